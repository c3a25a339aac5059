"""Functions of arrays that lie on a mesh with Explicit axes, `jax.make_mesh`'s default.

There every operation must say where its result lies, or leave no doubt. Sorting a batch, counting
along a row or cutting a vocabulary into blocks leaves doubts, though what they compute does not
depend on where an array lies. Such a function lets the compiler place what it computes, as on Auto
axes, and says of its results alone where they lie.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def any_mesh(f: Callable) -> Callable:
  """`f` for arrays on any mesh; without Explicit axes, it is `f` itself.

  Results lie as the first array of the most axes does, as far as their shapes begin alike:

  >>> import jax.numpy as jnp
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> x = jax.device_put(jnp.array([[3.0, 1.0]]), NamedSharding(mesh, PartitionSpec("data")))
  >>> [str(jax.typeof(any_mesh(g)(x))) for g in (jnp.sort, jnp.median)]
  ['float32[1@data,2]', 'float32[]']

  Args:
    f: a function of arrays and settings, by position or by name. It closes over no array.
  """

  @functools.wraps(f)
  def on_any_mesh(*args, **kwargs):
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    explicit = [x for x in arrays.values() if AxisType.Explicit in _mesh(x).axis_types]
    if not explicit:
      return f(*args, **kwargs)

    def call(arrays):
      args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)])
      return f(*args, **kwargs)

    first = max(explicit, key=lambda x: x.ndim)
    mesh = _mesh(first)
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(name for name in types if types[name] == AxisType.Explicit)
    auto = [AxisType.Auto if name in axes else types[name] for name in types]
    with jax.sharding.use_abstract_mesh(
      AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=tuple(auto))
    ):
      shapes = jax.eval_shape(call, jax.tree.map(_shape, arrays))
    places = jax.tree.map(lambda x: NamedSharding(mesh, _as_far_as_alike(first, x.shape)), shapes)
    return jax.sharding.auto_axes(call, axes=axes, out_sharding=places)(arrays)

  return on_any_mesh


def _mesh(x: jax.Array) -> AbstractMesh:
  return jax.typeof(x).sharding.mesh


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _as_far_as_alike(first: jax.Array, shape: tuple[int, ...]) -> PartitionSpec:
  """Where `first` lies, along the axes with which it and `shape` begin alike."""
  spec: list[Any] = []
  for own, size, axes in zip(first.shape, shape, jax.typeof(first).sharding.spec, strict=False):
    if own != size:
      break
    spec.append(axes)
  return PartitionSpec(*spec)
