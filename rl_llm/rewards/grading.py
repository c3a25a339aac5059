"""One call of a reward function, in the process that makes it: its input and its answer.

A child receives a call of n responses (`rl_llm.rewards.calls` makes it):

    {"prompts": [n], "completions": [n], "columns": {name: [n]}, "completion_ids": [n] or null,
     "step": int, "steps": int}

It answers (`rl_llm.rewards.results` judges that) with one of

    {"values": [n of a number, null for "no opinion", or a text that says why it is invalid],
     "extra": {name: [n]}, "metrics": {name: number}, "unreadable": why, if it was}
    {"raised": why}    {"died": why}    {"broken": what the function may not return}

A frame may hold several calls that need no process of their own, `{"each": [call]}`, and is
answered by `{"each": [JSON text of an answer]}`.

A text that its grader runs can write such an answer too, so `decode_reply` reads it as what it may
be: a forgery. It can set the reward of its own call, within the range that the grader's module
states as `REWARD_RANGE = (lowest, highest)`, and nothing else.

Standard library only: `rl_llm.rewards.worker` runs where no package is importable.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Callable, Sequence

MAX_REPLY = 1 << 16  # bytes of a reply, plus this many for each response that was graded:
MAX_EXTRA = 1 << 13  # what `log_extra` may keep of one, as JSON
MAX_DETAIL = 2000  # characters of an exception that are kept
MAX_METRICS = 64  # names that `log_metric` may be called with: each is a column of the record
MAX_NAME = 100  # characters of such a name
MAX_METRIC = 1e30  # its largest value: the mean of many is still a number
MAX_ABSOLUTE = 1e6  # of a reward
NO_NETWORK = "; a grader has no network"


def reply_limit(count: int) -> int:
  """Bytes of the longest reply to a call of this many responses."""
  return MAX_REPLY + MAX_EXTRA * count


def decode_reply(body: bytes) -> dict | None:
  """An answer as its frame holds it; None unless it is an object that nests as answers do.

  >>> decode_reply(b'{"values": [1.0]}'), decode_reply(b"[" * 980 + b"]" * 980)
  ({'values': [1.0]}, None)

  Nesting matters since whatever copies, compares or shows a nested value recurses into it, and some
  depth is more than the stack of whoever does that allows.
  """
  try:
    reply = json.loads(body)
  except (ValueError, RecursionError):
    return None
  return reply if isinstance(reply, dict) and _is_flat(reply, 3) else None


def _is_flat(value: object, levels: int) -> bool:
  """Whether lists and objects nest at most this deep: {"extra": {name: [values]}} is three."""
  inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
  return inner is None or levels > 0 and all(_is_flat(each, levels - 1) for each in inner)


def stated_range(stated: object) -> tuple[float, float]:
  """The lowest and the highest reward that a grader's module states; by default ±1e6.

  Raises:
    ValueError: it is not two finite numbers in order.
  """
  try:
    low, high = map(float, (-MAX_ABSOLUTE, MAX_ABSOLUTE) if stated is None else stated)
  except (TypeError, ValueError):
    low, high = math.nan, math.nan
  if not -MAX_ABSOLUTE <= low <= high <= MAX_ABSOLUTE:
    raise ValueError(
      f"REWARD_RANGE = {stated!r}: must be two numbers within ±{MAX_ABSOLUTE:g}, the lowest and "
      "the highest reward of the function"
    )
  return low, high


class Log:
  """What a function logs about a call besides its rewards, with `log_extra` and `log_metric`."""

  def __init__(self, count: int):
    self.count = count
    self.columns: dict[str, list] = {}
    self.values: dict[str, list[float]] = {}

  def extra(self, column: str, values: list) -> None:
    """Keeps one value per response; the last call for a column counts."""
    values = [_scalar(value) for value in values]
    if len(values) != self.count:
      raise ValueError(
        f"log_extra({column!r}): {len(values)} values for {self.count} completions; give one each"
      )
    self.columns[str(column)] = values
    for row in zip(*self.columns.values(), strict=True):
      if len(json.dumps(dict(zip(self.columns, row, strict=True)))) > MAX_EXTRA:
        raise ValueError(f"log_extra({column!r}): over {MAX_EXTRA} bytes a response; log less")

  def metric(self, name: str, value: float) -> None:
    """Keeps a number of the whole call; the mean counts where there are several."""
    value = float(value)
    if not abs(value) <= MAX_METRIC:
      raise ValueError(f"log_metric({name!r}): {value}; must be finite and at most {MAX_METRIC:g}")
    self.values.setdefault(str(name), []).append(value)
    if len(self.values) > MAX_METRICS or len(str(name)) > MAX_NAME:
      raise ValueError(
        f"log_metric: at most {MAX_METRICS} names, of {MAX_NAME} characters; use fewer or shorter"
      )

  def reply(self) -> dict:
    """Its part of the answer, without what is empty."""
    means = {name: sum(found) / len(found) for name, found in self.values.items()}
    return {name: kept for name, kept in (("extra", self.columns), ("metrics", means)) if kept}


def _scalar(value: object) -> object:
  """What a line of the record can hold: a number, a bool, None or text."""
  if hasattr(value, "item") and not isinstance(value, (int, float)):
    value = value.item()  # a scalar of numpy, jax or torch
  return value if value is None or isinstance(value, (bool, int, float)) else str(value)


ENVIRONMENTS = "environments"  # the column with the attributes of each response's environment
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def call(function: Callable, takes: Sequence[str], request: dict, log: Log) -> object:
  """Calls the function as TRL does: by keyword, with lists of equal length, and awaits it."""
  state = types.SimpleNamespace(global_step=request["step"], max_steps=request["steps"])
  given = {
    "prompts": request["prompts"],
    "completions": request["completions"],
    "completion_ids": request["completion_ids"],
    "trainer_state": state,
    "log_extra": log.extra,
    "log_metric": log.metric,
  }
  given = {name: given[name] for name in takes if given[name] is not None}
  columns = dict(request["columns"])
  if ENVIRONMENTS in columns:
    columns[ENVIRONMENTS] = [types.SimpleNamespace(**each) for each in columns[ENVIRONMENTS]]
  found = function(**given, **columns)
  if hasattr(found, "__await__"):
    import asyncio  # where it is needed: most functions are not asynchronous

    async def wait():
      return await found

    found = asyncio.run(wait())
  return found


def reward_value(value: object) -> float | str | None:
  """One reward as a worker answers it: a number, None, or text that says why it is neither."""
  if hasattr(value, "item") and not isinstance(value, (int, float)):
    try:
      value = value.item()
    except (TypeError, ValueError):
      pass  # an array of several numbers
  if value is not None and not isinstance(value, (bool, int, float)):
    return f"a reward of type {type(value).__name__}, must be a number or None"
  try:
    return None if value is None else float(value)
  except OverflowError:
    return "an integer too large for a float"


Grade = Callable[[dict], dict]  # (what is sent) -> what is answered


def grader(function: Callable) -> Grade:
  """Returns what calls the function, with those `ARGUMENTS` that it takes.

  They are found once, here: a forked child copies every object that it looks at.
  """
  parameters = inspect.signature(function).parameters
  takes = [name for name in ARGUMENTS if name in parameters]
  if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
    takes = ARGUMENTS
  if inspect.iscoroutinefunction(function):
    import asyncio  # noqa: F401  (it takes as long as a hundred calls)
  return functools.partial(grade, function, takes)


def grade(function: Callable, takes: Sequence[str], request: dict) -> dict:
  """Calls the function; replies "values", "raised" or "broken"."""
  count = len(request["completions"])
  log = Log(count)
  try:
    found = call(function, takes, request, log)
    if isinstance(found, (str, bytes, dict, set, frozenset)) or not _iterable(found):
      kind = type(found).__name__
      return {"broken": f"returned {kind}, must return a list: one number per completion"}
    rewards = list(itertools.islice(found, count + 1))
    if len(rewards) != count:
      number = len(found) if hasattr(found, "__len__") else f"at least {len(rewards)}"
      what = f"{number} rewards for {count} completion{'s' * (count > 1)}"
      return {"broken": f"returned {what}, must return one per completion"}
    return {"values": [reward_value(value) for value in rewards]} | log.reply()
  except BaseException as error:  # SystemExit too: a grader must not end quietly
    return {"raised": described(error, sys.modules.get(getattr(function, "__module__", "")))}


def described(error: BaseException, module: types.ModuleType | None = None) -> str:
  """An error in one line: what it is, where in the grader's file, and whether it wanted a network.

  Args:
    error: as it was caught.
    module: whose file is meant; None: that of the last frame.
  """
  frames, trace = [], error.__traceback__
  while trace is not None:
    frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
    trace = trace.tb_next
  if isinstance(error, SyntaxError) and error.filename:
    frames.append((error.filename, error.lineno))
  file = getattr(module, "__file__", None) or (frames[-1][0] if frames else None)
  own = [(os.path.basename(name), line) for name, line in frames if name == file]
  place = f" ({own[-1][0]}:{own[-1][1]})" if own else ""
  text = f"{type(error).__name__}: {error}"[: MAX_DETAIL - 200]
  return text + place + (NO_NETWORK if _wants_network(error) else "")


def _wants_network(error: BaseException | None) -> bool:
  """Whether it, or what it follows from, was raised by Python's sockets."""
  for _ in range(10):
    trace = getattr(error, "__traceback__", None)
    while trace is not None:
      if os.path.basename(trace.tb_frame.f_code.co_filename) == "socket.py":
        return True
      trace = trace.tb_next
    error = getattr(error, "__cause__", None) or getattr(error, "__context__", None)
  return False


def _iterable(value: object) -> bool:
  try:
    iter(value)
  except TypeError:
    return False
  return True


def grade_text(grade_one: Grade, request: dict) -> dict:
  """Grades one response by a grader of this library: text that it cannot read is a wrong answer.

  The text is at fault if the same grader gives a number for the problem's own answer (or for an
  empty text, where the problem names no answer); otherwise the grader is, which stays a failure.
  """
  reply = grade_one(request)
  why = _at_a_loss(reply)
  if why is None:
    return reply
  (answer,) = request["columns"].get("answer") or [None]
  own = grade_one(request | {"completions": ["" if answer is None else str(answer)]})
  if "values" in own and _at_a_loss(own) is None:
    return {"values": [0.0], "unreadable": why}
  return {"raised": why}


def _at_a_loss(reply: dict) -> str | None:
  """Why an answer to a call of one response has no reward, unless the process died."""
  if "values" not in reply:
    return reply.get("raised") or reply.get("broken")
  value = next(iter(reply["values"]), None)
  if isinstance(value, str):
    return value
  if isinstance(value, float) and not abs(value) <= MAX_ABSOLUTE:
    return f"a reward of {value!r}"
  return None
