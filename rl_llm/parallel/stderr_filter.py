"""Stands between a process of several and its standard error: says in one line why JAX ended it.

When a process is lost, JAX ends the others from its own threads, where no Python runs any more. The
screen then shows pages of addresses, with the number of the lost process somewhere among them. This
program reads its parent's standard error and forwards lines as they arrive, but holds back those of
JAX's coordination service. If they turn out to be the last, it prints one line instead.

`rl_llm.parallel.hosts` runs it by its path, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
from typing import Any

NAMES = "\0names "  # The parent's line with the hosts' names; never shown.
NOISE = re.compile(
  r"[EWF]\d{4} .*(coordination_service|preemption_sync|client\.h:)|\*\*\* Check failure|    @ +0x"
)
UNANSWERED = re.compile(r"DEADLINE_EXCEEDED|UNAVAILABLE|Deadline Exceeded|grpc_message")
FATAL = "Terminating process because the JAX distributed service"
PYTHONS = ("error: ", "Traceback ")
QUIET_SECONDS = 2.0  # If nothing follows the held lines for this long, they were not the last.


def explained(text: str, known: dict[str, Any]) -> str:
  """JAX's last message as a line for a person.

  >>> known = {"process": 0, "processes": 2, "heartbeat": 10, "names": ["a", "b"]}
  >>> explained("unhealthy (stopped sending heartbeats):\\n1\\nThe tasks", known)
  'error: process 1 (b) is lost: no sign of life from it for 10 s. Start all processes again: the \
run resumes from its last checkpoint'

  Args:
    text: what JAX wrote.
    known: "process", "processes", "coordinator", "heartbeat", "wait"; and "names", once known.
  """
  again = "Start all processes again: the run resumes from its last checkpoint"
  lost = re.search(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)", text)
  if lost:
    who = " and ".join(name(int(number), known) for number in lost[1].split())
    return f"error: {who} is lost: no sign of life from it for {known['heartbeat']} s. {again}"
  if "RegisterTask" in text:
    me = "this process" if known["process"] < 0 else f"process {known['process']}"
    return (
      f"error: {me} waited {known['wait']} s for all {known['processes'] or ''} processes at "
      f"{known['coordinator'] or 'the first one'}, and they did not come; look whether each was "
      "started, with the same --distributed.coordinator and --distributed.processes and a "
      "--distributed.process_id of its own"
    )
  if "leader task" in text or "Failed to send RPC" in text:
    return f"error: {name(0, known)} is lost, at which the others meet. {again}"
  if known["process"] != 0 and UNANSWERED.search(text):
    return (
      f"error: {name(0, known)}, at which the others meet, does not answer: it is lost, stopped or "
      f"cut off. {again}"
    )
  return "error: " + " ".join(text.split())[:1000]


def name(process: int, known: dict[str, Any]) -> str:
  """A process for a person to find: its number and its host."""
  names = known.get("names", [])
  return f"process {process} ({names[process]})" if process < len(names) else f"process {process}"


def main() -> None:
  """Forwards standard input to standard output until it ends."""
  for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)  # The parent handles it; its last lines come after.
  known = json.loads(sys.argv[1])
  held: list[str] = []
  partial, holding, said, over = b"", False, False, False

  def show(text: str) -> None:
    nonlocal said
    said |= text.startswith("error: ")
    if not over:
      os.write(1, text.encode("utf-8", "surrogateescape"))

  def release() -> None:
    nonlocal over
    text = "".join(held)
    held.clear()
    if FATAL not in text:
      show(text)
      return
    if not said:  # Unless the process itself has explained it.
      show(explained(text, known) + "\n")
    over = True  # What follows are addresses.

  while True:
    if (held or partial) and not select.select([0], [], [], QUIET_SECONDS)[0]:
      release()
      begun = partial.decode("utf-8", "surrogateescape")
      if not holding and not NOISE.match(begun):  # Else wait for the rest of a slow line.
        show(begun)
        partial = b""
      holding = False
      continue
    found = os.read(0, 1 << 16)
    *lines, partial = (partial + found).split(b"\n")
    for line in lines:
      text = line.decode("utf-8", "surrogateescape") + "\n"
      if text.startswith(NAMES):
        known["names"] = json.loads(text.removeprefix(NAMES))
        continue
      # Lines after such a line belong to it, except those that are certainly Python's.
      holding = bool(NOISE.match(text)) or (holding and not text.startswith(PYTHONS))
      if holding:
        held.append(text)
      else:
        show(text)
    if not found:
      rest = partial.decode("utf-8", "surrogateescape")
      if NOISE.match(rest):
        held.append(rest)
        rest = ""
      release()
      show(rest)
      return


if __name__ == "__main__":
  main()
