"""Laps: every row of a task's file once, then every row again, whatever a run resumes from."""

from __future__ import annotations

import json

import pytest

from experiments import dpo, grpo, sft
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from rl_llm.tasks import TaskError, in_laps, load_task


@pytest.fixture
def task(tmp_path):
  """Ten rows to train on."""
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": n}) + "\n" for n in range(10)))
  options = {"reward_function": "exact_match", "held_out_fraction": 0.0}
  return load_task(f"jsonl:{path}", **options)


def asked(task, seed, steps, size):
  return [[each.key for each in task.sample(seed, step, size)] for step in steps]


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_each_row_comes_once_a_lap(task, size):
  laps = in_laps(task, size)
  steps = range(3 * 10 // size + 1)
  everything = sum(asked(laps, 5, steps, size), [])
  rows = sorted(row.key for row in task.rows)
  for lap in range(3):
    assert sorted(everything[10 * lap : 10 * (lap + 1)]) == rows
  assert everything[:10] != everything[10:20]  # In another order.
  assert asked(laps, 6, [0], size) != asked(laps, 5, [0], size) or size == 1


def test_a_step_s_rows_need_no_memory_of_the_steps_before(task):
  laps = in_laps(task, 4)
  assert asked(laps, 0, [7], 4)[0] == asked(laps, 0, range(8), 4)[-1]
  assert asked(laps, 0, [7], 2)[0] == asked(laps, 0, [7], 4)[0][:2]


def test_without_laps_rows_are_missing_after_as_many_draws(task):
  drawn = sum(asked(task, 0, range(5), 2), [])
  assert len({*drawn}) < 10  # A test of the test.


def test_what_has_no_end_has_no_laps():
  with pytest.raises(TaskError, match="makes its problems"):
    in_laps(load_task("copy"), 4)


@pytest.mark.parametrize(
  ("experiment", "changes", "says"),
  [
    (grpo, {"dynamic.groups": "informative"}, "dynamic.groups"),
    (grpo, {"overlong_prompt": "drop"}, "overlong_prompt"),
    (sft, {"data": "rows.jsonl", "task": "none"}, "always come in turn"),
    (dpo, {"data": "rows.jsonl", "task": "none"}, "always come in turn"),
  ],
)
def test_refused(experiment, changes, says):
  with pytest.raises(ConfigError, match=says):
    experiment.check(replace(experiment.Config(), {"laps": True} | changes))
