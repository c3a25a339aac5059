"""A run's record in TensorBoard, Weights & Biases or Trackio as well, while it is written.

Whoever compares runs of several projects has a tracker already. It gets the rows of metrics.jsonl
and of samples.jsonl as they stand there, with credentials redacted; nothing is measured for it
alone. `trackers.json` in the run's directory has each tracker's own name for the run, and the last
step that it was given. So a run that resumes continues the same tracker run, no step is given
twice, and a tracker that is named only when the run resumes gets the steps before as well.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_llm.errors import ConfigError, redact
from rl_llm.files import write_atomically
from rl_llm.runs.formatting import printable
from rl_llm.runs.metrics import plain, read

PROJECT = "rl_llm"  # unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise
_COLUMNS = ("split", "prompt", "response", "reward", "advantage")


class Tracker(NamedTuple):
  """A tracker that is open.

  Attributes:
    log: (step, row of metrics.jsonl, rows of samples.jsonl for a table, maybe none) -> None. Where
      a run is continued, its last row, which only evaluates, is followed by one of the same step.
    close: (whether the run is done) -> None.
    where: what to type to look at it.
  """

  log: Callable[[int, Mapping[str, Any], Sequence[Mapping[str, Any]]], Any]
  close: Callable[[bool], Any]
  where: str


def check_installed(names: Sequence[str]) -> None:
  """Refuses a tracker without its package.

  Raises:
    ConfigError: one is missing; the message has the command that installs it.
  """
  for name in names:
    if importlib.util.find_spec(PACKAGES[name]) is None:
      allowed = f"a tracker whose package, {PACKAGES[name]}, is installed"
      raise ConfigError("track", name, allowed, f"pip install {PACKAGES[name]}")


@contextlib.contextmanager
def tracking(
  names: Sequence[str], workdir: Path, *, say: Callable[[str], Any]
) -> Iterator[Callable[[int, Mapping[str, Any], Sequence[Mapping[str, Any]]], None]]:
  """A function that gives a step's rows to all of these trackers, while the block lasts.

  A tracker that fails is said and left out: the run trains on, and its own record is whole.

  Args:
    names: of `TRACKERS`.
    workdir: the run's directory, with config.json and what metrics.jsonl holds so far.
    say: called with each line for a person.

  Raises:
    ConfigError: a package is missing, or a tracker does not open; the message says what to do.
  """
  config = json.loads((workdir / "config.json").read_text("ascii")) if names else {}
  record = read(workdir / "metrics.jsonl") if names else []
  marks, opened = _Marks(workdir / "trackers.json", begun=bool(record)), {}
  done = False
  try:
    for name in names:
      opened[name] = _opened(name, workdir, config, marks.of(name)["run"])
      say(f"{name}: {opened[name].where}")
      for row in record:
        _give(opened, name, marks, row["step"], row, (), say)

    def track(step: int, row: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
      lines = [plain(line) for line in samples]
      for name in list(opened):
        _give(opened, name, marks, step, plain(row), lines, say)

    yield track
    done = True
  finally:
    for name, tracker in opened.items():
      try:
        tracker.close(done)
      except Exception as error:  # The end of a run is no place to fail in another's code.
        say(f"{name} did not close: {_one_line(error)}")


def _give(opened, name, marks, step, row, lines, say) -> None:
  """Gives a tracker a step that it does not have; drops one that fails."""
  if name not in opened or step <= marks.of(name)["step"]:
    return
  try:
    opened[name].log(step, {key: value for key, value in row.items() if key != "step"}, lines)
  except Exception as error:  # Another program's failure is none of the run's.
    del opened[name]
    say(f"{name} failed at step {step}, and gets no more of this start: {_one_line(error)}")
    return
  if not _only_evaluates(row):
    marks.set(name, step)


def _only_evaluates(row: Mapping[str, Any]) -> bool:
  """Whether it is the last row of a run, which a longer run writes anew."""
  return all(key == "step" or key.startswith(("eval/", "time/")) for key in row)


def _one_line(error: Exception) -> str:
  return printable(f"{type(error).__name__}: {error}", limit=200)


class _Marks:
  """trackers.json: {tracker: {"run": its own name for the run, "step": the last one given}}."""

  def __init__(self, path: Path, *, begun: bool):
    self._path = path
    self._found = json.loads(path.read_text("ascii")) if begun and path.exists() else {}

  def of(self, name: str) -> dict[str, Any]:
    return self._found.setdefault(name, {"run": uuid.uuid4().hex[:8], "step": -1})

  def set(self, name: str, step: int) -> None:
    self.of(name)["step"] = step
    write_atomically(self._path, (json.dumps(self._found) + "\n").encode("ascii"))


def _opened(name: str, workdir: Path, config: Mapping[str, Any], run: str) -> Tracker:
  try:
    return TRACKERS[name](workdir, config, run)
  except Exception as error:
    fix = f"{_one_line(error)}; leave it out to train without"
    raise ConfigError("track", name, "a tracker that opens", fix) from None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a row, non-finite ones too; no texts, and nothing that is not known."""
  texts = ("nan", "inf", "-inf")
  return {
    key: float(value)
    for key, value in row.items()
    if isinstance(value, (int, float)) or (isinstance(value, str) and value in texts)
  }


def _cells(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
  """A table's rows: texts as a person may see them, and numbers; None where there is none."""

  def cell(value: Any) -> Any:
    return printable(value, limit=2000, keep_newlines=True) if isinstance(value, str) else value

  return [[cell(line.get(column)) for column in _COLUMNS] for line in lines]


def tensorboard(workdir: Path, config: Mapping[str, Any], run: str) -> Tracker:
  """TensorBoard's event files, in WORKDIR/tensorboard; a resumed run appends another file."""
  del run  # The directory is the run.
  writer = importlib.import_module("tensorboardX").SummaryWriter(str(workdir / "tensorboard"))
  settings = "\n".join(f"    {key} = {value}" for key, value in config.items())
  writer.add_text("config", settings, 0)

  def log(step, row, lines):
    for key, value in _numbers(row).items():
      writer.add_scalar(key, value, step)
    if lines:
      table = [list(_COLUMNS), ["---"] * len(_COLUMNS), *_cells(lines)]
      text = "\n".join("|" + "|".join(map(_markdown, cells)) + "|" for cells in table)
      writer.add_text("samples", text, step)
    writer.flush()

  return Tracker(log, lambda done: writer.close(), f"tensorboard --logdir={workdir.parent}")


def _markdown(value: Any) -> str:
  """A cell of a table: nothing in it ends the cell."""
  return str("" if value is None else value).replace("|", "\\|").replace("\n", " ⏎ ")


def wandb(workdir: Path, config: Mapping[str, Any], run: str) -> Tracker:
  """A run of Weights & Biases; without an account, or with WANDB_MODE=offline, on disk alone.

  It is told nothing of the machine, the command line, the repository or the terminal, which could
  hold credentials.
  """
  package = importlib.import_module("wandb")
  mode = os.environ.get("WANDB_MODE") or ("online" if _has_account(package) else "offline")
  quiet = package.Settings(
    silent=True,
    console="off",
    disable_git=True,
    save_code=False,
    x_disable_meta=True,
    x_disable_stats=True,
    x_disable_machine_info=True,
  )
  given = package.init(
    project=os.environ.get("WANDB_PROJECT", PROJECT),
    name=redact(workdir.name),
    id=run,
    resume="allow" if mode == "online" else None,
    dir=str(workdir),
    config=dict(config),
    mode=mode,
    settings=quiet,
  )

  given.define_metric("*", step_metric="step")

  def log(step, row, lines):
    table = {"samples": package.Table(columns=list(_COLUMNS), data=_cells(lines))} if lines else {}
    # Its own count of rows must rise, also where the last step's evaluation is followed by its row.
    given.log(row | _numbers(row) | table | {"step": step}, step=2 * step - _only_evaluates(row))

  offline = f"offline; wandb sync {workdir / 'wandb' / 'offline-*'} uploads it"
  where = offline if mode == "offline" else (given.url or mode)
  return Tracker(log, lambda done: given.finish(exit_code=0 if done else 1), where)


def _has_account(package: Any) -> bool:
  """Whether a key is known here: of the environment, or of `wandb login`."""
  return bool(os.environ.get("WANDB_API_KEY") or package.setup().settings.api_key)


def trackio(workdir: Path, config: Mapping[str, Any], run: str) -> Tracker:
  """A run of Trackio, in its own directory (TRACKIO_DIR) or where TRACKIO_SPACE_ID says."""
  package = importlib.import_module("trackio")
  project = os.environ.get("TRACKIO_PROJECT", PROJECT)
  with contextlib.redirect_stdout(io.StringIO()):  # It prints what `where` says.
    given = package.init(
      project=project,
      name=redact(f"{workdir.name}-{run}"),
      config=dict(config),
      resume="allow",
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )

  def log(step, row, lines):
    table = {"samples": package.Table(columns=list(_COLUMNS), data=_cells(lines))} if lines else {}
    given.log(_numbers(row) | table, step=step)

  def close(done):
    with contextlib.redirect_stdout(io.StringIO()):
      given.finish()

  return Tracker(log, close, f"trackio show --project {project}")


# What opens each; flags choose among them.
TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
# The module of each, which its extra installs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
