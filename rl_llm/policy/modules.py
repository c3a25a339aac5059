"""The Flax modules of a decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from rl_llm.policy.attention import Kernel, Visible, attend, fused_attend, takes
from rl_llm.policy.configs import TransformerConfig
from rl_llm.policy.layer_stack import rematerialized
from rl_llm.policy.positions import apply_rope, make_geometry

Params = dict[str, Any]

# Up to this many rows a CPU multiplies faster with the matrix first: see `times_transposed`.
FEW_ROWS = 128


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, in float32; Gemma's scale is stored less 1."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    plus_one = self.config.norm_plus_one
    initializer = nn.initializers.zeros if plus_one else nn.initializers.ones

    def normalize(x: chex.Array, scale: chex.Array) -> chex.Array:
      wide, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
      mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
      normed = wide * jax.lax.rsqrt(mean_square + self.config.rms_eps)
      return (normed * (1.0 + scale if plus_one else scale)).astype(x.dtype)

    scale = self.param("scale", initializer, (x.shape[-1],))
    return rematerialized(normalize)(_flat(x), scale).reshape(x.shape)


def _flat(x: chex.Array) -> chex.Array:
  """[B, T, D] as [B * T, D]: a weight's gradient then sums over one axis, and a CPU need not
  transpose activations for it, nor sum with one core where B is 1."""
  return x.reshape(-1, x.shape[-1])


def times_transposed(x: chex.Array, weight: chex.Array, *, dtype: Any = None) -> chex.Array:
  """x @ weight.T. Decoding multiplies few rows with a large matrix, and a CPU's library repacks the
  second operand at every product: with the matrix first it packs the few rows instead, and 32 rows
  take two thirds of the time.

  >>> times_transposed(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]])).tolist()
  [[11.0, 17.0]]

  Args:
    x: [N, D] float.
    weight: [F, D] float.
    dtype: of the sums and the result; None for x's.

  Returns:
    [N, F].
  """

  def rows_first(x: chex.Array, weight: chex.Array) -> chex.Array:
    return jnp.einsum("nd,fd->nf", x, weight, preferred_element_type=dtype)

  def matrix_first(x: chex.Array, weight: chex.Array) -> chex.Array:
    product = jnp.einsum("fd,nd->fn", weight, x, preferred_element_type=dtype)
    # Without the barrier the compiler merges both into one product again, rows first.
    return jax.lax.optimization_barrier(product).T

  if len(x) > FEW_ROWS:
    return rows_first(x, weight)
  return jax.lax.platform_dependent(x, weight, cpu=matrix_first, default=rows_first)


def _product(x: chex.Array, weight: chex.Array) -> chex.Array:
  """x @ weight.T; with copies of the weight (`sharding.copy_to_rows`), each part of the rows with
  its own."""
  if weight.ndim == 2:
    return times_transposed(x, weight)
  parts = x.reshape(len(weight), -1, x.shape[-1])
  return jnp.einsum("ptd,pfd->ptf", parts, weight).reshape(*x.shape[:-1], -1)


class Linear(nn.Module):
  """x @ weight.T + bias. `weight` is [out, in], as Hugging Face stores it and unlike `nn.Dense`:
  decoding a few rows on a CPU takes a tenth less time than with [in, out]. Adapters next to it
  (`rl_llm.policy.lora`) are added."""

  features: int
  use_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Any, before: Callable[[Any], chex.Array] | None = None) -> chex.Array:
    """Applies to `before(x)`, which the backward pass recomputes instead of keeping; None: to x."""
    if self.is_initializing():
      x, before = x if before is None else before(x), None
      shape = x.shape[-1], self.features
      self.param("weight", lambda key: nn.initializers.lecun_normal()(key, shape).T)
      if self.use_bias:
        self.param("bias", nn.initializers.zeros, (self.features,))
    weights = {name: w.astype(self.dtype) for name, w in self.variables["params"].items()}

    def multiply(x: Any, weights: Params) -> chex.Array:
      x = (x if before is None else before(x)).astype(self.dtype)
      y = _product(x, weights["weight"])
      if "lora_a" in weights:
        narrow = jnp.einsum("...d,rd->...r", x, weights["lora_a"])
        y = y + weights["lora_scale"] * jnp.einsum("...r,fr->...f", narrow, weights["lora_b"])
      return y + weights["bias"] if self.use_bias else y

    return multiply(x, weights) if before is None else rematerialized(multiply)(x, weights)


def rematerialized_attention(query, keys, values, mask, *, config: TransformerConfig) -> chex.Array:
  """Plain attention, over a cache's layout. Scores and their softmax take queries times keys times
  heads numbers and are cheap to recompute, so they are not kept for the backward pass."""
  plain = functools.partial(attend, scale=config.attention_scale, cap=config.attn_softcap)
  return rematerialized(lambda qkv, mask: plain(*qkv, mask))((query, keys, values), mask)


def masked_attention(
  query: chex.Array,
  keys: chex.Array,
  values: chex.Array,
  visible: Visible,
  *,
  config: TransformerConfig,
  kernel: Kernel | None,
  first_column: int = 0,
) -> chex.Array:
  """What queries [B, T, N, H] take from keys and values [B, S, K, H], by the kernel if there is one
  for it."""
  cap = config.attn_softcap
  if takes(kernel, query, *keys.shape[1:3], cap=cap):
    return fused_attend(
      query,
      keys,
      values,
      visible,
      kernel=kernel,
      first_column=first_column,
      window=config.sliding_window,
      scale=config.attention_scale,
      cap=cap,
    )
  keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
  return rematerialized_attention(query, keys, values, visible.mask, config=config)


# (query [B, T, N, H], key [B, T, K, H], value [B, T, K, H]) -> (out [B, T, N, H], what is kept)
Mix = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]


class Attention(nn.Module):
  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: chex.Array, rope: Any, mix: Mix) -> tuple[chex.Array, Any]:
    """x [B, T, D], rope (cos, sin); `mix` decides what sees what, the rest works token by token."""
    config = self.config
    flat = _flat(x)

    def project(name: str, heads: int) -> chex.Array:
      linear = Linear(heads * config.head_dim, config.qkv_bias, self.dtype, name=name)
      return linear(flat).reshape(*x.shape[:2], heads, config.head_dim)

    query = project("query", config.n_heads)
    key = project("key", config.n_kv_heads)
    value = project("value", config.n_kv_heads)
    if config.qk_norm:
      query = RMSNorm(config, name="query_norm")(query)
      key = RMSNorm(config, name="key_norm")(key)
    out, kept = mix(apply_rope(query, *rope), apply_rope(key, *rope), value)
    linear = Linear(config.width, False, self.dtype, name="output")
    return linear(out.reshape(*flat.shape[:1], -1)).reshape(x.shape), kept


class MLP(nn.Module):
  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x):
    linear = functools.partial(Linear, use_bias=False, dtype=self.dtype)
    silu = self.config.activation == "silu"

    def gated(halves: tuple[chex.Array, chex.Array]) -> chex.Array:
      gate, up = halves
      return (nn.silu(gate) if silu else nn.gelu(gate, approximate=True)) * up

    flat = _flat(x)
    halves = tuple(linear(self.config.mlp_width, name=name)(flat) for name in ("gate", "up"))
    return linear(self.config.width, name="down")(halves, before=gated).reshape(x.shape)


class Block(nn.Module):
  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x: chex.Array, rope: Any, mix: Mix) -> tuple[chex.Array, Any]:
    config = self.config

    def post(name: str, y: chex.Array) -> chex.Array:
      return RMSNorm(config, name=name)(y) if config.post_norms else y

    y, kept = Attention(config, self.dtype, name="attention")(
      RMSNorm(config, name="attention_norm")(x), rope, mix
    )
    x = x + post("attention_post_norm", y)
    y = MLP(config, self.dtype, name="mlp")(RMSNorm(config, name="mlp_norm")(x))
    return x + post("mlp_post_norm", y), kept


class Table(nn.Module):
  """A [V, D] matrix, one row a token."""

  config: TransformerConfig

  @nn.compact
  def __call__(self) -> chex.Array:
    shape = (self.config.vocab_size, self.config.width)
    return self.param("embedding", nn.initializers.normal(0.02), shape)


class Transformer(nn.Module):
  """All weights by name, for `init`; a pass runs `Block`s of them, as `make_policy` says."""

  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, tokens):
    config = self.config
    # Only `unembed` reads it; a trunk whose head is another (a reward model's) need not have it.
    if not config.tie_embeddings:
      Table(config, name="unembed")()
    x = jnp.take(Table(config, name="embed")(), tokens, axis=0).astype(self.dtype)
    zeros = jnp.zeros_like(tokens)
    rope, visible = make_geometry(config, zeros, zeros, zeros, zeros).of(False)

    def mix(*made: chex.Array) -> tuple[chex.Array, None]:
      return masked_attention(*made, visible, config=config, kernel=None), None

    for layer in range(config.n_layers):
      x, _ = Block(config, self.dtype, name=f"layers_{layer}")(x, rope, mix)
    return RMSNorm(config, name="final_norm")(x)
