"""What a worker says of its confinement, and what that leaves open."""

from __future__ import annotations

from collections.abc import Sequence

REQUIRED = ("network", "files")  # by a grader that runs a model's text


def describe(layers: Sequence[str]) -> str:
  """One line for the start of a run: which layers are active, and what is open.

  >>> print(describe(("processes", "files", "system calls", "network")))
  grader sandbox: processes, files, system calls, network; open: names and sizes of files
  >>> print(describe(("limits",)).partition("; ")[2])
  open: network, files, signals to other processes, processes that outlive a killed run

  Args:
    layers: of `RewardPool.active_layers()`.
  """
  return (
    f"grader sandbox: {', '.join(layers)}; open: {', '.join(openings(layers)) or 'nothing known'}"
  )


def missing(layers: Sequence[str]) -> list[str]:
  """Which of `REQUIRED` do not hold."""
  return [layer for layer in REQUIRED if layer not in layers]


def openings(layers: Sequence[str]) -> list[str]:
  """What text that runs in a grader could reach, through the layers that are missing."""
  found = missing(layers)
  if "files" in layers and "own file system" not in layers:
    found.append("names and sizes of files")
  if "processes" not in layers:
    found += [] if "system calls" in layers else ["signals to other processes"]
    found.append("processes that outlive a killed run")
  return found
