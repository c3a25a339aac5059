"""Online preferences: who duels whom, what is learned from it, interruptions, refusals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, online_dpo
from rl_llm import rollout
from rl_llm.errors import ConfigError
from rl_llm.rewards import RewardResult
from rl_llm.rollout import collect, duels
from rl_llm.rollout.grading import as_scores
from rl_llm.runs.config import replace
from tests.experiments import helpers
from tests.experiments.helpers import equal, run
from tests.experiments.test_sft import KILL_OR_ALL, stopped
from tests.representatives import mostly_slow

P, G, T = 2, 2, 4


def settings(files, **changes):
  return helpers.settings(files) | {"optimizer.learning_rate": 0.01} | changes


def scores(*values):
  results = [RewardResult(x, "ok" if x is not None else "timed_out") for x in values]
  return as_scores(results, group_size=G)


def test_preferences_are_the_order_or_a_reward_model_s_probability():
  own, other = scores(1.0, 0.0, 2.0, None), scores(0.5, 0.0, 4.0, 1.0)
  found, known = duels.preferences(own, other, scale=None)
  assert found[:3].tolist() == [1.0, 0.5, 0.0] and known.tolist() == [True, True, True, False]
  found, _ = duels.preferences(own, other, scale=2.0)
  wanted = [1 / (1 + math.exp(-2 * gap)) for gap in (0.5, 0, -2)]
  np.testing.assert_allclose(found[:3], wanted, rtol=1e-6)


def log_sigmoid(x):
  return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("name", ["dpo_loss", "xpo_loss", "nash_md_loss", "astar_po_loss"])
def test_objective(name, monkeypatch):
  """Two problems of two duels: the policy wins, ties, loses, and one has no grade."""
  rng = np.random.default_rng(1)
  mask = np.arange(T) < rng.integers(1, T + 1, (P * 2 * G, 1))
  logprobs, ref = (
    np.where(mask, -rng.uniform(0.1, 2, mask.shape), 0).astype(np.float32) for _ in range(2)
  )
  preferences, weights = np.float32([1, 0.5, 0.2, 0.9]), np.float32([1 / 3] * 3 + [0])
  rows = rollout.ResponseBatch(
    np.zeros((P, 1), np.int32), np.ones(P, np.int32), mask.astype(np.int32), mask, mask,
    ref_logprobs=ref,
  )  # fmt: skip
  monkeypatch.setattr(rollout, "response_logprobs", lambda params, *_, **__: (params, 0))
  config = replace(online_dpo.Config(), {"loss.name": name, "loss.beta": 0.3})
  batch = online_dpo.Batch(rows, preferences, weights)
  hparams = {"beta": jnp.float32(0.3), "alpha": jnp.float32(0.2)}
  loss_fn = online_dpo.make_loss(config, None)
  loss, found = loss_fn(jnp.asarray(logprobs), batch, hparams)
  sums, refs = (x.sum(1).reshape(P, 2, G) for x in (logprobs, ref))
  wanted = 0.0
  for k in range(P * G):
    p, g = divmod(k, G)
    own, other = sums[p, :, g]
    c, r = sums[p, :, g] - refs[p, :, g]
    if name == "astar_po_loss":
      wanted += weights[k] * (0.3 * c - preferences[k]) ** 2
      continue
    if name == "nash_md_loss":
      wanted += weights[k] * (-(preferences[k] - 0.5) * own + 0.3 * c**2 / 2)
      continue
    if preferences[k] != 0.5:
      gap = c - r if preferences[k] > 0.5 else r - c
      wanted -= weights[k] * log_sigmoid(0.3 * gap)
    if name == "xpo_loss":
      wanted += 0.2 * weights[k] * other
  assert float(loss) == pytest.approx(wanted, rel=1e-5)
  halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], (logprobs, batch)) for i in (0, 1)]
  parts = [float(loss_fn(jnp.asarray(of), part, hparams)[0]) for of, part in halves]
  assert sum(parts) == pytest.approx(wanted, rel=1e-5) and all(parts)
  if name == "astar_po_loss":
    return
  total, count = found["preference"]
  assert float(total) == pytest.approx(1.7) and int(count) == 3


@pytest.mark.parametrize(
  "name", mostly_slow(["dpo_loss", "xpo_loss", "nash_md_loss", "astar_po_loss"], quick=[0, 1, 2])
)
def test_the_opponent_is_who_it_should_be_and_samples_otherwise(
  name, files, small, tmp_path, monkeypatch
):
  seen, original = [], collect.answer

  def noting(sampler, params, drawn, keys, clock, **how):
    found = original(sampler, params, drawn, keys, clock, **how)
    embedding = np.asarray(jax.tree.leaves(params["embed"])[0])
    seen.append((embedding, found.rollout.tokens, found.drawn.prompts))
    return found

  monkeypatch.setattr(collect, "answer", noting)
  monkeypatch.setattr(duels, "answer", noting)
  run(online_dpo, tmp_path / "run", settings(files, **{"loss.name": name, "eval.every": 0}))
  (first, _, _), (_, _, _), (own, tokens, asked), (other, theirs, also) = seen
  assert asked == also and not np.array_equal(tokens, theirs)
  assert not np.array_equal(first, own)
  wanted = {
    "dpo_loss": own,
    "xpo_loss": first,
    "astar_po_loss": first,
    "nash_md_loss": (own + first) / 2,
  }[name]
  np.testing.assert_allclose(other, wanted, atol=1e-7)


def test_the_two_sides_lie_next_to_each_other(files, small, tmp_path, monkeypatch):
  batches = []
  original = duels.duel_batch

  def noting(own, other):
    batches.append((own, other, original(own, other)))
    return batches[-1][2]

  monkeypatch.setattr(duels, "duel_batch", noting)
  run(online_dpo, tmp_path / "run", settings(files, steps=1, **{"eval.every": 0}))
  own, other, made = batches[0]
  for p in range(4):
    for g in range(4):
      for side, found in enumerate((own, other)):
        mask = found.rollout.mask[p * 4 + g]
        row = (p * 2 + side) * 4 + g
        assert made.tokens[row, : mask.sum()].tolist() == (
          found.rollout.tokens[p * 4 + g][mask].tolist()
        )
        assert made.mask[row].sum() == mask.sum()


@pytest.mark.parametrize("stops", KILL_OR_ALL, ids=len)
@pytest.mark.parametrize("name", mostly_slow(["xpo_loss", "nash_md_loss"], quick=[1]))
def test_a_killed_run_resumes_bit_for_bit(name, stops, files, small, tmp_path, monkeypatch):
  changes = settings(files, steps=6, **{"loss.name": name, "checkpoint.every": 2, "eval.every": 4})
  straight = run(online_dpo, tmp_path / "straight", changes)
  cut = stopped(monkeypatch, online_dpo, tmp_path / "cut", changes, stops)
  assert cut.metrics == straight.metrics and cut.samples == straight.samples
  assert equal(cut.state, straight.state)


@pytest.mark.slow
def test_microbatches_add_up_to_the_whole(files, small, tmp_path):
  changes = settings(files, **{"loss.name": "xpo_loss", "loss.alpha": 0.1, "eval.every": 0})
  whole = run(online_dpo, tmp_path / "whole", changes)
  parts = run(online_dpo, tmp_path / "parts", changes | {"microbatch_prompts": 1})
  for one, two in zip(whole.metrics[:-1], parts.metrics[:-1], strict=True):
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_loss", "xpo_loss", "nash_md_loss", "astar_po_loss"])
def test_it_learns_what_the_grader_prefers(name, files, small, tmp_path):
  """Short answers win: more of them by the end, and more than the opponent has."""
  changes = {"jsonl.reward_function": "short", "steps": 25, "loss.name": name, "eval.every": 0}
  changes |= {"prompts_per_step": 8, "microbatch_prompts": 8, "loss.beta": 0.05}
  found = run(online_dpo, tmp_path / "run", settings(files, **changes))
  rewards = [row["reward_mean"] for row in found.metrics[:-1]]
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
  if name == "xpo_loss":  # The reference does not learn.
    theirs = [row["opponent_reward_mean"] for row in found.metrics[:-1]]
    assert np.mean(rewards[-5:]) > np.mean(theirs[-5:]) + 0.2


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"loss.alpha": 0.1}, "xpo_loss has it"),
    ({"loss.mixture": 0.1, "loss.name": "xpo_loss"}, "nash_md_loss has it"),
    ({"microbatch_prompts": 3}, "microbatch_prompts"),
    ({"preference_scale": -1.0}, "preference_scale"),
    ({"preference_scale": 1.0, "loss.name": "astar_po_loss"}, "compares rewards"),
    ({"loss.temperature": 0.1}, "astar_po_loss has it"),
  ],
)
def test_refused(changes, says, files):
  with pytest.raises(ConfigError, match=says):
    online_dpo.check(replace(online_dpo.Config(), settings(files) | changes))


def test_a_file_of_pairs_has_its_own_judge(tmp_path):
  changes = {"data": "pairs.jsonl", "task": "none", "reward": "model:somewhere"}
  with pytest.raises(ConfigError, match="says itself what is better"):
    dpo.check(replace(dpo.Config(), changes))


def test_the_reference_s_answers_say_what_the_best_policy_near_it_would_get():
  """V* is a soft maximum of the reference's rewards; one that failed is left out."""
  made = lambda found: collect.Experience(None, None, None, [], found, found, {}, [])  # noqa: E731
  own, other = made(scores(1.0, 0.0, 0.5, None)), made(scores(1.0, 0.0, 0.25, None))
  changes = {"loss.name": "astar_po_loss", "loss.temperature": 0.5}
  found, known = online_dpo.outcomes_of(replace(online_dpo.Config(), changes), own, other)
  first = 0.5 * math.log((math.exp(2) + 1) / 2)
  np.testing.assert_allclose(found, [1 - first, -first, 0.25, 0], rtol=1e-5)
  assert known.tolist() == [True, True, True, False]
