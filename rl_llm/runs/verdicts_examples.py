"""Rules of `rl_llm.runs.verdicts` about what is learned from: examples, pairs, labels, a teacher.

The loss says whether they are learned, the task's held-out problems whether that was any use.
"""

from __future__ import annotations

import statistics

from rl_llm.runs.evidence import (
  ERRORS,
  FEW,
  Evidence,
  Verdict,
  attempt,
  data,
  flag,
  grader,
  lower_rate,
  trend,
  truth,
)
from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import finite

# A held-out loss this share over its minimum has turned, and one this share off the first has
# moved.
_TURNED, _MOVED = 0.05, 0.02
# Training examples are learned once their loss is this share below the first.
_LEARNED = 0.1
# No rise of a held-out loss is this small, in nats.
_NATS = 0.01
# Steps that a trend takes.
_ENOUGH = 20
# A student "is" its teacher below this many nats per token, if that is this share of the first;
# or below this many anyway.
_NEAR, _NEAR_SHARE, _SAME = 0.1, 0.1, 0.01
# A policy has moved where held-out answers earn this much; it tells nothing where the share in
# order is this close to a coin's.
_EARNED, _COIN = 0.02, 0.05
# Held-out pairs and labels are told apart from this share on, whatever their loss is.
_TOLD = 0.9
# Labels are "one-sided" where fewer than this share are of the other kind.
_OTHER_KIND = 0.05
# Problems are known by heart where this much more of them is right than of held-out ones, at most.
_GAP = 0.2
# Examples over the limit are told from this share on, of a run with fewer right answers than half.
_LONG, _HALF = 0.2, 0.5
_LOST = {
  "truncate_left": "have lost their beginning, so the model is not shown what it is asked",
  "truncate_right": "have lost their end, so the model is not shown how an answer ends",
  "drop": "are left out, so only short ones are learned",
}
# From this share of right answers before training on, nothing is left to learn; nor where all
# responses of this many first steps are right.
_DONE, _FIRST = 0.9, 5

_LOSSES = ("eval/token_loss", "eval/pair_loss", "eval/answer_loss")


def _losses(record: Evidence, *keys: str) -> list[tuple[int, float]]:
  """(step, held-out loss) of each evaluation."""
  for key in keys:
    found = [(row["step"], finite(row.get(key))) for row in record.evaluated]
    found = [(step, loss) for step, loss in found if loss is not None]
    if len(found) > 1:
      return found
  return []


def _fell(record: Evidence) -> bool:
  """Whether the training loss fell, from the first quarter to the last and from the first step."""
  losses = record.series("loss") or [0.0]
  fell, error = trend(losses)
  return fell < -error and record.mean("loss") < losses[0] - _LEARNED * abs(losses[0])


def _told(record: Evidence) -> bool:
  """Whether held-out pairs, or labels, are told apart."""
  last = record.evaluated[-1] if record.evaluated else {}
  shares = (finite(last.get(f"eval/{key}")) or 0.0 for key in ("pair_accuracy", "label_auc"))
  return max(shares) >= _TOLD


def _held_more(record: Evidence) -> tuple[str, float]:
  """A reference that holds more strongly."""
  return "loss.beta", 5 * (finite(record.config.get("loss.beta")) or 0.1)


def answers_cut(record: Evidence) -> Verdict | None:
  """Examples that are not whole, or not there, for being too long."""
  rows, long = (finite(record.rows[-1].get(f"data_{key}")) or 0.0 for key in ("rows", "overlong"))
  lost = _LOST.get(str(record.config.get("overlong")))
  known = truth(record)
  poor = known[-1][1] < _HALF and known[-1][0] <= known[0][2] if known else long > _HALF * rows
  if not lost or long < _LONG * rows or not long or not poor:
    return None
  limit = int(finite(record.config.get("max_tokens")) or 0)
  return Verdict(
    "answers_cut",
    f"{min(long / rows, 1):.0%} of the examples are longer than {limit} tokens and {lost}.",
    attempt(record, ("max_tokens", 4 * limit)),
  )


def memorised(record: Evidence) -> Verdict | None:
  """The held-out loss of examples turned, while the training loss fell."""
  losses = _losses(record, *_LOSSES)
  if len(losses) < 3:
    return None
  step, least = min(losses, key=lambda pair: pair[1])
  turned = losses[-1][1] > least + _TURNED * abs(least) and step < losses[-2][0]
  if not turned or not _fell(record) or _told(record):
    return None
  ends = f"({number(least)}, now {number(losses[-1][1])}) while the training loss fell"
  if step == losses[0][0]:
    return Verdict(
      "no_signal",
      f"The held-out loss never fell {ends}: what is learned of the training examples does not "
      "hold for others.",
      f"Check the labels, or which answer is the better one ({data(record)}). "
      + attempt(record, "more data", lower_rate(record)),
    )
  return Verdict(
    "memorised",
    f"The held-out loss was least at step {step} {ends}: the model learns its examples by heart.",
    attempt(record, ("steps", step), "more data", lower_rate(record)),
  )


def one_sided(record: Evidence) -> Verdict | None:
  """Labels that are nearly all the same."""
  wanted = record.series("desirable_fraction")
  share = statistics.fmean(wanted) if wanted else 0.5
  if _OTHER_KIND <= share <= 1 - _OTHER_KIND:
    return None
  kind, other = ("wanted", "unwanted") if share > 0.5 else ("unwanted", "wanted")
  return Verdict(
    "one_sided",
    f"{max(share, 1 - share):.0%} of the answers are {kind} ones: there is next to nothing to tell "
    "them from.",
    attempt(record, f"more {other} answers in {data(record)}", ("balanced", "true")),
  )


def worse(record: Evidence) -> Verdict | None:
  """A held-out loss that is higher than before training, and was so at the evaluation before."""
  losses = _losses(record, *_LOSSES, "eval/reverse_kl")
  if len(losses) < 3 or _fell(record):
    return None
  first = losses[0][1]
  if min(loss for _, loss in losses[-2:]) <= first + max(_TURNED * abs(first), _NATS):
    return None
  return Verdict(
    "worse",
    f"The held-out loss rose from {number(first)} to {number(losses[-1][1])}: the updates are too "
    "large.",
    attempt(record, lower_rate(record)),
  )


def taught_else(record: Evidence) -> Verdict | None:
  """The data is learned, and the task is not, or is forgotten."""
  losses, known = _losses(record, *_LOSSES), truth(record)
  if not losses or not known or losses[-1][1] >= losses[0][1] - _MOVED * abs(losses[0][1]):
    return None
  forgot = known[-1][2] < known[0][0]
  late, whole = trend(record.late("loss"), parts=2)[0], trend(record.series("loss"))[0]
  plateau = abs(late) <= 0.1 * abs(whole) and record.share_done() >= 0.5
  plateau = plateau and record.evaluated[-1]["step"] >= record.rows[-1]["step"]
  never = plateau and known[-1][1] <= min(known[0][2], FEW)
  if not forgot and not never:
    return None
  before, after = (number(ends[1], 2) for ends in (known[0], known[-1]))
  pairs = bool(record.series("pair_accuracy"))
  check = f"Check that the chosen answers are the better ones ({data(record)})"
  if not pairs:
    check = f"Check that its answers are those that the task calls right ({data(record)})"
  option = _held_more(record) if pairs else lower_rate(record)
  if pairs and known[0][1] == known[-1][1] == 0:
    model = flag(record, "model", record.config.get("model")) or "this one"
    return Verdict(
      "never_right",
      f"The held-out loss fell from {number(losses[0][1])} to {number(losses[-1][1])}, and not one "
      "held-out answer was right, before or after: pairs teach a model which of its answers to "
      "prefer, and this one has no right ones.",
      f"Try a model that is sometimes right, by experiments.sft for instance, in the place of "
      f"{model}. {check}",
    )
  return Verdict(
    "taught_else",
    f"The held-out loss fell from {number(losses[0][1])} to {number(losses[-1][1])} while held-out "
    f"accuracy went from {before} to {after}: the data teaches something else than the task "
    "grades.",
    check + (". " + attempt(record, option) if forgot else ""),
  )


def like_its_teacher(record: Evidence) -> Verdict | None:
  """A student that is its teacher, and still wrong."""
  far, known = _losses(record, "eval/reverse_kl"), truth(record)
  if not far or not known or record.share_done() < 0.5 or known[-1][1] > known[0][2]:
    return None
  first, last = far[0][1], far[-1][1]
  if last > max(min(_NEAR, _NEAR_SHARE * first), _SAME):
    return None
  teacher = flag(record, "teacher", record.config.get("teacher")) or "this one"
  return Verdict(
    "like_its_teacher",
    f"The student writes as its teacher does (KL {number(first, 2)} to {number(last, 2)} nats per "
    f"token), and {known[-1][1]:.0%} of its answers are right: the teacher knows no better.",
    attempt(record, f"a teacher that solves the task, in the place of {teacher}"),
  )


def told_by_chance(record: Evidence) -> Verdict | None:
  """A policy that has moved, and tells held-out answers apart as a coin would."""
  last = record.evaluated[-1] if record.evaluated else {}
  keys = ("desirable_reward", "undesirable_reward", "chosen_reward", "rejected_reward")
  earned = max(abs(finite(last.get(f"eval/{key}")) or 0.0) for key in keys)
  shares = (finite(last.get(f"eval/{key}")) for key in ("label_auc", "pair_accuracy"))
  share = next((share for share in shares if share is not None), None)
  if share is None or abs(share - 0.5) > _COIN or earned < _EARNED or record.share_done() < 0.5:
    return None
  return Verdict(
    "no_signal",
    f"The policy has moved, and of held-out answers it puts {share:.0%} in the right order, as a "
    "coin would: what is learned does not hold for others.",
    f"Check the labels, or which answer is the better one ({data(record)}). Try more data",
  )


def loss_unmoved(record: Evidence) -> Verdict | None:
  """Given examples whose loss is what it was."""
  losses, trained = _losses(record, *_LOSSES, "eval/reverse_kl"), record.series("loss")
  if record.series("reward_mean") or len(trained) < _ENOUGH or record.share_done() < 0.5:
    return None
  if not losses:
    return None
  rise, error = trend(trained)
  first, last = losses[0][1], losses[-1][1]
  if rise < -max(ERRORS * error, _MOVED * abs(first)) or abs(last - first) > _MOVED * abs(first):
    return None
  given = finite(record.config.get("optimizer.learning_rate")) or 1e-5
  return Verdict(
    "unmoved",
    f"The loss has not moved in {len(trained)} steps: held out it was {number(first, 4)} and is "
    f"{number(last, 4)}.",
    attempt(record, ("optimizer.learning_rate", 10 * given), "more steps"),
  )


def by_heart(record: Evidence) -> Verdict | None:
  """Right answers to the problems of training alone."""
  known = truth(record)
  if len(record.rows) < _ENOUGH or not known or not record.series("accuracy"):
    return None
  if record.evaluated[-1]["step"] < record.rows[-1]["step"]:  # Training has moved on since.
    return None
  right, (_, accuracy, high) = record.mean("accuracy"), known[-1]
  if right - high < _GAP:
    return None
  temperature = finite(record.config.get("sampling.temperature")) or 1.0
  said = f"Of the training problems {right:.0%} are right, of the held-out ones {accuracy:.0%}"
  if temperature < 1:
    return Verdict(
      "other_samples",
      f"{said}: those of training were sampled at temperature {number(temperature)}, and these at "
      "1.",
      attempt(record, ("sampling.temperature", 1.0)),
    )
  return Verdict(
    "by_heart",
    f"{said}: the model learns its problems by heart.",
    "Try more problems, or fewer steps",
  )


def nothing_left(record: Evidence) -> Verdict | None:
  """A task that the model could do before training."""
  first = record.evaluated[0] if record.evaluated else {}
  low, right = (finite(first.get(f"eval/sampled_{end}")) for end in ("low", "accuracy"))
  every = right == 1 and len(record.rows) >= _FIRST and min(record.series("accuracy")[:_FIRST]) == 1
  if first.get("step") != 0 or low is None or not (low >= _DONE or every):
    return None
  own = {"reward", "jsonl.reward_file"} & {*record.changed}
  check = f"Check that the grader refuses a wrong answer ({grader(record)}). " if own else ""
  return Verdict(
    "nothing_left",
    f"{right:.0%} of the held-out answers were right before training: there is hardly anything to "
    "learn.",
    check + "Try harder problems",
  )


EXAMPLES = (one_sided, worse, taught_else, told_by_chance, loss_unmoved)
