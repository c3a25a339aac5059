"""What a run is, and whether a directory holds the same one: experiment, code, settings and files.

Resuming with something else would give a record that no command can reproduce. So what decides the
steps must be as it was; what decides little may change from a step on, which changes.jsonl notes:

    may not differ    settings; data files; the experiment's own module; Python files that settings
                      name (these two unless --code=changed)
    is noted          settings in `NOTED` of their class; modules that experiments share, and this
                      library's
    may differ        settings declared `volatile`
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rl_llm.errors import ConfigError, redact
from rl_llm.runs import code
from rl_llm.runs.checkpoint import extras
from rl_llm.runs.config import flatten, noted
from rl_llm.runs.metrics import read

Settings = Mapping[str, tuple[Any, Any]]  # setting -> (before, now)


def recorded(workdir: Path) -> bool:
  """Whether the directory has a step on record."""
  metrics = workdir / "metrics.jsonl"
  return metrics.exists() and metrics.stat().st_size > 0


def json_object(path: Path) -> dict[str, Any]:
  """The content of a JSON file of a run's directory.

  Raises:
    ConfigError: it is cut short, or something else than an object.
  """
  try:
    found = json.loads(path.read_bytes())
  except (ValueError, RecursionError):
    found = None
  if not isinstance(found, dict):
    raise broken(path.parent, path.name, "is not a JSON object")
  return found


def broken(workdir: Path, name: str, what: str) -> ConfigError:
  """The error for a file of a run's directory that no run wrote so."""
  return ConfigError(
    "workdir",
    str(workdir),
    f"a directory whose JSON files are whole: {name} {what}",
    f"restore {name}, or choose another directory",
  )


def hashes(config: Any) -> dict[str, str]:
  """{setting: hash} of the files that settings name, as PATH, KIND:PATH or PATH:FUNCTION.

  Of a Python file it is that of its code and of what it imports from its directory, else SHA-256;
  of several files, that of their hashes. A run that is named stands for the manifest of its
  checkpoint.
  """
  found = {}
  for name, value in flatten(config).items():
    if isinstance(value, str):
      paths = value, value.partition(":")[2], value.rpartition(":")[0]
      path = next(filter(os.path.isfile, (*paths, *_checkpoint(value))), None)
      listed = [part.rpartition(":")[0].strip() for part in value.split(",")]
      if path is not None:
        found[name] = _hash(path)
      elif files := [file for file in listed if file.endswith(".py") and os.path.isfile(file)]:
        hashed = " ".join(_hash(file) for file in files)
        found[name] = hashlib.sha256(hashed.encode()).hexdigest() if files[1:] else hashed
  return found


def _hash(path: str) -> str:
  if path.endswith(".py"):
    return code.digest_of_file(Path(path))
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoint(name: str) -> list[str]:
  """The manifest that holds the hashes of RUN or RUN@STEP."""
  if (found := find_run(name)) is None:
    return []
  directory, step = found
  if step is None:
    saved = [int(path.name) for path in (directory / "checkpoints").glob("[0-9]*")]
    step = max(saved, default=0)
  return [str(directory / "checkpoints" / str(step) / "manifest.json")]


def find_run(name: str) -> tuple[Path, int | None] | None:
  """(directory, step) of "RUN" or "RUN@STEP", the step None if it is not given; None if no run's.

  >>> find_run("smollm2") is None
  True
  """
  directory, _, step = name.rpartition("@")
  for path, number in ((Path(name), None), (Path(directory), step)):
    with contextlib.suppress(OSError, ValueError):  # Not every text can be a path.
      if (path / "flags.txt").is_file() and (path / "config.json").is_file():
        if number is None or number.isdecimal():
          return path, None if number is None else int(number)
  return None


def is_code(name: str, config: Any) -> bool:
  """Whether an entry of inputs.json is a hash of code, and not of data."""
  return name == "program" or ".py" in str(flatten(config).get(name))


def differences(
  recorded: Mapping[str, Any], config: Any, may_differ: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
  """{setting: (recorded, now)} of those that differ.

  Args:
    recorded: the content of a config.json.
    config: an instance of a frozen dataclass.
    may_differ: dotted paths that are not compared.
  """
  # The record was redacted, so redact the config too before comparing.
  wanted = json.loads(redact(json.dumps(flatten(config))))
  # A setting that was added after the run began had its default then.
  before = json.loads(json.dumps(flatten(type(config)()))) | recorded
  skipped = set(may_differ)
  return {
    path: (before[path], value)
    for path, value in wanted.items()
    if path not in skipped and before[path] != value
  }


def compare(
  workdir: Path, now: Mapping[str, Any], config: Any, *, volatile: set[str], new_code: bool
) -> tuple[dict[str, Any], Settings]:
  """Refuses another run than the one that a directory holds.

  A start that failed before its first step does not fix anything.

  Args:
    workdir: the directory.
    now: what inputs.json is to say.
    config: an instance of a frozen dataclass.
    volatile: dotted paths of settings that are not compared.
    new_code: whether code may differ that otherwise may not.

  Returns:
    What inputs.json said, {} of a run that has not begun, and the noted settings that differ.

  Raises:
    ConfigError: another experiment, other code, other settings or other files; in this order.
  """
  before, settings, holder = {}, {}, f"the run that {workdir} holds"
  known, inputs = workdir / "config.json", workdir / "inputs.json"
  if begun := recorded(workdir):
    before = _inputs(inputs, now) if inputs.exists() else {}
    if "program" in before and not new_code:
      _refuse_other_program(workdir, before["program"], now["program"])
    elif "program" not in before:  # An older version's hashes are not of parsed code.
      before = {name: hash for name, hash in before.items() if not is_code(name, config)}
      before["program"] = None
    if known.exists():
      _refuse_other_settings(holder, json_object(known), config, volatile)
      settings = differences(json_object(known), config, flatten(config).keys() - noted(config))
    _refuse_other_files(holder, before, now, config, volatile, new_code=new_code)
  told = _refuse_other_checkpoints(workdir, now, config, volatile)
  if told is not None and not known.exists():
    settings = differences(told, config, flatten(config).keys() - noted(config))
  if begun and told is None and not known.exists():
    raise ConfigError(
      "workdir",
      str(workdir),
      "a directory whose config.json is there: this one has a record, and nothing says with "
      "which settings it was made",
      "restore config.json, or give another --workdir",
    )
  return before, settings


def _inputs(path: Path, now: Mapping[str, Any]) -> dict[str, Any]:
  """The content of inputs.json, which must have the form of what is written now."""
  found = json_object(path)
  for name, value in found.items():
    fits = isinstance(value, str)
    if name == "program":
      kinds = {key: type(what) for key, what in now[name].items()}
      fits = isinstance(value, dict) and all(
        isinstance(value.get(key), kind) for key, kind in kinds.items() if key != "commit"
      )
    if not fits:
      raise broken(path.parent, path.name, f"has no hash of {name}")
  return found


def _refuse_other_program(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
  if old["module"] != new["module"]:
    allowed = f"a directory for {new['module']}, and {workdir} holds a run of {old['module']}"
    raise ConfigError("workdir", str(workdir), allowed, "give another")
  if old["own"] != new["own"]:
    raise ConfigError(
      "code",
      "same",
      f"changed where {new['module']} is not the code that the run in {workdir} began with",
      "--code=changed resumes it all the same, another --workdir begins anew",
    )


def _refuse_other_settings(
  holder: str, recorded: Mapping[str, Any], config: Any, volatile: set[str]
) -> None:
  differ = differences(recorded, config, volatile | noted(config))
  for path, (before, now) in differ.items():
    allowed = f"{before}, as in {holder}"
    raise ConfigError(path, now, allowed, "give that value, or another --workdir")


def _refuse_other_files(
  holder: str,
  before: Mapping[str, Any],
  now: Mapping[str, Any],
  config: Any,
  volatile: set[str],
  *,
  new_code: bool,
) -> None:
  for name in sorted(before.keys() & now.keys() - {"program", *volatile}):
    code_file = is_code(name, config)
    if before[name] != now[name] and not (code_file and new_code):
      raise ConfigError(
        name,
        flatten(config)[name],
        f"the file as it was when {holder} began (SHA-256 {before[name][:12]}...)",
        "restore it, give another --workdir, or --code=changed"
        if code_file
        else "restore it, or give another --workdir",
      )


def _refuse_other_checkpoints(
  workdir: Path, now: Mapping[str, Any], config: Any, volatile: set[str]
) -> Mapping[str, Any] | None:
  """Refuses checkpoints of another run; gives the settings that the last says it was made with.

  Code is left to inputs.json: it may have changed between two checkpoints.
  """
  told = None
  for step, extra in extras(workdir / "checkpoints").items():
    holder = f"the run whose checkpoint is {workdir / 'checkpoints' / str(step)}"
    if "settings" in extra:
      told = extra["settings"]
      _refuse_other_settings(holder, told, config, volatile)
      files = extra.get("files", {})
      data = {name: hash for name, hash in files.items() if not is_code(name, config)}
      _refuse_other_files(holder, data, now, config, volatile, new_code=False)
  return told


def note_changes(
  workdir: Path,
  before: Mapping[str, Any],
  now: Mapping[str, Any],
  settings: Settings,
  say: Callable[[str], Any],
) -> None:
  """Says what code and settings the steps so far did not have, and notes it in changes.jsonl.

  Args:
    workdir: the run's directory.
    before: from `compare`.
    now: as for `compare`.
    settings: from `compare`.
    say: called with each line.
  """
  step, line = _resumes_at(workdir), {}
  if before["program"] is None:
    say(f"{workdir} does not say which code it is of; it resumes with the code that is here")
  else:
    files = sorted(name for name in before.keys() & now.keys() if name != "program")
    changed = code.differences(before["program"], now["program"])
    changed += [f"--{name}" for name in files if before[name] != now[name]]
    if changed:
      program = now["program"]
      line |= {"code": changed, "commit": program["commit"], "uncommitted": program["uncommitted"]}
      more = f" and {len(changed) - 3} more" * (len(changed) > 3)
      say(f"other code from step {step} on: {', '.join(changed[:3])}{more}")
  if settings:
    line["settings"] = settings
    texts = [f"{path} {old} -> {new}" for path, (old, new) in settings.items()]
    say(f"other settings from step {step} on: {', '.join(texts)}")
  if line:
    with open(workdir / "changes.jsonl", "a", encoding="ascii") as file:
      file.write(redact(json.dumps({"step": step} | line)) + "\n")


def _resumes_at(workdir: Path) -> int:
  """The step of the newest checkpoint; where there is none, the number of steps on record."""
  saved = [int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*")]
  return max(saved) if saved else len(read(workdir / "metrics.jsonl"))
