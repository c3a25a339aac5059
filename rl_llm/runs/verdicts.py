"""What a run's record says: known ways to fail, each in one sentence with the flag to try.

A curve shows what happened, but whoever trains for the first time does not know which shape is a
fault. Each rule here reads the rows of metrics.jsonl and the config, and says one thing, or
nothing. A rule says nothing of a run that has learned its task: groups also agree where every
response is right. Rules that name a cause come before those that name what follows from it.

The thresholds are constants at the top.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rl_llm.runs import verdicts_examples as examples
from rl_llm.runs import verdicts_settings as settings
from rl_llm.runs import verdicts_suspects as suspects
from rl_llm.runs.evidence import (
  ERRORS,
  FEW,
  Evidence,
  Verdict,
  attempt,
  full_reward,
  grader,
  lower_rate,
  nearer,
  trend,
  truth,
)
from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import finite
from rl_llm.runs.verdicts_updates import UPDATES, bonus, no_baseline

# Fewer steps say nothing of a trend.
_ENOUGH = 10
# A group "agrees" from the step after which this share of all groups has equal rewards.
_AGREE = 0.9
# "Small" groups have up to this many responses; they agree too often from this share on.
_SMALL, _SMALL_AGREE = 4, 0.6
# Entropy is "gone" below this share of the first, or below this many nats per token.
_ENTROPY_SHARE, _ENTROPY_NATS = 0.02, 0.005
# A policy this undecided, in nats per token, writes noise: that it never ends says nothing.
_NOISE = 1.5
# Updates are "early" up to this step.
_EARLY = 5
# Shares of responses.
_CUT, _FAILED = 0.5, 0.05
# A gradient norm below this share of the first is no gradient.
_DEAD = 1e-6
# A reward is on a plateau if its last quarter rose by less than this share of its whole rise.
_STILL = 0.05
# A grader "pays in full" from this share of the greatest reward.
_PAID = 0.7
# A policy that is right more often than this is not lost, however certain it is.
_HALF = 0.5
# Groups of noise agree as well: they are told from this share of the run on.
_BEGUN = 0.5

_FAILURES = ("raised", "timed_out", "died", "invalid")


def verdicts(
  rows: Sequence[Mapping[str, Any]],
  config: Mapping[str, Any],
  changed: Mapping[str, Any] = MappingProxyType({}),
) -> list[Verdict]:
  """What the record says, the cause first; nothing of a run that goes well.

  Twelve steps in which the grader gave 0 to everything:

  >>> rows = [{"step": step, "reward_mean": 0.0, "frac_zero_std": 1.0} for step in range(12)]
  >>> (found,) = verdicts(rows, {"task": "jsonl:train.jsonl", "jsonl.reward_file": "mine.py"})
  >>> print(found.says)
  No response was ever rewarded: the reward is 0 in all 12 steps.
  >>> "--jsonl.reward_file=mine.py" in found.advice
  True

  Args:
    rows: of metrics.jsonl.
    config: of config.json, dotted path -> value; {} if it is not known.
    changed: of changed.json, the settings that are not the defaults -> what these would be.

  Returns:
    The verdicts; those of one chain of causes are one.
  """
  trained = [row for row in rows if any(key in row for key in ("loss", "reward_mean"))]
  evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
  record = Evidence(trained, evaluated, config, changed)
  if not trained:
    return []
  for rule in _BROKEN:
    if found := rule(record):
      return [suspects.suspected(record, found)]
  found = []
  if len(trained) >= _ENOUGH and not record.solved():
    chains = (_LEARNING, UPDATES, (examples.answers_cut, examples.memorised, *examples.EXAMPLES))
    found = [next((v for rule in chain if (v := rule(record))), None) for chain in chains]
  if not any(found):  # Also of what is right in training alone, or was from the start.
    found = [next((v for rule in _SOLVED if (v := rule(record))), None)]
  found = [verdict for verdict in found if verdict]
  if found:
    return [suspects.suspected(record, found[0]), *found[1:]]
  poor = len(trained) >= _ENOUGH and not record.solved() and suspects.short_of(record)
  return [poor] if poor else []


# What is broken, whatever else the record says.


def _skipped(record: Evidence) -> Verdict | None:
  counts = [finite(row.get("updates_skipped")) or 0.0 for row in record.rows]
  if (
    counts[-1] <= counts[-min(len(counts), 10)]
    and finite(record.rows[-1].get("loss", 0)) is not None
  ):
    return None
  return Verdict(
    "not_finite",
    f"{number(counts[-1])} updates were skipped, some of them just now: their gradient was not "
    "finite.",
    attempt(record, lower_rate(record)),
  )


def _grader_failed(record: Evidence) -> Verdict | None:
  rows = record.rows[-max(5, len(record.rows) // 4) :]
  counts = {
    name: sum(finite(row.get(f"rewards_{name}")) or 0.0 for row in rows) for name in _FAILURES
  }
  whole = sum(counts.values()) + sum(finite(row.get("rewards_ok")) or 0.0 for row in rows)
  share = sum(counts.values()) / whole if whole else 0.0
  if share < _FAILED:
    return None
  most = max(counts, key=counts.get)
  advice = f"Correct the grader ({grader(record)}): samples.jsonl has what it failed on"
  if most == "timed_out":
    deadline = finite(record.config.get("reward_deadline")) or 5.0
    advice = attempt(record, ("reward_deadline", 4 * deadline), "a faster grader")
  return Verdict(
    "grader_failed",
    f"The grader failed on {share:.0%} of the newest responses (most of them "
    f"{most.replace('_', ' ')}); these teach nothing.",
    advice,
  )


def _differ(record: Evidence) -> bool:
  """Whether the newest rewards differ within groups; where none says so, from step to step."""
  if record.series("frac_zero_std"):
    return record.mean("frac_zero_std") < 0.95
  return len({*record.late("reward_mean")}) > 1


def _first_updates(record: Evidence) -> Verdict | None:
  """Updates that broke the network before it learned anything."""
  norms, entropies = record.series("grad_norm"), record.series("entropy")
  if len(norms) > _EARLY and max(norms[-_EARLY:]) <= _DEAD * norms[0] and _differ(record):
    since = record.since(lambda row: (finite(row.get("grad_norm")) or 0.0) <= _DEAD * norms[0])
    said = f"the gradient has been 0 since step {since}, although the rewards differ."
  else:
    early = zip(entropies[:_EARLY], entropies[1 : _EARLY + 1], strict=False)
    jumps = [i for i, (before, after) in enumerate(early) if abs(after - before) > settings.JUMP]
    rewards = record.series("reward_mean")
    recovered = bool(rewards) and record.mean("reward_mean") > rewards[0]
    if not jumps or recovered or record.solved():
      return None
    i = jumps[0]
    before, after = number(entropies[i], 2), number(entropies[i + 1], 2)
    said = f"the entropy went from {before} to {after} nats per token in step {i}."
  return Verdict(
    "first_updates",
    f"The first updates were too large: {said}",
    attempt(record, lower_rate(record)),
  )


def _constant(record: Evidence) -> Verdict | None:
  rewards = record.series("reward_mean")
  spread = [1.0 - value for value in record.series("frac_zero_std")]
  same = len(rewards) >= 5 and max(rewards) - min(rewards) <= 1e-9 and max(spread, default=0.0) == 0
  if not same or _cut(record):
    return None
  if rewards[0] == 0:
    more = 2 * int(finite(record.config.get("responses_per_prompt")) or 8)
    return Verdict(
      "never_rewarded",
      f"No response was ever rewarded: the reward is 0 in all {len(rewards)} steps.",
      f"Check that the grader pays for a right answer ({grader(record)}). "
      + attempt(record, "easier problems", "a stronger model", ("responses_per_prompt", more)),
    )
  return Verdict(
    "always_rewarded",
    f"Every response got the same reward, {number(rewards[0])}, in all {len(rewards)} steps, so "
    "there is nothing to learn.",
    f"Check that the grader refuses a wrong answer ({grader(record)}). Try harder problems",
  )


# What keeps a run from learning, the cause first.


def _cut(record: Evidence) -> Verdict | None:
  share, newest = record.mean("truncated_fraction"), record.series("truncated_fraction")[-5:]
  falling = not newest or statistics.fmean(newest) < 0.9 * max(record.late("truncated_fraction"))
  noise = record.mean("entropy") > _NOISE
  right_though_cut = record.mean("accuracy") > 1 - share + 0.05
  # A reward that rises by parts of an answer, of which none is ever whole, is no way out.
  learns = record.rising() and max(record.series("accuracy"), default=1.0) > 0
  learns = learns or _more_right(record)
  if share < _CUT or falling or noise or right_though_cut or learns:
    return None
  limit = int(finite(record.config.get("max_new_tokens")) or 0)
  return Verdict(
    "cut_short",
    f"{share:.0%} of the newest responses are cut at the limit"
    + (f" of {limit} tokens" if limit else "")
    + ", so most never come to their answer.",
    attempt(record, settings.room(record)),
  )


def _more_right(record: Evidence) -> bool:
  """Whether a run in progress has more right responses than it began with, beyond chance."""
  rights, count = record.series("accuracy"), sum(record.late("rewards_ok"))
  if not rights or not count or record.share_done() >= 1:
    return False
  rise, _ = trend(rights)
  right = record.mean("accuracy")
  return rise > ERRORS * ((right + 1 / count) / count) ** 0.5


def _cut_before_any_answer(record: Evidence) -> Verdict | None:
  """Cut responses of which none was ever right: whatever else the record shows follows from it."""
  return _cut(record) if max(record.series("accuracy"), default=1.0) == 0 else None


def _entropy_gone(record: Evidence) -> Verdict | None:
  entropies = record.series("entropy")
  if not entropies or not record.series("reward_mean"):  # Given answers may be certain.
    return None
  bound = max(_ENTROPY_SHARE * entropies[0], _ENTROPY_NATS)
  since = record.since(lambda row: (finite(row.get("entropy")) or 0.0) <= bound)
  if since is None or max(entropies[-5:]) > bound or record.mean("accuracy") > _HALF:
    return None
  coefficient = finite(record.config.get("loss.entropy_coef")) or 0.0
  bonus = 2 * coefficient if coefficient else (0.1 if entropies[0] > _NOISE else 0.01)
  advice = attempt(record, ("loss.entropy_coef", bonus), lower_rate(record))
  if (finite(record.config.get("sampling.temperature")) or 1.0) <= 0.5:
    advice = attempt(record, ("sampling.temperature", 1.0))
  return Verdict(
    "entropy_gone",
    f"The entropy is gone since step {since} ({number(record.mean('entropy'), 2)} nats per token): "
    f"all samples of a problem are the same, and {_right(record)}.",
    advice,
  )


def _right(record: Evidence) -> str:
  """How many of the newest responses are right, where that is recorded."""
  return (
    f"{record.mean('accuracy'):.0%} are right" if record.series("accuracy") else "few are right"
  )


def _groups_agree(record: Evidence) -> Verdict | None:
  since = record.since(lambda row: (finite(row.get("frac_zero_std")) or 0.0) >= _AGREE)
  early = record.share_done() < _BEGUN or record.rising()
  if since is None or early or record.mean("frac_zero_std") < _AGREE:
    return None
  group = int(finite(record.config.get("responses_per_prompt")) or 8)
  return Verdict(
    "groups_agree",
    f"Groups agree since step {since}: in {record.mean('frac_zero_std'):.0%} of them all "
    f"{group} responses have the same reward, which teaches nothing.",
    attempt(
      record,
      ("responses_per_prompt", max(8, 2 * group)),
      "problems that the model sometimes solves",
    ),
  )


def _small_groups(record: Evidence) -> Verdict | None:
  group = int(finite(record.config.get("responses_per_prompt")) or 8)
  share = record.mean("frac_zero_std")
  newest = statistics.fmean(record.series("frac_zero_std")[-5:] or [0.0])
  early = record.share_done() < _BEGUN or record.mean("accuracy") > _HALF
  if group > _SMALL or min(share, newest) < _SMALL_AGREE or early:
    return None
  return Verdict(
    "small_groups",
    f"In {share:.0%} of the groups all {group} responses have the same reward: groups this small "
    "rarely differ.",
    attempt(record, ("responses_per_prompt", 8)),
  )


def _overlooked(record: Evidence) -> Verdict | None:
  """The reward rose to a plateau, and the truth stayed."""
  rewards, known = record.series("reward_mean"), truth(record)
  if len(rewards) < 2 * _ENOUGH or not known:
    return None
  rise, error = trend(rewards)
  still, _ = trend(record.late("reward_mean"), parts=2)
  fell = known[-1][2] < known[0][0]
  plateau = still <= _STILL * rise and record.share_done() >= 0.5
  flat = known[-1][1] <= known[0][2] and plateau and not _more_right(record)
  graded = str(record.config.get("reward", "task")) == "task"
  scale = full_reward(record) if graded else 0.0  # A reward model has no scale of its own.
  if rise <= max(ERRORS * error, 0.1 * scale, 1e-9) or not (fell or flat):
    return None
  if (trend(record.series("accuracy")) if record.series("accuracy") else (0.0, 0.0))[0] > FEW:
    return _by_heart(record, known[-1])
  if not any([*record.series("accuracy"), *(ends[1] for ends in known)]):
    return Verdict(
      "overlooked",
      f"The reward rose by {number(rise, 2)}, to {number(record.mean('reward_mean'), 2)}, and not "
      "one response was ever right: the grader pays for something else.",
      f"Check what it pays for, and its sign ({grader(record)}): samples.jsonl has every reward",
    )
  before, after = (number(ends[1], 2) for ends in (known[0], known[-1]))
  return Verdict(
    "overlooked",
    f"The reward rose by {number(rise, 2)} while held-out accuracy went from {before} to {after}: "
    "the policy has found what the grader overlooks.",
    f"Read the samples with the highest rewards, and correct the grader ({grader(record)}). "
    + attempt(record, nearer(record)),
  )


def _paid_in_full(record: Evidence) -> Verdict | None:
  """Nearly the whole reward for answers of which hardly any is right: no collapse, but a way."""
  full = full_reward(record)
  paid = _PAID * full <= record.mean("reward_mean") <= full
  return _overlooked(record) if paid and record.mean("accuracy") <= FEW else None


def _by_heart(record: Evidence, held_out: tuple[float, float, float]) -> Verdict | None:
  """Right answers to the problems of training alone."""
  right = record.mean("accuracy")
  if right <= held_out[2]:
    return None
  return Verdict(
    "by_heart",
    f"Of the training problems {right:.0%} are right, of the held-out ones {held_out[1]:.0%}: the "
    "model learns its problems by heart.",
    "Try more problems, or fewer steps",
  )


def _unfinished(record: Evidence) -> Verdict | None:
  """A run that was over before anything was right, although its reward still rose."""
  right = record.late("accuracy")
  if record.share_done() < 1 or not record.rising() or not right or max(right) > FEW:
    return None
  rise, _ = trend(record.late("reward_mean"), parts=2)
  steps = int(finite(record.config.get("steps")) or len(record.rows))
  return Verdict(
    "unfinished",
    f"The run ended while its reward was still rising, by {number(rise, 2)} in the last quarter, "
    f"and at most {max(right):.0%} of a step's responses were right.",
    attempt(record, ("steps", 2 * steps)),
  )


_BROKEN = (
  _skipped,
  _grader_failed,
  settings.cold,
  settings.never_ends,
  _constant,
  no_baseline,
  settings.graded_alike,
  _first_updates,
)
_LEARNING = (
  settings.prompts_cut,
  examples.like_its_teacher,
  bonus,
  settings.other_part,
  _paid_in_full,
  _cut_before_any_answer,
  _entropy_gone,
  _cut,
  settings.unreadable,
  _overlooked,
  settings.fell,
  _groups_agree,
  _small_groups,
  settings.unmoved,
  _unfinished,
)
_SOLVED = (examples.memorised, examples.by_heart, examples.nothing_left)
