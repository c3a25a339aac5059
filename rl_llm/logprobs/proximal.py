"""The proximal policy's log-probs without a pass of their own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, at_least_float32, check_members, check_same_shape


def proximal_logprobs(logprobs, sampler_logprobs, mask, *, updates) -> Array:
  """A-3PO: what the policy said one update ago, guessed from the sampler and from now.

      share    = (updates - 1) / updates                        0 where updates is 0 or 1
      proximal = sampler_logprobs + share * (logprobs - sampler_logprobs)

  Decoupled PPO clips against a recent policy, whatever old policy sampled the tokens, which costs a
  forward pass of that recent policy in every step. It lies between the sampler, `updates` updates
  ago, and the policy being trained; the guess is as far along as its age says. A token sampled four
  updates ago, which has risen by 0.8 nats since, had risen by 0.6 one update ago:

  >>> now, sampler, mask = jnp.array([[-1.0]]), jnp.array([[-1.8]]), jnp.ones((1, 1), bool)
  >>> proximal_logprobs(now, sampler, mask, updates=jnp.array([[4]])).round(3).tolist()
  [[-1.2000000476837158]]

  Pass it to `ppo_loss` as `old_logprobs`, and to `truncated_importance` likewise. Where the sampler
  is one update old it is the sampler itself.

  Args:
    logprobs: [B, T] float, of the policy being trained, in nats; a constant here.
    sampler_logprobs: [B, T] float, of the policy that sampled the tokens, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    updates: [B, T] int, how many updates lie between the two, of each token.

  Returns:
    [B, T] float32, without gradient; 0 outside the mask.

  Raises:
    ValueError: shapes differ.

  Reference: A-3PO, 2025, https://arxiv.org/abs/2512.06547, as AReaL's code has it ("loglinear");
    decoupled PPO: Fu et al., 2025, AReaL, https://arxiv.org/abs/2505.24298
  """
  check_members(mask)
  for name, x in (
    ("logprobs", logprobs),
    ("sampler_logprobs", sampler_logprobs),
    ("updates", updates),
  ):
    check_same_shape(name, x, "mask", mask)
  now, sampler = (jnp.where(mask, at_least_float32(x), 0) for x in (logprobs, sampler_logprobs))
  updates = jnp.maximum(jnp.asarray(updates), 1).astype(now.dtype)
  return jax.lax.stop_gradient(sampler + (updates - 1) / updates * (now - sampler))
