"""`--env=python`: a program of the model's, in a fresh process each call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

_SECONDS = 5.0
_CHARACTERS = 1800  # with what is said of its end, below the bound of an answer


class Python:
  """Runs programs; nothing is kept from one to the next but what the model has read."""

  def reset(self, answer: str | None = None, **columns) -> str | None:
    self._answer = None if answer is None else str(answer)
    return None

  def python(self, code: str) -> str:
    """Runs a Python program and shows what it prints.

    Args:
      code: The program; print what you want to see.
    """
    # A fresh interpreter holds nothing of this process, such as the answer to the problem.
    process = subprocess.Popen(
      [sys.executable, "-I", "-B", "-"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    try:
      process.stdin.write(code.encode("utf-8", "replace"))
      process.stdin.close()
      output, why = _read(process)
    finally:
      _end(process)
    if why or process.returncode:
      output += f"\n[{why or f'code {process.returncode}'}]"
    return output.strip("\n") or "[no output; print what you want to see]"


def _read(process: subprocess.Popen) -> tuple[str, str]:
  """What the program prints, and why it is ended before it ends by itself; else ""."""
  import select
  import time

  found, end = bytearray(), time.monotonic() + _SECONDS
  while len(found) <= 4 * _CHARACTERS:
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
    if not ready:
      return _shortened(found), f"ended after {_SECONDS:g} s"
    piece = os.read(process.stdout.fileno(), 1 << 14)
    if not piece:
      process.wait(timeout=_SECONDS)
      return _shortened(found), ""
    found += piece
  return _shortened(found), "ended: too much output"


def _shortened(found: bytearray) -> str:
  """The end of a long output is cut, except that of an error: its last lines say what it was."""
  text = found.decode("utf-8", "replace")
  if len(text) <= _CHARACTERS:
    return text
  if "Traceback (most recent call last)" in text:
    return "[...]\n" + text[-_CHARACTERS // 2 :]
  return text[:_CHARACTERS]


def _end(process: subprocess.Popen) -> None:
  """Kills the program with all that it has started."""
  for kill in (os.killpg, os.kill):
    try:
      kill(process.pid, signal.SIGKILL)
    except OSError:
      pass
  if os.getpid() == 1:  # All others of this process namespace are the program's.
    try:
      os.kill(-1, signal.SIGKILL)
    except OSError:
      pass
  if process.returncode is None:
    process.wait()
  process.stdout.close()
