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
import mmap, os, time
kept = []

def reward(completions, **columns):
  kind = completions[0]
  for _ in range(40):
    if kind in ("private", "shared"):
      if os.fork() == 0:
        os.setsid()
        size = 100 << 20
        kept.append(bytearray(size) if kind == "private" else mmap.mmap(-1, size))
        kept[0][:: 4096] = b"x" * (size // 4096)
        time.sleep(60)
      time.sleep(0.05)
    if kind == "idle" and os.fork() == 0:
      time.sleep(60)
  time.sleep(0.3)
  return [1.0]
"""


def has_lists_of_children():
  return os.path.exists(f"/proc/self/task/{os.getpid()}/children")


@pytest.fixture
def source(tmp_path):
  file = tmp_path / "forks.py"
  file.write_text(FORKS)
  return RewardSource(str(file))


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_forks_are_counted_together(source, kind):
  """40 of 100 MB each, where 512 MB are allowed: none is over the limit of its own."""
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
