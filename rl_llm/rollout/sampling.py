"""From logits to the next token: (key, logits) -> token, one row at a time or a whole batch.

The sampler and the trainer must use the same distribution. So the log-probs and entropies reported
here are always those of the *full tempered* distribution, `softmax(logits / temperature)`, even if
top-k, top-p or a minimum length restricted the choice. With these, the sampler draws from another
distribution than the one that is trained, so training refuses top-k and top-p unless asked for. A
minimum length only masks end-of-sequence tokens at first, so the caller may use it freely.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["temperature"],
  meta_fields=["top_k", "top_p", "min_new_tokens"],
)
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How to choose the next token. `temperature` is data and may differ by row; the rest is static.

  Attributes:
    temperature: float or [B] float, >= 0. 0 is greedy, and its log-probs are reported at
      temperature 1.
    top_k: keep the k likeliest tokens; 0 keeps all.
    top_p: keep the likeliest tokens until their probabilities reach p, in (0, 1]; 1 keeps all.
    min_new_tokens: end-of-sequence tokens are not chosen until there are this many tokens.
  """

  temperature: chex.Array | float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_new_tokens: int = 0

  def per_row(self, rows: int) -> SamplingConfig:
    """The same with one temperature a row, [rows] float32: one type, so that a shape compiles once.

    >>> SamplingConfig(0.5).per_row(2).temperature.tolist()
    [0.5, 0.5]
    """
    temperature = jnp.broadcast_to(jnp.asarray(self.temperature, jnp.float32), (rows,))
    return dataclasses.replace(self, temperature=temperature)


class Sample(NamedTuple):
  """One token for each row, with its log-prob and the entropy of the distribution."""

  token: chex.Array  # [B] int32
  logprob: chex.Array  # [B] float32, nats, under the full tempered distribution
  entropy: chex.Array  # [B] float32, nats, of the full tempered distribution


def sample(
  keys: chex.Array,
  logits: chex.Array,
  config: SamplingConfig,
  *,
  suppress: chex.Array | None = None,
) -> Sample:
  """Draws one token per row; reports its log-prob and entropy in the full tempered distribution.

  Drawing needs one uniform number per row, not one per logit: with p = softmax(logits /
    temperature) and u in [0, 1), the token is the first whose cumulative probability exceeds u
    (inversion), which is exact up to float32 rounding.

      logprob = logits[token] / T - logsumexp(logits / T)        entropy = -sum(p log p)

  Two tokens with odds 3 to 1: the entropy is -(0.75 log 0.75 + 0.25 log 0.25) = 0.562 nats.

  >>> keys = jax.random.split(jax.random.key(0), 1)
  >>> drawn = sample(keys, jnp.log(jnp.array([[3.0, 1.0]])), SamplingConfig())
  >>> round(float(drawn.entropy[0]), 3)
  0.562

  Args:
    keys: [B] typed PRNG keys, one per row; each is consumed.
    logits: [B, V] float; computations use float32.
    config: see `SamplingConfig`.
    suppress: [B, V] bool or None; True tokens are not chosen (their probability still counts in
      logprob and entropy).

  Returns:
    A `Sample` of [B] arrays.
  """
  chex.assert_rank(logits, 2)
  rows, vocab = logits.shape
  logits = logits.astype(jnp.float32)
  temperature = jnp.broadcast_to(jnp.asarray(config.temperature, jnp.float32), (rows,))
  greedy = temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, temperature)[:, None]
  shifted = scaled - jnp.max(scaled, axis=-1, keepdims=True)
  exponentials = jnp.exp(shifted)
  total = jnp.sum(exponentials, axis=-1)
  log_total = jnp.log(total)
  # H = log Z - E[x]: `where` keeps 0 * -inf (a token of probability zero) out of the sum.
  expected = jnp.sum(jnp.where(exponentials > 0, exponentials * shifted, 0.0), axis=-1) / total
  entropy = log_total - expected

  candidates = shifted if suppress is None else jnp.where(suppress, -jnp.inf, shifted)
  if config.top_k and config.top_k < vocab:
    candidates = _keep_top_k(candidates, config.top_k)
  if config.top_p < 1.0:
    candidates = _keep_top_p(candidates, config.top_p)
  if candidates is shifted:
    masses = exponentials
  else:  # Re-centre, since the likeliest tokens may be suppressed.
    masses = jnp.exp(candidates - jnp.max(candidates, axis=-1, keepdims=True))

  def likeliest() -> chex.Array:
    allowed = logits if suppress is None else jnp.where(suppress, -jnp.inf, logits)
    return jnp.argmax(allowed, axis=-1).astype(jnp.int32)

  uniform = jax.vmap(lambda key: jax.random.uniform(key))(keys)
  token = _invert(masses, uniform).astype(jnp.int32)
  # On a CPU, argmax takes longer than all of the above. It is taken of the logits: what a branch
  # reads must lie in memory, so `candidates` would be written out at every token.
  token = jax.lax.cond(
    jnp.any(greedy), lambda: jnp.where(greedy, likeliest(), token), lambda: token
  )
  logprob = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0] - log_total
  return Sample(token, logprob, entropy)


def _invert(masses: chex.Array, uniform: chex.Array, block: int = 256) -> chex.Array:
  """The first index whose cumulative mass exceeds `uniform` of the total: [B, V], [B] -> [B].

  Searches in two levels, first blocks and then one block's entries, since a cumulative sum over a
  whole vocabulary is slow and, in float32, loses small masses.
  """
  rows, vocab = masses.shape
  blocks = -(-vocab // block)
  masses = jnp.pad(masses, ((0, 0), (0, blocks * block - vocab))).reshape(rows, blocks, block)
  block_index, before = _first_exceeding(jnp.sum(masses, axis=-1), uniform)
  chosen = jnp.take_along_axis(masses, block_index[:, None, None], axis=1)[:, 0]
  within, _ = _first_exceeding(chosen, before)
  return block_index * block + within


def _first_exceeding(masses: chex.Array, fraction: chex.Array) -> tuple[chex.Array, chex.Array]:
  """The first index whose cumulative mass exceeds the fraction, and the fraction left inside it."""
  cumulative = jnp.cumsum(masses, axis=-1)
  target = fraction * cumulative[:, -1]
  index = jnp.sum(cumulative <= target[:, None], axis=-1)
  # Rounding may push the target up to the total: then take the last entry with any mass, never an
  # empty one.
  last = masses.shape[-1] - 1 - jnp.argmax((masses > 0)[:, ::-1], axis=-1)
  index = jnp.minimum(index, last)
  mass = jnp.take_along_axis(masses, index[:, None], axis=-1)[:, 0]
  before = jnp.take_along_axis(cumulative, index[:, None], axis=-1)[:, 0] - mass
  return index, jnp.clip((target - before) / mass, 0.0, 1.0)


def _keep_top_k(logits: chex.Array, k: int) -> chex.Array:
  threshold = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits >= threshold, logits, -jnp.inf)


def _keep_top_p(logits: chex.Array, p: float) -> chex.Array:
  """Keeps the smallest set of likeliest tokens whose probabilities reach p, at least one token."""
  descending = -jnp.sort(-logits, axis=-1)
  probabilities = jax.nn.softmax(descending, axis=-1)
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  kept = jnp.sum(before < p, axis=-1, keepdims=True)
  threshold = jnp.take_along_axis(descending, kept - 1, axis=-1)
  return jnp.where(logits >= threshold, logits, -jnp.inf)
