"""Draws an explanation's figure as SVG, whose text is text: any font of the reader will do."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rl_llm.checks import check_choice
from rl_llm.errors import ConfigError
from rl_llm.explain.explanation import LANGUAGES, Explanation, Figure, TokenRow
from rl_llm.runs.report_figures import ticks

# Legible on white and on black, as the page behind the figure is either.
_COLORS = ("#2f7ed8", "#d9730d", "#2e9e5b", "#a05fd0", "#c8385a", "#8a8a2a", "#5f8a9e")
_INK = "#808080"
_WIDTH, _HEIGHT = 720, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 500, 16, 290
_LINE, _BOX = 32, 24  # of a row of tokens: heights of a line, and of the boxes in it


def draw(explanation: Explanation, path: Path, *, lang: str = "en") -> None:
  """Writes the figure of an explanation as an SVG file.

  Args:
    explanation: of one of the topics.
    path: the file to write, which must end in .svg; its directory is made.
    lang: language of the labels, "en" or "ja".

  Raises:
    ConfigError: the file has another ending.
    ValueError: `lang` is neither.
  """
  check_choice("lang", lang, LANGUAGES)
  if path.suffix != ".svg":
    raise ConfigError("plot", path, "a file that ends in .svg", f"try --plot={path.stem}.svg")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(_svg(explanation, lang), encoding="utf-8")


def _svg(explanation: Explanation, lang: str) -> str:
  figure = explanation.figure()
  of_tokens = isinstance(figure, TokenRow)
  parts, height = _token_row(figure, lang) if of_tokens else (_curves(figure, lang), _HEIGHT)
  title = html.escape(getattr(explanation.title, lang))
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
    f'font-family="sans-serif" font-size="13" fill="{_INK}">\n<title>{title}</title>\n'
    + "\n".join(parts)
    + "\n</svg>\n"
  )


def _curves(figure: Figure, lang: str) -> list[str]:
  xs = [x for curve in figure.curves for x in curve.x] + [x for x, _ in figure.points]
  ys = [y for curve in figure.curves for y in curve.y] + [y for _, y in figure.points]
  x_of, x_ticks = _scale(xs, _LEFT, _RIGHT, pad=0.06 if figure.stepped else 0.0)
  y_of, y_ticks = _scale([*ys, 0.0], _BOTTOM, _TOP, pad=0.06)
  if figure.stepped:
    x_ticks = list(figure.curves[0].x)
  parts = [_line(_LEFT, _RIGHT, y_of(0.0), y_of(0.0))]
  parts += [_line(_LEFT, _LEFT, _TOP, _BOTTOM), _line(_LEFT, _RIGHT, _BOTTOM, _BOTTOM)]
  parts += [_text(_LEFT - 6, y_of(y) + 4, f"{y:.4g}", "end") for y in y_ticks]
  parts += [_text(x_of(x), _BOTTOM + 18, f"{x:.4g}", "middle") for x in x_ticks]
  label = getattr(figure.x_label, lang)
  parts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 10, label, "middle"))
  for i, curve in enumerate(figure.curves):
    color = _COLORS[i % len(_COLORS)]
    places = [(x_of(x), y_of(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    dash = ' stroke-dasharray="3 4"' if figure.stepped else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2"{dash} points="{path}"/>')
    if figure.stepped:
      parts += [_dot(x, y, color) for x, y in places]
    height = _TOP + 14 + 22 * i
    parts.append(_line(_RIGHT + 14, _RIGHT + 34, height - 4, height - 4, color, 3))
    parts.append(_text(_RIGHT + 40, height, getattr(curve.name, lang), "start"))
  return parts + [_dot(x_of(x), y_of(y), _INK) for x, y in figure.points]


def _token_row(row: TokenRow, lang: str) -> tuple[list[str], int]:
  """The tokens in boxes, who wrote them above, a line of marks below for each; and the height.

  A token that a mark is true of has a full box in its line, another one an empty box.
  """
  tokens = [token for _, own in row.parts for token in own]
  ends = np.cumsum([0.0, *(len(token) + 2 for token in tokens)])  # in characters
  edges = _LEFT + 16 + (_WIDTH - _LEFT - 24) * ends / ends[-1]
  parts, first, top = [], 0, _TOP + 22
  for name, own in row.parts:
    left, right = edges[first] + 2, edges[first + len(own)] - 2
    parts.append(_text((left + right) / 2, _TOP, getattr(name, lang), "middle"))
    parts.append(_line(left, right, _TOP + 10, _TOP + 10))
    first += len(own)
  for i, token in enumerate(tokens):
    parts.append(_box(edges[i], edges[i + 1], top, None))
    parts.append(_text((edges[i] + edges[i + 1]) / 2, top + 16, token, "middle"))
  for i, (name, found) in enumerate(row.marks):
    top += _LINE
    parts.append(_text(_LEFT + 8, top + 16, getattr(name, lang), "end"))
    for left, right, true in zip(edges[:-1], edges[1:], found, strict=True):
      parts.append(_box(left, right, top, _COLORS[i] if true else None))
  return parts, top + _LINE


def _scale(values: Sequence[float], start: float, end: float, *, pad: float):
  """(from a value to a pixel, round numbers to label) of an axis that covers the values."""
  low, high = float(np.min(values)), float(np.max(values))
  extent = (high - low) or 1.0
  low, high = low - pad * extent, (high if high > low else low + 1.0) + pad * extent
  labels = [round(tick, 12) + 0.0 for tick in ticks(low, high)]
  return lambda value: start + (float(value) - low) / (high - low) * (end - start), labels


def _line(x1: float, x2: float, y1: float, y2: float, color: str = _INK, width: float = 1) -> str:
  place = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
  return f'<line {place} stroke="{color}" stroke-width="{width}"/>'


def _dot(x: float, y: float, color: str) -> str:
  return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'


def _box(left: float, right: float, top: float, color: str | None) -> str:
  """Full of a color, or an outline without one."""
  place = f'x="{left + 2:.1f}" y="{top:.1f}" width="{right - left - 4:.1f}" height="{_BOX}" rx="3"'
  return f'<rect {place} fill="{color or "none"}" stroke="{color or _INK}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
