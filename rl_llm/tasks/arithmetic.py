"""Sums, differences and products of two numbers: a small model learns them in minutes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal

from rl_llm.rewards import RewardSource, completion_text
from rl_llm.rewards.graders import find_numbers, plain
from rl_llm.tasks.problem import (
  Problem,
  Task,
  check_held_out_count,
  check_option,
  hashed_numbers,
  number_text,
  rng_for,
)

REWARD_RANGE = (0.0, 1.0)
LARGEST = 10**9  # operand: products and the number of problems stay far below 2^63


@dataclass(frozen=True)
class ArithmeticOptions:
  """`--task=arithmetic`: sums, differences and products of two numbers."""

  operators: str = field(default="+", metadata={"help": "operators to draw from: + - *, e.g. '+-'"})
  operand_min: int = field(default=0, metadata={"help": "smallest operand"})
  operand_max: int = field(default=11, metadata={"help": "largest operand"})
  held_out: int = field(
    default=100, metadata={"help": "problems kept for evaluation, at least; a+b and b+a together"}
  )
  question: str = field(
    default="What is {a} {op} {b}? Give one number as the answer.",
    metadata={
      "help": "the prompt, with {a}, {op} and {b}",
      # Its default has changed, which is nothing to an old run of another task.
      "volatile": lambda config: config.task.task != "arithmetic",
    },
  )

  def __post_init__(self):
    name = "arithmetic."
    operators = self.operators
    check_option(
      name + "operators",
      operators,
      bool(operators) and set(operators) <= set("+-*") and len(set(operators)) == len(operators),
      "one or more of + - *, each once",
    )
    check_option(
      name + "operand_min", self.operand_min, self.operand_min >= -LARGEST, f"at least {-LARGEST}"
    )
    check_option(
      name + "operand_max",
      self.operand_max,
      self.operand_min <= self.operand_max <= LARGEST,
      f"at least operand_min={self.operand_min} and at most {LARGEST}",
    )
    check_held_out_count(name + "held_out", self.held_out)
    most = self.problems() * 3 // 4
    check_option(
      name + "held_out",
      self.held_out,
      0 <= self.held_out <= most,
      f"in 0..{most} (three quarters of the {self.problems()} problems); lower it or widen the "
      "operands",
    )
    used = set(re.findall(r"\{(.*?)\}", self.question))
    check_option(
      name + "question",
      self.question,
      used == {"a", "op", "b"},
      "text with {a}, {op} and {b} and no other braces",
    )

  def problems(self) -> int:
    """How many different problems there are; a+b and b+a are two."""
    return len(self.operators) * (self.operand_max - self.operand_min + 1) ** 2


def _problem(a: int, op: str, b: int, question: str) -> Problem:
  answer = {"+": a + b, "-": a - b, "*": a * b}[op]
  content = question.replace("{a}", str(a)).replace("{op}", op).replace("{b}", str(b))
  expression = f"{a} {op} {b}"
  columns = {"answer": str(answer), "expression": expression}
  return Problem([{"role": "user", "content": content}], columns, expression)


def arithmetic_task(options: ArithmeticOptions) -> Task:
  """Problems "What is 7 + 5?" with operands and operators drawn uniformly.

  >>> task = arithmetic_task(ArithmeticOptions(operand_max=9, held_out=10))
  >>> problem = task.sample(0, 0, 1)[0]
  >>> problem.key in {p.key for p in task.held_out}, len(task.held_out)
  (False, 10)

  The options fix the held-out problems: the seed does not matter, and 3+8 and 8+3 are on the same
  side.
  """
  low, high, operators = options.operand_min, options.operand_max, options.operators
  width = high - low + 1

  held_out: dict[str, Problem] = {}
  numbers = hashed_numbers("arithmetic held out")
  while len(held_out) < options.held_out:
    op = operators[next(numbers) % len(operators)]
    a, b = low + next(numbers) % width, low + next(numbers) % width
    for first, second in ((a, b),) if op == "-" else ((a, b), (b, a)):
      problem = _problem(first, op, second, options.question)
      held_out.setdefault(problem.key, problem)

  def draw(seed: int, step: int, index: int) -> Problem:
    rng = rng_for(seed, step, index)
    while True:
      op = operators[rng.integers(len(operators))]
      a, b = (int(x) for x in rng.integers(low, high, size=2, endpoint=True))
      problem = _problem(a, op, b, options.question)
      if problem.key not in held_out:
        return problem

  def sample(seed: int, step: int, count: int) -> list[Problem]:
    return [draw(seed, step, index) for index in range(count)]

  return Task(
    name="arithmetic",
    sample=sample,
    held_out=tuple(held_out.values()),
    reward=RewardSource("rl_llm.tasks.arithmetic", own_grader=True),
    note=f"{options.problems()} different problems, {len(held_out)} held out",
    answer_of=lambda problem, text: number_text(named_number(text, problem.columns["expression"])),
    difficulty=_difficulty,
  )


def _difficulty(problem: Problem) -> str:
  """The operator, and the digits of the longer operand."""
  a, op, b = problem.columns["expression"].split(" ")
  digits = max(len(operand.lstrip("-")) for operand in (a, b))
  return f"{op}, {digits} digit{'s' * (digits > 1)}"


def named_number(completion: str, expression: str) -> Decimal | None:
  """The one number a completion commits to; None where there is none, or two that differ.

  Accepting any right number in the text rewards listing guesses, so a completion must name exactly
  one, as the default question asks. It may repeat the question (as asked, or swapped for + and *)
  and the answer, but may not name a second number.

  >>> named_number("7 + 5 = 12.", "7 + 5")
  Decimal('12')
  >>> print(named_number("11 or 12", "7 + 5"))
  None

  Args:
    completion: what the model wrote.
    expression: the question as "a op b".
  """
  a, op, b = expression.split(" ")
  text = plain(completion).replace("×", "*").replace("\\times", "*")
  for first, second in ((a, b), (b, a)) if op != "-" else ((a, b),):
    asked = r"\s*".join(re.escape(part) for part in (first, op, second))
    echo = rf"(?<![\w.]){asked}(?!\w|[.,][0-9])"
    text = re.sub(echo, " ", text)
  numbers = set(find_numbers(text))
  return numbers.pop() if len(numbers) == 1 else None


def is_answer(completion: str, answer: str, expression: str) -> bool:
  """Whether the completion commits to the right number, as `named_number` reads it.

  >>> is_answer("7 + 5 = 12.", "12", "7 + 5"), is_answer("11 or 12", "12", "7 + 5")
  (True, False)

  Args:
    completion: what the model wrote.
    answer: the right integer, as text.
    expression: the question as "a op b".
  """
  return named_number(completion, expression) == Decimal(answer)


def reward(prompts, completions, answer, expression, **columns) -> list[float]:
  """1 where `is_answer`, else 0."""
  return [
    float(is_answer(completion_text(completion), right, asked))
    for completion, right, asked in zip(completions, answer, expression, strict=True)
  ]
