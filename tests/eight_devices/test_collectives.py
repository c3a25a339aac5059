"""What eight devices say to one another in an update, in bytes, against what it must cost."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from experiments.flags import SamplingMesh
from launch import plan
from launch.hlo import collectives
from launch.models import find_model
from rl_llm.parallel import sharding
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout import generate, response_logprobs, row_keys
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.training.train_state import init_state
from rl_llm.training.update import make_update
from tests.eight_devices.test_update import mesh_of, policy_loss, ragged_batch

# Matrices that outweigh the activations of a few tokens, so that sending the latter shows.
CONFIG = dataclasses.replace(tiny_config(64), n_layers=2, mlp_width=512)
MICROBATCHES = 2


def of_update(sizes, *, scan_layers) -> dict[str, float]:
  """Bytes through a device by kind of collective, for shapes alone: nothing is run."""
  mesh = mesh_of(sizes)
  policy = make_policy(CONFIG, scan_layers=scan_layers, remat=True, mesh=mesh)

  def loss_fn(weights, batch, hparams):
    logprobs, _ = response_logprobs(weights, batch, policy=policy)
    return policy_loss(logprobs, batch)

  init = functools.partial(init_state, optimizer=optax.identity())
  state = sharding.sharded_shapes(
    jax.eval_shape(lambda: init(policy.init(jax.random.key(0)))), mesh
  )
  rows = sharding.row_sharding(mesh)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), ragged_batch()
  )
  update = make_update(loss_fn, optax.identity(), microbatches=MICROBATCHES, mesh=mesh)
  text = update.lower(state, batch, {"learning_rate": jnp.float32(1.0)}).compile().as_text()
  found = collectives(text, loop=MICROBATCHES)
  return {kind: moved for kind, (_, moved) in found.items()}


def matrix_bytes() -> tuple[int, int]:
  """(the layers', the embedding's), in float32."""
  shapes = jax.eval_shape(make_policy(CONFIG).init, jax.random.key(0))
  layers = sum(
    4 * math.prod(leaf.shape)
    for name, layer in shapes.items()
    if name.startswith("layers")
    for leaf in jax.tree.leaves(layer)
    if leaf.ndim == 2
  )
  return layers, 4 * math.prod(shapes["embed"]["embedding"].shape)


@pytest.mark.parametrize(("sizes", "scan_layers"), [((1, 8, 1), False), ((2, 4, 1), True)], ids=str)
def test_weights_are_gathered_twice_and_their_gradient_is_added_up_once(sizes, scan_layers):
  """For each microbatch: forward and again; and once for prompts and responses.

  With layers one after another the last one's two gathers may be one. The table is left to the
  compiler, which gives every device the whole of its gradient, and of the states it is made from.
  """
  moved = of_update(sizes, scan_layers=scan_layers)
  layers, table = matrix_bytes()
  slices = 2 * layers / sizes[1] if sizes[0] > 1 else 0  # Along data, the slices' all-reduce.
  assert moved.get("reduce-scatter", 0) == MICROBATCHES * layers
  assert moved["all-gather"] < 1.05 * MICROBATCHES * 2 * (layers + table)
  states = 4 * 8 * 15 * CONFIG.width  # In float32, of 8 prompts of 7 tokens and what follows them.
  most = 1.05 * MICROBATCHES * (slices + 2 * table) + states + 20_000  # And norms.
  assert moved["all-reduce"] < most
  assert sum(moved.values()) < 1.5 * MICROBATCHES * (3 * layers + slices)


@pytest.fixture
def careful_compilation():
  """With few optimisations a loop would hold what never changes."""
  before = jax.config.values["jax_disable_most_optimizations"]
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


def test_a_rollout_gathers_a_layer_at_each_token_instead_of_holding_the_model(careful_compilation):
  """The first layer's matrices may be gathered before the loop over tokens, and no others."""
  config = dataclasses.replace(CONFIG, n_layers=3)
  mesh = mesh_of((1, 8, 1))
  policy = make_policy(config, mesh=mesh)
  rows = sharding.row_sharding(mesh)
  params = sharding.sharded_shapes(jax.eval_shape(policy.init, jax.random.key(0)), mesh)
  prompts = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=rows)
  lengths = jax.ShapeDtypeStruct((8,), jnp.int32, sharding=rows)
  text = (
    generate.lower(
      params,
      prompts,
      lengths,
      row_keys(jax.random.key(0), 8, 2),
      SamplingConfig(),
      policy=policy,
      responses_per_prompt=2,
      max_new_tokens=4,
      eos_ids=(),
      pad_id=0,
    )
    .compile()
    .as_text()
  )
  steps = 100  # As if the loop ran so often.
  layer = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(params["layers_1"]) if x.ndim == 2)
  assert collectives(text, loop=steps)["all-gather"][1] > steps * (config.n_layers - 1) * layer


def test_a_plan_gathers_weights_before_the_rollout_that_holds_them():
  def moved(program):
    return sum(moved for _, moved in program.collectives.values())

  config = plan.Config(
    topology="cpu:8",
    model="tiny",
    prompts_per_step=8,
    responses_per_prompt=2,
    microbatch_prompts=8,
    prompt_tokens=8,
    max_new_tokens=6,
    dtype="float32",
    mesh=SamplingMesh(1, 8, 1),
  )
  once = {program.name: program for program in plan.plan(config)}
  assert list(once) == ["update", "gather", "rollout"]
  shapes = jax.tree.leaves(jax.eval_shape(make_policy(find_model("tiny")).init, jax.random.key(0)))
  weights = 4 * sum(x.size for x in shapes)
  assert moved(once["rollout"]) < weights / 50  # Tokens and their log-probs.
  assert weights < once["rollout"].arguments < weights + 1000
  assert once["rollout"].resident > 3 * weights / 8
  assert once["gather"].collectives["all-gather"][1] == 4 * sum(
    x.size for x in shapes if x.ndim == 2
  )
  token = plan.plan(dataclasses.replace(config, mesh=SamplingMesh(1, 8, 1, gather="token")))
  assert [program.name for program in token] == ["update", "rollout"]
  assert token[1].arguments < weights / 4 and moved(token[1]) > weights
