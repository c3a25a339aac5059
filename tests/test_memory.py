"""What is freed does not stay with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import jax
import pytest

from rl_llm.runs import heap

# A block at the top of the heap stays, so that what lies below it is kept for what may come.
KEEP = """
import ctypes
from rl_llm.runs.heap import trim

def resident():
  pages = int(open("/proc/self/statm").read().split()[1])
  return pages * 4096 / 2**20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(2000)]
for block in blocks:
  ctypes.memset(block, 1, 100_000)
full = resident()
for block in blocks[:-1]:
  libc.free(block)
freed = resident()
trim()
print(full - freed, freed - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own way")
def test_what_glibc_keeps_is_given_back():
  done = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  without, given = map(float, done.stdout.split())
  assert without < 10 and given > 150, "of 190 MB"


def test_it_is_at_the_beginning_and_after_each_long_compilation(monkeypatch):
  given = []
  monkeypatch.setattr(heap, "trim", lambda: given.append(1))
  with heap.trimmed():
    assert len(given) == 1
    jax.monitoring.record_event_duration_secs(heap.COMPILED, 0.2)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 3.0)
    assert len(given) == 1
    jax.monitoring.record_event_duration_secs(heap.COMPILED, 3.0)
    assert len(given) == 2
  jax.monitoring.record_event_duration_secs(heap.COMPILED, 3.0)
  assert len(given) == 2


def test_compiling_is_such_an_event():
  """The name is JAX's."""
  seen = []

  def listen(event, seconds, **_):
    seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  jax.jit(lambda x: x * 17 + 3).lower(1.0).compile()
  jax.monitoring.unregister_event_duration_listener(listen)
  assert heap.COMPILED in seen
