"""A guard against gradients that are far larger than those before them.

A batch whose loss is a million times too large (a broken row, an overflow that stayed finite) is
clipped to a step of ordinary length in an arbitrary direction, and without clipping it fills
Adam's mean squares for hundreds of steps. The guard skips such an update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class SpikeState(NamedTuple):
  """The last norms, and the state of the optimiser that is guarded."""

  norms: chex.Array  # [window] float32, of the last gradients, each at most its limit then
  seen: chex.Array  # int32 scalar, finite gradients so far
  spikes: chex.Array  # int32 scalar, updates skipped so far because a gradient was too large
  inner: Any  # the guarded optimiser's state


def norm_limit(norms: chex.Array, seen: chex.Array, *, sigma: float) -> chex.Array:
  """The largest norm of a gradient that is no spike: mean + sigma * std of the last ones.

  Infinite until there are as many as the window holds. After norms of 1, 2, 1 and 2:

  >>> norms = jnp.array([1.0, 2.0, 1.0, 2.0])
  >>> float(norm_limit(norms, 4, sigma=6.0)), float(norm_limit(norms, 3, sigma=6.0))
  (4.5, inf)

  Args:
    norms: [window] the last norms, in any order.
    seen: how many there have been so far.
    sigma: how many standard deviations above the mean are still allowed, > 0.
  """
  limit = jnp.mean(norms) + sigma * jnp.std(norms)
  return jnp.where(seen >= norms.shape[0], limit, jnp.inf)


def skip_spikes(
  optimizer: optax.GradientTransformation, *, window: int, sigma: float
) -> optax.GradientTransformation:
  """The optimiser, which on a gradient above `norm_limit` moves nothing and keeps its moments.

  What enters the window is min(norm, limit). So one spike raises the limit little, and if
  gradients stay larger, the limit follows them within a few updates instead of skipping all.

  All of it is in the optimiser's state, so a run resumes with the same limit, and each network of a
  run has its own.

  >>> guarded = skip_spikes(optax.sgd(1.0), window=2, sigma=3.0)
  >>> params = jnp.zeros(1)
  >>> state, moved = guarded.init(params), []
  >>> for gradient in (1.0, 1.5, 1e6, 1.0):
  ...   direction, state = guarded.update(jnp.array([gradient]), state, params)
  ...   moved.append(float(direction[0]))
  >>> moved, int(state.spikes)
  ([-1.0, -1.5, 0.0, -1.0], 1)

  Args:
    optimizer: what is guarded, clipping included.
    window: norms that the limit is taken from, at least 2; before there are as many, none is
      skipped.
    sigma: see `norm_limit`.

  Raises:
    ValueError: the window holds less than two norms, or sigma is not above 0.
  """
  if window < 2:
    raise ValueError(f"window: {window}; allowed: 2 or more")
  if sigma <= 0:
    raise ValueError(f"sigma: {sigma}; allowed: above 0")

  def init(params):
    counts = [jnp.zeros((), jnp.int32) for _ in range(2)]
    return SpikeState(jnp.zeros(window, jnp.float32), *counts, optimizer.init(params))

  def update(grads, state, params=None):
    norm = optax.tree.norm(grads).astype(jnp.float32)
    limit = norm_limit(state.norms, state.seen, sigma=sigma)
    sound = norm <= limit
    direction, inner = optimizer.update(grads, state.inner, params)
    new = SpikeState(
      state.norms.at[state.seen % window].set(jnp.minimum(norm, limit)),
      state.seen + 1,
      state.spikes + (~sound).astype(jnp.int32),
      jax.tree.map(lambda new, old: jnp.where(sound, new, old), inner, state.inner),
    )
    return jax.tree.map(lambda d: jnp.where(sound, d, jnp.zeros_like(d)), direction), new

  return optax.GradientTransformation(init, update)


def spikes_skipped(opt_state: Any) -> chex.Array | None:
  """How many updates of an optimiser were skipped as spikes; None if it has no guard.

  >>> guarded = skip_spikes(optax.sgd(1.0), window=2, sigma=3.0)
  >>> int(spikes_skipped(guarded.init(jnp.zeros(1)))), spikes_skipped(optax.sgd(1.0).init(0.0))
  (0, None)
  """
  leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SpikeState))
  found = [leaf.spikes for leaf in leaves if isinstance(leaf, SpikeState)]
  return found[0] if found else None
