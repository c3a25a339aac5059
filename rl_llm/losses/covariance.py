"""Preserves entropy where it falls fastest: the few tokens that are both likely and rewarded.

Over one step of policy gradient, entropy changes by about minus the covariance of a token's
log-prob and its advantage. A handful of tokens carry nearly all of that covariance. Holding back
those few keeps the policy exploring, whereas an entropy bonus would push on every token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  Array,
  Metrics,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_mask,
  check_members,
  check_same_shape,
  is_number,
)
from rl_llm.losses import _checks
from rl_llm.losses.policy_gradient import ppo_loss
from rl_llm.masked import masked_mean


def token_covariance(logprobs, advantages, mask) -> Array:
  """Each token's share of the covariance of log-prob and advantage.

      covariance = (logprobs - mean of logprobs) * (advantages - mean of advantages)

  The means are over all tokens of the batch: compute this before it is split. Two tokens with
  log-probs -1 and -3, and advantages 1 and -1, each lie 1 from both means:

  >>> logprobs, advantages = jnp.array([[-1.0, -3.0]]), jnp.array([[1.0, -1.0]])
  >>> token_covariance(logprobs, advantages, jnp.ones((1, 2), bool)).tolist()
  [[1.0, 1.0]]

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens, in nats; a constant here.
    advantages: [B] or [B, T]; a constant.
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.

  Returns:
    [B, T], at least float32, without gradient; 0 outside the mask.

  Raises:
    ValueError: shapes differ, or `mask` is not bool.

  Needs: samples, advantages, old policy.

  Reference: Cui et al., 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning
    Language Models, https://arxiv.org/abs/2505.22617
  """
  check_members(mask)
  mask = jnp.asarray(mask)
  check_same_shape("logprobs", logprobs, "mask", mask)
  logprobs = jax.lax.stop_gradient(at_least_float32(logprobs))
  advantages = _checks.per_token("advantages", advantages, mask)
  away = lambda x: jnp.where(mask, x - masked_mean(x, mask), 0)  # noqa: E731
  return away(logprobs) * away(advantages)


@any_mesh
def clip_cov_mask(
  key, covariance, mask, *, fraction=2e-4, low=1.0, high=5.0, clipped=None, at_least=0
) -> Array:
  """Clip-Cov's selection: a few tokens of high covariance, drawn at random.

      candidates = tokens with low <= covariance <= high that PPO has not clipped
      selected   = floor(fraction * number of tokens in the mask) of them

  Half of four tokens are two, drawn from the three within [1, 5]:

  >>> covariance, mask = jnp.array([[0.5, 2.0, 3.0, 4.0]]), jnp.ones((1, 4), bool)
  >>> selected = clip_cov_mask(jax.random.key(0), covariance, mask, fraction=0.5)
  >>> int(selected.sum()), bool(selected[0, 0])
  (2, False)

  Args:
    key: a PRNG key; it is consumed.
    covariance: [B, T] float, from `token_covariance`.
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    fraction: of the tokens, between 0 and 1.
    low: the least covariance.
    high: the greatest, at least `low`.
    clipped: None, or [B, T] bool, tokens that PPO's clip already leaves without gradient, see
      `ppo_clipped`; none are before the first update.
    at_least: how many to select even if there are few tokens; verl selects at least 1.

  Returns:
    [B, T] bool; fewer are selected only if there are fewer candidates.

  Raises:
    ValueError: shapes differ, a mask is not bool, or a number is out of range.

  Needs: samples, advantages, old policy.

  Reference: Cui et al., 2025, https://arxiv.org/abs/2505.22617
  """
  check_between("fraction", fraction, 0, 1)
  if is_number(low):
    check_between("high", high, low, float("inf"))
  check_members(mask)
  mask = jnp.asarray(mask)
  check_same_shape("covariance", covariance, "mask", mask)
  candidates = mask & (covariance >= low) & (covariance <= high)
  if clipped is not None:
    check_mask("clipped", clipped)
    check_same_shape("clipped", clipped, "mask", mask)
    candidates = candidates & ~jnp.asarray(clipped)
  return _largest(jax.random.uniform(key, mask.shape), candidates, _share(fraction, mask, at_least))


@any_mesh
def kl_cov_mask(covariance, mask, *, fraction=2e-3, at_least=0) -> Array:
  """KL-Cov's selection: the tokens of the highest covariance.

      selected = the floor(fraction * number of tokens in the mask) largest

  Half of four tokens:

  >>> covariance, mask = jnp.array([[0.5, 2.0, -3.0, 4.0]]), jnp.ones((1, 4), bool)
  >>> kl_cov_mask(covariance, mask, fraction=0.5).tolist()
  [[False, True, False, True]]

  Args:
    covariance: [B, T] float, from `token_covariance`.
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    fraction: of the tokens, between 0 and 1. The paper has 2e-3 for a model of 7B and 2e-4 for
      32B; verl has 2e-4.
    at_least: how many to select even if there are few tokens; verl selects at least 1.

  Returns:
    [B, T] bool; of equal covariances the first in the batch.

  Raises:
    ValueError: shapes differ, `mask` is not bool, or `fraction` is outside [0, 1].

  Needs: samples, advantages, old policy.

  Reference: Cui et al., 2025, https://arxiv.org/abs/2505.22617
  """
  check_between("fraction", fraction, 0, 1)
  check_members(mask)
  mask = jnp.asarray(mask)
  check_same_shape("covariance", covariance, "mask", mask)
  return _largest(at_least_float32(covariance), mask, _share(fraction, mask, at_least))


def ppo_clipped(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2) -> Array:
  """The tokens that PPO's clip leaves without gradient: they were already pushed far enough.

      clipped = ratio > 1 + clip_high where A > 0, ratio < 1 - clip_low where A < 0

  >>> now, old = jnp.log(jnp.array([[0.3, 0.3]])), jnp.log(jnp.array([[0.5, 0.5]]))
  >>> ppo_clipped(now, old, jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool)).tolist()
  [[False, True]]

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats;
      a constant here.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    clip_low: as in `ppo_loss`.
    clip_high: as in `ppo_loss`.

  Returns:
    [B, T] bool.

  Raises:
    ValueError: shapes differ, a dtype does not fit, or a limit is not above 0.

  Needs: samples, advantages, old policy.

  Reference: Schulman et al., 2017, https://arxiv.org/abs/1707.06347
  """
  check_above("clip_low", clip_low, 0)
  check_above("clip_high", clip_high, 0)
  check_members(mask)
  mask = jnp.asarray(mask)
  logprobs = _checks.constant("logprobs", logprobs, "mask", mask, mask)
  old_logprobs = _checks.constant("old_logprobs", old_logprobs, "mask", mask, mask)
  advantages = _checks.per_token("advantages", advantages, mask)
  ratio = _checks.ratio_of(logprobs - old_logprobs)
  far_up, far_down = ratio > 1 + clip_high, ratio < 1 - clip_low
  return mask & jnp.where(advantages > 0, far_up, (advantages < 0) & far_down)


def clip_cov_loss(
  logprobs, old_logprobs, advantages, selected, weights, *, mask=None, clip_low=0.2, clip_high=0.2
) -> tuple[Array, Metrics]:
  """Clip-Cov: PPO without a gradient from the selected tokens.

      clipped   = clip(ratio, 1 - clip_low, 1 + clip_high)
      per_token = 0 if selected else max(-ratio * A, -clipped * A)
      loss      = sum(weights * per_token)

  Selected tokens still count in the denominator of the weights. Two tokens of weight 1/2, one of
  them selected:

  >>> logprobs = jnp.log(jnp.array([[0.5, 0.9]]))
  >>> gradient, _ = jax.grad(clip_cov_loss, has_aux=True)(
  ...   logprobs, logprobs, jnp.ones(1), jnp.array([[False, True]]), jnp.full((1, 2), 0.5))
  >>> [round(float(g), 1) + 0 for g in gradient[0]]
  [-0.5, 0.0]

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    selected: [B, T] bool, from `clip_cov_mask` on the whole batch; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, which tokens belong to a response. None is `weights != 0`.
    clip_low: as in `ppo_loss`.
    clip_high: as in `ppo_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `ppo_loss` with {"selected_fraction"}.
    Log-ratios are limited to +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype does not fit, or a limit is not above 0; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: Cui et al., 2025, https://arxiv.org/abs/2505.22617
  """
  like = logprobs
  _, weights, mask = _checks.tokens("logprobs", logprobs, weights, mask)
  selected = _selected(selected, like, mask)
  loss, metrics = ppo_loss(
    logprobs,
    old_logprobs,
    advantages,
    jnp.where(selected, 0, weights),
    mask=mask,
    clip_low=clip_low,
    clip_high=clip_high,
  )
  return loss, metrics | {"selected_fraction": _checks.metric(selected, mask)}


def kl_cov_loss(
  logprobs, old_logprobs, advantages, selected, weights, *, mask=None, coef=1.0
) -> tuple[Array, Metrics]:
  """KL-Cov: an unclipped surrogate with a penalty on the selected tokens' moves.

      per_token = -ratio * A + (coef * |logprobs - old_logprobs| if selected else 0)
      loss      = sum(weights * per_token)

  A token of advantage 2 that rose from 1/4 to 1/2: ratio 2, so -4, and log 2 if it is selected:

  >>> now, old = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]]))
  >>> loss, _ = kl_cov_loss(now, old, jnp.array([2.0]), jnp.array([[True]]), jnp.ones((1, 1)))
  >>> round(float(loss), 3)
  -3.307

  A common misconception is that the penalty estimates a KL. Its slope is +-1 however small the
  move, while an estimate's slope fades towards 0: a selected token is held, not merely slowed.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    selected: [B, T] bool, from `kl_cov_mask` on the whole batch; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, which tokens belong to a response. None is `weights != 0`.
    coef: the penalty per nat; verl's configuration has 0.1.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "log_ratio_size", "selected_fraction"}:
    over member tokens, the mean ratio, |logprobs - old_logprobs|, and how many are selected. In the
    ratio, log-ratios are limited to +-20; beyond, it has no gradient.

  Raises:
    ValueError: shapes differ, or a dtype does not fit; the message names the argument.

  Needs: samples, advantages, old policy.

  Reference: Cui et al., 2025, https://arxiv.org/abs/2505.22617
  """
  like = logprobs
  _, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  selected = _selected(selected, like, mask)
  ratio = _checks.ratio_of(log_ratio)
  moved = jnp.abs(log_ratio)
  per_token = -ratio * advantages + jnp.where(selected, coef * moved, 0)
  metrics = {
    "ratio": _checks.metric(ratio, mask),
    "log_ratio_size": _checks.metric(moved, mask),
    "selected_fraction": _checks.metric(selected, mask),
  }
  return jnp.sum(weights * per_token), metrics


def _selected(selected, logprobs, mask):
  check_same_shape("selected", selected, "logprobs", logprobs)
  check_mask("selected", selected)
  return jnp.asarray(selected) & mask


def _share(fraction, mask, at_least):
  """floor(fraction * tokens); 0.21 of 300 are 63, though the float32 product is a little less."""
  exact = jnp.floor(fraction * jnp.sum(mask).astype(jnp.float32) * (1 + 2.0**-22))
  return jnp.maximum(exact, at_least)


def _largest(x, candidates, count):
  """The `count` candidates with the largest x, the first of equals, as a mask."""
  order = jnp.argsort(jnp.where(candidates, -x, jnp.inf).reshape(-1), stable=True)
  rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
  return candidates & (rank.reshape(candidates.shape) < count.astype(rank.dtype))
