"""The scorer of `reasoning_gym:<name>`, for workers: some scorers run model text as Python."""

from __future__ import annotations

from reasoning_gym import (
  get_score_answer_fn,
)  # here, so that it is imported once and not for every sample

from rl_llm.rewards import completion_text
from rl_llm.tasks.reasoning_gym import unpack


def reward(prompts, completions, puzzle, entry, **columns) -> list[float]:
  """The package's score of each completion, white space around it aside; partial below 1."""
  return [
    get_score_answer_fn(name)(completion_text(completion).strip(), unpack(packed))
    for completion, name, packed in zip(completions, puzzle, entry, strict=True)
  ]
