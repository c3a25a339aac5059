"""The processes that graders run in; started by `rl_llm.rewards.pool`, not imported by it.

    trainer --- server          imports the reward function once; never sees text
                  `- minder     one per worker, exists to be killed: its end is the worker's end
                       `- worker     process 1 of its own process namespace, in its own directory
                            `- child      a fresh fork per call: what text breaks ends with it
                                          (not for graders of this library that compare text)

A fork costs a millisecond, an import of the grader up to seconds, so a worker killed at its
deadline is replaced at once. Frames are four bytes of length (big endian), then JSON. Standard
library only: `python -I -S -B worker.py FD`.

What a child is sent, a call of n responses (`rl_llm.rewards.calls` makes it):

    {"prompts": [n], "completions": [n], "columns": {name: [n]}, "completion_ids": [n] or null,
     "step": int, "steps": int}

What it answers (`rl_llm.rewards.results` judges it), one of

    {"values": [n of a number, null for "no opinion", or a text that says why it is invalid],
     "extra": {name: [n]}, "metrics": {name: number}, "unreadable": why, if it was}
    {"raised": why}    {"died": why}    {"broken": what the function may not return}
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable

if __name__ == "__main__":  # run as a file, where no package is importable yet
  _path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox.py")
  _spec = importlib.util.spec_from_file_location("sandbox", _path)
  sandbox = importlib.util.module_from_spec(_spec)
  _spec.loader.exec_module(sandbox)
else:
  from rl_llm.rewards import sandbox

MAX_REPLY = 1 << 16  # bytes of a reply, and so many more for each response that was graded:
MAX_EXTRA = 1 << 13  # what `log_extra` may keep of one, as JSON
MAX_DETAIL = 2000  # characters of an exception that are kept
COMMAND = struct.Struct(">cQ")  # b"S" (start, with a socket) or b"E" (end), and the worker's number


def write_frame(write: Callable[[bytes], object], message: object) -> None:
  """Sends one message. JSON in ASCII: lone surrogates of broken text pass unharmed."""
  body = json.dumps(message).encode("ascii")
  write(struct.pack(">I", len(body)) + body)


def read_frame(read: Callable[[int], bytes], limit: int | None = None) -> object | None:
  """Receives one message; None when the other side has ended, or breaks the form."""

  def exactly(count: int) -> bytes | None:
    parts = []
    while count:
      part = read(min(count, 1 << 20))
      if not part:
        return None
      parts.append(part)
      count -= len(part)
    return b"".join(parts)

  header = exactly(4)
  if header is None:
    return None
  length = struct.unpack(">I", header)[0]
  if limit is not None and length > limit:
    return None
  body = exactly(length)
  try:
    return None if body is None else json.loads(body)
  except ValueError:
    return None


def load_function(location: str, function: str) -> Callable:
  """Imports the reward function from a `.py` file or from a module."""
  if location.endswith(".py"):
    spec = importlib.util.spec_from_file_location("reward_file", location)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward_file"] = module
    spec.loader.exec_module(module)
  else:
    module = importlib.import_module(location)
  found = getattr(module, function, None)
  if not callable(found):
    names = sorted(
      n for n, value in vars(module).items() if callable(value) and not n.startswith("_")
    )
    raise AttributeError(f"no function {function!r} in it; it has: {', '.join(names) or 'none'}")
  return found


def reply_limit(count: int) -> int:
  """Bytes of the longest reply to a call of so many responses."""
  return MAX_REPLY + MAX_EXTRA * count


class Log:
  """What a function says of a call besides its rewards, by `log_extra` and `log_metric`."""

  def __init__(self, count: int):
    self.count = count
    self.columns: dict[str, list] = {}
    self.values: dict[str, list[float]] = {}

  def extra(self, column: str, values: list) -> None:
    """Keeps one value a response; the last call for a column counts."""
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
    if not math.isfinite(value):
      raise ValueError(f"log_metric({name!r}): {value}; must be finite")
    self.values.setdefault(str(name), []).append(value)

  def reply(self) -> dict:
    """Its part of the answer, without what is empty."""
    means = {name: sum(found) / len(found) for name, found in self.values.items()}
    return {name: kept for name, kept in (("extra", self.columns), ("metrics", means)) if kept}


def _scalar(value: object) -> object:
  """What a line of the record can hold: a number, a bool, None or text."""
  if hasattr(value, "item") and not isinstance(value, (int, float)):
    value = value.item()  # a scalar of numpy, jax or torch
  return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def call(function: Callable, request: dict, log: Log) -> object:
  """Calls the function as TRL does: by keyword, with lists of equal length, and awaits it.

  Of the arguments that are not columns of the data it gets those that it takes.
  """
  state = types.SimpleNamespace(global_step=request["step"], max_steps=request["steps"])
  given = {
    "prompts": request["prompts"],
    "completions": request["completions"],
    "completion_ids": request["completion_ids"],
    "trainer_state": state,
    "log_extra": log.extra,
    "log_metric": log.metric,
  }
  if request["completion_ids"] is None:
    del given["completion_ids"]
  parameters = inspect.signature(function).parameters
  if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
    given = {name: value for name, value in given.items() if name in parameters}
  found = function(**given, **request["columns"])
  if inspect.isawaitable(found):
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


def grade(function: Callable, request: dict) -> dict:
  """Calls the function; replies "values", "raised" or "broken"."""
  count = len(request["completions"])
  log = Log(count)
  try:
    found = call(function, request, log)
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
    return {"raised": f"{type(error).__name__}: {error}"[:MAX_DETAIL]}


def _iterable(value: object) -> bool:
  try:
    iter(value)
  except TypeError:
    return False
  return True


def grade_text(grading: Callable[[dict], dict], request: dict) -> dict:
  """Grades one response by a grader of this library: text that it cannot read is a wrong answer.

  It is the text's fault if the same grader gives a number for the problem's own answer (for no text
  at all, where the problem names no answer); else the grader's, and that stays a failure.
  """
  reply = grading(request)
  why = reply.get("raised") or reply.get("broken") or next(
    (value for value in reply.get("values", ()) if isinstance(value, str)), None
  )
  if why is None:
    return reply
  (answer,) = request["columns"].get("answer") or [None]
  own = grading(request | {"completions": ["" if answer is None else str(answer)]})
  if all(isinstance(value, float) for value in own.get("values", [None])):
    return {"values": [0.0], "unreadable": why}
  return {"raised": why}


def grade_in_child(
  function: Callable, request: dict, inherited: int, alone: bool, processes: int | None
) -> dict:
  """Grades one call in a fresh fork, and leaves nothing of it behind.

  Args:
    inherited: the descriptor of the trainer's socket, which the child must not hold.
    alone: whether this process is process 1 of its own namespace, so that "all processes" means the
      child's.
    processes: how many processes of this kind of user the child may bring about; None for no limit.
      It binds the child only, so that a fork bomb cannot keep the other workers from forking.
  """
  reading, writing = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      sandbox.die_with_parent()
      os.close(inherited)
      os.close(reading)
      sandbox.limit_processes(processes)
      write_frame(lambda frame: os.write(writing, frame), grade(function, request))
    finally:
      os._exit(0)
  os.close(writing)
  try:
    limit = reply_limit(len(request["completions"]))
    reply = read_frame(lambda count: os.read(reading, count), limit)
  finally:
    os.close(reading)
  status = 0
  os.kill(child, signal.SIGKILL)  # still ours: it has not been waited for
  if alone:
    try:
      os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
      pass
  try:
    while True:
      ended, ended_status = os.waitpid(-1, 0)
      status = ended_status if ended == child else status
  except ChildProcessError:
    pass
  for name in os.listdir("."):
    shutil.rmtree(name) if os.path.isdir(name) and not os.path.islink(name) else os.unlink(name)
  if isinstance(reply, dict):
    return reply
  if os.WIFSIGNALED(status):
    return {"died": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
  return {"died": f"exited with code {os.WEXITSTATUS(status)} and no reward"}


def work(
  function: Callable, connection: socket.socket, config: dict, layers: list[str], alone: bool
) -> None:
  """A worker's life: the last restrictions, then one call after another."""
  sandbox.die_with_parent()
  layers = list(layers) + (["processes"] if alone else [])
  directory = config["directory"]
  if sandbox.own_directory(directory, config["file_mb"]):
    layers.append("own file system")
  else:
    directory = os.path.join(directory, str(os.getpid()))
    os.makedirs(directory, exist_ok=True)
  os.chdir(directory)
  os.environ["TMPDIR"] = os.environ["HOME"] = directory
  sandbox.no_tracing()
  if sandbox.no_new_privileges():
    layers.append("no new privileges")
  devices = ["/dev/null", "/dev/zero", "/dev/urandom"]
  if sandbox.only_files(config["readable"] + devices[1:], [directory, devices[0]]):
    layers.append("files")
  # Since Linux 5.14 processes are counted per user namespace; before, all of the user's are.
  release = re.match(r"(\d+)\.(\d+)", os.uname().release)
  counted_apart = "user" in layers and tuple(map(int, release.groups())) >= (5, 14)
  processes = 64 if counted_apart else None
  sandbox.limit_resources(memory_mb=config["memory_mb"], file_mb=config["file_mb"])
  layers.append("limits")
  write_frame(connection.sendall, {"layers": layers})

  def grading(request: dict) -> dict:
    if config["shared"]:
      return grade(function, request)
    return grade_in_child(function, request, connection.fileno(), alone, processes)

  while (request := read_frame(connection.recv)) is not None:
    reply = grade_text(grading, request) if config["own_grader"] else grading(request)
    write_frame(connection.sendall, reply)


def start_worker(
  function: Callable, control: socket.socket, fd: int, config: dict, layers: list[str]
) -> int:
  """Forks a minder and, under it, a worker that talks on `fd`; returns the minder's id."""
  minder = os.fork()
  if minder:
    os.close(fd)
    return minder
  try:
    sandbox.die_with_parent()
    control.close()
    os.setsid()
    alone = sandbox.next_child_is_init()
    worker = os.fork()
    if worker == 0:
      work(function, socket.socket(fileno=fd), config, layers, alone)
    else:
      os.close(fd)
      os.waitpid(worker, 0)
  finally:
    os._exit(0)


def serve(control: socket.socket) -> None:
  """The server's life: import the function, then start and end workers until the end."""
  config = read_frame(control.recv)
  signal.alarm(
    config["start_deadline"]
  )  # an import that hangs ends, even if the trainer is gone by then
  try:
    if os.geteuid() == 0:
      os.chown(config["directory"], sandbox.NOBODY, sandbox.NOBODY)
    steps = {
      "user": sandbox.own_user,
      "network": sandbox.no_network,
      "ipc": sandbox.no_shared_names,
    }
    layers = [name for name, step in steps.items() if step()]
    sys.path.extend(path for path in config["sys_path"] if path not in sys.path)
    function = load_function(config["location"], config["function"])
  except BaseException as error:
    write_frame(control.sendall, {"error": f"{type(error).__name__}: {error}"[:MAX_DETAIL]})
    return
  signal.alarm(0)
  write_frame(control.sendall, {"layers": layers})
  minders = {}
  while True:
    command, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
    if len(command) < COMMAND.size:
      return
    kind, number = COMMAND.unpack(command)
    if kind == b"S":
      minders[number] = start_worker(function, control, fds[0], config, layers)
    elif number in minders:
      # A minder stays a zombie until here, so its process id cannot have passed to another process.
      minder = minders.pop(number)
      for kill in (os.killpg, os.kill):
        try:
          kill(minder, signal.SIGKILL)
        except OSError:
          pass
      os.waitpid(minder, 0)


if __name__ == "__main__":
  serve(socket.socket(fileno=int(sys.argv[1])))
