"""Language models as pure functions, and their weights from and to files.

The only package that imports flax.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from rl_llm.policy.cache import Cache
from rl_llm.policy.configs import (
  RopeScaling,
  TransformerConfig,
  WeightsError,
  config_from_hf,
  config_to_hf,
  tiny_config,
)
from rl_llm.policy.gguf import demo_gguf_path, load_gguf
from rl_llm.policy.hf import Layout, load_hf, save_hf
from rl_llm.policy.lora import join, merge_lora, split_lora
from rl_llm.policy.modules import Params
from rl_llm.policy.peft import load_adapter, save_adapter
from rl_llm.policy.population import PopulationPolicy, population_policy
from rl_llm.policy.scalar_head import apply_head, normal_head, with_head, zero_head
from rl_llm.policy.transformer import Policy, make_policy


def load_weights(
  path_or_name: str | os.PathLike,
  *,
  layout: Layout | None = None,
  say: Callable[[str], None] = warnings.warn,
) -> tuple[TransformerConfig, Params]:
  """Reads a pretrained model, by what the path is.

  Args:
    path_or_name: "smollm2", the demo model; a Hugging Face directory; or a .gguf file.
    layout: how to place the leaves over devices, from `rl_llm.parallel.sharding.tree_shardings`;
      each process reads the parts that its devices hold. None: all on the first device.
    say: reports a line wherever something was not read as the files declare it.

  Returns:
    The config, and the weights as float32: `make_policy(config)` runs them.

  Raises:
    WeightsError: the path is none of these, or the file cannot be used.
  """
  if path_or_name == "smollm2":
    return load_gguf(demo_gguf_path(), layout=layout, say=say)
  path = Path(os.fspath(path_or_name).replace("\0", "\N{SYMBOL FOR NULL}"))  # In no file's name.
  if path.is_dir():
    return load_hf(path, layout=layout, say=say)
  if path.suffix == ".gguf":
    return load_gguf(path, layout=layout, say=say)
  raise WeightsError(
    f"{path}: no such model directory or .gguf file; give 'smollm2', a Hugging "
    "Face directory (config.json and safetensors), or a file ending in .gguf"
  )


__all__ = [
  "Cache",
  "Params",
  "Policy",
  "PopulationPolicy",
  "RopeScaling",
  "TransformerConfig",
  "WeightsError",
  "apply_head",
  "config_from_hf",
  "config_to_hf",
  "demo_gguf_path",
  "join",
  "load_adapter",
  "load_gguf",
  "load_hf",
  "load_weights",
  "make_policy",
  "merge_lora",
  "normal_head",
  "population_policy",
  "save_adapter",
  "save_hf",
  "split_lora",
  "tiny_config",
  "with_head",
  "zero_head",
]
