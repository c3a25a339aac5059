"""Leases: who may run a trial, also after crashes, and when many want it at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import state
from launch.sweep import plan

ROOT = Path(__file__).parents[2]

# In each round all children wait for one moment, want the same trial, live until all have tried.
RACE = """
import json, os, sys
from pathlib import Path
from launch import state

for number in range(int(sys.argv[2])):
  directory = Path(sys.argv[1]) / str(number)
  (directory / "leases").mkdir(parents=True)
  if number % 2:  # A dead launcher's.
    (directory / "leases" / "000001").write_text(json.dumps(state.this_process() | {"pid": 2**22}))
  go, start = os.pipe()
  result, tried = os.pipe()
  end, finish = os.pipe()
  pids = []
  for _ in range(8):
    pid = os.fork()
    if not pid:
      os.close(start)
      os.close(finish)
      os.read(go, 1)
      word = b"!"
      try:
        word = b"x" if state.take_lease(directory) else b"."
      finally:
        os.write(tried, word)
        os.read(end, 1)
        os._exit(0)
    pids.append(pid)
  os.close(start)
  found = b""
  while len(found) < 8:
    found += os.read(result, 8)
  os.close(finish)
  for pid in pids:
    os.waitpid(pid, 0)
  for handle in (go, result, tried, end):
    os.close(handle)
  print(found.count(b"x") + 10 * found.count(b"!"))
"""


def lease_of(directory, **changes):
  """A lease that somebody else once took."""
  leases = directory / "leases"
  leases.mkdir(parents=True, exist_ok=True)
  path = leases / f"{len(list(leases.iterdir())) + 1:06d}"
  path.write_text(json.dumps(state.this_process() | changes))
  return path


def test_one_of_many_gets_a_lease_and_takes_over_a_dead_one(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", RACE, str(tmp_path), "40"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout.split() == ["1"] * 40, done.stderr
  assert not list(tmp_path.glob("*/leases/.*")), "temporary files"


def test_a_lease_is_ours_until_it_is_released(tmp_path):
  lease = state.take_lease(tmp_path)
  assert lease is not None and state.holder(lease) == "alive"
  assert state.take_lease(tmp_path) is None
  assert state.renew_lease(lease)
  state.release_lease(lease)
  again = state.take_lease(tmp_path)
  assert again is not None and again != lease
  # We were slow, and another launcher went on: what is lost stays lost.
  assert not state.renew_lease(lease)


@pytest.mark.parametrize(
  ("changes", "age", "expected"),
  [
    ({}, 1e6, "alive"),  # Paused for days, but it is there.
    ({"pid": 2**22}, 0, "nobody"),
    ({"started": 1}, 0, "nobody"),  # Another process has its pid now.
    ({"boot": "another"}, 0, "nobody"),
    ({"host": "another", "boot": "another"}, 0, "unknown"),
    ({"host": "another", "boot": "another"}, state.LEASE + 1, "nobody"),
    ({"namespace": "pid:[1]", "pid": 2**22}, 0, "unknown"),  # Another container's pids.
    ({"namespace": "pid:[1]"}, state.LEASE + 1, "nobody"),
    ({"released": 1.0}, 0, "nobody"),
  ],
)
def test_who_holds_a_lease(tmp_path, changes, age, expected):
  path = lease_of(tmp_path, **changes)
  then = time.time() - age
  os.utime(path, (then, then))
  assert state.holder(path) == expected
  assert (state.take_lease(tmp_path) is not None) == (expected == "nobody")


def test_a_corpse_holds_nothing(tmp_path):
  child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
  started = state._started(child.pid)
  path = lease_of(tmp_path, pid=child.pid, started=started)
  assert state.holder(path) == "alive"
  child.kill()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # Dead, and not yet reaped.
  assert state.holder(path) == "nobody"
  child.communicate()
  assert state.holder(path) == "nobody"


def test_the_last_lease_counts_beyond_any_number_of_digits(tmp_path):
  leases = tmp_path / "leases"
  leases.mkdir()
  for name in ("000002", "999999", "1000000", ".000003x", "junk"):
    (leases / name).write_text("{}")
  assert state.newest_lease(tmp_path).name == "1000000"


def test_only_a_result_of_all_steps_proves_that_a_trial_is_done(tmp_path):
  assert not state.is_done(tmp_path, 4)
  for text, done in (
    ('{"steps": 4}', True),
    ('{"steps": 9}', True),
    ('{"steps": 3}', False),
    ('{"ste', False),
    ("[]", False),
    ('{"accuracy": 1}', True),
  ):
    (tmp_path / "result.json").write_text(text)
    assert state.is_done(tmp_path, 4) is done, text


def test_the_word_for_where_a_trial_stands(tmp_path):
  def word(**status):
    return state.where(tmp_path, 4, status)

  assert word() == "waiting"
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st')
  assert word() == "stopped" and state.last_row(tmp_path) == {"step": 0}
  assert word(status="again", failures=1) == "waiting"
  assert word(status="failed", failures=2) == "failed"
  lease = state.take_lease(tmp_path)
  assert word(status="failed", failures=2) == "running"
  (tmp_path / "result.json").write_text('{"steps": 4}')
  assert word(status="failed", failures=2) == "done"
  state.release_lease(lease)


def test_last_lines_are_of_this_start_redacted_and_bounded(tmp_path):
  log = tmp_path / "stdout.log"
  log.write_text("old\n" * 30)
  begin = log.stat().st_size
  secret = "hf_" + "a" * 24
  with open(log, "a") as file:
    file.write("10%\r100%\n\n" + "x" * 2000 + f"\n--token={secret}\nend\n")
  lines = state.last_lines(log, begin)
  assert lines == ["100%", "x" * 500, "--token=[redacted]", "end"]
  with open(log, "a") as file:
    file.write("line\n" * 100_000)
  assert state.last_lines(log, begin) == ["line"] * state.LINES


def test_what_a_trial_is_stays_on_disk_without_credentials(tmp_path):
  (trial,) = plan("tests.launch.standin", [{"model": "hf_" + "a" * 24}])
  state.describe(trial, " ".join(trial.command(tmp_path)), tmp_path / trial.id)
  assert "aaaa" not in (tmp_path / trial.id / "trial.json").read_text()
