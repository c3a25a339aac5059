"""What a policy has read, for the tokens that follow."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Cache(NamedTuple):
  """What has been read, so that a decode step computes one token: S columns, `cursor` written.

  Every leaf but a scalar `cursor` has the batch first, so rows can be repeated or gathered with
  `jax.tree.map`. Keys and values are stored in the order in which a decode step multiplies them:
  with heads after columns, or keys with columns first, a CPU rearranges the whole cache per token.
  """

  keys: tuple[chex.Array, ...]  # one a layer, [B, K, H, S] in the compute dtype, rotated
  values: tuple[chex.Array, ...]  # one a layer, [B, K, S, H] in the compute dtype
  segment_ids: chex.Array  # [B, S] int32, -1 = padding or not yet written
  positions: chex.Array  # [B, S] int32
  cursor: chex.Array  # int32, the column the next token goes to: of all rows, or [B] of each


def written(kept: chex.Array, new: chex.Array, cursor: chex.Array, *, axis: int) -> chex.Array:
  """A cache's array with `new` in the columns from `cursor` on, along `axis`."""
  if jnp.ndim(cursor) == 0:
    return jax.lax.dynamic_update_slice_in_dim(kept, new, cursor, axis=axis)
  columns = cursor[:, None] + jnp.arange(new.shape[axis])

  def of_row(kept: chex.Array, new: chex.Array, columns: chex.Array) -> chex.Array:
    return kept.at[(slice(None),) * (axis - 1) + (columns,)].set(new, mode="drop")

  return jax.vmap(of_row)(kept, new, columns)
