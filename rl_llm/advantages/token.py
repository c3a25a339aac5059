"""How much better each token was than expected: returns, GAE, penalties, baselines."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.advantages.group import group_relative
from rl_llm.checks import (
  Array,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_choice,
  check_members,
  check_same_shape,
  is_number,
  one_width,
)
from rl_llm.masked import whiten


@any_mesh
def token_rewards(outcomes, mask, *, kl=None, kl_coef=0.0) -> Array:
  """Puts each outcome on its response's last token, and the KL penalty on every token.

      rewards[b, t] = outcomes[b] * 1[t is the last token of b] - kl_coef * kl[b, t]

  A reward of 1/2 at the end of two tokens that each cost 0.1 * 0.2:

  >>> rewards = token_rewards(jnp.array([0.5]), jnp.array([[True, True, False]]),
  ...                         kl=jnp.full((1, 3), 0.2), kl_coef=0.1)
  >>> [round(float(r), 3) for r in rewards[0]]
  [-0.02, 0.48, 0.0]

  Args:
    outcomes: [B], one reward per response; integers are converted, and 0.5 is never truncated.
    mask: [B, T] bool, the tokens the policy produced.
    kl: None, or [B, T] float, in nats; `kl.k1` is the right estimator here, as the reward is not
      differentiated.
    kl_coef: the penalty per nat.

  Returns:
    [B, T] float32 rewards; 0 outside the mask, and everywhere in a row without tokens.

  Raises:
    ValueError: shapes differ, or `mask` is not bool.

  Needs: samples, reward.

  Reference: Ouyang et al., 2022, Training language models to follow instructions with human
    feedback, https://arxiv.org/abs/2203.02155
  """
  check_members(mask)
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


@any_mesh
def discounted_returns(rewards, mask, *, discount=1.0) -> Array:
  """The discounted sum of the rewards still to come, at each token.

      G_t = r_t + discount * G_{t+1}

  A reward of 1 at the last of three tokens is halved with each step back:

  >>> rewards, mask = jnp.array([[0.0, 0.0, 1.0]]), jnp.ones((1, 3), bool)
  >>> discounted_returns(rewards, mask, discount=0.5).tolist()
  [[0.25, 0.5, 1.0]]

  Args:
    rewards: [B, T], such as from `token_rewards`.
    mask: [B, T] bool; tokens outside it are skipped, and t + 1 is the next one inside.
    discount: discount factor per token, between 0 and 1.

  Returns:
    [B, T] float32; 0 outside the mask.

  Raises:
    ValueError: shapes differ, `mask` is not bool, or `discount` is outside [0, 1].

  Needs: samples, reward.
  """
  check_between("discount", discount, 0, 1)
  check_members(mask)
  check_same_shape("rewards", rewards, "mask", mask)

  def step(following, reward_and_mask):
    reward, valid = reward_and_mask
    following = jnp.where(valid, reward + discount * following, following)
    return following, jnp.where(valid, following, 0)

  rewards = at_least_float32(rewards)
  discount = jnp.asarray(discount, rewards.dtype)
  return _backwards(step, _zeros(rewards), rewards, mask)


@any_mesh
def gae(
  rewards, values, mask, *, discount=1.0, gae_lambda=0.95, bootstrap=None
) -> tuple[Array, Array]:
  """Generalised advantage estimation: a dial between the value network and sampled rewards.

      delta_t = r_t + discount * V_{t+1} - V_t
      A_t     = delta_t + discount * gae_lambda * A_{t+1}
      returns = A + V

  With gae_lambda 0 the advantage is the one-step surprise delta: little noise, but wrong where V is
  wrong. With 1 it is the return minus V: right on average, but noisy. Two tokens have values 0.4
  and 0.6, and a reward of 1 at the end. The surprises are 0.2 and 0.4, and half of the second is
  credited to the first:

  >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.4, 0.6]])
  >>> advantages, returns = gae(rewards, values, jnp.ones((1, 2), bool), gae_lambda=0.5)
  >>> [round(float(a), 3) for a in advantages[0]], [round(float(r), 3) for r in returns[0]]
  ([0.4, 0.4], [0.8, 1.0])

  Args:
    rewards: [B, T], such as from `token_rewards`.
    values: [B, T] float, the value network's expectation before token t is chosen.
    mask: [B, T] bool; tokens outside it are skipped, and t + 1 is the next one inside.
    discount: discount factor per token, between 0 and 1.
    gae_lambda: between 0 and 1; a scalar, or [B] such as from `length_adaptive_lambda`.
    bootstrap: None, or [B] float, the value after the last token, for responses that were cut off
      rather than ended. None is 0.

  Returns:
    advantages and returns (the value network's targets), each [B, T] float32, 0 outside the mask.

  Raises:
    ValueError: shapes differ, `mask` is not bool, or `discount` or `gae_lambda` is outside [0, 1].

  Needs: samples, reward, value network.

  Reference: Schulman et al., 2015, High-Dimensional Continuous Control Using GAE,
    https://arxiv.org/abs/1506.02438
  """
  check_between("discount", discount, 0, 1)
  check_between("gae_lambda", gae_lambda, 0, 1)
  check_members(mask)
  check_same_shape("rewards", rewards, "mask", mask)
  check_same_shape("values", values, "mask", mask)
  per_row = jnp.shape(mask)[:1]
  if jnp.shape(gae_lambda) not in ((), per_row):
    raise ValueError(
      f"gae_lambda has shape {jnp.shape(gae_lambda)}; it must be a scalar or [B] = {per_row}."
    )
  if bootstrap is not None and jnp.shape(bootstrap) != per_row:
    raise ValueError(f"bootstrap has shape {jnp.shape(bootstrap)}; it must be [B] = {per_row}.")
  rewards, values, *end = one_width(rewards, values, *[] if bootstrap is None else [bootstrap])
  end = end[0] if end else _zeros(values)
  discount, gae_lambda = (jnp.asarray(x, values.dtype) for x in (discount, gae_lambda))

  def step(following, inputs):
    next_value, next_advantage = following
    reward, value, valid = inputs
    delta = reward + discount * next_value - value
    advantage = delta + discount * gae_lambda * next_advantage
    following = jnp.where(valid, value, next_value), jnp.where(valid, advantage, next_advantage)
    return following, jnp.where(valid, advantage, 0)

  advantages = _backwards(step, (end, _zeros(values)), rewards, values, mask)
  return advantages, jnp.where(mask, advantages + values, 0)


def length_adaptive_lambda(mask, *, alpha=0.05) -> Array:
  """VAPO's lambda for `gae`: the longer the response, the closer to 1.

      gae_lambda = max(0, 1 - 1 / (alpha * n))        n = tokens of the response

  The reward at the end reaches a token k steps before it with the factor lambda^k. With lambda 0.95
  nothing of it is left after 1,000 tokens (0.95^1000 = 5e-23). Here every advantage looks ahead
  over a fixed share alpha of the response's length, for 1,000 tokens over 50 of them:

  >>> round(float(length_adaptive_lambda(jnp.ones((1, 1000), bool))[0]), 3)
  0.98

  VAPO uses it only for the policy: its value network is trained on the returns of another `gae`
  with lambda 1.

  Args:
    mask: [B, T] bool, the tokens the policy produced.
    alpha: the share of a response over which advantages look ahead, > 0.

  Returns:
    [B] float32 between 0 and 1; 0 for responses of at most 1 / alpha tokens.

  Raises:
    ValueError: `mask` is not a bool array of two axes, or `alpha` is not above 0.

  Needs: samples.

  Reference: Yue et al., 2025, VAPO, https://arxiv.org/abs/2504.05118
  """
  check_above("alpha", alpha, 0)
  check_members(mask)
  length = jnp.sum(mask, axis=1).astype(jnp.float32)
  return jnp.maximum(0, 1 - 1 / (alpha * jnp.maximum(length, 1)))


def reinforce_plus_plus(rewards, mask, *, discount=1.0, ddof=1, eps=1e-8) -> Array:
  """REINFORCE++'s advantage: returns, whitened over all tokens of the batch.

      G          = discounted_returns(rewards, mask)
      advantages = (G - mean(G)) / sqrt(var(G) + eps)

  One response per prompt is enough, since the batch is the baseline. So every answer to an easy
  prompt looks good; `reinforce_plus_plus_baseline` first compares within the prompt. Returns of 1
  and 0 lie half a unit, which is one standard deviation (ddof 0), from their mean:

  >>> rewards, mask = jnp.array([[1.0], [0.0]]), jnp.ones((2, 1), bool)
  >>> [round(float(a), 3) for a in reinforce_plus_plus(rewards, mask, ddof=0)[:, 0]]
  [1.0, -1.0]

  Long responses weigh more in both statistics, as each token is one item.

  Args:
    rewards: [B, T], such as from `token_rewards`, with the KL in it.
    mask: [B, T] bool; tokens outside it are skipped.
    discount: discount factor per token, between 0 and 1.
    ddof: of the variance; OpenRLHF has 0, most others 1.
    eps: added to the variance, > 0.

  Returns:
    [B, T] float32; 0 outside the mask.

  Raises:
    ValueError: shapes differ, `mask` is not bool, or `eps` is not above 0.

  Needs: samples, reward.

  Reference: Hu et al., 2025, REINFORCE++, https://arxiv.org/abs/2501.03262
  """
  check_above("eps", eps, 0)
  return whiten(discounted_returns(rewards, mask, discount=discount), mask, ddof=ddof, eps=eps)


@any_mesh
def reinforce_plus_plus_baseline(
  rewards, mask, *, ddof=1, eps=1e-8, singleton="zero", where=None
) -> Array:
  """REINFORCE++-baseline: centred within each prompt, whitened over all tokens of the batch.

      centred    = rewards - mean of its group
      advantages = centred on each token, divided by the spread over all tokens of the batch

  GRPO divides by each prompt's own spread, which gives more weight to prompts that are nearly
  always or nearly never solved; here all share one divisor.

  >>> advantages = reinforce_plus_plus_baseline(jnp.array([[1, 0]]), jnp.ones((2, 1), bool), ddof=0)
  >>> [round(float(a), 3) for a in advantages[:, 0]]
  [1.0, -1.0]

  Args:
    rewards: [P, G], G responses to each of P prompts.
    mask: [B, T] bool, the tokens the policy produced; rows are `b = p * G + g`.
    ddof: of the variance; OpenRLHF has 0, most others 1.
    eps: added to the variance, > 0.
    singleton: what a group of one has before whitening, "zero" or "raw", its reward (verl).
    where: None, or [P, G] bool, as in `group_relative`.

  Returns:
    [B, T] float32; 0 outside the mask.

  Raises:
    ValueError: shapes differ, a mask is not bool, or `eps` is not above 0.

  Needs: samples, reward, several responses.

  Reference: Hu et al., 2025, REINFORCE++, https://arxiv.org/abs/2501.03262
  """
  check_above("eps", eps, 0)
  centred = group_relative(rewards, scale="none", singleton=singleton, where=where).reshape(-1, 1)
  check_members(mask)
  mask = jnp.asarray(mask)
  if centred.size != mask.shape[0]:
    raise ValueError(f"mask has shape {mask.shape}; it needs P * G = {centred.size} rows.")
  if where is not None:
    mask = mask & jnp.reshape(where, (-1, 1))
  return whiten(jnp.broadcast_to(centred, mask.shape), mask, ddof=ddof, eps=eps)


@any_mesh
def optimal_token_baseline(
  returns, logprobs, sum_of_squares, mask, *, group_size, singleton="zero"
) -> Array:
  """Subtracts the baseline with the least variance at each token, given the gradient so far.

      W_t = sum_{s <= t} (1 - 2 * p_s + sum_v p_s(v)^2)    p_s = exp(logprobs_s)
      B_t = sum_j W_jt G_jt / sum_j W_jt                   over the responses j of the prompt
      advantages = G - B

  A response whose tokens were surprising has a large gradient, and its return affects the update
  most, so the baseline should be closest to that return. The squared distance between one-hot and
  softmax, summed up to t, stands in for the gradient's norm. Of two responses the first took a
  token of probability 1/2 among two (W 1/2), the second a certain one (W 0), so the baseline is the
  return of the first:

  >>> returns, logprobs = jnp.array([[1.0], [0.0]]), jnp.log(jnp.array([[0.5], [1.0]]))
  >>> advantages = optimal_token_baseline(
  ...   returns, logprobs, jnp.array([[0.5], [1.0]]), jnp.ones((2, 1), bool), group_size=2)
  >>> advantages.tolist()
  [[0.0], [-1.0]]

  Args:
    returns: [B, T], such as from `discounted_returns`; rows are `b = p * group_size + g`.
    logprobs: [B, T] float, of the sampled tokens, in nats.
    sum_of_squares: [B, T] float, the sum of the squared probabilities of all tokens.
    mask: [B, T] bool, the tokens the policy produced.
    group_size: G, responses per prompt.
    singleton: where only one response of the group has a token at t, as at the end of the longest,
      "zero" follows the formula (its baseline is its own return) and "raw" keeps its return.

  Returns:
    [B, T] float32; 0 outside the mask.

  Raises:
    ValueError: shapes differ, `mask` is not bool, or B is not a multiple of `group_size`.

  Needs: samples, reward, several responses, vocabulary.

  Reference: Li et al., 2026, The Optimal Token Baseline, https://arxiv.org/abs/2602.07078
  """
  check_choice("singleton", singleton, ("zero", "raw"))
  check_members(mask)
  check_same_shape("returns", returns, "mask", mask)
  check_same_shape("logprobs", logprobs, "mask", mask)
  check_same_shape("sum_of_squares", sum_of_squares, "mask", mask)
  rows, length = jnp.shape(mask)
  if group_size < 1 or rows % group_size:
    raise ValueError(f"group_size is {group_size}; it must divide the rows of mask, {rows}.")
  shape = (rows // group_size, group_size, length)
  returns = jnp.where(mask, at_least_float32(returns), 0)
  p = jnp.exp(at_least_float32(logprobs))
  distance = jnp.where(mask, jnp.maximum(1 - 2 * p + at_least_float32(sum_of_squares), 0), 0)
  moved = jnp.where(mask, jnp.cumsum(distance, axis=1), 0).reshape(shape)
  total = jnp.sum(moved, axis=1, keepdims=True)
  baseline = jnp.sum(moved * returns.reshape(shape), axis=1, keepdims=True)
  baseline = baseline / jnp.where(total > 0, total, 1)
  advantages = (returns.reshape(shape) - baseline).reshape(rows, length)
  alone = jnp.sum(jnp.reshape(mask, shape), axis=1, keepdims=True) == 1
  alone = jnp.broadcast_to(alone, moved.shape).reshape(rows, length)
  return jnp.where(mask, jnp.where(alone, returns if singleton == "raw" else 0, advantages), 0)


def overlong_penalty(lengths, *, limit, cache) -> Array:
  """DAPO's soft penalty for length, to be added to the reward.

      penalty = clip((limit - cache - n) / cache, -1, 0)

  With a hard limit, a good answer that needed one more token earns no more than nonsense. Here the
  penalty grows over the last `cache` tokens before the limit. Limit 100, cache 20:

  >>> overlong_penalty(jnp.array([80, 90, 100, 120]), limit=100, cache=20).tolist()
  [0.0, -0.5, -1.0, -1.0]

  Lengths are in tokens, as the sampler reports them, not in characters.

  Args:
    lengths: any shape, tokens of each response.
    limit: the length from which the full penalty applies, > 0.
    cache: over how many tokens before it the penalty grows, > 0 and at most `limit`.

  Returns:
    The shape of `lengths`, float32 between -1 and 0.

  Raises:
    ValueError: `limit` or `cache` is not above 0, or `cache` is above `limit`.

  Needs: samples.

  Reference: Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476
  """
  check_above("limit", limit, 0)
  check_above("cache", cache, 0)
  if is_number(limit):
    check_between("cache", cache, 0, limit)
  return jnp.clip((limit - cache - at_least_float32(lengths)) / cache, -1, 0)


def _zeros(x):
  """[B] zeros, as an empty sum, so that they vary over the devices that x does."""
  return jnp.sum(x[:, :0], axis=1)


def _backwards(step, carry, *arrays):
  """Runs `step` from the last token to the first; `arrays` and the result are [B, T]."""
  _, outputs = jax.lax.scan(step, carry, tuple(jnp.asarray(x).T for x in arrays), reverse=True)
  return outputs.T
