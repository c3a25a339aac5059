"""Memory of all processes of a call together, which the limit on each of them does not bound.

`RLIMIT_AS` counts one process: forty forks of 100 MB pass under a limit of 4 GB each. A control
group would count them all, but an ordinary process may seldom make one. So the minder of a worker
adds up, twenty times a second, what the call's processes hold for themselves (`RssAnon`, `RssShmem`
and `VmSwap` of /proc/<process>/status, less what the worker had before the call, since a fork
shares that), and kills them all when it is too much. Standard library only.
"""

from __future__ import annotations

import os
import signal
import time

PERIOD = 0.05  # seconds


def yield_first() -> None:
  """Has the kernel kill this process, or one it starts, before others when memory runs out."""
  try:
    with open("/proc/self/oom_score_adj", "w") as file:
      file.write("1000")
  except OSError:  # no /proc, or one that may not be written
    pass


def descendants(process: int) -> list[int]:
  """The processes that a process has started, and those that these have, by their ids here."""
  found, unseen = [], [process]
  while unseen:
    folder = f"/proc/{unseen.pop()}/task"
    try:
      for thread in os.listdir(folder):
        with open(f"{folder}/{thread}/children") as file:
          unseen += (children := [int(number) for number in file.read().split()])
          found += children
    except OSError:  # it has ended, or the kernel has no such list
      pass
  return found


def status_of(process: int) -> dict[str, str]:
  """The kernel's rows about a process that has memory, by name; none once it has ended.

  Its first thread may end while others run: it then seems dead, and to hold nothing.
  """
  folder = f"/proc/{process}/task"
  try:
    for thread in os.listdir(folder):
      with open(f"{folder}/{thread}/status") as file:
        rows = dict(line.split(":", 1) for line in file)
      if "VmSize" in rows:
        return rows
  except OSError:  # it ends in this moment
    pass
  return {}


def held(process: int) -> int:
  """Bytes in memory that a process does not share with a file; 0 where it has ended."""
  rows = status_of(process)
  sizes = (rows.get(name, "0 kB") for name in ("RssAnon", "RssShmem", "VmSwap", "HugetlbPages"))
  return sum(int(size.split()[0]) for size in sizes) << 10


def started_beside(worker: int) -> list[int]:
  """All that this process's child, and what this has started, have started: also as its parent."""
  return [each for each in descendants(os.getpid()) if each != worker]


def watch(worker: int, megabytes: int, *, idle_period: float = PERIOD) -> None:
  """Waits for the end of a child, and kills its descendants whenever they hold too much.

  It kills until none of them is left: a fork made between the look and the kill holds what its
  parent held.

  Args:
    worker: the only child; it is idle at first.
    megabytes: what all of its descendants may hold together, with what it holds more than at first.
    idle_period: seconds between two looks while it has no descendants.
  """
  shared = first = held(worker)
  while os.waitpid(worker, os.WNOHANG) == (0, 0):
    processes = started_beside(worker)
    if not processes:
      shared = held(worker)
    else:
      own = max(0, held(worker) - first)
      if own + sum(max(0, held(each) - shared) for each in processes) > megabytes << 20:
        while living := [each for each in started_beside(worker) if status_of(each)]:
          for each in living:
            try:
              os.kill(each, signal.SIGKILL)
            except OSError:  # it has ended
              pass
    time.sleep(PERIOD if processes else idle_period)
