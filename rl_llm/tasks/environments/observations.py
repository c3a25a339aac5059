"""What an environment says to a turn, put together from the answers to its calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rl_llm.tasks.environments.calls import Call

# From the best to the worst: a turn has that of its worst call.
STATUSES = ("ok", "malformed", "tool_error", "timed_out", "died")


class Observation(NamedTuple):
  """What the environment said to a turn.

  Attributes:
    text: all of it, as a person reads it.
    done: whether the episode has ended: the turn had no call, the environment said so, or its
      process is gone.
    status: of `STATUSES`.
    calls: how many calls the turn had, malformed ones included.
    seconds: that its tools took.
    reward: of this turn, from `get_turn_reward`; None where there is no such method.
    answers: one text per call.
    malformed: calls that could not be made.
    errors: calls whose tool raised, exceeded its deadline or died.
  """

  text: str
  done: bool
  status: str = "ok"
  calls: int = 0
  seconds: float = 0.0
  reward: float | None = None
  answers: tuple[str, ...] = ()
  malformed: int = 0
  errors: int = 0


class Turn:
  """A turn's calls, and what has been answered."""

  def __init__(self, calls: Sequence[Call]):
    self._calls = list(calls)
    self._answers: list[str] = []
    self._statuses: list[str] = []
    self.done, self.seconds, self.reward = not calls, 0.0, None

  def next_call(self) -> Call | None:
    """The call to make now; None where all have been."""
    made = len(self._answers)
    return self._calls[made] if made < len(self._calls) else None

  def answer(self, text: str, status: str) -> None:
    """Notes the answer to a call."""
    self._answers.append(text)
    self._statuses.append(status)

  def stop(self, text: str, status: str) -> None:
    """Notes that the episode has ended in this call, and drops the calls after it."""
    self.answer(text, status if status in STATUSES else "tool_error")
    self._calls = self._calls[: len(self._answers)]
    self.done = True

  def observation(self) -> Observation:
    """What the environment says to the turn."""
    return Observation(
      text="\n".join(self._answers),
      done=self.done,
      status=max(self._statuses, key=STATUSES.index, default="ok"),
      calls=len(self._calls),
      seconds=self.seconds,
      reward=self.reward,
      answers=tuple(self._answers),
      malformed=self._statuses.count("malformed"),
      errors=sum(status in STATUSES[2:] for status in self._statuses),
    )
