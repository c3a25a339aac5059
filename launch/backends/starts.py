"""One start of one trial: its processes, how they are watched and ended, and what came of them.

`launch.backends.local` decides which trial starts when. A trial may need several starts, each in a
slot and under a lease, until its result is complete or its retries are used up.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import state
from launch.backends.slots import Slot
from launch.sweep import Trial
from rl_llm.errors import redact
from rl_llm.runs.formatting import duration

HOPELESS = "hopeless"  # why a search ended a trial

# Runs as a process of its own for a moment and then becomes the trial: whatever kills the launcher
# kills the trial too (PR_SET_PDEATHSIG), also where the launcher died before this was asked for.
_GUARD = (
  "import ctypes, os, sys\n"
  "ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
  "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"
  "os.execvp(sys.argv[2], sys.argv[2:])"
)


def ranks(command: Sequence[str], processes: int, *, port: int) -> list[list[str]]:
  """The command of each process of a trial; they connect on loopback, out of other machines' reach.

  >>> for rank in ranks(["python", "-m", "x"], 2, port=1234):
  ...   print(*rank[4:])
  --distributed.coordinator=127.0.0.1:1234 --distributed.processes=2 --distributed.process_id=0
  --distributed.coordinator=127.0.0.1:1234 --distributed.processes=2 --distributed.process_id=1
  """
  if processes == 1:
    return [list(command)]
  where = [
    "--distributed",
    f"--distributed.coordinator=127.0.0.1:{port}",
    f"--distributed.processes={processes}",
  ]
  return [[*command, *where, f"--distributed.process_id={i}"] for i in range(processes)]


def free_port() -> int:
  """A loopback port that no process listens on."""
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


@dataclasses.dataclass
class Start:
  """A trial that is running."""

  trial: Trial
  directory: Path
  slot: Slot
  lease: Path
  processes: list[subprocess.Popen]
  ask: Callable[[subprocess.Popen, int | None], None]
  log_begin: int  # where its lines begin in stdout.log
  began: float = dataclasses.field(default_factory=time.monotonic)
  renewed: float = dataclasses.field(default_factory=time.monotonic)
  judged: float = dataclasses.field(default_factory=time.monotonic)
  cause: str = ""  # why we ended it, or the first process that failed
  code: int = 0  # of that process
  kill_at: float | None = None  # once it has been asked to end

  def ask_to_end(self, grace: float, received: int | None = None) -> None:
    """Asks each process to save and end, and kills it after `grace` seconds.

    Args:
      grace: to save in.
      received: the signal by which the launcher was itself asked, if it was.
    """
    if self.kill_at is None:
      self.kill_at = time.monotonic() + grace
      for process in self.processes:
        self.ask(process, received)

  def kill(self) -> None:
    for process in self.processes:
      try:
        os.killpg(process.pid, signal.SIGKILL)
      except ProcessLookupError:
        pass


def ask(process: subprocess.Popen, received: int | None) -> None:
  """Experiments save at SIGTERM. The group would include graders, which they still need."""
  process.send_signal(signal.SIGTERM)


def start(trial: Trial, directory: Path, slot: Slot, lease: Path, commands, ask) -> Start:
  """Starts the processes of a trial whose lease we hold."""
  with open(directory / "stdout.log", "ab") as log:
    began = log.tell()
    log.write(redact(f"$ {shlex.join(commands[0])}\n").encode())
    log.flush()
    processes = [
      subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **slot.environment},
        start_new_session=True,  # Ctrl-C is for us; they get the one signal that we send.
      )
      for command in commands
    ]
  return Start(trial, directory, slot, lease, processes, ask, began)


def watch(running: Start, *, time_limit: float, grace: float) -> bool:
  """Keeps a trial alive or ends it; whether it is over."""
  now = time.monotonic()
  codes = [process.poll() for process in running.processes]
  if running.kill_at is None and any(codes):
    running.code = next(code for code in codes if code)
    running.cause = in_words(running.code)
    running.ask_to_end(grace)  # The others would wait for it.
  if running.kill_at is None and time_limit and now - running.began > time_limit:
    running.cause = f"over its time limit of {duration(time_limit)}"
    running.ask_to_end(grace)
  if running.kill_at is not None and now > running.kill_at:
    running.kill()
  if now - running.renewed > state.HEARTBEAT:
    running.renewed = now
    if not state.renew_lease(running.lease):
      running.cause = "taken over by another launcher"
      if not running.lease.exists():
        running.cause = f"{running.directory} or its leases were deleted while it ran"
      running.kill()
  return None not in codes


def in_words(code: int) -> str:
  """How a process ended.

  >>> in_words(1), in_words(-9)
  ('exit code 1', 'killed by SIGKILL (out of memory?)')
  """
  if code >= 0:
    return f"exit code {code}"
  hint = " (out of memory?)" if code == -signal.SIGKILL else ""
  return f"killed by {signal.Signals(-code).name}{hint}"


def conclude(over: Start, *, retries: int, backoff: float, stopping: bool) -> str:
  """Records what came of a start and releases its lease: "done", "failed", "again", "stopped",
  or "pruned".

  A failed start waits twice as long as the one before it. What stops because it was asked to (exit
  code 129, 130 or 143, with everything saved) has not failed.
  """
  over.kill()  # What its processes may have left behind.
  if not over.directory.exists():
    return "failed"  # Its directory was deleted: nothing to report, nothing to restart.
  newest = state.newest_lease(over.directory)
  if newest is not None and newest != over.lease:
    return "elsewhere"  # It is another launcher's now, and so is its status.
  before = state.read_status(over.directory)
  seconds = before.get("seconds", 0.0) + time.monotonic() - over.began
  changes = {"seconds": round(seconds, 1), "ended": time.time()}
  stops = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
  asked = over.code in [code for stop in stops for code in (128 + stop, -stop)]
  if state.is_done(over.directory, over.trial.steps):
    verdict, changes = "done", changes | {"failures": 0, "reason": "", "lines": []}
  elif over.cause == HOPELESS:
    verdict = "pruned"
  elif (stopping and over.kill_at is not None) or asked:
    verdict = "stopped"
  else:
    failures = before.get("failures", 0) + 1
    verdict = "failed" if failures > retries else "again"
    wait = min(backoff * 2 ** (failures - 1), 3600)
    changes |= {
      "failures": failures,
      "reason": over.cause or "ended well, but result.json does not hold all steps",
      "lines": state.last_lines(over.directory / "stdout.log", over.log_begin),
      "next_try": time.time() + wait,
      "wait": wait,
    }
  state.record(over.directory, status=verdict, **changes)
  if newest is not None:
    state.release_lease(over.lease)
  return verdict
