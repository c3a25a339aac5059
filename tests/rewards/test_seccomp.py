"""The filter of system calls, read as the kernel reads it, and asked in processes that have it.

What must be refused is from the manual pages of the calls; the numbers are compared with the
kernel's own headers where they are installed.
"""

import errno
import pathlib
import platform
import re
import subprocess
import sys

import pytest

from rl_llm.rewards import seccomp
from tests.processes import PATIENCE

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
HEADERS = {
  "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"),
  "aarch64": ("/usr/include/asm-generic/unistd.h",),
}


def verdict(program, number, arguments=(), *, architecture):
  """What the filter returns, by the rules of the kernel's filter.rst; only what it uses."""
  data = number.to_bytes(4, "little") + architecture.to_bytes(4, "little") + bytes(8)
  for value in (*arguments, *[0] * (6 - len(arguments))):
    data += (value & (2**64 - 1)).to_bytes(8, "little")
  at = value = 0
  while True:
    code, yes, no, constant = program[at]
    at += 1
    if code == 0x20:
      value = int.from_bytes(data[constant : constant + 4], "little")
    elif code == 0x54:
      value &= constant
    elif code in (0x15, 0x35):
      at += yes if (value == constant if code == 0x15 else value >= constant) else no
    else:
      assert code == 0x06
      return constant


def number(name, machine):
  return seccomp._NUMBERS[name][list(ARCHITECTURES).index(machine)]


REFUSED = """socket connect bind listen accept accept4 unshare setns mount umount2 pivot_root chroot
  open_tree move_mount fsopen fsmount mount_setattr ptrace process_vm_readv process_vm_writev
  pidfd_getfd add_key request_key keyctl shmget shmat semget msgget mq_open io_uring_setup
  io_uring_enter io_uring_register open_by_handle_at userfaultfd perf_event_open bpf""".split()
CHANGES = """chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat
  utimensat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr
  removexattrat truncate""".split()


@pytest.mark.parametrize("machine", ARCHITECTURES)
class TestProgram:
  def asked(self, machine, name, *arguments, metadata=True):
    names = [n for n in seccomp._NUMBERS if n not in seccomp.SIGNALS]
    names = [n for n in names if metadata or n not in seccomp.METADATA]
    program = seccomp.program(names, machine)
    call = name if isinstance(name, int) else number(name, machine)
    return verdict(program, call, arguments, architecture=ARCHITECTURES[machine])

  @pytest.mark.parametrize("name", REFUSED)
  def test_is_refused_whatever_its_arguments(self, machine, name):
    for arguments in ((), (1, 1, 1), (-1, -1, -1)):
      assert self.asked(machine, name, *arguments) == ERRNO | errno.EPERM
      assert self.asked(machine, name, *arguments, metadata=False) == ERRNO | errno.EPERM

  @pytest.mark.parametrize("name", CHANGES)
  def test_changes_to_files_are_refused_where_asked(self, machine, name):
    if number(name, machine) is None:
      pytest.skip(f"{machine} has no {name}")
    assert self.asked(machine, name) == ERRNO | errno.EPERM
    assert self.asked(machine, name, metadata=False) == ALLOW

  def test_depends_on_arguments(self, machine):
    refused = ERRNO | errno.EPERM
    unix, stream, datagram, cloexec = 1, 1, 2, 0o2000000
    assert self.asked(machine, "socketpair", unix, stream | cloexec) == ALLOW
    assert self.asked(machine, "socketpair", unix, datagram) == refused
    assert self.asked(machine, "socketpair", 40, stream) == refused
    assert self.asked(machine, "clone", 17) == ALLOW  # SIGCHLD: a fork
    assert self.asked(machine, "clone", 0x003D0F00) == ALLOW  # glibc's flags for a thread
    for new in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
      assert self.asked(machine, "clone", 17 | new) == refused
    assert self.asked(machine, "prlimit64", 0, 7) == ALLOW
    assert self.asked(machine, "prlimit64", 1, 7) == refused
    assert self.asked(machine, "prlimit64", 1 << 32, 7) == ALLOW  # an int: its high half is unread
    assert self.asked(machine, "setpriority", 0, 0) == ALLOW
    assert self.asked(machine, "setpriority", 2, 0) == refused  # of the whole user
    assert self.asked(machine, "fcntl", 3, 4) == ALLOW
    assert self.asked(machine, "fcntl", 3, 8) == refused
    private, shared, either, anonymous = 2, 1, 3, 0x20
    assert self.asked(machine, "mmap", 0, 4096, 3, private | anonymous, -1) == ALLOW
    assert self.asked(machine, "mmap", 0, 4096, 3, shared, 5) == ALLOW  # a file's
    assert self.asked(machine, "mmap", 0, 4096, 3, shared | anonymous, -1) == refused
    assert self.asked(machine, "mmap", 0, 4096, 3, either | anonymous, -1) == refused
    assert self.asked(machine, "umask", 0o077) == ALLOW
    assert self.asked(machine, "umask", 0o400) == refused
    assert self.asked(machine, "umask", 0o400, metadata=False) == ALLOW
    assert self.asked(machine, "mkdirat", 3, 0, 0o700) == ALLOW
    assert self.asked(machine, "mkdirat", 3, 0, 0o300) == refused
    assert self.asked(machine, "ioctl", 0, 0x5412) == refused
    assert self.asked(machine, "ioctl", 0, 0x5401) == ALLOW

  def test_unknown_numbers_and_other_architectures(self, machine):
    missing = ERRNO | errno.ENOSYS
    assert self.asked(machine, "clone3") == missing
    assert self.asked(machine, "memfd_create") == missing
    assert self.asked(machine, 467) == missing
    assert self.asked(machine, 0x40000000) == missing  # x32's read
    program = seccomp.program(["ptrace"], machine)
    for other in (0x40000003, 0x40000028, 0, *set(ARCHITECTURES.values())):  # i386, ARM
      if other != ARCHITECTURES[machine]:
        assert verdict(program, 0, architecture=other) == KILL

  def test_what_programs_need_runs(self, machine):
    x86 = "read write openat close mmap execve exit_group wait4 pipe2 dup3 epoll_ctl futex".split()
    numbers = {"x86_64": [0, 1, 257, 3, 9, 59, 231, 61, 293, 292, 233, 202]}
    numbers["aarch64"] = [63, 64, 56, 57, 222, 221, 94, 260, 59, 24, 21, 98]
    for name, call in zip(x86, numbers[machine], strict=True):
      assert self.asked(machine, call) == ALLOW, name

  def test_numbers_are_the_kernel_s(self, machine):
    header = next((h for h in HEADERS[machine] if pathlib.Path(h).is_file()), None)
    if header is None:
      pytest.skip(f"no kernel headers for {machine} here")
    text = pathlib.Path(header).read_text()
    known = {name: int(n) for name, n in re.findall(r"#define __NR_(\w+) (\d+)\b", text)}
    assert len(known) > 200
    for name in seccomp._NUMBERS:
      mine = number(name, machine)
      if name in known or machine == "x86_64" and mine is not None and mine < 424:
        assert known[name] == mine


def test_signals_reach_only_oneself(monkeypatch):
  monkeypatch.setattr(seccomp.os, "getpid", lambda: 77)
  program = seccomp._only_oneself("x86_64")

  def asked(name, *arguments):
    call = number(name, "x86_64")
    return verdict(program, call, arguments, architecture=ARCHITECTURES["x86_64"])

  assert asked("kill", 77, 9) == asked("tgkill", 77, 77, 6) == asked("ptrace") == ALLOW
  for name, first in (("kill", 1), ("kill", 0), ("kill", -1), ("tgkill", 1), ("tkill", 77)):
    assert asked(name, first, 9) == ERRNO | errno.EPERM
  assert asked("pidfd_send_signal", 3, 9) == ERRNO | errno.EPERM


INSTALLED = """
import ctypes, errno, importlib.util, os, socket, sys
spec = importlib.util.spec_from_file_location("seccomp", sys.argv[1])
seccomp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(seccomp)
if not seccomp.refuse_calls(metadata=True):
  sys.exit(77)
libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
  ctypes.set_errno(0)
  result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
  return errno.errorcode[ctypes.get_errno()] if result == -1 else "ran"
"""


def installed(body):
  """The lines that a process prints which has given up its calls."""
  command = [sys.executable, "-I", "-S", "-c", INSTALLED + body, seccomp.__file__]
  done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
  if done.returncode == 77:
    pytest.skip("this kernel or machine offers no filter of system calls")
  return done.stdout.split(), done.returncode


class TestInstalled:
  def test_the_kernel_refuses(self):
    """-1 for every argument: a call that ran would say EBADF, EFAULT or EINVAL."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
      pytest.skip(f"no filter for {machine}")
    names = [n for n in REFUSED + CHANGES if number(n, machine) is not None]
    body = (
      f"print(*[call(n, -1, -1, -1, -1, -1, -1) for n in {[number(n, machine) for n in names]}])"
    )
    found, code = installed(body)
    assert code == 0 and dict(zip(names, found, strict=True)) == dict.fromkeys(names, "EPERM")

  def test_no_socket_of_any_family(self):
    body = """
made = []
for family in range(-1, 64):
  for kind in (1, 2, 3, 5):
    try: made.append(socket.socket(family, kind, 0))
    except OSError as error: assert error.errno == errno.EPERM, (family, error)
print(len(made))
a, b = socket.socketpair()
a.send(b"x")
print(b.recv(1).decode())
try: socket.socketpair(type=socket.SOCK_DGRAM)
except PermissionError: print("refused")
"""
    assert installed(body) == (["0", "x", "refused"], 0)

  def test_ordinary_programs_run(self):
    body = """
import asyncio, subprocess, tempfile, threading
async def one(): return 1
print(asyncio.run(one()))
command = [sys.executable, "-I", "-S", "-c", "print(2)"]
print(subprocess.run(command, capture_output=True).stdout.decode())
thread = threading.Thread(target=lambda: print(3))
thread.start()
thread.join()
with tempfile.TemporaryFile() as file: print(file.write(b"four"))
sys.stdout.flush()
os.kill(os.getpid(), 9)
"""
    assert installed(body) == (["1", "2", "3", "4"], -9)

  def test_32_bit_calls_end_the_process(self):
    if platform.machine() != "x86_64":
      pytest.skip("int 0x80 is an instruction of x86")
    body = """
import mmap
flags, prot = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7
page = mmap.mmap(-1, 4096, flags=flags, prot=prot)
page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (i386's getpid); int 0x80; ret
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
print("before", flush=True)
print(ctypes.CFUNCTYPE(ctypes.c_int)(address)(), "after")
"""
    found, code = installed(body)  # SIGSYS; SIGSEGV where the kernel has no 32-bit calls at all
    assert found == ["before"] and code in (-31, -11)
