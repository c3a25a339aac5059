"""Order by (seed, step), and sequences as arrays: padded, packed and paired."""

import numpy as np
import pytest

from rl_llm.data.batches import (
  batch_indices,
  packed_batch,
  packed_shares,
  packed_with_values,
  pad_values,
  pair_batch,
  sequence_batch,
)
from rl_llm.data.encoding import Encoded, Pair
from rl_llm.data.packing import pack


def sequences(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Encoded(rng.integers(1, 50, n).tolist(), [False, *(rng.random(n - 1) < 0.5).tolist()], 1)
    for n in sizes
  ]


def stream(count, seed, length):
  """The order as one long list: epoch after epoch, each shuffled by (seed, epoch)."""
  found = []
  epoch = 0
  while len(found) < length:
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    found.extend(rng.permutation(count).tolist())
    epoch += 1
  return found[:length]


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 7), (3, 8), (1, 2), (5, 1)])
def test_batches_are_consecutive_pieces_of_the_epochs(count, batch_size):
  steps = 11
  batches = [
    batch_indices(count, batch_size=batch_size, seed=3, step=step).tolist() for step in range(steps)
  ]
  assert sum(batches, []) == stream(count, 3, steps * batch_size)


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
  drawn = np.concatenate([batch_indices(50, batch_size=15, seed=0, step=s) for s in range(10)])
  epochs = drawn.reshape(3, 50)  # 10 x 15 = 3 x 50: batches 3 and 6 lie across a border.
  assert (np.sort(epochs) == np.arange(50)).all()
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
  assert (batch_indices(50, batch_size=15, seed=1, step=0) != drawn[:15]).any()


@pytest.mark.parametrize(
  "changed, said",
  [
    ({"count": 0}, "count=0: must be 1 or more"),
    ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
    ({"seed": -1}, "seed=-1: must be 0 or more"),
    ({"step": -1}, "step=-1: must be 0 or more"),
  ],
)
def test_what_has_no_order(changed, said):
  given = {"count": 4, "batch_size": 2, "seed": 0, "step": 0} | changed
  with pytest.raises(ValueError, match=said):
    batch_indices(given.pop("count"), **given)


def test_a_padded_row_holds_one_sequence_and_then_nothing():
  given = sequences([5, 11, 1])
  batch = sequence_batch(given, pad_id=7, rows=4)
  assert batch.tokens.shape == (4, 16)  # The bucket of 11.
  for row, sequence in enumerate(given):
    size = len(sequence.tokens)
    rest = 16 - size
    assert batch.tokens[row].tolist() == sequence.tokens + [7] * rest
    assert batch.mask[row].tolist() == sequence.mask + [False] * rest
    assert batch.positions[row].tolist() == list(range(size)) + [0] * rest
    assert batch.segment_ids[row].tolist() == [1] * size + [-1] * rest
  assert not batch.mask[3].any() and (batch.segment_ids[3] == -1).all()
  assert [x.dtype for x in batch] == [np.int32, bool, np.int32, np.int32]


def test_a_pad_id_that_a_sequence_holds_is_harmless():
  [sequence] = sequences([6])
  batch = sequence_batch([sequence], pad_id=sequence.tokens[-1])
  assert batch.mask[0, :6].tolist() == sequence.mask and batch.segment_ids[0, 5] == 1


def test_packed_rows_are_those_of_pack_and_empty_ones():
  given = sequences([5, 9, 3, 7, 4])
  packed = pack(given, length=14, pad_id=0)
  batch = packed_batch(given, length=14, pad_id=0, rows=5)
  for found, expected in zip(batch, packed, strict=False):
    assert found.shape == (5, 14)
    np.testing.assert_array_equal(found[:2], expected)
  assert not batch.mask[2:].any() and (batch.segment_ids[2:] == -1).all()


def test_values_move_with_their_tokens():
  given = sequences([5, 3, 7, 2, 4])
  rng = np.random.default_rng(1)
  values = rng.uniform(1, 2, size=(8, 16)).astype(np.float32)  # Rows and columns beyond them too.
  batch, moved = packed_with_values(given, values, length=9, pad_id=6, rows=5)
  for a, b in zip(batch, packed_batch(given, length=9, pad_id=6, rows=5), strict=True):
    np.testing.assert_array_equal(a, b)
  assert moved.shape == batch.tokens.shape and moved.dtype == np.float32
  filled = batch.segment_ids > 0
  assert (moved[~filled] == 0).all() and (batch.segment_ids == 2).any()
  seen = []
  for row, column in zip(*np.nonzero(filled), strict=True):
    position = batch.positions[row, column]
    first = column - position
    [index] = [  # The one that stands there, with all of its tokens.
      n
      for n, one in enumerate(given)
      if batch.tokens[row, first : first + len(one.tokens)].tolist() == one.tokens
    ]
    assert moved[row, column] == values[index, position]
    seen.append((index, position))
  assert sorted(seen) == [(n, t) for n, one in enumerate(given) for t in range(len(one.tokens))]


def test_pairs_alternate():
  chosen, rejected = sequences([5, 9]), sequences([3, 12], seed=1)
  pairs = [Pair(*pair) for pair in zip(chosen, rejected, strict=True)]
  batch = pair_batch(pairs, pad_id=0)
  for row, sequence in enumerate([chosen[0], rejected[0], chosen[1], rejected[1]]):
    assert batch.tokens[row, : len(sequence.tokens)].tolist() == sequence.tokens
    assert (batch.segment_ids[row] == 1).sum() == len(sequence.tokens)
  assert batch.tokens.shape == (4, 16)


@pytest.mark.parametrize(
  "given, rows, said",
  [
    ([], None, "none given"),
    ([Encoded([], [], 0)], None, "number 0 has no tokens"),
    ([Encoded([1, 2], [True, True], 0)], None, "the first token of number 0 is marked"),
    (sequences([3, 4]), 1, "rows=1: the batch has 2; raise it, or pass fewer sequences"),
  ],
)
def test_what_is_no_batch(given, rows, said):
  with pytest.raises(ValueError, match=said):
    sequence_batch(given, pad_id=0, rows=rows)
  with pytest.raises(ValueError, match=said):
    packed_batch(given, length=6, pad_id=0, rows=rows or 9)


def test_values_of_ragged_sequences_as_rows():
  values = [np.array([0, -1, -2], np.float32), np.array([-3], np.float32)]
  found = pad_values(values, width=4)
  assert found.tolist() == [[0, -1, -2, 0], [-3, 0, 0, 0]] and found.dtype == np.float32
  with pytest.raises(ValueError, match="width=2: number 0 has 3 values"):
    pad_values(values, width=2)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_each_share_is_packed_on_its_own(count):
  """12 places in 3 shares, the last may be empty: every token is where it is said to be."""
  rng = np.random.default_rng(count)
  sequences = []
  for size in rng.integers(2, 9, size=count).tolist():
    tokens = rng.integers(1, 100, size=size).tolist()
    sequences.append(Encoded(tokens, [False] + [True] * (size - 1), 1))
  found = packed_shares(sequences, shares=3, per_share=4, length=10, pad_id=0)
  height = len(found.packed.tokens) // 3
  assert len(found.packed.tokens) == 3 * height and height in (1, 2, 4)
  seen = np.zeros(found.packed.tokens.shape, bool)
  for index, (row, start, length) in enumerate(
    zip(found.rows, found.starts, found.lengths, strict=True)
  ):
    if index >= count:
      assert length == 0
      continue
    own, place = sequences[index], slice(start, start + length)
    assert row // height == index // 4
    assert found.packed.tokens[row, place].tolist() == own.tokens
    assert found.packed.mask[row, place].tolist() == own.mask
    assert found.packed.positions[row, place].tolist() == list(range(length))
    assert len(set(found.packed.segment_ids[row, place].tolist())) == 1
    assert not seen[row, place].any()
    seen[row, place] = True
  assert not found.packed.mask[~seen].any() and (found.packed.segment_ids[~seen] == -1).all()
  needed = [
    len(pack(part, length=10, pad_id=0).tokens)
    for part in (sequences[:4], sequences[4:8], sequences[8:])
    if part
  ]
  assert height >= max(needed) and (height == 1 or height < 2 * max(needed))


def test_more_sequences_than_places():
  three = [Encoded([1, 2], [False, True], 1)] * 3
  with pytest.raises(ValueError, match=r"sequences: 3 are more than shares \* per_share = 2"):
    packed_shares(three, shares=2, per_share=1, length=4, pad_id=0)
