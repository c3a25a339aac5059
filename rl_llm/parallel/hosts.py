"""Several processes, on one host or many, that train one model together.

Every process runs the same program, and JAX puts together what their devices hold. What remains is
what a host does besides: start, grade, write files, stop and fail. Each of these is done together
or by the first process alone; a host waits for the others no longer than it was told to, and then
names who is late.

In a run of one process every function here does nothing, or gives back what it was given.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state

from rl_llm.errors import ConfigError, UserError, redact
from rl_llm.parallel import stderr_filter

_LISTEN_SECONDS = 1.0  # Between two looks whether another process has failed.
_DEAD = re.compile(r"Task (\d+) heartbeat timeout")
_HEARD_MS = 5000  # For the last words of a process to reach the others.


class HostsDiffer(UserError, ValueError):
  """The processes were not started alike; the message names the process and what differs."""


class HostLost(RuntimeError):
  """A process is late or gone; the message names it."""


@dataclasses.dataclass
class _Here:
  """What this process knows of the group beyond JAX."""

  wait: int = 600  # Seconds.
  heartbeat: int = 100
  names: tuple[str, ...] = ()  # The hosts', by process.
  exchanges: int = 0
  ending: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_here = _Here()


def count() -> int:
  """How many processes train together; 1 before `initialize`."""
  return global_state.num_processes or 1


def index() -> int:
  """The number of this process, from 0."""
  return global_state.process_id or 0


def is_main() -> bool:
  """Whether this process is the one that writes files and talks to a person: the first."""
  return index() == 0


def name(process: int) -> str:
  """A process as a person finds it: its number and its host.

  Args:
    process: its number.
  """
  return stderr_filter.name(process, {"names": _here.names})


def initialize(
  *,
  coordinator: str = "",
  processes: int = 0,
  process_id: int = -1,
  heartbeat: int = 100,
  wait: int = 600,
) -> None:
  """Joins the other processes; before JAX is asked for its devices, and once.

  Slurm, Open MPI, GKE and TPU virtual machines say by themselves who belongs together; elsewhere
  the first three arguments do. From here on only the first process says anything on standard
  output, and what JAX writes when it has to end a process is put into one line
  (`rl_llm.parallel.stderr_filter`).

  Args:
    coordinator: HOST:PORT of the first process, where all meet; "" finds it.
    processes: how many there are; 0 finds it.
    process_id: this one's number, from 0; -1 finds it.
    heartbeat: seconds without a sign of life after which a process is lost, and the others end.
    wait: seconds for which processes that are alive wait for each other: at the start, at a step's
      beginning, for grades, at a checkpoint.

  Raises:
    ConfigError: the surroundings do not say who belongs together, and neither do the arguments.
    HostLost: a process went away at once.
  """
  given = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
  missing = [key for key, unset in (("processes", 0), ("process_id", -1)) if given[key] == unset]
  if missing and (coordinator or len(missing) == 1):
    raise ConfigError(
      f"distributed.{missing[0]}",
      given[missing[0]],
      "given where the other two are",
      "coordinator, processes and process_id go together, or are all found",
    )
  if not missing and process_id >= processes:
    raise ConfigError("distributed.process_id", process_id, f"below processes ({processes})")
  _here.wait, _here.heartbeat = wait, heartbeat
  known = given | {"process": process_id, "heartbeat": heartbeat, "wait": wait}
  _filter_stderr(known)
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)  # Who connects to whom.
  # Its handler would take SIGTERM from ours, which saves and stops.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      None if process_id < 0 else process_id,
      initialization_timeout=wait,
      heartbeat_timeout_seconds=heartbeat,
      shutdown_timeout_seconds=heartbeat,
    )
  except ValueError as error:
    raise ConfigError(
      "distributed.coordinator",
      coordinator,
      "HOST:PORT of process 0 where no Slurm, Open MPI, GKE or TPU VM says it",
      f"with --distributed.processes and --distributed.process_id ({error})",
    ) from None
  if count() == 1:
    return
  _keep_stdout()
  over = threading.Event()
  name = "rl_llm.parallel.hosts"
  listener = threading.Thread(target=_listen, args=(over,), name=name, daemon=True)
  listener.start()

  def stop_listening() -> None:
    over.set()
    listener.join()

  atexit.register(stop_listening)  # Before JAX leaves the others, which was registered earlier.
  _here.names = tuple(exchange("the start", socket.gethostname()))
  os.write(2, (stderr_filter.NAMES + json.dumps(_here.names) + "\n").encode())


def barrier(what: str) -> None:
  """Waits until every process is here, for `wait` seconds at most.

  Args:
    what: where they meet, for the message; the same in every process.

  Raises:
    HostLost: a process did not come; the message names it.
  """
  if count() == 1:
    return
  try:
    global_state.client.wait_at_barrier(f"rl_llm/{what}", 1000 * _here.wait)
  except jax.errors.JaxRuntimeError as error:
    raise HostLost(_why(what, str(error))) from None


def exchange(what: str, value: Any) -> list[Any]:
  """Every process's value, by process; a barrier as well.

  This goes over the network of the hosts and not over that of the devices: for little things, and
  where a process may be late through no fault of its devices.

  Args:
    what: as for `barrier`.
    value: what JSON can hold.

  Raises:
    HostLost: as for `barrier`.
  """
  if count() == 1:
    return [value]
  client, number = global_state.client, _here.exchanges
  _here.exchanges += 1
  client.key_value_set(f"rl_llm/{number}/{index()}", json.dumps(value))
  barrier(what)
  found = {
    int(key.rpartition("/")[2]): json.loads(text)
    for key, text in client.key_value_dir_get(f"rl_llm/{number}/")
  }
  if number:  # All have come here, so all have read what was exchanged before.
    client.key_value_delete(f"rl_llm/{number - 1}/{index()}")
  return [found[process] for process in range(count())]


def share(what: str, value: Any) -> Any:
  """The first process's value in every process.

  Args:
    what: as for `barrier`.
    value: what JSON can hold; that of the others does not matter.
  """
  return exchange(what, value if is_main() else None)[0]


def agree(what: str, values: Mapping[str, Any]) -> None:
  """Sees to it that all processes have the same values, as those of one run must.

  Args:
    what: as for `barrier`.
    values: name -> what JSON can hold; the first name that differs is told.

  Raises:
    HostsDiffer: in every process alike; the message names a process and what it has of its own.
  """
  first, *others = exchange(what, dict(values))
  for process, found in enumerate(others, 1):
    for key in [*first, *(key for key in found if key not in first)]:
      if key not in found or key not in first or found[key] != first[key]:
        raise HostsDiffer(
          f"{key} is {found.get(key, 'missing')} in {name(process)}, and "
          f"{first.get(key, 'missing')} in {name(0)}; start all processes alike"
        )


def code_hash(*directories: str | os.PathLike) -> str:
  """The SHA-256 of this package's Python files, and of those in further directories.

  Args:
    directories: each with all that is below it.
  """
  digest = hashlib.sha256()
  for directory in (Path(__file__).parent, *map(Path, directories)):
    for path in sorted(directory.rglob("*.py")):
      digest.update(f"{path.relative_to(directory)}\n".encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()


def end_all(line: str, code: int, *, of_one: bool) -> NoReturn:
  """Says why this process cannot go on, here and in all others, and ends them all.

  Args:
    line: what went wrong.
    code: the exit code of all.
    of_one: whether it went wrong in this process: the others then say in which.
  """
  if not _here.ending.acquire(blocking=False):
    threading.Event().wait()  # The others' last words came first; they end this process.
  _say(line)
  told = f"{name(index())}: {line}" if of_one else line
  client = global_state.client
  try:
    client.key_value_set("rl_llm/failed", json.dumps([code, told]))
  except jax.errors.JaxRuntimeError:
    pass  # Another process was first, or the first process is gone.
  _leave(code)


def lost(error: Exception) -> str:
  """Why a computation failed that all processes do together, once that is known.

  When a process dies, the others' computations fail at once, with a message of the network's. Who
  it was turns out after `heartbeat` seconds at most: here, or JAX ends this process with its name.

  Args:
    error: what the computation raised.
  """
  client = global_state.client
  try:
    client.wait_at_barrier("rl_llm/failed computation", 1000 * (_here.heartbeat + 5))
  except jax.errors.JaxRuntimeError as found:
    if _DEAD.search(str(found)):
      return _why("its end", str(found))
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def is_of_network(error: Exception) -> bool:
  """Whether a computation may have failed because another process is gone.

  Args:
    error: what the computation raised; with Gloo that is a ValueError.
  """
  return isinstance(error, jax.errors.JaxRuntimeError) or bool(
    re.match(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ", str(error))
  )


def _why(what: str, message: str) -> str:
  """The coordination service's message as a line for a person."""
  late = re.search(r"timed out task names:\s*((?:\d+\s+)+)", message)
  if late:
    who = " and ".join(name(int(number)) for number in late[1].split())
    return (
      f"{who} is late: not at {what!r} within {_here.wait} s of the others; look what it is doing, "
      "or raise --distributed.wait"
    )
  dead = _DEAD.search(message)
  if dead:
    return stderr_filter.explained(
      f"stopped sending heartbeats):\n{dead[1]}\n",
      {"heartbeat": _here.heartbeat, "names": _here.names},
    ).removeprefix("error: ")
  return f"the processes could not meet at {what!r}: {' '.join(message.split())[:500]}"


def _listen(over: threading.Event) -> None:
  """Waits for the last words of another process, says them and ends this one."""
  while not over.wait(_LISTEN_SECONDS):
    try:
      code, line = json.loads(global_state.client.key_value_try_get("rl_llm/failed"))
    except jax.errors.JaxRuntimeError:
      continue  # Nobody has failed.
    if _here.ending.acquire(blocking=False):
      _say(line)
      _leave(code)
    return


def _leave(code: int) -> NoReturn:
  """Ends the process, once the others know as well: with the first one the service ends."""
  try:
    global_state.client.wait_at_barrier("rl_llm/heard", _HEARD_MS)
  except jax.errors.JaxRuntimeError:
    pass
  if is_main():
    threading.Event().wait(0.5)
  os._exit(code)


def _say(line: str) -> None:
  sys.stdout.flush()
  os.write(2, f"error: {' '.join(redact(line).split())}\n".encode("utf-8", "backslashreplace"))


def _filter_stderr(known: dict[str, Any]) -> None:
  """Has standard error go through `rl_llm.parallel.stderr_filter`."""
  sys.stderr.flush()
  ours, theirs = os.pipe()
  subprocess.Popen(
    [sys.executable, "-I", "-S", stderr_filter.__file__, json.dumps(known)],
    stdin=ours,
    stdout=2,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  os.dup2(theirs, 2)
  os.close(ours)
  os.close(theirs)


def _keep_stdout() -> None:
  """Standard output is the first process's, and Python's: Gloo tells there who is connected."""
  sys.stdout.flush()
  if is_main():
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)
