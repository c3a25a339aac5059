"""A decoder-only transformer as pure functions of its weights.

Weights are a plain nested dict, one subtree a layer, so that paths read like
`layers_3/attention/query/weight`. How the layers are run, one after another or as a loop over their
stack, is decided in `rl_llm.policy.layer_stack` and changes nothing in this tree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from rl_llm.parallel.sharding import constrain, constrain_rows, copy_to_rows, row_shards
from rl_llm.policy.attention import AttentionName, Kernel, find_kernel, softcap
from rl_llm.policy.cache import Cache, written
from rl_llm.policy.configs import TransformerConfig
from rl_llm.policy.layer_stack import Layer, cast_weights, run_layers
from rl_llm.policy.modules import (
  Block,
  Mix,
  Params,
  RMSNorm,
  Transformer,
  masked_attention,
  rematerialized_attention,
  times_transposed,
)
from rl_llm.policy.positions import make_geometry
from rl_llm.policy.shared_prefix import Fork


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
  #   within the cache's length (each row's own cursor drops what is beyond), and see what it holds.
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
  # cast(params) -> the weights that every pass would cast to the compute dtype, cast, for a caller
  #   that makes several passes: all but norms' scales, which are used in float32, and the table of
  #   embeddings, in whose gradient all of a token's places are summed
  cast: Callable[[Params], Params]
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
      they are and are cast where they are used: loops in bfloat16 want them cast once, before
      (`Policy.cast`; to decode, all of them).
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
    cast=bind(cast),
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
    key_segments = written(cache.segment_ids, segment_ids, cursor, axis=1)
    key_positions = written(cache.positions, positions, cursor, axis=1)
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


def cast(setup: Setup, params: Params) -> Params:
  if setup.scan_layers:  # Each pass casts as it stacks them: another copy would take memory.
    return params
  return {
    name: part if name in ("embed", "head") else cast_weights(part, setup.dtype)
    for name, part in params.items()
  }


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
  attend_layer = functools.partial(masked_attention, config=setup.config, kernel=setup.kernel)

  def mix(query: chex.Array, key: chex.Array, value: chex.Array) -> tuple[chex.Array, Any]:
    if cached is None:
      return attend_layer(query, key, value, visible), None
    keys, values = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)
    keys = written(cached[0], keys, cursor, axis=3)
    values = written(cached[1], values, cursor, axis=2)
    if keys.shape[-1] == query.shape[1]:  # Nothing was read before.
      return attend_layer(query, key, value, visible), (keys, values)
    out = rematerialized_attention(query, keys, values, visible.mask, config=setup.config)
    return out, (keys, values)

  return _apply_block(setup, x, weights, rope, mix)


def _forked_layer(
  setup: Setup, fork: Fork, xy: chex.Array, weights: Params, is_sliding: Any, _: Any, common: Any
) -> tuple[chex.Array, Any]:
  """A layer of `shared_hidden`, as `run_layers` calls it."""
  (rope, visible), (more_rope, more_visible) = (geometry.of(is_sliding) for geometry in common)
  attend_layer = functools.partial(masked_attention, config=setup.config, kernel=setup.kernel)

  def mix(*joined: chex.Array) -> tuple[chex.Array, None]:
    (query, more_query), (key, more_key), (value, more_value) = map(fork.part, joined)
    keys, values = fork.with_prompts(key, more_key), fork.with_prompts(value, more_value)
    out = attend_layer(query, key, value, visible)
    more = attend_layer(more_query, keys, values, more_visible, first_column=fork.columns)
    return fork.join(out, more), None

  return _apply_block(setup, xy, weights, jax.tree.map(fork.join, rope, more_rope), mix)
