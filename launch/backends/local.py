"""Runs trials as processes of this machine, one per slot at a time.

One thread, one loop: a process set to die with its parent dies with the *thread* that started it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from launch import state
from launch.backends.slots import Slot
from launch.backends.starts import HOPELESS, Start, ask, conclude, start, watch
from launch.progress import Progress
from launch.sweep import Trial
from rl_llm.files import locked
from rl_llm.runs.signals import Interrupted, StopSignals

POLL = 0.1  # seconds between two checks of the processes
CHECK_SECONDS = (
  3.0  # seconds between two looks at what another launcher has, or what may be hopeless
)


class Standing(NamedTuple):
  """What a trial's directory says to do, and when to check it again."""

  verdict: str  # "go", "done", "failed", "elsewhere", or "wait"
  seconds: float = 0.0


def standing(trial: Trial, directory: Path, *, retries: int) -> Standing:
  """Whether the trial needs anything done, by this launcher or another."""
  if state.is_done(directory, trial.steps):
    return Standing("done")
  status = state.read_status(directory)
  if status.get("failures", 0) > retries:
    return Standing("failed")
  left = state.wait_left(status, time.time())
  return Standing("wait", left) if left > 0 else Standing("go")


def check(
  trial: Trial, directory: Path, heartbeats: dict[Path, float], *, retries: int
) -> Standing:
  """Whether we may start a trial, as far as this can be known without its lease."""
  if not directory.exists():
    return Standing("failed")
  found = standing(trial, directory, retries=retries)
  lease = state.newest_lease(directory)
  held = state.holder(lease)
  if found.verdict == "done" or held == "nobody":
    return found
  # Of a launcher on another machine we know that it lives once we have seen a sign of life.
  beat = lease.stat().st_mtime
  alive = held == "alive" or heartbeats.setdefault(lease, beat) != beat
  return Standing("elsewhere" if alive else "wait", CHECK_SECONDS)


class Limits(NamedTuple):
  """How often and how long each trial may run."""

  retries: int  # how often a trial that failed is started again, over all launchers
  backoff: float  # seconds before the first of them; doubles each time
  time_limit: float  # seconds of one start, 0 = none
  grace: float  # seconds to save in, once asked to end


@dataclasses.dataclass
class Launcher:
  """What this launcher knows of the trials. `drive` is its loop, each method a part of one turn."""

  workdir: Path
  free: list[Slot]
  commands: Callable[[Trial, Slot], list[list[str]]]
  limits: Limits
  progress: Progress
  ask: Callable[[subprocess.Popen, int | None], None]
  trials: list[Trial] = dataclasses.field(default_factory=list)
  running: list[Start] = dataclasses.field(default_factory=list)
  settled: dict[str, str] = dataclasses.field(default_factory=dict)  # id -> verdict
  elsewhere: set[str] = dataclasses.field(default_factory=set)  # ids that another launcher runs
  next_check: dict[str, float] = dataclasses.field(default_factory=dict)  # id -> monotonic time
  heartbeats: dict[Path, float] = dataclasses.field(default_factory=dict)  # lease -> its first
  waits: dict[str, float] = dataclasses.field(default_factory=dict)  # id -> seconds, after a lease

  def add(self, trials: Sequence[Trial]) -> None:
    self.trials += trials
    self.next_check |= dict.fromkeys((trial.id for trial in trials), 0.0)

  def open_ids(self) -> list[str]:
    """The trials that are not settled."""
    return [trial.id for trial in self.trials if trial.id not in self.settled]

  def end_those_over(self, *, time_limit: float, stopping: bool) -> None:
    """Watches every trial that runs, and frees the slots of those that are over."""
    limits = self.limits
    for over in [r for r in self.running if watch(r, time_limit=time_limit, grace=limits.grace)]:
      self.running.remove(over)
      self.free.append(over.slot)
      verdict = conclude(over, retries=limits.retries, backoff=limits.backoff, stopping=stopping)
      self.progress.ended(over, verdict)
      if verdict == "again":
        # By a monotonic clock; what is on disk is for other launchers, and later ones.
        wait = state.read_status(over.directory).get("wait", 0.0)
        self.next_check[over.trial.id] = time.monotonic() + wait
      else:
        self.settled[over.trial.id] = verdict

  def end_hopeless(self, hopeless: Callable[[Trial], bool]) -> None:
    for each in self.running:
      if each.kill_at is None and time.monotonic() - each.judged > CHECK_SECONDS:
        each.judged = time.monotonic()
        if hopeless(each.trial):
          each.cause = HOPELESS
          each.ask_to_end(self.limits.grace)

  def begin_more(self, more: Callable[[Mapping[str, str]], list[Trial]]) -> None:
    """Starts trials while a slot is free; asks for more of them if none waits for it."""
    begun = {each.trial.id for each in self.running} | self.settled.keys() | self.elsewhere
    if self.free and begun.issuperset(self.next_check):
      self.add(more(self.settled))
    for trial in self.trials:
      due = trial.id not in self.settled and self.next_check[trial.id] <= time.monotonic()
      if self.free and due:
        self.next_check[trial.id] = time.monotonic() + self.begin(trial)

  def begin(self, trial: Trial) -> float:
    """Starts the trial in a free slot; else seconds until it can be tried again."""
    directory = self.workdir / trial.id
    try:
      return self._begin(trial, directory)
    except FileNotFoundError:
      if directory.exists():
        raise
      return 0.2  # Deleted this moment: the next check says so.

  def _begin(self, trial: Trial, directory: Path) -> float:
    retries = self.limits.retries
    found = check(trial, directory, self.heartbeats, retries=retries)
    self.elsewhere.discard(trial.id)
    if found.verdict in ("done", "failed"):
      self.settled[trial.id] = found.verdict
      self.progress.found(trial, directory, found.verdict)
    elif found.verdict == "elsewhere":
      self.elsewhere.add(trial.id)
    elif found.verdict == "go" and (lease := state.take_lease(directory)) is not None:
      # Between our check and our lease another launcher may have come and gone; and a process may
      # train there without one, started by hand or not quite dead yet.
      with locked(directory / ".lock") as alone:
        pass
      if not alone or standing(trial, directory, retries=retries).verdict != "go":
        state.release_lease(lease)
        wait = min(2 * self.waits.get(trial.id, 0.1), 30.0)  # Each check costs a lease.
        self.waits[trial.id] = wait
        return wait
      slot = self.free[0]
      state.record(directory, status="running", slot=slot.name)
      commands = self.commands(trial, slot)
      self.running.append(start(trial, directory, slot, lease, commands, self.ask))
      self.free.remove(slot)
      self.progress.started(self.running[-1])
      return float("inf")
    return max(found.seconds, 0.2)

  def stop_all(self, received: int) -> None:
    """Asks every trial to save and end, and waits for it."""
    for each in self.running:
      each.ask_to_end(self.limits.grace, received)
    while self.running:
      self.end_those_over(time_limit=0, stopping=True)
      time.sleep(POLL)


def drive(
  trials: Sequence[Trial],
  workdir: Path,
  *,
  slots: Sequence[Slot],
  commands: Callable[[Trial, Slot], list[list[str]]],
  limits: Limits,
  progress: Progress,
  ask: Callable[[subprocess.Popen, int | None], None] = ask,
  more: Callable[[Mapping[str, str]], list[Trial]] = lambda verdicts: [],
  hopeless: Callable[[Trial], bool] = lambda trial: False,
) -> dict[str, str]:
  """Runs every trial that is neither done nor another launcher's, until nothing is left to do.

  Args:
    trials: all of the sweep, in the order in which to start.
    workdir: holds their directories.
    slots: one trial at a time in each.
    commands: the command of each process of a trial in a slot.
    limits: of each trial.
    progress: where to say what happens.
    ask: (process, the signal that the launcher received or None) asks a process to save and end.
    more: further trials to run, asked for when a slot is free and no trial waits for it; called
      with the verdicts so far.
    hopeless: whether a trial that is running is to be ended for good, asked every few seconds.

  Returns:
    id -> "done", "failed", "stopped", "pruned" or "elsewhere".

  Raises:
    Interrupted: SIGINT or SIGTERM came; the trials were asked to save, and have ended.
  """
  launcher = Launcher(workdir, list(slots), commands, limits, progress, ask)
  launcher.add(trials)
  running, settled, elsewhere = launcher.running, launcher.settled, launcher.elsewhere
  with StopSignals() as stop:
    try:
      while True:
        stop.check()
        launcher.end_those_over(time_limit=limits.time_limit, stopping=False)
        launcher.end_hopeless(hopeless)
        launcher.begin_more(more)
        left = launcher.open_ids()
        if not running and elsewhere.issuperset(left):
          return settled | dict.fromkeys(left, "elsewhere")
        progress.show(running, settled, len(launcher.trials), len(elsewhere))
        time.sleep(POLL)
    except Interrupted as interruption:
      launcher.stop_all(interruption.signum)
      raise
    except BaseException:
      for each in running:
        each.kill()
      raise
    finally:
      progress.close()
