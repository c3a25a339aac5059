"""The first steps of every loss over tokens: check, widen, select, and cut constants' gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  LOG_RATIO_LIMIT,
  Array,
  at_least_float32,
  check_float,
  check_mask,
  check_ndim,
  check_same_shape,
)


def tokens(name, x, weights, mask=None) -> tuple[Array, Array, Array]:
  """Prepares the trained [B, T] argument `x`, the weights, and the mask of members.

  Positions outside the mask become 0 here, before any `exp` or product: masking later would leave
  the gradient 0 * inf = nan.

  Returns:
    `x` at least float32 and 0 outside the mask; weights likewise, without gradient; the mask.
  """
  return _members(name, x, 2, "[B, T]", weights, mask)


def rows(name, x, weights) -> tuple[Array, Array, Array]:
  """Prepares the trained [B] argument `x` and its weights as `tokens` does; members have weight."""
  return _members(name, x, 1, "[B]", weights, None)


def _members(name, x, ndim, axes, weights, mask):
  check_ndim(name, x, ndim, axes)
  check_float(name, x)
  check_same_shape("weights", weights, name, x)
  check_float("weights", weights)
  weights = jax.lax.stop_gradient(at_least_float32(weights))
  if mask is None:
    mask = weights != 0
  else:
    check_mask("mask", mask)
    check_same_shape("mask", mask, name, x)
  return jnp.where(mask, at_least_float32(x), 0), jnp.where(mask, weights, 0), jnp.asarray(mask)


def trained(name, x, like_name, like, mask) -> Array:
  """A second trained argument, of the shape of `like`, 0 outside the mask."""
  check_same_shape(name, x, like_name, like)
  check_float(name, x)
  return jnp.where(mask, at_least_float32(x), 0)


def constant(name, x, like_name, like, mask) -> Array:
  """A constant of the shape of `like`: no gradient, and 0 outside the mask."""
  return jax.lax.stop_gradient(trained(name, x, like_name, like, mask))


def per_token(name, x, mask) -> Array:
  """A constant per sequence [B] or per token [B, T], made [B, T] and 0 outside the mask."""
  shape = mask.shape
  if jnp.shape(x) not in (shape, shape[:1]):
    raise ValueError(
      f"{name} has shape {jnp.shape(x)}; it must be [B] = {shape[:1]} or [B, T] = {shape}."
    )
  x = jax.lax.stop_gradient(at_least_float32(x))
  x = x[:, None] if x.ndim == 1 else x
  return jnp.where(mask, x, 0)


def per_row(name, x, mask) -> Array:
  """A constant for the whole batch [] or one per row [B], made [B] and 0 outside the mask.

  A Python number gets no dtype of its own, since that would make a loss float64 under x64.
  """
  if jnp.shape(x) not in ((), mask.shape):
    raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be [] or [B] = {mask.shape}.")
  check_float(name, x)
  x = x if isinstance(x, int | float) else jax.lax.stop_gradient(at_least_float32(x))
  return jnp.where(mask, x, 0)


def policy_gradient(logprobs, old_logprobs, advantages, weights, mask):
  """Prepares the arguments of a policy-gradient surrogate.

  Returns:
    The trained log-probs, their log-ratio, and the constants, all 0 outside the mask; and the mask.
  """
  like = logprobs
  logprobs, weights, mask = tokens("logprobs", logprobs, weights, mask)
  old_logprobs = constant("old_logprobs", old_logprobs, "logprobs", like, mask)
  advantages = per_token("advantages", advantages, mask)
  return logprobs, logprobs - old_logprobs, advantages, weights, mask


def larger(first, second):
  """The larger of two arrays. Where both are equal the gradient is the first's.

  `jnp.maximum` takes half of each, and `jnp.clip` half of its slope at the ends of its range: there
  three quarters of a clipped loss's slope would be left.
  """
  return jnp.where(first >= second, first, second)


def ratio_of(log_ratio) -> Array:
  """exp(log_ratio), with the log-ratio limited to +-20 so that value and gradient stay finite."""
  return jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def approx_kl(ratio, mask) -> tuple[Array, Array]:
  """(sum, count) of the k3 estimate of KL(old || policy)."""
  return metric(ratio - 1 - jnp.log(ratio), mask)


def metric(x, mask) -> tuple[Array, Array]:
  """(sum, count) of `x` over the members, without gradient."""
  x = jax.lax.stop_gradient(jnp.where(mask, at_least_float32(x), 0))
  return jnp.sum(x), jnp.sum(mask).astype(jnp.float32)
