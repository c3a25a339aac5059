"""The first steps of every loss over preference pairs, and what each reports."""

from __future__ import annotations

import jax

from rl_llm.checks import Metrics, check_above, is_number
from rl_llm.losses import _checks


def pair_metrics(chosen, rejected, mask) -> Metrics:
  """The metrics of every loss over pairs, from rewards [B] and the pairs that count [B] bool."""
  return {
    "accuracy": _checks.metric(chosen > rejected, mask),
    "margin": _checks.metric(chosen - rejected, mask),
    "chosen_reward": _checks.metric(chosen, mask),
    "rejected_reward": _checks.metric(rejected, mask),
  }


def pairs(chosen, rejected, ref_chosen, ref_rejected, weights, beta):
  """Checked and masked: (chosen, rejected), (ref chosen, ref rejected), weights, mask."""
  check_above("beta", beta, 0)
  name, like = "chosen_logprobs", chosen
  chosen, weights, mask = _checks.rows(name, chosen, weights)
  rejected = _checks.trained("rejected_logprobs", rejected, name, like, mask)
  ref_chosen = _checks.constant("ref_chosen_logprobs", ref_chosen, name, like, mask)
  ref_rejected = _checks.constant("ref_rejected_logprobs", ref_rejected, name, like, mask)
  return (chosen, rejected), (ref_chosen, ref_rejected), weights, mask


def log_ratios(*pairs_weights_beta):
  """((chosen, rejected) log-ratios to the reference in nats, 0 outside the mask), weights, mask."""
  (chosen, rejected), (ref_chosen, ref_rejected), weights, mask = pairs(*pairs_weights_beta)
  return (chosen - ref_chosen, rejected - ref_rejected), weights, mask


def rewards(*pairs_weights_beta):
  """`log_ratios`, times beta."""
  (chosen, rejected), weights, mask = log_ratios(*pairs_weights_beta)
  beta = pairs_weights_beta[-1]
  return (beta * chosen, beta * rejected), weights, mask


def check_smoothing(label_smoothing) -> None:
  """Refuses a share of wrong labels from which a label says nothing, or the reverse."""
  if is_number(label_smoothing) and not 0 <= float(label_smoothing) < 0.5:
    raise ValueError(
      f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5, from which on a "
      "label says nothing, or the reverse."
    )


def smoothed_logistic(margin, label_smoothing):
  """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin), as one softplus and a line."""
  return label_smoothing * margin - jax.nn.log_sigmoid(margin)
