"""PPO's critic: how much reward the policy is about to earn, from every state on the way."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from rl_llm import advantages
from rl_llm.masked import masked_mean, masked_var
from rl_llm.policy import Policy
from rl_llm.policy.scalar_head import apply_head
from rl_llm.rollout import ResponseBatch, response_hidden
from rl_llm.training.credit import of_tokens


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


def turn_gae(
  rewards: jax.Array,
  values: jax.Array,
  turns: jax.Array,
  mask: jax.Array,
  kl: jax.Array | None = None,
  kl_coef: jax.Array | float = 0.0,
  *,
  discount: jax.Array | float = 1.0,
  gae_lambda: jax.Array | float = 0.95,
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation over turns: an action is a turn, not a token.

      delta_k = r_k + discount * V_{k+1} - V_k        V_k: the value at turn k's first token
      A_k     = delta_k + discount * gae_lambda * A_{k+1}

  Over tokens, gae_lambda^n fades a reward away over the n tokens of a long turn, and most of them
  are no decision. All tokens of a turn have its advantage. Two turns of two tokens with values 0.4
  and 0.6 at their beginnings, and a reward of 1 for the second:

  >>> turns, mask = jnp.array([[0, 0, 1, 1]]), jnp.ones((1, 4), bool)
  >>> values = jnp.array([[0.4, 9.0, 0.6, 9.0]])
  >>> found, returns = turn_gae(jnp.array([[0.0, 1.0]]), values, turns, mask, gae_lambda=0.5)
  >>> print(found.round(3), returns.round(3))
  [[0.4 0.4 0.4 0.4]] [[0.8 0.8 1.  1. ]]

  Args:
    rewards: [B, N] float, of each turn.
    values: [B, T] float, the value network's, before each token.
    turns: [B, T] int32, the turn that a token is in.
    mask: [B, T] bool, the tokens that the policy wrote.
    kl: None, or [B, T] float, in nats; a turn pays for all of its tokens.
    kl_coef: the price of a nat.
    discount, gae_lambda: per turn.

  Returns:
    Advantages and returns [B, T], 0 outside the mask.
  """
  count = rewards.shape[1]
  before = jnp.pad(turns, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
  of_turn = mask[:, :, None] & (turns[:, :, None] == jnp.arange(count))
  begins = of_turn & (turns != before)[:, :, None]
  first = jnp.sum(jnp.where(begins, values[:, :, None], 0), axis=1)
  if kl is not None:
    rewards = rewards - kl_coef * jnp.sum(jnp.where(of_turn, kl[:, :, None], 0), axis=1)
  found = advantages.gae(
    rewards, first, jnp.any(of_turn, axis=1), discount=discount, gae_lambda=gae_lambda
  )
  by_token = (of_tokens(by_turn, turns, mask) for by_turn in found)
  return next(by_token), next(by_token)
