"""The decoder's rules: who sees whom, and that cache, padding and packing change nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import RopeScaling, TransformerConfig, make_policy, tiny_config
from rl_llm.policy.attention import attend, attention_mask
from rl_llm.policy.modules import FEW_ROWS, times_transposed
from rl_llm.policy.positions import apply_rope, rope_frequencies
from tests.policy.make_goldens import N_TOKENS, family_model, family_tokens
from tests.representatives import mostly_slow

# Between them: both attention paths, full and sliding layers, soft caps, QK norm, local RoPE.
KINDS = ("gemma2", "gemma3")


@pytest.fixture(scope="module", params=mostly_slow(KINDS, quick=[1]))
def model(request):
  config, params = family_model(request.param)
  policy = make_policy(config)
  hidden = jax.jit(policy.hidden)
  return policy, params, hidden


@pytest.fixture(scope="module")
def tiny():
  config = tiny_config(32)
  return config, jax.jit(make_policy(config).init)(jax.random.key(0))


def columns(tokens):
  return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def rows_of(*parts):
  """(tokens, positions, segment_ids), [2, 24] twice the same row, of (tokens, positions, segment)
  parts: one shape for most tests, so that one compilation serves them."""
  tokens, positions, segments = (
    np.concatenate([np.broadcast_to(part[i], (len(part[0]),)) for part in parts]) for i in range(3)
  )
  assert tokens.shape == (N_TOKENS,)
  return tuple(np.stack([x, x]).astype(np.int32) for x in (tokens, positions, segments))


# The parts, against explicit loops.


def test_mask_against_loops():
  rng = np.random.default_rng(0)
  key_segments = rng.integers(-1, 3, (3, 9))
  key_positions = rng.integers(0, 9, (3, 9))
  first, window = 4, 3
  queries = slice(first, first + 5)
  for limit in (None, window):
    mask = attention_mask(
      jnp.asarray(key_segments[:, queries]),
      jnp.asarray(key_segments),
      jnp.asarray(key_positions[:, queries]),
      jnp.asarray(key_positions),
      first,
      limit,
    )
    assert mask.shape == (3, 1, 5, 9)
    for b in range(3):
      for t in range(5):
        for s in range(9):
          key, query = key_segments[b, s], key_segments[b, first + t]
          seen = key != -1 and key in (query, 0) and s <= first + t
          if limit is not None:
            seen = seen and key_positions[b, first + t] - key_positions[b, s] < limit
          assert bool(mask[b, 0, t, s]) == seen, (b, t, s)


@pytest.mark.parametrize("cap", [None, 0.7])
def test_attend_against_loops(cap):
  rng = np.random.default_rng(1)
  b, t, s, n, k, h = 2, 3, 5, 6, 2, 4
  query, keys, values = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((b, t, n, h), (b, k, h, s), (b, k, s, h))
  )
  mask = rng.random((b, 1, t, s)) < 0.6
  mask[..., 0] = True
  out = jax.jit(functools.partial(attend, scale=0.3, cap=cap))(query, keys, values, mask)
  for i in range(b):
    for j in range(t):
      for head in range(n):
        group = head // (n // k)
        scores = 0.3 * (query[i, j, head] @ keys[i, group])
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores) * mask[i, 0, j]
        expected = (weights / weights.sum()) @ values[i, group]
        np.testing.assert_allclose(out[i, j, head], expected, atol=1e-5)
  if cap is None:  # The path without a cache is jax.nn's: the same function in another layout.
    theirs = jax.nn.dot_product_attention(
      jnp.asarray(query),
      jnp.asarray(keys.transpose(0, 3, 1, 2)),
      jnp.asarray(values.transpose(0, 2, 1, 3)),
      mask=jnp.asarray(mask),
      scale=0.3,
    )
    np.testing.assert_allclose(out, theirs, atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_times_transposed_against_numpy_values_and_gradients(rows):
  rng = np.random.default_rng(rows)
  x, weight, toward = (rng.normal(size=s) for s in ((rows, 24), (40, 24), (rows, 40)))
  product, pull = jax.vjp(times_transposed, jnp.float32(x), jnp.float32(weight))
  np.testing.assert_allclose(product, x @ weight.T, rtol=1e-4, atol=1e-4)
  of_x, of_weight = pull(jnp.float32(toward))
  np.testing.assert_allclose(of_x, toward @ weight, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(of_weight, toward.T @ x, rtol=1e-4, atol=1e-4)
  narrow = jnp.bfloat16(x), jnp.bfloat16(weight)
  assert times_transposed(*narrow).dtype == jnp.bfloat16
  assert times_transposed(*narrow, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.cpu
def test_times_transposed_puts_the_matrix_first_for_few_rows_on_a_cpu_alone():
  def lowered(rows: int, platform: str) -> str:
    traced = jax.jit(times_transposed).trace(jnp.ones((rows, 24)), jnp.ones((40, 24)))
    return traced.lower(lowering_platforms=(platform,)).as_text()

  few, many, elsewhere = lowered(32, "cpu"), lowered(FEW_ROWS + 1, "cpu"), lowered(32, "tpu")
  assert "-> tensor<40x32xf32>" in few and "optimization_barrier" in few
  assert "-> tensor<129x40xf32>" in many and "optimization_barrier" not in many
  assert "-> tensor<32x40xf32>" in elsewhere and "optimization_barrier" not in elsewhere
  # And the compiler leaves it so.
  compiled = jax.jit(times_transposed).lower(jnp.ones((32, 24)), jnp.ones((40, 24))).compile()
  assert "f32[40,32]" in compiled.as_text()


def test_llama3_frequencies_against_the_rule():
  scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 512)
  plain, scaled = rope_frequencies(64, 1e4), rope_frequencies(64, 1e4, scaling)
  regimes = set()
  for frequency, result in zip(plain, scaled, strict=True):
    wavelength = 2 * np.pi / frequency
    if wavelength > 512 / 1.0:
      expected, regime = frequency / 8, "slowed"
    elif wavelength < 512 / 4.0:
      expected, regime = frequency, "kept"
    else:
      smooth = (512 / wavelength - 1.0) / (4.0 - 1.0)
      expected, regime = (1 - smooth) * frequency / 8 + smooth * frequency, "blended"
    regimes.add(regime)
    np.testing.assert_allclose(result, expected, rtol=1e-12)
  assert regimes == {"slowed", "kept", "blended"}


def test_rope_scores_depend_on_distance_only():
  rng = np.random.default_rng(2)
  query, key = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

  def score(query_position, key_position):
    rotated = []
    for x, position in ((query, query_position), (key, key_position)):
      angles = jnp.full((1, 1, 1), position) * jnp.asarray(rope_frequencies(8, 100.0), jnp.float32)
      rotated.append(apply_rope(jnp.asarray(x), jnp.cos(angles), jnp.sin(angles)))
    return float(jnp.sum(rotated[0] * rotated[1]))

  assert abs(score(7, 3) - score(104, 100)) < 1e-4
  assert abs(score(7, 3) - score(7, 4)) > 1e-2


# The whole decoder.


def test_causality_by_gradient(model):
  policy, params, _ = model
  tokens = jnp.arange(12)[None]  # all different, so row s of the table is token s and only that

  @jax.jit
  @jax.jacrev
  def jacobian(table):
    embedded = params | {"embed": {"embedding": table}}
    return policy.hidden(embedded, tokens, columns(tokens))[0][0] @ jnp.arange(1.0, 33.0)

  influence = jacobian(params["embed"]["embedding"])[:, :12]  # d hidden[t] / d embed[s]
  influence = np.abs(np.asarray(influence)).max(axis=-1)
  assert (influence[np.triu_indices(12, 1)] == 0).all()
  assert (influence[np.tril_indices(12)] > 0).all()  # three layers see further than a window of 8


def test_incremental_equals_teacher_forced(model):
  policy, params, hidden = model
  tokens = jnp.asarray(family_tokens())
  full, none = hidden(params, tokens, columns(tokens), jnp.zeros_like(tokens))
  assert none is None
  prefill = 10

  @jax.jit
  def incremental(params):
    first, cache = policy.hidden(
      params, tokens[:, :prefill], columns(tokens)[:, :prefill], None, policy.init_cache(2, 30)
    )

    def step(carry):
      t, cache, out = carry
      token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, axis=1)
      new, cache = policy.hidden(params, token, jnp.full((2, 1), t), None, cache)
      return t + 1, cache, jax.lax.dynamic_update_slice(out, new, (0, t, 0))

    out = jnp.zeros_like(full).at[:, :prefill].set(first)
    carry = (jnp.int32(prefill), cache, out)
    return jax.lax.while_loop(lambda carry: carry[0] < N_TOKENS, step, carry)

  _, cache, out = incremental(params)
  assert int(cache.cursor) == N_TOKENS
  assert cache.segment_ids.tolist() == [[0] * N_TOKENS + [-1] * 6] * 2
  np.testing.assert_allclose(
    policy.logits(params, out), policy.logits(params, full), atol=1e-4, rtol=0
  )


def test_rows_read_on_from_columns_of_their_own(model):
  """Row 0 has read 10 tokens and row 1 has read 7; both read on, and the last does not fit."""
  policy, params, hidden = model
  tokens, begun = jnp.asarray(family_tokens()), np.array([10, 7])
  full, _ = hidden(params, tokens, columns(tokens), jnp.zeros_like(tokens))
  read = columns(tokens)[:, :10] < begun[:, None]
  _, cache = hidden(
    params,
    tokens[:, :10],
    columns(tokens)[:, :10],
    jnp.where(read, 0, -1),
    policy.init_cache(2, 15),
  )
  following = begun[:, None] + np.arange(6)
  cache = cache._replace(cursor=jnp.asarray(begun))
  more = jnp.take_along_axis(tokens, following, axis=1)
  out, cache = hidden(params, more, following, jnp.zeros_like(more), cache)
  for row in range(2):
    kept = following[row, : 15 - begun[row]]  # What is dropped cannot be seen.
    np.testing.assert_allclose(out[row, : len(kept)], full[row, kept], atol=1e-4, rtol=0)
  assert cache.cursor.tolist() == [16, 13]
  assert cache.segment_ids.tolist() == [[0] * 15, [0] * 13 + [-1] * 2]
  assert cache.positions[1, :13].tolist() == list(range(13))


@pytest.mark.parametrize("left, right", [(5, 0), (0, 5), (2, 3)])
def test_padding_changes_nothing(model, left, right):
  _, params, hidden = model
  tokens, length = family_tokens()[0], N_TOKENS - 5
  plain, _ = hidden(params, *rows_of((tokens, np.arange(N_TOKENS), 0)))
  row = rows_of(
    (np.full(left, 9), 0, -1), (tokens[:length], np.arange(length), 0), (np.full(right, 9), 0, -1)
  )
  padded, _ = hidden(params, *row)
  assert np.isfinite(padded).all()
  np.testing.assert_allclose(padded[0, left : left + length], plain[0, :length], atol=2e-5, rtol=0)


def test_packed_sequences_do_not_see_one_another(model):
  _, params, hidden = model
  a, b = family_tokens()
  row = rows_of(
    (a[:12], np.arange(12), 1), (b[:9], np.arange(9), 2), (np.full(3, 5), np.zeros(3), -1)
  )
  packed, _ = hidden(params, *row)
  for tokens, found in ((a, packed[0, :12]), (b, packed[0, 12:21])):
    alone, _ = hidden(params, *rows_of((tokens, np.arange(N_TOKENS), 0)))
    np.testing.assert_allclose(found, alone[0, : len(found)], atol=2e-5, rtol=0)


def test_shared_prefix_is_seen_by_every_response(model):
  _, params, hidden = model
  tokens, others = family_tokens()
  prefix, first, second = tokens[:10], tokens[10:16], others[10:18]
  row = rows_of(
    (prefix, np.arange(10), 0), (first, 10 + np.arange(6), 1), (second, 10 + np.arange(8), 2)
  )
  shared, _ = hidden(params, *row)
  for answer, found in ((first, shared[0, 10:16]), (second, shared[0, 16:])):
    alone = np.concatenate([prefix, answer, np.zeros(14 - len(answer))])
    expected, _ = hidden(params, *rows_of((alone, np.arange(N_TOKENS), 0)))
    np.testing.assert_allclose(found, expected[0, 10 : 10 + len(answer)], atol=2e-5, rtol=0)


def test_rows_of_padding_have_finite_values_and_gradients(model):
  policy, params, _ = model
  tokens = jnp.asarray(family_tokens()[:, :6])
  segments = jnp.array([[-1] * 6, [-1, -1, 0, 0, 0, -1]])

  def total(params):
    return policy.hidden(params, tokens, columns(tokens), segments)[0].sum()

  value, gradient = jax.jit(jax.value_and_grad(total))(params)
  assert np.isfinite(value)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_out_of_window_keys_do_not_matter_to_one_layer(tiny):
  config, params = tiny
  config = dataclasses.replace(config, n_layers=1, sliding_window=3, layer_types=("sliding",))
  policy = make_policy(config)
  tokens = jnp.arange(8)[None]
  changed = tokens.at[0, 4].set(30)
  hidden = jax.jit(policy.hidden)
  a, _ = hidden(params, tokens, columns(tokens))
  b, _ = hidden(params, changed, columns(tokens))
  moved = np.abs(np.asarray(a - b)).max(axis=-1)[0] > 0
  assert moved.tolist() == [False] * 4 + [True] * 3 + [False]


@pytest.mark.parametrize("cached", [False, True])
def test_of_a_layer_neither_scores_nor_gated_halves_are_kept(cached):
  """Until the backward pass there are gate and up, from which the rest is soon made again."""
  config = dataclasses.replace(tiny_config(32), n_layers=2, mlp_width=57)
  policy, tokens, n_keys = make_policy(config), jnp.arange(22).reshape(2, 11), 13 if cached else 11
  params = jax.jit(policy.init)(jax.random.key(0))

  def hidden(params):
    cache = policy.init_cache(2, n_keys) if cached else None
    return policy.hidden(params, tokens, columns(tokens), None, cache)[0]

  _, pull = jax.vjp(hidden, params)
  kept = [x.shape for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert kept.count((22, 57)) == 2 * config.n_layers
  rows = {11, 2 * 11}  # Tokens; in a cache's layout those of all heads that read one key head.
  assert not [shape for shape in kept if shape[-1:] == (n_keys,) and rows & {*shape[-2:-1]}], kept


@pytest.mark.slow
def test_remat_changes_memory_and_nothing_else():
  config = dataclasses.replace(tiny_config(32), n_layers=6)
  tokens = jnp.arange(2048).reshape(16, 128) % 32
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  gradients, held = [], []
  for remat in (False, True):
    policy = make_policy(config, remat=remat)
    gradient = jax.jit(jax.grad(lambda p, f=policy.hidden: f(p, tokens, columns(tokens))[0].std()))
    program = gradient.lower(params).compile()
    held.append(program.memory_analysis().temp_size_in_bytes)
    gradients.append(program(params))
  assert held[1] < 0.4 * held[0], held  # Of 6 layers' activations one layer's, and the inputs.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *gradients)


def test_bfloat16_computes_there_and_answers_nearly_the_same(tiny):
  config, params = tiny
  exact, rough = make_policy(config), make_policy(config, dtype=jnp.bfloat16)
  tokens = jnp.arange(12).reshape(2, 6)
  hidden, cache = jax.jit(rough.hidden)(
    params, tokens, columns(tokens), None, rough.init_cache(2, 8)
  )
  assert hidden.dtype == cache.keys[0].dtype == cache.values[0].dtype == jnp.bfloat16
  logits = rough.logits(params, hidden)
  assert logits.dtype == jnp.float32
  expected = exact.logits(params, jax.jit(exact.hidden)(params, tokens, columns(tokens))[0])
  np.testing.assert_allclose(logits, expected, atol=0.05)  # bfloat16 keeps 8 bits; logits are ~1
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_policy_is_hashable_and_the_same_for_the_same_arguments():
  config = tiny_config(32)
  assert make_policy(config) is make_policy(tiny_config(32))
  assert make_policy(config) != make_policy(config, remat=True)
  assert hash(make_policy(config)) == hash(make_policy(config))


def test_parameter_paths_and_count(tiny):
  config, params = tiny
  layer = 2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256  # norms, q and o, k and v, MLP
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == 32 * 64 + 64 + 2 * layer
  assert params["layers_1"]["attention"]["query"]["weight"].shape == (64, 64)
  assert set(params) == {"embed", "final_norm", "layers_0", "layers_1"}
  assert make_policy(config).unembed(params) is params["embed"]["embedding"]
  untied = make_policy(dataclasses.replace(config, tie_embeddings=False))
  shapes = jax.eval_shape(untied.init, jax.random.key(0))
  assert untied.unembed(shapes).shape == (32, 64) and "unembed" in shapes


def test_bad_shapes_are_named(tiny):
  config, params = tiny
  policy = make_policy(config)
  tokens = jnp.zeros((2, 3), jnp.int32)
  with pytest.raises(ValueError, match=r"tokens: shape \(3,\)"):
    policy.hidden(params, tokens[0], tokens[0])
  with pytest.raises(ValueError, match="positions: shape"):
    policy.hidden(params, tokens, tokens[:, :2])
  with pytest.raises(ValueError, match="segment_ids: shape"):
    policy.hidden(params, tokens, tokens, tokens[:1])
  with pytest.raises(ValueError, match=r"cache: .* init_cache\(2, length\)"):
    policy.hidden(params, tokens, tokens, None, policy.init_cache(2, 2))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"n_layers": 0}, "n_layers: 0"),
    ({"n_kv_heads": 3}, "n_kv_heads: 3 must divide n_heads, 4"),
    ({"head_dim": 15}, "head_dim: 15 must be even"),
    ({"activation": "relu"}, "'relu' is not one of 'silu', 'gelu_tanh'"),
    ({"layer_types": ("full",)}, "1 entries for 2 layers"),
    ({"layer_types": ("full", "wide")}, "must be full or sliding"),
    ({"layer_types": ("full", "sliding")}, "sliding_window: None must be >= 1"),
  ],
)
def test_bad_configs_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny_config(32), **change)


def test_bad_rope_scaling_is_named():
  with pytest.raises(ValueError, match="'yarn' is not one of"):
    RopeScaling("yarn", 2.0)
  with pytest.raises(ValueError, match="factor: 0.0 must be > 0"):
    RopeScaling("linear", 0.0)
  with pytest.raises(ValueError, match="high_freq_factor"):
    RopeScaling("llama3", 2.0, 4.0, 1.0)


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    tiny_config(32).width = 3
  assert isinstance(hash(tiny_config(32)), int) and isinstance(tiny_config(32), TransformerConfig)
