"""Which examples are kept for evaluation: a function of the prompt's text alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

from rl_llm.data.formats import Content, Demonstration, Preference, Unpaired
from rl_llm.data.jsonl import DataError

Example = TypeVar("Example", Demonstration, Preference, Unpaired)


def hashed(text: str) -> int:
  """A 64-bit number from text, the same on every machine and with every version of numpy."""
  return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_held_out(key: str, *, fraction: float) -> bool:
  """Whether what this key stands for is among the held-out `fraction`.

      hashed(key) / 2^64 < fraction

  Args:
    key: identifies an example or a problem.
    fraction: at least 0 and below 1.
  """
  return hashed(key) < int(fraction * 2**64)


def content_key(content: Content) -> str:
  """A prompt as one line of JSON, in which the order of a message's keys does not show."""
  return json.dumps(content, sort_keys=True, ensure_ascii=False)


def prompt_key(example: Example) -> str:
  """The key of an example's prompt.

  In language modelling the prompt is empty. What comes before the assistant's first answer, or the
  text itself, then takes its place; otherwise all examples would share one key.

  >>> prompt_key(Demonstration("2+2=", "4", {}))
  '"2+2="'
  """
  if example.prompt:
    return content_key(example.prompt)
  completion = example.completion
  if isinstance(completion, list):
    roles = [message["role"] for message in completion]
    completion = completion[: roles.index("assistant", 1)]
  return content_key(completion)


def split_held_out(
  examples: Sequence[Example], *, fraction: float
) -> tuple[list[Example], list[Example]]:
  """Splits a data set in two by a hash of the prompt.

  A random split puts one answer to a question into training and another into evaluation, which then
  measures memory. With the prompt's hash, all examples of a prompt lie on one side. Adding or
  removing rows moves none, no seed matters, and the tasks that read files split the same way.

  >>> examples = [Demonstration(f"{n}+1=", answer, {}) for n in range(50) for answer in ("a", "b")]
  >>> training, held_out = split_held_out(examples, fraction=0.1)
  >>> len(training) + len(held_out), len(held_out) % 2
  (100, 0)
  >>> {e.prompt for e in training} & {e.prompt for e in held_out}
  set()

  The fraction is exact only for an endless data set; of 50 prompts it may take 2 or 8.

  Args:
    examples: with a prompt each; an empty one as for `prompt_key`.
    fraction: of the prompts to hold out, at least 0 and below 1.

  Returns:
    Training and held-out examples, each in their order.

  Raises:
    DataError: fraction is out of range, or above 0 and one side is empty.
  """
  name = f"held_out_fraction={fraction:g}"
  if not 0 <= fraction < 1:
    raise DataError(f"{name}: must be at least 0 and below 1")
  sides: tuple[list[Example], list[Example]] = [], []
  for example in examples:
    sides[is_held_out(prompt_key(example), fraction=fraction)].append(example)
  if fraction and not all(sides):
    taken, fix = ("none", "raise it") if sides[0] else ("all", "lower it")
    raise DataError(
      f"{name}: takes {taken} of the {len(examples)} examples; {fix}, or set it to 0 for no split, "
      "with --eval.every=0 where nothing else is evaluated"
    )
  return sides
