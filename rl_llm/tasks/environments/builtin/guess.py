"""`--env=guess`: find a number, told after each guess whether it is higher or lower."""

from __future__ import annotations


class Guess:
  """A secret number between 1 and `highest`, and a number of tries."""

  def reset(self, secret: int, highest: int = 100, tries: int = 7) -> str | None:
    self._secret, self._highest = int(secret), int(highest)
    self.left, self.guesses, self.found, self.done = int(tries), [], False, False
    return f"You have {self.left} guesses."

  def guess(self, number: int) -> str:
    """Guesses the number.

    Args:
      number: The guess.
    """
    if self.done:
      raise ValueError("the game is over")
    if not 1 <= number <= self._highest:
      raise ValueError(f"guess a number from 1 to {self._highest}")
    self.guesses.append(number)
    self.left -= 1
    self.found = number == self._secret
    self.done = self.found or not self.left
    if self.found:
      return "correct"
    hint = "higher" if number < self._secret else "lower"
    return f"{hint}, {self.left} left" if self.left else f"{hint}, no guess left"

  def get_reward(self) -> float:
    return float(self.found)
