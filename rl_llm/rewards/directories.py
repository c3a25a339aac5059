"""Temporary directories that a hostile text may have filled, and that are deleted all the same.

`shutil.rmtree` calls itself for each level, so a tree a thousand deep ends the program that deletes
it. Standard library only, since workers load this file alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path

_BEING_MADE = 60  # seconds
_LONGEST = 60  # seconds of deleting: what a process that still lives adds may have no end
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _opened(name: str, at: int | None = None) -> int:
  """Opens a directory, as one that its owner may write in; follows no link."""
  try:
    found = os.open(name, _DIRECTORY, dir_fd=at)
  except PermissionError:
    if not hasattr(os, "O_PATH"):
      raise
    closed = os.open(name, _DIRECTORY | os.O_PATH, dir_fd=at)
    try:
      os.chmod(f"/proc/self/fd/{closed}", 0o700)  # not by its name, which may be another's now
    finally:
      os.close(closed)
    found = os.open(name, _DIRECTORY, dir_fd=at)
  with contextlib.suppress(OSError):  # a worker whose filter refuses it; the server then can
    os.fchmod(found, 0o700)
  return found


def _is_directory(name: str, at: int) -> bool:
  return stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)


def _take_up(directory: int, top: int, prefix: str) -> None:
  """Deletes the files of a directory; its directories become new ones of `top`."""
  for number, name in enumerate(os.listdir(directory)):
    if _is_directory(name, directory):
      os.close(_opened(name, directory))  # what may not be written in cannot be moved
      os.rename(name, f"{prefix}{number}", src_dir_fd=directory, dst_dir_fd=top)
    else:
      os.unlink(name, dir_fd=directory)


def empty(directory: str | os.PathLike, kept: Container[str] = ()) -> None:
  """Deletes what a directory holds, however deep it is, and follows no link.

  Args:
    directory: its path.
    kept: names in it that stay.

  Raises:
    OSError: something cannot be deleted, or it takes over a minute.
  """
  end, prefix = time.monotonic() + _LONGEST, f".{os.urandom(8).hex()}."
  top, taken_up = _opened(os.fspath(directory)), 0
  try:
    while names := [name for name in os.listdir(top) if name not in kept]:
      for name in names:
        if time.monotonic() > end:
          raise TimeoutError(f"{directory}: deleting what it holds takes over {_LONGEST} s")
        if not _is_directory(name, top):
          os.unlink(name, dir_fd=top)
          continue
        below, taken_up = _opened(name, top), taken_up + 1
        try:
          _take_up(below, top, f"{prefix}{taken_up}.")
        finally:
          os.close(below)
        os.rmdir(name, dir_fd=top)
  finally:
    os.close(top)


def remove(directory: str | os.PathLike) -> None:
  """Deletes a directory with all that it holds, as far as this process may; it may be missing."""
  with contextlib.suppress(OSError):
    empty(directory)
    os.rmdir(directory)


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
  """A new temporary directory while the body runs; removes those that killed processes left.

  The process holds a lock on its directory, which ends with it, however it ends: one without a lock
  belongs to nobody.

  Args:
    prefix: of the directory's name; those of the same prefix and user, for root of all users, are
      looked at.
  """
  for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
    with contextlib.suppress(OSError):
      # Those of root belong to the id that its graders had.
      if os.getuid() in (0, left.stat(follow_symlinks=False).st_uid):
        with _locked_directory(left) as free:
          # One that is being made has no lock yet.
          if free and time.time() - left.stat().st_mtime > _BEING_MADE:
            remove(left)
  directory = Path(tempfile.mkdtemp(prefix=prefix))
  try:
    with _locked_directory(directory):
      yield directory
  finally:
    remove(directory)


@contextlib.contextmanager
def _locked_directory(path: Path) -> Iterator[bool]:
  descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
    else:
      yield True
  finally:
    os.close(descriptor)
