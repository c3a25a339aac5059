"""The pages as GitHub and PyPI render them: examples are code, and nothing is lost on the way.

tests/test_docs.py and tests/test_importing.py run the examples.
"""

import collections
import functools
import pathlib
import re
import subprocess
import urllib.parse
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).parent.parent
DIRECTORIES = ("rl_llm", "experiments", "launch", "benchmarks", "tests", "docs")
PAGES = sorted([*ROOT.glob("*.md"), *(p for d in DIRECTORIES for p in (ROOT / d).rglob("*.md"))])
COLUMNS = 88  # of a line of code, at most
# How a command begins, perhaps behind variables: it has to stand in a ```sh fence.
COMMAND = r"(?:\w+=\S+ )*(?:make|sh|bash|cd|git|(?:\S*/)?(?:python3?|pip)) "


class Block(NamedTuple):
  """A fence or an indented block of code.

  Fields:
    info: what follows the backquotes of a fence; None: an indented block.
    lines: number in the page, counted from 1, -> text.
    heading: the one that it stands under.
  """

  info: str | None
  lines: dict[int, str]
  heading: str


@functools.cache
def parse(text):
  return MarkdownIt("commonmark").enable("table").parse(text)


def blocks(text):
  heading, found = "", []
  tokens = parse(text)
  for token, following in zip(tokens, [*tokens[1:], None], strict=True):
    if token.type == "heading_open":
      heading = following.content
    elif token.type in ("fence", "code_block"):
      fence = token.type == "fence"
      lines = dict(enumerate(token.content.splitlines(), token.map[0] + 1 + fence))
      found.append(Block(token.info.strip() if fence else None, lines, heading))
  return found


def examples_outside(text):
  """Numbers of the lines with an example that do not lie in a ```pycon fence."""
  inside = {i for block in blocks(text) if block.info == "pycon" for i in block.lines}
  lines = enumerate(text.splitlines(), 1)
  return [i for i, line in lines if re.match(r"[^\w`]*>>>", line) and i not in inside]


def long_lines(text):
  """Numbers of the lines of code over COLUMNS, but for what a program printed.

  That is everything in a ```console fence except its commands, which follow a `$`.
  """
  return [
    i
    for block in blocks(text)
    for i, line in block.lines.items()
    if len(line) > COLUMNS and (block.info != "console" or line.startswith("$ "))
  ]


def shell_faults(text):
  """Numbers of the lines with a command outside a fence of the shell, or broken without a `\\`."""
  faults = []
  for block in blocks(text):
    if block.info == "sh":
      continues = False
      for i, line in block.lines.items():
        if line.startswith(" ") != continues or re.search(r"\\\s|^\$ ", line):
          faults.append(i)
        continues = line.endswith("\\")
      faults += [i] * continues
    elif block.info not in ("console", "python", "pycon"):
      faults += [i for i, line in block.lines.items() if re.match(COMMAND, line + " ")]
  return faults


def anchors(text):
  """What `#...` may name: the headings, as GitHub turns them into anchors."""
  found, times = set(), collections.Counter()
  tokens = parse(text)
  for token, following in zip(tokens, tokens[1:], strict=False):
    if token.type == "heading_open":
      shown = "".join(each.content for each in following.children)
      anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
      found.add(f"{anchor}-{times[anchor]}" if times[anchor] else anchor)
      times[anchor] += 1
  return found


def targets(text):
  """The addresses of a page's links and images."""
  inline = [child for token in parse(text) for child in token.children or []]
  found = [child.attrs.get("href") or child.attrs.get("src") for child in inline]
  return [address for address in found if address]


def broken_links(path):
  broken = []
  for address in targets(path.read_text(encoding="utf-8")):
    parts = urllib.parse.urlsplit(address)
    target = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
    if not parts.scheme and (
      not target.exists()
      or parts.fragment
      and urllib.parse.unquote(parts.fragment) not in anchors(target.read_text(encoding="utf-8"))
    ):
      broken.append(address)
  return broken


# A fold, which GitHub and the site both render.
FOLD = re.compile(r'<details markdown="1"><summary>[^<>]+</summary>\n?|</details>\n?')


def lost(text):
  """Lines that a renderer takes for a quotation, for HTML, or for a row of more or fewer cells."""
  source, faults = text.splitlines(), []
  for token in parse(text):
    inline = [child.type for child in token.children or []]
    html = token.type == "html_block" and not token.content.startswith("<!--")
    html = html and not FOLD.fullmatch(token.content)
    if token.type == "blockquote_open" or html or "html_inline" in inline:
      faults.append(token.map[0] + 1)
    elif token.type == "table_open":
      cells = {i + 1: len(re.findall(r"(?<!\\)\|", source[i])) for i in range(*token.map)}
      faults += [i for i, count in cells.items() if count != cells[token.map[0] + 1]]
  return faults


@pytest.fixture(params=PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def page(request):
  return request.param


def test_every_example_is_code(page):
  text = page.read_text(encoding="utf-8")
  assert examples_outside(text) == []
  fences = [block for block in blocks(text) if block.info == "pycon"]
  assert all(next(iter(block.lines.values())).startswith(">>> ") for block in fences)


def test_no_line_of_code_is_too_long(page):
  # The source tree is a list in two columns, not code.
  text = page.read_text(encoding="utf-8")
  tree = {i for block in blocks(text) if block.heading == "Source tree" for i in block.lines}
  assert [i for i in long_lines(text) if i not in tree] == []


def test_commands_can_be_pasted(page):
  text = page.read_text(encoding="utf-8")
  assert shell_faults(text) == []
  lines = [line for block in blocks(text) if block.info == "sh" for line in block.lines.values()]
  subprocess.run(["sh", "-n"], input="\n".join(lines), text=True, check=True)


def test_no_link_is_broken(page):
  assert broken_links(page) == []


def test_nothing_is_lost(page):
  assert lost(page.read_text(encoding="utf-8")) == []


def test_examples_anywhere_but_in_their_fence_are_found():
  assert examples_outside("```pycon\n>>> 1\n1\n```\n\nThe lines after `>>>` run.") == []
  assert examples_outside(">>> 1\n1\n\n    >>> 2\n\n- >>> 3\n") == [1, 4, 6]
  assert examples_outside("```\n>>> 1\n```\n\n```python\n>>> 2\n```\n") == [2, 6]
  assert examples_outside("```pycon\n>>> 1\n```\n>>> 2\n```\n>>> 3\n```\n") == [4, 6]


def test_long_lines_are_found():
  page = "prose of any length {0}{0}\n\n    {0}\n\n```sh\n\n{0}\n```\n\n- a\n\n      {0}\n"
  line = "x" * COLUMNS
  assert long_lines(page.format(line)) == []
  assert long_lines(page.format(line + "x")) == [3, 7, 12]
  assert long_lines(f"```console\n$ {line}\n{line}x\n```\n") == [2]


def test_commands_that_cannot_be_pasted_are_found():
  assert shell_faults("```sh\n# one\nA=1 python a.py \\\n  --b\nmake\n```\n\n    a = 1\n") == []
  assert shell_faults("a\n\n    make\n\n    .venv/bin/python -m a\n    X=1 python b\n") == [3, 5, 6]
  assert shell_faults("```sh\npython a.py\n  --b\n$ make\n```\n\n```bash\nmake\n```\n") == [3, 4, 8]
  assert shell_faults("```sh\npython a.py \\ \n  --b \\\n```\n") == [2, 3, 3]
  assert shell_faults("```sh\npython a.py \\\n--b\n```\n") == [3]


def test_links_that_lead_nowhere_are_found(tmp_path):
  (tmp_path / "b.md").write_text("# What it `says`, twice\n" + 2 * "# What it says, twice\n")
  page = tmp_path / "a.md"
  page.write_text(
    "# A\n[1](#a) [2](#b) [3](b.md) ![4](c.svg) [5](b.md#what-it-says-twice-2) [6](b.md#a)\n"
    "[7](https://example.com/c.md#x) `[8](d.md)` [9][] <https://example.com>\n\n[9]: e.md\n"
  )
  assert broken_links(page) == ["#b", "c.svg", "b.md#a", "e.md"]


def test_what_a_renderer_loses_is_found():
  fold = '<details markdown="1"><summary>Answer</summary>\n\nYes.\n\n{}\n'
  assert lost(fold.format("</details>")) == [] and lost(fold.format("</div>")) == [5]
  assert lost("a `<b>` < c\n\n<!-- d -->\n\n| a | b |\n|---|---|\n| `c` | \\|d\\| |\n") == []
  table = "| a | b |\n|---|---|\n"
  assert lost(f"> a\n\nruns/<name> b\n\n<div>\n\n{table}| `c|d` | e |\n") == [1, 3, 5, 9]
