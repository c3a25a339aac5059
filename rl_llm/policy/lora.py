"""LoRA: train two thin matrices next to each weight, and leave the weight alone.

    y = W x + (alpha / rank) B A x        A [rank, in], B [out, rank]

Only A and B have gradients and moments, so training adds about a percent to the weights' memory.
B starts at 0, so the first step starts from the model itself. The model without A and B is still
there, so the reference of a KL or of DPO costs nothing.

The adapted weights are the model's tree with the leaves lora_a, lora_b and lora_scale next to a
"weight"; `Policy` computes with whichever it finds. Trained and frozen weights are two trees, which
`join` puts together.

Reference: Hu et al., 2021, LoRA: Low-Rank Adaptation of Large Language Models,
  https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rl_llm.policy.modules import Params


def split_lora(
  params: Params, key: chex.Array, *, rank: int, alpha: float, targets: str = "attention|mlp"
) -> tuple[Params, Params]:
  """A model's weights as (frozen, trained): all of them, and new adapters for the chosen ones.

  >>> params = {"layers_0": {"mlp": {"up": {"weight": jnp.ones((256, 64))}}}}
  >>> frozen, trained = split_lora(params, jax.random.key(0), rank=4, alpha=8.0)
  >>> jax.tree.map(jnp.shape, trained)
  {'layers_0': {'mlp': {'up': {'lora_a': (4, 64), 'lora_b': (256, 4)}}}}

  Args:
    params: the weights.
    key: consumed; A is drawn uniformly within 1 / sqrt(in), as PEFT draws it.
    rank: of each adapter.
    alpha: the adapter is multiplied by alpha / rank, so one learning rate suits any rank.
    targets: a pattern that `re.search` finds in the paths of the weights to adapt, such as
      "layers_3/attention/query"; by default every matrix but the embedding.

  Returns:
    frozen: the weights (no copies) and each adapter's lora_scale. trained: lora_a, lora_b.

  Raises:
    ValueError: no matrix has such a path, or `rank` is below 1.
  """
  if rank < 1:
    raise ValueError(f"rank: {rank}; must be at least 1")
  number = 0

  def split(node: Params, path: str) -> tuple[Params, Params]:
    nonlocal number
    frozen, trained = {}, {}
    for name, child in sorted(node.items()):
      if isinstance(child, dict):
        frozen[name], below = split(child, f"{path}/{name}" if path else name)
        if below:
          trained[name] = below
      else:
        frozen[name] = child
    if "weight" in node and node["weight"].ndim == 2 and re.search(targets, path):
      out, width = node["weight"].shape
      bound = 1 / math.sqrt(width)
      draw = jax.random.fold_in(key, number)
      number += 1
      trained["lora_a"] = jax.random.uniform(draw, (rank, width), jnp.float32, -bound, bound)
      trained["lora_b"] = jnp.zeros((out, rank), jnp.float32)
      frozen["lora_scale"] = jnp.float32(alpha / rank)
    return frozen, trained

  frozen, trained = split(params, "")
  if not trained:
    raise ValueError(f"targets: {targets!r} is found in no path such as 'layers_0/attention/query'")
  return frozen, trained


def join(frozen: Params | None, trained: Params) -> Params:
  """The weights to compute with: two trees in one, without a copy.

  >>> join({"up": {"weight": 1}}, {"up": {"lora_a": 2}, "head": 3})
  {'up': {'weight': 1, 'lora_a': 2}, 'head': 3}

  Args:
    frozen: from `split_lora`; None where everything is trained.
    trained: its leaves are added to those of `frozen` and never replace them.
  """
  if frozen is None:
    return trained
  joined: dict[str, Any] = dict(frozen)
  for name, child in trained.items():
    joined[name] = join(frozen[name], child) if name in frozen else child
  return joined


def merge_lora(params: Params) -> Params:
  """Merges the adapters into the weights: W + (alpha / rank) B A takes the place of W.

  Args:
    params: from `join`; weights without adapters come back as they are.
  """
  if "lora_a" in params:
    change = params["lora_scale"] * (params["lora_b"] @ params["lora_a"])
    params = params | {"weight": params["weight"] + change.astype(params["weight"].dtype)}
  return {
    name: merge_lora(child) if isinstance(child, dict) else child
    for name, child in params.items()
    if not name.startswith("lora_")
  }
