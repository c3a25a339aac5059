"""Shapes of models by name, so that a plan needs no files."""

from __future__ import annotations

import dataclasses
import os

from rl_llm.errors import ConfigError
from rl_llm.policy import TransformerConfig, tiny_config
from rl_llm.policy.hf import read_config


def _shape(width, layers, heads, kv_heads, mlp_width, *, tied=False, head_dim=128, **others):
  return TransformerConfig(
    width=width,
    n_layers=layers,
    n_heads=heads,
    n_kv_heads=kv_heads,
    head_dim=head_dim,
    mlp_width=mlp_width,
    tie_embeddings=tied,
    **others,
  )


_QWEN = {"vocab_size": 152_064, "rope_theta": 1e6, "qkv_bias": True}
_LLAMA = {"vocab_size": 128_256, "rope_theta": 5e5, "rms_eps": 1e-5}
_SMALL_QWEN = _QWEN | {"vocab_size": 151_936, "tied": True}
# Shapes, from the models' config.json. A directory with one takes any other model.
MODELS = {
  "qwen2.5-0.5b": _shape(896, 24, 14, 2, 4864, head_dim=64, **_SMALL_QWEN),
  "qwen2.5-1.5b": _shape(1536, 28, 12, 2, 8960, **_SMALL_QWEN),
  "qwen2.5-7b": _shape(3584, 28, 28, 4, 18_944, **_QWEN),
  "qwen2.5-32b": _shape(5120, 64, 40, 8, 27_648, **_QWEN),
  "qwen2.5-72b": _shape(8192, 80, 64, 8, 29_568, **_QWEN),
  "llama-3.1-8b": _shape(4096, 32, 32, 8, 14_336, **_LLAMA),
  "llama-3.1-70b": _shape(8192, 80, 64, 8, 28_672, **_LLAMA),
}


def find_model(name: str, *, vocab_size: int = 0) -> TransformerConfig:
  """The shape by name or from a directory, with the given vocabulary size if there is one."""
  if name == "tiny":
    found = tiny_config(vocab_size or 256)
  elif name in MODELS:
    found = MODELS[name]
  elif os.path.isdir(name):
    found, _ = read_config(name)
  else:
    known = ", ".join(MODELS)
    raise ConfigError("model", name, f"a directory with a config.json, tiny, or {known}")
  return dataclasses.replace(found, vocab_size=vocab_size or found.vocab_size)
