"""GKE through Cluster Toolkit: each trial a JobSet in Kueue's queue, TPU7x and GPUs included."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from launch import state
from launch.sweep import Trial
from rl_llm.errors import ConfigError
from rl_llm.runs.config import option


@dataclasses.dataclass(frozen=True)
class Gke:
  """Jobs of a Kubernetes cluster, by `gcluster job submit`."""

  cluster: str = option("", "its name")
  location: str = option("", "its zone or region")
  project: str = option("", "empty = gcloud's own")
  image: str = option("", "a container image with this code and its packages")
  compute_type: str = option("v6e-8", "type of each slice, such as v6e-16 or nvidia-l4")
  slices: int = option(1, "slices per trial", min=1)
  queue: str = option("", "a Kueue LocalQueue; empty = the cluster's default")
  extra: str = option("", "further flags for each submission, such as a --mount for WORKDIR")


def lines(config: Any, workdir: Path, trials: list[Trial], python: str) -> list[str]:
  """One submission per trial; jobs are named after trials, so none can be there twice."""
  check(config, workdir)
  return [shlex.join(command(config, workdir, trial, python)) for trial in trials]


def command(config: Any, workdir: Path, trial: Trial, python: str) -> list[str]:
  """The submission of one trial; a job that fails or is preempted restarts and resumes."""
  options = config.gke
  stem = re.sub("[^a-z0-9]+", "-", Path(config.sweep).stem.lower()).strip("-")[:20]
  wanted = {
    "name": f"{stem}-{trial.id}",
    "cluster": options.cluster,
    "location": options.location,
    "project": options.project,
    "image": options.image,
    "compute-type": options.compute_type,
    "num-slices": options.slices,
    "queue": options.queue,
    "restarts": config.retries,
    "grace-period": f"{config.grace:.0f}s",
    "command": shlex.join(trial.command(workdir, python=python, joined=True)),
  }
  flags = [f"--{name}={value}" for name, value in wanted.items() if value != ""]
  return ["gcluster", "job", "submit", *flags, *shlex.split(options.extra)]


def submit(config: Any, workdir: Path, trials: list[Trial], python: str) -> int:
  """Submits what is not done; the cluster refuses a name that it already has."""
  worst = 0
  for trial in trials:
    if state.is_done(workdir / trial.id, trial.steps):
      continue
    try:
      worst |= subprocess.run(command(config, workdir, trial, python)).returncode
    except FileNotFoundError:
      raise ConfigError(
        "backend", "gke", "used with --execute where gcluster is", "leave out --execute to see it"
      ) from None
  return min(worst, 1)


def check(config: Any, workdir: Path) -> None:
  """Refuses what cannot be submitted."""
  for name in ("cluster", "location", "image"):
    if not getattr(config.gke, name):
      raise ConfigError(f"gke.{name}", "", "given with --backend=gke")
  if not workdir.is_absolute():
    raise ConfigError(
      "workdir", workdir, "an absolute path in the container, on a volume that stays", "--gke.extra"
    )
