"""Array types, and the argument checks that public functions begin with.

A check raises `ValueError` with the argument's name, the value seen, what is allowed, and the fix.
It looks only at what is known while tracing (shapes, dtypes, Python numbers), so it costs nothing
at run time, and hyperparameters may be traced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Array = jax.Array
# Name -> (sum, count). Both add up across microbatches and hosts; whoever writes them divides.
Metrics = dict[str, tuple[Array, Array]]
# Log-ratios are limited to +-20 before `exp`. exp(20) = 4.9e8: a larger ratio carries no
# information, squares of its gradient overflow float32, and an infinite ratio times 0 is nan.
LOG_RATIO_LIMIT = 20.0


def at_least_float32(x) -> Array:
  """Converts to float32, or keeps float64: int rewards are not truncated, bf16 sums do not drift.

  >>> at_least_float32([0, 1]).dtype, at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
  (dtype('float32'), dtype('float32'))
  """
  x = jnp.asarray(x)
  return x.astype(wide_dtype(x))


def one_width(*arrays) -> list[Array]:
  """`at_least_float32` of each, in one common dtype: a loop's carry must keep its dtype."""
  arrays = [jnp.asarray(x) for x in arrays]
  return [x.astype(wide_dtype(*arrays)) for x in arrays]


def wide_dtype(*arrays: Array) -> Any:
  """float64 if any of the arrays has it, else float32.

  Compares dtypes instead of promoting them, so that it also works where JAX refuses to promote
  (`jax.numpy_dtype_promotion("strict")`).
  """
  return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32


def check_ndim(name: str, x, ndim: int, axes: str) -> None:
  """Raises unless `x` has `ndim` axes; `axes` is how docstrings write them, such as "[B, T]"."""
  if jnp.ndim(x) != ndim:
    raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {axes}, with {ndim} axes.")


def check_same_shape(name: str, x, like_name: str, like) -> None:
  """Raises unless `x` has the shape of `like`, so that nothing is broadcast by accident."""
  if jnp.shape(x) != jnp.shape(like):
    raise ValueError(
      f"{name} has shape {jnp.shape(x)}; it must have the shape of {like_name}, {jnp.shape(like)}."
    )


def check_float(name: str, x) -> None:
  """Raises unless `x` holds floats."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{name} has dtype {dtype}; it must be a float, such as float32 or bfloat16.")


def check_int(name: str, x) -> None:
  """Raises unless `x` holds integers, such as token ids."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f"{name} has dtype {dtype}; it must be an integer, such as int32.")


def check_mask(name: str, x) -> None:
  """Raises unless `x` is boolean: weights passed as a mask would silently lose their values."""
  dtype = jnp.result_type(x)
  if dtype != jnp.bool_:
    raise ValueError(f"{name} has dtype {dtype}; it must be bool: pass `{name} != 0`.")


def check_members(mask) -> None:
  """Raises unless `mask` is a bool array [B, T]: which tokens belong to a response."""
  check_mask("mask", mask)
  check_ndim("mask", mask, 2, "[B, T]")


def check_choice(name: str, value, allowed: tuple[str, ...]) -> None:
  """Raises unless `value` is one of the strings `allowed`."""
  if value not in allowed:
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def check_above(name: str, value, bound: float) -> None:
  """Raises if `value` is a number that is not above `bound`. JAX arrays pass: a traced
  hyperparameter is one."""
  if is_number(value) and not float(value) > bound:
    raise ValueError(f"{name} is {value}; it must be a number above {bound}.")


def check_between(name: str, value, low: float, high: float) -> None:
  """Raises if `value` is a number outside [low, high]; JAX arrays pass, as in `check_above`."""
  if is_number(value) and not low <= float(value) <= high:
    raise ValueError(f"{name} is {value}; it must be between {low} and {high}, both included.")


def is_number(value) -> bool:
  """Whether `value` is a Python or NumPy number, whose value is known while tracing."""
  return isinstance(value, int | float | np.number)


def any_mesh(f: Callable) -> Callable:
  """Makes `f` accept arrays on any mesh; without Explicit axes, it just calls `f`.

  A result is sharded like the argument with the most axes (the first of several), along the
  leading axes in which their shapes agree:

  >>> import jax.numpy as jnp
  >>> mesh = jax.make_mesh((1,), ("data",))
  >>> x = jax.device_put(jnp.array([[3.0, 1.0]]), NamedSharding(mesh, PartitionSpec("data")))
  >>> [str(jax.typeof(any_mesh(g)(x))) for g in (jnp.sort, jnp.median)]
  ['float32[1@data,2]', 'float32[]']

  Args:
    f: a function of arrays and settings, by position or by name. It must not close over an array.
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
  """The sharding of `first` along the leading axes in which its shape agrees with `shape`."""
  spec: list[Any] = []
  for own, size, axes in zip(first.shape, shape, jax.typeof(first).sharding.spec, strict=False):
    if own != size:
      break
    spec.append(axes)
  return PartitionSpec(*spec)
