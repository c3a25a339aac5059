"""The report of a run: one HTML file with its curves and samples, readable anywhere.

To judge a run, look at it: did accuracy on held-out problems rise, and what does the model write
now? The report answers both from the run's directory alone, without a network, a server or a
script, so it can be mailed, archived or opened ten years later. It reads

    metrics.jsonl   one line per step; step 0 is the evaluation before training
    samples.jsonl   prompts, responses, rewards                         (may be missing)
    config.json     the config; defaults.json has the defaults          (may be missing)

Everything a model or a user wrote is escaped, and the page also forbids scripts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_llm.runs import metrics as metrics_lib
from rl_llm.runs.console import duration, number
from rl_llm.runs.report_figures import curves, step_seconds
from rl_llm.runs.report_page import counted, escaped, finite, page, section
from rl_llm.runs.speed import rate_lines, rates, step_table, steps_counted

_STEPS_SHOWN = 24  # with samples

_ROWS_SHOWN = 16  # samples of one step

_PAIRS_SHOWN = 12  # before and after

_TEXT_SHOWN = 1500  # characters of a prompt or a response


def write_report(run_dir: str | os.PathLike) -> Path:
  """Writes report.html from the files in a run's directory, also while the run is in progress.

  Args:
    run_dir: directory that holds metrics.jsonl, and samples.jsonl, config.json and defaults.json
      if they exist.

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
    section("Curves", "".join(curves(rows)), "plots"),
    section("Where the time of a step goes", _speed(rows)),
    _pairs(before_after(samples)),
    _samples(samples),
  )
  path = run_dir / "report.html"
  text = page(run_dir.resolve().name, "".join(sections))
  metrics_lib.write_atomically(path, text.encode("utf-8"))
  return path


def before_after(samples: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping, Mapping]]:
  """The model's answers before training and now, to the same held-out problems.

  >>> def row(step, response):
  ...   return {"step": step, "split": "eval", "problem": "2+2", "response": response}
  >>> ((before, after),) = before_after([row(0, "5"), row(4, "3"), row(9, "4")])
  >>> before["response"], after["response"]
  ('5', '4')

  Args:
    samples: rows of samples.jsonl.

  Returns:
    (row of step 0, row of the last evaluated step) for each problem that both have: the first
    sample of each, in the order of step 0, not selected by quality.
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


def _header(name: str, rows: Sequence[Mapping], config: Mapping[str, Any]) -> str:
  shown = ("model", "task", "data", "preset", "seed")
  what = [f"{key} {config[key]}" for key in shown if key in config]
  cards = []
  for how in ("sampled", "greedy", "pair"):
    evaluated = [row for row in rows if finite(row.get(f"eval/{how}_accuracy")) is not None]
    if evaluated:
      cards.append(_accuracy_card(how, evaluated))
  steps = max((row["step"] for row in rows), default=0)
  seconds = sum(step_seconds(row) for row in rows)
  cards.append(_card("Steps", str(steps), f"{duration(seconds / max(steps, 1))} a step on average"))
  cards.append(_card("Time", duration(seconds), "compiling, sampling, updating, evaluating"))
  line = f"<p>{escaped(', '.join(what), 300)}</p>" if what else ""
  if missing := metrics_lib.missing_steps((row["step"] for row in rows), steps):
    line += f"<p>metrics.jsonl has lost the lines of steps {missing}</p>"
  return f'<header><h1>{escaped(name)}</h1>{line}<div class="cards">{"".join(cards)}</div></header>'


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


def _config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
  changed = {
    key: value for key, value in config.items() if key in defaults and defaults[key] != value
  }

  def table(values: Mapping[str, Any]) -> str:
    lines = "".join(
      f"<tr><td><code>{escaped(key)}</code></td><td><code>{escaped(value, 300)}</code></td>"
      + (f"<td><code>{escaped(defaults[key], 300)}</code></td>" if key in changed else "<td></td>")
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
  return section("Config", content)


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
  """The step table, and the rates of the steps in it."""
  table = step_table(rows)
  if table is None:
    return ""
  lines = [(phase.name, phase.steps, phase.seconds, phase.share) for phase in table.phases]
  lines.append(("step", table.steps, table.seconds, 1.0))
  cells = "".join(
    f'<tr><td>{escaped(name)}</td><td class="number">{steps}</td>'
    f'<td class="number">{seconds:.3f}</td><td class="number">{share:.1%}</td></tr>'
    for name, steps, seconds, share in lines
  )
  heads = ("phase", "steps", "median seconds", "share")
  head = "".join(f'<th class="number">{name}</th>' for name in heads[1:])
  told = "<br>".join(escaped(line) for line in rate_lines(rates(rows)))
  return (
    f"<p>In {steps_counted(table)}. A phase's median is that of the steps that had it; idle is "
    f"the time in no phase, in which the devices wait for the host.</p>"
    f"<table><tr><th>{heads[0]}</th>{head}</tr>{cells}</table><p>{told}</p>"
  )


def _text_cell(text: str, mark: bool | None = None) -> str:
  marks = {True: '<b class="right">✓ </b>', False: '<b class="wrong">✗ </b>', None: ""}
  return f'<td class="text">{marks[mark]}{escaped(text, _TEXT_SHOWN)}</td>'


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
  return section(
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
  # Evenly spaced, including the first and the last.
  steps = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
  folds = []
  for step in steps:
    rows = by_step[step]
    lines = "".join(_sample_line(row) for row in rows[:_ROWS_SHOWN])
    more = f", the first {_ROWS_SHOWN} shown" if len(rows) > _ROWS_SHOWN else ""
    folds.append(
      f"<details{' open' if step == steps[-1] else ''}><summary>step {step}: "
      f"{counted(len(rows), 'sample')}{more}</summary><table><tr><th>prompt</th>"
      "<th>response</th><th>reward</th><th>advantage</th><th>tokens</th></tr>"
      f"{lines}</table></details>"
    )
  left = len(by_step) - len(steps)
  note = f"<p>{left} steps in between are left out; samples.jsonl has them.</p>" if left else ""
  return section("Samples from training", note + "".join(folds) if folds else "")


def _sample_line(row: Mapping[str, Any]) -> str:
  reward = finite(row.get("reward"))
  shown = escaped(row.get("status", "-")) if reward is None else number(reward)
  advantage = number(finite(row.get("advantage")))
  tokens = f"{number(row.get('length'))}{' (cut)' if row.get('stop_reason') == 'length' else ''}"
  return (
    f"<tr>{_text_cell(row['prompt'])}{_text_cell(row['response'], row.get('correct'))}"
    f'<td class="number">{shown}</td><td class="number">{advantage}</td>'
    f'<td class="number">{tokens}</td></tr>'
  )
