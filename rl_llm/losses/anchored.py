"""Preference losses on pairs that judge each answer on its own, against the reference.

The reward is that of `rl_llm.losses.dpo`, beta times the log-ratio to the reference. DPO sees only
the difference of the two rewards, so both answers may become less likely. Each loss here also says
where the chosen and the rejected answer should be relative to the reference, whose reward is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics
from rl_llm.losses import _checks
from rl_llm.losses._pairs import log_ratios, pair_metrics, rewards


def nca_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """NCA on pairs: each answer against the reference, so that the chosen one cannot fall.

      loss = sum(weights * (-log sigmoid(chosen) - log sigmoid(-chosen) / 2
                            - log sigmoid(-rejected) / 2))

  with the rewards `chosen` and `rejected`. DPO sees only their difference, and often makes both
  answers less likely. Noise contrast judges each separately: is it from the data, or from the
  reference? At the reference every term is a coin flip, 2 log 2 = 1.386:

  >>> zero = jnp.zeros(1)
  >>> round(float(nca_loss(zero, zero, zero, zero, jnp.ones(1))[0]), 3)
  1.386

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Chen et al., 2024, Noise Contrastive Alignment of Language Models with Explicit
    Rewards, https://arxiv.org/abs/2402.05369
  """
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = -jax.nn.log_sigmoid(chosen) - 0.5 * (
    jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
  )
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def bco_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  shift=0.0,
) -> tuple[Array, Metrics]:
  """BCO on pairs: a classifier of good and bad answers whose logit is the reward.

      loss = sum(weights * (-log sigmoid(chosen - shift) - log sigmoid(-(rejected - shift))))

  with the rewards `chosen` and `rejected`. At the reference that is two coin flips, 2 log 2:

  >>> zero = jnp.zeros(1)
  >>> round(float(bco_loss(zero, zero, zero, zero, jnp.ones(1))[0]), 3)
  1.386

  The shift tightens the bound on DPO's loss. The paper uses the running mean of all rewards, see
  `bco_shift`; pairwise trainers leave it at 0.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    shift: [] or [B] float, the reward of an answer that is neither good nor bad; a constant.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`, of rewards without shift.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Jung et al., 2024, Binary Classifier Optimization for Large Language Model Alignment,
    https://arxiv.org/abs/2404.04656
  """
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  shift = _checks.per_row("shift", shift, mask)
  per_pair = -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def sppo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """SPPO with hard labels: pull each answer's log-ratio to its own target.

      loss = sum(weights * ((chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2))

  with `chosen` and `rejected` the log-ratios to the reference, in nats. In self-play, the
  probability of an answer that wins against the policy with probability P should grow by the factor
  exp((P - 1/2) / beta); with certain labels P is 1 or 0. Unlike in IPO, moving both answers down
  together is penalised. At the reference, with beta 1/2, both targets are 1 nat away:

  >>> zero = jnp.zeros(1)
  >>> float(sppo_loss(zero, zero, zero, zero, jnp.ones(1), beta=0.5)[0])
  2.0

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; here the policy of the last iteration; a
      constant.
    ref_rejected_logprobs: [B] float, the same of the rejected answers; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: sets the targets, > 0; the paper's 1 / eta.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Wu et al., 2024, Self-Play Preference Optimization, https://arxiv.org/abs/2405.00675
  """
  (chosen, rejected), weights, mask = log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  target = 1 / (2 * beta)
  per_pair = jnp.square(chosen - target) + jnp.square(rejected + target)
  return jnp.sum(weights * per_pair), pair_metrics(beta * chosen, beta * rejected, mask)


def apo_zero_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """APO-zero: chosen answers up, rejected answers down, each anchored at the reference.

      loss = sum(weights * (1 - sigmoid(chosen) + sigmoid(rejected)))

  with the rewards `chosen` and `rejected`. Use it if the chosen answers are better than what the
  policy writes; if they are worse, use `apo_down_loss`. At the reference it is 1:

  >>> zero = jnp.zeros(1)
  >>> float(apo_zero_loss(zero, zero, zero, zero, jnp.ones(1))[0])
  1.0

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: D'Oosterlinck et al., 2024, Anchored Preference Optimization,
    https://arxiv.org/abs/2408.06266
  """
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def apo_down_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """APO-down: both answers down, the rejected one further.

      loss = sum(weights * (sigmoid(chosen) + 1 - sigmoid(chosen - rejected)))

  with the rewards `chosen` and `rejected`. When the policy already writes better than the data,
  even the chosen answers should become less likely: only their order is worth learning. At the
  reference it is 1:

  >>> zero = jnp.zeros(1)
  >>> float(apo_down_loss(zero, zero, zero, zero, jnp.ones(1))[0])
  1.0

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: D'Oosterlinck et al., 2024, Anchored Preference Optimization,
    https://arxiv.org/abs/2408.06266
  """
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)
