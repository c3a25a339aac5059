"""The processes that graders run in; started by `rl_llm.rewards.server`, not imported by it.

    trainer --- server          imports the reward function once; never sees text
                  `- minder     one per worker: its end is the worker's end; it watches memory
                       `- worker     process 1 of its own process namespace, in its own directory
                            `- child      a fresh fork per call: what text breaks ends with it
                                          (not for graders of this library that compare text)

A fork costs a millisecond, an import of the grader up to seconds, so a worker killed at its
deadline is replaced at once. Frames are four bytes of length (big endian), then JSON. Standard
library only: `python -I -S -B worker.py FD`. `rl_llm.rewards.grading` describes the contents of the
frames to and from a worker.

Another program than a grader has a file with `prepare(config) -> (reply, live)`, named in the
config as `program`: `rl_llm/tasks/environments/process.py` is one.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import json
import os
import re
import select
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable, Container
from typing import NamedTuple


def load_file(path: str, name: str) -> types.ModuleType:
  """Runs a Python file as the module of this name, without a package."""
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


if __name__ == "__main__":  # run as a file, where no package is importable yet
  _FOLDER = os.path.dirname(os.path.abspath(__file__))
  directories, grading, memory, root, sandbox, seccomp = (
    load_file(os.path.join(_FOLDER, name + ".py"), "_rl_llm_" + name)
    for name in ("directories", "grading", "memory", "root", "sandbox", "seccomp")
  )
else:
  from rl_llm.rewards import directories, grading, memory, root, sandbox, seccomp

COMMAND = struct.Struct(">cQ")  # b"S" (start, with a socket) or b"E" (end), and the worker's number


def write_frame(write: Callable[[bytes], object], message: object) -> None:
  """Sends one message. JSON in ASCII: lone surrogates of broken text pass unharmed."""
  body = json.dumps(message).encode("ascii")
  write(struct.pack(">I", len(body)) + body)


def read_frame(read: Callable[[int], bytes], limit: int | None = None) -> object | None:
  """Receives one message; None when the other side has ended, or breaks the format.

  With a limit of bytes it is an answer to a call, which may be forged.
  """

  def exactly(count: int) -> bytes | None:
    parts = []
    while count:
      part = read(min(count, 1 << 20))
      if not part:
        return None
      parts.append(part)
      count -= len(part)
    return b"".join(parts)

  header = exactly(4)
  if header is None:
    return None
  length = struct.unpack(">I", header)[0]
  if limit is not None and length > limit:
    return None
  body = exactly(length)
  if body is not None and limit is not None:
    return grading.decode_reply(body)
  try:
    return None if body is None else json.loads(body)
  except ValueError:
    return None


def load_function(location: str, function: str) -> tuple[Callable, tuple[float, float]]:
  """Imports the reward function from a `.py` file or a module; gives it and its rewards' range."""
  if location.endswith(".py"):
    module = load_file(location, "reward_file")
  else:
    module = importlib.import_module(location)
  found = getattr(module, function, None)
  if not callable(found):
    names = sorted(
      n for n, value in vars(module).items() if callable(value) and not n.startswith("_")
    )
    raise AttributeError(f"no function {function!r} in it; it has: {', '.join(names) or 'none'}")
  return found, grading.stated_range(getattr(module, "REWARD_RANGE", None))


class Confinement(NamedTuple):
  """What a call's child inherits from its worker.

  Attributes:
    inherited: the descriptor of the trainer's socket, which the child must not hold.
    alone: whether the worker is process 1 of its own namespace, so that "all processes" means the
      child's.
    children: lists the processes whose parent the worker is.
    processes: the child's limit on the number of its user's processes. It binds only the child, so
      that a fork bomb cannot keep the other workers from forking.
    kept: names in the working directory that are part of the file system.
  """

  inherited: int
  alone: bool
  children: Callable[[], list[int]]
  processes: int
  kept: list[str]


def grade_in_child(grade: grading.Grade, request: dict, confined: Confinement) -> dict:
  """Grades one call in a fresh fork, and leaves nothing of it behind."""
  reading, writing = os.pipe()
  child = os.fork()
  if child == 0:
    try:
      sandbox.die_with_parent()
      os.close(confined.inherited)
      os.close(reading)
      sandbox.limit_processes(confined.processes)
      if not confined.alone:
        seccomp.refuse_signals()
      write_frame(lambda frame: os.write(writing, frame), grade(request))
    finally:
      os._exit(0)
  os.close(writing)
  try:
    limit = grading.reply_limit(len(request["completions"]))
    reply = read_frame(lambda count: read_from(child, reading, count), limit)
  finally:
    os.close(reading)
  status = end_call(child, confined)
  if os.stat(".").st_mode & 0o700 != 0o700:  # which the child may change where it can change modes
    os.chmod(".", 0o700)
  directories.empty(".", confined.kept)
  if reply is not None:
    return reply
  if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
    return {"died": "killed by SIGKILL: it ended itself, or its processes took too much memory"}
  if os.WIFSIGNALED(status):
    return {"died": f"killed by {signal.Signals(os.WTERMSIG(status)).name}"}
  return {"died": f"exited with code {os.WEXITSTATUS(status)} and no reward"}


def has_ended(child: int) -> bool:
  """Whether a child has ended; it is left to be waited for."""
  return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def read_from(child: int, reading: int, count: int) -> bytes:
  """Reads what a child writes; nothing once it has ended, even if a fork of it holds the pipe."""
  ended = False
  while not select.select([reading], [], [], 0 if ended else memory.PERIOD)[0]:
    if ended:
      return b""
    ended = has_ended(child)
  return os.read(reading, count)


def end_call(child: int, confined: Confinement) -> int:
  """Kills a call's child with all that it has started; gives the child's status as `waitpid`."""
  os.kill(child, signal.SIGKILL)  # still ours: it has not been waited for
  if confined.alone:
    try:
      os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
      pass
  _, status = os.waitpid(child, 0)
  if not confined.alone:
    end_orphans(confined.children)
  try:
    while confined.alone:
      os.waitpid(-1, 0)
  except ChildProcessError:
    pass
  return status


def end_orphans(children: Callable[[], list[int]], spared: Container[int] = ()) -> None:
  """Kills what the dead have left to this process, and what that leaves, until nothing is left."""

  def left() -> list[int]:
    return [child for child in children() if child not in spared]

  while orphans := left():
    # The dead are kept until all are dead: they count as processes, so one that forks faster than
    # it is killed comes to its limit.
    while living := [orphan for orphan in orphans if not has_ended(orphan)]:
      for orphan in living:
        os.kill(orphan, signal.SIGKILL)
      orphans = left()
    for orphan in orphans:
      os.waitpid(orphan, 0)


def imported_files() -> list[str]:
  """The files of all modules that are imported by now."""
  found = {getattr(module, "__dict__", {}).get("__file__") for module in sys.modules.values()}
  return sorted(file for file in found if isinstance(file, str))


Live = Callable[[socket.socket, Confinement], None]


def prepare_grader(config: dict) -> tuple[dict, Live]:
  """Imports the reward function; gives the server's answer and what its workers do."""
  function, rewards = load_function(config["location"], config["function"])
  grade = grading.grader(function)

  def live(connection: socket.socket, confined: Confinement) -> None:
    """Makes one call after another."""

    def apart(request: dict) -> dict:
      return grade_in_child(grade, request, confined)

    isolated = grade if config["shared"] else apart
    if config["own_grader"]:
      isolated = functools.partial(grading.grade_text, isolated)
    while (request := read_frame(connection.recv)) is not None:
      if "each" in request:
        reply = {"each": [json.dumps(isolated(each)) for each in request["each"]]}
      else:
        reply = isolated(request)
      write_frame(connection.sendall, reply)

  return {"range": rewards}, live


def work(
  live: Live, connection: socket.socket, config: dict, layers: list[str], alone: bool
) -> None:
  """A worker's life: the last restrictions, then what the program does."""
  sandbox.die_with_parent()
  sandbox.adopt_orphans()
  if alone:  # A call that kills its group does not kill the minder, whose end ends this process.
    os.setsid()
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # which process 1 of a namespace does not get
  layers = list(layers) + (["processes"] if alone else [])
  children, others = sandbox.children_list(), 0 if alone else sandbox.count_processes()
  directory, readable = "/tmp", ["/"]
  kept = root.enter(config["root"], config["file_mb"], own_processes=alone)
  if kept is not None:
    layers.append("own file system")
  else:
    directory, readable = os.path.join(config["directory"], config["name"]), config["readable"]
    os.makedirs(directory, exist_ok=True)
    os.chdir(directory)
  os.environ["TMPDIR"] = os.environ["HOME"] = directory
  sandbox.no_tracing()
  if sandbox.no_new_privileges():
    layers.append("no new privileges")
  devices = ["/dev/full", "/dev/random", "/dev/urandom"]
  if sandbox.only_files(readable + devices, [directory, "/dev/null"]) or kept is not None:
    layers.append("files")
  sandbox.drop_capabilities(reading="files" in layers)
  if seccomp.refuse_calls(metadata=kept is None):
    layers += ["system calls", "network"]
  # Since Linux 5.14 processes are counted per user namespace; before, all of the user's are.
  release = re.match(r"(\d+)\.(\d+)", os.uname().release)
  counted_apart = "user" in layers and tuple(map(int, release.groups())) >= (5, 14)
  processes = config["processes"] if counted_apart else others + 512
  sandbox.limit_resources(memory_mb=config["memory_mb"], file_mb=config["file_mb"])
  layers.append("limits")
  write_frame(connection.sendall, {"layers": layers})

  live(connection, Confinement(connection.fileno(), alone, children, processes, kept or []))


def start_worker(
  live: Live, control: socket.socket, fd: int, config: dict, layers: list[str]
) -> int:
  """Forks a minder and, under it, a worker that talks on `fd`; returns the minder's id."""
  minder = os.fork()
  if minder:
    os.close(fd)
    return minder
  try:
    sandbox.die_with_parent()
    control.close()
    os.setsid()
    if config["together"]:  # Processes are counted by user namespace: each minder has its own.
      sandbox.traceable()
      if not sandbox.own_user():
        config["processes"] += 2 * config["together"]
    # Of each worker. The calls of one need none of their own: the filter refuses them all of it.
    sandbox.own_keyring()
    sandbox.no_shared_names()
    sandbox.adopt_orphans()
    children = sandbox.children_list()
    alone = sandbox.next_child_is_init()
    worker = os.fork()
    if worker == 0:
      work(live, socket.socket(fileno=fd), config, layers, alone)
    else:
      os.close(fd)
      if config["shared"]:  # no forks, so that the limit on a process is one on all
        os.waitpid(worker, 0)
      else:
        memory.watch(worker, config["memory_mb"], idle_period=config["idle_period"])
      # They would keep the worker's connection open, and the trainer wait for its deadline.
      end_orphans(children)
  finally:
    os._exit(0)


def serve(control: socket.socket) -> None:
  """The server's life: import the function, then start and end workers until the end."""
  memory.yield_first()
  config = read_frame(control.recv)
  # An import that hangs ends, even if the trainer is gone by then.
  signal.alarm(config["start_deadline"])
  try:
    was_root = os.geteuid() == 0
    layers = ["user"] if sandbox.own_user() else []
    needed = [config["location"], *config["readable"]]
    if sandbox.not_root(config["directory"], needed) and was_root:
      layers = ["user"]
    sandbox.no_network()
    layers += ["ipc"] if sandbox.no_shared_names() else []
    sys.path.extend(path for path in config["sys_path"] if path not in sys.path)
    program = config.get("program")
    prepare = load_file(program, "_rl_llm_program").prepare if program else prepare_grader
    reply, live = prepare(config)
    # Lists the directories of sys.path, for modules among reward_files: Landlock forbids it later.
    importlib.util.find_spec("_no_such_module")
    config["readable"] += imported_files()
    config["root"] = os.path.join(config["directory"], "root")
    os.makedirs(config["root"], exist_ok=True)
    root.build(config["root"], config["readable"])
  except BaseException as error:
    own = types.SimpleNamespace(__file__=config["location"])
    write_frame(control.sendall, {"error": grading.described(error, own)})
    return
  gc.collect()
  gc.freeze()  # A call's child then copies no page because its collector has looked at it.
  signal.alarm(0)
  write_frame(control.sendall, reply)
  sandbox.adopt_orphans()
  children, minders = sandbox.children_list(), {}
  while True:
    command, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
    if len(command) < COMMAND.size:
      end_orphans(children)
      return
    kind, number = COMMAND.unpack(command)
    if kind == b"S":
      own = config | {"name": str(number)}
      minders[number] = start_worker(live, control, fds[0], own, layers)
    elif number in minders:
      # A minder stays a zombie until here, so its process id cannot have passed to another process.
      minder = minders.pop(number)
      for kill in (os.killpg, os.kill):
        try:
          kill(minder, signal.SIGKILL)
        except OSError:
          pass
      os.waitpid(minder, 0)
      end_orphans(children, minders.values())
      # What a call that was ended has left there, before many such fill the disk.
      directories.remove(os.path.join(config["directory"], str(number)))


if __name__ == "__main__":
  serve(socket.socket(fileno=int(sys.argv[1])))
