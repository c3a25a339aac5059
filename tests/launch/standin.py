"""An experiment without a model, for the launcher's tests: it counts, keeps a journal and resumes.

It does what the experiments do with a run's directory (settings, lock, record, checkpoint, result,
signals), and fails in the ways that the tests ask for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal

from rl_llm.errors import ConfigError
from rl_llm.files import locked, write_atomically
from rl_llm.runs.config import check, option, run, volatile
from rl_llm.runs.run_directory import open_run, write_result
from rl_llm.runs.signals import Interrupted, StopSignals


@dataclasses.dataclass(frozen=True)
class Optimizer:
  learning_rate: float = option(0.1, "how fast", above=0)
  schedule: Literal["constant", "linear"] = option("constant", "to the end")


@dataclasses.dataclass(frozen=True)
class Loss:
  name: Literal["square", "absolute"] = option("square", "which")
  clip: float | None = option(None, "at most", above=0)

  def check(self, config):
    if self.name == "absolute" and self.clip is not None:
      raise ConfigError("loss.clip", self.clip, "left out with --loss=absolute")


@dataclasses.dataclass(frozen=True)
class Config:
  """What it counts."""

  model: str = option("large", "large or tiny")
  workdir: str = option("", "where", volatile=True)
  seed: int = option(0, "of nothing", min=0)
  steps: int = option(
    4, "to count to", min=1, volatile=lambda config: config.optimizer.schedule == "constant"
  )
  seconds: float = option(0.0, "of each step", min=0)
  gate: str = option("", "a file without which step 2 does not begin", volatile=True)
  journal: str = option("", "a file for all trials: a line per event", volatile=True)
  fault: Literal["none", "raise", "hang", "killed", "deaf", "settings"] = option("none", "what")
  fault_at: int = option(1, "step", min=0)
  faults: int = option(1000, "times it does", min=0)
  optimizer: Optimizer = Optimizer()
  loss: Loss = Loss()


def overrides(config):
  return {"optimizer.learning_rate": 0.5} if config.model == "tiny" else {}


def main(config):
  check(config)
  workdir = Path(config.workdir)

  def note(*words):
    with open(config.journal, "a") as file:  # One write of one line: it cannot be torn.
      file.write(" ".join(map(str, (workdir.name, os.getpid(), *words))) + "\n")

  result = open_run(workdir, config, volatile=volatile(config))
  with locked(workdir / ".lock") as alone, StopSignals() as stop:
    if not alone:
      raise ConfigError("workdir", config.workdir, "a directory that no other process trains in")
    if result is not None and result["steps"] >= config.steps:
      note("finished before")
      return 0
    saved = workdir / "saved.json"
    begin = json.loads(saved.read_text()) if saved.exists() else 0
    note("begin", begin)
    record = workdir / "metrics.jsonl"
    lines = record.read_text().splitlines(keepends=True)[:begin] if record.exists() else []
    write_atomically(record, "".join(lines).encode())
    try:
      for step in range(begin, config.steps):
        stop.check()
        fail(config, workdir, step)
        while config.gate and step == 2 and not os.path.exists(config.gate):
          stop.check()
          time.sleep(0.01)
        time.sleep(config.seconds)
        figure = config.optimizer.learning_rate * step + 0.01 * config.seed
        with open(record, "a") as file:
          row = {"step": step, "eval/sampled_accuracy": figure, "time/step": config.seconds}
          file.write(json.dumps(row) + "\n")
        note("step", step)
        write_atomically(saved, json.dumps(step + 1).encode())
    except Interrupted as interruption:
      note("stopped")
      return 128 + interruption.signum
    figure = config.optimizer.learning_rate * config.steps + 0.01 * config.seed
    after = {"eval/sampled_accuracy": figure}
    write_result(workdir, {"steps": config.steps, "seconds": 1.0, "before": {}, "after": after})
    note("done")
  return 0


def fail(config, workdir, step):
  """The fault that the settings ask for, as often as they ask for it."""
  if config.fault == "none" or step != config.fault_at:
    return
  count = workdir / "faults"
  done = int(count.read_text()) if count.exists() else 0
  if done >= config.faults:
    return
  count.write_text(str(done + 1))
  print(f"about to {config.fault}", file=sys.stderr, flush=True)
  if config.fault == "raise":
    raise RuntimeError("the loss is the wrong way round")
  if config.fault == "settings":
    raise ConfigError("seed", config.seed, "another")
  if config.fault == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
  if config.fault == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  time.sleep(3600)


if __name__ == "__main__":
  run(main, Config, overrides=overrides)
