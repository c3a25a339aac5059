"""The scorer of `reasoning_gym:<name>`, for workers: some scorers run model text as Python."""

from __future__ import annotations

import functools
import re

# Here, so that it is imported once and not for every sample.
from reasoning_gym import get_score_answer_fn

from rl_llm.rewards import completion_text
from rl_llm.tasks.reasoning_gym import unpack

# Python reads it as a number, and the one scorer that does so too gives it 1: no number is further
# from NaN than another.
_NAN = re.compile(r"[\s\d.+\-()ij]*nan[\s\d.+\-()ijan]*", re.IGNORECASE)


REWARD_RANGE = (0.0, 1.0)

_scorer = functools.cache(get_score_answer_fn)  # It makes a whole data set to get at its function.


def reward(prompts, completions, puzzle, entry, **columns) -> list[float]:
  """The package's score of each completion, ignoring white space around it; below 1 is partial."""
  return [
    score(completion_text(completion).strip(), name, unpack(packed))
    for completion, name, packed in zip(completions, puzzle, entry, strict=True)
  ]


def score(text: str, puzzle: str, entry: dict) -> float:
  """The package's score of one text; 0 for NaN."""
  return 0.0 if _NAN.fullmatch(text) else _scorer(puzzle)(text, entry)
