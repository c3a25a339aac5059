"""The figures of a report as SVG, each with a caption that says what to look for."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rl_llm.runs.console import number
from rl_llm.runs.report_page import counted, finite
from rl_llm.runs.speed import MFU_MEANS, phases_of


class _Plot(NamedTuple):
  """What one figure shows, and what to look for in it."""

  title: str
  unit: str
  curves: tuple[tuple[str, str], ...]  # (key of metrics.jsonl, name in the legend)
  caption: str
  low: float | None = None  # the axis reaches at least this far down
  high: float | None = None


_PLOTS = (
  _Plot(
    "Held-out accuracy",
    "fraction right",
    (
      ("eval/sampled_accuracy", "sampled"),
      ("eval/greedy_accuracy", "greedy"),
      ("eval/pair_accuracy", "pairs"),
    ),
    "The curve that counts, on problems that training never draws, with 95 % bands: a reward that"
    " rises while it stays flat means that the model learns the grader's weaknesses.",
    0.0,
    1.0,
  ),
  _Plot(
    "Reward",
    "mean of the batch",
    (("reward_mean", "reward"), ("accuracy", "fraction right")),
    "The batch of each step, so look through the noise for the trend: flat from the start, the "
    "model never finds a right answer to learn from.",
  ),
  _Plot(
    "The same responses, graded",
    "mean grade",
    (("grade_mean", "grade"),),
    "A reward model gave the reward, and the task's own grader, which nobody trained on, gave this:"
    " where the reward keeps rising and this does not, the policy has found what the reward model"
    " overlooks.",
  ),
  _Plot(
    "Held-out loss",
    "nats",
    (("eval/token_loss", "per token"), ("eval/pair_loss", "per pair")),
    "On examples that training never sees: once it rises while the training loss falls, the model"
    " learns its examples by heart.",
  ),
  _Plot(
    "Pairs told apart",
    "fraction",
    (("pair_accuracy", "of the batch"),),
    "How often the better answer has the higher reward, implicit or modelled: the share that the"
    " model would have ranked as the labels do.",
    0.0,
    1.0,
  ),
  _Plot(
    "Log-probs of the two answers",
    "nats per answer",
    (("chosen_logprobs", "chosen"), ("rejected_logprobs", "rejected")),
    "The gap is all that most preference losses see, so both may fall; where the chosen answers"
    " fall far, the model comes to prefer answers that are in no pair.",
  ),
  _Plot(
    "Rewards of the two answers",
    "reward",
    (("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("margin", "margin")),
    "Implicit (beta times the log-ratio to the reference) or modelled: the margin should rise, and"
    " the chosen answers' own reward tells how.",
  ),
  _Plot(
    "Response length",
    "tokens",
    (("response_length_mean", "mean"),),
    "Length that climbs without accuracy is padding that the loss rewards, and length that falls "
    "to nothing is a grader that pays for silence.",
    0.0,
  ),
  _Plot(
    "Entropy",
    "nats per token",
    (("entropy", "entropy"),),
    "How undecided the model is: some fall is what learning looks like, but at 0 all samples of a"
    " problem are the same and learning stops, while a steep rise is a policy that falls apart.",
    0.0,
  ),
  _Plot(
    "KL to the reference",
    "nats",
    (("kl_ref", "KL"),),
    "How far the model has moved from where it began: a steady climb is the price of learning, a "
    "jump is an update that was too large.",
    0.0,
  ),
  _Plot(
    "Price of the KL",
    "reward per nat",
    (("kl_coef", "coefficient"),),
    "What a nat away from the reference costs: the controller raises it while the KL is over its "
    "target and lowers it while it is under.",
    0.0,
  ),
  _Plot(
    "KL of one step's updates",
    "nats",
    (("approx_kl", "KL"),),
    "How far one batch's updates move the policy from the one that sampled it: above about 0.1 "
    "the batch no longer describes the policy.",
  ),
  _Plot(
    "Explained variance of the value network",
    "fraction",
    (("explained_variance", "explained"),),
    "How much of the difference between returns was foreseen: 0 is no better than one number for "
    "all, and below 0 its baseline adds noise. Where all returns are equal there is nothing to "
    "explain, and no value.",
    high=1.0,
  ),
  _Plot(
    "Gradient norm",
    "before clipping",
    (("grad_norm", "norm"),),
    "Spikes are batches that pull hard, and a norm that grows step by step announces divergence.",
    0.0,
  ),
  _Plot(
    "Sampler-trainer log-prob gap",
    "nats",
    (("logprob_gap_mean", "mean"),),
    "Sampler and trainer should compute the same log-probs up to rounding, so a gap that grows "
    "means that the model learns from another distribution than the sampled one.",
    0.0,
  ),
  _Plot(
    "Groups with no spread, responses cut short",
    "fraction",
    (("frac_zero_std", "groups with no spread"), ("truncated_fraction", "cut at the limit")),
    "A group whose rewards are all equal teaches nothing (near 1, the problems are too easy or "
    "too hard), and a response cut at the length limit never came to its answer.",
    0.0,
    1.0,
  ),
  _Plot(
    "Clipped tokens",
    "fraction",
    (
      ("clip_low_fraction", "below"),
      ("clip_high_fraction", "above"),
      ("value_clip_fraction", "values"),
    ),
    "Tokens whose update the loss cut off: none where each batch is used once, and above about "
    "0.2 the steps are too large or too many.",
    0.0,
  ),
  _Plot(
    "Reward failures",
    "rewards per step",
    (
      ("rewards_raised", "raised"),
      ("rewards_timed_out", "timed out"),
      ("rewards_not_applicable", "not applicable"),
      ("rewards_unreadable", "unreadable"),
    ),
    "Responses without a reward, which are left out of the update rather than counted as 0: those"
    " that raised or timed out are faults of the grader and should stay at 0. Unreadable ones are"
    " wrong answers in a form that the grader does not know.",
    0.0,
  ),
  _Plot(
    "Loss",
    "dimensionless",
    (("loss", "loss"),),
    "Of sampled responses it is no measure of progress: advantages average to about zero, so it"
    " hovers around 0 however well a policy learns. Of given answers and pairs it should fall.",
  ),
  _Plot(
    "Learning rate",
    "per update",
    (("learning_rate", "learning rate"),),
    "The schedule as it was applied.",
    0.0,
  ),
  _Plot(
    "Tokens a second",
    "tokens per second",
    (
      ("speed/generated_tokens_per_second", "generated, in the rollout"),
      ("speed/trained_tokens_per_second", "trained, in the update"),
    ),
    "A rollout slows down where responses differ in length and the short ones wait for the longest;"
    " steps that compile are slow too.",
    0.0,
  ),
  _Plot(
    "MFU of the update",
    "fraction of the peak",
    (("speed/mfu", "MFU"),),
    f"{MFU_MEANS}. What is missing to 1 is waiting, moving data, and work on padding.",
    0.0,
  ),
)


_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 250, 62, 10, 10, 38


def curves(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
  for plot in _PLOTS:
    curves = [(key, name) for key, name in plot.curves if any(key in row for row in rows)]
    if curves:
      yield _line_figure(plot, curves, rows)
  phases = phases_of(rows)
  if phases:
    yield _time_figure(phases, rows)


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
  pad = (top - bottom) * 0.06 or abs(top) * 0.1 or 1.0
  bottom = bottom if bottom == low else bottom - pad
  top = top if top == high else top + pad
  first, last = min(steps, default=0), max(steps, default=0)
  return _Axes(first, last if last > first else first + 1, bottom, top)


def _frame(axes: _Axes, unit: str) -> str:
  """Grid, ticks and axis names."""
  parts = []
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
  for value in ticks(axes.y_low, axes.y_high):
    y = axes.y(value)
    parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    label = number(round(value, 12) + 0.0)
    parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
  for value in ticks(axes.x_low, axes.x_high):
    if value == round(value):
      x = axes.x(value)
      parts.append(
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
      )
      parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:.0f}</text>')
  middle_x, middle_y = (_LEFT + right) / 2, (_TOP + bottom) / 2
  parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
  parts.append(f'<text x="{middle_x}" y="{_HEIGHT - 5}" text-anchor="middle">step</text>')
  turn = f'transform="rotate(-90 12 {middle_y})"'
  parts.append(f'<text x="12" y="{middle_y}" text-anchor="middle" {turn}>{unit}</text>')
  return "".join(parts)


def _figure(title: str, names: Sequence[str], drawing: str, caption: str) -> str:
  legend = "".join(
    f'<span class="key k{i}">{html.escape(name)}</span>' for i, name in enumerate(names)
  )
  legend = f'<div class="legend">{legend}</div>' if len(names) > 1 else ""
  return (
    f"<figure><h3>{title}</h3>{legend}"
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title} by step">{drawing}</svg>'
    f"<figcaption>{caption}</figcaption></figure>"
  )


def _line_figure(plot: _Plot, curves: Sequence[tuple[str, str]], rows: Sequence[Mapping]) -> str:
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
    drawing += _line(axes, points[key], i, name)
  caption = plot.caption
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


def _line(axes: _Axes, points: Sequence[tuple[int, float | None]], color: int, name: str) -> str:
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
      parts.append(f'<polyline class="line s{color}" points="{path}"/>')
    if len(points) <= 60 or len(piece) == 1:
      parts += [
        f'<circle class="f{color}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2.6">'
        f"<title>step {step}, {html.escape(name)}: {number(value, 4)}</title></circle>"
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
          f'height="{bottom - top:.2f}"><title>step {rows_[0]["step"]}, {html.escape(name)}: '
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
