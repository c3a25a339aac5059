"""An episode as a person reads it: who said what, what the tools answered, what is trained on.

A line of samples.jsonl that is an episode has "turns", a list with one object for each turn of the
model: its `text` and `tokens`, and unless the turn was cut off, what the environment said
(`observation`), its `status`, `calls` and `reward`, and how many tokens of it the model `read`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
import rich.text

from rl_llm.errors import UserError
from rl_llm.runs.console import TRAINED, UNTRAINED
from rl_llm.runs.formatting import number, printable
from rl_llm.runs.metrics import read

_STYLES = {"prompt": "", "model": TRAINED, "environment": UNTRAINED}


class Part(NamedTuple):
  """What one side said.

  Attributes:
    who: "prompt", "model" or "environment".
    text: what it said.
    note: its tokens, and what else there is to say of it.
    trained: whether its tokens are trained on.
  """

  who: str
  text: str
  note: str
  trained: bool


def is_episode(row: Mapping[str, Any]) -> bool:
  """Whether a line of samples.jsonl has turns."""
  return isinstance(row.get("turns"), Sequence) and bool(row["turns"])


def parts(row: Mapping[str, Any]) -> list[Part]:
  """An episode's prompt, and then the turns of both sides.

  >>> turn = {"text": "call inc: 1", "tokens": 5, "observation": "2", "read": 9, "status": "ok"}
  >>> row = {"prompt": "1+1?", "turns": [turn, {"text": "2", "tokens": 2}]}
  >>> [(part.who, part.text, part.note) for part in parts(row)][1:]
  [('model', 'call inc: 1', '5 tokens'), ('environment', '2', '9 tokens'), ('model', '2', '2 tokens, cut off')]

  Args:
    row: a line of samples.jsonl.
  """  # noqa: E501
  trained = row.get("split") != "eval"
  found = [Part("prompt", str(row.get("prompt", "")), "", False)]
  for turn in row["turns"]:
    cut = "" if "observation" in turn else ", cut off"
    found.append(Part("model", str(turn["text"]), _tokens(turn.get("tokens")) + cut, trained))
    if turn.get("observation"):
      found.append(Part("environment", str(turn["observation"]), _note(turn), False))
  return found


def _note(turn: Mapping[str, Any]) -> str:
  """What there is to say of an observation."""
  said = [_tokens(turn.get("read"))] if turn.get("read") else ["the episode ends here, unread"]
  if turn.get("status", "ok") != "ok":
    said.append(str(turn["status"]).replace("_", " "))
  if turn.get("reward") is not None:
    said.append(f"reward {number(turn['reward'])}")
  return ", ".join(said)


def _tokens(count: Any) -> str:
  return f"{count} token{'s' * (count != 1)}"


def show(row: Mapping[str, Any]) -> rich.text.Text:
  """A whole episode for the terminal: what is trained on is green, what is not is cyan."""
  text = rich.text.Text()
  for part in parts(row):
    note = f" ({part.note})" if part.note else ""
    trained = ", trained on" if part.trained else ""
    text.append(f"{part.who}{note}{trained}\n", "bold")
    text.append(f"{printable(part.text, keep_newlines=True)}\n\n", _STYLES[part.who])
  reward = row.get("reward")
  ends = f"reward {number(reward)}" if reward is not None else str(row.get("status", "-"))
  if row.get("advantage") is not None:
    ends += f", advantage {number(row['advantage'])}"
  text.append(f"{ends}\n", "bold")
  return text


def find(run: Path, *, step: int | None = None, count: int = 1) -> Mapping[str, Any]:
  """One episode of a run's samples.jsonl.

  Args:
    run: its directory.
    step: of which; None: the last that has any.
    count: the how manieth of that step, from 1.

  Raises:
    UserError: there is none; the message says where to look.
  """
  path = run / "samples.jsonl"
  if not path.exists():
    raise UserError(f"{run}: no samples.jsonl in it; give a run's directory")
  rows = [row for row in read(path) if is_episode(row)]
  if not rows:
    raise UserError(f"{run}: no episode in its samples.jsonl; train with --env=calculator")
  steps = sorted({row["step"] for row in rows})
  wanted = steps[-1] if step is None else step
  found = [row for row in rows if row["step"] == wanted]
  if not found:
    nearest = min(steps, key=lambda step: abs(step - wanted))
    raise UserError(f"--step={wanted}: no episode of that step; the nearest is --step={nearest}")
  if not 1 <= count <= len(found):
    raise UserError(f"--count={count}: must be 1 to {len(found)}, the episodes of step {wanted}")
  return found[count - 1]


def add_episode(parser: argparse.ArgumentParser) -> None:
  """The arguments of `python -m rl_llm episode`."""
  parser.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
  parser.add_argument("--step", type=int, help="the step to show; by default the last on record")
  parser.add_argument(
    "--count", type=int, default=1, help="which of the step's episodes, from 1 on"
  )


def show_episode(given: argparse.Namespace) -> None:
  """Prints an episode, in colours on a terminal.

  Raises:
    UserError: there is no such episode.
  """
  row = find(given.run, step=given.step, count=given.count)
  console = rich.console.Console(markup=False, highlight=False, emoji=False)
  console.print(f"step {row['step']}", show(row), sep="\n", soft_wrap=True, end="")
