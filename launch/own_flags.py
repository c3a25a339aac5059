"""An experiment's own command line as a plan's: `--kl.coef=0.1` is the plan's `--kl_coef=0.1`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launch.plan_flags import Config
from launch.programs import ALIASES, EXPERIMENTS
from rl_llm.errors import UserError
from rl_llm.runs.config import flatten


def translated(argv: Sequence[str]) -> list[str]:
  """The command line in the plan's own flags; what a plan has no use for is said and left out.

  >>> translated(["plan", "--experiment=grpo", "--kl.coef=0.1", "--max_prompt_tokens=64"])[2:]
  ['--kl_coef=0.1', '--prompt_tokens=64']

  Args:
    argv: with the program's name first. `--flagfile=FILE` is read, such as a run's flags.txt. A
      flag that neither has is left for the parser to refuse.

  Raises:
    UserError: there is no such flagfile.
  """
  program, *words = argv
  flags = [flag for word in words for flag in _read(word)]
  named = [flag.partition("=")[2] for flag in flags if flag.startswith("--experiment=")]
  experiment = EXPERIMENTS.get(named[-1] if named else Config().experiment)
  own = set(flatten(experiment.Config())) if experiment else set()
  known, ours = set(flatten(Config())), {theirs: name for name, theirs in ALIASES.items()}
  found, unused = [program], []
  for flag in flags:
    name, equals, value = flag.removeprefix("--").partition("=")
    plain = name.removeprefix("no") if name.removeprefix("no") in own else name
    if name in known or plain in known or name not in own | {plain} or not flag.startswith("--"):
      found.append(flag)
    elif name in ours:
      found.append(f"--{ours[name]}{equals}{value}")
    elif plain in own:
      unused.append(plain)
    else:
      found.append(flag)
  if unused:
    more = f" and {len(unused) - 6} more" * (len(unused) > 6)
    said = ", ".join(f"--{name}" for name in unused[:6])
    print(f"of no use to a plan: {said}{more}", file=sys.stderr, flush=True)
  return found


def _read(word: str) -> list[str]:
  """A word of the command line; or the flags of the file that it names."""
  if not word.startswith("--flagfile="):
    return [word]
  path = Path(word.partition("=")[2])
  if not path.is_file():
    raise UserError(f"--flagfile={path}: no such file; give one of flags, as a run's flags.txt")
  lines = path.read_text(encoding="utf-8").splitlines()
  return [line for line in lines if line.strip() and not line.startswith("#")]
