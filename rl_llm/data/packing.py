"""Several short sequences in one row, so that less of a batch is padding.

Where lengths differ, a batch of rows as long as its longest sequence is mostly padding. A packed
row holds as many sequences as fit; `segment_ids` keep them from seeing one another and `positions`
restart with each, so every log-prob is what it would be in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from rl_llm.data.encoding import Encoded


class Packed(NamedTuple):
  """N sequences in R rows of T tokens.

  Attributes:
    tokens: [R, T] int32.
    mask: [R, T] bool, True = trained on.
    positions: [R, T] int32, from 0 in each sequence; 0 in padding.
    segment_ids: [R, T] int32, 1, 2, ... within a row; -1 is padding.
    rows: [N] int32, the row a sequence is in.
    starts: [N] int32, the column it begins at.
    lengths: [N] int32, its tokens.
  """

  tokens: np.ndarray
  mask: np.ndarray
  positions: np.ndarray
  segment_ids: np.ndarray
  rows: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray


def pack(sequences: Sequence[Encoded], *, length: int, pad_id: int) -> Packed:
  """Packs sequences, in their order, each into the first row with room for it.

  Of lengths 3, 4 and 2 in rows of 5, the third shares a row with the first:

  >>> a, b, c = (Encoded([n] * n, [False] + [True] * (n - 1), 1) for n in (3, 4, 2))
  >>> packed = pack([a, b, c], length=5, pad_id=0)
  >>> packed.tokens.tolist()
  [[3, 3, 3, 2, 2], [4, 4, 4, 4, 0]]
  >>> packed.segment_ids.tolist()
  [[1, 1, 1, 2, 2], [1, 1, 1, 1, -1]]
  >>> packed.positions.tolist()
  [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]

  Args:
    sequences: from `encode`, none longer than `length` (see `limit_sequences`).
    length: T, tokens in a row.
    pad_id: what fills the rest; never seen.

  Returns:
    A `Packed`.

  Raises:
    ValueError: there are none, one is empty or does not fit into a row, or its first token is
      marked as trained on, which nothing predicts.
  """
  check_sequences(sequences)
  sizes = np.array([len(sequence.tokens) for sequence in sequences], np.int32)
  for index, size in enumerate(sizes):
    if size > length:
      raise ValueError(
        f"sequences: number {index} has {size} tokens, a row {length}; raise "
        "length, or apply limit_sequences before"
      )
  rows, starts, count = _first_fit(sizes, length)
  tokens = np.full((count, length), pad_id, np.int32)
  mask = np.zeros((count, length), bool)
  positions = np.zeros((count, length), np.int32)
  segment_ids = np.full((count, length), -1, np.int32)
  used = np.zeros(count, np.int32)  # Segments in each row so far.
  for row, start, sequence in zip(rows, starts, sequences, strict=True):
    place = slice(start, start + len(sequence.tokens))
    used[row] += 1
    tokens[row, place] = sequence.tokens
    mask[row, place] = sequence.mask
    positions[row, place] = np.arange(len(sequence.tokens))
    segment_ids[row, place] = used[row]
  return Packed(tokens, mask, positions, segment_ids, rows, starts, sizes)


def unpack(
  values: chex.Array, rows: chex.Array, starts: chex.Array, lengths: chex.Array, *, width: int
) -> chex.Array:
  """Gathers what was computed on packed rows back to one row per sequence, as losses take it.

  >>> a, b = Encoded([3, 3, 3], [False, True, True], 1), Encoded([2, 2], [False, True], 1)
  >>> packed = pack([a, b], length=5, pad_id=0)
  >>> unpack(packed.tokens, packed.rows, packed.starts, packed.lengths, width=3).tolist()
  [[3, 3, 3], [2, 2, 0]]

  Args:
    values: [R, T] per token: log-probs, masks, ...
    rows: [B] int32, from `Packed`.
    starts: [B] int32.
    lengths: [B] int32.
    width: columns of the result; a longer sequence loses its end.

  Returns:
    [B, width], 0 after the end of a sequence.
  """
  columns = jnp.arange(width)
  gathered = jnp.asarray(values).at[rows[:, None], starts[:, None] + columns].get(mode="clip")
  return jnp.where(columns < lengths[:, None], gathered, jnp.zeros_like(gathered))


def check_sequences(sequences: Sequence[Encoded]) -> None:
  """Raises ValueError unless there are sequences, each with tokens and a first that is not trained.

  Args:
    sequences: a message gives the place of the one that is wrong.
  """
  if not sequences:
    raise ValueError("sequences: none given; pass at least one")
  for index, sequence in enumerate(sequences):
    if not sequence.tokens:
      raise ValueError(f"sequences: number {index} has no tokens; drop it")
    if sequence.mask[0]:
      raise ValueError(
        f"sequences: the first token of number {index} is marked as trained on, but nothing "
        "predicts it; set its mask to False"
      )


def _first_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Row and first column of each sequence, given [N] sizes; and the number of rows."""
  room = np.full(len(sizes), length)  # At most a row for each.
  rows, starts = np.zeros_like(sizes), np.zeros_like(sizes)
  for index, size in enumerate(sizes):
    row = int(np.argmax(room >= size))
    rows[index], starts[index] = row, length - room[row]
    room[row] -= size
  return rows, starts, int(rows.max()) + 1
