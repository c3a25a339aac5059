"""The result of grading a response: its status, and the meaning of a worker's answer to a call."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_llm.errors import UserError
from rl_llm.rewards import grading

STATUSES = ("ok", "not_applicable", "raised", "timed_out", "died", "invalid")
FAILED = STATUSES[2:]


class RewardError(UserError, RuntimeError):
  """The reward function cannot be used; the message names it and the fix."""


class RewardResult(NamedTuple):
  """What became of one sample.

  Attributes:
    value: the reward, finite and at most 1e6 in size; None unless `status` is "ok".
    status: "ok"; "not_applicable" (the function returned None: no opinion); "raised"; "timed_out";
      "died" (the process ended: `os._exit`, a segmentation fault, out of memory); "invalid" (not a
      number, NaN, outside the grader's REWARD_RANGE or ±1e6, or not one reward per completion). All
      of a call have its status where it raised, timed out or died.
    detail: one line that says why, empty for "ok" and "not_applicable".
    unreadable: whether a grader of this library could not read the text: "ok", with reward 0, and
      `detail` says why.
    extra: what the function logged about the response with `log_extra`, by column.
    metrics: what it logged about the call with `log_metric`, by name.
    parts: of several rewards, each by its name, None where it has no value; `value` is their sum.
  """

  value: float | None
  status: str
  detail: str = ""
  unreadable: bool = False
  extra: dict[str, Any] | None = None
  metrics: dict[str, float] | None = None
  parts: dict[str, float | None] | None = None


def to_arrays(results: Sequence[RewardResult]) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
  """Rewards as arrays, with what failed masked out instead of counted as wrong.

  >>> values, ok, counts = to_arrays([RewardResult(0.5, "ok"), RewardResult(None, "timed_out")])
  >>> values.tolist(), ok.tolist()
  ([0.5, 0.0], [True, False])
  >>> counts["ok"], counts["timed_out"], counts["raised"]
  (1, 1, 0)

  Args:
    results: N results.

  Returns:
    [N] float32 values, 0 where there is none; [N] bool, True where there is one; the number of each
    status, and of "unreadable" ones among the "ok".
  """
  ok = np.array([result.status == "ok" for result in results], dtype=bool)
  values = np.array([result.value or 0.0 for result in results], dtype=np.float32)
  found = collections.Counter(result.status for result in results)
  counts = {status: found[status] for status in STATUSES}
  return values, ok, counts | {"unreadable": sum(result.unreadable for result in results)}


def failure_share(results: Sequence[RewardResult], *statuses: str) -> float | None:
  """The share of grades that failed like this, without those on which the function had no opinion.

  >>> failure_share([RewardResult(1.0, "ok"), RewardResult(None, "timed_out")], "timed_out")
  0.5

  Args:
    results: N results.
    *statuses: of `FAILED`.

  Returns:
    The share, or None where there is no grade at all.
  """
  opinions = [result.status for result in results if result.status != "not_applicable"]
  return sum(status in statuses for status in opinions) / len(opinions) if opinions else None


def too_many_failures(
  name: str, results: Sequence[RewardResult], max_failure_rate: float, advice: str = ""
) -> RewardError:
  """The error of a function that fails on most samples, with the first failure in it.

  Args:
    name: of the function.
    results: of a batch, some of them failed.
    max_failure_rate: the share that may fail.
    advice: what to do about it, from its semicolon on.
  """
  failed = [index for index, result in enumerate(results) if result.status in FAILED]
  first = results[failed[0]]
  return RewardError(
    f"reward function {name} failed on {len(failed)} of {len(results)} samples, "
    f"more than max_failure_rate={max_failure_rate:g} allows; "
    f"sample {failed[0]} {first.status}: {first.detail}{advice}"
  )


def read_reply(reply: dict | None, count: int, within: tuple[float, float]) -> list[RewardResult]:
  """Judges a worker's answer, which the text it graded may have forged: nothing is trusted.

  >>> [result.status for result in read_reply({"values": [1.0, 7.0, None]}, 3, (0.0, 1.0))]
  ['ok', 'invalid', 'not_applicable']

  Args:
    reply: as `rl_llm.rewards.grading` describes it; None: the worker has ended.
    count: responses of the call.
    within: the lowest and the highest reward that the grader states.
  """
  if reply is None:
    return [RewardResult(None, "died", "the worker process ended")] * count
  for key, status in (("broken", "invalid"), ("raised", "raised"), ("died", "died")):
    if key in reply:
      return [RewardResult(None, status, str(reply[key])[: grading.MAX_DETAIL])] * count
  values = reply.get("values")
  if not isinstance(values, list) or len(values) != count:
    return [RewardResult(None, "invalid", "the worker sent no rewards")] * count
  try:
    extras, metrics = _logged(reply, count)
  except ValueError as error:
    return [RewardResult(None, "invalid", str(error))] * count
  unreadable = str(reply.get("unreadable", ""))[: grading.MAX_DETAIL]
  results = [_result(value, *within) for value in values]
  return [
    result._replace(
      detail=unreadable if result.value == 0 and unreadable else result.detail,
      unreadable=bool(unreadable) and result.value == 0,
      extra=extra,
      metrics=metrics,
    )
    for result, extra in zip(results, extras, strict=True)
  ]


def read_replies(reply: dict | None, count: int, within: tuple[float, float]) -> list[RewardResult]:
  """Judges a worker's answer to one call, or to `count` calls of one response in a frame."""
  each = None if reply is None else reply.get("each")
  if not isinstance(each, list) or len(each) != count:
    return read_reply(reply, count, within)
  replies = [grading.decode_reply(str(text).encode("utf-8", "replace")) for text in each]
  return [result for one in replies for result in read_reply(one, 1, within)]


def _result(value: Any, low: float, high: float) -> RewardResult:
  """Judges one reward of a worker's answer."""
  if value is None:
    return RewardResult(None, "not_applicable")
  if isinstance(value, str):
    return RewardResult(None, "invalid", value[: grading.MAX_DETAIL])
  if not isinstance(value, float):
    return RewardResult(None, "invalid", "the worker sent no number")
  if not low <= value <= high:
    source = "±1e+06" if high == grading.MAX_ABSOLUTE else f"its REWARD_RANGE, {low:g} to {high:g}"
    return RewardResult(None, "invalid", f"a reward of {value!r}, must be within {source}")
  return RewardResult(value, "ok")


def _logged(reply: dict, count: int) -> tuple[list[dict[str, Any] | None], dict[str, float] | None]:
  """What the function logged: by response, and for the whole call."""
  columns, metrics = reply.get("extra", {}), reply.get("metrics", {})
  fits = isinstance(columns, dict) and all(
    isinstance(values, list)
    and len(values) == count
    and all(value is None or isinstance(value, bool | int | float | str) for value in values)
    for values in columns.values()
  )
  if (
    not fits
    or not isinstance(metrics, dict)
    or len(metrics) > grading.MAX_METRICS
    or not all(len(name) <= grading.MAX_NAME for name in metrics)
    or not all(isinstance(v, float) and abs(v) <= grading.MAX_METRIC for v in metrics.values())
  ):
    raise ValueError("the worker sent something else than log_extra and log_metric take")
  extras = [{name: values[row] for name, values in columns.items()} or None for row in range(count)]
  return extras, metrics or None
