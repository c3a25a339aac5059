r"""Grade-school mathematics: `gsm8k:<path>`, a file in GSM8K's own format.

Its rows are `{"question": ..., "answer": ...}`, where the answer is a worked solution and ends in a
line "#### 72". The file is not part of this library.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from rl_llm.data.jsonl import MAX_ROWS
from rl_llm.rewards import RewardSource
from rl_llm.rewards.graders import final_answer
from rl_llm.tasks.jsonl import JsonlOptions, jsonl_task
from rl_llm.tasks.problem import Problem, Task, check_option, number_text


@dataclass(frozen=True)
class Gsm8kOptions:
  """`--task=gsm8k:FILE`: grade-school word problems."""

  instruction: str = field(
    default="Think step by step, then write the answer on a last line as #### and the number.",
    metadata={"help": "text put after each question, on a line of its own"},
  )
  held_out_file: str = field(
    default="", metadata={"help": "file of problems for evaluation (test.jsonl); else a fraction"}
  )
  held_out_fraction: float = field(
    default=0.1, metadata={"help": "fraction of the rows kept for evaluation; a row's hash decides"}
  )
  lenient: bool = field(
    default=False, metadata={"help": "drop and count broken rows instead of stopping at the first"}
  )
  max_rows: int = field(
    default=MAX_ROWS, metadata={"help": "most rows of a file; one with more is refused"}
  )

  def __post_init__(self):
    check_option(
      "gsm8k.held_out_fraction",
      self.held_out_fraction,
      0 <= self.held_out_fraction < 1,
      "at least 0 and below 1",
    )
    check_option("gsm8k.max_rows", self.max_rows, self.max_rows >= 1, "at least 1")


def gsm8k_task(path: str, options: Gsm8kOptions) -> Task:
  """Problems from a file in GSM8K's format; drawn, split and held out as `jsonl_task` does.

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
    max_rows=options.max_rows,
  )
  task = jsonl_task(path, rows, name="gsm8k", check=_check_answer)
  return dataclasses.replace(
    task,
    reward=RewardSource("rl_llm.rewards.graders", "gsm8k", own_grader=True),
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
