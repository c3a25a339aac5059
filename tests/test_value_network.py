"""Values stand before the tokens they judge, aligned with log-probs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.scalar_head import with_head
from rl_llm.rollout import ResponseBatch, logprobs_of_hidden, response_hidden, response_logprobs
from rl_llm.runs.metrics import finalize
from rl_llm.training.value_network import (
  explained_variance,
  response_values,
  value_statistics,
  values_of_hidden,
)

CONFIG = dataclasses.replace(tiny_config(16), n_layers=1)
POLICY = make_policy(CONFIG)
PROMPTS = ([3, 1, 4], [5])
PADDED, LENGTHS = np.array([[0, 3, 1, 4], [0, 0, 0, 5]]), np.array([3, 1])
TOKENS = np.array([[7, 8, 9], [2, 0, 0], [6, 7, 0], [9, 9, 9]])  # two responses a prompt
MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]], bool)
BATCH = ResponseBatch(PADDED, LENGTHS, TOKENS, MASK, MASK)


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  head = {"weight": rng.normal(size=(1, CONFIG.width)), "bias": np.array([0.25])}
  policy_params = jax.jit(POLICY.init)(jax.random.key(0))
  larger = {**policy_params, "embed": jax.tree.map(lambda x: 15 * x, policy_params["embed"])}
  return with_head(larger, jax.tree.map(lambda x: x.astype(np.float32), head))


@jax.jit
def values_of(params, batch):
  return response_values(params, batch, policy=POLICY)


def test_a_value_is_read_from_the_state_that_predicts_its_token(params):
  """One response at a time, no cache, no padding, the head written out."""
  hidden_of = jax.jit(lambda p, ids: POLICY.hidden(p, ids, jnp.arange(ids.shape[1])[None])[0])
  weight = np.asarray(params["head"]["weight"], np.float64)[0]
  wanted = np.zeros(TOKENS.shape)
  for b, row in enumerate(TOKENS):
    ids = [*PROMPTS[b // 2], *row]
    text = np.array([ids + [0] * (6 - len(ids))])  # causal: what follows is not seen
    states = np.asarray(hidden_of(params, text), np.float64)[0]
    for t in range(MASK[b].sum()):
      seen = len(PROMPTS[b // 2]) + t
      wanted[b, t] = states[seen - 1] @ weight + 0.25
  values = values_of(params, BATCH)
  assert values.dtype == jnp.float32
  np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-4)


def test_a_value_does_not_know_its_own_token(params):
  changed = TOKENS.copy()
  changed[0, 1] = 1
  before, after = (
    np.asarray(values_of(params, BATCH._replace(tokens=tokens))) for tokens in (TOKENS, changed)
  )
  np.testing.assert_array_equal(before[0, :2], after[0, :2])
  assert abs(before[0, 2] - after[0, 2]) > 1e-3
  np.testing.assert_array_equal(before[1:], after[1:])


def test_a_token_that_was_not_written_has_no_value_and_is_seen_by_later_ones(params):
  """The middle token of the first row is another's: no value of its own, as before for the rest."""
  written = MASK.copy()
  written[0, 1] = False
  values = np.asarray(values_of(params, BATCH))
  found = np.asarray(values_of(params, BATCH._replace(mask=written)))
  np.testing.assert_array_equal(found, np.where(written, values, 0))
  unseen = np.asarray(values_of(params, BATCH._replace(mask=written, attended=written)))
  assert abs(unseen[0, 2] - values[0, 2]) > 1e-3


def test_a_shared_trunk_gives_both_from_one_pass(params):
  @jax.jit
  def both(params):
    hidden = response_hidden(params, BATCH, policy=POLICY)
    logprobs = logprobs_of_hidden(params, hidden, TOKENS, MASK, policy=POLICY, temperature=0.7)
    return *logprobs, values_of_hidden(params["head"], hidden, MASK)

  @jax.jit
  def apart(params):
    logprobs = response_logprobs(params, BATCH, policy=POLICY, temperature=0.7)
    return *logprobs, response_values(params, BATCH, policy=POLICY)

  for one, two in zip(both(params), apart(params), strict=True):
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


def test_explained_variance_is_one_less_the_unexplained_share():
  rng = np.random.default_rng(1)
  values, returns = rng.normal(size=(2, 3, 5)).astype(np.float32)
  mask = rng.random((3, 5)) < 0.6
  errors, kept = [], []
  for b in range(3):
    for t in range(5):
      if mask[b, t]:
        errors.append(returns[b, t] - values[b, t])
        kept.append(returns[b, t])
  wanted = 1 - np.var(errors) / np.var(kept)
  np.testing.assert_allclose(explained_variance(values, returns, mask), wanted, rtol=1e-5)
  assert float(explained_variance(returns + 7, returns, mask)) == pytest.approx(1, abs=1e-5)
  assert float(explained_variance(jnp.zeros((3, 5)), returns, mask)) == 0
  assert np.isnan(explained_variance(values, jnp.ones((3, 5)), mask))


def test_a_record_has_null_where_there_is_nothing_to_explain():
  values, mask = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3), bool)
  found = finalize(value_statistics(values, jnp.ones((2, 3)), mask))
  assert found["explained_variance"] is None and found["returns_mean"] == 1
  assert finalize(value_statistics(values, values, mask))["explained_variance"] == 1
  broken = finalize(value_statistics(values.at[0, 0].set(jnp.nan), values, mask))
  assert np.isnan(broken["explained_variance"]), "a value that is not a number is to be seen"
