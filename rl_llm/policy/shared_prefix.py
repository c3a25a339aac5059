"""One row for a prompt and all its responses, where attention reads the prompt once."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp


class Fork(NamedTuple):
  """Combines prompts [P, L, ...] and what follows them [B, T, ...], B = P * G, into one array.

  Everything but attention works token by token. So both lie in one array, [P, L + G * T, ...], each
  prompt with what follows it, and one product with each matrix covers both.

  >>> fork = Fork(prompts=1, columns=2, rows=2, steps=1)
  >>> both = fork.join(jnp.array([[5, 6]]), jnp.array([[7], [8]]))
  >>> both.tolist(), [x.tolist() for x in fork.part(both)]
  ([[5, 6, 7, 8]], [[[5, 6]], [[7], [8]]])
  >>> fork.with_prompts(jnp.array([[5, 6]]), jnp.array([[7], [8]])).tolist()
  [[5, 6, 7], [5, 6, 8]]
  """

  prompts: int  # P
  columns: int  # L
  rows: int  # B
  steps: int  # T

  def with_prompts(self, x: chex.Array, y: chex.Array) -> chex.Array:
    """[P, L, ...] and [B, T, ...] as [B, L + T, ...]: each row behind a copy of its prompt."""
    return jnp.concatenate([jnp.repeat(x, self.rows // self.prompts, axis=0), y], axis=1)

  def join(self, x: chex.Array, y: chex.Array) -> chex.Array:
    """[P, L, ...] and [B, T, ...] as [P, L + G * T, ...]."""
    return jnp.concatenate([x, y.reshape(self.prompts, -1, *y.shape[2:])], axis=1)

  def part(self, xy: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The way back."""
    prompts, following = xy[:, : self.columns], xy[:, self.columns :]
    return prompts, following.reshape(self.rows, self.steps, *xy.shape[2:])
