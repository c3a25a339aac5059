"""The record of a run: one flushed JSON line per step, the source of all that is shown.

A run can be killed at any moment and resumes from its last checkpoint. The record must then be what
an uninterrupted run would have written, with no step lost or repeated. So the writer repairs it
when it opens: it drops a line cut in the middle, and the steps that the resumed run will repeat.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rl_llm.errors import UserError, redact, secrets
from rl_llm.files import write_atomically, writing

_encode = json.JSONEncoder(allow_nan=False).encode


class RecordError(UserError, ValueError):
  """A record is broken; the message names the file and the line."""


class MetricsWriter:
  """Appends rows of a step to a JSONL file, and repairs the file when a run resumes.

  >>> import tempfile
  >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
  >>> with MetricsWriter(path) as writer:
  ...   writer.write(1, {"loss": 0.5})
  ...   writer.write(2, {"loss": np.float32(0.25), "kl": float("inf")})
  >>> with MetricsWriter(path, resume_step=1) as writer:  # the checkpoint is of step 1
  ...   writer.write(2, {"loss": 0.125})
  >>> print(path.read_text(), end="")
  {"step": 1, "loss": 0.5}
  {"step": 2, "loss": 0.125}

  Each call is one write, so a kill loses at most the call in progress; with `sync` it is on disk
  when the call returns, so the same holds where the machine dies. Write a step's rows before its
  checkpoint, so that every step in a checkpoint is on record. A line has
  "step" first and the other keys sorted. Floats read back exactly; JSON has no non-finite numbers,
  so they are written as the strings "nan", "inf" and "-inf", which `float` reads back. Credentials
  in texts are redacted.

  Args:
    path: the file; its directory exists. None writes nothing: only one of several processes keeps
      the record.
    resume_step: the step of the checkpoint that the run resumes from: rows of later steps are
      dropped. None begins a new record and drops all rows.
    sync: whether each call waits for the disk. If not, `close` does, and whoever saves a checkpoint
      does it before (`rl_llm.runs.origin.recorded`): rows after it are written again anyway.

  Raises:
    RecordError: a line before the last is not a JSON object with an int "step".
  """

  def __init__(
    self, path: str | os.PathLike | None, *, resume_step: int | None = None, sync: bool = True
  ):
    kept, self._file, self._last_step, self._sync = [], None, None, sync
    if path is None:
      return
    self.path = Path(path)
    if resume_step is not None and self.path.exists():
      kept = [line for line, row in _lines(self.path) if row["step"] <= resume_step]
    write_atomically(self.path, b"".join(line + b"\n" for line in kept))
    self._last_step = json.loads(kept[-1])["step"] if kept else None
    self._file = open(self.path, "ab", buffering=0)

  def write(self, step: int, *rows: Mapping[str, Any]) -> None:
    """Appends the step's rows: one in metrics.jsonl, one per sample in samples.jsonl.

    Args:
      step: the step, not before the last step written.
      rows: dicts of scalars: numbers (Python, NumPy or JAX), bools, strings or None. A sample that
        is an episode also has a list of such dicts, one for each turn.

    Raises:
      ValueError: the step is before the last one written.
      TypeError: a value is not a scalar; the message names its key.
      WriteError: the disk is full, or the file gone; the run resumes once that is put right.
    """
    step = int(step)
    if self._last_step is not None and step < self._last_step:
      raise ValueError(f"step is {step}, must be at least {self._last_step}, the last one written")
    self._last_step = step
    if self._file is None:
      return
    # A step's texts repeat: each prompt in its group, "ok" and "eos" in every line.
    clean = functools.cache(functools.partial(redact, environ=secrets()))
    left = memoryview("".join(_line(step, row, clean) + "\n" for row in rows).encode("ascii"))
    with writing(self.path):
      while left:  # A disk that gets full takes a part.
        left = left[self._file.write(left) :]
      if self._sync:
        os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file; everything written is on disk."""
    if self._file is not None and not self._file.closed:
      try:
        with writing(self.path):
          os.fsync(self._file.fileno())
      finally:
        self._file.close()

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _line(step: int, row: Mapping[str, Any], clean: Callable[[str], str]) -> str:
  if "step" in row:
    raise ValueError('a row has its own "step"; the step is the first argument of write')
  return _encode({"step": step} | plain(row, clean=clean))


def plain(row: Mapping[str, Any], *, clean: Callable[[str], str] = redact) -> dict[str, Any]:
  """A row as a record holds it: sorted, its numbers such as JSON has, its texts redacted.

  >>> plain({"loss": np.float32(0.5), "key": "hf_abcdefghijklmnopqrstuvwx", "kl": float("inf")})
  {'key': '[redacted]', 'kl': 'inf', 'loss': 0.5}

  Args:
    row: as for `MetricsWriter.write`.
    clean: redacts a text.

  Raises:
    TypeError: a value is not a scalar; the message names its key.
  """
  return {key: _value(key, row[key], clean) for key in sorted(row)}


def _value(key: str, value: Any, clean: Callable[[str], str]) -> Any:
  """A scalar, or a list of dicts of scalars."""
  if isinstance(value, list) and all(isinstance(each, dict) for each in value):
    return [{name: _scalar(f"{key}, {name}", each[name], clean) for name in each} for each in value]
  return _scalar(key, value, clean)


def _scalar(key: str, value: Any, clean: Callable[[str], str]) -> Any:
  """The value as an equal one that JSON can hold."""
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, str):
    return clean(value)
  if not isinstance(value, (int, float)):
    array = np.asarray(value)
    if array.ndim or array.dtype == object:
      kind, shape = type(value).__name__, f" of shape {array.shape}" if array.ndim else ""
      raise TypeError(f"{key!r} is a {kind}{shape}, must be a scalar: reduce it before writing")
    if array.dtype == bool:
      return bool(array)
    value = int(array) if np.issubdtype(array.dtype, np.integer) else float(array)
  return json_number(value)


def json_number(value: int | float) -> int | float | str:
  """The number, or for a non-finite number its name, which `float` reads back.

  >>> json_number(0.5), json_number(float("inf")), json_number(float("nan"))
  (0.5, 'inf', 'nan')
  """
  return value if isinstance(value, int) or math.isfinite(value) else str(float(value))


def _lines(path: Path) -> list[tuple[bytes, dict]]:
  """The complete lines of a file and their rows; the last line may be cut short."""
  *lines, last = path.read_bytes().split(b"\n")
  numbered = list(enumerate([*lines, last], 1))
  if not last:
    numbered.pop()
  rows = []
  for number, line in numbered:
    try:
      row = json.loads(line)
      if type(row["step"]) is not int:
        raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
      if number == numbered[-1][0]:
        break
      raise RecordError(
        f'{path}:{number}: must be a JSON object with an int "step"; only the last line may be '
        "cut. Move the file away to begin a new record"
      ) from None
    rows.append((line, row))
  return rows


def read(path: str | os.PathLike) -> list[dict]:
  """The rows of a record, also while a run is writing: a last line cut short is left out.

  Args:
    path: a file that `MetricsWriter` wrote.

  Returns:
    One dict per line, including "step"; non-finite numbers are strings that `float` reads.

  Raises:
    RecordError: a line before the last is broken; the message names the file and the line.
    FileNotFoundError: there is no such file.
  """
  return [row for _, row in _lines(Path(path))]


def extent(path: str | os.PathLike, end: int) -> tuple[list[int], int]:
  """(the steps of a record's lines before the step `end`, the bytes of these lines).

  Args:
    path: a file that `MetricsWriter` wrote; without it there are no lines.
    end: the first step that does not count.

  Raises:
    RecordError: as for `read`.
  """
  path = Path(path)
  found = [(row["step"], len(line) + 1) for line, row in _lines(path)] if path.exists() else []
  kept = [(step, size) for step, size in found if step < end]
  return [step for step, _ in kept], sum(size for _, size in kept)


def without_timings(rows: Iterable[Mapping[str, Any]]) -> list[dict]:
  """The rows without the keys that depend on the clock, "time/..." and "speed/...": the part that
  an interrupted and an uninterrupted run must share.

  >>> without_timings([{"step": 1, "loss": 0.5, "time/step": 2.1, "speed/mfu": 0.3}])
  [{'step': 1, 'loss': 0.5}]

  Args:
    rows: rows of a record.

  Returns:
    New rows, in the same order.
  """
  return [
    {key: value for key, value in row.items() if not key.startswith(("time/", "speed/"))}
    for row in rows
  ]


class PhaseClock:
  """Measures the seconds of each phase of a step, for the record.

      clock = PhaseClock()
      with clock("rollout"):
        ...
      writer.write(step, row | clock.metrics())  # "time/rollout", and "time/step" since it was made

  Work on a device is asynchronous: a phase must wait for its result at the end, or its time counts
  in the next phase. A trace (`rl_llm.runs.profiling`) shows the phases by name.
  """

  def __init__(self):
    self._started = time.monotonic()
    self._seconds: dict[str, float] = {}

  @contextmanager
  def __call__(self, phase: str) -> Iterator[None]:
    """Adds the duration of the block to the phase."""
    import jax  # Here, so that reading records does not import it.

    started = time.monotonic()
    with jax.profiler.TraceAnnotation(phase):
      yield
    self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - started

  def metrics(self) -> dict[str, float]:
    """The seconds of every phase so far, and of the whole step."""
    whole = {"time/step": time.monotonic() - self._started}
    return {f"time/{phase}": seconds for phase, seconds in self._seconds.items()} | whole


def add_metrics(
  totals: Mapping[str, tuple[Any, Any]], metrics: Mapping[str, tuple[Any, Any]]
) -> dict[str, tuple[Any, Any]]:
  """Adds up the (sum, count) pairs of two parts.

  >>> add_metrics({"kl": (0.5, 2)}, {"kl": (0.25, 1), "ratio": (4.0, 4)})
  {'kl': (0.75, 3), 'ratio': (4.0, 4)}
  """
  added = dict(totals)
  for name, (total, count) in metrics.items():
    before = added.get(name)
    added[name] = (total, count) if before is None else (before[0] + total, before[1] + count)
  return added


def finalize(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Divides metrics that were added up as (sum, count) pairs over microbatches and hosts.

  Averages with different counts cannot be averaged. If 1 of 3 tokens was clipped, and then 1 of 1,
  half of the tokens were clipped, though the mean of the two means is 0.67:

  >>> finalize({"clip_fraction": (1.0 + 1.0, 3 + 1), "kl": (0.0, 0)})
  {'clip_fraction': 0.5, 'kl': None}

  Args:
    metrics: name -> (sum, count), where a sum may be an array; other values stay as they are.

  Returns:
    name -> sum / count, or None if the count is 0.
  """

  def mean(metric: Any) -> Any:
    if not isinstance(metric, tuple):
      return metric
    total, count = np.asarray(metric[0], float), float(metric[1])
    return (total / count if total.ndim else float(total) / count) if count else None

  return {name: mean(metric) for name, metric in metrics.items()}


def proportion_interval(
  correct_counts: Any, samples_per_problem: Any
) -> tuple[float, float, float]:
  """The accuracy over problems that were each tried several times, with a 95 % interval.

  Ten answers to one problem are not ten problems: they share its difficulty, and an interval that
  counts each as independent is far too narrow. Problems are the independent units, so their spread
  says how many independent answers all answers are worth. With S_i answers to problem i:

      p_i = correct_i / S_i      p = mean(p_i)        v = sum((p_i - p)^2) / (N (N - 1))
      n   = p (1 - p) / v, kept within [N, sum(S_i)]                 (effective sample size)
      low, high = (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  z = 1.96

  This is Wilson's interval at n answers, so it stays inside [0, 1], and its width is not 0 even if
  all answers are right or all are wrong; then the spread says nothing, and n = N. With one sample
  per problem, n = N too. The approximation is good from about 30 problems.

  Two problems, one right 4 times of 4, the other never, say no more than two answers do:

  >>> [round(x, 3) for x in proportion_interval([4, 0], 4)]
  [0.5, 0.095, 0.905]
  >>> [round(x, 3) for x in proportion_interval([1, 0], 1)]
  [0.5, 0.095, 0.905]

  Args:
    correct_counts: [N] ints, how many of a problem's samples were right.
    samples_per_problem: S, at least 1, or [N] of them where problems have different numbers.

  Returns:
    (mean, low, high), each in [0, 1].

  Raises:
    ValueError: there are no problems, a count is outside 0 ... S, or there are more or fewer S than
      problems.

  Reference: Wilson, 1927, Probable inference, the law of succession, and statistical inference;
  Korn and Graubard, 1998, Confidence intervals for proportions with small expected number of
  positive counts estimated from survey data (the effective sample size).
  """
  counts = np.asarray(correct_counts, dtype=np.float64)
  if counts.ndim != 1 or not counts.size:
    raise ValueError(f"correct_counts has shape {counts.shape}, must be [N] with N at least 1")
  samples = np.asarray(samples_per_problem, dtype=np.float64)
  if samples.ndim and samples.shape != counts.shape:
    raise ValueError(
      f"samples_per_problem has shape {samples.shape}, must be one number, or {counts.shape}"
    )
  if (samples < 1).any():
    raise ValueError(f"samples_per_problem is {samples_per_problem}, must be at least 1")
  if not ((counts >= 0) & (counts <= samples)).all():
    raise ValueError(
      f"correct_counts has values from {counts.min()} to {counts.max()}, must be within 0 and "
      f"samples_per_problem ({samples_per_problem})"
    )
  problems = counts.size
  each = counts / samples
  mean = float(each.mean())
  variance = float(((each - mean) ** 2).sum()) / (problems * max(problems - 1, 1))
  largest = float(np.broadcast_to(samples, counts.shape).sum())
  if mean in (0.0, 1.0) or problems == 1:
    effective = problems
  else:
    effective = mean * (1 - mean) / variance if variance else largest
  n = min(max(effective, problems), largest)
  z = 1.959963984540054
  center = (mean + z * z / (2 * n)) / (1 + z * z / n)
  half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
  return mean, min(max(center - half, 0.0), mean), max(min(center + half, 1.0), mean)


def noise_to_signal(vectors: Sequence[Any]) -> float:
  """The noise in independent estimates of one vector: trace(covariance) / |mean|^2.

  For gradients of independent batches, it is the number of batches to average before the signal is
  as long as the noise; both are estimated without bias. For 3 and 5, the variance is 2, and the
  square of the mean is 4^2 - 2 / 2 = 15:

  >>> round(noise_to_signal([np.array([3.0]), np.array([5.0])]), 4)
  0.1333

  Args:
    vectors: N >= 2 arrays [D].

  Returns:
    The ratio; infinity if the mean cannot be distinguished from 0.
  """
  products = np.array([[np.dot(a, b) for b in vectors] for a in vectors], np.float64)
  count = len(vectors)
  signal_and_noise = products.mean()  # |mean|^2
  trace = (np.trace(products) - count * signal_and_noise) / (count - 1)
  squared = signal_and_noise - trace / count
  return float(trace / squared) if squared > 0 else float("inf")
