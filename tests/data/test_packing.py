"""Packing: nothing lost, first fit as a slow loop, and log-probs as in rows of their own."""

import jax
import numpy as np
import pytest

from rl_llm.data.encoding import Encoded
from rl_llm.data.packing import pack, unpack
from rl_llm.logprobs import token_logprobs
from rl_llm.policy.configs import tiny_config
from rl_llm.policy.transformer import make_policy


def sequences(sizes, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Encoded(rng.integers(1, 50, n).tolist(), [False, *(rng.random(n - 1) < 0.5).tolist()], 1)
    for n in sizes
  ]


def first_fit(sizes, length):
  """The rows of first fit, by trying them one after the other."""
  rows = []
  for index, size in enumerate(sizes):
    for row in rows:
      if sum(sizes[i] for i in row) + size <= length:
        row.append(index)
        break
    else:
      rows.append([index])
  return rows


SIZES = np.random.default_rng(1).integers(1, 17, 200).tolist()


def test_rows_hold_what_first_fit_puts_there_and_nothing_is_lost():
  given = sequences(SIZES)
  packed = pack(given, length=16, pad_id=7)
  expected = first_fit(SIZES, 16)
  assert packed.tokens.shape == (len(expected), 16)
  for row, members in enumerate(expected):
    padding = 16 - sum(SIZES[i] for i in members)
    tokens = [token for i in members for token in given[i].tokens]
    mask = [m for i in members for m in given[i].mask]
    positions = [p for i in members for p in range(SIZES[i])]
    segments = [k for k, i in enumerate(members, 1) for _ in range(SIZES[i])]
    assert packed.tokens[row].tolist() == tokens + [7] * padding
    assert packed.mask[row].tolist() == mask + [False] * padding
    assert packed.positions[row].tolist() == positions + [0] * padding
    assert packed.segment_ids[row].tolist() == segments + [-1] * padding
  assert packed.mask.sum() == sum(sum(s.mask) for s in given)
  back = [
    packed.tokens[r, s : s + n].tolist()
    for r, s, n in zip(packed.rows, packed.starts, packed.lengths, strict=True)
  ]
  assert back == [s.tokens for s in given]


def test_logprobs_are_those_of_rows_of_their_own():
  given = sequences([5, 9, 3, 7, 4], seed=2)
  policy = make_policy(tiny_config(vocab_size=50))
  params = jax.jit(policy.init)(jax.random.key(0))

  @jax.jit
  def logprobs(params, tokens, positions, segment_ids):
    hidden, _ = policy.hidden(params, tokens, positions, segment_ids)
    return token_logprobs(policy.logits(params, hidden)[:, :-1], tokens[:, 1:])

  packed = pack(given, length=14, pad_id=0)
  assert len(packed.tokens) == 2  # 5 + 9 and 3 + 7 + 4: no padding at all.
  merged = packed._replace(segment_ids=np.ones_like(packed.segment_ids))
  alone = [pack([sequence], length=14, pad_id=0) for sequence in given]
  # Rows 0 and 1 packed, 2 and 3 the same without segments, 4 to 8 alone, in one call.
  arrays = [np.concatenate(parts) for parts in zip(packed, merged, *alone, strict=True)]
  rows = type(packed)(*arrays)
  values = logprobs(params, rows.tokens, rows.positions, rows.segment_ids)
  size = packed.lengths - 1
  own = unpack(values[4:], np.arange(5), np.zeros(5, int), size, width=8)
  found, seen = (
    unpack(part, packed.rows, packed.starts, size, width=8) for part in (values[:2], values[2:4])
  )
  np.testing.assert_allclose(found, own, rtol=0, atol=1e-5)
  assert np.abs(seen - own)[1].max() > 1e-4  # A test of the test: the second sees the first.


def test_unpack_writes_nothing_behind_a_sequence_even_if_nan_stands_there():
  values = np.array([[1.0, 2.0, np.nan]])
  found = unpack(values, np.array([0, 0]), np.array([0, 1]), np.array([2, 1]), width=4)
  assert found.tolist() == [[1, 2, 0, 0], [2, 0, 0, 0]]


@pytest.mark.parametrize(
  "given, said",
  [
    ([], "none given"),
    ([Encoded([1], [False], 1), Encoded([], [], 0)], "number 1 has no tokens"),
    ([Encoded([1] * 5, [False] * 5, 1)], "number 0 has 5 tokens, a row 4"),
    ([Encoded([1, 2], [True, True], 0)], "the first token of number 0 is marked"),
  ],
)
def test_what_cannot_be_packed(given, said):
  with pytest.raises(ValueError, match=said):
    pack(given, length=4, pad_id=0)
