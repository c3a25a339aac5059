"""Rollouts: prompts in, sampled responses out, as one compiled program.

Each *prompt* is prefilled once. Its keys and values are then shared by its G responses, and a
`lax.while_loop` decodes rows together until every row has ended. With fewer slots than responses, a
response that has ended makes room for the next, so that short answers do not wait for long ones.
The loop's whole state is one documented pytree, `DecodeState`. Weights are arguments, so a rollout
can never silently use stale weights. Each row has its own key, so its tokens depend only on its
problem and its key, and on nothing else in the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from rl_llm.logprobs import chunked_logprobs_and_entropy
from rl_llm.parallel.sharding import constrain
from rl_llm.policy.layers import cast_weights
from rl_llm.rollout.sampling import Sample, SamplingConfig, sample

# The row ended with an end-of-sequence token, which belongs to the response and is trained on.
STOP_EOS = 0
STOP_LENGTH = 1  # The row was cut off at max_new_tokens.
CHUNK_SIZE = 512  # tokens whose logits one device holds at once


class Rollout(NamedTuple):
  """B = P * G responses, row b = p * G + g; t counts the tokens after the prompt."""

  tokens: chex.Array  # [B, T] int32, `pad_id` after the end
  mask: chex.Array  # [B, T] bool, True = produced by the policy, its end-of-sequence token included
  sampler_logprobs: chex.Array  # [B, T] float32, nats, of the full tempered distribution; 0 outside
  entropies: chex.Array  # [B, T] float32, nats, of the same distribution; 0 outside the mask
  lengths: chex.Array  # [B] int32, tokens in the mask
  stop_reason: chex.Array  # [B] int32, STOP_EOS or STOP_LENGTH


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
  old_values: chex.Array | None = None  # [B, T], of a value network before this batch's updates
  returns: chex.Array | None = None  # [B, T], what the values should have been


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


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def gather_weights(params: Any, *, dtype: Any, mesh: jax.sharding.Mesh) -> Any:
  """The weights as `generate` needs them on a mesh of `sharding.whole_along_fsdp`.

  A decode step reads every matrix for one token per row. If a matrix is cut along `fsdp`, every
  step gathers it: 7.6 billion weights of 2 bytes and 1,024 tokens send 16 TB through each device.
  Gathered once per rollout, it is 15 GB, which must fit on the device (divided by the mesh's
  `tensor`).

  Args:
    params: the weights, cut over the same devices in the same order.
    dtype: of the arithmetic; the weights are cast to it before they are sent.
    mesh: the mesh to lay them over.
  """
  return constrain(cast_weights(params, dtype), mesh)


@functools.partial(jax.jit, static_argnames=("prompts", "responses"))
def row_keys(key: chex.Array, prompts: int, responses: int) -> chex.Array:
  """One PRNG key per row, fold_in(fold_in(key, p), g): draws do not depend on the batch's layout.

  Args:
    key: a typed key, usually fold_in(root, step); consumed.
    prompts: P.
    responses: G.
  """
  by_prompt = jax.vmap(lambda p: jax.random.fold_in(key, p))(jnp.arange(prompts))
  by_row = jax.vmap(lambda k: jax.vmap(lambda g: jax.random.fold_in(k, g))(jnp.arange(responses)))
  return by_row(by_prompt).reshape(prompts * responses)


class Decoding(NamedTuple):
  """The static settings that the decode loop is compiled for: hashable, without arrays."""

  policy: Any  # the pure functions of `rl_llm.policy.Policy`
  responses_per_prompt: int  # G
  max_new_tokens: int  # T
  eos_ids: tuple[int, ...]  # each ends a response; may be empty
  slots: int  # S, responses decoded at once, from 1 to B


class Requests(NamedTuple):
  """The requests of all B rows. The decode loop reads them and does not change them."""

  prompt_lengths: chex.Array  # [B] int32
  keys: chex.Array  # [B] typed keys
  sampling: SamplingConfig  # its temperature is [B] float32


class Prefilled(NamedTuple):
  """The result of `prefill`. The decode loop reads it and does not change it."""

  params: Any  # the weights, rounded as `rl_llm.policy.layers.cast_weights` does
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

  def draw(hidden: chex.Array, row: chex.Array) -> Sample:
    return _draw(params, hidden, row, jnp.zeros_like(row), requests, decoding=decoding)

  if slots == rows:
    return Prefilled(params, cache, draw(last, jnp.arange(rows)))
  parts = jnp.minimum(jnp.arange(-(-rows // slots) * slots), rows - 1).reshape(-1, slots)
  drawn = jax.lax.map(lambda row: draw(last[row], row), parts)
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
  drawn = _draw(params, hidden[:, 0], state.row, state.length, requests, decoding=decoding)
  ended = _ends(drawn.token, decoding)
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


def _draw(
  params: Any,
  hidden: chex.Array,
  row: chex.Array,
  length: chex.Array,
  requests: Requests,
  *,
  decoding: Decoding,
) -> Sample:
  """Token number `length` of these rows, from the hidden states [S, D] that predict it."""
  logits = decoding.policy.logits(params, hidden)
  sampling, suppress = requests.sampling, None
  if decoding.eos_ids and sampling.min_new_tokens:
    is_eos = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(decoding.eos_ids))
    suppress = is_eos & (length < sampling.min_new_tokens)[:, None]
  sampling = dataclasses.replace(sampling, temperature=sampling.temperature[row])
  keys = jax.vmap(jax.random.fold_in)(requests.keys[row], length)
  return sample(keys, logits, sampling, suppress=suppress)


def _ends(tokens: chex.Array, decoding: Decoding) -> chex.Array:
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
    ended=_ends(prefilled.first.token, decoding),
  )


def _admit_all(state: DecodeState, prefilled: Prefilled, *, decoding: Decoding) -> DecodeState:
  """`admit` of the first state if every row has a slot: nothing in the cache must be kept."""
  rows, max_new_tokens = state.tokens.shape
  share = functools.partial(jnp.repeat, repeats=decoding.responses_per_prompt, axis=0)
  copies = jax.tree.map(lambda x: share(x) if x.ndim else x, prefilled.cache)
  return state._replace(
    waiting=jnp.int32(rows),
    cache=_pad_to(state.cache, copies),
    row=jnp.arange(rows),
    last=prefilled.first.token,
    alive=~state.ended & (max_new_tokens > 1),
  )


def _decode_all(
  state: DecodeState, prefilled: Prefilled, requests: Requests, *, decoding: Decoding
) -> DecodeState:
  """Decodes until every row has ended."""
  rows, slots = len(state.tokens), decoding.slots

  def step(state: DecodeState) -> DecodeState:
    return decode_step(prefilled.params, state, requests, decoding=decoding)

  if slots == rows:
    state = _admit_all(state, prefilled, decoding=decoding)
    return jax.lax.while_loop(lambda state: jnp.any(state.alive), step, state)

  def keep_decoding(state: DecodeState) -> chex.Array:
    """False once enough slots are free to admit waiting rows."""
    free = jnp.sum(~state.alive)
    admits = (state.waiting < rows) & (free >= max(1, slots // 8))
    return jnp.any(state.alive) & ~admits

  def admit_and_decode(state: DecodeState) -> DecodeState:
    return jax.lax.while_loop(keep_decoding, step, admit(state, prefilled, decoding=decoding))

  return jax.lax.while_loop(
    lambda state: jnp.any(state.alive) | (state.waiting < rows), admit_and_decode, state
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    "policy",
    "responses_per_prompt",
    "max_new_tokens",
    "eos_ids",
    "pad_id",
    "slots",
  ),
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
  slots: int = 0,
) -> Rollout:
  """Samples G responses to each of P prompts.

  Take 256 responses with 64 tokens on average and at most 300. Decoded all together they take 300
  steps of 256 rows, and most of those rows have already ended. With 32 slots they take about
  256 * 64 / 32 = 512 steps of 32 rows, under a quarter of the work, plus the end, when no row waits
  any more. A row's tokens do not depend on the slots: its key is its own, and it does not see a
  slot's earlier tokens.

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
    pad_id: fills rows after their end; may equal an end-of-sequence id, since masks come from the
      decode loop and not from ids.
    slots: S, responses that are decoded at once; 0, or B and more: all. Waiting rows are admitted
      together, once an eighth of the slots is free, since that rewrites the prompts' part of the
      cache.

  Returns:
    A `Rollout` of B = P * G rows, T columns.
  """
  chex.assert_rank([prompts, prompt_lengths, keys], [2, 1, 1])
  n_prompts = len(prompts)
  rows = n_prompts * responses_per_prompt
  if keys.shape[0] != rows:
    raise ValueError(
      f"keys: {keys.shape[0]} keys for {n_prompts} prompts x {responses_per_prompt} responses; "
      f"pass {rows}, from row_keys(key, {n_prompts}, {responses_per_prompt})"
    )

  slots = min(slots or rows, rows)
  decoding = Decoding(policy, responses_per_prompt, max_new_tokens, eos_ids, slots)
  temperatures = jnp.broadcast_to(jnp.asarray(sampling.temperature, jnp.float32), (rows,))
  requests = Requests(
    prompt_lengths=jnp.repeat(prompt_lengths, responses_per_prompt, axis=0),
    keys=keys,
    sampling=dataclasses.replace(sampling, temperature=temperatures),
  )
  prefilled = prefill(params, prompts, prompt_lengths, requests, decoding=decoding)
  state = first_state(prefilled, pad_id=pad_id, decoding=decoding)
  state = _decode_all(state, prefilled, requests, decoding=decoding)
  return Rollout(
    tokens=state.tokens,
    mask=state.mask,
    sampler_logprobs=state.logprobs,
    entropies=state.entropies,
    lengths=jnp.sum(state.mask, axis=-1, dtype=jnp.int32),
    stop_reason=jnp.where(state.ended, STOP_EOS, STOP_LENGTH).astype(jnp.int32),
  )


def _pad_to(room: Any, cache: Any) -> Any:
  """The cache, extended by the columns that `room` has beyond it, not yet written."""

  def put(empty: chex.Array, x: chex.Array) -> chex.Array:
    return jax.lax.dynamic_update_slice(empty, x, (0,) * x.ndim)

  return jax.tree.map(put, room, cache)


def response_hidden(params: Any, batch: ResponseBatch, *, policy: Any) -> chex.Array:
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
  policy: Any,
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
  policy: Any,
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
