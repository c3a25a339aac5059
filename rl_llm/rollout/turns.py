"""Episodes of several turns, sampled in three compiled pieces over one state on the device.

    start          reads each prompt once, and draws the first token of every row
    decode_turns   decodes until each row has ended its turn
    append         reads what the environment answered, and draws the first token of the next turn

The environment runs on the host, between the second and the third. All that was read stays in the
cache meanwhile: token t of a row lies in column L + t, whoever wrote it, so nothing is read twice
and no id that the model sampled is ever decoded and encoded again.

A row that waits, or whose episode is over, is computed along with the others. What it computes is
hidden from all that follows (segment -1), and its own next token overwrites it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.prompts import PromptBatch, bucket
from rl_llm.parallel.sharding import constrain_rows, shard_rows
from rl_llm.policy import Policy
from rl_llm.policy.layer_stack import cast_weights
from rl_llm.rollout.decoding import Decoding, Requests, draw, ends, prefill, requests_of, shared_out
from rl_llm.rollout.generation import sampling_layout
from rl_llm.rollout.sampling import Sample, SamplingConfig
from rl_llm.text.tokenizers import Tokenizer

NO_TURN = -1  # in `TurnState.turns`: the environment's tokens, and columns after the end


class TurnState(NamedTuple):
  """All that the three pieces read and write: B = P * G episodes of at most T tokens."""

  cache: Any  # the policy's cache, [B, L + T, ...]; token t of a row is in column L + t
  length: chex.Array  # [B] int32, tokens of the row, the model's and the environment's
  written: chex.Array  # [B] int32, tokens of the row's last turn
  turn: chex.Array  # [B] int32, number of the row's last turn, from 0
  last: chex.Array  # [B] int32, the last sampled token: the next pass reads it
  alive: chex.Array  # [B] bool, its turn has not ended
  ended: chex.Array  # [B] bool, its last turn ended with a token that ends turns
  tokens: chex.Array  # [B, T] int32
  mask: chex.Array  # [B, T] bool, True = sampled
  logprobs: chex.Array  # [B, T] float32, 0 outside the mask
  entropies: chex.Array  # [B, T] float32, 0 outside the mask
  turns: chex.Array  # [B, T] int32, the turn that a sampled token is in; NO_TURN elsewhere


class Turns(NamedTuple):
  """What episodes of several turns have next to their tokens."""

  ids: np.ndarray  # [B, T] int32, the turn that a sampled token is in, from 0; -1 elsewhere
  rewards: np.ndarray  # [B, N] float32, of each turn; the last turn's has the episode's own


class TurnDecoding(NamedTuple):
  """The static settings of the three pieces: hashable, without arrays."""

  decoding: Decoding  # its `max_new_tokens` is T, of the episode; its `slots` are B
  turn_tokens: int  # the most tokens of one turn
  pad_id: int  # fills rows after their end
  mesh: jax.sharding.Mesh | None = None  # over which the rows lie; None: the first device


class Running(NamedTuple):
  """Episodes under way on the device."""

  state: TurnState  # after a turn of each row; the device may still be decoding it
  # (state, {row: the ids of what its environment said}) -> the state after those rows' next turn
  resume: Callable[[TurnState, Mapping[int, Sequence[int]]], TurnState]


# (params) -> ((prompts, keys, sampling, responses_per_prompt) -> Running): the weights are gathered
# and rounded once, for all turns and parts of a rollout.
Begin = Callable[[Any], Callable[[PromptBatch, jax.Array, SamplingConfig, int], Running]]


@functools.partial(jax.jit, static_argnames="settings")
def start(
  params: Any,
  prompts: chex.Array,
  prompt_lengths: chex.Array,
  requests: Requests,
  *,
  settings: TurnDecoding,
) -> TurnState:
  """Reads every prompt once, shares it out to its G rows, and draws each row's first token.

  Args:
    params: the policy's weights.
    prompts: [P, L] int32, left-padded.
    prompt_lengths: [P] int32, from 1 to L.
    requests: from `rl_llm.rollout.decoding.requests_of`.
    settings: of the episodes.
  """
  decoding = settings.decoding
  rows, tokens = len(requests.keys), decoding.max_new_tokens
  prefilled = prefill(params, prompts, prompt_lengths, requests, decoding=decoding)
  empty = decoding.policy.init_cache(rows, prompts.shape[1] + tokens)
  none = jnp.zeros((rows,), jnp.int32)
  state = TurnState(
    cache=shared_out(prefilled, empty, decoding=decoding)._replace(cursor=none),
    length=none,
    written=none,
    turn=none - 1,
    last=none,
    alive=jnp.zeros((rows,), bool),
    ended=jnp.zeros((rows,), bool),
    tokens=jnp.full((rows, tokens), settings.pad_id, jnp.int32),
    mask=jnp.zeros((rows, tokens), bool),
    logprobs=jnp.zeros((rows, tokens)),
    entropies=jnp.zeros((rows, tokens)),
    turns=jnp.full((rows, tokens), NO_TURN, jnp.int32),
  )
  state = _begin_turn(state, prefilled.first, jnp.ones((rows,), bool), settings)
  return _by_rows(state, settings)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def decode_turns(
  params: Any, state: TurnState, requests: Requests, *, settings: TurnDecoding
) -> TurnState:
  """Decodes until each row has ended its turn, by a token that ends turns or by a limit.

  Args:
    params: the policy's weights.
    state: from `start` or `append`; donated.
    requests: from `requests_of`.
    settings: of the episodes.
  """
  params = cast_weights(params, settings.decoding.policy.dtype)

  def step(state: TurnState) -> TurnState:
    decoding, rows = settings.decoding, jnp.arange(len(state.length))
    tokens, positions = state.last[:, None], (requests.prompt_lengths + state.length - 1)[:, None]
    hidden, cache = decoding.policy.hidden(
      params, tokens, positions, jnp.where(state.alive, 0, -1)[:, None], _at(state, settings)
    )
    drawn = draw(
      params, hidden[:, 0], rows, state.length, requests, decoding=decoding, written=state.written
    )
    return _put(state._replace(cache=cache), drawn, state.alive, settings)

  state = jax.lax.while_loop(lambda state: jnp.any(state.alive), step, state)
  return _by_rows(state, settings)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def append(
  params: Any,
  state: TurnState,
  requests: Requests,
  observations: chex.Array,
  lengths: chex.Array,
  continues: chex.Array,
  *,
  settings: TurnDecoding,
) -> TurnState:
  """Reads ragged observations into the cache, and draws the first token of the next turn.

  The last token of a turn is not in the cache yet, since nothing came after it: it is read here,
  with the observation.

  Args:
    params: the policy's weights.
    state: from `decode_turns`; donated.
    requests: from `requests_of`.
    observations: [B, O] int32, right-padded.
    lengths: [B] int32, tokens of each, from 0 to O.
    continues: [B] bool, True = the row has another turn. Its length and the observation's must
      leave room for a token: length + lengths < T.
    settings: of the episodes.
  """
  decoding = settings.decoding
  params = cast_weights(params, decoding.policy.dtype)
  rows, offsets = jnp.arange(len(state.length)), jnp.arange(observations.shape[1] + 1)[None, :]
  read = jnp.concatenate([state.last[:, None], observations], axis=1)
  own = continues[:, None] & (offsets <= lengths[:, None])
  hidden, cache = decoding.policy.hidden(
    params,
    read,
    (requests.prompt_lengths + state.length - 1)[:, None] + offsets,
    jnp.where(own, 0, -1),
    _at(state, settings),
  )
  last = jnp.take_along_axis(hidden, lengths[:, None, None], axis=1)[:, 0]
  # Columns beyond the last are dropped, those of padding and of rows that have ended among them.
  column = jnp.where(own[:, 1:], state.length[:, None] + offsets[:, :-1], state.tokens.shape[1])
  length = jnp.where(continues, state.length + lengths, state.length)
  none = jnp.zeros_like(state.written)
  drawn = draw(params, last, rows, length, requests, decoding=decoding, written=none)
  state = state._replace(
    cache=cache,
    length=length,
    tokens=state.tokens.at[rows[:, None], column].set(observations, mode="drop"),
  )
  return _by_rows(_begin_turn(state, drawn, continues, settings), settings)


def _at(state: TurnState, settings: TurnDecoding) -> Any:
  """The cache, about to be written where each row's last sampled token belongs."""
  columns = state.cache.positions.shape[1] - settings.decoding.max_new_tokens
  return state.cache._replace(cursor=columns + state.length - 1)


def _by_rows(state: TurnState, settings: TurnDecoding) -> TurnState:
  """Keeps each device on its own rows, so that each piece has one layout to compile for."""
  return state if settings.mesh is None else constrain_rows(state, settings.mesh)


def _begin_turn(
  state: TurnState, drawn: Sample, begins: chex.Array, settings: TurnDecoding
) -> TurnState:
  """The state with the first token of a new turn in the rows that begin one."""
  state = state._replace(
    turn=state.turn + begins,
    written=jnp.where(begins, 0, state.written),
    ended=state.ended & ~begins,
  )
  return _put(state, drawn, begins, settings)


def _put(state: TurnState, drawn: Sample, writes: chex.Array, settings: TurnDecoding) -> TurnState:
  """The state with these tokens at the end of the rows that write one."""
  rows, tokens = jnp.arange(len(state.length)), settings.decoding.max_new_tokens
  at = rows, jnp.where(writes, state.length, tokens)  # Columns beyond the last are dropped.
  length, written = state.length + writes, state.written + writes
  ended = ends(drawn.token, settings.decoding)
  within = (written < settings.turn_tokens) & (length < tokens)
  return state._replace(
    length=length,
    written=written,
    last=jnp.where(writes, drawn.token, state.last),
    # A log-prob is NaN if a logit is not a number: `rl_llm.runs.finite` stops the run.
    alive=writes & ~ended & within & ~jnp.isnan(drawn.logprob),
    ended=jnp.where(writes, ended, state.ended),
    tokens=state.tokens.at[at].set(drawn.token, mode="drop"),
    mask=state.mask.at[at].set(True, mode="drop"),
    logprobs=state.logprobs.at[at].set(drawn.logprob, mode="drop"),
    entropies=state.entropies.at[at].set(drawn.entropy, mode="drop"),
    turns=state.turns.at[at].set(state.turn, mode="drop"),
  )


def make_begin(
  policy: Policy,
  tokenizer: Tokenizer,
  *,
  turn_tokens: int,
  episode_tokens: int,
  say: Callable[[str], None],
  timed: Callable[[str], AbstractContextManager] = contextlib.nullcontext,
  mesh: jax.sharding.Mesh | None = None,
  gather: Literal["step", "token"] = "step",
) -> Begin:
  """The three pieces for one model; it announces each shape that it compiles for.

  Args:
    policy: the model's functions.
    tokenizer: its tokenizer, which knows what ends a turn.
    turn_tokens: the most tokens of a turn.
    episode_tokens: T, of an episode, what its environment says included.
    say: shows a line.
    timed: opens a block in which a line is shown, such as `Console.timed`.
    mesh, gather: as for `rl_llm.rollout.generation.sampling_layout`.
  """
  announce = functools.cache(say)
  policy, mesh, before = sampling_layout(policy, mesh, gather=gather)

  def begin(params):
    return functools.partial(run, cast_weights(before(params), policy.dtype))

  def run(params, prompts, keys, sampling, group):
    (count, columns), rows = prompts.tokens.shape, len(keys)
    if beyond := policy.config.length_note(int(max(prompts.lengths)) + episode_tokens):
      announce(beyond)
    decoding = Decoding(policy, group, episode_tokens, tokenizer.eos_ids, rows)
    settings = TurnDecoding(decoding, turn_tokens, tokenizer.pad_id, mesh)
    requests = requests_of(np.asarray(prompts.lengths), keys, sampling, group)
    requests = shard_rows(requests, mesh)
    of_prompts = shard_rows((prompts.tokens, prompts.lengths), mesh)

    def resume(state, said):
      width = bucket(max(map(len, said.values())))
      observations = np.full((rows, width), tokenizer.pad_id, np.int32)
      lengths, continues = np.zeros(rows, np.int32), np.zeros(rows, bool)
      for row, ids in said.items():
        observations[row, : len(ids)], lengths[row], continues[row] = ids, len(ids), True
      read = shard_rows((observations, lengths, continues), mesh)
      with timed(f"compiling the reading of answers: {rows} rows of up to {width} tokens"):
        state = append(params, state, requests, *read, settings=settings)
      return decode_turns(params, state, requests, settings=settings)

    with timed(f"compiling the episodes: {count} prompts of up to {columns} tokens x {group} rows"):
      state = start(params, *of_prompts, requests, settings=settings)
      state = decode_turns(params, state, requests, settings=settings)
    return Running(state, resume)

  return begin
