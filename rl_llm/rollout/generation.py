"""Rollouts: prompts in, sampled responses out, as one compiled program.

Each *prompt* is prefilled once. Its keys and values are then shared by its G responses, and a
`lax.while_loop` decodes rows together until every row has ended. With fewer slots than responses, a
response that has ended makes room for the next, so that short answers do not wait for long ones.
The loop's whole state is one documented pytree, `DecodeState`. Weights are arguments, so a rollout
can never silently use stale weights. Each row has its own key, so its tokens depend only on its
problem and its key, and on nothing else in the batch.

Functions at the end bring a rollout to the host: checked, cut to its longest response, as text.
`rl_llm/rollout/decoding.py` has the steps of the loop, `rl_llm/rollout/sampling.py` how each draws
a token from its logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.prompts import bucket
from rl_llm.parallel.sharding import constrain, gather_to_host, whole_along_fsdp
from rl_llm.policy import Policy
from rl_llm.policy.layer_stack import cast_weights
from rl_llm.rollout.decoding import (
  DecodeState,
  Decoding,
  Prefilled,
  Requests,
  admit,
  admit_all,
  decode_step,
  first_state,
  prefill,
  requests_of,
)
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.finite import check_finite
from rl_llm.text.tokenizers import Tokenizer

# The row ended with an end-of-sequence token, which belongs to the response and is trained on.
STOP_EOS = 0
STOP_LENGTH = 1  # The row was cut off at max_new_tokens.


class Rollout(NamedTuple):
  """B = P * G responses, row b = p * G + g; t counts the tokens after the prompt."""

  tokens: chex.Array  # [B, T] int32, `pad_id` after the end
  mask: chex.Array  # [B, T] bool, True = produced by the policy, its end-of-sequence token included
  sampler_logprobs: chex.Array  # [B, T] float32, nats, of the full tempered distribution; 0 outside
  entropies: chex.Array  # [B, T] float32, nats, of the same distribution; 0 outside the mask
  lengths: chex.Array  # [B] int32, tokens in the mask
  stop_reason: chex.Array  # [B] int32, STOP_EOS or STOP_LENGTH


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


def sampling_layout(
  policy: Policy, mesh: jax.sharding.Mesh | None, *, gather: Literal["step", "token"]
) -> tuple[Policy, jax.sharding.Mesh | None, Callable[[Any], Any]]:
  """The policy and the mesh to sample with, and what is done to the weights before each rollout.

  Args:
    policy: the model's functions.
    mesh: the devices for the weights and the rows; None: the first device.
    gather: when a device gathers the weights that the mesh's `fsdp` cuts. "step": all before the
      first token, and keeps them; "token": each matrix at every token.
  """
  if gather == "token" or mesh is None or mesh.shape["fsdp"] == 1:
    return policy, mesh, lambda params: params
  mesh = whole_along_fsdp(mesh)
  policy = policy.over(mesh)
  return policy, mesh, functools.partial(gather_weights, dtype=policy.dtype, mesh=mesh)


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


def _decode_all(
  state: DecodeState, prefilled: Prefilled, requests: Requests, *, decoding: Decoding
) -> DecodeState:
  """Decodes until every row has ended."""
  rows, slots = len(state.tokens), decoding.slots

  def step(state: DecodeState) -> DecodeState:
    return decode_step(prefilled.params, state, requests, decoding=decoding)

  if slots == rows:
    state = admit_all(state, prefilled, decoding=decoding)
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
  policy: Policy,
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
  requests = requests_of(prompt_lengths, keys, sampling, responses_per_prompt)
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


def to_host(rollout: Rollout) -> Rollout:
  """The whole rollout as NumPy arrays; waits until the devices have finished it."""
  return Rollout(*(np.asarray(x) for x in gather_to_host(rollout)))


def checked(rollout: Rollout, params: Any) -> Rollout:
  """`to_host` of a rollout, after checking that its log-probs are finite.

  Args:
    rollout: sampled with `params`.
    params: the policy's weights, to name the cause in the error; None: not known.

  Raises:
    NotFiniteError: a sampled token's log-prob is not finite.
  """
  rollout = to_host(rollout)
  check_finite(rollout.sampler_logprobs, params, what="the log-probs of the sampled tokens")
  return rollout


def trim(rollout: Rollout) -> Rollout:
  """Brings a rollout to the host, without the columns that no response reached.

  The width is rounded up to a bucket, so an update compiles for few widths, and short responses do
  not cost as much as the longest response allowed.
  """
  rollout = to_host(rollout)
  width = min(bucket(int(rollout.lengths.max())), rollout.tokens.shape[1])
  return rollout._replace(
    tokens=rollout.tokens[:, :width],
    mask=rollout.mask[:, :width],
    sampler_logprobs=rollout.sampler_logprobs[:, :width],
    entropies=rollout.entropies[:, :width],
  )


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
  """The responses as text, without special tokens; lengths come from the sampler."""
  return [tokenizer.decode(tokens) for tokens in response_ids(rollout)]


def response_ids(rollout: Rollout) -> list[list[int]]:
  """The responses' tokens as they were sampled, including the token that ended them."""
  return [
    tokens[:length].tolist() for tokens, length in zip(rollout.tokens, rollout.lengths, strict=True)
  ]
