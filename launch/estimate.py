"""Estimates by formula what a run needs of a chip: where there is no compiler, and for the search.

The formulas know the large arrays and nothing of what a compiler adds or saves. They are good for
ranking: which of two meshes is better, and whether a run can fit at all. Of the programs in
docs/results/plan.md, the compiler's peak is 0.8 to 1.3 times the formula's. `launch.plan` says next
to each figure where it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import NamedTuple

import jax

from launch.chips import find_chip
from launch.models import find_model
from launch.plan_flags import Config
from launch.programs import cache_bytes, itemsize, updates_of, work
from rl_llm import rollout
from rl_llm.parallel import sharding
from rl_llm.policy import TransformerConfig, make_policy
from rl_llm.rollout import teacher_forcing
from rl_llm.runs.flops import update_passes
from rl_llm.training.train_state import parameter_count


class Sizes(NamedTuple):
  """Of a mesh's axes."""

  data: int
  fsdp: int
  tensor: int


class Estimate(NamedTuple):
  """One program's figures, by chip."""

  name: str
  calls: int
  arguments: float  # bytes: weights, moments
  temporaries: float  # bytes
  resident: float  # bytes of weights and moments that the program does not use
  collectives: dict[str, tuple[int, float]]
  flops: float
  moved: float


def estimate(config: Config, shape: TransformerConfig, sizes: Sizes) -> list[Estimate]:
  """The update's and the rollout's figures.

  With N parameters, S = fsdp x tensor slices of them, R rows on a chip at once of n tokens in all:

      arguments     4 N / S weights, 8 N / S moments
      temporaries   4 N / S gradient, as much again to add microbatches up, 2 N / S cast weights
                    n D 2 layers    what remat keeps, plus twice the arrays of one layer and once
                    its attention scores
                    logits of the update's `CHUNK_SIZE` tokens, three times
      a rollout's   the cache 1.4 times, and the vocabulary's matrices once more
      network       along fsdp the weights, forward and backward, and their float32 gradient once;
                    along tensor activations, twice a layer and pass; along data the gradient

  Adapters count as nothing next to the frozen weights.
  """
  total, layer = count_parameters(shape)
  trained = 0 if config.lora.rank else total
  updates = updates_of(config)
  prompts = config.prompts_per_step // updates.minibatches
  at_once = min(config.microbatch_prompts, prompts)
  microbatches = max(1, prompts // at_once)
  size, slices, shards = itemsize(config), sizes.fsdp * sizes.tensor, sizes.data * sizes.fsdp
  chips = shards * sizes.tensor
  passes = update_passes(adapters=bool(config.lora.rank)) + config.remat
  heads = shape.n_heads / sizes.tensor

  weights, moments = 4 * total / slices, 8 * trained / slices
  rows = at_once * config.responses_per_prompt / shards
  new, columns = config.max_new_tokens, config.prompt_tokens + config.max_new_tokens
  tokens = rows * new + at_once / shards * config.prompt_tokens
  chunk = rollout.CHUNK_SIZE  # Tokens whose logits exist at once.
  if config.experiment == "dpo":
    rows, new, chunk = 2 * at_once / shards, columns, teacher_forcing.CHUNK_SIZE
    tokens = rows * columns
  wide = 4 * shape.width + (3 * shape.mlp_width + 4 * heads * shape.head_dim * sizes.tensor) / (
    sizes.tensor
  )
  inside = tokens * wide * size
  # In float32 before and after the mask, and their softmax in the arithmetic's dtype.
  scores = rows * heads * new * columns * (8 + size)
  kept = tokens * shape.width * size * shape.n_layers + 2 * inside + scores
  if not config.remat:
    kept = (inside + scores) * shape.n_layers
  gradient = 4 * trained / slices * (2 if microbatches > 1 else 1) + size * trained / slices
  cast = size * total / slices + 2 * size * layer / sizes.tensor
  logits = 3 * 4 * chunk * shape.vocab_size / sizes.tensor
  gathered = size * total / sizes.tensor
  forward_and_back = 4 + 2 * config.remat  # Sums of activations a layer.
  found = [
    Estimate(
      "update",
      updates.count,
      weights + moments,
      gradient + cast + kept + logits,
      0.0,
      {
        "all-gather": along(sizes.fsdp, microbatches * 2 * gathered),
        "reduce-scatter": along(sizes.fsdp, microbatches * 4 * trained / sizes.tensor),
        "all-reduce": add(
          along(sizes.data, microbatches * 2 * 4 * trained / slices),
          along(
            sizes.tensor,
            microbatches * forward_and_back * shape.n_layers * 2 * tokens * shape.width * size,
          ),
        ),
      },
      passes * work(config, shape) / updates.minibatches / chips,
      passes * microbatches * gathered + 6 * 4 * trained / slices,
    )
  ]
  if config.experiment == "dpo":
    return found
  rows = config.prompts_per_step * config.responses_per_prompt / shards
  token = cache_bytes(config, shape) / min(sizes.tensor, shape.n_kv_heads)
  steps = config.max_new_tokens
  vocabulary = total - shape.n_layers * layer  # Embedding, the head if it has its own.
  once = config.mesh.gather == "step" and sizes.fsdp > 1
  found.append(
    Estimate(
      "rollout",
      1,
      gathered if once else weights,
      1.4 * rows * columns * token
      + size * vocabulary / sizes.tensor
      + 2 * size * layer / sizes.tensor
      + 2 * 4 * rows * shape.vocab_size / sizes.tensor,
      weights + moments if once else moments,
      {
        "all-gather": along(sizes.fsdp, (1 if once else steps) * gathered),
        "all-reduce": along(
          sizes.tensor, steps * 2 * shape.n_layers * 2 * rows * shape.width * size
        ),
      },
      work(config, shape) / chips,
      steps * (gathered + rows * (columns - steps / 2) * token),
    )
  )
  return found


@functools.cache
def count_parameters(shape: TransformerConfig) -> tuple[int, int]:
  """Of the model, and of one layer: all have equally many, so one is traced and not 80."""
  kinds = shape.layer_types and shape.layer_types[:1]
  one = dataclasses.replace(shape, n_layers=1, layer_types=kinds)
  shapes = jax.eval_shape(make_policy(one).init, jax.random.key(0))
  layer = parameter_count(shapes["layers_0"])
  return parameter_count(shapes) + (shape.n_layers - 1) * layer, layer


def along(devices: int, moved: float) -> tuple[int, float]:
  """(how many, bytes): nothing along an axis of one device."""
  return (1, moved) if devices > 1 else (0, 0.0)


def add(a: tuple[int, float], b: tuple[int, float]) -> tuple[int, float]:
  return a[0] + b[0], a[1] + b[1]


def meshes(config: Config, shape: TransformerConfig, devices: int) -> list[Sizes]:
  """All sizes whose product is the number of devices and that divide what they cut.

  >>> from rl_llm.policy import tiny_config
  >>> config = Config(prompts_per_step=2, microbatch_prompts=2)
  >>> [tuple(sizes) for sizes in meshes(config, tiny_config(64), 4)]
  [(1, 1, 4), (1, 2, 2), (2, 1, 2)]
  """
  found = []
  for tensor in divisors(devices):
    # Heads are cut whole, and every other dimension is a multiple of what cuts them.
    if shape.n_heads % tensor or shape.vocab_size % tensor or shape.mlp_width % tensor:
      continue
    if shape.n_kv_heads * shape.head_dim % tensor:
      continue
    for fsdp in divisors(devices // tensor):
      shards = devices // tensor
      if shape.width % fsdp or config.prompts_per_step % shards:
        continue
      found.append(Sizes(shards // fsdp, fsdp, tensor))
  return sorted(found)


def mesh_sizes(config: Config) -> Sizes:
  """The mesh's axes; -1 is what the other axes leave."""
  count = find_chip(config.topology)[1] * config.num_slices
  sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
  rest = count // math.prod(size for size in sizes.values() if size != -1)
  return Sizes(**{name: rest if size == -1 else size for name, size in sizes.items()})


def settled(config: Config) -> Config:
  """The config with a microbatch: the largest that fits by formula, where none is given."""
  if config.microbatch_prompts:
    return config
  whole = dataclasses.replace(config, microbatch_prompts=config.prompts_per_step)
  update = config.prompts_per_step // updates_of(whole).minibatches
  shape, (chip, _) = (
    find_model(config.model, vocab_size=config.vocab_size),
    find_chip(config.topology),
  )
  sizes = mesh_sizes(config)
  rows, fitting = sizes.data * sizes.fsdp, []
  possible = [size for size in divisors(update) if size % rows == 0] or [update]
  for size in possible:
    found = estimate(dataclasses.replace(config, microbatch_prompts=size), shape, sizes)
    if chip is None or found[0].arguments + found[0].temporaries <= chip.hbm:
      fitting.append(size)
  chosen = max(fitting, default=possible[0])
  print(f"--microbatch_prompts={chosen}, the most that fit by formula", file=sys.stderr, flush=True)
  return dataclasses.replace(config, microbatch_prompts=chosen)


def divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]
