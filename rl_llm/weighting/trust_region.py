"""Factors that drop what has moved too far from the policy that sampled it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, check_members, check_same_shape
from rl_llm.weighting._arrays import check_rows, masked_difference, token_counts


def off_policy_mask(logprobs, sampler_logprobs, advantages, mask, *, threshold) -> Array:
  """Factors that drop bad responses the policy has already moved away from (DeepSeek-V3.2).

      factor = 0 where advantage < 0 and mean_t(sampler_logprobs - logprobs) > threshold, else 1

  The mean estimates KL(sampler || policy) on that response. A wrong answer that the policy would
  hardly give any more teaches little, and pushing it down further moves its probability to
  arbitrary places. A good answer is kept, however old. Both rows have fallen from 0.5 to 0.1, by
  log 5 = 1.61, which is above the limit, but only the first one was bad:

  >>> sampler, now = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.1], [0.1]]))
  >>> advantages, mask = jnp.array([-1.0, 1.0]), jnp.ones((2, 1), bool)
  >>> off_policy_mask(now, sampler, advantages, mask, threshold=1.0).tolist()
  [[0.0], [1.0]]

  Args:
    logprobs: [B, T] float, of the policy being trained, in nats; a constant here.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    advantages: [B] float; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    threshold: the mean log-ratio in nats above which a bad response is dropped.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask.

  Raises:
    ValueError: shapes differ.

  Reference: DeepSeek-AI, 2025, DeepSeek-V3.2, https://arxiv.org/abs/2512.02556
  """
  check_members(mask)
  check_same_shape("logprobs", logprobs, "mask", mask)
  check_same_shape("sampler_logprobs", sampler_logprobs, "mask", mask)
  check_rows("advantages", advantages, mask)
  moved = jnp.sum(masked_difference(sampler_logprobs, logprobs, mask), axis=1, keepdims=True)
  moved = moved / jnp.maximum(token_counts(mask), 1)
  dropped = (jnp.asarray(advantages)[:, None] < 0) & (moved > threshold)
  return jax.lax.stop_gradient((mask & ~dropped).astype(jnp.float32))
