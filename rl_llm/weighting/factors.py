"""Factors that multiply the weights: which tokens count less, more, or not at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  LOG_RATIO_LIMIT,
  Array,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_choice,
  check_mask,
  check_members,
  check_same_shape,
  is_number,
)
from rl_llm.weighting._arrays import (
  check_rows,
  masked_difference,
  masked_quantile,
  to_float,
  token_counts,
)


def truncated_importance(
  old_logprobs, sampler_logprobs, mask, *, level="token", low=0.0, high=2.0, mode="truncate"
) -> Array:
  """Factors that correct for a sampler whose probabilities differ from the trainer's (TIS, IcePop).

  Two programs, or two precisions, give the same token different probabilities. The policy gradient
  is then an average over the wrong distribution. Importance weights correct it, but their variance
  is unbounded, so they are limited:

      w     = exp(old_logprobs - sampler_logprobs)        level "token"
      w     = exp(sum_t mask * log-ratio)                 level "sequence"
      w     = exp(sum_t mask * log-ratio / n)             level "geometric"
      factor = clip(w, low, high)                         mode "truncate": TIS is low 0, high 2
      factor = w if low <= w <= high else 0               mode "mask": IcePop is low 0.5, high 5
      factor = 1 if low <= w <= high else 0               mode "reject": keeps or drops, unweighted

  A token that is three times as likely under the trainer as under the sampler counts twice, or not
  at all:

  >>> old, sampler = jnp.log(jnp.array([[0.6, 0.3]])), jnp.log(jnp.array([[0.2, 0.3]]))
  >>> mask = jnp.array([[True, True]])
  >>> truncated_importance(old, sampler, mask).tolist()
  [[2.0, 1.0]]
  >>> truncated_importance(old, sampler, mask, low=0.5, high=2.0, mode="mask").tolist()
  [[0.0, 1.0]]

  Factors multiply. For example, judge each response as a whole by its geometric mean, whose bounds
  do not depend on its length, and weight its tokens one by one ("seq-mask-tis"):

  >>> whole = truncated_importance(
  ...   old, sampler, mask, level="geometric", mode="reject", low=0.5, high=2.0)
  >>> [round(float(w), 3) for w in (whole * truncated_importance(old, sampler, mask, high=1e6))[0]]
  [3.0, 1.0]

  Conventions: TIS caps at 2 per token in Tunix, verl, SkyRL and slime, where verl's default is the
  level "sequence"; TRL masks sequences with `high` 3; IcePop's limits are 0.5 and 5; rejection by
  geometric mean is 0.999 to 1.001 in verl. Some state bounds on -log w ("k1"), which mirrors them:
  `low` 1 / hi and `high` 1 / lo here.

  Args:
    old_logprobs: [B, T] float, the trainer's log-probs before this batch's updates, in nats; a
      constant.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    level: "token", or "sequence" and "geometric", which give one factor to all tokens of a row.
    low: the lower limit, >= 0.
    high: the upper limit, above `low`.
    mode: what happens outside the limits, as above.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask. Ratios are limited to
    exp(20).

  Raises:
    ValueError: shapes differ, or `level` or `mode` is none of the above.

  Reference: Yao et al., 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training, https://fengyao.notion.site/off-policy-rl; Ling Team, 2025, Every Step Evolves
    (IcePop), https://arxiv.org/abs/2510.18855
  """
  check_choice("level", level, ("token", "sequence", "geometric"))
  check_choice("mode", mode, ("truncate", "mask", "reject"))
  check_between("low", low, 0, float("inf"))
  if is_number(low):
    check_above("high", high, low)
  check_members(mask)
  check_same_shape("old_logprobs", old_logprobs, "mask", mask)
  check_same_shape("sampler_logprobs", sampler_logprobs, "mask", mask)
  log_ratio = masked_difference(old_logprobs, sampler_logprobs, mask)
  if level == "sequence":
    log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
  elif level == "geometric":
    log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(token_counts(mask), 1)
  ratio = jnp.exp(jnp.minimum(log_ratio, LOG_RATIO_LIMIT))
  outside = (ratio < low) | (ratio > high)  # False for a nan, which stays.
  if mode == "truncate":
    factors = jnp.clip(ratio, low, high)
  elif mode == "mask":
    factors = jnp.where(outside, 0, ratio)
  else:
    factors = jnp.where(outside, 0, jnp.where(jnp.isnan(ratio), ratio, 1))
  return jax.lax.stop_gradient(jnp.where(mask, factors, 0))


def drop_truncated(mask, truncated) -> Array:
  """Factors that silence responses cut off at the length limit (DAPO's overlong filter).

  A response that hit the limit was never finished; scoring it as wrong punishes sound reasoning for
  its length.

  >>> drop_truncated(jnp.array([[True, True], [True, True]]), jnp.array([True, False])).tolist()
  [[0.0, 0.0], [1.0, 1.0]]

  Factors leave the dropped tokens in the denominator that the weights were made with. To count as
  if the response had never been sampled, drop it from the mask before making the weights:
  `token_mean(mask & ~truncated[:, None])`.

  Args:
    mask: [B, T] bool, the tokens the policy produced.
    truncated: [B] bool, from the sampler's stop reason.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask.

  Raises:
    ValueError: an argument is not bool, or `truncated` has not one entry per row.

  Reference: Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476
  """
  check_members(mask)
  check_mask("truncated", truncated)
  check_rows("truncated", truncated, mask)
  return (mask & ~jnp.asarray(truncated)[:, None]).astype(jnp.float32)


@any_mesh
def top_entropy(entropies, mask, *, fraction) -> Array:
  """Factors that keep the tokens at which the policy was least sure (the 80/20 rule).

      factor = 1 where entropy >= the (1 - fraction) quantile over all masked tokens, else 0

  Most tokens of a chain of thought follow from the one before. The few forks decide the answer and
  have the highest entropy. The top half of four tokens:

  >>> entropies = jnp.array([[0.1, 2.0, 0.3, 1.0]])
  >>> top_entropy(entropies, jnp.ones((1, 4), bool), fraction=0.5).tolist()
  [[0.0, 1.0, 0.0, 1.0]]

  The quantile is one number for the batch: compute it before the batch is split. Dropped tokens
  stay in the denominator of the weights. Tokens tied with the quantile are all kept.

  Args:
    entropies: [B, T] float, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    fraction: the share of tokens to keep, between 0 and 1.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask. An entropy of nan within it
    makes them all nan: there is no quantile.

  Raises:
    ValueError: shapes differ, or `fraction` is outside [0, 1].

  Reference: Wang et al., 2025, Beyond the 80/20 Rule, https://arxiv.org/abs/2506.01939
  """
  check_between("fraction", fraction, 0, 1)
  check_members(mask)
  check_same_shape("entropies", entropies, "mask", mask)
  if not mask.size:
    return jnp.zeros(mask.shape)
  entropies = jax.lax.stop_gradient(at_least_float32(entropies))
  kept = to_float(entropies >= masked_quantile(entropies, mask, 1 - fraction))
  lost = jnp.any(mask & jnp.isnan(entropies))
  return jnp.where(mask, jnp.where(lost, jnp.nan, kept), 0)
