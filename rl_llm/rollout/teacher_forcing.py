"""Log-probs of complete texts, such as demonstrations and preference pairs.

`rl_llm.rollout.response_logprobs` scores many responses to few prompts and reads each prompt once.
Here every row is a complete text, including its prompt, or several packed texts.
"""

from __future__ import annotations

from typing import Any

import chex
import jax.numpy as jnp

from rl_llm.logprobs import chunked_logprobs_and_entropy
from rl_llm.policy import Policy

CHUNK_SIZE = 256  # tokens whose logits one device holds at once


def teacher_forced_logprobs(
  params: Any,
  tokens: chex.Array,
  mask: chex.Array,
  positions: chex.Array,
  segment_ids: chex.Array,
  *,
  policy: Policy,
  temperature: chex.Array | float = 1.0,
  chunk_size: int | None = None,
) -> tuple[chex.Array, chex.Array]:
  """Log-probs and entropies of the trained tokens of whole sequences.

      logprobs[r, t] = log p(tokens[r, t] | the tokens before it in its own sequence)

  The arguments are the fields of a `SequenceBatch`, so a call reads
  `teacher_forced_logprobs(params, *batch, policy=policy)`. Logits are computed in chunks: [R, T, V]
  never exists, forward or backward. Column t is predicted at column t - 1; the shift happens only
  here. (A common mistake is to shift twice, once in the mask, which trains the model to write every
  answer one token late.)

  >>> import jax
  >>> from rl_llm.policy import make_policy, tiny_config
  >>> policy = make_policy(tiny_config(vocab_size=16))
  >>> shapes = jax.eval_shape(policy.init, jax.random.key(0))
  >>> params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)  # 16 tokens, equally likely.
  >>> tokens, mask = jnp.array([[5, 6, 7, 0]]), jnp.array([[False, False, True, False]])
  >>> logprobs, entropies = teacher_forced_logprobs(
  ...   params, tokens, mask, jnp.array([[0, 1, 2, 0]]), jnp.array([[1, 1, 1, -1]]), policy=policy)
  >>> jnp.exp(logprobs).round(4).tolist(), (logprobs == 0).tolist()
  ([[1.0, 1.0, 0.0625, 1.0]], [[True, True, False, True]])

  Args:
    params: the weights to score under.
    tokens: [R, T] int32.
    mask: [R, T] bool, True = trained on; never a sequence's first token.
    positions: [R, T] int32, from 0 in each sequence.
    segment_ids: [R, T] int32, which sequence of its row a token is in, from 1; -1 is padding.
    policy: the pure functions of `rl_llm.policy.Policy`.
    temperature: of the distribution; the same for a policy and its reference.
    chunk_size: tokens whose logits exist at once, on all devices together; None: CHUNK_SIZE on each
      device over which rows lie.

  Returns:
    logprobs [R, T] and entropies [R, T], float32, nats, 0 outside the mask.
  """
  hidden, _ = policy.hidden(params, tokens, positions, segment_ids)
  found = chunked_logprobs_and_entropy(
    hidden[:, :-1],
    policy.unembed(params).astype(hidden.dtype),
    tokens[:, 1:],
    chunk_size=chunk_size or CHUNK_SIZE * policy.row_shards,
    temperature=temperature,
    softcap=policy.config.final_softcap,
  )
  logprobs, entropies = (
    jnp.where(mask, jnp.pad(values, ((0, 0), (1, 0))), 0.0) for values in found
  )
  return logprobs, entropies
