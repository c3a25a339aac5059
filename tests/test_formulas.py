"""Formulas are written so that GitHub shows them, and the site shows each as MathML."""

import doctest
import importlib.util
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.test_markdown import PAGES, ROOT, blocks

spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)

MATH = "{http://www.w3.org/1998/Math/MathML}"


def prose(text):
  """A page without its code."""
  code = {i for block in blocks(text) for i in block.lines}
  lines = [line for i, line in enumerate(text.splitlines(), 1) if i not in code]
  return re.sub(r"`[^`]+`", "", "\n".join(lines))


def inline(text):
  """The formulas between dollars, and the characters on both sides of each."""
  return re.findall(r"(^|.)\$([^$\n]+)\$(.|$)", prose(text), flags=re.MULTILINE)


def displayed(text):
  return ["\n".join(block.lines.values()) for block in blocks(text) if block.info == "math"]


FORMULAS = {
  (path.name, tex)
  for path in PAGES
  for text in [path.read_text(encoding="utf-8")]
  for tex in [*displayed(text), *(found[1] for found in inline(text))]
}


def test_the_examples_of_the_hooks():
  assert doctest.testmod(hooks) == (0, 3)


@pytest.mark.parametrize("page, tex", sorted(FORMULAS))
def test_a_formula_becomes_mathml(page, tex):
  made = ElementTree.fromstring(hooks.mathml(tex, inline=False))
  shown = "".join(made.itertext())
  assert made.tag == f"{MATH}math" and "\\" not in shown and "&" not in shown
  # Every number and name of the source is in what is shown.
  words = re.sub(r"\\(?:begin|end)\{[a-z*]+\}|\\[A-Za-z]+", r" ", tex)
  assert all(word in shown for word in re.findall(r"[A-Za-z]+|\d+(?:\.\d+)?", words))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_github_shows_the_formulas(path):
  text = path.read_text(encoding="utf-8")
  for before, tex, after in inline(text):
    # GitHub takes a dollar for one of mathematics between spaces and ASCII punctuation alone, and
    # Markdown reads what stands between two dollars before TeX does.
    assert before in ("", " ", "(") and (after in ("", " ") or after in ".,:;)"), tex
    assert not re.search(r"\\[^A-Za-z]|\*", tex), tex
  for tex in [*displayed(text), *(found[1] for found in inline(text))]:
    assert not re.search(r"\\(?:begin|end)\{(?!align\*\})|\\(?:operatorname|mbox|phantom)\b", tex)


@pytest.mark.parametrize("page", ["policy_gradient", "ppo", "dpo", "grpo", "kl", "entropy"])
@pytest.mark.parametrize("ending", [".md", ".ja.md"])
def test_a_lesson_has_its_formulas(page, ending):
  text = (ROOT / "docs" / "guide" / f"{page}{ending}").read_text(encoding="utf-8")
  assert displayed(text)


@pytest.mark.parametrize("tex", [r"\nosuch x", r"\begin{aligned} a &= b \end{aligned}"])
def test_what_has_no_mathml_is_an_error(tex):
  with pytest.raises(ValueError, match="no MathML"):
    hooks.mathml(tex, inline=True)


def test_what_tex_spaces_is_spaced():
  made = hooks.mathml(
    r"-p \log p - (1 - p) \log (1 - p) = \max(-a / b, \, -\mathrm{clip}(c))", inline=False
  )
  assert made.count(hooks._SPACE) == 3 and made.count('<mo form="prefix">−</mo>') == 2
  assert '<mo lspace="0" rspace="0">/</mo>' in made and made.count('class="name"') == 4


def test_formulas_that_github_would_not_show_are_found():
  assert [found[::2] for found in inline("は$x$。 a $y$, $z$\n`$no$`")] == [
    ("は", "。"),
    (" ", ","),
    (" ", ""),
  ]
