"""The figures of a report as SVG, each with a caption that says what to look for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import counted, escaped, finite
from rl_llm.runs.report_plots import PLOTS, Plot, several_rewards
from rl_llm.runs.speed import phases_of

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 250, 70, 18, 10, 38


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
  """The figures of all curves on record; those of training that never change are folded."""
  shown, flat = [], []
  for plot in (*PLOTS, *several_rewards(rows)):
    known = [(key, name) for key, name in plot.curves if any(key in row for row in rows)]
    if known:
      # That a held-out figure stays where it is says much.
      kept = any(key.startswith("eval/") or _changes(rows, key) for key, _ in known)
      into = shown if len(rows) < 3 or kept else flat
      into.append((plot.title, _line_figure(plot, known, rows)))
  phases = phases_of(rows)
  if phases:
    shown.append(("Time per phase", _time_figure(phases, rows)))
  figures = "".join(figure for _, figure in shown)
  figures = f'<div class="plots">{figures}</div>' if shown else ""
  if flat:
    titles = ", ".join(title for title, _ in flat)
    figures += (
      f"<details><summary>{counted(len(flat), 'chart')} without change: {titles}</summary>"
      f'<div class="plots">{"".join(figure for _, figure in flat)}</div></details>'
    )
  return figures


def _changes(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
  """Whether a curve has anything to show: two different values, or one that is not finite."""
  values = {row[key] for row in rows if row.get(key) is not None}
  return len(values) > 1 or any(finite(value) is None for value in values)


def ticks(low: float, high: float) -> list[float]:
  """3 to 9 round numbers within [low, high]: the multiples of 1, 2 or 5 times a power of 10."""
  raw = (high - low) / 8
  power = 10.0 ** math.floor(math.log10(raw))
  unit = next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9)) * power
  return [k * unit for k in range(math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9) + 1)]


class _Axes(NamedTuple):
  """The rectangle of a figure, from data to pixels."""

  x_low: float
  x_high: float
  y_low: float
  y_high: float

  def x(self, value: float) -> float:
    share = (value - self.x_low) / (self.x_high - self.x_low)
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

  def y(self, value: float) -> float:
    share = (value - self.y_low) / (self.y_high - self.y_low)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _axes(steps: Sequence[float], values: Sequence[float], low=None, high=None) -> _Axes:
  """Axes that cover all values, and at least low to high; widened if they would have no extent."""
  ends = [*values, *(end for end in (low, high) if end is not None)] or [0.0]
  bottom, top = min(ends), max(ends)
  extent = top - bottom
  pad = extent * 0.06 or abs(top) * 0.1 or 1.0
  bottom = bottom if bottom == low else bottom - pad
  top = top if top == high and extent else top + pad
  first, last = min(steps, default=0), max(steps, default=0)
  return _Axes(first, last if last > first else first + 1, bottom, top)


def _step_ticks(axes: _Axes) -> list[float]:
  """Whole steps, the last of which is the last one on record."""
  last = math.floor(axes.x_high)
  room = 0.07 * (axes.x_high - axes.x_low)
  inside = [value for value in ticks(axes.x_low, axes.x_high) if value == round(value)]
  return [value for value in inside if last - value > room] + [last]


def _label(value: float) -> str:
  """A tick's number, short enough to leave the axis's name its place: 20k, 1.5M."""
  for size, letter in ((1e6, "M"), (1e3, "k")):
    if abs(value) >= max(size, 1e4):
      return number(value / size) + letter
  return number(value)


def _frame(axes: _Axes, unit: str) -> str:
  """Grid, ticks and axis names."""
  parts = []
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
  for value in ticks(axes.y_low, axes.y_high):
    y = axes.y(value)
    parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    label = _label(round(value, 12) + 0.0)
    parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
  for value in _step_ticks(axes):
    x = axes.x(value)
    parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
    parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:.0f}</text>')
  middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
  parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
  parts.append(f'<text x="{middle_x}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
  turn = f'transform="rotate(-90 12 {middle_y})"'
  parts.append(f'<text x="12" y="{middle_y}" text-anchor="middle" {turn}>{unit}</text>')
  return "".join(parts)


def _figure(title: str, names: Sequence[str], drawing: str, caption: str) -> str:
  legend = "".join(
    f'<span class="key k{i % 8}">{escaped(name)}</span>' for i, name in enumerate(names)
  )
  legend = f'<div class="legend">{legend}</div>' if len(names) > 1 else ""
  return (
    f"<figure><h3>{title}</h3>{legend}"
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title} by step">{drawing}</svg>'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _line_figure(plot: Plot, curves: Sequence[tuple[str, str]], rows: Sequence[Mapping]) -> str:
  points = {
    key: [(row["step"], finite(row[key])) for row in rows if key in row] for key, _ in curves
  }
  bands = {
    key: [
      (row["step"], low, high)
      for row in rows
      if (low := finite(row.get(key.replace("accuracy", "low")))) is not None
      and (high := finite(row.get(key.replace("accuracy", "high")))) is not None
    ]
    for key, _ in curves
    if key.startswith("eval/")
  }
  drawn = [y for curve in points.values() for _, y in curve if y is not None]
  drawn += [end for band in bands.values() for _, low, high in band for end in (low, high)]
  axes = _axes([row["step"] for row in rows], drawn, plot.low, plot.high)
  drawing = _frame(axes, plot.unit)
  for i, (key, name) in enumerate(curves):
    if bands.get(key):
      upper = [f"{axes.x(x):.1f},{axes.y(high):.1f}" for x, _, high in bands[key]]
      lower = [f"{axes.x(x):.1f},{axes.y(low):.1f}" for x, low, _ in reversed(bands[key])]
      drawing += f'<polygon class="band f{i}" points="{" ".join(upper + lower)}"/>'
    # Where two curves are one, the later is dashed, so that both colours can be seen.
    hidden = any(points[key] == points[other] for other, _ in curves[:i])
    drawing += _line(axes, points[key], i, name, dashed=hidden)
  caption = plot.caption + (" Bands are 95 % intervals." if any(bands.values()) else "")
  values = [(row["step"], row[key]) for row in rows for key, _ in curves if key in row]
  # None means that a step had nothing to measure, as when every group agreed: not a fault.
  empty = {step for step, value in values if value is None}
  if empty:
    caption += f" Nothing to measure in {counted(len(empty), 'step')}, first in step {min(empty)}."
  gone = [step for step, value in values if value is not None and finite(value) is None]
  if gone:
    count = f"{counted(len(gone), 'value')} not finite, first at step {min(gone)}"
    caption += f" <strong>{count}.</strong>"
  return _figure(plot.title, [name for _, name in curves], drawing, caption)


def overlay(
  plot: Plot, lines: Mapping[str, Sequence[tuple[int, float | None]]], *, steps: Sequence[int] = ()
) -> str:
  """One figure with a curve for each run or setting; at most sixteen can be told apart.

  Args:
    plot: its title, unit, caption and the least extent of its axis.
    lines: name in the legend -> points (step, value), with None where there is no value.
    steps: further steps that the axis reaches, such as those of a figure next to it.
  """
  steps = [*steps, *(step for points in lines.values() for step, _ in points)]
  drawn = [value for points in lines.values() for _, value in points if value is not None]
  axes = _axes(steps, drawn, plot.low, plot.high)
  drawing = _frame(axes, plot.unit)
  for i, (name, points) in enumerate(lines.items()):
    hidden = any(points == earlier for earlier in list(lines.values())[:i])
    drawing += _line(axes, points, i % 8, name, dashed=hidden or i % 16 >= 8)
  return _figure(plot.title, list(lines), drawing, plot.caption)


def _line(
  axes: _Axes,
  points: Sequence[tuple[int, float | None]],
  color: int,
  name: str,
  *,
  dashed: bool = False,
) -> str:
  """A curve that breaks where a value is not finite; it marks its points if they are few."""
  pieces: list[list[tuple[int, float]]] = [[]]
  for step, value in points:
    if value is None:
      pieces.append([])
    else:
      pieces[-1].append((step, value))
  parts = []
  for piece in pieces:
    path = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in piece)
    if len(piece) > 1:
      style = "line dashed" if dashed else "line"
      parts.append(f'<polyline class="{style} s{color}" points="{path}"/>')
    if not dashed and (len(points) <= 60 or len(piece) == 1):
      parts += [
        f'<circle class="f{color}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2.6">'
        f"<title>step {step}, {escaped(name)}: {number(value, 4)}</title></circle>"
        for step, value in piece
      ]
  return "".join(parts)


def _time_figure(phases: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
  """Stacked seconds of each phase and of idle time; many steps share a bar with their mean."""
  size = max(1, math.ceil(len(rows) / 100))
  bins = [rows[start : start + size] for start in range(0, len(rows), size)]

  def seconds_of(row: Mapping[str, Any]) -> list[float]:
    own = [finite(row.get(f"time/{name}")) or 0.0 for name in phases]
    return [*own, max(0.0, step_seconds(row) - sum(own))]

  stacks = [
    [sum(part) / len(rows_) for part in zip(*map(seconds_of, rows_), strict=True)] for rows_ in bins
  ]
  phases = [*phases, "idle"]
  axes = _axes([row["step"] for row in rows], [sum(stack) for stack in stacks], low=0.0)
  axes = axes._replace(x_low=axes.x_low - 0.5, x_high=axes.x_high + 0.5)
  drawing = _frame(axes, "seconds a step")
  for rows_, stack in zip(bins, stacks, strict=True):
    left, right = axes.x(rows_[0]["step"] - 0.42), axes.x(rows_[-1]["step"] + 0.42)
    base = 0.0
    for i, (name, seconds) in enumerate(zip(phases, stack, strict=True)):
      if seconds > 0:
        top, bottom = axes.y(base + seconds), axes.y(base)
        drawing += (
          f'<rect class="f{i % 8}" x="{left:.1f}" width="{right - left:.1f}" y="{top:.2f}" '
          f'height="{bottom - top:.2f}"><title>step {rows_[0]["step"]}, {escaped(name)}: '
          f"{number(seconds)} s</title></rect>"
        )
      base += seconds
  caption = "Where the time goes: the first steps also compile, so judge by the later ones."
  return _figure("Time per phase", phases, drawing, caption)


def step_seconds(row: Mapping[str, Any]) -> float:
  """How long a step took: its "time/step", else the sum of its phases."""
  whole = finite(row.get("time/step"))
  phases = (finite(value) or 0.0 for key, value in row.items() if key.startswith("time/"))
  return sum(phases) if whole is None else whole
