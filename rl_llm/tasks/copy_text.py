"""Repeat a short string: a model that starts from random weights learns it in a minute."""

from __future__ import annotations

from dataclasses import dataclass, field

from rl_llm.rewards import RewardSource, completion_text
from rl_llm.tasks.problem import (
  Problem,
  Task,
  check_held_out_count,
  check_option,
  hashed_numbers,
  rng_for,
)

REWARD_RANGE = (0.0, 1.0)
LONGEST = 500  # characters: the number of different strings is counted length by length


@dataclass(frozen=True)
class CopyOptions:
  """`--task=copy`: write a short string again."""

  alphabet: str = field(default="abcd", metadata={"help": "the characters of the strings"})
  min_length: int = field(default=3, metadata={"help": "length of the shortest string"})
  max_length: int = field(default=3, metadata={"help": "length of the longest string"})
  held_out: int = field(default=20, metadata={"help": "strings kept for evaluation"})

  def __post_init__(self):
    name, alphabet = "copy.", self.alphabet
    check_option(
      name + "alphabet",
      alphabet,
      bool(alphabet) and len(set(alphabet)) == len(alphabet) and ">" not in alphabet,
      "one or more different characters other than '>', which ends the prompt",
    )
    check_option(name + "min_length", self.min_length, self.min_length >= 1, "an integer >= 1")
    check_option(
      name + "max_length",
      self.max_length,
      self.min_length <= self.max_length <= LONGEST,
      f"at least min_length={self.min_length} and at most {LONGEST}",
    )
    check_held_out_count(name + "held_out", self.held_out)
    most = self.strings() // 2
    check_option(
      name + "held_out",
      self.held_out,
      0 <= self.held_out <= most,
      f"in 0..{most} (half of the {self.strings()} strings); lower it or widen the strings",
    )

  def strings(self) -> int:
    """How many different strings there are."""
    return sum(
      len(self.alphabet) ** length for length in range(self.min_length, self.max_length + 1)
    )


def _problem(text: str) -> Problem:
  return Problem(text + ">", {"answer": text}, text)


def _string(index: int, options: CopyOptions) -> str:
  """The string at a place in the list of all strings, shortest first."""
  n, length = len(options.alphabet), options.min_length
  while index >= n**length:
    index -= n**length
    length += 1
  characters = []
  for _ in range(length):
    index, character = divmod(index, n)
    characters.append(options.alphabet[character])
  return "".join(reversed(characters))


def copy_task(options: CopyOptions) -> Task:
  """Prompts "abca>" whose right response is "abca" and then the end.

  Training draws a length, then a string, so short strings come up often enough to be learned first;
  held-out strings are drawn uniformly from all of them, so most are long.

  >>> task = copy_task(CopyOptions())
  >>> problem = task.sample(0, 0, 1)[0]
  >>> problem.prompt == problem.columns["answer"] + ">", len(task.held_out)
  (True, 20)
  """
  total, held_out = options.strings(), {}
  numbers = hashed_numbers("copy held out")
  while len(held_out) < options.held_out:
    text = _string(next(numbers) % total, options)
    held_out.setdefault(text, _problem(text))
  sizes = range(options.min_length, options.max_length + 1)
  lengths = [
    length
    for length in sizes
    if sum(len(text) == length for text in held_out) < len(options.alphabet) ** length
  ]

  def draw(seed: int, step: int, index: int) -> Problem:
    rng = rng_for(seed, step, index)
    length = lengths[rng.integers(len(lengths))]
    while True:
      letters = rng.integers(len(options.alphabet), size=length)
      text = "".join(options.alphabet[letter] for letter in letters)
      if text not in held_out:
        return _problem(text)

  def sample(seed: int, step: int, count: int) -> list[Problem]:
    return [draw(seed, step, index) for index in range(count)]

  return Task(
    name="copy",
    sample=sample,
    held_out=tuple(held_out.values()),
    reward=RewardSource("rl_llm.tasks.copy_text", own_grader=True),
    note=f"{total} different strings, {len(held_out)} held out",
    answer_of=lambda problem, text: text,
    difficulty=lambda problem: f"length {len(problem.columns['answer'])}",
  )


def credit(completion: str, answer: str) -> float:
  """1 for the exact string, else below 0.6: partial credit gives a new model a slope to climb.

      credit = 0.5 * right / longest + 0.1 * shared / longest

  `right` counts the places with the right character, `shared` those of the answer's places that
  hold any of its characters, `longest` is the longer of the two lengths. Random bytes hit the
  character of a place once in 256 tries, but some character of the answer more often, and learning
  that needs no order. Writing past the end of the answer costs the same whatever is written: if the
  answer's characters were worth more there than others, a model would learn to keep writing them,
  would never learn to end, and would never earn the 1.

  >>> credit("abc", "abc"), credit("abx", "abc")
  (1.0, 0.4)

  (2 of 3 are right and 2 of 3 are shared: 0.5 * 2/3 + 0.1 * 2/3 = 0.4.)
  """
  if completion == answer:
    return 1.0
  longest = max(len(completion), len(answer))
  right = sum(a == b for a, b in zip(completion, answer, strict=False))
  shared = sum(character in answer for character in completion[: len(answer)])
  return (5 * right + shared) / (10 * longest)


def reward(prompts, completions, answer, **columns) -> list[float]:
  """The `credit` of each completion."""
  return [
    credit(completion_text(completion), right)
    for completion, right in zip(completions, answer, strict=True)
  ]
