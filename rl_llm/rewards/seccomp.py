"""Which system calls a process gives up before it handles text written by a model.

Namespaces and Landlock leave doors open: a UNIX socket is a file that neither of them guards, a key
in the kernel's keyring outlives its process, and every rare system call is code of the kernel that
a text could attack. So the process installs a filter (seccomp), which nothing can remove:

    architecture not this one          -> the process is killed (32-bit calls have other numbers)
    a number of x86-64's x32 calls,
    or newer than `_NEWEST`            -> ENOSYS, as on a kernel that has no such call
    `REFUSED`, `_CONDITIONS`, `_BITS`  -> EPERM
    clone3, memfd_create               -> ENOSYS: libraries then use clone and files
    everything else                    -> runs

The filter sees numbers, never what a pointer points to, so it cannot tell one path from another:
that is the work of `rl_llm.rewards.root` and of Landlock. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable

# What the kernel calls this machine, and its numbers. Numbers from 424 on are the same everywhere.
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
_NEWEST = 466  # removexattrat, of Linux 6.13; calls that came later have not been looked at

# name -> (x86-64, aarch64); None where there is none.
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
  # Sockets: of any family, since a UNIX socket may lead to a service that runs commands.
  "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
  "accept": (43, 202), "accept4": (288, 242), "socketpair": (53, 199),
  # Namespaces and mounts.
  "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
  "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
  "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
  "mount_setattr": (442, 442), "clone": (56, 220), "clone3": (435, 435),
  # Other processes, and what belongs to them.
  "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
  "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
  "pidfd_getfd": (438, 438), "migrate_pages": (256, 238), "move_pages": (279, 239),
  "prlimit64": (302, 261), "setpriority": (141, 140), "sched_setaffinity": (203, 122),
  "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
  "ioprio_set": (251, 30), "fcntl": (72, 25), "ioctl": (16, 29),
  # What outlives its process: keys, System V objects, message queues, files without a name.
  "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
  "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197),
  "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
  "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187),
  "mq_open": (240, 180), "mq_unlink": (241, 181), "memfd_create": (319, 279),
  "memfd_secret": (447, 447), "mmap": (9, 222),
  # Ways past this filter or past paths, and wide parts of the kernel that no grader needs.
  "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
  "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "userfaultfd": (323, 282),
  "perf_event_open": (298, 241), "bpf": (321, 280), "fanotify_init": (300, 262),
  "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116), "acct": (163, 89),
  "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142), "kexec_load": (246, 104),
  "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
  "delete_module": (176, 106), "iopl": (172, None), "ioperm": (173, None),
  "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
  "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
  "vhangup": (153, 58), "lookup_dcookie": (212, 18), "personality": (135, 92),
  # What changes a file that may only be read (see `refuse_metadata`).
  "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
  "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
  "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
  "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
  "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
  "removexattrat": (466, 466), "truncate": (76, 45), "inotify_add_watch": (254, 27),
  # Directories that their owner may not list, and so not delete.
  "mkdir": (83, None), "mkdirat": (258, 34), "umask": (95, 166),
  # Signals (see `refuse_signals`).
  "kill": (62, 129), "tgkill": (234, 131), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
  "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
}  # fmt: skip

METADATA = (
  "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime",
  "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "setxattrat",
  "removexattr", "lremovexattr", "fremovexattr", "removexattrat", "truncate", "inotify_add_watch",
  "mkdir", "mkdirat", "umask",
)  # fmt: skip
SIGNALS = ("kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")
_MISSING = ("clone3", "memfd_create")  # answered with ENOSYS
# Refused unless each of these holds: (argument, mask, allowed value).
_CONDITIONS = {
  # A pair of datagram sockets could send to any path; a pair of streams reaches nobody.
  "socketpair": ((0, 0xFFFFFFFF, 1), (1, 0xF, 1)),
  "clone": ((0, 0x7E020080, 0),),  # CLONE_NEW*: no namespace
  "prlimit64": ((0, 0xFFFFFFFF, 0),),  # 0 is the process itself
  "sched_setaffinity": ((0, 0xFFFFFFFF, 0),),
  "sched_setscheduler": ((0, 0xFFFFFFFF, 0),),
  "sched_setparam": ((0, 0xFFFFFFFF, 0),),
  "sched_setattr": ((0, 0xFFFFFFFF, 0),),
  "setpriority": ((0, 0xFFFFFFFF, 0), (1, 0xFFFFFFFF, 0)),
  "ioprio_set": ((0, 0xFFFFFFFF, 1), (1, 0xFFFFFFFF, 0)),
  "mkdir": ((1, 0o700, 0o700),),
  "mkdirat": ((2, 0o700, 0o700),),
  "umask": ((0, 0o700, 0),),
}
# Refused where an argument has one of these values.
_VALUES = {
  # F_SETOWN, F_SETOWN_EX (signals in one's name), F_SETLEASE (opens by others wait)
  "fcntl": (1, (8, 15, 1024)),
  "ioctl": (1, (0x5412, 0x541C, 0x8901, 0x8902)),  # TIOCSTI, TIOCLINUX, FIOSETOWN, SIOCSPGRP
}
# Refused where an argument has all of these bits. Memory that is shared and belongs to no file
# (MAP_SHARED | MAP_ANONYMOUS) lives on where nothing shows who holds it: in a process that has
# mapped it and not touched it.
_BITS = {"mmap": (3, 0x21)}
REFUSED = tuple(
  name
  for name in _NUMBERS
  if name not in {*METADATA, *SIGNALS, *_MISSING, *_CONDITIONS, *_VALUES, *_BITS}
)

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2

Instruction = tuple[int, int, int, int]  # (code, jump if true, jump if false, constant)


def _argument(index: int) -> Instruction:
  """Loads the low half of an argument, which is all that the calls above look at."""
  return (_LOAD, 0, 0, 16 + 8 * index)


def _refuse(error: int) -> Instruction:
  return (_RETURN, 0, 0, _ERRNO | error)


def _rule(name: str) -> list[Instruction]:
  """What follows where the number is this call's; it falls through where the call may run."""
  if name in _MISSING:
    return [_refuse(errno.ENOSYS)]
  rule: list[Instruction] = []
  for index, mask, value in _CONDITIONS.get(name, ()):
    rule += [_argument(index), (_AND, 0, 0, mask), (_EQUAL, 1, 0, value), _refuse(errno.EPERM)]
  if name in _VALUES:
    index, values = _VALUES[name]
    rule.append(_argument(index))
    for value in values:
      rule += [(_EQUAL, 0, 1, value), _refuse(errno.EPERM)]
  if name in _BITS:
    index, bits = _BITS[name]
    rule += [_argument(index), (_AND, 0, 0, bits), (_EQUAL, 0, 1, bits), _refuse(errno.EPERM)]
  return rule + [(_RETURN, 0, 0, _ALLOW)] if rule else [_refuse(errno.EPERM)]


def program(names: Iterable[str], machine: str) -> list[Instruction]:
  """The filter that refuses these calls, as instructions of the kernel's packet filter (BPF).

  >>> program(["ptrace"], "x86_64")[-3:]  # if the number is 101: EPERM; else: runs
  [(21, 0, 1, 101), (6, 0, 0, 327681), (6, 0, 0, 2147418112)]

  Args:
    names: of `_NUMBERS`.
    machine: "x86_64" or "aarch64".
  """
  architecture, column = _ARCHITECTURES[machine]
  found = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
  # The numbers of x32 have bit 30 set, so they are above the newest too.
  found += [(_AT_LEAST, 0, 1, _NEWEST + 1), _refuse(errno.ENOSYS)]
  for name in names:
    number = _NUMBERS[name][column]
    if number is not None:
      rule = _rule(name)
      found += [(_EQUAL, 0, len(rule), number), *rule]
  return found + [(_RETURN, 0, 0, _ALLOW)]


def _only_oneself(machine: str) -> list[Instruction]:
  """The filter that lets a process send signals to itself alone."""
  architecture, column = _ARCHITECTURES[machine]
  found = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
  for name in SIGNALS:
    rule = [_refuse(errno.EPERM)]
    if name in ("kill", "tgkill"):
      rule = [_argument(0), (_EQUAL, 0, 1, os.getpid()), (_RETURN, 0, 0, _ALLOW), *rule]
    found += [(_EQUAL, 0, len(rule), _NUMBERS[name][column]), *rule]
  return found + [(_RETURN, 0, 0, _ALLOW)]


def _install(instructions: list[Instruction]) -> bool:
  code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
  count_and_address = struct.pack("@HP", len(instructions), ctypes.addressof(code))
  prctl = ctypes.CDLL(None, use_errno=True).prctl
  zero = ctypes.c_ulong(0)
  prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
  return prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), count_and_address, zero, zero) == 0


def _machine() -> str | None:
  machine = platform.machine() if sys.platform == "linux" else ""
  return machine if machine in _ARCHITECTURES and sys.maxsize > 2**32 else None


def refuse_calls(*, metadata: bool) -> bool:
  """Gives up the calls of `REFUSED` and their like, for this process and all that it starts.

  Args:
    metadata: whether to give up `METADATA` too: where a process can still see the files of others,
      it may otherwise change the mode, times and attributes of what it may only read.

  Returns:
    Whether the kernel enforces it (x86-64 or aarch64, with seccomp).
  """
  machine = _machine()
  names = [name for name in _NUMBERS if name not in SIGNALS and (metadata or name not in METADATA)]
  return machine is not None and _install(program(names, machine))


def refuse_signals() -> bool:
  """Gives up signals to any process but the caller itself; what it starts can send none at all."""
  machine = _machine()
  return machine is not None and _install(_only_oneself(machine))
