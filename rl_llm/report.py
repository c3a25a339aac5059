"""The report of a run: one HTML file with its curves and samples, readable anywhere.

A run is judged by looking: did accuracy on held-out problems rise, and what does the model write
now? The report answers both from the run's directory alone, without a network, a server or a
script, so it can be mailed, archived or opened ten years on. It reads

    metrics.jsonl   one line per step; step 0 is the evaluation before training
    samples.jsonl   prompts, responses, rewards                         (may be missing)
    config.json     the config, and defaults.json what it differs from  (may be missing)

Everything a model or a user wrote is escaped, and the page forbids scripts besides.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_llm import metrics as metrics_lib
from rl_llm.console import duration, number, printable
from rl_llm.speed import MFU_MEANS, phases_of, rate_lines, rates, step_table, steps_counted

_STEPS_SHOWN = 24  # with samples
_ROWS_SHOWN = 16  # samples of one step
_PAIRS_SHOWN = 12  # before and after
_TEXT_SHOWN = 1500  # characters of a prompt or a response


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
    " where the reward goes on rising and this does not, the policy has found what the reward model"
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
    "all, and below 0 its baseline adds noise. Where all returns are alike there is nothing to "
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
    (("logprob_gap_mean", "mean"), ("logprob_gap_max", "largest")),
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

def write_report(run_dir: str | os.PathLike) -> Path:
  """Writes report.html into a run's directory, from the files there; also of a run that goes on.

  Args:
    run_dir: directory that holds metrics.jsonl, and samples.jsonl, config.json and defaults.json
      where there are any.

  Returns:
    The path of the report.

  Raises:
    FileNotFoundError: there is no metrics.jsonl; the message names the directory.
    ValueError: a file is broken; the message names it and the line.
  """
  run_dir = Path(run_dir)
  if not (run_dir / "metrics.jsonl").exists():
    raise FileNotFoundError(f"{run_dir} holds no metrics.jsonl, so it is no run's directory")
  rows = metrics_lib.read(run_dir / "metrics.jsonl")
  samples_path = run_dir / "samples.jsonl"
  samples = metrics_lib.read(samples_path) if samples_path.exists() else []
  config, defaults = _read_json(run_dir / "config.json"), _read_json(run_dir / "defaults.json")
  sections = (
    _header(run_dir.resolve().name, rows, config),
    _config(config, defaults),
    _section("Curves", "".join(_curves(rows)), "plots"),
    _section("Where the time of a step goes", _speed(rows)),
    _pairs(before_after(samples)),
    _samples(samples),
  )
  path = run_dir / "report.html"
  text = page(run_dir.resolve().name, "".join(sections))
  metrics_lib.write_atomically(path, text.encode("utf-8"))
  return path


def page(title: str, body: str) -> str:
  """A whole HTML document in the style of the reports; scripts are forbidden in it.

  Args:
    title: any text.
    body: HTML whose texts are escaped.
  """
  return _PAGE.replace("{title}", _shown(title)).replace("{body}", body)


def before_after(samples: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping, Mapping]]:
  """What the model answered before training and what it answers now, to the same held-out problems.

  >>> def row(step, response):
  ...   return {"step": step, "split": "eval", "problem": "2+2", "response": response}
  >>> ((before, after),) = before_after([row(0, "5"), row(4, "3"), row(9, "4")])
  >>> before["response"], after["response"]
  ('5', '4')

  Args:
    samples: rows of samples.jsonl.

  Returns:
    (row of step 0, row of the last evaluated step), the first sample of each problem that both
    have, in the order of step 0: nothing is picked.
  """
  evaluated = [row for row in samples if row.get("split") == "eval"]
  last = max((row["step"] for row in evaluated), default=0)
  if last == 0:
    return []
  first_of: dict[int, dict[Any, Mapping]] = {0: {}, last: {}}
  for row in evaluated:
    if row["step"] in first_of:
      first_of[row["step"]].setdefault(row["problem"], row)
  return [
    (row, first_of[last][problem])
    for problem, row in first_of[0].items()
    if problem in first_of[last]
  ]


def _read_json(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: not JSON ({error})") from None
  if not isinstance(values, dict):
    raise ValueError(f"{path}: must be a JSON object, dotted path -> value")
  return values


def _shown(value: Any, limit: int | None = None) -> str:
  """Any value as HTML text that acts on nothing."""
  text = value if isinstance(value, str) else json.dumps(value)
  return html.escape(printable(text, limit=limit, keep_newlines=True))


def finite(value: Any) -> float | None:
  """A record's value as a number to draw; None for what is missing or not finite."""
  try:
    value = float(value)
  except (TypeError, ValueError):
    return None
  return value if math.isfinite(value) else None


def _counted(count: int, noun: str) -> str:
  return f"{count} {noun}{'' if count == 1 else 's'}"


def _section(title: str, content: str, kind: str = "") -> str:
  if not content:
    return ""
  return f'<section><h2>{title}</h2><div class="{kind}">{content}</div></section>'


# --- header -------------------------------------------------------------------------------------


def _header(name: str, rows: Sequence[Mapping], config: Mapping[str, Any]) -> str:
  shown = ("model", "task", "data", "preset", "seed")
  what = [f"{key} {config[key]}" for key in shown if key in config]
  cards = []
  for how in ("sampled", "greedy", "pair"):
    evaluated = [row for row in rows if finite(row.get(f"eval/{how}_accuracy")) is not None]
    if evaluated:
      cards.append(_accuracy_card(how, evaluated))
  steps = max((row["step"] for row in rows), default=0)
  seconds = sum(_step_seconds(row) for row in rows)
  cards.append(_card("Steps", str(steps), f"{duration(seconds / max(steps, 1))} a step on average"))
  cards.append(_card("Time", duration(seconds), "compiling, sampling, updating, evaluating"))
  line = f"<p>{_shown(', '.join(what), 300)}</p>" if what else ""
  return f'<header><h1>{_shown(name)}</h1>{line}<div class="cards">{"".join(cards)}</div></header>'


def _accuracy_card(how: str, rows: Sequence[Mapping]) -> str:
  def percent(row: Mapping, key: str) -> str:
    value = finite(row.get(f"eval/{how}_{key}"))
    return "?" if value is None else f"{100 * value:.0f}"

  ends = [rows[0]] if len(rows) == 1 else [rows[0], rows[-1]]
  figure = ' <span class="arrow">→</span> '.join(f"{percent(row, 'accuracy')}%" for row in ends)
  intervals = [f"{percent(row, 'low')} to {percent(row, 'high')} %" for row in ends]
  note = f"95 % interval: {intervals[0]}"
  if len(ends) == 2:
    note = "<br>".join(
      f"95 % interval at step {row['step']}: {interval}"
      for row, interval in zip(ends, intervals, strict=True)
    )
  return _card(f"Held-out accuracy, {how}", figure, note, "wide")


def _card(title: str, figure: str, note: str, kind: str = "") -> str:
  return (
    f'<div class="card {kind}"><div class="name">{title}</div>'
    f'<div class="figure">{figure}</div><div class="note">{note}</div></div>'
  )


def _step_seconds(row: Mapping[str, Any]) -> float:
  """How long a step took: what it says itself, else the sum of its phases."""
  whole = finite(row.get("time/step"))
  phases = (finite(value) or 0.0 for key, value in row.items() if key.startswith("time/"))
  return sum(phases) if whole is None else whole


def _config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
  changed = {
    key: value for key, value in config.items() if key in defaults and defaults[key] != value
  }

  def table(values: Mapping[str, Any]) -> str:
    lines = "".join(
      f"<tr><td><code>{_shown(key)}</code></td><td><code>{_shown(value, 300)}</code></td>"
      + (f"<td><code>{_shown(defaults[key], 300)}</code></td>" if key in changed else "<td></td>")
      + "</tr>"
      for key, value in values.items()
    )
    return f"<table><tr><th>field</th><th>value</th><th>default</th></tr>{lines}</table>"

  if not config:
    return ""
  others = {key: value for key, value in config.items() if key not in changed}
  summary = f"{len(config)} settings"
  if defaults:
    summary += f", of which {len(changed)} changed from the default (first)"
  content = f"<details><summary>{summary}</summary>{table(changed | others)}</details>"
  return _section("Config", content)


# --- curves -------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 250, 62, 10, 10, 38


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
  for plot in _PLOTS:
    curves = [(key, name) for key, name in plot.curves if any(key in row for row in rows)]
    if curves:
      yield _line_figure(plot, curves, rows)
  phases = phases_of(rows)
  if phases:
    yield _time_figure(phases, rows)


def _ticks(low: float, high: float) -> list[float]:
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
  """Axes that hold all values, at least from low to high, with room where they would have none."""
  ends = [*values, *(end for end in (low, high) if end is not None)] or [0.0]
  bottom, top = min(ends), max(ends)
  pad = (top - bottom) * 0.06 or abs(top) * 0.1 or 1.0
  bottom = bottom if bottom == low else bottom - pad
  top = top if top == high else top + pad
  first, last = min(steps, default=0), max(steps, default=0)
  return _Axes(first, last if last > first else first + 1, bottom, top)


def _frame(axes: _Axes, unit: str) -> str:
  """Grid, ticks and the names of the axes."""
  parts = []
  right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
  for value in _ticks(axes.y_low, axes.y_high):
    y = axes.y(value)
    parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    label = number(round(value, 12) + 0.0)
    parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
  for value in _ticks(axes.x_low, axes.x_high):
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
  # None says that a step had nothing to measure, as where every group agreed: no fault.
  empty = {step for step, value in values if value is None}
  if empty:
    caption += f" Nothing to measure in {_counted(len(empty), 'step')}, first in step {min(empty)}."
  gone = [step for step, value in values if value is not None and finite(value) is None]
  if gone:
    count = f"{_counted(len(gone), 'value')} not finite, first at step {min(gone)}"
    caption += f" <strong>{count}.</strong>"
  return _figure(plot.title, [name for _, name in curves], drawing, caption)


def _line(axes: _Axes, points: Sequence[tuple[int, float | None]], color: int, name: str) -> str:
  """A curve that breaks where a value is not finite, with its points where they are few."""
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
  """Seconds of each phase and of none, stacked; many steps share a bar that shows their mean."""
  size = max(1, math.ceil(len(rows) / 100))
  bins = [rows[start : start + size] for start in range(0, len(rows), size)]

  def seconds_of(row: Mapping[str, Any]) -> list[float]:
    own = [finite(row.get(f"time/{name}")) or 0.0 for name in phases]
    return [*own, max(0.0, _step_seconds(row) - sum(own))]

  stacks = [[sum(part) / len(rows_) for part in zip(*map(seconds_of, rows_), strict=True)]
            for rows_ in bins]
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


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
  """The step table, and the rates of the steps in it."""
  table = step_table(rows)
  if table is None:
    return ""
  lines = [(phase.name, phase.steps, phase.seconds, phase.share) for phase in table.phases]
  lines.append(("step", table.steps, table.seconds, 1.0))
  cells = "".join(
    f'<tr><td>{_shown(name)}</td><td class="number">{steps}</td>'
    f'<td class="number">{seconds:.3f}</td><td class="number">{share:.1%}</td></tr>'
    for name, steps, seconds, share in lines
  )
  heads = ("phase", "steps", "median seconds", "share")
  head = "".join(f'<th class="number">{name}</th>' for name in heads[1:])
  told = "<br>".join(_shown(line) for line in rate_lines(rates(rows)))
  return (
    f"<p>In {steps_counted(table)}. A phase's median is that of the steps that had it; idle is "
    f"the time in no phase, in which the devices wait for the host.</p>"
    f"<table><tr><th>{heads[0]}</th>{head}</tr>{cells}</table><p>{told}</p>"
  )


# --- texts --------------------------------------------------------------------------------------


def _text_cell(text: str, mark: bool | None = None) -> str:
  marks = {True: '<b class="right">✓ </b>', False: '<b class="wrong">✗ </b>', None: ""}
  return f'<td class="text">{marks[mark]}{_shown(text, _TEXT_SHOWN)}</td>'


def _pairs(pairs: Sequence[tuple[Mapping, Mapping]]) -> str:
  if not pairs:
    return ""
  lines = "".join(
    f"<tr>{_text_cell(before['prompt'])}{_text_cell(before['response'], before.get('correct'))}"
    f"{_text_cell(after['response'], after.get('correct'))}</tr>"
    for before, after in pairs[:_PAIRS_SHOWN]
  )
  ends = [f"step {row['step']}" for row in pairs[0]]
  shown = min(len(pairs), _PAIRS_SHOWN)
  return _section(
    "Before and after",
    f"<p>The first {shown} of {len(pairs)} held-out problems on record, not chosen.</p>"
    f"<table><tr><th>prompt</th><th>before ({ends[0]})</th><th>after ({ends[1]})</th></tr>"
    f"{lines}</table>",
  )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
  by_step: dict[int, list[Mapping]] = {}
  for row in samples:
    if row.get("split") != "eval":
      by_step.setdefault(row["step"], []).append(row)
  steps = sorted(by_step)
  count = min(len(steps), _STEPS_SHOWN)
  # Evenly spaced, with the first and the last among them.
  steps = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
  folds = []
  for step in steps:
    rows = by_step[step]
    lines = "".join(_sample_line(row) for row in rows[:_ROWS_SHOWN])
    more = f", the first {_ROWS_SHOWN} shown" if len(rows) > _ROWS_SHOWN else ""
    folds.append(
      f"<details{' open' if step == steps[-1] else ''}><summary>step {step}: "
      f"{_counted(len(rows), 'sample')}{more}</summary><table><tr><th>prompt</th>"
      "<th>response</th><th>reward</th><th>advantage</th><th>tokens</th></tr>"
      f"{lines}</table></details>"
    )
  left = len(by_step) - len(steps)
  note = f"<p>{left} steps in between are left out; samples.jsonl has them.</p>" if left else ""
  return _section("Samples from training", note + "".join(folds) if folds else "")


def _sample_line(row: Mapping[str, Any]) -> str:
  reward = finite(row.get("reward"))
  shown = _shown(row.get("status", "-")) if reward is None else number(reward)
  advantage = number(finite(row.get("advantage")))
  tokens = f"{number(row.get('length'))}{' (cut)' if row.get('stop_reason') == 'length' else ''}"
  return (
    f"<tr>{_text_cell(row['prompt'])}{_text_cell(row['response'], row.get('correct'))}"
    f'<td class="number">{shown}</td><td class="number">{advantage}</td>'
    f'<td class="number">{tokens}</td></tr>'
  )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {
  color-scheme: light dark;
  --back: #f7f7f8; --paper: #ffffff; --ink: #1c1e21; --soft: #666b73; --rule: #e3e5e8;
  --right: #15803d; --wrong: #b91c1c;
  --c0: #2563eb; --c1: #d97706; --c2: #059669; --c3: #9333ea; --c4: #dc2626; --c5: #0891b2;
  --c6: #a16207; --c7: #64748b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15171a; --paper: #1e2125; --ink: #e6e8eb; --soft: #9aa1ab; --rule: #343a41;
    --right: #4ade80; --wrong: #f87171;
    --c0: #6ea8fe; --c1: #f5b042; --c2: #4cc38a; --c3: #c084fc; --c4: #f87171; --c5: #5cc8dd;
    --c6: #d6b25e; --c7: #94a3b8;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 12px; }
h3 { font-size: 15px; margin: 0 0 2px; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 18px; }
.card, figure, details, section > div > table {
  background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; }
.card { flex: 1 1 150px; padding: 14px 18px; }
.card.wide { flex: 2 1 280px; }
.card .name, .card .note { color: var(--soft); font-size: 13px; }
.card .figure { font-size: 38px; font-weight: 650; line-height: 1.25; white-space: nowrap; }
.arrow { color: var(--soft); font-weight: 400; }
.plots { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); }
figure { margin: 0; padding: 14px 16px 12px; display: flex; flex-direction: column; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.42; margin-top: 6px; }
figcaption strong { color: var(--wrong); }
svg { width: 100%; height: auto; display: block; margin-top: auto; }
svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.band { opacity: .16; }
.legend { font-size: 13px; color: var(--soft); display: flex; flex-wrap: wrap; gap: 2px 14px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 5px; background: currentColor; }
{colors}
details { padding: 8px 14px; margin-bottom: 8px; }
summary { cursor: pointer; font-weight: 550; }
details > table { margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 550; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
code, .text { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.text, code { white-space: pre-wrap; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
</style>
</head>
<body><main>
{body}
</main></body>
</html>
""".replace(
  "{colors}",
  "\n".join(
    f".s{i} {{ stroke: var(--c{i}); }} .f{i} {{ fill: var(--c{i}); }} "
    f".k{i}::before {{ color: var(--c{i}); }}"
    for i in range(8)
  ),
)
