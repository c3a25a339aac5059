"""From rewards to advantages: how much better each response, or token, was than expected.

Advantages are statistics of the whole batch: compute them before it is split into microbatches or
over devices. They enter a loss as constants.

Tokens outside the mask (padding, or what a tool wrote into the row) are *skipped*: they receive 0,
and recursions over time pass over them as if the tokens on both sides were neighbours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.masked import masked_mean, masked_var
from rl_llm.types import (
  Array,
  at_least_float32,
  check_above,
  check_choice,
  check_mask,
  check_ndim,
  check_same_shape,
)


def token_rewards(outcomes, mask, *, kl=None, kl_coef=0.0) -> Array:
  """Puts each outcome on its response's last token, and the price of the KL on every token.

      rewards[b, t] = outcomes[b] * 1[t is the last token of b] - kl_coef * kl[b, t]

  A reward of 1/2 at the end of two tokens, each of which costs 0.1 * 0.2:

  >>> rewards = token_rewards(jnp.array([0.5]), jnp.array([[True, True, False]]),
  ...                         kl=jnp.full((1, 3), 0.2), kl_coef=0.1)
  >>> [round(float(r), 3) for r in rewards[0]]
  [-0.02, 0.48, 0.0]

  Args:
    outcomes: [B], one reward per response; integers are converted, a reward of 0.5 is never
      truncated.
    mask: [B, T] bool, the tokens the policy produced.
    kl: None, or [B, T] float, in nats; `kl.k1` is the right estimator here, as the reward is not
      differentiated.
    kl_coef: how much a nat costs.

  Returns:
    [B, T] float32 rewards; 0 outside the mask, and everywhere in a row without tokens.

  Raises:
    ValueError: shapes differ, or `mask` is not bool.

  Reference: Ouyang et al., 2022, Training language models to follow instructions with human
    feedback, https://arxiv.org/abs/2203.02155
  """
  _check_mask(mask)
  if jnp.shape(outcomes) != jnp.shape(mask)[:1]:
    raise ValueError(
      f"outcomes has shape {jnp.shape(outcomes)}; it must be [B] = {jnp.shape(mask)[:1]}."
    )
  mask = jnp.asarray(mask)
  tokens_after = jnp.sum(mask, axis=1, keepdims=True) - jnp.cumsum(mask, axis=1)
  is_last = mask & (tokens_after == 0)
  rewards = jnp.where(is_last, at_least_float32(outcomes)[:, None], 0)
  if kl is None:
    return rewards
  check_same_shape("kl", kl, "mask", mask)
  return rewards - kl_coef * jnp.where(mask, at_least_float32(kl), 0)


def discounted_returns(rewards, mask, *, discount=1.0) -> Array:
  """The sum of the rewards still to come, at each token.

      G_t = r_t + discount * G_{t+1}

  A reward of 1 after three tokens, each step back halving it:

  >>> rewards, mask = jnp.array([[0.0, 0.0, 1.0]]), jnp.ones((1, 3), bool)
  >>> discounted_returns(rewards, mask, discount=0.5).tolist()
  [[0.25, 0.5, 1.0]]

  Args:
    rewards: [B, T], such as from `token_rewards`.
    mask: [B, T] bool; tokens outside it are skipped, and t + 1 is the next one inside.
    discount: between 0 and 1.

  Returns:
    [B, T] float32; 0 outside the mask.

  Raises:
    ValueError: shapes differ, or `mask` is not bool.
  """
  _check_mask(mask)
  check_same_shape("rewards", rewards, "mask", mask)

  def step(following, reward_and_mask):
    reward, valid = reward_and_mask
    following = jnp.where(valid, reward + discount * following, following)
    return following, jnp.where(valid, following, 0)

  rewards = at_least_float32(rewards)
  return _backwards(step, jnp.zeros_like(rewards[:, 0]), rewards, mask)


def gae(
  rewards, values, mask, *, discount=1.0, gae_lambda=0.95, bootstrap=None
) -> tuple[Array, Array]:
  """Generalised advantage estimation: a dial between the value network and sampled rewards.

      delta_t = r_t + discount * V_{t+1} - V_t
      A_t     = delta_t + discount * gae_lambda * A_{t+1}
      returns = A + V

  With gae_lambda 0 the advantage is the one-step surprise delta: little noise, but wrong where V
  is. With 1 it is the return minus V: right on average, and noisy. Two tokens, values 0.4 and 0.6,
  a reward of 1 at the end: the surprises are 0.2 and 0.4, and half of the second belongs to the
  first:

  >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.4, 0.6]])
  >>> advantages, returns = gae(rewards, values, jnp.ones((1, 2), bool), gae_lambda=0.5)
  >>> [round(float(a), 3) for a in advantages[0]], [round(float(r), 3) for r in returns[0]]
  ([0.4, 0.4], [0.8, 1.0])

  Args:
    rewards: [B, T], such as from `token_rewards`.
    values: [B, T] float, the value network's expectation before token t is chosen.
    mask: [B, T] bool; tokens outside it are skipped, and t + 1 is the next one inside.
    discount: between 0 and 1.
    gae_lambda: between 0 and 1.
    bootstrap: None, or [B] float, the value after the last token: for responses that were cut off,
      not ended. None is 0.

  Returns:
    advantages and returns (the value network's targets), each [B, T] float32, 0 outside the mask.

  Raises:
    ValueError: shapes differ, or `mask` is not bool.

  Reference: Schulman et al., 2015, High-Dimensional Continuous Control Using GAE,
    https://arxiv.org/abs/1506.02438
  """
  _check_mask(mask)
  check_same_shape("rewards", rewards, "mask", mask)
  check_same_shape("values", values, "mask", mask)
  rewards, values = at_least_float32(rewards), at_least_float32(values)
  end = jnp.zeros_like(values[:, 0])
  if bootstrap is not None:
    if jnp.shape(bootstrap) != end.shape:
      raise ValueError(f"bootstrap has shape {jnp.shape(bootstrap)}; it must be [B] = {end.shape}.")
    end = end + bootstrap

  def step(following, inputs):
    next_value, next_advantage = following
    reward, value, valid = inputs
    delta = reward + discount * next_value - value
    advantage = delta + discount * gae_lambda * next_advantage
    following = jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage)
    return following, jnp.where(valid, advantage, 0)

  advantages = _backwards(step, (end, jnp.zeros_like(end)), rewards, values, mask)
  return advantages, jnp.where(mask, advantages + values, 0)


def group_relative(
  rewards, *, scale="std", ddof=1, eps=1e-6, baseline="mean", where=None
) -> Array:
  """GRPO's advantage: how a response compares with the others to the same prompt.

      advantage = (reward - mean of its group) / (std of its group + eps)

  The other responses replace PPO's value network. One right answer among four, mean 1/4, std 1/2
  (ddof 1):

  >>> [round(float(a), 2) for a in group_relative(jnp.array([[1, 0, 0, 0]]))[0]]
  [1.5, -0.5, -0.5, -0.5]

  A common misconception is that an all-right group rewards the model. It has no spread, so it
  teaches nothing:

  >>> group_relative(jnp.array([[0.1, 0.1, 0.1]])).tolist()
  [[0.0, 0.0, 0.0]]

  Published systems that all say GRPO differ in `ddof` and `eps` (`rl_llm.presets`); Dr. GRPO drops
  the division, which makes prompts that are nearly always or nearly never solved count more:

  >>> group_relative(jnp.array([[1, 0, 0, 0]]), scale="none").tolist()
  [[0.75, -0.25, -0.25, -0.25]]

  Args:
    rewards: [P, G], G responses to each of P prompts; integers are converted to float.
    scale: "std" divides by the group's standard deviation + `eps`, "batch" by that of all rewards,
      "none" not at all.
    ddof: of the standard deviation, 1 divides by G - 1.
    eps: added to the standard deviation, > 0.
    baseline: "mean" of the group, or "leave_one_out", the mean of the *other* responses (RLOO).
    where: None, or [P, G] bool; False marks a reward that failed. It enters no statistic, and its
      advantage is 0.

  Returns:
    [P, G] float32; exactly 0 in a group without spread and in a group of one.

  Raises:
    ValueError: shapes differ, a name is unknown, or `eps` is not above 0.

  Reference: Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300
  """
  check_choice("scale", scale, ("std", "batch", "none"))
  check_choice("baseline", baseline, ("mean", "leave_one_out"))
  check_above("eps", eps, 0)
  check_ndim("rewards", rewards, 2, "[P, G]: reshape(P, G)")
  rewards = at_least_float32(rewards)
  where = jnp.ones(rewards.shape, bool) if where is None else jnp.asarray(where)
  check_mask("where", where)
  check_same_shape("where", where, "rewards", rewards)
  # Equal rewards must give exactly 0, and their rounded mean may differ from them by one digit,
  # which dividing by a std near 0 would blow up. Subtracting one of them first makes all of them 0.
  anchor = jnp.max(jnp.where(where, rewards, -jnp.inf), axis=1, keepdims=True)
  shifted = jnp.where(where, rewards - anchor, 0)
  advantages = shifted - masked_mean(shifted, where, axis=1)[:, None]
  if baseline == "leave_one_out":
    count = jnp.sum(where, axis=1, keepdims=True)
    advantages = advantages * (count / jnp.maximum(count - 1, 1))
  if scale == "std":
    advantages = advantages / (jnp.sqrt(masked_var(shifted, where, 1, ddof=ddof))[:, None] + eps)
  elif scale == "batch":
    advantages = advantages / (jnp.sqrt(masked_var(rewards, where, ddof=ddof)) + eps)
  return jnp.where(where & (jnp.sum(where, axis=1, keepdims=True) > 1), advantages, 0)


def leave_one_out(rewards, *, where=None) -> Array:
  """RLOO's advantage: the reward minus the mean reward of the other responses to the prompt.

      advantage_i = R_i - sum_{j != i} R_j / (G - 1) = (R_i - mean) * G / (G - 1)

  A baseline must not depend on the response it is subtracted from, or the gradient is biased (here
  only by the factor above). One right answer among four: the others have the mean 0 for it, and 1/3
  for each wrong one:

  >>> [round(float(a), 3) for a in leave_one_out(jnp.array([[1, 0, 0, 0]]))[0]]
  [1.0, -0.333, -0.333, -0.333]

  Args:
    rewards: [P, G], G responses to each of P prompts; integers are converted to float.
    where: None, or [P, G] bool; False marks a reward that failed. It enters no statistic, and its
      advantage is 0.

  Returns:
    [P, G] float32; 0 in a group of one.

  Raises:
    ValueError: shapes differ.

  Reference: Ahmadian et al., 2024, Back to Basics, https://arxiv.org/abs/2402.14740
  """
  return group_relative(rewards, scale="none", baseline="leave_one_out", where=where)


def _check_mask(mask):
  check_mask("mask", mask)
  check_ndim("mask", mask, 2, "[B, T]")


def _backwards(step, carry, *arrays):
  """Runs `step` from the last token to the first; `arrays` and the result are [B, T]."""
  _, outputs = jax.lax.scan(step, carry, tuple(jnp.asarray(x).T for x in arrays), reverse=True)
  return outputs.T
