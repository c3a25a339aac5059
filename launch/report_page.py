"""The page of a sweep: curves, the effect of each setting, and a line for each trial."""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.results import Group, Row, shown
from launch.sweep import varying
from rl_llm.errors import ConfigError
from rl_llm.runs.formatting import duration, number
from rl_llm.runs.report_figures import overlay
from rl_llm.runs.report_page import page, section, tabs
from rl_llm.runs.report_plots import Plot

_OVERLAID = 16  # curves in one figure that can be told apart


def _color(share: float) -> str:
  """From blue, the worst, to orange, the best; both can be seen on white and on black."""
  low, high = (70, 110, 200), (235, 130, 20)
  return "rgb({},{},{})".format(
    *(round(a + share * (b - a)) for a, b in zip(low, high, strict=True))
  )


class View(NamedTuple):
  """A sweep by one metric."""

  metric: str
  lines: Sequence[Sequence[str]]  # of the table
  paths: Sequence[str]  # the settings that vary
  groups: Sequence[Group]  # the best first
  rows: Sequence[Row]


def title_of(group: Group) -> str:
  return ", ".join(f"{path}={shown(value)}" for path, value in group.settings.items()) or "all"


def overlays(view: View) -> str:
  """The mean curve of each setting, over one another, the best first."""
  lines = {}
  for group in view.groups:
    curve = mean_curve([row.curve for row in group.rows if row.curve])
    if curve and len(lines) < _OVERLAID:
      lines[f"{title_of(group)} (best)" if group is best(view.groups) else title_of(group)] = curve
  if not lines:
    return ""
  left = sum(any(row.curve for row in group.rows) for group in view.groups) - len(lines)
  caption = "The mean over seeds, at the steps that all of a setting's trials have reached."
  caption += f" The best {_OVERLAID}; {left} settings are left out." if left else ""
  values = [value for curve in lines.values() for _, value in curve]
  return overlay(_plot(view.metric, "All settings", caption, (min(values), max(values))), lines)


def mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
  """The mean of several curves, at the steps that all of them have.

  >>> mean_curve([[(0, 1.0), (5, 2.0), (9, 3.0)], [(0, 3.0), (5, 4.0)]])
  [(0, 2.0), (5, 3.0)]
  """
  values = [dict(curve) for curve in curves]
  shared = sorted(set.intersection(*map(set, values))) if values else []
  return [(step, statistics.fmean(curve[step] for curve in values)) for step in shared]


def best(groups: Sequence[Group]) -> Group | None:
  """The first of the settings, if there is another one to be better than."""
  known = [group for group in groups if group.mean is not None]
  return known[0] if len(known) > 1 else None


def _plot(metric: str, title: str, caption: str = "", ends=(None, None)) -> Plot:
  unit = metric.removeprefix("eval/").replace("_", " ")
  return Plot(html.escape(title), html.escape(unit), (), html.escape(caption), *ends)


def multiples(view: View) -> str:
  """A figure for each setting, a curve for each seed, all on the same axes."""
  points = [point for group in view.groups for row in group.rows for point in row.curve]
  if not points:
    return "<p>Nothing has been recorded yet.</p>"
  values = [value for _, value in points]
  ends = min(values), max(values)
  figures = []
  for group in view.groups:
    lines = {f"seed {shown(row.config.get('seed'))}, {row.id}": row.curve for row in group.rows}
    title = title_of(group) + (" (best)" if group is best(view.groups) else "")
    plot = _plot(view.metric, title, ends=ends)
    figures.append(overlay(plot, lines, steps=[step for step, _ in points]))
  return "".join(figures)


def parallel(paths: Sequence[str], groups: Sequence[Group], metric: str) -> str:
  """One line per setting across an axis per key, coloured by its result."""
  groups = [group for group in groups if group.mean is not None]
  if not paths or len(groups) < 2:
    return ""
  width, height, top, bottom = 900, 300, 30, 30
  columns: list[tuple[str, list[Any]]] = [
    (path, [group.settings[path] for group in groups]) for path in paths
  ]
  columns.append((metric.removeprefix("eval/"), [group.mean for group in groups]))
  places, parts, marked = [], [], []
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
      marks = {number(max(column)): top, number(min(column)): end}  # Where all are equal: below.
    side = f'x="{x + 5:.1f}"' if last else f'x="{x - 6:.1f}" text-anchor="end"'
    marked += [
      f'<text class="mark" {side} y="{y + 4:.1f}">{html.escape(mark)}</text>'
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
  parts += marked  # Over the lines, each with a rim of the page's colour.
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
        [ticks.index(values) for values, _ in line],
        [mean for _, mean in line],
        color="0.6",
        linewidth=1,
        marker="o",
        markersize=3,
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


def trials_table(view: View) -> str:
  """A line per trial, with links to its files; the best one is marked."""
  paths = varying([row.config for row in view.rows])
  names = ("trial", *paths, view.metric.removeprefix("eval/"), "status", "step", "time", "files")
  head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
  first = best_trial(view)
  lines = []
  for row in view.rows:
    files = ("report.html", "samples.jsonl", "metrics.jsonl", "stdout.log")
    links = " ".join(
      f'<a href="{row.id}/{name}">{name.partition(".")[0]}</a>'
      for name in files
      if (row.directory / name).exists()
    )
    cells = [
      f"★ {row.id}" if row is first else row.id,
      *(shown(row.config.get(path)) for path in paths),
      number(row.value),
      row.status,
      f"{number(row.step)}/{row.steps}",
      duration(row.seconds),
    ]
    kind = ' class="best"' if row is first else ""
    told = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
    lines.append(f"<tr{kind}>{told}<td>{links}</td></tr>")
    if row.error:
      text = html.escape("\n".join(row.error))
      lines.append(f'<tr><td></td><td class="text" colspan="{len(cells)}">{text}</td></tr>')
  return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def best_trial(view: View) -> Row | None:
  """The trial with the best figure, and of those the one with most reward."""
  sign = 1 if view.metric.endswith("loss") else -1
  known = [row for row in view.rows if row.value is not None]
  if len(known) < 2:
    return None
  return min(known, key=lambda row: (sign * row.value, -(row.reward or 0.0)))


def settings_table(view: View) -> str:
  """The table of settings; the best one is marked."""
  head = "".join(f"<th>{html.escape(cell)}</th>" for cell in view.lines[0])
  first, body = best(view.groups), ""
  for group, line in zip(view.groups, view.lines[1:], strict=True):
    kind = ' class="best"' if group is first else ""
    body += f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
  return f"<table><tr>{head}</tr>{body}</table>"


def as_html(name: str, views: Sequence[View]) -> str:
  """The whole page: a part for each metric, of which the reader sees the chosen one."""
  rows = views[0].rows
  counts = Counter(row.status for row in rows)
  said = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
  return page(
    name,
    f"<header><h1>{html.escape(name)}</h1><p>{len(rows)} trials: {html.escape(said)}</p></header>"
    + tabs([(view.metric.removeprefix("eval/"), _part(view)) for view in views]),
  )


def _part(view: View) -> str:
  return "".join(
    section(title, content, kind)
    for title, content, kind in (
      ("Settings, the best first", settings_table(view), ""),
      ("What goes with what", parallel(view.paths, view.groups, view.metric), ""),
      ("Curves of all settings", overlays(view), "wide"),
      ("Curves of each setting", multiples(view), "plots"),
      ("Trials", trials_table(view), ""),
    )
  )
