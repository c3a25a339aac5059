"""What came of a sweep: one table, and one HTML file with its curves that can be mailed.

  python -m launch.report runs/sweep-grpo_tiny
  python -m launch.report runs/sweep-grpo_tiny --figure=sweep.svg

Trials that differ in their seed alone are one line: mean and 95 % interval over seeds. Only
settings that vary are shown. Beside the trials' directories it writes report.csv (a line per
trial), report.md (the table) and report.html (the table, curves, and each trial's own report with
its samples a click away). It reads files and nothing else, so it may be called at any time.
"""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import state
from launch.progress import FIGURES
from launch.sweep import varying
from rl_llm.config import ConfigError, option, redact, run
from rl_llm.console import duration, number, printable
from rl_llm.errors import UserError
from rl_llm.files import write_atomically
from rl_llm.metrics import RecordError, read
from rl_llm.report import finite, page, write_report

# Student's t, two-sided 95 %, by degrees of freedom; beyond them 1.96 is near enough.
_T = (
  12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
  2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
  2.045, 2.042,
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Which sweep."""

  workdir: str = option("", "the sweep's directory; may be given without --workdir=")
  metric: str = option("", "key of metrics.jsonl to compare by; empty = held-out accuracy, or loss")
  figure: str = option("", "a file.svg or .png for what each setting does; needs the extra plot")


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


class Group(NamedTuple):
  """Trials that differ in their seed alone."""

  settings: dict[str, Any]
  rows: list[Row]
  mean: float | None
  half: float | None  # of the 95 % interval


# What is read of a trial's files.
_KINDS = {
  "trial.json": {"id": str, "order": int, "steps": int, "config": dict},
  "status.json": {"status": str, "seconds": (int, float), "failures": int, "reason": str,
                  "lines": list},
  "result.json": {"steps": int, "after": dict},
}


def read_known(path: Path) -> dict[str, Any]:
  """`state.read_json` of one of a trial's files.

  Raises:
    RecordError: a value in it is of another kind than the launcher writes.
  """
  values = state.read_json(path)
  for key, kind in _KINDS[path.name].items():
    if key in values and not isinstance(values[key], kind):
      shown = json.dumps(values[key])
      raise RecordError(f"{path}: {key}={shown:.40} cannot be used; move the file away")
  return values


def read_rows(workdir: Path, *, metric: str) -> tuple[str, list[Row]]:
  """The metric, and what is known of every trial of the directory, in the order of the sweep.

  Raises:
    ConfigError: there are no trials.
    RecordError: a trial's file is broken; the message names it.
  """
  found = [read_known(path) | {"path": path} for path in workdir.glob("*/trial.json")]
  if not found:
    raise ConfigError("workdir", workdir, "a directory in which launch.run has run a sweep")
  for trial in found:
    if "id" not in trial:
      raise RecordError(f"{trial['path']}: broken; the launch.run command that began the sweep "
                        "writes it anew, or move the trial's directory away")
  found.sort(key=lambda trial: (trial.get("order", 0), trial["id"]))
  records = {}
  for trial in found:
    metrics = trial["path"].parent / "metrics.jsonl"
    records[trial["id"]] = read(metrics) if metrics.exists() else []
  keys = {key for rows in records.values() for row in rows for key in row}
  if metric and keys and metric not in keys:
    raise ConfigError("metric", metric, f"one of {', '.join(sorted(keys - {'step'}))}")
  metric = metric or next((key for key in FIGURES if key in keys), FIGURES[0])
  rows = []
  for trial in found:
    directory, steps = trial["path"].parent, trial.get("steps", 0)
    status = read_known(directory / "status.json")
    after = read_known(directory / "result.json").get("after", {})
    word = state.where(directory, steps, status)
    curve = [
      (row["step"], value)
      for row in records[trial["id"]] if (value := finite(row.get(metric))) is not None
    ]
    result = finite(after.get(metric))
    failed = [status.get("reason", ""), *map(str, status.get("lines", []))]
    rows.append(
      Row(
        trial["id"],
        directory,
        trial.get("config", {}),
        word,
        records[trial["id"]][-1]["step"] if records[trial["id"]] else None,
        steps,
        status.get("seconds", 0.0),
        result if word == "done" and result is not None else curve[-1][1] if curve else None,
        curve,
        failed if word != "done" and status.get("failures") else [],
      )
    )
  return metric, rows


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
  """The settings that vary, and the trials by them: the best first, those without a value last."""
  paths = [path for path in varying([row.config for row in rows]) if path != "seed"]
  by_settings: dict[str, list[Row]] = {}
  for row in rows:
    by_settings.setdefault(repr([row.config.get(path) for path in paths]), []).append(row)
  groups = []
  for members in by_settings.values():
    mean, half = interval([row.value for row in members if row.value is not None])
    groups.append(
      Group({path: members[0].config.get(path) for path in paths}, members, mean, half)
    )
  sign = 1 if metric.endswith("loss") else -1
  groups.sort(key=lambda group: (group.mean is None, sign * (group.mean or 0.0)))
  return paths, groups


def shown(value: Any) -> str:
  """A setting as its flag has it."""
  if isinstance(value, bool) or value is None:
    return "none" if value is None else str(value).lower()
  if isinstance(value, list):
    return ",".join(map(shown, value))
  return number(value, 4) if isinstance(value, float) else printable(str(value), limit=40)


def table(paths: Sequence[str], groups: Sequence[Group], metric: str) -> list[list[str]]:
  """Header and lines of the table."""
  lines = [[*paths, metric.removeprefix("eval/"), "95 %", "n", "status", "steps", "time"]]
  for group in groups:
    counts = Counter(row.status for row in group.rows)
    status = ", ".join(
      word if len(counts) == 1 else f"{count} {word}" for word, count in sorted(counts.items())
    )
    steps = [row.step or 0 for row in group.rows]
    lines.append(
      [
        *(shown(group.settings[path]) for path in paths),
        number(group.mean),
        f"±{number(group.half, 2)}" if group.half is not None else "-",
        str(sum(row.value is not None for row in group.rows)),
        status,
        "-".join(map(str, sorted({min(steps), max(steps)}))),
        duration(statistics.fmean(row.seconds for row in group.rows)),
      ]
    )
  return lines


def as_text(lines: Sequence[Sequence[str]]) -> str:
  """The table in columns."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  )


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
  """The table in Markdown."""
  rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
  return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def failures(rows: Sequence[Row]) -> list[str]:
  """Why trials failed, in their last words."""
  lines = []
  for row in rows:
    if row.error:
      lines += [f"{row.id} {row.status}: {row.error[0]}", *(f"  | {x}" for x in row.error[1:])]
  return lines


def as_csv(rows: Sequence[Row], metric: str) -> str:
  """One line per trial."""
  paths = varying([row.config for row in rows])
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(["trial", *paths, metric, "status", "step", "steps", "seconds", "error"])
  for row in rows:
    writer.writerow(
      [row.id, *(row.config.get(path) for path in paths), row.value, row.status, row.step,
       row.steps, row.seconds, "\n".join(row.error)]
    )
  return text.getvalue()


# --- the page ------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _PAD = 300, 130, 34


def _color(share: float) -> str:
  """From blue, the worst, to orange, the best; both can be seen on white and on black."""
  low, high = (70, 110, 200), (235, 130, 20)
  return "rgb({},{},{})".format(
    *(round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
  )


def multiples(groups: Sequence[Group], metric: str) -> str:
  """A small figure per setting, a curve per seed, all on the same axes."""
  points = [point for group in groups for row in group.rows for point in row.curve]
  if not points:
    return "<p>Nothing has been recorded yet.</p>"
  last = max(step for step, _ in points) or 1
  low, high = min(value for _, value in points), max(value for _, value in points)
  high = high if high > low else low + 1.0

  def place(step: float, value: float) -> str:
    x = _PAD + step / last * (_WIDTH - _PAD - 8)
    y = _HEIGHT - 20 - (value - low) / (high - low) * (_HEIGHT - 30)
    return f"{x:.1f},{y:.1f}"

  figures = []
  for group in groups:
    title = ", ".join(f"{path}={shown(value)}" for path, value in group.settings.items())
    curves = "".join(
      f'<polyline class="line s{i % 8}" points="{" ".join(place(*point) for point in row.curve)}">'
      f"<title>seed {html.escape(shown(row.config.get('seed')))}</title></polyline>"
      + "".join(
        '<circle class="f{}" cx="{}" cy="{}" r="2"/>'.format(i % 8, *place(*point).split(","))
        for point in row.curve if len(row.curve) <= 40
      )
      for i, row in enumerate(group.rows)
    )
    axis = _HEIGHT - 20
    frame = (
      f'<line class="axis" x1="{_PAD}" x2="{_WIDTH - 8}" y1="{axis}" y2="{axis}"/>'
      f'<text x="{_PAD - 4}" y="{axis}" text-anchor="end">{number(low, 2)}</text>'
      f'<text x="{_PAD - 4}" y="16" text-anchor="end">{number(high, 2)}</text>'
      f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 5}" text-anchor="end">step {last}</text>'
    )
    figures.append(
      f"<figure><h3>{html.escape(title) or 'all'}</h3>"
      f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
      f'aria-label="{html.escape(metric)} by step">{frame}{curves}</svg></figure>'
    )
  return "".join(figures)


def parallel(paths: Sequence[str], groups: Sequence[Group], metric: str) -> str:
  """One line per setting across an axis per key, coloured by what came of it."""
  groups = [group for group in groups if group.mean is not None]
  if not paths or len(groups) < 2:
    return ""
  width, height, top, bottom = 900, 300, 30, 30
  columns: list[tuple[str, list[Any]]] = [
    (path, [group.settings[path] for group in groups]) for path in paths
  ]
  columns.append((metric.removeprefix("eval/"), [group.mean for group in groups]))
  places, parts = [], []
  for i, (name, column) in enumerate(columns):
    x = 70 + i * (width - 140) / (len(columns) - 1)
    last = i == len(columns) - 1
    # Settings stand at equal distances, in order, since they are often powers; the metric to scale.
    kinds = sorted(set(map(_key, column)))
    spread = (max(column) - min(column)) or 1.0 if last else 1.0
    heights = [
      (value - min(column)) / spread if last else kinds.index(_key(value)) / max(len(kinds) - 1, 1)
      for value in column
    ]
    ys = [height - bottom - share * (height - top - bottom) for share in heights]
    places.append([(x, y) for y in ys])
    end = height - bottom
    parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{end}"/>')
    parts.append(f'<text x="{x:.1f}" y="14" text-anchor="middle">{html.escape(name)}</text>')
    marks = dict(zip(map(shown, column), ys, strict=True))
    if last:
      marks = {number(min(column)): height - bottom, number(max(column)): top}
    parts += [
      f'<text x="{x + 5:.1f}" y="{y + 4:.1f}">{html.escape(mark)}</text>'
      for mark, y in marks.items()
    ]
  means = [group.mean for group in groups]
  low, spread = min(means), (max(means) - min(means)) or 1.0
  for i, group in enumerate(groups):
    share = (group.mean - low) / spread
    share = 1 - share if metric.endswith("loss") else share
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (column[i] for column in places))
    title = ", ".join(f"{path}={shown(value)}" for path, value in group.settings.items())
    parts.append(
      f'<polyline points="{line}" fill="none" stroke="{_color(share)}" stroke-width="2" '
      f'opacity="0.75"><title>{html.escape(title)}: {number(group.mean)}</title></polyline>'
    )
  return (
    f'<figure><svg viewBox="0 0 {width} {height}" role="img" '
    f'aria-label="settings and {html.escape(metric)}">{"".join(parts)}</svg><figcaption>A line per '
    "setting, orange where it is best. Settings stand at equal distances.</figcaption></figure>"
  )


def _keys(values: Sequence[Any]) -> list[tuple]:
  return [_key(value) for value in values]


def _key(value: Any) -> tuple:
  """Sorts numbers before texts."""
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return (0, float(value), "")
  return (1, 0.0, shown(value))


def effects(
  paths: Sequence[str], groups: Sequence[Group]
) -> dict[tuple[str, ...], list[list[tuple[tuple, float]]]]:
  """What each setting does: for each, one line of (values, mean) per combination of the others.

  Settings that only ever change together are one.

  >>> groups = [Group({"a": a, "b": b, "c": -b}, [], a + b / 10, None)
  ...           for a in (1, 2) for b in (3, 4)]
  >>> effects(["a", "b", "c"], groups)["b", "c"]
  [[((3, -3), 1.3), ((4, -4), 1.4)], [((3, -3), 2.3), ((4, -4), 2.4)]]
  """
  together: dict[tuple, list[str]] = {}
  for path in paths:
    values = [repr(group.settings[path]) for group in groups]
    together.setdefault(tuple(map(values.index, values)), []).append(path)
  found = {}
  for own in map(tuple, together.values()):
    lines: dict[str, list[tuple[tuple, float]]] = {}
    for group in groups:
      if group.mean is not None:
        others = repr([group.settings[other] for other in paths if other not in own])
        values = tuple(group.settings[path] for path in own)
        lines.setdefault(others, []).append((values, group.mean))
    found[own] = [sorted(line, key=lambda point: _keys(point[0])) for line in lines.values()]
  return found


def draw(paths: Sequence[str], groups: Sequence[Group], metric: str, path: str) -> None:
  """The `effects` as a figure: a thin line per combination of the others, and their mean.

  Raises:
    ConfigError: nothing varies, the file is of another kind, or Matplotlib is not installed.
  """
  if not paths:
    raise ConfigError("figure", path, "left out where no setting varies")
  if not path.endswith((".svg", ".png")):
    raise ConfigError("figure", path, "a file ending in .svg or .png")
  try:
    import matplotlib
  except ImportError:
    raise ConfigError(
      "figure", path, "used where matplotlib is installed", "pip install 'rl_llm[plot]'"
    ) from None
  matplotlib.use("Agg")
  matplotlib.rcParams["svg.hashsalt"] = "rl_llm"  # The same figures give the same file.
  from matplotlib import pyplot

  found = effects(paths, groups)
  figure, axes = pyplot.subplots(
    1, len(found), figsize=(3.6 * len(found), 3.4), sharey=True, squeeze=False
  )
  for axis, (names, lines) in zip(axes[0], found.items(), strict=True):
    # At equal distances, in order: settings are often powers.
    ticks = sorted({values for line in lines for values, _ in line}, key=_keys)
    for line in lines:
      axis.plot(
        [ticks.index(values) for values, _ in line], [mean for _, mean in line],
        color="0.6", linewidth=1, marker="o", markersize=3,
      )
    means = [
      statistics.fmean([mean for line in lines for values, mean in line if values == tick])
      for tick in ticks
    ]
    axis.plot(range(len(ticks)), means, color="tab:orange", linewidth=3, marker="o")
    axis.set_xticks(range(len(ticks)), [", ".join(map(shown, tick)) for tick in ticks])
    axis.set_xlabel("\n".join(names))
    axis.grid(axis="y", alpha=0.3)
  axes[0][0].set_ylabel(metric.removeprefix("eval/").replace("_", " "))
  figure.tight_layout()
  figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)
  pyplot.close(figure)


def trials_table(rows: Sequence[Row], metric: str) -> str:
  """A line per trial, with what it left a click away."""
  paths = varying([row.config for row in rows])
  head = "".join(
    f"<th>{html.escape(name)}</th>"
    for name in ("trial", *paths, metric.removeprefix("eval/"), "status", "step", "time", "files")
  )
  lines = []
  for row in rows:
    names = ("report.html", "samples.jsonl", "metrics.jsonl", "stdout.log")
    links = " ".join(
      f'<a href="{row.id}/{name}">{name.partition(".")[0]}</a>'
      for name in names if (row.directory / name).exists()
    )
    cells = [
      row.id, *(shown(row.config.get(path)) for path in paths), number(row.value), row.status,
      f"{number(row.step)}/{row.steps}", duration(row.seconds),
    ]
    lines.append(
      "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td>{links}</td></tr>"
    )
    if row.error:
      text = html.escape("\n".join(row.error))
      lines.append(f'<tr><td></td><td class="text" colspan="{len(cells)}">{text}</td></tr>')
  return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def as_html(
  name: str, lines: Sequence[Sequence[str]], paths, groups, rows: Sequence[Row], metric: str
) -> str:
  """The whole page."""
  counts = Counter(row.status for row in rows)
  said = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0])
  body = "".join(
    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
    for line in lines[1:]
  )
  sections = [
    ("Settings, the best first", f"<table><tr>{head}</tr>{body}</table>", ""),
    ("What goes with what", parallel(paths, groups, metric), ""),
    (f"Curves of {html.escape(metric)}", multiples(groups, metric), "plots"),
    ("Trials", trials_table(rows, metric), ""),
  ]
  return page(
    name,
    f"<header><h1>{html.escape(name)}</h1><p>{len(rows)} trials: {html.escape(said)}</p></header>"
    + "".join(
      f'<section><h2>{title}</h2><div class="{kind}">{content}</div></section>'
      for title, content, kind in sections if content
    ),
  )


def write_own(directory: Path) -> None:
  """Writes the report of one trial.

  Raises:
    RecordError: a file of it is broken.
  """
  try:
    write_report(directory)
  except UserError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    said = f"a line lacks {error}" if isinstance(error, KeyError) else error
    raise RecordError(f"{directory}: its report cannot be written: {said}") from None


def write(workdir: Path, *, metric: str, figure: str = "") -> str:
  """Writes report.csv, report.md, report.html and the figure; gives the table as text."""
  metric, rows = read_rows(workdir, metric=metric)
  for row in rows:
    if row.status not in ("done", "running") and row.step is not None:
      write_own(row.directory)  # Who never came to an end has not written its own.
  paths, groups = grouped(rows, metric)
  lines = table(paths, groups, metric)
  why = failures(rows)
  name = workdir.resolve().name
  markdown = [f"# {name}", "", as_markdown(lines), ""]
  markdown += ["```", *why, "```", ""] if why else []
  for file, text in (
    ("report.csv", as_csv(rows, metric)),
    ("report.md", "\n".join(markdown)),
    ("report.html", as_html(name, lines, paths, groups, rows, metric)),
  ):
    write_atomically(workdir / file, redact(text).encode("utf-8", "backslashreplace"))
  if figure:
    draw(paths, groups, metric, figure)
  return printable("\n".join([as_text(lines), *why]), keep_newlines=True)


def main(config: Config) -> int:
  workdir = Path(config.workdir)
  if not config.workdir:
    raise ConfigError("workdir", "", "the directory of a sweep", "python -m launch.report DIR")
  try:
    print(write(workdir, metric=config.metric, figure=config.figure))
  except OSError as error:
    field = "figure" if error.filename == config.figure else "workdir"
    raise ConfigError(
      field, getattr(config, field), "where files can be read and written",
      f"{error.filename}: {error.strerror}",
    ) from None
  print(f"curves: {workdir / 'report.html'}")
  return 0


def arguments(argv: Sequence[str]) -> list[str]:
  """A directory given bare is --workdir.

  >>> arguments(["report.py", "runs/x", "--metric=loss"])
  ['report.py', '--workdir=runs/x', '--metric=loss']
  """
  if len(argv) > 1 and not argv[1].startswith("-"):
    return [argv[0], f"--workdir={argv[1]}", *argv[2:]]
  return list(argv)


if __name__ == "__main__":
  run(main, Config, argv=arguments(sys.argv))
