"""Runs all trials of a sweep in this process, as one program: see `experiments.population`.

The trials are of `experiments.grpo`, and differ in what is data to its programs. The population has
a directory next to theirs, with its checkpoints. A trial's directory holds what it would hold if
run alone, except checkpoints. Trials start and resume together, so the same command resumes with
the same members, even if the last start was killed while it wrote their results.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import state
from launch.sweep import SweepError, Trial
from rl_llm.errors import UserError
from rl_llm.runs.config import resolve
from rl_llm.runs.signals import Interrupted

EXPERIMENT = "experiments.grpo"


def find_members(trials: Sequence[Trial], workdir: Path) -> tuple[list[Trial], Path]:
  """Which trials make up the population, and its directory.

  These are all that are not done, or all members of the population, if one of them has begun.

  Args:
    trials: of the sweep.
    workdir: the sweep's.
  """
  known = {trial.id: trial for trial in trials}
  left = {trial.id for trial in trials if not state.is_done(workdir / trial.id, trial.steps)}
  for path in sorted(workdir.glob("population-*/config.json")):
    ids = state.read_json(path).get("members", [])
    if left and left <= set(ids) <= set(known):
      return [known[id] for id in ids], path.parent
  members = [trial for trial in trials if trial.id in left]
  name = hashlib.sha256(" ".join(trial.id for trial in members).encode()).hexdigest()[:12]
  return members, workdir / f"population-{name}"


def train_all(trials: Sequence[Trial], workdir: Path) -> dict[str, str]:
  """Trains what is not done; id -> "done", "failed" or "stopped".

  Args:
    trials: of the sweep; their directories have been described.
    workdir: the sweep's.

  Raises:
    SweepError: the trials cannot be one program, or one is at work or has begun elsewhere.
    Interrupted: SIGINT or SIGTERM came; everything is saved.
  """
  if trials[0].experiment != EXPERIMENT:
    raise SweepError(
      f"EXPERIMENT={trials[0].experiment!r}: must be {EXPERIMENT!r} with --backend=population"
    )
  members, directory = find_members(trials, workdir)
  verdicts = dict.fromkeys([trial.id for trial in trials], "done")
  if not members:
    return verdicts
  grpo, population = map(importlib.import_module, (EXPERIMENT, "experiments.population"))
  configs = [resolve(grpo.Config, trial.settings, overrides=grpo.overrides)[0] for trial in members]
  places = [workdir / trial.id for trial in members]
  for place in places:
    if any((place / "checkpoints").glob("[0-9]*")):
      raise SweepError(
        f"trial {place.name} has begun on its own: --only={place.name} finishes it with --backend="
        "local, and the population is then made up of the others"
      )
  try:
    population.check(configs)
    with held(places), recorded(members, places) as found:
      population.train(configs, places, directory)
      found |= outcomes(members, places)
  except UserError as error:
    raise SweepError(str(error)) from None
  return verdicts | found


def outcomes(members: Sequence[Trial], places: Sequence[Path]) -> dict[str, str]:
  """What became of each, now that the population has come to its end."""
  return {
    trial.id: "done" if state.is_done(place, trial.steps) else "failed"
    for trial, place in zip(members, places, strict=True)
  }


@contextlib.contextmanager
def recorded(members: Sequence[Trial], places: Sequence[Path]) -> Iterator[dict[str, str]]:
  """Writes each status before and after; the body fills in what became of each trial.

  The seconds of a trial are those of the whole program, since it has none of its own.
  """
  began = time.monotonic()
  before = [state.read_status(place).get("seconds", 0.0) for place in places]
  for place in places:
    state.record(place, status="running", slot="population")
  found: dict[str, str] = {}
  reason = "ended before the population did"
  try:
    yield found
  except Interrupted:
    found |= dict.fromkeys([trial.id for trial in members], "stopped")
    raise
  except BaseException as error:
    reason = f"{type(error).__name__}: {error}"
    raise
  finally:
    for trial, place, seconds in zip(members, places, before, strict=True):
      verdict = found.get(trial.id, "failed")
      changes = {"failures": 0, "reason": "", "lines": []}
      if verdict == "failed":
        why = state.last_row(place).get("failure", reason)
        changes = {"failures": 1, "reason": why, "lines": []}
      seconds = round(seconds + time.monotonic() - began, 1)
      state.record(place, status=verdict, seconds=seconds, ended=time.time(), **changes)


@contextlib.contextmanager
def held(places: Sequence[Path]) -> Iterator[None]:
  """Holds the leases of all trials, and gives signs of life, while the body runs.

  Raises:
    SweepError: another launcher has one of them.
  """
  leases: list[Path] = []
  over = threading.Event()

  def beat() -> None:
    while not over.wait(state.HEARTBEAT):
      if not all([state.renew_lease(lease) for lease in leases]):
        # Another launcher took us for dead: save, and leave the trial to it.
        os.kill(os.getpid(), signal.SIGTERM)
        return

  heart = threading.Thread(target=beat, daemon=True)
  try:
    for place in places:
      lease = state.take_lease(place)
      if lease is None:
        raise SweepError(f"trial {place.name} is at work under another launcher; wait, or stop it")
      leases.append(lease)
    heart.start()
    yield
  finally:
    over.set()
    if heart.is_alive():
      heart.join()
    for lease in leases:
      state.release_lease(lease)
