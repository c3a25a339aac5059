"""Memory that was freed and is still held."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"


def give_back_freed() -> None:
  """Gives the system what was freed; does nothing where the C library is not glibc.

  glibc keeps freed memory for arrays to come. Where half a gigabyte of arrays gave way to others,
  or a compilation has ended, nothing of that size comes, and the process holds it until it ends.
  """
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
      trim(0)


@contextmanager
def freed_given_back() -> Iterator[None]:
  """Gives freed memory back as the block begins, and in it after all that took a second to compile.

  Of SmolLM2 on a CPU these are 0.3 GB of first weights that the training state has copied, and 0.3
  GB that compiling the update took, which a run would else hold beside the update's own memory.
  """

  def listen(event: str, seconds: float, **_: object) -> None:
    if event == COMPILED and seconds > 1:
      give_back_freed()

  give_back_freed()
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
