"""Log-probabilities and entropies of sampled tokens, from logits or straight from hidden states.

Both are those of the *tempered* distribution, softmax(logits / temperature): the one tokens were
drawn from. A sampler at temperature 0.7 and a trainer at 1 are two policies, and the KL between
them is not zero even if their weights are equal; so temperature is an argument everywhere.

The misconception is that memory goes into the network. A vocabulary of 49,152 makes the logits of 8
responses of 1,024 tokens 1.6 GB in float32, and autodiff keeps more than one such array; the
network that made them, SmolLM2, has 0.5 GB of weights. `chunked_logprobs_and_entropy` never builds
that array.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from rl_llm.masked import masked_mean, masked_sum
from rl_llm.types import (
  Array,
  at_least_float32,
  check_above,
  check_float,
  check_int,
  check_ndim,
  check_same_shape,
)


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
  """Entropy of the distribution each token was drawn from.

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
  possible = jnp.isfinite(logp)  # 0 log 0 = 0; replaced before the product, or its gradient is nan
  return jnp.sum(jnp.where(possible, -jnp.exp(logp) * jnp.where(possible, logp, 0), 0), axis=-1)


def sequence_logprobs(logprobs, mask, *, average=False) -> Array:
  """Log-prob of each response: the sum over its tokens, or their mean.

      sums[b] = sum_t mask[b, t] * logprobs[b, t]

  A response is as likely as the product of its tokens: 1/2 and 1/4 make 1/8.

  >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.25, 0.9]])), jnp.array([[True, True, False]])
  >>> float(jnp.exp(sequence_logprobs(logprobs, mask))[0])
  0.125

  Args:
    logprobs: [B, T] float, in nats.
    mask: [B, T] bool, the tokens the policy produced.
    average: divide by the number of tokens (IPO, SimPO, ORPO).

  Returns:
    [B] log-probs in nats, at least float32; 0 for a row without tokens.

  Raises:
    ValueError: shapes differ, or `mask` is not bool.
  """
  check_ndim("logprobs", logprobs, 2, "[B, T]")
  return (masked_mean if average else masked_sum)(logprobs, mask, axis=1)


def chunked_logprobs_and_entropy(
  hidden, unembedding, tokens, *, chunk_size, temperature=1.0, softcap=None
) -> tuple[Array, Array]:
  """Log-probs and entropies of sampled tokens from hidden states, without building [B, T, V].

      z       = hidden @ unembedding.T
      z       = softcap * tanh(z / softcap)        only if softcap is given
      z       = z / temperature
      logprob = z[token] - logsumexp(z)
      entropy = logsumexp(z) - sum(softmax(z) * z)

  At most `chunk_size` tokens have logits at a time, forward and backward: memory grows with
  `chunk_size * V`, not with `B * T * V`. The backward pass computes the logits of a chunk once more
  instead of keeping them (one matrix product in four), with

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
    chunk_size: the most tokens whose logits may exist at once; any number of tokens works.
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
  hidden, unembedding, tokens = map(jnp.asarray, (hidden, unembedding, tokens))
  check_same_shape("tokens", tokens, "hidden without its last axis", hidden[..., 0])
  width = hidden.shape[-1]
  if unembedding.shape[1] != width:
    raise ValueError(
      f"unembedding has shape {unembedding.shape}; it must be [V, D] with D = {width} as in "
      "hidden: transpose it if it is stored as [D, V]."
    )
  constants = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (temperature, softcap))
  constants = jax.lax.stop_gradient(constants)
  hidden = _split(hidden, tokens.shape, chunk_size)
  flat = _split(tokens, tokens.shape, chunk_size)
  logprobs, entropies = _chunks(hidden, unembedding, flat, *constants)
  return _join(logprobs, tokens.shape), _join(entropies, tokens.shape)


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
  """
  logits = _matmul(hidden, unembedding, contract=(jnp.ndim(hidden) - 1, 1))
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def map_chunks(f, chunk_size, *arrays) -> Array:
  """Computes one number per token, for at most `chunk_size` tokens at a time.

  Wrap `f` in `jax.checkpoint`, or what the backward pass needs of all chunks is kept.

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
  devices.
  """
  count = math.prod(shape)
  chunks = max(-(-count // chunk_size), 1)
  rows = -(-count // chunks)
  x = x.reshape(count, *x.shape[len(shape):])
  x = jnp.pad(x, ((0, rows * chunks - count), *((0, 0) for _ in x.shape[1:])))
  return x.reshape(rows, chunks, *x.shape[1:]).swapaxes(0, 1)


def _join(x, shape):
  """Undoes `_split`."""
  return x.swapaxes(0, 1).reshape(-1)[:math.prod(shape)].reshape(shape)


def _log_softmax(logits, temperature):
  check_above("temperature", temperature, 0)
  return jax.nn.log_softmax(at_least_float32(logits) / temperature, axis=-1)


@jax.custom_vjp
def _chunks(hidden, unembedding, tokens, temperature, softcap):
  """hidden [chunks, rows, D], tokens [chunks, rows] -> log-probs and entropies [chunks, rows]."""
  return _chunks_forward(hidden, unembedding, tokens, temperature, softcap)[0]


def _chunks_forward(hidden, unembedding, tokens, temperature, softcap):
  def chunk(x):
    hidden, tokens = x
    z, _ = _chunk_logits(hidden, unembedding, temperature, softcap)
    peak = jnp.max(z, axis=-1, keepdims=True)
    exps = jnp.exp(z - peak)
    total = jnp.sum(exps, axis=-1)
    mean = jnp.sum(exps * (z - peak), axis=-1) / total
    chosen = jnp.take_along_axis(z - peak, tokens[:, None], axis=-1)[:, 0]
    log_total = jnp.log(total)
    return chosen - log_total, log_total - mean, peak[:, 0] + log_total

  logprobs, entropies, normalisers = jax.lax.map(chunk, (hidden, tokens))
  residuals = (hidden, unembedding, tokens, temperature, softcap, entropies, normalisers)
  return (logprobs, entropies), residuals


def _chunks_backward(residuals, cotangents):
  hidden, unembedding, tokens, temperature, softcap, entropies, normalisers = residuals

  def chunk(unembedding_gradient, x):
    hidden, tokens, entropies, normalisers, of_logprobs, of_entropies = x
    z, slope = _chunk_logits(hidden, unembedding, temperature, softcap)
    logp = z - normalisers[:, None]
    of_p = of_logprobs[:, None] + of_entropies[:, None] * (logp + entropies[:, None])
    is_token = jnp.arange(unembedding.shape[0]) == tokens[:, None]
    of_z = jnp.where(is_token, of_logprobs[:, None], 0) - jnp.exp(logp) * of_p
    of_z = of_z * slope
    unembedding_gradient += _matmul(of_z, hidden, contract=(0, 0))
    return unembedding_gradient, _matmul(of_z, unembedding, contract=(1, 0)).astype(hidden.dtype)

  unembedding_gradient, hidden_gradient = jax.lax.scan(
    chunk,
    jnp.zeros(unembedding.shape, normalisers.dtype),
    (hidden, tokens, entropies, normalisers, *cotangents),
  )
  constants = jax.tree.map(jnp.zeros_like, (temperature, softcap))
  return hidden_gradient, unembedding_gradient.astype(unembedding.dtype), None, *constants


_chunks.defvjp(_chunks_forward, _chunks_backward)


def _chunk_logits(hidden, unembedding, temperature, softcap):
  """The logits z [rows, V] of a chunk in float32, and dz / d(hidden @ unembedding.T)."""
  z = _matmul(hidden, unembedding, contract=(1, 1))
  if softcap is None:
    return z / temperature, 1 / temperature
  bounded = jnp.tanh(z / softcap)
  return bounded * (softcap / temperature), (1 - jnp.square(bounded)) / temperature


def _matmul(a, b, *, contract):
  """Product over axis `contract[0]` of a and `contract[1]` of b, at least in float32."""
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  wide = jnp.promote_types(jnp.result_type(a, b), jnp.float32)
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide)
