"""Rollouts: prompts in, sampled responses out, as one compiled program.

Each *prompt* is prefilled once; its keys and values are then shared out to its G responses, and a
`lax.while_loop` decodes all rows together until every one has ended. The loop's whole state is one
documented pytree, `DecodeState`. Weights are arguments, so a rollout can never run on stale ones
unnoticed, and randomness is one key a row, so that what a row says depends on its problem and its
key and on nothing else in the batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rl_llm.logprobs import chunked_logprobs_and_entropy
from rl_llm.sampling import Sample, SamplingConfig, sample

# The row ended with an end-of-sequence token, which is part of the response and is trained on.
STOP_EOS = 0
STOP_LENGTH = 1  # The row was cut off at max_new_tokens.
CHUNK_SIZE = 512  # tokens whose logits one device holds at once


class Rollout(NamedTuple):
  """B = P * G responses, row b = p * G + g; t runs over what follows the prompt."""

  tokens: chex.Array  # [B, T] int32, `pad_id` after the end
  mask: chex.Array  # [B, T] bool, True = produced by the policy, its end-of-sequence token included
  sampler_logprobs: chex.Array  # [B, T] float32, nats, of the full tempered distribution; 0 outside
  entropies: chex.Array  # [B, T] float32, nats, of the same distribution; 0 outside the mask
  lengths: chex.Array  # [B] int32, tokens in the mask
  stop_reason: chex.Array  # [B] int32, STOP_EOS or STOP_LENGTH


class DecodeState(NamedTuple):
  """All that one decode step reads and writes."""

  step: chex.Array  # int32 scalar, tokens written so far in every row
  cache: Any  # the policy's cache, [B, L + T, ...]
  last: chex.Array  # [B] int32, the token sampled last: the next forward pass reads it
  done: chex.Array  # [B] bool, the row has ended
  tokens: chex.Array  # [B, T] int32
  mask: chex.Array  # [B, T] bool
  logprobs: chex.Array  # [B, T] float32
  entropies: chex.Array  # [B, T] float32


def prompt_layout(lengths: chex.Array, columns: int) -> tuple[chex.Array, chex.Array]:
  """Positions and segment ids of left-padded prompts.

  A prompt of 2 tokens in 3 columns stands in the last 2, at positions 0 and 1:

  >>> positions, segments = prompt_layout(jnp.array([2]), 3)
  >>> positions.tolist(), segments.tolist()
  ([[0, 0, 1]], [[-1, 0, 0]])

  Args:
    lengths: [P] int32, tokens of each prompt.
    columns: L, the padded width.

  Returns:
    positions [P, L] int32 and segment ids [P, L] int32, -1 at padding and 0 elsewhere.
  """
  offset = jnp.arange(columns)[None, :] - (columns - lengths[:, None])
  return jnp.maximum(offset, 0).astype(jnp.int32), jnp.where(offset >= 0, 0, -1).astype(jnp.int32)


def row_keys(key: chex.Array, prompts: int, responses: int) -> chex.Array:
  """One PRNG key a row, fold_in(fold_in(key, p), g): draws do not depend on the batch's layout.

  Args:
    key: a typed key, usually fold_in(root, step); consumed.
    prompts: P.
    responses: G.
  """
  by_prompt = jax.vmap(lambda p: jax.random.fold_in(key, p))(jnp.arange(prompts))
  by_row = jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(responses)))
  return by_row(by_prompt).reshape(prompts * responses)


@functools.partial(
  jax.jit, static_argnames=("policy", "responses_per_prompt", "max_new_tokens", "eos_ids", "pad_id")
)
def generate(
  params: Any,
  prompts: chex.Array,
  prompt_lengths: chex.Array,
  keys: chex.Array,
  sampling: SamplingConfig,
  *,
  policy: Any,
  responses_per_prompt: int,
  max_new_tokens: int,
  eos_ids: tuple[int, ...],
  pad_id: int,
) -> Rollout:
  """Samples G responses to each of P prompts.

  Args:
    params: the policy's weights.
    prompts: [P, L] int32, left-padded.
    prompt_lengths: [P] int32, from 1 to L.
    keys: [P * G] typed keys, from `row_keys`.
    sampling: how tokens are chosen; its temperature may be [P * G].
    policy: the pure functions of `rl_llm.policy.Policy`.
    responses_per_prompt: G.
    max_new_tokens: T; a row that has not ended by then stops with STOP_LENGTH.
    eos_ids: the *set* of ids that end a response; may be empty.
    pad_id: what fills rows after their end; may equal an end-of-sequence id, since masks come from
      here and not from ids.

  Returns:
    A `Rollout` of B = P * G rows, T columns.
  """
  chex.assert_rank([prompts, prompt_lengths, keys], [2, 1, 1])
  n_prompts, columns = prompts.shape
  rows = n_prompts * responses_per_prompt
  if keys.shape[0] != rows:
    raise ValueError(
      f"keys: {keys.shape[0]} keys for {n_prompts} prompts x {responses_per_prompt} responses; "
      f"pass {rows}, from row_keys(key, {n_prompts}, {responses_per_prompt})"
    )

  positions, segments = prompt_layout(prompt_lengths, columns)
  cache = policy.init_cache(n_prompts, columns + max_new_tokens)
  hidden, cache = policy.hidden(params, prompts, positions, segments, cache)
  share = functools.partial(_share, rows=n_prompts, copies=responses_per_prompt)
  cache = jax.tree.map(share, cache)
  first_hidden = share(hidden[:, -1])
  lengths = share(prompt_lengths)
  # The loop reads every matrix at every token: those that it rounds are rounded once, before it.
  params = jax.tree.map(lambda w: w.astype(hidden.dtype) if w.ndim > 1 else w, params)

  def choose(hidden: chex.Array, step: chex.Array) -> Sample:
    logits = policy.logits(params, hidden)
    suppress = None
    if eos_ids and sampling.min_new_tokens:
      is_eos = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(eos_ids))
      suppress = jnp.broadcast_to(is_eos & (step < sampling.min_new_tokens), logits.shape)
    return sample(_fold(keys, step), logits, sampling, suppress=suppress)

  def write(state: DecodeState, drawn: Sample) -> DecodeState:
    """Records one token for every row that has not ended."""
    alive = ~state.done
    column = (0, state.step)

    def put(array, values):
      return jax.lax.dynamic_update_slice(array, values[:, None].astype(array.dtype), column)

    ended = jnp.isin(drawn.token, jnp.array(eos_ids, jnp.int32))
    return DecodeState(
      step=state.step + 1,
      cache=state.cache,
      last=drawn.token,
      done=state.done | ended,
      tokens=put(state.tokens, jnp.where(alive, drawn.token, pad_id)),
      mask=put(state.mask, alive),
      logprobs=put(state.logprobs, jnp.where(alive, drawn.logprob, 0.0)),
      entropies=put(state.entropies, jnp.where(alive, drawn.entropy, 0.0)),
    )

  def decode(state: DecodeState) -> DecodeState:
    position = lengths + state.step - 1
    hidden, cache = policy.hidden(
      params, state.last[:, None], position[:, None], jnp.zeros((rows, 1), jnp.int32), state.cache
    )
    return write(state._replace(cache=cache), choose(hidden[:, 0], state.step))

  shape = (rows, max_new_tokens)
  state = DecodeState(
    step=jnp.zeros((), jnp.int32),
    cache=cache,
    last=jnp.zeros((rows,), jnp.int32),
    done=jnp.zeros((rows,), bool),
    tokens=jnp.full(shape, pad_id, jnp.int32),
    mask=jnp.zeros(shape, bool),
    logprobs=jnp.zeros(shape, jnp.float32),
    entropies=jnp.zeros(shape, jnp.float32),
  )
  state = write(state, choose(first_hidden, state.step))
  state = jax.lax.while_loop(
    lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done), decode, state
  )
  return Rollout(
    tokens=state.tokens,
    mask=state.mask,
    sampler_logprobs=state.logprobs,
    entropies=state.entropies,
    lengths=jnp.sum(state.mask, axis=-1, dtype=jnp.int32),
    stop_reason=jnp.where(state.done, STOP_EOS, STOP_LENGTH).astype(jnp.int32),
  )


def _share(x: chex.Array, *, rows: int, copies: int) -> chex.Array:
  """Repeats each prompt's row for its responses; scalars (the cache's cursor) are common."""
  return jnp.repeat(x, copies, axis=0) if x.ndim and x.shape[0] == rows else x


def _fold(keys: chex.Array, step: chex.Array) -> chex.Array:
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)


def response_hidden(
  params: Any,
  prompts: chex.Array,
  prompt_lengths: chex.Array,
  tokens: chex.Array,
  mask: chex.Array,
  *,
  policy: Any,
) -> chex.Array:
  """The states that predict the tokens of responses: what any head of the trainer's side reads.

  It reads as the sampler reads: each prompt once, its keys and values shared out to its G
  responses, then all tokens of the responses at once instead of one by one. For short answers to
  long questions that is several times less work than G copies of the prompt, and never more.
  Gradients flow through the shared keys and values.

  Args:
    params: the weights to read with.
    prompts: [P, L] int32, left-padded.
    prompt_lengths: [P] int32.
    tokens: [B, T] int32, the responses, B = P * G; row b answers prompt b // G.
    mask: [B, T] bool, True = part of the response.
    policy: as for `generate`.

  Returns:
    [B, T, D] in the compute dtype: column t has seen the prompt and the tokens before t. Column 0
    is the prompt's end; the last token is not read.

  Raises:
    ValueError: B is not a multiple of P.
  """
  n_prompts, columns = prompts.shape
  rows, steps = tokens.shape
  if rows % n_prompts:
    raise ValueError(f"tokens: {rows} rows are not a multiple of the {n_prompts} rows of prompts")
  share = functools.partial(jnp.repeat, repeats=rows // n_prompts, axis=0)
  reading = prompts, *prompt_layout(prompt_lengths, columns)
  if steps == 1:  # Nothing follows the last token: it is not read.
    return share(policy.hidden(params, *reading)[0][:, -1:])
  following = (
    tokens[:, :-1],
    share(prompt_lengths)[:, None] + jnp.arange(steps - 1),
    jnp.where(mask[:, :-1], 0, -1),
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
  policy: Any,
  temperature: chex.Array | float = 1.0,
  chunk_size: int | None = None,
) -> tuple[chex.Array, chex.Array]:
  """The second half of `response_logprobs`, for a trainer that has another use for `hidden` too.

  Args:
    params: the weights, of which only the unembedding is read.
    hidden: [B, T, D] float, from `response_hidden`.
    tokens, mask, policy, temperature, chunk_size: as for `response_logprobs`.

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
  prompts: chex.Array,
  prompt_lengths: chex.Array,
  tokens: chex.Array,
  mask: chex.Array,
  *,
  policy: Any,
  temperature: chex.Array | float = 1.0,
  chunk_size: int | None = None,
) -> tuple[chex.Array, chex.Array]:
  """Teacher-forced log-probs and entropies of responses: the trainer's side of `generate`.

  Prompts are read once, as `response_hidden` says. Only the positions that predict response tokens
  meet the vocabulary, in chunks, so that [B, T, V] never exists.

  Args:
    params: the weights to score under.
    prompts: [P, L] int32, left-padded.
    prompt_lengths: [P] int32.
    tokens: [B, T] int32, the responses, B = P * G; row b answers prompt b // G.
    mask: [B, T] bool, True = part of the response.
    policy: as for `generate`.
    temperature: the sampler's; the same for both, or the ratio of the first update is not 1.
    chunk_size: as many logits exist at once as this many tokens have, on all devices together;
      None: CHUNK_SIZE on each device over which rows lie.

  Returns:
    logprobs [B, T] and entropies [B, T], float32, nats, 0 outside the mask.

  Raises:
    ValueError: B is not a multiple of P.
  """
  hidden = response_hidden(params, prompts, prompt_lengths, tokens, mask, policy=policy)
  return logprobs_of_hidden(
    params,
    hidden,
    tokens,
    mask,
    policy=policy,
    temperature=temperature,
    chunk_size=chunk_size,
  )
