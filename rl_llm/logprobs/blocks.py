"""Log-probs and entropies for a block of the vocabulary at a time, forward and backward.

`rl_llm.logprobs.chunked_logprobs_and_entropy` calls this once its arguments are checked. It works
on blocks of the vocabulary rather than of the tokens, since each row of the unembedding's gradient
is then complete when its block is done: nothing of the size of the unembedding is accumulated.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from rl_llm.checks import wide_dtype

# The logit of a missing token: exp of it is 0, and so is 0 times it.
NO_LOGIT = -1e30


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise(hidden, unembedding, tokens, temperature, softcap, cut):
  """Log-probs and entropies [N] of tokens [N] from hidden [N, D] and unembedding [V, D].

  Temperature and softcap (or None) are constants; `cut` is from `cut_of`.
  """
  return _forward(hidden, unembedding, tokens, temperature, softcap, cut)[0]


def _forward(hidden, unembedding, tokens, temperature, softcap, cut):
  folded = _fold(unembedding, cut)

  def block(carry, i):
    peak, total, mean, chosen = carry
    z, row = _block_logits(i, hidden, folded, tokens, temperature, softcap, cut, len(unembedding))
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
  residuals = (hidden, unembedding, tokens, temperature, softcap, entropies, peak + log_total, kept)
  return (logprobs, entropies), residuals


def _backward(cut, residuals, cotangents):
  hidden, unembedding, tokens, temperature, softcap, entropies, normalisers, kept = residuals
  of_logprobs, of_entropies = (x[..., None] for x in cotangents)
  entropies, normalisers = entropies[..., None], normalisers[..., None]
  folded = _fold(unembedding, cut)

  def block(carry, index_and_logits):
    of_hidden, of_unembedding = carry
    i, z = index_and_logits
    if z is None:
      z, _ = _block_logits(i, hidden, folded, tokens, temperature, softcap, cut, len(unembedding))
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
    of_rows = matmul(_as_short(of_z, hidden), hidden, contract=(leading, leading))
    of_rows = of_rows.astype(folded.dtype)
    of_hidden += matmul(_as_short(of_z, rows), rows, contract=((tokens.ndim,), (0,)))
    of_rows = of_rows.reshape(cut.groups, cut.rows, -1)
    of_unembedding = jax.lax.dynamic_update_slice_in_dim(
      of_unembedding, of_rows, cut.start(i), axis=1
    )
    return (of_hidden, of_unembedding), None

  start = jnp.zeros_like(hidden, temperature.dtype), jnp.zeros_like(folded)
  (of_hidden, of_unembedding), _ = jax.lax.scan(block, start, (cut.indices(), kept))
  of_unembedding = of_unembedding.reshape(-1, hidden.shape[-1])[: len(unembedding)]
  constants = jax.tree.map(jnp.zeros_like, (temperature, softcap))
  return of_hidden.astype(hidden.dtype), of_unembedding, None, *constants


blockwise.defvjp(_forward, _backward)


def varying_alike(hidden, unembedding, tokens):
  """Inside `jax.shard_map`: the two floats, varying over every axis that one of the three does.

  A loop's state may not start to vary midway, and the gradient of an unembedding that is the same
  on all devices must be summed over them. Adding an empty sum, which varies, achieves both.
  """
  if AxisType.Manual not in jax.typeof(hidden).sharding.mesh.axis_types:
    return hidden, unembedding
  of_nothing = [jnp.sum(x.reshape(-1)[:0]) for x in (hidden, unembedding, tokens)]
  return tuple(x + sum(n.astype(x.dtype) for n in of_nothing) for x in (hidden, unembedding))


class Cut(NamedTuple):
  """How the vocabulary is cut: into equal groups, with some rows of each in a block."""

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


def cut_of(unembedding, blocks):
  """The cut into at least this many blocks.

  A sharded vocabulary must be cut so that each block lies on all its devices, or it is gathered
  whole, so the number of groups is a multiple of the number of shards. The compiler decides which
  axes of a mesh shard it, but their sizes divide both V and the number of devices.
  """
  vocabulary = len(unembedding)
  # A number of blocks that divides V needs no padded copy of the unembedding.
  even = next((n for n in range(blocks, 2 * blocks) if vocabulary % n == 0), blocks)
  groups = -(-vocabulary // even)
  shards = math.gcd(vocabulary, devices(unembedding))
  rows = vocabulary // shards // blocks
  if shards == 1 or rows == 0 or (vocabulary % even == 0 and groups % shards == 0):
    return Cut(groups, even, 1)
  return Cut(shards, vocabulary // shards, rows)


def devices(x):
  """The number of devices over which the compiler may have laid out `x`."""
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
  z = matmul(hidden, rows, contract=((tokens.ndim,), (1,)))
  z = (z if softcap is None else softcap * jnp.tanh(z / softcap)) / temperature
  if cut.groups * cut.size > vocabulary or cut.blocks * cut.rows > cut.size:
    place, group = (jnp.arange(n, dtype=jnp.int32) for n in (cut.rows, cut.groups))
    ids = (group * cut.size)[:, None] + (cut.start(i) + place)[None]
    counted = (ids < vocabulary) & (place < cut.start(i + 1) - cut.start(i))[None]
    z = jnp.where(counted.reshape(1, -1), z, NO_LOGIT)
  return z, row


def _as_short(slopes, other):
  """The slopes in bfloat16 if that is what they are multiplied with, so that the product is too.

  A product of float32 and bfloat16 is made in float32, at a quarter of an accelerator's speed or
  less. Rounding changes a slope by 2^-8 of itself at most; the sums are in float32 either way.
  """
  return slopes.astype(other.dtype) if other.dtype == jnp.bfloat16 else slopes


def matmul(a, b, *, contract):
  """Product over the axes `contract[0]` of a and `contract[1]` of b, at least in float32."""
  dimensions = (contract, ((), ()))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide_dtype(a, b))
