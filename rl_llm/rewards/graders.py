r"""How this library's graders read answers: the only place that finds numbers, and two graders.

A grader that takes any number it finds, or the last one, also rewards "72 or 73", and a grader that
cannot read "1{,}000" rejects right answers. So all of them find numbers with `find_numbers`.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any

from rl_llm.rewards.calls import completion_text

# Possessive (`++`): no digit is read twice, however long the number.
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9.])\.[0-9]++)"
# A sign is one only where nothing is left to subtract from: 5-3 holds 5 and 3.
_NUMBER = re.compile(
  rf"(?P<sign>(?<![\w.)])-)?\$?(?P<inner>(?<=\$)-)?(?P<digits>{_DIGITS})"
  rf"(?P<rest>\s?/\s?\$?{_DIGITS}|[eE][-+]?[0-9]++)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_OR = re.compile(r"\W*or\W*", re.IGNORECASE)


def plain(text: str) -> str:
  r"""The text with its numbers as they stand in bare text, not in LaTeX.

  >>> print(plain(r"\$1{,}000 or \frac{1}{2}, or −5"))
  $1,000 or 1/2, or -5
  """
  for latex, bare in (("{,}", ","), ("\\,", ","), ("\\$", "$"), ("−", "-")):
    text = text.replace(latex, bare)
  return _FRACTION.sub(r"\1/\2", text)


def find_numbers(text: str) -> list[Decimal | None]:
  r"""The numbers of a text in order; None for a form that no grader compares, such as 3/4 or 1e3.

  >>> find_numbers("from 5-3 to -$1,250.50, .5 and 3/4")
  [Decimal('5'), Decimal('3'), Decimal('-1250.50'), Decimal('0.5'), None]
  """
  return [_decimal(found) for found in _NUMBER.finditer(plain(text))]


def _decimal(found: re.Match) -> Decimal | None:
  if found["rest"]:
    return None
  value = Decimal(found["digits"].replace(",", ""))
  negative = bool(found["sign"]) != bool(found["inner"])
  return value.copy_negate() if negative else value  # Not -value, which rounds to 28 digits.


def final_answer(text: str) -> Decimal | None:
  r"""The one number a solution commits to; None where there is none, or two that differ.

  A grader that takes the last number it sees also rewards "72 or 73". So a solution that marks its
  answer, with "####" or \boxed{}, is held to that: every mark must be followed by one number, the
  same each time, and "####" must be on the last line. Without a mark, the last number counts.

  >>> final_answer("48 + 24 = 72\n#### 72")
  Decimal('72')
  >>> final_answer("48 + 24 = 72, so it is \\boxed{$72.00}.")
  Decimal('72.00')
  >>> final_answer("24 in May, so she sold 1,072 clips")
  Decimal('1072')
  >>> print(final_answer("#### 72\n#### 73"), final_answer("#### 72\nor not"))
  None None

  Args:
    text: a worked solution.
  """
  text = plain(text)
  _, *marked = text.split("####")
  if marked and "\n" in marked[-1].strip():
    return None
  places = [line for part in marked for line in part.strip().split("\n")[:1]]
  places += _BOXED.findall(text)
  if places:
    found = [frozenset(find_numbers(place)) for place in places]
    return min(found[0]) if len(found[0]) == 1 and len(set(found)) == 1 else None
  numbers = list(_NUMBER.finditer(text))
  hedged = len(numbers) > 1 and _OR.fullmatch(text, numbers[-2].end(), numbers[-1].start())
  return _decimal(numbers[-1]) if numbers and not hedged else None


def right_number(answer: Any) -> Decimal | None:
  """The number that a row's answer is: a number as JSON has it, or the `final_answer` of text.

  >>> right_number(1e-05), right_number("6*7=42\\n#### 42"), right_number(True)
  (Decimal('0.00001'), Decimal('42'), None)
  """
  if isinstance(answer, bool) or isinstance(answer, float) and not math.isfinite(answer):
    return None
  if isinstance(answer, int | float):
    return Decimal(repr(answer))
  return final_answer(str(answer))


def gsm8k(prompts, completions, answer, **columns) -> list[float | None]:
  """1 if the completion commits to the number that `answer` ends in, else 0; None if it has none.

  >>> gsm8k(["6*7?"] * 3, ["#### 42", "It is 42.", "41 or 42"], answer=["6*7=42\\n#### 42"] * 3)
  [1.0, 1.0, 0.0]
  """
  rewards = []
  for completion, solution in zip(completions, answer, strict=True):
    right = right_number(solution)
    said = final_answer(completion_text(completion))
    rewards.append(None if right is None else float(said == right))
  return rewards


def exact_match(prompts, completions, answer, **columns) -> list[float]:
  """1 where the completion equals the answer, ignoring white space around both."""
  return [
    float(completion_text(completion).strip() == str(right).strip())
    for completion, right in zip(completions, answer, strict=True)
  ]


FUNCTIONS = ("gsm8k", "exact_match")
REWARD_RANGE = (0.0, 1.0)
