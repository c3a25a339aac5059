"""Turns token lists into the padded arrays a rollout takes: few shapes, nothing cut silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rl_llm.errors import UserError

Overlong = Literal["error", "drop", "truncate_left"]


class PromptTooLong(UserError, ValueError):
  """A prompt is longer than the limit, and the policy for such prompts is to stop."""


class PromptBatch(NamedTuple):
  """P prompts, left-padded to one width."""

  tokens: np.ndarray  # [P, L] int32
  lengths: np.ndarray  # [P] int32


def bucket(length: int, *, minimum: int = 8) -> int:
  """The least width of 8, 16, 24, 32, 48, 64, 96, 128, ... that holds `length`.

  Programs are compiled once per shape. With steps of at most a half, lengths up to 4,096 make at
  most 18 shapes, and no width is more than half padding.

  >>> [bucket(n) for n in (1, 8, 9, 17, 25, 33, 65, 200)]
  [8, 8, 16, 24, 32, 48, 96, 256]

  Args:
    length: tokens, >= 0.
    minimum: the least width, a power of two.
  """
  width = minimum
  while width < length:
    if width + width // 2 >= length and width > minimum:
      return width + width // 2
    width *= 2
  return width


def pad_prompts(prompts: Sequence[Sequence[int]], *, pad_id: int, columns: int = 0) -> PromptBatch:
  """Left-pads to the bucket of the longest, so that every response begins in the same column.

  >>> batch = pad_prompts([[5, 6], [7]], pad_id=0)
  >>> batch.tokens.shape, batch.tokens[:, -2:].tolist(), batch.lengths.tolist()
  ((2, 8), [[5, 6], [0, 7]], [2, 1])

  Args:
    prompts: P token lists.
    pad_id: what fills rows before their beginning.
    columns: pad at least to the bucket of this many columns, so that several batches share a shape.

  Raises:
    ValueError: there are no prompts, or one is empty (there is nothing to predict from).
  """
  if not prompts:
    raise ValueError("prompts: none given; pass at least one")
  empty = [index for index, prompt in enumerate(prompts) if not len(prompt)]
  if empty:
    raise ValueError(f"prompts: prompt {empty[0]} has no tokens; a prompt needs at least one")
  width = bucket(max(columns, *map(len, prompts)))
  tokens = np.full((len(prompts), width), pad_id, np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[width - len(prompt) :] = prompt
  return PromptBatch(tokens, np.array([len(prompt) for prompt in prompts], np.int32))


def limit_length(
  prompts: Sequence[Sequence[int]], *, limit: int, overlong: Overlong
) -> tuple[list[list[int] | None], int]:
  """Applies the policy for prompts longer than `limit`; says how many there were.

  >>> limit_length([[1, 2, 3], [4]], limit=2, overlong="truncate_left")
  ([[2, 3], [4]], 1)
  >>> limit_length([[1, 2, 3], [4]], limit=2, overlong="drop")
  ([None, [4]], 1)

  Args:
    prompts: token lists.
    limit: tokens allowed, >= 1.
    overlong: "error" stops, "drop" puts None in the prompt's place, "truncate_left" keeps its end.

  Raises:
    PromptTooLong: under "error"; the message gives the prompt's number, length and the ways out.
  """
  kept: list[list[int] | None] = []
  count = 0
  for index, prompt in enumerate(prompts):
    if len(prompt) <= limit:
      kept.append(list(prompt))
      continue
    count += 1
    if overlong == "error":
      raise PromptTooLong(
        f"prompt {index} has {len(prompt)} tokens, over --max_prompt_tokens={limit}; raise the "
        "limit, or choose another --overlong_prompt"
      )
    kept.append(None if overlong == "drop" else list(prompt[-limit:]))
  return kept, count
