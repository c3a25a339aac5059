"""PPO's critic: how much reward the policy is about to earn, from every state on the way."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rl_llm.masked import masked_mean, masked_var
from rl_llm.policy.scalar_head import apply_head
from rl_llm.rollout import ResponseBatch, response_hidden


def response_values(params: Any, batch: ResponseBatch, *, policy: Any) -> chex.Array:
  """The value of the state before each response token, aligned with `response_logprobs`.

      values[b, t] = apply_head(head, hidden that has seen the prompt and tokens[b, :t])

  The baseline of a choice must not know what was chosen: the value of token t is read from the
  state that predicts it, one place before the state that has read it. The first is the prompt's.

  A tower of its own is `with_head(policy_params, zero_head(width))`. Where the policy's trunk is
  shared, one pass serves both heads:

      hidden = response_hidden(params, batch, policy=policy)
      logprobs, entropies = logprobs_of_hidden(params, hidden, batch.tokens, batch.mask, ...)
      values = values_of_hidden(params["head"], hidden, batch.mask)

  Args:
    params: a tower's, with its "head".
    batch: of which prompts, prompt_lengths, tokens, `attended` and `mask` are read.
    policy: the pure functions of the trunk, a `rl_llm.policy.Policy`.

  Returns:
    values [B, T], float32, in units of reward, 0 outside `mask`.

  Raises:
    ValueError: B is not a multiple of P.
  """
  hidden = response_hidden(params, batch, policy=policy)
  return values_of_hidden(params["head"], hidden, batch.mask)


def values_of_hidden(head: Any, hidden: chex.Array, mask: chex.Array) -> chex.Array:
  """The second half of `response_values`, for a trunk shared with the policy.

  Args:
    head: from `zero_head`, or trained.
    hidden: [B, T, D] float, from `response_hidden`.
    mask: [B, T] bool.

  Returns:
    values [B, T], float32, 0 outside the mask.
  """
  return jnp.where(mask, apply_head(head, hidden), 0.0)


def explained_variance(values: chex.Array, returns: chex.Array, mask: chex.Array) -> chex.Array:
  """How much of the returns' variance the value network foresaw.

      1 - var(returns - values) / var(returns)

  1 is perfect, 0 no better than a constant, below 0 worse than one: then the baseline adds noise.
  A value of 1/4 and 3/4 where the returns were 0 and 1 leaves half the error, a quarter of the
  variance:

  >>> values, returns = jnp.array([[0.25, 0.75, 9.0]]), jnp.array([[0.0, 1.0, -9.0]])
  >>> float(explained_variance(values, returns, jnp.array([[True, True, False]])))
  0.75

  The misconception is that a small value loss shows a good critic. Where all returns are alike any
  constant has none, and there is nothing to explain: then this is nan.

  Args:
    values: [B, T] float, before this batch's updates.
    returns: [B, T] float.
    mask: [B, T] bool, the tokens that count.

  Returns:
    A scalar of at most 1; nan where the returns do not vary.
  """
  variance = masked_var(returns, mask)
  unexplained = masked_var(returns - values, mask)
  return jnp.where(variance > 0, 1 - unexplained / jnp.maximum(variance, 1e-30), jnp.nan)


@jax.jit
def value_statistics(
  values: chex.Array, returns: chex.Array, mask: chex.Array
) -> dict[str, chex.Array]:
  """What a value network foresaw of a step, for its record; the arguments as above.

  As everywhere in a record, what there is nothing of is null: a (sum, count) with count 0.
  """
  explained = explained_variance(values, returns, mask)
  varied = masked_var(returns, mask) != 0  # True for a nan, which is to be seen.
  return {
    "explained_variance": (jnp.where(varied, explained, 0), varied),
    "values_mean": masked_mean(values, mask),
    "returns_mean": masked_mean(returns, mask),
  }
