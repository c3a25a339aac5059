"""Weights that turn a sum over tokens into a mean: over tokens, responses, or prompts."""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.checks import Array, any_mesh, check_above, check_members
from rl_llm.weighting._arrays import to_float, token_counts


def token_mean(mask) -> Array:
  """Weights for the mean over all tokens of the batch; long responses count more (DAPO).

      weights[b, t] = mask[b, t] / sum(mask)

  Three tokens in two responses count 1/3 each, so the response of two tokens counts 2/3:

  >>> token_mean(jnp.array([[True, True], [True, False]])).tolist()
  [[0.3333333432674408, 0.3333333432674408], [0.3333333432674408, 0.0]]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.

  Returns:
    [B, T] float32, summing to 1; all 0 if the mask is empty.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Reference: Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476
  """
  check_members(mask)
  return to_float(mask) / to_float(jnp.maximum(jnp.sum(mask), 1))


def sequence_mean(mask, *, count_empty=False) -> Array:
  """Weights for the mean over responses of their token means; each counts the same (GRPO).

      weights[b, t] = mask[b, t] / (n_b * B)        n_b = sum_t mask[b, t]

  The response of two tokens and the response of one both count 1/2:

  >>> sequence_mean(jnp.array([[True, True], [True, False]])).tolist()
  [[0.25, 0.25], [0.5, 0.0]]

  A row without tokens is not a response: by default it is left out of the count, so adding one
  changes nothing. With `count_empty=True` it counts in B (TRL does so, verl, OpenRLHF and Tunix do
  not):

  >>> float(sequence_mean(jnp.array([[True, True], [False, False]])).sum())
  1.0
  >>> float(sequence_mean(jnp.array([[True, True], [False, False]]), count_empty=True).sum())
  0.5

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    count_empty: whether rows without tokens count in B.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Reference: Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300
  """
  return sequence_sum(mask, count_empty=count_empty) / jnp.maximum(token_counts(mask), 1)


def sequence_sum(mask, *, count_empty=False) -> Array:
  """Weights for the mean over responses of each one's sum over tokens.

      weights[b, t] = mask[b, t] / B

  A response's log-prob is the sum of its tokens' log-probs, so this is the textbook policy
  gradient: nothing is divided by a length that the policy itself chooses.

  >>> sequence_sum(jnp.array([[True, True], [True, False]])).tolist()
  [[0.5, 0.5], [0.5, 0.0]]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    count_empty: whether rows without tokens count in B, see `sequence_mean`.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: `mask` is not a bool array of two axes.
  """
  check_members(mask)
  rows = mask.shape[0] if count_empty else jnp.maximum(jnp.sum(jnp.any(mask, axis=1)), 1)
  return to_float(mask) / to_float(rows)


def constant_length(mask, *, length, count_empty=False) -> Array:
  """Weights for the sum over tokens divided by the same length for every response (Dr. GRPO).

      weights[b, t] = mask[b, t] / (length * B)

  Dividing each response by its own length makes a wrong answer cheaper the longer it gets: the same
  push is spread over more tokens. One constant for all responses avoids that and keeps the scale of
  a token mean:

  >>> constant_length(jnp.array([[True, True], [True, False]]), length=4).tolist()
  [[0.125, 0.125], [0.125, 0.0]]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    length: a constant of the run, such as the maximum number of new tokens; > 0. Not the padded
      width, which changes with the batch.
    count_empty: whether rows without tokens count in B, see `sequence_mean`.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: `mask` is not a bool array of two axes, or `length` is not above 0.

  Reference: Liu et al., 2025, Understanding R1-Zero-Like Training, https://arxiv.org/abs/2503.20783
  """
  check_above("length", length, 0)
  return sequence_sum(mask, count_empty=count_empty) / length


@any_mesh
def prompt_mean(mask, *, group_size) -> Array:
  """Weights for the mean over prompts of the token mean among each prompt's responses.

      weights[b, t] = mask[b, t] / (tokens of the group of b * P)

  Each prompt counts the same, however long its answers are; within a prompt, long answers count
  more. Two groups of two responses, one group with three tokens and one with one:

  >>> mask = jnp.array([[True, True], [True, False], [True, False], [False, False]])
  >>> [round(float(w), 3) for w in prompt_mean(mask, group_size=2).sum(axis=1)]
  [0.333, 0.167, 0.5, 0.0]

  Args:
    mask: [B, T] bool, the tokens the policy produced; rows are `b = p * group_size + g`.
    group_size: G, responses per prompt.

  Returns:
    [B, T] float32, summing to 1; prompts without any token are left out of the count P.

  Raises:
    ValueError: `mask` is not a bool array of two axes, or B is not a multiple of `group_size`.
  """
  check_members(mask)
  if group_size < 1 or mask.shape[0] % group_size:
    raise ValueError(
      f"group_size is {group_size}; it must divide the number of rows of mask, {mask.shape[0]}."
    )
  groups = mask.shape[0] // group_size, group_size
  tokens = jnp.sum(jnp.reshape(jnp.sum(mask, axis=1), groups), axis=1)
  prompts = jnp.maximum(jnp.sum(tokens > 0), 1)
  per_row = jnp.repeat(jnp.maximum(tokens, 1) * prompts, group_size)
  return to_float(mask) / to_float(per_row)[:, None]


def length_power(mask, *, power) -> Array:
  """Weights between the mean over responses and the mean over tokens (LBPO).

      weights[b, t] = mask[b, t] * n_b^(power - 1) / sum_j n_j^power        n_b = sum_t mask[b, t]

  The total weight of a response of n tokens is proportional to n^power. Power 0 is `sequence_mean`,
  1 is `token_mean`. Responses of 4 tokens and of 1 token weigh 4 to 1 at power 1, 1 to 1 at power
  0, and 2 to 1 at power 1/2:

  >>> weights = length_power(jnp.arange(4) < jnp.array([[4], [1]]), power=0.5)
  >>> [round(float(w), 3) for w in weights.sum(axis=1)]
  [0.667, 0.333]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    power: usually between 0 and 1.

  Returns:
    [B, T] float32, summing to 1; all 0 if the mask is empty. Rows without tokens are left out.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Reference: as "LBPO" in NexRL, https://github.com/nex-agi/NexRL
  """
  check_members(mask)
  lengths = token_counts(mask)
  safe = jnp.maximum(lengths, 1)
  total = jnp.sum(jnp.where(lengths > 0, safe**power, 0))
  return jnp.where(mask, safe ** (power - 1) / jnp.where(total > 0, total, 1), 0)
