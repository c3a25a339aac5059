"""Several runs on one page: what they differ in, and what came of it.

Two curves on two pages cannot be compared by eye. This page draws the runs over one another, lists
the settings that differ, and gives the difference of their accuracies with an interval, since on
100 held-out problems 0.90 and 0.94 may well be the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_llm.errors import UserError
from rl_llm.files import write_atomically
from rl_llm.runs.formatting import duration, number
from rl_llm.runs.metrics import read
from rl_llm.runs.report import read_changed, read_settings
from rl_llm.runs.report_figures import overlay, step_seconds
from rl_llm.runs.report_page import escaped, finite, page, section
from rl_llm.runs.report_plots import PLOTS
from rl_llm.runs.verdicts import verdicts

_Z = 1.959963984540054  # two-sided 95 %

Interval = tuple[float, float, float]  # (difference, low, high)


class _Run(NamedTuple):
  """What the page needs of a run."""

  name: str
  directory: Path
  rows: list[dict[str, Any]]
  config: dict[str, Any]
  changed: dict[str, Any]  # of it, with the defaults
  answers: dict[str, bool]  # held-out problem -> whether the newest greedy answer is right


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> Interval:
  """The difference of two accuracies on the same problems, with a 95 % interval.

  Problems that both runs solve, or neither, say nothing of which is better. With b problems that
  only the second solves and c that only the first does, of n, and half a problem added to each of
  the four cases (Agresti and Min), so that the interval has a width where b = c = 0 too:

      d = (b - c) / (n + 2)     se = sqrt((b + c + 1) - (b - c)^2 / (n + 2)) / (n + 2)
      low, high = d -+ 1.96 se

  Of 100 problems, 8 are solved by the second alone and 2 by the first alone: 6 / 102 = 0.059 in the
  middle, and 1.96 * sqrt(11 - 36 / 102) / 102 = 0.063 either way.

  >>> first, second = [1] * 82 + [0] * 18, [1] * 80 + [0] * 2 + [1] * 8 + [0] * 10
  >>> [round(x, 3) for x in paired_difference(first, second)]
  [0.06, -0.004, 0.122]

  Args:
    before: [N] whether the first run's answer to each problem is right.
    after: [N] the same of the second run.

  Returns:
    (the observed difference (b - c) / n, low, high), each in [-1, 1].

  Raises:
    ValueError: there is no problem, or the lengths differ.

  Reference: Agresti and Min, 2005, Simple improved confidence intervals for comparing matched
  proportions.
  """
  gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
  lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
  count = len(before)
  if not count:
    raise ValueError("before is empty; it must have at least one problem")
  middle = (gained - lost) / (count + 2)
  error = math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)
  low, high = middle - _Z * error, middle + _Z * error
  return (gained - lost) / count, max(low, -1.0), min(high, 1.0)


def unpaired_difference(before: Interval, after: Interval) -> Interval:
  """The difference of two accuracies of which only their own intervals are known.

  Newcombe's: each end is as far from the difference as the two ends that make it, in squares.

  >>> [round(x, 3) for x in unpaired_difference((0.5, 0.4, 0.6), (0.7, 0.6, 0.8))]
  [0.2, 0.059, 0.341]

  Args:
    before: (accuracy, low, high) of the first run.
    after: the same of the second.

  Returns:
    (difference, low, high). Where both ran on the same problems it is wider than it needs to be.

  Reference: Newcombe, 1998, Interval estimation for the difference between independent
  proportions: comparison of eleven methods (method 10).
  """
  (p, p_low, p_high), (q, q_low, q_high) = before, after
  return (
    q - p,
    q - p - math.hypot(q - q_low, p_high - p),
    q - p + math.hypot(q_high - q, p - p_low),
  )


def write_comparison(directories: Sequence[Path], path: Path | None = None) -> Path:
  """Writes a page that compares runs; the first one is what the others are compared with.

  Args:
    directories: at least two directories of runs, finished or not.
    path: the file; None is comparison.html in the directory that holds all of them.

  Returns:
    The path of the page.

  Raises:
    UserError: a directory was given twice.
    FileNotFoundError: one has no record.
    ValueError: a file is broken; the message names it.
  """
  resolved = [directory.resolve() for directory in directories]
  twice = [given for given in resolved if resolved.count(given) > 1]
  if twice:
    raise UserError(f"{twice[0]} was given twice; give each run once")
  runs = [
    _read(directory, name) for directory, name in zip(resolved, _names(resolved), strict=True)
  ]
  path = (
    path or Path(os.path.commonpath([run.directory.parent for run in runs])) / "comparison.html"
  )
  body = "".join(
    (
      f"<header><h1>{len(runs)} runs compared</h1></header>",
      section("What came of them", _results(runs)),
      section("Differences of held-out accuracy", _differences(runs)),
      section("Settings that differ", _settings(runs)),
      section("Curves", _curves(runs), "plots"),
    )
  )
  write_atomically(path, page(f"{len(runs)} runs compared", body).encode("utf-8"))
  return path


def _read(directory: Path, name: str) -> _Run:
  record = directory / "metrics.jsonl"
  if not record.exists():
    raise FileNotFoundError(f"{directory} holds no metrics.jsonl, so it is no run's directory")
  samples = directory / "samples.jsonl"
  evaluated = read(samples) if samples.exists() else []
  evaluated = [row for row in evaluated if row.get("split") == "eval"]
  last = max((row["step"] for row in evaluated), default=0)
  answers: dict[str, bool] = {}
  for row in evaluated:
    if row["step"] == last and type(row.get("correct")) is bool:
      answers.setdefault(str(row.get("problem")), row["correct"])
  settings = read_settings(directory)[0], read_changed(directory)
  return _Run(name, directory, read(record), *settings, answers)


def _names(directories: Sequence[Path]) -> list[str]:
  """The directories' last parts, as many as tell them apart.

  >>> _names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other")])
  ['a/run', 'b/run', 'b/other']
  """
  longest = max(len(directory.parts) for directory in directories)
  for count in range(1, longest + 1):
    names = ["/".join(directory.parts[-count:]) for directory in directories]
    if len(set(names)) == len(names):
      break
  return names


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """A table of texts, all of them escaped here."""
  first = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
  rest = "".join(
    "<tr>" + "".join(f"<td>{escaped(cell, 400)}</td>" for cell in line) + "</tr>" for line in lines
  )
  return f"<table><tr>{first}</tr>{rest}</table>"


def _accuracy(run: _Run, how: str) -> Interval | None:
  """The newest held-out accuracy with its interval."""
  for row in reversed(run.rows):
    found = [finite(row.get(f"eval/{how}_{end}")) for end in ("accuracy", "low", "high")]
    if None not in found:
      return tuple(found)
  return None


def _shown(interval: Interval | None, *, signed: bool = False) -> str:
  if interval is None:
    return "-"
  sign = "+" if signed else ""
  return "{:{s}.2f} ({:{s}.2f} to {:{s}.2f})".format(*interval, s=sign)


_HOW = ("sampled", "greedy", "pair")


def _results(runs: Sequence[_Run]) -> str:
  how = [name for name in _HOW if any(_accuracy(run, name) for run in runs)]
  head = ["run", "steps", "time", *(f"accuracy, {name} (95 %)" for name in how), "what it says"]
  lines = []
  for run in runs:
    said = [verdict.says for verdict in verdicts(run.rows, run.config, run.changed)[:1]]
    steps = max((row["step"] for row in run.rows), default=0)
    seconds = duration(sum(map(step_seconds, run.rows)))
    shares = [_shown(_accuracy(run, name)) for name in how]
    lines.append([run.name, str(steps), seconds, *shares, *(said or ["-"])])
  return _table(head, lines)


def _differences(runs: Sequence[_Run]) -> str:
  """Each run against the first one."""
  first, *others = runs
  lines = []
  for run in others:
    for how in _HOW:
      ends = _accuracy(first, how), _accuracy(run, how)
      if None in ends:
        continue
      shared = [problem for problem in first.answers if problem in run.answers]
      if how == "greedy" and shared and len(shared) == len(first.answers) == len(run.answers):
        found = paired_difference(
          *([r.answers[problem] for problem in shared] for r in (first, run))
        )
        basis = f"the same {len(shared)} problems, paired"
      else:
        found, basis = unpaired_difference(*ends), "the two intervals, not paired"
      clear = "yes" if found[1] > 0 or found[2] < 0 else "no"
      lines.append([run.name, how, _shown(found, signed=True), clear, basis])
  if not lines:
    return ""
  head = ["run", "answers", f"minus {first.name} (95 %)", "clear of 0", "from"]
  return _table(head, lines) + (
    "<p>At the newest evaluation of each run. An interval clear of 0 says that these two policies "
    "differ; whether the settings do takes several seeds of each.</p>"
  )


def _settings(runs: Sequence[_Run]) -> str:
  """Settings of which two runs have different values; one that only some runs know is named."""
  keys = list(dict.fromkeys(key for run in runs for key in run.config if key != "workdir"))
  lines, unknown = [], []
  for key in keys:
    values = [run.config[key] for run in runs if key in run.config]
    if any(value != values[0] for value in values):
      lines.append([key, *(_value(run.config[key]) if key in run.config else "-" for run in runs)])
    elif len(values) < len(runs):
      unknown.append(key)
  table = _table(["setting", *(run.name for run in runs)], lines) if lines else "<p>None.</p>"
  if unknown:
    table += (
      "<p>Not every run knows these settings, since another command or another version wrote it: "
      f"{escaped(', '.join(unknown), 1500)}.</p>"
    )
  return table


def _value(value: Any) -> str:
  text = value if isinstance(value, str) else number_or_text(value)
  return text or "(empty)"


def number_or_text(value: Any) -> str:
  """A setting as its flag has it.

  >>> number_or_text(1e-05), number_or_text(True), number_or_text(None)
  ('1e-5', 'true', 'none')
  """
  if isinstance(value, bool) or value is None:
    return "none" if value is None else str(value).lower()
  return number(value) if isinstance(value, (int, float)) else str(value)


def _curves(runs: Sequence[_Run]) -> str:
  """A figure for each curve that changes in a run, with a line for each run."""
  figures = []
  for plot in PLOTS:
    for key, name in plot.curves:
      lines: Mapping[str, list] = {
        run.name: [(row["step"], finite(row[key])) for row in run.rows if key in row]
        for run in runs
        if any(key in row for row in run.rows)
      }
      values = {value for points in lines.values() for _, value in points}
      if len(values - {None}) > 1:
        title = plot.title if len(plot.curves) == 1 else f"{plot.title}: {name}"
        figures.append(overlay(plot._replace(title=title), lines))
  return "".join(figures)
