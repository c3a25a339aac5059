"""TPU VM slices, v4 to v6e: one trial at a time on each, the same command on all of its hosts.

TPU7x has no TPU VM interface; it is reached through GKE. Hosts find each other through JAX, which
asks the metadata server. WORKDIR must be one file system, such as Filestore, that the slices and
the launcher's machine see under the same absolute path.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

from launch.backends.slots import Slot
from launch.sweep import Trial
from rl_llm.errors import ConfigError
from rl_llm.runs.config import option

ARCHIVE = "/tmp/rl_llm.tar.gz"
# cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
  "v4": "tpu-ubuntu2204-base",
  "v5litepod": "v2-alpha-tpuv5-lite",
  "v5p": "v2-alpha-tpuv5",
  "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True)
class Tpu:
  """TPU VM slices."""

  name: str = option("", "name of the slices, which become NAME-0, NAME-1, ...")
  slices: int = option(1, "number of slices; each runs one trial at a time", min=1)
  type: str = option("v6e-8", "type of each slice: v4-N, v5litepod-N, v5p-N or v6e-N")
  zone: str = option("", "zone, such as us-east5-b")
  project: str = option("", "project; empty = gcloud's own")
  spot: bool = option(True, "spot slices: they cost less and may be preempted")
  directory: str = option("rl_llm", "directory on the slices' hosts that holds this code")


def lines(config: Any, workdir: Path, trials: list[Trial], python: str) -> list[str]:
  """What to type: get the slices, install, run, give them back. --execute only does the third."""
  options = config.tpu
  check(config, workdir)
  family = options.type.rpartition("-")[0]
  names = [f"{options.name}-{i}" for i in range(options.slices)]
  end = place(options)
  spot = ["--spot"] if options.spot else []
  queued = ["gcloud", "compute", "tpus", "queued-resources"]
  text = ["# 1. ask for the slices, and wait until describe says ACTIVE"]
  for name in names:
    wanted = [f"--accelerator-type={options.type}", f"--runtime-version={RUNTIMES[family]}"]
    text.append(shlex.join([*queued, "create", name, f"--node-id={name}", *wanted, *spot, *end]))
    text.append(shlex.join([*queued, "describe", name, "--format=value(state.state)", *end]))
  text.append(
    "# 2. copy what git tracks here to their hosts, and install it; they need Python 3.11"
  )
  text.append("#    to 3.13, and Ubuntu 22.04 brings 3.10: see the error's command, and --python")
  text.append(f"git ls-files -z | tar --create --gzip --null --files-from=- --file={ARCHIVE}")
  copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", ARCHIVE]
  for name in names:
    text.append(shlex.join([*copy, f"{name}:{Path(ARCHIVE).name}", "--worker=all", *end]))
    text.append(shlex.join(ssh(options, name, install(options.directory, python))))
  text.append(f"# 3. {len(trials)} trials; --execute runs each on the next slice that is free")
  for number, trial in enumerate(trials):
    name = names[number % len(names)]
    text.append(shlex.join(command(options, name, trial, workdir, python)))
  text.append("# 4. give them back")
  text += [shlex.join([*queued, "delete", name, "--force", "--quiet", *end]) for name in names]
  return text


def install(directory: str, python: str) -> str:
  """What a host runs to unpack the archive and install it, by a Python that is new enough."""
  there, name = shlex.quote(directory), shlex.quote(python)
  old = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
  fix = "sudo apt-get install -y python3.11 python3.11-venv && python3.11 -m ensurepip --user"
  said = f"{python} is not Python 3.11 to 3.13: {fix}, and give --python=python3.11"
  return (
    f"mkdir -p {there} && tar -xzf {Path(ARCHIVE).name} -C {there} && cd {there} && "
    f"{{ {name} -c {shlex.quote(old)} || {{ echo {shlex.quote(said)} >&2; exit 2; }}; }} && "
    f"{name} -m pip install -q '.[tpu]'"
  )


def places(config: Any, workdir: Path, python: str) -> tuple:
  """(slots, commands) for `local.drive`: a slot is a slice."""
  check(config, workdir)
  slots = [Slot(f"{config.tpu.name}-{i}", {}) for i in range(config.tpu.slices)]

  def commands(trial: Trial, slot: Slot) -> list[list[str]]:
    return [command(config.tpu, slot.name, trial, workdir, python)]

  return slots, commands


def command(options: Tpu, name: str, trial: Trial, workdir: Path, python: str) -> list[str]:
  """One trial on all hosts of one slice."""
  text = shlex.join(trial.command(workdir, python=python, joined=True))
  return ssh(options, name, f"cd {shlex.quote(options.directory)} && exec {text}")


def ssh(options: Tpu, name: str, text: str) -> list[str]:
  return [
    "gcloud",
    "compute",
    "tpus",
    "tpu-vm",
    "ssh",
    name,
    *place(options),
    "--worker=all",
    f"--command={text}",
  ]


def place(options: Tpu) -> list[str]:
  project = [f"--project={options.project}"] if options.project else []
  return [f"--zone={options.zone}", *project]


def check(config: Any, workdir: Path) -> None:
  """Refuses what gcloud would refuse a minute later."""
  options = config.tpu
  for name in ("name", "zone"):
    if not getattr(options, name):
      raise ConfigError(f"tpu.{name}", "", "given with --backend=tpu")
  family, _, count = options.type.rpartition("-")
  if family not in RUNTIMES or not count.isdigit():
    known = ", ".join(f"{name}-N" for name in RUNTIMES)
    fix = "TPU7x has no TPU VMs: --backend=gke" if re.match("(tpu7|v7)", options.type) else ""
    raise ConfigError("tpu.type", options.type, f"one of {known}", fix)
  if not workdir.is_absolute():
    raise ConfigError(
      "workdir", workdir, "an absolute path that all hosts see, such as a Filestore share"
    )
