"""Several processes of one run, each a real one: started, waited for, and what they said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # Seconds: only a test that would never end is ended.


class Ended(NamedTuple):
  """What became of a process."""

  code: int
  out: str
  err: str

  @property
  def errors(self) -> list[str]:
    """The lines that a person is to see."""
    return [line for line in self.err.splitlines() if line.startswith("error: ")]


def free_port() -> int:
  with socket.socket() as taken:
    taken.bind(("localhost", 0))
    return taken.getsockname()[1]


def start(arguments, *, devices=1, stdout=subprocess.PIPE, **environment) -> subprocess.Popen:
  """`python ARGUMENTS` on `devices` virtual devices of a CPU."""
  names = "PATH HOME TMPDIR LANG RL_LLM_FULL XLA_FLAGS".split()
  compiling = ("JAX_DISABLE_", "JAX_COMPILATION_CACHE_", "JAX_PERSISTENT_CACHE_")
  inherited = {k: v for k, v in os.environ.items() if k in names or k.startswith(compiling)}
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    env=inherited
    | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    | environment,
    stdout=stdout,
    stderr=subprocess.PIPE if stdout == subprocess.PIPE else subprocess.STDOUT,
    text=True,
  )


def ended(process: subprocess.Popen) -> Ended:
  try:
    out, err = process.communicate(timeout=PATIENCE)
  except subprocess.TimeoutExpired:
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f"did not end: {out[-2000:]}\n{err[-4000:]}") from None
  return Ended(process.returncode, out, err)


def flags(process: int, *, port: int, processes: int = 2, **further) -> list[str]:
  """How a process is told to join the others."""
  given = {"coordinator": f"localhost:{port}", "processes": processes, "process_id": process}
  settings = (given | further).items()
  return ["--distributed", *(f"--distributed.{name}={value}" for name, value in settings)]
