"""Rights that a process gives up before it handles text written by a model.

Some graders run model text as a program, and any of them may hang or crash on it. Each function
below uses the kernel to take one right away from the calling process, and returns whether the
kernel agreed. Nothing here needs root. Standard library only, since it runs in a bare interpreter.
On a system other than Linux every function returns False, and only the limits of `limit_resources`
are left.

Patching `socket` or `__builtins__` is not a sandbox: the text being graded can undo it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import threading
from collections.abc import Callable, Iterable

NOBODY = 65534

_NEW_PID, _NEW_NET, _NEW_USER = 0x20000000, 0x40000000, 0x10000000
_NEW_IPC, _NEW_UTS = 0x08000000, 0x04000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS = 1, 4, 8, 38
_PR_SET_CHILD_SUBREAPER = 36
_CAP_READ_ANY, _CAP_SYS_ADMIN = 2, 21  # the first is DAC_READ_SEARCH
_OWN_IDS = 1 << 30  # ids from here on belong to no account

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(name: str, *arguments) -> int:
  """Calls a C function; -1 on failure, and where there is no such function."""
  function = getattr(_libc, name, None) if _libc else None
  return -1 if function is None else function(*arguments)


def _unshare(flags: int) -> bool:
  return _call("unshare", flags) == 0


def _capabilities() -> set[int]:
  """The capabilities that this process may use."""
  header, data = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
  if _call("capget", header, data) != 0:
    return set()
  _, low, _, _, high, _ = struct.unpack("=6I", data.raw)
  return {number for number in range(64) if (low | high << 32) >> number & 1}


def _set_capabilities(*kept: int) -> bool:
  """Leaves this process with the capabilities `kept` and no others."""
  bits = sum(1 << capability for capability in kept)
  header = struct.pack("=Ii", 0x20080522, 0)
  data = struct.pack("=6I", bits, bits, 0, 0, 0, 0)
  return _call("capset", header, data) == 0


def die_with_parent() -> None:
  """Has the kernel kill this process when the one that forked it ends, however it ends."""
  _call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)


def own_user() -> bool:
  """Moves into a user namespace of its own, in which root is nobody.

  The namespace lets an ordinary process make the other namespaces, and takes away root's power over
  the machine. Root keeps a second id, to become nobody with; where only one id is mapped
  (`unshare -r`, Apptainer), that one is called nobody. The map of ids must be written from outside
  the namespace, hence the helper.
  """
  uid, gid = os.geteuid(), os.getegid()
  two, one = f"0 0 1\n{NOBODY} {NOBODY} 1", f"{NOBODY} 0 1"
  maps = [(two, two), (one, one)] if uid == 0 else [(f"{uid} {uid} 1", f"{gid} {gid} 1")]
  entered_read, entered_write = os.pipe()
  parent = os.getpid()
  helper = os.fork()
  if helper == 0:
    failed = 1
    try:
      os.close(entered_write)
      if os.read(entered_read, 1) and any(_map_ids(parent, *each) for each in maps):
        failed = 0
    finally:
      os._exit(failed)
  os.close(entered_read)
  entered = _unshare(_NEW_USER)
  if entered:
    os.write(entered_write, b"1")
  os.close(entered_write)
  _, status = os.waitpid(helper, 0)
  return entered and status == 0


def _map_ids(process: int, users: str, groups: str) -> bool:
  """Writes what the ids of a process's new user namespace are outside of it."""
  try:
    for name, text in (("setgroups", "deny"), ("uid_map", users), ("gid_map", groups)):
      with open(f"/proc/{process}/{name}", "w") as file:
        file.write(text)
  except OSError:
    return False
  return True


def not_root(directory: str, needed: Iterable[str]) -> bool:
  """Becomes an id that owns nothing but a directory, where this is root and may.

  A limit on the number of processes does not bind root, root's files are open to it, and it may
  send signals to all of root's processes. The id is one that no other process has, else nobody. It
  keeps `CAP_DAC_READ_SEARCH` (reading past file modes) and `CAP_SYS_ADMIN` (making namespaces), if
  root had them, for `drop_capabilities` to take away.

  Args:
    directory: what the id will write in.
    needed: paths that it must be able to read; else the process stays root, without rights.

  Returns:
    Whether the process is another user than root now.
  """
  if os.geteuid() != 0:
    return True
  kept = [number for number in (_CAP_READ_ANY, _CAP_SYS_ADMIN) if number in _capabilities()]
  own = _OWN_IDS | os.getpid()
  for target in (own, NOBODY):
    try:
      os.chown(directory, target, target)
      if _CAP_READ_ANY not in kept and not _readable_by(target, needed):
        raise PermissionError
      _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
      _leave_groups()
      os.setresgid(target, target, target)
      os.setresuid(target, target, target)
      return _set_capabilities(*kept)
    except OSError:
      continue
  try:
    os.chown(directory, 0, 0)
  except OSError:
    pass
  return False


def _leave_groups() -> None:
  try:
    os.setgroups([])
  except OSError:  # a user namespace that denies it
    pass


def _readable_by(user: int, paths: Iterable[str]) -> bool:
  """Whether a user without rights can read all of the paths that exist; asked in a child."""
  existing = [path for path in paths if os.path.exists(path)]
  child = os.fork()
  if child == 0:
    failed = 1
    try:
      _leave_groups()
      os.setresgid(user, user, user)
      os.setresuid(user, user, user)
      failed = 0 if all(os.access(path, os.R_OK) for path in existing) else 1
    finally:
      os._exit(failed)
  return os.waitpid(child, 0)[1] == 0


def no_network() -> bool:
  """An empty network namespace: no interface is up, so every connection fails, at any protocol."""
  return _unshare(_NEW_NET)


def no_shared_names() -> bool:
  """Own System V IPC objects and host name: shared memory of others is out of reach."""
  return _unshare(_NEW_IPC | _NEW_UTS)


def own_keyring() -> bool:
  """An empty session keyring of its own: keys that the trainer's session holds are out of reach."""
  number = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)
  join = 1  # KEYCTL_JOIN_SESSION_KEYRING, of no name: a new one
  return number is not None and _call("syscall", ctypes.c_long(number), join, None) >= 0


def next_child_is_init() -> bool:
  """The next fork is process 1 of a new namespace; its end ends all it started."""
  return _unshare(_NEW_PID)


def _limit(kind: int, limit: int) -> None:
  _, hard = resource.getrlimit(kind)
  limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
  try:
    resource.setrlimit(kind, (limit, limit))
  except (ValueError, OSError):  # macOS refuses a limit on the address space
    pass


def limit_resources(*, memory_mb: int, file_mb: int) -> None:
  """Bounds the address space, the size of a file, the number of open files, and core dumps."""
  _limit(resource.RLIMIT_AS, memory_mb << 20)
  _limit(resource.RLIMIT_FSIZE, file_mb << 20)
  _limit(resource.RLIMIT_NOFILE, 256)
  _limit(resource.RLIMIT_CORE, 0)


def limit_processes(processes: int) -> None:
  """Refuses forks once the user, within its namespace, has this many processes."""
  _limit(resource.RLIMIT_NPROC, processes)


def no_new_privileges() -> bool:
  """Stops programs started from here from gaining rights (setuid)."""
  return _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0


def drop_capabilities(*, reading: bool) -> bool:
  """Drops all capabilities, but for reading past file modes if that is to stay and was there.

  Let it stay where another barrier says which files there are: the interpreter may lie in a
  directory that only root may enter.
  """
  kept = (_CAP_READ_ANY,) if reading and _CAP_READ_ANY in _capabilities() else ()
  return _set_capabilities(*kept)


def adopt_orphans() -> bool:
  """Makes this process the parent of what its descendants leave behind when they end."""
  return _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def children_list() -> Callable[[], list[int]]:
  """A function that lists the processes whose parent is this thread.

  It reads a file that is opened here, since Landlock may keep it from being opened later. Where the
  kernel has no such file the list is empty.
  """
  try:
    file = os.open(f"/proc/self/task/{threading.get_native_id()}/children", os.O_RDONLY)
  except OSError:
    return list
  return lambda: [int(number) for number in os.pread(file, 1 << 20, 0).split()]


def count_processes() -> int:
  """How many threads this process's user has, in all of its processes that can be seen."""
  found = 0
  for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
    try:
      if os.stat(f"/proc/{name}").st_uid == os.geteuid():
        found += len(os.listdir(f"/proc/{name}/task"))
    except OSError:  # it has ended
      pass
  return found


def no_tracing() -> bool:
  """Stops processes of the same user from tracing this one or reading its memory."""
  return _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0) == 0


def traceable() -> bool:
  """Undoes `no_tracing`, which a change of user does as well: needed to map ids once more."""
  return _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0) == 0


_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15


def only_files(read: Iterable[str], write: Iterable[str]) -> bool:
  """Landlock: from now on only files under `read` can be read, only those under `write` changed.

  Also refuses TCP and signals to outside processes, where the kernel knows how. Paths that do not
  exist are skipped. Call `no_new_privileges` first: without it the kernel does not let an ordinary
  process do this.

  Args:
    read: directories or files, with all below them.
    write: the same, for reading, writing, creating and deleting.

  Returns:
    Whether the kernel (5.13 or newer, Landlock on) enforces it.
  """
  version = _call("syscall", ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
  if version < 1:
    return False
  known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
  size = 8 if version < 4 else 16 if version < 6 else 24
  attributes = struct.pack("=QQQ", known, 3, 3)[:size]  # files; TCP bind, connect; sockets, signals
  ruleset = _call(
    "syscall", ctypes.c_long(444), attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)
  )
  if ruleset < 0:
    return False
  reading, for_files = (
    _READ_FILE | _READ_DIR | _EXECUTE,
    _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL,
  )
  try:
    for paths, allowed in ((read, reading), (write, known)):
      for path in paths:
        try:
          parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
          continue
        allowed_here = allowed & known & (-1 if os.path.isdir(path) else for_files)
        rule = struct.pack("=Qi", allowed_here, parent)
        added = _call(
          "syscall", ctypes.c_long(445), ctypes.c_int(ruleset), 1, rule, ctypes.c_uint32(0)
        )
        os.close(parent)
        if added != 0:
          return False
    return _call("syscall", ctypes.c_long(446), ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0
  finally:
    os.close(ruleset)
