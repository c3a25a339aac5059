"""The command lines of clusters, word for word: none of them can be run here."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import run
from launch.backends import gke, local, slurm, tpu
from launch.sweep import plan
from rl_llm.config import ConfigError, replace

ROOT = Path(__file__).parents[2]
WORKDIR = Path("/shared/rates")
SWEEP = "sweeps/Learning_Rates.py"


def make(**changes):
  groups = {key.replace("__", "."): value for key, value in changes.items()}
  return replace(run.Config(), {"sweep": SWEEP} | groups)


@pytest.fixture(scope="module")
def trials():
  return plan("tests.launch.standin", [{"seed": seed, "model": "it's"} for seed in range(3)])


def test_a_job_array(trials):
  config = make(
    backend="slurm", slurm__partition="gpu", slurm__nodes=2, slurm__tasks_per_node=8,
    slurm__gpus_per_task=1, slurm__at_once=4, slurm__setup="module load cuda", time_limit=3600,
  )
  a, b, c = (trial.id for trial in trials)
  assert "\n".join(slurm.lines(config, WORKDIR, trials, "/venv/bin/python")) == f"""#!/bin/bash
#SBATCH --job-name=Learning_Rates
#SBATCH --array=0-2%4
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --output=/shared/rates/slurm-%a.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
#SBATCH --requeue
cd {shlex.quote(os.getcwd())} || exit 2
module load cuda
trials=({a} {b} {c})
/venv/bin/python -m launch.run --sweep=/shared/rates/sweep.py --workdir=/shared/rates \
--retries=2 --backoff=10.0 --time_limit=3600.0 --grace=60.0 \
--prefix=srun --only="${{trials[$SLURM_ARRAY_TASK_ID]}}"
code=$?
if [ "$code" = 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code\""""


def test_several_trials_share_a_job(trials):
  script = slurm.lines(make(backend="slurm", slurm__pack=2), WORKDIR, trials, "python")
  a, b, c = (trial.id for trial in trials)
  assert f"trials=({a},{b} {c})" in script and "#SBATCH --array=0-1" in script
  assert any("--parallel=2 --devices_per_trial=1 --only" in line for line in script)
  assert not any("srun" in line for line in script)
  with pytest.raises(ConfigError, match="--slurm.pack=2: must be 1 where a trial has several"):
    slurm.lines(
      make(backend="slurm", slurm__pack=2, slurm__nodes=2), WORKDIR, trials, "python"
    )


def test_the_array_script_runs_its_trials_and_queues_again_what_was_stopped(tmp_path):
  """With a fake srun, and a fake scontrol that says what it was asked."""
  tools = tmp_path / "bin"
  tools.mkdir()
  for name, body in (("srun", 'exec "$@"'), ("scontrol", f'echo "$@" >> {tmp_path}/asked')):
    (tools / name).write_text(f"#!/bin/sh\n{body}\n")
    (tools / name).chmod(0o755 | stat.S_IEXEC)
  spec = tmp_path / "spec.py"
  spec.write_text(
    'EXPERIMENT = "tests.launch.standin"\n'
    f"def sweep():\n  return [dict(seed=s, journal='{tmp_path}/journal') for s in range(2)]\n"
  )
  workdir = tmp_path / "work"
  common = [sys.executable, "-m", "launch.run", f"--sweep={spec}", f"--workdir={workdir}"]
  script = subprocess.run([*common, "--backend=slurm"], cwd=ROOT, capture_output=True, text=True)
  assert script.returncode == 0 and not workdir.exists()
  (tools / "sbatch").write_text('#!/bin/sh\nSLURM_ARRAY_TASK_ID=1 exec bash "$1"\n')
  (tools / "sbatch").chmod(0o755)
  environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
  done = subprocess.run(
    [*common, "--backend=slurm", "--execute"], cwd=ROOT, env=environment, capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  second = plan("tests.launch.standin", [{"seed": 1}])[0].id
  assert [path.parent.name for path in workdir.glob("*/result.json")] == [second]
  assert (workdir / "slurm.sh").read_text() == script.stdout
  assert not (tmp_path / "asked").exists()

  (tools / "srun").write_text("#!/bin/sh\nexit 143\n")  # Stopped a minute before the limit.
  code = subprocess.run(["bash", str(workdir / "slurm.sh")], cwd=ROOT, capture_output=True,
                        env=environment | {"SLURM_ARRAY_TASK_ID": "0"}).returncode
  assert code == 143 and (tmp_path / "asked").read_text() == "requeue 7\n"


def test_tpu_slices(trials):
  config = make(
    backend="tpu", tpu__name="sweep", tpu__slices=2, tpu__type="v6e-16", tpu__zone="us-east5-b",
    tpu__project="p",
  )
  text = tpu.lines(config, WORKDIR, trials, "python3")
  end = "--zone=us-east5-b --project=p"
  assert [line for line in text if "create" in line] == [
    f"gcloud compute tpus queued-resources create sweep-{i} --node-id=sweep-{i} "
    f"--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot {end}" for i in range(2)
  ]
  runs = [line for line in text if "tests.launch.standin" in line]
  assert runs[1] == (
    f"gcloud compute tpus tpu-vm ssh sweep-1 {end} --worker=all "
    + shlex.quote(
      "--command=cd rl_llm && exec python3 -m tests.launch.standin --seed=1 "
      f"""'--model=it'"'"'s' --workdir=/shared/rates/{trials[1].id}"""
    )
  )
  assert [shlex.split(line)[5] for line in runs] == ["sweep-0", "sweep-1", "sweep-0"]
  assert sum("delete" in line for line in text) == 2
  # What --execute drives: a slot per slice, the same command in each.
  slots, commands = tpu.places(config, WORKDIR, "python3")
  assert [slot.name for slot in slots] == ["sweep-0", "sweep-1"]
  assert commands(trials[1], slots[1]) == [shlex.split(runs[1])]


def test_slices_are_driven_from_here(tmp_path):
  """With a fake gcloud that runs what it is given, and notes on which slice."""
  tools = tmp_path / "bin"
  tools.mkdir()
  (tools / "gcloud").write_text(
    f'#!/bin/sh\necho "$5" >> {tmp_path}/slices\n'
    'for last; do :; done\nexec sh -c "${last#--command=}"\n'
  )
  (tools / "gcloud").chmod(0o755)
  spec, workdir = tmp_path / "spec.py", tmp_path / "work"
  spec.write_text(
    'EXPERIMENT = "tests.launch.standin"\n'
    f"def sweep():\n  return [dict(seed=s, journal='{tmp_path}/journal') for s in range(3)]\n"
  )
  done = subprocess.run(
    [sys.executable, "-m", "launch.run", f"--sweep={spec}", f"--workdir={workdir}", "--execute",
     "--backend=tpu", "--tpu.name=s", "--tpu.zone=z", "--tpu.slices=2", f"--tpu.directory={ROOT}",
     f"--python={sys.executable}"],
    cwd=ROOT, env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}, capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(list(workdir.glob("*/result.json"))) == 3
  slices = (tmp_path / "slices").read_text().split()
  assert len(slices) == 3 and set(slices) == {"s-0", "s-1"}


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"tpu__zone": ""}, "--tpu.zone=: must be given"),
    ({"tpu__type": "v7x-8"}, "one of v4-N, v5litepod-N, v5p-N, v6e-N; TPU7x has no TPU VMs"),
    ({"tpu__type": "v6e"}, "--tpu.type=v6e: must be one of"),
  ],
)
def test_what_a_tpu_cannot_do(trials, changes, says):
  config = make(backend="tpu", **{"tpu__name": "a", "tpu__zone": "z"} | changes)
  with pytest.raises(ConfigError, match=says):
    tpu.lines(config, WORKDIR, trials, "python3")
  with pytest.raises(ConfigError, match="absolute path that all hosts see"):
    tpu.lines(make(tpu__name="a", tpu__zone="z"), Path("runs/x"), trials, "python3")


def test_gke_jobs(trials):
  config = make(
    backend="gke", gke__cluster="c", gke__location="us-east5", gke__image="image:1",
    gke__compute_type="v6e-16", gke__slices=2, gke__extra="--mount 'a b'",
  )
  text = gke.lines(config, WORKDIR, trials, "python3")
  assert text[0] == (
    f"gcluster job submit --name=learning-rates-{trials[0].id} --cluster=c --location=us-east5 "
    "--image=image:1 --compute-type=v6e-16 --num-slices=2 --restarts=2 --grace-period=60s "
    + shlex.quote(
      "--command=python3 -m tests.launch.standin --seed=0 "
      f"""'--model=it'"'"'s' --workdir=/shared/rates/{trials[0].id}"""
    )
    + " --mount 'a b'"
  )
  assert len({shlex.split(line)[3] for line in text}) == 3
  with pytest.raises(ConfigError, match="--gke.image=: must be given"):
    gke.lines(make(gke__cluster="c", gke__location="l"), WORKDIR, trials, "python3")


def test_several_processes_of_a_trial_meet_on_loopback():
  assert local.ranks(["python", "-m", "x"], 1, port=5) == [["python", "-m", "x"]]
  assert local.ranks(["python", "-m", "x"], 2, port=5) == [
    ["python", "-m", "x", "--distributed", "--distributed.coordinator=127.0.0.1:5",
     "--distributed.processes=2", f"--distributed.process_id={i}"] for i in range(2)
  ]




def test_where_a_trial_is_many_processes_they_join_if_the_experiment_can(monkeypatch):
  """The hosts of a slice, and the tasks of srun, find each other; nobody tells them the address."""
  [trial] = plan("experiments.grpo", [{"model": "tiny", "task": "copy"}])
  config = make(backend="tpu", tpu__name="sweep", tpu__zone="z", tpu__type="v6e-16")
  assert " --distributed" in tpu.command(config.tpu, "sweep-0", trial, WORKDIR, "python3")[-1]
  config = make(gke__cluster="c", gke__location="l", gke__image="i")
  assert any(" --distributed" in part for part in gke.command(config, WORKDIR, trial, "python3"))

  seen = []

  def start(config):
    _, commands = run.places(config, WORKDIR, "python3")
    seen.append(commands(trial, None)[0])

  for tasks in ("1", "2"):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    start(make(prefix="srun"))
  start(make())  # Nobody starts it twice.
  assert [command[-1] == "--distributed" for command in seen] == [False, True, False]
