"""The files of a model directory, and its tensors under the names of a plain language model.

Checkpoints hold the same tensors under names that wrappers such as FSDP left behind, and some hold
more than a language model. Whatever is renamed or left out is reported, and nothing else is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rl_llm.files import leads_outside, writing
from rl_llm.policy.configs import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's.
DTYPES = ("F32", "F16", "BF16", "F64")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Modules that torch.compile, FSDP and checkpointing put around others: parts of a name.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Gemma 3's, as distributed and as newer versions of transformers name them.
_OF_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_BLOCK = 4096  # rows that are compared at a time


class Tensors(NamedTuple):
  """The tensors of a model by their plain names, not read yet."""

  shapes: dict[str, tuple[int, ...]]
  # (name, which part) -> that part of the tensor
  read: Callable[[str, tuple[slice, ...]], np.ndarray]

  def without(self, names: Collection[str]) -> Tensors:
    """These tensors but those of the names."""
    return self._replace(shapes={n: s for n, s in self.shapes.items() if n not in names})

  def equal(self, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers; reads them a block of rows at a time."""
    if self.shapes[one] != self.shapes[other]:
      return False
    rows = self.shapes[one][0]
    parts = [(slice(i, min(i + _BLOCK, rows)), ...) for i in range(0, rows, _BLOCK)]
    return all(
      np.array_equal(*(np.asarray(self.read(n, part), np.float32) for n in (one, other)))
      for part in parts
    )


def plain_name(name: str) -> str:
  """The name that a plain language model has for a tensor.

  >>> plain_name("_orig_mod.model.layers.0._orig_mod.mlp.up_proj.weight")
  'model.layers.0.mlp.up_proj.weight'
  >>> plain_name("language_model.model.norm.weight"), plain_name("norm.weight")
  ('model.norm.weight', 'model.norm.weight')

  Args:
    name: as a file has it: torch.compile, FSDP and DDP add the names of their modules, a model of
      images and text (Gemma 3) adds a prefix, and a model without a head omits "model.".
  """
  name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
  name = name.removeprefix("module.")
  name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
  name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
  return re.sub(r"^(embed_tokens|layers|norm)\.", r"model.\1.", name)


def open_tensors(directory: Path, say: Callable[[str], None]) -> Tensors:
  """The tensors of a directory's safetensors files.

  Args:
    directory: holds model.safetensors, or its index and shards.
    say: reports a line about what was renamed or left out.

  Raises:
    WeightsError: a file is missing, damaged or outside the directory, or a tensor is there twice or
      quantised.
  """
  safetensors = import_safetensors()
  files: dict[str, tuple[Any, str]] = {}  # plain name -> (file, its name there)
  images: list[str] = []
  path = directory
  try:
    for shard in sorted(_shards(directory)):
      path = inside(directory, shard, f"is missing, though {INDEX} names it; download it again")
      handle = safetensors.safe_open(path, framework="numpy")
      for stored in handle.keys():
        name = plain_name(stored)
        if _OF_IMAGES.match(name):
          images.append(stored)
          continue
        if name in files:
          raise WeightsError(f"{path}: tensor '{stored}' is there twice; download it again")
        dtype = handle.get_slice(stored).get_dtype()
        if dtype not in DTYPES:
          raise WeightsError(
            f"{path}: tensor '{stored}' is {dtype}, not one of {', '.join(DTYPES)}; "
            "use unquantised weights"
          )
        files[name] = handle, stored
  except (safetensors.SafetensorError, OSError) as error:
    raise damaged(path, error) from error
  renamed = [(stored, name) for name, (_, stored) in files.items() if stored != name]
  if renamed:
    say(
      f"{directory}: {len(renamed)} tensors are read by another name, such as '{renamed[0][0]}' as "
      f"'{renamed[0][1]}'"
    )
  if images:
    say(f"{directory}: the text model alone is read, without {len(images)} tensors for images")

  def part_of(name: str) -> Any:
    handle, stored = files[name]
    return handle.get_slice(stored)

  return Tensors(
    {name: tuple(part_of(name).get_shape()) for name in files},
    lambda name, part: part_of(name)[part],
  )


def _shards(directory: Path) -> set[str]:
  if os.path.lexists(directory / SINGLE):
    return {SINGLE}
  if os.path.lexists(directory / INDEX):
    path = inside(directory, INDEX, "is missing")
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
      raise WeightsError(f"{path}: 'weight_map' is not a table of names; download it again")
    return set(weight_map.values())
  parts = sorted(directory.glob("model-*-of-*.safetensors"))
  if parts:
    raise WeightsError(
      f"{directory}: has {len(parts)} parts such as {parts[0].name}, and no {INDEX}, which says "
      "what is in them; download it too"
    )
  raise WeightsError(
    f"{directory}: neither {SINGLE} nor {INDEX} is there; download the model's safetensors "
    "(pickled .bin weights are never read)"
  )


# Part of a tensor's name -> what holds such tensors, and what to do instead.
_KINDS = {
  ".lora_": "it holds PEFT's adapters next to the weights: merge them (model.merge_and_unload()) "
  "and save the model again",
  "score.": "it is a sequence classifier, such as a reward model, which rewards another model: "
  "python -m experiments.grpo --reward=model:DIR",
  "v_head.": "it has TRL's value head: save the language model in it alone "
  "(model.pretrained_model)",
}


def what_holds(names: Iterable[str]) -> str:
  """Describes a model with these tensors if it is a known kind other than a language model; or "".

  >>> what_holds(["model.norm.weight", "score.weight"])[:27]
  'it is a sequence classifier'
  """
  found = (text for part, text in _KINDS.items() if any(part in name for name in names))
  return next(found, "")


def check_numbers(array: np.ndarray, where: str) -> None:
  """Rejects weights that are NaN or infinite: a single one makes every answer nonsense.

  Args:
    array: float.
    where: which tensor of what, for the error.
  """
  with np.errstate(over="ignore", invalid="ignore"):
    total = np.sum(array)  # Several times as fast as a look at each.
  if not np.isfinite(total) and not np.isfinite(array).all():
    raise WeightsError(
      f"{where} holds NaN or infinity; download the model again, or take an earlier checkpoint"
    )


def damaged(path: Path, error: Exception) -> WeightsError:
  """The error for a file that cannot be read to its end."""
  return WeightsError(f"{path}: damaged or truncated ({error}); download the file again")


def inside(directory: Path, name: str, if_missing: str) -> Path:
  """The path of a file of the directory, links followed and found to stay within."""
  path = directory / name
  if leads_outside(directory, name):
    raise WeightsError(
      f"{str(path)!r}: leads outside the model directory, which is never read; copy the real files "
      "into one directory (cp -rL)"
    )
  if not path.is_file():
    raise WeightsError(f"{path}: {if_missing}")
  return path


def read_json(path: Path) -> dict[str, Any]:
  """The table that a JSON file holds."""
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
    json.dumps(entries, allow_nan=False)  # Python takes NaN, and reads 1e400 as infinity.
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{path}: not valid JSON ({error}); download it again") from error
  if not isinstance(entries, dict):
    raise WeightsError(f"{path}: holds {type(entries).__name__}, not a table; download it again")
  return entries


def import_safetensors() -> Any:
  """The package, or a `WeightsError` with the command that installs it."""
  try:
    import safetensors
  except ImportError as error:
    raise WeightsError(
      "Hugging Face weights need the package safetensors: pip install 'rl_llm[hf]'"
    ) from error
  return safetensors


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
  """A temporary directory next to `directory`, which replaces it when the body is done.

  Raises:
    WeightsError: the directory holds something.
    WriteError: it cannot be written.
  """
  directory = Path(directory)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise WeightsError(f"{directory}: already exists; give a new directory, or remove this one")
  with writing(directory):
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
      os.chmod(partial, 0o755)
      yield partial
      os.replace(partial, directory)
    except BaseException:
      shutil.rmtree(partial, ignore_errors=True)
      raise
