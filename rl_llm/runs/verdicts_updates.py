"""Rules of `rl_llm.runs.verdicts` about updates of the wrong size."""

from __future__ import annotations

import math
import statistics

from rl_llm.runs.evidence import Evidence, Verdict, attempt, full_reward, grader, lower_rate, nearer
from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import finite

# Steps that a trend of the gradient takes.
_ENOUGH = 20
# A gradient norm has "exploded" where it grew this many times, and is this much over its limit.
_GROWN = 10.0
# Nats per token: one step's updates, and the distance to the reference model.
_STEP_KL, _FAR = 0.1, 1.0
# Clipping takes the gradient of this share of tokens where updates go too far.
_CLIPPED = 0.3
# Rewards this many times their spread from 0 hide it.
_OFFSET = 4.0
# Weight decay is too large once it has left less than this share of the weights.
_LEFT = 0.5


def no_baseline(record: Evidence) -> Verdict | None:
  """Rewards far from 0 for their spread, off which nothing is taken."""
  means, counts = record.series("reward_mean"), record.series("rewards_ok")
  if record.config.get("advantage.name") != "plain" or len(means) < _ENOUGH / 2 or not counts:
    return None
  first = max(len(means) // 4, 2)
  # A mean of n rewards varies from step to step by their spread over the root of n.
  mean, step_spread = statistics.fmean(means[:first]), statistics.stdev(means[:first])
  spread = step_spread * statistics.fmean(counts[:first]) ** 0.5
  usual = record.solved() and 0 <= mean <= full_reward(record)  # Most is right, and earns 1.
  if usual or not spread or abs(mean) < _OFFSET * spread:
    return None
  sign = "praised" if mean > 0 else "blamed"
  return Verdict(
    "no_baseline",
    f"Rewards are {number(mean, 2)} with a spread of {number(spread, 2)}, and the plain advantage "
    f"takes nothing off them: every response is {sign} alike, good or bad.",
    attempt(record, ("advantage.name", "leave_one_out"))
    + f"; or have the grader give about 0 to a middling response ({grader(record)})",
  )


def bonus(record: Evidence) -> Verdict | None:
  """An entropy bonus that outweighs the reward, or is negative."""
  coefficient = finite(record.config.get("loss.entropy_coef")) or 0.0
  first = (record.series("entropy") or [0.0])[0]
  if -coefficient * first > 1:
    return Verdict(
      "bonus_negative",
      f"The entropy bonus is negative: certainty earns up to {number(-coefficient)} x "
      f"{number(first, 2)} nats, against advantages of about 1.",
      attempt(record, ("loss.entropy_coef", -coefficient / 30)),
    )
  if coefficient * record.mean("entropy") <= 1 or record.mean("entropy") < 0.9 * first:
    return None
  return Verdict(
    "bonus_outweighs",
    f"The entropy bonus outweighs the reward: {number(coefficient)} x "
    f"{number(record.mean('entropy'), 2)} nats, against advantages of about 1.",
    attempt(record, ("loss.entropy_coef", coefficient / 30)),
  )


def _exploding(record: Evidence) -> Verdict | None:
  norms = record.series("grad_norm")
  if len(norms) < _ENOUGH:
    return None
  first = statistics.median(norms[: len(norms) // 4])
  last = statistics.median(record.late("grad_norm"))
  limit = finite(record.config.get("optimizer.max_grad_norm")) or 1.0
  if last < _GROWN * max(first, limit):
    return None
  return Verdict(
    "exploding",
    f"The gradient explodes: its norm grew from {number(first, 2)} to {number(last, 2)}.",
    attempt(record, lower_rate(record)),
  )


def _step_kl(record: Evidence) -> Verdict | None:
  if record.mean("approx_kl") <= _STEP_KL:
    return None
  return Verdict(
    "step_kl",
    f"One step's updates move the policy by {number(record.mean('approx_kl'), 2)} nats per token "
    f"(over {_STEP_KL}), so its batch no longer describes it.",
    attempt(record, lower_rate(record), ("epochs", 1)),
  )


def _clipped(record: Evidence) -> Verdict | None:
  """Updates of one batch of which many have no gradient any more."""
  share = record.mean("clip_low_fraction") + record.mean("clip_high_fraction")
  epochs = int(finite(record.config.get("epochs")) or 1)
  if share < _CLIPPED or epochs < 2:
    return None
  return Verdict(
    "clipped_tokens",
    f"{share:.0%} of the tokens are clipped: after {epochs} passes over a batch the policy has "
    "left what sampled it.",
    attempt(record, ("epochs", max(epochs // 8, 1)), lower_rate(record)),
  )


def _decayed(record: Evidence) -> Verdict | None:
  """Decay that took more of the weights than it left: (1 - rate * decay) of them stay in a step."""
  decay = finite(record.config.get("optimizer.weight_decay")) or 0.0
  left = math.prod(max(1 - rate * decay, 0.0) for rate in record.series("learning_rate"))
  if left >= _LEFT:
    return None
  return Verdict(
    "decayed",
    f"A weight decay of {number(decay)} has left {left:.0%} of the weights that training began "
    "with.",
    attempt(record, ("optimizer.weight_decay", 0.01)),
  )


def _far(record: Evidence) -> Verdict | None:
  if record.mean("kl_ref") <= _FAR or record.rising():  # A reward that still rises was worth it.
    return None
  return Verdict(
    "far",
    f"The policy is {number(record.mean('kl_ref'), 2)} nats per token from the reference model "
    f"(over {number(_FAR)}), and few responses are right.",
    attempt(record, nearer(record)),
  )


UPDATES = (_exploding, _decayed, _step_kl, _clipped, _far)
