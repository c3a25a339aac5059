"""Single answers with labels: which ones a step takes, KTO's mismatched rows, the figure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rl_llm.data.encoding import Encoded, Pair
from rl_llm.data.formats import Dataset, Preference, Unpaired, labelled
from rl_llm.training.pairs import make_answer_batch, make_pair_batch
from rl_llm.training.unpaired import drawn_answers, label_auc, mismatched


def answer(prompt, *tokens):
  """An answer [2, *tokens] whose second token is not trained on."""
  mask = [False] * len(prompt) + [True, False] + [True] * (len(tokens) - 1)
  return Encoded([*prompt, 2, *tokens], mask[: len(prompt) + 1 + len(tokens)], len(prompt))


def test_every_prompt_gets_the_next_answer_to_another_one():
  prompts = [[1], [1], [3, 4], [5], [1]]
  rows = [answer(prompt, 10 + i, 20 + i) for i, prompt in enumerate(prompts)]
  found = mismatched(rows, limit=99)
  taken = [row.tokens[-2] - 10 for row in found]
  assert taken == [2, 2, 3, 4, 2]  # The last one looks past the first two, which are its own.
  for row, prompt, other in zip(found, prompts, taken, strict=True):
    assert row.tokens == [*prompt, 2, 10 + other, 20 + other]
    assert row.mask == [False] * len(prompt) + [True, False, True]
    assert row.prompt_length == len(prompt)


def test_a_mismatched_row_that_is_too_long_keeps_its_answer():
  rows = [answer([1, 3, 4, 5], 7), answer([6], *range(20, 23))]
  assert [row.tokens for row in mismatched(rows, limit=6)] == [[4, 5, 2, 20, 21, 22], [6, 2, 7]]


def test_answers_to_one_prompt_have_no_mismatched_ones():
  with pytest.raises(ValueError, match="one prompt"):
    mismatched([answer([1], 3), answer([1], 4)], limit=9)


@pytest.mark.parametrize("halves", [False, True])
def test_a_lap_takes_each_answer_once(halves):
  desirable = np.arange(12) % 2 == 0
  steps = [drawn_answers(desirable, count=4, seed=3, step=step, halves=halves) for step in range(6)]
  assert sorted(np.concatenate(steps[:3])) == sorted(np.concatenate(steps[3:])) == list(range(12))
  assert not np.array_equal(steps[0], steps[3])


def test_of_a_rare_kind_as_many_are_drawn():
  desirable = np.arange(40) < 3
  for step in range(5):
    kinds = desirable[drawn_answers(desirable, count=8, seed=0, step=step, halves=True)]
    assert kinds.tolist() == [True, False] * 4


def test_the_auc_is_the_share_of_pairs_in_the_right_order():
  rng = np.random.default_rng(0)
  rewards, wanted = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
  pairs = itertools.product(rewards[wanted], rewards[~wanted])
  scores = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
  assert label_auc(rewards, wanted) == pytest.approx(np.mean(scores))
  assert label_auc(np.zeros(40), wanted) == 0.5
  assert label_auc(rewards, np.ones(40, bool)) is None


def test_pairs_become_answers_with_labels_and_keep_their_lines():
  pairs = (Preference("a", "b", "c", {"n": 1}), Preference("d", "e", "f", {}))
  found = labelled(Dataset("preference", pairs, (4, 7), ("dropped",)))
  assert found.format == "unpaired" and found.lines == (4, 4, 7, 7) and found.errors == ("dropped",)
  assert [(row.prompt, row.completion, row.label) for row in found.examples] == [
    ("a", "b", True), ("a", "c", False), ("d", "e", True), ("d", "f", False)
  ]  # fmt: skip
  assert found.examples[1].columns == {"n": 1, "label": False}
  rows = (Unpaired("a", "b", False, {"n": 2}),)
  assert labelled(Dataset("unpaired", rows, (1,), ())).examples[0].columns["label"] is False


@pytest.mark.parametrize("packing", [0, 16])
def test_single_answers_lie_in_a_batch_as_those_of_pairs_do(packing):
  rows = [answer([1] * (i % 3 + 1), *range(10, 12 + i % 4)) for i in range(6)]
  pairs = [Pair(*rows[i : i + 2]) for i in (0, 2, 4)]
  how = {"pad_id": 0, "packing": packing, "shares": 2}
  of_pairs, padding = make_pair_batch(pairs, rows=4, **how)
  single, own_padding = make_answer_batch(rows, rows=8, **how)
  assert padding == own_padding
  assert np.array_equal(single.sequences.mask, of_pairs.sequences.mask)
  assert single.weights.tolist() == pytest.approx([1 / 6] * 6 + [0] * 2)
  if packing:
    assert np.array_equal(single.packed.packed.tokens, of_pairs.packed.packed.tokens)
