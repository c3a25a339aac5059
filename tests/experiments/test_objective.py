"""Flags of the objective: each moves what its documentation says, and its default moves nothing."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo, reinforce, setup
from rl_llm import losses
from rl_llm.errors import ConfigError
from rl_llm.rollout import ResponseBatch
from rl_llm.runs.config import replace
from rl_llm.training import objective
from tests.experiments import helpers
from tests.experiments.helpers import settings
from tests.representatives import mostly_slow

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
  mostly_slow(
    [
      ({"advantage.name": "gpg"}, gpg),
      ({"advantage.name": "opo"}, opo),
      ({"advantage.name": "pass_at_k", "advantage.scale": "none"}, best_of_four),
      ({"advantage.name": "pass_at_k", "advantage.k": 4, "advantage.scale": "none"}, best_of_four),
    ],
    quick=[1, 3],
  ),
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


@pytest.mark.parametrize("responses", mostly_slow([4, 1], quick=[0]))
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
  said = [row["response"] for row in trained_rows(found)]
  grades = np.array([sum(map(ord, text)) % 8 / 8 for text in said])  # As `fraction` has them.
  lengths, rewards = column(found, "length"), grades.reshape(4, 4)
  penalties = 2 * np.clip((7 - 4 - lengths) / 4, -1, 0)
  assert len(np.unique(penalties)) > 3
  np.testing.assert_allclose(column(found, "reward"), rewards + penalties, atol=1e-6)
  row = found.metrics[0]
  assert row["overlong_penalty"] == pytest.approx(penalties.mean(), abs=1e-6)
  assert row["reward_mean"] == pytest.approx(grades.mean() + penalties.mean(), abs=1e-5)
  assert row["accuracy"] == (grades == 1).mean()
  assert row["grade_mean"] == pytest.approx(grades.mean(), abs=1e-6)


@pytest.mark.slow
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


# How much a token counts.


def shifted(monkeypatch, by):
  """The sampler reports log-probs that are lower by these nats than they were."""

  def wrap(sample):
    def sample_and_shift(state, step, clock):
      found = sample(state, step, clock)
      logprobs = found.rollout.sampler_logprobs - by
      return found._replace(rollout=found.rollout._replace(sampler_logprobs=logprobs))

    return sample_and_shift

  helpers.wrap_seams(monkeypatch, sample=wrap)


FACTORS = [
  ({"correction.name": "token"}, np.exp(0.5)),
  ({"correction.name": "token", "correction.high": 1.25}, 1.25),
  ({"correction.name": "geometric", "correction.high": 2.0}, 1.0),
  ({"correction.name": "icepop", "correction.high": 1.25}, 0.0),
  ({"correction.second_moment_mask": 0.2}, 0.0),
  ({"correction.trust_region_mask": 0.2}, 1.0),  # k3 of 0.5 is 0.107, or 0.149 the other way.
]


@pytest.mark.parametrize(("changes", "factor"), FACTORS)
def test_a_correction_weighs_tokens_as_told(changes, factor):
  mask = np.arange(3) < np.array([3, 1])[:, None]
  own, sampled = np.where(mask, -1.0, 0), np.where(mask, -1.5, 0)
  batch = ResponseBatch(
    np.zeros((1, 1), int), np.ones(1, int), mask.astype(int), mask, mask,
    sampler_logprobs=sampled, old_logprobs=own, advantages=np.array([1.0, -1.0]),
  )  # fmt: skip
  found = setup.weigh(replace(grpo.Config(), changes))(batch)["factors"]
  np.testing.assert_allclose(np.asarray(found)[mask], factor, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "factor"),
  mostly_slow([*FACTORS, ({"weighting.top_entropy": 0.25}, 0.25)], quick=[4, 6]),
)
def test_a_factor_is_what_was_asked_for(tmp_path, small, files, monkeypatch, changes, factor):
  """The trainer's probabilities are e^0.5 times those that the sampler reports."""
  shifted(monkeypatch, 0.5)
  found = run(tmp_path, settings(files, steps=1, **{"eval.every": 0}) | changes)
  row, tokens = found.metrics[0], sum(r["length"] for r in trained_rows(found))
  assert row["factor_mean"] == pytest.approx(factor, abs=1e-3 + 1 / tokens)
  assert (row["grad_norm"] > 0) == (factor > 0)


def test_shared_tokens_count_as_told():
  """A right and a wrong response begin with one token: those of random weights hardly ever do."""
  tokens, mask = np.array([[4, 5], [4, 6]]), np.ones((2, 2), bool)
  batch = ResponseBatch(
    np.zeros((1, 1), int), np.ones(1, int), tokens, mask, mask, advantages=np.array([1.0, -1.0])
  )
  config = replace(grpo.Config(), {"weighting.shared_tokens": 3.0})
  assert setup.weigh(config)(batch)["factors"].tolist() == [[3, 1], [0, 1]]
  assert "factors" not in setup.weigh(grpo.Config())(batch)


def test_responses_that_the_policy_has_left_are_dropped(tmp_path, small, files, monkeypatch):
  """The sampler reports log-probs above the policy's: every other response is left that far."""
  left = np.arange(16) % 2 == 1
  shifted(monkeypatch, np.where(left, -1.0, -0.2)[:, None])
  base = settings(files, steps=1, **{"eval.every": 0})
  found = run(tmp_path, base | {"correction.off_policy_mask": 0.5})
  rows = trained_rows(found)
  bad = [row["length"] * (row["advantage"] < 0) for row in rows]
  share = np.dot(bad, left) / sum(row["length"] for row in rows)
  assert 0 < share and np.dot(bad, ~left) > 0
  assert found.metrics[0]["off_policy_fraction"] == pytest.approx(share, abs=1e-6)


# Further losses and terms.

BUSY = {"epochs": 2, "optimizer.learning_rate": 0.03, "steps": 2, "eval.every": 0}


@pytest.mark.parametrize("loss", mostly_slow(["clip_cov_loss", "kl_cov_loss"], quick=[0]))
def test_as_many_tokens_are_held_back_as_asked(tmp_path, small, files, loss):
  changes = {"loss.name": loss, "loss.selected": 0.25, "microbatch_prompts": 1}
  if loss == "clip_cov_loss":  # All that there are.
    changes |= {"loss.covariance_low": -1e6, "loss.covariance_high": 1e6}
  found = run(tmp_path, settings(files, **BUSY) | changes)
  for row in found.metrics[:2]:
    tokens = sum(r["length"] for r in trained_rows(found) if r["step"] == row["step"])
    assert row["selected_fraction"] == pytest.approx(int(0.25 * tokens) / tokens, abs=1e-6)


def test_llds_holds_up_what_would_fall(tmp_path, small, files):
  found = {
    coef: run(tmp_path / str(coef), settings(files, **BUSY) | {"llds.coef": coef, "epochs": 4})
    for coef in (1e-9, 10.0)
  }
  lost = {coef: found[coef].metrics[0]["lost_likelihood"] for coef in found}
  assert 0 < lost[10.0] < 0.8 * lost[1e-9]


def test_right_answers_become_likelier(tmp_path, small, files):
  changes = {"jsonl.reward_function": "short", "weighting.name": "sequence_mean"}
  found = {
    coef: run(tmp_path / str(coef), settings(files, **BUSY) | changes | {"positive_nll_coef": coef})
    for coef in (1e-9, 1.0)
  }
  nll = {coef: found[coef].metrics[0]["positive_nll"] for coef in found}
  assert 0 < nll[1.0] < nll[1e-9]  # Over both of a step's epochs.


@pytest.mark.slow
def test_a_step_ends_once_the_policy_has_moved_far_enough(tmp_path, small, files):
  changes = settings(files, **BUSY) | {"epochs": 4}
  updates = {}
  for target in (0.0, 1e-6, 1e6):
    found = run(tmp_path / str(target), changes | {"target_kl": target})
    updates[target] = int(next(x for path, x in found.state.items() if path.endswith("step")))
    assert ("kl_old" in found.metrics[0]) == (target > 0)
  # The first update of a step finds the policy where it was; the second is the last.
  assert updates == {0.0: 8, 1e-6: 4, 1e6: 8}


def test_a_kl_in_the_loss_is_no_part_of_what_a_response_earns(tmp_path, small, files):
  """Of `reinforce`, which has it in the reward by default: leave-one-out of the rewards alone."""
  changes = {"kl.coef": 0.5, "kl.place": "loss", "kl.value": "k1", **BUSY}
  found = helpers.run(reinforce, tmp_path, settings(files) | {"loss.name": "ppo_loss"} | changes)
  assert abs(found.metrics[1]["kl_ref"]) > 1e-3
  rewards, advantages = (column(found, key, step=1) for key in ("reward", "advantage"))
  wanted = (rewards - rewards.mean(axis=1, keepdims=True)) * 4 / 3
  np.testing.assert_allclose(advantages, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [grpo, reinforce])
def test_the_kl_is_in_the_loss_or_in_the_reward_of_any_script(tmp_path, small, files, experiment):
  """In the reward it is measured before the updates; in the loss it is a metric of each."""
  weights = []
  for place in ("loss", "reward"):
    changes = {"kl.coef": 0.5, "kl.place": place, "kl.value": "k1", **BUSY}
    base = settings(files) | {"loss.name": "ppo_loss"}
    found = helpers.run(experiment, tmp_path / place, base | changes)
    assert abs(found.metrics[1]["kl_ref"]) > 1e-3
    weights.append(found.params)
  assert not helpers.equal(*weights)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"llds.coef": 0.2}, "--llds.coef=0.2: must be 0 with one update a step.*--epochs=2"),
    ({"target_kl": 0.2}, "--target_kl=0.2: must be 0 with one update a step.*--epochs=2"),
    ({"llds.level": "token"}, "--llds.level=token: must be left out without --llds.coef"),
    ({"correction.low": 0.5}, "--correction.low=0.5: must be left out without --correction"),
    ({"correction.name": "token", "correction.low": 3.0}, "--correction.low=3.0: must be below"),
    ({"loss.selected": 0.5}, "--loss.selected=0.5: must be left out with --loss=grpo_loss"),
    (
      {"loss.name": "kl_cov_loss", "loss.covariance_low": 0.5},
      "--loss.covariance_low=0.5: must be left out with --loss=kl_cov_loss",
    ),
    ({"kl.place": "reward", "kl.gradient": "k3"}, "--kl.gradient=k3: must be left out with"),
  ],
)
def test_what_would_do_nothing_is_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    grpo.check(replace(grpo.Config(), changes))


@pytest.mark.parametrize("parts", [1, 2])
def test_tpo_is_about_whole_responses_and_adds_up_over_microbatches(parts):
  """softmax over a group's responses against the tilted old ones, in plain Python."""
  rng = np.random.default_rng(4)
  mask = np.arange(5) < rng.integers(1, 6, (6, 1))
  logprobs, old = (np.where(mask, -rng.uniform(0, 2, mask.shape), 0) for _ in range(2))
  advantages = rng.normal(size=6)
  weights = np.where(mask, 1 / mask.sum(1, keepdims=True) / 6, 0)  # sequence_mean
  total = 0.0
  for part in range(parts):
    rows, asked = slice(part * 6 // parts, (part + 1) * 6 // parts), 2 // parts
    batch = ResponseBatch(
      np.zeros((asked, 1)), np.ones(asked), mask[rows], mask[rows], mask[rows],
      advantages=jnp.asarray(advantages[rows]),
    )  # fmt: skip
    given = jnp.asarray(logprobs[rows]), jnp.asarray(old[rows]), batch, jnp.asarray(weights[rows])
    total += float(objective.group_loss(losses.tpo_loss, *given, temperature=0.5)[0])
  wanted = 0.0
  for p in range(2):
    own, before = (x.sum(1)[3 * p : 3 * p + 3] for x in (logprobs, old))
    tilted = np.exp(before + advantages[3 * p : 3 * p + 3] / 0.5)
    log_p = own - np.log(np.exp(own).sum())
    wanted -= (tilted / tilted.sum() * log_p).sum() / 2
  assert total == pytest.approx(wanted, rel=1e-5)
