"""Estimators of the KL divergence to a reference policy, per sampled token.

The exact KL needs all V probabilities at each position. These estimators need only the sampled
token; with d = logprobs - ref_logprobs:

    k1 = d                   unbiased, but of either sign
    k2 = d^2 / 2             biased, never negative
    k3 = exp(-d) + d - 1     unbiased and never negative

A misconception is that an estimator which is right as a *value* is also right as a *loss*. Autodiff
differentiates the estimator at fixed samples and ignores that the samples would change too. For
tokens sampled from the policy:

    E[grad k1] = 0                    adds noise and regularises nothing
    E[grad k2] = grad KL(policy || reference)       the reverse KL, which is usually meant
    E[grad k3] = grad KL(reference || policy)       the forward KL

In other words: report k3 (or put k1 in the reward), and differentiate k2. `kl_penalty` takes both
by name.

These identities hold for each token given the tokens before it, and for responses of one token. In
longer responses a token also decides which contexts follow. A loss term does not account for that;
k1 in the reward of each token (`token_rewards(kl=...)`, with returns) does, and its expected
gradient is exactly that of the whole response's KL.

A run calls them through `losses.kl_loss`, or with `--kl.place=reward` through
`rl_llm.training.credit.reward_kl`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  LOG_RATIO_LIMIT,
  Array,
  at_least_float32,
  check_choice,
  check_float,
  check_same_shape,
)

ESTIMATORS = ("k1", "k2", "k3")


def k1(logprobs, ref_logprobs) -> Array:
  """The plain log-ratio d: unbiased for KL(policy || reference), of either sign.

      k1 = logprobs - ref_logprobs

  A token of probability 1/2 where the reference has 1/4 gives log 2:

  >>> round(float(k1(jnp.log(0.5), jnp.log(0.25))), 3)
  0.693

  Args:
    logprobs: any shape, float, of the sampled tokens under the policy, in nats.
    ref_logprobs: the same under the reference, in nats; a constant.

  Returns:
    The shape of `logprobs`, at least float32, in nats.

  Raises:
    ValueError: shapes differ, or dtypes are not float.

  Reference: Schulman, 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
  """
  return _log_ratio(logprobs, ref_logprobs)


def k2(logprobs, ref_logprobs) -> Array:
  """Half the squared log-ratio: biased as a value, right as a loss.

      k2 = (logprobs - ref_logprobs)^2 / 2

  A token of probability 1/2 where the reference has 1/4 gives (log 2)^2 / 2:

  >>> round(float(k2(jnp.log(0.5), jnp.log(0.25))), 3)
  0.24

  Args:
    logprobs: any shape, float, of the sampled tokens under the policy, in nats.
    ref_logprobs: the same under the reference, in nats; a constant.

  Returns:
    The shape of `logprobs`, at least float32.

  Raises:
    ValueError: shapes differ, or dtypes are not float.

  Reference: Schulman, 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
  """
  return jnp.square(_log_ratio(logprobs, ref_logprobs)) / 2


def k3(logprobs, ref_logprobs) -> Array:
  """The estimator that is unbiased and never negative: the one to report.

      k3 = exp(-d) + d - 1        d = logprobs - ref_logprobs, limited to +-20

  It is k1 plus exp(-d) - 1, a term with mean 0 that cancels most of k1's noise. A token of
  probability 1/2 where the reference has 1/4 gives 1/2 + log 2 - 1:

  >>> round(float(k3(jnp.log(0.5), jnp.log(0.25))), 3)
  0.193

  Args:
    logprobs: any shape, float, of the sampled tokens under the policy, in nats.
    ref_logprobs: the same under the reference, in nats; a constant.

  Returns:
    The shape of `logprobs`, at least float32, in nats. Beyond the limit, exp(20) = 4.9e8 says how
    far a policy has left its reference and stays finite; its gradient is 0.

  Raises:
    ValueError: shapes differ, or dtypes are not float.

  Reference: Schulman, 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
  """
  d = jnp.clip(_log_ratio(logprobs, ref_logprobs), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
  return jnp.expm1(-d) + d


def kl_penalty(logprobs, ref_logprobs, *, value="k3", gradient="k2", ratio=None) -> Array:
  """The value of one estimator with the gradient of another.

      penalty = stop_gradient(value) + gradient - stop_gradient(gradient)
      penalty = ratio * penalty                     if ratio is given

  By default its value is k3 and its gradient is that of k2, which is d itself, here log 2:

  >>> f = lambda x: kl_penalty(x, jnp.log(0.25))
  >>> [round(float(y), 3) for y in jax.value_and_grad(f)(jnp.log(0.5))]
  [0.193, 0.693]

  Tokens sampled by an older policy need importance weights, `ratio = exp(logprobs -
  old_logprobs)`. With "k3", differentiate through the ratio, since grad(ratio * k3) = ratio * d *
  grad(logprobs) (DeepSeek-V3.2; TRL). With "k2", pass `stop_gradient(ratio)`, which gives the same.

  Args:
    logprobs: any shape, float, of the sampled tokens under the policy, in nats.
    ref_logprobs: the same under the reference, in nats; a constant.
    value: the estimator to report, "k1", "k2" or "k3".
    gradient: the estimator to differentiate, "k1", "k2" or "k3".
    ratio: None, or the shape of `logprobs`: importance weights, differentiated through as they are
      passed.

  Returns:
    The shape of `logprobs`, at least float32, in nats. In k3, d is limited to +-20.

  Raises:
    ValueError: shapes differ, dtypes are not float, or an estimator is unknown.

  Reference: Tang and Munos, 2025, On a few pitfalls in KL divergence gradient estimation for RL,
    https://arxiv.org/abs/2506.09477
  """
  check_choice("value", value, ESTIMATORS)
  check_choice("gradient", gradient, ESTIMATORS)
  estimators = {"k1": k1, "k2": k2, "k3": k3}
  reported = jax.lax.stop_gradient(estimators[value](logprobs, ref_logprobs))
  differentiated = estimators[gradient](logprobs, ref_logprobs)
  penalty = reported + differentiated - jax.lax.stop_gradient(differentiated)
  if ratio is None:
    return penalty
  check_same_shape("ratio", ratio, "logprobs", logprobs)
  return at_least_float32(ratio) * penalty


def _log_ratio(logprobs, ref_logprobs):
  check_float("logprobs", logprobs)
  check_float("ref_logprobs", ref_logprobs)
  check_same_shape("ref_logprobs", ref_logprobs, "logprobs", logprobs)
  return at_least_float32(logprobs) - jax.lax.stop_gradient(at_least_float32(ref_logprobs))
