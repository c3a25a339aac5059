"""Preference losses on the margin between two answers, with another penalty than DPO's.

The reward is that of `rl_llm.losses.dpo`, beta times the log-ratio to the reference. Like DPO,
these losses see only the difference of the two rewards. They differ in what they ask of it: a
target (IPO), the KL the other way round (EXO), or a form that a language model found (DiscoPOP).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above
from rl_llm.losses import _checks
from rl_llm.losses._pairs import check_smoothing, log_ratios, pair_metrics, rewards


def ipo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """IPO: pull the difference of log-ratios to a target, instead of pushing it without end.

      difference = (chosen - ref chosen) - (rejected - ref rejected)          in nats
      loss       = sum(weights * (difference - 1 / (2 beta))^2)

  If an answer always wins in the data, DPO's best margin is infinite, whatever beta is, and the
  reference holds nothing back. The square has its minimum at 1 / (2 beta): 5 nats at beta 0.1. At
  the reference, 0 nats, the loss is 25:

  >>> zero = jnp.zeros(1)
  >>> float(ipo_loss(zero, zero, zero, zero, jnp.ones(1))[0])
  25.0

  Two normalisations are in use, and the caller chooses one by the log-probs it passes. The paper's
  formula takes those of whole answers: sums, with a target of 5 nats per answer. Most trainers pass
  averages (`sequence_logprobs(average=True)`), with a target of 5 nats per *token*, so long answers
  need not change less. A beta tuned for one is wrong for the other by about the answers' length.

  Args:
    chosen_logprobs: [B] float, sums or averages, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: sets the target, > 0; the paper's tau.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Azar et al., 2023, A General Theoretical Paradigm to Understand Learning from Human
    Preferences, https://arxiv.org/abs/2310.12036
  """
  (chosen, rejected), weights, mask = log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jnp.square(chosen - rejected - 1 / (2 * beta))
  return jnp.sum(weights * per_pair), pair_metrics(beta * chosen, beta * rejected, mask)


def exo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=1e-3,
) -> tuple[Array, Metrics]:
  """EXO on pairs: DPO's fit with the KL the other way round.

      q    = sigmoid(margin)                        what the policy says
      loss = sum(weights * (q log(q / (1 - e)) + (1 - q) log((1 - q) / e)))

  DPO minimises KL(labels || policy), which spreads over everything the labels allow. EXO minimises
  KL(policy || labels), as reinforcement learning does, which seeks one mode. The labels must allow
  both answers, so e = `label_smoothing` is above 0. At the reference q is 1/2; with e = 1/4 the KL
  from (1/2, 1/2) to (3/4, 1/4) is log(2) - log(3) / 2 = 0.144:

  >>> zero = jnp.zeros(1)
  >>> loss, _ = exo_loss(zero, zero, zero, zero, jnp.ones(1), label_smoothing=0.25)
  >>> round(float(loss), 3)
  0.144

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: the e above, above 0 and below 1/2.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Ji et al., 2024, Towards Efficient Exact Optimization of Language Model Alignment,
    https://arxiv.org/abs/2402.00856
  """
  check_above("label_smoothing", label_smoothing, 0)
  check_smoothing(label_smoothing)
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  margin = chosen - rejected
  right = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing))
  wrong = jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing))
  return jnp.sum(weights * (right + wrong)), pair_metrics(chosen, rejected, mask)


def discopop_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  temperature=0.05,
) -> tuple[Array, Metrics]:
  """DiscoPOP: logistic for pairs in the wrong order, exponential for pairs in the right one.

      s    = sigmoid(margin / temperature)
      loss = sum(weights * ((1 - s) * -log sigmoid(margin) + s * exp(-margin)))

  A language model found this form by proposing losses and reading their results. At the reference
  s is 1/2: (log 2 + 1) / 2 = 0.847.

  >>> zero = jnp.zeros(1)
  >>> round(float(discopop_loss(zero, zero, zero, zero, jnp.ones(1))[0]), 3)
  0.847

  It is not convex: around margin 0 it *rises* with the margin, so a pair must be pushed over a
  small hill.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    temperature: the width of the transition between the two forms, in units of reward, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`. The logarithm of
    s * exp(-margin) is limited to +-20.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Lu et al., 2024, Discovering Preference Optimization Algorithms with and for Large
    Language Models, https://arxiv.org/abs/2406.08414
  """
  check_above("temperature", temperature, 0)
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  margin = chosen - rejected
  logistic = jax.nn.sigmoid(-margin / temperature) * -jax.nn.log_sigmoid(margin)
  # s * exp(-margin) in one exponential, as s vanishes faster than exp(-margin) grows.
  exponential = _checks.ratio_of(jax.nn.log_sigmoid(margin / temperature) - margin)
  return jnp.sum(weights * (logistic + exponential)), pair_metrics(chosen, rejected, mask)
