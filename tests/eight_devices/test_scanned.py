"""Layers in a loop on eight devices: the same gradients, in the same layout, of slices alone."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_llm.parallel import sharding
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout import response_logprobs, scoring
from rl_llm.training.train_state import init_state
from rl_llm.training.update import make_update
from tests.eight_devices.test_update import DESCENT, distance, mesh_of, policy_loss, ragged_batch

CONFIG = dataclasses.replace(
  tiny_config(64), n_layers=3, sliding_window=3, layer_types=("sliding", "full", "sliding")
)


@functools.cache
def params():
  return jax.tree.map(np.asarray, jax.jit(make_policy(CONFIG).init)(jax.random.key(0)))


def update_on(mesh, *, scan_layers):
  """The jitted update and its arguments."""
  policy = make_policy(CONFIG, scan_layers=scan_layers, remat=scan_layers, mesh=mesh)

  def loss_fn(weights, batch, hparams):
    logprobs, _ = response_logprobs(weights, batch, policy=policy)
    return policy_loss(logprobs, batch)

  state = init_state(params(), DESCENT["optimizer"])
  batch = ragged_batch()
  if mesh is not None:
    state, batch = sharding.shard(state, mesh), sharding.shard_rows(batch, mesh)
  update = make_update(loss_fn, optax.identity(), microbatches=2, mesh=mesh)
  return update, (state, batch, {"learning_rate": jnp.float32(1.0)})


def change(state):
  leaves = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, state.params, params())
  return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(leaves)])


@functools.cache
def of_one_device():
  update, arguments = update_on(None, scan_layers=False)
  return change(update(*arguments)[0])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_gradients_and_layout_are_those_of_one_device_and_of_the_state(sizes):
  update, arguments = update_on(mesh_of(sizes), scan_layers=True)
  before = jax.tree.map(lambda x: x.sharding, arguments[0])
  text = update.lower(*arguments).compile().as_text()
  state, _ = update(*arguments)
  assert distance(change(state), of_one_device()) < 1e-5
  same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, before)
  assert all(jax.tree.leaves(same)), same
  # One layer's matrix is gathered, [256, 64] at most, and never the stack of three.
  gathered = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", text)
  assert not [shape for shape in gathered if shape.startswith("3,")], gathered
  assert sizes == (8, 1, 1) or gathered


def test_each_device_holds_as_many_logits_as_one_would(monkeypatch):
  """512 tokens' on one device are 4,096 on eight that share the rows, 2,048 on four."""
  seen = []
  monkeypatch.setattr(
    scoring,
    "chunked_logprobs_and_entropy",
    lambda hidden, table, tokens, *, chunk_size, **_: seen.append(chunk_size) or (tokens, tokens),
  )
  hidden, tokens = jnp.ones((8, 1, 64)), jnp.ones((8, 1))
  for mesh in (None, mesh_of((2, 4, 1)), mesh_of((2, 2, 2))):
    policy = make_policy(CONFIG, mesh=mesh)
    scoring.logprobs_of_hidden(params(), hidden, tokens, tokens > 0, policy=policy)
  assert seen == [512, 4096, 2048]
