"""What an array must look like: names of array types, and the checks public functions begin with.

A check raises `ValueError` with the argument's name, the value seen, what is allowed, and the fix.
Only what is known while tracing (shapes, dtypes, Python numbers) is checked, so a check costs
nothing at run time and hyperparameters may be traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
# Name -> (sum, count). Both add across microbatches and hosts; dividing is the writer's business.
Metrics = dict[str, tuple[Array, Array]]


def at_least_float32(x) -> Array:
  """Converts to float32, or keeps float64: int rewards are not truncated, bf16 sums do not drift.

  >>> at_least_float32([0, 1]).dtype, at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
  (dtype('float32'), dtype('float32'))
  """
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_ndim(name: str, x, ndim: int, axes: str) -> None:
  """Raises unless `x` has `ndim` axes; `axes` is how docstrings write them, such as "[B, T]"."""
  if jnp.ndim(x) != ndim:
    raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be {axes}, with {ndim} axes.")


def check_same_shape(name: str, x, like_name: str, like) -> None:
  """Raises unless `x` has the shape of `like`: nothing is broadcast by accident."""
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
  """Raises if `value` is a Python number that is not above `bound`; arrays and tracers pass."""
  if isinstance(value, int | float) and not value > bound:
    raise ValueError(f"{name} is {value}; it must be a number above {bound}.")


def check_between(name: str, value, low: float, high: float) -> None:
  """Raises if `value` is a Python number outside [low, high]; arrays and tracers pass."""
  if isinstance(value, int | float) and not low <= value <= high:
    raise ValueError(f"{name} is {value}; it must be between {low} and {high}, both included.")
