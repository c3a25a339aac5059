"""Dynamic sampling: whole groups that teach, in an order that only (seed, step) decides."""

from __future__ import annotations

import functools

import pytest

from experiments import grpo
from tests.experiments import helpers
from tests.experiments.helpers import equal, settings
from tests.representatives import mostly_slow

run = functools.partial(helpers.run, grpo)

REFILL = {"dynamic.groups": "informative", "eval.every": 0}


def groups(found, step):
  """The samples of a step, by group."""
  rows = [r for r in found.samples if r["split"] == "train" and r["step"] == step]
  return [rows[start : start + 4] for start in range(0, len(rows), 4)]


def test_a_step_is_refilled_with_groups_that_teach(tmp_path, small, files):
  """Prompts that begin with a, c, e, ... please with whatever is said: about half teach nothing."""
  base = settings(files) | {"jsonl.reward_function": "spread_for_some"}
  found = run(tmp_path / "refilled", base | REFILL | {"dynamic.max_rounds": 8})
  for row in found.metrics[:2]:
    kept = groups(found, row["step"])
    prompts = [group[0]["prompt"] for group in kept]
    assert len(set(prompts)) == len(prompts) == 4
    assert all(len({r["reward"] for r in group}) > 1 for group in kept)
    assert all(ord(prompt[0]) % 2 == 0 for prompt in prompts)
    assert row["refill/lacked"] == 0 and row["frac_zero_std"] == 0
  assert max(row["refill/rounds"] for row in found.metrics[:2]) > 1
  assert any(row["refill/tokens_beyond"] > 0 for row in found.metrics[:2])
  # The first round is what a step without a refill samples: what teaches among it is kept.
  plain = run(tmp_path / "plain", base | REFILL | {"dynamic.groups": "any"})
  teaching = [g for g in groups(plain, 0) if len({r["reward"] for r in g}) > 1]
  said = [[r["response"] for r in group] for group in groups(found, 0)]
  assert teaching and all([r["response"] for r in group] in said for group in teaching)


@pytest.mark.parametrize(
  ("function", "mean"), mostly_slow([("alike", 0.5), ("lonely", 1.0)], quick=[1])
)
def test_what_lacks_is_counted_and_filled(tmp_path, small, files, function, mean):
  """Nor does a group teach in which the responses that have a reward all have the same one."""
  changes = {"jsonl.reward_function": function, "dynamic.max_rounds": 2, "steps": 1}
  found = run(tmp_path, settings(files) | REFILL | changes)
  row = found.metrics[0]
  assert (row["refill/rounds"], row["refill/lacked"]) == (2, 4)
  assert len(groups(found, 0)) == 4 and row["reward_mean"] == mean


@pytest.mark.slow
def test_a_refilled_run_resumes_bit_for_bit(tmp_path, small, files):
  base = settings(files) | REFILL | {"jsonl.reward_function": "spread_for_some", "steps": 3}
  base |= {"optimizer.learning_rate": 0.03}
  straight = run(tmp_path / "straight", base)
  run(tmp_path / "stopped", base | {"steps": 1})
  resumed = run(tmp_path / "stopped", base)
  assert resumed.samples == straight.samples
  assert equal(straight.state, resumed.state)


@pytest.mark.slow
@pytest.mark.parametrize("responses", [2])
def test_a_penalty_for_length_does_not_make_a_group_teach(tmp_path, small, files, responses):
  changes = {"jsonl.reward_function": "alike", "overlong.cache": 8, "dynamic.max_rounds": 1}
  sizes = {"steps": 1, "responses_per_prompt": responses}
  found = run(tmp_path, settings(files) | REFILL | changes | sizes)
  assert found.metrics[0]["refill/lacked"] == 4


def test_groups_without_spread_can_be_left_out_of_all_means(tmp_path, small, files):
  """As if they had not been sampled: a constant reward leaves nothing to train on at all."""
  base = settings(files) | REFILL | {"steps": 1}
  base |= {"dynamic.groups": "drop", "loss.entropy_coef": 0.1}
  some = run(tmp_path / "some", base | {"jsonl.reward_function": "spread_for_some"})
  shares = [len({r["reward"] for r in group}) == 1 for group in groups(some, 0)]
  assert some.metrics[0]["dropped_groups"] == pytest.approx(sum(shares) / 4)
  none = run(tmp_path / "none", base | {"jsonl.reward_function": "alike"})
  assert none.metrics[0]["dropped_groups"] == 1 and none.metrics[0]["grad_norm"] == 0
