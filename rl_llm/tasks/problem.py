"""What a task is: problems by (seed, step), a held-out set, and where its grader is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from rl_llm.data.batches import batch_indices
from rl_llm.data.held_out import hashed
from rl_llm.errors import UserError
from rl_llm.rewards import RewardSource, Term


class TaskError(UserError, ValueError):
  """A task or one of its options cannot be used; the message names it and the fix."""


class Problem(NamedTuple):
  """One problem to put to the model.

  Attributes:
    prompt: text, or messages `{"role", "content"}` for a chat template.
    columns: what the reward function gets besides prompt and completion, by name; JSON types only.
    key: identifies this problem: two with the same key never lie on different sides of the held-out
      split.
  """

  prompt: str | list[dict[str, str]]
  columns: dict[str, Any]
  key: str


@dataclass(frozen=True)
class Task:
  """A source of problems and their grader.

  Attributes:
    name: for logs, e.g. "arithmetic".
    sample: `sample(seed, step, count)` gives `count` training problems. It depends only on its
      arguments, so a resumed run gets the same problems, and asking for more does not change the
      first ones.
    held_out: problems for evaluation, the same for every seed, whose keys `sample` never draws.
    reward: where the reward function is, for `RewardPool`; or the function, for `InProcess`; or
      pairs of a `Term` and one of these, for `Several`.
    max_reward: a response counts as correct if and only if its reward is at least this.
    note: one line for the log: sizes, and what was left out.
    answer_of: `answer_of(problem, completion)` is what the completion commits to, read as the
      grader reads it: equal texts get the same grade, so responses can vote. None where it commits
      to nothing. Tasks whose grader does not define this have no such function.
    difficulty: `difficulty(problem)` names a class of problems, such as "3 steps", or None.
    rows: all training problems, where there is an end to them; None where they are made.
  """

  name: str
  sample: Callable[[int, int, int], list[Problem]]
  held_out: tuple[Problem, ...]
  reward: RewardSource | Callable | tuple[tuple[Term, RewardSource | Callable], ...]
  max_reward: float = 1.0
  note: str = ""
  answer_of: Callable[[Problem, str], str | None] | None = None
  difficulty: Callable[[Problem], str] | None = None
  rows: tuple[Problem, ...] | None = None


def in_laps(task: Task, size: int) -> Task:
  """The task whose steps take its rows in turn: each once in a lap, in another order every lap.

  By itself a task draws every step anew, so that after as many draws as there are rows about a
  third (1/e) has not come yet. Which rows a step takes depends on (seed, step) alone, see
  `rl_llm.data.batches.batch_indices`.

  >>> rows = tuple(Problem(text, {}, text) for text in "abcde")
  >>> task = in_laps(Task("letters", None, (), None, rows=rows), 2)
  >>> drawn = [problem.prompt for step in range(5) for problem in task.sample(0, step, 2)]
  >>> sorted(drawn[:5]) == sorted(drawn[5:]) == list("abcde")
  True

  Args:
    task: with rows.
    size: problems a step; a step may be asked for fewer.

  Raises:
    TaskError: the task makes its problems.
  """
  if (rows := task.rows) is None:
    fix = "leave it out, or take --task=jsonl:FILE"
    raise TaskError(f"laps=True: {task.name} makes its problems, of which there is no end; {fix}")

  def sample(seed: int, step: int, count: int) -> list[Problem]:
    if count > size:
      raise ValueError(f"count={count}: must be at most the {size} problems of a step")
    chosen = batch_indices(len(rows), batch_size=size, seed=seed, step=step)
    return [rows[index] for index in chosen[:count]]

  return replace(task, sample=sample)


def check_option(name: str, value: object, fits: bool, allowed: str) -> None:
  """Raises TaskError unless the value fits; the flag's name and the fix are in the message."""
  if not fits:
    raise TaskError(f"{name}={value!r}: must be {allowed}")


def check_held_out_count(name: str, count: int) -> None:
  """`check_option` of a number of held-out problems, each of which is made when a run begins."""
  check_option(name, count, count <= 10**6, "at most 1000000")


def rng_for(seed: int, step: int, index: int) -> np.random.Generator:
  """The generator of one problem, so that problems do not depend on each other."""
  for name, value in (("seed", seed), ("step", step)):
    check_option(name, value, value >= 0, "an integer >= 0")
  return np.random.default_rng(np.random.SeedSequence([seed, step, index]))


def number_text(number: Decimal | None) -> str | None:
  """A number as text, equal numbers as equal texts; None stays None.

  >>> number_text(Decimal("072.50")), number_text(Decimal("72")), number_text(Decimal("-0.0"))
  ('72.5', '72', '0')
  """
  if number is None:
    return None
  text = format(number.copy_abs(), "f")  # Not `abs` or `normalize`: both round to 28 digits.
  text = text.rstrip("0").rstrip(".") if "." in text else text
  return f"-{text}" if number < 0 else text


def hashed_numbers(name: str) -> Iterator[int]:
  """An endless fixed sequence of 64-bit numbers; what held-out sets are drawn with."""
  count = 0
  while True:
    yield hashed(f"{name} {count}")
    count += 1
