"""What a checkpoint says of its run, so that a record cannot lose lines without a word.

A directory is copied, cleaned up and restored by people. Checkpoints of another run may end up in
it, and lines of its record may be gone; every file that is left is sound, and the run would resume.
So each checkpoint's manifest repeats, in its `extra`, what else the directory should hold:

    "settings"   the settings that define the run, seed included, as in config.json
    "files"      the SHA-256 of the files that they name, as in inputs.json
    "recorded"   the last step on record, -1 if there is none
    "bytes"      the sizes of metrics.jsonl and samples.jsonl up to that step

Other settings or files are refused. Lines that are missing are named when the run resumes and in
its result: training does not need them, and what they said cannot be had again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rl_llm.errors import redact
from rl_llm.files import writing
from rl_llm.runs.config import flatten
from rl_llm.runs.metrics import extent

RECORDS = ("metrics.jsonl", "samples.jsonl")


def origin(workdir: Path, config: Any, *, volatile: Iterable[str]) -> dict[str, Any]:
  """The part of `extra` that is the same for all checkpoints of a run.

  Args:
    workdir: the run's directory; its inputs.json is read.
    config: an instance of a frozen dataclass.
    volatile: dotted paths of fields that may differ when the run resumes.
  """
  volatile = set(volatile)
  settings = json.loads(redact(json.dumps(flatten(config))))
  files = json.loads((workdir / "inputs.json").read_text("ascii"))
  files.pop("program", None)  # inputs.json alone says which code it is.
  return {
    "settings": {path: value for path, value in settings.items() if path not in volatile},
    "files": {path: value for path, value in files.items() if path not in volatile},
  }


def recorded(workdir: Path, step: int) -> dict[str, Any]:
  """The part of `extra` that says how far the record was when the checkpoint was made.

  The record is on disk when this returns: the checkpoint will say that these steps are done.

  Args:
    workdir: the run's directory.
    step: the checkpoint's: steps 0 .. step - 1 are on record.
  """
  sizes = {}
  for name in RECORDS:
    if (workdir / name).exists():
      with writing(workdir / name), open(workdir / name, "rb") as file:
        os.fsync(file.fileno())
        sizes[name] = os.fstat(file.fileno()).st_size
  return {"recorded": step - 1, "bytes": sizes}


def missing(workdir: Path, start: int, extra: Mapping[str, Any]) -> list[str]:
  """What the record lacks of the steps before `start`: a line for a person about each file.

  Args:
    workdir: the run's directory.
    start: the step that the run resumes with.
    extra: of the checkpoint that it resumes from; an older version left it empty.

  Raises:
    RecordError: a line before the last is broken.
  """
  said = []
  for name in RECORDS:
    steps, size = extent(workdir / name, start)
    gaps = missing_steps(steps, start) if name == "metrics.jsonl" else ""
    written = extra.get("bytes", {}).get(name, 0)
    if gaps:
      one = gaps.isdecimal()
      said.append(f"{'line' if one else 'lines'} {gaps} of {name} {'is' if one else 'are'} missing")
    elif size < written:
      said.append(f"{written - size} of {written} bytes of {name} are missing")
  return said


def missing_steps(steps: Iterable[int], end: int) -> str:
  """The steps from 0 to end - 1 that are not there, as ranges; "" if all are.

  >>> missing_steps([0, 1, 4, 6], 9)
  '2 to 3, 5, 7 to 8'
  """
  ranges: list[list[int]] = []
  for step in sorted(set(range(end)) - set(steps)):
    if ranges and step == ranges[-1][1] + 1:
      ranges[-1][1] = step
    else:
      ranges.append([step, step])
  return ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in ranges)
