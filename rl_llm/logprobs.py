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

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from rl_llm.masked import masked_mean, masked_sum
from rl_llm.meshes import any_mesh
from rl_llm.types import (
  Array,
  at_least_float32,
  check_above,
  check_between,
  check_float,
  check_int,
  check_ndim,
  check_same_shape,
  wide_dtype,
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
  forbidden = logp == -jnp.inf  # 0 log 0 = 0; replaced before the product, or its gradient is nan
  return jnp.sum(jnp.where(forbidden, 0, -jnp.exp(logp) * jnp.where(forbidden, 0, logp)), axis=-1)


@any_mesh
def sequence_logprobs(
  logprobs, mask, *, average=False, tail_weight=1.0, head_length=None
) -> Array:
  """Log-prob of each response: the sum over its tokens, or their mean.

      sums[b] = sum_t mask[b, t] * logprobs[b, t]

  A response is as likely as the product of its tokens: 1/2 and 1/4 make 1/8.

  >>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.25, 0.9]])), jnp.array([[True, True, False]])
  >>> float(jnp.exp(sequence_logprobs(logprobs, mask))[0])
  0.125

  The longer answer of a pair has more terms, so a sum tells DPO the length first of all. LD-DPO
  counts tokens past the shorter answer's length only `tail_weight` times. Here the other answer has
  one token, and the tail of 1/4 counts half: 1/2 * sqrt(1/4)

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

  No more logits exist at a time than `chunk_size` tokens have, forward and backward: memory grows
  with `chunk_size * V`, not with `B * T * V`. They are those of all tokens for a share of the
  vocabulary. The backward pass computes them once more instead of keeping them (one matrix product
  in four), unless they are those of `chunk_size` tokens or fewer in all, with

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
      any V work.
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
  hidden, unembedding = _varying_alike(hidden, unembedding, tokens)
  # Flat, so that the unembedding's gradient sums over one axis: over two, a CPU transposes.
  flat = _blockwise(
    hidden.reshape(-1, width), unembedding, tokens.reshape(-1),
    *jax.lax.stop_gradient(constants), _cut(unembedding, blocks),
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
  logits = _matmul(hidden, unembedding, contract=((jnp.ndim(hidden) - 1,), (1,)))
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@any_mesh
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


# What stands for the logit of no token: exp of it is 0, and so is 0 times it.
NO_LOGIT = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(hidden, unembedding, tokens, temperature, softcap, cut):
  """Log-probs and entropies, for a block of the vocabulary at a time.

  Blocks of the vocabulary rather than of the tokens, since each row of the unembedding's gradient
  is then complete when its block is done: nothing of the size of the unembedding is accumulated.
  """
  return _blockwise_forward(hidden, unembedding, tokens, temperature, softcap, cut)[0]


def _blockwise_forward(hidden, unembedding, tokens, temperature, softcap, cut):
  folded = _fold(unembedding, cut)

  def block(carry, i):
    peak, total, mean, chosen = carry
    z, row = _block_logits(
      i, hidden, folded, tokens, temperature, softcap, cut, len(unembedding))
    # One block is small enough to keep: the backward pass asks for it.
    kept = z if cut.blocks == 1 else None
    new_peak = jnp.maximum(peak, jnp.max(z, axis=-1))
    shift = peak - new_peak
    scale = jnp.exp(shift)
    z = z - new_peak[..., None]
    exps = jnp.exp(z)
    mean = scale * (mean + shift * total) + jnp.sum(exps * z, axis=-1)
    total = scale * total + jnp.sum(exps, axis=-1)
    here = jnp.take_along_axis(z, jnp.maximum(row, 0)[..., None], axis=-1)[..., 0]
    return (new_peak, total, mean, jnp.where(row >= 0, here + new_peak, chosen)), kept

  zeros = jnp.zeros_like(hidden[:, 0], temperature.dtype)
  carry, kept = jax.lax.scan(block, (zeros + NO_LOGIT, zeros, zeros, zeros), cut.indices())
  peak, total, mean, chosen = carry
  log_total = jnp.log(total)
  logprobs, entropies = chosen - peak - log_total, log_total - mean / total
  residuals = (
    hidden, unembedding, tokens, temperature, softcap, entropies, peak + log_total, kept)
  return (logprobs, entropies), residuals


def _blockwise_backward(cut, residuals, cotangents):
  hidden, unembedding, tokens, temperature, softcap, entropies, normalisers, kept = residuals
  of_logprobs, of_entropies = (x[..., None] for x in cotangents)
  entropies, normalisers = entropies[..., None], normalisers[..., None]
  folded = _fold(unembedding, cut)

  def block(carry, index_and_logits):
    of_hidden, of_unembedding = carry
    i, z = index_and_logits
    if z is None:
      z, _ = _block_logits(
        i, hidden, folded, tokens, temperature, softcap, cut, len(unembedding))
    rows, row = _block_rows(i, folded, tokens, cut)
    slope = 1 / temperature
    if softcap is not None:
      bounded = jnp.clip(z * temperature / softcap, -1, 1)  # NO_LOGIT is beyond.
      slope = (1 - jnp.square(bounded)) / temperature
    logp = z - normalisers
    of_p = of_logprobs + of_entropies * (logp + entropies)
    is_token = jnp.arange(len(rows), dtype=jnp.int32)[None] == row[:, None]
    of_z = (jnp.where(is_token, of_logprobs, 0) - jnp.exp(logp) * of_p) * slope
    leading = tuple(range(tokens.ndim))
    of_rows = _matmul(of_z, hidden, contract=(leading, leading)).astype(folded.dtype)
    of_hidden += _matmul(of_z, rows, contract=((tokens.ndim,), (0,)))
    of_rows = of_rows.reshape(cut.groups, cut.rows, -1)
    of_unembedding = jax.lax.dynamic_update_slice_in_dim(
      of_unembedding, of_rows, cut.start(i), axis=1)
    return (of_hidden, of_unembedding), None

  start = jnp.zeros_like(hidden, temperature.dtype), jnp.zeros_like(folded)
  (of_hidden, of_unembedding), _ = jax.lax.scan(block, start, (cut.indices(), kept))
  of_unembedding = of_unembedding.reshape(-1, hidden.shape[-1])[:len(unembedding)]
  constants = jax.tree.map(jnp.zeros_like, (temperature, softcap))
  return of_hidden.astype(hidden.dtype), of_unembedding, None, *constants


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _varying_alike(hidden, unembedding, tokens):
  """Inside `jax.shard_map`: the two floats, varying over every axis that one of the three does.

  A loop's state may not begin to vary, and the gradient of an unembedding that is the same on all
  devices must be summed over them. Adding something that varies, a sum of nothing, does both.
  """
  if AxisType.Manual not in jax.typeof(hidden).sharding.mesh.axis_types:
    return hidden, unembedding
  of_nothing = [jnp.sum(x.reshape(-1)[:0]) for x in (hidden, unembedding, tokens)]
  return tuple(x + sum(n.astype(x.dtype) for n in of_nothing) for x in (hidden, unembedding))


class _Cut(NamedTuple):
  """How the vocabulary is cut: into equal groups, of which a block has some rows each."""

  groups: int
  size: int  # of a group; groups * size is V, or more
  rows: int  # of each group in a block

  @property
  def blocks(self) -> int:
    return -(-self.size // self.rows)

  def indices(self):
    return jnp.arange(self.blocks, dtype=jnp.int32)

  def start(self, i):
    """Where block i begins in its groups: the last one ends with them, the first overlaps."""
    return jnp.maximum(self.size - (self.blocks - i) * self.rows, 0)


def _cut(unembedding, blocks):
  """The cut into at least so many blocks.

  A sharded vocabulary must be cut so that each block lies on all its devices, or it is gathered
  whole: the number of groups is a multiple of that of the shards. Which axes of a mesh shard it is
  left to the compiler, but their sizes divide both V and the number of devices.
  """
  vocabulary = len(unembedding)
  # A number of blocks that divides V needs no padded copy of the unembedding.
  even = next((n for n in range(blocks, 2 * blocks) if vocabulary % n == 0), blocks)
  groups = -(-vocabulary // even)
  shards = math.gcd(vocabulary, _devices(unembedding))
  rows = vocabulary // shards // blocks
  if shards == 1 or rows == 0 or (vocabulary % even == 0 and groups % shards == 0):
    return _Cut(groups, even, 1)
  return _Cut(shards, vocabulary // shards, rows)


def _devices(x):
  """Over how many devices the compiler may have laid `x`."""
  mesh = jax.typeof(x).sharding.mesh
  types = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
  return math.prod(size for size, kind in types if kind == AxisType.Auto)


def _fold(unembedding, cut):
  """[V, D] -> [groups, size, D], padded if need be."""
  vocabulary, width = unembedding.shape
  padding = cut.groups * cut.size - vocabulary
  if padding:
    unembedding = jnp.pad(unembedding, ((0, padding), (0, 0)))
  return unembedding.reshape(cut.groups, cut.size, width)


def _block_rows(i, folded, tokens, cut):
  """Of block i: its rows of the unembedding, and which of them is the token's, or -1."""
  rows = jax.lax.dynamic_slice_in_dim(folded, cut.start(i), cut.rows, axis=1)
  place = tokens % cut.size - cut.start(i)
  here = (place >= 0) & (place < cut.start(i + 1) - cut.start(i))
  row = jnp.where(here, tokens // cut.size * cut.rows + place, -1)
  return rows.reshape(-1, folded.shape[-1]), row


def _block_logits(i, hidden, folded, tokens, temperature, softcap, cut, vocabulary):
  """Of block i: the tempered logits, and which of them is the token's, or -1."""
  rows, row = _block_rows(i, folded, tokens, cut)
  z = _matmul(hidden, rows, contract=((tokens.ndim,), (1,)))
  z = (z if softcap is None else softcap * jnp.tanh(z / softcap)) / temperature
  if cut.groups * cut.size > vocabulary or cut.blocks * cut.rows > cut.size:
    place, group = (jnp.arange(n, dtype=jnp.int32) for n in (cut.rows, cut.groups))
    ids = (group * cut.size)[:, None] + (cut.start(i) + place)[None]
    counted = (ids < vocabulary) & (place < cut.start(i + 1) - cut.start(i))[None]
    z = jnp.where(counted.reshape(1, -1), z, NO_LOGIT)
  return z, row


def _matmul(a, b, *, contract):
  """Product over the axes `contract[0]` of a and `contract[1]` of b, at least in float32."""
  dimensions = (contract, ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide_dtype(a, b))
