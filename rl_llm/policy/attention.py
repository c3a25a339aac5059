"""Which tokens see which, and what they take from them.

There are queries times keys times heads scores. Held in memory all at once, those of one row of
8,192 tokens and 28 heads take 7.5 GB per layer in float32; a fused kernel holds a block at a time.
`attend` is the plain form, for a CPU, for decoding and for short rows. `fused_attend` computes the
same numbers with a kernel of cuDNN (NVIDIA's GPUs) or Pallas (TPUs: "splash attention").
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rl_llm.errors import UserError
from rl_llm.parallel.sharding import ROWS, row_shards

AttentionName = Literal["auto", "xla", "cudnn", "splash"]

# With fewer keys a row's scores are small, and a kernel's blocks would be mostly padding.
FEW_KEYS = 512
LANES = 128  # of a TPU's vector: rows, columns and heads of a block are multiples of it


def softcap(x: chex.Array, cap: float | None) -> chex.Array:
  """cap * tanh(x / cap): nearly x where |x| is well below `cap`, never beyond it; None leaves x
  alone.

  >>> round(float(softcap(jnp.array(30.0), 30.0)), 2)  # 30 tanh(1)
  22.85
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


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
    first_column: the key column that holds the first query's own key; [B] where rows differ.
    window: how many positions back a query sees, its own included; None for all.

  Returns:
    [B, 1, T, S] bool.
  """
  query, key = query_segments[:, :, None], key_segments[:, None, :]
  # Columns from the first query's key to each key. Those past the queries were written earlier too.
  behind = jnp.arange(key_segments.shape[1]) - jnp.reshape(first_column, (-1, 1, 1))
  length = query_segments.shape[1]
  causal = (behind <= jnp.arange(length)[:, None]) | (behind >= length)
  seen = (key != -1) & ((key == query) | (key == 0)) & causal
  if window is not None:
    seen &= query_positions[:, :, None] - key_positions[:, None, :] < window
  return seen[:, None]


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


class AttentionError(UserError, ValueError):
  """A requested kernel is not available here, or cannot do what is asked of it."""


class Visible(NamedTuple):
  """What the queries of a layer may see: a mask, and the arrays from which it is made."""

  mask: chex.Array  # [B, 1, T, S] bool
  query_segments: chex.Array  # [B, T] int32
  key_segments: chex.Array  # [B, S] int32
  is_sliding: bool | chex.Array  # whether the layer slides; a scalar array in a loop over layers


class Kernel(NamedTuple):
  """A fused kernel, and where it runs."""

  name: Literal["cudnn", "splash"]
  asked: bool  # for by name: what it cannot do is then an error
  mesh: Mesh | None
  interpret: bool  # step by step on a CPU: slow, to compare


def find_kernel(attention: AttentionName, *, dtype: Any, mesh: Mesh | None = None) -> Kernel | None:
  """The kernel that a name stands for on this platform; None for plain attention.

  "auto" is splash attention on a TPU, cuDNN's on a GPU in bfloat16 or float16, and plain elsewhere.

  >>> find_kernel("splash", dtype=jnp.float32).interpret  # On a CPU.
  True

  Args:
    attention: the name.
    dtype: of the arithmetic.
    mesh: the devices over which rows and heads lie; None where there is one.

  Raises:
    AttentionError: the platform has no such kernel.
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if attention == "auto":
    narrow = jnp.dtype(dtype).itemsize == 2
    name = {"tpu": "splash", "gpu": "cudnn" if narrow else None}.get(platform)
    return None if name is None else Kernel(name, False, mesh, False)
  if attention == "xla":
    return None
  platforms = {"splash": ("tpu", "cpu"), "cudnn": ("gpu",)}
  if attention not in platforms:
    raise AttentionError(f"attention: {attention!r}; allowed: auto, xla, cudnn, splash")
  if platform not in platforms[attention]:
    raise AttentionError(
      f"attention: {attention} is for {' and '.join(platforms[attention])}, here is {platform}; "
      "auto takes what there is"
    )
  return Kernel(attention, True, mesh, platform == "cpu")


def takes(
  kernel: Kernel | None, query: chex.Array, n_keys: int, n_kv_heads: int, *, cap: float | None
) -> bool:
  """Whether this pass uses the kernel; decided from shapes alone, while a program is traced.

  Decoding, where a row has one query, never does.

  Args:
    kernel: None for none.
    query: [B, T, N, H] float.
    n_keys: S.
    n_kv_heads: K.
    cap: soft cap of the scores, or None.

  Raises:
    AttentionError: the kernel was asked for by name and cannot do it.
  """
  rows, length, heads, head_dim = query.shape
  if kernel is None or length == 1:
    return False
  if not kernel.asked and n_keys < FEW_KEYS:
    return False
  why = ""
  if kernel.mesh is not None and rows % row_shards(kernel.mesh):
    why = f"{rows} rows are not a multiple of the {row_shards(kernel.mesh)} devices they lie over"
  elif kernel.mesh is not None and heads % kernel.mesh.shape["tensor"]:
    why = f"{heads} heads are not a multiple of tensor={kernel.mesh.shape['tensor']}"
  elif kernel.name == "cudnn":
    shapes = (rows, length, n_keys, heads, n_kv_heads, head_dim)
    why = "it has no soft cap" if cap is not None else _refused_by_cudnn(*shapes, query.dtype)
  if why and kernel.asked:
    raise AttentionError(f"attention: {kernel.name} cannot do this: {why}; use auto or xla")
  if why:
    logging.log_first_n(logging.WARNING, "plain attention instead of %s: %s", 8, kernel.name, why)
  return not why


def fused_attend(
  query: chex.Array,
  keys: chex.Array,
  values: chex.Array,
  visible: Visible,
  *,
  kernel: Kernel,
  first_column: int,
  window: int | None,
  scale: float,
  cap: float | None = None,
) -> chex.Array:
  """Grouped-query attention by a kernel that `takes` it. A query that sees nothing gets a finite
  value that means nothing, as from `attend`.

  cuDNN reads the mask. Splash attention reads segments, and has no "segment 0 is seen by all": a
  row whose keys are of segment 0 *and* of others becomes NaN. Nothing in this library makes such
  rows (a prompt shared by G responses lies in G rows here, 0 throughout; packed rows have none).
  Its window counts columns, so tokens of a segment must lie next to one another.

  Args:
    query: [B, T, N, H] float.
    keys: [B, S, K, H] float.
    values: [B, S, K, H] float.
    visible: what each query may see.
    kernel: from `find_kernel`.
    first_column: the key column that holds the first query's own key.
    window: of the sliding layers; None where there are none.
    scale: multiplies query-key products.
    cap: soft cap of the scaled products, or None.

  Returns:
    [B, T, N, H].
  """
  if kernel.name == "cudnn":
    return _cudnn(query, keys, values, visible.mask, scale=scale)

  def attend_within(window: int | None):
    return functools.partial(
      _splash, kernel=kernel, first_column=first_column, window=window, scale=scale, cap=cap
    )

  arrays = (query, keys, values, (visible.query_segments, visible.key_segments))
  if isinstance(visible.is_sliding, bool):
    return attend_within(window if visible.is_sliding else None)(*arrays)
  return jax.lax.cond(visible.is_sliding, attend_within(window), attend_within(None), *arrays)


def _cudnn(query, keys, values, mask, *, scale: float) -> chex.Array:
  # An odd number of queries or keys has no gradient there.
  length, odd_queries, odd_keys = query.shape[1], query.shape[1] % 2, keys.shape[1] % 2
  query = _longer(query, odd_queries)
  keys, values = _longer(keys, odd_keys), _longer(values, odd_keys)
  mask = jnp.pad(mask, ((0, 0), (0, 0), (0, odd_queries), (0, odd_keys)))
  out = jax.nn.dot_product_attention(
    query, keys, values, mask=mask, scale=scale, implementation="cudnn"
  )
  return out[:, :length]


@functools.cache
def _refused_by_cudnn(
  rows: int, length: int, n_keys: int, heads: int, n_kv_heads: int, head_dim: int, dtype: Any
) -> str:
  """Why cuDNN does not do these shapes, in JAX's words; "" if it does."""
  query = jax.ShapeDtypeStruct((rows, length, heads, head_dim), dtype)
  keys = jax.ShapeDtypeStruct((rows, n_keys, n_kv_heads, head_dim), dtype)
  mask = jax.ShapeDtypeStruct((rows, 1, length, n_keys), bool)

  def gradient(query, keys, values, mask):
    out, pull = jax.vjp(lambda *x: _cudnn(*x, mask, scale=1.0), query, keys, values)
    return pull(out)

  try:
    jax.eval_shape(gradient, query, keys, keys, mask)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    return str(error).splitlines()[0]
  return ""


def _splash(query, keys, values, segments, *, kernel: Kernel, **settings) -> chex.Array:
  part = functools.partial(_splash_part, interpret=kernel.interpret, **settings)
  if kernel.mesh is None:
    return part(query, keys, values, segments)
  heads, tensor = query.shape[2], kernel.mesh.shape["tensor"]
  if keys.shape[2] % tensor:  # Fewer key heads than devices: each gets those of its own queries.
    keys, values = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (keys, values))
  by_head, by_row = P(ROWS, None, "tensor", None), P(ROWS, None)
  return jax.shard_map(
    part,
    mesh=kernel.mesh,
    in_specs=(by_head, by_head, by_head, by_row),
    out_specs=by_head,
    check_vma=False,
  )(query, keys, values, segments)


def _splash_part(
  query,
  keys,
  values,
  segments,
  *,
  first_column: int,
  window: int | None,
  scale: float,
  cap: float | None,
  interpret: bool,
) -> chex.Array:
  """One device's rows and heads; segments are those of the queries and those of the keys."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  query_segments, key_segments = segments
  _, length, heads, head_dim = query.shape
  more_queries, more_keys = -length % LANES, -keys.shape[1] % LANES
  n_queries, n_keys = length + more_queries, keys.shape[1] + more_keys

  def pad(x: chex.Array, more: int) -> chex.Array:
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, -head_dim % LANES)))
    return x.transpose(0, 2, 1, 3)

  shape = n_queries, n_keys
  if window is None:
    mask = masks.CausalMask(shape, offset=first_column)
  else:
    mask = masks.LocalMask(shape, window_size=(window - 1, 0), offset=first_column)
  queries_at_once, keys_at_once = _block(n_queries), _block(n_keys)
  attend_row = kernels.make_splash_mha_single_device(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=kernels.BlockSizes(
      block_q=queries_at_once,
      block_kv=keys_at_once,
      block_kv_compute=keys_at_once,
      block_q_dkv=queries_at_once,
      block_kv_dkv=keys_at_once,
      block_kv_dkv_compute=keys_at_once,
      block_q_dq=queries_at_once,
      block_kv_dq=keys_at_once,
    ),
    attn_logits_soft_cap=cap,
    interpret=interpret,
  )
  scaled = (query.astype(jnp.float32) * scale).astype(query.dtype)
  segments = kernels.SegmentIds(
    q=jnp.pad(query_segments, ((0, 0), (0, more_queries)), constant_values=-1),
    kv=jnp.pad(key_segments, ((0, 0), (0, more_keys)), constant_values=-1),
  )
  out = jax.vmap(attend_row)(
    pad(scaled, more_queries), pad(keys, more_keys), pad(values, more_keys), segments
  )
  out = out.transpose(0, 2, 1, 3)[:, :length, :, :head_dim].astype(query.dtype)
  mixed = jnp.any(key_segments == 0, axis=1) & jnp.any(key_segments > 0, axis=1)
  return jnp.where(mixed[:, None, None, None], jnp.nan, out)


def _block(size: int) -> int:
  """The largest block that divides a multiple of 128.

  >>> _block(1536), _block(640)
  (512, 128)
  """
  return next(block for block in (512, 256, LANES) if size % block == 0)


def _longer(x: chex.Array, more: int) -> chex.Array:
  return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
