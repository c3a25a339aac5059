"""What an update reads: how much each token counts, and what groups are compared by."""

import types

import jax
import numpy as np

from rl_llm import weighting
from rl_llm.rewards.results import RewardResult
from rl_llm.rollout import ResponseBatch
from rl_llm.rollout.grading import Scores
from rl_llm.training.credit import less_kl
from rl_llm.training.minibatches import all_weights, group_inputs, make_programs, minibatches

MASK = np.array([[True, True, True], [True, False, False], [True, True, False], [True] * 3])
ROWS = np.zeros(MASK.shape, np.int32)
BATCH = ResponseBatch(
  np.zeros((2, 2), np.int32),
  np.array([1, 2]),
  ROWS,
  MASK,
  MASK,
  truncated=np.array([False, False, True, False]),
)


def test_the_weights_of_the_kl_are_those_of_the_loss_unless_named():
  found = all_weights(BATCH, name="token_mean", length=8)
  np.testing.assert_array_equal(found["weights"], weighting.token_mean(MASK))
  assert found["kl_weights"] is None


def test_a_kl_term_may_have_weights_of_its_own():
  found = all_weights(BATCH, name="token_mean", length=8, kl_name="sequence_mean", truncated="zero")
  kept = np.where(BATCH.truncated[:, None], 0, 1)
  np.testing.assert_array_equal(found["weights"], weighting.token_mean(MASK) * kept)
  np.testing.assert_array_equal(found["kl_weights"], weighting.sequence_mean(MASK) * kept)


def test_an_update_takes_both_with_its_rows():
  weigh = lambda batch: all_weights(batch, name="token_mean", length=8, kl_name="sequence_sum")  # noqa: E731
  programs = make_programs(None, None, temperature=1.0, weigh=weigh)
  taken = programs.take(jax.tree.map(jax.numpy.asarray, BATCH), np.array([1]))
  np.testing.assert_array_equal(taken.weights, weighting.token_mean(MASK[2:]))
  np.testing.assert_array_equal(taken.kl_weights, weighting.sequence_sum(MASK[2:]))
  assert taken.truncated is None


def test_factors_are_those_of_the_loss_alone_and_multiply():
  rng = np.random.default_rng(0)
  old, entropies = np.log(rng.uniform(0.2, 0.9, MASK.shape)), rng.uniform(size=MASK.shape)
  batch = BATCH._replace(old_logprobs=old, sampler_logprobs=old - 1.0, entropies=entropies)
  icepop = {"level": "token", "low": 0.5, "high": 5.0, "mode": "mask"}
  given = {
    "name": "token_mean",
    "length": 8,
    "corrections": {"truncated_importance": icepop},
    "top_entropy": 0.5,
  }
  found = all_weights(batch, **given)
  np.testing.assert_array_equal(found["weights"], weighting.token_mean(MASK))
  surest = np.sort(entropies[MASK])[: MASK.sum() // 2]
  kept = MASK & ~np.isin(entropies, surest)
  np.testing.assert_allclose(found["factors"], kept * np.e, rtol=1e-6)


def test_what_good_and_bad_responses_share_counts_as_told():
  advantages = np.array([1.0, -1.0] * (len(MASK) // 2))
  batch = BATCH._replace(tokens=np.zeros(MASK.shape, int), advantages=advantages)
  size = len(MASK) // len(BATCH.prompts)
  found = all_weights(batch, name="token_mean", length=8, shared_tokens=3.0)["factors"]
  wanted = weighting.shared_tokens(batch.tokens, advantages, MASK, group_size=size, positive=3.0)
  np.testing.assert_array_equal(found, wanted)
  assert {0.0, 3.0} <= set(np.unique(found[MASK]))
  assert "factors" not in all_weights(batch, name="token_mean", length=8)


def test_a_power_of_the_length_lies_between_two_means():
  rows = all_weights(BATCH, name="length_power", length=8, power=0.0)["weights"]
  np.testing.assert_allclose(rows, weighting.sequence_mean(MASK), rtol=1e-6)
  tokens = all_weights(BATCH, name="length_power", length=8, power=1.0)["weights"]
  np.testing.assert_allclose(tokens, weighting.token_mean(MASK), rtol=1e-6)


def test_right_answers_have_weights_of_their_own():
  batch = BATCH._replace(correct=np.array([True, False, True, False]))
  found = all_weights(batch, name="token_mean", length=8)["nll_weights"]
  np.testing.assert_allclose(found, (MASK & batch.correct[:, None]) / 5, rtol=1e-6)


def test_the_kl_of_a_group_advantage_counts_from_each_token_on():
  kl = np.random.default_rng(1).normal(size=MASK.shape).astype(np.float32) * MASK
  batch = BATCH._replace(advantages=np.array([1.0, -1.0, 0.5, 0.0], np.float32))
  found = np.asarray(less_kl(batch, kl, 0.1).advantages)
  for b, mask in enumerate(MASK):
    for t in range(mask.size):
      wanted = batch.advantages[b] - 0.1 * kl[b, t:].sum() if mask[t] else 0
      assert abs(found[b, t] - wanted) < 1e-6


def test_a_problem_whose_greedy_response_failed_compares_nothing():
  rewards, ok = np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([[True, False], [True, True]])
  greedy = Scores(np.array([[0.25], [0.0]]), np.array([[True], [False]]), {}, [])
  experience = types.SimpleNamespace(
    rollout=types.SimpleNamespace(lengths=np.array([3, 1, 2, 5])),
    scores=Scores(rewards, ok, {}, []),
    greedy=None,
  )
  values, counted, lengths, baseline, _ = group_inputs(experience)
  assert counted.tolist() == ok.tolist() and baseline is None
  assert values.tolist() == rewards.tolist() and lengths.tolist() == [[3, 1], [2, 5]]
  experience.greedy = greedy
  _, counted, _, baseline, _ = group_inputs(experience)
  assert counted.tolist() == [[True, False], [False, False]] and baseline.tolist() == [0.25, 0.0]


def test_of_several_rewards_none_counts_of_a_response_that_lacks_one():
  """A part without opinion leaves the sum; a part that failed leaves the response out whole."""
  given = [({"a": 1.0, "b": 2.0}, "ok"), ({"a": 3.0, "b": None}, "ok")]
  given += [({"a": 4.0, "b": None}, "raised"), ({"a": 5.0, "b": 6.0}, "invalid")]
  results = [RewardResult(None, status, parts=parts) for parts, status in given]
  ok = np.array([[status == "ok" for _, status in given]])
  experience = types.SimpleNamespace(
    rollout=types.SimpleNamespace(lengths=np.ones(4, np.int32)),
    scores=Scores(np.zeros((1, 4), np.float32), ok, {}, results),
    greedy=None,
  )
  values, counted, _, _, weights = group_inputs(experience, np.array([1.0, 0.2]))
  assert counted.tolist() == [[[True, True], [True, False], [False, False], [False, False]]]
  assert values.tolist() == [[[1.0, 2.0], [3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]
  np.testing.assert_allclose(weights, [1.0, 0.2])


def test_a_microbatch_that_is_filled_in_part_is_computed():
  """Three problems matter, two fit into a microbatch: the second one holds the third problem."""
  order = [(np.array([2, 0, 1, 3]), used) for used in (3, 2, 1, 0)]
  given = {"take": lambda batch, chosen: batch, "batch": BATCH, "microbatch_prompts": 2}
  parts = list(minibatches(order=iter(order), only=True, **given))
  assert [part.microbatches for part in parts] == [2, 1, 1, 0]
  assert [part.problems.tolist() for part in parts] == [[2, 0, 1], [2, 0], [2], []]
  # Where another term counts too, all are computed.
  parts = list(minibatches(order=iter(order), only=False, **given))
  assert [part.microbatches for part in parts] == [2, 2, 2, 2]
  assert all(part.problems.tolist() == [2, 0, 1, 3] for part in parts)
