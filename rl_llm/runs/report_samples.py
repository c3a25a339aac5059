"""The samples of a report: what the model wrote, before and now, and what surprised it most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rl_llm.runs.console import telling
from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import counted, escaped, finite, section
from rl_llm.runs.transcripts import is_episode, parts

_STEPS_SHOWN = 24  # with samples

_ROWS_SHOWN = 16  # samples of one step

_PAIRS_SHOWN = 12  # before and after

_SURPRISES_SHOWN = 8

_TEXT_SHOWN = 1500  # characters of a prompt, a response or a turn

_LEGEND = (
  '<p>An episode has several turns: <span class="model">what the model wrote</span>, which is '
  'trained on, and <span class="environment">what its environment said</span>, which it only '
  "reads.</p>"
)


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


def _text_cell(text: str, mark: bool | None = None) -> str:
  marks = {True: '<b class="right">✓ </b>', False: '<b class="wrong">✗ </b>', None: ""}
  return f'<td class="text">{marks[mark]}{escaped(text, _TEXT_SHOWN)}</td>'


def _response_cell(row: Mapping[str, Any]) -> str:
  """What the model wrote; of an episode its turns, and what the environment said to them."""
  if not is_episode(row):
    return _text_cell(row["response"], row.get("correct"))
  said = "\n".join(
    f'<span class="{part.who}" title="{part.who}, {escaped(part.note)}">'
    f"{escaped(part.text, _TEXT_SHOWN)}</span>"
    for part in parts(row)[1:]
  )
  mark = _text_cell("", row.get("correct")).removesuffix("</td>")
  return f"{mark}\n{said}</td>"


def pairs_section(pairs: Sequence[tuple[Mapping, Mapping]]) -> str:
  """Held-out answers before and after: the first ones, and those that changed or are still wrong.

  Args:
    pairs: from `before_after`.
  """
  if not pairs:
    return ""
  judged = [pair for pair in pairs if all(type(row.get("correct")) is bool for row in pair)]
  folds = ""
  for title, ends in (
    ("Learned: wrong before, right now", (False, True)),
    ("Still wrong", (False, False)),
    ("Forgotten: right before, wrong now", (True, False)),
  ):
    found = [pair for pair in judged if tuple(row["correct"] for row in pair) == ends]
    if found:
      more = f", the first {_PAIRS_SHOWN} shown" if len(found) > _PAIRS_SHOWN else ""
      folds += (
        f"<details><summary>{title}: {len(found)} of {len(judged)}{more}</summary>"
        f"{_pairs_table(found)}</details>"
      )
  shown = min(len(pairs), _PAIRS_SHOWN)
  said = f"<p>The first {shown} of {len(pairs)} held-out problems on record, not chosen.</p>"
  return section("Before and after", said + _pairs_table(pairs)) + section(
    "What changed, and what is still wrong", folds
  )


def _pairs_table(pairs: Sequence[tuple[Mapping, Mapping]]) -> str:
  lines = "".join(
    f"<tr>{_text_cell(before['prompt'])}{_response_cell(before)}{_response_cell(after)}</tr>"
    for before, after in pairs[:_PAIRS_SHOWN]
  )
  ends = [f"step {row['step']}" for row in pairs[0]]
  return (
    f"<table><tr><th>prompt</th><th>before ({ends[0]})</th><th>after ({ends[1]})</th></tr>"
    f"{lines}</table>"
  )


def surprising(samples: Iterable[Mapping[str, Any]], *, count: int) -> list[Mapping[str, Any]]:
  """The training samples that pulled hardest: half of them upwards and half downwards.

  Once nearly all is right, the largest advantages are all of wrong answers; those that pull upwards
  say what is being learned. One sample a problem and step, the newest first where advantages are
  equal:

  >>> rows = [{"step": step, "problem": "2+2", "response": text, "advantage": advantage}
  ...         for step, text, advantage in ((1, "5", -0.4), (1, "4", 2.5), (2, "7", -2.5))]
  >>> [row["response"] for row in surprising(rows, count=2)]
  ['7', '4']

  Args:
    samples: rows of samples.jsonl.
    count: how many at most.
  """
  best: dict[tuple, tuple[float, int]] = {}
  rows = []
  for row in samples:
    pull = finite(row.get("advantage"))
    if row.get("split") == "eval" or not pull:
      continue
    key, rank = (row["step"], str(row.get("problem"))), (abs(pull), row["step"])
    if key not in best or rank > best[key][0]:
      best[key] = (rank, len(rows))
    rows.append(row)
  ordered = sorted(best.values(), reverse=True)
  up = [found for found in ordered if finite(rows[found[1]]["advantage"]) > 0]
  down = [found for found in ordered if finite(rows[found[1]]["advantage"]) < 0]
  half = count // 2
  kept = up[: max(count - half, count - len(down))] + down[: max(half, count - len(up))]
  return [rows[index] for _, index in sorted(kept, reverse=True)]


def surprises_section(samples: Sequence[Mapping[str, Any]]) -> str:
  """The most surprising samples of training, as a table."""
  found = surprising(samples, count=_SURPRISES_SHOWN)
  lines = "".join(_sample_line(row, step=True) for row in found)
  return section(
    "The most surprising samples",
    f"<p>The largest advantages of training, good and bad: these {len(found)} samples pulled "
    "hardest at the policy. If a wrong one pulls upwards, or a right one downwards, look at the "
    f"grader.</p>{_table(lines, step=True)}"
    if found
    else "",
  )


def samples_section(samples: Sequence[Mapping[str, Any]]) -> str:
  """The samples of training, step by step; of a long run, those of steps at equal distances.

  Problems whose responses earned differently come first.
  """
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
    lines = "".join(_sample_line(row) for row in telling(rows, count=_ROWS_SHOWN))
    more = f", {_ROWS_SHOWN} of them shown" if len(rows) > _ROWS_SHOWN else ""
    folds.append(
      f"<details{' open' if step == steps[-1] else ''}><summary>step {step}: "
      f"{counted(len(rows), 'sample')}{more}</summary>{_table(lines)}</details>"
    )
  left = len(by_step) - len(steps)
  legend = _LEGEND if any(map(is_episode, samples)) else ""
  note = f"<p>{left} steps in between are left out; samples.jsonl has them.</p>" if left else ""
  return section("Samples from training", legend + note + "".join(folds) if folds else "")


def _table(lines: str, *, step: bool = False) -> str:
  numbers = ("step", "reward", "advantage", "tokens")
  names = [*(["step"] if step else []), "prompt", "response", *numbers[1:]]
  head = "".join(f'<th class="{"number" if n in numbers else ""}">{n}</th>' for n in names)
  return f"<table><tr>{head}</tr>{lines}</table>"


def _sample_line(row: Mapping[str, Any], *, step: bool = False) -> str:
  reward = finite(row.get("reward"))
  shown = escaped(row.get("status", "-")) if reward is None else number(reward)
  advantage = number(finite(row.get("advantage")))
  tokens = f"{number(row.get('length'))}{' (cut)' if row.get('stop_reason') == 'length' else ''}"
  first = f'<td class="number">{row["step"]}</td>' if step else ""
  return (
    f"<tr>{first}{_text_cell(row['prompt'])}{_response_cell(row)}"
    f'<td class="number">{shown}</td><td class="number">{advantage}</td>'
    f'<td class="number">{tokens}</td></tr>'
  )
