"""Reads and writes Hugging Face's files: model directories (`config.json` and safetensors, single
or sharded), and PEFT's directories that hold only adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.policy.configs import TransformerConfig, WeightsError, config_from_hf, config_to_hf
from rl_llm.policy.model_files import (
  DTYPES,
  EMBEDDING,
  HEAD,
  INDEX,
  SINGLE,
  Tensors,
  check_numbers,
  damaged,
  import_safetensors,
  inside,
  open_tensors,
  read_json,
  what_holds,
)
from rl_llm.policy.transformer import Params, make_policy, rope_frequencies

# Shapes of all leaves, nested -> a sharding for each.
Layout = Callable[[Any], Any]

_ADAPTER = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
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

# Our path inside a layer -> theirs. Gemma, which norms after attention too, uses the name
# post_attention_layernorm for that; elsewhere it is the norm before the MLP.
_LAYER_NAMES = {
  "attention/query": "self_attn.q_proj",
  "attention/key": "self_attn.k_proj",
  "attention/value": "self_attn.v_proj",
  "attention/output": "self_attn.o_proj",
  "attention/query_norm": "self_attn.q_norm",
  "attention/key_norm": "self_attn.k_norm",
  "mlp/gate": "mlp.gate_proj",
  "mlp/up": "mlp.up_proj",
  "mlp/down": "mlp.down_proj",
  "attention_norm": "input_layernorm",
}
_PRE_NORM_NAMES = {"mlp_norm": "post_attention_layernorm"}
_POST_NORM_NAMES = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_TOP_NAMES = {
  "embed": "model.embed_tokens",
  "final_norm": "model.norm",
  "unembed": "lm_head",
  "head": "score",  # Of a sequence classifier.
}


def hf_name(config: TransformerConfig, path: str) -> str:
  """Hugging Face's name of the leaf at `path`.

  >>> from rl_llm.policy.configs import tiny_config
  >>> hf_name(tiny_config(32), "layers_1/attention/query/weight")
  'model.layers.1.self_attn.q_proj.weight'
  """
  module, leaf = path.rsplit("/", 1)
  suffix = "bias" if leaf == "bias" else "weight"
  match = re.fullmatch(r"layers_(\d+)/(.+)", module)
  if not match:
    return f"{_TOP_NAMES[module]}.{suffix}"
  norms = _POST_NORM_NAMES if config.post_norms else _PRE_NORM_NAMES
  return f"model.layers.{match[1]}.{(_LAYER_NAMES | norms)[match[2]]}.{suffix}"


def leaf_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """{path: shape} of every leaf of the parameters, nothing allocated.

  >>> from rl_llm.policy.configs import tiny_config
  >>> leaf_shapes(tiny_config(32))["layers_0/attention/key/weight"]
  (32, 64)
  """
  init = make_policy(config).init
  abstract = jax.eval_shape(lambda: init(jax.random.key(0)))
  return {path: leaf.shape for path, leaf in _leaves(abstract)}


def assemble(
  wanted: dict[str, tuple[int, ...]],
  name_of: Callable[[str], str],
  shapes: dict[str, tuple[int, ...]],
  read: Callable[[str, tuple[slice, ...]], np.ndarray],
  source: str,
  *,
  layout: Layout | None = None,
) -> Params:
  """Builds the parameters from a file's tensors, checking names and shapes before any is read.

  Args:
    wanted: {path: shape} of every leaf, such as `leaf_shapes` gives.
    name_of: our path -> the file's name.
    shapes: the file's name -> its shape.
    read: (the file's name, which part) -> that part of the tensor.
    source: what the tensors come from, for errors.
    layout: how to place the leaves over devices. Each process then reads only the parts that its
      own devices hold, so it can read a model larger than a host or a device. None: all of it, to
      the first device.

  Returns:
    Parameters, float32.

  Raises:
    WeightsError: a tensor is missing, is not part of the model, has another shape, or holds NaN or
      infinity.
  """
  names = {path: name_of(path) for path in wanted}
  missing = sorted(set(names.values()) - set(shapes))
  unexpected = sorted(set(shapes) - set(names.values()))
  kind = what_holds(unexpected)
  if missing:
    fix = "download the model again"
    if missing == [HEAD]:
      fix = (
        "it is the language-model head: download the file that holds it, or say in config.json "
        "that the embedding is the head (tie_word_embeddings: true)"
      )
    raise WeightsError(
      f"{source}: tensor '{missing[0]}' is missing ({len(missing)} of {len(wanted)} are); "
      f"{kind or fix}"
    )
  if unexpected:
    fix = "use the config.json that belongs to these weights, of a plain language model"
    raise WeightsError(
      f"{source}: tensor '{unexpected[0]}' has no place in this architecture ({len(unexpected)} "
      f"such tensors); {kind or fix}"
    )
  for path, shape in wanted.items():
    if tuple(shapes[names[path]]) != shape:
      raise WeightsError(
        f"{source}: leaf '{path}' (tensor '{names[path]}') has shape {tuple(shapes[names[path]])}, "
        f"the config says {shape}; use the config that belongs to these weights"
      )

  def part_of(path: str, part: tuple[Any, ...]) -> np.ndarray:
    array = np.asarray(read(names[path], part), np.float32)
    check_numbers(array, f"{source}: tensor '{names[path]}'")
    return array

  def nested(leaf_of: Callable[[str], Any]) -> Params:
    params: Params = {}
    for path in wanted:
      *parents, leaf = path.split("/")
      node = params
      for parent in parents:
        node = node.setdefault(parent, {})
      node[leaf] = leaf_of(path)
    return params

  if layout is None:
    return nested(lambda path: jnp.array(part_of(path, (...,))))
  shardings = layout(nested(lambda path: jax.ShapeDtypeStruct(wanted[path], jnp.float32)))
  shardings = dict(_leaves(shardings))

  def leaf(path: str) -> jax.Array:
    @functools.cache  # Devices that hold the same part share one read.
    def part(*bounds: tuple[int, int]) -> np.ndarray:
      return part_of(path, tuple(slice(*b) for b in bounds))

    def of_index(index: tuple[slice, ...]) -> np.ndarray:
      return part(*(s.indices(size)[:2] for s, size in zip(index, wanted[path], strict=True)))

    return jax.make_array_from_callback(wanted[path], shardings[path], of_index)

  return nested(leaf)


def load_hf(
  directory: str | os.PathLike,
  *,
  layout: Layout | None = None,
  say: Callable[[str], None] = warnings.warn,
) -> tuple[TransformerConfig, Params]:
  """Reads a Hugging Face model directory. No pickle is read, and no file outside the directory.

  The files are checked even where config.json contradicts them: if it says that the embedding is
  also the head and the files hold a separate head, that head is dropped if it equals the embedding
  and read if it does not, as `transformers` does.

  Args:
    directory: holds config.json and model.safetensors, or its index and shards.
    layout: as for `assemble`.
    say: reports a line wherever something was not read as config.json or the files' names say.

  Returns:
    The config, and the weights as float32 (from float32, float16 or bfloat16).

  Raises:
    WeightsError: a file is missing, damaged, outside the directory, or not of a supported model.
  """
  config, _ = read_config(directory)
  directory = Path(directory)
  tensors = open_tensors(directory, say)
  try:
    if config.tie_embeddings and {EMBEDDING, HEAD} <= tensors.shapes.keys():
      if tensors.equal(EMBEDDING, HEAD):
        tensors = tensors.without([HEAD])
      else:
        config = dataclasses.replace(config, tie_embeddings=False)
        say(
          f"{directory}: config.json says tie_word_embeddings, but '{HEAD}' is not the embedding: "
          "the head is read and trained on its own"
        )
    return config, _read(directory, config, leaf_shapes(config), tensors, layout, say)
  except (import_safetensors().SafetensorError, OSError) as error:
    raise damaged(directory, error) from error


def read_config(directory: str | os.PathLike) -> tuple[TransformerConfig, dict[str, Any]]:
  """The config of a model directory, and all entries of its config.json.

  Raises:
    WeightsError: there is no such directory or file, or it is not of a supported model.
  """
  import_safetensors()
  directory = Path(directory)
  if not directory.is_dir():
    raise WeightsError(f"{directory}: no such model directory; check the path")
  if (directory / _ADAPTER_CONFIG).is_file() and not (directory / "config.json").exists():
    named = read_json(inside(directory, _ADAPTER_CONFIG, "")).get("base_model_name_or_path")
    base = named or "which they do not name"
    raise WeightsError(
      f"{directory}: holds PEFT's adapters alone; merge them into their base model ({base}), or "
      "train on from both: python -m experiments.grpo --model=BASE --lora.adapter=DIR"
    )
  path = inside(directory, "config.json", "is missing; download the whole model")
  entries = read_json(path)
  return config_from_hf(entries, str(path)), entries


def read_weights(
  directory: str | os.PathLike,
  config: TransformerConfig,
  wanted: dict[str, tuple[int, ...]],
  *,
  layout: Layout | None = None,
  say: Callable[[str], None] = warnings.warn,
) -> Params:
  """The leaves `wanted` of a model directory, which must hold these and no others.

  Args:
    directory: as for `load_hf`.
    config: from `read_config`.
    wanted: {path: shape} of a trunk whose head is not a language model's. The language model's head
      may be in the files and is not read.
    layout: as for `assemble`.
    say: as for `load_hf`.

  Returns:
    The weights as float32.

  Raises:
    WeightsError: as for `load_hf`.
  """
  directory = Path(directory)
  tensors = open_tensors(directory, say).without([HEAD])
  try:
    return _read(directory, config, wanted, tensors, layout, say)
  except (import_safetensors().SafetensorError, OSError) as error:
    raise damaged(directory, error) from error


def _read(
  directory: Path,
  config: TransformerConfig,
  wanted: dict[str, tuple[int, ...]],
  tensors: Tensors,
  layout: Layout | None,
  say: Callable[[str], None],
) -> Params:
  # Old checkpoints also hold tensors that follow from config.json, some in half precision.
  derived = [name for name in tensors.shapes if name.endswith("rotary_emb.inv_freq")]
  expected = [
    rope_frequencies(config.head_dim, config.rope_theta, scaling)
    for scaling in (None, config.rope_scaling)
  ]
  for name in derived:
    stored = np.asarray(tensors.read(name, (...,)), np.float32)
    if not any(stored.shape == e.shape and np.allclose(stored, e, rtol=1e-2) for e in expected):
      say(f"{directory}: '{name}' holds other RoPE frequencies than config.json, whose are used")
      break
  tensors = tensors.without(derived)
  return assemble(
    wanted,
    lambda path: hf_name(config, path),
    tensors.shapes,
    tensors.read,
    str(directory),
    layout=layout,
  )


def save_hf(
  directory: str | os.PathLike,
  config: TransformerConfig,
  params: Params,
  *,
  token_ids: Mapping[str, Any] = types.MappingProxyType({}),
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a float32 directory that `load_hf` and `transformers` read. The write is atomic: it goes
  to a temporary directory next to the target, which is then renamed.

  Args:
    directory: must not exist yet, or be empty.
    config: the model's shape.
    params: its weights.
    token_ids: config.json's entries for BOS, EOS and padding, from
      `rl_llm.text.tokenizers.token_ids`. Without them transformers assumes those of the
      architecture's first model.
    max_shard_bytes: a file larger than this is split.

  Raises:
    WeightsError: the directory holds something, the config has no Hugging Face architecture, or
      the weights are not of this config.
  """
  write_directory(
    directory,
    config,
    config_to_hf(config) | token_ids,
    leaf_shapes(config),
    params,
    max_shard_bytes=max_shard_bytes,
  )


def write_directory(
  directory: str | os.PathLike,
  config: TransformerConfig,
  entries: dict[str, Any],
  wanted: dict[str, tuple[int, ...]],
  params: Params,
  *,
  max_shard_bytes: int,
) -> None:
  """`save_hf` of a model with the given entries in config.json and the leaves `wanted`.

  Args:
    directory: must not exist yet, or be empty.
    config: the model's shape.
    entries: of config.json.
    wanted: {path: shape}; `leaf_shapes(config)` for a language model.
    params: its weights: these leaves and no others.
    max_shard_bytes: a file larger than this is split.

  Raises:
    WeightsError: the directory holds something, or the weights are not of this config.
  """
  import_safetensors()
  from safetensors.numpy import save_file

  leaves = dict(_leaves(params))
  for path in sorted(wanted.keys() | leaves.keys()):
    shape = leaves[path].shape if path in leaves else None
    if shape != wanted.get(path):
      raise WeightsError(
        f"params: leaf '{path}' has shape {shape}, the config says {wanted.get(path)}; "
        "pass the config these weights were made with"
      )

  shards: list[list[str]] = [[]]
  size = total = 0
  for path, shape in wanted.items():
    nbytes = 4 * int(np.prod(shape))
    total += nbytes
    if shards[-1] and size + nbytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(path)
    size += nbytes

  with _new_directory(directory) as partial:
    weight_map = {}
    for number, paths in enumerate(shards, start=1):
      sharded = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
      file_name = sharded if len(shards) > 1 else SINGLE
      tensors = {}
      for path in paths:
        tensors[hf_name(config, path)] = np.ascontiguousarray(leaves[path], np.float32)
      save_file(tensors, partial / file_name, metadata={"format": "pt"})
      weight_map |= dict.fromkeys(tensors, file_name)
    if len(shards) > 1:
      index = {"metadata": {"total_size": total}, "weight_map": weight_map}
      (partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (partial / "config.json").write_text(json.dumps(entries, indent=2) + "\n")


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
  with _new_directory(directory) as partial:
    save_file(tensors, partial / _ADAPTER, metadata={"format": "pt"})
    (partial / _ADAPTER_CONFIG).write_text(json.dumps(entries, indent=2) + "\n")


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
          f"{where} has rank {found[rank_axis]}, and {_ADAPTER_CONFIG} says 'r' is {entries['r']}; "
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
  path = inside(directory, _ADAPTER_CONFIG, "is missing; give a directory as PEFT writes it")
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
  path = inside(directory, _ADAPTER, "is missing (pickled adapter_model.bin is never read)")
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
  if not match or match[2] not in _LAYER_NAMES:
    raise WeightsError(f"params: leaf '{path}' is no matrix of a layer, as PEFT's adapters are")
  return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"


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
  ours = {theirs: path for path, theirs in _LAYER_NAMES.items()}
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


@contextlib.contextmanager
def _new_directory(directory: str | os.PathLike) -> Iterator[Path]:
  """A temporary directory next to `directory`, which replaces it when the body is done.

  Raises:
    WeightsError: the directory holds something.
  """
  directory = Path(directory)
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise WeightsError(f"{directory}: already exists; give a new directory, or remove this one")
  directory.parent.mkdir(parents=True, exist_ok=True)
  partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
  try:
    os.chmod(partial, 0o755)
    yield partial
    os.replace(partial, directory)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _leaves(tree: Params) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield "/".join(entry.key for entry in path), leaf
