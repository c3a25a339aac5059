"""Preference losses that compare sorted lists of a whole batch instead of single pairs."""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, any_mesh
from rl_llm.losses._pairs import check_smoothing, log_ratios, pair_metrics, pairs, smoothed_logistic

# The losses that compare the rows of a batch with each other, so that no microbatch can compute its
# share. An experiment that offers them checks:
#   if name in losses.BATCH_COUPLED and microbatches > 1: raise ValueError(...)
BATCH_COUPLED = frozenset({"aot_loss", "aot_unpaired_loss"})


@any_mesh
def aot_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=0.0,
) -> tuple[Array, Metrics]:
  """AOT for pairs: raises the distribution of the policy's margins above the reference's.

      policy_i    = the i-th smallest of chosen - rejected          over the batch, in nats
      reference_i = the i-th smallest of ref chosen - ref rejected
      loss        = sum(weights * -log sigmoid(beta * (policy_i - reference_i)))

  DPO asks each pair for more than its own reference margin. Comparing quantiles asks less of any
  one pair and more of the whole: the worst margin should beat the reference's worst margin, and so
  on upwards. Margins (2, 1) and (1, 2) are equal once sorted, so the loss is log 2:

  >>> zero = jnp.zeros(2)
  >>> loss, _ = aot_loss(jnp.array([2.0, 1.0]), zero, jnp.array([1.0, 2.0]), zero, jnp.ones(2) / 2)
  >>> round(float(loss), 3)
  0.693

  Sorting couples the batch: microbatches sort among fewer rows and do *not* add up to the whole, so
  use one (`losses.BATCH_COUPLED` names such losses). Weights should be equal, or 0 for rows that do
  not count; where they differ, the weight is that of the row with the policy's margin.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: as in `dpo_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`, of pairs as given.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference, unsplit batch.

  Reference: Melnyk et al., 2024, Distributional Preference Alignment of LLMs via Optimal Transport,
    https://arxiv.org/abs/2406.05882
  """
  check_smoothing(label_smoothing)
  logprobs, reference, weights, mask = pairs(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  difference, order = _sorted_difference(
    logprobs[0] - logprobs[1], reference[0] - reference[1], mask
  )
  per_pair = smoothed_logistic(beta * difference, label_smoothing)
  chosen, rejected = (beta * (x - ref) for x, ref in zip(logprobs, reference, strict=True))
  return jnp.sum(weights[order] * per_pair), pair_metrics(chosen, rejected, mask)


@any_mesh
def aot_unpaired_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=0.0,
) -> tuple[Array, Metrics]:
  """AOT without pairs: raises the distribution of good answers' rewards above bad ones'.

      chosen_i   = the i-th smallest of chosen - ref chosen          over the batch, in nats
      rejected_i = the i-th smallest of rejected - ref rejected
      loss       = sum(weights * -log sigmoid(beta * (chosen_i - rejected_i)))

  Good and bad answers may belong to different prompts: only the two sorted lists are compared. Good
  log-ratios (0, 3) and bad ones (2, 1), with beta 1, compare 0 with 1 and 3 with 2:

  >>> zero = jnp.zeros(2)
  >>> loss, _ = aot_unpaired_loss(
  ...   jnp.array([0.0, 3.0]), jnp.array([2.0, 1.0]), zero, zero, jnp.array([1.0, 1.0]), beta=1.0)
  >>> round(float(loss - jnp.log1p(jnp.exp(1.0)) - jnp.log1p(jnp.exp(-1.0))), 3)
  0.0

  Sorting couples the batch, as in `aot_loss`: use one microbatch.

  Args:
    chosen_logprobs: [B] float, log-probs of B good answers, as in `dpo_loss`.
    rejected_logprobs: [B] float, of B bad answers, to any prompts.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each row counts; a constant. A row of weight 0 leaves out both of
      its answers; where weights differ, that of the row with the good answer counts.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: the share of wrong labels, at least 0 and below 1/2.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`, of rows as given.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: labels, reference, unsplit batch.

  Reference: Melnyk et al., 2024, Distributional Preference Alignment of LLMs via Optimal Transport,
    https://arxiv.org/abs/2406.05882
  """
  check_smoothing(label_smoothing)
  (chosen, rejected), weights, mask = log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  difference, order = _sorted_difference(chosen, rejected, mask)
  per_pair = smoothed_logistic(beta * difference, label_smoothing)
  metrics = pair_metrics(beta * chosen, beta * rejected, mask)
  return jnp.sum(weights[order] * per_pair), metrics


def _sorted_difference(x, y, mask):
  """Sorts the members of x and of y, and subtracts: [B], 0 beyond them; and the order of x."""
  # Members first; among them a nan is last, where it is seen.
  order, others = (jnp.lexsort((values, ~mask)) for values in (x, y))
  return jnp.where(mask[order], x[order] - y[others], 0), order
