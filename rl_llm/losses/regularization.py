"""Terms that hold a policy near its reference, keep it exploring, or train its value network."""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above, check_same_shape
from rl_llm.kl import kl_penalty
from rl_llm.losses import _checks


def kl_loss(
  logprobs, ref_logprobs, weights, *, value="k3", gradient="k2", ratio=None
) -> tuple[Array, Metrics]:
  """The penalty for leaving the reference policy, as a term of the loss.

      loss = sum(weights * kl_penalty(logprobs, ref_logprobs, value, gradient, ratio))

  A policy that only chases the reward forgets what the reference knew. The value is unbiased and
  the gradient is that of KL(policy || reference); DeepSeekMath's published term is `gradient="k3"`,
  whose gradient is the forward KL's. See `rl_llm.kl` for why they differ. For a token of
  probability 1/2 where the reference has 1/4, the value is 1/2 + log 2 - 1 and the gradient log 2:

  >>> import jax
  >>> f = jax.value_and_grad(kl_loss, has_aux=True)
  >>> now, reference = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]]))
  >>> (loss, _), gradient = f(now, reference, jnp.ones((1, 1)))
  >>> round(float(loss), 3), round(float(gradient[0, 0]), 3)
  (0.193, 0.693)

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    ref_logprobs: [B, T] float, the same under the reference, at the same temperature; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    value: the estimator to report, "k1", "k2" or "k3".
    gradient: the estimator to differentiate, "k1", "k2" or "k3".
    ratio: None, or [B, T] float importance weights, see `kl_penalty`.

  Returns:
    The scalar loss, at least float32, and metrics {"kl"}: the estimate per token, unweighted.
    In k3, log-ratios are limited to +-20; a token beyond has no gradient of it.

  Raises:
    ValueError: shapes differ, a dtype is not float, or an estimator is unknown; the message names
      the argument.

  Needs: samples, reference.

  Reference: Schulman, 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html;
    Tang and Munos, 2025, https://arxiv.org/abs/2506.09477
  """
  like = logprobs
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights)
  ref_logprobs = _checks.constant("ref_logprobs", ref_logprobs, "logprobs", like, mask)
  if ratio is not None:
    check_same_shape("ratio", ratio, "logprobs", like)
    ratio = jnp.where(mask, ratio, 1)
  penalty = kl_penalty(logprobs, ref_logprobs, value=value, gradient=gradient, ratio=ratio)
  return jnp.sum(weights * penalty), {"kl": _checks.metric(penalty, mask)}


def entropy_loss(entropies, weights) -> tuple[Array, Metrics]:
  """Minus the policy's entropy: added with a small coefficient, it rewards staying undecided.

      loss = -sum(weights * entropies)

  A policy that is certain stops exploring, and the reward can teach it nothing more. A fair coin
  has log 2:

  >>> loss, _ = entropy_loss(jnp.log(jnp.array([[2.0]])), jnp.ones((1, 1)))
  >>> round(float(loss), 3)
  -0.693

  Args:
    entropies: [B, T] float, of the distributions the tokens were sampled from, in nats: they carry
      the gradient.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.

  Returns:
    The scalar loss, at least float32, and metrics {"entropy"}: per token, unweighted.

  Raises:
    ValueError: shapes differ, or a dtype is not float; the message names the argument.

  Needs: samples, vocabulary.

  Reference: Williams and Peng, 1991, Function optimization using connectionist reinforcement
    learning algorithms, https://doi.org/10.1080/09540099108946587
  """
  entropies, weights, mask = _checks.tokens("entropies", entropies, weights)
  return -jnp.sum(weights * entropies), {"entropy": _checks.metric(entropies, mask)}


def value_loss(values, old_values, returns, weights, *, clip=0.2) -> tuple[Array, Metrics]:
  """Half the squared error of the value network, whose moves from its old values are clipped.

      clipped = clip_to(values, old_values - clip, old_values + clip)
      loss    = sum(weights * max((values - returns)^2, (clipped - returns)^2) / 2)

  A value moved from 0 to 0.5 towards its return 1, where 0.2 is allowed. The larger error, 0.8,
  counts, and it is a constant, so there is no gradient:

  >>> import jax
  >>> f = jax.value_and_grad(value_loss, has_aux=True)
  >>> one = jnp.ones((1, 1))
  >>> (loss, _), gradient = f(0.5 * one, 0 * one, one, one)
  >>> round(float(loss), 3), abs(float(gradient[0, 0]))
  (0.32, 0.0)

  Args:
    values: [B, T] float, of the value network being trained.
    old_values: [B, T] float, the same before this batch's updates; a constant.
    returns: [B, T] float, the targets, such as from `advantages.gae`; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    clip: how far a value may move, > 0, or None for the plain squared error.

  Returns:
    The scalar loss, at least float32, and metrics {"value_error", "value_clip_fraction"}: per
    token, unweighted.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `clip` is not above 0; the message names the
      argument.

  Needs: samples, reward, value network.

  Reference: Schulman et al., 2017, Proximal Policy Optimization Algorithms,
    https://arxiv.org/abs/1707.06347
  """
  check_above("clip", clip, 0)
  like = values
  values, weights, mask = _checks.tokens("values", values, weights)
  old_values = _checks.constant("old_values", old_values, "values", like, mask)
  returns = _checks.constant("returns", returns, "values", like, mask)
  error = jnp.square(values - returns)
  worst = error
  if clip is not None:
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    worst = _checks.larger(error, jnp.square(clipped - returns))
  metrics = {
    "value_error": _checks.metric(error, mask),
    "value_clip_fraction": _checks.metric(worst > error, mask),
  }
  return jnp.sum(weights * worst) / 2, metrics
