"""What a decoder looks like: one frozen dataclass for Llama, Mistral, Qwen and Gemma."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from rl_llm.errors import UserError


class WeightsError(UserError, ValueError):
  """A model's files cannot be used. One line gives the file, what is wrong with it, and the fix."""


# What no decoder reaches. Files from elsewhere may claim any size, and a list of 1e9 layers is long
# before the first tensor turns out to be missing.
MOST = {
  "vocab_size": 2**24,
  "width": 2**20,
  "n_layers": 2**14,
  "n_heads": 2**14,
  "n_kv_heads": 2**14,
  "head_dim": 2**14,
  "mlp_width": 2**22,
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are slowed so that a model reads beyond its original training length.

  "linear" divides every frequency by `factor`. "llama3" divides only the slow ones: wavelengths
  longer than `original_max_position / low_freq_factor` by `factor`, those shorter than
  `original_max_position / high_freq_factor` not at all, and blends in between.
  """

  kind: Literal["linear", "llama3"]
  factor: float  # dimensionless, > 0
  low_freq_factor: float = 1.0  # llama3 only, rotations per original context
  high_freq_factor: float = 4.0  # llama3 only, rotations per original context, > low_freq_factor
  original_max_position: int = 8192  # llama3 only, tokens

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(f"RopeScaling.kind: {self.kind!r} is not one of 'linear', 'llama3'")
    if not self.factor > 0:
      raise ValueError(f"RopeScaling.factor: {self.factor} must be > 0")
    if not self.high_freq_factor > self.low_freq_factor:
      raise ValueError(
        f"RopeScaling.high_freq_factor: {self.high_freq_factor} must be larger than "
        f"low_freq_factor, {self.low_freq_factor}"
      )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """The shape of a decoder. Fields distinguish the families, never a family's name.

  >>> config = tiny_config(vocab_size=32)
  >>> config.n_heads * config.head_dim, config.attention_scale
  (64, 0.25)
  """

  vocab_size: int  # V, rows of the embedding
  width: int  # D, floats per token between layers
  n_layers: int
  n_heads: int  # N, query heads
  n_kv_heads: int  # K, key and value heads; divides n_heads
  head_dim: int  # H, floats per head; even, since RoPE rotates pairs
  mlp_width: int  # floats per token inside the gated MLP
  rope_theta: float = 10_000.0  # base of the rotary wavelengths
  rope_scaling: RopeScaling | None = None  # None: as trained
  rope_local_theta: float | None = None  # sliding layers' base, unscaled (Gemma 3); None: as above
  rms_eps: float = 1e-6  # added to the mean square in every RMSNorm
  tie_embeddings: bool = True  # the unembedding is the embedding
  qkv_bias: bool = False  # Qwen2: biases on query, key and value
  qk_norm: bool = False  # Qwen3, Gemma 3: RMSNorm of every query and key head before RoPE
  activation: Literal["silu", "gelu_tanh"] = "silu"  # of the MLP's gate
  embed_scale: float = 1.0  # multiplies embeddings on the way in; Gemma: sqrt(width)
  norm_plus_one: bool = False  # Gemma: RMSNorm multiplies by (1 + scale)
  post_norms: bool = False  # Gemma: a norm after attention and MLP too, before the residual sum
  attn_softcap: float | None = None  # Gemma 2: logits become cap * tanh(logits / cap)
  final_softcap: float | None = None  # Gemma 2: the same for the vocabulary's logits
  query_pre_attn_scalar: int | None = None  # its root divides query-key products; None: head_dim
  sliding_window: int | None = None  # tokens a sliding layer sees, the current one included
  layer_types: tuple[Literal["full", "sliding"], ...] = ()  # one a layer; (): all "full"
  max_position: int = 8192  # tokens the model was trained to read; a record, not a limit

  def __post_init__(self):
    for name, most in MOST.items():
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"TransformerConfig.{name}: {value!r} must be an integer in 1 .. {most}")
    if self.n_heads % self.n_kv_heads:
      raise ValueError(
        f"TransformerConfig.n_kv_heads: {self.n_kv_heads} must divide n_heads, {self.n_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(
        f"TransformerConfig.head_dim: {self.head_dim} must be even: RoPE rotates pairs"
      )
    if self.activation not in ("silu", "gelu_tanh"):
      raise ValueError(
        f"TransformerConfig.activation: {self.activation!r} is not one of 'silu', 'gelu_tanh'"
      )
    if self.layer_types and len(self.layer_types) != self.n_layers:
      raise ValueError(
        f"TransformerConfig.layer_types: {len(self.layer_types)} entries for {self.n_layers} layers"
      )
    if not set(self.layer_types) <= {"full", "sliding"}:
      raise ValueError(
        f"TransformerConfig.layer_types: {sorted(set(self.layer_types))} must be full or sliding"
      )
    if "sliding" in self.layer_types and not (self.sliding_window or 0) >= 1:
      raise ValueError(
        f"TransformerConfig.sliding_window: {self.sliding_window} must be >= 1 for sliding layers"
      )

  def is_sliding(self, layer: int) -> bool:
    """Whether `layer` sees only the last `sliding_window` positions."""
    return bool(self.layer_types) and self.layer_types[layer] == "sliding"

  @property
  def attention_scale(self) -> float:
    """What query-key products are multiplied by."""
    return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

  def length_note(self, longest: int) -> str:
    """A note on sequences longer than the model was trained to read; "" if there are none.

    Rotations are defined at every position, so nothing fails there, but the model's output at
    positions it never saw may be poor.

    >>> TransformerConfig(32, 8, 1, 1, 1, 8, 8, max_position=512).length_note(512)
    ''

    Args:
      longest: tokens of the longest sequence, its answer included.
    """
    if longest <= self.max_position:
      return ""
    return (
      f"sequences of over {self.max_position} tokens, the most that the model was trained to read "
      "(max_position_embeddings): what it makes of the places behind is chance"
    )


def tiny_config(vocab_size: int) -> TransformerConfig:
  """A 2-layer, 64-wide model with every moving part (GQA, RoPE, tied embeddings): about 130,000
  parameters besides the embedding, small enough to learn a toy task from scratch in a minute on a
  CPU.

  Args:
    vocab_size: V, of its tokenizer.
  """
  return TransformerConfig(
    vocab_size=vocab_size,
    width=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    mlp_width=256,
    max_position=2048,
  )


# Hugging Face's config.json, both ways. `model_type` there is a name for a set of our fields.

_ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}
_NUMBER = (int, float)


def config_from_hf(entries: dict[str, Any], source: str = "config.json") -> TransformerConfig:
  """Reads the entries of a Hugging Face `config.json`, old style (`rope_theta`, `rope_scaling`) or
  new (`rope_parameters`).

  >>> config_from_hf(config_to_hf(tiny_config(32))) == tiny_config(32)
  True

  Args:
    entries: what the JSON file holds; of Gemma 3's models of images and text, the text model's
      count.
    source: the file's name, for errors.

  Returns:
    The config.

  Raises:
    WeightsError: an architecture or a setting this decoder does not have, or an entry that is
    missing or of the wrong type.
  """

  def get(key: str, kinds: Any, default: Any = ...) -> Any:
    value = entries.get(key)
    if value is None and default is not ...:
      return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
      found = "is missing" if value is None else f"is {value!r}, of the wrong type"
      raise WeightsError(
        f"{source}: entry '{key}' {found}; restore the model's original config.json"
      )
    return value

  entries = _text_entries(entries)
  family = entries.get("model_type")
  if not isinstance(family, str) or family not in _ARCHITECTURES:
    raise WeightsError(
      f"{source}: model_type {family!r} is not supported; use a model of one of: "
      + ", ".join(_ARCHITECTURES)
    )
  for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config"):
    if entries.get(key):
      raise WeightsError(
        f"{source}: '{key}' is set, which is not supported; use a model without it"
      )

  gemma = family in ("gemma2", "gemma3_text")
  width, n_layers, n_heads = (
    get(key, int) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
  )
  if not 1 <= n_layers <= MOST["n_layers"]:
    raise WeightsError(
      f"{source}: num_hidden_layers is {n_layers}, must be in 1 .. {MOST['n_layers']}; restore the "
      "model's original config.json"
    )
  activation = get(
    "hidden_activation" if gemma else "hidden_act", str, "gelu_pytorch_tanh" if gemma else "silu"
  )
  if activation not in _ACTIVATIONS:
    raise WeightsError(
      f"{source}: activation {activation!r} is not supported; use a model with one of: "
      + ", ".join(_ACTIVATIONS)
    )

  def cap(key: str, default: float) -> float | None:
    if not gemma or (key in entries and entries[key] is None):  # null means none
      return None
    return get(key, _NUMBER, default if family == "gemma2" else None)

  theta, scaling, local_theta = _rope_from_hf(entries, family, source)
  window, layer_types = _layers_from_hf(get, family, n_layers, source)
  defaults = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
  try:
    return TransformerConfig(
      vocab_size=get("vocab_size", int),
      width=width,
      n_layers=n_layers,
      n_heads=n_heads,
      n_kv_heads=get("num_key_value_heads", int, n_heads),
      head_dim=get("head_dim", int, defaults.get(family, width // max(n_heads, 1))),
      mlp_width=get("intermediate_size", int),
      rope_theta=theta,
      rope_scaling=scaling,
      rope_local_theta=local_theta,
      rms_eps=float(get("rms_norm_eps", _NUMBER, 1e-6)),
      tie_embeddings=get("tie_word_embeddings", bool, gemma),
      qkv_bias=family == "qwen2",
      qk_norm=family in ("qwen3", "gemma3_text"),
      activation=_ACTIVATIONS[activation],
      embed_scale=math.sqrt(width) if gemma else 1.0,
      norm_plus_one=gemma,
      post_norms=gemma,
      attn_softcap=cap("attn_logit_softcapping", 50.0),
      final_softcap=cap("final_logit_softcapping", 30.0),
      query_pre_attn_scalar=get("query_pre_attn_scalar", int, 256) if gemma else None,
      sliding_window=window,
      layer_types=layer_types,
      max_position=get("max_position_embeddings", int, 8192),
    )
  except WeightsError:
    raise
  except (ValueError, ArithmeticError) as error:
    raise WeightsError(f"{source}: {error}; restore the model's original config.json") from error


# What google/gemma-3's text_config leaves out, as transformers' Gemma3TextConfig has it.
_GEMMA3_TEXT = {
  "vocab_size": 262_208,
  "hidden_size": 2304,
  "intermediate_size": 9216,
  "num_hidden_layers": 26,
  "num_attention_heads": 8,
  "num_key_value_heads": 4,
  "head_dim": 256,
  "max_position_embeddings": 131_072,
  "sliding_window": 4096,
}


def _text_entries(entries: dict[str, Any]) -> dict[str, Any]:
  """The entries of the text model: of Gemma 3's models of images and text (4B to 27B) those inside
  text_config, else all."""
  text = entries.get("text_config")
  if entries.get("model_type") != "gemma3" or not isinstance(text, dict):
    return entries
  return _GEMMA3_TEXT | text | {"model_type": "gemma3_text"}


def _rope_from_hf(
  entries: dict[str, Any], family: str, source: str
) -> tuple[float, RopeScaling | None, float | None]:
  """(theta, scaling, local theta)."""
  gemma3 = family == "gemma3_text"

  def table(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
      raise WeightsError(
        f"{source}: RoPE settings: {value!r:.40} is not a table; restore the model's original "
        "config.json"
      )
    return value or {}

  parameters = table(entries.get("rope_parameters"))
  local = {}
  if gemma3 and "full_attention" in parameters:
    local = table(parameters.get("sliding_attention"))
    parameters = table(parameters["full_attention"])
  scaling = table(entries.get("rope_scaling")) or parameters
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if not isinstance(kind, str) or kind not in ("default", "linear", "llama3"):
    raise WeightsError(
      f"{source}: RoPE scaling {kind!r} is not supported; use a model with default, linear "
      "or llama3 scaling"
    )
  partial = [e.get("partial_rotary_factor") for e in (entries, parameters, scaling, local)]
  if (
    any(factor not in (None, 1) for factor in partial)
    or local.get("rope_type", "default") != "default"
  ):
    raise WeightsError(
      f"{source}: partial rotary embeddings and scaled local ones are not supported; "
      "use a model without them"
    )
  try:
    theta = parameters.get("rope_theta", entries.get("rope_theta"))
    theta = float(theta or (1e6 if gemma3 else 1e4))
    local_theta = None
    if gemma3:
      local_theta = float(local.get("rope_theta") or entries.get("rope_local_base_freq") or 1e4)
    if kind == "default":
      return theta, None, local_theta
    if kind == "linear":
      return theta, RopeScaling("linear", float(scaling["factor"])), local_theta
    original = scaling.get("original_max_position_embeddings") or entries["max_position_embeddings"]
    slow, fast = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    return (
      theta,
      RopeScaling("llama3", float(scaling["factor"]), slow, fast, int(original)),
      local_theta,
    )
  except KeyError as error:
    raise WeightsError(
      f"{source}: RoPE scaling lacks {error}; restore the model's original config.json"
    ) from error
  except (TypeError, ValueError, ArithmeticError) as error:
    raise WeightsError(
      f"{source}: RoPE settings: {error}; restore the model's original config.json"
    ) from error


def _layers_from_hf(
  get: Any, family: str, n_layers: int, source: str
) -> tuple[int | None, tuple[str, ...]]:
  """(sliding window, layer types); no window and () where every layer sees everything."""
  window = get("sliding_window", int, None)
  names = get("layer_types", list, None)
  if family == "llama" or (
    family.startswith("qwen") and not get("use_sliding_window", bool, False)
  ):
    window, names = None, None
  elif names is not None:
    unknown = [n for n in names if not isinstance(n, str) or n not in _LAYER_TYPES]
    if unknown:
      raise WeightsError(
        f"{source}: layer type {unknown[0]!r} is not supported; use a model with: "
        + ", ".join(_LAYER_TYPES)
      )
    names = [_LAYER_TYPES[name] for name in names]
  elif family == "mistral":
    names = ["sliding"] * n_layers if window else None
  elif family.startswith("qwen"):
    first = get("max_window_layers", int, 28)
    names = ["sliding" if layer >= first else "full" for layer in range(n_layers)]
  else:
    period = 2 if family == "gemma2" else max(get("sliding_window_pattern", int, 6), 1)
    names = ["sliding" if (layer + 1) % period else "full" for layer in range(n_layers)]
  return (window, tuple(names)) if names and "sliding" in names else (None, ())


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
  """The `config.json` entries of the Hugging Face architecture that has exactly this config's
  parts.

  >>> config_to_hf(tiny_config(32))["model_type"]
  'llama'

  Args:
    config: any config.

  Returns:
    Entries that `config_from_hf` and `transformers` read back.

  Raises:
    WeightsError: no supported architecture has this combination; the message names the fields.
  """
  if config.post_norms:
    family = "gemma3_text" if config.qk_norm else "gemma2"
  elif config.qk_norm:
    family = "qwen3"
  elif config.qkv_bias:
    family = "qwen2"
  else:
    family = "mistral" if "sliding" in config.layer_types else "llama"
  gemma = family in ("gemma2", "gemma3_text")
  activation = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation]
  entries: dict[str, Any] = {
    "architectures": [_ARCHITECTURES[family]],
    "model_type": family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "num_hidden_layers": config.n_layers,
    "num_attention_heads": config.n_heads,
    "num_key_value_heads": config.n_kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.mlp_width,
    "hidden_activation" if gemma else "hidden_act": activation,
    "rms_norm_eps": config.rms_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "max_position_embeddings": config.max_position,
    "rope_theta": config.rope_theta,
    "torch_dtype": "float32",
  }
  if config.rope_scaling:
    entries["rope_scaling"] = {
      "rope_type": config.rope_scaling.kind,
      "factor": config.rope_scaling.factor,
    }
    if config.rope_scaling.kind == "llama3":
      entries["rope_scaling"] |= {
        "low_freq_factor": config.rope_scaling.low_freq_factor,
        "high_freq_factor": config.rope_scaling.high_freq_factor,
        "original_max_position_embeddings": config.rope_scaling.original_max_position,
      }
  if gemma:
    entries |= {
      "attn_logit_softcapping": config.attn_softcap,
      "final_logit_softcapping": config.final_softcap,
      "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
    }
  if family == "gemma3_text":
    entries["rope_local_base_freq"] = config.rope_local_theta
  if family == "mistral":
    entries["sliding_window"] = config.sliding_window
  elif family != "llama":
    sliding = "sliding" in config.layer_types
    names = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
    entries["layer_types"] = [names[t] for t in config.layer_types or ("full",) * config.n_layers]
    entries["sliding_window"] = config.sliding_window if sliding else 4096
    if not gemma:
      entries["use_sliding_window"] = sliding

  meant, read_back = _canonical(config), _canonical(config_from_hf(entries))
  lost = [
    field.name
    for field in dataclasses.fields(config)
    if getattr(meant, field.name) != getattr(read_back, field.name)
  ]
  if lost:
    raise WeightsError(
      f"config: as {_ARCHITECTURES[family]}, the nearest Hugging Face architecture, it would lose "
      f"{', '.join(lost)}; change those fields to what that architecture has"
    )
  return entries


def _canonical(config: TransformerConfig) -> TransformerConfig:
  """The same model with one spelling: the query scalar written out, no window where no layer
  slides."""
  sliding = "sliding" in config.layer_types
  return dataclasses.replace(
    config,
    query_pre_attn_scalar=config.query_pre_attn_scalar or config.head_dim,
    sliding_window=config.sliding_window if sliding else None,
    layer_types=config.layer_types if sliding else (),
  )
