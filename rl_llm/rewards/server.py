"""The process that imports a program once, and forks a confined process for each connection.

`rl_llm.rewards.worker` is what runs in it. Graders (`rl_llm.rewards.pool`) and the environments of
agents (`rl_llm.tasks.environments`) are such programs. `Server` is the process as the trainer sees
it, and `Worker` one that it has forked to grade.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_llm.rewards import grading
from rl_llm.rewards import worker as protocol
from rl_llm.rewards.results import RewardError


class Server:
  """A running server, seen from the trainer.

  Args:
    name: what it runs, for messages, e.g. "reward function reward of mine.py".
    config: what `rl_llm.rewards.worker.serve` reads; JSON types.
    directory: for the files of its processes; the caller removes it.
    start_deadline: seconds that importing the program may take.

  Raises:
    RewardError: the program cannot be imported; the message says why.
  """

  def __init__(
    self, name: str, config: Mapping[str, Any], *, directory: str, start_deadline: float
  ):
    self.name = name
    self._control, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", "-B", protocol.__file__, str(theirs.fileno())]
    self._process = subprocess.Popen(
      command,
      env={"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
      cwd=directory,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      pass_fds=[theirs.fileno()],
      start_new_session=True,  # an interrupt typed at the terminal is the trainer's to handle
    )
    theirs.close()
    self._control.settimeout(start_deadline)
    try:
      self.reply = self._first_reply(dict(config), start_deadline)
    except BaseException:
      self.close()
      raise

  def _first_reply(self, config: dict[str, Any], start_deadline: float) -> dict[str, Any]:
    try:
      protocol.write_frame(self._control.sendall, config)
      reply = protocol.read_frame(self._control.recv)
    except TimeoutError:
      raise RewardError(
        f"{self.name}: importing it took over {start_deadline} s; "
        "give it less to do, or from Python a larger start_deadline"
      ) from None
    except OSError:
      reply = None
    if reply is None:
      raise RewardError(
        f"{self.name}: the process died while importing it (code {self._process.wait()})"
      )
    if "error" in reply:
      raise RewardError(f"{self.name}: {reply['error']}")
    return reply

  @property
  def pid(self) -> int:
    """The id of its process."""
    return self._process.pid

  def poll(self) -> int | None:
    """The code with which it has ended; None while it runs."""
    return self._process.poll()

  def wait(self) -> int:
    """Waits for its end."""
    return self._process.wait()

  def start(self, number: int) -> socket.socket:
    """Forks a confined process, known by this number; gives the connection to it.

    Raises:
      RewardError: the server has ended.
    """
    ours, theirs = socket.socketpair()
    try:
      socket.send_fds(self._control, [protocol.COMMAND.pack(b"S", number)], [theirs.fileno()])
    except OSError:
      ours.close()
      raise RewardError(f"{self.name}: the process that starts workers has died") from None
    finally:
      theirs.close()
    ours.setblocking(False)
    return ours

  def end(self, number: int) -> None:
    """Kills a process with everything it started."""
    try:
      self._control.sendall(protocol.COMMAND.pack(b"E", number))
    except OSError:  # the server has ended, and with it all that it forked
      pass

  def close(self) -> None:
    """Ends the server, and with it all that it forked."""
    self._control.close()
    try:
      self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()


def receive(connection: socket.socket, received: bytearray) -> bool:
  """Adds what has arrived to `received`, without waiting; whether the other side has ended."""
  try:
    data = connection.recv(1 << 20)
  except BlockingIOError:
    return False
  except OSError:
    return True
  received += data
  return not data


def taken(received: bytearray, *, limit: int) -> Iterator[dict | None]:
  """Takes the complete messages off what has arrived, one by one.

  Yields None, and then nothing, where one is over `limit` bytes or no message: what wrote it is not
  what was asked.
  """
  while len(received) >= 4:
    length = int.from_bytes(received[:4], "big")
    if length > limit:
      yield None
      return
    if len(received) < 4 + length:
      return
    body = bytes(received[4 : 4 + length])
    del received[: 4 + length]
    message = grading.decode_reply(body)
    yield message
    if message is None:
      return


@dataclass(eq=False)
class Worker:
  """One worker process, seen from the trainer; `call` is None while it has no work."""

  number: int
  connection: socket.socket
  since: float
  ready: bool = False
  call: int | None = None
  count: int = 0  # responses of that call
  received: bytearray = field(default_factory=bytearray)

  def replies(self) -> tuple[list[dict | None], bool]:
    """Reads what has arrived: the complete messages, and whether the other side has ended."""
    found, ended = [], receive(self.connection, self.received)
    for reply in taken(self.received, limit=grading.reply_limit(self.count)):
      if reply is None:
        return found, True
      found.append(reply)
    return found, ended
