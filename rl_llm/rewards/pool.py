"""Rewards from worker processes, with a deadline and a status per sample.

A grader runs on text that nobody has read. In the trainer's own process one endless loop stalls the
run, one crash ends it, and a failure that becomes a silent 0 teaches the model that the answer was
wrong. So each call runs in a process that may hang, crash or be attacked without affecting the
others, and a call that yields no number reports why.
"""

from __future__ import annotations

import collections
import contextlib
import math
import os
import selectors
import statistics
import time
from collections.abc import Sequence

from rl_llm.rewards import grading, layers, memory
from rl_llm.rewards.calls import Call, Prompt, RewardSource, make_calls, packed, responses_per_call
from rl_llm.rewards.directories import scratch
from rl_llm.rewards.paths import import_path, readable_paths
from rl_llm.rewards.results import (
  FAILED,
  RewardError,
  RewardResult,
  failure_share,
  read_replies,
  too_many_failures,
)
from rl_llm.rewards.server import Server, Worker


def _check(
  workers: int,
  spares: int,
  deadline: float,
  memory_mb: int,
  max_failure_rate: float,
  start_deadline: int,
) -> None:
  """Refuses arguments that a pool cannot be made with."""

  def whole(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least

  for name, value, allowed, fits in (
    ("workers", workers, "an integer >= 1", whole(workers, 1)),
    ("spares", spares, "an integer >= 0", whole(spares, 0)),
    ("deadline", deadline, "finite seconds > 0", 0 < deadline < math.inf),
    ("memory_mb", memory_mb, "an integer >= 256", whole(memory_mb, 256)),
    ("max_failure_rate", max_failure_rate, "a fraction in [0, 1]", 0 <= max_failure_rate <= 1),
    ("start_deadline", start_deadline, "whole seconds >= 1", whole(start_deadline, 1)),
  ):
    if not fits:
      raise ValueError(f"{name}={value!r}: must be {allowed}")


class RewardPool:
  """Grades samples in isolated worker processes; use it as a context manager.

  The reward function is imported once, in its own process, when the pool is made, so a file that
  cannot be imported is an error before any training. All responses to a prompt are then graded by
  one call (`RewardSource.isolation` changes that), `f(prompts=..., completions=..., answer=...)`,
  in a fresh fork, so it sees no other call and its failure affects no other. State that the
  function keeps between calls is lost. (The library's own graders, which only compare text, run in
  the worker itself.)

  A worker that exceeds the deadline is killed with everything it started, and replaced. While some
  calls are slow, spare workers grade the rest: 64 calls, of which 8 hang, take about one deadline.

  Where the kernel allows (Linux; no root needed) a worker has no network, sees no other processes,
  and has a file system of its own: Python, system libraries, the reward file and the modules it has
  imported before the first response, the source's `files`, and a /tmp of 16 MB in memory.
  `active_layers` says what holds. What the function prints is dropped; its environment is empty.

  >>> with RewardPool(RewardSource("rl_llm.tasks.arithmetic"), workers=1) as pool:
  ...   columns = [{"answer": "12", "expression": "7 + 5"}]
  ...   pool.score(["What is 7 + 5?"], ["7 + 5 = 12"], columns)[0][:2]
  (1.0, 'ok')

  Args:
    source: where the reward function is.
    workers: processes that grade at the same time, >= 1.
    spares: how many extra workers may run while that many calls are slow, >= 0.
    deadline: seconds of wall clock one call may take, > 0.
    memory_mb: address space of each process in MB, including what the function's imports map, and
      memory of all processes of a call together, without these imports.
    max_failure_rate: fraction of a batch, in [0, 1], that may fail (raise, time out, die, be
      invalid) before `score` gives up on the function; 1 never does. Samples on which the function
      has no opinion do not count.
    start_deadline: seconds that importing the function may take.
    allow_weak_sandbox: let a function that runs model text reach files or a network left open.

  Raises:
    RewardError: the function cannot be imported, or runs model text without the barriers it needs.
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
    _check(workers, spares, deadline, memory_mb, max_failure_rate, start_deadline)
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
    self._live: list[Worker] = []
    self._next_number = 0
    self._layers: tuple[str, ...] = ()
    self._selector = selectors.DefaultSelector()
    self._held = contextlib.ExitStack()
    self._directory = str(self._held.enter_context(scratch("rl_llm_rewards_")))
    self._server: Server | None = None
    try:
      self._start_server()
      for _ in range(workers):
        self._start_worker()
      self._wait_until_ready()
      missing = layers.missing(self._layers)
      if source.runs_text and missing and not allow_weak_sandbox:
        raise RewardError(
          f"reward function {self._name} runs model text as a program, and this system cannot "
          f"bar it from {' and '.join(missing)}; run on Linux 5.13+ with user namespaces, or give "
          "--reward_sandbox=weak where there is nothing to protect"
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
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    columns: Sequence[dict],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    group_size: int = 1,
    step: int = 0,
    steps: int = 1,
  ) -> list[RewardResult]:
    """Grades a batch.

    Args:
      prompts: N prompts, text or messages. A function is given each completion in the same form,
        as TRL's are: `completion[0]["content"]` where the prompt is messages.
      completions: N texts written by the model.
      columns: N dicts of further arguments of the function, of JSON types, e.g. {"answer": "12"}.
      completion_ids: N lists of the tokens of the completions, which a function gets by that name.
      group_size: G, responses to each prompt; N is a multiple of it, and a group stands together.
      step: what the function gets as `trainer_state.global_step`.
      steps: what it gets as `trainer_state.max_steps`; 1 where nothing is trained.

    Returns:
      N results, in order.

    Raises:
      ValueError: the lengths differ, or a column is not of JSON types.
      RewardError: every call returned something other than one reward per completion, or more
        than `max_failure_rate` of the batch failed, or workers cannot be started.
    """
    batch = prompts, completions, columns, completion_ids
    responses = responses_per_call(self._source.unit, *batch, group_size=group_size)
    numbers = {"responses": responses, "step": step, "steps": steps}
    calls = make_calls(*batch, **numbers)
    if self._source.shares_process:
      calls = packed(calls)
    try:
      results = [result for call in self._grade(calls) for result in call]
    except BaseException:
      self._end_busy()
      raise
    if (failure_share(results, *FAILED) or 0.0) > self._max_failure_rate:
      raise self._too_many_failures(results, messages=any(not isinstance(p, str) for p in prompts))
    return results

  def _too_many_failures(self, results: Sequence[RewardResult], *, messages: bool) -> RewardError:
    """The message about a function that fails on most samples, and what to do about it."""
    first = next(result for result in results if result.status in FAILED)
    status, detail, advice = first.status, first.detail, ""
    if status == "timed_out":
      advice = "; raise --reward_deadline, or grade fewer at a time: --reward_isolation=sample"
    elif grading.NO_NETWORK in detail:
      advice = ": have what it needs in a file, and name that with --reward_files"
    elif detail.startswith(("FileNotFoundError", "ModuleNotFoundError", "PermissionError")):
      advice = "; it sees the modules it imported at first, and files given with --reward_files"
    elif status == "raised" and messages and detail.startswith(("TypeError", "AttributeError")):
      advice = "; completions of prompts that are messages are messages: completion[0]['content']"
    return too_many_failures(self._name, results, self._max_failure_rate, advice)

  def close(self) -> None:
    """Ends all processes and removes the pool's directory."""
    for worker in list(self._live):
      self._forget(worker)
    if self._server is not None:
      self._server.close()
      self._server = None
    self._selector.close()
    self._held.close()

  def _start_server(self) -> None:
    config = {
      "location": self._source.location,
      "function": self._source.function,
      "sys_path": import_path(self._source),
      "readable": readable_paths(self._source),
      "directory": self._directory,
      "memory_mb": self._memory_mb,
      "file_mb": 16,
      "processes": 64,
      "together": 0,
      "idle_period": memory.PERIOD,
      "own_grader": self._source.own_grader,
      "shared": self._source.shares_process,
      "start_deadline": self._start_deadline,
    }
    deadline = self._start_deadline
    self._server = Server(
      f"reward function {self._name}", config, directory=self._directory, start_deadline=deadline
    )
    self._range = tuple(self._server.reply["range"])

  def _start_worker(self) -> None:
    connection = self._server.start(self._next_number)
    worker = Worker(self._next_number, connection, time.monotonic())
    self._next_number += 1
    self._live.append(worker)
    self._selector.register(connection, selectors.EVENT_READ, worker)

  def _forget(self, worker: Worker) -> None:
    """Kills a worker with everything it started."""
    self._live.remove(worker)
    self._selector.unregister(worker.connection)
    worker.connection.close()
    self._server.end(worker.number)

  def _slow_after(self) -> tuple[float, int]:
    """The seconds after which a call counts as slow, and how many spares that may call in.

    Slow means ten times what others took: a grader that needs a second for every call gains
    nothing from spares, and would miss its deadline with too many of them on the same cores. Until
    a call has finished, it means a sixth of the deadline, with as many spares as workers.
    """
    if not self._durations:
      return self._deadline / 6, min(self._spares, self._workers)
    return max(self._deadline / 20, 10 * statistics.median(self._durations)), self._spares

  def _end_busy(self) -> None:
    for worker in [w for w in self._live if w.call is not None]:
      self._forget(worker)

  def _wait_until_ready(self) -> None:
    while not all(worker.ready for worker in self._live):
      self._listen(self._start_deadline)
      overdue = [
        w for w in self._live if not w.ready and time.monotonic() - w.since > self._start_deadline
      ]
      if overdue or len(self._live) < self._workers:
        raise RewardError(f"reward function {self._name}: a worker did not start")

  def _listen(self, timeout: float) -> list[tuple[Worker, dict | None]]:
    """Waits; returns what busy workers sent, None for one that ended, and drops the ended."""
    events = []
    for key, _ in self._selector.select(timeout):
      worker = key.data
      replies, ended = worker.replies()
      for reply in replies:
        if not worker.ready:
          worker.ready = True
          self._layers = tuple(reply.get("layers", ()))
        elif worker.call is not None:
          events.append((worker, reply))
        else:
          ended = True  # a message nobody asked for: something has gone wrong inside
      if ended:
        if worker.call is None or not replies:
          events.append((worker, None))
        self._forget(worker)
    return events

  def _send(self, worker: Worker, number: int, call: Call) -> None:
    worker.call, worker.count, worker.since = number, call.count, time.monotonic()
    worker.connection.settimeout(self._deadline)
    try:
      worker.connection.sendall(call.frame)
    except OSError:
      pass  # it has ended, which the next `_listen` reports
    worker.connection.setblocking(False)

  def _grade(self, calls: list[Call]) -> list[list[RewardResult]]:
    """The results of each call, whichever worker made it."""
    results: list[list[RewardResult]] = [[] for _ in calls]
    waiting = collections.deque(range(len(calls)))
    failed_starts, broken, again = 0, [], []
    while waiting or any(worker.call is not None for worker in self._live):
      if self._server.poll() is not None:
        waiting.extend(self._restart())
      slow_after, spares = self._slow_after()
      self._start_wanted(len(waiting), slow_after, spares)
      for worker in self._live:
        if waiting and worker.ready and worker.call is None:
          number = waiting.popleft()
          self._send(worker, number, calls[number])
      for worker, reply in self._listen(self._patience(bool(waiting), slow_after)):
        if worker.call is not None:
          results[worker.call] = read_replies(reply, worker.count, self._range)
          again += [worker.call] if reply is None and calls[worker.call].apart else []
          broken += [worker.call] if reply is not None and "broken" in reply else []
          self._durations.append(time.monotonic() - worker.since)
          worker.call, failed_starts = None, 0
        elif reply is None:
          failed_starts += 1
      now = time.monotonic()
      for worker in list(self._live):
        if worker.call is not None and now - worker.since > self._deadline:
          results[worker.call] = [self._timed_out(worker.count)] * worker.count
          again += [worker.call] if calls[worker.call].apart else []
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
    if calls and len(broken) == len(calls):  # All: a single one may be what the text has forged.
      raise RewardError(f"reward function {self._name} {results[0][0].detail}")
    for number in again:
      results[number] = [result for one in self._grade([*calls[number].apart]) for result in one]
    return results

  def _restart(self) -> list[int]:
    """Replaces the server, and with it all workers; gives the calls that they had."""
    calls = [worker.call for worker in self._live if worker.call is not None]
    for worker in list(self._live):
      self._forget(worker)
    self._server.close()
    self._start_server()
    return calls

  def _start_wanted(self, waiting: int, slow_after: float, spares: int) -> None:
    """Starts workers until there are enough for the calls that wait and those that are slow."""
    now = time.monotonic()
    busy = [worker for worker in self._live if worker.call is not None]
    slow = sum(now - worker.since > slow_after for worker in busy)
    wanted = min(self._workers + min(slow, spares), len(busy) + waiting)
    while len(self._live) < wanted:
      self._start_worker()

  def _patience(self, waiting: bool, slow_after: float) -> float:
    """Seconds until a call is over its deadline, or, while others wait, counts as slow."""
    moments = [
      worker.since + (self._deadline if worker.ready else self._start_deadline)
      for worker in self._live
      if worker.call is not None or not worker.ready
    ]
    if waiting:
      moments += [w.since + slow_after for w in self._live if w.call is not None]
    now = time.monotonic()
    return 0.001 + min([moment - now for moment in moments if moment > now], default=0.0)

  def _timed_out(self, count: int) -> RewardResult:
    what = f"a call of {count} responses took" if count > 1 else "took"
    return RewardResult(None, "timed_out", f"{what} over {self._deadline:g} s and was killed")
