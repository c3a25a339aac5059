"""The model that a run has trained, read from its checkpoint while the run is at work or after it.

A run is named as RUN or RUN@STEP: its directory, and which of the checkpoints that it has kept; the
newest without a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from rl_llm.errors import ConfigError
from rl_llm.policy import join, merge_lora, split_lora
from rl_llm.policy.load import LanguageModel
from rl_llm.runs.checkpoint import Checkpointer, CheckpointError, leaves_of
from rl_llm.runs.identity import find_run


def checkpoint_of(run: str, *, setting: str) -> tuple[Path, int]:
  """The directory of a run, and the step of one of its checkpoints.

  Args:
    run: RUN or RUN@STEP.
    setting: which names it, for the message.

  Raises:
    ConfigError: it is not a run, or the run has no checkpoint, or not of this step.
  """
  found = find_run(run)
  if found is None:
    allowed = "RUN or RUN@STEP: a run's directory, and a step that it has kept"
    raise ConfigError(setting, run, allowed)
  directory, step = found
  places = sorted((directory / "checkpoints").glob("[0-9]*"), key=lambda place: int(place.name))
  steps = [int(place.name) for place in places]
  if not steps:
    raise ConfigError(setting, run, "a run with a checkpoint", "it saves the first at its end")
  if step is None:
    step = Checkpointer(directory / "checkpoints").latest()
  if step not in steps:
    kept = ", ".join(f"{directory}@{known}" for known in steps)
    raise ConfigError(setting, run, f"a step that the run has kept: {kept}")
  return directory, step


def load_trained(
  run: str, load: Callable[..., LanguageModel], *, setting: str = "model"
) -> LanguageModel:
  """The model of a run, with adapters merged.

  Args:
    run: RUN or RUN@STEP.
    load: (name, seed) -> the model that the run began with, laid out as this one is to be.
    setting: which names the run, for messages.

  Raises:
    ConfigError: as for `checkpoint_of`, or the run trained something else than a language model.
  """
  directory, step = checkpoint_of(run, setting=setting)
  try:
    settings = json.loads((directory / "config.json").read_bytes())
  except ValueError:
    raise ConfigError(setting, run, "a run whose config.json is whole") from None
  name, seed = settings.get("init_from") or settings["model"], settings["seed"]
  base = load_trained(name, load, setting=setting) if find_run(name) else load(name, seed)
  frozen, trained = None, base.params
  if settings["lora.rank"]:  # Adapters of its shape, for the trained ones to take their place.
    lora = {name: settings[f"lora.{name}"] for name in ("rank", "alpha", "targets")}
    frozen, trained = split_lora(base.params, jax.random.key(seed), **lora)
  try:
    trained = restore_part(directory, step, "params", trained)
  except CheckpointError:
    raise ConfigError(
      setting, run, f"a run that trained a language model like {settings['model']}"
    ) from None
  return base._replace(params=merge_lora(join(frozen, trained)))


def restore_part(directory: Path, step: int, part: str, like: Any) -> Any:
  """A part of the state of the network that samples, such as "params" or "opt_state".

  Args:
    directory: of the run.
    step: of the checkpoint.
    part: a field of `rl_llm.training.train_state.TrainState`.
    like: arrays or their shapes; leaves that the checkpoint has beyond them are left there.

  Raises:
    CheckpointError: a leaf is missing or has another shape.
  """
  checkpoints = directory / "checkpoints"
  names = leaves_of(checkpoints, step)
  # The first network that a state trains is the policy: it has a prefix where there are several.
  found = next(name for name in names if f"/{part}/" in f"/{name}")
  below = found[: f"/{found}".index(f"/{part}/")]
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
  return Checkpointer(checkpoints).restore(shapes, step, below=f"{below}{part}/")[1]
