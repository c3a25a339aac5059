"""Rules of `rl_llm.runs.verdicts` about runs in which a setting leaves nothing to learn from."""

from __future__ import annotations

import itertools
import statistics

from rl_llm.runs.evidence import (
  ERRORS,
  FEW,
  Evidence,
  Verdict,
  attempt,
  full_reward,
  grader,
  lower_rate,
  trend,
  truth,
)
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
# This share of prompts cut at their beginning is told.
_CUT_PROMPTS = 0.2
# What other parts of a reward pay is "large" from this share of a right answer's reward.
_LARGE = 0.5
# Responses of a step with which its mean reward is noise.
_STEP_RESPONSES = 16
# Clipping takes nearly all of a gradient of this many times its limit.
_CLIPPED = 1000.0
# Values this much worse than one number for all mislead.
_BLIND = -0.5
# A price of the KL, in reward per nat, and a weight decay, that hold a policy where it is.
_DEAR, _DECAY = 0.5, 0.3
# A reward has "fallen" by `ERRORS` and by this share of what it was.
_LOST = 0.1
# The policy has "moved" where its entropy changed by this share.
_MOVED = 0.1
# Outside these shares of right responses, groups agree whoever grades.
_RARE, _USUAL = 0.1, 0.9
_PROMPTS = ("prompts_per_step", "max_prompt_tokens")
# Groups that show how often they agree: if none of this many does, under 1.5 % of all do.
_GROUPS = 200
# Groups of which not one differs, and the nats of a response with which its samples do differ.
_ALIKE, _OPEN = 50, 1.0


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


def prompts_cut(record: Evidence) -> Verdict | None:
  """Prompts that begin somewhere in their middle."""
  config = record.config
  problems, limit = (int(finite(config.get(key)) or 0) for key in _PROMPTS)
  share = min(record.mean("overlong_prompts") / problems, 1.0) if problems else 0.0
  if config.get("overlong_prompt") != "truncate_left" or share < _CUT_PROMPTS:
    return None
  return Verdict(
    "prompts_cut",
    f"{share:.0%} of the prompts are longer than {limit} tokens and have lost their beginning: the "
    "model is not shown what it is asked.",
    attempt(record, ("max_prompt_tokens", 4 * limit)),
  )


def other_part(record: Evidence) -> Verdict | None:
  """A sum of rewards that rises, but hardly by what says which responses are right."""
  total, penalties = record.series("reward_mean"), record.series("overlong_penalty")
  terms = str(record.config.get("reward", "task")).split(",")
  names = [term.split("*")[0].rsplit(":", 1)[-1] for term in terms]
  graded = record.series(f"reward_{names[0]}") if len(names) > 1 else []
  if not graded and penalties and len(penalties) == len(total):
    graded = [whole - part for whole, part in zip(total, penalties, strict=True)]
  if len(total) < _ENOUGH or len(graded) != len(total) or record.share_done() < 0.5:
    return None
  (rise, error), (of_grade, _) = trend(total), trend(graded)
  paid = record.mean("reward_mean")
  grade = statistics.fmean(graded[-len(graded) // 4 :])
  mostly = rise > ERRORS * error and of_grade <= 0.5 * rise
  large = paid - grade >= max(_LARGE * full_reward(record), 2 * grade)
  if not (mostly or large) or record.mean("accuracy") > FEW:
    return None
  others = " and ".join(names[1:]) if len(names) > 1 else "the penalty for length"
  option = ",".join([terms[0], *(_weaker(term) for term in terms[1:])])
  weaker = ("reward", option) if len(names) > 1 else ("overlong.cache", 0.0)
  return Verdict(
    "other_part",
    f"Of the reward, {number(paid, 2)}, the grader itself pays {number(grade, 2)}: the policy "
    f"follows {others}, and {record.mean('accuracy'):.0%} of its responses are right.",
    attempt(record, weaker),
  )


def _weaker(term: str) -> str:
  """A reward with a tenth of its weight.

  >>> _weaker("style.py:short*0.2"), _weaker("style.py:short")
  ('style.py:short*0.02', 'style.py:short*0.1')
  """
  name, _, weight = term.partition("*")
  return f"{name}*{number(float(weight or 1) / 10, 2)}"


def unreadable(record: Evidence) -> Verdict | None:
  """Answers in another form than the grader reads."""
  graded = sum(record.late("rewards_ok"))
  share = sum(record.late("rewards_unreadable")) / graded if graded else 0.0
  if share < 0.5 or record.rising():
    return None
  flag = "reasoning_gym.instruction"
  return Verdict(
    "unreadable",
    f"The grader cannot read {share:.0%} of the newest responses: they are not in the form that it "
    "expects.",
    attempt(record, "an instruction that says how to give the answer")
    + (f" (--{flag})" if flag in record.config else ""),
  )


def room(record: Evidence) -> str | tuple[str, int]:
  """What gives responses room to end: a limit that is higher, or that on their least length."""
  limit = int(finite(record.config.get("max_new_tokens")) or 0)
  least = int(finite(record.config.get("sampling.min_new_tokens")) or 0)
  if least and least >= limit / 2:
    return "sampling.min_new_tokens", 0
  return ("max_new_tokens", 2 * limit) if limit else "a higher limit"


def never_ends(record: Evidence) -> Verdict | None:
  """All responses cut, in all steps: not one was ever ended, and none was right."""
  cut, responses = record.series("truncated_fraction"), sum(record.series("rewards_ok"))
  if responses < _RESPONSES or min(cut, default=0.0) < 1 or max(record.series("accuracy") or [1.0]):
    return None
  limit = int(finite(record.config.get("max_new_tokens")) or 0)
  return Verdict(
    "cut_short",
    f"No response ever ended by itself: all {responses:.0f} are cut at the limit"
    + (f" of {limit} tokens" if limit else "")
    + ", and none is right.",
    attempt(record, room(record))
    + "; check that the model's end-of-sequence token is the one it knows",
  )


def fell(record: Evidence) -> Verdict | None:
  """The reward is lower than it was in the beginning."""
  rewards, known = record.series("reward_mean"), truth(record)
  if len(rewards) < _ENOUGH or (known and known[-1][1] > known[0][2]) or record.rising():
    return None
  rise, error = trend(rewards)
  first = sum(rewards[: len(rewards) // 4]) / (len(rewards) // 4)
  if -rise <= max(ERRORS * error, _LOST * abs(first), 1e-9):
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
  return record.mean("frac_zero_std") <= chance + ERRORS * error


def graded_alike(record: Evidence) -> Verdict | None:
  """Responses that differ, of which all to a problem have one reward: only some problems pay.

  Eight responses of which each is right by a half are all alike in 2 * 0.5^8, 0.8 % of the groups.
  """
  shares, right = record.series("frac_zero_std"), record.mean("accuracy")
  group = int(finite(record.config.get("responses_per_prompt")) or 8)
  few = group <= 3 or sum(record.series("rewards_ok")) < _ALIKE * group
  if few or min(shares, default=0.0) < 1 or not _RARE < right < _USUAL:
    return None
  nats = record.mean("entropy") * record.mean("response_length_mean")
  sampling = [finite(record.config.get(f"sampling.{key}")) for key in ("temperature", "top_p")]
  narrow = min(value or 1.0 for value in sampling) < 0.5
  narrow = narrow or 0 < (finite(record.config.get("sampling.top_k")) or 0) < 4
  if nats < _OPEN or narrow:
    return None
  return Verdict(
    "graded_alike",
    f"In all {len(shares)} steps the {group} responses to a problem had one reward, though they "
    f"differ ({number(nats, 2)} nats a response) and {right:.0%} are right: what the grader pays "
    "depends on the problem alone.",
    f"Check that the grader reads the response, and keeps nothing from call to call "
    f"({grader(record)})",
  )


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


def _small_steps(record: Evidence, said: str) -> Verdict | None:
  """An optimizer that takes next to nothing of each gradient."""
  config = record.config
  norm, limit = record.mean("grad_norm"), finite(config.get("optimizer.max_grad_norm")) or 0.0
  if config.get("optimizer.name") != "sgd":
    return None
  if limit and norm > _CLIPPED * limit:
    said = f"{said}: gradients of norm {number(norm, 2)} are scaled down to {number(limit)}."
    return Verdict("clipped", said, attempt(record, ("optimizer.max_grad_norm", 1.0)))
  given = finite(config.get("optimizer.learning_rate")) or 1e-5
  return Verdict(
    "sgd",
    f"{said}: plain gradient steps of {number(given)} times a norm of {number(norm, 2)} are short; "
    "Adam's do not depend on that norm.",
    attempt(record, ("optimizer.name", "adamw"), ("optimizer.learning_rate", 100 * given)),
  )


def _misled(record: Evidence, said: str) -> Verdict | None:
  """Values that are worse than none."""
  told = record.mean("explained_variance")
  if told > _BLIND:
    return None
  rate = (finite(record.config.get("value.learning_rate")) or 1e-4) / 10
  return Verdict(
    "misled",
    f"{said}, and the value network predicts it worse than one number would (explained variance "
    f"{number(told, 2)}).",
    attempt(record, ("value.learning_rate", rate)),
  )


def _few_responses(record: Evidence, said: str) -> Verdict | None:
  """Steps of so few responses that nothing can be seen in them."""
  responses = record.mean("rewards_ok")
  if not 0 < responses <= _STEP_RESPONSES:
    return None
  return Verdict(
    "noisy",
    f"{said}: a step has only {responses:.0f} responses, and their mean is mostly noise.",
    attempt(record, ("prompts_per_step", 16)),
  )


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
  moved = abs(rise) > max(ERRORS * error, 0.02 * (max(rewards) - min(rewards)))
  if moved or (known and known[-1][1] > known[0][2]):
    return None
  said = f"The reward has not moved in {len(rewards)} steps"
  for why in (_held, _small_steps, _thrown, _misled, _unlearnable, _few_responses):
    if found := why(record, said):
      return found
  given = finite(record.config.get("optimizer.learning_rate")) or 1e-5
  return Verdict(
    "unmoved",
    f"{said}: {number(rise, 2)} from the first quarter to the last, within its noise.",
    attempt(record, ("optimizer.learning_rate", 10 * given), "more steps"),
  )
