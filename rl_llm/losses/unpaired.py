"""Preference losses on single answers, each known to be good or bad, and terms for online DPO.

Most feedback is a thumbs up or a thumbs down on one answer; pairs are rare and expensive. The
reward is that of `rl_llm.losses.dpo`, beta times the log-ratio to the reference. Unlike a pair, a
single answer has nothing to compare with, so these losses take a baseline as an array, computed
over the whole batch before it is split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  Array,
  Metrics,
  at_least_float32,
  check_above,
  check_float,
  check_mask,
  check_ndim,
  check_same_shape,
)
from rl_llm.losses import _checks
from rl_llm.masked import masked_mean


def kto_loss(
  response_logprobs,
  ref_response_logprobs,
  desirable,
  baseline,
  weights,
  *,
  beta=0.1,
  desirable_weight=1.0,
  undesirable_weight=1.0,
) -> tuple[Array, Metrics]:
  """KTO: an answer's value as people perceive it, as a gain or loss from a reference point.

      c        = response_logprobs - ref_response_logprobs
      per_row  = desirable_weight * (1 - sigmoid(beta * (c - baseline)))         good answers
                 undesirable_weight * (1 - sigmoid(beta * (baseline - c)))       bad answers
      loss     = sum(weights * per_row)

  The baseline z0, from `kto_baseline`, is how far the policy has moved from its reference on
  answers in general; an answer gains if it moved further. At the reference nothing has moved, and a
  row costs 1/2. With beta 1, a good answer whose odds tripled costs 1/4:

  >>> logprobs, reference = jnp.log(jnp.array([0.3, 0.3])), jnp.log(jnp.array([0.3, 0.1]))
  >>> good, weights = jnp.array([True, True]), jnp.array([1.0, 0.0])
  >>> round(float(kto_loss(logprobs, reference, good, 0.0, weights, beta=1.0)[0]), 3)
  0.5
  >>> round(float(kto_loss(logprobs, reference, good, 0.0, 1 - weights, beta=1.0)[0]), 3)
  0.25

  The sigmoid saturates: an answer far on the wrong side is treated as noise and left alone. The
  paper advises factors that give good and bad rows the same total, within a factor of 4/3. With
  baseline 0 this is APO-zero without pairs.

  Args:
    response_logprobs: [B] float, log-probs of the answers under the policy being trained, in nats:
      sums from `logprobs.sequence_logprobs`.
    ref_response_logprobs: [B] float, the same under the reference, at the same temperature; a
      constant.
    desirable: [B] bool, whether the answer is good.
    baseline: [] or [B] float, z0 in nats; a constant. As [B] it splits into microbatches.
    weights: [B] float, how much each row counts, usually 1 / B; a constant.
    beta: reward per nat of log-ratio, > 0.
    desirable_weight: factor of good answers, the paper's lambda_D, > 0.
    undesirable_weight: factor of bad answers, the paper's lambda_U, > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"desirable_reward", "undesirable_reward"} over
    the rows of each kind, and {"baseline"} times beta.

  Raises:
    ValueError: shapes differ, a dtype is wrong, or a number is out of range; the message names the
      argument.

  Needs: labels, reference, mismatched answers.

  Reference: Ethayarajh et al., 2024, KTO: Model Alignment as Prospect Theoretic Optimization,
    https://arxiv.org/abs/2402.01306
  """
  check_above("desirable_weight", desirable_weight, 0)
  check_above("undesirable_weight", undesirable_weight, 0)
  log_ratio, good, weights, mask = _log_ratio(
    response_logprobs, ref_response_logprobs, desirable, weights, beta
  )
  baseline = _checks.per_row("baseline", baseline, mask)
  gain = jnp.where(good, log_ratio - baseline, baseline - log_ratio)
  factor = jnp.where(good, desirable_weight, undesirable_weight)
  per_row = factor * jax.nn.sigmoid(-beta * gain)
  metrics = _single_metrics(beta * log_ratio, good, mask)
  return jnp.sum(weights * per_row), metrics | {"baseline": _checks.metric(beta * baseline, mask)}


def kto_baseline(response_logprobs, ref_response_logprobs, *, where=None) -> Array:
  """KTO's reference point z0: how far the policy has moved from its reference, in nats.

      z0 = max(0, mean(response_logprobs - ref_response_logprobs))

  estimates KL(policy || reference) from *mismatched* pairs: each prompt with the answer to another
  prompt, such as the next in the batch. Matching answers would measure their own reward. Answers
  that moved by 1 and 2 nats have baseline 1.5:

  >>> float(kto_baseline(jnp.array([-4.0, -6.0]), jnp.array([-5.0, -8.0])))
  1.5

  One number for the whole batch, over all hosts: compute it before the batch is split.

  Args:
    response_logprobs: [B] float, log-probs of the mismatched answers under the policy, in nats.
    ref_response_logprobs: [B] float, the same under the reference.
    where: [B] bool, the rows that count; None is all.

  Returns:
    A scalar, at least float32, without gradient; 0 if no row counts.

  Raises:
    ValueError: shapes differ, or `where` is not bool; the message names the argument.

  Needs: labels, reference, mismatched answers.

  Reference: Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306
  """
  return jax.lax.stop_gradient(
    jnp.maximum(_mean_log_ratio(response_logprobs, ref_response_logprobs, where), 0)
  )


def bco_unpaired_loss(
  response_logprobs, ref_response_logprobs, desirable, weights, *, beta=0.1, shift=0.0
) -> tuple[Array, Metrics]:
  """BCO: a classifier of good and bad answers whose logit is the reward.

      reward  = beta * (response_logprobs - ref_response_logprobs) - shift
      per_row = -log sigmoid(reward)      good answers
                -log sigmoid(-reward)     bad answers
      loss    = sum(weights * per_row)

  Minimising it also minimises a bound on DPO's loss, without pairs. At the reference every answer
  is a coin flip, log 2. With beta 1, a good answer whose odds tripled counts as good at 3/4:

  >>> logprobs, reference = jnp.log(jnp.array([0.3])), jnp.log(jnp.array([0.1]))
  >>> loss, _ = bco_unpaired_loss(logprobs, reference, jnp.array([True]), jnp.ones(1), beta=1.0)
  >>> round(float(jnp.exp(-loss)), 3)
  0.75

  Where good and bad answers come from different prompts, the paper multiplies the weights of the
  bad ones by how likely their prompt is among the good ones.

  Args:
    response_logprobs: [B] float, as in `kto_loss`.
    ref_response_logprobs: [B] float, as in `kto_loss`; a constant.
    desirable: [B] bool, whether the answer is good.
    weights: [B] float, how much each row counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    shift: [] or [B] float, from `bco_shift` over the whole batch, or its running mean; a constant.

  Returns:
    The scalar loss, at least float32, and metrics {"desirable_reward", "undesirable_reward"} over
    the rows of each kind, without shift.

  Raises:
    ValueError: shapes differ, a dtype is wrong, or a number is out of range; the message names the
      argument.

  Needs: labels, reference.

  Reference: Jung et al., 2024, Binary Classifier Optimization for Large Language Model Alignment,
    https://arxiv.org/abs/2404.04656
  """
  log_ratio, good, weights, mask = _log_ratio(
    response_logprobs, ref_response_logprobs, desirable, weights, beta
  )
  shift = _checks.per_row("shift", shift, mask)
  reward = beta * log_ratio
  per_row = -jax.nn.log_sigmoid(jnp.where(good, reward - shift, shift - reward))
  return jnp.sum(weights * per_row), _single_metrics(reward, good, mask)


def bco_shift(
  response_logprobs, ref_response_logprobs, desirable, *, beta=0.1, where=None
) -> Array:
  """BCO's reward shift: halfway between the mean rewards of good and of bad answers.

      shift = (mean reward of the good + mean reward of the bad) / 2

  It does not depend on how many of each kind there are. Good answers at 1 and 3 nats, a bad one at
  0, beta 1:

  >>> logprobs, good = jnp.array([1.0, 3.0, 0.0]), jnp.array([True, True, False])
  >>> float(bco_shift(logprobs, jnp.zeros(3), good, beta=1.0))
  1.0

  One number for the whole batch: compute it before the batch is split. The paper keeps its running
  mean over steps.

  Args:
    response_logprobs: [B] float, log-probs of the answers under the policy, in nats.
    ref_response_logprobs: [B] float, the same under the reference.
    desirable: [B] bool, whether the answer is good.
    beta: reward per nat of log-ratio, > 0.
    where: [B] bool, the rows that count; None is all.

  Returns:
    A scalar, at least float32, without gradient; a kind without rows counts as 0.

  Raises:
    ValueError: shapes differ, a dtype is wrong, or `beta` is not above 0; the message names the
      argument.

  Needs: labels, reference.

  Reference: Jung et al., 2024, https://arxiv.org/abs/2404.04656
  """
  check_above("beta", beta, 0)
  check_mask("desirable", desirable)
  check_same_shape("desirable", desirable, "response_logprobs", response_logprobs)
  where = jnp.ones_like(desirable) if where is None else where
  means = (
    _mean_log_ratio(response_logprobs, ref_response_logprobs, where & kind)
    for kind in (jnp.asarray(desirable), ~jnp.asarray(desirable))
  )
  return jax.lax.stop_gradient(beta * sum(means) / 2)


def xpo_loss(response_logprobs, weights, *, alpha=1e-5) -> tuple[Array, Metrics]:
  """XPO's bonus for exploring: makes what the *reference* would write less likely.

      loss = alpha * sum(weights * response_logprobs)

  Online DPO only compares answers that the policy happens to write, so it may never see the best
  one. Added to `dpo_loss`, this term is optimistic about everything that the reference does not
  say. Draw the answers from the reference: on the policy's own answers, it would lower what was
  just learned. An answer of probability 1/2:

  >>> round(float(xpo_loss(jnp.log(jnp.array([0.5])), jnp.ones(1), alpha=0.1)[0]), 4)
  -0.0693

  Args:
    response_logprobs: [B] float, log-probs, under the policy being trained, of answers sampled from
      the reference, in nats: sums from `logprobs.sequence_logprobs`.
    weights: [B] float, how much each row counts, usually 1 / B; a constant.
    alpha: strength of the bonus, > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"reference_logprob"} per row, unweighted.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `alpha` is not above 0; the message names
      the argument.

  Needs: reference responses.

  Reference: Xie et al., 2024, Exploratory Preference Optimization, https://arxiv.org/abs/2405.21046
  """
  check_above("alpha", alpha, 0)
  logprobs, weights, mask = _checks.rows("response_logprobs", response_logprobs, weights)
  metrics = {"reference_logprob": _checks.metric(logprobs, mask)}
  return alpha * jnp.sum(weights * logprobs), metrics


def nash_md_loss(
  response_logprobs, ref_response_logprobs, preferences, weights, *, beta=0.1
) -> tuple[Array, Metrics]:
  """Nash-MD: win against a mixture of policy and reference, and stay close to the reference.

      c    = response_logprobs - ref_response_logprobs
      loss = sum(weights * (-(preferences - 1/2) * response_logprobs + beta * c^2 / 2))

  Preferences need not be transitive, so there may be no reward that explains them. But there is
  always a policy that no other beats more than half the time. It is found by playing against the
  geometric mixture of policy and reference (1/2 each is usual): `preferences` is how likely the
  judge finds the policy's answer better. The square has the gradient of KL(policy || reference) on
  the policy's own answers, see `rl_llm.kl`, so the gradient of a row is
  -(preference - 1/2 - beta * c). An answer preferred with 0.9, at the reference:

  >>> logprobs, weights = jnp.log(jnp.array([0.5])), jnp.ones(1)
  >>> gradient, _ = jax.grad(nash_md_loss, has_aux=True)(
  ...   logprobs, logprobs, jnp.array([0.9]), weights)
  >>> gradient.round(3).tolist()
  [-0.4000000059604645]

  Args:
    response_logprobs: [B] float, log-probs of the policy's own answers under the policy being
      trained, in nats: sums from `logprobs.sequence_logprobs`.
    ref_response_logprobs: [B] float, the same under the policy the KL holds to: the reference in
      the paper's policy gradient, the mixture in its mirror descent; a constant.
    preferences: [B] float, P(answer > the mixture's answer), between 0 and 1; a constant.
    weights: [B] float, how much each row counts, usually 1 / B; a constant.
    beta: coefficient of the KL, > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"preference", "kl"} per row, unweighted; "kl" is
    the estimate c.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `beta` is not above 0; the message names the
      argument.

  Needs: samples, reference, judge.

  Reference: Munos et al., 2023, Nash Learning from Human Feedback, https://arxiv.org/abs/2312.00886
  """
  check_above("beta", beta, 0)
  name, like = "response_logprobs", response_logprobs
  logprobs, weights, mask = _checks.rows(name, response_logprobs, weights)
  reference = _checks.constant("ref_response_logprobs", ref_response_logprobs, name, like, mask)
  preferences = _checks.constant("preferences", preferences, name, like, mask)
  log_ratio = logprobs - reference
  per_row = -(preferences - 0.5) * logprobs + beta * jnp.square(log_ratio) / 2
  metrics = {"preference": _checks.metric(preferences, mask), "kl": _checks.metric(log_ratio, mask)}
  return jnp.sum(weights * per_row), metrics


def _log_ratio(response_logprobs, ref_response_logprobs, desirable, weights, beta):
  """Checked and masked: log-ratio to the reference, desirable, weights, mask."""
  check_above("beta", beta, 0)
  name, like = "response_logprobs", response_logprobs
  logprobs, weights, mask = _checks.rows(name, response_logprobs, weights)
  reference = _checks.constant("ref_response_logprobs", ref_response_logprobs, name, like, mask)
  check_same_shape("desirable", desirable, name, like)
  check_mask("desirable", desirable)
  return logprobs - reference, jnp.asarray(desirable), weights, mask


def _single_metrics(reward, good, mask) -> Metrics:
  return {
    "desirable_reward": _checks.metric(reward, mask & good),
    "undesirable_reward": _checks.metric(reward, mask & ~good),
  }


def _mean_log_ratio(response_logprobs, ref_response_logprobs, where):
  check_ndim("response_logprobs", response_logprobs, 1, "[B]")
  check_float("response_logprobs", response_logprobs)
  check_same_shape(
    "ref_response_logprobs", ref_response_logprobs, "response_logprobs", response_logprobs
  )
  log_ratio = at_least_float32(response_logprobs) - at_least_float32(ref_response_logprobs)
  if where is None:
    where = jnp.ones_like(log_ratio, bool)
  else:
    check_same_shape("where", where, "response_logprobs", response_logprobs)
    check_mask("where", where)
  return masked_mean(log_ratio, where)
