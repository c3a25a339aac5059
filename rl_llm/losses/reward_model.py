"""Teaches a network to score answers, given which of two is better."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_between
from rl_llm.losses import _checks
from rl_llm.losses._pairs import pair_metrics


def reward_model_loss(
  chosen_rewards, rejected_rewards, weights, *, margin=None, center_coef=0.0
) -> tuple[Array, Metrics]:
  """Bradley-Terry: the better answer wins with the sigmoid of the rewards' difference.

      loss = sum(weights * (-log sigmoid(chosen - rejected - margin)
                            + center_coef * (chosen + rejected)^2))

  People cannot say how good an answer is, but they can say which of two is better. Rewards log 3
  and 0 mean that the first wins three times in four:

  >>> loss, _ = reward_model_loss(jnp.log(jnp.array([3.0])), jnp.zeros(1), jnp.ones(1))
  >>> round(float(jnp.exp(-loss)), 3)
  0.75

  Only differences are learned: adding 100 to every reward changes nothing. So rewards drift, and
  those of two models cannot be compared; `center_coef` (0.01 is usual) ties their mean to 0. The
  `margin` asks for a larger difference in pairs that people called clearly different.

  Args:
    chosen_rewards: [B] float, of the better answers, from the network being trained.
    rejected_rewards: [B] float, of the worse answers.
    weights: [B] float, how much each pair counts, usually 1 / B; a constant.
    margin: None, or [B] float, by how much the rewards of each pair should differ; a constant.
    center_coef: factor of the centering term, 0 or more.

  Returns:
    The scalar loss, at least float32, and metrics {"accuracy", "margin", "chosen_reward",
    "rejected_reward"} per pair, unweighted; that margin is the rewards' difference.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs.

  Reference: Ouyang et al., 2022, Training language models to follow instructions with human
    feedback, https://arxiv.org/abs/2203.02155; margin: Touvron et al., 2023, Llama 2,
    https://arxiv.org/abs/2307.09288; centering: Eisenstein et al., 2023, Helping or Herding?,
    https://arxiv.org/abs/2312.09244
  """
  check_between("center_coef", center_coef, 0, float("inf"))
  name, like = "chosen_rewards", chosen_rewards
  chosen, weights, mask = _checks.rows(name, chosen_rewards, weights)
  rejected = _checks.trained("rejected_rewards", rejected_rewards, name, like, mask)
  difference = chosen - rejected
  if margin is not None:
    difference -= _checks.constant("margin", margin, name, like, mask)
  per_pair = -jax.nn.log_sigmoid(difference) + center_coef * jnp.square(chosen + rejected)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)
