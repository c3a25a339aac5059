"""The formulas of a step's work against a loop that makes every product of every token."""

import dataclasses

import numpy as np
import pytest

from rl_llm.data.encoding import Encoded
from rl_llm.policy import TransformerConfig
from rl_llm.runs.flops import (
  Work,
  forward_flops,
  response_work,
  text_flops,
  text_work,
  trunk_flops,
  update_passes,
)

SHAPE = TransformerConfig(
  vocab_size=11, width=8, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, mlp_width=10
)
SLIDING = dataclasses.replace(SHAPE, sliding_window=3, layer_types=("sliding", "full", "sliding"))


def slow_read(shape, column):
  """One token through all layers, when columns 0 .. column are there: 2 per multiply-add."""
  flops = 0
  for layer in range(3):
    for rows, columns in [(8, 24), (8, 12), (8, 12), (24, 8), (8, 10), (8, 10), (10, 8)]:
      flops += 2 * rows * columns
    for _ in range(4):
      for key in range(column + 1):
        if not shape.is_sliding(layer) or column - key < shape.sliding_window:
          flops += 2 * 6 + 2 * 6  # query . key, weight * value
  return flops


def slow_trunk(shape, prompts, responses):
  total = 0
  for prompt, group in zip(prompts, responses, strict=True):
    total += sum(slow_read(shape, column) for column in range(prompt))
    for length in group:
      for token in range(length - 1):  # The last token is read by nobody.
        total += slow_read(shape, prompt + token)
  return total


def slow_forward(shape, prompts, responses):
  predictions = sum(length for group in responses for length in group)
  return slow_trunk(shape, prompts, responses) + predictions * 2 * 8 * 11


RAGGED = [
  ([1], [[1]]),
  ([5], [[1, 1]]),
  ([4, 4], [[5, 5, 5], [5, 5, 5]]),
  ([2, 7, 1], [[3, 1], [6, 2], [1, 9]]),
  ([3, 2], [[0, 4], [0, 0]]),  # Responses without a reward: nothing of them is there.
]


@pytest.mark.parametrize("shape", [SHAPE, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("prompts, responses", RAGGED)
def test_ragged_responses_are_counted_token_by_token(shape, prompts, responses):
  flat = np.concatenate(responses)
  assert forward_flops(shape, prompts, flat) == slow_forward(shape, prompts, responses)
  assert trunk_flops(shape, prompts, flat) == slow_trunk(shape, prompts, responses)


@pytest.mark.parametrize("shape", [SHAPE, SLIDING], ids=["full", "sliding"])
def test_whole_texts_are_read_to_their_last_token(shape):
  lengths = [4, 1, 9]
  slow = sum(slow_read(shape, column) for length in lengths for column in range(length))
  assert text_flops(shape, lengths, predicted=0) == slow
  assert text_flops(shape, lengths, predicted=5) == slow + 5 * 2 * 8 * 11


def test_a_whole_pod_does_not_overflow():
  large = TransformerConfig(
    vocab_size=2**17,
    width=2**13,
    n_layers=2**7,
    n_heads=2**6,
    n_kv_heads=2**3,
    head_dim=2**7,
    mlp_width=2**15,
  )
  one = forward_flops(large, [2**13], [2**13] * 8)
  assert forward_flops(large, [2**13] * 2**12, [2**13] * 2**15) == 2**12 * one > 2**63


def test_the_work_of_a_step_with_two_updates_of_which_one_leaves_a_group_out():
  prompts, sampled = np.array([2, 7, 1]), np.array([3, 1, 6, 2, 1, 9])
  trained = np.array([3, 1, 6, 0, 1, 9])  # One response has no reward.
  updates = [np.array([2, 0]), np.array([1])]
  work = response_work(SHAPE, prompts, sampled, trained, updates, passes=3)
  assert work == Work(
    generated_tokens=22,
    rollout_flops=slow_forward(SHAPE, prompts, [[3, 1], [6, 2], [1, 9]]),
    trained_tokens=1 + 9 + 3 + 1 + 6 + 0,
    update_flops=3 * slow_forward(SHAPE, [1, 2], [[1, 9], [3, 1]])
    + 3 * slow_forward(SHAPE, [7], [[6, 0]]),
  )
  tower = response_work(SHAPE, prompts, sampled, trained, updates, passes=3, towers=1)
  assert tower.update_flops - work.update_flops == 3 * (
    slow_trunk(SHAPE, [1, 2], [[1, 9], [3, 1]]) + slow_trunk(SHAPE, [7], [[6, 0]])
  )
  nothing = response_work(SHAPE, prompts, sampled, trained, [np.array([], int)], passes=3)
  assert nothing == work._replace(trained_tokens=0, update_flops=0)


def test_the_work_of_whole_texts():
  texts = [
    Encoded([7, 8, 9], [False, True, True], 1),
    Encoded([7, 8, 9, 9], [False, False, False, True], 3),
  ]
  work = text_work(SHAPE, texts, passes=2)
  assert work == Work(trained_tokens=3, update_flops=2 * text_flops(SHAPE, [3, 4], predicted=3))
  silent = text_work(SHAPE, texts, passes=2, predicts=False)  # A reward model.
  assert silent == work._replace(update_flops=2 * text_flops(SHAPE, [3, 4], predicted=0))


def test_frozen_weights_get_no_gradient():
  assert (update_passes(adapters=False), update_passes(adapters=True)) == (3, 2)
