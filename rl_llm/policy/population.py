"""Many variants of one model, which may share most of their weights, decoding as one model.

Running N settings one after another reads the base weights N times as often as necessary: a decode
step of few rows waits for weights, not for arithmetic. Here the rows of a batch belong to members,
first those of member 0, then those of member 1, and so on. Each member multiplies its rows with its
own weights, and what members share multiplies all rows in one product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax

from rl_llm.policy.cache import Cache
from rl_llm.policy.lora import join
from rl_llm.policy.modules import Params
from rl_llm.policy.transformer import Policy

# (what all members share, or None; what each has, with the members along a new first axis)
Population = tuple[Params | None, Params]


class PopulationPolicy(NamedTuple):
  """What a rollout reads of a `Policy`, for weights of type `Population`."""

  # hidden(population, tokens [N * B, T], positions, segment_ids=None, cache=None)
  #   -> (hidden [N * B, T, D], cache)
  hidden: Callable[..., tuple[chex.Array, Cache | None]]
  # init_cache(N * B, length) -> an empty Cache
  init_cache: Callable[[int, int], Cache]
  # logits(population, hidden [N * B, ..., D]) -> [N * B, ..., V] float32
  logits: Callable[[Population, chex.Array], chex.Array]


@functools.cache
def population_policy(policy: Policy) -> PopulationPolicy:
  """The functions of a model for the rows of N members, to sample with in one loop.

  A `vmap` of the whole rollout would run one loop per member under a shared condition, and would
  have to select between the old and the new cache at every token. Here a single loop runs over all
  rows, and its body tells the members apart: `vmap` covers only what each has alone.

      y = x @ W.T              [N * B, D] @ [D, F]          W is read once for all members
        + (x @ A.T) @ B.T      N of [B, D] @ [D, r] @ [r, F]

  The gain, where reading weights is all that a decode step does: one member alone reads
  W + a bytes a token, base and adapters; N in one program read W + N a instead of N (W + a).
  SmolLM2 in bfloat16 has 269 MB, its adapters of rank 8 have 4.9 MB, so 8 settings take

  >>> W, a, N = 269.0, 4.9, 8
  >>> round(N * (W + a) / (W + N * a), 1)  # times less
  7.1

  of the time, until there are enough rows that arithmetic or the caches (one per row) dominate.

  >>> import jax.numpy as jnp
  >>> from rl_llm.policy import make_policy, split_lora, tiny_config
  >>> policy = make_policy(tiny_config(vocab_size=32))
  >>> params = jax.jit(policy.init)(jax.random.key(0))
  >>> frozen, adapters = split_lora(params, jax.random.key(1), rank=2, alpha=2.0)
  >>> three = jax.tree.map(lambda *x: jnp.stack(x), adapters, adapters, adapters)
  >>> tokens, positions = jnp.ones((6, 4), int), jnp.tile(jnp.arange(4), (6, 1))
  >>> population_policy(policy).hidden((frozen, three), tokens, positions)[0].shape
  (6, 4, 64)

  Args:
    policy: of one member, made without a mesh. Devices can divide the members instead.

  Returns:
    Functions that `rl_llm.rollout.generate` takes in the place of a policy's, with all rows decoded
    at once (`slots=0`: a slot belongs to a member for good).
  """

  def each(function: Callable[..., Any], population: Population, *args: Any, axes: Any, out: Any):
    """`function(weights, ...)` of every member."""
    frozen, own = population
    return jax.vmap(
      lambda own, *args: function(join(frozen, own), *args), in_axes=(0, *axes), out_axes=out
    )(own, *args)

  def hidden(population, tokens, positions, segment_ids=None, cache=None):
    members = count_members(population)
    rows = divided((tokens, positions, segment_ids, cache), members)
    # All rows stand at one column.
    axes = None if cache is None else Cache(0, 0, 0, 0, None)
    found = each(policy.hidden, population, *rows, axes=(0, 0, 0, axes), out=(0, axes))
    return joined(found)

  def logits(population, hidden):
    rows = divided(hidden, count_members(population))
    return joined(each(policy.logits, population, rows, axes=(0,), out=0))

  return PopulationPolicy(hidden, policy.init_cache, logits)


def count_members(population: Population) -> int:
  """N, by the weights that each has."""
  return jax.tree.leaves(population[1])[0].shape[0]


def divided(rows: Any, members: int) -> Any:
  """[N * B, ...] as [N, B, ...] in every array of a tree; scalars stay.

  >>> divided(jax.numpy.arange(6), 3).tolist()
  [[0, 1], [2, 3], [4, 5]]
  """
  return jax.tree.map(lambda x: x.reshape(members, -1, *x.shape[1:]) if x.ndim else x, rows)


def joined(rows: Any) -> Any:
  """The way back."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) if x.ndim else x, rows)
