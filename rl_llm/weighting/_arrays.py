"""What weights and factors have in common."""

from __future__ import annotations

import jax.numpy as jnp


def check_rows(name, x, mask):
  if jnp.shape(x) != jnp.shape(mask)[:1]:
    raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be [B] = {jnp.shape(mask)[:1]}.")


def to_float(x):
  return jnp.asarray(x, jnp.float32)


def token_counts(mask):
  return to_float(jnp.sum(mask, axis=1, keepdims=True))


def masked_quantile(x, mask, q):
  """The q quantile of the masked-in values of x, interpolated as `jnp.quantile` does.

  All other values are sorted to the end. Setting them to nan for `jnp.nanquantile` to skip would
  trip `jax_debug_nans`, and a nan among the masked-in values would be skipped too.
  """
  ordered = jnp.sort(jnp.where(mask, x, jnp.finfo(x.dtype).max), axis=None)
  last = jnp.maximum(jnp.sum(mask) - 1, 0)
  place = jnp.asarray(q, ordered.dtype) * last.astype(ordered.dtype)
  low, high = jnp.floor(place), jnp.ceil(place)
  low_value, high_value = (ordered[jnp.minimum(i.astype(int), last)] for i in (low, high))
  share = place - low
  return low_value * (1 - share) + high_value * share


def masked_difference(a, b, mask):
  """a - b in float32, 0 outside the mask, where either may be infinite."""
  difference = to_float(a) - to_float(b)
  return jnp.where(mask, difference, 0)
