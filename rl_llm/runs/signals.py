"""Ctrl-C and preemption: noticed at once, acted on where nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from rl_llm.parallel import hosts


class Interrupted(Exception):
  """The run was asked to stop; the state is whole, and the caller saves it.

  Attributes:
    signum: the signal, e.g. signal.SIGTERM. The exit code is 128 + signum.
  """

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


class StopSignals:
  """Turns SIGINT, SIGTERM and SIGHUP into an `Interrupted` that `check` raises at a safe point.

  A signal in the middle of an update must not lose the update, and a signal during a write must not
  leave half a file. So the handler only remembers the signal, and the loop calls `check` between
  phases (`rl_llm.training.loop.train_loop`): after a signal while a step samples, its responses are
  dropped; while it learns, the step is finished and recorded first. Then the state is saved. A
  second signal has its usual effect: it ends the process at once, and only the last checkpoint
  remains. A terminal that closes sends SIGHUP, which `nohup` ignores and so does this.

      with StopSignals() as stop:
        while ...:
          stop.check()
          ...
  """

  def __init__(self):
    self._received: int | None = None
    self._previous = {}
    self._terminals: list[int] = []

  def __enter__(self) -> StopSignals:
    self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
        self._previous[signum] = signal.signal(signum, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def check(self) -> None:
    """Raises `Interrupted` if a signal has arrived.

    With several processes this does nothing: if one stopped alone, the others would wait for it
    forever. They stop in `check_together`.
    """
    if self._received is not None and hosts.count() == 1:
      raise Interrupted(self._received)

  def check_together(self, what: str) -> None:
    """`check` at a point that all processes reach together: a signal to one of them stops all.

    Args:
      what: the point, for the message that names a process that does not reach it.

    Raises:
      HostLost: as for `rl_llm.parallel.hosts.barrier`.
    """
    self.check()
    received = hosts.all_gather(what, self._received)
    for signum in received:
      if signum is not None:
        raise Interrupted(signum)

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self._received = signum
    self._restore()
    if signum == signal.SIGHUP:  # Writing to a terminal that is gone would fail before the save.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      for descriptor in self._terminals:
        os.dup2(nowhere, descriptor)
      os.close(nowhere)
    # Say it at once, unbuffered: a compilation may take a minute, and a second Ctrl-C loses work.
    os.write(2, b"\nstopping at the next safe point; a second signal stops at once\n")

  def _restore(self) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    self._previous = {}


def run_child(
  command: Sequence[str], stop: StopSignals, *, environment: Mapping[str, str]
) -> tuple[int, int]:
  """Runs a command to its end; forwards a signal to it once.

  The child has its own session, so Ctrl-C reaches it only as the one SIGTERM sent here: a second
  signal would end it before it has saved. The caller checks `stop` again afterwards.

  Args:
    command: the program and its arguments.
    stop: the signals of this process.
    environment: the child's complete environment.

  Returns:
    Its exit code, negative after a signal, and its peak memory, KiB on Linux.
  """
  child = subprocess.Popen(command, env=environment, start_new_session=True)
  told, done = False, 0
  while not done:
    time.sleep(0.2)
    try:
      stop.check()
    except Interrupted:
      if not told:
        child.send_signal(signal.SIGTERM)
      told = True
    done, status, usage = os.wait4(child.pid, os.WNOHANG)
  child.returncode = os.waitstatus_to_exitcode(status)
  return child.returncode, usage.ru_maxrss
