"""A sweep as data: a Python file that yields dictionaries of flags, and the trials they stand for.

    EXPERIMENT = "experiments.grpo"

    def sweep():
      yield from product(
        fixed(model="tiny", task="copy"),
        {"optimizer.learning_rate": [1e-3, 3e-3], "loss.clip_high": [0.2, 0.28]},
        seed=[0, 1, 2],
      )

Every dictionary is checked by the experiment's own config before anything starts: a wrong key in
the last of a hundred trials costs a second, not a night. A trial *is* what its config resolves to,
defaults and presets included: two dictionaries that resolve to the same config are one trial, and
changing a default makes a new one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import random as random_lib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rl_llm.errors import ConfigError, UserError
from rl_llm.runs import config as configs
from rl_llm.runs.config import flatten, resolve, to_flags

Settings = dict[str, Any]  # flag -> value


class SweepError(UserError, ValueError):
  """A sweep that cannot be run; the message names the file, the trial and the setting."""


class Trial(NamedTuple):
  """One run of an experiment, wherever it will run.

  Attributes:
    id: hash of what is computed; also the name of its directory.
    experiment: module, run by `python -m`.
    settings: what the sweep set, by full paths.
    config: all fields, by full paths.
    flags: the settings as arguments, `--path=value`.
    steps: the budget; 0 where the experiment has none.
    order: its place in the sweep.
  """

  id: str
  experiment: str
  settings: Settings
  config: Settings
  flags: list[str]
  steps: int
  order: int = 0

  def command(
    self, workdir: Path, *, python: str = sys.executable, joined: bool = False
  ) -> list[str]:
    """The ordinary command line that runs it, in its directory below the sweep's.

    Args:
      workdir: the sweep's.
      python: the interpreter.
      joined: whether it is started on several hosts at once, which find each other; experiments
        without --distributed do not.
    """
    join = ["--distributed"] if joined and "distributed.on" in self.config else []
    return [python, "-m", self.experiment, *self.flags, f"--workdir={workdir / self.id}", *join]


# --- the algebra: sweeps are iterables of dictionaries -------------------------------------------


def product(*sweeps: Iterable | Mapping, **axes: Sequence[Any]) -> list[Settings]:
  """Every combination; the last factor varies fastest.

  >>> product({"loss.clip_high": [0.2, 0.3]}, seed=[0, 1])  # doctest: +NORMALIZE_WHITESPACE
  [{'loss.clip_high': 0.2, 'seed': 0}, {'loss.clip_high': 0.2, 'seed': 1},
   {'loss.clip_high': 0.3, 'seed': 0}, {'loss.clip_high': 0.3, 'seed': 1}]

  Args:
    *sweeps: sweeps, or axes as a mapping: flag -> values.
    **axes: more axes, for flags without a dot.

  Raises:
    SweepError: two factors set the same flag, or an axis is no list of values.
  """
  factors: list[list[Settings]] = []
  for sweep in (*sweeps, axes):
    if isinstance(sweep, Mapping):
      factors += [[{key: value} for value in _values(key, axis)] for key, axis in sweep.items()]
    else:
      factors.append(list(sweep))
  return [_merged(parts) for parts in itertools.product(*factors)]


def zipped(*mappings: Mapping[str, Sequence[Any]], **axes: Sequence[Any]) -> list[Settings]:
  """The first values together, then the second ones: axes that move as one.

  >>> zipped({"optimizer.learning_rate": [1e-3, 3e-3]}, steps=[40, 20])
  [{'optimizer.learning_rate': 0.001, 'steps': 40}, {'optimizer.learning_rate': 0.003, 'steps': 20}]

  Raises:
    SweepError: axes differ in length, or set the same flag.
  """
  columns = [
    [{key: value} for value in _values(key, axis)]
    for mapping in (*mappings, axes)
    for key, axis in mapping.items()
  ]
  if len({len(column) for column in columns}) > 1:
    sizes = ", ".join(f"{next(iter(c[0]), '') if c else 'one'} has {len(c)}" for c in columns)
    raise SweepError(f"zipped axes must be of one length; {sizes}")
  return [_merged(parts) for parts in zip(*columns, strict=True)]


def chain(*sweeps: Iterable[Settings]) -> list[Settings]:
  """One sweep after another.

  >>> chain(fixed(loss="ppo_loss"), product(loss=["grpo_loss"], seed=[0, 1]))
  [{'loss': 'ppo_loss'}, {'loss': 'grpo_loss', 'seed': 0}, {'loss': 'grpo_loss', 'seed': 1}]
  """
  return [settings for sweep in sweeps for settings in sweep]


def fixed(*mappings: Mapping[str, Any], **settings: Any) -> list[Settings]:
  """One dictionary: as a factor of a product, what all of its trials share.

  >>> product(fixed({"loss.clip_high": 0.28}, model="tiny"), seed=[0])
  [{'loss.clip_high': 0.28, 'model': 'tiny', 'seed': 0}]
  """
  return [_merged((*mappings, settings))]


def random(count: int, seed: int, *mappings: Mapping[str, Any], **axes: Any) -> list[Settings]:
  """Independent draws; each axis is a distribution of this module or a list to choose from.

  A larger `count` adds draws and keeps the first ones, and an axis gives the same draws whatever
  other axes there are, so a sweep can grow without starting over.

  >>> rates = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}
  >>> random(3, 0, rates)[:2] == random(2, 0, rates)
  True

  Args:
    count: how many.
    seed: of the draws.
    *mappings: flag -> distribution or list.
    **axes: the same, for flags without a dot.
  """
  columns = []
  for key, axis in _merged((*mappings, axes)).items():
    draws = random_lib.Random(f"{seed}/{key}")  # A text is hashed the same everywhere.
    values = None if callable(axis) else _values(key, axis)
    columns.append([{key: draws.choice(values) if values else axis(draws)} for _ in range(count)])
  return [_merged(column[i] for column in columns) for i in range(count)]


def log_uniform(low: float, high: float) -> Callable[[random_lib.Random], float]:
  """Uniform in the logarithm, 4 digits: every factor of ten is as likely as every other."""
  if not 0 < low <= high:
    raise SweepError(f"log_uniform({low}, {high}): must be 0 < low <= high")
  return lambda draws: _rounded(math.exp(draws.uniform(math.log(low), math.log(high))), low, high)


def uniform(low: float, high: float) -> Callable[[random_lib.Random], float]:
  """Uniform between two numbers, 4 digits."""
  if not low <= high:
    raise SweepError(f"uniform({low}, {high}): must be low <= high")
  return lambda draws: _rounded(draws.uniform(low, high), low, high)


def _rounded(value: float, low: float, high: float) -> float:
  return min(max(float(f"{value:.4g}"), low), high)


def _values(key: str, axis: Any) -> list[Any]:
  if isinstance(axis, (str, Mapping)) or not isinstance(axis, Iterable):
    raise SweepError(f"{key}={axis!r}: must be a list of values; for one value, fixed({key}=...)")
  return list(axis)


def _merged(parts: Iterable[Mapping[str, Any]]) -> Settings:
  merged: Settings = {}
  for part in parts:
    for key in part:
      if key in merged:
        raise SweepError(f"{key} is set twice, to {merged[key]!r} and to {part[key]!r}")
    merged |= part
  return merged


# --- from a file to trials -----------------------------------------------------------------------


def load(path: str) -> tuple[str, list[Settings]]:
  """The experiment that a sweep's file names, and the dictionaries it yields.

  Raises:
    SweepError: there is no such file, or it lacks EXPERIMENT or sweep(), or yields something else.
  """
  experiment, sweep = load_function(path, "sweep", "yields dictionaries of flags")
  return experiment, _of_file(path, lambda: list(sweep()))


def load_function(path: str, name: str, purpose: str) -> tuple[str, Callable[..., Any]]:
  """The experiment that a sweep's file names, and its function of that name.

  Raises:
    SweepError: there is no such file, or it lacks one of them.
  """
  spec = importlib.util.spec_from_file_location("sweep_file", path)
  if spec is None or not Path(path).is_file():
    raise SweepError(f"--sweep={path}: must be a Python file with a function {name}()")
  module = importlib.util.module_from_spec(spec)
  _of_file(path, lambda: spec.loader.exec_module(module))
  experiment = getattr(module, "EXPERIMENT", None)
  if not isinstance(experiment, str):
    raise SweepError(f'{path}: must say what to run, such as EXPERIMENT = "experiments.grpo"')
  if not callable(getattr(module, name, None)):
    raise SweepError(f"{path}: must have a function {name}() that {purpose}")
  return experiment, getattr(module, name)


def _of_file(path: str, call: Callable[[], Any]) -> Any:
  """Calls into a sweep's file; an error becomes one line that says where in the file.

  Raises:
    SweepError: the file is wrong.
  """
  try:
    return call()
  except SweepError as error:
    raise SweepError(f"{path}: {error}") from None
  except SyntaxError as error:
    raise SweepError(f"{error.filename}:{error.lineno}: {error.msg}") from None
  except Exception as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    place = f"{path}:{lines[-1]}" if lines else path
    raise SweepError(f"{place}: {type(error).__name__}: {error}") from None


def check_plain(settings: Any, *, where: str) -> None:
  """Refuses values that a command line or JSON cannot express."""
  if not isinstance(settings, dict):
    raise SweepError(f"{where}: {settings!r}: must be a dictionary of flags")
  for key, value in settings.items():
    items = value if isinstance(value, (list, tuple)) else [value]
    # Exactly these: NumPy's numbers are not JSON, and a bool is an int to isinstance alone.
    odd = [x for x in items if type(x) not in (int, float, str, bool, type(None))]
    if odd or not isinstance(key, str):
      raise SweepError(
        f"{where}: {key}={value!r}: must be a number, a text, true, false, None "
        f"or a list of them, not {type((odd or [key])[0]).__name__}; "
        "float(...) or int(...) makes a number plain"
      )


def plan(
  experiment: str, sweep: Sequence[Settings], *, where: str = "sweep", first: int = 1
) -> list[Trial]:
  """The trials of a sweep, each once, all checked.

  Args:
    experiment: module with a frozen `Config`, and where it has them `overrides` and `check`, as the
      experiments have.
    sweep: dictionaries of flags.
    where: what errors begin with.
    first: the number of the first dictionary, for errors.

  Returns:
    In the order of the sweep. Where dictionaries differ only in settings that do not change what is
    computed, such as the steps of a run that can be extended, the one with most steps counts.

  Raises:
    SweepError: with the trial's number, the key, and the nearest valid flag.
  """
  try:
    module = importlib.import_module(experiment)
  except ImportError as error:
    raise SweepError(f"{where}: EXPERIMENT={experiment!r} cannot be imported: {error}") from None
  trials: dict[str, Trial] = {}
  for number, settings in enumerate(sweep, first):
    check_plain(settings, where=f"{where}, trial {number}")
    try:
      trial = make_trial(module, experiment, settings)
    except UserError as error:
      raise SweepError(f"{where}, trial {number}: {error}") from None
    if trial.id not in trials or trial.steps > trials[trial.id].steps:
      trials[trial.id] = trial
  if not trials:
    raise SweepError(f"{where}: must yield at least one dictionary of flags")
  return [trial._replace(order=order) for order, trial in enumerate(trials.values())]


def make_trial(module: ModuleType, experiment: str, settings: Mapping[str, Any]) -> Trial:
  """One dictionary as a trial."""
  if "workdir" in settings:
    raise ConfigError("workdir", settings["workdir"], "left to the launcher", "leave it out")
  config, given = resolve(module.Config, settings, overrides=getattr(module, "overrides", None))
  getattr(module, "check", configs.check)(config)
  ignored = {*configs.volatile(config), "workdir"}
  values = flatten(config)
  identity = {
    "experiment": experiment,
    "config": {path: value for path, value in values.items() if path not in ignored},
  }
  text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
  return Trial(
    id=hashlib.sha256(text.encode()).hexdigest()[:12],
    experiment=experiment,
    settings=given,
    config=values,
    flags=to_flags(config, given),
    steps=values.get("steps", 0),
  )


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """The paths whose values are not all the same, in the order of the fields.

  >>> varying([{"seed": 0, "steps": 4}, {"seed": 1, "steps": 4}])
  ['seed']
  """
  paths = dict.fromkeys(itertools.chain.from_iterable(configs))
  return [
    path
    for path in paths
    if path != "workdir" and any(config.get(path) != configs[0].get(path) for config in configs)
  ]


def described(trials: Sequence[Trial]) -> Iterator[str]:
  """What sets each trial apart from the others, in a few words each."""
  paths = varying([trial.config for trial in trials])
  for trial in trials:
    yield " ".join(f"{path}={trial.config.get(path)}" for path in paths) or "as its defaults"
