"""LoRA: the model itself at first, the merged model's outputs and gradients afterwards."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_llm.policy import join, make_policy, merge_lora, split_lora, tiny_config
from rl_llm.training.train_state import init_state, parameter_count
from rl_llm.training.update import make_update

POLICY = make_policy(dataclasses.replace(tiny_config(32), qkv_bias=True))
TOKENS = np.random.default_rng(1).integers(0, 32, (2, 7))
POSITIONS = np.tile(np.arange(7), (2, 1))


@functools.cache  # At the first test, not when tests are collected.
def weights():
  return jax.jit(POLICY.init)(jax.random.key(0))


def split(**changes):
  return split_lora(weights(), jax.random.key(2), **({"rank": 3, "alpha": 6.0} | changes))


def shaken(trained):
  """Adapters as after some training: B is not 0."""
  return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(3), x.shape), trained)


def logits(params):
  hidden, _ = POLICY.hidden(params, TOKENS, POSITIONS)
  return POLICY.logits(params, hidden)


def test_new_adapters_change_nothing():
  frozen, trained = split()
  np.testing.assert_array_equal(logits(join(frozen, trained)), logits(weights()))
  np.testing.assert_array_equal(logits(frozen), logits(weights()))  # The reference.


def test_adapters_compute_what_the_formula_says():
  """W x + (alpha / rank) B A x, by hand for one matrix, and for all by the merged model."""
  frozen, trained = split()
  joined = join(frozen, shaken(trained))
  up, merged = joined["layers_1"]["mlp"]["up"], merge_lora(joined)
  wanted = np.asarray(up["weight"]) + 6 / 3 * np.asarray(up["lora_b"]) @ np.asarray(up["lora_a"])
  np.testing.assert_allclose(merged["layers_1"]["mlp"]["up"]["weight"], wanted, atol=1e-6)
  assert jax.tree.structure(merged) == jax.tree.structure(weights())
  assert np.max(np.abs(logits(joined) - logits(weights()))) > 0.1
  np.testing.assert_allclose(logits(joined), logits(merged), atol=2e-5)


def test_the_gradient_is_that_of_the_merged_model():
  """By the chain rule: dA = (alpha / rank) B^T dW, dB = (alpha / rank) dW A^T."""
  frozen, trained = split()
  trained = shaken(trained)

  def loss_fn(params, batch, hparams):
    loss = jnp.sum(jax.nn.log_softmax(logits(params))[..., 3]) + 0 * jnp.sum(batch)
    return loss, {}

  state = init_state(jax.tree.map(jnp.copy, trained), optax.identity())
  update = make_update(loss_fn, optax.identity())
  hparams = {"learning_rate": jnp.float32(1.0)}
  kept = jax.tree.map(np.asarray, frozen)
  state, _ = update(state, jnp.zeros(2), hparams, 1, frozen)
  jax.tree.map(np.testing.assert_array_equal, frozen, kept)
  of_merged = jax.grad(lambda p: loss_fn(p, 0.0, None)[0])(merge_lora(join(frozen, trained)))
  for name in ("query", "output"):
    path = ("layers_0", "attention", name)
    dw = of_merged[path[0]][path[1]][path[2]]["weight"]
    old, new = (tree[path[0]][path[1]][path[2]] for tree in (trained, state.params))
    for leaf, wanted in (
      ("lora_a", 2 * old["lora_b"].T @ dw),
      ("lora_b", 2 * dw @ old["lora_a"].T),
    ):
      np.testing.assert_allclose(old[leaf] - new[leaf], wanted, rtol=1e-4, atol=1e-5)


def test_targets_choose_and_sizes_are_those_of_the_ranks():
  _, trained = split(targets="layers_1/attention/(query|value)$", rank=2)
  paths = [
    jax.tree_util.keystr(p, simple=True, separator="/")
    for p, _ in jax.tree_util.tree_leaves_with_path(trained)
  ]
  assert paths == [
    f"layers_1/attention/{name}/lora_{leaf}" for name in ("query", "value") for leaf in "ab"
  ]
  width, heads, kv = POLICY.config.width, 64, POLICY.config.n_kv_heads * POLICY.config.head_dim
  assert parameter_count(trained) == 2 * (width + heads) + 2 * (width + kv)
  frozen, everything = split()
  assert "lora_a" not in str(jax.tree.structure(frozen)) and "embed" not in everything


def test_draws_differ_by_matrix_and_are_bounded():
  _, trained = split(rank=8)
  first, second = (trained[f"layers_{i}"]["mlp"]["up"]["lora_a"] for i in (0, 1))
  assert not np.allclose(first, second)
  bound = POLICY.config.width**-0.5
  assert 0.9 * bound < np.max(np.abs(first)) <= bound


def test_what_cannot_be_adapted_is_refused():
  with pytest.raises(ValueError, match="targets: 'conv' is found in no path"):
    split(targets="conv")
  with pytest.raises(ValueError, match="rank: 0; must be at least 1"):
    split(rank=0)
