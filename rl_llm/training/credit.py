"""What each turn of an episode is worth, where the turns have rewards of their own."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.rollout import ResponseBatch
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
