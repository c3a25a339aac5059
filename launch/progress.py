"""What a person sees of a running sweep: on a terminal a block that stays, elsewhere lines."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from launch import state
from rl_llm.errors import redact
from rl_llm.runs.formatting import duration, number, printable

# Metrics that show how a run is doing; the first one in its record counts.
FIGURES = (
  "eval/sampled_accuracy",
  "eval/greedy_accuracy",
  "eval/pair_accuracy",
  "eval/label_auc",
  "reward_mean",
  "eval/token_loss",
  "eval/pair_loss",
  "eval/reverse_kl",
  "loss",
)


class Progress:
  """Says what happens to trials, and now and then where all of them are.

  Args:
    names: id -> what sets the trial apart.
    stream: where to; standard output when None.
    every: seconds between two summaries.
  """

  def __init__(self, names: Mapping[str, str], *, stream: TextIO | None = None, every: float = 30):
    self._names = names
    self._stream = sys.stdout if stream is None else stream
    self._live = self._stream.isatty()
    self._every = 1.0 if self._live else every
    self._began = self._shown = time.monotonic()
    self._drawn = 0  # lines of the block

  def say(self, line: str) -> None:
    """Prints a line that stays."""
    self._erase()
    self._stream.write(printable(redact(line)) + "\n")
    self._stream.flush()

  def started(self, start: Any) -> None:
    self.say(f"{start.trial.id} started on {start.slot.name}: {self._names[start.trial.id]}")

  def found(self, trial: Any, directory: Path, verdict: str) -> None:
    status = state.read_status(directory)
    if verdict == "failed" and not directory.exists():
      verdict = "gone: its directory was deleted; the same command begins it anew"
    elif verdict == "failed":
      said = f"{status['failures']} times: {status.get('reason', '')}"
      verdict = f"failed already, {said}; a larger --retries tries again"
    self.say(f"{trial.id} is {verdict}")

  def ended(self, start: Any, verdict: str) -> None:
    seconds = duration(time.monotonic() - start.began)
    status = state.read_status(start.directory)
    if verdict == "failed" and not start.directory.exists():
      self.say(
        f"{start.trial.id} failed after {seconds}: its directory was deleted while it ran; "
        "the same command begins it anew"
      )
      return
    if verdict not in ("failed", "again"):
      self.say(f"{start.trial.id} {verdict} after {seconds}{self._figure(start.directory)}")
      return
    then = "no more retries" if verdict == "failed" else (f"next try in {duration(status['wait'])}")
    self.say(f"{start.trial.id} failed after {seconds}: {status['reason']}; {then}. Last lines:")
    for line in status["lines"][-5:]:
      self.say(f"  | {line}")

  def show(
    self, running: Sequence[Any], settled: Mapping[str, str], total: int, elsewhere: int
  ) -> None:
    """The state of the whole sweep, if it is time for it."""
    now = time.monotonic()
    if now - self._shown < self._every:
      return
    self._shown = now
    counts = Counter(settled.values())
    counts["running"] = len(running)
    counts["under another launcher"] += elsewhere
    counts["waiting"] = total - len(settled) - len(running) - elsewhere
    words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    lines = [f"{total} trials after {duration(now - self._began)}: {words}"]
    for each in running:
      row = state.last_row(each.directory)
      steps = f"step {row['step']}/{each.trial.steps}" if "step" in row else "starting"
      lines.append(
        f"  {each.trial.id} {steps}{self._figure(each.directory)} {self._names[each.trial.id]}"
      )
    if not self._live:
      for line in lines:
        self.say(line)
      return
    self._erase()
    width = shutil.get_terminal_size().columns - 1
    self._stream.write("".join(f"{printable(redact(line))[:width]}\n" for line in lines))
    self._stream.flush()
    self._drawn = len(lines)

  def close(self) -> None:
    """Takes the block away."""
    self._erase()
    self._stream.flush()

  def _erase(self) -> None:
    if self._drawn:
      self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
      self._drawn = 0

  def _figure(self, directory: Path) -> str:
    row = state.last_row(directory)
    key = next((key for key in FIGURES if row.get(key) is not None), None)
    return f", {key.removeprefix('eval/')} {number(row[key])}" if key else ""
