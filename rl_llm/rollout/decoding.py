"""Decoding: read prompts, then sample a token a step for every row that has not ended.

The draw itself, logits to a token, is `rl_llm.rollout.sampling.sample`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rl_llm.policy import Policy
from rl_llm.policy.layer_stack import cast_weights
from rl_llm.rollout.sampling import Sample, SamplingConfig, sample


class DecodeState(NamedTuple):
  """All that one decode step reads and writes: B responses, with S slots to decode them in."""

  step: chex.Array  # int32 scalar, decode steps taken
  waiting: chex.Array  # int32 scalar, the first response that has not had a slot yet; B: none
  cache: Any  # the policy's cache, [S, L + T, ...]; step i is written at column L + i % T
  row: chex.Array  # [S] int32, which response the slot works on
  length: chex.Array  # [S] int32, how many of its tokens are written
  last: chex.Array  # [S] int32, its last sampled token: the next forward pass reads it
  alive: chex.Array  # [S] bool, it has not ended
  tokens: chex.Array  # [B, T] int32
  mask: chex.Array  # [B, T] bool
  logprobs: chex.Array  # [B, T] float32
  entropies: chex.Array  # [B, T] float32
  ended: chex.Array  # [B] bool, True = ended by a token that ends responses


def prompt_layout(lengths: chex.Array, columns: int) -> tuple[chex.Array, chex.Array]:
  """Positions and segment ids of left-padded prompts.

  A prompt of 2 tokens in 3 columns fills the last 2, at positions 0 and 1:

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


class Decoding(NamedTuple):
  """The static settings that the decode loop is compiled for: hashable, without arrays."""

  policy: Policy  # the pure functions of `rl_llm.policy.Policy`
  responses_per_prompt: int  # G
  max_new_tokens: int  # T
  eos_ids: tuple[int, ...]  # each ends a response; may be empty
  slots: int  # S, responses decoded at once, from 1 to B


class Requests(NamedTuple):
  """The requests of all B rows. The decode loop reads them and does not change them."""

  prompt_lengths: chex.Array  # [B] int32
  keys: chex.Array  # [B] typed keys
  sampling: SamplingConfig  # its temperature is [B] float32


def requests_of(
  prompt_lengths: chex.Array, keys: chex.Array, sampling: SamplingConfig, responses_per_prompt: int
) -> Requests:
  """The requests of B = P * G rows.

  Args:
    prompt_lengths: [P] int32.
    keys: [B] typed keys; each row's token number t is drawn with fold_in(key, t).
    sampling: its temperature may be [B].
    responses_per_prompt: G.
  """
  lengths = jnp.repeat(jnp.asarray(prompt_lengths), responses_per_prompt, axis=0)
  return Requests(lengths, keys, sampling.per_row(len(keys)))


class Prefilled(NamedTuple):
  """The result of `prefill`. The decode loop reads it and does not change it."""

  params: Any  # the weights, rounded as `rl_llm.policy.layer_stack.cast_weights` does
  cache: Any  # the policy's cache of the prompts, [P, L, ...]
  first: Sample  # [B], the first token of each response


def prefill(
  params: Any,
  prompts: chex.Array,
  prompt_lengths: chex.Array,
  requests: Requests,
  *,
  decoding: Decoding,
) -> Prefilled:
  """Reads every prompt once, and draws the first token of every response.

  Args:
    params: the policy's weights.
    prompts: [P, L] int32, left-padded.
    prompt_lengths: [P] int32, from 1 to L.
    requests: of the B = P * G rows.
    decoding: the loop's settings. At most as many logits exist at once as in a decode step.
  """
  policy, slots = decoding.policy, decoding.slots
  n_prompts, columns = prompts.shape
  positions, segments = prompt_layout(prompt_lengths, columns)
  hidden, cache = policy.hidden(
    params, prompts, positions, segments, policy.init_cache(n_prompts, columns)
  )
  # The loop reads every matrix at every token, so round those that it rounds once, before it.
  params = cast_weights(params, hidden.dtype)
  last = jnp.repeat(hidden[:, -1], decoding.responses_per_prompt, axis=0)
  rows = len(last)

  def first(hidden: chex.Array, row: chex.Array) -> Sample:
    return draw(params, hidden, row, jnp.zeros_like(row), requests, decoding=decoding)

  if slots == rows:
    return Prefilled(params, cache, first(last, jnp.arange(rows)))
  parts = jnp.minimum(jnp.arange(-(-rows // slots) * slots), rows - 1).reshape(-1, slots)
  drawn = jax.lax.map(lambda row: first(last[row], row), parts)
  return Prefilled(params, cache, jax.tree.map(lambda x: x.reshape(-1)[:rows], drawn))


def decode_step(
  params: Any, state: DecodeState, requests: Requests, *, decoding: Decoding
) -> DecodeState:
  """Reads the token that each slot sampled last, and samples the next one.

  Slots whose row has ended compute too, but write to no row.

  Args:
    params: the policy's weights.
    state: rows in their slots, each with at least one token.
    requests: of all B rows.
    decoding: the loop's settings.
  """
  rows, max_new_tokens = state.tokens.shape
  columns = state.cache.positions.shape[1] - max_new_tokens
  cache = state.cache._replace(cursor=columns + state.step % max_new_tokens)
  position = requests.prompt_lengths[state.row] + state.length - 1
  hidden, cache = decoding.policy.hidden(
    params, state.last[:, None], position[:, None], jnp.zeros((decoding.slots, 1), jnp.int32), cache
  )
  drawn = draw(params, hidden[:, 0], state.row, state.length, requests, decoding=decoding)
  ended = ends(drawn.token, decoding)
  # Writes to rows beyond the last are dropped.
  row = jnp.where(state.alive, state.row, rows)
  at = row, state.length
  length = state.length + 1
  return state._replace(
    step=state.step + 1,
    cache=cache,
    length=length,
    last=drawn.token,
    # A log-prob is NaN if a logit is not a number: `rl_llm.runs.finite` stops the run, so stop
    # decoding.
    alive=state.alive & ~ended & (length < max_new_tokens) & ~jnp.isnan(drawn.logprob),
    tokens=state.tokens.at[at].set(drawn.token, mode="drop"),
    mask=state.mask.at[at].set(True, mode="drop"),
    logprobs=state.logprobs.at[at].set(drawn.logprob, mode="drop"),
    entropies=state.entropies.at[at].set(drawn.entropy, mode="drop"),
    ended=state.ended.at[row].set(ended, mode="drop"),
  )


def admit(state: DecodeState, prefilled: Prefilled, *, decoding: Decoding) -> DecodeState:
  """Gives the free slots to waiting rows, in their order.

  The slot's cache then holds the row's prompt, and nothing of the slot's previous response.

  Args:
    state: between two decode steps.
    prefilled: from `prefill`.
    decoding: the loop's settings.
  """
  rows, max_new_tokens = state.tokens.shape
  cache, prompts = state.cache, prefilled.cache
  columns = prompts.positions.shape[1]
  candidate = state.waiting + jnp.cumsum(~state.alive) - 1
  comes = ~state.alive & (candidate < rows)
  row = jnp.where(comes, candidate, state.row)

  def put(kept: chex.Array, new: chex.Array, *, axis: int) -> chex.Array:
    """Writes the prompts' columns, along `axis`, into the slots that get a new row."""
    new = new[row // decoding.responses_per_prompt]
    comer = comes.reshape(-1, *[1] * (kept.ndim - 1))
    old = jax.lax.slice_in_dim(kept, 0, columns, axis=axis)
    return jax.lax.dynamic_update_slice_in_dim(kept, jnp.where(comer, new, old), 0, axis=axis)

  segment_ids = jnp.where(comes[:, None], -1, cache.segment_ids)
  return state._replace(
    waiting=state.waiting + jnp.sum(comes, dtype=jnp.int32),
    cache=cache._replace(
      keys=jax.tree.map(functools.partial(put, axis=3), cache.keys, prompts.keys),
      values=jax.tree.map(functools.partial(put, axis=2), cache.values, prompts.values),
      segment_ids=put(segment_ids, prompts.segment_ids, axis=1),
      positions=put(cache.positions, prompts.positions, axis=1),
    ),
    row=row,
    length=jnp.where(comes, 1, state.length),
    last=jnp.where(comes, prefilled.first.token[row], state.last),
    alive=jnp.where(comes, ~state.ended[row] & (max_new_tokens > 1), state.alive),
  )


def draw(
  params: Any,
  hidden: chex.Array,
  row: chex.Array,
  length: chex.Array,
  requests: Requests,
  *,
  decoding: Decoding,
  written: chex.Array | None = None,
) -> Sample:
  """Draws token number `length` of these rows.

  Args:
    params: the policy's weights.
    hidden: [S, D], the states that predict the tokens.
    row: [S] int32, which of the requests each belongs to.
    length: [S] int32, tokens of the row so far: its key is folded with this number.
    requests: of all B rows.
    decoding: the loop's settings.
    written: [S] int32, tokens of the turn so far, for a minimum length; None: `length`.
  """
  logits = decoding.policy.logits(params, hidden)
  sampling, suppress = requests.sampling, None
  if decoding.eos_ids and sampling.min_new_tokens:
    is_eos = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(decoding.eos_ids))
    written = length if written is None else written
    suppress = is_eos & (written < sampling.min_new_tokens)[:, None]
  sampling = dataclasses.replace(sampling, temperature=sampling.temperature[row])
  keys = jax.vmap(jax.random.fold_in)(requests.keys[row], length)
  return sample(keys, logits, sampling, suppress=suppress)


def ends(tokens: chex.Array, decoding: Decoding) -> chex.Array:
  """Which of these tokens end a response, or a turn of it."""
  return jnp.isin(tokens, jnp.array(decoding.eos_ids, jnp.int32))


def first_state(prefilled: Prefilled, *, pad_id: int, decoding: Decoding) -> DecodeState:
  """The state in which every row's first token is written, and all rows wait for a slot."""
  slots, max_new_tokens = decoding.slots, decoding.max_new_tokens
  columns, (rows,) = prefilled.cache.positions.shape[1], prefilled.first.token.shape

  def first_column(x: chex.Array, fill: Any) -> chex.Array:
    return jnp.full((rows, max_new_tokens), fill, x.dtype).at[:, 0].set(x)

  return DecodeState(
    step=jnp.zeros((), jnp.int32),
    waiting=jnp.zeros((), jnp.int32),
    cache=decoding.policy.init_cache(slots, columns + max_new_tokens),
    row=jnp.zeros((slots,), jnp.int32),
    length=jnp.ones((slots,), jnp.int32),
    last=jnp.zeros((slots,), jnp.int32),
    alive=jnp.zeros((slots,), bool),
    tokens=first_column(prefilled.first.token, pad_id),
    mask=first_column(jnp.ones((rows,), bool), False),
    logprobs=first_column(prefilled.first.logprob, 0),
    entropies=first_column(prefilled.first.entropy, 0),
    ended=ends(prefilled.first.token, decoding),
  )


def admit_all(state: DecodeState, prefilled: Prefilled, *, decoding: Decoding) -> DecodeState:
  """`admit` of the first state if every row has a slot: nothing in the cache must be kept."""
  rows, max_new_tokens = state.tokens.shape
  return state._replace(
    waiting=jnp.int32(rows),
    cache=shared_out(prefilled, state.cache, decoding=decoding),
    row=jnp.arange(rows),
    last=prefilled.first.token,
    alive=~state.ended & (max_new_tokens > 1),
  )


def shared_out(prefilled: Prefilled, room: Any, *, decoding: Decoding) -> Any:
  """Each prompt's cache in all of its G rows, with the columns that `room` has beyond it, not yet
  written."""

  def put(empty: chex.Array, x: chex.Array) -> chex.Array:
    copies = jnp.repeat(x, decoding.responses_per_prompt, axis=0) if x.ndim else x
    return jax.lax.dynamic_update_slice(empty, copies, (0,) * x.ndim)

  return jax.tree.map(put, room, prefilled.cache)
