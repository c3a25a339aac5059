"""Ctrl-C and preemption: notice them at once, act on them where nothing is lost."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupted(Exception):
  """The run was asked to stop; the state is whole, and the caller saves it.

  Attributes:
    signum: the signal, e.g. signal.SIGTERM. The exit code that says so is 128 + signum.
  """

  def __init__(self, signum: int):
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


class StopSignals:
  """Turns SIGINT and SIGTERM into an `Interrupted` raised by `check`, at a moment of our choosing.

  A signal that arrives in the middle of an update must not lose it, and one that arrives while a
  file is written must not leave half of it. So the handler only remembers the signal; the loop
  calls `check` between phases. A second signal does what it would have done without us: it ends the
  process at once, and the last checkpoint is what remains.

      with StopSignals() as stop:
        while ...:
          stop.check()
          ...
  """

  def __init__(self):
    self._received: int | None = None
    self._previous = {}

  def __enter__(self) -> StopSignals:
    for signum in (signal.SIGINT, signal.SIGTERM):
      self._previous[signum] = signal.signal(signum, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def check(self) -> None:
    """Raises `Interrupted` if a signal has come."""
    if self._received is not None:
      raise Interrupted(self._received)

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self._received = signum
    self._restore()
    # Unbuffered and at once: a compilation may take a minute, and a second Ctrl-C would lose work.
    os.write(2, b"\nstopping at the next safe point; a second signal stops at once\n")

  def _restore(self) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    self._previous = {}
