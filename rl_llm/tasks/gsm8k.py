r"""Grade-school mathematics: `gsm8k:<path>`, a file of GSM8K's own shape.

Its rows are `{"question": ..., "answer": ...}`, where the answer is worked out and ends in a line
"#### 72". The file is not part of this library.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from rl_llm.rewards import RewardSource
from rl_llm.tasks.jsonl import JsonlOptions, jsonl_task
from rl_llm.tasks.problem import Problem, Task, check_option, number_text

# A sign is one only where nothing is left to subtract from: 5-3 holds 5 and 3.
_NUMBER = (
  r"(?:(?<![\w.)])[-−])?\$?"
  r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_NUMBERS = re.compile(_NUMBER)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_HEDGED = re.compile(rf"{_NUMBER}\W*\bor\W*\Z")


@dataclass(frozen=True)
class Gsm8kOptions:
  """The options of `gsm8k:<path>`; each is a flag of the experiments."""

  instruction: str = field(
    default="Think step by step, then write the answer on a last line as #### and the number.",
    metadata={"help": "text put after each question, on a line of its own"},
  )
  held_out_file: str = field(
    default="", metadata={"help": "file of problems for evaluation (test.jsonl); else a fraction"}
  )
  held_out_fraction: float = field(
    default=0.1, metadata={"help": "fraction of the rows kept for evaluation, chosen by hash"}
  )
  lenient: bool = field(
    default=False, metadata={"help": "drop and count broken rows instead of stopping at the first"}
  )

  def __post_init__(self):
    check_option(
      "gsm8k.held_out_fraction",
      self.held_out_fraction,
      0 <= self.held_out_fraction < 1,
      "at least 0 and below 1",
    )


def gsm8k_task(path: str, options: Gsm8kOptions) -> Task:
  """Problems from a file of GSM8K's shape; drawn, split and held out as `jsonl_task` does.

  Args:
    path: the training rows, JSONL (plain or gzip) or Parquet.
    options: instruction and split.

  Raises:
    DataError: a file is missing or a row broken, as `path:line: what; fix`; an answer that does not
      end in "#### number" is broken.
    TaskError: all rows are held out.
  """
  rows = JsonlOptions(
    prompt_column="question",
    instruction=options.instruction,
    reward_function="gsm8k",
    held_out_file=options.held_out_file,
    held_out_fraction=options.held_out_fraction,
    lenient=options.lenient,
  )
  task = jsonl_task(path, rows, name="gsm8k", check=_check_answer)
  return dataclasses.replace(
    task,
    reward=RewardSource("rl_llm.tasks.gsm8k", own_grader=True),
    answer_of=lambda problem, text: number_text(final_answer(text)),
    difficulty=_difficulty,
  )


def _difficulty(problem: Problem) -> str:
  """How many steps the solution in the file takes: its lines before the answer."""
  steps = problem.columns["answer"].rpartition("####")[0].split("\n")
  count = sum(bool(step.strip()) for step in steps)
  return f"{count} step{'s' * (count != 1)}"


def _check_answer(row: dict[str, Any]) -> str:
  if "answer" not in row:
    return "no key 'answer'; add it"
  answer = row["answer"]
  if not isinstance(answer, str):
    return f"'answer' is of type {type(answer).__name__}; write it as text"
  if "####" not in answer or final_answer(answer) is None:
    return "'answer' does not end in '#### ' and one number; write it there"
  return ""


def final_answer(text: str) -> Decimal | None:
  r"""The one number a solution commits to; None where there is none, or two that differ.

  A grader that takes the last number it sees also pays for "72 or 73". So a solution that marks its
  answer, with "####" or \boxed{}, is held to that: every mark must be followed by one number, the
  same each time, and "####" must be on the last line. A solution without a mark is read by its last
  number.

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
  text = text.replace("{,}", ",").replace("\\$", "$")
  _, *marked = text.split("####")
  if marked and "\n" in marked[-1].strip():
    return None
  places = [line for part in marked for line in part.strip().split("\n")[:1]]
  places += _BOXED.findall(text)
  if places:
    found = [frozenset(map(_decimal, _NUMBERS.findall(place))) for place in places]
    return min(found[0]) if len(found[0]) == 1 and len(set(found)) == 1 else None
  numbers = list(_NUMBERS.finditer(text))
  if not numbers or _HEDGED.search(text[: numbers[-1].start()]):
    return None
  return _decimal(numbers[-1][0])


def _decimal(number: str) -> Decimal:
  return Decimal(number.replace(",", "").replace("$", "").replace("−", "-"))


def reward(prompts, completions, answer, **columns) -> list[float | None]:
  """1 where the completion commits to the number `answer` ends in, else 0; None where it has none.

  >>> reward(["6*7?"] * 3, ["#### 42", "It is 42.", "41 or 42"], answer=["6*7=42\\n#### 42"] * 3)
  [1.0, 1.0, 0.0]
  """
  rewards = []
  for completion, solution in zip(completions, answer, strict=True):
    right = final_answer(str(solution))
    rewards.append(None if right is None else float(final_answer(completion) == right))
  return rewards
