"""One number a hidden state, on a trunk that is nobody else's."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.scalar_head import apply_head, normal_head, with_head, zero_head


def test_a_head_is_a_sum_of_products():
  rng = np.random.default_rng(0)
  hidden, weight = rng.normal(size=(2, 3, 4)), rng.normal(size=(1, 4))
  wanted = np.zeros((2, 3))
  for b in range(2):
    for t in range(3):
      wanted[b, t] = sum(hidden[b, t, d] * weight[0, d] for d in range(4))
  np.testing.assert_allclose(apply_head({"weight": weight}, hidden), wanted, rtol=1e-5)
  shifted = apply_head({"weight": weight, "bias": np.array([0.5])}, hidden)
  np.testing.assert_allclose(shifted, wanted + 0.5, rtol=1e-5)


def test_the_head_is_float32_whatever_the_trunk_computes_in():
  # 256 + 1 is not a bfloat16: it would be rounded to 256.
  y = apply_head({"weight": jnp.ones((1, 2))}, jnp.array([256.0, 1.0], jnp.bfloat16))
  assert y.dtype == jnp.float32 and float(y) == 257.0


def test_a_value_network_begins_with_zeros_and_learns():
  hidden = jnp.array([[1.0, -2.0], [3.0, 4.0]])
  head = zero_head(2)
  assert apply_head(head, hidden).tolist() == [0.0, 0.0]
  grads = jax.grad(lambda head: apply_head(head, hidden).sum())(head)
  assert grads["weight"].tolist() == [[4.0, 2.0]] and grads["bias"].tolist() == [2.0]


def test_a_reward_models_head_spreads_as_stated():
  width = 20_000
  weight = np.asarray(normal_head(width, jax.random.key(0))["weight"], np.float64)
  assert weight.shape == (1, width)
  # The standard error of a standard deviation from n draws is 1 / sqrt(2 n) of it.
  np.testing.assert_allclose(weight.std() * math.sqrt(width + 1), 1, atol=4 / math.sqrt(2 * width))
  np.testing.assert_allclose(weight.mean() * math.sqrt(width), 0, atol=4 / math.sqrt(width))


def test_a_tower_is_a_copy_of_the_trunk_that_any_policy_runs():
  config = dataclasses.replace(tiny_config(16), n_layers=1, tie_embeddings=False)
  policy = make_policy(config)
  params = jax.jit(policy.init)(jax.random.key(0))
  tower = with_head(params, zero_head(config.width))
  assert sorted(tower) == sorted({*params, "head"} - {"unembed"})
  ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
  assert not ours & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tower)}
  hidden_of = jax.jit(lambda params, *args: policy.hidden(params, *args)[0])
  inputs = jnp.array([[3, 1, 4]]), jnp.array([[0, 1, 2]])
  np.testing.assert_array_equal(hidden_of(tower, *inputs), hidden_of(params, *inputs))
  other = normal_head(config.width, jax.random.key(1))
  assert with_head(tower, other)["head"].keys() == {"weight"}  # no head upon a head
