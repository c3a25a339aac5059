"""Names of a model's weights: ours, and those in Hugging Face's files."""

from __future__ import annotations

import re

from rl_llm.policy.configs import TransformerConfig

# Our path inside a layer -> theirs. Gemma, which norms after attention too, uses the name
# post_attention_layernorm for that; elsewhere it is the norm before the MLP.
LAYER_NAMES = {
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
  return f"model.layers.{match[1]}.{(LAYER_NAMES | norms)[match[2]]}.{suffix}"
