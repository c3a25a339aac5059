"""Preference pairs as arrays: what losses on pairs read, packed or not.

A loss on a pair needs both answers in one place, so a microbatch holds whole pairs. Pair i has rows
2 i and 2 i + 1, or its answers are packed into rows that belong to this microbatch alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import numpy as np

from rl_llm.data import DataError, Dataset
from rl_llm.data.batches import (
  PackedShares,
  SequenceBatch,
  packed_shares,
  pad_values,
  padding_fraction,
  sequence_batch,
)
from rl_llm.data.encoding import Encoded, Pair, flat
from rl_llm.data.packing import unpack
from rl_llm.logprobs import sequence_logprobs
from rl_llm.losses import wpo_weights
from rl_llm.policy import Policy
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.weighting import token_mean


class PairBatch(NamedTuple):
  """What a loss reads of R pairs: 2 R answers, chosen and rejected in turn.

  Attributes:
    sequences: each answer in its own row; if answers are packed, only the mask is kept.
    packed: several answers per row, each microbatch packed separately; None: not packed.
    weights: [R] float32, how much each pair counts: 1 / pairs, or 0 if there is no pair. Of single
      answers [2 R], in the same way.
  """

  sequences: SequenceBatch
  packed: PackedShares | None
  weights: np.ndarray


def make_pair_batch(
  pairs: Sequence[Pair], *, pad_id: int, rows: int, packing: int = 0, shares: int = 1
) -> tuple[PairBatch, float]:
  """The batch of one update on pairs, and the share of padding in its rows.

  >>> from rl_llm.data.encoding import Encoded
  >>> answer = Encoded([4, 5], [False, True], 1)
  >>> batch, padding = make_pair_batch([Pair(answer, answer)], pad_id=0, rows=2)
  >>> batch.weights.tolist(), batch.sequences.mask.any(axis=1).tolist(), padding
  ([1.0, 0.0], [True, True, False, False], 0.75)

  Args:
    pairs: at most `rows`.
    pad_id: as for `sequence_batch`.
    rows: R.
    packing: tokens of a row that several answers share; 0: each answer has its own row.
    shares: microbatches, each packed separately.
  """
  how = {"pad_id": pad_id, "packing": packing, "shares": shares}
  batch, padding = make_answer_batch(flat(pairs), rows=2 * rows, **how)
  return batch._replace(weights=_equal(len(pairs), rows)), padding


def make_answer_batch(
  answers: Sequence[Encoded], *, pad_id: int, rows: int, packing: int = 0, shares: int = 1
) -> tuple[PairBatch, float]:
  """`make_pair_batch` of single answers, for losses that compare nothing: a weight for each.

  >>> from rl_llm.data.encoding import Encoded
  >>> batch, _ = make_answer_batch([Encoded([4, 5], [False, True], 1)], pad_id=0, rows=2)
  >>> batch.weights.tolist()
  [1.0, 0.0]

  Args:
    answers: at most `rows`.
    pad_id, packing, shares: as for `make_pair_batch`.
    rows: answers of a full batch.
  """
  sequences = sequence_batch(answers, pad_id=pad_id, rows=rows)
  weights = _equal(len(answers), rows)
  if not packing:
    return PairBatch(sequences, None, weights), padding_fraction(sequences.segment_ids)
  packed = packed_shares(
    answers, shares=shares, per_share=rows // shares, length=packing, pad_id=pad_id
  )
  only_mask = SequenceBatch(None, sequences.mask, None, None)
  return PairBatch(only_mask, packed, weights), padding_fraction(packed.packed.segment_ids)


def _equal(count: int, size: int) -> np.ndarray:
  """[size] float32: 1 / count, and 0 after the first `count`."""
  return np.where(np.arange(size) < count, 1 / max(count, 1), 0).astype(np.float32)


def chosen_token_weights(batch: PairBatch) -> np.ndarray:
  """[2 R, T] weights for the mean over the tokens of all chosen answers; 0 in the rejected ones."""
  mask = batch.sequences.mask
  return np.asarray(token_mean(mask & (np.arange(len(mask))[:, None] % 2 == 0)))


def pair_logprobs(
  params: Any, batch: PairBatch, *, policy: Policy, temperature: chex.Array | float = 1.0
) -> chex.Array:
  """`teacher_forced_logprobs` of both answers of pairs, packed or not: a row for each answer.

  Args:
    params, policy, temperature: as for `teacher_forced_logprobs`.
    batch: R pairs, or one microbatch of them.

  Returns:
    [2 R, T] float32, nats, 0 outside the mask; row 2 i is chosen, row 2 i + 1 rejected.
  """
  score = functools.partial(teacher_forced_logprobs, params, policy=policy, temperature=temperature)
  if batch.packed is None:
    return score(*batch.sequences)[0]
  packed, rows, starts, lengths = batch.packed
  logprobs, _ = score(*packed)
  rows = rows % len(logprobs)  # Row numbers count over all microbatches.
  return unpack(logprobs, rows, starts, lengths, width=batch.sequences.mask.shape[1])


def policy_weighted(
  batch: PairBatch, logprobs: Sequence[np.ndarray], at_half: Sequence[np.ndarray]
) -> PairBatch:
  """The pairs with WPO's weights, from the policy's log-probs of all answers.

  At half the temperature a token's log-prob less that at the temperature is its log-prob less
  log sum_v p(v)^2, how certain the policy is in its place.

  Args:
    batch: R pairs.
    logprobs: of the tokens of each answer under the policy, in nats.
    at_half: the same at half the temperature.
  """
  mask = batch.sequences.mask
  aligned = [half - own for half, own in zip(at_half, logprobs, strict=True)]
  padded = pad_values(aligned, width=mask.shape[1])
  padded = np.pad(padded, ((0, len(mask) - len(padded)), (0, 0)))
  means = sequence_logprobs(padded, mask, average=True)
  weights = wpo_weights(means[0::2], means[1::2], batch.weights)
  return batch._replace(weights=np.asarray(weights))


def shorter_lengths(mask: Any) -> Any:
  """[2 R]: how long the shorter answer of each row's pair is; rows 2i and 2i + 1 are a pair."""
  return mask.sum(axis=1).reshape(-1, 2).min(axis=1).repeat(2)


def best_and_worst(rewards: np.ndarray, ok: np.ndarray) -> list[tuple[int, int, int]]:
  """(problem, best response, worst response) of each problem whose grades [P, G] differ.

  Ties take the first response: all are drawn the same way, so it is as good as any.

  >>> best_and_worst(np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), np.array([[1, 1, 1], [1, 1, 0]]))
  [(0, 1, 0)]
  """
  best = np.argmax(np.where(ok, rewards, -np.inf), axis=1)
  worst = np.argmin(np.where(ok, rewards, np.inf), axis=1)
  return [
    (p, int(b), int(w))
    for p, (b, w) in enumerate(zip(best, worst, strict=True))
    if ok[p, b] and ok[p, w] and rewards[p, b] > rewards[p, w]
  ]


def check_margins(dataset: Dataset, column: str, *, path: str) -> None:
  """Refuses a column of margins that holds anything but numbers; "" means no column.

  Raises:
    DataError: the message names the line of the file `path`.
  """
  for example, line in zip(dataset.examples, dataset.lines, strict=True) if column else ():
    value = example.columns.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise DataError(
        f"{path}:{line}: margin_column={column!r} is "
        f"{repr(value) if column in example.columns else 'missing'}; must be a number in every row"
      )


def margins(columns: Sequence[dict[str, Any]], column: str) -> np.ndarray:
  """[N] float32: each pair's margin; 0 if no column is named."""
  return np.array([row[column] if column else 0.0 for row in columns], np.float32)
