"""What each turn or token of a response is worth, where it has a reward or a baseline of its own.

Turns of an episode may be paid one by one; a KL may be taken off the reward of each token; and a
baseline may differ from token to token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import kl
from rl_llm.advantages import discounted_returns, optimal_token_baseline, token_rewards
from rl_llm.policy import Policy
from rl_llm.rollout import ResponseBatch, response_logprobs
from rl_llm.rollout.collect import Experience


def turn_returns(rewards: np.ndarray) -> np.ndarray:
  """The rewards still to come at each turn: what it and the turns after it earn.

      R_k = r_k + r_{k+1} + ... + r_N

  A turn that was paid 1/2, and one that was paid 1:

  >>> turn_returns(np.array([[0.5, 1.0]])).tolist()
  [[1.5, 1.0]]

  Args:
    rewards: [B, N] float.
  """
  return np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]


def turn_inputs(experience: Experience) -> list[tuple[np.ndarray, ...]]:
  """For each turn, what advantages of groups are computed from: `group_inputs` of that turn alone.

  A turn is compared with the turns of the same number in the episodes of its group, by what they
  earned from there on. An episode that ended before counts as not sampled.

  Args:
    experience: of episodes.

  Returns:
    For each turn up to the longest episode's last one: [P, G] returns; [P, G] bool, which of them
    to count; [P, G] lengths in tokens; None, since no turn is sampled greedily.
  """
  scores, (ids, rewards) = experience.scores, experience.turns
  shape, returns = scores.rewards.shape, turn_returns(rewards)
  lengths = np.reshape(experience.rollout.lengths, shape)
  last = ids.max(axis=1)
  return [
    (returns[:, turn].reshape(shape), scores.ok & (last >= turn).reshape(shape), lengths, None)
    for turn in range(int(last.max()) + 1)
  ]


def with_turn_advantages(batch: ResponseBatch, of_turns: Sequence[jax.Array]) -> ResponseBatch:
  """The batch with advantages [B, T]: each of the policy's tokens has that of its turn.

  Args:
    batch: with `turns`.
    of_turns: [P, G] for each turn, from `turn_inputs`.
  """
  by_turn = jnp.stack([jnp.reshape(jnp.asarray(of_turn), -1) for of_turn in of_turns], axis=1)
  return batch._replace(advantages=of_tokens(by_turn, batch.turns, batch.mask))


@jax.jit
def of_tokens(by_turn: jax.Array, turns: jax.Array, mask: jax.Array) -> jax.Array:
  """[B, T]: what the turn of each token in the mask has in `by_turn` [B, N]; 0 elsewhere."""
  found = jnp.take_along_axis(by_turn, jnp.maximum(turns, 0), axis=1)
  return jnp.where(mask, found, 0)


@functools.partial(jax.jit, static_argnames="value")
def reward_kl(batch: ResponseBatch, *, value: str) -> tuple[jax.Array, dict[str, tuple]]:
  """The KL as a part of the reward: [B, T], and the metric "kl_ref"; 0 without a reference.

  It uses the sampler's log-probs as the policy's, since a reward has no gradient.

  Args:
    batch: with or without reference log-probs.
    value: the estimator, "k1", "k2" or "k3".
  """
  if batch.ref_logprobs is None:
    return jnp.zeros_like(batch.sampler_logprobs), {}
  estimate = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[value]
  prices = estimate(batch.sampler_logprobs, batch.ref_logprobs)
  prices = jnp.where(batch.mask, prices, 0)
  return prices, {"kl_ref": (jnp.sum(prices), jnp.sum(batch.mask))}


@jax.jit
def less_kl(batch: ResponseBatch, kl: jax.Array, coef: float) -> ResponseBatch:
  """Advantages [B] of responses as [B, T] of their tokens, less the KL from each token on.

      advantages[b, t] = advantages[b] - coef * sum_{s >= t} kl[b, s]

  Args:
    batch: with advantages [B].
    kl: [B, T] from `reward_kl`.
    coef: the price of a nat.
  """
  rewards = token_rewards(batch.advantages, batch.mask, kl=kl, kl_coef=coef)
  found = discounted_returns(rewards, batch.mask)
  return batch._replace(advantages=jnp.where(batch.mask, found, 0))


@functools.partial(jax.jit, static_argnames=("policy", "group_size"))
def less_optimal_baseline(
  params: Any,
  batch: ResponseBatch,
  returns: jax.Array,
  *,
  policy: Policy,
  temperature: float,
  group_size: int,
) -> jax.Array:
  """[B, T]: the returns, less `rl_llm.advantages.optimal_token_baseline` of their group.

  It takes two passes over the responses: a token's log-prob at half the temperature gives the sum
  of all tokens' squared probabilities in its place.

      log sum_v p(v)^2 = 2 * log p(token) - log p(token) at half the temperature

  Args:
    params: the policy's weights before the step's updates.
    batch: all rows of a step.
    returns: [B, T] of its tokens.
    policy: as for `response_logprobs`.
    temperature: the sampler's.
    group_size: G.
  """
  score = functools.partial(response_logprobs, params, batch, policy=policy)
  own, half = (score(temperature=t)[0] for t in (temperature, temperature / 2))
  squares = jnp.exp(2 * own - half)
  return optimal_token_baseline(returns, own, squares, batch.mask, group_size=group_size)
