"""Reads and writes Hugging Face's files: model directories (`config.json` and safetensors, single
or sharded), and PEFT's directories that hold only adapters. `model_files.py` opens them, and
`hf_names.py` knows which weight has which name there."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.policy.configs import TransformerConfig, WeightsError, config_from_hf, config_to_hf
from rl_llm.policy.hf_names import hf_name
from rl_llm.policy.model_files import (
  ADAPTER_CONFIG,
  EMBEDDING,
  HEAD,
  INDEX,
  SINGLE,
  Tensors,
  check_numbers,
  damaged,
  import_safetensors,
  inside,
  new_directory,
  open_tensors,
  read_json,
  what_holds,
)
from rl_llm.policy.modules import Params
from rl_llm.policy.positions import rope_frequencies
from rl_llm.policy.transformer import make_policy

# Shapes of all leaves, nested -> a sharding for each.
Layout = Callable[[Any], Any]


def leaf_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """{path: shape} of every leaf of the parameters, nothing allocated.

  >>> from rl_llm.policy.configs import tiny_config
  >>> leaf_shapes(tiny_config(32))["layers_0/attention/key/weight"]
  (32, 64)
  """
  return dict(_leaf_shapes(config))


@functools.lru_cache(maxsize=32)  # Tracing takes as long as reading or writing a small model.
def _leaf_shapes(config: TransformerConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
  init = make_policy(config).init
  abstract = jax.eval_shape(lambda: init(jax.random.key(0)))
  return tuple((path, leaf.shape) for path, leaf in _leaves(abstract))


def check_layers(config: TransformerConfig, shapes: Mapping[str, Any], source: str) -> None:
  """Refuses a config of more layers than the files can hold, before anything is made for each.

  Args:
    config: what the files claim.
    shapes: of their tensors, by name; every layer has some of its own.
    source: what they come from, for the error.

  Raises:
    WeightsError: there are fewer tensors than layers.
  """
  if config.n_layers > len(shapes):
    raise WeightsError(
      f"{source}: the config says {config.n_layers} layers, and the files hold {len(shapes)} "
      "tensors; use the config that belongs to these weights"
    )


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
    say: called with one line for each thing that is not read as config.json or the files' names
      say.

  Returns:
    The config, and the weights as float32 (from float32, float16 or bfloat16).

  Raises:
    WeightsError: a file is missing, damaged, outside the directory, or not of a supported model.
  """
  config, _ = read_config(directory)
  directory = Path(directory)
  tensors = open_tensors(directory, say)
  check_layers(config, tensors.shapes, str(directory))
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
  if (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").exists():
    named = read_json(inside(directory, ADAPTER_CONFIG, "")).get("base_model_name_or_path")
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
  check_layers(config, tensors.shapes, str(directory))
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

  with new_directory(directory) as partial:
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


def _leaves(tree: Params) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield "/".join(entry.key for entry in path), leaf
