"""Returns freed heap memory to the operating system (glibc `malloc_trim`)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


def trim() -> None:
  """Returns freed memory to the system; does nothing if the C library is not glibc.

  glibc keeps freed memory for later allocations. After half a gigabyte of arrays is replaced, or a
  compilation ends, nothing of that size is allocated again, and the process would hold the memory
  until it exits.
  """
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
      trim(0)


@contextmanager
def trimmed() -> Iterator[None]:
  """Returns freed memory when the block begins, and in it after each compilation of over a second.

  With SmolLM2 on a CPU that is 0.3 GB of initial weights, which the training state has copied, and
  0.3 GB used to compile the update. A run would otherwise hold both in addition to the update's own
  memory.
  """

  def listen(event: str, seconds: float, **_: object) -> None:
    if event == COMPILED and seconds > 1:
      trim()

  trim()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
