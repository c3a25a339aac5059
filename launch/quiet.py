"""Keeps a compiler's stderr in a file: libtpu logs pages about chips that are not there."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from launch.chips import parse
from rl_llm.runs.chips import TPUS


@contextlib.contextmanager
def noise_in(topology: str) -> Iterator[None]:
  """While the block lasts, what libraries write to stderr goes to a file; Python's own stays.

  The file is named where there is anything in it. Only for TPUs: other compilers are quiet.

  Args:
    topology: as for `launch.chips.parse`.
  """
  if parse(topology)[0] not in TPUS:
    yield
    return
  sys.stderr.flush()
  terminal, python = os.dup(2), sys.stderr
  log = tempfile.NamedTemporaryFile(prefix="rl_llm-plan-", suffix=".log", delete=False)
  with log, os.fdopen(os.dup(terminal), "w", buffering=1) as stderr:
    os.dup2(log.fileno(), 2)
    sys.stderr = stderr
    try:
      yield
    finally:
      sys.stderr = python
      os.dup2(terminal, 2)
      os.close(terminal)
      if os.path.getsize(log.name):
        print(f"the compiler's own messages: {log.name}", file=sys.stderr, flush=True)
      else:
        os.unlink(log.name)
