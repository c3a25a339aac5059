"""Policy-gradient surrogates: make good tokens likelier, but no more than the data justifies."""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.checks import LOG_RATIO_LIMIT, Array, Metrics, check_above
from rl_llm.losses import _checks


def reinforce_loss(logprobs, advantages, weights) -> tuple[Array, Metrics]:
  """REINFORCE: each token's log-prob, pushed up or down by its advantage.

      loss = -sum(weights * advantages * logprobs)

  Only the gradient of this number matters, not the number itself: in expectation it is minus the
  gradient of the expected reward, if the tokens were sampled from the current policy. After an
  update they no longer are: see `ppo_loss`. The gradient with respect to each log-prob is -weight *
  advantage:

  >>> import jax
  >>> logprobs = jnp.log(jnp.array([[0.5, 0.25]]))
  >>> gradient, _ = jax.grad(reinforce_loss, has_aux=True)(
  ...   logprobs, jnp.array([2.0]), jnp.array([[0.5, 0.5]]))
  >>> gradient.tolist()
  [[-1.0, -1.0]]

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.

  Returns:
    The scalar loss, and metrics {"logprob"}.

  Raises:
    ValueError: shapes differ, or `logprobs` or `weights` is not float; the message names the
      argument.

  Needs: samples, advantages.

  Reference: Williams, 1992, Simple statistical gradient-following algorithms for connectionist
    reinforcement learning, https://doi.org/10.1007/BF00992696
  """
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights)
  advantages = _checks.per_token("advantages", advantages, mask)
  loss = -jnp.sum(weights * advantages * logprobs)
  return loss, {"logprob": _checks.metric(logprobs, mask)}


def ppo_loss(
  logprobs,
  old_logprobs,
  advantages,
  weights,
  *,
  mask=None,
  clip_low=0.2,
  clip_high=0.2,
  dual_clip=None,
  delta=None,
) -> tuple[Array, Metrics]:
  """PPO's clipped surrogate objective, to minimise.

  Sampling is expensive, so PPO makes several updates from one batch. Once the policy has moved, a
  token sampled by the old policy counts `ratio` times. Clipping removes the gradient that would
  push a token further than the batch can justify.

      ratio     = exp(logprobs - old_logprobs)
      per_token = max(-ratio * A, -clip(ratio, 1 - clip_low, 1 + clip_high) * A)
      loss      = sum(weights * per_token)

  A token whose probability fell from 0.5 to 0.3, with advantage 1: ratio 0.6, so it counts 0.6
  times:

  >>> now, old = jnp.log(jnp.array([[0.3]])), jnp.log(jnp.array([[0.5]]))
  >>> loss, _ = ppo_loss(now, old, jnp.ones(1), jnp.ones((1, 1)))
  >>> round(float(loss), 3)
  -0.6

  A common misconception is that clipping keeps the ratio within bounds. It only stops *pushing*:
  here the token was good and fell, so the gradient that brings it back is kept. If it had been bad
  (advantage -1), falling below 0.8 would have been far enough:

  >>> import jax
  >>> gradient = jax.grad(lambda x, a: ppo_loss(x, old, jnp.array([a]), jnp.ones((1, 1)))[0])
  >>> round(float(gradient(now, 1.0)[0, 0]), 3), float(gradient(now, -1.0)[0, 0])
  (-0.6, 0.0)

  The loss of a bad token that became much likelier, ratio * |A|, has no bound. There are two
  published limits, both off by default:

      dual_clip c:  per_token = min(per_token, -c * A) where A < 0
      delta d:      ratio in the unclipped term becomes min(ratio, d)

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, which tokens belong to a response: those the metrics describe. None is
      `weights != 0`.
    clip_low: lower clip range, > 0: ratios below 1 - clip_low are clipped.
    clip_high: upper clip range, > 0; larger than `clip_low` is DAPO's clip-higher.
    dual_clip: None, or c, > 1: a bad token's loss is at most c * |A|; 3 is usual.
    delta: None, or d, > 1: the largest ratio of a bad token; keep it above 1 + `clip_high`, or it
      also limits good tokens.

  Returns:
    The scalar loss, at least float32, and metrics {"ratio", "approx_kl", "clip_low_fraction",
    "clip_high_fraction"}: over member tokens, the mean ratio, the k3 estimate of KL(old || policy),
    and how often a limit from below or from above removed a gradient. These limits include
    `dual_clip`, `delta` and the bound of +-20 on log-ratios, beyond which a token has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is out of range; the message names
      the argument.

  Needs: samples, advantages, old policy.

  Reference: Schulman et al., 2017, Proximal Policy Optimization Algorithms,
    https://arxiv.org/abs/1707.06347; clip-higher: Yu et al., 2025, DAPO,
    https://arxiv.org/abs/2503.14476; dual clip: Ye et al., 2020, https://arxiv.org/abs/1912.09729;
    delta: Prime Intellect, 2025, INTELLECT-2, https://arxiv.org/abs/2505.07291
  """
  check_above("clip_low", clip_low, 0)
  check_above("clip_high", clip_high, 0)
  check_above("dual_clip", dual_clip, 1)
  check_above("delta", delta, 1)
  _, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  ratio = _checks.ratio_of(log_ratio)
  unclipped = ratio if delta is None else jnp.minimum(ratio, delta)
  clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  per_token = _checks.larger(-unclipped * advantages, -clipped * advantages)
  good, bad = advantages > 0, advantages < 0
  # The clip stops tokens pushed further away; only the other limits stop one that moves back.
  stopped_low = (bad & (ratio < 1 - clip_low)) | (good & (log_ratio < -LOG_RATIO_LIMIT))
  stopped_high = (good & (ratio > 1 + clip_high)) | (bad & (log_ratio > LOG_RATIO_LIMIT))
  if delta is not None:
    stopped_high |= (ratio > delta) & (good | (bad & (ratio > 1 + clip_high)))
  if dual_clip is not None:
    most = -dual_clip * advantages
    stopped_high |= bad & (per_token > most)
    per_token = jnp.where(bad, jnp.minimum(per_token, most), per_token)
  metrics = {
    "ratio": _checks.metric(ratio, mask),
    "approx_kl": _checks.approx_kl(ratio, mask),
    "clip_low_fraction": _checks.metric(stopped_low, mask),
    "clip_high_fraction": _checks.metric(stopped_high, mask),
  }
  return jnp.sum(weights * per_token), metrics


def grpo_loss(
  logprobs,
  old_logprobs,
  advantages,
  weights,
  *,
  mask=None,
  clip_low=0.2,
  clip_high=0.2,
  dual_clip=None,
  delta=None,
) -> tuple[Array, Metrics]:
  """GRPO's surrogate: PPO's, with advantages that compare the responses to one prompt.

  PPO trains a second network to predict the expected reward. GRPO asks the policy G times and takes
  the mean of the group, so every token of a response has the same advantage. What is new in GRPO
  lies outside this term, in three of its inputs:

      advantages = group_relative(rewards)     (R - mean) / std within the group
      weights    = sequence_mean(mask)         each response counts the same; DAPO: token_mean
      objective  = grpo_loss + coef * kl_loss  the KL is a term of the loss, not of the reward

  Take two responses to one prompt, one right and one wrong, before the first update. Every ratio is
  1, so the loss is minus the mean advantage, 0. Its gradient is not 0: it raises one response's
  log-prob and lowers the other's:

  >>> import jax
  >>> from rl_llm.advantages import group_relative
  >>> from rl_llm.weighting import sequence_mean
  >>> advantages = group_relative(jnp.array([[1.0, 0.0]]), scale="none").reshape(-1)
  >>> logprobs, mask = jnp.log(jnp.array([[0.5], [0.25]])), jnp.ones((2, 1), bool)
  >>> (loss, _), gradient = jax.value_and_grad(grpo_loss, has_aux=True)(
  ...   logprobs, logprobs, advantages, sequence_mean(mask))
  >>> float(loss), gradient.tolist()
  (0.0, [[-0.25], [0.25]])

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    mask: [B, T] bool, as in `ppo_loss`.
    clip_low: as in `ppo_loss`.
    clip_high: as in `ppo_loss`.
    dual_clip: as in `ppo_loss`.
    delta: as in `ppo_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `ppo_loss`. Log-ratios are limited to
    +-20; a token beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a limit is out of range; the message names
      the argument.

  Needs: samples, advantages, several responses, old policy.

  Reference: Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300
  """
  return ppo_loss(
    logprobs,
    old_logprobs,
    advantages,
    weights,
    mask=mask,
    clip_low=clip_low,
    clip_high=clip_high,
    dual_clip=dual_clip,
    delta=delta,
  )
