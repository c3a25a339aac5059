"""A real Slurm on this machine, for `make test-slurm`: nothing here is a stand-in.

Slurm needs neither root, systemd nor munge: `auth/none` trusts whoever asks, which is right for a
cluster of one machine that nobody else reaches, and for nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl_llm.metrics import read, without_timings
from tests.processes import ROOT, free_port

pytestmark = pytest.mark.skipif(
  not os.environ.get("RL_LLM_SLURM"), reason="needs Slurm's daemons: make test-slurm"
)

STEPS = 150
SWEEP = """
from launch.sweep import fixed, product

EXPERIMENT = "experiments.grpo"


def sweep():
  yield from product(
    fixed({{"checkpoint.every": 5, "eval.every": 1000}}, model="tiny", task="copy", steps={steps},
          prompts_per_step=8, microbatch_prompts=8),
    seed={seeds},
  )
"""
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def wait(what: str, found, *, seconds: float = 600):
  """What `found` gives, once it is anything."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    result = found()
    if result:
      return result
    time.sleep(0.1)
  raise AssertionError(f"after {seconds} s there is no {what}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """The environment in which Slurm's commands speak to a cluster of this machine alone."""
  root = tmp_path_factory.mktemp("slurm")
  for name in ("state", "spool"):
    (root / name).mkdir()
  text = CONFIG.format(
    root=root, host=socket.gethostname().split(".")[0], user=os.environ.get("USER", "root"),
    controller=free_port(), daemon=free_port(),
  )
  (root / "slurm.conf").write_text(text)
  path = f"{os.environ['PATH']}:/usr/sbin"
  environment = os.environ | {
    "SLURM_CONF": str(root / "slurm.conf"),
    "PATH": path,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "GLIBC_TUNABLES": "",
  }
  daemons = []
  for name in ("slurmctld", "slurmd"):
    program = shutil.which(name, path=path)
    assert program, f"{name} is not installed: make test-slurm does it"
    daemons.append(subprocess.Popen([program, "-D"], env=environment, stderr=subprocess.DEVNULL))
  try:
    wait("idle node", lambda: "idle" in slurm(environment, "sinfo", "-h", "-o", "%t"), seconds=60)
    yield environment
  finally:
    slurm(environment, "scancel", "--full", f"--user={os.getuid()}")
    time.sleep(1)
    for daemon in reversed(daemons):
      daemon.terminate()
      daemon.wait(timeout=30)


def slurm(environment, *command) -> str:
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  return done.stdout


def submit(environment, directory: Path, seeds, *flags) -> Path:
  """Submits a sweep by our own command; its directory."""
  directory.mkdir()
  sweep = directory / "mine.py"
  sweep.write_text(SWEEP.format(steps=STEPS, seeds=seeds))
  workdir = directory / "trials"
  done = subprocess.run(
    [sys.executable, "-m", "launch.run", f"--sweep={sweep}", "--backend=slurm",
     f"--workdir={workdir}", "--slurm.cpus_per_task=1", "--slurm.time=30", "--execute", *flags],
    cwd=ROOT, env=environment, capture_output=True, text=True,
  )
  assert done.returncode == 0 and "Submitted batch job" in done.stdout, done.stdout + done.stderr
  return workdir


def trials(workdir: Path) -> dict[int, Path]:
  """The directories of a sweep's trials, by seed."""
  found = sorted(workdir.glob("*/trial.json"))
  return {json.loads(path.read_text())["config"]["seed"]: path.parent for path in found}


def rows(trial: Path) -> list[dict]:
  return list(without_timings(read(trial / "metrics.jsonl")))


def queue(environment) -> list[str]:
  """Of each job that is not over: its number, task and state."""
  return slurm(environment, "squeue", "-h", "-r", "-o", "%A %K %T").splitlines()


def test_an_array_with_a_task_that_is_queued_again(cluster, tmp_path):
  """Task 1 goes back into the queue in the middle. All four end, and it as if nothing had been."""
  workdir = submit(cluster, tmp_path / "array", [0, 1, 2, 3], "--slurm.at_once=2")
  job = next(line.split()[0] for line in queue(cluster) if line.split()[1] == "1")

  def middle():
    record = trials(workdir).get(1, tmp_path) / "metrics.jsonl"
    return record.exists() and len(read(record)) > 10

  wait("task 1 in the middle", middle)
  subprocess.run(["scontrol", "requeue", job], env=cluster, check=True)
  assert not (trials(workdir)[1] / "result.json").exists()
  wait("end of the array", lambda: not queue(cluster), seconds=900)
  found = trials(workdir)
  assert sorted(found) == [0, 1, 2, 3]
  for trial in found.values():
    assert (trial / "result.json").exists(), (trial / "stdout.log").read_text()[-2000:]
    assert len(rows(trial)) == STEPS + 1
  assert "going on from the checkpoint" in (found[1] / "stdout.log").read_text()

  alone = submit(cluster, tmp_path / "alone", [1])
  wait("end of the same trial, left alone", lambda: not queue(cluster))
  assert rows(trials(alone)[1]) == rows(found[1])


def test_two_ranks_of_srun_find_each_other(cluster, tmp_path):
  """Nobody tells them an address: JAX reads Slurm's variables. Each sees both's devices."""
  workdir = submit(cluster, tmp_path / "ranks", [0], "--slurm.tasks_per_node=2")
  wait("end of the job", lambda: not queue(cluster))
  (trial,) = trials(workdir).values()
  log = (trial / "stdout.log").read_text()
  assert (trial / "result.json").exists(), log[-2000:]
  assert len(rows(trial)) == STEPS + 1
  assert "--distributed" in log and "loading tiny on 2 x cpu" in log
