"""Baselines from other responses than those that are trained on: the reference's, or earlier ones.

Import them from `rl_llm.advantages`.
"""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.advantages.group import _groups
from rl_llm.checks import Array, check_above


def optimal_advantage(
  rewards, ref_rewards, *, temperature=0.5, ref_where=None, where=None
) -> Array:
  """A*-PO's advantage: the reward minus what the best policy near the reference would get.

      V*        = temperature * log(mean_j exp(ref_reward_j / temperature))
      advantage = reward - V*

  Under a KL penalty the value of the best policy needs no training to be known: it is a soft
  maximum of the rewards of the reference's own responses, drawn once before training. One of four
  was right. At temperature 1 the best policy stays near the reference, and V* near the mean of 1/4;
  at 0.1 it may leave it, and V* is near the maximum:

  >>> none, drawn = jnp.zeros((1, 1)), jnp.array([[1.0, 0.0, 0.0, 0.0]])
  >>> value = lambda t: -optimal_advantage(none, drawn, temperature=t)[0, 0]
  >>> round(float(value(1.0)), 2), round(float(value(0.1)), 2)
  (0.36, 0.86)

  A common misconception is that this is GRPO with a bigger group. The baseline is not the mean of
  what the policy gets, so advantages need not sum to 0: a policy better than V* has positive ones
  alone. Use it with `astar_po_loss`, whose loss is 0 there.

  Args:
    rewards: [P, G], of G responses by the policy to each of P prompts.
    ref_rewards: [P, N], of N responses by the reference to each of them; the paper has N = 8.
    temperature: reward per nat, > 0; the paper's beta 1.
    ref_where: None, or [P, N] bool; False marks a reward that failed, which V* leaves out.
    where: None, or [P, G] bool; False marks a reward that failed, whose advantage is 0.

  Returns:
    [P, G] float32; 0 for a prompt without a reward of the reference.

  Raises:
    ValueError: shapes differ, or `temperature` is not above 0.

  Needs: samples, reward, reference responses.

  Reference: Brantley et al., 2025, Accelerating RL for LLM Reasoning with Optimal Advantage
    Regression, https://arxiv.org/abs/2505.20686
  """
  check_above("temperature", temperature, 0)
  rewards, where = _groups(rewards, where)
  ref_rewards, ref_where = _groups(ref_rewards, ref_where, "ref_rewards", "ref_where")
  if ref_rewards.shape[0] != rewards.shape[0]:
    raise ValueError(
      f"ref_rewards has {ref_rewards.shape[0]} rows; it must have one for each of the "
      f"{rewards.shape[0]} prompts of rewards."
    )
  known = jnp.any(ref_where, axis=1, keepdims=True)
  top = jnp.max(ref_rewards, axis=1, keepdims=True, where=ref_where, initial=-jnp.inf)
  top = jnp.where(known, top, 0)
  shifted = jnp.where(ref_where, (ref_rewards - top) / temperature, 0)
  total = jnp.sum(jnp.where(ref_where, jnp.exp(shifted), 0), axis=1, keepdims=True)
  count = jnp.sum(ref_where, axis=1, keepdims=True).astype(total.dtype)
  value = top + temperature * jnp.log(jnp.where(known, total, 1) / jnp.where(known, count, 1))
  return jnp.where(where & known, rewards - value, 0)
