"""The command line of `python -m rl_llm explain`: a topic, and a flag for each of its numbers."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rl_llm.errors import UserError
from rl_llm.explain import LANGUAGES, TOPICS, draw, render
from rl_llm.runs.keywords import described, settings


def add_topics(parser: argparse.ArgumentParser) -> None:
  """Adds a subcommand for each topic, with the flags that its signature and `Args:` give."""
  topics = parser.add_subparsers(dest="topic", metavar="TOPIC", required=True)
  for topic in TOPICS:
    said = (topic.__doc__ or "").partition("\n")[0]
    own = topics.add_parser(topic.__name__, help=said, description=said)
    for name, (kind, default) in settings(topic).items():
      shown = ",".join(f"{x:g}" for x in default) if isinstance(default, tuple) else default
      text = f"{described(topic, name)} (default {shown})"
      own.add_argument(f"--{name}", default=default, help=text, **_reader(kind))
    own.add_argument("--lang", choices=LANGUAGES, default="en", help="English or Japanese")
    own.add_argument("--plot", type=Path, metavar="FILE.svg", help="also draw the figure")
    own.set_defaults(explained=topic)


def explain(given: argparse.Namespace) -> int:
  """Prints the explanation that was asked for, and draws its figure; returns the exit code."""
  topic: Callable = given.explained
  try:
    explanation = topic(**{name: getattr(given, name) for name in settings(topic)})
    print(render(explanation, lang=given.lang))
    if given.plot:
      draw(explanation, given.plot, lang=given.lang)
      print(f"\nfigure: {given.plot}")
  except (UserError, ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def _reader(kind: Any) -> dict[str, Any]:
  """How argparse reads a value of this type."""
  if typing.get_origin(kind) is Literal:
    return {"choices": typing.get_args(kind)}
  if typing.get_origin(kind) is tuple:
    return {"type": _numbers, "metavar": "X,Y,..."}
  return {"type": float, "metavar": "X"}


def _numbers(text: str) -> tuple[float, ...]:
  try:
    return tuple(float(part) for part in text.split(","))
  except ValueError:
    said = f"{text!r} is not a list of numbers such as 1,0,0.5"
    raise argparse.ArgumentTypeError(said) from None
