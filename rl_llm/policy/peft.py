"""Reads and writes PEFT's adapter directories (LoRA)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rl_llm.policy.configs import WeightsError
from rl_llm.policy.hf_names import LAYER_NAMES
from rl_llm.policy.model_files import (
  ADAPTER,
  ADAPTER_CONFIG,
  DTYPES,
  check_numbers,
  import_safetensors,
  inside,
  new_directory,
  read_json,
)
from rl_llm.policy.modules import Params

# PEFT's entries that make a different function of the same tensors.
_NOT_PLAIN_LORA = (
  "use_rslora",
  "use_dora",
  "use_qalora",
  "alpha_pattern",
  "fan_in_fan_out",
  "layer_replication",
  "alora_invocation_tokens",
)


def save_adapter(directory: str | os.PathLike, params: Params, *, base: str) -> None:
  """Writes only a model's adapters, float32, as PEFT does: `PeftModel.from_pretrained` and servers
  that take LoRA adapters read them. The write is atomic, like `save_hf`'s.

  Args:
    directory: must not exist yet, or be empty.
    params: from `rl_llm.policy.join`, adapters of one rank and one alpha; only these are written.
    base: the name or path of the model that they belong to, which adapter_config.json repeats.

  Raises:
    WeightsError: the directory holds something, or there are no adapters.
  """
  import_safetensors()
  from safetensors.numpy import save_file

  adapters = _adapters(params)
  if not adapters:
    raise WeightsError("params: no adapters among these weights; make them with split_lora")
  ranks = {len(node["lora_a"]) for node in adapters.values()}
  scales = {float(node["lora_scale"]) for node in adapters.values()}
  if len(ranks) > 1 or len(scales) > 1:
    raise WeightsError(f"params: adapters of ranks {ranks}, scales {scales}; must be one of each")
  [rank], [scale] = ranks, scales
  alpha = _alpha(scale, rank)
  entries = {
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
    "lora_dropout": 0.0,
    "peft_type": "LORA",
    "r": rank,
    "target_modules": _target_modules(params, list(adapters)),
    "task_type": "CAUSAL_LM",
  }
  tensors = {
    adapter_name(f"{path}/{leaf}"): np.ascontiguousarray(node[leaf], np.float32)
    for path, node in adapters.items()
    for leaf in ("lora_a", "lora_b")
  }
  with new_directory(directory) as partial:
    save_file(tensors, partial / ADAPTER, metadata={"format": "pt"})
    (partial / ADAPTER_CONFIG).write_text(json.dumps(entries, indent=2) + "\n")


def load_adapter(directory: str | os.PathLike, params: Params) -> Params:
  """Reads adapters that `save_adapter` or PEFT wrote, if they match those asked for.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors.
    params: from `rl_llm.policy.join`: its adapters, such as fresh ones from `split_lora`, determine
      the matrices, the rank and the alpha asked for; their values are not used.

  Returns:
    The lora_a and lora_b of the directory, float32: what `split_lora` gives as `trained`.

  Raises:
    WeightsError: a file is missing, damaged or outside the directory, or not of plain LoRA; or the
      adapters have another rank, alpha or shape, or belong to other matrices.
  """
  directory = Path(directory)
  entries, tensors = _read_adapter(directory)
  asked = _adapters(params)
  fix = _to_ask_for(entries, tensors, sum(name.startswith("layers_") for name in params))
  trained: Params = {}
  for path, node in asked.items():
    place = trained
    for parent in path.split("/"):
      place = place.setdefault(parent, {})
    for leaf, rank_axis in (("lora_a", 0), ("lora_b", 1)):
      where, name = f"{directory}: leaf '{path}/{leaf}'", adapter_name(f"{path}/{leaf}")
      if name not in tensors:
        raise WeightsError(f"{where} is not there; {fix}")
      found, wanted = tensors[name].shape, node[leaf].shape
      if len(found) != 2 or found[1 - rank_axis] != wanted[1 - rank_axis]:
        base = entries.get("base_model_name_or_path") or "which it does not name"
        raise WeightsError(
          f"{where} has shape {found}, the model's is {wanted}; use the adapter's own model, {base}"
        )
      if found[rank_axis] != entries["r"]:
        raise WeightsError(
          f"{where} has rank {found[rank_axis]}, and {ADAPTER_CONFIG} says 'r' is {entries['r']}; "
          "use an adapter of one rank"
        )
      if found != wanted:
        raise WeightsError(
          f"{where} has rank {found[rank_axis]}, the rank asked for is {wanted[rank_axis]}; {fix}"
        )
      array = np.asarray(tensors.pop(name), np.float32)
      check_numbers(array, where)
      place[leaf] = jnp.array(array)
    scale, rank = float(node["lora_scale"]), len(node["lora_a"])
    if np.float32(entries["lora_alpha"] / rank) != np.float32(scale):
      raise WeightsError(
        f"{directory}: leaf '{path}/lora_a' has alpha {entries['lora_alpha']:g}, the alpha asked "
        f"for is {_alpha(scale, rank):g}; {fix}"
      )
  if tensors:
    raise WeightsError(f"{directory}: tensor '{min(tensors)}' was not asked for; {fix}")
  return trained


def _read_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The entries of adapter_config.json, checked to be plain LoRA's, and all tensors."""
  safetensors = import_safetensors()
  if not directory.is_dir():
    raise WeightsError(f"{directory}: no such adapter directory; check the path")
  path = inside(directory, ADAPTER_CONFIG, "is missing; give a directory as PEFT writes it")
  entries = read_json(path)
  if entries.get("peft_type") != "LORA":
    raise WeightsError(f"{path}: peft_type is {entries.get('peft_type')!r}; must be 'LORA'")
  other = {name: entries[name] for name in _NOT_PLAIN_LORA if entries.get(name)}
  # All but these change the model's own weights too.
  if entries.get("init_lora_weights") not in (None, True, False, "gaussian"):
    other["init_lora_weights"] = entries["init_lora_weights"]
  for name, value in other.items():
    raise WeightsError(f"{path}: '{name}' is {value!r}, which is not supported; use plain LoRA")
  for name, kinds in (("r", int), ("lora_alpha", int | float)):
    value = entries.get(name)
    if isinstance(value, bool) or not isinstance(value, kinds):
      raise WeightsError(f"{path}: '{name}' is {value!r}; must be a number")
  path = inside(directory, ADAPTER, "is missing (pickled adapter_model.bin is never read)")
  try:
    with safetensors.safe_open(path, framework="numpy") as handle:
      for name in handle.keys():
        dtype = handle.get_slice(name).get_dtype()
        if dtype not in DTYPES:
          raise WeightsError(f"{path}: tensor '{name}' is {dtype}, not one of {', '.join(DTYPES)}")
      return entries, {name: handle.get_tensor(name) for name in handle.keys()}
  except (safetensors.SafetensorError, OSError) as error:
    raise WeightsError(f"{path}: damaged or truncated ({error}); copy it again") from error


def adapter_name(path: str) -> str:
  """PEFT's name of the adapter's leaf at `path`.

  >>> adapter_name("layers_1/attention/query/lora_a")
  'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'
  """
  module, leaf = path.rsplit("/", 1)
  half = {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]
  return f"base_model.model.{_adapted_module(module)}.{half}.weight"


def _adapted_module(path: str) -> str:
  """Hugging Face's name of a matrix that `split_lora` adapts; norms alone depend on the family."""
  match = re.fullmatch(r"layers_(\d+)/(.+)", path)
  if not match or match[2] not in LAYER_NAMES:
    raise WeightsError(f"params: leaf '{path}' is no matrix of a layer, as PEFT's adapters are")
  return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}"


def _adapters(params: Params, path: str = "") -> dict[str, Params]:
  """{path: node} of every matrix that has an adapter."""
  if "lora_a" in params:
    return {path: params}
  found = {}
  for name, child in params.items():
    if isinstance(child, dict):
      found |= _adapters(child, f"{path}/{name}" if path else name)
  return found


def _target_modules(params: Params, paths: list[str]) -> list[str]:
  """PEFT's `target_modules`: the last part of a matrix's name where all layers have it, the full
  name where only some do."""
  layers = sum(name.startswith("layers_") for name in params)
  names = [_adapted_module(path) for path in paths]
  ends = [name.rsplit(".", 1)[1] for name in names]
  return sorted(
    {end if ends.count(end) == layers else name for name, end in zip(names, ends, strict=True)}
  )


def _alpha(scale: float, rank: int) -> float:
  """The shortest number that is the scale, as float32, when it is divided by the rank.

  >>> _alpha(float(np.float32(0.1 / 3)), 3)
  0.1
  """
  rounded = (float(f"{scale * rank:.{digits}g}") for digits in range(1, 17))
  return next(alpha for alpha in rounded if np.float32(alpha / rank) == np.float32(scale))


def _to_ask_for(entries: dict[str, Any], tensors: dict[str, Any], layers: int) -> str:
  """For an error, the settings that would match an adapter: they name its matrices, some of which
  may be in only some of the model's layers (PEFT's layers_to_transform)."""
  ours = {theirs: path for path, theirs in LAYER_NAMES.items()}
  having: dict[str, set[int]] = {}
  for name in sorted(tensors):
    match = re.fullmatch(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_[AB]\.weight", name)
    if not match or match[2] not in ours:
      return f"'{name}' is no matrix of a layer: use an adapter of such matrices alone"
    having.setdefault(ours[match[2]], set()).add(int(match[1]))
  targets = []
  for some in sorted(set(map(frozenset, having.values())), key=sorted):
    ends = "|".join(sorted(end for end, found in having.items() if found == some))
    numbers = "|".join(map(str, sorted(some)))
    targets.append(ends if len(some) == layers else f"layers_({numbers})/({ends})")
  rank, alpha = entries["r"], entries["lora_alpha"]
  found = f"--lora.rank={rank} --lora.alpha={alpha:g} --lora.targets='{'|'.join(targets)}'"
  return f"ask for those that it has: {found}"
