"""Layers in a loop say what layers one after another say, and compile as one."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import join, make_policy, split_lora
from rl_llm.policy.layer_stack import Layer, run_layers
from rl_llm.rollout import ResponseBatch, response_hidden
from tests.policy.make_goldens import family_model, family_tokens
from tests.representatives import mostly_slow

# Full layers alone; QK norm; full and sliding layers by turns, with another RoPE, and with caps.
KINDS = ("llama", "qwen3", "gemma2", "gemma3")
# Two rows of two packed sequences, and padding.
SEGMENTS = np.array([[1] * 11 + [2] * 10 + [-1] * 3, [-1] * 2 + [0] * 6 + [1] * 8 + [2] * 8])
POSITIONS = np.array([[*range(11), *range(10), 0, 0, 0], [0, 0, *range(22)]])
LENGTHS = np.array([4, 10])
MASK = np.arange(7) < np.array([7, 3, 5, 1])[:, None]


def hidden_of(params, policy):
  return policy.hidden(params, family_tokens(), POSITIONS, SEGMENTS)[0]


def responses_of(params, policy):
  tokens = family_tokens()
  answers = np.concatenate([tokens[:, 10:17], tokens[::-1, 12:19]])
  batch = ResponseBatch(tokens[:, :10], LENGTHS, answers, MASK, MASK)
  return response_hidden(params, batch, policy=policy)


def value_and_gradient(apply, params, **settings):
  policy = make_policy(settings.pop("config"), **settings)

  def total(params):
    hidden = apply(params, policy)
    return jnp.sum(jnp.sin(hidden.astype(jnp.float32))), hidden

  (_, hidden), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
  return hidden, gradient


def assert_close(found, wanted, limit=1e-5):
  """Within `limit` of each array's length."""
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
  ):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.linalg.norm(a - b) <= limit * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.slow  # The next test has the quick one: a loop with remat against layers without.
@pytest.mark.parametrize("apply", [hidden_of, responses_of])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_has_the_states_and_gradients_of_layers_one_by_one(kind, apply):
  config, params = family_model(kind)
  found = value_and_gradient(apply, params, config=config, scan_layers=True)
  assert_close(found, value_and_gradient(apply, params, config=config))


@pytest.mark.parametrize("apply", mostly_slow([hidden_of, responses_of], quick=[1]))
@pytest.mark.parametrize("scan_layers", [pytest.param(False, marks=pytest.mark.slow), True])
def test_so_it_is_with_remat(apply, scan_layers):
  config, params = family_model("gemma3")
  found = value_and_gradient(apply, params, config=config, scan_layers=scan_layers, remat=True)
  assert_close(found, value_and_gradient(apply, params, config=config))


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["layers_[12]/mlp", "attention|mlp", "layers_0"])
def test_so_it_is_with_adapters_on_all_layers_or_some(targets):
  config, params = family_model("qwen3")
  frozen, trained = split_lora(params, jax.random.key(0), rank=2, alpha=4.0, targets=targets)
  # B begins at 0: A's gradient would be 0. Twice as much makes of rounding ten times as much.
  trained = jax.tree.map(lambda x: x + 0.05, trained)

  def apply(trained, policy):
    return responses_of(join(frozen, trained), policy)

  found = value_and_gradient(apply, trained, config=config, scan_layers=True)
  assert_close(found, value_and_gradient(apply, trained, config=config))


@pytest.mark.slow
def test_in_bfloat16_it_is_no_further_from_float32():
  """Weights are rounded before they are stacked, norms' scales are not."""
  config, params = family_model("llama")
  run = functools.partial(value_and_gradient, hidden_of, params, config=config)
  exact, *rough = run(), run(dtype=jnp.bfloat16), run(dtype=jnp.bfloat16, scan_layers=True)
  unrolled, looped = (
    [
      np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
      for a, b in zip(*map(jax.tree.leaves, (found, exact)), strict=True)
      if np.any(b)  # Hidden states do not read the unembedding.
    ]
    for found in rough
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(rough[1][1])} == {jnp.dtype("float32")}
  assert np.mean(looped) < 1.2 * np.mean(unrolled)


def test_a_cache_is_filled_and_read_on():
  """Prefill in a loop, then tokens by several and by one."""
  config, params = family_model("gemma2")
  tokens = family_tokens()

  def read(policy):
    cache, out = policy.init_cache(2, 24), []
    for part in (slice(0, 10), slice(10, 23), slice(23, 24)):
      positions = jnp.broadcast_to(jnp.arange(24)[part], (2, part.stop - part.start))
      hidden, cache = policy.hidden(params, tokens[:, part], positions, None, cache)
      out.append(hidden)
    return jnp.concatenate(out, axis=1), cache

  found = jax.jit(functools.partial(read, make_policy(config, scan_layers=True)))()
  wanted = jax.jit(functools.partial(read, make_policy(config)))()
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  assert_close(found, wanted)


def test_responses_see_their_prompt_as_if_it_stood_before_them():
  """`shared_hidden` against one row of prompt and response together."""
  config, params = family_model("gemma2")
  policy = make_policy(config)
  tokens = family_tokens()
  found = responses_of(params, policy)
  answers = np.concatenate([tokens[:, 10:17], tokens[::-1, 12:19]])
  for row, answer in enumerate(answers):
    prompt = tokens[row // 2, 10 - LENGTHS[row // 2] : 10]
    whole = np.concatenate([prompt, answer])[None]
    alone, _ = policy.hidden(params, whole, np.arange(whole.shape[1])[None])
    count = MASK[row].sum()
    wanted = alone[0, len(prompt) - 1 : len(prompt) - 1 + count]
    np.testing.assert_allclose(found[row, :count], wanted, atol=2e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_the_loop_is_one_and_decoding_has_none(remat):
  """Of 3 layers there is one attention in the program; a step of one token has them all."""
  config, params = family_model("gemma3")
  policy = make_policy(config, scan_layers=True, remat=remat)

  def program(tokens):
    cache = policy.init_cache(2, 24)
    return str(jax.make_jaxpr(lambda p: policy.hidden(p, tokens, tokens, None, cache))(params))

  several, one = program(jnp.zeros((2, 3), int)), program(jnp.zeros((2, 1), int))
  assert several.count("scan[") == 1 and several.count("logistic") + several.count("tanh") == 1
  assert several.count("name=single") == 0 and one.count("name=single") == 3
  assert one.count("scan[") == 0 and one.count("logistic") + one.count("tanh") == 2  # Two kinds.
  gradient = jax.grad(lambda p: responses_of(p, policy).sum())
  assert ("remat" in str(jax.make_jaxpr(gradient)(params))) == remat


def test_layers_that_differ_are_looped_over_in_runs():
  weights = [{"weight": jnp.ones(size)} for size in (2, 2, 3, 2, 2, 2)]
  calls = []

  def body(x, layer, sliding, other, common):
    calls.append((layer["weight"].shape, isinstance(sliding, bool)))
    return x + layer["weight"].sum() * jnp.where(sliding, 10, 1), x

  sliding = [False, False, False, True, False, True]
  layers = [Layer(*parts) for parts in zip(weights, sliding, strict=True)]
  x, out = run_layers(body, jnp.float32(0), layers, scan=True, remat=False, dtype=jnp.float32)
  assert [float(y) for y in (*out, x)] == [0, 2, 4, 7, 27, 29, 49]
  assert set(calls) == {((2,), True), ((3,), True), ((2,), False)} and len(calls) == 3


@pytest.mark.parametrize("remat", [False, True])
def test_layers_that_are_alike_are_traced_once_for_all(remat):
  calls = []

  def body(x, layer, sliding, other, common):
    calls.append(sliding)
    return x * jnp.sin(layer["weight"] * common) + other, None

  def last(weights, common, layers):
    made = [Layer({"weight": weights[i]}, i % 2 == 1, weights[i]) for i in range(layers)]
    x, _ = run_layers(
      body, jnp.float32(1), made, common, scan=False, remat=remat, dtype=jnp.float32
    )
    return x

  def plain(weights, common):
    x = jnp.float32(1)
    for weight in weights:
      x = x * jnp.sin(weight * common) + weight
    return x

  counts = []
  for layers in (4, 12):  # The first layer is a kind of its own: its x is not differentiated.
    weights = jnp.linspace(0.3, 1.7, layers)
    calls.clear()
    for argument in (0, 1):
      ours = jax.jit(jax.grad(functools.partial(last, layers=layers), argument))(weights, 0.7)
      chex.assert_trees_all_close(ours, jax.grad(plain, argument)(weights, 0.7), rtol=1e-5)
    counts.append(sorted(calls))
  assert counts[0] == counts[1] and set(counts[0]) == {False, True}
