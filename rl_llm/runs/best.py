"""Which step of a run has the best held-out accuracy, so that its checkpoint is kept.

A run that collapses after its best step has, by the time that anybody looks, only checkpoints of
the collapse. Which step is best follows from the record alone, so a resumed run keeps the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# What says how good a model is, the first that a run has: more responses say it with less noise.
_ACCURACIES = ("eval/sampled_accuracy", "eval/sampled_mean", "eval/pair_accuracy")
_LOSSES = ("eval/token_loss", "eval/pair_loss")


class Best(NamedTuple):
  """The best step so far."""

  score: tuple[float, float]
  step: int


def score(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
  """How good a model is, larger is better; None if nothing held out was measured.

  Accuracy over the sampled responses counts, and of two that are equal the greedy one; of pairs,
  theirs; without any, the held-out loss.

  >>> score({"eval/sampled_accuracy": 0.5, "eval/greedy_accuracy": 0.75})
  (0.5, 0.75)
  >>> score({"eval/token_loss": 1.5}), score({"reward_mean": 0.5})
  ((-1.5, 0.0), None)

  Args:
    metrics: a line of metrics.jsonl.
  """
  for names, sign in ((_ACCURACIES, 1.0), (_LOSSES, -1.0)):
    for name in names:
      value = metrics.get(name)
      if isinstance(value, int | float) and math.isfinite(value):
        second = metrics.get("eval/greedy_accuracy") if sign > 0 else None
        return sign * float(value), float(second or 0.0)
  return None


def better(best: Best | None, step: int, metrics: Mapping[str, Any]) -> Best | None:
  """The step as the new best, or None if it is not better than the one before.

  Step 0 has trained nothing, so it is never the best. Of equals the earlier one stays.

  >>> best = better(None, 10, {"eval/sampled_accuracy": 0.5})
  >>> best.step, better(best, 20, {"eval/sampled_accuracy": 0.5})
  (10, None)

  Args:
    best: the best so far; None: no step yet.
    step: that the weights were evaluated at, before its update.
    metrics: what was measured.
  """
  found = score(metrics)
  if step == 0 or found is None or (best is not None and found <= best.score):
    return None
  return Best(found, step)


def best_recorded(rows: Iterable[Mapping[str, Any]], kept: Iterable[int]) -> Best | None:
  """The best step of a record of which there is a checkpoint; None if there is none.

  >>> rows = [{"step": s, "eval/sampled_accuracy": a} for s, a in ((5, 0.2), (10, 0.9), (15, 0.4))]
  >>> best_recorded(rows, [5, 10, 15]).step, best_recorded(rows, [5, 15]).step
  (10, 15)

  Args:
    rows: of metrics.jsonl.
    kept: the steps that have a checkpoint.
  """
  best, kept = None, set(kept)
  for row in rows:
    if row["step"] in kept:
      best = better(best, row["step"], row) or best
  return best
