"""The scorer of `reasoning_gym:<name>`; for workers, since several of its scorers run the response as Python."""

from __future__ import annotations

from reasoning_gym import (
  get_score_answer_fn,
)  # here, so that it is imported once and not for every sample

from rl_llm.tasks.reasoning_gym import unpack


def reward(prompts, completions, puzzle, entry, **columns) -> list[float]:
  """The package's own score of each completion, without the white space around it; partial credit below 1."""
  return [
    get_score_answer_fn(name)(completion.strip(), unpack(packed))
    for completion, name, packed in zip(completions, puzzle, entry, strict=True)
  ]
