"""What is added to a step's experience once it is graded: a price for length, a greedy baseline."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from rl_llm.advantages import informative_groups, overlong_penalty
from rl_llm.rollout.collect import Experience, Sampler, answer, make_experience, step_keys
from rl_llm.rollout.grading import as_scores
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.metrics import PhaseClock


class Overlong(NamedTuple):
  """The soft penalty for length, in tokens: see `rl_llm.advantages.overlong_penalty`."""

  limit: int
  cache: float
  coef: float = 1.0  # multiplies the penalty


class Shape(NamedTuple):
  """What is added to a step's experience.

  Fields:
    overlong: the penalty for length; None: none.
    drop: whether groups whose responses do not differ in reward are left out.
    greedy: whether to answer each problem greedily too, for `Experience.greedy`. That is a rollout
      of its own, with its own compiled program, and its responses are not trained on.
  """

  overlong: Overlong | None = None
  drop: bool = False
  greedy: bool = False


def shaped(
  sampler: Sampler,
  params: Any,
  experience: Experience,
  clock: PhaseClock,
  shape: Shape,
  *,
  seed: int,
  step: int,
  sampling: SamplingConfig,
) -> Experience:
  """A step's experience, with all that is added to it once it is graded.

  Args:
    sampler, params, clock: as for `rl_llm.rollout.collect.collect`.
    experience: of the step.
    seed, step: of the run.
    shape: what is added.
    sampling: of training.
  """
  overlong, most = shape.overlong, sampler.task.max_reward
  found = priced(experience, overlong, max_reward=most) if overlong else experience
  if shape.drop:  # By the rewards without the penalty, in which nearly all groups differ.
    teaches = informative_groups(experience.scores.rewards, where=experience.scores.ok)
    found = without(found, ~np.asarray(teaches))
  if not shape.greedy:
    return found
  keys = step_keys(seed, step, len(found.drawn.problems), 1)
  how = {"sampling": dataclasses.replace(sampling, temperature=0.0), "step": step}
  best = answer(sampler, params, found.drawn, keys, clock, responses=1, **how)
  scores = (priced(best, overlong, max_reward=most) if overlong else best).scores
  mean = float(np.mean(scores.rewards[scores.ok])) if scores.ok.any() else None
  return found._replace(greedy=scores, metrics=found.metrics | {"greedy_reward_mean": mean})


def without(experience: Experience, dropped: np.ndarray) -> Experience:
  """The experience in which these groups [P] count as if they had not been sampled.

  Their responses stay on record, but have no reward that is trained on, so they are in no mean. The
  step's row gains "dropped_groups", their share.
  """
  ok = experience.scores.ok & ~dropped[:, None]
  metrics = experience.metrics | {"dropped_groups": float(np.mean(dropped))}
  return experience._replace(scores=experience.scores._replace(ok=ok), metrics=metrics)


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
  changed = {name: found.metrics[name] for name in ("reward_mean", "grade_mean")}
  metrics = experience.metrics | changed | {"overlong_penalty": float(np.mean(penalties))}
  return found._replace(metrics=metrics)
