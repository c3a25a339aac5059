"""Successive halving: all settings for a few steps, the best of them for more, and so on.

Most settings of a sweep are bad, and most of the bad ones show it early. With 27 settings, budgets
of 10, 30 and 90 steps, and one in three kept, 27 * 10 + 9 * 20 + 3 * 60 = 630 steps are taken
instead of 27 * 90 = 2,430: a trial that is kept resumes from its checkpoint, under the same name.

A common misconception is that this finds what a full grid would. It finds what is best *early*: a
high learning rate wins the first rung and may lose the last. The first budget should lie past the
point where the curves of good and bad settings have crossed; the report shows where that is.

A trial can only be resumed with a larger budget if nothing in it depends on the budget, so the
learning rate must not decay towards the last step: with `--optimizer.schedule=constant` the number
of steps is not part of a trial's identity.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch import state
from launch.sweep import SweepError, Trial, plan
from rl_llm.errors import ConfigError
from rl_llm.runs.config import option
from rl_llm.runs.report_page import finite


@dataclasses.dataclass(frozen=True)
class Halving:
  """Successive halving."""

  steps: tuple[int, ...] = option((), "steps after which settings are compared, rising; empty = no")
  keep: int = option(3, "one setting in this many continues", min=2)
  metric: str = option("eval/sampled_accuracy", "the metric that compares trials after those steps")
  lowest: bool = option(False, "the lowest is best, as of a loss")


def survivors(scores: Mapping[str, float | None], groups: Mapping[str, str], keep: int) -> set[str]:
  """The trials that are kept: those of the best ceil(n / keep) of n settings.

  A setting's score is the mean over its seeds; in a tie the first is kept. A setting with a seed
  that failed is never kept, whatever the other seeds' scores.

  >>> scores = {"a": 0.1, "b": 0.5, "c": 0.4, "d": 0.4, "e": 0.9, "f": None}
  >>> groups = {"a": "x", "b": "x", "c": "y", "d": "y", "e": "z", "f": "z"}
  >>> sorted(survivors(scores, groups, 2))
  ['a', 'b', 'c', 'd']

  Args:
    scores: of each trial, higher is better; None: it failed.
    groups: the setting that each belongs to; trials of one setting differ only in the seed.
    keep: one setting in this many is kept.
  """
  members: dict[str, list[float | None]] = {}
  for trial, group in groups.items():
    members.setdefault(group, []).append(scores[trial])
  means = {group: statistics.fmean(x) for group, x in members.items() if None not in x}
  count = math.ceil(len(members) / keep)
  best = sorted(means, key=means.__getitem__, reverse=True)[:count]
  return {trial for trial, group in groups.items() if group in best}


def with_steps(trials: Sequence[Trial], steps: int) -> list[Trial]:
  """The same trials with another budget.

  Raises:
    SweepError: they would be others.
  """
  settings = [trial.settings | {"steps": steps} for trial in trials]
  found = plan(trials[0].experiment, settings, where=f"--halving.steps={steps}")
  if [trial.id for trial in found] != [trial.id for trial in trials]:
    raise SweepError(
      f"--halving.steps={steps}: another number of steps makes other trials of these; "
      "--optimizer.schedule=constant lets them continue"
    )
  return [new._replace(order=old.order) for new, old in zip(found, trials, strict=True)]


def check(options: Halving) -> None:
  """Refuses budgets that do not rise."""
  steps = options.steps
  if any(a >= b for a, b in zip((0, *steps), steps, strict=False)):
    raise ConfigError("halving.steps", ",".join(map(str, steps)), "rising, such as 10,30,90")


def run_rungs(
  options: Halving,
  workdir: Path,
  trials: Sequence[Trial],
  run: Callable[[list[Trial]], dict[str, str]],
) -> dict[str, str]:
  """Runs the trials to the first budget, the best of them to the second, and so on.

  A rung's result is written to WORKDIR/halving.json once it is complete, and is not computed again:
  the same command resumes where it stopped.

  Args:
    options: the budgets.
    workdir: the sweep's.
    trials: all of them.
    run: runs trials to their budgets, and says what became of each.

  Returns:
    What became of each trial in the last rung that it was in.

  Raises:
    SweepError: see `with_steps`; or a result has no such metric, or is one of more steps.
  """
  path = workdir / "halving.json"
  verdicts: dict[str, str] = {}
  for rung, steps in enumerate(options.steps):
    now = with_steps(trials, steps)
    known = state.read_json(path)  # Read again: another launcher may have got further.
    key = f"{steps} steps by {options.metric}, 1 in {options.keep}"
    scores = known.get(key)
    if scores is None or set(scores) != {trial.id for trial in now}:
      verdicts |= run(now)
      if any(verdicts[trial.id] not in ("done", "failed") for trial in now):
        return verdicts  # Somebody else has them, or has stopped them.
      scores = {
        trial.id: score(workdir / trial.id, trial, options.metric, flag="halving.metric")
        for trial in now
      }
      state.write_json(path, known | {key: scores})
    else:
      verdicts |= {id: "failed" if found is None else "done" for id, found in scores.items()}
    if rung + 1 < len(options.steps):
      signs = {id: None if x is None else -x if options.lowest else x for id, x in scores.items()}
      groups = {trial.id: setting(trial) for trial in now}
      stay = survivors(signs, groups, options.keep)
      trials = [trial for trial in now if trial.id in stay]
      print(f"{steps} steps: {len(trials)} of {len(now)} trials continue", flush=True)
      if not trials:
        break
  return verdicts


def setting(trial: Trial) -> str:
  """What a trial shares with those of other seeds."""
  ignored = ("seed", "workdir", "steps")
  return json.dumps({k: v for k, v in trial.config.items() if k not in ignored}, sort_keys=True)


def score(directory: Path, trial: Trial, metric: str, *, flag: str) -> float | None:
  """The metric of a trial that has reached its budget; None if it has not, or it is not finite.

  Raises:
    SweepError: the result has no such metric, as `flag` names it, or is one of more steps.
  """
  if not state.is_done(directory, trial.steps):
    return None
  result = state.read_json(directory / "result.json")
  after = result.get("after", {})
  if result.get("steps") != trial.steps:
    raise SweepError(
      f"{directory} has gone on to {result.get('steps')} steps, which cannot be compared with "
      f"{trial.steps}; another --workdir begins anew"
    )
  if metric not in after:
    found = ", ".join(after) or "no evaluation"
    raise SweepError(f"--{flag}={metric}: {directory / 'result.json'} has {found}")
  return finite(after[metric])
