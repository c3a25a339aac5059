"""The array script on a real Slurm, which this file starts and stops: `make test-slurm`.

One machine, as one node that claims more cores than it may have: controller and node daemon run
as whoever runs the tests, without systemd and munge (Debian's packages have auth/none).
"""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import state
from launch.sweep import plan
from rl_llm.runs.metrics import read, without_timings
from tests import processes

pytestmark = pytest.mark.skipif(
  not os.environ.get("RL_LLM_SLURM"), reason="needs Debian's Slurm packages: make test-slurm"
)
STEPS = 60
TRAINING = {
  "model": "tiny",
  "task": "copy",
  "steps": STEPS,
  "prompts_per_step": 8,
  "microbatch_prompts": 8,
  "checkpoint.every": 10,
  "eval.every": 30,
  "eval.problems": 16,
  "eval.samples": 1,
}
FOUR = [TRAINING | {"seed": seed} for seed in range(4)]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
# Who one is, nobody asks; and what was queued again waits for 5 seconds instead of 2 minutes.
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=120
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
  """A Slurm of our own, and what one does with it."""

  def __init__(self, path: Path):
    self.path = path
    for name in ("state", "spool"):
      (path / name).mkdir()
    ports = [processes.free_port(), processes.free_port()]
    user = pwd.getpwuid(os.getuid()).pw_name
    text = CONFIG.format(host=socket.gethostname(), ports=ports, user=user, path=path)
    (path / "slurm.conf").write_text(text)
    names = ("PATH", "HOME", "TMPDIR", "LANG")
    self.environment = {name: os.environ[name] for name in names if name in os.environ} | {
      "SLURM_CONF": str(path / "slurm.conf"),
      "JAX_PLATFORMS": "cpu",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "XDG_CACHE_HOME": str(path / "cache"),
    }
    self.daemons = []

  def start(self):
    for name, *flags in (("slurmctld", "-D"), ("slurmd", "-D", "-N", "localhost")):
      with open(self.path / f"{name}.out", "w") as log:
        self.daemons.append(
          subprocess.Popen([name, *flags], env=self.environment, stdout=log, stderr=log)
        )
    self.wait_for(lambda: "idle" in self("sinfo", "-h", "-o", "%t", check=False), "a node")

  def stop(self):
    self("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
    self.wait_for(lambda: not self("squeue", "-h", check=False), "the jobs to end")
    for daemon in reversed(self.daemons):
      daemon.terminate()
      daemon.wait(timeout=processes.PATIENCE)

  def __call__(self, *command, check=True):
    done = subprocess.run(
      command, env=self.environment, cwd=processes.ROOT, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout

  def wait_for(self, condition, what):
    end = time.monotonic() + processes.PATIENCE
    while not (found := condition()):
      assert time.monotonic() < end and all(d.poll() is None for d in self.daemons), what
      time.sleep(0.2)
    return found

  def submit(self, workdir, spec, *flags):
    """The array job's number."""
    said = self(
      sys.executable,
      "-m",
      "launch.run",
      f"--sweep={spec}",
      f"--workdir={workdir}",
      "--backend=slurm",
      "--execute",
      "--slurm.cpus_per_task=1",
      "--retries=0",
      *flags,
    )
    return int(said.split()[-1])

  def job(self, array, number):
    """The job of one task of an array, by the number that Slurm gave it alone."""
    return self("squeue", "-h", "-r", "-j", f"{array}_{number}", "-o", "%A").strip()

  def queued(self):
    return self("squeue", "-h", "-r").splitlines()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  found = Cluster(tmp_path_factory.mktemp("slurm"))
  try:
    found.start()
    yield found
  finally:
    found.stop()


def write_sweep(path, experiment, trials):
  spec = path / "spec.py"
  spec.write_text(f"EXPERIMENT = {experiment!r}\n\ndef sweep():\n  return {trials!r}\n")
  return spec, [trial.id for trial in plan(experiment, trials)]


def rows(directory):
  path = directory / "metrics.jsonl"
  return read(path) if path.exists() else []


def test_an_array_of_four_one_of_two_ranks_and_one_queued_again(cluster, tmp_path):
  spec, ids = write_sweep(tmp_path, "experiments.grpo", FOUR)
  workdir = tmp_path / "work"
  array = cluster.submit(workdir, spec, f"--only={','.join(ids[:3])}")
  ranks = cluster.submit(workdir, spec, f"--only={ids[3]}", "--slurm.tasks_per_node=2")
  # Both in their middle: the one as an administrator or a preemption does it, the other as the
  # notice before a time limit comes, upon which the script itself asks to be queued again.
  first, second = (workdir / id for id in ids[:2])
  cluster.wait_for(lambda: len(rows(first)) > 3, "the first trial to train")
  cluster("scontrol", "requeue", cluster.job(array, 0))
  cluster.wait_for(lambda: len(rows(second)) > 3, "the second trial to train")
  cluster("scancel", "--signal=TERM", cluster.job(array, 1))
  cluster.wait_for(lambda: not cluster.queued(), "the queue to be empty")

  logs = {id: (workdir / id / "stdout.log").read_text() for id in ids}
  for id in ids:
    assert state.is_done(workdir / id, STEPS), logs[id]
  for id in ids[:2]:
    assert "saved at step" in logs[id] and "resuming from the checkpoint at step" in logs[id]
  for id in ids[2:]:
    assert "resuming" not in logs[id]
  assert "on 2 x " in logs[ids[3]], "two ranks found each other"
  assert all("on 1 x " in logs[id] for id in ids[:3])
  for job, name in ((array, "0"), (array, "1"), (array, "2"), (ranks, "0")):
    assert "1 done" in (workdir / f"slurm-{job}_{name}.log").read_text()

  straight = tmp_path / "straight"
  trial = plan("experiments.grpo", FOUR)[0]
  done = subprocess.run(
    trial.command(straight),
    cwd=processes.ROOT,
    env=cluster.environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  whole = without_timings(read(straight / trial.id / "metrics.jsonl"))
  assert [row["step"] for row in whole] == list(range(STEPS + 1))
  assert without_timings(rows(first)) == whole


def counted(directory):
  return (directory / "metrics.jsonl").exists() and len(rows(directory)) > 1


def test_a_cancelled_job_saves_and_does_not_come_back(cluster, tmp_path):
  spec, [id] = write_sweep(
    tmp_path,
    "tests.launch.standin",
    [{"steps": 100_000, "seconds": 0.05, "journal": str(tmp_path / "journal")}],
  )
  array = cluster.submit(tmp_path / "work", spec)
  cluster.wait_for(lambda: counted(tmp_path / "work" / id), "it to count")
  cluster("scancel", str(array))
  cluster.wait_for(lambda: not cluster.queued(), "the queue to be empty")
  events = [line.split()[2] for line in (tmp_path / "journal").read_text().splitlines()]
  assert events[-1] == "stopped" and events.count("begin") == 1
  assert state.read_json(tmp_path / "work" / id / "status.json")["status"] == "stopped"


def test_several_trials_in_a_job_are_asked_by_their_launcher(cluster, tmp_path):
  spec, ids = write_sweep(
    tmp_path,
    "tests.launch.standin",
    [
      {"steps": 200, "seconds": 0.05, "journal": str(tmp_path / "journal"), "seed": seed}
      for seed in range(2)
    ],
  )
  array = cluster.submit(tmp_path / "work", spec, "--slurm.pack=2")
  directories = [tmp_path / "work" / id for id in ids]
  cluster.wait_for(lambda: all(map(counted, directories)), "both to count")
  cluster("scancel", f"--signal={signal.SIGINT.value}", str(array))  # As the notice has it.
  cluster.wait_for(lambda: not cluster.queued(), "the queue to be empty")
  events = [line.split() for line in (tmp_path / "journal").read_text().splitlines()]
  for id in ids:
    mine = [event for name, _, event, *_ in events if name == id]
    assert mine.count("begin") == 2 and mine.count("stopped") == 1 and mine[-1] == "done"
    assert mine.count("step") == 200, "nothing was counted twice"


def test_a_trial_over_its_time_limit_saves_first(cluster, tmp_path):
  spec, [id] = write_sweep(
    tmp_path,
    "tests.launch.standin",
    [{"steps": 100_000, "seconds": 0.05, "journal": str(tmp_path / "journal")}],
  )
  cluster.submit(tmp_path / "work", spec, "--time_limit=30")
  cluster.wait_for(lambda: not cluster.queued(), "the queue to be empty")
  events = [line.split()[2] for line in (tmp_path / "journal").read_text().splitlines()]
  status = json.loads((tmp_path / "work" / id / "status.json").read_text())
  assert status["reason"] == "over its time limit of 30s" and status["failures"] == 1
  assert events[-1] == "stopped"
