"""Sums, means and variances in which masked items behave as if they were absent.

Responses are ragged, arrays are not. A plain mean over a padded array counts the padding, and
multiplying by the mask does not help, since 0 * inf is nan. Here masked values are replaced
*before* anything is computed, so neither they nor their gradients can leak, and an empty selection
gives 0. A nan at an unmasked position stays a nan, so real faults are not hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, at_least_float32, check_above, check_mask, check_same_shape


def masked_sum(x, mask, axis=None) -> Array:
  """Sum of the items whose mask is True.

  >>> float(masked_sum(jnp.array([1.0, 2.0, jnp.inf]), jnp.array([True, True, False])))
  3.0

  Args:
    x: any shape, numbers.
    mask: the shape of `x`, bool.
    axis: the axis or axes to sum over; None is all of them.

  Returns:
    The sum, at least float32; 0 where nothing is selected.

  Raises:
    ValueError: `mask` is not bool, or has another shape than `x`.
  """
  check_mask("mask", mask)
  check_same_shape("mask", mask, "x", x)
  return jnp.sum(jnp.where(mask, at_least_float32(x), 0), axis=axis)


def masked_mean(x, mask, axis=None) -> Array:
  """Mean of the items whose mask is True: `sum(x * mask) / sum(mask)`.

  This gives (1 + 2) / 2, where a plain mean of the padded row would give (1 + 2 + 0) / 3 = 1:

  >>> float(masked_mean(jnp.array([1.0, 2.0, 0.0]), jnp.array([True, True, False])))
  1.5

  Args:
    x: any shape, numbers.
    mask: the shape of `x`, bool.
    axis: the axis or axes to average over; None is all of them.

  Returns:
    The mean, at least float32; 0 where nothing is selected.

  Raises:
    ValueError: `mask` is not bool, or has another shape than `x`.
  """
  total = masked_sum(x, mask, axis)
  return total / jnp.maximum(jnp.sum(mask, axis=axis), 1).astype(total.dtype)


def masked_var(x, mask, axis=None, *, ddof=0) -> Array:
  """Variance of the items whose mask is True, in two passes.

      var = sum(mask * (x - mean)^2) / (sum(mask) - ddof)

  The one-pass form mean(x^2) - mean(x)^2 cancels: for rewards near 10,000 that differ by 1 it keeps
  no digit in float32, and two passes keep them all. Values 1 and 3 lie 1 from their mean 2:

  >>> x, mask = jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])
  >>> float(masked_var(x, mask)), float(masked_var(x, mask, ddof=1))
  (1.0, 2.0)

  Args:
    x: any shape, numbers.
    mask: the shape of `x`, bool.
    axis: the axis or axes to reduce; None is all of them.
    ddof: 0 divides by the count n, 1 by n - 1 (unbiased).

  Returns:
    The variance, at least float32; 0 where at most `ddof` items are selected.

  Raises:
    ValueError: `mask` is not bool, or has another shape than `x`.
  """
  mean = jnp.expand_dims(masked_mean(x, mask, axis), _axes(x, axis))
  squares = masked_sum(jnp.square(jnp.where(mask, at_least_float32(x) - mean, 0)), mask, axis)
  divisor = jnp.sum(mask, axis=axis) - ddof
  return jnp.where(divisor > 0, squares / jnp.maximum(divisor, 1).astype(squares.dtype), 0)


def whiten(x, mask, *, ddof=1, eps=1e-8, shift_mean=True) -> Array:
  """Shifts and scales the selected items to mean 0 and variance 1.

      whitened = (x - mean) / sqrt(var + eps)

  Advantages of any scale then give updates of the same size. Mean and variance are those of the
  whole batch, so whiten before splitting it into microbatches. Values 1 and 3 lie one standard
  deviation (ddof 0) from their mean 2:

  >>> x, mask = jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False])
  >>> [round(float(v), 3) for v in whiten(x, mask, ddof=0)]
  [-1.0, 1.0, 0.0]

  A single item has no spread, and becomes 0 rather than nan:

  >>> float(whiten(jnp.array([5.0]), jnp.array([True]))[0])
  0.0

  Args:
    x: any shape, numbers.
    mask: the shape of `x`, bool.
    ddof: of the variance, see `masked_var`.
    eps: added to the variance, > 0.
    shift_mean: False keeps the mean and only scales the spread around it.

  Returns:
    The shape of `x`, at least float32; 0 at masked positions.

  Raises:
    ValueError: `mask` is not bool, or has another shape than `x`, or `eps` is not above 0.
  """
  check_above("eps", eps, 0)
  mean = masked_mean(x, mask)
  centred = jnp.where(mask, at_least_float32(x) - mean, 0)
  whitened = centred * jax.lax.rsqrt(masked_var(x, mask, ddof=ddof) + eps)
  return whitened if shift_mean else jnp.where(mask, whitened + mean, 0)


def _axes(x, axis):
  """The axes that `axis` means, for putting them back after a reduction."""
  return tuple(range(jnp.ndim(x))) if axis is None else axis
