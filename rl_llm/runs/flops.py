"""How much work a step is, by formula, to compare with measured and planned times.

This counts the matrix products that a step needs, 2 operations per multiply-add, over the real
tokens: no padding, nothing computed twice, no norms, softmax or rotations. So the figures do not
depend on how a step is computed, and a program that wastes nothing and never waits would take
flops / peak seconds (Chowdhery et al., 2022, PaLM, https://arxiv.org/abs/2204.02311, appendix B;
the share of the peak that a program reaches is called model FLOPs utilization, MFU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_llm.data.encoding import Encoded


class Work(NamedTuple):
  """What a step samples and trains on; 0 for what it does not do.

  Attributes:
    generated_tokens: tokens of all sampled responses.
    rollout_flops: one forward pass over prompts and responses.
    trained_tokens: tokens that the losses of the updates sum over; in two epochs each counts twice.
    update_flops: forward and backward passes of the updates.
  """

  generated_tokens: int = 0
  rollout_flops: int = 0
  trained_tokens: int = 0
  update_flops: int = 0


def forward_flops(shape: Any, prompt_lengths: Any, response_lengths: Any) -> int:
  """Operations to read all prompts and responses once and predict the responses' tokens.

      token      = 2 (2 D N H + 2 D K H + 3 D F) in each layer, for every token read
      attention  = 4 N H                         in each layer, for every key that a token sees
      prediction = 2 D V                         for every token of a response

  A prompt is read once for all its responses; the last token of a response is never read. Take one
  layer of width 1 with one head of size 2, an MLP of width 1, a vocabulary of 1, a prompt of one
  token and a response of one token. The prompt's token meets 11 weights and one key, 22 + 8
  operations, and the prediction takes 2:

  >>> from rl_llm.policy import TransformerConfig
  >>> shape = TransformerConfig(vocab_size=1, width=1, n_layers=1, n_heads=1, n_kv_heads=1,
  ...   head_dim=2, mlp_width=1)
  >>> forward_flops(shape, [1], [1])
  32

  Args:
    shape: a `rl_llm.policy.TransformerConfig`: V = vocab_size, D = width, N = n_heads,
      K = n_kv_heads, H = head_dim, F = mlp_width; a sliding layer's token sees its window.
    prompt_lengths: [P] ints, tokens of each prompt.
    response_lengths: [P * G] ints, tokens of each response; row b answers prompt b // G.

  Returns:
    The cost of generation; a training update of all weights costs three times as much.
  """
  predicted = int(np.sum(response_lengths))
  return trunk_flops(shape, prompt_lengths, response_lengths) + prediction_flops(shape, predicted)


def trunk_flops(shape: Any, prompt_lengths: Any, response_lengths: Any = ()) -> int:
  """The layers' part of `forward_flops`: the cost of a network that predicts no tokens.

  Args:
    shape, prompt_lengths, response_lengths: as for `forward_flops`; without responses, the prompts
      are whole texts.
  """
  prompts = np.asarray(prompt_lengths, np.int64).reshape(-1)
  responses = np.asarray(response_lengths, np.int64).reshape(prompts.size, -1)
  read = np.maximum(responses - 1, 0)
  rows = (prompts, 0), (read, prompts[:, None])
  tokens = sum(int(np.sum(count)) for count, _ in rows)
  projections = 2 * shape.width * (shape.n_heads + shape.n_kv_heads) * shape.head_dim
  flops = 2 * shape.n_layers * (projections + 3 * shape.width * shape.mlp_width) * tokens
  for layer in range(shape.n_layers):
    window = shape.sliding_window if shape.is_sliding(layer) else None
    keys = sum(keys_seen(count, before, window) for count, before in rows)
    flops += 4 * shape.n_heads * shape.head_dim * keys
  return flops


def keys_seen(count: Any, before: Any, window: int | None = None) -> int:
  """How many keys `count` tokens after `before` others see: each sees all up to and with itself.

  >>> keys_seen(3, 2), keys_seen(3, 2, window=4)  # 3 + 4 + 5, 3 + 4 + 4
  (12, 11)

  Args:
    count, before: ints, or arrays of them that broadcast.
    window: the most keys that one token sees; None: all.
  """
  growing = count if window is None else np.clip(window - before, 0, count)
  seen = growing * before + growing * (growing + 1) // 2
  return int(np.sum(seen if window is None else seen + (count - growing) * window))


def prediction_flops(shape: Any, tokens: int) -> int:
  """Operations to score the vocabulary for that many tokens."""
  return 2 * shape.width * shape.vocab_size * tokens


def text_flops(shape: Any, lengths: Any, *, predicted: int) -> int:
  """Operations of one forward pass over whole texts, each read to its last token.

  Args:
    shape: as for `forward_flops`.
    lengths: [R] ints, tokens of each text.
    predicted: how many of their tokens are predicted, that is, trained on.
  """
  return trunk_flops(shape, lengths) + prediction_flops(shape, predicted)


def update_passes(*, adapters: bool) -> int:
  """An update's work in forward passes. The backward pass has two products for each forward
  product, one for the gradient of each factor; frozen weights need no gradient.

  With adapters this ignores their own thin products and attention's second product: a few percent.

  >>> update_passes(adapters=False), update_passes(adapters=True)
  (3, 2)
  """
  return 2 if adapters else 3


def response_work(
  shape: Any,
  prompt_lengths: np.ndarray,
  response_lengths: np.ndarray,
  trained_lengths: np.ndarray,
  updates: Sequence[np.ndarray],
  *,
  passes: int,
  towers: int = 0,
) -> Work:
  """The work of a step that samples responses and trains on them.

  Args:
    shape: as for `forward_flops`.
    prompt_lengths: [P] ints.
    response_lengths: [P * G] ints, as sampled.
    trained_lengths: [P * G] ints, 0 where a response is left out.
    updates: for each update, the problems (ints below P) whose responses it learns from. Problems
      that add nothing because all their advantages are 0 are left out, whether they were computed
      or not.
    passes: from `update_passes`.
    towers: how many further networks of the policy's shape each update trains on the same tokens
      that predict no tokens, such as a value network with its own trunk.
  """
  by_prompt = np.reshape(trained_lengths, (len(prompt_lengths), -1))
  tokens, flops = 0, 0
  for chosen in updates:
    read = shape, prompt_lengths[chosen], by_prompt[chosen]
    tokens += int(by_prompt[chosen].sum())
    if len(chosen):
      flops += passes * (forward_flops(*read) + towers * trunk_flops(*read))
  return Work(
    int(np.sum(response_lengths)),
    forward_flops(shape, prompt_lengths, response_lengths),
    tokens,
    flops,
  )


def text_work(shape: Any, texts: Sequence[Encoded], *, passes: int, predicts: bool = True) -> Work:
  """The work of one update on whole texts.

  Args:
    shape: as for `forward_flops`.
    texts: with masks of the tokens that are trained on.
    passes: from `update_passes`.
    predicts: whether those tokens are predicted; a reward model predicts none.
  """
  trained = sum(sum(text.mask) for text in texts)
  lengths = [len(text.tokens) for text in texts]
  flops = text_flops(shape, lengths, predicted=trained if predicts else 0)
  return Work(trained_tokens=trained, update_flops=passes * flops)
