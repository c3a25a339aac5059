"""`python -m rl_llm`: what there is to run, the reports of runs, and worked examples.

python -m rl_llm                   the commands
python -m rl_llm report RUN        writes RUN/report.html anew, also while the run is in progress
python -m rl_llm report RUN RUN    also compares the runs on one page
python -m rl_llm episode RUN       shows an episode of a run with tools, turn by turn
python -m rl_llm demonstrations    plays an environment, as data for experiments.sft
python -m rl_llm explain TOPIC     works through a loss or an estimator, in English or Japanese
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import rl_llm
from rl_llm.errors import UserError
from rl_llm.explain.command import add_topics, explain
from rl_llm.runs.comparison import write_comparison
from rl_llm.runs.report import is_live, write_report
from rl_llm.runs.transcripts import add_episode, show_episode
from rl_llm.tasks.environments.demonstrations import add_demonstrations, write_demonstrations

PACKAGES = ("experiments", "launch", "benchmarks")


def commands(package: str) -> Iterator[tuple[str, str]]:
  """(command, first line of its help) of each module that can be run; nothing outside a clone."""
  spec = importlib.util.find_spec(package)
  for path in sorted(Path(spec.origin).parent.glob("*.py")) if spec and spec.origin else ():
    text = path.read_text(encoding="utf-8")
    if '\nif __name__ == "__main__":' in text:
      said = ast.get_docstring(ast.parse(text)) or ""
      yield f"python -m {package}.{path.stem}", said.partition("\n")[0]


def overview() -> str:
  """The commands, a line each."""
  lines = [f"rl_llm {rl_llm.__version__}: reinforcement learning for language models in JAX", ""]
  found = [
    ("python -m rl_llm report RUN ...", "Writes the reports of runs, and compares them."),
    ("python -m rl_llm episode RUN", "Shows an episode of a run with tools, turn by turn."),
    ("python -m rl_llm demonstrations", "Plays an environment, as data for experiments.sft."),
    ("python -m rl_llm explain TOPIC", "Works through a loss or an estimator, line by line."),
  ]
  own = len(found)
  found += [command for package in PACKAGES for command in commands(package)]
  width = max(len(command) for command, _ in found)
  lines += [f"  {command:{width}}  {said}" for command, said in found]
  if len(found) == own:
    lines += ["", "The experiments and the launcher run from a clone of the repository."]
  return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
  """Runs the command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m rl_llm",
    description=overview(),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--version", action="version", version=rl_llm.__version__)
  subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
  report = subparsers.add_parser(
    "report", help="write RUN/report.html anew; of several runs, also a page that compares them"
  )
  report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory")
  report.add_argument(
    "--output",
    type=Path,
    metavar="FILE",
    help="the page that compares runs; by default comparison.html in the directory that holds them",
  )
  add_episode(
    subparsers.add_parser("episode", help="show an episode of a run with tools, turn by turn")
  )
  add_demonstrations(
    subparsers.add_parser("demonstrations", help="play an environment, as data for experiments.sft")
  )
  add_topics(subparsers.add_parser("explain", help="work through a loss or an estimator"))
  given = parser.parse_args(arguments)
  if given.command is None:
    print(overview())
    return 0
  if given.command == "explain":
    return explain(given)
  try:
    if given.command == "episode":
      show_episode(given)
      return 0
    if given.command == "demonstrations":
      print(write_demonstrations(given))
      return 0
    for run in given.runs:
      print(f"report: {write_report(run, live=is_live(run))}")
    if len(given.runs) > 1:
      print(f"comparison: {write_comparison(given.runs, given.output)}")
    elif given.output:
      raise UserError("an output file is for a page that compares runs: give several")
  except (UserError, OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
