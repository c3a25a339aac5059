"""Preference pairs as arrays: packed or a row each, both answers have the same log-probs."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from rl_llm.data import DataError, Dataset, Preference
from rl_llm.data.batches import SequenceBatch, pad_values
from rl_llm.data.encoding import Encoded, Pair, flat
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.training.pairs import (
  best_and_worst,
  check_margins,
  chosen_token_weights,
  make_pair_batch,
  margins,
  pair_logprobs,
)
from tests.representatives import mostly_slow

VOCABULARY = 40
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def pairs():
  """5 pairs of ragged answers, some tokens of which are not trained on."""
  rng = np.random.default_rng(0)

  def answer():
    size = int(rng.integers(3, 12))
    mask = [False, True, *(rng.random(size - 2) < 0.7).tolist()]
    return Encoded(rng.integers(1, VOCABULARY, size).tolist(), mask, 1)

  return [Pair(answer(), answer()) for _ in range(5)]


@pytest.fixture(scope="module")
def model():
  policy = make_policy(dataclasses.replace(tiny_config(VOCABULARY), n_layers=1))
  params = jax.jit(policy.init)(jax.random.key(0))
  params["embed"]["embedding"] *= 20  # Tied, so that the distributions are far from uniform.
  return policy, params


@pytest.fixture(scope="module")
def alone(model, pairs):
  """The log-probs of each answer alone, in the order of the rows."""
  policy, params = model
  score = jax.jit(
    functools.partial(teacher_forced_logprobs, policy=policy, temperature=TEMPERATURE)
  )
  found = []
  for answer in flat(pairs):
    arrays = answer.tokens, answer.mask, np.arange(len(answer.tokens)), [1] * len(answer.tokens)
    found.append(np.asarray(score(params, *(np.array([array]) for array in arrays))[0][0]))
  return found


score_pairs = jax.jit(pair_logprobs, static_argnames=("policy", "temperature"))


def logprobs_of(model, batch):
  policy, params = model
  return np.asarray(score_pairs(params, batch, policy=policy, temperature=TEMPERATURE))


@pytest.mark.parametrize(
  ("packing", "shares"),
  mostly_slow([(0, 1), (0, 3), (11, 1), (24, 1), (24, 2), (24, 3), (24, 6)], quick=[1, 2, 5]),
)
def test_both_answers_have_the_log_probs_that_each_has_alone(model, pairs, alone, packing, shares):
  batch, _ = make_pair_batch(pairs, pad_id=3, rows=6, packing=packing, shares=shares)
  width = batch.sequences.mask.shape[1]
  wanted = np.pad(pad_values(alone, width=width), ((0, 2), (0, 0)))  # Of the sixth pair: nothing.
  assert np.ptp(wanted[wanted != 0]) > 1  # A test of the test.
  whole = logprobs_of(model, batch)
  assert whole.shape == (12, width) and whole.dtype == np.float32
  # One microbatch has its own rows, and finds its answers there without the others.
  parts = [jax.tree.map(lambda x, i=i: np.split(x, shares)[i], batch) for i in range(shares)]
  for found in (whole, np.concatenate([logprobs_of(model, part) for part in parts])):
    # Rows of another shape round differently: a few of float32's steps, which are 2e-6 at 20 nats.
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-5)
    assert (found[~batch.sequences.mask] == 0).all()


def test_pairs_count_alike_and_a_place_without_one_does_not(pairs):
  for packing in (0, 24):
    batch, _ = make_pair_batch(pairs, pad_id=3, rows=8, packing=packing, shares=2)
    np.testing.assert_allclose(batch.weights, [1 / 5] * 5 + [0] * 3, rtol=1e-6)
    assert batch.weights.dtype == np.float32
    for row, answer in enumerate(flat(pairs)):
      size = len(answer.tokens)
      assert batch.sequences.mask[row, :size].tolist() == answer.mask
      assert not batch.sequences.mask[row, size:].any()
    assert not batch.sequences.mask[10:].any()


def test_the_tokens_of_all_chosen_answers_count_alike(pairs):
  trained = sum(sum(pair.chosen.mask) for pair in pairs)
  for packing in (0, 24):
    batch, _ = make_pair_batch(pairs, pad_id=3, rows=6, packing=packing, shares=2)
    weights = chosen_token_weights(batch)
    wanted = batch.sequences.mask / trained
    wanted[1::2] = 0
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_packing_shares_rows_and_says_what_is_padding(pairs):
  tokens = sum(len(answer.tokens) for answer in flat(pairs))
  plain, padding = make_pair_batch(pairs, pad_id=3, rows=6)
  assert plain.packed is None
  assert padding == pytest.approx(1 - tokens / (10 * plain.sequences.tokens.shape[1]))
  packed, padding = make_pair_batch(pairs, pad_id=3, rows=6, packing=24, shares=2)
  assert packed.sequences == SequenceBatch(None, packed.sequences.mask, None, None)
  filled = int(np.sum(np.any(packed.packed.packed.segment_ids > 0, axis=1)))
  assert filled < 10 and padding == pytest.approx(1 - tokens / (filled * 24))


def test_an_answer_longer_than_a_row_and_pairs_without_a_place(pairs):
  longest = max(len(answer.tokens) for answer in flat(pairs))
  with pytest.raises(ValueError, match=f"{longest} tokens"):
    make_pair_batch(pairs, pad_id=3, rows=6, packing=longest - 1)
  for packing in (0, 24):
    with pytest.raises(ValueError, match="rows|more than"):
      make_pair_batch(pairs, pad_id=3, rows=4, packing=packing)


def test_best_and_worst_against_a_loop():
  rng = np.random.default_rng(0)
  rewards, ok = rng.integers(0, 3, size=(200, 4)) / 2, rng.random((200, 4)) < 0.6
  wanted = []
  for p in range(200):
    graded = [g for g in range(4) if ok[p, g]]
    if graded and len({rewards[p, g] for g in graded}) > 1:
      best = max(graded, key=lambda g: (rewards[p, g], -g))
      wanted.append((p, best, min(graded, key=lambda g: (rewards[p, g], g))))
  assert best_and_worst(rewards, ok) == wanted and 50 < len(wanted) < 200


@pytest.mark.parametrize("value", [True, "1", None, math.nan, [1], "missing"])
def test_a_margin_that_is_no_number_is_refused_with_its_line(value):
  columns = [{"gap": 1}, {} if value == "missing" else {"gap": value}, {"gap": -0.5}]
  examples = tuple(Preference("p", "a", "b", own) for own in columns)
  dataset = Dataset("preference", examples, (1, 4, 5), ())
  said = "missing" if value == "missing" else repr(value)
  with pytest.raises(DataError) as error:
    check_margins(dataset, "gap", path="the/file")
  assert str(error.value) == (
    f"the/file:4: margin_column='gap' is {said}; must be a number in every row"
  )
  check_margins(dataset, "", path="the/file")
  check_margins(dataset._replace(examples=examples[::2], lines=(1, 5)), "gap", path="the/file")


def test_margins_are_those_of_the_column_or_nothing():
  columns = [{"gap": 2}, {"gap": -0.5}]
  assert margins(columns, "gap").tolist() == [2.0, -0.5]
  assert margins(columns, "").tolist() == [0.0, 0.0]
  assert margins(columns, "gap").dtype == margins([], "").dtype == np.float32
