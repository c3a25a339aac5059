"""One optimiser update as a pure function: (state, batch, hparams) -> (state, metrics).

The losses of this library are sums over weighted tokens, with weights made once for the whole
batch. So the gradients of microbatches simply *add*: nothing is divided afterwards, and the number
of microbatches cannot change the result beyond rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from rl_llm.parallel.sharding import constrain, constrain_rows
from rl_llm.policy.lora import join
from rl_llm.training.spikes import spikes_skipped
from rl_llm.training.train_state import TrainState

# (params, microbatch, hparams) -> (scalar loss, {name: (sum, count)})
LossFn = Callable[[Any, Any, Any], tuple[chex.Array, dict[str, tuple[chex.Array, chex.Array]]]]


def make_optimizer(
  *,
  name: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw",
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  decayed: Literal["matrices", "layers", "all"] = "matrices",
  max_grad_norm: float = 1.0,
  mu_dtype: Any = jnp.float32,
) -> optax.GradientTransformation:
  """An optimiser's direction after clipping by global norm; the update applies the learning rate.

  Without the learning rate in the optimiser, schedules and sweeps can change it without
  recompiling. Weight decay is decoupled and skips vectors (norms and biases).

  Args:
    name: "adamw"; "adafactor", whose mean squares are factored, with steps relative to the size of
      each weight; "muon", which orthogonalises the mean gradient of each matrix, and is Adam with
      Nesterov's momentum for embeddings and vectors; or "sgd", with momentum `b1`.
    b1: decay of the mean gradient.
    b2: decay of the mean squared gradient; 0.95 forgets a bad batch sooner than 0.999.
    eps: added to the root of the mean square.
    weight_decay: fraction of each matrix subtracted per unit of learning rate.
    decayed: what decays: "matrices", "layers" (matrices without embeddings), or "all".
    max_grad_norm: longer gradients are scaled to this L2 norm; 0 does not clip.
    mu_dtype: dtype of the mean gradient; bfloat16 takes 2 bytes per parameter instead of 4. The
      mean square stays float32: its changes are too small for bfloat16.
  """

  def mask(params):
    return jax.tree.map_with_path(lambda path, p: _decays(path, p, decayed), params)

  def muon_axes(params):
    axes = contrib.MuonDimensionNumbers()
    return jax.tree.map_with_path(lambda p, x: axes if _decays(p, x, "layers") else None, params)

  match name:
    case "adamw":
      direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    case "adafactor":
      parts = optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
      direction = optax.chain(*parts, optax.scale_by_param_block_rms())
    case "muon":
      own = {"beta": b1, "eps": eps, "adam_b1": b1, "adam_b2": b2, "mu_dtype": mu_dtype}
      # It ends in minus the learning rate, which the update applies.
      direction = contrib.muon(-1.0, **own, muon_weight_dimension_numbers=muon_axes)
    case "sgd":
      direction = optax.trace(b1, accumulator_dtype=mu_dtype) if b1 else optax.identity()
    case _:
      raise ValueError(f"name: {name!r}; allowed: 'adamw', 'adafactor', 'muon', 'sgd'")
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
    direction,
    optax.add_decayed_weights(weight_decay, mask=mask) if weight_decay else optax.identity(),
  )


def _decays(path: Any, p: chex.Array, decayed: str) -> bool:
  """Whether a leaf of the parameters is of this kind."""
  is_embedding = "embed" in jax.tree_util.keystr(path)
  return decayed == "all" or (p.ndim > 1 and not (decayed == "layers" and is_embedding))


@functools.partial(jax.jit, donate_argnums=0)
def moved_towards(reference: Any, params: Any, *, keep: float) -> Any:
  """The reference after a refresh: keep * reference + (1 - keep) * params, leaf by leaf."""
  return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, reference, params)


def scale_part(
  optimizer: optax.GradientTransformation, name: str, factor: float
) -> optax.GradientTransformation:
  """The optimiser with `factor` times the learning rate for one part of the parameters.

  Args:
    optimizer: for example from `make_optimizer`.
    name: of the part, a top-level key of the parameters.
    factor: multiplies its updates.
  """
  part = optax.masked(optax.scale(factor), lambda params: {key: key == name for key in params})
  return optax.chain(optimizer, part)


def make_update(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  cast: Callable[[Any], Any] = lambda params: params,
) -> Callable[..., tuple[TrainState, dict[str, tuple[chex.Array, chex.Array]]]]:
  """Builds the jitted update `(state, batch, hparams) -> (state, metrics)`; the state is donated.

  The batch's rows are split into `microbatches` equal parts. One loop computes them one after
  another and sums their gradients in float32. If any entry of the summed gradient is not finite,
  the whole update is skipped on the device: parameters and moments stay as they were, and
  `state.skipped` counts it.

  Rows whose loss is 0 at any weights (responses whose group agreed, so that every advantage is 0)
  can be put last and left out: `update(state, batch, hparams, 3)` computes the first 3
  microbatches. The caller guarantees that the rest add nothing. The number is data, so it may
  change from step to step without recompiling.

  Frozen weights that the loss reads (LoRA's base) are passed to each call:
  `update(state, batch, hparams, 3, frozen)` takes the loss of `join(frozen, state.params)` and its
  gradient with respect to `state.params` alone.

  Args:
    loss_fn: (params, microbatch, hparams) -> (loss, metrics); a sum over weighted tokens, not a
      mean.
    optimizer: a direction without learning rate, for example from `make_optimizer`.
    microbatches: how many parts; must divide the batch's rows.
    mesh: the devices over which state and batch lie (`rl_llm.parallel.sharding`); None for a single
      device. Each microbatch takes rows of every device, gradients are summed directly into the
      slices of the state, and the new state has the layout of the old one.
    cast: params -> what the loss reads of them, made once an update and not in each microbatch;
      from `Policy.cast`. A microbatch's gradient is that of its result, and is summed in the
      params' own dtypes.

  Returns:
    The update. `hparams` is a dict of scalars with at least "learning_rate"; the rest is for the
    loss. Metrics are (sum, count) pairs: the loss's own, summed over the microbatches computed,
    and "loss", "grad_norm" and "nonfinite_leaves". The sum of the last is [N]: 1 for each leaf of
    the gradient, in the order of `jax.tree.leaves`, that is not finite (`name_nonfinite`). With
    `spikes.skip_spikes` also "spike_skipped". How many updates were skipped is in the state.

  Raises:
    ValueError: at trace time, if the batch's rows are not divisible.
  """
  if microbatches < 1:
    raise ValueError(f"microbatches: {microbatches}; allowed: 1 or more")

  def trained_loss(params, frozen, batch, hparams):
    return loss_fn(join(frozen, params), batch, hparams)

  differentiate = jax.value_and_grad(trained_loss, has_aux=True)

  def once(params):
    found = cast(params)
    return found if mesh is None else constrain(found, mesh)

  def accumulate(params, frozen, batch, hparams, used):
    dtypes = jax.tree.map(lambda p: p.dtype, params)
    params, frozen = once(params), None if frozen is None else once(frozen)

    @jax.jit  # Traced once, though it is called for its shapes and again in the loop.
    def value_and_grad(params, frozen, batch, hparams):
      value, grads = differentiate(params, frozen, batch, hparams)
      grads = jax.tree.map(lambda g, dtype: g.astype(dtype), grads, dtypes)
      if mesh is None:
        return value, grads
      grads, barrier = constrain(grads, mesh), jax.lax.optimization_barrier
      # The barrier keeps XLA from moving the sum over devices out of the loop: then every device
      # would hold the whole running total, and libtpu fails when it tries.
      if mesh.size > 1:
        return value, barrier(grads)
      # One accelerator adds up gradients in bfloat16 as they are, where a barrier has them written
      # out in float32 first. On a CPU sums would be fused with products, and round differently.
      return value, jax.lax.platform_dependent(grads, cpu=barrier, default=lambda grads: grads)

    if microbatches == 1:
      return value_and_grad(params, frozen, batch, hparams)
    parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
    if mesh is not None:
      parts = constrain_rows(parts, mesh, axis=1)

    def add(index, total):
      part = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), parts)
      return jax.tree.map(jnp.add, total, value_and_grad(params, frozen, part, hparams))

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(value_and_grad, params, frozen, first, hparams)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, used, add, zeros)

  def update(
    state: TrainState,
    batch: Any,
    hparams: dict[str, chex.Array],
    used: chex.Array | int = microbatches,
    frozen: Any = None,
  ):
    (loss, metrics), grads = accumulate(state.params, frozen, batch, hparams, used)
    squares = jnp.stack([optax.tree.norm(leaf, squared=True) for leaf in jax.tree.leaves(grads)])
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    direction, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(
      lambda p, d: (p - hparams["learning_rate"] * d).astype(p.dtype), state.params, direction
    )

    def keep(new, old):
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    skipped = (~finite).astype(jnp.int32)
    one = jnp.ones((), jnp.float32)
    new = state._replace(
      step=state.step + 1,
      params=keep(params, state.params),
      opt_state=keep(opt_state, state.opt_state),
      skipped=state.skipped + skipped,
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
    )
    spikes = spikes_skipped(new.opt_state)
    if spikes is not None:
      spiked = spikes - spikes_skipped(state.opt_state)
      metrics = {**metrics, "spike_skipped": (spiked.astype(jnp.float32), one)}
    return new if mesh is None else constrain(new, mesh), {
      **metrics,
      "loss": (loss, one),
      "grad_norm": (grad_norm, one),
      "nonfinite_leaves": ((~jnp.isfinite(squares)).astype(jnp.float32), one),
    }

  # Donated: the state, whose buffers the new state takes over. Not the batch: later epochs read it
  # again.
  return jax.jit(update, donate_argnums=0)


def _split(x: chex.Array, parts: int) -> chex.Array:
  if x.shape[0] % parts:
    raise ValueError(
      f"microbatches: {parts} does not divide the batch's {x.shape[0]} rows; choose a divisor of it"
    )
  return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def learning_rate_at(
  step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int
) -> float:
  """The learning rate of a step: a linear warm-up, then constant or decaying towards 0.

  >>> [learning_rate_at(s, peak=1.0, schedule="linear", warmup_steps=2, total_steps=6)
  ...  for s in range(6)]
  [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]

  Args:
    step: from 0.
    peak: the rate after warm-up.
    schedule: "constant", "linear" or "cosine".
    warmup_steps: steps of the warm-up; the first step already learns.
    total_steps: the step at which the decay would reach 0.
  """
  if step < warmup_steps:
    return peak * (step + 1) / warmup_steps
  done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
  match schedule:
    case "constant":
      return peak
    case "linear":
      return peak * max(0.0, 1.0 - done)
    case "cosine":
      return peak * (1.0 + math.cos(math.pi * min(done, 1.0))) / 2
  raise ValueError(f"schedule: {schedule!r}; allowed: 'constant', 'linear', 'cosine'")


def name_nonfinite(params: Any, leaves: Any) -> str:
  """The path of the first leaf of a gradient that was not finite, for a diagnosis.

  >>> name_nonfinite({"a": 0.0, "b": {"c": 0.0}}, [0.0, 1.0])
  "['b']['c']"

  Args:
    params: the parameters of the gradient, arrays or their shapes.
    leaves: [N] how often each leaf was not finite: the update's "nonfinite_leaves". If all are 0,
      each leaf was finite, but the sum of their squares was not.
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  found = [jax.tree_util.keystr(path) for path, n in zip(paths, leaves, strict=True) if n]
  return found[0] if found else "its norm, which overflows"
