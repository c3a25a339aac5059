"""Runs tests/eight_devices in processes of their own, where a CPU stands for eight devices.

How many devices there are is decided once, before JAX starts, so these tests cannot be among the
others. By hand:

  JAX_NUM_CPU_DEVICES=8 python -m pytest tests/eight_devices
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parent / "eight_devices"
PARTS = 3  # So that two workers share them.
# Eight threads that wait for each other on two busy cores: XLA takes 40 s of it for a deadlock.
PATIENCE = (
  "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"
)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_on_eight_devices(part):
  files = sorted(DIRECTORY.glob("test_*.py"))[part::PARTS]
  found = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
    cwd=DIRECTORY.parents[1],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": PATIENCE},
    capture_output=True,
    text=True,
  )
  assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-4_000:]
  assert " passed" in found.stdout, found.stdout
