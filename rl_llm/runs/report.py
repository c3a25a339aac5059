"""The report of a run: one HTML file with its curves and samples, readable anywhere.

To judge a run, look at it: did accuracy on held-out problems rise, and what does the model write
now? The report answers both from the run's directory alone, without a network, a server or a
script, so it can be mailed, archived or opened ten years later. It reads

    metrics.jsonl   one line per step; step 0 is the evaluation before training
    samples.jsonl   prompts, responses, rewards                         (may be missing)
    config.json     the config; defaults.json has the defaults          (may be missing)
    changed.json    what differs from those of this model and preset    (may be missing)

Everything a model or a user wrote is escaped, and the page also forbids scripts.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl_llm.errors import ConfigError
from rl_llm.files import locked
from rl_llm.runs import config as configs
from rl_llm.runs import metrics as metrics_lib
from rl_llm.runs.formatting import duration, number
from rl_llm.runs.origin import missing_steps
from rl_llm.runs.report_figures import curves, step_seconds
from rl_llm.runs.report_page import escaped, finite, page, section
from rl_llm.runs.report_samples import (
  before_after,
  pairs_section,
  samples_section,
  surprises_section,
)
from rl_llm.runs.speed import rate_lines, rates, step_table, steps_counted
from rl_llm.runs.verdicts import verdicts

_REFRESH = 30  # seconds between two loadings of the page, while the run is in progress

NOTHING_WRONG = "No known fault is on record."


def write_report(run_dir: str | os.PathLike, *, live: bool = False) -> Path:
  """Writes report.html from the files in a run's directory, also while the run is in progress.

  Args:
    run_dir: directory that holds metrics.jsonl, and samples.jsonl, config.json and defaults.json
      if they exist.
    live: whether the run is in progress: the page then says so, and loads itself anew every
      half minute.

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
  config, defaults = read_settings(run_dir)
  sections = (
    _header(run_dir.resolve().name, rows, config, origin(run_dir, config, defaults)),
    _says(rows, config, read_changed(run_dir), live=live),
    _config(config, defaults),
    section("Curves", curves(rows)),
    pairs_section(before_after(samples)),
    surprises_section(samples),
    section("Where the time of a step goes", _speed(rows)),
    samples_section(samples),
  )
  path = run_dir / "report.html"
  text = page(run_dir.resolve().name, "".join(sections), refresh=_REFRESH if live else 0)
  metrics_lib.write_atomically(path, text.encode("utf-8"))
  return path


def read_settings(run_dir: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """(config, defaults) of a run's directory, dotted path -> value; {} where a file is missing.

  Raises:
    ValueError: a file is broken; the message names it.
  """
  run_dir = Path(run_dir)
  return _read_json(run_dir / "config.json"), _read_json(run_dir / "defaults.json")


def read_changed(run_dir: str | os.PathLike) -> dict[str, Any]:
  """The settings of a run that its model and preset do not have by default -> what these would be.

  Of a run that an earlier version began, by today's defaults of its experiment; {} if its settings
  are not today's.

  Raises:
    ValueError: the file is broken; the message names it.
  """
  run_dir = Path(run_dir)
  if (run_dir / "changed.json").exists():
    return _read_json(run_dir / "changed.json")
  program = _read_json(run_dir / "inputs.json").get("program")
  name = str(program.get("module")) if isinstance(program, dict) else ""
  if not re.fullmatch(r"experiments\.[a-z_]+", name):
    return {}
  try:
    config = importlib.import_module(name).Config()
    recorded = configs.replace(config, _read_json(run_dir / "config.json"))
    return json.loads(json.dumps(configs.usual_of_changed(recorded)))
  except (ImportError, AttributeError, ConfigError):
    return {}


def is_live(run_dir: str | os.PathLike) -> bool:
  """Whether a process of this machine trains in the directory: its lock is held."""
  lock = Path(run_dir) / ".lock"
  if not lock.exists():
    return False
  with locked(lock) as free:
    return not free


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


def origin(run_dir: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
  """The command that makes this run again, and the commit of its code, as far as they are known."""
  path = run_dir / "flags.txt"
  flags = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  changed = {f"--{key}" for key, value in config.items() if defaults.get(key, value) != value}
  words = [shlex.quote(flag) for flag in flags if flag.partition("=")[0] in changed]
  program = _read_json(run_dir / "inputs.json").get("program")
  if not isinstance(program, dict):
    return " ".join(words)
  commit = f"  # commit {program['commit']}" if program.get("commit") else ""
  dirty = ", with changes that are not committed" if commit and program.get("uncommitted") else ""
  return " ".join(["python -m", str(program.get("module", "?")), *words]) + commit + dirty


def _header(name: str, rows: Sequence[Mapping], config: Mapping[str, Any], command: str) -> str:
  shown = ("model", "task", "data", "preset", "seed")
  what = [f"{key} {config[key]}" for key in shown if key in config]
  cards = []
  for how in ("sampled", "greedy", "pair"):
    evaluated = [row for row in rows if finite(row.get(f"eval/{how}_accuracy")) is not None]
    if evaluated:
      cards.append(_accuracy_card(how, evaluated))
  steps = max((row["step"] for row in rows), default=0)
  seconds = sum(step_seconds(row) for row in rows)
  each = seconds / max(steps, 1)
  pace = duration(each) if each >= 10 else f"{number(each, 2)}s"
  note = f"{pace} a step on average" if steps else "the first one is on record"
  cards.append(_card("Steps", str(steps), note))
  cards.append(_card("Time", duration(seconds), "compiling, sampling, updating, evaluating"))
  line = f"<p>{escaped(', '.join(what), 300)}</p>" if what else ""
  words = [f"<span>{escaped(word)}</span>" for word in command[:1500].split(" ")]
  line += f'<p><code class="command">{" ".join(words)}</code></p>' if command else ""
  if missing := missing_steps((row["step"] for row in rows), steps):
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


def _says(
  rows: Sequence[Mapping], config: Mapping[str, Any], changed: Mapping[str, Any], *, live: bool
) -> str:
  """The box with what the record says, and how far the run is."""
  found = verdicts(rows, config, changed)
  lines = "".join(
    f"<li>{escaped(verdict.says, 600)}<br><b>{escaped(verdict.advice, 600)}.</b></li>"
    for verdict in found
  )
  said = f"<ul>{lines}</ul>" if found else f"<p>{NOTHING_WRONG}</p>"
  if live:
    step, steps = max((row["step"] for row in rows), default=0), finite(config.get("steps"))
    of = f" of {steps:.0f}" if steps else ""
    said += (
      f"<p>The run is in progress, at step {step}{of}. This page is written anew at each evaluation"
      f" and loads itself anew every {_REFRESH} seconds.</p>"
    )
  kind = "box fault" if found else "box"
  return f'<section class="{kind}"><h2>What this run says</h2>{said}</section>'


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
