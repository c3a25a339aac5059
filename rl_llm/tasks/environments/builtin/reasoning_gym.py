"""`--env=reasoning_gym:<name>`: a puzzle of the package reasoning-gym, with several tries."""

from __future__ import annotations

from rl_llm.tasks.reasoning_gym import unpack
from rl_llm.tasks.reasoning_gym_reward import score

_TRIES = 3


class ReasoningGym:
  """A puzzle that may be answered until it is right, up to three times."""

  def reset(self, puzzle: str, entry: dict, **columns) -> str | None:
    self._puzzle, self._entry = puzzle, unpack(entry)
    self.left, self.best, self.done = _TRIES, 0.0, False
    return f"You may answer {self.left} times."

  def answer(self, text: str) -> str:
    """Answers the puzzle, and says whether that is right.

    Args:
      text: The answer alone, in the form that the puzzle asks for.
    """
    if self.done:
      raise ValueError("no try is left")
    self.left -= 1
    self.done = not self.left
    value = float(score(text.strip(), self._puzzle, self._entry))
    self.best = max(self.best, value)
    if value >= 1:
      self.done = True
      return "right"
    return f"wrong, {self.left} left"

  def get_reward(self) -> float:
    """The best of the tries' scores, of which 1 is right."""
    return self.best
