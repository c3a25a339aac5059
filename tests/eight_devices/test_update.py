"""One update on eight devices is the update of one device, for every shape of the mesh."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch.hlo import collectives
from rl_llm import losses
from rl_llm.data.prompts import PromptBatch
from rl_llm.parallel import sharding
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout import ResponseBatch, gather_weights, generate, response_logprobs, row_keys
from rl_llm.rollout.collect import make_generate
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.training.train_state import init_state
from rl_llm.training.update import make_optimizer, make_update

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
POLICY = make_policy(dataclasses.replace(tiny_config(64), n_layers=1))
PROMPTS, GROUP, STEPS = 16, 2, 5
# One step whose change of the parameters is the gradient.
DESCENT = {"count": 1, "rate": 1.0, "optimizer": optax.identity()}


def mesh_of(sizes):
  return sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))


@functools.cache
def params():
  return jax.tree.map(np.asarray, jax.jit(POLICY.init)(jax.random.key(0)))


@functools.cache
def ragged_batch():
  """Prompts of 1 to 7 tokens, responses of 1 to 5."""
  rng = np.random.default_rng(0)
  rows = PROMPTS * GROUP
  mask = np.arange(STEPS) < rng.integers(1, STEPS + 1, rows)[:, None]
  return ResponseBatch(
    prompts=rng.integers(0, 64, (PROMPTS, 7), np.int32),
    prompt_lengths=rng.integers(1, 8, PROMPTS, np.int32),
    tokens=rng.integers(0, 64, (rows, STEPS), np.int32),
    attended=mask,
    mask=mask,
    old_logprobs=rng.normal(-4, 0.1, (rows, STEPS)).astype(np.float32),
    advantages=rng.normal(size=rows).astype(np.float32),
    weights=(mask / mask.sum()).astype(np.float32),
  )


def policy_loss(logprobs, batch):
  return losses.ppo_loss(
    logprobs, batch.old_logprobs, batch.advantages, batch.weights, mask=batch.mask
  )


def loss_fn(weights, batch, hparams):
  logprobs, entropies = response_logprobs(weights, batch, policy=POLICY, chunk_size=16)
  loss, metrics = policy_loss(logprobs, batch)
  return loss + 0.01 * losses.entropy_loss(entropies, batch.weights)[0], metrics


@functools.cache
def steps(sizes, *, count, rate, microbatches=1, optimizer=make_optimizer()):  # noqa: B008
  """State and metrics after `count` updates; sizes None: on one device, without a mesh."""
  mesh = None if sizes is None else mesh_of(sizes)
  state = jax.jit(functools.partial(init_state, optimizer=optimizer))(params())
  batch = ragged_batch()
  if mesh is not None:
    state, batch = sharding.shard(state, mesh), sharding.shard_rows(batch, mesh)
  update = make_update(loss_fn, optimizer, microbatches=microbatches, mesh=mesh)
  before = jax.tree.map(lambda x: x.sharding, state)
  hparams = {"learning_rate": jnp.float32(rate)}
  for _ in range(count):
    state, metrics = update(state, batch, hparams)
  assert update._cache_size() == 1
  if mesh is not None:
    same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, before)
    assert all(jax.tree.leaves(same)), same
  return state, metrics


def change(state):
  """What became of the parameters, as one vector."""
  leaves = jax.tree.leaves(
    jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params, params())
  )
  return np.concatenate([leaf.ravel() for leaf in leaves])


def distance(found, wanted):
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize(
  ("sizes", "microbatches"), [*((sizes, 1) for sizes in MESHES), ((4, 1, 2), 2)], ids=str
)
def test_loss_and_gradient_are_those_of_one_device(sizes, microbatches):
  state, metrics = steps(sizes, **DESCENT, microbatches=microbatches)
  wanted, wanted_metrics = steps(None, **DESCENT)
  np.testing.assert_allclose(metrics["loss"][0], wanted_metrics["loss"][0], rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"][0], wanted_metrics["grad_norm"][0], rtol=1e-5)
  assert distance(change(state), change(wanted)) < 1e-5


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_three_steps_of_adam_are_those_of_one_device(sizes):
  state, _ = steps(sizes, count=3, rate=1e-5)
  wanted, _ = steps(None, count=3, rate=1e-5)
  assert distance(change(state), change(wanted)) < 1e-3


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_ragged_rows_in_any_number_of_microbatches_have_one_gradient(microbatches):
  state, _ = steps((2, 1, 1), **DESCENT, microbatches=microbatches)
  wanted, _ = steps(None, **DESCENT)
  assert distance(change(state), change(wanted)) < 1e-5


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_work_is_shared(sizes):
  """Each device computes about an eighth of the products: not all of them, eight times over."""
  flops = []
  for mesh in (mesh_of((1, 1, 1)), mesh_of(sizes)):
    optimizer = optax.identity()
    state = sharding.shard(init_state(params(), optimizer), mesh)
    update = make_update(loss_fn, optimizer, mesh=mesh)
    arguments = state, sharding.shard_rows(ragged_batch(), mesh), {"learning_rate": 1.0}
    flops.append(update.lower(*arguments).compile().cost_analysis()["flops"])
  assert flops[1] < 0.2 * flops[0], flops


def test_each_device_holds_its_slice_and_no_more():
  """Under fsdp=8 a matrix and its moments lie in eighths; norms are whole."""
  state, _ = steps((1, 8, 1), count=3, rate=1e-5)
  layer = state.params["layers_0"]
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if "up" in jax.tree_util.keystr(path)
  ]
  assert len(moments) == 2 * POLICY.config.n_layers
  for leaf in (layer["mlp"]["up"]["weight"], layer["mlp"]["down"]["weight"], *moments):
    assert {8 * shard.data.size for shard in leaf.addressable_shards} == {leaf.size}
  norm = layer["mlp_norm"]["scale"]
  assert {shard.data.size for shard in norm.addressable_shards} == {norm.size}


@pytest.mark.parametrize("slots, sizes", [*((0, mesh) for mesh in MESHES), (8, (2, 2, 2))], ids=str)
def test_a_rollout_says_what_one_device_says(sizes, slots):
  mesh, batch = mesh_of(sizes), ragged_batch()
  keys = row_keys(jax.random.key(3), PROMPTS, GROUP)
  arguments = batch.prompts, batch.prompt_lengths, keys
  settings = {
    "policy": POLICY,
    "responses_per_prompt": GROUP,
    "max_new_tokens": STEPS,
    "eos_ids": (1, 2),
    "pad_id": 0,
  }
  sampling = SamplingConfig(jnp.full(PROMPTS * GROUP, 0.7))
  wanted = generate(params(), *arguments, sampling, **settings)
  placed = sharding.shard_rows((*arguments, sampling), mesh)
  found = generate(sharding.shard(params(), mesh), *placed, **settings, slots=slots)
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  np.testing.assert_array_equal(found.stop_reason, wanted.stop_reason)
  np.testing.assert_allclose(found.sampler_logprobs, wanted.sampler_logprobs, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_a_rollout_on_gathered_weights_says_what_one_device_says(sizes):
  """And nothing is communicated along `fsdp` while it runs."""
  mesh, batch = mesh_of(sizes), ragged_batch()
  prompts = PromptBatch(batch.prompts, batch.prompt_lengths)
  keys = row_keys(jax.random.key(3), PROMPTS, GROUP)
  sampling = SamplingConfig(jnp.full(PROMPTS * GROUP, 0.7))
  tokenizer = SimpleNamespace(eos_ids=(1, 2), pad_id=0)
  settings = {"max_new_tokens": STEPS, "say": lambda line: None}
  alone = make_generate(POLICY, tokenizer, **settings)
  wanted = alone(params(), prompts, keys, sampling, GROUP)
  policy = make_policy(POLICY.config, mesh=mesh)
  placed = sharding.shard(params(), mesh)
  found = make_generate(policy, tokenizer, **settings, mesh=mesh)(
    placed, prompts, keys, sampling, GROUP
  )
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  np.testing.assert_allclose(found.sampler_logprobs, wanted.sampler_logprobs, atol=1e-5)

  whole = sharding.whole_along_fsdp(mesh)
  gathered = gather_weights(placed, dtype=jnp.bfloat16, mesh=whole)
  layer = gathered["layers_0"]
  assert layer["mlp"]["up"]["weight"].dtype == jnp.bfloat16
  assert layer["mlp_norm"]["scale"].dtype == jnp.float32
  for leaf in jax.tree.leaves(layer["mlp"]):
    assert {shard.data.size * sizes[2] for shard in leaf.addressable_shards} == {leaf.size}
  compiled = generate.lower(
    jax.tree.map(lambda x: x.astype(jnp.float32), gathered),
    *sharding.shard_rows((*prompts[:2], keys, sampling), whole),
    policy=policy.over(whole),
    responses_per_prompt=GROUP,
    max_new_tokens=STEPS,
    eos_ids=(1, 2),
    pad_id=0,
  ).compile()
  if sizes[2] == 1:
    # Tokens and their log-probs, a few bytes a row; less than the smallest matrix.
    moved = sum(moved for _, moved in collectives(compiled.as_text(), loop=STEPS).values())
    assert moved < STEPS * min(4 * x.size for x in jax.tree.leaves(layer) if x.ndim == 2)


# What does not fit.


def test_sizes_that_are_not_the_devices_are_refused():
  assert dict(mesh_of((-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert mesh_of((1, 2, 1)).size == 2  # The first two.
  for sizes, message in [
    ((3, -1, 1), "data=3 x fsdp=-1 x tensor=1: 8 devices are not 3 times something"),
    ((4, 4, 1), "16 devices are needed, and there are 8"),
    ((-1, -1, 1), "only one axis"),
    ((0, 1, 1), "or -1 for the rest"),
  ]:
    with pytest.raises(sharding.ShardingError, match=message):
      mesh_of(sizes)


def test_what_cannot_be_cut_is_named():
  shape = jax.ShapeDtypeStruct((20, 64), jnp.float32)
  with pytest.raises(
    sharding.ShardingError,
    match=r"embed/embedding: dimension 0 of \(20, 64\) cannot be cut into 8 parts .*axis tensor\)",
  ):
    sharding.tree_shardings({"embed": {"embedding": shape}}, mesh_of((1, 1, 8)))
  with pytest.raises(sharding.ShardingError, match=r"tokens: 12 rows cannot be cut into 8 parts"):
    sharding.shard_rows({"tokens": np.zeros((12, 3))}, mesh_of((4, 2, 1)))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 1, 4)], ids=str)
def test_each_device_gives_its_own_rows_and_heads_to_the_kernel(sizes):
  """Over 4 devices the 2 key heads are copied to those whose queries read them."""
  batch = ragged_batch()

  def gradient(policy, weights, batch):
    def summed(weights):
      logprobs, _ = response_logprobs(weights, batch, policy=policy, chunk_size=16)
      return jnp.sum(logprobs * batch.weights)

    return jax.jit(jax.value_and_grad(summed))(weights)

  mesh = mesh_of(sizes)
  kernel = make_policy(POLICY.config, attention="splash", mesh=mesh)
  placed = sharding.shard(params(), mesh), sharding.shard_rows(batch, mesh)
  loss, found = gradient(kernel, *placed)
  wanted_loss, wanted = gradient(POLICY, params(), batch)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  pairs = zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
  assert all(distance(np.asarray(x), np.asarray(y)) < 1e-5 for x, y in pairs)
