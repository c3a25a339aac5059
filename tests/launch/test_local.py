"""The launcher against everything that kills it and its trials: each trial is done exactly once."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import state
from launch.backends import local, slots
from launch.progress import Progress
from launch.sweep import Trial
from rl_llm.errors import ConfigError

ROOT = Path(__file__).parents[2]
FULL = bool(os.environ.get("RL_LLM_FULL"))  # `make test-full`
PATIENCE = 300  # seconds; a machine that is busy is not a failing test


class Sweep:
  """A sweep of the stand-in in a directory of its own."""

  def __init__(self, path, *factors, experiment="tests.launch.standin", **shared):
    self.path, self.workdir, self.journal = path, path / "work", path / "journal"
    path.mkdir(exist_ok=True)
    if experiment == "tests.launch.standin":
      shared["journal"] = str(self.journal)
    (path / "spec.py").write_text(
      "from launch.sweep import fixed, product\n"
      f"EXPERIMENT = {experiment!r}\n"
      f"def sweep():\n  return product(fixed({shared!r}), *{factors!r})\n"
    )

  def start(self, *flags):
    command = [
      sys.executable,
      "-m",
      "launch.run",
      f"--sweep={self.path / 'spec.py'}",
      f"--workdir={self.workdir}",
      *flags,
    ]
    with open(self.path / "output", "a") as log:
      return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

  def run(self, *flags):
    """Exit code and output of a launcher that may run to its end."""
    before = len(self.output())
    code = self.start(*flags).wait(timeout=PATIENCE)
    return code, self.output()[before:]

  def output(self):
    path = self.path / "output"
    return path.read_text() if path.exists() else ""

  def events(self):
    """Lines of the journal by trial: (pid, event, number or None)."""
    found = defaultdict(list)
    for line in self.journal.read_text().splitlines() if self.journal.exists() else ():
      trial, pid, event, *number = line.split(" ", 3)
      found[trial].append((int(pid), event, int(number[0]) if event in ("begin", "step") else None))
    return found

  def lines(self):
    return self.journal.read_text().count("\n") if self.journal.exists() else 0

  def status(self):
    """id -> status.json."""
    return {path.parent.name: state.read_json(path) for path in self.workdir.glob("*/status.json")}

  def table(self):
    """report.csv."""
    done = subprocess.run(
      [sys.executable, "-m", "launch.report", str(self.workdir)],
      cwd=ROOT,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    with open(self.workdir / "report.csv") as file:
      return list(csv.DictReader(file))


def wait_for(condition, what):
  end = time.monotonic() + PATIENCE
  while not condition():
    assert time.monotonic() < end, what
    time.sleep(0.01)


def check_done_once(sweep, count, steps):
  """Every trial went from 0 to its last step, by processes that never met, and not once more."""
  events = sweep.events()
  assert len(events) == count
  for trial, lines in events.items():
    processes = [pid for pid, _ in itertools.groupby(lines, key=lambda line: line[0])]
    assert len(set(processes)) == len(processes), f"{trial}: two processes at once"
    reached = 0
    for _, event, number in lines:
      assert event != "finished before", f"{trial} was started though it was done"
      if event == "begin":
        # A kill between a step's line and its checkpoint: that step is done again.
        assert number in (reached, reached - 1)
        reached = number
      elif event == "step":
        assert number == reached
        reached += 1
    assert reached == steps
    assert sum(event == "done" for _, event, _ in lines) <= 1
    rows = (sweep.workdir / trial / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(steps))
    assert state.is_done(sweep.workdir / trial, steps)


@pytest.mark.slow
def test_a_launcher_killed_again_and_again_does_each_trial_exactly_once(tmp_path, record_property):
  count, kills = (24, 10) if FULL else (8, 5)
  sweep = Sweep(
    tmp_path,
    {"seed": range(count // 4)},
    {"optimizer.learning_rate": [0.1, 0.2, 0.3, 0.4]},
    steps=5,
    seconds=0.02,
  )
  draws = random.Random(0)
  for _ in range(kills):
    launcher = sweep.start("--parallel=3")
    goal = sweep.lines() + draws.randint(1, 7)
    wait_for(lambda goal=goal: sweep.lines() >= goal, "progress")  # noqa: B023
    assert launcher.poll() is None
    launcher.kill()
    launcher.wait()
  code, output = sweep.run("--parallel=3")
  assert code == 0, output
  check_done_once(sweep, count, 5)
  rows = sweep.table()
  assert len(rows) == len({row["trial"] for row in rows}) == count
  assert {row["status"] for row in rows} == {"done"}
  lines = sweep.lines()
  assert sweep.run("--parallel=3")[0] == 0 and sweep.lines() == lines, "done is done"
  record_property("F36", kills)


@pytest.mark.slow
def test_two_launchers_at_once_never_run_a_trial_twice(tmp_path, record_property):
  """Until they have met in three sweeps, and in the long trials in all twenty."""
  both = 0
  for number in range(20):
    if both >= 3 and not FULL:
      return
    sweep = Sweep(tmp_path / str(number), {"seed": range(3)}, steps=1)
    launchers = [sweep.start("--parallel=2") for _ in range(2)]
    assert [launcher.wait(timeout=PATIENCE) for launcher in launchers] == [0, 0], sweep.output()
    check_done_once(sweep, 3, 1)
    for trial, lines in sweep.events().items():
      assert [event for _, event, _ in lines] == ["begin", "step", "done"], trial
    holders = {
      json.loads(path.read_text())["pid"] for path in sweep.workdir.glob("*/leases/000001")
    }
    both += len(holders) == 2
    record_property("F37", 1)
  assert both >= 5, "the two hardly ever met, so that nothing was tested"


def by_fault(sweep):
  """fault -> the trial's directory."""
  return {
    json.loads(path.read_text())["settings"]["fault"]: path.parent
    for path in sweep.workdir.glob("*/trial.json")
  }


def begins(sweep, directory):
  """The steps from which a trial's starts went on."""
  return [number for _, event, number in sweep.events()[directory.name] if event == "begin"]


@pytest.mark.slow
def test_what_fails_is_tried_again_and_then_told_with_its_last_lines(tmp_path):
  reasons = {
    "raise": ("exit code 1", "RuntimeError: the loss is the wrong way round"),
    "killed": ("killed by SIGKILL (out of memory?)", "about to killed"),
    "settings": ("exit code 2", "error: --seed=0: must be another"),
  }
  sweep = Sweep(tmp_path, {"fault": ["none", *reasons]}, steps=3)
  flags = ("--parallel=4", "--retries=1", "--backoff=0.1")
  code, output = sweep.run(*flags)
  assert code == 1
  trials = by_fault(sweep)
  for fault, (reason, last) in reasons.items():
    status = state.read_json(trials[fault] / "status.json")
    assert (status["status"], status["failures"], status["reason"]) == ("failed", 2, reason)
    assert any(last in line for line in status["lines"]) and len(status["lines"]) <= 20
    assert last in output
    assert begins(sweep, trials[fault]) == [0, 1], "the second try resumes from the checkpoint"
  assert state.is_done(trials["none"], 3)
  table = {row["trial"]: row for row in sweep.table()}
  assert table[trials["raise"].name]["status"] == "failed"
  assert "the loss is the wrong way round" in table[trials["raise"].name]["error"]
  assert table[trials["none"].name]["status"] == "done"

  lines = sweep.lines()
  code, output = sweep.run(*flags)
  assert code == 1 and sweep.lines() == lines, "the retries are used up"
  assert "a larger --retries tries again" in output


@pytest.mark.slow
def test_what_hangs_is_ended_also_if_it_ignores_being_asked(tmp_path):
  for limit in (3, 20, 120):  # A busy machine takes longer to come to the point at which it hangs.
    sweep = Sweep(tmp_path / str(limit), {"fault": ["hang", "deaf"]}, steps=3)
    code, output = sweep.run(
      "--parallel=2", "--retries=1", "--backoff=0.1", "--grace=1", f"--time_limit={limit}"
    )
    assert code == 1
    trials = by_fault(sweep)
    if all(begins(sweep, directory) == [0, 1] for directory in trials.values()):
      break
  for fault, directory in trials.items():
    assert begins(sweep, directory) == [0, 1]
    status = state.read_json(directory / "status.json")
    assert status["reason"] == f"over its time limit of {limit}s" and status["failures"] == 2
    assert f"about to {fault}" in output


@pytest.mark.slow
def test_what_fails_once_gets_done(tmp_path):
  sweep = Sweep(tmp_path, {"fault": ["raise", "killed"]}, steps=3, faults=1)
  code, output = sweep.run("--backoff=0.1", "--parallel=2")
  assert code == 0 and output.count("next try in") == 2
  check_done_once(sweep, 2, 3)
  assert all(status["failures"] == 0 for status in sweep.status().values())


@pytest.mark.slow
def test_a_failure_is_remembered_by_the_next_launcher(tmp_path):
  sweep = Sweep(tmp_path, {"fault": ["raise"]}, steps=3)
  assert sweep.run("--retries=0", "--backoff=0.1")[0] == 1
  ((trial, status),) = sweep.status().items()
  assert status["failures"] == 1
  assert sweep.run("--retries=1", "--backoff=0")[0] == 1
  assert sweep.status()[trial]["failures"] == 2
  assert [event for _, event, _ in sweep.events()[trial]].count("begin") == 2


def at_the_gate(sweep):
  """How many trials have taken the two steps before it: they stay there."""
  return sum(lines[-1][1:] == ("step", 1) for lines in sweep.events().values())


@pytest.mark.slow
def test_ctrl_c_lets_trials_save_and_the_same_command_goes_on(tmp_path):
  gate = tmp_path / "gate"
  sweep = Sweep(tmp_path, {"seed": [0, 1]}, steps=6, gate=str(gate))
  launcher = sweep.start("--parallel=2")
  wait_for(lambda: at_the_gate(sweep) == 2, "two trials under way")
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(timeout=PATIENCE) == 130
  assert "the same command resumes" in sweep.output()
  assert [lines[-1][1] for lines in sweep.events().values()] == ["stopped"] * 2
  assert {status["status"] for status in sweep.status().values()} == {"stopped"}
  assert not any(status.get("failures") for status in sweep.status().values())
  gate.touch()
  code, _ = sweep.run("--parallel=2")
  assert code == 0
  check_done_once(sweep, 2, 6)


@pytest.mark.slow
def test_a_trial_dies_with_its_launcher(tmp_path):
  sweep = Sweep(tmp_path, {"seed": [0]}, steps=10_000, seconds=0.01)
  launcher = sweep.start()
  wait_for(lambda: sweep.lines() > 3, "a trial under way")
  ((pid, _, _),) = {line[:1] + ("", "") for lines in sweep.events().values() for line in lines}
  assert state._started(pid) is not None
  launcher.kill()
  launcher.wait()
  wait_for(lambda: state._started(pid) is None, "the trial to die")


@pytest.mark.slow
def test_a_trial_stopped_from_outside_has_not_failed_and_is_left_alone(tmp_path):
  sweep = Sweep(tmp_path, {"seed": [0]}, gate=str(tmp_path / "gate"))
  launcher = sweep.start()
  wait_for(lambda: at_the_gate(sweep) == 1, "a trial under way")
  os.kill(next(iter(sweep.events().values()))[0][0], signal.SIGTERM)
  assert launcher.wait(timeout=PATIENCE) == 143
  ((_, status),) = sweep.status().items()
  assert status["status"] == "stopped" and not status.get("failures")


@pytest.mark.slow
def test_a_directory_in_which_somebody_trains_is_waited_for(tmp_path):
  gate = tmp_path / "gate"
  sweep = Sweep(tmp_path, {"seed": [0]}, gate=str(gate))
  code, output = sweep.run("--dry_run")
  assert code == 0
  by_hand = subprocess.Popen(output.splitlines()[-1], shell=True, cwd=ROOT)
  wait_for(lambda: at_the_gate(sweep) == 1, "a trial under way")
  launcher = sweep.start()
  wait_for(lambda: [*sweep.workdir.glob("*/leases/*")], "the launcher to have tried")
  gate.touch()
  assert (launcher.wait(timeout=PATIENCE), by_hand.wait()) == (0, 0)
  check_done_once(sweep, 1, 4)


def test_a_dry_run_writes_nothing(tmp_path):
  sweep = Sweep(tmp_path, {"seed": [0, 1]})
  code, output = sweep.run("--dry_run")
  assert code == 0 and not sweep.workdir.exists()
  comments = [line for line in output.splitlines() if line.startswith("# ")]
  assert len(comments) == 3 and comments[1].endswith("(waiting): seed=0")


WRONG_FLAGS = [
  (["--swep=x"], "unknown flag --swep; did you mean --sweep?"),
  (["--only=abc"], "--only=abc: must be an id of"),
  (["--processes=2"], "--processes=2: must be 1: tests.launch.standin has no --distributed"),
  (["--devices_per_trial=3", "--devices=0,1"], "--devices_per_trial=3: must be at most 2"),
  (["--backend=tpu", "--tpu.name=a", "--tpu.zone=b", "--tpu.type=v7x-8"], "--backend=gke"),
  (["--backend=gke"], "--gke.cluster=: must be given"),
  (["--backend=slurm", "--parallel=2"], "--parallel=2: must be left out with --backend=slurm"),
  (["--execute"], "--execute=True: must be left out with --backend=local"),
]
# The launcher with each command line in turn, in forks of one process that has paid for imports:
# the launcher's, and those of the experiment that each reads.
FORKS = """
import gc, json, os, sys
from launch import run
import tests.launch.standin
gc.disable()  # A collection would copy all of the parent's memory, in each of them.
for flags in json.load(sys.stdin):
  child = os.fork()
  if not child:
    run.run(run.main, run.Config, argv=["launch.run", *flags])
  print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_wrong_flag_or_key_of_a_sweep_costs_one_line(tmp_path):
  sweep = Sweep(tmp_path / "flags", {"seed": [0]})
  wrong = Sweep(tmp_path / "key", {"optimizer.learningrate": [0.1]})
  common = [f"--sweep={sweep.path / 'spec.py'}", f"--workdir={sweep.workdir}"]
  lines = [(common + flags, says) for flags, says in WRONG_FLAGS]
  key = [f"--sweep={wrong.path / 'spec.py'}", f"--workdir={wrong.workdir}"]
  lines.append((key, "did you mean optimizer.learning_rate?"))
  done = subprocess.run(
    [sys.executable, "-c", FORKS],
    cwd=ROOT,
    input=json.dumps([flags for flags, _ in lines]),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  *said, end = done.stdout.split("exit 2\n")
  assert end == "" and len(said) == len(lines), done.stdout
  for (flags, says), output in zip(lines, said, strict=True):
    assert output.startswith("error: ") and output.count("\n") == 1 and says in output, flags


# --- slots ---------------------------------------------------------------------------------------


def environments(*args, **kwargs):
  return [slot.environment for slot in slots.share_out(*args, **kwargs)]


def test_devices_are_shared_out():
  key = "CUDA_VISIBLE_DEVICES"
  assert environments((), devices_per_trial=1, parallel=2) == [{}, {}]
  assert environments(("0", "1"), devices_per_trial=1, parallel=1) == [{key: "0"}, {key: "1"}]
  assert environments(("3", "5", "7"), devices_per_trial=2, parallel=1) == [{key: "3,5"}]
  packed = environments(("0",), devices_per_trial=1, parallel=3)
  assert packed == [{key: "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300"}] * 3
  with pytest.raises(ConfigError, match="at most 1, the number of GPUs"):
    slots.share_out(("0",), devices_per_trial=2, parallel=1)


def test_devices_are_found_without_a_library(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  assert slots.find_devices() == ("2", "3")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert slots.find_devices() == ()


# --- the same on a model -------------------------------------------------------------------------


@pytest.mark.skipif(not FULL, reason="about half an hour; RL_LLM_FULL=1")
@pytest.mark.slow
def test_twelve_real_trials_and_ten_kills(tmp_path):
  sweep = Sweep(
    tmp_path,
    {"seed": [0, 1]},
    {"optimizer.learning_rate": [1e-3, 3e-3, 1e-2]},
    {"loss.clip_high": [0.2, 0.3]},
    experiment="experiments.grpo",
    model="tiny",
    task="copy",
    epochs=2,
    steps=24,
    prompts_per_step=16,
    microbatch_prompts=16,
    **{"checkpoint.every": 4, "eval.every": 12, "eval.samples": 1},
  )
  flags = ("--parallel=2",)

  def rows():
    return sum(path.read_bytes().count(b"\n") for path in sweep.workdir.glob("*/metrics.jsonl"))

  straight = Sweep(
    tmp_path / "straight",
    {"seed": [0]},
    {"optimizer.learning_rate": [1e-3]},
    {"loss.clip_high": [0.2]},
    experiment="experiments.grpo",
    model="tiny",
    task="copy",
    epochs=2,
    steps=24,
    prompts_per_step=16,
    microbatch_prompts=16,
    **{"checkpoint.every": 4, "eval.every": 12, "eval.samples": 1},
  )
  draws = random.Random(0)
  for _ in range(10):
    launcher = sweep.start(*flags)
    goal = rows() + draws.randint(1, 16)
    wait_for(
      lambda goal=goal, launcher=launcher: rows() >= goal or launcher.poll() is not None, "progress"
    )
    assert launcher.poll() is None, sweep.output()
    launcher.kill()
    launcher.wait()
  assert sweep.start(*flags).wait(timeout=3600) == 0, sweep.output()
  assert straight.start(*flags).wait(timeout=3600) == 0
  table = sweep.table()
  assert len(table) == len({row["trial"] for row in table}) == 12
  assert {row["status"] for row in table} == {"done"}
  for path in sweep.workdir.glob("*/metrics.jsonl"):
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(25))
  # Killed or not, it is the same run.
  (path,) = straight.workdir.glob("*/result.json")
  twin = state.read_json(sweep.workdir / path.parent.name / "result.json")
  assert twin["after"] == state.read_json(path)["after"]


@pytest.mark.slow
def test_a_trial_whose_directory_is_deleted_ends_alone(tmp_path):
  gate = tmp_path / "gate"
  sweep = Sweep(tmp_path, {"seed": range(3)}, steps=6, gate=str(gate))
  launcher = sweep.start("--parallel=3", "--retries=2")
  wait_for(lambda: at_the_gate(sweep) == 3, "three trials that run")
  gone = next(sweep.workdir.glob("*/metrics.jsonl")).parent
  shutil.rmtree(gone)
  gate.touch()
  assert launcher.wait(timeout=PATIENCE) == 1
  others = [p.name for p in sweep.workdir.glob("*") if (p / "trial.json").exists()]
  assert sorted(sweep.status()) == sorted(others) and gone.name not in others
  assert all(state.is_done(sweep.workdir / name, 6) for name in others) and len(others) == 2
  said = [line for line in sweep.output().splitlines() if line.startswith(f"{gone.name} failed")]
  assert len(said) == 1 and "its directory was deleted while it ran" in said[0]
  assert sweep.run("--parallel=3")[0] == 0, "the same command begins it anew"
  assert state.is_done(gone, 6)


def test_a_trial_whose_leases_are_deleted_is_tried_again(tmp_path, monkeypatch):
  """Nobody can tell any more whether another launcher has it, so it ends, and begins once more."""
  monkeypatch.setattr(state, "HEARTBEAT", 0.0)
  trial = Trial("one", "x", {}, {}, [], steps=1)
  directory = tmp_path / trial.id
  directory.mkdir()
  begun = []

  def commands(trial, slot):
    begun.append(time.monotonic())
    if len(begun) > 1:
      return [["sh", "-c", f"echo '{{\"steps\": 1}}' > {directory}/result.json"]]
    return [["sleep", "60"]]

  class Deletes(Progress):
    def started(self, start):
      if len(begun) == 1:
        shutil.rmtree(directory / "leases")

  verdicts = local.drive(
    [trial],
    tmp_path,
    slots=[slots.Slot("cpu", {})],
    commands=commands,
    limits=local.Limits(retries=1, backoff=0.5, time_limit=0, grace=5),
    progress=Deletes({trial.id: "it"}, stream=io.StringIO()),
  )
  assert verdicts == {trial.id: "done"} and begun[1] - begun[0] >= 0.5
  assert state.read_status(directory)["seconds"] < 60


@pytest.mark.slow
def test_a_status_that_somebody_wrote_is_read_for_what_it_is_worth(tmp_path):
  sweep = Sweep(tmp_path, {"seed": [0]}, steps=2)
  assert sweep.run()[0] == 0
  (path,) = sweep.workdir.glob("*/status.json")
  (path.parent / "result.json").unlink()
  for odd in ('{"failures": "many", "next_try": "soon", "seconds": "long", "wait": []}', '"done"'):
    path.write_text(odd)
    (path.parent / "result.json").unlink(missing_ok=True)
    code, output = sweep.run()
    assert code == 0 and "Traceback" not in output, output


@given(failed=st.floats(0, 1e10), wait=st.floats(0, 3600), moved=st.floats(-1e6, 1e6))
def test_no_clock_makes_a_wait_longer_than_it_was(failed, wait, moved):
  status = {"failures": 1, "ended": failed, "next_try": failed + wait, "wait": wait}
  left = state.wait_left(status, failed + moved)
  assert 0 <= left <= wait
  if failed + moved < failed:
    assert left == 0


@pytest.mark.slow
def test_a_trial_that_is_retried_with_changed_code_does_not_resume_unasked(tmp_path, monkeypatch):
  """As a run that is started by hand: refused in one line, and resumed once the code is back."""
  code = (ROOT / "tests" / "launch" / "standin.py").read_text()
  (tmp_path / "counts.py").write_text(code)
  monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
  shared = {"journal": str(tmp_path / "journal"), "fault": "killed", "faults": 1}
  sweep = Sweep(tmp_path, experiment="counts", **shared)
  assert sweep.run("--retries=0", "--backoff=0.1")[0] == 1
  (trial,) = sweep.status()
  assert [event for _, event, _ in sweep.events()[trial]] == ["begin", "step"]
  changed = code.replace("learning_rate * step + 0.01", "learning_rate * step + 0.02")
  assert changed != code
  (tmp_path / "counts.py").write_text(changed)
  assert sweep.run("--retries=1", "--backoff=0.1")[0] == 1
  assert any("--code=" in line for line in sweep.status()[trial]["lines"])
  assert [event for _, event, _ in sweep.events()[trial]] == ["begin", "step"], "it did not resume"
  (tmp_path / "counts.py").write_text("# Comments do not count.\n" + code)
  assert sweep.run("--retries=2", "--backoff=0.1")[0] == 0
  numbers = [number for _, event, number in sweep.events()[trial] if event == "step"]
  assert numbers == [0, 1, 2, 3]
