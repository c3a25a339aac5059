"""Where a run's time went, and how fast the run was, read from its record.

A step's row has "time/<phase>" and "time/step" in seconds (`rl_llm.runs.metrics.PhaseClock`). From
these and the work that the step did, it also has

    speed/generated_tokens_per_second   tokens of the responses / time/rollout
    speed/rollout_flops_per_second      forward pass over prompts and responses / time/rollout
    speed/trained_tokens_per_second     tokens that the losses sum over / time/update
    speed/update_flops_per_second       forward and backward passes over these / time/update
    speed/mfu                           speed/update_flops_per_second / speed/peak_flops
    speed/peak_flops                    the most that all devices together do in a second
    speed/peak_measured                 whether that was measured, since no maker states it
    speed/compile_seconds               the part of time/step spent compiling

A key is missing if there is nothing to divide: no rollout, or a device of unknown peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rl_llm.runs.flops import Work
from rl_llm.runs.formatting import number

PHASES = ("rollout", "reward", "logprobs", "update", "eval", "checkpoint")
_PART_OF_COMPILING = 0.1  # of a step's time: with more, the step says nothing about the others

MFU_MEANS = (
  "model FLOPs / (seconds x peak FLOP/s of all devices); model FLOPs: forward and backward pass "
  "over the tokens that are there, no padding, nothing computed twice"
)


class Phase(NamedTuple):
  """One line of the step table.

  Attributes:
    name: of the phase.
    steps: how many steps had it.
    seconds: its median over those steps.
    share: its share of the time of all steps in the table.
  """

  name: str
  steps: int
  seconds: float
  share: float


class StepTable(NamedTuple):
  """Where the time of a step goes.

  Attributes:
    phases: in the order of a step; the last is "idle", the time outside all phases.
    steps: how many were counted.
    seconds: the median of a step.
    compiled: whether they spent time compiling, unlike later steps: no other steps are on record.
  """

  phases: list[Phase]
  steps: int
  seconds: float
  compiled: bool


def speed_metrics(times: Mapping[str, float], work: Work, peak: Any = None) -> dict[str, Any]:
  """The "speed/..." keys of a step's row; see above.

  An update that took 2 s for 6e9 operations, on devices that do 1e10 a second:

  >>> from rl_llm.runs.chips import Peak
  >>> found = speed_metrics({"time/update": 2.0}, Work(trained_tokens=500, update_flops=6 * 10**9),
  ...   Peak(1e10, measured=False))
  >>> found["speed/trained_tokens_per_second"], found["speed/mfu"]
  (250.0, 0.3)

  Args:
    times: from a `PhaseClock`.
    work: of the step.
    peak: a `rl_llm.runs.chips.Peak`; None if it is not known.
  """
  found = {}
  for phase, verb, tokens, flops in (
    ("rollout", "generated", work.generated_tokens, work.rollout_flops),
    ("update", "trained", work.trained_tokens, work.update_flops),
  ):
    seconds = times.get(f"time/{phase}", 0.0)
    if flops and seconds:
      found[f"speed/{verb}_tokens_per_second"] = tokens / seconds
      found[f"speed/{phase}_flops_per_second"] = flops / seconds
  rate = found.get("speed/update_flops_per_second")
  if peak is not None and rate is not None:
    found |= {
      "speed/mfu": rate / peak.flops,
      "speed/peak_flops": peak.flops,
      "speed/peak_measured": peak.measured,
    }
  return found


def phases_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """The phases that a record has times for, in the order of a step."""
  names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")}
  return [name for name in PHASES if name in names] + sorted(names - {*PHASES, "step"})


def idle_seconds(row: Mapping[str, Any]) -> float:
  """The time of a step outside its phases, in which the devices waited for the host.

  >>> idle_seconds({"time/rollout": 3.0, "time/update": 1.5, "time/step": 5.0})
  0.5
  """
  phases = sum(float(row.get(f"time/{name}", 0.0)) for name in phases_of([row]))
  return max(0.0, float(row.get("time/step", 0.0)) - phases)


def counted(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
  """The steps to measure speed by, and whether they all spent much of their time compiling.

  Leaves out the last line, which only evaluates, and steps that spent more than a tenth of their
  time compiling, unless there are no others.

  Args:
    rows: of metrics.jsonl.
  """
  others = {"time/eval", "time/checkpoint", "time/step"}
  trained = [
    row
    for row in rows
    if row.get("time/step") and any(key.startswith("time/") and key not in others for key in row)
  ]
  steady = [
    row
    for row in trained
    if row.get("speed/compile_seconds", 0.0) <= _PART_OF_COMPILING * row["time/step"]
  ]
  return (steady, False) if steady else (trained, True)


def step_table(rows: Sequence[Mapping[str, Any]]) -> StepTable | None:
  """Where a step's time goes: the phases of the steps that `counted` returns; None without steps.

  A phase's seconds are the median over the steps that had it: if one step in ten writes a
  checkpoint, the median over all would be 0. Its share is one of sums, so shares add up to 1.

  Args:
    rows: of metrics.jsonl.
  """
  steps, compiled = counted(rows)
  if not steps:
    return None
  times = {
    name: [row[f"time/{name}"] for row in steps if f"time/{name}" in row]
    for name in phases_of(steps)
  } | {"idle": [idle_seconds(row) for row in steps]}
  whole = [row["time/step"] for row in steps]
  phases = [
    Phase(name, len(seconds), statistics.median(seconds), sum(seconds) / sum(whole))
    for name, seconds in times.items()
  ]
  return StepTable(phases, len(steps), statistics.median(whole), compiled)


def rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The "speed/..." keys over all steps that `counted` returns: total work by total seconds, not a
  mean of rates.

  10 tokens a second for 1 s and 40 for 2 s are 90 tokens in 3 s:

  >>> row = {"time/step": 1.0, "time/update": 1.0, "speed/trained_tokens_per_second": 10.0}
  >>> slow = {"time/step": 2.0, "time/update": 2.0, "speed/trained_tokens_per_second": 40.0}
  >>> rates([row, slow])
  {'speed/trained_tokens_per_second': 30.0}

  Args:
    rows: of metrics.jsonl.

  Returns:
    As `speed_metrics`, without the seconds of compiling; empty if no step had any rates.
  """
  steps, _ = counted(rows)
  found = {}
  for key, phase in (
    ("speed/generated_tokens_per_second", "rollout"),
    ("speed/rollout_flops_per_second", "rollout"),
    ("speed/trained_tokens_per_second", "update"),
    ("speed/update_flops_per_second", "update"),
    ("speed/mfu", "update"),
  ):
    pairs = [(row[key], row[f"time/{phase}"]) for row in steps if key in row]
    if pairs:
      seconds = sum(time for _, time in pairs)
      found[key] = sum(rate * time for rate, time in pairs) / seconds
  if "speed/mfu" in found:
    last = next(row for row in reversed(steps) if "speed/mfu" in row)
    found |= {key: last[key] for key in ("speed/peak_flops", "speed/peak_measured")}
  return found


def steps_counted(table: StepTable) -> str:
  """Which steps the table covers."""
  steps = f"{table.steps} step{'s' if table.steps > 1 else ''}"
  which = "which compiled too" if table.compiled else "that did not compile"
  return f"{steps} {which}"


def flop_rate(value: float) -> str:
  """Formats operations a second for a person.

  >>> flop_rate(1.234e11), flop_rate(9.89e14), flop_rate(3.2e6)
  ('123 GFLOP/s', '989 TFLOP/s', '0.0032 GFLOP/s')
  """
  unit, name = (1e12, "TFLOP/s") if value >= 1e12 else (1e9, "GFLOP/s")
  return f"{number(value / unit)} {name}"


def rate_lines(found: Mapping[str, Any]) -> list[str]:
  """The result of `rates` in words."""
  lines = []
  for phase, verb in (("rollout", "generated"), ("update", "trained")):
    tokens = found.get(f"speed/{verb}_tokens_per_second")
    if tokens is not None:
      flops = flop_rate(found[f"speed/{phase}_flops_per_second"])
      lines.append(f"{phase}: {number(float(round(tokens)))} tokens/s {verb}, {flops}")
  if "speed/mfu" in found:
    how = "measured at the start" if found["speed/peak_measured"] else "as its maker says"
    mfu, peak = number(found["speed/mfu"], 2), flop_rate(found["speed/peak_flops"])
    lines += [f"MFU of the update: {mfu}, with a peak of {peak}, {how}", f"  MFU = {MFU_MEANS}"]
  return lines
