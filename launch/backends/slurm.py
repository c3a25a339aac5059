"""A Slurm job array: each task of the array runs the launcher for one trial, or for a few.

A real Slurm differs from `exec "$@"` in which processes get the signal to stop:

    a minute before the limit   --signal: the tasks of steps, neither the script nor srun
    cancelled, queued again,    SIGTERM to every process of the job at the same moment
    preempted
    SIGTERM sent to srun        it kills its tasks with SIGKILL: they save nothing
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.sweep import Trial
from rl_llm.errors import ConfigError
from rl_llm.files import write_atomically
from rl_llm.runs.config import option


@dataclasses.dataclass(frozen=True)
class Slurm:
  """Job array."""

  partition: str = option("", "empty = the site's default")
  account: str = option("", "empty = yours")
  time: str = option(
    "24:00:00", "time limit of a job; one that reaches it is queued again and resumes"
  )
  nodes: int = option(1, "nodes per trial", min=1)
  tasks_per_node: int = option(1, "processes per node of a trial: one per GPU", min=1)
  gpus_per_task: int = option(0, "GPUs of each process", min=0)
  cpus_per_task: int = option(4, "cores of each process", min=1)
  memory: str = option("", "memory per node, such as 64G; empty = the site's default")
  at_once: int = option(0, "jobs running at the same time; 0 = no limit", min=0)
  pack: int = option(1, "trials that share a job, each of one process if over 1", min=1)
  requeues: int = option(20, "times a job is queued again at its time limit", min=0)
  setup: str = option("", "a shell line before all, such as module load cuda")


def lines(config: Any, workdir: Path, trials: list[Trial], python: str) -> list[str]:
  """The script for `sbatch`.

  Its steps get a signal a minute before the limit: trials save and end with 143, or a launcher that
  has several ends with 130, and the job goes back into the queue. After a node failure or a
  preemption Slurm requeues the job itself. A job that is cancelled must not come back, so the
  script survives SIGTERM in order to notice it.
  """
  options = config.slurm
  if options.pack > 1 and options.nodes * options.tasks_per_node > 1:
    raise ConfigError("slurm.pack", options.pack, "1 where a trial has several processes")
  packs = [trials[i : i + options.pack] for i in range(0, len(trials), options.pack)]
  limit = f"%{options.at_once}" if options.at_once else ""
  wanted = {
    "job-name": Path(config.sweep).stem,
    "array": f"0-{len(packs) - 1}{limit}",
    "partition": options.partition,
    "account": options.account,
    "time": options.time,
    "nodes": options.nodes,
    "ntasks-per-node": options.tasks_per_node,
    "cpus-per-task": options.cpus_per_task * options.pack,
    "gpus-per-task": options.gpus_per_task * options.pack or "",
    "mem": options.memory,
    "output": f"{workdir.absolute()}/slurm-%A_%a.log",
    "open-mode": "append",
    "signal": "TERM@60" if options.pack == 1 else "INT@60",
  }
  launcher = [
    python,
    "-m",
    "launch.run",
    f"--sweep={workdir / 'sweep.py'}",
    f"--workdir={workdir}",
    f"--retries={config.retries}",
    f"--backoff={config.backoff}",
    f"--time_limit={config.time_limit}",
    f"--grace={config.grace}",
  ]
  # srun does not ask sbatch how many cores a task has.
  cores = f"--cpus-per-task={options.cpus_per_task * options.pack}"
  if options.pack == 1:
    launcher += [f"--prefix=srun {cores}"]
  else:
    launcher = ["srun", "--ntasks=1", cores, *launcher]
    launcher += [
      f"--parallel={1 if options.gpus_per_task else options.pack}",
      f"--devices_per_trial={max(options.gpus_per_task, 1)}",
    ]
  return [
    "#!/bin/bash",
    *(f"#SBATCH --{name}={value}" for name, value in wanted.items() if value != ""),
    "#SBATCH --requeue",
    f"cd {shlex.quote(os.getcwd())} || exit 2",
    *([options.setup] if options.setup else []),
    f"trials=({' '.join(','.join(trial.id for trial in pack) for pack in packs)})",
    "cancelled=",
    "trap 'cancelled=1' TERM",
    f'{shlex.join(launcher)} --only="${{trials[$SLURM_ARRAY_TASK_ID]}}"',
    "code=$?",
    'case "$code$cancelled" in 130 | 143)',
    f'  [ "${{SLURM_RESTART_COUNT:-0}}" -ge {options.requeues} ] ||'
    ' scontrol requeue "$SLURM_JOB_ID"',
    "esac",
    'exit "$code"',
  ]


def asks(prefix: str) -> Callable[[subprocess.Popen, int | None], None]:
  """Returns the function by which the launcher asks a trial to end, within a job.

  Args:
    prefix: what starts the trial's processes; "" if the launcher does.
  """

  def ask(process: subprocess.Popen, received: int | None) -> None:
    if received == signal.SIGTERM:
      return  # From Slurm, which has sent it to the trial too; a second one would end it at once.
    if prefix:
      subprocess.run(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]])
    else:
      process.send_signal(signal.SIGTERM)

  return ask


def submit(config: Any, workdir: Path, trials: list[Trial], python: str) -> int:
  """Writes the script and hands it to `sbatch`."""
  script = workdir / "slurm.sh"
  write_atomically(script, ("\n".join(lines(config, workdir, trials, python)) + "\n").encode())
  try:
    return subprocess.run(["sbatch", str(script)]).returncode
  except FileNotFoundError:
    raise ConfigError(
      "backend", "slurm", "used with --execute where sbatch is", "leave out --execute to see it"
    ) from None
