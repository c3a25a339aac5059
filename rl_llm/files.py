"""Files written whole, locks, and files that stay within a directory; a failure is one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rl_llm.errors import UserError

_FIXES = {
  errno.ENOSPC: "free some space; the same command then resumes",
  errno.EDQUOT: "free some space; the same command then resumes",
  errno.ENOENT: "was its directory moved or deleted?",
}


class WriteError(UserError, OSError):
  """A file cannot be written; one line names it, the reason and the fix.

  >>> print(WriteError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"))
  run/metrics.jsonl: No space left on device; free some space; the same command then resumes
  """

  def __str__(self) -> str:
    fix = _FIXES.get(self.errno, "make it writable, or choose another place")
    return f"{self.filename}: {self.strerror}; {fix}"


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
  """Makes a failure to write, in Python or in a package written in Rust, a `WriteError`.

  Args:
    path: what the body writes.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
      number = int(found[1])
    if number is None:
      raise
    raise WriteError(number, os.strerror(number), os.fspath(path)) from None


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Replaces a file atomically: a crash leaves the old file or the new one, never half of one.

  Args:
    path: file to create or replace; its directory exists.
    content: bytes of the whole file.

  Raises:
    WriteError: the disk is full, or the directory gone or not writable.
  """
  path = Path(path)
  with writing(path):
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
      with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
      os.chmod(temporary, 0o644)
      os.replace(temporary, path)
    except BaseException:
      with contextlib.suppress(OSError):
        os.unlink(temporary)
      raise


def leads_outside(directory: str | os.PathLike, name: str) -> bool:
  """Whether a name leads out of the directory: by `..`, as an absolute path, or through a link.

  A directory from elsewhere must not make a program read, and export, files of this machine:
  `chat_template.jinja -> ~/.ssh/id_ed25519`.

  >>> leads_outside("/models/a", "../b"), leads_outside("/models/a", "config.json")
  (True, False)

  A snapshot in the Hugging Face cache is links into the blobs of its own repository,
  `models--X--Y/snapshots/REVISION/config.json -> ../../blobs/HASH`, which lead nowhere else.

  Args:
    directory: the directory; it may be reached through a link itself.
    name: of a file in it, which may be missing. No file has a name with NUL in it.
  """
  if "\0" in name:
    return True
  directory = Path(directory)
  try:
    found, within = (directory / name).resolve(), directory.resolve()
    repository = within.parent.parent
    cached = within.parent.name == "snapshots" and repository.name.startswith("models--")
    own = [within] + [(repository / "blobs").resolve()] * cached
    own = [place for place in own if place.is_relative_to(repository) or place == within]
    return not any(found.is_relative_to(place) for place in own)
  except (OSError, RuntimeError):  # A loop of links.
    return True


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[bool]:
  """Holds a lock file while the body runs; yields False if another process holds it.

  The lock is released when the process ends, however it ends: a kill leaves nothing to clean up.

  Args:
    path: of the lock file, which is created and stays.

  Raises:
    WriteError: it cannot be created.
  """
  with writing(path):
    file = open(path, "a")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    yield True
