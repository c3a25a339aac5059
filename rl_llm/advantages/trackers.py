"""Baselines that are remembered from step to step, so that one response per prompt is enough.

Import them from `rl_llm.advantages`. Each is a pure function of what was known and what was seen;
the caller keeps the arrays, next to its train state.
"""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.checks import (
  Array,
  at_least_float32,
  check_above,
  check_between,
  check_mask,
  check_same_shape,
  is_number,
)


def track_values(
  right, wrong, rewards, moved, *, half_life=0.06, least=0.875, most=0.96, where=None
) -> tuple[Array, Array]:
  """SPO's value tracker: how often each prompt was solved, older tries counting less.

      keep  = clip(2^(-moved / half_life), least, most)
      right = keep * right + reward
      wrong = keep * wrong + 1 - reward
      value = right / (right + wrong)                 the mean of a Beta distribution

  GRPO learns what a prompt is worth from the other responses of the step, and throws it away. Where
  all of them are right, or all wrong, it learns nothing. A count of right and wrong answers that
  outlives the step is a baseline for a single response. What an old policy could do says little
  about the new one, so old counts fade the faster the further the policy has moved. Solved twice
  in four tries, by a policy that has not moved, then once more:

  >>> right, wrong = track_values(2.0, 2.0, 1.0, 0.0)
  >>> round(float(right), 2), round(float(wrong), 2), round(float(right / (right + wrong)), 3)
  (2.92, 1.92, 0.603)

  The advantage of a response is its reward minus the value *before* it is counted, whitened over
  the batch: `whiten(rewards - right / (right + wrong), where)`. However far the policy moves,
  `least` of a count is kept, so that the value is never of fewer than 1 / (1 - 0.875) = 8 tries.
  Begin with 8 tries of the first policy, or with 1/2 and 1/2.

  Args:
    right: [...] float, what counts as right so far, of each prompt.
    wrong: [...] float, what counts as wrong.
    rewards: [...] of the response to each of them, between 0 and 1.
    moved: [...] float, how far the policy has moved since the prompt's last try, in nats a token:
      the mean of |log-ratio| over its last response.
    half_life: the move that halves a count, in nats, > 0.
    least: the least that is kept of a count, between 0 and 1.
    most: the most that is kept of a count, between 0 and 1.
    where: None, or [...] bool; False marks a prompt without a reward in this step, whose counts
      stay as they are.

  Returns:
    right and wrong after this step, float32.

  Raises:
    ValueError: shapes differ, or a number is out of range.

  Needs: samples, reward.

  Reference: Xu and Ding, 2025, Single-stream Policy Optimization, https://arxiv.org/abs/2509.13232
  """
  check_above("half_life", half_life, 0)
  check_between("least", least, 0, 1)
  check_between("most", most, least if is_number(least) else 0, 1)
  for name, x in (("wrong", wrong), ("rewards", rewards), ("moved", moved)):
    check_same_shape(name, x, "right", right)
  right, wrong, rewards, moved = map(at_least_float32, (right, wrong, rewards, moved))
  keep = jnp.clip(jnp.exp2(-moved / half_life), least, most)
  counts = keep * right + rewards, keep * wrong + 1 - rewards
  if where is None:
    return counts
  check_mask("where", where)
  check_same_shape("where", where, "right", right)
  return jnp.where(where, counts[0], right), jnp.where(where, counts[1], wrong)


def role_baseline(baselines, rewards, *, decay=0.95, where=None) -> Array:
  """RAE's baseline: a moving average of the rewards of each role in a game.

      baseline  = decay * baseline + (1 - decay) * reward
      advantage = reward - baseline before it

  In self-play one policy plays both sides, and the sides need not be equally hard: whoever moves
  first may win three games in four. A common baseline would then reward moving first. With a
  baseline of its own for each role, an advantage of 0 means: as usual in this role:

  >>> before = jnp.array([0.5, -0.5])  # the first player, the second
  >>> rewards = jnp.array([1.0, -1.0])
  >>> (rewards - before).tolist(), role_baseline(before, rewards, decay=0.9).round(2).tolist()
  ([0.5, -0.5], [0.550000011920929, -0.550000011920929])

  Args:
    baselines: [...] float, of each role (and game); 0 at first.
    rewards: [...] of the game just played, or the mean of several, in each role.
    decay: how much of the baseline stays, between 0 and 1.
    where: None, or [...] bool; False marks a role that did not play.

  Returns:
    The baselines for the next game, float32.

  Raises:
    ValueError: shapes differ, or `decay` is out of range.

  Needs: samples, reward.

  Reference: Liu et al., 2025, SPIRAL, https://arxiv.org/abs/2506.24119
  """
  check_between("decay", decay, 0, 1)
  check_same_shape("rewards", rewards, "baselines", baselines)
  baselines, rewards = at_least_float32(baselines), at_least_float32(rewards)
  after = decay * baselines + (1 - decay) * rewards
  if where is None:
    return after
  check_mask("where", where)
  check_same_shape("where", where, "baselines", baselines)
  return jnp.where(where, after, baselines)
