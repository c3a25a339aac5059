"""A run's directory: the config that was asked for, and the result that proves it is done."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rl_llm.errors import ConfigError, UserError, redact
from rl_llm.files import locked, write_atomically
from rl_llm.parallel import hosts
from rl_llm.runs.checkpoint import Checkpointer, extras
from rl_llm.runs.config import flatten, write_config
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


_SHARED_SECONDS = 10  # A network file system may show a new file late.


@contextlib.contextmanager
def opened(
  workdir: Path, config: Any, *, volatile: Iterable[str], doing: str
) -> Iterator[dict[str, Any] | None]:
  """Opens the directory for this run alone while the body runs; yields the result, if there is one.

  With several processes, the first one opens it, once all have checked that they were started the
  same way: the same settings except the `volatile` ones, the same files, the same code.

  Args:
    workdir: the run's directory, on a file system that all processes see.
    config: as for `open_run`.
    volatile: as for `open_run`.
    doing: what a process does in the directory, for the message.

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
      result = open_run(workdir, config, volatile=volatile)
      if not stack.enter_context(locked(workdir / ".lock")):
        raise ConfigError("workdir", str(workdir), f"a directory that no other process {doing}")
    if hosts.count() > 1:
      result = hosts.broadcast("the run's directory", result)
      _refuse_own_directories(workdir)
    try:
      yield result
    except UserError:
      if new and hosts.is_main() and not _recorded(workdir):
        shutil.rmtree(workdir)  # A failed start leaves nothing behind.
      raise


def started_with(config: Any, *, volatile: Iterable[str]) -> dict[str, Any]:
  """What must be the same in all processes of one run, by names that a person knows.

  Args:
    config: an instance of a frozen dataclass.
    volatile: fields that may differ.
  """
  values = {f"--{path}": value for path, value in flatten(config).items() if path not in volatile}
  files = {
    f"the file of --{path}": value
    for path, value in _hashes(config).items()
    if path not in volatile
  }
  code = hosts.code_hash(Path(inspect.getfile(type(config))).parent)
  found = values | files | {"the code": code, "JAX's version": jax.__version__}
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


def open_run(workdir: Path, config: Any, *, volatile: Iterable[str]) -> dict[str, Any] | None:
  """Makes the directory and records the config in it; refuses to mix two runs.

  Resuming with different settings would give a record that no command can reproduce, so only the
  `volatile` settings may differ. Files that settings name, such as data or a reward function, must
  be unchanged, which the hashes in inputs.json prove.

  Args:
    workdir: the run's directory.
    config: an instance of a frozen dataclass.
    volatile: dotted paths of fields that do not change what is computed.

  Returns:
    The result, if an earlier run finished here; else None.

  Raises:
    ConfigError: the directory cannot be used, or holds a run with other settings.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    recorded = workdir / "config.json"
    if recorded.exists() and not (workdir / "flags.txt").exists():
      raise ConfigError(
        "workdir",
        str(workdir),
        "a directory of its own: this one holds a config.json that no run wrote",
        "a model's directory goes to --model",
      )
    # A start that failed before its first step does not fix the settings.
    inputs, hashes, volatile = workdir / "inputs.json", _hashes(config), set(volatile)
    if _recorded(workdir):
      holder = f"the run that {workdir} holds"
      if recorded.exists():
        _refuse_other_settings(holder, _json_object(recorded), config, volatile)
      if inputs.exists():
        known = _json_object(inputs)
        _refuse_other_files(holder, known, hashes, config, volatile)
        hashes |= known
    told = _refuse_other_checkpoints(workdir, hashes, config, volatile)
    if _recorded(workdir) and not (recorded.exists() or told):
      raise ConfigError(
        "workdir",
        str(workdir),
        "a directory whose config.json is there: this one has a record, and nothing says with "
        "which settings it was made",
        "restore config.json, or give another --workdir",
      )
    write_config(config, workdir)
    write_atomically(inputs, (json.dumps(hashes, indent=2) + "\n").encode("ascii"))
    result = workdir / "result.json"
    return _json_object(result) if result.exists() else None
  except OSError as error:
    raise ConfigError(
      "workdir", str(workdir), "a directory that can be written", str(error.strerror)
    ) from None


def _recorded(workdir: Path) -> bool:
  """Whether the directory has a step on record."""
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and metrics.stat().st_size > 0


def _json_object(path: Path) -> dict[str, Any]:
  """The content of a JSON file of the directory.

  Raises:
    ConfigError: it is cut short, or something else than an object.
  """
  try:
    found = json.loads(path.read_bytes())
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise ConfigError(
      "workdir",
      str(path.parent),
      f"a directory whose JSON files are whole: {path.name} is not a JSON object",
      f"restore {path.name}, or choose another directory",
    )
  return found


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


def _refuse_other_settings(
  holder: str, recorded: dict[str, Any], config: Any, volatile: set[str]
) -> None:
  # The record was redacted, so redact the config too before comparing.
  wanted = json.loads(redact(json.dumps(flatten(config))))
  # A setting that was added after the run began had its default then.
  recorded = json.loads(json.dumps(flatten(type(config)()))) | recorded
  for path, value in wanted.items():
    if path not in volatile and recorded[path] != value:
      raise ConfigError(
        path, value, f"{recorded[path]}, as in {holder}", "give that value, or another --workdir"
      )


def _hashes(config: Any) -> dict[str, str]:
  """{setting: SHA-256} of the files that settings name, as PATH or KIND:PATH."""
  found = {}
  for name, value in flatten(config).items():
    if isinstance(value, str):
      path = next(filter(os.path.isfile, (value, value.partition(":")[2])), None)
      if path is not None:
        with open(path, "rb") as file:
          found[name] = hashlib.file_digest(file, "sha256").hexdigest()
  return found


def _refuse_other_files(
  holder: str, known: dict[str, str], hashes: dict[str, str], config: Any, volatile: set[str]
) -> None:
  for name in sorted(known.keys() & hashes.keys() - volatile):
    if known[name] != hashes[name]:
      raise ConfigError(
        name,
        flatten(config)[name],
        f"the file as it was when {holder} began (SHA-256 {known[name][:12]}...)",
        "restore it, or give another --workdir",
      )


def _refuse_other_checkpoints(
  workdir: Path, hashes: dict[str, str], config: Any, volatile: set[str]
) -> bool:
  """Refuses checkpoints of another run; whether any says of which run it is."""
  told = False
  for step, extra in extras(workdir / "checkpoints").items():
    holder = f"the run whose checkpoint is {workdir / 'checkpoints' / str(step)}"
    if "settings" in extra:
      told = True
      _refuse_other_settings(holder, extra["settings"], config, volatile)
      _refuse_other_files(holder, extra.get("files", {}), hashes, config, volatile)
  return told
