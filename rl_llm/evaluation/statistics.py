"""Accuracy over several answers to a problem: pass@k, majority@k and their intervals."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rl_llm.errors import ConfigError
from rl_llm.runs.metrics import proportion_interval
from rl_llm.tasks import Problem, Task

# (mean, low, high), or (None, None, None) if there is nothing to judge by
Interval = tuple[float | None, float | None, float | None]


def pass_at_k(correct: Any, *, k: int) -> np.ndarray:
  """How likely at least one of k responses to a problem is right, from S >= k sampled responses.

  If answers can be checked, it is enough that one of several is right. With c of the S responses
  right, this is the share of the C(S, k) subsets of k that hold a right response:

      pass@k = 1 - C(S - c, k) / C(S, k) = 1 - prod_{i < k} (S - c - i) / (S - i)

  A misconception is that 1 - (1 - c / S)^k does as well: it draws with replacement, and is too low
  on average. With one right response of 4 and k = 2, 3 of the 6 pairs have no right response:

  >>> pass_at_k([[True, False, False, False]], k=2).tolist()
  [0.5]
  >>> 1 - (1 - 1 / 4) ** 2
  0.4375

  Args:
    correct: [N, S] bool, which of the S responses to each problem are right.
    k: the number of responses in a subset, 1 to S.

  Returns:
    [N] float64, the unbiased estimate for each problem; `estimate_interval` gives their mean.

  Raises:
    ValueError: `correct` is not [N, S], or k is not between 1 and S.

  Reference: Chen et al., 2021, Evaluating Large Language Models Trained on Code,
  https://arxiv.org/abs/2107.03374
  """
  correct = _checked_correct(correct, k)
  samples = correct.shape[1]
  wrong = samples - correct.sum(axis=1, keepdims=True)
  drawn = np.arange(k)
  return 1 - np.prod(np.maximum(wrong - drawn, 0) / (samples - drawn), axis=1)


def majority_at_k(correct: Any, answers: Any, *, k: int) -> np.ndarray:
  """How likely the most frequent of k answers to a problem is right, from S >= k sampled answers.

  Pass@k needs someone who knows which response is right. A vote does not: wrong answers scatter,
  and the right answer tends to recur. Over all C(S, k) subsets of k responses,

      majority@k = mean over subsets of  sum_{a wins} right(a) / (number of answers that win)

  where a wins if no answer is more frequent in the subset, and right(a) is the share of the
  responses with answer a that are right: 0 or 1, unless a grade failed. A response without an
  answer does not vote; if no response votes, nothing is right.

  Take the answers 12 (right), 12 and 11. Of all three, 12 wins. Of two, 12 wins once, and ties with
  11 twice:

  >>> correct, answers = [[True, True, False]], [["12", "12", "11"]]
  >>> majority_at_k(correct, answers, k=3).tolist()
  [1.0]
  >>> majority_at_k(correct, answers, k=2).round(3).tolist()  # (1 + 1/2 + 1/2) / 3
  [0.667]

  A misconception is that voting always helps. It hurts if the right answer is the rarer one: with
  one right response of three and the wrong ones agreeing, pass@1 is 1/3 and majority@3 is 0.

  Args:
    correct: [N, S] bool, which of the S responses to each problem are right.
    answers: [N, S] strings, the answer of each response; None if it commits to no answer.
    k: the number of responses that vote, 1 to S.

  Returns:
    [N] float64, exact; `estimate_interval` gives their mean.

  Raises:
    ValueError: a shape is not [N, S], or k is not between 1 and S.

  Reference: Wang et al., 2022, Self-Consistency Improves Chain of Thought Reasoning in Language
  Models, https://arxiv.org/abs/2203.11171
  """
  correct = _checked_correct(correct, k)
  if np.shape(answers) != correct.shape:
    raise ValueError(
      f"answers has shape {np.shape(answers)}; it must have the shape of correct, {correct.shape}"
    )
  return np.array([_majority(*row, k) for row in zip(correct, answers, strict=True)])


def estimate_interval(estimates: Any, *, samples: Any, k: int) -> tuple[float, float, float]:
  """The mean of per-problem estimates of pass@k or majority@k, with a 95 % interval.

  Problems are the independent units, as in `rl_llm.runs.metrics.proportion_interval`; for k = 1 the
  two are equal. An estimate over all subsets of k of S responses is worth at least S / k draws of k
  (those that do not overlap), so the same interval holds with a share e_i of each problem's S / k
  draws right.

  If all 8 responses to all 4 problems are right, this says as much as 4 answers, for k = 1 or 8:

  >>> [round(x, 2) for x in estimate_interval([1, 1, 1, 1], samples=8, k=8)]
  [1.0, 0.51, 1.0]

  Args:
    estimates: [N] floats in [0, 1].
    samples: S, responses to each problem, or [N] numbers if they differ.
    k: of the estimates, 1 to S.

  Returns:
    (mean, low, high), each in [0, 1].

  Raises:
    ValueError: there are no estimates, or one is outside [0, 1].

  Reference: Hoeffding, 1948, A class of statistics with asymptotically normal distribution (the
  variance of a mean over all subsets is at most that of S / k independent draws).
  """
  draws = samples / k
  return proportion_interval(np.asarray(estimates) * draws, draws)


def _checked_correct(correct: Any, k: int) -> np.ndarray:
  correct = np.asarray(correct, dtype=bool)
  if correct.ndim != 2:
    raise ValueError(f"correct has shape {correct.shape}; it must be [N, S], with 2 axes")
  if not 1 <= k <= correct.shape[1]:
    samples = correct.shape[1]
    raise ValueError(f"k is {k}; it must be within the samples of a problem, 1 to {samples}")
  return correct


def _majority(correct: Sequence[bool], answers: Sequence[str | None], k: int) -> float:
  """One problem's majority@k.

  For each vote count j of the winner, this counts subsets answer by answer: `ways[n, t]` is the
  number of subsets of n responses in which t answers have j votes and none has more, and
  `right[n, t]` is the sum over them of how many of the t answers are right.
  """
  votes: dict[str, int] = defaultdict(int)
  rights: dict[str, int] = defaultdict(int)
  for flag, answer in zip(correct, answers, strict=True):
    if answer is not None:
      votes[answer] += 1
      rights[answer] += bool(flag)
  total = 0.0
  for height in range(1, min(k, max(votes.values(), default=0)) + 1):
    able = [answer for answer in votes if votes[answer] >= height]
    left = sum(votes[answer] for answer in able)
    others = len(answers) - left  # No answer, or too rare to win: any may be in the subset.
    ways = {(n, 0): math.comb(others, n) for n in range(max(k - left, 0), min(k, others) + 1)}
    right: dict[tuple[int, int], float] = defaultdict(float)
    for answer in able:
      left -= votes[answer]
      value = rights[answer] / votes[answer]
      more_ways, more_right = defaultdict(int), defaultdict(float)
      for (n, tied), count in ways.items():
        for given in range(max(k - left - n, 0), min(height, k - n) + 1):
          choices, wins = math.comb(votes[answer], given), given == height
          more_ways[n + given, tied + wins] += choices * count
          more_right[n + given, tied + wins] += choices * (right[n, tied] + wins * value * count)
      ways, right = more_ways, more_right
    total += sum(value / tied for (_, tied), value in right.items() if tied)
  return min(total / math.comb(len(answers), k), 1.0)  # Rounding may exceed 1.


def over_opinions(
  estimate: Callable[..., np.ndarray], correct: np.ndarray, *further: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """An estimate for each problem, from its responses on which the grader has an opinion.

  >>> correct = np.array([[1, np.nan, 1], [0, np.nan, np.nan]])
  >>> values, opinions = over_opinions(pass_at_k, correct, k=2)
  >>> values.tolist(), opinions.tolist()
  ([1.0], [2])

  Args:
    estimate: `pass_at_k` or `majority_at_k`.
    correct: [N, S] float, NaN where there is no opinion.
    *further: [N, S], further arguments of `estimate`.
    k: of the estimate.

  Returns:
    [M] the estimates of the M problems with at least k opinions, and [M] each one's opinion count.
  """
  opinions = np.count_nonzero(~np.isnan(correct), axis=1)
  values = []
  for row in np.flatnonzero(opinions >= k):
    known = ~np.isnan(correct[row])
    values.append(estimate(*(x[row][known][None] for x in (correct, *further)), k=k)[0])
  return np.array(values), opinions[opinions >= k]


def accuracy_interval(correct: np.ndarray) -> Interval:
  """`proportion_interval` of [N, S] float, NaN where there is no opinion.

  A response without an opinion counts as not sampled, and so does a problem without any opinion:

  >>> accuracy_interval(np.array([[1, np.nan], [1, 1], [np.nan, np.nan]]))[0]
  1.0
  """
  opinions = np.count_nonzero(~np.isnan(correct), axis=1)
  known = opinions > 0
  if not known.any():
    return None, None, None
  return proportion_interval(np.nansum(correct[known], axis=1), opinions[known])


def natural_order(text: str) -> list[tuple[bool, int, str]]:
  """A sort key that puts "2 steps" before "10 steps"."""
  return [
    (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
    for part in re.split(r"([0-9]+)", text)
    if part
  ]


def difficulty_of(
  task: Task, problems: Sequence[Problem], column: str
) -> Callable[[Problem], str] | None:
  """The difficulty of a problem: the column of that name, or for "" the task's own measure."""
  if not column:
    return task.difficulty
  shared = set.intersection(*(set(problem.columns) for problem in problems))
  if column not in shared:
    allowed = f"a column that all problems have: {', '.join(sorted(shared))}"
    raise ConfigError("difficulty_column", column, allowed)
  return lambda problem: str(problem.columns[column])
