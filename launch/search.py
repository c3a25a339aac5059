"""Search by Optuna: each new trial is chosen by what the ones before it gave.

A sweep's file has `search` in place of `sweep`. It asks Optuna for what is to vary, and returns the
flags of one trial:

    EXPERIMENT = "experiments.grpo"

    def search(trial):
      return {
        "model": "tiny", "task": "copy",
        "optimizer.learning_rate": trial.suggest_float("rate", 1e-3, 1e-1, log=True),
        "loss.clip_high": trial.suggest_categorical("clip", [0.2, 0.28]),
      }

Optuna itself keeps nothing on disk. WORKDIR/search.json has what it suggested for each trial, in
order; a trial's outcome is in the trial's directory, as always. A launcher that resumes replays the
same trials and their results to a new study, and none is run twice. Draws depend on the seed, the
trial's number and the results known by then, not on how often the launcher was started: with one
trial at a time, a search that was killed asks for the same trials as an uninterrupted one.

A common misconception is that pruning only saves time. It ends slow learners, however good they
might have become. Trials are compared at the same step, so start pruning after the steps in which
the curves of good and bad settings cross.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from launch import halving, state
from launch.sweep import Settings, Trial, load_function, plan
from rl_llm.errors import ConfigError
from rl_llm.files import locked
from rl_llm.runs import formatting
from rl_llm.runs.config import option
from rl_llm.runs.metrics import read
from rl_llm.runs.report_page import finite


@dataclasses.dataclass(frozen=True)
class Search:
  """Search by Optuna, of a file with search()."""

  trials: int = option(0, "how many it may ask for; 0 = no search", min=0)
  metric: str = option("eval/sampled_accuracy", "the metric that compares trials")
  lowest: bool = option(False, "the lowest is best, as of a loss")
  seed: int = option(0, "random seed of the search's draws", min=0)
  prune_from: int = option(
    0,
    "step from which a trial is ended if it is below the median of the finished ones, five at "
    "least, as they were at its step; 0 = none is",
    min=0,
  )


class Asked(NamedTuple):
  """A trial that Optuna chose."""

  handle: Any  # optuna.trial.Trial
  trial: Trial


class Study:
  """What Optuna knows of a search.

  Args:
    options: of the search.
    path: the file with search().
    workdir: the sweep's; its search.json says what was asked for before.

  Raises:
    ConfigError: Optuna is not installed.
    SweepError: the file or a setting is wrong, or the file is not the one of the trials asked for.
  """

  def __init__(self, options: Search, path: str, workdir: Path):
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._optuna, self._options, self._path, self._workdir = optuna, options, path, workdir
    self._experiment, self._search = load_function(
      path, "search", "takes an Optuna trial and returns flags"
    )
    self._study = optuna.create_study(
      direction="minimize" if options.lowest else "maximize",
      pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=options.prune_from),
    )
    self.trials: dict[str, Trial] = {}  # by id
    self.names: dict[str, str] = {}  # what sets each apart
    self._asked: list[Asked] = []
    self._told: set[int] = set()  # numbers
    self._reported: set[tuple[int, int]] = set()  # number, step
    for known in state.read_json(workdir / "search.json").get("asked", []):
      found = self._ask(known["params"])
      if found.id != known["id"]:
        raise ConfigError(
          "sweep",
          path,
          f"the file that {workdir} was begun with: of {known['params']} it now "
          "makes another trial",
          "another --workdir begins anew",
        )
    if not self._asked:
      self._ask()

  def _ask(self, params: Settings | None = None) -> Trial:
    number = len(self._asked)
    draws = random.Random(f"{self._options.seed}/{number}")
    self._study.sampler = self._optuna.samplers.TPESampler(seed=draws.getrandbits(32))
    if params is not None:
      self._study.enqueue_trial(params)
    handle = self._study.ask()
    settings = [self._search(handle)]
    trial = plan(self._experiment, settings, where=self._path, first=number + 1)[0]
    self._asked.append(Asked(handle, trial._replace(order=number)))
    self.trials.setdefault(trial.id, self._asked[-1].trial)
    self.names[trial.id] = " ".join(
      f"{key}={formatting.number(value, 4) if isinstance(value, float) else value}"
      for key, value in handle.params.items()
    )
    return self.trials[trial.id]

  def save(self) -> None:
    """Writes the trials asked for, before any of them starts."""
    asked = [{"id": each.trial.id, "params": each.handle.params} for each in self._asked]
    state.write_json(self._workdir / "search.json", {"asked": asked})

  def next(self, verdicts: Mapping[str, str]) -> list[Trial]:
    """The next trial, in a list, that was not asked for before; [] if the search is over.

    Args:
      verdicts: id -> what became of the trials that are over.
    """
    self._tell(verdicts)
    while len(self._asked) < self._options.trials:
      known = len(self.trials)
      trial = self._ask()
      self.save()
      if len(self.trials) > known:
        return [trial]
      self._tell(verdicts)  # Asked for twice, it counts twice.
    return []

  def _tell(self, verdicts: Mapping[str, str]) -> None:
    # A failure is reported as the worst of results. Optuna forgets trials reported as failed, and
    # would keep asking for settings that diverge.
    worst = self._optuna.trial.TrialState.PRUNED
    for number, asked in enumerate(self._asked):
      verdict = verdicts.get(asked.trial.id)
      if number in self._told or verdict not in ("done", "failed", "pruned"):
        continue
      self._told.add(number)
      self._report(number)
      value = halving.score(
        self._workdir / asked.trial.id, asked.trial, self._options.metric, flag="search.metric"
      )
      self._study.tell(asked.handle, value, state=worst if value is None else None)

  def _report(self, number: int) -> None:
    handle, trial = self._asked[number]
    record = self._workdir / trial.id / "metrics.jsonl"
    for row in read(record) if record.exists() else ():
      value, key = finite(row.get(self._options.metric)), (number, row["step"])
      if value is not None and key not in self._reported:
        self._reported.add(key)
        handle.report(value, row["step"])

  def hopeless(self, trial: Trial) -> bool:
    """Whether a trial that is running is to be ended."""
    if not self._options.prune_from:
      return False
    number = next(n for n, asked in enumerate(self._asked) if asked.trial.id == trial.id)
    self._report(number)
    return self._asked[number].handle.should_prune()

  def run(self, drive: Callable[..., dict[str, str]]) -> dict[str, str]:
    """Runs the search to its end, from wherever it stands; returns what became of each trial.

    Args:
      drive: (trials, names=, more=, hopeless=) runs trials, `more` among them.

    Raises:
      ConfigError: another launcher leads this search.
    """
    self._workdir.mkdir(parents=True, exist_ok=True)
    with locked(self._workdir / ".search.lock") as alone:
      if not alone:
        raise ConfigError(
          "workdir",
          self._workdir,
          "of a search that no other launcher leads",
          "a search has one; --parallel runs more trials at once",
        )
      self.save()
      pruned = {id: "pruned" for id in self.trials if self._was_pruned(id)}
      begin = [trial for trial in self.trials.values() if trial.id not in pruned]

      def more(verdicts: Mapping[str, str]) -> list[Trial]:
        return self.next(pruned | dict(verdicts))

      return pruned | drive(begin, names=self.names, more=more, hopeless=self.hopeless)

  def _was_pruned(self, id: str) -> bool:
    status = state.read_status(self._workdir / id)
    return bool(self._options.prune_from) and status.get("status") == "pruned"


def import_optuna() -> Any:
  """The package, or an error with the command that installs it."""
  try:
    import optuna
  except ImportError:
    raise ConfigError(
      "search.trials", "> 0", "0 without the package optuna", "pip install 'rl_llm[optuna]'"
    ) from None
  return optuna
