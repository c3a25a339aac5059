"""Where the time went and how fast it was, from records whose answers a pencil gives."""

from __future__ import annotations

import pytest

from rl_llm.runs import speed
from rl_llm.runs.chips import Peak
from rl_llm.runs.flops import Work
from rl_llm.runs.speed import (
  Phase,
  StepTable,
  idle_seconds,
  phases_of,
  rate_lines,
  rates,
  speed_metrics,
  step_table,
  steps_counted,
)

WORK = Work(generated_tokens=60, rollout_flops=4000, trained_tokens=50, update_flops=9000)


def test_a_row_has_the_rates_of_its_phases():
  times = {"time/rollout": 2.0, "time/update": 3.0, "time/step": 6.0}
  row = speed_metrics(times, WORK, Peak(12_000.0, measured=True))
  assert row == {
    "speed/generated_tokens_per_second": 60 / 2,
    "speed/rollout_flops_per_second": 4000 / 2,
    "speed/trained_tokens_per_second": 50 / 3,
    "speed/update_flops_per_second": 9000 / 3,
    "speed/mfu": 9000 / 3 / 12_000,
    "speed/peak_flops": 12_000.0,
    "speed/peak_measured": True,
  }


@pytest.mark.parametrize(
  "times, work, peak, missing",
  [
    ({"time/rollout": 2.0, "time/update": 3.0}, WORK, None, ("mfu", "peak_flops", "peak_measured")),
    (
      {"time/update": 3.0},
      WORK._replace(generated_tokens=0, rollout_flops=0),
      Peak(1.0, True),
      ("generated_tokens_per_second", "rollout_flops_per_second"),
    ),
    (
      {"time/rollout": 2.0, "time/update": 3.0},
      WORK._replace(trained_tokens=0, update_flops=0),
      Peak(1.0, True),
      (
        "trained_tokens_per_second",
        "update_flops_per_second",
        "mfu",
        "peak_flops",
        "peak_measured",
      ),
    ),
  ],
  ids=["unknown device", "no rollout", "nothing to learn"],
)
def test_what_cannot_be_said_is_absent_and_not_0(times, work, peak, missing):
  every = set(speed_metrics({"time/rollout": 1.0, "time/update": 1.0}, WORK, Peak(1.0, True)))
  assert every - set(speed_metrics(times, work, peak)) == {f"speed/{key}" for key in missing}


def row(number, **times):
  compiled = times.pop("compiled", 0.0)
  return {"step": number, "speed/compile_seconds": compiled} | {
    f"time/{name}": seconds for name, seconds in times.items()
  }


ROWS = [
  row(0, rollout=50.0, update=40.0, eval=9.0, step=99.0, compiled=60.0),
  row(1, rollout=3.0, update=4.0, step=8.0),
  row(2, rollout=5.0, update=4.0, step=10.0, compiled=0.9),  # A small program, 9 % of the step.
  row(3, rollout=4.0, update=9.0, checkpoint=2.0, step=16.0, compiled=0.0),
  row(4, rollout=4.0, update=30.0, step=36.0, compiled=20.0),
  {"step": 5, "time/eval": 7.0, "time/checkpoint": 3.0, "time/step": 10.0},  # The end: no step.
]


def test_the_table_is_of_steps_that_did_not_compile():
  table = step_table(ROWS)
  assert table == StepTable(
    [
      Phase("rollout", 3, 4.0, 12 / 34),
      Phase("update", 3, 4.0, 17 / 34),
      Phase("checkpoint", 1, 2.0, 2 / 34),
      Phase("idle", 3, 1.0, 3 / 34),
    ],
    steps=3,
    seconds=10.0,
    compiled=False,
  )
  assert sum(phase.share for phase in table.phases) == pytest.approx(1)
  assert steps_counted(table) == "3 steps that did not compile"


def test_where_all_steps_compiled_the_table_says_so():
  table = step_table(ROWS[:1])
  assert (table.steps, table.seconds, table.compiled) == (1, 99.0, True)
  assert steps_counted(table) == "1 step which compiled too"


@pytest.mark.parametrize("rows", [[], [{"step": 0}], ROWS[-1:], [{"step": 1, "time/update": 1.0}]])
def test_no_steps_no_table(rows):
  assert step_table(rows) is None and rates(rows) == {} and rate_lines(rates(rows)) == []


def test_phases_stand_in_the_order_of_a_step_and_unknown_ones_last():
  assert phases_of([row(0, zip=1.0, update=1.0, step=3.0), row(1, rollout=1.0)]) == [
    "rollout",
    "update",
    "zip",
  ]


def test_idle_is_never_less_than_nothing():
  assert idle_seconds({"time/update": 0.1 + 0.2, "time/step": 0.3}) == 0.0


def test_rates_of_a_run_are_its_work_by_its_seconds():
  """As if the counted steps were one: the sums of their work by the sums of their seconds."""
  works = [WORK, Work(10, 500, 90, 70_000)]
  times = [
    {"time/rollout": 2.0, "time/update": 4.0, "time/step": 7.0},
    {"time/rollout": 0.5, "time/update": 1.0, "time/step": 1.5},
  ]
  peak = Peak(50_000.0, measured=False)
  rows = [t | speed_metrics(t, w, peak) for t, w in zip(times, works, strict=True)]
  whole = {"time/rollout": 2.5, "time/update": 5.0}
  expected = speed_metrics(whole, Work(*map(sum, zip(*works, strict=True))), peak)
  assert rates(rows) == pytest.approx(expected)
  slow = {"time/rollout": 99.0, "time/update": 99.0, "time/step": 198.0}
  compiling = slow | speed_metrics(slow, WORK, peak) | {"speed/compile_seconds": 150.0}
  assert rates([compiling, *rows]) == pytest.approx(expected)


def test_a_person_reads_the_rates_and_what_they_are():
  found = rates(
    [
      {"time/update": 2.0, "time/rollout": 1.0, "time/step": 3.0}
      | speed_metrics(
        {"time/update": 2.0, "time/rollout": 1.0},
        Work(1234, 5 * 10**12, 500, 6 * 10**14),
        Peak(989e12, measured=False),
      )
    ]
  )
  assert rate_lines(found) == [
    "rollout: 1234 tokens/s generated, 5 TFLOP/s",
    "update: 250 tokens/s trained, 300 TFLOP/s",
    "MFU of the update: 0.3, with a peak of 989 TFLOP/s, as its maker says",
    f"  MFU = {speed.MFU_MEANS}",
  ]
