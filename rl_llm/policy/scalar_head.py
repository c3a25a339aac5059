"""The head of value networks and reward models: one number in place of a distribution over tokens.

Both are a trunk, which computes hidden states as any policy does, and one column that reads the
last of them. The trunk is a language model's weights without the unembedding, with the column added
as `params["head"]`; `policy.hidden(params, ...)` runs this tree like a language model's.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from rl_llm.policy.modules import Params


def zero_head(width: int) -> Params:
  """The head of a value network before training: every value is 0.

  A random head would start with values as large as rewards and no better than chance, and GAE would
  trust them. With 0 the first advantages are the returns themselves, as without a value network. A
  common misconception is that zeros never learn, as in a hidden layer. Here the weight's gradient
  is the hidden state, and the trunk learns from the second update on.

  Args:
    width: D, of the trunk.

  Returns:
    {"weight": [1, D], "bias": [1]} float32.
  """
  return {"weight": jnp.zeros((1, width), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def normal_head(width: int, key: chex.Array) -> Params:
  """The head of a reward model before training: normal with standard deviation 1 / sqrt(D + 1).

  For hidden states whose entries have mean square 1, rewards then have a spread of about 1, so the
  first loss moves the trunk too. There is no bias: pairs only teach differences, so a constant has
  no gradient.

  Args:
    width: D, of the trunk.
    key: consumed.

  Returns:
    {"weight": [1, D]} float32.

  Reference: Stiennon et al., 2020, Learning to summarize from human feedback,
    https://arxiv.org/abs/2009.01325
  """
  return {"weight": jax.random.normal(key, (1, width), jnp.float32) / math.sqrt(width + 1)}


def with_head(params: Params, head: Params) -> Params:
  """A separate tower: a copy of a model's trunk, and a head.

  >>> params = {"final_norm": {"scale": jnp.ones(2)}, "unembed": {"embedding": jnp.ones((5, 2))}}
  >>> sorted(with_head(params, zero_head(2)))
  ['final_norm', 'head']

  Args:
    params: a policy's, or those of another tower, whose head is dropped.
    head: from `zero_head` or `normal_head`.

  Returns:
    The parameters. The arrays are new: an update that donates these leaves the policy's alone.
  """
  trunk = {name: leaf for name, leaf in params.items() if name not in ("unembed", "head")}
  return jax.tree.map(jnp.copy, trunk | {"head": head})


def apply_head(head: Params, hidden: chex.Array) -> chex.Array:
  """One number a hidden state.

      y = hidden . weight + bias

  >>> head = {"weight": jnp.array([[1.0, 10.0]]), "bias": jnp.array([100.0])}
  >>> apply_head(head, jnp.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
  [121.0, 130.0]

  Args:
    head: {"weight": [1, D]}, and "bias" [1] or none.
    hidden: [..., D] float, of any dtype.

  Returns:
    [...] float32.
  """
  # A sum of products, not a matrix product, which accelerators round to fewer bits.
  y = jnp.sum(hidden.astype(jnp.float32) * head["weight"][0].astype(jnp.float32), axis=-1)
  return y + head["bias"][0] if "bias" in head else y
