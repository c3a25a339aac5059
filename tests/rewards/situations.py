"""Where people run graders, imitated: `python -m tests.rewards.situations FOLDER SITUATION`.

Enters the situation, runs all of `payloads` against a pool there, and prints as JSON what the pool
says of its layers, which payloads got through, and what the outside saw. Exits with 77 and one line
where this machine does not allow the situation. Everything that is attacked is made here. With the
name of another module, it runs that there: `python -m MODULE FOLDER`.

A process enters a user namespace only while it has one thread, so this is entered first, and what
starts threads (numpy) is imported after an exec, which also gives the capabilities that the
situation's user has.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import pathlib
import platform
import signal
import socket
import sys
import time

libc = ctypes.CDLL(None, use_errno=True)
USER = 0x10000000
ROOT = pathlib.Path(__file__).parents[2]
DOCKER = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}  # Docker's capabilities by default

GRADER = """
import ctypes, errno, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = {}

def call(name, *arguments):
  given = [a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
  return libc.syscall(ctypes.c_long(NUMBERS[name]), *given)

def reward(completions, P, **columns):
  body = "def payload(P):\\n  " + completions[0].replace("\\n", "\\n  ")
  names = dict(globals())
  exec(body, names)
  return [float(names["payload"](P[0]) is True)]
"""


def alone(name):
  """A module of `rl_llm.rewards` without its package, which would import numpy."""
  spec = importlib.util.spec_from_file_location(name, ROOT / "rl_llm" / "rewards" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def cannot(why):
  print(why)
  sys.exit(77)


def refuse(numbers, error):
  """From now on the kernel answers these calls with this error, here and in all that is started."""
  seccomp = alone("seccomp")
  architecture, _ = seccomp._ARCHITECTURES[platform.machine()]
  code = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, 0x7FFF0000), (0x20, 0, 0, 0)]
  for number in numbers:
    code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error)]
  if not seccomp._install(code + [(0x06, 0, 0, 0x7FFF0000)]):
    cannot("no filter of system calls here")


def map_user(inside):
  """A user namespace with one id, which is `inside` there."""
  user, group = os.geteuid(), os.getegid()
  if libc.unshare(USER) != 0:
    cannot("no user namespaces here")
  try:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {user} 1")):
      pathlib.Path(f"/proc/self/{name}").write_text(text)
    pathlib.Path("/proc/self/gid_map").write_text(f"{inside} {group} 1")
  except OSError as error:
    cannot(f"no map of ids here: {error}")


def allow_namespaces(count):
  try:
    pathlib.Path("/proc/sys/user/max_user_namespaces").write_text(str(count))
  except OSError as error:
    cannot(f"max_user_namespaces cannot be set here: {error}")


def keep_capabilities(kept):
  for number in set(range(64)) - kept:
    libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP: what root has after its next exec


def no_landlock():
  refuse((444, 445, 446), 38)


def enter(situation):
  base, _, without = situation.partition(" without ")
  if base == "root" and os.geteuid() != 0:
    cannot("this is not root")
  if base == "user" and os.geteuid() == 0:
    map_user(1000)  # An id other than 0 has no capabilities after the next exec.
  if base == "one uid":
    map_user(0)
  if base == "container root":
    map_all() if os.geteuid() == 0 else map_user(0)
    allow_namespaces(0)
    keep_capabilities(DOCKER)
  if base == "namespaces off":
    map_user(0)
    allow_namespaces(1)
    map_user(1000)
  if without == "Landlock":
    no_landlock()


def map_all():
  """All ids of this root in the new user namespace; written by a child that stayed outside."""
  parent, (reading, writing) = os.getpid(), os.pipe()
  helper = os.fork()
  if helper == 0:
    ids = "0 0 4294967295"
    os.close(writing)
    os._exit(0 if os.read(reading, 1) and alone("sandbox")._map_ids(parent, ids, ids) else 1)
  if libc.unshare(USER) != 0:
    cannot("no user namespaces here")
  os.write(writing, b"1")
  if os.waitpid(helper, 0)[1] != 0:
    cannot("no map of ids here")


@contextlib.contextmanager
def listeners(folder):
  """Sockets of every kind a text could look for, and how many have been reached."""
  reached, kept = [], []
  found = {"stream": str(folder / "s"), "datagram": str(folder / "d")}
  found["abstract"] = f"\0rl_llm_test_{os.getpid()}"
  kinds = [("stream", socket.AF_UNIX, 1), ("datagram", socket.AF_UNIX, 2)]
  kinds += [("abstract", socket.AF_UNIX, 1)]
  for name, family, kind in kinds:
    kept.append((name, socket.socket(family, kind)))
    kept[-1][1].bind(found[name])
  for name, kind in (("tcp", 1), ("udp", 2)):
    kept.append((name, socket.socket(socket.AF_INET, kind)))
    kept[-1][1].bind(("127.0.0.1", 0))
    found[name] = kept[-1][1].getsockname()[1]
  for path in ("s", "d"):
    os.chmod(folder / path, 0o777)
  for _, each in kept:
    if each.type == socket.SOCK_STREAM:
      each.listen()
  yield found, reached
  for name, each in kept:
    each.settimeout(0)
    try:
      reached.append((name, str(each.accept() if each.type == 1 else each.recv(9))))
    except BlockingIOError:
      pass
    each.close()


def state(path):
  found = os.lstat(path)
  return (found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns)


def attack(folder):
  from rl_llm.rewards import RewardError, RewardPool, RewardSource, describe, seccomp
  from tests.rewards import payloads

  grader = folder / "grader.py"
  numbers = {n: pair[platform.machine() != "x86_64"] for n, pair in seccomp._NUMBERS.items()}
  grader.write_text(GRADER.replace("NUMBERS = {}", f"NUMBERS = {numbers}"))
  names = {"key": 0o600, "public": 0o644}
  for name, mode in names.items():
    (folder / name).write_text("secret")
    (folder / name).chmod(mode)
  directory = folder / "checkpoints"
  (directory / "empty").mkdir(parents=True)
  directory.chmod(0o777)
  watched = [folder / name for name in (*names, "grader.py", "checkpoints")]
  before = [state(path) for path in watched]
  given = {name: str(folder / name) for name in names} | {"reward": str(grader)}
  given |= {"directory": str(directory), "marker": str(directory / "marker")}
  given["shared"] = f"/dev/shm/rl_llm_test_{os.getpid()}"
  source = RewardSource(str(grader), runs_text=True)
  options = {"workers": 1, "deadline": 5.0, "max_failure_rate": 1.0, "allow_weak_sandbox": True}
  try:
    RewardPool(source, workers=1).close()
    refused = ""
  except RewardError as error:
    refused = str(error)
  through, signals = [], []
  signal.signal(signal.SIGTERM, lambda *unused: signals.append("SIGTERM"))
  begun = time.monotonic()
  with listeners(folder) as (sockets, reached):
    given |= sockets | {"trainer": os.getpid(), "nice": os.nice(0)}
    with RewardPool(source, **options) as pool:
      layers = pool.active_layers()

      def tried(*texts):
        results = pool.score(["p"] * len(texts), texts, [{"P": given}] * len(texts))
        return [result.value == 1.0 for result in results], [result.status for result in results]

      working = tried("return True", "return False")
      for name, layer, code in payloads.PAYLOADS:
        if tried(code)[0][0]:
          through.append((name, layer))
      for name, (leave, look) in payloads.PAIRS.items():
        if tried(leave + "\nreturn False", look)[0][1]:
          through.append((name, payloads.FILES if name == "shared memory" else "limits"))
  pathlib.Path(given["shared"]).unlink(missing_ok=True)
  left = [name for name in os.listdir(directory) if name != "empty"]
  changed = [str(path) for path, was in zip(watched, before, strict=True) if state(path) != was]
  evidence = {"reached": reached, "left": left, "changed": changed, "signals": signals}
  found = {
    "layers": layers,
    "refused": refused,
    "says": describe(layers),
    "through": through,
    "working": working,
  }
  seconds = time.monotonic() - begun
  print(json.dumps(found | evidence | {"seconds": seconds}))


if __name__ == "__main__":
  if len(sys.argv) > 2:
    enter(sys.argv[2])
    module = sys.argv[3] if len(sys.argv) > 3 else "tests.rewards.situations"
    os.execv(sys.executable, [sys.executable, "-m", module, sys.argv[1]])
  attack(pathlib.Path(sys.argv[1]))
