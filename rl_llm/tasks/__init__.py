"""Tasks: problems by (seed, step), a held-out set training never draws, and a grader."""

from __future__ import annotations

import dataclasses
import difflib

from rl_llm.tasks.arithmetic import ArithmeticOptions, arithmetic_task
from rl_llm.tasks.copy_text import CopyOptions, copy_task
from rl_llm.tasks.gsm8k import Gsm8kOptions, gsm8k_task
from rl_llm.tasks.jsonl import JsonlOptions, jsonl_task
from rl_llm.tasks.problem import Problem, Task, TaskError
from rl_llm.tasks.reasoning_gym import ReasoningGymOptions, reasoning_gym_task

__all__ = [
  "ArithmeticOptions",
  "CopyOptions",
  "Gsm8kOptions",
  "JsonlOptions",
  "Problem",
  "ReasoningGymOptions",
  "Task",
  "TaskError",
  "arithmetic_task",
  "copy_task",
  "gsm8k_task",
  "jsonl_task",
  "load_task",
  "reasoning_gym_task",
  "task_family",
]

_OPTIONS = {
  "arithmetic": ArithmeticOptions,
  "copy": CopyOptions,
  "reasoning_gym": ReasoningGymOptions,
  "jsonl": JsonlOptions,
  "gsm8k": Gsm8kOptions,
}
_FORMS = ("arithmetic", "copy", "reasoning_gym:<name>", "jsonl:<path>", "gsm8k:<path>")


def task_family(spec: str) -> str:
  """The part of a task's name that decides its options: "jsonl" of "jsonl:train.jsonl".

  >>> task_family("reasoning_gym:leg_counting")
  'reasoning_gym'

  Raises:
    TaskError: no such task, or the part after the colon is missing or too much; names the nearest.
  """
  family, colon, rest = spec.partition(":")
  if family not in _OPTIONS:
    near = difflib.get_close_matches(family, _OPTIONS, n=1)
    guess = f" did you mean {near[0]}?" if near else ""
    raise TaskError(f"task={spec!r}: no such task;{guess} must be one of {', '.join(_FORMS)}")
  takes_rest = family in ("reasoning_gym", "jsonl", "gsm8k")
  if takes_rest != bool(rest) or bool(colon) != bool(rest):
    form = next(form for form in _FORMS if form.startswith(family))
    raise TaskError(f"task={spec!r}: must be written {form}")
  return family


def load_task(spec: str, **options) -> Task:
  """The task of a name: "arithmetic", "copy", "reasoning_gym:leg_counting", "jsonl:train.jsonl",
  "gsm8k:train.jsonl".

  >>> load_task("arithmetic", operand_max=9, held_out=20).note
  '100 different problems, 21 held out'

  Args:
    spec: the name; after a colon the puzzle or the path.
    **options: fields of `ArithmeticOptions`, `CopyOptions`, `ReasoningGymOptions`,
      `JsonlOptions` or `Gsm8kOptions`.

  Raises:
    TaskError: the name, an option's name or its value does not fit.
    DataError: a file or a row of it cannot be used.
  """
  family = task_family(spec)
  known = [field.name for field in dataclasses.fields(_OPTIONS[family])]
  for name in options:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      guess = f" did you mean {near[0]}?" if near else ""
      raise TaskError(f"{family}.{name}: no such option;{guess} must be one of {', '.join(known)}")
  chosen = _OPTIONS[family](**options)
  rest = spec.partition(":")[2]
  if family == "arithmetic":
    return arithmetic_task(chosen)
  if family == "copy":
    return copy_task(chosen)
  if family == "reasoning_gym":
    return reasoning_gym_task(rest, chosen)
  if family == "gsm8k":
    return gsm8k_task(rest, chosen)
  return jsonl_task(rest, chosen)
