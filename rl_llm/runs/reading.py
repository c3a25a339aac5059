"""What a run left, for a notebook: its result, and its metrics as arrays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rl_llm.errors import UserError
from rl_llm.runs.metrics import read


def result(run: str | os.PathLike) -> dict[str, Any]:
  """The content of a finished run's result.json.

  Args:
    run: its directory.

  Raises:
    UserError: the run is not finished, or there is none.
  """
  path = Path(run) / "result.json"
  if not path.exists():
    raise UserError(f"{run} has no result.json: no run has finished there; its command resumes it")
  return json.loads(path.read_text("ascii"))


def metrics(run: str | os.PathLike) -> dict[str, np.ndarray]:
  """A run's metrics.jsonl as arrays, also while the run is in progress.

  >>> import tempfile
  >>> run = Path(tempfile.mkdtemp())
  >>> rows = {"step": 0, "reward": 0.25, "eval/accuracy": 0.5}, {"step": 1, "reward": 0.5}
  >>> _ = (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
  >>> {name: values.tolist() for name, values in metrics(run).items()}
  {'step': [0, 1], 'reward': [0.25, 0.5], 'eval/accuracy': [0.5, nan]}

  Args:
    run: its directory.

  Returns:
    Name -> [steps] float64, NaN where a step has no such figure; "step" is int64. Texts are left
    out.

  Raises:
    FileNotFoundError: there is no record.
    RecordError: a line of it is broken.
  """
  rows = read(Path(run) / "metrics.jsonl")
  names = dict.fromkeys(name for row in rows for name in row)
  found = {name: [_number(row.get(name)) for row in rows] for name in names}
  return {
    name: np.array(values, np.int64 if name == "step" else np.float64)
    for name, values in found.items()
    if None not in values
  }


def _number(value: Any) -> float | None:
  """A figure, NaN where there is none; None for a text. Non-finite numbers are stored as texts."""
  try:
    return float("nan") if value is None else float(value)
  except (TypeError, ValueError):
    return None
