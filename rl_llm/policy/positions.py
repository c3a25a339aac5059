"""Rotary positions, and what each query may see: the geometry of a pass."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.policy.attention import Visible, attention_mask
from rl_llm.policy.configs import RopeScaling, TransformerConfig


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Radians per position of each rotated pair: theta^(-2i / head_dim), slowed down as `scaling`
  says.

  >>> rope_frequencies(4, 10_000.0).tolist()
  [1.0, 0.01]
  >>> rope_frequencies(4, 10_000.0, RopeScaling("linear", 2.0)).tolist()
  [0.5, 0.005]

  Args:
    head_dim: H, floats per head.
    theta: base of the wavelengths.
    scaling: None for none.

  Returns:
    [H / 2] float64.
  """
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is None:
    return frequencies
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  # Decided by how many full turns a pair makes within the original context: few -> slowed, many ->
  # kept.
  turns = scaling.original_max_position * frequencies / (2 * np.pi)
  span = scaling.high_freq_factor - scaling.low_freq_factor
  keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
  return frequencies * (keep + (1.0 - keep) / scaling.factor)


def apply_rope(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
  """Rotates pair (i, i + H / 2) of every head by its angle, in float32.

  A quarter turn takes (1, 0) to (0, 1):

  >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
  >>> apply_rope(x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))).tolist()
  [[[[0.0, 1.0]]]]

  Args:
    x: [B, T, heads, H] float.
    cos: [B, T, H / 2] float32, of the angles position * frequency.
    sin: [B, T, H / 2] float32.

  Returns:
    [B, T, heads, H] in x's dtype.
  """
  halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
  cos, sin = cos[:, :, None, None, :], jnp.stack([-sin, sin], axis=-2)[:, :, None]
  # Swapped, not split and joined: one fused loop, where a CPU takes several for a concatenation.
  rotated = halves * cos + halves[..., ::-1, :] * sin
  return rotated.reshape(x.shape).astype(x.dtype)


class Geometry(NamedTuple):
  """Where a pass's tokens stand and what they see: ((cos, sin), mask), in each kind of layer."""

  full: tuple[tuple[chex.Array, chex.Array], chex.Array]
  sliding: tuple[tuple[chex.Array, chex.Array], chex.Array]
  segments: tuple[chex.Array, chex.Array]  # of the queries and of the keys

  def of(self, is_sliding: bool | chex.Array) -> tuple[tuple[chex.Array, chex.Array], Visible]:
    """The geometry for a layer: by its kind, or selected by data in a loop over both kinds."""
    if isinstance(is_sliding, bool):
      rope, mask = self.sliding if is_sliding else self.full
    else:
      choose = functools.partial(jnp.where, is_sliding)
      rope, mask = jax.tree.map(choose, self.sliding, self.full)
    return rope, Visible(mask, *self.segments, is_sliding)


def make_geometry(
  config: TransformerConfig,
  query_segments: chex.Array,
  key_segments: chex.Array,
  query_positions: chex.Array,
  key_positions: chex.Array,
  first_column: chex.Array | int = 0,
) -> Geometry:
  """Angles and masks of a pass. The arguments are those of `attention_mask`."""

  def mask(window: int | None) -> chex.Array:
    return attention_mask(
      query_segments, key_segments, query_positions, key_positions, first_column, window
    )

  def rope(theta: float, scaling: RopeScaling | None) -> tuple[chex.Array, chex.Array]:
    frequencies = jnp.asarray(rope_frequencies(config.head_dim, theta, scaling), jnp.float32)
    angles = query_positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)

  full = rope(config.rope_theta, config.rope_scaling), mask(None)
  if "sliding" not in config.layer_types:
    return Geometry(full, full, (query_segments, key_segments))
  local = config.rope_local_theta
  sliding = rope(local, None) if local else full[0], mask(config.sliding_window)
  return Geometry(full, sliding, (query_segments, key_segments))
