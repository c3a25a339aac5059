"""Surrogates with a quadratic penalty in place of PPO's clip: a token that went too far comes back.

Once a token is past PPO's clip its gradient is 0. It stays where it is, or other tokens drag it
further. A parabola around ratio 1 has a slope everywhere: it slows a token down on its way to the
threshold, and pulls it back beyond. The two losses differ in what they call far: a ratio
(`spo_loss`), or a change of the probability (`drpo_loss`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above
from rl_llm.losses import _checks


def spo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, threshold=0.2
) -> tuple[Array, Metrics]:
  """SPO (Simple Policy Optimization): PPO with a parabola around ratio 1 instead of a clip.

      ratio     = exp(logprobs - old_logprobs)
      per_token = -ratio * A + |A| * (ratio - 1)^2 / (2 * threshold)
      loss      = sum(weights * per_token)

  The gradient is that of -ratio * A, times a weight that falls as the token moves the way it is
  pushed, is 0 at the threshold and negative beyond it:

      weight = 1 - sign(A * (ratio - 1)) * |ratio - 1| / threshold

  With threshold 0.5, a good token whose ratio is 1.25 keeps half of its gradient, -1.25 / 2. At 1.5
  it has none; at 2 it is pulled back (a gradient above 0 lowers its log-prob):

  >>> now, old = jnp.log(jnp.array([[0.5, 0.6, 0.8]])), jnp.log(jnp.full((1, 3), 0.4))
  >>> gradient = jax.grad(lambda x: spo_loss(
  ...   x, old, jnp.ones(1), jnp.ones((1, 3)), threshold=0.5)[0])(now)
  >>> [round(float(g), 3) + 0 for g in gradient[0]]
  [-0.625, 0.0, 2.0]

  A ratio of a rare token is soon large, so its pull is too: see `drpo_loss`, whose paper sets both
  thresholds to 12.5. The default is that of SPO's own paper, which has no language models.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    threshold: how far from 1 the ratio moves before the token is pulled back, > 0; the larger, the
      weaker the penalty.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "approx_kl", "clip_low_fraction",
    "clip_high_fraction"}: as in `ppo_loss`, the fractions being those of bad and of good tokens
    that are pulled back. Log-ratios are limited to +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `threshold` is not above 0; the message
      names the argument.

  Needs: samples, advantages, old policy.

  Reference: Xie et al., 2024, Simple Policy Optimization, https://arxiv.org/abs/2401.16025
  """
  _, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  return _quadratic(log_ratio, advantages, weights, mask, threshold)


def drpo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, threshold=12.5
) -> tuple[Array, Metrics]:
  """DRPO: `dppo_tv_loss` as a slope, `spo_loss` with the move measured as a probability.

  Each sampled token's parabola is as steep as the token was likely:

      ratio     = exp(logprobs - old_logprobs)
      per_token = -ratio * A + |A| * exp(old_logprobs) * (ratio - 1)^2 / (2 * threshold)
      loss      = sum(weights * per_token)

  The gradient is that of -ratio * A, times a weight of the probability that moved:

      weight = 1 - sign(A * (ratio - 1)) * |exp(logprobs) - exp(old_logprobs)| / threshold

  From 0.01 to 0.05 a token's ratio is 5, but only 4% of the probability moved. With threshold 0.4
  it keeps 0.9 of its gradient, -5. SPO pulls it back, nine times as hard as it was pushed. A token
  that rose from 0.2 to 0.6 is at the threshold:

  >>> now, old = jnp.log(jnp.array([[0.05, 0.6]])), jnp.log(jnp.array([[0.01, 0.2]]))
  >>> gradient = lambda f: jax.grad(lambda x: f(
  ...   x, old, jnp.ones(1), jnp.ones((1, 2)), threshold=0.4)[0])(now)
  >>> [round(float(g), 2) + 0 for g in gradient(drpo_loss)[0]]
  [-4.5, 0.0]
  >>> [round(float(g), 2) + 0 for g in gradient(spo_loss)[0]]
  [45.0, 12.0]

  A common misconception is that the paper's threshold of 12.5 is a bound. No probability moves by
  more than 1, so the weight stays between 1 - 1/12.5 and 1 + 1/12.5, and no token is ever pulled
  back: at that setting the penalty is a correction of at most 8%. Below 1 it is a trust region.

  The paper compares with the policy that *sampled*: pass the sampler's log-probs as `old_logprobs`,
  and do not also multiply the weights by importance factors.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy that sampled them; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    threshold: the probability that a token gains or loses before it is pulled back, > 0; the
      larger, the weaker the penalty.

  Returns:
    The scalar loss, at least float32, and the metrics of `spo_loss`. Log-ratios are limited to
    +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `threshold` is not above 0; the message
      names the argument.

  Needs: samples, advantages, sampler.

  Reference: Yao et al., 2026, Rethinking the Divergence Regularization in LLM RL,
    https://arxiv.org/abs/2606.09821
  """
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  old_probs = jax.lax.stop_gradient(jnp.exp(logprobs - log_ratio))
  return _quadratic(log_ratio, advantages, weights, mask, threshold, curvature=old_probs)


def _quadratic(log_ratio, advantages, weights, mask, threshold, curvature=1.0):
  """-ratio * A, and |A| times a parabola that is as steep as `curvature / threshold`."""
  check_above("threshold", threshold, 0)
  ratio = _checks.ratio_of(log_ratio)
  moved = curvature * (ratio - 1)
  penalty = jnp.abs(advantages) * moved * (ratio - 1) / (2 * threshold)
  metrics = {
    "ratio": _checks.metric(ratio, mask),
    "approx_kl": _checks.approx_kl(ratio, mask),
    "clip_low_fraction": _checks.metric((advantages < 0) & (moved < -threshold), mask),
    "clip_high_fraction": _checks.metric((advantages > 0) & (moved > threshold), mask),
  }
  return jnp.sum(weights * (penalty - ratio * advantages)), metrics
