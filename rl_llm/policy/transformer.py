"""A decoder-only transformer as pure functions of its weights.

Weights are a plain nested dict, one subtree a layer, so that paths read like
`layers_3/attention/query/weight`. How the layers are run, one after another or as a loop over their
stack, is decided in `rl_llm.policy.layers` and changes nothing in this tree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.policy.configs import RopeScaling, TransformerConfig
from rl_llm.policy.layers import run_layers
from rl_llm.sharding import constrain, constrain_rows, copy_to_rows, row_shards

Params = dict[str, Any]

# Up to so many rows a CPU multiplies sooner with the matrix first: see `times_transposed`.
FEW_ROWS = 128


class Cache(NamedTuple):
  """What has been read, so that a decode step computes one token: S columns, `cursor` written.

  Every leaf but `cursor` has the batch first, so rows can be repeated or gathered with
  `jax.tree.map`. Keys and values lie as a decode step multiplies them: with heads after columns,
  or keys with their columns first, a CPU rearranges the whole cache at every token.
  """

  keys: tuple[chex.Array, ...]  # one a layer, [B, K, H, S] in the compute dtype, rotated
  values: tuple[chex.Array, ...]  # one a layer, [B, K, S, H] in the compute dtype
  segment_ids: chex.Array  # [B, S] int32, -1 = padding or not yet written
  positions: chex.Array  # [B, S] int32
  cursor: chex.Array  # int32 scalar, the column the next token goes to, the same for all rows


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model as pure functions; hashable, so it can be a static argument. Weights are
  always an argument, never held.

  The token at column t of `tokens` sees, and `hidden[:, t]` predicts the token at t + 1 from, the
  keys at columns s <= t with

      segment_ids[s] != -1  and  segment_ids[s] in (segment_ids[t], 0)

  so -1 is padding on either side, 0 a prefix that everyone sees, and 1, 2, ... sequences packed in
  one row (or responses that share the prefix) that do not see one another. Sliding layers also need
  `positions[t] - positions[s] < sliding_window`. Columns of a cache that the T tokens do not take
  count as earlier wherever they lie, so its columns can be written in a circle.
  """

  config: TransformerConfig
  # init(key) -> params, float32
  init: Callable[[chex.Array], Params]
  # hidden(params, tokens [B, T], positions [B, T], segment_ids=None [B, T], cache=None)
  #   -> (hidden [B, T, D] in the compute dtype, cache). Without segment_ids nothing is padding.
  #   With a cache the T tokens are written at columns cursor .. cursor + T, which the caller keeps
  #   within the cache's length, and also see what it holds.
  hidden: Callable[..., tuple[chex.Array, Cache | None]]
  # shared_hidden(params, prompts, following) -> (hidden [P, L, D], hidden [B, T, D]), B = P * G
  #   Each of the two is (tokens, positions, segment_ids). Row b of `following` also sees row b // G
  #   of `prompts`, which is read once: the same as `hidden` of the prompts into a cache, shared out
  #   to G copies, and `hidden` of what follows, but no layer's keys and values outlive the layer.
  shared_hidden: Callable[..., tuple[chex.Array, chex.Array]]
  # unembed(params) -> [V, D], the matrix whose rows score hidden states
  unembed: Callable[[Params], chex.Array]
  # init_cache(batch, length) -> an empty Cache of S = length columns
  init_cache: Callable[[int, int], Cache]
  # logits(params, hidden [..., D]) -> [..., V] float32, soft-capped where the model is
  logits: Callable[[Params, chex.Array], chex.Array]
  # over how many devices the rows of a batch lie: what is limited at once on each may be as many
  # times as much in all
  row_shards: int = 1
  # over(mesh) -> the policy of the same settings for weights and rows that lie over another mesh
  over: Callable[[jax.sharding.Mesh], Policy] | None = None
  # of the arithmetic
  dtype: Any = jnp.float32


def make_policy(
  config: TransformerConfig,
  *,
  dtype: Any = jnp.float32,
  remat: bool = False,
  scan_layers: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Policy:
  """The pure functions of a model of this shape; the same arguments give the same object, so
  nothing compiles twice.

  >>> from rl_llm.policy.configs import tiny_config
  >>> policy = make_policy(tiny_config(vocab_size=32))
  >>> params = jax.jit(policy.init)(jax.random.key(0))
  >>> tokens, positions = jnp.array([[5, 6, 7]]), jnp.array([[0, 1, 2]])
  >>> hidden, _ = jax.jit(policy.hidden)(params, tokens, positions)
  >>> hidden.shape, policy.logits(params, hidden).shape
  ((1, 3, 64), (1, 3, 32))

  Args:
    config: the model's shape.
    dtype: of the arithmetic between float32 islands (norms, RoPE, softmax, logits). Weights stay as
      they are and are cast where they are used: a decode loop in bfloat16 wants them cast once,
      before it.
    remat: forget each layer's activations and compute them again in the backward pass: memory for
      about a third more time.
    scan_layers: compile one layer and loop over their stack, wherever several tokens of a row are
      read at once: a deep model then compiles several times sooner. Decoding stays unrolled. It
      changes results by rounding.
    mesh: the devices over which weights and rows lie, from `rl_llm.sharding.make_mesh`; None where
      there is one.

  Returns:
    A `Policy`.
  """
  # One spelling of the arguments for each policy, or the cache would hold several.
  return _make_policy(config, jnp.dtype(dtype), remat, scan_layers, mesh)


@functools.cache
def _make_policy(
  config: TransformerConfig,
  dtype: Any,
  remat: bool,
  scan_layers: bool,
  mesh: jax.sharding.Mesh | None,
) -> Policy:
  model = Transformer(config, dtype)
  block, norm = Block(config, dtype), RMSNorm(config)
  settings = {"remat": remat, "dtype": dtype, "mesh": mesh}
  sliding = [config.is_sliding(layer) for layer in range(config.n_layers)]
  shards = 1 if mesh is None else row_shards(mesh)

  def init(key: chex.Array) -> Params:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  def embed(params: Params, tokens: chex.Array) -> chex.Array:
    x = jnp.take(params["embed"]["embedding"], tokens, axis=0).astype(dtype)
    return by_rows(x * jnp.asarray(config.embed_scale, dtype))

  def by_rows(x: chex.Array) -> chex.Array:
    """Keeps each device at its own rows, where they can be divided."""
    return constrain_rows(x, mesh) if mesh is not None and divide(x.shape[0]) else x

  def divide(rows: int) -> bool:
    return rows % shards == 0

  def lay(rows: int, tokens: int) -> Callable[[Params, jax.sharding.Mesh], Params]:
    """How matrices lie that meet so many: few tokens are sent sooner than a matrix."""
    many = tokens >= config.width
    return copy_to_rows if shards > 1 and many and divide(rows) else constrain

  def layers_of(params: Params) -> list[Params]:
    return [params[f"layers_{layer}"] for layer in range(config.n_layers)]

  def read(x, weights, geometry: Geometry, is_sliding, cached, cursor):
    rope_and_mask = geometry.of(is_sliding)
    x, cached = block.apply({"params": weights}, by_rows(x), *rope_and_mask, cached, cursor)
    return by_rows(x), cached

  def final(params: Params, x: chex.Array) -> chex.Array:
    return norm.apply({"params": params["final_norm"]}, x)

  def hidden(
    params: Params,
    tokens: chex.Array,
    positions: chex.Array,
    segment_ids: chex.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[chex.Array, Cache | None]:
    if segment_ids is None:
      segment_ids = jnp.zeros_like(positions)
    if tokens.ndim != 2:
      raise ValueError(f"tokens: shape {tokens.shape}, must be [B, T]; add the batch axis")
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
      if value.shape != tokens.shape:
        raise ValueError(f"{name}: shape {value.shape}, must be that of tokens, {tokens.shape}")
    if cache is not None and (
      cache.positions.shape[0] != tokens.shape[0] or cache.positions.shape[1] < tokens.shape[1]
    ):
      raise ValueError(
        f"cache: made for [B, S] = {cache.positions.shape}, tokens are [B, T] = {tokens.shape}; "
        f"use init_cache({tokens.shape[0]}, length) with length >= all tokens to be read"
      )
    positions, segment_ids = positions.astype(jnp.int32), segment_ids.astype(jnp.int32)
    key_segments, key_positions, cursor = segment_ids, positions, 0
    if cache is not None:
      cursor = cache.cursor
      key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cursor))
      key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cursor))
    geometry = make_geometry(config, segment_ids, key_segments, positions, key_positions, cursor)

    def body(x, weights, is_sliding, cached):
      return read(x, weights, geometry, is_sliding, cached, cursor)

    x, layers = run_layers(
      body,
      embed(params, tokens),
      layers_of(params),
      sliding,
      None if cache is None else list(zip(cache.keys, cache.values, strict=True)),
      scan=scan_layers and tokens.shape[1] > 1,
      lay=lay(len(tokens), tokens.size),
      **settings,
    )
    x = final(params, x)
    if cache is None:
      return x, None
    keys, values = zip(*layers, strict=True)
    return x, Cache(keys, values, key_segments, key_positions, cursor + tokens.shape[1])

  def shared_hidden(params: Params, prompts: Any, following: Any) -> tuple[chex.Array, chex.Array]:
    (tokens, positions, segments), (more, more_positions, more_segments) = jax.tree.map(
      lambda x: x.astype(jnp.int32), (tuple(prompts), tuple(following))
    )
    (rows, columns), copies = tokens.shape, more.shape[0] // tokens.shape[0]
    if copies * rows != more.shape[0]:
      raise ValueError(f"following: {more.shape[0]} rows are not a multiple of prompts' {rows}")

    def share(x):
      return jnp.repeat(x, copies, axis=0)

    of_prompts = make_geometry(config, segments, segments, positions, positions)
    of_following = make_geometry(
      config,
      more_segments,
      jnp.concatenate([share(segments), more_segments], axis=1),
      more_positions,
      jnp.concatenate([share(positions), more_positions], axis=1),
      columns,
    )
    empty = init_cache(rows, columns)

    def body(xs, weights, is_sliding, _):
      x, y = xs
      # A cache of one layer, just as long as the prompts.
      cached = empty.keys[0], empty.values[0]
      x, (keys, values) = read(x, weights, of_prompts, is_sliding, cached, 0)
      room = (0, more.shape[1])
      none = (0, 0)
      cached = (
        jnp.pad(share(keys), (none, none, none, room)),
        jnp.pad(share(values), (none, none, room, none)),
      )
      y, _ = read(y, weights, of_following, is_sliding, cached, columns)
      return (x, y), None

    (x, y), _ = run_layers(
      body,
      (embed(params, tokens), embed(params, more)),
      layers_of(params),
      sliding,
      scan=scan_layers,
      lay=lay(rows, tokens.size + more.size),
      **settings,
    )
    return final(params, x), final(params, y)

  def unembed(params: Params) -> chex.Array:
    return params["embed" if config.tie_embeddings else "unembed"]["embedding"]

  def init_cache(batch: int, length: int) -> Cache:
    def empty(*columns: int) -> tuple[chex.Array, ...]:
      shape = (batch, config.n_kv_heads, *columns)
      return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layers))

    return Cache(
      keys=empty(config.head_dim, length),
      values=empty(length, config.head_dim),
      segment_ids=jnp.full((batch, length), -1, jnp.int32),
      positions=jnp.zeros((batch, length), jnp.int32),
      cursor=jnp.zeros((), jnp.int32),
    )

  def logits(params: Params, hidden: chex.Array) -> chex.Array:
    table = unembed(params).astype(hidden.dtype)
    scores = times_transposed(hidden.reshape(-1, hidden.shape[-1]), table, dtype=jnp.float32)
    return softcap(scores.reshape(*hidden.shape[:-1], -1), config.final_softcap)

  def over(mesh: jax.sharding.Mesh) -> Policy:
    return _make_policy(config, dtype, remat, scan_layers, mesh)

  return Policy(
    config, init, hidden, shared_hidden, unembed, init_cache, logits, shards, over, dtype
  )


def softcap(x: chex.Array, cap: float | None) -> chex.Array:
  """cap * tanh(x / cap): nearly x where |x| is small beside `cap`, never beyond it; None leaves x
  alone.

  >>> round(float(softcap(jnp.array(30.0), 30.0)), 2)  # 30 tanh(1)
  22.85
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
  """Radians per position of each rotated pair: theta^(-2i / head_dim), slowed down as `scaling`
  says.

  >>> rope_frequencies(4, 10_000.0).tolist()
  [1.0, 0.01]
  >>> rope_frequencies(4, 10_000.0, RopeScaling("linear", 2.0)).tolist()
  [0.5, 0.005]

  Args:
    head_dim: H, floats per head.
    theta: base of the wavelengths.
    scaling: None for none.

  Returns:
    [H / 2] float64.
  """
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is None:
    return frequencies
  if scaling.kind == "linear":
    return frequencies / scaling.factor
  # How many full turns a pair makes within the original context decides: few -> slowed, many ->
  # kept.
  turns = scaling.original_max_position * frequencies / (2 * np.pi)
  span = scaling.high_freq_factor - scaling.low_freq_factor
  keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
  return frequencies * (keep + (1.0 - keep) / scaling.factor)


def apply_rope(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
  """Rotates pair (i, i + H / 2) of every head by its angle, in float32.

  A quarter turn takes (1, 0) to (0, 1):

  >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
  >>> apply_rope(x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))).tolist()
  [[[[0.0, 1.0]]]]

  Args:
    x: [B, T, heads, H] float.
    cos: [B, T, H / 2] float32, of the angles position * frequency.
    sin: [B, T, H / 2] float32.

  Returns:
    [B, T, heads, H] in x's dtype.
  """
  halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
  cos, sin = cos[:, :, None, None, :], jnp.stack([-sin, sin], axis=-2)[:, :, None]
  # Swapped, not split and joined: one fused loop, where a CPU takes several for a concatenation.
  rotated = halves * cos + halves[..., ::-1, :] * sin
  return rotated.reshape(x.shape).astype(x.dtype)


def attention_mask(
  query_segments: chex.Array,
  key_segments: chex.Array,
  query_positions: chex.Array,
  key_positions: chex.Array,
  first_column: chex.Array | int = 0,
  window: int | None = None,
) -> chex.Array:
  """Which keys each query sees: the one place where causality, padding, packing and windows are
  decided (see `Policy`). Queries stand at columns first_column .. first_column + T of the keys; all
  keys at other columns were written before them.

  Padding, then a two-token sequence:

  >>> segments, positions = jnp.array([[-1, 0, 0]]), jnp.array([[0, 0, 1]])
  >>> attention_mask(segments, segments, positions, positions)[0, 0].astype(int).tolist()
  [[0, 0, 0], [0, 1, 0], [0, 1, 1]]

  Args:
    query_segments: [B, T] int32.
    key_segments: [B, S] int32, -1 = never seen.
    query_positions: [B, T] int32.
    key_positions: [B, S] int32.
    first_column: the key column that holds the first query's own key.
    window: how many positions back a query sees, its own included; None for all.

  Returns:
    [B, 1, T, S] bool.
  """
  query, key = query_segments[:, :, None], key_segments[:, None, :]
  # How far a key lies behind the first query's. What a cache holds was written before, also behind.
  behind = (jnp.arange(key_segments.shape[1]) - first_column)[None, :]
  length = query_segments.shape[1]
  causal = (behind <= jnp.arange(length)[:, None]) | (behind >= length)
  seen = (key != -1) & ((key == query) | (key == 0)) & causal
  if window is not None:
    seen &= query_positions[:, :, None] - key_positions[:, None, :] < window
  return seen[:, None]


class Geometry(NamedTuple):
  """Where a pass's tokens stand and what they see: ((cos, sin), mask), in each kind of layer."""

  full: tuple[tuple[chex.Array, chex.Array], chex.Array]
  sliding: tuple[tuple[chex.Array, chex.Array], chex.Array]

  def of(self, is_sliding: bool | chex.Array):
    """That of a layer: of its kind, or chosen by data where a loop runs over both kinds."""
    if isinstance(is_sliding, bool):
      return self.sliding if is_sliding else self.full
    return jax.tree.map(functools.partial(jnp.where, is_sliding), self.sliding, self.full)


def make_geometry(
  config: TransformerConfig,
  query_segments: chex.Array,
  key_segments: chex.Array,
  query_positions: chex.Array,
  key_positions: chex.Array,
  first_column: chex.Array | int = 0,
) -> Geometry:
  """Angles and masks of a pass. The arguments are those of `attention_mask`."""

  def mask(window: int | None) -> chex.Array:
    return attention_mask(
      query_segments, key_segments, query_positions, key_positions, first_column, window
    )

  def rope(theta: float, scaling: RopeScaling | None) -> tuple[chex.Array, chex.Array]:
    frequencies = jnp.asarray(rope_frequencies(config.head_dim, theta, scaling), jnp.float32)
    angles = query_positions[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)

  full = rope(config.rope_theta, config.rope_scaling), mask(None)
  if "sliding" not in config.layer_types:
    return Geometry(full, full)
  local = config.rope_local_theta
  return Geometry(full, (rope(local, None) if local else full[0], mask(config.sliding_window)))


def attend(
  query: chex.Array,
  keys: chex.Array,
  values: chex.Array,
  mask: chex.Array,
  *,
  scale: float,
  cap: float | None = None,
) -> chex.Array:
  """Grouped-query attention over a cache's layout: query head n reads key head n // (N / K).

  Args:
    query: [B, T, N, H] float.
    keys: [B, K, H, S] float.
    values: [B, K, S, H] float.
    mask: [B, 1, T, S] bool; a query that sees nothing gets a finite value that means nothing.
    scale: multiplies query-key products.
    cap: soft cap of the scaled products (Gemma 2), or None.

  Returns:
    [B, T, N, H]; the softmax is taken in float32.
  """
  batch, length, heads, head_dim = query.shape
  kv_heads = keys.shape[1]
  group = heads // kv_heads
  # All queries that read one key head become the rows of one product: no key is repeated.
  rows = query.reshape(batch, length, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
  rows = rows.reshape(batch, kv_heads, group * length, head_dim)
  scores = jnp.einsum("bkrh,bkhs->bkrs", rows, keys, preferred_element_type=jnp.float32)
  scores = softcap(scores * scale, cap).reshape(batch, kv_heads, group, length, -1)
  scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  weights = weights.reshape(batch, kv_heads, group * length, -1)
  out = jnp.einsum("bkrs,bksh->bkrh", weights, values)
  out = out.reshape(batch, kv_heads, group, length, head_dim)
  return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, in float32; Gemma's scale is stored less 1."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    plus_one = self.config.norm_plus_one
    initializer = nn.initializers.zeros if plus_one else nn.initializers.ones
    scale = self.param("scale", initializer, (x.shape[-1],)).astype(jnp.float32)
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + self.config.rms_eps)
    return (normed * (1.0 + scale if plus_one else scale)).astype(x.dtype)


def _flat(x: chex.Array) -> chex.Array:
  """[B, T, D] as [B * T, D]: a weight's gradient then sums over one axis, and a CPU need not
  transpose activations for it."""
  return x.reshape(-1, x.shape[-1])


def times_transposed(x: chex.Array, weight: chex.Array, *, dtype: Any = None) -> chex.Array:
  """x @ weight.T. Few rows against a large matrix are what decoding is, and a CPU's library packs
  the second operand anew at every product: with the matrix first it packs the few rows instead, and
  32 rows take two thirds of the time.

  >>> times_transposed(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]])).tolist()
  [[11.0, 17.0]]

  Args:
    x: [N, D] float.
    weight: [F, D] float.
    dtype: of the sums and of the result; None for x's.

  Returns:
    [N, F].
  """

  def rows_first(x: chex.Array, weight: chex.Array) -> chex.Array:
    return jnp.einsum("nd,fd->nf", x, weight, preferred_element_type=dtype)

  def matrix_first(x: chex.Array, weight: chex.Array) -> chex.Array:
    product = jnp.einsum("fd,nd->fn", weight, x, preferred_element_type=dtype)
    # Without the barrier the compiler makes one product of both again, rows first.
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
  decoding a few rows on a CPU takes a tenth less time than with [in, out]. Adapters beside it
  (`rl_llm.policy.lora`) are added."""

  features: int
  use_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: chex.Array) -> chex.Array:
    shape = x.shape[-1], self.features
    if self.is_initializing():
      self.param("weight", lambda key: nn.initializers.lecun_normal()(key, shape).T)
    x = x.astype(self.dtype)
    y = _product(x, self.get_variable("params", "weight").astype(self.dtype))
    if self.has_variable("params", "lora_a"):
      a, b, scale = (
        self.get_variable("params", f"lora_{name}").astype(self.dtype)
        for name in ("a", "b", "scale")
      )
      y = y + scale * jnp.einsum("...r,fr->...f", jnp.einsum("...d,rd->...r", x, a), b)
    if not self.use_bias:
      return y
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return y + bias.astype(self.dtype)


class Attention(nn.Module):
  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, rope, mask, cached, cursor):
    """x [B, T, D], rope (cos, sin), mask [B, 1, T, S], cached (keys, values) or None."""
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
    query, key = apply_rope(query, *rope), apply_rope(key, *rope)
    scale, cap = config.attention_scale, config.attn_softcap
    if cached is None and cap is None:
      out = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)
    else:
      keys, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
      if cached is not None:
        keys = jax.lax.dynamic_update_slice(cached[0], keys, (0, 0, 0, cursor))
        values = jax.lax.dynamic_update_slice(cached[1], values, (0, 0, cursor, 0))
        cached = keys, values
      out = attend(query, keys, values, mask, scale=scale, cap=cap)
    linear = Linear(config.width, False, self.dtype, name="output")
    return linear(out.reshape(*flat.shape[:1], -1)).reshape(x.shape), cached


class MLP(nn.Module):
  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x):
    linear = functools.partial(Linear, use_bias=False, dtype=self.dtype)
    flat = _flat(x)
    gate = linear(self.config.mlp_width, name="gate")(flat)
    gate = nn.silu(gate) if self.config.activation == "silu" else nn.gelu(gate, approximate=True)
    up = linear(self.config.mlp_width, name="up")(flat)
    return linear(self.config.width, name="down")(gate * up).reshape(x.shape)


class Block(nn.Module):
  config: TransformerConfig
  dtype: Any

  @nn.compact
  def __call__(self, x, rope, mask, cached, cursor):
    config = self.config

    def post(name: str, y: chex.Array) -> chex.Array:
      return RMSNorm(config, name=name)(y) if config.post_norms else y

    y, cached = Attention(config, self.dtype, name="attention")(
      RMSNorm(config, name="attention_norm")(x), rope, mask, cached, cursor
    )
    x = x + post("attention_post_norm", y)
    y = MLP(config, self.dtype, name="mlp")(RMSNorm(config, name="mlp_norm")(x))
    return x + post("mlp_post_norm", y), cached


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
    geometry = make_geometry(config, zeros, zeros, zeros, zeros)
    for layer in range(config.n_layers):
      x, _ = Block(config, self.dtype, name=f"layers_{layer}")(x, *geometry.full, None, 0)
    return RMSNorm(config, name="final_norm")(x)
