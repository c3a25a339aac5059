"""Tasks: problems by (seed, step), a held-out set training never draws, and a grader."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable

from rl_llm.rewards import RewardSource, isolated, terms
from rl_llm.runs import functions
from rl_llm.tasks.arithmetic import ArithmeticOptions, arithmetic_task
from rl_llm.tasks.copy_text import CopyOptions, copy_task
from rl_llm.tasks.gsm8k import Gsm8kOptions, gsm8k_task
from rl_llm.tasks.jsonl import JsonlOptions, jsonl_task
from rl_llm.tasks.problem import Problem, Task, TaskError, in_laps
from rl_llm.tasks.reasoning_gym import ReasoningGymOptions, reasoning_gym_task

__all__ = [
  "FORMS",
  "TASKS",
  "ArithmeticOptions",
  "CopyOptions",
  "Gsm8kOptions",
  "JsonlOptions",
  "Problem",
  "ReasoningGymOptions",
  "Task",
  "TaskError",
  "arithmetic_task",
  "check_held_out",
  "copy_task",
  "gsm8k_task",
  "in_laps",
  "jsonl_task",
  "load_task",
  "reasoning_gym_task",
  "task_family",
]

# To add a task, add a line: --task= knows its name, and every field of its options is a flag.
# name -> (options, function). The function takes (options); or, if the name has a part after a
# colon as in "jsonl:FILE", (that part, options).
TASKS = {
  "arithmetic": (ArithmeticOptions, arithmetic_task),
  "copy": (CopyOptions, copy_task),
  "reasoning_gym": (ReasoningGymOptions, reasoning_gym_task),
  "jsonl": (JsonlOptions, jsonl_task),
  "gsm8k": (Gsm8kOptions, gsm8k_task),
}


def _rest(family: str) -> str:
  """What comes after the colon of a task's name, by the parameter's name; "" if nothing does."""
  *before, _ = inspect.signature(TASKS[family][1]).parameters
  return before[0] if before else ""


FORMS = tuple(f"{name}:<{_rest(name)}>" if _rest(name) else name for name in TASKS)
FORMS += ("FILE.py:<function>",)


def task_family(spec: str) -> str:
  """The part of a task's name that decides its options: "jsonl" of "jsonl:train.jsonl"; "" of a
  function that makes a task.

  >>> task_family("reasoning_gym:leg_counting")
  'reasoning_gym'

  Raises:
    TaskError: no such task, or the part after the colon is missing or too much; names the nearest.
  """
  if functions.named("task", spec):
    return ""
  family, colon, rest = spec.partition(":")
  if family not in TASKS:
    near = difflib.get_close_matches(family, TASKS, n=1)
    guess = f" did you mean {near[0]}?" if near else ""
    raise TaskError(f"task={spec!r}: no such task;{guess} must be one of {', '.join(FORMS)}")
  if bool(_rest(family)) != bool(rest) or bool(colon) != bool(rest):
    form = FORMS[list(TASKS).index(family)]
    raise TaskError(f"task={spec!r}: must be written {form}")
  return family


def check_held_out(task: Task, *, otherwise: str) -> None:
  """Refuses a task without held-out problems if it is to be evaluated.

  A file of three rows may well hold none of them out. That is no fault of the file, nor a problem
  for a run without evaluation, so only code that evaluates calls this.

  >>> try:
  ...   check_held_out(load_task("copy", held_out=0), otherwise="--split=train")
  ... except TaskError as error:
  ...   print(str(error).partition("; ")[2])
  raise --copy.held_out, or choose --split=train

  Args:
    task: from `load_task`.
    otherwise: the setting that makes them unnecessary.

  Raises:
    TaskError: there are none; the message says how to hold some out.
  """
  if task.held_out:
    return
  family = task.name.partition(":")[0]
  options = dataclasses.fields(TASKS[family][0]) if family in TASKS else ()
  ways = [
    f"{'give' if option.type == 'str' else 'raise'} --{family}.{option.name}"
    for option in options
    if option.name.startswith("held_out")
  ]
  raise TaskError(
    f"{task.name}: no problem is held out to evaluate on ({task.note}); "
    f"{', '.join(ways) or 'hold some out'}, or choose {otherwise}"
  )


def load_task(
  spec: str, reward_isolation: str = "auto", reward: str = "task", /, **options
) -> Task:
  """The task of a name: "arithmetic", "copy", "reasoning_gym:leg_counting", "jsonl:train.jsonl",
  "gsm8k:train.jsonl".

  >>> load_task("arithmetic", operand_max=9, held_out=20).note
  '100 different problems, 21 held out'

  Args:
    spec: the name; after a colon the puzzle or the path. Or FILE.py:function, or in Python a
      function, that returns a `Task`.
    reward_isolation: which responses its grader gets in one call, of `rl_llm.rewards.ISOLATION`.
    reward: another grader than the task's: FILE.py:function, which workers call, or a
      `functions.Function`, which is called in this process; or several of them, for
      `rl_llm.rewards.terms`. Any other text changes nothing.
    **options: fields of the task's options in `TASKS`.

  Raises:
    TaskError: the name, an option's name or its value does not fit.
    RewardError: the isolation does not fit the grader.
    DataError: a file or a row of it cannot be used.
  """
  family = task_family(spec)
  file, _, function = reward.rpartition(":")
  listed = () if isinstance(reward, functions.Function) else terms(reward)
  own = not listed and (isinstance(reward, functions.Function) or file.endswith(".py"))
  if not family:
    task = _own_task(spec)
  else:
    kind, make = TASKS[family]
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
      if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f" did you mean {near[0]}?" if near else ""
        raise TaskError(
          f"{family}.{name}: no such option;{guess} must be one of {', '.join(known)}"
        )
    unused = own or (listed and all(term.spec != "task" for term in listed))
    if unused and "reward_file" in known:  # Another function takes the place of this one.
      options |= {"reward_file": file if file.endswith(".py") else "function.py"}
    rest = spec.partition(":")[2]
    task = make(*[rest] * bool(rest), kind(**options))
  if own:  # What it reads in a completion is not known.
    source = getattr(reward, "function", None) or RewardSource(file, function)
    task = dataclasses.replace(task, reward=source, answer_of=None)

  def alone(source: RewardSource | Callable) -> RewardSource | Callable:
    apart = reward_isolation == "auto" or callable(source)
    return source if apart else isolated(source, reward_isolation)

  if not listed:
    same = reward_isolation == "auto" or callable(task.reward)
    return task if same else dataclasses.replace(task, reward=alone(task.reward))
  sources = [
    task.reward if term.spec == "task" else RewardSource(*term.spec.rpartition(":")[::2])
    for term in listed
  ]
  weighted = tuple(zip(listed, map(alone, sources), strict=True))
  answer_of = task.answer_of if listed[0].spec == "task" else None
  return dataclasses.replace(task, reward=weighted, answer_of=answer_of)


def _own_task(spec: str) -> Task:
  """The task that a person's function makes."""
  task = functions.named("task", spec)()
  if not isinstance(task, Task):
    raise TaskError(f"task={spec!r}: returned {type(task).__name__}, must return rl_llm.tasks.Task")
  return task
