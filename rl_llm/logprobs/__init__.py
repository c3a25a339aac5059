"""Log-probabilities and entropies of sampled tokens, from logits or straight from hidden states.

Both refer to the *tempered* distribution, softmax(logits / temperature), from which tokens were
drawn. A sampler at temperature 0.7 and a trainer at 1 are two policies, and the KL between them is
not zero even if their weights are equal; so temperature is an argument everywhere.

A common misconception is that the network takes most of the memory. With a vocabulary of 49,152,
the logits of 8 responses of 1,024 tokens take 1.6 GB in float32, and autodiff keeps more than one
such array; the network that computes them, SmolLM2, has 0.5 GB of weights.
`chunked_logprobs_and_entropy` never builds that array.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  Array,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_float,
  check_int,
  check_ndim,
  check_same_shape,
  wide_dtype,
)
from rl_llm.logprobs.blocks import blockwise, cut_of, devices, matmul, varying_alike
from rl_llm.logprobs.proximal import proximal_logprobs as proximal_logprobs
from rl_llm.masked import masked_mean, masked_sum


def token_logprobs(logits, tokens, *, temperature=1.0) -> Array:
  """Log-probs of the given tokens.

      logprobs = (logits / temperature)[tokens] - logsumexp(logits / temperature)

  Logits log 1 and log 3 are probabilities 1/4 and 3/4; at temperature 1/2 the odds are squared,
  1/10 and 9/10:

  >>> logits = jnp.log(jnp.array([[1.0, 3.0]]))
  >>> p = lambda t: jnp.exp(token_logprobs(logits, jnp.array([1]), temperature=t))
  >>> [round(float(p(t)[0]), 3) for t in (1, 0.5)]
  [0.75, 0.9]

  Args:
    logits: [..., V] float.
    tokens: [...] int, in [0, V).
    temperature: of the sampler, > 0.

  Returns:
    [...] log-probs in nats, at least float32.

  Raises:
    ValueError: dtypes or shapes do not fit, or `temperature` is not above 0.
  """
  check_float("logits", logits)
  check_int("tokens", tokens)
  if jnp.shape(tokens) != jnp.shape(logits)[:-1]:
    raise ValueError(
      f"tokens has shape {jnp.shape(tokens)}; it must be {jnp.shape(logits)[:-1]}, "
      "the shape of logits without its last axis."
    )
  logp = _log_softmax(logits, temperature)
  return jnp.take_along_axis(logp, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]


def entropy(logits, *, temperature=1.0) -> Array:
  """Entropy of the distribution that each token was drawn from.

      H = -sum_v p_v log p_v        p = softmax(logits / temperature)

  A fair choice among four tokens has entropy log 4 = 1.386, a certain one 0; -inf forbids a token:

  >>> logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, -jnp.inf, -jnp.inf, -jnp.inf]])
  >>> [round(float(h), 3) for h in entropy(logits)]
  [1.386, 0.0]

  Args:
    logits: [..., V] float.
    temperature: of the sampler, > 0.

  Returns:
    [...] entropies in nats, at least float32.

  Raises:
    ValueError: `logits` is not float, or `temperature` is not above 0.
  """
  check_float("logits", logits)
  logp = _log_softmax(logits, temperature)
  forbidden = logp == -jnp.inf  # 0 log 0 = 0; replaced before the product, or its gradient is nan
  return jnp.sum(jnp.where(forbidden, 0, -jnp.exp(logp) * jnp.where(forbidden, 0, logp)), axis=-1)


@any_mesh
def sequence_logprobs(logprobs, mask, *, average=False, tail_weight=1.0, head_length=None) -> Array:
  """Log-prob of each response: the sum over its tokens, or their mean.

      sums[b] = sum_t mask[b, t] * logprobs[b, t]

  A response's probability is the product of its tokens' probabilities: 1/2 and 1/4 make 1/8.

  >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.25, 0.9]])), jnp.array([[True, True, False]])
  >>> float(jnp.exp(sequence_logprobs(logprobs, mask))[0])
  0.125

  The longer answer of a pair has more terms, so a sum tells DPO about length more than anything
  else. LD-DPO counts tokens past the shorter answer's length only `tail_weight` times. Here the
  other answer has one token, and the tail of 1/4 counts half: 1/2 * sqrt(1/4)

  >>> p = sequence_logprobs(logprobs, mask, tail_weight=0.5, head_length=jnp.array([1]))
  >>> float(jnp.exp(p[0]).round(3))
  0.25

  Args:
    logprobs: [B, T] float, in nats.
    mask: [B, T] bool, the tokens the policy produced.
    average: divide by the number of tokens (IPO, SimPO, ORPO); a token of the tail counts whole.
    tail_weight: how much tokens after the head count, between 0 and 1; needs `head_length`.
    head_length: None (no tail), or [B] int, how many of a row's masked tokens come before the tail:
      for a pair, `jnp.minimum(chosen_mask.sum(1), rejected_mask.sum(1))`.

  Returns:
    [B] log-probs in nats, at least float32; 0 for a row without tokens.

  Raises:
    ValueError: shapes differ, `mask` is not bool, `head_length` is not int, or `tail_weight` is
      outside [0, 1] or has no `head_length`.

  Reference: LD-DPO: Liu et al., 2024, Length Desensitization in Direct Preference Optimization,
    https://arxiv.org/abs/2409.06411
  """
  check_ndim("logprobs", logprobs, 2, "[B, T]")
  check_between("tail_weight", tail_weight, 0, 1)
  if head_length is None:
    if not isinstance(tail_weight, int | float) or tail_weight != 1:
      raise ValueError(f"tail_weight is {tail_weight}; without head_length it must be 1.")
  else:
    check_int("head_length", head_length)
    if jnp.shape(head_length) != jnp.shape(mask)[:1]:
      raise ValueError(
        f"head_length has shape {jnp.shape(head_length)}; it must be [B] = {jnp.shape(mask)[:1]}."
      )
    count = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    tail = count > jnp.asarray(head_length, jnp.int32)[:, None]
    # Masked before the product, or an infinite log-prob outside the mask has gradient nan.
    logprobs = jnp.where(mask, at_least_float32(logprobs), 0) * jnp.where(tail, tail_weight, 1.0)
  return (masked_mean if average else masked_sum)(logprobs, mask, axis=1)


@any_mesh
def chunked_logprobs_and_entropy(
  hidden, unembedding, tokens, *, chunk_size, temperature=1.0, softcap=None
) -> tuple[Array, Array]:
  """Log-probs and entropies of sampled tokens from hidden states, without building [B, T, V].

      z       = hidden @ unembedding.T
      z       = softcap * tanh(z / softcap)        only if softcap is given
      z       = z / temperature
      logprob = z[token] - logsumexp(z)
      entropy = logsumexp(z) - sum(softmax(z) * z)

  At most `chunk_size * V` logits exist at a time, forward and backward, so memory grows with that
  and not with `B * T * V`. They are those of all tokens for a block of the vocabulary. The backward
  pass recomputes them instead of keeping them (one matrix product in four), unless there are only
  `chunk_size` tokens or fewer in all, with

      d logprob / d z_v = 1[v = token] - p_v        d entropy / d z_v = -p_v (log p_v + entropy)

  >>> hidden, tokens = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.array([[1, 0]])
  >>> unembedding = jnp.log(jnp.array([[1.0, 1.0], [3.0, 1.0]]))
  >>> logprobs, entropies = chunked_logprobs_and_entropy(hidden, unembedding, tokens, chunk_size=1)
  >>> [round(float(p), 3) for p in jnp.exp(logprobs)[0]]
  [0.75, 0.5]
  >>> [round(float(h), 3) for h in entropies[0]]
  [0.562, 0.693]

  Args:
    hidden: [..., D] float, the last hidden states; products with them are accumulated in float32.
    unembedding: [V, D] float, such as the embedding matrix as it is stored.
    tokens: [...] int, in [0, V).
    chunk_size: as many logits may exist at once as this many tokens have; any number of tokens and
      any V will do.
    temperature: of the sampler, > 0; a constant.
    softcap: Gemma's bound on the logits, > 0, or None; a constant.

  Returns:
    Log-probs and entropies, each [...], in nats, at least float32.

  Raises:
    ValueError: dtypes or shapes do not fit, or a number is out of range.
  """
  check_float("hidden", hidden)
  check_float("unembedding", unembedding)
  check_int("tokens", tokens)
  check_ndim("unembedding", unembedding, 2, "[V, D]")
  check_above("chunk_size", chunk_size, 0)
  check_above("temperature", temperature, 0)
  check_above("softcap", softcap, 0)
  hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
  tokens = jnp.asarray(tokens, jnp.int32)
  check_same_shape("tokens", tokens, "hidden without its last axis", hidden[..., 0])
  width = hidden.shape[-1]
  if unembedding.shape[1] != width:
    raise ValueError(
      f"unembedding has shape {unembedding.shape}; it must be [V, D] with D = {width} as in "
      "hidden: transpose it if it is stored as [D, V]."
    )
  wide = wide_dtype(hidden, unembedding)
  constants = jax.tree.map(lambda x: jnp.asarray(x, wide), (temperature, softcap))
  blocks = max(min(-(-tokens.size // chunk_size), len(unembedding)), 1)
  hidden, unembedding = varying_alike(hidden, unembedding, tokens)
  # Flat, so that the unembedding's gradient sums over one axis; over two a CPU would transpose.
  flat = blockwise(
    hidden.reshape(-1, width),
    unembedding,
    tokens.reshape(-1),
    *jax.lax.stop_gradient(constants),
    cut_of(unembedding, blocks),
  )
  return jax.tree.map(lambda x: x.reshape(tokens.shape), flat)


def unembed(hidden, unembedding, *, softcap=None) -> Array:
  """Logits of hidden states, before any temperature.

      logits = hidden @ unembedding.T
      logits = softcap * tanh(logits / softcap)        only if softcap is given

  >>> unembed(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [1.0, 1.0]])).tolist()
  [1.0, 3.0]

  Args:
    hidden: [..., D] float, the last hidden states.
    unembedding: [V, D] float, such as the embedding matrix as it is stored.
    softcap: Gemma's bound on the logits, > 0, or None.

  Returns:
    [..., V], at least float32.

  Raises:
    ValueError: `softcap` is not above 0.
  """
  check_above("softcap", softcap, 0)
  logits = matmul(hidden, unembedding, contract=((jnp.ndim(hidden) - 1,), (1,)))
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@any_mesh
def map_chunks(f, chunk_size, *arrays) -> Array:
  """Computes one number per token, for at most `chunk_size` tokens at a time.

  Wrap `f` in `jax.checkpoint`, or everything that the backward pass needs is kept for all chunks.

  >>> map_chunks(lambda x: x.sum(axis=1), 2, jnp.ones((1, 3, 4))).tolist()
  [[4.0, 4.0, 4.0]]

  Args:
    f: a function of arrays [N, D], one for each of `arrays`, that returns [N].
    chunk_size: the most tokens that `f` may see at once.
    *arrays: [..., D], the leading axes the same; the last may differ.

  Returns:
    [...], the leading axes.
  """
  shape = arrays[0].shape[:-1]
  outputs = jax.lax.map(lambda chunk: f(*chunk), [_split(x, shape, chunk_size) for x in arrays])
  return _join(outputs, shape)


def _split(x, shape, chunk_size):
  """[*shape, ...] -> [chunks, rows, ...], padded with zeros.

  Chunk i takes every `chunks`-th token: if the batch is sharded, so is each chunk, over all
  devices, if some number of chunks allows it.
  """
  count = math.prod(shape)
  chunks = max(-(-count // chunk_size), 1)
  shards = math.gcd(count, devices(x))
  if shards > 1:
    chunks = next((n for n in range(chunks, 4 * chunks) if count % (n * shards) == 0), chunks)
  rows = -(-count // chunks)
  x = x.reshape(count, *x.shape[len(shape) :])
  x = jnp.pad(x, ((0, rows * chunks - count), *((0, 0) for _ in x.shape[1:])))
  return x.reshape(rows, chunks, *x.shape[1:]).swapaxes(0, 1)


def _join(x, shape):
  """Undoes `_split`."""
  return x.swapaxes(0, 1).reshape(-1)[: math.prod(shape)].reshape(shape)


def _log_softmax(logits, temperature):
  check_above("temperature", temperature, 0)
  return jax.nn.log_softmax(at_least_float32(logits) / temperature, axis=-1)
