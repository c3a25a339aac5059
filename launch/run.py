"""Runs a sweep: every trial of a Python file of flags, each exactly once, wherever it stops.

  python -m launch.run --sweep=launch/sweeps/grpo_tiny.py --dry_run       the plan, as commands
  python -m launch.run --sweep=launch/sweeps/grpo_tiny.py --parallel=2    on this machine
  python -m launch.run --sweep=SWEEP.py --backend=slurm                   prints a job array
  python -m launch.run --sweep=SWEEP.py --backend=slurm --execute         submits it
  python -m launch.run --sweep=SWEEP.py --backend=population              all trials in one program
  python -m launch.run --sweep=SWEEP.py --halving.steps=10,30,90          the best third continues
  python -m launch.run --sweep=SEARCH.py --search.trials=40               Optuna chooses 40 trials
  python -m launch.report runs/sweep-grpo_tiny                            the table and the curves

The same command resumes the sweep: finished and running trials are left alone, failed ones are
retried up to --retries times, stopped ones resume from their checkpoints. Ctrl-C lets trials save
first; when the launcher is killed they die with it, and the next launcher resumes.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from launch import halving, search, state
from launch.backends import gke, local, population, slurm, starts, tpu
from launch.backends.slots import Slot, find_devices, share_out
from launch.progress import Progress
from launch.sweep import Trial, described, load, plan
from rl_llm.errors import ConfigError, redact
from rl_llm.files import write_atomically
from rl_llm.runs import bucket
from rl_llm.runs.config import flatten, option, run
from rl_llm.runs.signals import Interrupted


@dataclasses.dataclass(frozen=True)
class Config:
  """What to run, and where."""

  sweep: str = option("", "a Python file with EXPERIMENT and sweep(), see launch/sweeps/")
  workdir: str = option("", "holds a directory per trial; empty = runs/sweep-<name of the file>")
  backend: Literal["local", "population", "slurm", "tpu", "gke"] = option(
    "local", "where; slurm, tpu and gke print what they would do"
  )
  execute: bool = option(False, "slurm, tpu, gke: do it")
  dry_run: bool = option(False, "print the plan, write nothing, start nothing")
  only: tuple[str, ...] = option((), "ids of the trials to run; empty = all")
  retries: int = option(2, "times a failed trial is tried again, over all launchers", min=0)
  backoff: float = option(10.0, "seconds before the first retry; doubles each time", min=0)
  time_limit: float = option(0.0, "seconds of one start of a trial; 0 = none", min=0)
  grace: float = option(60.0, "seconds a trial has to save in once it is asked to end", min=0)
  parallel: int = option(1, "trials at once: on this machine, or on each group of its GPUs", min=1)
  devices: tuple[str, ...] = option((), "local: GPUs to share out; empty = all that are there")
  devices_per_trial: int = option(1, "local: GPUs of each trial", min=1)
  processes: int = option(1, "local: processes of each trial, joined by jax.distributed", min=1)
  prefix: str = option("", "local: put before each command, such as srun")
  python: str = option("", "interpreter of the trials; empty = this one, or python3 on tpu and gke")
  halving: halving.Halving = halving.Halving()
  search: search.Search = search.Search()
  slurm: slurm.Slurm = slurm.Slurm()
  tpu: tpu.Tpu = tpu.Tpu()
  gke: gke.Gke = gke.Gke()


BACKENDS = {"slurm": slurm, "tpu": tpu, "gke": gke}


# Flags that would do nothing with that backend, and are refused.
_HERE = ("devices", "devices_per_trial", "parallel", "processes", "prefix")
# Jobs of a cluster's queue do not wait for each other's results.
_WAITS = ("halving.steps", "search.trials")
# A population's members begin together, in this process.
_STARTS = ("retries", "backoff", "time_limit", "grace", "python", *_WAITS)
NO_EFFECT = {
  "local": ("execute",),
  "population": ("execute", *_HERE, *_STARTS),
  "slurm": (*_HERE, *_WAITS),
  "tpu": _HERE,
  "gke": (*_HERE, "backoff", "time_limit", *_WAITS),
}


def check(config: Config) -> None:
  """Refuses settings that would do nothing, or cannot be met."""
  if not config.sweep:
    raise ConfigError("sweep", "", "a file", "such as --sweep=launch/sweeps/grpo_tiny.py")
  if "://" in config.workdir:
    raise ConfigError("workdir", config.workdir, bucket.NO_DIRECTORY, "give --workdir=DIR")
  values, defaults = flatten(config), flatten(Config())

  def refuse(names: Iterable[str], where: str) -> None:
    for name in names:
      value = values[name]
      if value != defaults[name]:
        shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        raise ConfigError(name, shown, f"left out with {where}")

  refuse(NO_EFFECT[config.backend], f"--backend={config.backend}")
  halving.check(config.halving)
  if config.search.trials:
    refuse(("only", "halving.steps"), f"--search.trials={config.search.trials}")
  if config.backend == "tpu":  # What gcloud's ssh has started keeps running without it.
    refuse(("search.prune_from",), "--backend=tpu")


def chosen(config: Config) -> list[Trial]:
  """The trials of the sweep, or those of them that --only names."""
  trials = plan(*load(config.sweep), where=config.sweep)
  known = {trial.id: trial for trial in trials}
  for id in config.only:
    if id not in known:
      raise ConfigError("only", id, f"an id of {config.sweep}", "--dry_run lists them")
  return [known[id] for id in dict.fromkeys(config.only)] or trials


def write_plan(config: Config, workdir: Path, trials: list[Trial], python: str) -> None:
  """What the report and the jobs of a cluster read: the sweep, and what each trial is."""
  for trial in trials:
    command = shlex.join(trial.command(workdir, python=python))
    state.describe(trial, command, workdir / trial.id)
  copy = workdir / "sweep.py"
  if Path(config.sweep).resolve() != copy.resolve():
    write_atomically(copy, Path(config.sweep).read_bytes())


def plan_lines(config: Config, workdir: Path, trials: list[Trial], python: str) -> list[str]:
  """The plan as a shell script with comments."""
  asked = f", with which a search of {config.search.trials} begins" if config.search.trials else ""
  what = f"{len(trials)} trials of {trials[0].experiment}{asked}"
  lines = [f"# {what}, from {config.sweep}, in {workdir}"]
  for trial, what in zip(trials, described(trials), strict=True):
    directory = workdir / trial.id
    status = state.read_status(directory)
    word = state.where(directory, trial.steps, status)
    lines += [f"# {trial.id} ({word}): {what}", shlex.join(trial.command(workdir, python=python))]
  return lines


def places(config: Config, workdir: Path, python: str) -> tuple:
  """(slots, commands) for `local.drive`: what this machine has."""
  if config.prefix and config.processes > 1:
    raise ConfigError("processes", config.processes, "1 with --prefix", "the prefix starts them")
  slots = share_out(
    () if config.prefix else config.devices or find_devices(),  # srun hands out its own.
    devices_per_trial=config.devices_per_trial,
    parallel=config.parallel,
  )

  tasks = int(os.environ.get("SLURM_NTASKS", "1"))  # As many processes does srun start of each.

  def commands(trial: Trial, slot: Slot) -> list[list[str]]:
    joined = bool(config.prefix) and tasks > 1
    command = trial.command(workdir, python=python, joined=joined)
    command = [*shlex.split(config.prefix), *command]
    return starts.ranks(command, config.processes, port=starts.free_port())

  return slots, commands


def drive(
  config: Config,
  workdir: Path,
  trials: list[Trial],
  slots: Sequence[Slot],
  commands: Callable,
  *,
  names: Mapping[str, str] | None = None,
  **search: Callable,
) -> dict[str, str]:
  """Runs them; id -> what became of each."""
  if names is None:
    names = dict(zip([trial.id for trial in trials], described(trials), strict=True))
  # Only what slurmd has started has this variable.
  ask = slurm.asks(config.prefix) if "SLURM_TASK_PID" in os.environ else starts.ask
  return local.drive(
    trials,
    workdir,
    slots=slots,
    commands=commands,
    limits=local.Limits(config.retries, config.backoff, config.time_limit, config.grace),
    progress=Progress(names),
    ask=ask,
    **search,
  )


def main(config: Config) -> int:
  check(config)
  workdir = Path(config.workdir or f"runs/sweep-{Path(config.sweep).stem}")
  if config.search.trials:
    study = search.Study(config.search, config.sweep, workdir)
    trials = list(study.trials.values())
  else:
    trials = chosen(config)
  if config.halving.steps:
    trials = halving.with_steps(trials, config.halving.steps[0])
  if config.processes > 1 and "distributed.coordinator" not in trials[0].config:
    raise ConfigError(
      "processes", config.processes, f"1: {trials[0].experiment} has no --distributed flags"
    )
  remote = config.backend in ("tpu", "gke")
  python = config.python or ("python3" if remote else sys.executable)
  local_ = config.backend in ("local", "population")
  if config.dry_run or not (local_ or config.execute):
    lines = plan_lines if local_ else BACKENDS[config.backend].lines
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error.
    print(redact("\n".join(lines(config, workdir, trials, python))), flush=True)
    if not local_:
      print("# nothing has been started: --execute does it", file=sys.stderr)
    return 0

  def run_all(trials: list[Trial], **search: Any) -> dict[str, str]:
    write_plan(config, workdir, trials, python)
    if config.backend == "tpu":
      slots, commands = tpu.places(config, workdir, python)
    else:
      slots, commands = places(config, workdir, python)
    return drive(config, workdir, trials, slots, commands, **search)

  def search_all(trials: list[Trial], *, more: Callable, **search: Any) -> dict[str, str]:
    def described_more(verdicts: Mapping[str, str]) -> list[Trial]:
      found = more(verdicts)
      write_plan(config, workdir, found, python)
      return found

    return run_all(trials, more=described_more, **search)

  try:
    if config.backend in ("slurm", "gke"):
      write_plan(config, workdir, trials, python)
      return BACKENDS[config.backend].submit(config, workdir, trials, python)
    if config.backend == "population":
      write_plan(config, workdir, trials, python)
      verdicts = population.train_all(trials, workdir)
    elif config.search.trials:
      verdicts = study.run(search_all)
    elif config.halving.steps:
      verdicts = halving.run_rungs(config.halving, workdir, trials, run_all)
    else:
      verdicts = run_all(trials)
  except Interrupted as interruption:
    print("the same command resumes")
    return 128 + interruption.signum
  return ending(verdicts, workdir)


def ending(verdicts: dict[str, str], workdir: Path) -> int:
  """The last lines, and the exit code: 0, 1 where trials failed, 143 where some were stopped."""
  counts = Counter(verdicts.values())
  words = {"elsewhere": "running under another launcher", "stopped": "stopped from outside"}
  said = [f"{counts[word]} {words.get(word, word)}" for word in sorted(counts)]
  print(f"{len(verdicts)} trials: {', '.join(said)}")
  print(f"table and curves: python -m launch.report {workdir}")
  return 1 if counts["failed"] else 143 if counts["stopped"] else 0


if __name__ == "__main__":
  run(main, Config)
