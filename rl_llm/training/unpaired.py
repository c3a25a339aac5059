"""Single answers, each wanted or not: which of them a step takes, and what KTO measures them by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl_llm.data.batches import batch_indices
from rl_llm.data.encoding import Encoded, limit_sequences


class Answers(NamedTuple):
  """N answers, and all about them that never changes."""

  rows: list[Encoded]
  desirable: np.ndarray  # [N] bool
  ref_answers: np.ndarray  # [N] the reference's log-probs of the answers, in nats
  others: list[Encoded]  # the same prompts with other prompts' answers; KTO's alone
  ref_others: np.ndarray  # [N] the reference's log-probs of those

  def take(self, indices: Sequence[int]) -> Answers:
    """The answers with these numbers, in this order."""
    others = [self.others[index] for index in indices] if self.others else []
    ref_others = self.ref_others[indices] if self.others else self.ref_others
    known = self.desirable[indices], self.ref_answers[indices]
    return Answers([self.rows[index] for index in indices], *known, others, ref_others)


def drawn_answers(
  desirable: np.ndarray, *, count: int, seed: int, step: int, halves: bool = False
) -> np.ndarray:
  """Which answers a step trains on: a function of (seed, step), as `batch_indices` is.

  With `halves`, wanted and unwanted ones alternate, each kind in laps of its own: where one kind is
  rare, its answers come more often than the others.

  >>> wanted = np.array([True, False, False, False])
  >>> wanted[drawn_answers(wanted, count=4, seed=0, step=0, halves=True)].tolist()
  [True, False, True, False]

  Args:
    desirable: [N] bool, the label of each answer.
    count: answers a step; even with `halves`.
    seed, step: of the run.
    halves: whether half of them are to be wanted; both kinds must occur.

  Returns:
    [count] int, each in [0, N).
  """
  if not halves:
    return batch_indices(len(desirable), batch_size=count, seed=seed, step=step)
  kinds = np.flatnonzero(desirable), np.flatnonzero(~desirable)
  how = {"batch_size": count // 2, "seed": seed, "step": step}
  return np.stack([kind[batch_indices(len(kind), **how)] for kind in kinds], axis=1).reshape(-1)


def mismatched(answers: Sequence[Encoded], *, limit: int) -> list[Encoded]:
  """Each prompt with the next answer that belongs to another prompt, for `losses.kto_baseline`.

  The last answers are followed by the first. Which belongs to which is fixed for a data set, so the
  reference's log-probs of them can be computed once.

  >>> rows = [Encoded([1, 5], [False, True], 1), Encoded([1, 6], [False, True], 1),
  ...         Encoded([2, 7], [False, True], 1)]
  >>> [row.tokens for row in mismatched(rows, limit=9)]
  [[1, 7], [1, 7], [2, 5]]

  Args:
    answers: from `rl_llm.data.encoding.encode`.
    limit: tokens that a row may have; a longer one loses the beginning of its prompt.

  Raises:
    ValueError: all answers belong to one prompt.
  """
  prompts = [tuple(each.tokens[: each.prompt_length]) for each in answers]
  count, following = len(answers), {}
  for i in reversed(range(2 * count)):  # Twice around, since the last look at the first.
    own, after = i % count, (i + 1) % count
    other = after if prompts[own] != prompts[after] else following.get(after)
    if other is not None:
      following[own] = other
  if len(following) < count:
    raise ValueError("all answers belong to one prompt: there is no mismatched one")
  rows = []
  for own, prompt in enumerate(prompts):
    of_other, at = answers[following[own]], len(prompt)
    start = of_other.prompt_length
    tokens = [*prompt, *of_other.tokens[start:]]
    rows.append(Encoded(tokens, [False] * at + of_other.mask[start:], at))
  return limit_sequences(rows, limit=limit, overlong="truncate_left").kept


def label_auc(rewards: np.ndarray, desirable: np.ndarray) -> float | None:
  """How often a wanted answer's reward is above an unwanted one's, over all such pairs.

  A tie counts half, so a model that tells nothing apart has 0.5. Wanted answers at 2 and 0, an
  unwanted one at 1:

  >>> label_auc(np.array([2.0, 0.0, 1.0]), np.array([True, True, False]))
  0.5

  Args:
    rewards: [N] float.
    desirable: [N] bool.

  Returns:
    A number between 0 and 1; None if one kind is missing.
  """
  wanted, unwanted = rewards[desirable], np.sort(rewards[~desirable])
  if not len(wanted) or not len(unwanted):
    return None
  below = np.searchsorted(unwanted, wanted, "left") + np.searchsorted(unwanted, wanted, "right")
  return float(np.mean(below) / (2 * len(unwanted)))
