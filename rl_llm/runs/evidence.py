"""A run's record as the rules of `rl_llm.runs.verdicts` read it, and what they say of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from rl_llm.runs.formatting import number
from rl_llm.runs.report_page import finite

# A run with this share of right responses has learned its task; "few" are right up to this share.
SOLVED, FEW = 0.9, 0.1
# A trend of this many standard errors is no noise.
ERRORS = 4.0

HOW = ("sampled", "greedy")


class Verdict(NamedTuple):
  """One thing that a record says.

  Attributes:
    name: for programs and tests.
    says: one sentence, with the numbers that it follows from.
    advice: what to do, with the flag to try; a sentence without its full stop.
  """

  name: str
  says: str
  advice: str


class Evidence(NamedTuple):
  """A run's rows as the rules read them."""

  rows: Sequence[Mapping[str, Any]]  # of steps that trained
  evaluated: Sequence[Mapping[str, Any]]
  config: Mapping[str, Any]
  changed: Mapping[str, Any] = MappingProxyType({})  # setting -> the default it does not have

  def series(self, key: str) -> list[float]:
    """The finite values of a key, in the order of the steps."""
    return [value for row in self.rows if (value := finite(row.get(key))) is not None]

  def late(self, key: str) -> list[float]:
    """Those of the last quarter, and of at least five steps."""
    values = self.series(key)
    return values[-max(5, len(values) // 4) :]

  def mean(self, key: str) -> float:
    """The mean of the last quarter; 0 without a value."""
    return statistics.fmean(self.late(key) or [0.0])

  def solved(self) -> bool:
    """Whether nearly all responses are right, in training or held out."""
    ends = [row.get(f"eval/{how}_accuracy") for row in self.evaluated[-1:] for how in HOW]
    shares = [self.mean("accuracy"), *self.series("accuracy")[-1:], *map(finite, ends)]
    return max((share for share in shares if share is not None), default=0.0) >= SOLVED

  def rising(self) -> bool:
    """Whether the reward of the last quarter is still rising."""
    rewards = self.series("reward_mean")
    if len(rewards) < 8:
      return False
    rise, error = trend(self.late("reward_mean"), parts=2)
    return rise > max(3 * error, 0.05 * (max(rewards) - min(rewards)))

  def since(self, holds: Callable[[Mapping[str, Any]], bool]) -> int | None:
    """The step since which nearly all rows do what `holds` asks; None: the newest ones do not."""
    seen = right = 0
    first = None
    for row in reversed(self.rows):
      seen, right = seen + 1, right + holds(row)
      if right < 0.9 * seen and seen >= 5:
        break
      if holds(row):
        first = row["step"]
    return first if seen - right < right and holds(self.rows[-1]) else None

  def share_done(self) -> float:
    """How much of the run is done; 1 where nobody knows how long it is."""
    steps = finite(self.config.get("steps"))
    return (self.rows[-1]["step"] + 1) / steps if steps else 1.0


def trend(values: Sequence[float], *, parts: int = 4) -> tuple[float, float]:
  """(the mean of the last quarter, or other part, minus that of the first; its standard error).

  >>> trend([1.0, 3.0, 9.0, 11.0], parts=2)  # 10 - 2, and each pair has the variance 1
  (8.0, 1.4142135623730951)
  """
  size = max(len(values) // parts, 1)
  first, last = values[:size], values[-size:]
  squares = [statistics.pvariance(part) / max(size - 1, 1) for part in (first, last)]
  return statistics.fmean(last) - statistics.fmean(first), sum(squares) ** 0.5


def truth(record: Evidence) -> list[tuple[float, float, float]]:
  """(low, accuracy, high) of each evaluation, of sampled answers or else of greedy ones."""
  for how in HOW:
    keys = [f"eval/{how}_{end}" for end in ("low", "accuracy", "high")]
    found = [tuple(finite(row.get(key)) for key in keys) for row in record.evaluated]
    found = [ends for ends in found if None not in ends]
    if len(found) > 1:
      return found
  return []


def attempt(record: Evidence, *options: str | tuple[str, Any]) -> str:
  """What to try: words, or (setting, value) for the flag where the run's command has it.

  >>> attempt(Evidence([], [], {"kl.coef": 0.0}), ("kl.coef", 0.05), ("epochs", 1), "more data")
  'Try --kl.coef=0.05, or more data'
  """
  said = [option if isinstance(option, str) else flag(record, *option) for option in options]
  return "Try " + ", or ".join(option for option in said if option)


def flag(record: Evidence, path: str, value: Any) -> str:
  """The flag; "" if the run's command has no such setting."""
  if record.config and path not in record.config:
    return ""
  return f"--{path}={number(value, 2) if isinstance(value, float) else value}"


def grader(record: Evidence) -> str:
  """The flag that says who grades."""
  config = record.config
  if str(config.get("reward", "task")) != "task":
    return flag(record, "reward", config["reward"])
  if config.get("jsonl.reward_file") and str(config.get("task", "")).startswith("jsonl"):
    return flag(record, "jsonl.reward_file", config["jsonl.reward_file"])
  return flag(record, "task", config["task"]) if "task" in config else "of the task"


def data(record: Evidence) -> str:
  """The flag that says where the examples are from."""
  return flag(record, "data", record.config["data"]) if "data" in record.config else "the data"


def lower_rate(record: Evidence) -> tuple[str, float]:
  """A tenth of the learning rate, and no more than any model takes."""
  rate = finite(record.config.get("optimizer.learning_rate")) or 1e-5
  return "optimizer.learning_rate", min(rate / 10, 1e-3)


def nearer(record: Evidence) -> tuple[str, float]:
  """A higher price of the KL."""
  coefficient = finite(record.config.get("kl.coef")) or 0.0
  return "kl.coef", 10 * coefficient if coefficient else 0.05


def full_reward(record: Evidence) -> float:
  """The reward of a right answer."""
  return finite(record.config.get("jsonl.max_reward")) or 1.0
