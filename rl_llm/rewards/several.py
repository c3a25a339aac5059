"""Several rewards of the same responses: each named and graded for itself, then added."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_llm.rewards.results import FAILED, RewardError, RewardResult

_TERM = re.compile(r"(?P<spec>task|.*\.py:\w+)(\*(?P<weight>[^*]+))?")


class Term(NamedTuple):
  """One of several rewards.

  Attributes:
    name: what it is called in the record: the function's name, or "task".
    weight: what it is multiplied by before all are added.
    spec: where it is: "FILE.py:function", or "task" for the task's own grader.
  """

  name: str
  weight: float
  spec: str


def terms(text: str) -> tuple[Term, ...]:
  """The rewards that a setting lists; () where it names one, as "task" or "FILE.py:function".

  >>> [term[:2] for term in terms("task,style.py:short*0.2")]
  [('task', 1.0), ('short', 0.2)]
  >>> terms("style.py:short")
  ()

  Functions of the same name have their file's name too.

  Raises:
    RewardError: a term is neither; or one is given twice, or a weight is no number.
  """
  parts = [part.strip() for part in text.split(",")]
  if len(parts) == 1 and "*" not in text.rpartition(":")[2]:
    return ()
  found = []
  for part in parts:
    match = _TERM.fullmatch(part)
    try:
      weight = float(match["weight"] or 1)
    except (TypeError, ValueError):
      weight = float("nan")
    if match is None or not abs(weight) < float("inf"):
      raise RewardError(
        f"rewards {text!r}: {part!r} must be task or FILE.py:function, and *NUMBER for its weight, "
        "as in task,style.py:short*0.2"
      )
    found.append((match["spec"], weight))
  specs = [spec for spec, _ in found]
  if len(set(specs)) < len(specs):
    raise RewardError(f"rewards {text!r}: a function is given twice; give it one weight")
  names = [spec.rpartition(":")[2] for spec in specs]
  counts = Counter(names)
  return tuple(
    Term(
      name if counts[name] == 1 else f"{Path(spec.rpartition(':')[0]).stem}.{name}", weight, spec
    )
    for name, (spec, weight) in zip(names, found, strict=True)
  )


def added(results: Sequence[RewardResult], named: Sequence[tuple[str, float]]) -> RewardResult:
  """One response's result from those of its graders, in the order of their names and weights.

  A grader without an opinion adds nothing. Where one has failed, so has the response: a sum without
  it would be another reward.

  >>> ok = RewardResult(1.0, "ok"), RewardResult(0.5, "ok")
  >>> added(ok, [("right", 1.0), ("short", 0.2)])[:2]
  (1.1, 'ok')
  >>> added((ok[0], RewardResult(None, "raised", "no")), [("right", 1.0), ("short", 0.2)])[2]
  'short: no'

  Args:
    results: K, one of each grader.
    named: K names and weights.
  """
  parts = {name: result.value for (name, _), result in zip(named, results, strict=True)}
  extra: dict[str, Any] = {}
  metrics: dict[str, float] = {}
  for result in results:
    extra |= result.extra or {}
    metrics |= result.metrics or {}
  logged = {"extra": extra or None, "metrics": metrics or None, "parts": parts}
  for (name, _), result in zip(named, results, strict=True):
    if result.status in FAILED:
      return RewardResult(None, result.status, f"{name}: {result.detail}", **logged)
  counted = [
    weight * result.value
    for (_, weight), result in zip(named, results, strict=True)
    if result.value is not None
  ]
  if not counted:
    return RewardResult(None, "not_applicable", **logged)
  unreadable = [result.detail for result in results if result.unreadable]
  detail = unreadable[0] if unreadable else ""
  return RewardResult(sum(counted), "ok", detail, bool(unreadable), **logged)


class Several:
  """Graders of the same responses in the place of one: gives each response the sum of its rewards.

  Args:
    graders: K `RewardPool`s or `InProcess`es, each open; they end with this one.
    named: K names and weights.
  """

  def __init__(self, graders: Sequence[Any], named: Sequence[tuple[str, float]]):
    self._graders, self._named = tuple(graders), tuple(named)

  def __enter__(self) -> Several:
    return self

  def __exit__(self, *_: object) -> None:
    for grader in self._graders:
      grader.__exit__(None, None, None)

  def score(self, *batch: Any, **how: Any) -> list[RewardResult]:
    """Grades a batch by each, as `RewardPool.score` does; each result has its `parts`."""
    found = [grader.score(*batch, **how) for grader in self._graders]
    return [added(results, self._named) for results in zip(*found, strict=True)]
