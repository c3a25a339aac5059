"""Rules of `rl_llm.runs.verdicts` about runs in which a setting leaves nothing to learn from."""

from __future__ import annotations

import itertools

from rl_llm.runs.evidence import Evidence, Verdict, attempt, grader, lower_rate, trend, truth
from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import finite

# A change of the entropy in one step, in nats per token, that only too large an update makes.
JUMP = 1.0
# Steps that a trend takes.
_ENOUGH = 20
# Responses of which not one has ended: with fewer, a model of noise may just have been unlucky.
_RESPONSES = 2000
# A temperature up to this is "cold", where nearly all groups agree and the entropy is below this.
_COLD, _AGREE, _NATS = 0.3, 0.9, 0.05
# A temperature from this on samples noise.
_HOT = 2.0
# A price of the KL, in reward per nat, and a weight decay, that hold a policy where it is.
_DEAR, _DECAY = 0.5, 0.3
# A reward has "fallen" by this many standard errors, and this share of what it was.
_ERRORS, _LOST = 4.0, 0.1
# The policy has "moved" where its entropy changed by this share.
_MOVED = 0.1
# Outside these shares of right responses, groups agree whoever grades.
_RARE, _USUAL = 0.1, 0.9
# Groups that show how often they agree: if none of this many does, under 1.5 % of all do.
_GROUPS = 200


def cold(record: Evidence) -> Verdict | None:
  """Samples so cold that all of a group are the same from the first step on."""
  temperature = finite(record.config.get("sampling.temperature")) or 1.0
  apart = record.series("frac_zero_std") and record.mean("frac_zero_std") < _AGREE
  entropies = record.series("entropy")
  warm = temperature > _COLD or len(entropies) < 5 or max(entropies[-5:]) > _NATS
  if warm or apart or record.solved():
    return None
  return Verdict(
    "cold",
    f"At temperature {number(temperature)} all samples of a problem are the same "
    f"({number(record.mean('entropy'), 2)} nats per token), so nothing tells a better one.",
    attempt(record, ("sampling.temperature", 1.0)),
  )


def never_ends(record: Evidence) -> Verdict | None:
  """All responses cut, in all steps: not one was ever ended, and none was right."""
  cut, responses = record.series("truncated_fraction"), sum(record.series("rewards_ok"))
  if responses < _RESPONSES or min(cut, default=0.0) < 1 or max(record.series("accuracy") or [1.0]):
    return None
  limit = int(finite(record.config.get("max_new_tokens")) or 0)
  least = int(finite(record.config.get("sampling.min_new_tokens")) or 0)
  options = [("max_new_tokens", 2 * limit) if limit else "a higher limit"]
  if least and least >= limit / 2:
    options = [("sampling.min_new_tokens", 0)]
  return Verdict(
    "cut_short",
    f"No response ever ended by itself: all {responses:.0f} are cut at the limit"
    + (f" of {limit} tokens" if limit else "")
    + ", and none is right.",
    attempt(record, *options)
    + "; check that the model's end-of-sequence token is the one it knows",
  )


def fell(record: Evidence) -> Verdict | None:
  """The reward is lower than it was in the beginning."""
  rewards, known = record.series("reward_mean"), truth(record)
  if len(rewards) < _ENOUGH or (known and known[-1][1] > known[0][2]) or record.rising():
    return None
  rise, error = trend(rewards)
  first = sum(rewards[: len(rewards) // 4]) / (len(rewards) // 4)
  if -rise <= max(_ERRORS * error, _LOST * abs(first), 1e-9):
    return None
  decay = finite(record.config.get("optimizer.weight_decay")) or 0.0
  option = ("optimizer.weight_decay", 0.01) if decay >= _DECAY else lower_rate(record)
  return Verdict(
    "fell",
    f"The reward fell from {number(first, 2)} to {number(first + rise, 2)} and has not come back: "
    "the updates undo what the model could do.",
    attempt(record, option),
  )


def _by_chance(record: Evidence) -> bool:
  """Whether right responses are spread over the groups as the heads of one coin are.

  Problems differ in difficulty, so the responses to one agree more often than by chance:

      p^G + (1 - p)^G, where each of the G is right with the same probability p
  """
  config, right = record.config, record.mean("reward_mean")
  both = zip(record.late("reward_mean"), record.late("accuracy"), strict=False)
  all_or_nothing = record.late("accuracy") and all(abs(a - b) < 1e-6 for a, b in both)
  group = int(finite(config.get("responses_per_prompt")) or 8)
  groups = sum(record.late("rewards_ok")) / group
  told = all_or_nothing and record.series("frac_zero_std") and groups >= _GROUPS
  if not told or not _RARE < right < _USUAL:
    return False
  chance = right**group + (1 - right) ** group
  error = (chance * (1 - chance) / groups) ** 0.5
  return record.mean("frac_zero_std") <= chance + _ERRORS * error


def _held(record: Evidence, said: str) -> Verdict | None:
  """A setting that keeps the policy, or what it samples, from changing."""
  config = record.config
  price = finite(config.get("kl.coef")) or 0.0
  if price >= _DEAR:
    held = f"{said}: a KL that costs {number(price)} a nat holds the policy where it began."
    return Verdict("held_back", held, attempt(record, ("kl.coef", min(price / 30, 0.01))))
  temperature = finite(config.get("sampling.temperature")) or 1.0
  if temperature >= _HOT:
    hot = f"{said}: at temperature {number(temperature)} the samples are noise."
    return Verdict("hot", hot, attempt(record, ("sampling.temperature", 1.0)))
  warmup, steps = (finite(config.get(key)) or 0.0 for key in ("optimizer.warmup_steps", "steps"))
  if warmup > steps > 0:
    return Verdict(
      "warming_up",
      f"{said}: the warm-up of {warmup:.0f} steps outlasts the run, so the learning rate stays "
      f"below {steps / warmup:.1%} of what was set.",
      attempt(record, ("optimizer.warmup_steps", int(steps / 10))),
    )
  return None


def _thrown(record: Evidence, said: str) -> Verdict | None:
  """Updates after which the policy is another one each time."""
  entropies = record.series("entropy")
  jump = max((abs(b - a) for a, b in itertools.pairwise(entropies)), default=0.0)
  if jump <= JUMP:
    return None
  return Verdict(
    "first_updates",
    f"{said}, but the entropy changed by {number(jump, 2)} nats per token in one: the updates are "
    "too large.",
    attempt(record, lower_rate(record)),
  )


def _unlearnable(record: Evidence, said: str) -> Verdict | None:
  """A reward that does not depend on what the policy does."""
  entropies = record.series("entropy") or [0.0]
  first, (change, _) = entropies[0], trend(entropies)
  if record.mean("frac_zero_std") < 0.5 and abs(change) > _MOVED * first > 0:
    why = (
      f"although the policy has (entropy {number(first, 2)} to {number(record.mean('entropy'), 2)})"
      ": what the grader pays for does not depend on it."
    )
  elif _by_chance(record):
    why = (
      "and every problem is solved equally often: the groups differ as if each response had a "
      f"chance of {record.mean('reward_mean'):.0%}, whatever it says."
    )
  else:
    return None
  return Verdict(
    "unlearnable",
    f"{said}, {why}",
    f"Check the grader ({grader(record)}): equal responses should earn the same",
  )


def unmoved(record: Evidence) -> Verdict | None:
  """The reward is what it was, within its noise: because of a setting, the grader, or the rate."""
  rewards, known = record.series("reward_mean"), truth(record)
  if len(rewards) < _ENOUGH or record.share_done() < 0.5:
    return None
  rise, error = trend(rewards)
  moved = abs(rise) > max(_ERRORS * error, 0.02 * (max(rewards) - min(rewards)))
  if moved or (known and known[-1][1] > known[0][2]):
    return None
  said = f"The reward has not moved in {len(rewards)} steps"
  for why in (_held, _thrown, _unlearnable):
    if found := why(record, said):
      return found
  given = finite(record.config.get("optimizer.learning_rate")) or 1e-5
  return Verdict(
    "unmoved",
    f"{said}: {number(rise, 2)} from the first quarter to the last, within its noise.",
    attempt(record, ("optimizer.learning_rate", 10 * given), "more steps"),
  )
