"""All that training changes, as one pytree: what a checkpoint holds and an update donates."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
  """Everything that must survive a crash, together with (seed, step)."""

  step: chex.Array  # int32 scalar, optimiser updates attempted
  params: Any  # the weights being trained
  opt_state: Any  # the optimiser's moments
  skipped: chex.Array  # int32 scalar, updates skipped because a gradient was not finite
  skipped_in_a_row: chex.Array  # int32 scalar, number of consecutive skipped updates
  controls: Any = None  # what the run's controllers know; None: it has none
  reference: Any = None  # trained weights of a reference that is refreshed; None: it is not


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first update; `jax.eval_shape` of it is the tree a restore needs."""
  # Separate arrays: a buffer that is in a state twice cannot be donated.
  zeros = [jnp.zeros((), jnp.int32) for _ in range(3)]
  return TrainState(zeros[0], params, optimizer.init(params), zeros[1], zeros[2])


def parameter_count(params: Any) -> int:
  """The number of scalars in a tree of weights."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
