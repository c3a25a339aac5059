"""A file system of a grader's own: what is not put into it cannot be reached.

A list of what may be read (Landlock) guards opening, creating and deleting. A path still leads to
`stat`, `chmod`, `utime`, and to every UNIX socket on the machine. So the process that grades is put
on a small root in memory (`pivot_root`):

    /usr /lib /etc/ld.so.cache    the system's libraries and programs, read-only
    <prefix>/bin <prefix>/lib     the interpreter and its packages, read-only; of the directories
                                  above them (say, a home) only the names on the way
    <reward file> ...             the file and the modules it has imported, read-only
    /dev/null full random urandom the devices that change nothing
    /proc                         its own process namespace, read-only; where the kernel permits
    /tmp                          its own, in memory, of bounded size

The server builds the root (`build`), each worker enters it (`enter`) with a /tmp and a /proc of its
own. Both need a mount namespace, hence CAP_SYS_ADMIN in the user namespace that they are in.
Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

_NEW_MOUNT = 0x00020000
_NOSUID, _NODEV, _NOEXEC, _READ_ONLY = 2, 4, 8, 1  # both of mount and of mount_setattr
_BIND, _MOVE, _RECURSIVE, _PRIVATE = 0x1000, 0x2000, 0x4000, 0x40000
_DETACH = 2
_AT_CWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_SETATTR, _PIVOT_ROOT = 442, {"x86_64": 155}.get(os.uname().machine, 41)

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

# Not /dev/zero: mapped, it is shared memory of no file, which nothing shows to be anyone's.
_DEVICES = ("null", "full", "random", "urandom")
_SPARE = "/.tmp"  # where /tmp is made, before it covers what the root shows below /tmp


def _checked(result: int, what: str) -> None:
  if result != 0:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
  encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
  data = options.encode() or None
  _checked(_libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {target}")


def _restrict(target: str, flags: int, *, below: bool = True) -> None:
  """Adds flags to a mount and those below it; unlike a remount it takes none away."""
  attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
  arguments = (ctypes.c_int(_AT_CWD), os.fsencode(target))
  where = ctypes.c_uint(_AT_RECURSIVE if below else 0)
  size = ctypes.c_size_t(len(attributes))
  done = _libc.syscall(ctypes.c_long(_MOUNT_SETATTR), *arguments, where, attributes, size)
  _checked(done, f"mount_setattr {target}")


def _own_mounts() -> None:
  """A mount namespace whose mounts show nowhere else."""
  _checked(_libc.unshare(_NEW_MOUNT), "unshare")
  _mount("none", "/", None, _RECURSIVE | _PRIVATE)


def _bind(source: str, target: str) -> None:
  """Shows a file or directory at `target`, which it makes."""
  if os.path.isdir(source):
    os.makedirs(target, mode=0o755, exist_ok=True)
  else:
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
  _mount(source, target, None, _BIND | _RECURSIVE)


def _show(root: str, path: str, shown: set[str]) -> None:
  """Puts a file or directory into the root where it lies outside, with the links on the way."""
  at, left, links = "", path.split("/"), 0
  while left:
    part = left.pop(0)
    if part in ("", "."):
      continue
    if part == "..":
      at = os.path.dirname(at)
      continue
    here = f"{at}/{part}"
    if here in shown:
      return
    if os.path.islink(here):
      links += 1
      if links > 40:
        return
      target = os.readlink(here)
      if not os.path.lexists(root + here):
        os.symlink(target, root + here)
      at, left = "" if target.startswith("/") else at, target.split("/") + left
      continue
    at = here
    if any(part not in ("", ".") for part in left):
      os.makedirs(root + here, mode=0o755, exist_ok=True)
  if at and os.path.exists(at):
    _bind(at, root + at)
    _restrict(root + at, _READ_ONLY | _NOSUID | _NODEV)
    shown.add(at)


def build(root: str, paths: Iterable[str]) -> bool:
  """Moves into a mount namespace of its own, where the directory `root` is a root to `enter`.

  Args:
    root: an empty directory.
    paths: absolute; files and directories that it shows. What does not exist is left out.

  Returns:
    Whether the kernel (5.12 or newer) let it.
  """
  if _libc is None:
    return False
  try:
    _own_mounts()
    _mount("tmpfs", root, "tmpfs", _NOSUID, "size=4m,nr_inodes=65536,mode=755")
    for directory in ("/dev", "/proc", "/tmp", _SPARE):
      os.mkdir(root + directory, 0o755)
    for device in _DEVICES:
      if os.path.exists(f"/dev/{device}"):
        _bind(f"/dev/{device}", f"{root}/dev/{device}")
        _restrict(f"{root}/dev/{device}", _READ_ONLY | _NOSUID | _NOEXEC)
    shown = {"/proc", "/dev"}  # nothing of the system's
    for path in sorted(map(os.path.abspath, paths), key=lambda path: len(os.path.realpath(path))):
      if os.path.realpath(path) != "/tmp":
        _show(root, path, shown)
    _restrict(root, _READ_ONLY | _NOSUID | _NODEV, below=False)
    return True
  except OSError:
    return False


def enter(root: str, megabytes: int, *, own_processes: bool) -> list[str] | None:
  """Makes what `build` has made the root of this process alone, with a new /tmp.

  Args:
    root: the directory given to `build` in this process's parent.
    megabytes: size of /tmp.
    own_processes: whether the process is the first of its process namespace, and so may see /proc.

  Returns:
    The names in /tmp that are part of the root, and cannot be deleted; None where the kernel did
    not let it.
  """
  if _libc is None:
    return None
  try:
    _own_mounts()
    # In a user namespace below that of `build` its mounts are locked, and a view of them is not.
    _mount(root, root, None, _BIND | _RECURSIVE)
    spare = root + _SPARE
    options = f"size={megabytes}m,nr_inodes=4096,mode=700"
    _mount("tmpfs", spare, "tmpfs", _NOSUID | _NODEV, options)
    kept = os.listdir(root + "/tmp")
    for name in kept:
      if os.path.islink(f"{root}/tmp/{name}"):
        os.symlink(os.readlink(f"{root}/tmp/{name}"), f"{spare}/{name}")
      else:
        _bind(f"{root}/tmp/{name}", f"{spare}/{name}")
    _mount(spare, root + "/tmp", None, _MOVE)
    if own_processes:
      try:  # In a container that masks parts of /proc the kernel refuses a new one.
        flags = _NOSUID | _NODEV | _NOEXEC | _READ_ONLY
        _mount("proc", root + "/proc", "proc", flags, "subset=pid")
      except OSError:
        pass
    os.chdir(root)
    _checked(_libc.syscall(ctypes.c_long(_PIVOT_ROOT), b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/tmp")
    return kept
  except OSError:
    return None
