"""The known results of a sweep's trials: a row for each, and a group for each setting."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import state
from launch.progress import FIGURES
from launch.sweep import varying
from rl_llm.errors import ConfigError
from rl_llm.runs.formatting import number, printable
from rl_llm.runs.metrics import RecordError, read
from rl_llm.runs.report_page import finite

# Student's t, two-sided 95 %, by degrees of freedom; beyond them 1.96 is near enough.
_T = (
  12.706,
  4.303,
  3.182,
  2.776,
  2.571,
  2.447,
  2.365,
  2.306,
  2.262,
  2.228,
  2.201,
  2.179,
  2.160,
  2.145,
  2.131,
  2.120,
  2.110,
  2.101,
  2.093,
  2.086,
  2.080,
  2.074,
  2.069,
  2.064,
  2.060,
  2.056,
  2.052,
  2.048,
  2.045,
  2.042,
)


class Row(NamedTuple):
  """What is known of one trial."""

  id: str
  directory: Path
  config: Mapping[str, Any]
  status: str
  step: int | None
  steps: int
  seconds: float  # of its processes, over all starts
  value: float | None  # of the metric, the newest
  curve: list[tuple[int, float]]
  error: list[str]
  own_half: float | None = None  # of the newest evaluation's own 95 % interval
  reward: float | None = None  # the newest mean reward, which breaks ties


class Group(NamedTuple):
  """Trials that differ in their seed alone."""

  settings: dict[str, Any]
  rows: list[Row]
  mean: float | None
  half: float | None  # of the 95 % interval


# What is read of a trial's files.
_KINDS = {
  "trial.json": {"id": str, "order": int, "steps": int, "config": dict},
  "status.json": {
    "status": str,
    "seconds": (int, float),
    "failures": int,
    "reason": str,
    "lines": list,
  },
  "result.json": {"steps": int, "after": dict},
}


def read_known(path: Path) -> dict[str, Any]:
  """`state.read_json` of one of a trial's files.

  Raises:
    RecordError: a value in it has a type that the launcher does not write.
  """
  values = state.read_json(path)
  for key, kind in _KINDS[path.name].items():
    if key in values and not isinstance(values[key], kind):
      shown = json.dumps(values[key])
      raise RecordError(f"{path}: {key}={shown:.40} cannot be used; move the file away")
  return values


class Trials(NamedTuple):
  """All that is on disk of a sweep: what the launcher wrote of each trial, and their records."""

  found: list[dict[str, Any]]  # of trial.json, with "path", in the order of the sweep
  records: dict[str, list[dict[str, Any]]]  # id -> rows of metrics.jsonl

  def metrics(self) -> list[str]:
    """The figures on record by which trials can be compared, the best suited first."""
    keys = {key for rows in self.records.values() for row in rows for key in row}
    return [key for key in FIGURES if key in keys]


def read_trials(workdir: Path) -> Trials:
  """Reads the trials of a sweep's directory.

  Raises:
    ConfigError: there are no trials.
    RecordError: a trial's file is broken; the message names it.
  """
  found = [read_known(path) | {"path": path} for path in workdir.glob("*/trial.json")]
  if not found:
    raise ConfigError("workdir", workdir, "a directory in which launch.run has run a sweep")
  for trial in found:
    if "id" not in trial:
      raise RecordError(
        f"{trial['path']}: broken; the launch.run command that began the sweep "
        "writes it anew, or move the trial's directory away"
      )
  found.sort(key=lambda trial: (trial.get("order", 0), trial["id"]))
  records = {}
  for trial in found:
    metrics = trial["path"].parent / "metrics.jsonl"
    records[trial["id"]] = read(metrics) if metrics.exists() else []
  return Trials(found, records)


def checked_metric(trials: Trials, metric: str) -> str:
  """The metric that was asked for, or else the best suited one.

  Raises:
    ConfigError: no trial has it on record.
  """
  keys = {key for rows in trials.records.values() for row in rows for key in row}
  if metric and keys and metric not in keys:
    raise ConfigError("metric", metric, f"one of {', '.join(sorted(keys - {'step'}))}")
  return metric or next(iter(trials.metrics()), FIGURES[0])


def rows_of(trials: Trials, metric: str) -> list[Row]:
  """What is known of every trial by this metric, in the order of the sweep.

  Raises:
    RecordError: a trial's file is broken; the message names it.
  """
  return [_row(trial, trials.records[trial["id"]], metric) for trial in trials.found]


def _row(trial: Mapping[str, Any], record: Sequence[Mapping[str, Any]], metric: str) -> Row:
  directory, steps = trial["path"].parent, trial.get("steps", 0)
  status = read_known(directory / "status.json")
  after = read_known(directory / "result.json").get("after", {})
  word = state.where(directory, steps, status)
  curve = [(row["step"], value) for row in record if (value := finite(row.get(metric))) is not None]
  result = finite(after.get(metric))
  failed = [status.get("reason", ""), *map(str, status.get("lines", []))]
  rewards = [value for row in record if (value := finite(row.get("reward_mean"))) is not None]
  return Row(
    trial["id"],
    directory,
    trial.get("config", {}),
    word,
    record[-1]["step"] if record else None,
    steps,
    status.get("seconds", 0.0),
    result if word == "done" and result is not None else curve[-1][1] if curve else None,
    curve,
    failed if word != "done" and status.get("failures") else [],
    _own_half([*record, after], metric),
    rewards[-1] if rewards else None,
  )


def _own_half(record: Sequence[Mapping[str, Any]], metric: str) -> float | None:
  """Half the width of the newest interval that an evaluation gave for an accuracy."""
  if not metric.endswith("_accuracy"):
    return None
  for row in reversed(record):
    low, high = (finite(row.get(metric.replace("accuracy", end))) for end in ("low", "high"))
    if low is not None and high is not None:
      return (high - low) / 2
  return None


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
  """Mean, and half the width of its 95 % interval by Student's t; none of one value.

  Of 0.1, 0.2 and 0.3: s = 0.1, t = 4.303 with two degrees of freedom, 4.303 * 0.1 / sqrt(3).

  >>> [round(x, 3) for x in interval([0.1, 0.2, 0.3])]
  [0.2, 0.248]
  """
  if len(values) < 2:
    return (values[0] if values else None), None
  t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.96
  return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def grouped(rows: Sequence[Row], metric: str) -> tuple[list[str], list[Group]]:
  """The settings that vary, and the trials by them: the best first, those without a value last.

  Where two are as good, the one with more reward comes first.
  """
  paths = [path for path in varying([row.config for row in rows]) if path != "seed"]
  by_settings: dict[str, list[Row]] = {}
  for row in rows:
    by_settings.setdefault(repr([row.config.get(path) for path in paths]), []).append(row)
  groups = [
    Group({path: members[0].config.get(path) for path in paths}, members, *honest(members))
    for members in by_settings.values()
  ]
  sign = 1 if metric.endswith("loss") else -1

  def rank(group: Group) -> tuple[bool, float, float]:
    rewards = [row.reward for row in group.rows if row.reward is not None]
    reward = statistics.fmean(rewards) if rewards else 0.0
    return group.mean is None, sign * (group.mean or 0.0), -reward

  return paths, sorted(groups, key=rank)


def honest(rows: Sequence[Row]) -> tuple[float | None, float | None]:
  """The mean over seeds, and half the width of an interval that few seeds cannot make too narrow.

  Seeds share their held-out problems. Two seeds with 18 of 20 right have no spread, and yet another
  20 problems would give another figure. So the interval is at least as wide as those of single
  evaluations are on average. If these are not known, seeds without spread give no interval.
  """
  known = [row for row in rows if row.value is not None]
  mean, half = interval([row.value for row in known])
  own = [row.own_half for row in known if row.own_half is not None]
  widest = max(half or 0.0, statistics.fmean(own) if own else 0.0)
  return mean, widest or None


def shown(value: Any) -> str:
  """A setting as its flag has it."""
  if isinstance(value, bool) or value is None:
    return "none" if value is None else str(value).lower()
  if isinstance(value, list):
    return ",".join(map(shown, value))
  return number(value, 4) if isinstance(value, float) else printable(str(value), limit=40)
