"""Surrogates that treat each token's ratio differently from PPO's clip.

PPO's clip removes the gradient of any token that moved beyond 1 +- 0.2. Each loss here answers one
complaint about the clip: it silences the rare tokens on which reasoning turns (`cispo_loss`), it is
a cliff where a slope would do (`sapo_loss`), it measures a move by the ratio and not by how much
probability moved (`dppo_tv_loss`, `dppo_kl_loss`), or it does not pull a token back (`dro_loss`).
At ratio 1 all have the gradient of `reinforce_loss`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above, check_between, is_number
from rl_llm.losses import _checks


def cispo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, low=0.0, high=5.0
) -> tuple[Array, Metrics]:
  """CISPO: REINFORCE, each token weighted by its clipped ratio.

  Words like "Wait" and "However" are rare when they first redirect a chain of thought, so their
  ratio soon leaves PPO's bounds, and PPO then learns nothing from them. CISPO limits how much such
  a token counts but keeps its gradient:

      per_token = -stop_gradient(clip(ratio, low, high)) * A * logprobs
      loss      = sum(weights * per_token)

  A good token that rose from 0.01 to 0.08, ratio 8, counts 5 times, while PPO has no gradient:

  >>> from rl_llm.losses.policy_gradient import ppo_loss
  >>> now, old, one = jnp.log(jnp.array([[0.08]])), jnp.log(jnp.array([[0.01]])), jnp.ones((1, 1))
  >>> gradient = lambda f: float(jax.grad(lambda x: f(x, old, jnp.ones(1), one)[0])(now)[0, 0])
  >>> gradient(cispo_loss), gradient(ppo_loss)
  (-5.0, -0.0)

  A common misconception is that the stop-gradient is an optimisation. Without it the gradient also
  flows through the ratio, and a token is pushed by A * (1 + logprob): a good token of probability
  0.1 would be pushed *down*, since 1 + log 0.1 = -1.3.

  The bounds apply to the ratio itself. The paper has no lower bound and does not state its upper
  one; ScaleRL found that 5 works. Systems that write clip(ratio, 1 - eps_low, 1 + eps_high) mean
  `low=1 - eps_low, high=1 + eps_high`; those with one absolute cap mean `high`. With both 1 it is
  REINFORCE.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    low: the least a token counts, >= 0.
    high: the most a token counts, at least `low`.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "approx_kl", "clip_low_fraction",
    "clip_high_fraction"}: as in `ppo_loss`, the fractions being those of ratios beyond a bound.
    Log-ratios are limited to +-20 in the ratio, which has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a bound is out of range; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: MiniMax, 2025, MiniMax-M1, https://arxiv.org/abs/2506.13585; the cap of 5: Khatri et
    al., 2025, The Art of Scaling RL Compute for LLMs, https://arxiv.org/abs/2510.13786
  """
  infinity = float("inf")
  check_between("low", low, 0, infinity)
  check_between("high", high, low if is_number(low) else 0, infinity)
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  ratio = _checks.ratio_of(log_ratio)
  count = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
  metrics = _metrics(ratio, mask) | {
    "clip_low_fraction": _checks.metric(ratio < low, mask),
    "clip_high_fraction": _checks.metric(ratio > high, mask),
  }
  return -jnp.sum(weights * count * advantages * logprobs), metrics


def sapo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, tau_positive=1.0, tau_negative=1.05
) -> tuple[Array, Metrics]:
  """SAPO: PPO's clip as a slope, a sigmoid of the ratio.

  A token counts fully just inside PPO's clip, and not at all just outside. SAPO lets the gradient
  fade with the distance from ratio 1, on both sides:

      gate(ratio) = 4 / tau * sigmoid(tau * (ratio - 1))       tau = tau_positive where A > 0
      per_token   = -gate(ratio) * A                           tau = tau_negative elsewhere
      loss        = sum(weights * per_token)

  The factor 4 / tau makes the slope of the gate 1 at ratio 1. At ratio 2 it is 4 * sigmoid(1) *
  sigmoid(-1) = 0.786, so a good token that doubled keeps 0.786 of its gradient without a gate,
  which is its ratio; PPO would keep nothing:

  >>> now, old, one = jnp.log(jnp.array([[0.4]])), jnp.log(jnp.array([[0.2]])), jnp.ones((1, 1))
  >>> gradient = jax.grad(lambda x: sapo_loss(x, old, jnp.ones(1), one)[0])(now)
  >>> round(float(gradient[0, 0]) / -2.0, 3)
  0.786

  Pushing a bad token down raises all other tokens, most of them nonsense, so the gate of bad tokens
  is a little narrower. The loss at ratio 1 is -2 / tau * A, not -A: only its gradient is
  meaningful.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    tau_positive: how fast the gate of good tokens closes, > 0.
    tau_negative: the same for bad tokens, > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "approx_kl"}, as in `ppo_loss`.
    Log-ratios are limited to +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a tau is not above 0; the message names the
      argument.

  Needs: samples, advantages, old policy.

  Reference: Gao et al., 2025, Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347
  """
  check_above("tau_positive", tau_positive, 0)
  check_above("tau_negative", tau_negative, 0)
  _, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  ratio = _checks.ratio_of(log_ratio)
  tau = jnp.where(advantages > 0, tau_positive, tau_negative)
  gate = 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))
  return -jnp.sum(weights * gate * advantages), _metrics(ratio, mask)


def dppo_tv_loss(
  logprobs,
  old_logprobs,
  advantages,
  weights,
  *,
  mask=None,
  threshold_low=0.15,
  threshold_high=0.15,
  ratio_cap=None,
) -> tuple[Array, Metrics]:
  """DPPO with total variation: drops tokens whose *probability* moved too far, not their ratio.

  A ratio says little about how much a policy changed. From 0.01 to 0.05 the ratio is 5, but only 4%
  of the probability moved; from 0.8 to 0.955 it is 1.19, but 15.5% moved. PPO drops the first and
  keeps the second. A better measure is the divergence between "this token" and "any other" under
  both policies:

      moved     = exp(logprobs) - exp(old_logprobs)
      dropped   = (A > 0 and moved > threshold_high) or (A < 0 and moved < -threshold_low)
      per_token = 0 if dropped else -ratio * A
      loss      = sum(weights * per_token)

  >>> from rl_llm.losses.policy_gradient import ppo_loss
  >>> now, old = jnp.log(jnp.array([[0.05, 0.955]])), jnp.log(jnp.array([[0.01, 0.8]]))
  >>> gradient = lambda f: jax.grad(lambda x: f(x, old, jnp.ones(1), jnp.ones((1, 2)))[0])(now)
  >>> [round(float(g), 2) + 0 for g in gradient(dppo_tv_loss)[0]]
  [-5.0, 0.0]
  >>> [round(float(g), 2) + 0 for g in gradient(ppo_loss)[0]]
  [0.0, -1.19]

  The paper compares with the policy that *sampled*: pass the sampler's log-probs as `old_logprobs`,
  and do not also multiply the weights by importance factors. The signs matter: a token that moves
  back is kept, however far away it is. To drop tokens in both directions, multiply the weights by
  your own mask and set both thresholds to 1.

  Systems disagree on the ratio. The paper's objective leaves it unlimited; some limit it (3 and 20
  are in use), in the form -A * min(ratio, cap) * logprobs with a constant ratio. That is
  `ratio_cap`, with the same gradient.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy that sampled them; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    threshold_low: the probability a bad token may lose, > 0.
    threshold_high: the probability a good token may gain, > 0.
    ratio_cap: None, or the most that a token may count, > 0; its gradient is kept.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "approx_kl", "clip_low_fraction",
    "clip_high_fraction"}: as in `ppo_loss`, the fractions being those of the tokens dropped.
    Log-ratios are limited to +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is not above 0; the message names
      the argument.

  Needs: samples, advantages, sampler.

  Reference: Qi et al., 2026, Rethinking the Trust Region in LLM Reinforcement Learning,
    https://arxiv.org/abs/2602.04879
  """
  return _dppo_loss(
    lambda new, old: jnp.abs(jnp.exp(new) - jnp.exp(old)),
    logprobs,
    old_logprobs,
    advantages,
    weights,
    mask=mask,
    threshold_low=threshold_low,
    threshold_high=threshold_high,
    ratio_cap=ratio_cap,
  )


def dppo_kl_loss(
  logprobs,
  old_logprobs,
  advantages,
  weights,
  *,
  mask=None,
  threshold_low=0.05,
  threshold_high=0.05,
  ratio_cap=None,
) -> tuple[Array, Metrics]:
  """DPPO with a binary KL: as `dppo_tv_loss`, with the move measured in nats.

  With p the old and q the new probability of the token, the KL of "this token or another":

      moved     = p * log(p / q) + (1 - p) * log((1 - p) / (1 - q))
      dropped   = (A > 0 and q > p and moved > threshold_high)
               or (A < 0 and q < p and moved > threshold_low)
      per_token = 0 if dropped else -ratio * A
      loss      = sum(weights * per_token)

  From 0.01 to 0.05 is 0.025 nats, from 0.8 to 0.955 is 0.157: the second is dropped.

  >>> now, old = jnp.log(jnp.array([[0.05, 0.955]])), jnp.log(jnp.array([[0.01, 0.8]]))
  >>> gradient = jax.grad(lambda x: dppo_kl_loss(x, old, jnp.ones(1), jnp.ones((1, 2)))[0])(now)
  >>> [round(float(g), 2) + 0 for g in gradient[0]]
  [-5.0, 0.0]

  Unlike the total variation, the KL of a move by 0.1 is larger near probability 0 or 1 than in the
  middle. A token that became certain (q = 1) has infinite divergence, and is dropped.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy that sampled them; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    threshold_low: how far a bad token may fall, in nats, > 0.
    threshold_high: how far a good token may rise, in nats, > 0.
    ratio_cap: as in `dppo_tv_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `dppo_tv_loss`. Log-ratios are limited to
    +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is not above 0; the message names
      the argument.

  Needs: samples, advantages, sampler.

  Reference: Qi et al., 2026, Rethinking the Trust Region in LLM Reinforcement Learning,
    https://arxiv.org/abs/2602.04879
  """
  return _dppo_loss(
    _binary_kl,
    logprobs,
    old_logprobs,
    advantages,
    weights,
    mask=mask,
    threshold_low=threshold_low,
    threshold_high=threshold_high,
    ratio_cap=ratio_cap,
  )


def dro_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, beta=0.05
) -> tuple[Array, Metrics]:
  """DRO: REINFORCE with a spring to the policy that sampled, for data of any age.

  A ratio corrects for old samples only while it is near 1. DRO has no ratio: it pulls each log-prob
  back in proportion to its distance:

      per_token = -(A * logprobs - beta / 2 * (logprobs - old_logprobs)^2)
      loss      = sum(weights * per_token)

  So each token has a target, old_logprobs + A / beta, and no gradient once it gets there. With
  advantage 0.05 and beta 0.05 the target is one nat up, a probability e times as large:

  >>> old, one = jnp.log(jnp.array([[0.1]])), jnp.ones((1, 1))
  >>> gradient = jax.grad(lambda x: dro_loss(x, old, jnp.array([0.05]), one)[0])
  >>> round(float(gradient(old)[0, 0]), 3), round(float(gradient(old + 1.0)[0, 0]), 3) + 0
  (-0.05, 0.0)

  The papers write it for whole responses; systems apply it to tokens, as here. For responses pass
  [B, 1] sums of log-probs.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy that sampled them; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    beta: the stiffness of the spring, > 0; tune it to the scale of the advantages.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "approx_kl"}, as in `ppo_loss`.
    Log-ratios are limited to +-20 only in the metrics.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `beta` is not above 0; the message names the
      argument.

  Needs: samples, advantages, old policy.

  Reference: Richemond et al., 2024, Offline Regularised Reinforcement Learning for LLM Alignment,
    https://arxiv.org/abs/2405.19107; Kimi Team, 2025, Kimi k1.5, https://arxiv.org/abs/2501.12599
  """
  check_above("beta", beta, 0)
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  per_token = beta / 2 * jnp.square(log_ratio) - advantages * logprobs
  return jnp.sum(weights * per_token), _metrics(_checks.ratio_of(log_ratio), mask)


def _dppo_loss(
  divergence,
  logprobs,
  old_logprobs,
  advantages,
  weights,
  *,
  mask,
  threshold_low,
  threshold_high,
  ratio_cap,
):
  """DPPO with `divergence(logprobs, old_logprobs) -> [B, T]`, >= 0, of constants."""
  check_above("threshold_low", threshold_low, 0)
  check_above("threshold_high", threshold_high, 0)
  check_above("ratio_cap", ratio_cap, 0)
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  now = jax.lax.stop_gradient(logprobs)
  change = jax.lax.stop_gradient(log_ratio)
  moved = divergence(now, now - change)
  dropped_low = (advantages < 0) & (change < 0) & (moved > threshold_low)
  dropped_high = (advantages > 0) & (change > 0) & (moved > threshold_high)
  ratio = _checks.ratio_of(log_ratio)
  counted = ratio
  if ratio_cap is not None:  # scaled by a constant: its value is limited, its gradient kept
    counted = ratio * jax.lax.stop_gradient(jnp.minimum(1, ratio_cap / ratio))
  per_token = jnp.where(dropped_low | dropped_high, 0, -counted * advantages)
  metrics = _metrics(ratio, mask) | {
    "clip_low_fraction": _checks.metric(dropped_low, mask),
    "clip_high_fraction": _checks.metric(dropped_high, mask),
  }
  return jnp.sum(weights * per_token), metrics


def _binary_kl(logprobs, old_logprobs):
  """KL(Bernoulli(exp(old_logprobs)) || Bernoulli(exp(logprobs)))."""
  # -expm1(x) is 1 - exp(x), exact also for probabilities near 1.
  return jax.scipy.special.rel_entr(jnp.exp(old_logprobs), jnp.exp(logprobs)) + (
    jax.scipy.special.rel_entr(-jnp.expm1(old_logprobs), -jnp.expm1(logprobs))
  )


def _metrics(ratio, mask):
  return {"ratio": _checks.metric(ratio, mask), "approx_kl": _checks.approx_kl(ratio, mask)}
