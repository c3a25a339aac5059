"""Runs one function over a model's layers: one after another, or as one loop over their stack.

Given 80 layers one after another, a compiler compiles the same code 80 times: minutes become an
hour. A loop over stacked layers is compiled once, but a stack is a copy, and a decode step that
slices it copies every weight at every token. So weights are kept as one tree per layer, and are
stacked only inside the programs where it pays: those that read many tokens at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rl_llm.parallel.sharding import constrain, constrain_stacked


class Layer(NamedTuple):
  """What a layer has that the others do not share."""

  weights: Any  # a tree of arrays
  is_sliding: bool
  other: Any = None  # a tree of arrays, of one structure in all layers (a cache's keys and values)


# (x, weights of a layer, whether it is a sliding one, what else is the layer's, what all layers
# read) -> (x, output)
Body = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]


def run_layers(
  body: Body,
  x: Any,
  layers: Sequence[Layer],
  common: Any = None,
  *,
  scan: bool,
  remat: bool,
  dtype: Any,
  mesh: Mesh | None = None,
  layout: Callable[[Any, Mesh], Any] = constrain,
) -> tuple[Any, list[Any]]:
  """Runs x through all layers; returns it with the output of each.

  >>> layers = [Layer({"weight": jnp.float32(w)}, is_sliding=False) for w in (2, 3, 5)]
  >>> body = lambda x, weights, is_sliding, other, common: (x * weights["weight"], x)
  >>> for scan in (False, True):
  ...   x, out = run_layers(
  ...     body, jnp.float32(1), layers, scan=scan, remat=False, dtype=jnp.float32)
  ...   print(float(x), [float(y) for y in out])
  30.0 [1.0, 2.0, 6.0]
  30.0 [1.0, 2.0, 6.0]

  Args:
    body: see `Body`; it closes over no array, since identical layers are traced only once.
      Whether a layer slides is a bool where all layers of a loop agree, and an array where they do
      not, as in Gemma's.
    x: any tree of arrays.
    layers: one `Layer` each. Neighbours whose weights have the same structure and shapes share a
      loop: one that has adapters which the others lack (LoRA on some layers) does not.
    common: a tree for all of them (angles and masks).
    scan: one loop over the stack instead of one layer after another.
    remat: compute what happens within a layer again in the backward pass.
    dtype: weights are cast to it before they are stacked, as they would be where they are used.
      Norms' scales, which are used in float32, stay as they are.
    mesh: the devices over which the weights lie; each stacks its own slices and gets its own
      slices of the gradient. None where there is one.
    layout: how a layer's matrices lie over the mesh when x meets them, from
      `rl_llm.parallel.sharding`: `copy_to_rows` where x's rows can be divided over the devices.
      Where x is small compared with a matrix, as when few rows decode, `constrain` lets the
      compiler send x instead.

  Returns:
    x, and the list of the layers' outputs.
  """
  layers = list(layers)
  outputs: list[Any] = []

  def layer(x, parts, same):
    slices, flag, other, common = parts
    if mesh is not None:
      slices = layout(cast_weights(slices, dtype), mesh)
    return body(x, slices, flag if same is None else same, other, common)

  # Traces, differentiates and transposes identical layers once: otherwise tracing takes as long as
  # compiling.
  @functools.partial(jax.jit, static_argnums=2)
  def single(x, parts, same):
    function = functools.partial(layer, same=same)
    return (rematerialized(function) if remat else function)(x, parts)

  runs = _runs([layer.weights for layer in layers])
  for first, last in runs if scan else [(i, i + 1) for i in range(len(layers))]:
    weights, flags, others = zip(*layers[first:last], strict=True)
    same = flags[0] if len(set(flags)) == 1 else None

    if last - first == 1:
      if mesh is not None and mesh.size > 1 and last < len(layers):
        # Gather the next layer's matrices when this one begins, and no sooner: left to itself, a
        # compiler may start by gathering all layers, and each device then holds the whole model.
        x, later = jax.lax.optimization_barrier((x, layers[last].weights))
        layers[last] = layers[last]._replace(weights=later)
      x, out = single(x, (weights[0], None, others[0], common), same)
      outputs.append(out)
      continue

    stacked = (
      stack_layers(weights, dtype=dtype, mesh=mesh),
      jnp.array(flags),
      jax.tree.map(lambda *leaves: jnp.stack(leaves), *others),
    )

    # Inside a loop nothing can be merged with the forward pass, so no barrier is needed.
    def one(x, parts, same=same):
      return layer(x, (*parts, common), same)

    one = jax.checkpoint(one, prevent_cse=False) if remat else one
    x, out = jax.lax.scan(one, x, stacked)
    outputs += [jax.tree.map(lambda leaf, i=i: leaf[i], out) for i in range(last - first)]
  return x, outputs


def rematerialized(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
  """The function, keeping only its arguments from the forward pass; the backward pass recomputes
  the rest when it needs it.

  `jax.checkpoint` does this with a barrier that a CPU's compiler removes: it then recomputes
  everything at once, before any of it is needed, and saves no memory. Here x becomes
  x + 0 * cotangent on a CPU before it is read again. A cotangent that is not finite makes the
  gradient nan, which it was anyway. JAX differentiates the result in reverse only (no jvp).

  >>> f = rematerialized(lambda x, parts: jnp.sin(x) * parts)
  >>> [round(float(g), 2) for g in jax.grad(f, argnums=(0, 1))(0.0, 2.0)]
  [2.0, 0.0]

  Args:
    function: (x, parts) -> result, any trees of arrays, which contain all that is differentiated.
  """

  @jax.custom_vjp
  def run(x, parts):
    return function(x, parts)

  def forward(x, parts):
    return function(x, parts), (x, parts)

  def add_zero(x, arrived):
    zero = sum(0 * cotangent.ravel()[0].astype(jnp.float32) for cotangent in arrived)
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), x)

  def barrier(x, arrived):
    return jax.lax.optimization_barrier((x, arrived))[0]

  def backward(kept, cotangents):
    x, parts = kept
    arrived = [c for c in jax.tree.leaves(cotangents) if c.dtype != jax.dtypes.float0]
    x = jax.lax.platform_dependent(x, arrived, cpu=add_zero, default=barrier)
    return jax.vjp(function, x, parts)[1](cotangents)

  run.defvjp(forward, backward)
  return run


def stack_layers(weights: Sequence[Any], *, dtype: Any, mesh: Mesh | None = None) -> Any:
  """The trees of layers as one tree, with the layers along a new first axis, in `dtype`.

  >>> weights = [{"norm": {"scale": jnp.ones(2)}, "up": {"weight": jnp.ones((3, 2))}}] * 4
  >>> jax.tree.map(lambda x: (x.shape, x.dtype.name), stack_layers(weights, dtype=jnp.bfloat16))
  {'norm': {'scale': ((4, 2), 'float32')}, 'up': {'weight': ((4, 3, 2), 'bfloat16')}}
  """

  weights = [cast_weights(layer, dtype) for layer in weights]
  if mesh is not None:  # Cast slice by slice too, not gathered first.
    weights = [constrain(layer, mesh) for layer in weights]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)
  return stacked if mesh is None else constrain_stacked(stacked, mesh)


def cast_weights(weights: Any, dtype: Any) -> Any:
  """All but norms' scales, which are used in float32."""

  def cast(path, leaf):
    return leaf if path[-1].key == "scale" else leaf.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, weights)


def _runs(weights: Sequence[Any]) -> list[tuple[int, int]]:
  """[first, last) of neighbours with the same structure, shapes and dtypes."""

  def kind(layer):
    leaves, structure = jax.tree.flatten(layer)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

  kinds = [kind(layer) for layer in weights]
  starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
  return list(zip(starts, [*starts[1:], len(kinds)], strict=True))
