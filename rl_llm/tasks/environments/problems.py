"""Problems for the environments that ship, so that `--env=calculator` needs no further file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from decimal import Decimal

from rl_llm.rewards import RewardSource, completion_text
from rl_llm.rewards.graders import find_numbers, plain
from rl_llm.tasks.arithmetic import ArithmeticOptions, arithmetic_task
from rl_llm.tasks.environments.builtin.search import towns
from rl_llm.tasks.environments.builtin.wordle import WORDS
from rl_llm.tasks.environments.environment import Environment, EnvironmentError
from rl_llm.tasks.problem import Problem, Task, hashed_numbers, rng_for
from rl_llm.tasks.reasoning_gym import ReasoningGymOptions, reasoning_gym_task

REWARD_RANGE = (0.0, 1.0)
_HIGHEST = 100


def owned_by_environment(prompts, completions, **columns) -> list[None]:
  """The grader of a task whose environment gives the rewards: it has no opinion."""
  return [None] * len(completions)


def default_task(environment: Environment) -> Task:
  """The problems of an environment that ships.

  >>> from rl_llm.tasks.environments import load
  >>> task = default_task(load("calculator"))
  >>> task.sample(0, 0, 1)[0].columns["expression"].partition(" * ")[1]
  ' * '

  Args:
    environment: from `load`, with one kind.

  Raises:
    EnvironmentError: it has no problems of its own; the message says to give a task.
  """
  name, _, rest = environment.kinds[0].name.partition(":")
  if len(environment.kinds) > 1 or name not in _TASKS:
    names = ", ".join(kind.name for kind in environment.kinds)
    raise EnvironmentError(
      f"{names}: no problems come with it; give some with --task=jsonl:FILE, whose columns reset "
      "gets"
    )
  return _TASKS[name](rest)


def reward(prompts, completions, answer, **columns) -> list[float]:
  """1 where the completion names the right number and no other, else 0."""
  texts = [plain(completion_text(completion)) for completion in completions]
  return [
    float(set(find_numbers(text)) == {Decimal(right)})
    for text, right in zip(texts, answer, strict=True)
  ]


def _calculations(rest: str) -> Task:
  """Products of two-digit numbers; the calculator need not be used."""
  return _arithmetic("*", 10, 99)


def _programs(rest: str) -> Task:
  """Sums, differences and products of four-digit numbers."""
  return _arithmetic("+-*", 1000, 9999)


def _arithmetic(operators: str, low: int, high: int) -> Task:
  options = ArithmeticOptions(operators=operators, operand_min=low, operand_max=high, held_out=200)
  return arithmetic_task(options)


def _secrets(rest: str) -> Task:
  """Numbers from 1 to 100; a fifth of them are held out."""
  question = f"I think of a whole number from 1 to {_HIGHEST}. Find it."
  problems = [
    _problem(question, f"secret {secret}", secret=secret, highest=_HIGHEST)
    for secret in range(1, _HIGHEST + 1)
  ]
  return _drawn("guess", problems, held_out=20)


def _words(rest: str) -> Task:
  """The words of the list; a tenth of them are held out."""
  question = "Find the secret word of five letters."
  problems = [_problem(question, word, word=word) for word in WORDS]
  return _drawn("wordle", problems, held_out=40)


def _mayors(rest: str) -> Task:
  """Questions about the demo's towns that need two searches."""
  if rest != "demo":
    raise EnvironmentError(
      f"env=search:{rest}: whoever searches {rest} brings the questions; give them with "
      "--task=jsonl:FILE, or try --env=search:demo"
    )
  problems = [
    _problem(f"In which year was the mayor of {t.name} born?", t.name, answer=str(t.born))
    for t in towns()
  ]
  source = RewardSource("rl_llm.tasks.environments.problems", own_grader=True)
  return _drawn("search:demo", problems, held_out=100, reward=source)


def _puzzles(rest: str) -> Task:
  """The puzzles of that name, graded in the environment."""
  task = reasoning_gym_task(rest, ReasoningGymOptions())
  return dataclasses.replace(task, reward=owned_by_environment, answer_of=None)


def _problem(question: str, key: str, **columns: str | int) -> Problem:
  return Problem([{"role": "user", "content": question}], columns, key)


def _drawn(
  name: str,
  problems: list[Problem],
  *,
  held_out: int,
  reward: RewardSource | Callable = owned_by_environment,
) -> Task:
  """A task that draws from a list of problems, of which it keeps some."""
  numbers, kept = hashed_numbers(f"{name} held out"), {}
  while len(kept) < held_out:
    index = next(numbers) % len(problems)
    kept[index] = problems[index]
  train = [problem for index, problem in enumerate(problems) if index not in kept]

  def sample(seed: int, step: int, count: int) -> list[Problem]:
    return [train[rng_for(seed, step, index).integers(len(train))] for index in range(count)]

  return Task(
    name=name,
    sample=sample,
    held_out=tuple(kept.values()),
    reward=reward,
    note=f"{len(train)} problems, {len(kept)} held out",
  )


_TASKS: dict[str, Callable[[str], Task]] = {
  "calculator": _calculations,
  "python": _programs,
  "search": _mayors,
  "guess": _secrets,
  "wordle": _words,
  "reasoning_gym": _puzzles,
}
