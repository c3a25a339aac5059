"""Settings that may be why a run does badly: those that its command has changed, likeliest first.

A symptom has many causes, and no rule knows them all: a reward stands still because of a rate, a
price, a clip or a label. But runs learn with the defaults of their model and preset. So where one
that does badly has changed a setting, that change is suspected before anything else, and above all
a value with which hardly any run learns: `rl_llm.runs.verdicts_ordinary` says which those are, and
what they do. A run that does well is never asked what it changed.
"""

from __future__ import annotations

import math
import re
import statistics
from typing import Any, NamedTuple

from rl_llm.runs.evidence import Evidence, Verdict, data, grader
from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import finite
from rl_llm.runs.verdicts_ordinary import (
  BLIND,
  DEFAULT,
  ORDINARY,
  STILL,
  SWITCHED,
  WILD,
  Effect,
  Ordinary,
)

# What a default of 0 is taken for, where bounds are multiples of it.
_UNIT = 0.01
# A value on the wrong side of 0 is this many powers of ten outside.
_FAR = 3.0
# Suspects that are named, and characters of a value.
_NAMED, _LONGEST = 3, 40
# A run with less than this share of right answers at its end, and less of a rise, has not learned.
_RIGHT, _ROSE = 0.5, 0.25


class Suspect(NamedTuple):
  """A changed setting.

  Attributes:
    effect: what its value does; None if nothing is known of it.
    outside: powers of ten that it is outside the ordinary values.
  """

  path: str
  value: Any
  default: Any
  effect: Effect | None
  outside: float = 0.0


# Settings that say what is trained, measured and kept, and how it is computed: never suspected.
_NEVER = re.compile(
  r"steps|seed|model|task|data|reward|teacher|laps|packing|remat|scan_layers|attention|code"
  r"|matmul_precision|held_out_examples|reward_\w+|microbatch_\w+|\w+\.held_out_file"
  r"|jsonl\.reward_\w+|\w+\.lenient|\w+\.max_rows|max_rows|data_\w+|init_\w+|env|tools|tool_\w+"
  r"|eval\..*|sampling\.(slots|parts|allow_truncated)|optimizer\.(mu_dtype|max_skipped)"
  r"|dynamic\..*|env_\w+|episode_(deadline|memory_mb)"
)
# Those that say what the problems are: suspected where the table knows what a value does.
_PROBLEMS = re.compile(r"(arithmetic|copy|jsonl|gsm8k|reasoning_gym)\..*")
# Those that decide what is shown, sampled and graded, and act before the first update.
_ASKED = re.compile(r"sampling\..*|system_prompt|prompt_format|max_.*")
# A limit cuts nothing that matters where less than this share of responses reaches it.
_CUT_SHARE = 0.2

# Verdicts whose evidence is of the cause itself.
_PROVEN = (
  *("grader_failed", "one_sided", "like_its_teacher", "nothing_left", "no_baseline"),
  *("prompts_cut", "answers_cut", "other_part", "graded_alike"),
)
# Those that say what happened, and guess why.
_GUESSED = {
  "unmoved": (STILL, BLIND, WILD),
  "unfinished": (STILL, BLIND, WILD),
  "groups_agree": (BLIND, WILD, STILL),
  "small_groups": (BLIND, WILD, STILL),
  "entropy_gone": (WILD, BLIND, STILL),
  "never_rewarded": (BLIND,),
  "always_rewarded": (BLIND,),
  "cut_short": (BLIND, WILD, STILL),
  "first_updates": (WILD, STILL, BLIND),
  "not_finite": (WILD, STILL, BLIND),
  "exploding": (WILD, STILL, BLIND),
  "step_kl": (WILD, STILL, BLIND),
  "fell": (WILD, BLIND, STILL),
  "worse": (WILD, STILL, BLIND),
  "far": (WILD, STILL, BLIND),
}
# Limits that cut nothing where what is longer is an error.
_CUTS = {"max_tokens": "overlong", "max_prompt_tokens": "overlong_prompt"}
# Distillation compares no responses, and its beta mixes two divergences.
_NOT_DISTILLED = ("loss.beta", "responses_per_prompt")
_ANY = (BLIND, WILD, STILL)
# Those that show a grader, or examples, to be at fault, unless something else is asked or shown.
_SHOWN = {"overlooked": (BLIND,), "unlearnable": (BLIND,), "taught_else": (BLIND, WILD)}
# Settings that say who grades, and what is learned: a verdict that names them knows no cause.
_GIVEN = ("task", "reward", "jsonl.reward_file", "data", "teacher")
# Symptoms that a person's own grader, or file of examples, has as well.
_OF_GRADER = ("unmoved", "groups_agree", "entropy_gone", "fell", "unfinished", "small_groups")
_OF_DATA = ("unmoved", "memorised", "by_heart")


def suspects(record: Evidence) -> list[Suspect]:
  """The changed settings that can matter, those outside the ordinary values first."""
  found = []
  for path, default in record.changed.items():
    value = record.config.get(path)
    if _NEVER.fullmatch(path) or value == default or _innocent(record, path):
      continue
    if effect := _switched(path, value):
      found.append(Suspect(path, value, default, effect, 1.0))
    elif str(record.config.get(_CUTS.get(path))) == "error":
      continue  # Nothing is longer.
    elif (ordinary := _ordinary(record, path, default)) and finite(value) is not None:
      effect, outside = _compared(record, ordinary, float(value), default)
      if effect:
        found.append(Suspect(path, value, default, effect, outside))
    elif not _PROBLEMS.fullmatch(path):
      found.append(Suspect(path, value, default, None))
  return sorted(found, key=lambda suspect: (suspect.effect is None, -suspect.outside))


def _switched(path: str, value: Any) -> Effect | None:
  """What an odd switch does; a value of any kind may be asked for, also one without a hash."""
  return next((effect for switch, effect in SWITCHED.items() if switch == (path, value)), None)


def _innocent(record: Evidence, path: str) -> bool:
  """Whether the record itself shows that a setting cannot be why."""
  if path == "max_new_tokens":  # Hardly a response is cut.
    return bool(record.series("truncated_fraction")) and (
      record.mean("truncated_fraction") < _CUT_SHARE
    )
  if path == "jsonl.max_reward":  # The grader pays more than the default calls the whole.
    return max(record.series("reward_mean"), default=0.0) > (finite(record.changed[path]) or 1.0)
  # Problems are not what is learned where the examples are in a file.
  return bool(_PROBLEMS.fullmatch(path)) and "data" in record.changed


def _ordinary(record: Evidence, path: str, default: Any) -> Ordinary | None:
  """The ordinary values of a number; None where they are not known."""
  found = ORDINARY.get(path)
  of_nothing = found and found.of == DEFAULT and finite(default) is None
  distilled = path in _NOT_DISTILLED and "teacher" in record.config
  return None if of_nothing or distilled else found


def _compared(
  record: Evidence, ordinary: Ordinary, amount: float, default: Any
) -> tuple[Effect | None, float]:
  """What a number does that is outside the ordinary ones, and how far outside it is."""
  unit = finite(ordinary.of) or finite(record.config.get(ordinary.of)) or 1.0
  if ordinary.of == DEFAULT:
    unit = finite(default) or _UNIT
  low, high = ordinary.low * unit, ordinary.high * unit
  if ordinary.of == DEFAULT and not default:
    low = 0.0
  if ordinary.off and amount == 0:
    return None, 0.0
  if amount < low:
    return ordinary.under, math.log10(low / amount) if amount > 0 else _FAR
  if amount > high:
    return ordinary.over, math.log10(amount / high) if high > 0 else _FAR
  return None, 0.0


def suspected(record: Evidence, verdict: Verdict) -> Verdict:
  """The verdict, with the changed settings that may be why; as it is where it knows why itself."""
  own = {*re.findall(r"--([a-z_0-9.]+)=", verdict.advice)} & {*record.changed} - {*_GIVEN}
  guessed = verdict.name in _GUESSED
  if verdict.name in _PROVEN or (own and not guessed):
    return verdict
  kinds = _GUESSED.get(verdict.name) or _SHOWN.get(verdict.name, _ANY)
  found = suspects(record)
  odd = [suspect for suspect in found if suspect.effect and suspect.effect.kind in kinds]
  odd = sorted(odd, key=lambda suspect: (kinds.index(suspect.effect.kind), -suspect.outside))
  asked = kinds == (BLIND,) or verdict.name == "cut_short"
  others = [s for s in found if not s.effect and (not asked or _ASKED.fullmatch(s.path))]
  named = (odd + (others if guessed else []))[:_NAMED]
  checks = _checks(record, verdict)
  if not named and not checks:
    return verdict
  tries = _put_back(named)
  if verdict.name == "taught_else" and "data" in record.changed:  # They were learned as they are.
    return verdict._replace(advice=f"{verdict.advice}. Failing that, try {tries}")
  says = verdict.says.removesuffix(".") + _says(named) + "."
  first = ["Try " + tries] if tries else []
  return Verdict(verdict.name, says, ". ".join([*first, *checks, *_rest(verdict, named)]))


def _checks(record: Evidence, verdict: Verdict) -> list[str]:
  """What to check of a person's own grader or data, where the verdict does not say so."""
  sampled = bool(record.series("reward_mean"))
  graded, given = grader(record), data(record)
  own_grader = ".py" in graded and {"reward", "jsonl.reward_file"} & {*record.changed}
  if sampled and own_grader and verdict.name in _OF_GRADER and graded not in verdict.advice:
    return [f"Check that the grader pays more for a better response ({graded})"]
  own_data = "data" in record.changed and ("." in given or "/" in given)
  if not sampled and own_data and verdict.name in _OF_DATA and given not in verdict.advice:
    return [f"Check that the examples are right and whole ({given})"]
  return []


def _says(named: list[Suspect]) -> str:
  """The clause that names the suspects: those of which something is known, and the others."""
  odd = [f"{_shown(suspect)}, which {suspect.effect.says}" for suspect in named if suspect.effect]
  others = [_shown(suspect) for suspect in named if not suspect.effect]
  clause = ""
  if odd:
    clause = f"; the likeliest cause is {odd[0]}"
    clause += "".join(f", or {text}" for text in odd[1:])
  if others:
    clause += ("; it " + ("also " if odd else "") + "differs from the defaults in ") + (
      " and ".join(others)
    )
  return clause


def _shown(suspect: Suspect) -> str:
  return f"--{suspect.path}={_text(suspect.value)} (default {_text(suspect.default)})"


def _put_back(named: list[Suspect]) -> str:
  """The flags that put suspects back, any of which may help."""
  return ", or ".join(f"--{suspect.path}={_text(suspect.default)}" for suspect in named)


def _text(value: Any) -> str:
  """A value as its flag has it, shortened.

  >>> _text(None), _text(True), _text(0.5), _text(0.0), _text(["a", "b"])
  ('none', 'true', '0.5', '0', 'a,b')
  """
  if value is None:
    return "none"
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, list | tuple):
    return ",".join(map(_text, value))
  text = number(value) if isinstance(value, int | float) else str(value)
  return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _rest(verdict: Verdict, named: list[Suspect]) -> list[str]:
  """The verdict's own advice, without the settings that are named already."""
  if not named:
    return [verdict.advice]
  taken = [f"--{suspect.path}=" for suspect in named]
  sentences = []
  for sentence in verdict.advice.split(". "):
    options = sentence.removeprefix("Try ").split(", or ")
    kept = [option for option in options if not any(flag in option for flag in taken)]
    if kept and sentence.startswith("Try "):
      sentences.append("Failing that, try " + ", or ".join(kept))
    elif kept:
      sentences.append(sentence)
  return sentences


def short_of(record: Evidence) -> Verdict | None:
  """A run that ended with little learned, and a setting outside the ordinary values."""
  odd = [suspect for suspect in suspects(record) if suspect.effect]
  first, last = _ends(record)
  poor = last is not None and last < _RIGHT and last - first < _ROSE
  if not odd or not poor or record.share_done() < 1:
    return None
  return Verdict(
    "short_of",
    f"At the end {last:.0%} of the answers are right, after {first:.0%} in the beginning"
    + _says(odd[:_NAMED])
    + ".",
    f"Try {_put_back(odd[:_NAMED])}",
  )


def _ends(record: Evidence) -> tuple[float, float | None]:
  """The share of right answers at the beginning and at the end: held out, or else in training."""
  for key in ("eval/sampled_accuracy", "eval/pair_accuracy"):
    shares = [finite(row.get(key)) for row in record.evaluated]
    shares = [share for share in shares if share is not None]
    if len(shares) > 1 and "pair" in key:  # A coin has half of them in order.
      return 2 * shares[0] - 1, 2 * shares[-1] - 1
    if len(shares) > 1:
      return shares[0], shares[-1]
  rights = record.series("accuracy")
  if not rights:
    return 0.0, None
  size = max(len(rights) // 4, 1)
  return statistics.fmean(rights[:size]), record.mean("accuracy")
