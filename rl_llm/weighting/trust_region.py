"""Factors that drop what has moved too far from the policy that sampled it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm import kl
from rl_llm.checks import (
  LOG_RATIO_LIMIT,
  Array,
  any_mesh,
  check_above,
  check_choice,
  check_members,
  check_same_shape,
)
from rl_llm.weighting._arrays import check_rows, masked_difference, token_counts


def off_policy_mask(logprobs, sampler_logprobs, advantages, mask, *, threshold) -> Array:
  """Factors that drop bad responses the policy has already moved away from (DeepSeek-V3.2).

      factor = 0 where advantage < 0 and mean_t(sampler_logprobs - logprobs) > threshold, else 1

  The mean estimates KL(sampler || policy) on that response. A wrong answer that the policy would
  hardly give any more teaches little, and pushing it down further moves its probability to
  arbitrary places. A good answer is kept, however old. Both rows have fallen from 0.5 to 0.1, by
  log 5 = 1.61, which is above the limit, but only the first one was bad:

  >>> sampler, now = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.1], [0.1]]))
  >>> advantages, mask = jnp.array([-1.0, 1.0]), jnp.ones((2, 1), bool)
  >>> off_policy_mask(now, sampler, advantages, mask, threshold=1.0).tolist()
  [[0.0], [1.0]]

  Args:
    logprobs: [B, T] float, of the policy being trained, in nats; a constant here.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    advantages: [B] float; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    threshold: the mean log-ratio in nats above which a bad response is dropped.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask.

  Raises:
    ValueError: shapes differ.

  Reference: DeepSeek-AI, 2025, DeepSeek-V3.2, https://arxiv.org/abs/2512.02556
  """
  check_members(mask)
  check_same_shape("logprobs", logprobs, "mask", mask)
  check_same_shape("sampler_logprobs", sampler_logprobs, "mask", mask)
  check_rows("advantages", advantages, mask)
  moved = jnp.sum(masked_difference(sampler_logprobs, logprobs, mask), axis=1, keepdims=True)
  moved = moved / jnp.maximum(token_counts(mask), 1)
  dropped = (jnp.asarray(advantages)[:, None] < 0) & (moved > threshold)
  return jax.lax.stop_gradient((mask & ~dropped).astype(jnp.float32))


def trust_region_mask(
  logprobs, sampler_logprobs, mask, *, threshold, estimator="k3", statistic="max"
) -> Array:
  """Factors that drop each response in which one token has moved too far (Trust Region Masking).

      log_ratio = logprobs - sampler_logprobs
      moved     = exp(log_ratio) - 1 - log_ratio         estimator "k3"; "k2": log_ratio^2 / 2
      factor    = 0 where max_t moved > threshold, else 1, for all tokens of the row

  PPO's clip silences the one token and trains on the rest. But everything after that token was
  written in a context that the policy would hardly reach any more, so the bound on how wrong the
  surrogate can be depends on a response's *worst* token. One of the first row's tokens rose from
  0.1 to 0.5, which is 5 - 1 - log 5 = 2.39 nats; the second row moved by 0.05 nats at most:

  >>> sampler = jnp.log(jnp.array([[0.9, 0.1, 0.8], [0.5, 0.5, 0.5]]))
  >>> now = jnp.log(jnp.array([[0.9, 0.5, 0.8], [0.4, 0.6, 0.65]]))
  >>> trust_region_mask(now, sampler, jnp.ones((2, 3), bool), threshold=0.5).tolist()
  [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]

  The exact divergence needs all probabilities of the vocabulary. The estimates here need only that
  of the sampled token; both are 0 only where it has not moved.

  Args:
    logprobs: [B, T] float, of the policy being trained, or of the trainer before this batch's
      updates, in nats; a constant here.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    threshold: the divergence in nats above which a response is dropped, > 0.
    estimator: "k3" or "k2", as above.
    statistic: "max", the worst token, or "mean", over the tokens of the response.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask. Log-ratios are limited to
    +-20. A log-prob of nan within the mask makes its row nan.

  Raises:
    ValueError: shapes differ, a name is unknown, or `threshold` is not above 0.

  Reference: Li et al., 2025, Trust Region Masking for Long-Horizon LLM Reinforcement Learning,
    https://arxiv.org/abs/2512.23075
  """
  check_above("threshold", threshold, 0)
  check_choice("estimator", estimator, ("k3", "k2"))
  check_choice("statistic", statistic, ("max", "mean"))
  log_ratio = _log_ratio(logprobs, sampler_logprobs, mask)
  divergence = kl.k3 if estimator == "k3" else kl.k2
  moved = divergence(jnp.zeros_like(log_ratio), log_ratio)
  if statistic == "max":
    worst = jnp.max(moved, axis=1, keepdims=True, initial=0)
  else:
    worst = jnp.sum(moved, axis=1, keepdims=True) / jnp.maximum(token_counts(mask), 1)
  kept = jnp.where(jnp.isnan(worst), worst, (worst <= threshold).astype(jnp.float32))
  return jax.lax.stop_gradient(jnp.where(mask, kept, 0))


@any_mesh
def second_moment_mask(logprobs, sampler_logprobs, mask, *, threshold=0.04) -> Array:
  """Factors that drop the tokens that moved furthest, until the rest is near enough (M2PO).

      moved  = (logprobs - sampler_logprobs)^2
      factor = 0 for the tokens that moved most, as few as make the mean of the others <= threshold

  A mean log-ratio cannot say how far a stale batch is from the policy: rises and falls cancel. Its
  second moment can. PPO's clip has the same bounds for each token of each batch and silences many,
  most of them rare and informative; here a batch that is near enough loses none, and a stale one
  only its outliers. Of the log-ratios 0.1, -0.2, 0.1 and 1, the squares have the mean 0.265.
  Without the last it is 0.02:

  >>> log_ratio = jnp.array([[0.1, -0.2, 0.1, 1.0]])
  >>> second_moment_mask(log_ratio, jnp.zeros((1, 4)), jnp.ones((1, 4), bool)).tolist()
  [[1.0, 1.0, 1.0, 0.0]]

  The mean is that of the batch: compute the factors before it is split. Tokens that tie are kept or
  dropped together. The paper's objective has no clip besides; one implementation adds PPO's.

  Args:
    logprobs: [B, T] float, of the policy being trained, or of the trainer before this batch's
      updates (AReaL), in nats; a constant here.
    sampler_logprobs: [B, T] float, of the policy that sampled them, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    threshold: the largest mean of squared log-ratios, in nats squared, > 0.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask, and everywhere if not even
    the token that moved least is near enough. Log-ratios are limited to +-20. A log-prob of nan
    within the mask makes that token's factor nan.

  Raises:
    ValueError: shapes differ, or `threshold` is not above 0.

  Reference: Zheng et al., 2025, Prosperity before Collapse, https://arxiv.org/abs/2510.01161
  """
  check_above("threshold", threshold, 0)
  moved = jnp.square(_log_ratio(logprobs, sampler_logprobs, mask))
  most = float("inf")
  ordered = jnp.sort(jnp.where(mask, moved, most), axis=None)  # a nan comes last of all
  means = jnp.cumsum(ordered) / jnp.arange(1, ordered.size + 1, dtype=ordered.dtype)
  first_dropped = jnp.append(ordered, most)[jnp.sum(means <= threshold)]
  kept = jnp.where(jnp.isnan(moved), moved, (moved < first_dropped).astype(jnp.float32))
  return jax.lax.stop_gradient(jnp.where(mask, kept, 0))


def _log_ratio(logprobs, sampler_logprobs, mask):
  """logprobs - sampler_logprobs, limited to +-20, and 0 outside the mask."""
  check_members(mask)
  check_same_shape("logprobs", logprobs, "mask", mask)
  check_same_shape("sampler_logprobs", sampler_logprobs, "mask", mask)
  log_ratio = masked_difference(logprobs, sampler_logprobs, mask)
  return jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
