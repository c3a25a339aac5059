"""Rewards from worker processes, with a deadline and a status per sample.

A grader meets text nobody has read. In the trainer's own process one endless loop stops the run,
one crash ends it, and a failure that becomes a silent 0 teaches the model that the answer was
wrong. So each sample is graded in a process that may hang, crash or be attacked at no cost to the
others, and what did not yield a number says so.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import math
import os
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rl_llm.errors import UserError
from rl_llm.rewards import worker as protocol

STATUSES = ("ok", "not_applicable", "raised", "timed_out", "died", "invalid")
MAX_ABSOLUTE = 1e6
REQUIRED_LAYERS = ("network", "files")


class RewardError(UserError, RuntimeError):
  """The reward function cannot be used; the message names it and the fix."""


class RewardSource(NamedTuple):
  """Where a worker finds a reward function.

  Its signature is `f(prompts, completions, **columns) -> list[float | None]`.

  Attributes:
    location: the path of a file ending in `.py`, or an importable module such as
      `"rl_llm.tasks.arithmetic"`.
    function: the function's name in it.
    runs_text: whether the function runs parts of a completion as a program. Then a pool refuses to
      start where the kernel offers no barrier to files and network.
    own_grader: whether it is one of this library's, which only compare text. It then needs no fresh
      process per sample, which is most of the time of grading a short answer.
  """

  location: str
  function: str = "reward"
  runs_text: bool = False
  own_grader: bool = False


class RewardResult(NamedTuple):
  """What became of one sample.

  Attributes:
    value: the reward, finite and at most 1e6 in size; None unless `status` is "ok".
    status: "ok"; "not_applicable" (the function returned None); "raised"; "timed_out"; "died" (the
      process ended: `os._exit`, a segmentation fault, out of memory); "invalid" (not a number, NaN,
      infinite, beyond 1e6).
    detail: one line that says why, empty for "ok" and "not_applicable".
  """

  value: float | None
  status: str
  detail: str = ""


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
    status.
  """
  ok = np.array([result.status == "ok" for result in results], dtype=bool)
  values = np.array([result.value or 0.0 for result in results], dtype=np.float32)
  counts = collections.Counter(result.status for result in results)
  return values, ok, {status: counts[status] for status in STATUSES}


def _result(reply: dict | None, name: str) -> RewardResult:
  """Judges a worker's reply, which the text it graded may have forged: nothing is trusted."""
  if reply is None:
    return RewardResult(None, "died", "the worker process ended")
  if "broken" in reply:
    raise RewardError(f"reward function {name} {reply['broken']}")
  for status in ("raised", "died", "invalid"):
    if status in reply:
      return RewardResult(None, status, str(reply[status])[: protocol.MAX_DETAIL])
  value = reply.get("value", "")
  if value is None:
    return RewardResult(None, "not_applicable")
  if not isinstance(value, float):
    return RewardResult(None, "invalid", "the worker sent no number")
  if not math.isfinite(value) or abs(value) > MAX_ABSOLUTE:
    return RewardResult(
      None, "invalid", f"a reward of {value!r}, must be finite and within ±{MAX_ABSOLUTE:g}"
    )
  return RewardResult(value, "ok")


@dataclass(eq=False)
class _Worker:
  """One worker process, seen from the trainer; `sample` is None while it has no work."""

  number: int
  connection: socket.socket
  since: float
  ready: bool = False
  sample: int | None = None
  received: bytearray = field(default_factory=bytearray)

  def replies(self) -> tuple[list[dict | None], bool]:
    """Reads what has arrived: the complete messages, and whether the other side has ended."""
    ended = False
    try:
      data = self.connection.recv(1 << 20)
      self.received += data
      ended = not data
    except BlockingIOError:
      pass
    except OSError:
      ended = True
    found = []
    while len(self.received) >= 4:
      length = int.from_bytes(self.received[:4], "big")
      if length > protocol.MAX_REPLY:
        return found, True
      if len(self.received) < 4 + length:
        break
      body = bytes(self.received[4 : 4 + length])
      del self.received[: 4 + length]
      try:
        reply = json.loads(body)
      except ValueError:
        return found, True
      if not isinstance(reply, dict):
        return found, True
      found.append(reply)
    return found, ended


def _import_path(source: RewardSource) -> tuple[list[str], list[str]]:
  """What a worker may import from, and which of it stays readable once text is graded."""
  path = [os.path.abspath(entry) for entry in sys.path if entry and os.path.isdir(entry)]
  readable = {
    sys.prefix,
    sys.base_prefix,
    sys.exec_prefix,
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc/ld.so.cache",
  }
  readable.update(entry for entry in path if entry.endswith(("site-packages", "dist-packages")))
  if source.location.endswith(".py"):
    own = os.path.dirname(os.path.abspath(source.location))
    path.append(own)
    readable.add(own)
  else:
    try:
      spec = importlib.util.find_spec(source.location.partition(".")[0])
    except (ImportError, ValueError):
      spec = None
    for place in (spec.submodule_search_locations or [spec.origin]) if spec and spec.origin else ():
      path.append(os.path.dirname(os.path.abspath(place)))
      readable.add(os.path.abspath(place))
  return path, sorted(readable)


class RewardPool:
  """Grades samples in isolated worker processes; use it as a context manager.

  The reward function is imported once, in a process of its own, when the pool is made: a file that
  does not import is an error before any training. Every sample is then one call, `f([prompt],
  [completion], answer=[...])`, in a fresh fork, so it sees no other sample and a failure touches no
  other. State that the function keeps between calls is lost. (The library's own graders, which only
  compare text, run in the worker itself: `RewardSource.own_grader`.)

  A worker that exceeds the deadline is killed with everything it started, and replaced. While some
  samples take much longer than others, spares grade the rest, so a batch of 64 with 8 that hang
  takes about one deadline, not four.

  Where the kernel allows (Linux; no root needed) a worker has no network, no other processes in
  sight, a 16 MB directory in memory of its own, and no files to read but Python, system libraries
  and the directory of the reward file: `active_layers` says which hold. What the function prints is
  dropped; its environment is empty.

  >>> with RewardPool(RewardSource("rl_llm.tasks.arithmetic"), workers=1) as pool:
  ...   pool.score(["What is 7 + 5?"], ["7 + 5 = 12"], [{"answer": "12", "expression": "7 + 5"}])
  [RewardResult(value=1.0, status='ok', detail='')]

  Args:
    source: where the reward function is.
    workers: processes that grade at the same time, >= 1.
    spares: how many more may run while that many samples are slow, >= 0.
    deadline: seconds of wall clock one sample may take, > 0.
    memory_mb: address space of one worker in MB, including what the function's imports map.
    max_failure_rate: fraction of a batch, in [0, 1], that may fail (raise, time out, die, be
      invalid) before `score` gives up on the function; 1 never does.
    start_deadline: seconds that importing the function may take.
    allow_weak_sandbox: grade with a function that runs model text even where files or network stay
      open to it.

  Raises:
    RewardError: the function cannot be imported, or it runs model text and the barriers it needs
      are missing.
    ValueError: an argument is out of range.
  """

  def __init__(
    self,
    source: RewardSource,
    *,
    workers: int = 2,
    spares: int = 16,
    deadline: float = 5.0,
    memory_mb: int = 4096,
    max_failure_rate: float = 0.5,
    start_deadline: int = 60,
    allow_weak_sandbox: bool = False,
  ):
    for name, value, allowed, fits in (
      ("workers", workers, "an integer >= 1", isinstance(workers, int) and workers >= 1),
      ("spares", spares, "an integer >= 0", isinstance(spares, int) and spares >= 0),
      ("deadline", deadline, "finite seconds > 0", 0 < deadline < math.inf),
      (
        "memory_mb",
        memory_mb,
        "an integer >= 256",
        isinstance(memory_mb, int) and memory_mb >= 256,
      ),
      ("max_failure_rate", max_failure_rate, "a fraction in [0, 1]", 0 <= max_failure_rate <= 1),
      (
        "start_deadline",
        start_deadline,
        "whole seconds >= 1",
        isinstance(start_deadline, int) and start_deadline >= 1,
      ),
    ):
      if not fits:
        raise ValueError(f"{name}={value!r}: must be {allowed}")
    location = source.location
    if location.endswith(".py"):
      location = os.path.abspath(location)
      if not os.path.isfile(location):
        raise RewardError(
          f"reward file {source.location}: no such file; give the path of a Python file"
        )
    self._source = source._replace(location=location)
    self._name = f"{source.function} of {source.location}"
    self._workers, self._spares, self._deadline = workers, spares, deadline
    self._memory_mb, self._start_deadline = memory_mb, start_deadline
    self._max_failure_rate = max_failure_rate
    self._durations: collections.deque[float] = collections.deque(maxlen=64)
    self._live: list[_Worker] = []
    self._next_number = 0
    self._layers: tuple[str, ...] = ()
    self._selector = selectors.DefaultSelector()
    self._directory = tempfile.mkdtemp(prefix="rl_llm_rewards_")
    self._server: subprocess.Popen | None = None
    try:
      self._start_server()
      for _ in range(workers):
        self._start_worker()
      self._wait_until_ready()
      missing = [layer for layer in REQUIRED_LAYERS if layer not in self._layers]
      if source.runs_text and missing and not allow_weak_sandbox:
        raise RewardError(
          f"reward function {self._name} runs model text as a program, and this system cannot "
          f"bar it from {' and '.join(missing)}; run on Linux 5.13+ with user namespaces; "
          "from Python, allow_weak_sandbox=True does without, where there is nothing to protect"
        )
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> RewardPool:
    return self

  def __exit__(self, *unused) -> None:
    self.close()

  def active_layers(self) -> tuple[str, ...]:
    """The barriers that hold on this machine, e.g. ("user", "network", "files", "limits")."""
    return self._layers

  @property
  def size(self) -> int:
    """How many workers are alive; `workers` between two batches."""
    return len(self._live)

  def score(
    self,
    prompts: Sequence[str | list[dict]],
    completions: Sequence[str],
    columns: Sequence[dict],
  ) -> list[RewardResult]:
    """Grades a batch.

    Args:
      prompts: N prompts, text or messages, as the function wants them.
      completions: N texts written by the model.
      columns: N dicts of further arguments of the function, of JSON types, e.g. {"answer": "12"}.

    Returns:
      N results, in order.

    Raises:
      ValueError: the lengths differ, or a column is not of JSON types.
      RewardError: the function returned something other than one reward per completion, or more
        than `max_failure_rate` of the batch failed, or workers cannot be started.
    """
    if not len(prompts) == len(completions) == len(columns):
      raise ValueError(
        f"{len(prompts)} prompts, {len(completions)} completions and {len(columns)} columns: "
        "must be as many of each"
      )
    requests = []
    for index, (prompt, completion, extra) in enumerate(
      zip(prompts, completions, columns, strict=True)
    ):
      frame = bytearray()
      try:
        request = {"prompt": prompt, "completion": completion, "columns": extra}
        protocol.write_frame(frame.extend, request)
      except (TypeError, ValueError) as error:
        raise ValueError(
          f"sample {index}: its prompt or columns are not of JSON types: {error}"
        ) from None
      requests.append(bytes(frame))
    try:
      results = self._grade(requests)
    except BaseException:
      self._end_busy()
      raise
    failed = [index for index, r in enumerate(results) if r.status not in ("ok", "not_applicable")]
    if len(failed) > self._max_failure_rate * len(results):
      first = failed[0]
      raise RewardError(
        f"reward function {self._name} failed on {len(failed)} of {len(results)} samples, "
        f"more than max_failure_rate={self._max_failure_rate:g} allows; "
        f"sample {first} {results[first].status}: "
        f"{results[first].detail}"
      )
    return results

  def close(self) -> None:
    """Ends all processes and removes the pool's directory."""
    for worker in list(self._live):
      self._forget(worker)
    if self._server is not None:
      self._control.close()  # the server ends, and with it every minder and worker
      try:
        self._server.wait(timeout=5)
      except subprocess.TimeoutExpired:
        self._server.kill()
        self._server.wait()
      self._server = None
    self._selector.close()
    shutil.rmtree(self._directory, ignore_errors=True)

  def _start_server(self) -> None:
    self._control, theirs = socket.socketpair()
    sys_path, readable = _import_path(self._source)
    command = [sys.executable, "-I", "-S", "-B", protocol.__file__, str(theirs.fileno())]
    self._server = subprocess.Popen(
      command,
      env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
      cwd=self._directory,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      pass_fds=[theirs.fileno()],
      start_new_session=True,  # an interrupt typed at the terminal is the trainer's to handle
    )
    theirs.close()
    self._control.settimeout(self._start_deadline)
    try:
      config = {
        "location": self._source.location,
        "function": self._source.function,
        "sys_path": sys_path,
        "readable": readable,
        "directory": self._directory,
        "memory_mb": self._memory_mb,
        "file_mb": 16,
        "own_grader": self._source.own_grader,
        "start_deadline": self._start_deadline,
      }
      protocol.write_frame(self._control.sendall, config)
      reply = protocol.read_frame(self._control.recv)
    except TimeoutError:
      raise RewardError(
        f"reward function {self._name}: importing it took over {self._start_deadline} s; "
        "give it less to do, or a larger start_deadline"
      ) from None
    except OSError:
      reply = None
    if reply is None:
      raise RewardError(
        f"reward function {self._name}: the process died while importing it "
        f"(code {self._server.wait()})"
      )
    if "error" in reply:
      raise RewardError(f"reward function {self._name}: {reply['error']}")

  def _start_worker(self) -> None:
    ours, theirs = socket.socketpair()
    try:
      socket.send_fds(
        self._control, [protocol.COMMAND.pack(b"S", self._next_number)], [theirs.fileno()]
      )
    except OSError:
      ours.close()
      raise RewardError(
        f"reward function {self._name}: the process that starts workers has died"
      ) from None
    finally:
      theirs.close()
    ours.setblocking(False)
    worker = _Worker(self._next_number, ours, time.monotonic())
    self._next_number += 1
    self._live.append(worker)
    self._selector.register(ours, selectors.EVENT_READ, worker)

  def _forget(self, worker: _Worker) -> None:
    """Kills a worker with everything it started."""
    self._live.remove(worker)
    self._selector.unregister(worker.connection)
    worker.connection.close()
    try:
      self._control.sendall(protocol.COMMAND.pack(b"E", worker.number))
    except OSError:  # the server has ended, and with it all workers
      pass

  def _slow_after(self) -> tuple[float, int]:
    """From how many seconds on a sample counts as slow, and how many spares that may call in.

    Slow means ten times what others took: a grader that needs a second for every sample gains
    nothing from spares, and would miss its deadline with too many of them on the same cores. While
    none has finished, a sixth of the deadline and as many spares as workers.
    """
    if not self._durations:
      return self._deadline / 6, min(self._spares, self._workers)
    return max(self._deadline / 20, 10 * statistics.median(self._durations)), self._spares

  def _end_busy(self) -> None:
    for worker in [w for w in self._live if w.sample is not None]:
      self._forget(worker)

  def _wait_until_ready(self) -> None:
    while not all(worker.ready for worker in self._live):
      self._listen(self._start_deadline)
      overdue = [
        w for w in self._live if not w.ready and time.monotonic() - w.since > self._start_deadline
      ]
      if overdue or len(self._live) < self._workers:
        raise RewardError(f"reward function {self._name}: a worker did not start")

  def _listen(self, timeout: float) -> list[tuple[_Worker, dict | None]]:
    """Waits; returns what busy workers sent, None for one that ended, and drops the ended."""
    events = []
    for key, _ in self._selector.select(timeout):
      worker = key.data
      replies, ended = worker.replies()
      for reply in replies:
        if not worker.ready:
          worker.ready = True
          self._layers = tuple(reply.get("layers", ()))
        elif worker.sample is not None:
          events.append((worker, reply))
        else:
          ended = True  # a message nobody asked for: something has gone wrong inside
      if ended:
        if worker.sample is None or not replies:
          events.append((worker, None))
        self._forget(worker)
    return events

  def _send(self, worker: _Worker, request: bytes, sample: int) -> None:
    worker.sample, worker.since = sample, time.monotonic()
    worker.connection.settimeout(self._deadline)
    try:
      worker.connection.sendall(request)
    except OSError:
      pass  # it has ended, which the next `_listen` reports
    worker.connection.setblocking(False)

  def _grade(self, requests: list[bytes]) -> list[RewardResult]:
    results: list[RewardResult | None] = [None] * len(requests)
    waiting = collections.deque(range(len(requests)))
    failed_starts = 0
    while waiting or any(worker.sample is not None for worker in self._live):
      if self._server.poll() is not None:
        for worker in list(self._live):
          waiting.extend([] if worker.sample is None else [worker.sample])
          self._forget(worker)
        self._control.close()
        self._start_server()
      now = time.monotonic()
      slow_after, spares = self._slow_after()
      slow = sum(w.sample is not None and now - w.since > slow_after for w in self._live)
      busy = sum(w.sample is not None for w in self._live)
      wanted = min(self._workers + min(slow, spares), busy + len(waiting))
      while len(self._live) < wanted:
        self._start_worker()
      for worker in self._live:
        if waiting and worker.ready and worker.sample is None:
          sample = waiting.popleft()
          self._send(worker, requests[sample], sample)
      ends = [
        w.since + (self._deadline if w.ready else self._start_deadline)
        for w in self._live
        if w.sample is not None or not w.ready
      ]
      turns = [w.since + slow_after for w in self._live if w.sample is not None] if waiting else []
      now = time.monotonic()
      timeout = min([moment - now for moment in ends + turns if moment > now], default=0.0)
      for worker, reply in self._listen(timeout + 0.001):
        if worker.sample is not None:
          results[worker.sample] = _result(reply, self._name)
          self._durations.append(time.monotonic() - worker.since)
          worker.sample = None
          failed_starts = 0
        elif reply is None:
          failed_starts += 1
      now = time.monotonic()
      for worker in list(self._live):
        if worker.sample is not None and now - worker.since > self._deadline:
          results[worker.sample] = RewardResult(
            None, "timed_out", f"took over {self._deadline:g} s and was killed"
          )
          self._forget(worker)
        elif not worker.ready and now - worker.since > self._start_deadline:
          failed_starts += 1
          self._forget(worker)
      if failed_starts > 3:
        raise RewardError(f"reward function {self._name}: workers end as soon as they start")
    for worker in self._live[self._workers :]:
      self._forget(worker)
    while len(self._live) < self._workers:
      self._start_worker()
    return results
