"""What the processes of an episode leave when they end, where no process namespace ends it too.

`python -m tests.environments.test_orphans FOLDER` runs `attack` in a situation of
`tests.rewards.situations`.
"""

import json
import pathlib
import sys
import threading
import time

import pytest

from rl_llm.rewards import memory
from rl_llm.tasks.environments import Episodes, load
from tests.rewards.test_escapes import attacked

DEADLINE = 30.0
TOOLS = """
import ctypes, os, platform, signal, time
libc = ctypes.CDLL(None)
FORK, PARENT = {"x86_64": 56, "aarch64": 220}[platform.machine()], 0x8000

class Hostile:
  def reset(self, **columns):
    pass

  def innocent(self) -> str:
    '''Answers.'''
    return "here"

  def fork_holds_the_connection(self):
    '''Ends; a fork of it does not.'''
    if os.fork():
      os._exit(3)
    time.sleep(1000)

  def hops(self):
    '''Ends; what it leaves is another process each millisecond.'''
    if os.fork():
      os._exit(3)
    os.setsid()
    for _ in range(10**9):
      if os.fork():
        os._exit(0)

  def siblings(self):
    '''Starts processes whose parent is its own parent, and which hold much together.'''
    for _ in range(12):
      if libc.syscall(ctypes.c_long(FORK), ctypes.c_long(PARENT | signal.SIGCHLD), 0, 0, 0, 0) == 0:
        kept = bytearray(b"x") * (100 << 20)
        time.sleep(1000)
      time.sleep(0.1)
    time.sleep(0.3)
    return "done"
"""
NAMES = ("fork_holds_the_connection", "hops", "siblings")


def attack(folder):
  """Prints, of each tool: its status, its seconds, what was held at most in MB, what is left."""
  path = folder / "tools.py"
  path.write_text(TOOLS)
  found = {}
  limits = {"deadline": DEADLINE, "memory_mb": 512}
  with Episodes(load(f"{path}:Hostile", protocol="text"), **limits) as episodes:
    for name in NAMES:
      most, done = [0], threading.Event()
      episodes.start([{}, {}])
      (server,) = (each.pid for each in episodes._servers.values())

      def look(server=server, most=most, done=done):
        while not done.wait(0.02):
          most.append(sum(map(memory.held, memory.descendants(server))) >> 20)

      looking = threading.Thread(target=look)
      looking.start()
      begun = time.monotonic()
      first = episodes.turn({0: f"call {name}:"})[0]
      seconds = time.monotonic() - begun
      other = episodes.turn({1: "call innocent:"})[1].text
      episodes.finish([0, 1])
      until = time.monotonic() + 10
      while (left := memory.descendants(server)) and time.monotonic() < until:
        time.sleep(0.05)
      done.set()
      looking.join()
      found[name] = {"status": first.status, "seconds": seconds, "other": other}
      found[name] |= {"most": max(most), "left": len(left)}
    found["layers"] = episodes.layers
  print(json.dumps(found))


@pytest.fixture(params=["root", pytest.param("namespaces off", marks=pytest.mark.slow)])
def found(request, tmp_path):
  found = attacked(request.param, tmp_path, "tests.environments.test_orphans")
  if isinstance(found, str):
    pytest.skip(f"{request.param}: {found}")
  assert ("processes" in found["layers"]) == (request.param == "root")
  return found


def test_an_end_is_known_at_once_and_nothing_is_left(found):
  for name in NAMES:
    assert found[name]["other"] == "here" and found[name]["left"] == 0, (name, found)
  for name in NAMES[:2]:
    assert found[name]["status"] == "died" and found[name]["seconds"] < DEADLINE / 2, found
  assert found["siblings"]["most"] < 1000, found["siblings"]


if __name__ == "__main__":
  attack(pathlib.Path(sys.argv[1]))
