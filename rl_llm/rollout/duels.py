"""Responses of a policy against those of an opponent, to the same problems: who wins."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from rl_llm.rollout.collect import Experience, Sampler, answer, response_batch
from rl_llm.rollout.generation import row_keys
from rl_llm.rollout.grading import Scores
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.scoring import ResponseBatch
from rl_llm.runs.metrics import PhaseClock

OPPONENT = 2**32 - 3  # Stands where a problem's number does in the keys of a step's samples.


def opposed(
  sampler: Sampler,
  params: Any,
  own: Experience,
  seed: int,
  step: int,
  clock: PhaseClock,
  *,
  sampling: SamplingConfig,
  parts: int = 1,
) -> Experience:
  """An opponent's responses to the problems of an experience, as many to each, graded likewise.

  Args:
    sampler: that of `own`.
    params: the opponent's weights, such as those of the policy itself: the keys are others.
    own: the policy's experience.
    seed, step: of the run.
    clock, sampling, parts: as for `rl_llm.rollout.collect.collect`.
  """
  size, responses = own.scores.rewards.shape
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), OPPONENT)
  keys, sizes = row_keys(key, size, responses), {"responses": responses, "parts": parts}
  return answer(sampler, params, own.drawn, keys, clock, sampling=sampling, step=step, **sizes)


def duel_batch(own: Experience, other: Experience) -> ResponseBatch:
  """Both sides' responses as one batch: to each problem first the policy's, then the opponent's.

  Returns:
    On the host, P * 2 * G rows, so that a microbatch of problems holds whole duels.
  """
  sides = response_batch(own), response_batch(other)
  width = max(side.tokens.shape[1] for side in sides)

  def joined(name: str) -> np.ndarray:
    rows = [np.asarray(getattr(side, name)) for side in sides]
    rows = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in rows]
    rows = [x.reshape(len(own.drawn.problems), -1, width) for x in rows]
    return np.concatenate(rows, axis=1).reshape(-1, width)

  tokens, attended, mask = map(joined, ("tokens", "attended", "mask"))
  return ResponseBatch(own.prompts.tokens, own.prompts.lengths, tokens, attended, mask)


def preferences(
  own: Scores, other: Scores, *, scale: float | None
) -> tuple[np.ndarray, np.ndarray]:
  """How likely the g-th response of the policy is better than the opponent's g-th.

      preference = sigmoid(scale * (reward - opponent's reward))
      preference = 1, 0, or 1/2 for a tie                              without a scale

  Args:
    own: the policy's rewards [P, G].
    other: the opponent's.
    scale: of rewards that are logits, as a reward model's with 1; None: only the order counts.

  Returns:
    [P * G] float32, and [P * G] bool: whether both have a reward.
  """
  gap = np.where(own.ok & other.ok, own.rewards - other.rewards, 0.0).reshape(-1)
  found = (np.sign(gap) + 1) / 2 if scale is None else (1 + np.tanh(scale * gap / 2)) / 2
  return found.astype(np.float32), (own.ok & other.ok).reshape(-1)
