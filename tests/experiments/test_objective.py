"""Flags of the objective: each moves what its documentation says, and its default moves nothing."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from experiments import grpo
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from tests.experiments import helpers
from tests.experiments.helpers import settings

run = functools.partial(helpers.run, grpo)


def trained_rows(found):
  return [row for row in found.samples if row["split"] == "train"]


def column(found, key, step=0):
  """[P, G] what the samples of a step have under this key."""
  return np.array([row[key] for row in trained_rows(found) if row["step"] == step]).reshape(4, 4)


# What a response is worth.


def gpg(rewards, lengths):
  teaches = np.ptp(rewards, axis=1) > 0
  return (rewards - rewards.mean(axis=1, keepdims=True)) * rewards.shape[0] / teaches.sum()


def opo(rewards, lengths):
  return rewards - (lengths * rewards).sum(axis=1, keepdims=True) / lengths.sum(axis=1)[:, None]


def best_of_four(rewards, lengths):
  """What the best adds to the second best, of all four; the others add nothing."""
  ordered = np.sort(rewards, axis=1)
  lead = (ordered[:, -1] - ordered[:, -2])[:, None]
  return np.where(rewards == ordered[:, -1:], lead, 0)


@pytest.mark.parametrize(
  ("changes", "formula"),
  [
    ({"advantage.name": "gpg"}, gpg),
    ({"advantage.name": "opo"}, opo),
    ({"advantage.name": "pass_at_k", "advantage.scale": "none"}, best_of_four),
    ({"advantage.name": "pass_at_k", "advantage.k": 4, "advantage.scale": "none"}, best_of_four),
  ],
  ids=["gpg", "opo", "pass_at_k", "pass_at_4"],
)
def test_an_advantage_chosen_by_name_is_that_of_its_formula(
  tmp_path, small, files, changes, formula
):
  changes |= {"jsonl.reward_function": "spread_for_some"}
  found = run(tmp_path, settings(files, steps=1) | changes)
  rewards, lengths = column(found, "reward"), column(found, "length")
  assert np.unique(lengths).size > 2
  wanted = formula(rewards, lengths)
  assert np.any(wanted)
  np.testing.assert_allclose(column(found, "advantage"), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("responses", [4, 1])
def test_remax_subtracts_the_reward_of_a_greedy_response(tmp_path, small, files, responses):
  """The greedy responses of step 0 are also those of an evaluation of the first weights."""
  changes = {"advantage.name": "remax", "responses_per_prompt": responses, "steps": 1}
  found = run(tmp_path, settings(files, **changes))
  of = [trained_rows(found)[p * responses :][:responses] for p in range(4)]
  baselines = [{round(row["reward"] - row["advantage"], 5) for row in rows} for rows in of]
  assert all(len(baseline) == 1 for baseline in baselines)  # one for each problem
  values = [baseline.pop() for baseline in baselines]
  assert found.metrics[0]["greedy_reward_mean"] == pytest.approx(np.mean(values), abs=1e-5)
  assert set(values) <= {n / 8 for n in range(8)}  # The rewards that there are.
  assert len(set(values)) > 1


def test_k_is_at_most_the_responses_there_are():
  changes = {"advantage.name": "pass_at_k", "responses_per_prompt": 8, "advantage.k": 9}
  with pytest.raises(ConfigError, match="--advantage.k=9: must be between 2 and 8"):
    grpo.check(replace(grpo.Config(), changes))
  grpo.check(replace(grpo.Config(), changes | {"advantage.k": 8}))


# What is added to rewards.


def test_the_overlong_penalty_grows_over_the_last_tokens_before_the_limit(tmp_path, small, files):
  changes = {"overlong.cache": 4, "overlong.limit": 7, "overlong.coef": 2.0, "steps": 1}
  changes |= {"eval.every": 0}
  found = run(tmp_path, settings(files, **changes))
  plain = run(tmp_path / "plain", settings(files, steps=1, **{"eval.every": 0}))
  lengths, rewards = column(found, "length"), column(plain, "reward")
  penalties = 2 * np.clip((7 - 4 - lengths) / 4, -1, 0)
  assert len(np.unique(penalties)) > 3
  np.testing.assert_allclose(column(found, "reward"), rewards + penalties, atol=1e-6)
  row, before = found.metrics[0], plain.metrics[0]
  assert row["overlong_penalty"] == pytest.approx(penalties.mean(), abs=1e-6)
  assert row["reward_mean"] == pytest.approx(before["reward_mean"] + penalties.mean(), abs=1e-5)
  assert row["accuracy"] == before["accuracy"] and row["grade_mean"] == before["reward_mean"]


def test_a_penalty_for_length_makes_responses_shorter(tmp_path, small, files):
  changes = {"overlong.cache": 8, "steps": 12, "optimizer.learning_rate": 0.02, "eval.every": 0}
  changes |= {"jsonl.reward_function": "alike", "prompts_per_step": 8, "responses_per_prompt": 8}
  found = run(tmp_path, settings(files, **changes) | {"microbatch_prompts": 8})
  lengths = [row["response_length_mean"] for row in found.metrics[:12]]
  assert np.mean(lengths[-3:]) < np.mean(lengths[:3]) - 1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"overlong.cache": 17}, r"--overlong.cache=17: must be at most the limit \(16 tokens\)"),
    ({"overlong.limit": 8}, "--overlong.limit=8: must be left out without --overlong.cache"),
  ],
)
def test_a_penalty_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    grpo.check(replace(grpo.Config(), changes))
