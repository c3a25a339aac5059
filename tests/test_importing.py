"""The programs of docs/importing.md run as they stand and print what the page says."""

import pathlib
import re
import runpy

import pytest

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "importing.md"
PROGRAMS = re.findall(
  r"^```python\n# (\w+\.py)\n(.*?)^```\n\n^```\n(.*?)^```",
  PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_every_program_has_its_output():
  names = [name for name, _, _ in PROGRAMS]
  assert names == ["plain.py", "with_optax.py", "with_nnx.py"]


@pytest.mark.parametrize("name, program, printed", PROGRAMS, ids=[p[0] for p in PROGRAMS])
def test_a_program_prints_what_the_page_says(name, program, printed, tmp_path, capsys):
  (tmp_path / name).write_text(program)
  runpy.run_path(str(tmp_path / name))
  assert capsys.readouterr().out == printed
