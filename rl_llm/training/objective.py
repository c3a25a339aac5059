"""The objective of a policy gradient on responses: what may surround its surrogate.

    loss = surrogate + kl_coef * KL - entropy_coef * entropy + llds_coef * LLDS + nll_coef * NLL

The scripts write out the first three; here are the weights of the first, and the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_llm import losses, weighting
from rl_llm.checks import LOG_RATIO_LIMIT
from rl_llm.logprobs import sequence_logprobs
from rl_llm.masked import masked_mean
from rl_llm.rollout import ResponseBatch
from rl_llm.training.minibatches import logprob_gap


class Terms(NamedTuple):
  """Which terms an objective has, and what is fixed of them; coefficients are data (`hparams`)."""

  kl: Mapping[str, str] | None = None  # keywords of `kl_loss`; None, or no reference: no such term
  llds: Mapping[str, str] | None = None  # keywords of `llds_loss`; None: no such term
  positive_nll: bool = False  # whether right answers have a likelihood term
  off_policy: float | None = None  # threshold of `off_policy_mask`; None: all responses count
  moved: bool = False  # whether to measure "kl_old", how far the policy is from the old one


def further_terms(
  terms: Terms,
  hparams: Mapping[str, Any],
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  batch: ResponseBatch,
) -> tuple[jax.Array | float, dict[str, tuple]]:
  """The terms of an objective besides its surrogate, KL and entropy, on one microbatch.

      llds_coef * LLDS + nll_coef * positive NLL

  Args:
    terms: which there are.
    hparams: {"llds_coef" and "nll_coef" where there are such terms}.
    logprobs: [B, T] float, of the policy being trained.
    old_logprobs: [B, T] float, of the policy before this step's updates.
    batch: the rows, with the weights of these terms.

  Returns:
    The sum of the terms, 0.0 without any, and the metrics as (sum, count).
  """
  total, found = 0.0, logprob_gap(logprobs, batch)
  if terms.llds is not None:
    arrays = logprobs, old_logprobs, batch.advantages, batch.llds_weights
    actions = {"mask": batch.mask, "action_ids": batch.turns}
    lost, of_llds = losses.llds_loss(*arrays, **actions, **terms.llds)
    total = total + hparams["llds_coef"] * lost
    found |= of_llds
  if terms.positive_nll:
    nll, of_nll = losses.positive_nll_loss(logprobs, batch.correct, batch.nll_weights)
    total = total + hparams["nll_coef"] * nll
    found |= of_nll
  if terms.moved:
    found |= {"kl_old": _moved(logprobs, old_logprobs, batch.mask)}
  return total, found


def surrogate_weights(
  terms: Terms, logprobs: jax.Array, batch: ResponseBatch
) -> tuple[jax.Array, dict[str, tuple]]:
  """The weights of the surrogate alone, and how much of its tokens the factors leave.

  The factors of `batch.factors` and of `off_policy` do not multiply the other terms' weights, so a
  token that they silence still feels those.

  Args:
    terms: of which `off_policy` counts here.
    logprobs: [B, T] float, of the policy being trained.
    batch: the rows, with their weights.

  Returns:
    [B, T] weights, and metrics as (sum, count).
  """
  weights, found, count = batch.weights, {}, jnp.sum(batch.mask)
  if batch.factors is not None:
    weights = weights * batch.factors
    found["factor_mean"] = jnp.sum(jnp.where(batch.mask, batch.factors, 0)), count
  if terms.off_policy is not None:
    advantages = batch.advantages
    if advantages.ndim == 2:  # A response is bad if its tokens are on average.
      advantages = masked_mean(advantages, batch.mask, axis=1)
    kept = weighting.off_policy_mask(
      jax.lax.stop_gradient(logprobs),
      batch.sampler_logprobs,
      advantages,
      batch.mask,
      threshold=terms.off_policy,
    )
    weights = weights * kept
    found["off_policy_fraction"] = count - jnp.sum(kept), count
  return weights, found


def group_loss(
  loss: Callable,
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  batch: ResponseBatch,
  weights: jax.Array,
  **numbers: Any,
) -> tuple[jax.Array, dict[str, tuple]]:
  """A loss on whole responses to each problem, such as `rl_llm.losses.tpo_loss`, of a microbatch.

  Args:
    loss: (logprobs, old_logprobs, advantages, weights, *, mask, ...), all [P, G]; log-probs are
      sums over a response.
    logprobs: [B, T] float, of the policy being trained.
    old_logprobs: [B, T] float, of the policy before this step's updates.
    batch: the rows, with advantages [B].
    weights: [B, T] of the tokens. A response counts the sum of its tokens' times G, so that under
      `sequence_mean` it is 1 / P.
    **numbers: keywords of the loss.
  """
  shape = (len(batch.prompts), -1)
  sums = (sequence_logprobs(x, batch.mask).reshape(shape) for x in (logprobs, old_logprobs))
  per_response = jnp.sum(weights, axis=1).reshape(shape)
  count = per_response.shape[1]
  members = jnp.any(batch.mask, axis=1).reshape(shape)
  rows = *sums, batch.advantages.reshape(shape), count * per_response
  return loss(*rows, mask=members, **numbers)


def _moved(logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array) -> tuple:
  """KL(old policy || policy) per token by k3: the samples are the old policy's."""
  log_ratio = jnp.clip(
    jnp.where(mask, logprobs - old_logprobs, 0), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
  )
  return jnp.sum(jnp.exp(log_ratio) - 1 - log_ratio), jnp.sum(mask)


@functools.partial(jax.jit, static_argnames=("loss", "fraction", "low", "high"))
def select_tokens(
  batch: ResponseBatch,
  key: jax.Array,
  *,
  loss: str,
  fraction: float | None = None,
  low: float | None = None,
  high: float | None = None,
) -> jax.Array:
  """[B, T] bool: the tokens that `clip_cov_loss` or `kl_cov_loss` holds back, of a whole step.

  Their covariance is that of the log-probs before the step's updates, over all responses of the
  step, so neither minibatches nor microbatches change what is selected.

  Args:
    batch: all responses of a step, with old log-probs and advantages.
    key: for the draw of `clip_cov_mask`.
    loss: "clip_cov_loss" or "kl_cov_loss".
    fraction, low, high: keywords of `clip_cov_mask` or `kl_cov_mask`; None: their defaults.
  """
  covariance = losses.token_covariance(batch.old_logprobs, batch.advantages, batch.mask)
  given = {"fraction": fraction, "low": low, "high": high}
  given = {name: value for name, value in given.items() if value is not None}
  if loss == "clip_cov_loss":
    return losses.clip_cov_mask(key, covariance, batch.mask, **given)
  return losses.kl_cov_mask(covariance, batch.mask, **given)
