"""A run's directory: the config that was asked for, and the result that proves it is done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rl_llm.errors import ConfigError, UserError, redact
from rl_llm.files import locked, write_atomically
from rl_llm.parallel import hosts
from rl_llm.runs import code, identity
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import flatten, volatile, write_config
from rl_llm.runs.console import Console
from rl_llm.runs.signals import StopSignals


class Run(NamedTuple):
  """A run at work in its directory."""

  workdir: Path
  console: Console  # its output for the person who started it
  stop: StopSignals  # checked at points where stopping loses nothing
  checkpoints: Checkpointer | None = None  # None if nothing is trained
  origin: Mapping[str, Any] = {}  # what its checkpoints say of it, by `rl_llm.runs.origin`
  result: dict[str, Any] | None = None  # of a finished run, which has nothing left to do


_LONGEST_CHANGES = 80  # Characters of a directory's name that say which settings are changed.
_SHARED_SECONDS = 10  # A network file system may show a new file late.


@contextlib.contextmanager
def opened(
  workdir: Path,
  config: Any,
  *,
  volatile: Iterable[str],
  doing: str,
  steps: int | None = None,
  new_code: bool = False,
  say: Callable[[str], Any] = print,
) -> Iterator[dict[str, Any] | None]:
  """Opens the directory for this run alone while the body runs; yields the result, if there is one.

  With several processes, the first one opens it, once all have checked that they were started the
  same way: the same settings except the `volatile` ones, the same files, the same code.

  Args:
    workdir: the run's directory, on a file system that all processes see.
    config: as for `open_run`.
    doing: what a process does in the directory, for the message.
    volatile, steps, new_code, say: as for `open_run`.

  Raises:
    ConfigError: as for `open_run`; or another run is at work there.
    HostsDiffer: the processes were not started the same way.
  """
  volatile = set(volatile)
  if hosts.count() > 1:
    hosts.assert_equal("the settings", started_with(config, volatile=volatile))
  with contextlib.ExitStack() as stack:
    result, new = None, not workdir.exists()
    if hosts.is_main():
      # Before anything is written: another process may be at work there.
      if not stack.enter_context(_locked(workdir)):
        raise ConfigError("workdir", str(workdir), f"a directory that no other process {doing}")
      how = {"steps": steps, "new_code": new_code, "say": say}
      result = open_run(workdir, config, volatile=volatile, **how)
    if hosts.count() > 1:
      result = hosts.broadcast("the run's directory", result)
      _refuse_own_directories(workdir)
    try:
      yield result
    except UserError:
      if new and hosts.is_main() and not identity.recorded(workdir):
        shutil.rmtree(workdir, ignore_errors=True)  # A failed start leaves nothing behind.
      raise


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[bool]:
  """Makes a run's directory and locks it while the body runs; yields False if another has it."""
  with contextlib.ExitStack() as stack:
    with _usable(workdir):
      free = stack.enter_context(locked(workdir / ".lock"))
    yield free


@contextlib.contextmanager
def _usable(workdir: Path) -> Iterator[None]:
  """Makes a run's directory; what the body cannot read or write there is one line.

  Raises:
    ConfigError: it cannot be made, or is a model's.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / "config.json").exists() and not (workdir / "flags.txt").exists():
      raise ConfigError(
        "workdir",
        str(workdir),
        "a directory of its own: this one holds a config.json that no run wrote",
        "a model's directory goes to --model",
      )
    yield
  except OSError as error:
    raise ConfigError(
      "workdir", str(workdir), "a directory that can be written", str(error.strerror)
    ) from None


def started_with(config: Any, *, volatile: Iterable[str]) -> dict[str, Any]:
  """What must be the same in all processes of one run, by names that a person knows.

  Args:
    config: an instance of a frozen dataclass.
    volatile: fields that may differ.
  """
  values = {f"--{path}": value for path, value in flatten(config).items() if path not in volatile}
  files = {
    f"the file of --{path}": value
    for path, value in identity.hashes(config).items()
    if path not in volatile
  }
  program = code.program(config)
  modules = {f"the module {name}": hash for name, hash in (program.own | program.imported).items()}
  found = values | files | modules | {"JAX's version": jax.__version__}
  return json.loads(redact(json.dumps(found)))


def _refuse_own_directories(workdir: Path) -> None:
  """Refuses directories of the same name on separate file systems of the hosts."""
  seal = workdir / ".shared"
  mark = hosts.broadcast("the mark in the run's directory", uuid.uuid4().hex)
  if hosts.is_main():
    write_atomically(seal, mark.encode())
  hosts.barrier("the mark in the run's directory is written")
  deadline = time.monotonic() + _SHARED_SECONDS
  while not (seen := seal.exists() and seal.read_text() == mark):
    if time.monotonic() > deadline:
      break
    time.sleep(0.1)
  found = hosts.all_gather("the mark in the run's directory is read", bool(seen))
  if hosts.is_main():
    seal.unlink()
  if not all(found):
    raise hosts.HostsDiffer(
      f"--workdir={workdir} is not in {hosts.name(found.index(False))} what it is in "
      f"{hosts.name(0)}; give a directory on a file system that all hosts see"
    )


def open_run(
  workdir: Path,
  config: Any,
  *,
  volatile: Iterable[str],
  steps: int | None = None,
  new_code: bool = False,
  say: Callable[[str], Any] = print,
) -> dict[str, Any] | None:
  """Makes the directory and records the config in it; refuses to mix two runs.

  Resuming with different settings would give a record that no command can reproduce, so only the
  `volatile` settings may differ. Files that settings name, such as data or a reward function, must
  be unchanged, and so must the experiment's own module: inputs.json has their hashes. Where other
  modules have changed, the run resumes, says so, and notes it in changes.jsonl.

  Args:
    workdir: the run's directory.
    config: an instance of a frozen dataclass.
    volatile: dotted paths of fields that do not change what is computed.
    steps: of the whole run: a finished one with fewer steps resumes. None: it has no steps.
    new_code: whether the experiment's own code, and Python files that settings name, may differ.
    say: called with each line that the person who resumes should read.

  Returns:
    The result, if an earlier run finished here; else None.

  Raises:
    ConfigError: the directory cannot be used, or holds a run with other settings or other code.
  """
  with _usable(workdir):
    result = workdir / "result.json"
    result = identity.json_object(result) if result.exists() else None
    if steps is not None and result is not None and type(result.get("steps")) is not int:
      raise identity.broken(workdir, "result.json", "has no number of steps")
    now = {"program": code.program(config)._asdict()} | identity.hashes(config)
    before, settings = identity.compare(
      workdir, now, config, volatile=set(volatile), new_code=new_code
    )
    # What other code and settings have computed to the end stays theirs.
    unfinished = result is None or steps is None or result["steps"] < steps
    for path, (value, other) in () if unfinished else settings.items():
      allowed = f"{value}, with which the run that {workdir} holds has finished"
      raise ConfigError(
        path, other, allowed, "more steps train on with it, another --workdir begins anew"
      )
    if unfinished:
      write_config(config, workdir)
      data = {name: hash for name, hash in before.items() if not identity.is_code(name, config)}
      now |= data  # Where a data file may change, its hash stays that of the beginning.
      if before:
        identity.note_changes(workdir, before, now, settings, say)
      content = json.dumps(now, indent=2) + "\n"
      write_atomically(workdir / "inputs.json", content.encode("ascii"))
    return result


def default_workdir(
  experiment: str, *, model: str, data: str, seed: int, changed: Mapping[str, str] = {}
) -> str:
  """The directory of a run whose config names none: another for every setting that is changed.

  >>> default_workdir("grpo", model="smollm2", data="gsm8k:train.jsonl", seed=0)
  'runs/grpo-smollm2-gsm8k_train.jsonl-seed0'
  >>> changed = {"loss.entropy_coef": "0.0", "model": "tiny", "task": "copy", "steps": "9"}
  >>> default_workdir("grpo", model="tiny", data="copy", seed=0, changed=changed)
  'runs/grpo-tiny-copy-seed0-loss.entropy_coef=0.0'

  Args:
    experiment: its name.
    model, data: what is trained, and on what.
    seed: of the run.
    changed: setting -> its text. Those that the name has already are left out, and `steps`, so that
      a longer run continues a shorter one. Beyond 80 characters a hash stands for the rest.
  """
  base = [experiment, Path(model).name.removesuffix(".gguf")]
  base += [data.replace(os.sep, "_").replace(":", "_"), f"seed{seed}"]
  known = {data, *data.split(":")}
  further = [
    f"{path}={redact(text)}"
    for path, text in changed.items()
    if path not in ("model", "seed", "steps") and text not in known and Path(text).name != data
  ]
  whole = "-".join(further)
  while len("-".join(further)) > _LONGEST_CHANGES:
    further = further[:-1]
  if "-".join(further) != whole:
    further.append(hashlib.sha256(whole.encode()).hexdigest()[:8])
  suffix = [re.sub(r"[^A-Za-z0-9_.,=+-]", "_", text) for text in further]
  return os.path.join("runs", "-".join(base + suffix))


def found_workdir(config: Any, *names: str) -> str:
  """The first of these directories that holds a run of this config; else the first."""

  def holds(name: str) -> bool:
    try:
      recorded = json.loads(Path(name, "config.json").read_text("ascii"))
    except (OSError, ValueError):
      return False
    return not identity.differences(recorded, config, volatile(config))

  return next(filter(holds, names), names[0])


def run_name(model: str) -> str:
  """The model's name; for a model that a run exported, the run's directory, which says more.

  >>> run_name("runs/grpo-tiny-copy-seed0/model"), run_name("smollm2")
  ('runs/grpo-tiny-copy-seed0', 'smollm2')
  """
  path = Path(model)
  return str(path.parent) if path.name == "model" and path.parent.name else model


def write_result(workdir: Path, result: dict[str, Any]) -> None:
  """Writes result.json atomically and last: it is the only proof that a run is done."""
  content = json.dumps(result, indent=2) + "\n"
  write_atomically(workdir / "result.json", content.encode("ascii"))
