"""Where a trial stands, read off its directory: there is no other record, so nothing can disagree.

In addition to what the experiment writes there (metrics.jsonl, checkpoints, and result.json last):

    trial.json    what it is: settings, config, command; written when the sweep is planned
    status.json   what became of its last start; written by the holder of the lease
    stdout.log    what its processes printed, all starts one after another
    leases/       000001, 000002, ...: which process may run it; the last one counts

A lease is never removed and never reused. A launcher takes over a dead one by creating the next
number, which the file system grants once, however many launchers try at the same moment. A holder
that was only slow finds a number higher than its own and lets go.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.sweep import Trial
from rl_llm.errors import ConfigError, redact
from rl_llm.files import write_atomically

HEARTBEAT = 20.0  # seconds between signs of life
LEASE = 6 * HEARTBEAT  # seconds after which a silent holder on another machine counts as dead
LINES = 20  # of a failure, kept in its status


def write_json(path: Path, value: Any) -> None:
  """Writes the file atomically, readable, with credentials redacted."""
  write_atomically(path, (redact(json.dumps(value, indent=2)) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
  """What `write_json` wrote; {} where there is nothing or nothing whole."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def describe(trial: Trial, command: str, directory: Path) -> None:
  """Makes the trial's directory, and writes trial.json unless it is there."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    known = {
      "id": trial.id,
      "order": trial.order,
      "experiment": trial.experiment,
      "steps": trial.steps,
      "command": command,
      "settings": trial.settings,
      "config": trial.config,
    }
    if read_json(directory / "trial.json") != json.loads(redact(json.dumps(known))):
      write_json(directory / "trial.json", known)
  except OSError as error:
    raise ConfigError(
      "workdir", directory.parent, "a directory that can be written", error.strerror or ""
    ) from None


def is_done(directory: Path, steps: int) -> bool:
  """Whether result.json says so, for at least that many steps: the only proof."""
  result = read_json(directory / "result.json")
  reached = result.get("steps", steps)
  return bool(result) and isinstance(reached, int) and reached >= steps


# --- leases --------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
  """Identifies this process, so that a later one with the same pid is not mistaken for it."""
  return {
    "host": socket.gethostname(),
    "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    "namespace": os.readlink("/proc/self/ns/pid"),
    "pid": os.getpid(),
    "started": _started(os.getpid()),
  }


def _started(pid: int) -> int | None:
  """When a process started, in ticks since boot; None if there is none, or only its corpse."""
  try:
    stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
  except OSError:
    return None
  fields = stat.rpartition(")")[2].split()  # The name before may hold anything.
  return None if fields[0] in "ZX" else int(fields[19])


def newest_lease(directory: Path) -> Path | None:
  """The lease that counts."""
  names = (path for path in (directory / "leases").glob("*") if path.name.isdigit())
  return max(names, key=lambda path: int(path.name), default=None)


def holder(lease: Path | None) -> str:
  """Whether a process holds the lease: "nobody", "alive", or "unknown" from here.

  A process of this machine is there or it is not, however long it was paused. Of one on another
  machine we see only its last sign of life: a recent one may still come from a dead launcher.
  """
  who = read_json(lease) if lease else {}
  if lease is None or who.get("released"):
    return "nobody"
  here = this_process()
  if all(who.get(key) == here[key] for key in ("host", "boot", "namespace")):
    same = isinstance(who.get("pid"), int) and _started(who["pid"]) == who.get("started")
    return "alive" if same else "nobody"
  if who.get("host") == here["host"] and who.get("boot") != here["boot"]:
    return "nobody"  # The machine has been restarted since.
  return "unknown" if _now(lease.parent) - lease.stat().st_mtime < LEASE else "nobody"


def _now(directory: Path) -> float:
  """The file system's time, which is not always ours."""
  with tempfile.TemporaryFile(dir=directory) as file:
    file.write(b".")
    file.flush()
    return os.fstat(file.fileno()).st_mtime


def take_lease(directory: Path) -> Path | None:
  """Takes the trial for this process, or gives None since another process has it."""
  newest = newest_lease(directory)
  if holder(newest) != "nobody":
    return None
  leases = directory / "leases"
  leases.mkdir(exist_ok=True)
  path = leases / f"{int(newest.name) + 1 if newest else 1:06d}"
  # As O_CREAT | O_EXCL, but the name appears with its content.
  handle, temporary = tempfile.mkstemp(dir=leases, prefix=".")
  try:
    with os.fdopen(handle, "w") as file:
      json.dump(this_process(), file)
      file.flush()
      os.fsync(file.fileno())
    os.link(temporary, path)
  except FileExistsError:
    return None
  except OSError as error:
    raise ConfigError(
      "workdir",
      directory.parent,
      "on a file system with hard links, such as a local disk or NFS",
      error.strerror or "",
    ) from None
  finally:
    os.unlink(temporary)
  return path


def renew_lease(lease: Path) -> bool:
  """Gives a sign of life; False if the lease has been taken over, so that its trial must stop."""
  try:
    os.utime(lease)
  except FileNotFoundError:
    return False  # Somebody deleted it, or all of the trial's directory.
  return newest_lease(lease.parent.parent) == lease


def release_lease(lease: Path) -> None:
  """Releases the trial; its status must be on disk before."""
  write_json(lease, read_json(lease) | {"released": time.time()})


# --- status --------------------------------------------------------------------------------------


_KINDS = {
  "status": str,
  "slot": str,
  "reason": str,
  "failures": int,
  "seconds": (int, float),
  "ended": (int, float),
  "next_try": (int, float),
  "wait": (int, float),
  "lines": list,
}


def read_status(directory: Path) -> dict[str, Any]:
  """What is known of a trial's last start, without values of the wrong type."""
  status = read_json(directory / "status.json")
  return {key: value for key, value in status.items() if isinstance(value, _KINDS.get(key, object))}


def wait_left(status: Mapping[str, Any], now: float) -> float:
  """Seconds until a trial that failed may be started again.

  A clock that was set back must not turn 8 seconds into an hour: at most the wait itself is left,
  and nothing if the failure lies in the future.

  >>> failed = {"failures": 1, "ended": 100.0, "next_try": 108.0, "wait": 8.0}
  >>> wait_left(failed, 103.0), wait_left(failed, 110.0), wait_left(failed, 100.0 - 3600.0)
  (5.0, 0.0, 0.0)

  Args:
    status: from `read_status`.
    now: the time, as `time.time` has it.
  """
  if not status.get("failures") or now < status.get("ended", now):
    return 0.0
  left = status.get("next_try", now) - now
  return max(0.0, min(left, status.get("wait", left)))


def record(directory: Path, **changes: Any) -> dict[str, Any]:
  """Updates status.json; only the holder of the lease may call this."""
  status = read_status(directory) | changes
  write_json(directory / "status.json", status)
  return status


def last_row(directory: Path) -> dict[str, Any]:
  """The newest whole line of metrics.jsonl, without reading the rest; {} if there is none."""
  try:
    with open(directory / "metrics.jsonl", "rb") as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))
      lines = file.read().split(b"\n")[:-1]
    row = json.loads(lines[-1])
  except (OSError, ValueError, IndexError, RecursionError):
    return {}
  return row if isinstance(row, dict) else {}


def last_lines(path: Path, start: int = 0, *, count: int = LINES) -> list[str]:
  """The end of a log from `start` on, as it may be shown."""
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      file.seek(max(start, size - 65536))
      text = file.read().decode("utf-8", "replace")
  except OSError:
    return []
  lines = [line.rpartition("\r")[2] for line in text.rstrip().split("\n")]
  return [redact(line)[:500] for line in lines if line.strip()][-count:]


def where(directory: Path, steps: int, status: Mapping[str, Any]) -> str:
  """A trial's state in one word: done, running, failed, pruned, stopped or waiting.

  A stopped trial has begun and resumes with the next start of the same command; a waiting one has
  not begun, or waits for its next try.
  """
  if is_done(directory, steps):
    return "done"
  if holder(newest_lease(directory)) != "nobody":
    return "running"
  # Failed with no retries left, as its launcher had them; or ended by a search.
  if status.get("status") in ("failed", "pruned"):
    return status["status"]
  return "stopped" if last_row(directory) and not status.get("failures") else "waiting"
