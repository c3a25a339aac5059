"""Reward functions for JSONL tasks without a file of their own: `gsm8k` and `exact_match`."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"[-−]?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


def final_number(text: str) -> Decimal | None:
  """The number a worked solution ends in: the first after the last "####", else the last one.

  >>> final_number("48 / 2 = 24, so 24 + 48 = 72. #### 72")
  Decimal('72')
  >>> final_number("She earns $1,250.50 a week.")
  Decimal('1250.50')
  """
  _, mark, tail = text.rpartition("####")
  found = _NUMBER.findall(tail if mark else text)
  if not found:
    return None
  return Decimal((found[0] if mark else found[-1]).replace(",", "").replace("−", "-"))


def gsm8k(prompts, completions, answer, **columns) -> list[float | None]:
  """1 where the completion ends in the number `answer` ends in; None where that has none."""
  rewards = []
  for completion, solution in zip(completions, answer, strict=True):
    right = final_number(str(solution))
    rewards.append(None if right is None else float(final_number(completion) == right))
  return rewards


def exact_match(prompts, completions, answer, **columns) -> list[float]:
  """1 where the completion is the answer, white space around both aside."""
  return [
    float(completion.strip() == str(right).strip())
    for completion, right in zip(completions, answer, strict=True)
  ]


FUNCTIONS = ("gsm8k", "exact_match")
