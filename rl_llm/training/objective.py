"""The objective of a policy gradient on responses: a surrogate, and the terms around it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_llm import losses, weighting
from rl_llm.checks import LOG_RATIO_LIMIT
from rl_llm.masked import masked_mean
from rl_llm.rollout import ResponseBatch
from rl_llm.runs import keywords
from rl_llm.training.minibatches import logprob_gap


class Terms(NamedTuple):
  """Which terms an objective has, and what is fixed of them; coefficients are data (`hparams`)."""

  loss: Any  # the surrogate: an instance of a `keyword_group` of losses
  kl: Mapping[str, str] | None = None  # keywords of `kl_loss`; None, or no reference: no such term
  llds: Mapping[str, str] | None = None  # keywords of `llds_loss`; None: no such term
  positive_nll: bool = False  # whether right answers have a likelihood term
  off_policy: float | None = None  # threshold of `off_policy_mask`; None: all responses count
  moved: bool = False  # whether to measure "kl_old", how far the policy is from the old one


def policy_terms(
  terms: Terms,
  hparams: Mapping[str, Any],
  logprobs: jax.Array,
  entropies: jax.Array,
  batch: ResponseBatch,
) -> tuple[jax.Array, dict[str, tuple]]:
  """The sum of an objective's terms on one microbatch, and their metrics.

      loss = surrogate + kl_coef * KL - entropy_coef * entropy
             + llds_coef * LLDS + nll_coef * positive NLL

  The factors of `batch.factors` and of `off_policy` multiply the surrogate's weights alone, so a
  token that they silence still feels the other terms.

  Args:
    terms: which there are.
    hparams: {"loss": the surrogate's keywords, "entropy_coef", and "kl_coef", "llds_coef" and
      "nll_coef" where there are such terms}.
    logprobs: [B, T] float, of the policy being trained.
    entropies: [B, T] float, of the same distributions.
    batch: the rows, with their weights. Without `old_logprobs`, the policy is still the old one.

  Returns:
    The scalar loss, and the metrics as (sum, count).
  """
  # With one update a batch the old policy is the current one: no second forward pass.
  one_update = batch.old_logprobs is None
  old_logprobs = jax.lax.stop_gradient(logprobs) if one_update else batch.old_logprobs
  weights, found = _surrogate_weights(terms, logprobs, batch)
  loss, of_loss = keywords.call(
    terms.loss,
    keywords=hparams["loss"],
    logprobs=logprobs,
    old_logprobs=old_logprobs,
    advantages=batch.advantages,
    selected=batch.selected,
    weights=weights,
    mask=batch.mask,
  )
  found |= of_loss
  if terms.kl is not None and batch.ref_logprobs is not None:
    weights = batch.weights if batch.kl_weights is None else batch.kl_weights
    penalty, of_kl = losses.kl_loss(logprobs, batch.ref_logprobs, weights, **terms.kl)
    loss = loss + hparams["kl_coef"] * penalty
    found |= {"kl_ref": of_kl["kl"]}
  bonus, of_entropy = losses.entropy_loss(entropies, batch.weights)
  loss = loss + hparams["entropy_coef"] * bonus
  found |= of_entropy | logprob_gap(logprobs, batch)
  if terms.llds is not None:
    arrays = logprobs, old_logprobs, batch.advantages, batch.llds_weights
    lost, of_llds = losses.llds_loss(*arrays, mask=batch.mask, **terms.llds)
    loss = loss + hparams["llds_coef"] * lost
    found |= of_llds
  if terms.positive_nll:
    nll, of_nll = losses.positive_nll_loss(logprobs, batch.correct, batch.nll_weights)
    loss = loss + hparams["nll_coef"] * nll
    found |= of_nll
  if terms.moved:
    found |= {"kl_old": _moved(logprobs, old_logprobs, batch.mask)}
  return loss, found


def _surrogate_weights(
  terms: Terms, logprobs: jax.Array, batch: ResponseBatch
) -> tuple[jax.Array, dict[str, tuple]]:
  """The weights of the surrogate, and how much of its tokens the factors leave."""
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
