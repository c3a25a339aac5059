"""What is added to a step's experience once it is graded: a price for length, a greedy baseline."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from rl_llm.advantages import overlong_penalty
from rl_llm.rollout.collect import Experience, Sampler, answer, make_experience, step_keys
from rl_llm.rollout.grading import as_scores
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.metrics import PhaseClock


class Overlong(NamedTuple):
  """The soft penalty for length, in tokens: see `rl_llm.advantages.overlong_penalty`."""

  limit: int
  cache: int
  coef: float = 1.0  # multiplies the penalty


def shaped(
  sampler: Sampler,
  params: Any,
  experience: Experience,
  clock: PhaseClock,
  *,
  seed: int,
  step: int,
  sampling: SamplingConfig,
  overlong: Overlong | None = None,
  greedy: bool = False,
) -> Experience:
  """A step's experience, with all that is added to it once it is graded.

  Args:
    sampler, params, clock: as for `rl_llm.rollout.collect.collect`.
    experience: of the step.
    seed, step: of the run.
    sampling: of training.
    overlong: the penalty for length; None: none.
    greedy: whether to answer each problem greedily too, for `Experience.greedy`. That is a rollout
      of its own, with its own compiled program, and its responses are not trained on.
  """
  most = sampler.task.max_reward
  found = priced(experience, overlong, max_reward=most) if overlong else experience
  if not greedy:
    return found
  keys = step_keys(seed, step, len(found.drawn.problems), 1)
  how = {"sampling": dataclasses.replace(sampling, temperature=0.0), "step": step}
  best = answer(sampler, params, found.drawn, keys, clock, responses=1, **how)
  scores = (priced(best, overlong, max_reward=most) if overlong else best).scores
  mean = float(np.mean(scores.rewards[scores.ok])) if scores.ok.any() else None
  return found._replace(greedy=scores, metrics=found.metrics | {"greedy_reward_mean": mean})


def priced(experience: Experience, overlong: Overlong, *, max_reward: float) -> Experience:
  """The experience with the penalty for length in its rewards; its grades stay what they were.

  A response whose grade failed still has no reward. The step's row gains "overlong_penalty", the
  mean of what was added.

  Args:
    experience: of a step.
    overlong: the penalty.
    max_reward: as for `make_experience`.
  """
  lengths, (limit, cache, coef) = experience.rollout.lengths, overlong
  penalties = coef * np.asarray(overlong_penalty(lengths, limit=limit, cache=cache))
  results = [
    result if result.value is None else result._replace(value=result.value + float(penalty))
    for result, penalty in zip(experience.scores.results, penalties, strict=True)
  ]
  scores = as_scores(results, group_size=experience.scores.rewards.shape[1])
  drawn, prompts, rollout, texts, _, grades, *_ = experience
  found = make_experience(drawn, prompts, rollout, texts, scores, grades, max_reward=max_reward)
  metrics = experience.metrics | found.metrics | {"overlong_penalty": float(np.mean(penalties))}
  return found._replace(metrics=metrics)
