"""Log-probs of responses: each prompt is read once for all that follow it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rl_llm.logprobs import chunked_logprobs_and_entropy
from rl_llm.policy import Policy
from rl_llm.rollout.decoding import prompt_layout

CHUNK_SIZE = 512  # tokens whose logits one device holds at once


class ResponseBatch(NamedTuple):
  """What a loss reads of sampled responses: P prompts and G responses to each, B = P * G rows.

  Row b answers prompt b // G, and t counts the tokens after the prompt. The two masks differ: a
  token that an environment wrote into the middle of a row is `attended`, since later tokens see it,
  but not in `mask`, since the policy did not write it.

  A field that a run does not need is None, so that no array of it exists on the host or a device.
  Every array has P or B rows, so minibatches and devices divide all arrays the same way.
  """

  prompts: chex.Array  # [P, L] int32, left-padded
  prompt_lengths: chex.Array  # [P] int32
  tokens: chex.Array  # [B, T] int32
  attended: chex.Array  # [B, T] bool, True = seen by the tokens after it
  mask: chex.Array  # [B, T] bool, True = written by the policy and trained on; within `attended`
  sampler_logprobs: chex.Array | None = None  # [B, T] float32, nats, as the sampler reported them
  old_logprobs: chex.Array | None = None  # [B, T], of the policy before this batch's updates
  ref_logprobs: chex.Array | None = None  # [B, T], of the frozen reference
  advantages: chex.Array | None = None  # [B] or [B, T]
  weights: chex.Array | None = None  # [B, T], of one update's rows, from `rl_llm.weighting`
  kl_weights: chex.Array | None = None  # [B, T], of a KL term, if they differ from `weights`
  truncated: chex.Array | None = None  # [B] bool, True = cut off at the length limit
  entropies: chex.Array | None = None  # [B, T], of the sampler's distributions, in nats
  correct: chex.Array | None = None  # [B] bool, whether the grader found the response right
  selected: chex.Array | None = None  # [B, T] bool, tokens that a loss holds back
  factors: chex.Array | None = None  # [B, T], what the surrogate's weights are multiplied by
  llds_weights: chex.Array | None = None  # [B, T], of the term that holds up likelihood
  nll_weights: chex.Array | None = None  # [B, T], of the likelihood of right answers
  teacher_hidden: chex.Array | None = None  # [B, T, E], a teacher's states that predict the tokens
  old_values: chex.Array | None = None  # [B, T], of a value network before this batch's updates
  returns: chex.Array | None = None  # [B, T], what the values should have been
  turns: chex.Array | None = None  # [B, T] int32, an agent's turn that each of its tokens is in


def take_prompts(batch: Any, chosen: chex.Array) -> Any:
  """The rows of the chosen prompts, in that order, from every array.

  >>> prompts, lengths, rows = jnp.array([[7], [8]]), jnp.ones(2), jnp.arange(4)[:, None]
  >>> batch = ResponseBatch(prompts, lengths, rows, rows >= 0, rows >= 0)
  >>> take_prompts(batch, jnp.array([1])).tokens.tolist()
  [[2], [3]]

  Args:
    batch: a `ResponseBatch`, or any tree of one and arrays of its rows, on the host or a device.
    chosen: [M] ints below P.
  """
  leaves = jax.tree.leaves(batch)
  count = min(len(leaf) for leaf in leaves)  # P; the other arrays have G times as many rows.

  def take(x: chex.Array) -> chex.Array:
    return x.reshape(count, -1, *x.shape[1:])[chosen].reshape(-1, *x.shape[1:])

  return jax.tree.map(take, batch)


def response_hidden(params: Any, batch: ResponseBatch, *, policy: Policy) -> chex.Array:
  """The states that predict the tokens of responses: the input of any head on the trainer's side.

  It reads as the sampler does: each prompt once, with its keys and values shared by its G
  responses, but then all tokens of the responses at once instead of one by one. For short answers
  to long questions that is several times less work than G copies of the prompt, and it is never
  more. Gradients flow through the shared keys and values.

  Args:
    params: the weights to read with.
    batch: prompts, prompt_lengths, tokens and `attended` are read from it.
    policy: as for `generate`.

  Returns:
    [B, T, D] in the compute dtype: column t has seen the prompt and the attended tokens before t.
    Column 0 is the state at the prompt's end; the last token is not read.

  Raises:
    ValueError: B is not a multiple of P.
  """
  n_prompts, columns = batch.prompts.shape
  rows, steps = batch.tokens.shape
  if rows % n_prompts:
    raise ValueError(f"tokens: {rows} rows are not a multiple of the {n_prompts} rows of prompts")
  share = functools.partial(jnp.repeat, repeats=rows // n_prompts, axis=0)
  reading = batch.prompts, *prompt_layout(batch.prompt_lengths, columns)
  if steps == 1:  # Nothing follows the last token, so it is not read.
    return share(policy.hidden(params, *reading)[0][:, -1:])
  following = (
    batch.tokens[:, :-1],
    share(batch.prompt_lengths)[:, None] + jnp.arange(steps - 1),
    jnp.where(batch.attended[:, :-1], 0, -1),
  )
  hidden, following = policy.shared_hidden(params, reading, following)
  # The prompt's end predicts the first token.
  return jnp.concatenate([share(hidden[:, -1:]), following], axis=1)


def logprobs_of_hidden(
  params: Any,
  hidden: chex.Array,
  tokens: chex.Array,
  mask: chex.Array,
  *,
  policy: Policy,
  temperature: chex.Array | float = 1.0,
  chunk_size: int | None = None,
) -> tuple[chex.Array, chex.Array]:
  """The second half of `response_logprobs`, for a trainer that also uses `hidden` otherwise.

  Args:
    params: the weights; only the unembedding is read.
    hidden: [B, T, D] float, from `response_hidden`.
    tokens: [B, T] int32, the token that each state predicts.
    mask: [B, T] bool, the tokens to score.
    policy, temperature, chunk_size: as for `response_logprobs`.

  Returns:
    logprobs [B, T] and entropies [B, T], float32, nats, 0 outside the mask.
  """
  logprobs, entropies = chunked_logprobs_and_entropy(
    hidden,
    policy.unembed(params).astype(hidden.dtype),  # As the sampler does.
    tokens,
    chunk_size=chunk_size or CHUNK_SIZE * policy.row_shards,
    temperature=temperature,
    softcap=policy.config.final_softcap,
  )
  return jnp.where(mask, logprobs, 0.0), jnp.where(mask, entropies, 0.0)


def response_logprobs(
  params: Any,
  batch: ResponseBatch,
  *,
  policy: Policy,
  temperature: chex.Array | float = 1.0,
  chunk_size: int | None = None,
) -> tuple[chex.Array, chex.Array]:
  """Teacher-forced log-probs and entropies of responses: the trainer's side of `generate`.

  Prompts are read once, see `response_hidden`. Logits are computed in chunks, only at the positions
  that predict response tokens, so that [B, T, V] never exists.

  Args:
    params: the weights to score under.
    batch: prompts, prompt_lengths, tokens, `attended` and `mask` are read from it.
    policy: as for `generate`.
    temperature: the sampler's; if they differ, the ratio of the first update is not 1.
    chunk_size: tokens whose logits exist at once, on all devices together; None: CHUNK_SIZE on each
      device over which rows lie.

  Returns:
    logprobs [B, T] and entropies [B, T], float32, nats, 0 outside `mask`.

  Raises:
    ValueError: B is not a multiple of P.
  """
  return logprobs_of_hidden(
    params,
    response_hidden(params, batch, policy=policy),
    batch.tokens,
    batch.mask,
    policy=policy,
    temperature=temperature,
    chunk_size=chunk_size,
  )
