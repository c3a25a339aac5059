"""Several processes, on one host or many, that train one model together.

Every process runs the same program, and JAX combines what their devices hold. This module covers
the rest of a host's work: start, grade, write files, stop and fail. All processes do each of these
together, or the first process does it alone. A host waits for the others only up to a time limit,
and then names the process that is late.

In a run of one process, every function here does nothing, or returns its argument.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

import jax

from rl_llm.errors import ConfigError, UserError, redact
from rl_llm.parallel import stderr_filter
from rl_llm.parallel.binding import EVERYWHERE, bind_address

_LISTEN_SECONDS = 1.0  # Between two checks whether another process has failed.
_DEAD = re.compile(r"Task (\d+) heartbeat timeout")
_HEARD_MS = 5000  # How long the last message of a process may take to reach the others.


class HostsDiffer(UserError, ValueError):
  """The processes were started differently; the message names the process and what differs."""


class HostLost(RuntimeError):
  """A process is late or gone; the message names it."""


@dataclasses.dataclass
class _Here:
  """What this process knows of the group beyond JAX."""

  wait: int = 600  # Seconds.
  heartbeat: int = 100
  names: tuple[str, ...] = ()  # Host names, by process.
  exchanges: int = 0
  ending: threading.Lock = dataclasses.field(default_factory=threading.Lock)


_here = _Here()


def _service() -> Any:
  """JAX's own connection to the other processes: `client`, `num_processes`, `process_id`.

  JAX offers no public way to its key-value store, to barriers with a time limit of one's own, or
  to the process's number before a backend is chosen. `jax.process_index()` would choose one.
  """
  from jax._src.distributed import global_state  # Private: nothing else in the library reads it.

  return global_state


def count() -> int:
  """How many processes train together; 1 before `initialize`."""
  return _service().num_processes or 1


def index() -> int:
  """The number of this process, from 0."""
  return _service().process_id or 0


def is_main() -> bool:
  """Whether this is the first process, which writes files and talks to a person."""
  return index() == 0


def name(process: int) -> str:
  """A process for a person to find: its number and its host.

  Args:
    process: its number.
  """
  return stderr_filter.name(process, {"names": _here.names})


def initialize(
  *,
  coordinator: str = "",
  processes: int = 0,
  process_id: int = -1,
  bind: str = "",
  heartbeat: int = 100,
  wait: int = 600,
) -> None:
  """Joins the other processes. Call it once, before JAX is asked for its devices.

  Slurm, Open MPI, GKE and TPU virtual machines tell JAX which processes belong together; elsewhere
  the first three arguments do. From then on, only the first process writes to standard output, and
  JAX's output when it has to end a process is reduced to one line
  (`rl_llm.parallel.stderr_filter`).

  Args:
    coordinator: HOST:PORT of the first process, where all meet; "" detects it.
    processes: how many there are; 0 detects it.
    process_id: the number of this process, from 0; -1 detects it.
    bind: the address on which the first process listens; "": the coordinator's, if it is this
      machine's, else all. Where the coordinator is detected, JAX listens on all.
    heartbeat: seconds without a sign of life after which a process is lost, and the others end.
    wait: seconds for which processes that are alive wait for each other: at the start, at the
      beginning of a step, for grades, at a checkpoint.

  Raises:
    ConfigError: neither the environment nor the arguments say which processes belong together.
    HostLost: a process failed during the start.
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
  if bind and not coordinator:
    raise ConfigError("distributed.bind", bind, "given with --distributed.coordinator alone")
  listen = bind_address(coordinator, bind) if coordinator and process_id == 0 else None
  if listen and not bind and listen.startswith(EVERYWHERE):
    line = f"{coordinator} is not an address of this machine: listening on all interfaces"
    print(f"{line}; --distributed.bind names one", file=sys.stderr)
  _here.wait, _here.heartbeat = wait, heartbeat
  known = given | {"process": process_id, "heartbeat": heartbeat, "wait": wait}
  _filter_stderr(known)
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)  # It logs connections.
  # JAX's handler would take SIGTERM from ours, which saves and stops.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator or None,
      processes or None,
      None if process_id < 0 else process_id,
      coordinator_bind_address=listen,
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

  atexit.register(stop_listening)  # Runs before JAX disconnects, which was registered earlier.
  _here.names = tuple(all_gather("the start", socket.gethostname()))
  os.write(2, (stderr_filter.NAMES + json.dumps(_here.names) + "\n").encode())


def barrier(what: str) -> None:
  """Waits until every process arrives, for at most `wait` seconds.

  Args:
    what: where they meet, for the message; the same in every process.

  Raises:
    HostLost: a process did not arrive; the message names it.
  """
  if count() == 1:
    return
  try:
    _service().client.wait_at_barrier(f"rl_llm/{what}", 1000 * _here.wait)
  except jax.errors.JaxRuntimeError as error:
    raise HostLost(_why(what, str(error))) from None


def all_gather(what: str, value: Any) -> list[Any]:
  """Every process's value, by process; also a barrier.

  It uses the network of the hosts, not that of the devices. Use it for small values, and where a
  process may be late for reasons other than its devices.

  Args:
    what: as for `barrier`.
    value: what JSON can hold.

  Raises:
    HostLost: as for `barrier`.
  """
  if count() == 1:
    return [value]
  client, number = _service().client, _here.exchanges
  _here.exchanges += 1
  client.key_value_set(f"rl_llm/{number}/{index()}", json.dumps(value))
  barrier(what)
  found = {
    int(key.rpartition("/")[2]): json.loads(text)
    for key, text in client.key_value_dir_get(f"rl_llm/{number}/")
  }
  if number:  # All have arrived here, so all have read the previous exchange.
    client.key_value_delete(f"rl_llm/{number - 1}/{index()}")
  return [found[process] for process in range(count())]


def broadcast(what: str, value: Any) -> Any:
  """The first process's value in every process.

  Args:
    what: as for `barrier`.
    value: what JSON can hold; the other processes' values are ignored.
  """
  return all_gather(what, value if is_main() else None)[0]


def assert_equal(what: str, values: Mapping[str, Any]) -> None:
  """Checks that all processes have the same values, as the processes of one run must.

  Args:
    what: as for `barrier`.
    values: name -> what JSON can hold; the error names the first name whose value differs.

  Raises:
    HostsDiffer: values differ. Every process raises it; the message names a process and its value.
  """
  first, *others = all_gather(what, dict(values))
  for process, found in enumerate(others, 1):
    for key in [*first, *(key for key in found if key not in first)]:
      if key not in found or key not in first or found[key] != first[key]:
        raise HostsDiffer(
          f"{key} is {found.get(key, 'missing')} in {name(process)}, and "
          f"{first.get(key, 'missing')} in {name(0)}; start all processes with the same"
        )


def end_all(line: str, code: int, *, of_one: bool) -> NoReturn:
  """Says why this process cannot continue, here and in all others, and ends them all.

  Args:
    line: what went wrong.
    code: the exit code of all processes.
    of_one: whether it went wrong in this process only: the others then name the process.
  """
  if not _here.ending.acquire(blocking=False):
    threading.Event().wait()  # Another process's last message came first and ends this process.
  _say(line)
  told = f"{name(index())}: {line}" if of_one else line
  client = _service().client
  try:
    client.key_value_set("rl_llm/failed", json.dumps([code, told]))
  except jax.errors.JaxRuntimeError:
    pass  # Another process reported first, or process 0 is gone.
  _leave(code)


def lost(error: Exception) -> str:
  """Why a computation of all processes failed, once the cause is known.

  When a process dies, the others' computations fail at once, with a message from the network. After
  at most `heartbeat` seconds it is known which process died: this function returns it, or JAX ends
  this process with that name.

  Args:
    error: what the computation raised.
  """
  client = _service().client
  try:
    client.wait_at_barrier("rl_llm/failed computation", 1000 * (_here.heartbeat + 5))
  except jax.errors.JaxRuntimeError as found:
    if _DEAD.search(str(found)):
      return _why("its end", str(found))
  return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def is_of_network(error: Exception) -> bool:
  """Whether a computation may have failed because another process is gone.

  Args:
    error: what the computation raised; with Gloo it is a ValueError.
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
  unanswered = "leader task" in message or stderr_filter.UNANSWERED.search(message)
  if unanswered and not is_main():
    known = {"process": index(), "names": _here.names}
    return stderr_filter.explained(message, known).removeprefix("error: ")
  return f"the processes could not meet at {what!r}: {' '.join(message.split())[:500]}"


def _listen(over: threading.Event) -> None:
  """Waits for the last message of another process, prints it and ends this process."""
  while not over.wait(_LISTEN_SECONDS):
    try:
      code, line = json.loads(_service().client.key_value_try_get("rl_llm/failed"))
    except jax.errors.JaxRuntimeError:
      continue  # No process has failed.
    if _here.ending.acquire(blocking=False):
      _say(line)
      _leave(code)
    return


def _leave(code: int) -> NoReturn:
  """Ends the process once the others know: the service ends with the first process."""
  try:
    _service().client.wait_at_barrier("rl_llm/heard", _HEARD_MS)
  except jax.errors.JaxRuntimeError:
    pass
  if is_main():
    threading.Event().wait(0.5)
  os._exit(code)


def _say(line: str) -> None:
  sys.stdout.flush()
  os.write(2, f"error: {' '.join(redact(line).split())}\n".encode("utf-8", "backslashreplace"))


def _filter_stderr(known: dict[str, Any]) -> None:
  """Sends standard error through `rl_llm.parallel.stderr_filter`."""
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
  """Keeps standard output for the first process's Python: Gloo prints its connections there."""
  sys.stdout.flush()
  if is_main():
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 1)
  os.close(nowhere)
