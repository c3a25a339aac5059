"""Surrogates with one ratio for the whole response, to match the reward.

A token's ratio rests on one sample, and a long response multiplies hundreds of them. The losses
here first take a mean or a sum of the log-ratios of a response, over the tokens of its *mask*. A
token whose weight was set to 0 by a correction still belongs to the response, so pass `mask`
whenever weights contain such factors; without it membership is `weights != 0`. The weight of a
sequence is the sum of its tokens' weights.

RLOO needs no function of its own: it is PPO on the summed log-probs of each response, one [B, 1]
"token" per row. Two tokens with ratios 1.5 and 0.5 make a response of ratio 0.75:

>>> from rl_llm.losses.policy_gradient import ppo_loss
>>> now, old = jnp.log(jnp.array([[0.6, 0.1]])), jnp.log(jnp.array([[0.4, 0.2]]))
>>> loss, _ = ppo_loss(now.sum(1, keepdims=True), old.sum(1, keepdims=True), jnp.ones(1),
...                    jnp.ones((1, 1)))
>>> round(float(loss), 3)
-0.75
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above, check_between
from rl_llm.losses import _checks


def gspo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, clip_low=3e-4, clip_high=4e-4
) -> tuple[Array, Metrics]:
  """GSPO: PPO's clipped surrogate, with one ratio for the whole response.

  The reward judges a response, but PPO keeps or drops its tokens one by one, each on the evidence
  of a single sample. In mixtures of experts, where one update reroutes many tokens, that noise
  alone can ruin a run. GSPO clips the geometric mean of a response's ratios:

      s         = exp(mean over the mask of (logprobs - old_logprobs))
      per_token = max(-s * A, -clip(s, 1 - clip_low, 1 + clip_high) * A)
      loss      = sum(weights * per_token)

  One of two tokens is twice as likely as before, the other half as likely. The response is then as
  likely as it was, s is 1, and each token receives half of the gradient. PPO would drop the first:

  >>> from rl_llm.losses.policy_gradient import ppo_loss
  >>> now, old = jnp.log(jnp.array([[0.4, 0.25]])), jnp.log(jnp.array([[0.2, 0.5]]))
  >>> weights = jnp.array([[0.5, 0.5]])
  >>> gradient = lambda f: jax.grad(lambda x: f(x, old, jnp.ones(1), weights)[0])(now)
  >>> [round(float(g), 2) for g in gradient(gspo_loss)[0]]
  [-0.5, -0.5]
  >>> [round(float(g), 2) + 0 for g in gradient(ppo_loss)[0]]
  [0.0, -0.25]

  A mean of log-ratios is small, hence the bounds of a few 1e-4: with PPO's 0.2, which several
  systems leave in place, hardly any response is clipped.

  With `sequence_mean` weights, as in the paper, a response of n tokens moves each by 1/n. With
  `sequence_sum` weights it moves each by 1, and the loss is LUSPO:

  >>> from rl_llm.weighting import sequence_mean, sequence_sum
  >>> mask = jnp.array([[True, True, True, True]])
  >>> for weighting in (sequence_mean, sequence_sum):
  ...   same = jnp.zeros((1, 4))
  ...   jax.grad(lambda x: gspo_loss(x, same, jnp.ones(1), weighting(mask))[0])(same).tolist()
  [[-0.25, -0.25, -0.25, -0.25]]
  [[-1.0, -1.0, -1.0, -1.0]]

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant. A
      sequence counts the sum of its row.
    mask: [B, T] bool, which tokens belong to a response, and so enter its mean. None is
      `weights != 0`.
    clip_low: lower clip range, > 0: ratios below 1 - clip_low are clipped.
    clip_high: upper clip range, > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"sequence_ratio", "approx_kl",
    "clip_low_fraction", "clip_high_fraction"}: the mean s over sequences; and over member tokens,
    the k3 estimate of KL(old || policy), and how often each clip removed a gradient.
    The mean of log-ratios in s, and each in the estimate, are limited to +-20; a response beyond
    has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is not above 0; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: Zheng et al., 2025, Group Sequence Policy Optimization,
    https://arxiv.org/abs/2507.18071; LUSPO: Liu et al., 2026, Length-Unbiased Sequence Policy
    Optimization, https://arxiv.org/abs/2602.05261
  """
  check_above("clip_low", clip_low, 0)
  check_above("clip_high", clip_high, 0)
  _, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  of_response = _checks.ratio_of(_row_mean(log_ratio, mask))
  ratio = jnp.broadcast_to(of_response, log_ratio.shape)
  return _clipped(ratio, of_response, log_ratio, advantages, weights, mask, clip_low, clip_high)


def gspo_token_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, clip_low=3e-4, clip_high=4e-4
) -> tuple[Array, Metrics]:
  """GSPO-token: GSPO's ratio, with a separate gradient for each token.

  In `gspo_loss` the gradient flows through the mean, so the advantages and weights of a response
  are averaged and every token gets the same push. When they differ from token to token (steps
  judged one by one, a correction factor per token), each token should keep its own:

      s         = stop_gradient(exp(mean over the mask of (logprobs - old_logprobs)))
      ratio     = s * exp(logprobs - stop_gradient(logprobs))
      per_token = max(-ratio * A, -clip(ratio, 1 - clip_low, 1 + clip_high) * A)
      loss      = sum(weights * per_token)

  The loss equals that of `gspo_loss`, and so does the gradient if advantages and weights are
  constant over the response. Here they are not, and only the first token was good:

  >>> old, advantages, weights = jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]), jnp.ones((1, 2))
  >>> for f in (gspo_loss, gspo_token_loss):
  ...   gradient = jax.grad(lambda x: f(x, old, advantages, weights)[0])(old)
  ...   [round(float(g), 2) + 0 for g in gradient[0]]
  [-0.5, -0.5]
  [-1.0, 0.0]

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `gspo_loss`.
    clip_low: as in `gspo_loss`.
    clip_high: as in `gspo_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `gspo_loss`. The mean of log-ratios in s
    is limited to +-20.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is not above 0; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: Zheng et al., 2025, Group Sequence Policy Optimization,
    https://arxiv.org/abs/2507.18071
  """
  check_above("clip_low", clip_low, 0)
  check_above("clip_high", clip_high, 0)
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  constant = jax.lax.stop_gradient
  of_response = constant(_checks.ratio_of(_row_mean(log_ratio, mask)))
  ratio = of_response * jnp.exp(logprobs - constant(logprobs))
  return _clipped(ratio, of_response, log_ratio, advantages, weights, mask, clip_low, clip_high)


def gmpo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, clip_low=0.4, clip_high=0.4
) -> tuple[Array, Metrics]:
  """GMPO: the geometric mean of the token ratios, each clipped before the mean is taken.

  GRPO's surrogate is an arithmetic mean of ratios, which one token of ratio 50 dominates. In a
  geometric mean its logarithm counts, so the clip can be wide. And unlike in GSPO, such a token
  loses only its own gradient, not that of the whole response:

      x         = logprobs - old_logprobs
      c         = min(x, clip_high) where A > 0, max(x, -clip_low) elsewhere
      g         = exp(mean over the mask of c)
      per_token = -g * A
      loss      = sum(weights * per_token)

  Log-ratios 1 and 0 of a good response: the first is cut to 0.4 and has no gradient, the second
  receives half of g = exp(0.2) = 1.221:

  >>> old = jnp.log(jnp.array([[0.1, 0.1]]))
  >>> gradient = jax.grad(lambda x: gmpo_loss(x, old, jnp.ones(1), jnp.full((1, 2), 0.5))[0])(
  ...   old + jnp.array([[1.0, 0.0]]))
  >>> [round(float(g), 3) + 0 for g in gradient[0]]
  [0.0, -0.611]

  The bounds apply to the *logarithm*: 0.4 allows ratios from exp(-0.4) = 0.67 to exp(0.4) = 1.49.
  One system averages over the sequences of the local microbatch, whatever weights were asked for;
  here weights count as in every loss, and `sequence_mean` is the paper's.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant. A
      sequence counts the sum of its row.
    mask: [B, T] bool, as in `gspo_loss`.
    clip_low: the log-ratio of a bad token is clipped below -clip_low, in nats, > 0.
    clip_high: the log-ratio of a good token is clipped above clip_high, in nats, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `gspo_loss`, "sequence_ratio" being the
    mean of g over sequences. The mean of c is limited to +-20; a response beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is not above 0; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: Zhao et al., 2025, Geometric-Mean Policy Optimization,
    https://arxiv.org/abs/2507.20673
  """
  check_above("clip_low", clip_low, 0)
  check_above("clip_high", clip_high, 0)
  _, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  above, below = log_ratio > clip_high, log_ratio < -clip_low
  from_above = jnp.where(above, clip_high, log_ratio)
  from_below = jnp.where(below, -clip_low, log_ratio)
  clipped = jnp.where(advantages > 0, from_above, from_below)
  ratio = _checks.ratio_of(_row_mean(clipped, mask))
  metrics = _metrics(ratio, log_ratio, mask) | {
    "clip_low_fraction": _checks.metric((advantages < 0) & below, mask),
    "clip_high_fraction": _checks.metric((advantages > 0) & above, mask),
  }
  return -jnp.sum(weights * ratio * advantages), metrics


def vespo_loss(
  logprobs,
  old_logprobs,
  advantages,
  weights,
  *,
  mask=None,
  k_positive=2.0,
  lambda_positive=3.0,
  k_negative=3.0,
  lambda_negative=2.0,
) -> tuple[Array, Metrics]:
  """VESPO: REINFORCE, each response weighted by a soft function of its importance weight.

  The importance weight of a response is the product of its token ratios. Theory asks for it, but
  its variance grows with the length until it is useless. GSPO takes the n-th root, which changes
  the objective; VESPO keeps the product and lets very large and very small ones fade:

      w         = exp(sum over the mask of (logprobs - old_logprobs))
      phi(w)    = w^k * exp(lambda * (1 - w))
      k, lambda = positive where A >= 0, else negative
      per_token = -stop_gradient(phi(w)) * A * logprobs
      loss      = sum(weights * per_token)

  phi(1) is 1. A good response that has become twice as likely counts 2^2 * exp(-3) = 0.199, and one
  that has become half as likely counts 0.5^2 * exp(1.5) = 1.12:

  >>> old, one = jnp.log(jnp.array([[0.4]])), jnp.ones((1, 1))
  >>> for now in (0.8, 0.2):
  ...   f = lambda x: vespo_loss(x, old, jnp.ones(1), one)[0]
  ...   round(-float(jax.grad(f)(jnp.log(jnp.array([[now]])))[0, 0]), 3)
  0.199
  1.12

  The largest weight is at w = k / lambda: 2/3 for good responses, 3/2 for bad ones. So responses
  that moved the right way count less, and those that moved the wrong way more. With all four 0 it
  is REINFORCE.

  If the sampler disagrees with the trainer, w should include that: pass the sampler's log-probs as
  `old_logprobs`, and no importance factors in the weights.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy that sampled them; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `gspo_loss`: the tokens of the sum.
    k_positive: the power of w for good responses, >= 0.
    lambda_positive: how fast large w fade for good responses, >= 0.
    k_negative: the same power for bad responses.
    lambda_negative: the same rate for bad responses.

  Returns:
    The scalar loss, at least float32, and metrics {"phi", "approx_kl"}: means over member tokens.
    log w is limited to +-20, and so is each log-ratio in the estimate.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a k or lambda is below 0; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: Shen et al., 2026, VESPO: Variational Sequence-Level Soft Policy Optimization,
    https://arxiv.org/abs/2602.10693
  """
  infinity = float("inf")
  check_between("k_positive", k_positive, 0, infinity)
  check_between("lambda_positive", lambda_positive, 0, infinity)
  check_between("k_negative", k_negative, 0, infinity)
  check_between("lambda_negative", lambda_negative, 0, infinity)
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  w = jax.lax.stop_gradient(_checks.ratio_of(jnp.sum(log_ratio, axis=1, keepdims=True)))
  k = jnp.where(advantages >= 0, k_positive, k_negative)
  rate = jnp.where(advantages >= 0, lambda_positive, lambda_negative)
  phi = jnp.exp(k * jnp.log(w) + rate * (1 - w))
  metrics = {
    "phi": _checks.metric(phi, mask),
    "approx_kl": _checks.approx_kl(_checks.ratio_of(log_ratio), mask),
  }
  return -jnp.sum(weights * phi * advantages * logprobs), metrics


def _row_mean(x, mask):
  """[B, 1]: the mean over each row's members of x, which is 0 elsewhere; 0 without members."""
  count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
  return jnp.sum(x, axis=1, keepdims=True) / count.astype(x.dtype)


def _clipped(ratio, of_response, log_ratio, advantages, weights, mask, clip_low, clip_high):
  """PPO's surrogate with a given [B, T] ratio, over each row the value of `of_response` [B, 1]."""
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  per_token = _checks.larger(-ratio * advantages, -clipped * advantages)
  metrics = _metrics(of_response, log_ratio, mask) | {
    "clip_low_fraction": _checks.metric((advantages < 0) & (ratio < 1 - clip_low), mask),
    "clip_high_fraction": _checks.metric((advantages > 0) & (ratio > 1 + clip_high), mask),
  }
  return jnp.sum(weights * per_token), metrics


def _metrics(sequence_ratio, log_ratio, mask):
  return {
    "sequence_ratio": _checks.metric(sequence_ratio, jnp.any(mask, axis=1, keepdims=True)),
    "approx_kl": _checks.approx_kl(_checks.ratio_of(log_ratio), mask),
  }
