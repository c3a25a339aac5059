"""Log-probs of whole sequences against the full logits of each sequence alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.data.batches import packed_batch, sequence_batch
from rl_llm.data.encoding import Encoded
from rl_llm.data.packing import pack, unpack
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs

VOCABULARY = 40
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def model():
  config = dataclasses.replace(tiny_config(VOCABULARY), n_layers=1, final_softcap=5.0)
  policy = make_policy(config)
  params = jax.jit(policy.init)(jax.random.key(0))
  params["embed"]["embedding"] *= 20  # Tied, so that the distributions are far from uniform.
  return policy, params


@pytest.fixture(scope="module")
def given():
  rng = np.random.default_rng(0)
  return [
    Encoded(rng.integers(1, VOCABULARY, n).tolist(), [False, *(rng.random(n - 1) < 0.7)], 1)
    for n in (5, 9, 3, 7)
  ]


@pytest.fixture(scope="module")
def plain(model, given):
  """Log-probs and entropies of each sequence from its own full logits, in float64."""
  policy, params = model

  @jax.jit
  def full_logits(params, tokens):
    hidden, _ = policy.hidden(params, tokens, jnp.arange(tokens.shape[1])[None])
    return policy.logits(params, hidden)

  found = []
  for sequence in given:
    logits = full_logits(params, jnp.array([sequence.tokens]))
    logits = np.asarray(logits[0], np.float64) / TEMPERATURE
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    entropies = -(np.exp(logp) * logp).sum(axis=-1)
    expected = np.zeros((2, len(sequence.tokens)))
    for t, (token, member) in enumerate(zip(sequence.tokens, sequence.mask, strict=True)):
      if member:
        expected[:, t] = logp[t - 1, token], entropies[t - 1]
    found.append(expected)
  return found


def computed(model, batch):
  policy, params = model
  score = functools.partial(
    teacher_forced_logprobs, policy=policy, temperature=TEMPERATURE, chunk_size=4
  )
  return jax.jit(score)(params, *batch)


def test_padded_rows_have_the_logprobs_of_full_logits(model, given, plain):
  batch = sequence_batch(given, pad_id=3, rows=5)
  logprobs, entropies = computed(model, batch)
  assert logprobs.shape == entropies.shape == (5, 16) and logprobs.dtype == jnp.float32
  for values, which in ((logprobs, 0), (entropies, 1)):
    expected = np.zeros((5, 16))
    for row, one in enumerate(plain):
      expected[row, : one.shape[1]] = one[which]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)
    assert (np.asarray(values)[~batch.mask] == 0).all()
  assert np.ptp(np.concatenate([one[0] for one in plain])) > 1  # A test of the test.


def test_packed_rows_have_the_same(model, given, plain):
  batch = packed_batch(given, length=14, pad_id=3, rows=3)
  places = pack(given, length=14, pad_id=3)
  assert len(places.tokens) == 2
  for values, which in zip(computed(model, batch), (0, 1), strict=True):
    own = unpack(values, places.rows, places.starts, places.lengths, width=9)
    for row, one in zip(own, plain, strict=True):
      np.testing.assert_allclose(row[: one.shape[1]], one[which], rtol=0, atol=1e-5)


def test_gradients_are_those_of_full_logits_padded_or_packed(model, given):
  policy, params = model

  def dense(params, tokens, mask, positions, segment_ids):
    hidden, _ = policy.hidden(params, tokens, positions, segment_ids)
    logp = jax.nn.log_softmax(policy.logits(params, hidden) / TEMPERATURE)[:, :-1]
    chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask[:, 1:], chosen, 0.0))

  def ours(params, *batch):
    return jnp.sum(computed((policy, params), batch)[0])

  padded = sequence_batch(given, pad_id=3)
  expected = jax.jit(jax.grad(dense))(params, *padded)
  for batch in (padded, packed_batch(given, length=14, pad_id=5, rows=3)):
    found = jax.jit(jax.grad(ours))(params, *batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      assert np.isfinite(a).all()
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_the_logits_of_all_positions_never_exist(model):
  policy, params = model
  rows, columns = 4, 32
  shape = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
  mask = jax.ShapeDtypeStruct((rows, columns), bool)

  def loss(params, *batch):
    return jnp.sum(computed((policy, params), batch)[0])

  text = str(jax.make_jaxpr(jax.grad(loss))(params, shape, mask, shape, shape))
  for positions in (columns, columns - 1):
    assert f"[{rows},{positions},{VOCABULARY}]" not in text
    assert f"[{rows * positions},{VOCABULARY}]" not in text
