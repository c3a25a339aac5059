"""Places for one trial at a time on this machine: its GPUs, shared out, or its processor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rl_llm.errors import ConfigError


class Slot(NamedTuple):
  """A place for one trial at a time."""

  name: str
  environment: dict[str, str]


def find_devices() -> tuple[str, ...]:
  """The GPUs of this machine, without a library that would take hold of them."""
  if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
    return ()
  if visible := os.environ.get("CUDA_VISIBLE_DEVICES", ""):
    return tuple(visible.split(","))
  found = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
  return tuple(sorted(found, key=int))


def share_out(devices: Sequence[str], *, devices_per_trial: int, parallel: int) -> list[Slot]:
  """Shares out GPUs; without any, the processor is one device that all trials share.

  >>> [slot.environment for slot in share_out("0123", devices_per_trial=2, parallel=1)]
  [{'CUDA_VISIBLE_DEVICES': '0,1'}, {'CUDA_VISIBLE_DEVICES': '2,3'}]

  Args:
    devices: what CUDA_VISIBLE_DEVICES may name.
    devices_per_trial: how many each trial sees.
    parallel: trials at once on the same devices, which share their memory.

  Raises:
    ConfigError: there are fewer devices than a trial wants.
  """
  size = devices_per_trial
  if (devices or size > 1) and len(devices) < size:
    raise ConfigError(
      "devices_per_trial", size, f"at most {len(devices)}, the number of GPUs", "see --devices"
    )
  groups = [devices[i : i + size] for i in range(0, len(devices) - size + 1, size)] or [()]
  found = []
  for group in groups:
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(group)} if group else {}
    if group and parallel > 1:  # JAX would give the first one nearly all of the memory.
      environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / parallel:.3f}"
    name = f"gpu {','.join(group)}" if group else "cpu"
    found += [Slot(f"{name}.{i}" if parallel > 1 else name, environment) for i in range(parallel)]
  return found
