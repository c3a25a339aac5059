"""A hook of mkdocs.yml: Japanese has no spaces between words, so a line break must not become one.

>>> on_page_markdown("報酬は、\\n微分されない。\\n\\nlog p\\nand")
'報酬は、微分されない。\\n\\nlog p\\nand'
"""

import re

WIDE = r"[\u3000-\u9fff\uff00-\uffef]"


def on_page_markdown(markdown: str, **_) -> str:
  """Joins two lines where both sides of the break are Japanese."""
  return re.sub(rf"(?<={WIDE})\n(?={WIDE})", "", markdown)
