"""Grades of responses, their status, and the lines of samples.jsonl."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import row_owners
from rl_llm.rewards import RewardPool, RewardResult, to_arrays
from rl_llm.rewards.grading import MAX_METRICS
from rl_llm.rollout.drawing import prompt_text
from rl_llm.rollout.generation import STOP_EOS, Rollout
from rl_llm.tasks import Problem


class Scores(NamedTuple):
  """The rewards of P * G responses; a failed grade is masked out, never counted as zero."""

  rewards: np.ndarray  # [P, G] float32, 0 if there is no reward
  ok: np.ndarray  # [P, G] bool, True = there is a reward
  counts: dict[str, int]  # how many results have each status
  results: list[RewardResult]  # [P * G]


def owners_of(mesh: jax.sharding.Mesh | None, rows: int) -> np.ndarray:
  """[rows] which process grades each response: the process whose devices hold it."""
  if mesh is None or hosts.count() == 1:
    return np.full(rows, hosts.index())
  return row_owners(mesh, rows)


def grade(
  pool: RewardPool,
  problems: Sequence[Problem],
  texts: Sequence[str],
  ids: Sequence[Sequence[int]],
  *,
  group_size: int,
  owners: np.ndarray | None = None,
  step: int = 0,
  steps: int = 1,
  environments: Mapping[int, Mapping[str, Any]] = types.MappingProxyType({}),
) -> list[RewardResult]:
  """Grades P * G responses; row p * G + g answers problem p.

  Args:
    pool: the workers of this process.
    problems: P problems.
    texts: P * G responses.
    ids: P * G, their tokens.
    group_size: G.
    owners: [P * G] which process grades each response, from `owners_of`; the same for all of a
      group. Every process gets all results. None: this process grades all.
    step, steps: of the run, and how many it has; passed to reward functions.
    environments: by row of this process the attributes of its environment, which reward functions
      get as the column `environments`.
  """
  columns = {row: {"environments": state} for row, state in environments.items()}
  repeated = [problem for problem in problems for _ in range(group_size)]
  shared = hosts.count() > 1 and owners is not None
  own = np.flatnonzero(owners == hosts.index()) if shared else range(len(texts))
  results = pool.score(
    [repeated[row].prompt for row in own],
    [texts[row] for row in own],
    [repeated[row].columns | columns.get(row, {}) for row in own],
    [ids[row] for row in own],
    group_size=group_size,
    step=step,
    steps=steps,
  )
  if not shared:
    return results
  # Also if one process has all rows, as in a last batch that is almost empty.
  graded = hosts.all_gather("the grades", results)
  by_owner = [iter(of_one) for of_one in graded]
  return [RewardResult(*next(by_owner[owner])) for owner in owners]


def as_scores(results: list[RewardResult], *, group_size: int) -> Scores:
  """The [P * G] results as arrays [P, G]."""
  rewards, ok, counts = to_arrays(results)
  shape = (-1, group_size)
  return Scores(rewards.reshape(shape), ok.reshape(shape), counts, results)


def score(
  pool: RewardPool,
  problems: Sequence[Problem],
  texts: Sequence[str],
  ids: Sequence[Sequence[int]],
  *,
  group_size: int,
  **how: Any,
) -> Scores:
  """The results of `grade` as arrays; takes the same arguments."""
  results = grade(pool, problems, texts, ids, group_size=group_size, **how)
  return as_scores(results, group_size=group_size)


def is_correct(grade: RewardResult, max_reward: float) -> bool | None:
  """Whether a response is right: False if its grade failed, None if the grader has no opinion.

  Of several rewards the first says so.

  >>> [is_correct(grade, 1.0) for grade in (RewardResult(1.0, "ok"), RewardResult(None, "raised"),
  ...                                       RewardResult(None, "not_applicable"))]
  [True, False, None]
  """
  if grade.status == "not_applicable":
    return None
  value = grade.value if grade.parts is None else next(iter(grade.parts.values()))
  return value is not None and value >= max_reward


def reward_parts(results: Sequence[RewardResult]) -> dict[str, float | None]:
  """The mean over responses of each of several rewards, as "reward_NAME"; {} where there is one."""
  found: dict[str, float | None] = {}
  for name in next((result.parts for result in results if result.parts), {}):
    values = [result.parts[name] for result in results if result.parts]
    values = [value for value in values if value is not None]
    found[f"reward_{name}"] = float(np.mean(values)) if values else None
  return found


def logged_metrics(results: Sequence[RewardResult]) -> dict[str, float]:
  """The mean over responses of the values passed to `log_metric`, as "reward/NAME".

  Of more than `MAX_METRICS` names the first count: responses that forge what their grader logs,
  each under other names, must not fill the disk with a record of them.
  """
  found: dict[str, list[float]] = {}
  for result in results:
    for name, value in (result.metrics or {}).items():
      if name in found or len(found) < MAX_METRICS:
        found.setdefault(name, []).append(value)
  return {f"reward/{name}": float(np.mean(values)) for name, values in found.items()}


def sample_rows(
  problems: Sequence[Problem],
  texts: Sequence[str],
  rollout: Rollout,
  scores: Scores,
  *,
  split: str,
  max_reward: float,
  grades: Scores | None = None,
) -> list[dict[str, Any]]:
  """One dict per response, for samples.jsonl: what the model wrote, and its grade and reward.

  Args:
    problems: P problems.
    texts: P * G responses.
    rollout: their tokens.
    scores: their rewards.
    split: "train" or "eval".
    max_reward: a response with at least this grade is correct.
    grades: the grader's, if `scores` are a reward model's.
  """
  graded = (grades or scores).results
  group_size = len(texts) // len(problems)
  rows = []
  for index, (text, reward, grade) in enumerate(zip(texts, scores.results, graded, strict=True)):
    problem = problems[index // group_size]
    row = {
      "split": split,
      "problem": problem.key,
      "prompt": prompt_text(problem.prompt),
      "response": text,
      "reward": reward.value,
      "status": grade.status,
      "advantage": None,  # Known only after the step's updates.
      "stop_reason": "eos" if rollout.stop_reason[index] == STOP_EOS else "length",
      "length": int(rollout.lengths[index]),
      "correct": is_correct(grade, max_reward),
    }
    if grade.detail:
      row["detail"] = grade.detail
    if grade.unreadable:
      row["unreadable"] = True
    row |= {f"extra/{name}": value for name, value in (grade.extra or {}).items()}
    row |= {f"reward_{name}": value for name, value in (grade.parts or {}).items()}
    rows.append(row)
  return rows
