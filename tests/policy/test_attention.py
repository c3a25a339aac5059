"""The fused kernels give plain attention's numbers, and say what they cannot do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.attention import (
  Kernel,
  Visible,
  attention_mask,
  find_kernel,
  fused_attend,
  softcap,
  takes,
)
from tests.policy.make_goldens import family_model

SPLASH = Kernel("splash", True, None, True)  # Step by step, as on a CPU.


def by_hand(query, keys, values, seen, scale, cap):
  """softmax(cap(q k scale)) v, one query and one head at a time; zeros where nothing is seen."""
  out = np.zeros(query.shape)
  rows, length, heads, _ = query.shape
  for row, t, head in np.ndindex(rows, length, heads):
    columns = np.flatnonzero(seen[row, t])
    of = head * keys.shape[2] // heads
    scores = keys[row, columns, of] @ query[row, t, head] * scale
    scores = scores if cap is None else cap * np.tanh(scores / cap)
    weights = np.exp(scores - scores.max(initial=-np.inf))
    out[row, t, head] = weights @ values[row, columns, of] / max(weights.sum(), 1e-30)
  return out


def seen_by(query_segments, key_segments, first_column, window):
  """The rule of `Policy`, from columns, where a segment's tokens are neighbours."""
  rows, length = query_segments.shape
  seen = np.zeros((rows, length, key_segments.shape[1]), bool)
  for row, t, s in np.ndindex(*seen.shape):
    behind = t + first_column - s
    seen[row, t, s] = (
      key_segments[row, s] in (query_segments[row, t], 0)
      and key_segments[row, s] != -1
      and behind >= 0
      and (window is None or behind < window)
    )
  return seen


@pytest.mark.parametrize(
  ("window", "cap", "first_column"), [(None, None, 0), (None, 2.0, 9), (5, 2.0, 9)]
)
@pytest.mark.cpu
def test_splash_attention_is_attention_by_hand(window, cap, first_column):
  rows, length, heads, kv_heads, head_dim = 2, 20, 4, 2, 8
  n_keys = length + first_column
  random = np.random.default_rng(0)
  query = random.normal(size=(rows, length, heads, head_dim))
  keys, values = random.normal(size=(2, rows, n_keys, kv_heads, head_dim))
  key_segments = np.ones((rows, n_keys), np.int32)
  key_segments[0, :4] = -1  # Padding on the left,
  key_segments[1, -3:] = -1  # on the right,
  key_segments[1, 12:-3] = 2  # and two sequences in a row.
  query_segments = key_segments[:, first_column:]
  seen = seen_by(query_segments, key_segments, first_column, window)
  visible = Visible(jnp.array(seen)[:, None], query_segments, key_segments, window is not None)
  out = fused_attend(
    *(jnp.float32(x) for x in (query, keys, values)),
    visible,
    kernel=SPLASH,
    first_column=first_column,
    window=window,
    scale=0.3,
    cap=cap,
  )
  wanted = by_hand(query, keys, values, seen, 0.3, cap)
  used = query_segments != -1
  np.testing.assert_allclose(out[used], wanted[used], rtol=1e-5, atol=1e-5)
  assert np.all(np.isfinite(out))


def packed_rows(vocabulary, length=24):
  """(tokens, positions, segments) of a row with two sequences, and one padded on the left."""
  tokens = np.random.default_rng(1).integers(1, vocabulary, (2, length))
  positions = np.stack([np.r_[0:10, 0:8, [0] * 6], np.r_[[0] * 5, 0 : length - 5]])
  segments = np.stack([[1] * 10 + [2] * 8 + [-1] * 6, [-1] * 5 + [1] * (length - 5)])
  return tokens, positions, segments


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scan_layers"), [("gemma2", False), ("gemma3", True)])
@pytest.mark.cpu
def test_a_model_reads_packed_rows_alike_with_and_without_the_kernel(family, scan_layers):
  config, params = family_model(family)
  rows = packed_rows(config.vocab_size)
  used = (rows[2] != -1)[..., None]
  direction = np.random.default_rng(2).normal(size=(*rows[0].shape, config.width)) * used

  def outcome(attention):
    policy = make_policy(config, scan_layers=scan_layers, attention=attention)

    def summed(params):
      hidden, _ = policy.hidden(params, *rows)
      return jnp.sum(hidden * direction), hidden * used

    return jax.jit(jax.value_and_grad(summed, has_aux=True))(params)

  (_, plain), plain_gradient = outcome("xla")
  (_, fused), gradient = outcome("splash")
  np.testing.assert_allclose(fused, plain, atol=2e-5)
  for wanted, got in zip(*map(jax.tree.leaves, (plain_gradient, gradient)), strict=True):
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted) + 1e-6


@pytest.mark.slow
@pytest.mark.cpu
def test_prompts_shared_by_their_responses_are_read_alike_with_and_without_the_kernel():
  config, params = family_model("qwen2")
  random = np.random.default_rng(3)
  prompts = random.integers(1, config.vocab_size, (2, 9))
  segments = np.where(np.arange(9) < np.array([[3], [0]]), -1, 0)
  positions = np.maximum(np.arange(9) - np.array([[3], [0]]), 0)
  following = random.integers(1, config.vocab_size, (4, 7))
  later = np.where(np.arange(7) < np.array([[7], [4], [6], [1]]), 0, -1)
  after = np.repeat([[6], [9]], 2, axis=0) + np.arange(7)
  weight = random.normal(size=(4, 7, config.width)) * (later == 0)[..., None]

  def outcome(attention):
    policy = make_policy(config, attention=attention)

    def summed(params):
      _, hidden = policy.shared_hidden(
        params, (prompts, positions, segments), (following, after, later)
      )
      return jnp.sum(hidden * weight)

    return jax.jit(jax.value_and_grad(summed))(params)

  plain, plain_gradient = outcome("xla")
  fused, gradient = outcome("splash")
  np.testing.assert_allclose(fused, plain, rtol=1e-5)
  for wanted, got in zip(*map(jax.tree.leaves, (plain_gradient, gradient)), strict=True):
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted) + 1e-6


@pytest.mark.cpu
def test_a_prefix_that_others_see_is_not_silently_left_out():
  config = tiny_config(32)
  policy = make_policy(config, attention="splash")
  params = jax.jit(policy.init)(jax.random.key(0))
  tokens = jnp.arange(12).reshape(2, 6) + 1
  segments = jnp.array([[0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2]])
  hidden, _ = policy.hidden(params, tokens, jnp.tile(jnp.arange(6), (2, 1)), segments)
  assert np.all(np.isnan(hidden[0])) and np.all(np.isfinite(hidden[1]))


def test_a_step_of_decoding_goes_by_plain_attention():
  query = jnp.zeros((2, 1, 4, 8))
  assert not takes(SPLASH, query, 1024, 2, cap=None)
  assert takes(SPLASH, jnp.zeros((2, 5, 4, 8)), 1024, 2, cap=None)


def test_short_rows_go_by_plain_attention_unless_the_kernel_is_asked_for():
  query = jnp.zeros((2, 64, 4, 8))
  chosen = Kernel("splash", False, None, False)
  assert not takes(chosen, query, 511, 2, cap=None)
  assert takes(chosen, query, 512, 2, cap=None)
  assert takes(SPLASH, query, 64, 2, cap=None)


@pytest.mark.cpu
def test_what_the_platform_lacks_is_named():
  assert find_kernel("auto", dtype=jnp.bfloat16) is None
  assert find_kernel("splash", dtype=jnp.float32) == SPLASH
  assert find_kernel("xla", dtype=jnp.bfloat16) is None
  with pytest.raises(ValueError, match="attention: cudnn is for gpu, here is cpu"):
    find_kernel("cudnn", dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match="'flash'; allowed: auto, xla, cudnn, splash"):
    make_policy(tiny_config(32), attention="flash")


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.cpu
def test_what_cudnn_cannot_do_is_an_error_where_it_was_asked_for_and_plain_otherwise(cap):
  query = jnp.zeros((2, 64, 4, 8), jnp.bfloat16)
  check = functools.partial(takes, cap=cap)
  why = "no soft cap" if cap else "cuDNN is not detected"  # There is none here.
  with pytest.raises(ValueError, match=f"attention: cudnn cannot do this: .*{why}"):
    check(Kernel("cudnn", True, None, False), query, 1024, 2)
  assert not check(Kernel("cudnn", False, None, False), query, 1024, 2)


def test_the_mask_is_the_rule_that_the_kernel_follows():
  segments = np.array([[-1, 1, 1, 2, 2, -1]])
  positions = np.array([[0, 0, 1, 0, 1, 0]])
  mask = attention_mask(*map(jnp.array, (segments, segments, positions, positions)))
  np.testing.assert_array_equal(mask[:, 0], seen_by(segments, segments, 0, None))


def test_a_soft_cap_bends_scores():
  assert float(softcap(jnp.float32(1e6), 2.0)) == 2.0
