"""One response, token by token as it is sampled: for a person who reads along."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rl_llm.data.prompts import pad_prompts
from rl_llm.policy import Policy
from rl_llm.rollout.decoding import (
  DecodeState,
  Decoding,
  Prefilled,
  Requests,
  admit_all,
  decode_step,
  first_state,
  prefill,
  requests_of,
)
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.text.tokenizers import Tokenizer


def stream(
  params: Any,
  prompt: Sequence[int],
  key: chex.Array,
  sampling: SamplingConfig,
  *,
  policy: Policy,
  tokenizer: Tokenizer,
  max_new_tokens: int,
) -> Iterator[int]:
  """The tokens of the response that `generate` would sample, each as soon as it is drawn.

  It returns to the host at every token, which `generate` does not, so it is for one reader.

  Args:
    params: the policy's weights.
    prompt: [L] its tokens.
    key: typed key of the response.
    sampling: how tokens are chosen.
    policy: the pure functions of `rl_llm.policy.Policy`.
    tokenizer: the model's; its `eos_ids` end the response.
    max_new_tokens: T, the limit of the response's length.

  Yields:
    Token ids, the one that ends the response included.
  """
  padded = pad_prompts([prompt], pad_id=tokenizer.pad_id)
  decoding = Decoding(policy, 1, max_new_tokens, tuple(tokenizer.eos_ids), 1)
  requests = requests_of(padded.lengths, key[None], sampling, 1)
  batch = jnp.asarray(padded.tokens), requests.prompt_lengths, requests
  prefilled, state = _begin(params, *batch, pad_id=tokenizer.pad_id, decoding=decoding)
  yield int(prefilled.first.token[0])
  while state.alive[0]:
    state = _step(prefilled.params, state, requests, decoding=decoding)
    yield int(state.last[0])


@functools.partial(jax.jit, static_argnames=("pad_id", "decoding"))
def _begin(
  params: Any,
  prompts: chex.Array,
  lengths: chex.Array,
  requests: Requests,
  *,
  pad_id: int,
  decoding: Decoding,
) -> tuple[Prefilled, DecodeState]:
  prefilled = prefill(params, prompts, lengths, requests, decoding=decoding)
  state = first_state(prefilled, pad_id=pad_id, decoding=decoding)
  return prefilled, admit_all(state, prefilled, decoding=decoding)


_step = jax.jit(decode_step, static_argnames="decoding", donate_argnums=1)
