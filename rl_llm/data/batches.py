"""Which examples a step takes, and their tokens as arrays of few shapes.

The order is a function of (seed, step), so a resumed run needs no saved position. The arrays have
the same form whether sequences are padded or packed, so one loss serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rl_llm.data.encoding import Encoded, Pair
from rl_llm.data.packing import check_sequences, pack
from rl_llm.data.prompts import bucket


class SequenceBatch(NamedTuple):
  """Whole sequences, prompt included, in R rows of T columns, as `teacher_forced_logprobs` reads.

  Attributes:
    tokens: [R, T] int32, right-padded.
    mask: [R, T] bool, True = trained on; never a sequence's first token.
    positions: [R, T] int32, from 0 in each sequence; 0 in padding.
    segment_ids: [R, T] int32, 1, 2, ... within a row (always 1 if it is not packed); -1 is padding.
  """

  tokens: np.ndarray
  mask: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray


class PackedShares(NamedTuple):
  """N sequences in consecutive shares, each packed separately; from `packed_shares`.

  Attributes:
    packed: R rows a share, one share after another.
    rows: [N] int32, the row of `packed` a sequence is in.
    starts: [N] int32, the column it begins at.
    lengths: [N] int32, its tokens; 0 where there is none.
  """

  packed: SequenceBatch
  rows: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray


def batch_indices(count: int, *, batch_size: int, seed: int, step: int) -> np.ndarray:
  """Which examples step `step` trains on: its slice of an endless sequence of shuffled epochs.

      row = permutation(seed, epoch 0), permutation(seed, epoch 1), ...
      indices = row[step * batch_size : (step + 1) * batch_size]

  Nothing is dropped at the end of an epoch: the batch there takes the rest of one epoch and the
  start of the next. So within an epoch every example comes exactly once, whatever the batch size;
  only a batch across two epochs can hold an example twice. Of 5 examples in batches of 2, the fifth
  is joined by the first of the next epoch:

  >>> batches = [batch_indices(5, batch_size=2, seed=0, step=step).tolist() for step in range(5)]
  >>> sorted(sum(batches, [])[:5]), sorted(sum(batches, [])[5:])
  ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])

  Args:
    count: examples in the data set, >= 1.
    batch_size: examples a step, >= 1.
    seed: of the run, >= 0.
    step: of the run, >= 0.

  Returns:
    [batch_size] int64, each in [0, count).

  Raises:
    ValueError: an argument is too small.
  """
  for name, value, least in (
    ("count", count, 1),
    ("batch_size", batch_size, 1),
    ("seed", seed, 0),
    ("step", step, 0),
  ):
    if value < least:
      raise ValueError(f"{name}={value}: must be {least} or more")
  first = step * batch_size
  epochs = range(first // count, (first + batch_size - 1) // count + 1)
  row = np.concatenate(
    [
      np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(count)
      for epoch in epochs
    ]
  )
  return row[first - epochs[0] * count :][:batch_size]


def sequence_batch(
  sequences: Sequence[Encoded], *, pad_id: int, rows: int | None = None
) -> SequenceBatch:
  """One sequence a row, right-padded to the bucket of the longest.

  >>> a, b = Encoded([5, 6, 7], [False, True, True], 1), Encoded([8, 9], [False, True], 1)
  >>> batch = sequence_batch([a, b], pad_id=0)
  >>> batch.tokens[:, :4].tolist(), batch.tokens.shape
  ([[5, 6, 7, 0], [8, 9, 0, 0]], (2, 8))
  >>> batch.segment_ids[:, :4].tolist()
  [[1, 1, 1, -1], [1, 1, -1, -1]]

  Args:
    sequences: from `encode`.
    pad_id: what fills the rest; never seen, so it may equal any token.
    rows: R; rows beyond the sequences hold padding alone. None makes as many as there are.

  Raises:
    ValueError: there are no sequences, more than `rows`, an empty one, or one whose first token is
      marked as trained on, which nothing predicts.
  """
  check_sequences(sequences)
  width = bucket(max(len(sequence.tokens) for sequence in sequences))
  batch = _padding(len(sequences), width, pad_id)
  for row, sequence in enumerate(sequences):
    size = len(sequence.tokens)
    batch.tokens[row, :size] = sequence.tokens
    batch.mask[row, :size] = sequence.mask
    batch.positions[row, :size] = np.arange(size)
    batch.segment_ids[row, :size] = 1
  return _fill(batch, pad_id, rows)


def pair_batch(pairs: Sequence[Pair], *, pad_id: int, rows: int | None = None) -> SequenceBatch:
  """`sequence_batch` of pairs: row 2i is chosen, row 2i + 1 rejected.

  Side by side rather than all chosen ones first, so that microbatches of an even number of rows
  hold whole pairs:

  >>> answers = [Encoded([4, token], [False, True], 1) for token in (5, 6, 7, 8)]
  >>> batch = pair_batch([Pair(*answers[:2]), Pair(*answers[2:])], pad_id=0)
  >>> batch.tokens[0::2, 1].tolist(), batch.tokens[1::2, 1].tolist()
  ([5, 7], [6, 8])
  """
  return sequence_batch([sequence for pair in pairs for sequence in pair], pad_id=pad_id, rows=rows)


def packed_batch(
  sequences: Sequence[Encoded], *, length: int, pad_id: int, rows: int
) -> SequenceBatch:
  """As many sequences a row as fit, as `pack` does, in an array of one shape for all steps.

  The number of rows that B sequences need differs from step to step, but never exceeds B. So set
  `rows` = B; the filled ones come first, and `make_update`'s argument `used` leaves out the
  microbatches of empty ones without compiling again.

  >>> three = [Encoded([n] * n, [False] + [True] * (n - 1), 1) for n in (3, 4, 2)]
  >>> batch = packed_batch(three, length=5, pad_id=0, rows=3)
  >>> batch.tokens.tolist()
  [[3, 3, 3, 2, 2], [4, 4, 4, 4, 0], [0, 0, 0, 0, 0]]
  >>> int(batch.mask.any(axis=1).sum())
  2

  A row is no longer a sequence: `token_mean` weighs tokens the same in both forms, but weights that
  count by sequence need the rows unpacked first, with `rl_llm.data.packing.unpack`.

  Args:
    sequences: from `encode`, none longer than `length` (see `limit_sequences`).
    length: T, tokens in a row.
    pad_id: as for `sequence_batch`.
    rows: R.

  Raises:
    ValueError: as for `sequence_batch`, or a sequence is longer than a row.
  """
  return _fill(SequenceBatch(*pack(sequences, length=length, pad_id=pad_id)[:4]), pad_id, rows)


def packed_with_values(
  sequences: Sequence[Encoded], values: np.ndarray, *, length: int, pad_id: int, rows: int
) -> tuple[SequenceBatch, np.ndarray]:
  """`packed_batch`, and one number per token, such as a weight, moved along with its token.

  >>> two = [Encoded([n] * n, [False] + [True] * (n - 1), 1) for n in (3, 2)]
  >>> values = np.array([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
  >>> packed_with_values(two, values, length=5, pad_id=0, rows=1)[1].tolist()
  [[0.0, 0.5, 0.5, 0.0, 1.0]]

  Args:
    sequences, length, pad_id, rows: as for `packed_batch`.
    values: [N or more, T'], in the layout of `sequence_batch`.

  Returns:
    The batch and float32 values [rows, length], 0 in padding.
  """
  packed = pack(sequences, length=length, pad_id=pad_id)
  batch = _fill(SequenceBatch(*packed[:4]), pad_id, rows)
  moved = np.zeros(batch.mask.shape, np.float32)
  places = zip(packed.rows, packed.starts, packed.lengths, strict=True)
  for own, (row, start, size) in zip(values, places, strict=False):
    moved[row, start : start + size] = own[:size]
  return batch, moved


def packed_shares(
  sequences: Sequence[Encoded], *, shares: int, per_share: int, length: int, pad_id: int
) -> PackedShares:
  """Packs what each microbatch needs on its own, for losses that look at whole sequences.

  A loss on pairs needs both answers in one microbatch. So each microbatch's sequences are packed
  among themselves, and `rl_llm.data.packing.unpack` takes its answers' values out of the rows
  again. All shares have as many rows as the fullest needs, rounded up to a power of two, so that an
  update compiles for few shapes.

  Of lengths 3, 2, 2 and 2 in rows of 5, two shares of two: one row each.

  >>> a, b, c, d = (Encoded([n] * n, [False] + [True] * (n - 1), 1) for n in (3, 2, 2, 2))
  >>> found = packed_shares([a, b, c, d], shares=2, per_share=2, length=5, pad_id=0)
  >>> found.packed.tokens.tolist(), found.rows.tolist(), found.starts.tolist()
  ([[3, 3, 3, 2, 2], [2, 2, 2, 2, 0]], [0, 0, 1, 1], [0, 3, 0, 2])

  Args:
    sequences: from `encode`, at most shares * per_share; the last shares may stay empty.
    shares: microbatches.
    per_share: sequences of each.
    length: T, tokens in a row.
    pad_id: as for `sequence_batch`.

  Returns:
    A `PackedShares` of N = shares * per_share.

  Raises:
    ValueError: as for `pack`, or there are too many sequences.
  """
  count = shares * per_share
  if len(sequences) > count:
    raise ValueError(f"sequences: {len(sequences)} are more than shares * per_share = {count}")
  own = [sequences[first : first + per_share] for first in range(0, count, per_share)]
  packs = [pack(part, length=length, pad_id=pad_id) if part else None for part in own]
  most = max(len(packed.tokens) for packed in packs if packed)
  height = min(1 << (most - 1).bit_length(), per_share)
  places = np.zeros((3, count), np.int32)
  batches = []
  for share, packed in enumerate(packs):
    if packed is None:
      batches.append(_padding(height, length, pad_id))
      continue
    batches.append(_fill(SequenceBatch(*packed[:4]), pad_id, height))
    found = packed.rows + share * height, packed.starts, packed.lengths
    first = share * per_share
    places[:, first : first + len(packed.rows)] = found
  joined = SequenceBatch(*(np.concatenate(parts) for parts in zip(*batches, strict=True)))
  return PackedShares(joined, *places)


def padding_fraction(segment_ids: np.ndarray) -> float:
  """How much of the rows that hold anything is padding.

  >>> padding_fraction(np.array([[1, 1, 1, -1], [1, 2, -1, -1], [-1, -1, -1, -1]]))
  0.375

  Args:
    segment_ids: [R, T] int32, as in a `SequenceBatch`.
  """
  used = segment_ids[np.any(segment_ids > 0, axis=1)]
  return 1 - float(np.mean(used > 0))


def pad_values(values: Sequence[np.ndarray], *, width: int) -> np.ndarray:
  """One number per token, such as a reference's log-probs, in the layout of `sequence_batch`.

  >>> pad_values([np.array([0.0, -1.0]), np.array([0.0])], width=3).tolist()
  [[0.0, -1.0, 0.0], [0.0, 0.0, 0.0]]

  Args:
    values: a vector for each row.
    width: T, columns of the batch they belong to.

  Returns:
    [R, T] float32, 0 after the end.

  Raises:
    ValueError: a vector is longer than `width`.
  """
  rows = np.zeros((len(values), width), np.float32)
  for index, (row, own) in enumerate(zip(rows, values, strict=True)):
    if len(own) > width:
      raise ValueError(f"width={width}: number {index} has {len(own)} values; raise it")
    row[: len(own)] = own
  return rows


def _padding(rows: int, width: int, pad_id: int) -> SequenceBatch:
  shape = (rows, width)
  return SequenceBatch(
    tokens=np.full(shape, pad_id, np.int32),
    mask=np.zeros(shape, bool),
    positions=np.zeros(shape, np.int32),
    segment_ids=np.full(shape, -1, np.int32),
  )


def _fill(batch: SequenceBatch, pad_id: int, rows: int | None) -> SequenceBatch:
  """Adds rows of padding up to `rows`."""
  have, width = batch.tokens.shape
  if rows is None or rows == have:
    return batch
  if rows < have:
    raise ValueError(f"rows={rows}: the batch has {have}; raise it, or pass fewer sequences")
  padding = _padding(rows - have, width, pad_id)
  return SequenceBatch(*(np.concatenate(parts) for parts in zip(batch, padding, strict=True)))
