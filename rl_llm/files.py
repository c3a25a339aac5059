"""Atomic writes (a file is whole or not there), lock files, and files that stay in a directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Replaces a file atomically: a crash leaves the old file or the new one, never half of one.

  Args:
    path: file to create or replace; its directory exists.
    content: bytes of the whole file.
  """
  path = Path(path)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def leads_outside(directory: str | os.PathLike, name: str) -> bool:
  """Whether a name leads out of the directory: by `..`, as an absolute path, or through a link.

  A directory from elsewhere must not make a program read, and export, files of this machine:
  `chat_template.jinja -> ~/.ssh/id_ed25519`.

  >>> leads_outside("/models/a", "../b"), leads_outside("/models/a", "config.json")
  (True, False)

  Args:
    directory: the directory; it may be reached through a link itself.
    name: of a file in it, which may be missing. No file has a name with NUL in it.
  """
  if "\0" in name:
    return True
  directory = Path(directory)
  try:
    return not (directory / name).resolve().is_relative_to(directory.resolve())
  except (OSError, RuntimeError):  # A loop of links.
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[bool]:
  """Holds a lock file while the body runs; yields False if another process holds it.

  The lock is released when the process ends, however it ends: a kill leaves nothing to clean up.

  Args:
    path: of the lock file, which is created and stays.
  """
  with open(path, "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    yield True
