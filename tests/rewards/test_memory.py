"""Memory of graders: of all processes of a call together, and who dies first."""

import os
import subprocess
import sys
import threading
import time

import pytest

from rl_llm.rewards import RewardPool, RewardSource, memory
from tests.processes import PATIENCE

FORKS = """
import ctypes, os, platform, threading, time
libc, kept = ctypes.CDLL(None), []
EXIT = {"x86_64": 60, "aarch64": 93}[platform.machine()]

def hold():
  kept.append(bytearray(100 << 20))
  kept[0][:: 4096] = b"x" * (100 << 8)
  time.sleep(60)

def hold_later():
  time.sleep(0.2)
  hold()

def reward(completions, **columns):
  kind = completions[0]
  for _ in range(40):
    if kind != "idle" and kind != "fine":
      if os.fork() == 0:
        os.setsid()
        if kind == "no first thread":
          threading.Thread(target=hold_later).start()
          libc.syscall(EXIT, 0)
        hold()
      time.sleep(0.15)  # three times as long as the minder sleeps
    if kind == "idle" and os.fork() == 0:
      time.sleep(60)
  time.sleep(2 if kind == "no first thread" else 0.3)
  return [1.0]
"""


def has_lists_of_children():
  return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


@pytest.fixture
def source(tmp_path):
  file = tmp_path / "forks.py"
  file.write_text(FORKS)
  return RewardSource(str(file))


@pytest.mark.parametrize("kind", ["ordinary", "no first thread"])
def test_forks_are_counted_together(source, kind):
  """40 of 100 MB each, where 512 MB are allowed: none is over the limit of its own.

  One whose first thread has ended seems to be a dead process, which holds nothing.
  """
  if not has_lists_of_children():
    pytest.skip("this kernel does not list a process's children")
  most, done = 0, threading.Event()
  limits = {"memory_mb": 512, "deadline": 30.0, "max_failure_rate": 1.0}
  with RewardPool(source, workers=1, **limits) as pool:

    def look():
      nonlocal most
      while not done.wait(0.02):
        most = max(most, sum(map(memory.held, memory.descendants(pool._server.pid))))

    looking = threading.Thread(target=look)
    looking.start()
    try:
      (result,) = pool.score(["p"], [kind], [{}])
      assert result.status == "died" and "memory" in result.detail
      deadline = time.monotonic() + PATIENCE
      while len(memory.descendants(pool._server.pid)) > 2 and time.monotonic() < deadline:
        time.sleep(0.05)
      assert len(memory.descendants(pool._server.pid)) == 2  # the minder and the worker
    finally:
      done.set()
      looking.join()
    assert pool.score(["p"], ["fine"], [{}])[0].value == 1.0
  assert 400 << 20 < most < 1500 << 20


def test_forks_that_hold_nothing_of_their_own_are_not_in_the_way(source):
  """40 copies of an interpreter share almost all they hold."""
  with RewardPool(source, workers=1, memory_mb=512, deadline=30.0, max_failure_rate=1.0) as pool:
    assert pool.score(["p"], ["idle"], [{}])[0].value == 1.0


def test_what_is_held_and_who_has_been_started():
  if not has_lists_of_children():
    pytest.skip("this kernel does not list a process's children")
  hold = "import time; kept = b'x' * (50 << 20); print(1, flush=True); time.sleep(60)"
  nested = f"import subprocess, sys; subprocess.run([sys.executable, '-I', '-S', '-c', {hold!r}])"
  command = [sys.executable, "-I", "-S", "-c", nested]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as outer:
    outer.stdout.readline()
    (inner,) = memory.descendants(outer.pid)
    assert inner in memory.descendants(os.getpid())
    assert 50 << 20 < memory.held(inner) < 80 << 20
    assert memory.held(outer.pid) < 30 << 20
    os.kill(inner, 9)
    outer.kill()
  assert memory.held(outer.pid) == 0 and memory.descendants(outer.pid) == []


def test_graders_die_before_the_trainer(source):
  if not os.access("/proc/self/oom_score_adj", os.W_OK):
    pytest.skip("no oom_score_adj that may be written here")

  def score(process):
    with open(f"/proc/{process}/oom_score_adj") as file:
      return int(file.read())

  with RewardPool(source, workers=1) as pool:
    processes = [pool._server.pid, *memory.descendants(pool._server.pid)]
    assert [score(process) for process in processes] == [1000] * len(processes)
  assert score(os.getpid()) < 1000


SPAWNS = """
import os, sys, time
from rl_llm.rewards import memory, sandbox
sandbox.adopt_orphans()  # as the minder is
worker = os.fork()
if worker == 0:
  sandbox.adopt_orphans()
  for _ in range(200):  # which take a while to look at
    if os.fork() == 0:
      time.sleep(1000)
  if os.fork() == 0:
    kept = bytearray(b"x") * (60 << 20)
    while True:
      if os.fork() == 0:
        del kept
        time.sleep(1000)
      time.sleep(0.001)
  until = time.monotonic() + 60
  while time.monotonic() < until:
    try:
      os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:  # All have been killed.
      break
    time.sleep(0.001)
  os._exit(0)
memory.watch(worker, 40)
left = [each for each in memory.descendants(os.getpid()) if memory.status_of(each)]
print(len(left), flush=True)
for each in left:
  os.kill(each, 9)
"""


def test_what_forks_between_the_look_and_the_kill_is_killed_too():
  """Its forks give back what it held, so they alone are never too much."""
  if not has_lists_of_children():
    pytest.skip("this kernel does not list a process's children")
  command = [sys.executable, "-c", SPAWNS]
  done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
  assert done.stdout == "0\n", done.stderr[-2000:]
