"""Problems for the environments that ship, so that `--env=calculator` needs no further file."""

from __future__ import annotations

from collections.abc import Callable

from rl_llm.tasks.arithmetic import ArithmeticOptions, arithmetic_task
from rl_llm.tasks.environments.environment import Environment, EnvironmentError
from rl_llm.tasks.problem import Problem, Task, hashed_numbers, rng_for

_HIGHEST = 100
_GUESSES_HELD_OUT = 20


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
      f"env={names}: has no problems of its own; give them with --task=jsonl:FILE, whose columns "
      "reset gets"
    )
  return _TASKS[name](rest)


def _products(rest: str) -> Task:
  """Products of two-digit numbers; the calculator need not be used."""
  question = "What is {a} {op} {b}? Reply with just the number."
  options = ArithmeticOptions(
    operators="*", operand_min=10, operand_max=99, held_out=200, question=question
  )
  return arithmetic_task(options)


def _secrets(rest: str) -> Task:
  """Numbers from 1 to 100; a fifth of them are held out."""
  question = f"I think of a whole number from 1 to {_HIGHEST}. Find it."

  def problem(secret: int) -> Problem:
    columns = {"secret": secret, "highest": _HIGHEST}
    return Problem([{"role": "user", "content": question}], columns, f"secret {secret}")

  numbers, held_out = hashed_numbers("guess held out"), {}
  while len(held_out) < _GUESSES_HELD_OUT:
    secret = 1 + next(numbers) % _HIGHEST
    held_out[secret] = problem(secret)
  left = [secret for secret in range(1, _HIGHEST + 1) if secret not in held_out]
  return _drawn("guess", [problem(secret) for secret in left], tuple(held_out.values()))


def _drawn(name: str, train: list[Problem], held_out: tuple[Problem, ...]) -> Task:
  """A task that draws from a list of problems, whose environment grades."""

  def sample(seed: int, step: int, count: int) -> list[Problem]:
    return [train[rng_for(seed, step, index).integers(len(train))] for index in range(count)]

  return Task(
    name=name,
    sample=sample,
    held_out=held_out,
    reward=owned_by_environment,
    note=f"{len(train)} problems, {len(held_out)} held out",
  )


_TASKS: dict[str, Callable[[str], Task]] = {"calculator": _products, "guess": _secrets}
