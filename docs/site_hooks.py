"""Hooks of mkdocs.yml: lines of Japanese join without a space, and formulas become MathML.

Browsers draw MathML by themselves, so a page shows its formulas without a script or a network. The
site has a font for them, STIX Two Math, which the package ziamath carries.

>>> on_page_markdown("報酬は、\\n微分されない。\\n\\nlog p\\nand")
'報酬は、微分されない。\\n\\nlog p\\nand'
>>> formula = '<span class="arithmatex">\\\\(\\\\log p\\\\)</span>'
>>> on_page_content(formula).partition("<mrow>")[2]
'<mi class="name">log</mi><mspace width="0.167em"/><mi>p</mi></mrow></math>'
"""

import html as entities
import importlib.util
import pathlib
import re
import shutil

from latex2mathml.converter import convert
from mkdocs.utils import get_relative_url

WIDE = r"[\u3000-\u9fff\uff00-\uffef]"
FONT = "STIXTwoMath-Regular.ttf"
CALCULATOR = [f"guide/calculator/{name}.js" for name in ("tokens", "outcomes", "form")]
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
# What TeX spaces and the converter does not: names of functions, a minus that is a sign, a slash.
_NAME = r'<mi class="name">[A-Za-z]+</mi>'
_UPRIGHT = re.compile(r'<mrow>((?:<mi mathvariant="normal">[A-Za-z]</mi>){2,})</mrow>')
_SPACE = '<mspace width="0.167em"/>'
_SIGN = re.compile(r"(<mo[^>]*>[=(,[{|∑∇·]</mo>(?:<mspace[^>]*>)?)<mo>(−|∇)</mo>")


def on_page_markdown(markdown: str, **_) -> str:
  """Joins two lines where both sides of the break are Japanese.

  The space that GitHub needs between a formula and Japanese punctuation goes, too.
  """
  joined = re.sub(rf"(?<={WIDE})\n(?={WIDE})", "", markdown)
  return re.sub(r"(?<=[、。（「]) (?=\$)|(?<=\$) (?=[、。）」])", "", joined)


def on_page_content(html: str, page=None, **_) -> str:
  """Turns what pymdownx.arithmatex marked as TeX into MathML, and a comment into the calculator."""
  if "<!-- calculator -->" in html:
    addresses = [get_relative_url(path, page.url) for path in CALCULATOR]
    scripts = "".join(f'<script src="{address}"></script>' for address in addresses)
    html = html.replace("<!-- calculator -->", f'<div id="calculator"></div>{scripts}')
  return _FORMULA.sub(lambda found: mathml(found[2], inline=found[1] == "span"), html)


def on_post_build(config, **_) -> None:
  """Puts the font of the formulas next to site.css, which names it."""
  (package,) = importlib.util.find_spec("ziamath").submodule_search_locations
  shutil.copy(pathlib.Path(package) / "fonts" / FONT, pathlib.Path(config.site_dir) / FONT)


def mathml(tex: str, *, inline: bool) -> str:
  """A formula as MathML.

  Args:
    tex: the formula, perhaps with HTML's entities.
    inline: whether it stands within a line of text.

  Raises:
    ValueError: the converter does not know a command, or an alignment has no environment.
  """
  tex = entities.unescape(tex).strip()
  made = convert(tex, display="inline" if inline else "block")
  made = re.sub(r"&#x0*([0-9A-Fa-f]+);", _character, made)
  if re.search(r">(?:\\[^<]*|&|&amp;)<", made):
    raise ValueError(f"this formula has a command that has no MathML: {tex}")
  made = _UPRIGHT.sub(lambda found: f"<mi>{re.sub('<[^>]+>', '', found[1])}</mi>", made)
  made = re.sub(r"<m[io]>([A-Za-z]{2,})</m[io]>", r'<mi class="name">\1</mi>', made)
  made = re.sub(rf"(</(?:mi|mn|msub|msup|mfrac)>|\)</mo>)(?={_NAME})", rf"\1{_SPACE}", made)
  made = re.sub(rf"({_NAME})(?=<m(?:i|n|sub|sup|frac|row)\b)", rf"\1{_SPACE}", made)
  made = made.replace("<mo>/</mo>", '<mo lspace="0" rspace="0">/</mo>')
  return _SIGN.sub(r'\1<mo form="prefix">\2</mo>', made)


def _character(found: re.Match) -> str:
  return entities.escape(chr(int(found[1], 16)), quote=False)
