"""Advantages that compare the responses to one prompt: [P, G] rewards in, [P, G] advantages out.

Import them from `rl_llm.advantages`, which also has those over tokens. They are statistics of the
whole batch: compute them before it is split into microbatches or over devices.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  Array,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_choice,
  check_mask,
  check_ndim,
  check_same_shape,
)
from rl_llm.masked import masked_mean, masked_sum, masked_var


def group_relative(
  rewards,
  *,
  scale: Literal["std", "batch", "leave_one_out", "none"] = "std",
  ddof=1,
  eps=1e-6,
  baseline: Literal["mean", "leave_one_out"] = "mean",
  singleton: Literal["zero", "raw"] = "zero",
  eps_rule: Literal["add", "max"] = "add",
  where=None,
) -> Array:
  """GRPO's advantage: how a response compares with the others to the same prompt.

      advantage = (reward - mean of its group) / (std of its group + eps)

  The other responses replace PPO's value network. With one right answer among four, the mean is 1/4
  and the std 1/2 (ddof 1):

  >>> [round(float(a), 2) for a in group_relative(jnp.array([[1, 0, 0, 0]]))[0]]
  [1.5, -0.5, -0.5, -0.5]

  A common misconception is that an all-right group rewards the model. It has no spread, so it
  teaches nothing:

  >>> group_relative(jnp.array([[0.1, 0.1, 0.1]])).tolist()
  [[0.0, 0.0, 0.0]]

  Published systems that are all called GRPO differ in `ddof` and `eps` (`rl_llm.presets`). Dr. GRPO
  drops the division, which gives more weight to prompts that are nearly always or never solved:

  >>> group_relative(jnp.array([[1, 0, 0, 0]]), scale="none").tolist()
  [[0.75, -0.25, -0.25, -0.25]]

  Args:
    rewards: [P, G], G responses to each of P prompts; integers are converted to float.
    scale: "std" divides by the group's standard deviation + `eps`, "batch" by that of all rewards,
      "leave_one_out" by that of the *other* responses, where they differ (NeMo), "none" not at all.
    ddof: degrees of freedom of the standard deviation: 1 divides by G - 1, 0 by G.
    eps: added to the standard deviation, > 0.
    baseline: "mean" of the group, or "leave_one_out", the mean of the *other* responses (RLOO).
    singleton: what a group of one gets, "zero" or "raw", its reward (verl, SkyRL).
    eps_rule: "add" divides by std + eps, "max" by max(std, eps) (Simply).
    where: None, or [P, G] bool; False marks a reward that failed. It enters no statistic, and its
      advantage is 0. Where nan means "does not apply", as in TRL, pass `~isnan(rewards)`; an
      unmarked nan stays nan.

  Returns:
    [P, G] float32; exactly 0 in a group without spread, and by default in a group of one.

  Raises:
    ValueError: shapes differ, a name is unknown, or `eps` is not above 0.

  Needs: samples, reward, several responses.

  Reference: Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300
  """
  check_choice("scale", scale, ("std", "batch", "leave_one_out", "none"))
  check_choice("baseline", baseline, ("mean", "leave_one_out"))
  check_choice("singleton", singleton, ("zero", "raw"))
  check_choice("eps_rule", eps_rule, ("add", "max"))
  check_above("eps", eps, 0)
  check_between("ddof", ddof, 0, 1)
  rewards, where = _groups(rewards, where)
  count = jnp.sum(where, axis=1, keepdims=True)
  shifted = _shifted(rewards, where)
  advantages = shifted - masked_mean(shifted, where, axis=1)[:, None]
  if baseline == "leave_one_out":
    others = jnp.maximum(count - 1, 1).astype(rewards.dtype)
    advantages = advantages * (count.astype(rewards.dtype) / others)
  if scale != "none":
    if scale == "std":
      std = _std(shifted, where, 1, ddof)[:, None]
    elif scale == "batch":
      std = _std(rewards, where, None, ddof)
    else:
      std = _std_of_others(shifted, where, ddof)
    divisor = std + eps if eps_rule == "add" else jnp.maximum(std, eps)
    advantages = advantages / jnp.where((std > 0) | (scale != "leave_one_out"), divisor, 1)
  advantages = jnp.where(where & (count > 1), advantages, 0)
  return _with_singletons(advantages, rewards, where, singleton)


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

  Needs: samples, reward, several responses.

  Reference: Ahmadian et al., 2024, Back to Basics, https://arxiv.org/abs/2402.14740
  """
  return group_relative(rewards, scale="none", baseline="leave_one_out", where=where)


def remax(rewards, greedy_rewards, *, where=None) -> Array:
  """ReMax's advantage: the reward minus that of the greedy response to the same prompt.

      advantage = R - R(greedy)

  One greedy decode per prompt stands in for a value network. It is not part of the batch, so the
  baseline does not depend on any sampled response. The greedy answer was half right:

  >>> remax(jnp.array([[1.0, 0.0]]), jnp.array([0.5])).tolist()
  [[0.5, -0.5]]

  With rewards on several tokens it is the baseline of each return:
  `discounted_returns(rewards, mask) - greedy_rewards[:, None]`.

  Args:
    rewards: [P, G], G responses to each of P prompts; ReMax has G = 1.
    greedy_rewards: [P], of the response decoded at temperature 0.
    where: None, or [P, G] bool; False marks a reward that failed, whose advantage is 0.

  Returns:
    [P, G] float32.

  Raises:
    ValueError: shapes differ.

  Needs: samples, reward, greedy response.

  Reference: Li et al., 2023, ReMax, https://arxiv.org/abs/2310.10505
  """
  rewards, where = _groups(rewards, where)
  if jnp.shape(greedy_rewards) != rewards.shape[:1]:
    raise ValueError(
      f"greedy_rewards has shape {jnp.shape(greedy_rewards)}; it must be [P] = {rewards.shape[:1]}."
    )
  return jnp.where(where, rewards - at_least_float32(greedy_rewards)[:, None], 0)


def opo(rewards, lengths, *, singleton: Literal["zero", "raw"] = "zero", where=None) -> Array:
  """OPO's advantage: the reward minus the length-weighted mean of its group.

      advantage_i = R_i - sum_j n_j R_j / sum_j n_j

  The baseline with the least variance weights each reward by the squared norm of its response's
  gradient, which grows roughly with its length. A right answer of 3 tokens and a wrong one of 1:

  >>> opo(jnp.array([[1, 0]]), jnp.array([[3, 1]])).tolist()
  [[0.25, -0.75]]

  Args:
    rewards: [P, G], G responses to each of P prompts.
    lengths: [P, G], in tokens.
    singleton: what a group of one gets, "zero" or "raw", its reward (verl).
    where: None, or [P, G] bool; False marks a reward that failed, whose advantage is 0.

  Returns:
    [P, G] float32; by default 0 in a group of one.

  Raises:
    ValueError: shapes differ, or `singleton` is unknown.

  Needs: samples, reward, several responses.

  Reference: Hao et al., 2025, On-Policy RL with Optimal Reward Baseline,
    https://arxiv.org/abs/2505.23585
  """
  check_choice("singleton", singleton, ("zero", "raw"))
  rewards, where = _groups(rewards, where)
  check_same_shape("lengths", lengths, "rewards", rewards)
  lengths, shifted = jnp.asarray(lengths, rewards.dtype), _shifted(rewards, where)
  total = masked_sum(lengths, where, 1)[:, None]
  mean = masked_sum(lengths * shifted, where, 1)[:, None] / jnp.where(total > 0, total, 1)
  advantages = jnp.where(where, shifted - mean, 0)
  return _with_singletons(advantages, rewards, where, singleton)


def gpg(
  rewards,
  *,
  alpha: Literal["informative", "nonzero"] = "informative",
  singleton: Literal["zero", "raw"] = "zero",
  where=None,
) -> Array:
  """GPG's advantage: the centred reward, scaled up to make up for responses that teach nothing.

      advantage = alpha * (R - mean of its group)        alpha = N / (N - M)

  N counts the responses, and M those in groups without spread. Their gradient is 0, but a mean over
  the batch still counts them: the more prompts are solved, the smaller the step. Alpha undoes that.
  Here one of two groups teaches, so it counts twice:

  >>> gpg(jnp.array([[1.0, 0.0], [1.0, 1.0]])).tolist()
  [[1.0, -1.0], [0.0, 0.0]]

  Args:
    rewards: [P, G], G responses to each of P prompts.
    alpha: "informative" divides by the share of responses in groups with spread, "nonzero" by that
      of rewards that are not 0 (verl).
    singleton: what a group of one gets, "zero" or "raw", alpha * R (verl).
    where: None, or [P, G] bool; False marks a reward that failed. It counts in neither number.

  Returns:
    [P, G] float32; by default 0 in a group of one.

  Raises:
    ValueError: shapes differ, or a name is unknown.

  Needs: samples, reward, several responses.

  Reference: Chu et al., 2025, GPG, https://arxiv.org/abs/2504.02546
  """
  check_choice("alpha", alpha, ("informative", "nonzero"))
  rewards, where = _groups(rewards, where)
  teaches = informative_groups(rewards, where=where)[:, None]
  counted = where & (teaches if alpha == "informative" else rewards != 0)
  count, total = jnp.maximum(jnp.sum(counted), 1), jnp.sum(where)
  factor = total.astype(rewards.dtype) / count.astype(rewards.dtype)
  return factor * group_relative(rewards, scale="none", singleton=singleton, where=where)


def maxrl(rewards, *, eps=1e-6, where=None) -> Array:
  """MaxRL's advantage: the centred reward, divided by the group's mean reward.

      advantage = (R - mean) / (mean + eps)

  The policy gradient raises the probability p of a right answer; maximum likelihood raises log p,
  whose gradient is 1 / p times that. So a prompt solved once in four counts three times as much as
  one solved three times in four:

  >>> [round(float(a), 3) for a in maxrl(jnp.array([[1, 0, 0, 0]]))[0]]
  [3.0, -1.0, -1.0, -1.0]
  >>> [round(float(a), 3) for a in maxrl(jnp.array([[1, 1, 1, 0]]))[0]]
  [0.333, 0.333, 0.333, -1.0]

  Args:
    rewards: [P, G], >= 0, such as 0 and 1: of a mean below 0 the sign would turn round.
    eps: added to the mean, > 0.
    where: None, or [P, G] bool; False marks a reward that failed, whose advantage is 0.

  Returns:
    [P, G] float32; 0 in a group without spread (none right among them) and in a group of one; nan
    in a group with a reward below 0, which is not known before it is computed.

  Raises:
    ValueError: shapes differ, or `eps` is not above 0.

  Needs: samples, reward, several responses.

  Reference: Tajwar et al., 2026, Maximum Likelihood Reinforcement Learning,
    https://arxiv.org/abs/2602.02710
  """
  check_above("eps", eps, 0)
  rewards, where = _groups(rewards, where)
  mean = masked_mean(rewards, where, 1)[:, None]
  advantages = group_relative(rewards, scale="none", where=where) / (mean + eps)
  undefined = jnp.any(where & (rewards < 0), axis=1, keepdims=True)
  return jnp.where(undefined & where, jnp.nan, advantages)


@any_mesh
def pass_at_k(
  rewards,
  *,
  k: int | None = None,
  scale: Literal["none", "std"] = "none",
  ddof=1,
  eps=1e-6,
  where=None,
) -> Array:
  """What a response adds to the best of k: the advantage for the pass@k objective.

      advantage_i = mean over sets S of k responses of lead_i(S)
      lead_i(S)   = max of S - max of S without i where S has i, else 0

  Trained for the mean reward, a policy gives up answers that are only sometimes right. If k tries
  are allowed, only the best counts, and a response adds to it only if it beats the others of its
  set. With k = G, the default, the best of the group gets its lead over the second, all others 0:

  >>> [round(float(a), 3) for a in pass_at_k(jnp.array([[0.2, 0.9, 0.5]]))[0]]
  [0.0, 0.4, 0.0]

  With k = 2 there are three pairs; 0.9 leads in two, by 0.7 and 0.4, and 0.5 in one, by 0.3:

  >>> [round(float(a), 3) for a in pass_at_k(jnp.array([[0.2, 0.9, 0.5]]), k=2)[0]]
  [0.0, 0.367, 0.1]

  The sum over i of advantage_i * grad(logprob_i) is unbiased for the gradient of the expected best
  of k; a mean over the G responses is 1 / G of it. Chen et al. (2508.10751) whiten the rewards of
  subsets instead, which gives wrong answers a negative advantage: another estimator.

  Args:
    rewards: [P, G], G responses to each of P prompts.
    k: tries, from 2 to G; None is G. In a group with fewer valid rewards, all of them.
    scale: "none", or "std" divides by the group's standard deviation + `eps` (verl's default).
    ddof: of the standard deviation.
    eps: added to the standard deviation, > 0.
    where: None, or [P, G] bool; False marks a reward that failed, whose advantage is 0.

  Returns:
    [P, G] float32, >= 0; 0 in a group without spread and in a group of one.

  Raises:
    ValueError: shapes differ, `scale` is unknown, or a number is out of range.

  Needs: samples, reward, several responses.

  Reference: Tang et al., 2025, Optimizing Language Models for Inference Time Objectives,
    https://arxiv.org/abs/2503.19595; any k: Walder and Karkhanis, 2025, Pass@K Policy Optimization,
    https://arxiv.org/abs/2505.15201
  """
  check_choice("scale", scale, ("none", "std"))
  check_above("eps", eps, 0)
  rewards, where = _groups(rewards, where)
  group = rewards.shape[1]
  check_between("k", k, 2, group)
  # i is the best of S and j the second best. Of S's other k - 2, all come from the `rank` responses
  # below j, so j is second in comb(rank, k - 2) of the comb(n, k) sets. Row n: n valid rewards.
  tries = [min(n, k or group) for n in range(group + 1)]
  share = jnp.array(
    [
      [
        math.comb(rank, t - 2) / math.comb(n, t) if 2 <= t and rank < n else 0.0
        for rank in range(group)
      ]
      for n, t in enumerate(tries)
    ],
    rewards.dtype,
  )
  rank = jnp.argsort(jnp.argsort(jnp.where(where, rewards, jnp.inf), axis=1), axis=1)
  second = jnp.take_along_axis(share[jnp.sum(where, axis=1)], rank, axis=1)
  clean = jnp.where(where, rewards, 0)
  lead = jnp.maximum(clean[:, :, None] - clean[:, None, :], 0)
  advantages = jnp.where(where, jnp.sum(second[:, None, :] * lead, axis=2), 0)
  if scale == "std":
    shifted = _shifted(rewards, where)
    advantages /= _std(shifted, where, 1, ddof)[:, None] + eps
  return advantages


def gdpo(
  rewards,
  weights,
  *,
  scale: Literal["std", "batch", "leave_one_out", "none"] = "std",
  ddof=1,
  eps=1e-6,
  where=None,
) -> Array:
  """GDPO's advantage: each of several rewards is normalised separately, then they are added.

      A_k        = group_relative(rewards[..., k])
      total      = sum_k weights[k] * A_k
      advantages = (total - mean) / (std + eps)        over all responses of the batch

  If they are added first, rewards (1, 0) and (0, 1) both become 1, and the group seems to have no
  spread; and the reward with the largest numbers drowns out the others. If they are normalised
  first, each counts by its weight:

  >>> rewards = jnp.array([[[1.0, 0.0], [0.0, 10.0]]])
  >>> [round(float(a), 3) for a in gdpo(rewards, jnp.array([2.0, 1.0]), ddof=0)[0]]
  [1.0, -1.0]

  verl whitens over tokens instead, so long responses weigh more: `masked.whiten` of these
  advantages, broadcast to [B, T], with the mask of the tokens. TRL and NeMo do it as above.

  Args:
    rewards: [P, G, K], K rewards of each of G responses to each of P prompts.
    weights: [K], how much each reward counts.
    scale: of each reward, as in `group_relative`.
    ddof: of the standard deviations.
    eps: added to the standard deviations, > 0.
    where: None, or [P, G, K] bool; False marks a reward that failed or does not apply, which adds 0
      to its response.

  Returns:
    [P, G] float32; 0 for a response without any reward.

  Raises:
    ValueError: shapes differ, `scale` is unknown, or `eps` is not above 0.

  Needs: samples, reward, several responses.

  Reference: Liu et al., 2026, GDPO, https://arxiv.org/abs/2601.05242
  """
  check_ndim("rewards", rewards, 3, "[P, G, K]")
  if jnp.shape(weights) != jnp.shape(rewards)[2:]:
    raise ValueError(
      f"weights has shape {jnp.shape(weights)}; it must be [K] = {jnp.shape(rewards)[2:]}."
    )
  rewards = at_least_float32(rewards)
  where = jnp.ones_like(rewards, bool) if where is None else jnp.asarray(where)
  check_mask("where", where)
  check_same_shape("where", where, "rewards", rewards)
  each = jax.vmap(
    lambda x, valid: group_relative(x, scale=scale, ddof=ddof, eps=eps, where=valid),
    in_axes=2,
    out_axes=2,
  )(rewards, where)
  # On a TPU the default precision of a product is bfloat16.
  total = jnp.matmul(each, at_least_float32(weights), precision=jax.lax.Precision.HIGHEST)
  valid = jnp.any(where, axis=2)
  std = _std(total, valid, None, ddof)
  # The mean is 0 but for rounding, which must not make a group without spread teach anything.
  teaches = valid & jnp.any(each != 0, axis=(1, 2))[:, None]
  return jnp.where(teaches, (total - masked_mean(total, valid)) / (std + eps), 0)


def informative_groups(rewards, *, where=None) -> Array:
  """Which prompts teach something: those whose responses did not all get the same reward (DAPO).

  A group without spread has only advantages of 0: it costs a forward and a backward pass, and
  makes every mean over the batch smaller. Dynamic sampling drops such prompts and draws others.

  >>> informative_groups(jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0]])).tolist()
  [True, False, False]

  Args:
    rewards: [P, G], G responses to each of P prompts.
    where: None, or [P, G] bool; False marks a reward that failed, which is ignored.

  Returns:
    [P] bool.

  Raises:
    ValueError: shapes differ.

  Needs: samples, reward, several responses.

  Reference: Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476
  """
  rewards, where = _groups(rewards, where)
  low = jnp.min(rewards, axis=1, where=where, initial=jnp.inf)
  high = jnp.max(rewards, axis=1, where=where, initial=-jnp.inf)
  return ~(high <= low)  # Neither holds for nan, so such a group is not silently dropped.


# What an experiment offers by name, the usual one first: of the rewards, of more than the rewards.
REWARD_ADVANTAGES = (group_relative, leave_one_out, maxrl, gpg, pass_at_k)
GROUP_ADVANTAGES = (*REWARD_ADVANTAGES, opo, remax, gdpo)


def _groups(rewards, where, name="rewards", where_name="where"):
  """Checks [P, G] rewards and their mask; the rewards at least float32, the mask never None."""
  check_ndim(name, rewards, 2, "[P, G]: reshape(P, G)")
  rewards = at_least_float32(rewards)
  where = jnp.ones_like(rewards, bool) if where is None else jnp.asarray(where)
  check_mask(where_name, where)
  check_same_shape(where_name, where, name, rewards)
  return rewards, where


def _with_singletons(advantages, rewards, where, singleton):
  """The advantages, with the reward itself for a group of one if that is asked for."""
  if singleton == "zero":
    return advantages
  alone = where & (jnp.sum(where, axis=1, keepdims=True) == 1)
  return jnp.where(alone, rewards, advantages)


def _shifted(rewards, where):
  """Rewards minus the largest of the group.

  Equal rewards must give exactly 0, but their rounded mean may differ from them by one digit, which
  dividing by a std near 0 would blow up. Subtracting one of them first makes all of them 0.
  """
  largest = jnp.max(rewards, axis=1, keepdims=True, where=where, initial=-jnp.inf)
  return jnp.where(where, rewards - largest, 0)


def _std(x, where, axis, ddof):
  """The standard deviation; where it is 0 its slope is 0 too, and not infinite."""
  variance = masked_var(x, where, axis, ddof=ddof)
  return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), variance)


def _std_of_others(x, where, ddof):
  """[P, G], the standard deviation of the other responses; exactly 0 where they are all equal."""
  others = where[:, None, :] & ~jnp.eye(x.shape[1], dtype=bool)[None]
  each = jnp.broadcast_to(x[:, None, :], others.shape)
  low = jnp.min(each, axis=2, where=others, initial=jnp.inf)
  differ = jnp.max(each, axis=2, where=others, initial=-jnp.inf) > low
  return jnp.where(differ, _std(each, others, 2, ddof), 0)
