"""Padding and limits of prompts: few widths, nothing lost that was not counted."""

from __future__ import annotations

import numpy as np
import pytest

from rl_llm.data.prompts import PromptTooLong, bucket, limit_length, pad_prompts


def test_buckets_are_the_least_of_the_series_that_holds_the_length():
  series = sorted({8 * 2**k for k in range(12)} | {12 * 2**k for k in range(1, 12)})
  for length in [*range(1, 300), 4095, 4096, 4097]:
    assert bucket(length) == min(width for width in series if width >= length)
  assert bucket(0) == 8
  assert bucket(3, minimum=2) == 4
  assert len({bucket(length) for length in range(1, 4097)}) == 18
  assert all(bucket(length) < 2 * length for length in range(8, 4097))


def test_padding_is_on_the_left_and_lengths_are_not_read_off_the_ids():
  prompts = [[9, 0, 0], [0] * 9, [5]]  # 0 is the padding as well
  batch = pad_prompts(prompts, pad_id=0)
  assert batch.tokens.shape == (3, 16) and batch.tokens.dtype == np.int32
  assert batch.lengths.tolist() == [3, 9, 1]
  for row, length, prompt in zip(batch.tokens, batch.lengths, prompts, strict=True):
    assert row[16 - length :].tolist() == prompt and not row[: 16 - length].any()


@pytest.mark.parametrize(
  ("prompts", "said"), [([], "prompts: none given"), ([[1], []], "prompt 1 has no tokens")]
)
def test_nothing_to_predict_from(prompts, said):
  with pytest.raises(ValueError, match=said):
    pad_prompts(prompts, pad_id=0)


def test_limits():
  prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
  assert limit_length(prompts, limit=4, overlong="error") == (prompts, 0)
  assert limit_length(prompts, limit=2, overlong="drop") == ([None, [4, 5], None], 2)
  kept = [[2, 3], [4, 5], [8, 9]]
  assert limit_length(prompts, limit=2, overlong="truncate_left") == (kept, 2)
  with pytest.raises(PromptTooLong, match=r"prompt 2 has 4 tokens, over --max_prompt_tokens=3"):
    limit_length(prompts, limit=3, overlong="error")
