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

from rl_llm.parallel.sharding import constrain, constrain_rows, copy_to_rows, row_shards
from rl_llm.policy.attention import (
  AttentionName,
  Kernel,
  Visible,
  attend,
  attention_mask,
  find_kernel,
  fused_attend,
  softcap,
  takes,
)
from rl_llm.policy.configs import RopeScaling, TransformerConfig
from rl_llm.policy.layers import Layer, rematerialized, run_layers

Params = dict[str, Any]

# Up to this many rows a CPU multiplies faster with the matrix first: see `times_transposed`.
FEW_ROWS = 128


class Cache(NamedTuple):
  """What has been read, so that a decode step computes one token: S columns, `cursor` written.

  Every leaf but `cursor` has the batch first, so rows can be repeated or gathered with
  `jax.tree.map`. Keys and values are stored in the order in which a decode step multiplies them:
  with heads after columns, or keys with columns first, a CPU rearranges the whole cache per token.
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

  The token at column t of `tokens` sees the following keys at columns s <= t, and `hidden[:, t]`
  predicts the token at t + 1 from them:

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
  # number of devices over which the rows of a batch lie: a limit per device is this many times as
  # large in total
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
  attention: AttentionName = "auto",
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
    scan_layers: compile one layer and loop over the stack of layers wherever several tokens of a
      row are read at once: a deep model then compiles several times faster. Decoding stays
      unrolled. Results change by rounding.
    attention: the kernel that reads rows of many keys: "cudnn" (NVIDIA), "splash" (TPU), "xla" for
      none, "auto" for what the platform has. See `rl_llm.policy.attention`.
    mesh: the devices over which weights and rows lie, from `rl_llm.parallel.sharding.make_mesh`;
      None where there is one.

  Returns:
    A `Policy`.

  Raises:
    AttentionError: the platform has no such kernel.
  """
  # One spelling of the arguments for each policy, or the cache would hold several.
  kernel = find_kernel(attention, dtype=dtype, mesh=mesh)
  return _make_policy(Setup(config, jnp.dtype(dtype), remat, scan_layers, kernel, mesh))


@dataclasses.dataclass(frozen=True)
class Setup:
  """What the functions of a policy are bound to. All of it is static: hashable, without arrays."""

  config: TransformerConfig
  dtype: Any
  remat: bool
  scan_layers: bool
  kernel: Kernel | None
  mesh: jax.sharding.Mesh | None

  @property
  def row_shards(self) -> int:
    """Over how many devices the rows of a batch lie."""
    return 1 if self.mesh is None else row_shards(self.mesh)


@functools.cache
def _make_policy(setup: Setup) -> Policy:
  def bind(function: Callable) -> Callable:
    return functools.partial(function, setup)

  return Policy(
    config=setup.config,
    init=bind(init),
    # Jitted, or layers that are traced once a call would be compiled once a call outside of a jit.
    hidden=jax.jit(bind(hidden)),
    shared_hidden=jax.jit(bind(shared_hidden)),
    unembed=bind(unembed),
    init_cache=bind(init_cache),
    logits=bind(logits),
    row_shards=setup.row_shards,
    over=bind(over),
    dtype=setup.dtype,
  )


# The functions of a policy, as `Policy` describes them, with their setup in front.


def init(setup: Setup, key: chex.Array) -> Params:
  model = Transformer(setup.config, setup.dtype)
  return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def hidden(
  setup: Setup,
  params: Params,
  tokens: chex.Array,
  positions: chex.Array,
  segment_ids: chex.Array | None = None,
  cache: Cache | None = None,
) -> tuple[chex.Array, Cache | None]:
  if segment_ids is None:
    segment_ids = jnp.zeros_like(positions)
  _check_pass(tokens, positions, segment_ids, cache)
  positions, segment_ids = positions.astype(jnp.int32), segment_ids.astype(jnp.int32)
  key_segments, key_positions, cursor, cached = segment_ids, positions, 0, None
  if cache is not None:
    cursor, cached = cache.cursor, list(zip(cache.keys, cache.values, strict=True))
    key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, cursor))
    key_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cursor))
  geometry = make_geometry(
    setup.config, segment_ids, key_segments, positions, key_positions, cursor
  )
  x, layers = run_layers(
    functools.partial(_cached_layer, setup),
    _embed(setup, params, tokens, segment_ids),
    _layers(setup, params, cached),
    (geometry, cursor),
    scan=setup.scan_layers and tokens.shape[1] > 1,
    remat=setup.remat,
    dtype=setup.dtype,
    mesh=setup.mesh,
    layout=_layout(setup, len(tokens), tokens.size),
  )
  x = _final_norm(setup, params, x)
  if cache is None:
    return x, None
  keys, values = zip(*layers, strict=True)
  return x, Cache(keys, values, key_segments, key_positions, cursor + tokens.shape[1])


def shared_hidden(
  setup: Setup, params: Params, prompts: Any, following: Any
) -> tuple[chex.Array, chex.Array]:
  (tokens, positions, segments), (more, more_positions, more_segments) = jax.tree.map(
    lambda x: x.astype(jnp.int32), (tuple(prompts), tuple(following))
  )
  if more.shape[0] % tokens.shape[0]:
    raise ValueError(
      f"following: {more.shape[0]} rows are not a multiple of prompts' {tokens.shape[0]}"
    )
  fork = Fork(*tokens.shape, *more.shape)
  of_prompts = make_geometry(setup.config, segments, segments, positions, positions)
  of_following = make_geometry(
    setup.config,
    more_segments,
    fork.with_prompts(segments, more_segments),
    more_positions,
    fork.with_prompts(positions, more_positions),
    fork.columns,
  )
  xy, _ = run_layers(
    functools.partial(_forked_layer, setup, fork),
    _embed(setup, params, fork.join(tokens, more), fork.join(segments, more_segments)),
    _layers(setup, params),
    (of_prompts, of_following),
    scan=setup.scan_layers,
    remat=setup.remat,
    dtype=setup.dtype,
    mesh=setup.mesh,
    layout=_layout(setup, len(tokens), tokens.size + more.size),
  )
  return fork.part(_final_norm(setup, params, xy))


def unembed(setup: Setup, params: Params) -> chex.Array:
  return params["embed" if setup.config.tie_embeddings else "unembed"]["embedding"]


def init_cache(setup: Setup, batch: int, length: int) -> Cache:
  config = setup.config

  def empty(*columns: int) -> tuple[chex.Array, ...]:
    shape = (batch, config.n_kv_heads, *columns)
    return tuple(jnp.zeros(shape, setup.dtype) for _ in range(config.n_layers))

  return Cache(
    keys=empty(config.head_dim, length),
    values=empty(length, config.head_dim),
    segment_ids=jnp.full((batch, length), -1, jnp.int32),
    positions=jnp.zeros((batch, length), jnp.int32),
    cursor=jnp.zeros((), jnp.int32),
  )


def logits(setup: Setup, params: Params, hidden: chex.Array) -> chex.Array:
  table = unembed(setup, params).astype(hidden.dtype)
  scores = times_transposed(hidden.reshape(-1, hidden.shape[-1]), table, dtype=jnp.float32)
  return softcap(scores.reshape(*hidden.shape[:-1], -1), setup.config.final_softcap)


def over(setup: Setup, mesh: jax.sharding.Mesh) -> Policy:
  kernel = None if setup.kernel is None else setup.kernel._replace(mesh=mesh)
  return _make_policy(dataclasses.replace(setup, kernel=kernel, mesh=mesh))


# What `hidden` and `shared_hidden` are made of.


def _check_pass(
  tokens: chex.Array, positions: chex.Array, segment_ids: chex.Array, cache: Cache | None
) -> None:
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


def _embed(setup: Setup, params: Params, tokens: chex.Array, segment_ids: chex.Array) -> chex.Array:
  # The id of padding does not matter unless it is beyond the table: that would give NaN.
  tokens = jnp.where(segment_ids < 0, 0, tokens)
  x = jnp.take(params["embed"]["embedding"], tokens, axis=0).astype(setup.dtype)
  return _by_rows(setup, x * jnp.asarray(setup.config.embed_scale, setup.dtype))


def _final_norm(setup: Setup, params: Params, x: chex.Array) -> chex.Array:
  return RMSNorm(setup.config).apply({"params": params["final_norm"]}, x)


def _layers(
  setup: Setup, params: Params, cached: list[tuple[chex.Array, chex.Array]] | None = None
) -> list[Layer]:
  """Each layer's weights, whether it slides, and its keys and values in a cache."""
  return [
    Layer(params[f"layers_{i}"], setup.config.is_sliding(i), None if cached is None else cached[i])
    for i in range(setup.config.n_layers)
  ]


def _by_rows(setup: Setup, x: chex.Array) -> chex.Array:
  """Keeps each device on its own rows, where they can be divided."""
  if setup.mesh is None or x.shape[0] % setup.row_shards:
    return x
  return constrain_rows(x, setup.mesh)


def _layout(setup: Setup, rows: int, tokens: int) -> Callable[[Params, jax.sharding.Mesh], Params]:
  """The layout of matrices for this batch: sending few tokens is faster than sending a matrix."""
  shards, many = setup.row_shards, tokens >= setup.config.width
  return copy_to_rows if shards > 1 and many and rows % shards == 0 else constrain


def _apply_block(
  setup: Setup, x: chex.Array, weights: Params, rope: Any, mix: Mix
) -> tuple[chex.Array, Any]:
  block = Block(setup.config, setup.dtype)
  x, kept = block.apply({"params": weights}, _by_rows(setup, x), rope, mix)
  return _by_rows(setup, x), kept


def _cached_layer(
  setup: Setup, x: chex.Array, weights: Params, is_sliding: Any, cached: Any, common: Any
) -> tuple[chex.Array, Any]:
  """A layer of `hidden`, as `run_layers` calls it; its output is the layer's new cache."""
  geometry, cursor = common
  rope, visible = geometry.of(is_sliding)
  attend_layer = functools.partial(_attend, config=setup.config, kernel=setup.kernel)

  def mix(query: chex.Array, key: chex.Array, value: chex.Array) -> tuple[chex.Array, Any]:
    if cached is None:
      return attend_layer(query, key, value, visible), None
    keys, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    keys = jax.lax.dynamic_update_slice(cached[0], keys, (0, 0, 0, cursor))
    values = jax.lax.dynamic_update_slice(cached[1], values, (0, 0, cursor, 0))
    if keys.shape[-1] == query.shape[1]:  # Nothing was read before.
      return attend_layer(query, key, value, visible), (keys, values)
    out = _rematerialized_attend(query, keys, values, visible.mask, config=setup.config)
    return out, (keys, values)

  return _apply_block(setup, x, weights, rope, mix)


class Fork(NamedTuple):
  """Combines prompts [P, L, ...] and what follows them [B, T, ...], B = P * G, into one array.

  Everything but attention works token by token. So both lie in one array, [P, L + G * T, ...], each
  prompt with what follows it, and one product with each matrix covers both.

  >>> fork = Fork(prompts=1, columns=2, rows=2, steps=1)
  >>> both = fork.join(jnp.array([[5, 6]]), jnp.array([[7], [8]]))
  >>> both.tolist(), [x.tolist() for x in fork.part(both)]
  ([[5, 6, 7, 8]], [[[5, 6]], [[7], [8]]])
  >>> fork.with_prompts(jnp.array([[5, 6]]), jnp.array([[7], [8]])).tolist()
  [[5, 6, 7], [5, 6, 8]]
  """

  prompts: int  # P
  columns: int  # L
  rows: int  # B
  steps: int  # T

  def with_prompts(self, x: chex.Array, y: chex.Array) -> chex.Array:
    """[P, L, ...] and [B, T, ...] as [B, L + T, ...]: each row behind a copy of its prompt."""
    return jnp.concatenate([jnp.repeat(x, self.rows // self.prompts, axis=0), y], axis=1)

  def join(self, x: chex.Array, y: chex.Array) -> chex.Array:
    """[P, L, ...] and [B, T, ...] as [P, L + G * T, ...]."""
    return jnp.concatenate([x, y.reshape(self.prompts, -1, *y.shape[2:])], axis=1)

  def part(self, xy: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The way back."""
    prompts, following = xy[:, : self.columns], xy[:, self.columns :]
    return prompts, following.reshape(self.rows, self.steps, *xy.shape[2:])


def _forked_layer(
  setup: Setup, fork: Fork, xy: chex.Array, weights: Params, is_sliding: Any, _: Any, common: Any
) -> tuple[chex.Array, Any]:
  """A layer of `shared_hidden`, as `run_layers` calls it."""
  (rope, visible), (more_rope, more_visible) = (geometry.of(is_sliding) for geometry in common)
  attend_layer = functools.partial(_attend, config=setup.config, kernel=setup.kernel)

  def mix(*joined: chex.Array) -> tuple[chex.Array, None]:
    (query, more_query), (key, more_key), (value, more_value) = map(fork.part, joined)
    keys, values = fork.with_prompts(key, more_key), fork.with_prompts(value, more_value)
    out = attend_layer(query, key, value, visible)
    more = attend_layer(more_query, keys, values, more_visible, first_column=fork.columns)
    return fork.join(out, more), None

  return _apply_block(setup, xy, weights, jax.tree.map(fork.join, rope, more_rope), mix)


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
  # Decided by how many full turns a pair makes within the original context: few -> slowed, many ->
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


class Geometry(NamedTuple):
  """Where a pass's tokens stand and what they see: ((cos, sin), mask), in each kind of layer."""

  full: tuple[tuple[chex.Array, chex.Array], chex.Array]
  sliding: tuple[tuple[chex.Array, chex.Array], chex.Array]
  segments: tuple[chex.Array, chex.Array]  # of the queries and of the keys

  def of(self, is_sliding: bool | chex.Array) -> tuple[tuple[chex.Array, chex.Array], Visible]:
    """The geometry for a layer: by its kind, or selected by data in a loop over both kinds."""
    if isinstance(is_sliding, bool):
      rope, mask = self.sliding if is_sliding else self.full
    else:
      choose = functools.partial(jnp.where, is_sliding)
      rope, mask = jax.tree.map(choose, self.sliding, self.full)
    return rope, Visible(mask, *self.segments, is_sliding)


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
    return Geometry(full, full, (query_segments, key_segments))
  local = config.rope_local_theta
  sliding = rope(local, None) if local else full[0], mask(config.sliding_window)
  return Geometry(full, sliding, (query_segments, key_segments))


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


def _rematerialized_attend(query, keys, values, mask, *, config: TransformerConfig) -> chex.Array:
  """Plain attention, over a cache's layout. Scores and their softmax take queries times keys times
  heads numbers and are cheap to recompute, so they are not kept for the backward pass."""
  plain = functools.partial(attend, scale=config.attention_scale, cap=config.attn_softcap)
  return rematerialized(lambda qkv, mask: plain(*qkv, mask))((query, keys, values), mask)


def _attend(
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
  return _rematerialized_attend(query, keys, values, visible.mask, config=config)


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
      return _attend(*made, visible, config=config, kernel=None), None

    for layer in range(config.n_layers):
      x, _ = Block(config, self.dtype, name=f"layers_{layer}")(x, rope, mix)
    return RMSNorm(config, name="final_norm")(x)
