"""The programs of docs/importing.md, each with what it prints; test_wheel.py runs them."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "importing.md"
PROGRAMS = re.findall(
  r"^```python\n# (\w+\.py)\n(.*?)^```\n\n^```\n(.*?)^```",
  PAGE.read_text(encoding="utf-8"),
  flags=re.MULTILINE | re.DOTALL,
)


def test_every_program_has_its_output():
  names = [name for name, _, _ in PROGRAMS]
  assert names == ["plain.py", "with_optax.py", "with_nnx.py"]
