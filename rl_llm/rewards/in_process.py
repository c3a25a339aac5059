"""A reward function that is called in the trainer's own process: quick to try, and trusted."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence

from rl_llm.rewards import grading
from rl_llm.rewards.calls import Prompt, make_requests, responses_per_call
from rl_llm.rewards.results import (
  FAILED,
  RewardError,
  RewardResult,
  failure_share,
  read_reply,
  too_many_failures,
)

_RUNS_TEXT = {"exec", "eval", "compile", "system", "popen", "Popen", "check_output", "subprocess"}


class InProcess:
  """Grades samples by a function of this process, in the place of a `RewardPool`.

  Nothing isolates it and no deadline ends it: a function that hangs stops the run. So a function
  that runs what a model wrote is refused; it belongs in a file, whose workers are confined.

  >>> def half(prompts, completions, **columns):
  ...   return [0.5 * (text == "yes") for text in completions]
  >>> with InProcess(half) as grader:
  ...   [result.value for result in grader.score(["q", "q"], ["yes", "no"], [{}, {}], group_size=2)]
  [0.5, 0.0]

  Args:
    function: as a reward file has it: `f(prompts, completions, **columns) -> list[float | None]`.
    unit: the responses of a call: "sample", "group" (all to a prompt) or "batch"; "auto" = "group".
    max_failure_rate: share of a batch that may fail.

  Raises:
    RewardError: the function runs text as a program.
  """

  def __init__(self, function: Callable, *, unit: str = "auto", max_failure_rate: float = 0.5):
    self._name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
    if word := runs_text(function):
      raise RewardError(
        f"reward function {self._name} uses {word}: what a model wrote is not run in this process; "
        "put the function into a file, which confined workers run: --jsonl.reward_file"
      )
    self._grade = grading.grader(function)
    self._unit, self._max_failure_rate = unit, max_failure_rate

  def __enter__(self) -> InProcess:
    return self

  def __exit__(self, *_: object) -> None:
    """Nothing to end: the function has no process of its own."""

  def score(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Sequence[dict],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    group_size: int = 1,
    step: int = 0,
    steps: int = 1,
  ) -> list[RewardResult]:
    """Grades a batch, as `RewardPool.score` does."""
    batch = prompts, completions, columns, completion_ids
    unit = "group" if self._unit == "auto" else self._unit
    responses = responses_per_call(unit, *batch, group_size=group_size)
    within = (-grading.MAX_ABSOLUTE, grading.MAX_ABSOLUTE)
    numbers = {"responses": responses, "step": step, "steps": steps}
    results: list[RewardResult] = []
    for request in make_requests(*batch, **numbers):
      results += read_reply(self._grade(request), len(request["completions"]), within)
    if (failure_share(results, *FAILED) or 0.0) > self._max_failure_rate:
      raise too_many_failures(self._name, results, self._max_failure_rate)
    return results


def runs_text(function: Callable) -> str:
  """What in a function's source can run a text as a program; "" if nothing is seen there.

  >>> runs_text(len)
  ''
  """
  try:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
  except (OSError, TypeError, SyntaxError):
    return ""
  called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
  names = {getattr(node, "attr", getattr(node, "id", "")) for node in called}
  names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"subprocess"}
  return min(names & _RUNS_TEXT, default="")
