"""PPO's critic: how much reward the policy is about to earn, from every state on the way."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rl_llm.masked import masked_mean, masked_var
from rl_llm.policy import Policy
from rl_llm.policy.scalar_head import apply_head
from rl_llm.rollout import ResponseBatch, response_hidden


def response_values(params: Any, batch: ResponseBatch, *, policy: Policy) -> chex.Array:
  """The value of the state before each response token, aligned with `response_logprobs`.

      values[b, t] = apply_head(head, hidden that has seen the prompt and tokens[b, :t])

  The baseline of a choice must not know what was chosen, so the value of token t is read from the
  state that predicts it, one position before the state that has read it. The first value is read
  from the prompt's state.

  A separate tower is `with_head(policy_params, zero_head(width))`. If the value network shares the
  policy's trunk, one pass serves both heads:

      hidden = response_hidden(params, batch, policy=policy)
      logprobs, entropies = logprobs_of_hidden(params, hidden, batch.tokens, batch.mask, ...)
      values = values_of_hidden(params["head"], hidden, batch.mask)

  Args:
    params: a tower's, with its "head".
    batch: prompts, prompt_lengths, tokens, `attended` and `mask` are read from it.
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
  """How much of the returns' variance the value network predicted.

      1 - var(returns - values) / var(returns)

  1 is perfect, 0 is no better than a constant, and below 0 is worse than a constant: the baseline
  then adds noise. Values of 1/4 and 3/4 for returns of 0 and 1 leave half the error, and so a
  quarter of the variance:

  >>> values, returns = jnp.array([[0.25, 0.75, 9.0]]), jnp.array([[0.0, 1.0, -9.0]])
  >>> float(explained_variance(values, returns, jnp.array([[True, True, False]])))
  0.75

  A misconception is that a small value loss shows a good critic. If all returns are equal, the
  right constant has a loss of 0, but there is nothing to explain: this is then nan.

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
  """How well the value network predicted a step, for its record; the arguments as above.

  As everywhere in a record, a metric with nothing to measure is null: (sum, count) with count 0.
  """
  explained = explained_variance(values, returns, mask)
  varied = masked_var(returns, mask) != 0  # True for a nan, so that it shows.
  return {
    "explained_variance": (jnp.where(varied, explained, 0), varied),
    "values_mean": masked_mean(values, mask),
    "returns_mean": masked_mean(returns, mask),
  }
