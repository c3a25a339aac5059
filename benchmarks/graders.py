"""Grades a second: a short function of a person's own, by how many responses a call has.

  python -m benchmarks.graders

The function compares a short text with its answer. Each of the steps is graded as training grades
it, by the workers of a pool behind the whole sandbox: a fresh fork a call. So a call for each
response forks most, one for each group less, and one for a whole batch least. One step is graded
first and not counted.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time

from rl_llm.rewards import ISOLATION, RewardPool, RewardSource, describe
from rl_llm.runs.config import option, run

GRADER = """
def reward(prompts, completions, answer, **columns):
  return [float(text.strip() == right) for text, right in zip(completions, answer)]
"""


@dataclasses.dataclass(frozen=True)
class Config:
  """How much is graded, and by how many workers."""

  problems: int = option(64, "problems of a step", min=1)
  responses: int = option(8, "responses to each", min=1)
  workers: int = option(2, "grader processes", min=1)
  steps: int = option(10, "steps timed for each isolation", min=2)


def rates(config: Config, isolation: str, path: str) -> list[float]:
  """Grades a second of each step."""
  count = config.problems * config.responses
  prompts = [f"What is {row // config.responses} + 1?" for row in range(count)]
  columns = [{"answer": str(row // config.responses + 1)} for row in range(count)]
  texts = [columns[row]["answer"] if row % 2 else "7" for row in range(count)]
  found = []
  with RewardPool(RewardSource(path, isolation=isolation), workers=config.workers) as pool:
    if isolation == "sample":
      print(describe(pool.active_layers()))
    for _ in range(config.steps + 1):
      begun = time.monotonic()
      results = pool.score(prompts, texts, columns, group_size=config.responses)
      found.append(count / (time.monotonic() - begun))
      assert all(result.status == "ok" for result in results)
  return found[1:]


def main(config: Config) -> int:
  count = config.problems * config.responses
  print(f"{count} responses a step, {config.workers} workers, {os.cpu_count()} cores")
  with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "mine.py")
    with open(path, "w") as file:
      file.write(GRADER)
    for isolation in ISOLATION[1:]:
      found = rates(config, isolation, path)
      middle, low, high = statistics.median(found), min(found), max(found)
      print(
        f"{isolation:<8} {middle:>8,.0f} grades a second ({low:,.0f} to {high:,.0f})", flush=True
      )
  return 0


if __name__ == "__main__":
  run(main, Config)
