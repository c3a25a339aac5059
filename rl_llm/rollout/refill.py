"""Dynamic sampling: a step is refilled until enough of its groups teach something (DAPO)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from rl_llm.advantages import informative_groups
from rl_llm.data.prompts import pad_prompts
from rl_llm.rollout.collect import Experience, Sampler, answer, make_experience, step_keys
from rl_llm.rollout.drawing import Drawn, draw_problems
from rl_llm.rollout.generation import Rollout
from rl_llm.rollout.grading import Scores, as_scores
from rl_llm.runs.metrics import PhaseClock


def collect_informative(
  sampler: Sampler,
  params: Any,
  seed: int,
  step: int,
  clock: PhaseClock,
  *,
  prompts: int,
  max_rounds: int,
  responses: int,
  **how: Any,
) -> Experience:
  """`rl_llm.rollout.collect.collect` in rounds, until P groups have rewards that differ.

  Round r answers problems r * P to (r + 1) * P of the max_rounds * P that the step draws, so all is
  a function of (params, seed, step), and no problem comes twice if the task draws without
  replacement. Groups are kept whole, in their order: the first P that are informative. If the
  rounds find fewer, the first of the others fill the step, and "refill/lacked" counts them.

  Rewards, accuracy and lengths in the step's row are those of all that was sampled (with a penalty
  for length, its rewards are the kept groups'); only the kept groups are trained on and written to
  samples.jsonl. What was sampled beyond them is counted in
  "refill/tokens_beyond" and "speed/refill_seconds".

  Args:
    sampler, params, seed, step, clock: as for `collect`.
    prompts: P, of a round and of the step.
    max_rounds: how often to sample, at most; at least 1.
    responses: G.
    **how: `sampling` and `parts`, as for `collect`.
  """
  with clock("rollout"):
    drawn = draw_problems(sampler.task, seed, step, max_rounds * prompts, sampler.encode)
    keys = step_keys(seed, step, max_rounds * prompts, responses)
  rounds: list[Experience] = []
  informative: list[bool] = []
  began = None
  while len(rounds) < max_rounds and sum(informative) < prompts:
    began = time.perf_counter() if len(rounds) == 1 else began
    own = slice(len(rounds) * prompts, (len(rounds) + 1) * prompts)
    of_round = Drawn(drawn.problems[own], drawn.prompts[own], drawn.overlong)
    own_keys = keys[own.start * responses : own.stop * responses]
    of_step = {"responses": responses, "step": step}
    found = answer(sampler, params, of_round, own_keys, clock, **of_step, **how)
    teaches = informative_groups(found.scores.rewards, where=found.scores.ok)
    informative += np.asarray(teaches).tolist()
    rounds.append(found)
  seconds = 0.0 if began is None else time.perf_counter() - began
  everything = joined(rounds, sampler)
  teaching = np.flatnonzero(informative)[:prompts]
  others = np.setdiff1d(np.arange(len(informative)), teaching)[: prompts - len(teaching)]
  kept = taken(everything, np.sort(np.concatenate([teaching, others])), sampler)
  beyond = int(np.sum(everything.rollout.lengths) - np.sum(kept.rollout.lengths))
  return kept._replace(
    metrics=everything.metrics
    | {
      "refill/rounds": len(rounds),
      "refill/lacked": prompts - len(teaching),
      "refill/tokens_beyond": beyond,
      "speed/refill_seconds": seconds,
    }
  )


def joined(rounds: list[Experience], sampler: Sampler) -> Experience:
  """All that the rounds sampled as one experience; rollouts are as wide as the widest."""
  drawn = Drawn(
    [problem for each in rounds for problem in each.drawn.problems],
    [prompt for each in rounds for prompt in each.drawn.prompts],
    rounds[0].drawn.overlong,
  )
  width = max(each.rollout.tokens.shape[1] for each in rounds)
  fill = Rollout(sampler.tokenizer.pad_id, False, 0.0, 0.0, 0, 0)

  def wide(x: np.ndarray, value: Any) -> np.ndarray:
    if x.ndim == 1:
      return x
    return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)

  parts = [map(wide, each.rollout, fill) for each in rounds]
  rollout = Rollout(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
  group = rounds[0].scores.rewards.shape[1]

  def of_all(name: str) -> Scores:
    results = [result for each in rounds for result in getattr(each, name).results]
    return as_scores(results, group_size=group)

  judged = rounds[0].scores is not rounds[0].grades
  grades = of_all("grades")
  return make_experience(
    drawn,
    pad_prompts(drawn.prompts, pad_id=sampler.tokenizer.pad_id),
    rollout,
    [text for each in rounds for text in each.texts],
    of_all("scores") if judged else grades,
    grades,
    max_reward=sampler.task.max_reward,
  )


def taken(experience: Experience, chosen: np.ndarray, sampler: Sampler) -> Experience:
  """The experience of the chosen problems alone, in that order."""
  group = experience.scores.rewards.shape[1]
  rows = (chosen[:, None] * group + np.arange(group)).reshape(-1)
  prompts = [experience.drawn.prompts[p] for p in chosen]

  def of_chosen(scores: Scores) -> Scores:
    return as_scores([scores.results[row] for row in rows], group_size=group)

  grades = of_chosen(experience.grades)
  judged = experience.scores is not experience.grades
  return make_experience(
    Drawn([experience.drawn.problems[p] for p in chosen], prompts, experience.drawn.overlong),
    pad_prompts(prompts, pad_id=sampler.tokenizer.pad_id),
    Rollout(*(x[rows] for x in experience.rollout)),
    [experience.texts[row] for row in rows],
    of_chosen(experience.scores) if judged else grades,
    grades,
    max_reward=sampler.task.max_reward,
  )
