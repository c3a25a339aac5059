"""The page of a sweep: curves, the effect of each setting, and a line for each trial."""

from __future__ import annotations

import html
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from launch.results import Group, Row, shown
from launch.sweep import varying
from rl_llm.errors import ConfigError
from rl_llm.runs.console import duration, number
from rl_llm.runs.report_page import page

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
        for point in row.curve
        if len(row.curve) <= 40
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
  """One line per setting across an axis per key, coloured by its result."""
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


def trials_table(rows: Sequence[Row], metric: str) -> str:
  """A line per trial, with links to its files."""
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
      for name in names
      if (row.directory / name).exists()
    )
    cells = [
      row.id,
      *(shown(row.config.get(path)) for path in paths),
      number(row.value),
      row.status,
      f"{number(row.step)}/{row.steps}",
      duration(row.seconds),
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
      for title, content, kind in sections
      if content
    ),
  )
