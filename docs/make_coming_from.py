"""Fills the table of docs/coming_from.md from `rl_llm.runs.peer_names`: `make docs`."""

from __future__ import annotations

import pathlib

from rl_llm.runs.peer_names import KNOWN, Known

PAGE = pathlib.Path(__file__).parent / "coming_from.md"
BEGIN, END = "<!-- begin -->\n", "<!-- end -->\n"


def table() -> str:
  """A line for each flag that other systems have under another name."""

  def line(known: Known) -> str:
    ours = ["--" + flag for flag in known.ours]
    cells = [ours, known.trl, known.verl, known.openrlhf]
    shown = [", ".join(f"`{name}`" for name in names) for names in cells]
    return f"| {known.what} | " + " | ".join(shown) + " |\n"

  head = "| | here | TRL | verl | OpenRLHF |\n|---|---|---|---|---|\n"
  return head + "".join(map(line, KNOWN))


def filled(page: str) -> str:
  """The page with its table made anew."""
  before, rest = page.split(BEGIN)
  return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
  PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
