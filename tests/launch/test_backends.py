"""The command lines of clusters, word for word; tests/slurm has a real cluster run them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch import run
from launch.backends import gke, slurm, starts, tpu
from launch.sweep import plan
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read, without_timings
from tests import processes
from tests.test_several_hosts import largest_gap

FULL = bool(os.environ.get("RL_LLM_FULL"))  # `make test-full`
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
    backend="slurm",
    slurm__partition="gpu",
    slurm__nodes=2,
    slurm__tasks_per_node=8,
    slurm__gpus_per_task=1,
    slurm__at_once=4,
    slurm__setup="module load cuda",
    time_limit=3600,
  )
  a, b, c = (trial.id for trial in trials)
  assert (
    "\n".join(slurm.lines(config, WORKDIR, trials, "/venv/bin/python"))
    == f"""#!/bin/bash
#SBATCH --job-name=Learning_Rates
#SBATCH --array=0-2%4
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --output=/shared/rates/slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60
#SBATCH --requeue
cd {shlex.quote(os.getcwd())} || exit 2
module load cuda
trials=({a} {b} {c})
cancelled=
trap 'cancelled=1' TERM
/venv/bin/python -m launch.run --sweep=/shared/rates/sweep.py --workdir=/shared/rates \
--retries=2 --backoff=10.0 --time_limit=3600.0 --grace=60.0 \
'--prefix=srun --cpus-per-task=4' --only="${{trials[$SLURM_ARRAY_TASK_ID]}}"
code=$?
case "$code$cancelled" in 130 | 143)
  [ "${{SLURM_RESTART_COUNT:-0}}" -ge 20 ] || scontrol requeue "$SLURM_JOB_ID"
esac
exit "$code\""""
  )


def test_several_trials_share_a_job(trials):
  script = slurm.lines(make(backend="slurm", slurm__pack=2), WORKDIR, trials, "python")
  a, b, c = (trial.id for trial in trials)
  assert f"trials=({a},{b} {c})" in script and "#SBATCH --array=0-1" in script
  (launcher,) = (line for line in script if "launch.run" in line)
  assert launcher.startswith("srun --ntasks=1 --cpus-per-task=8 python -m launch.run")
  assert "--parallel=2 --devices_per_trial=1 --only" in launcher and "--prefix" not in launcher
  assert "#SBATCH --signal=INT@60" in script
  with pytest.raises(ConfigError, match="--slurm.pack=2: must be 1 where a trial has several"):
    slurm.lines(make(backend="slurm", slurm__pack=2, slurm__nodes=2), WORKDIR, trials, "python")


@pytest.mark.slow
def test_the_array_script_runs_its_trials_and_queues_again_what_was_stopped(tmp_path):
  """With a fake srun, and a fake scontrol that says what it was asked."""
  tools = tmp_path / "bin"
  tools.mkdir()
  for name, body in (("srun", 'shift; exec "$@"'), ("scontrol", f'echo "$@" >> {tmp_path}/asked')):
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
    [*common, "--backend=slurm", "--execute"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  second = plan("tests.launch.standin", [{"seed": 1}])[0].id
  assert [path.parent.name for path in workdir.glob("*/result.json")] == [second]
  assert (workdir / "slurm.sh").read_text() == script.stdout
  assert not (tmp_path / "asked").exists()

  (tools / "srun").write_text("#!/bin/sh\nexit 143\n")  # Stopped a minute before the limit.
  code = subprocess.run(
    ["bash", str(workdir / "slurm.sh")],
    cwd=ROOT,
    capture_output=True,
    env=environment | {"SLURM_ARRAY_TASK_ID": "0"},
  ).returncode
  assert code == 143 and (tmp_path / "asked").read_text() == "requeue 7\n"


def test_tpu_slices(trials):
  config = make(
    backend="tpu",
    tpu__name="sweep",
    tpu__slices=2,
    tpu__type="v6e-16",
    tpu__zone="us-east5-b",
    tpu__project="p",
  )
  text = tpu.lines(config, WORKDIR, trials, "python3")
  end = "--zone=us-east5-b --project=p"
  assert [line for line in text if " create " in line] == [
    f"gcloud compute tpus queued-resources create sweep-{i} --node-id=sweep-{i} "
    f"--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot {end}"
    for i in range(2)
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
  assert "git ls-files -z | tar --create" in "\n".join(text), "neither .venv nor runs"
  copies = [line for line in text if " scp " in line]
  assert copies == [
    f"gcloud compute tpus tpu-vm scp /tmp/rl_llm.tar.gz sweep-{i}:rl_llm.tar.gz --worker=all {end}"
    for i in range(2)
  ]
  # What --execute drives: a slot per slice, the same command in each.
  slots, commands = tpu.places(config, WORKDIR, "python3")
  assert [slot.name for slot in slots] == ["sweep-0", "sweep-1"]
  assert commands(trials[1], slots[1]) == [shlex.split(runs[1])]


@pytest.mark.slow
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
    [
      sys.executable,
      "-m",
      "launch.run",
      f"--sweep={spec}",
      f"--workdir={workdir}",
      "--execute",
      "--backend=tpu",
      "--tpu.name=s",
      "--tpu.zone=z",
      "--tpu.slices=2",
      f"--tpu.directory={ROOT}",
      f"--python={sys.executable}",
    ],
    cwd=ROOT,
    env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(list(workdir.glob("*/result.json"))) == 3
  slices = (tmp_path / "slices").read_text().split()
  assert len(slices) == 3 and set(slices) == {"s-0", "s-1"}


GCLOUD = '''#!{python}
"""gcloud ... ssh SLICE --worker=all --command=TEXT: a slice of two hosts, both of them here."""
import os, subprocess, sys
given = dict(word.partition("=")[::2] for word in sys.argv)
assert sys.argv[1:5] == ["compute", "tpus", "tpu-vm", "ssh"] and given["--worker"] == "all"
# What the metadata server would say: JAX reads it from Slurm's variables just as well.
known = {{"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
         "JAX_COORDINATOR_PORT": "{port}"}}
hosts = [
  subprocess.Popen(["sh", "-c", given["--command"]],
                   env=os.environ | known | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
  for i in range(2)
]
sys.exit(max(host.wait() for host in hosts))
'''


@pytest.mark.skipif(not FULL, reason="three processes that train; RL_LLM_FULL=1")
def test_a_slice_of_two_hosts_trains_one_model(tmp_path):
  """All is real but gcloud and the chips: the hosts find each other and add up over Gloo."""
  tools = tmp_path / "bin"
  tools.mkdir()
  (tools / "gcloud").write_text(GCLOUD.format(python=sys.executable, port=processes.free_port()))
  (tools / "gcloud").chmod(0o755)
  settings = {
    "model": "tiny",
    "task": "copy",
    "steps": 3,
    "prompts_per_step": 16,
    "microbatch_prompts": 16,
    "eval.problems": 16,
    "eval.samples": 1,
    "eval.every": 2,
  }
  spec, workdir = tmp_path / "spec.py", tmp_path / "work"
  spec.write_text(f"EXPERIMENT = 'experiments.grpo'\ndef sweep():\n  return [{settings!r}]\n")
  environment = os.environ | {
    "PATH": f"{tools}:{os.environ['PATH']}",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "launch.run",
      f"--sweep={spec}",
      f"--workdir={workdir}",
      "--execute",
      "--backend=tpu",
      "--tpu.name=s",
      "--tpu.zone=z",
      f"--tpu.directory={ROOT}",
      f"--python={sys.executable}",
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  [trial] = plan("experiments.grpo", [settings])
  assert "on 2 x cpu" in (workdir / trial.id / "stdout.log").read_text()

  alone = subprocess.run(
    trial.command(tmp_path / "alone"),
    cwd=ROOT,
    env=environment | {"JAX_NUM_CPU_DEVICES": "2"},
    capture_output=True,
    text=True,
  )
  assert alone.returncode == 0, alone.stderr
  ours, theirs = (
    without_timings(read(path / trial.id / "metrics.jsonl"))
    for path in (workdir, tmp_path / "alone")
  )
  assert largest_gap(ours, theirs)[0] < 1e-5  # As of any two processes against one.


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
    backend="gke",
    gke__cluster="c",
    gke__location="us-east5",
    gke__image="image:1",
    gke__compute_type="v6e-16",
    gke__slices=2,
    gke__extra="--mount 'a b'",
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
  assert starts.ranks(["python", "-m", "x"], 1, port=5) == [["python", "-m", "x"]]
  assert starts.ranks(["python", "-m", "x"], 2, port=5) == [
    [
      "python",
      "-m",
      "x",
      "--distributed",
      "--distributed.coordinator=127.0.0.1:5",
      "--distributed.processes=2",
      f"--distributed.process_id={i}",
    ]
    for i in range(2)
  ]


def test_where_a_trial_is_many_processes_they_join_if_the_experiment_can(monkeypatch):
  """The hosts of a slice, and the tasks of srun, find each other; nobody tells them the address."""
  [trial] = plan("experiments.grpo", [{"model": "tiny", "task": "copy"}])
  config = make(backend="tpu", tpu__name="sweep", tpu__zone="z", tpu__type="v6e-16")
  assert " --distributed" in tpu.command(config.tpu, "sweep-0", trial, WORKDIR, "python3")[-1]
  config = make(gke__cluster="c", gke__location="l", gke__image="i")
  assert any(" --distributed" in part for part in gke.command(config, WORKDIR, trial, "python3"))

  seen = []
  for prefix, tasks in (("srun", "1"), ("srun", "2"), ("", "2")):  # Nobody starts the last twice.
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    _, commands = run.places(make(prefix=prefix), WORKDIR, "python3")
    [command] = commands(trial, None)
    seen.append(command[-1] == "--distributed")
  assert seen == [False, True, False]


@pytest.mark.parametrize(
  ("prefix", "received", "asked"),
  [
    ("", None, "TERM"),  # Over its time limit.
    ("", signal.SIGINT, "TERM"),  # Several trials in a job that is near its limit.
    ("srun", None, "scancel --signal=TERM 7"),  # srun itself would kill them.
    ("srun", signal.SIGTERM, ""),  # Slurm has sent it to all processes of the job.
    ("", signal.SIGTERM, ""),
  ],
)
def test_within_a_job_a_trial_is_asked_once(monkeypatch, prefix, received, asked):
  said = []
  monkeypatch.setenv("SLURM_JOB_ID", "7")
  monkeypatch.setattr(subprocess, "run", lambda command: said.append(" ".join(command)))

  class Process:
    def send_signal(self, signum):
      said.append(signal.Signals(signum).name.removeprefix("SIG"))

  slurm.asks(prefix)(Process(), received)
  assert said == [asked] * bool(asked)


@pytest.mark.slow
def test_a_slice_s_host_gets_what_git_tracks_if_its_python_is_new_enough(tmp_path):
  source, host = tmp_path / "source", tmp_path / "host"
  for place in (source, host):
    place.mkdir()
  (source / "tracked.py").write_text("x = 1\n")
  (source / ".venv").mkdir()
  (source / ".venv" / "huge").write_text("x")
  for words in (["init", "-q"], ["add", "tracked.py"]):
    subprocess.run(["git", *words], cwd=source, check=True)
  packed = tmp_path / "rl_llm.tar.gz"
  line = f"git ls-files -z | tar --create --gzip --null --files-from=- --file={packed}"
  subprocess.run(line, shell=True, cwd=source, check=True)
  shutil.copy(packed, host)
  for version, code in (("3.10", 2), ("3.12", 0)):
    python = tmp_path / f"python{version}"
    told = f'case "$1" in -c) exit {1 if code else 0};; esac; echo "$@" > {host}/installed\n'
    python.write_text(f"#!/bin/sh\n{told}")
    python.chmod(0o755)
    script = tpu.install("rl_llm", str(python))
    done = subprocess.run(["sh", "-c", script], cwd=host, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("give --python=python3.11" in done.stderr) == bool(code)
  assert {path.name for path in (host / "rl_llm").iterdir()} == {"tracked.py"}
  assert (host / "installed").read_text() == "-m pip install -q .[tpu]\n"
