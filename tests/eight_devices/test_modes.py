"""Every public function of arrays where importers call it: in `jax.shard_map`, on Explicit axes."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rl_llm.logprobs import chunked_logprobs_and_entropy
from rl_llm.losses import chunked_gkd_loss
from tests.losses import modes

SHARED = {"unembedding", "teacher_unembedding"}
FIRST = {name: modes.cases(name)[0] for name in modes.PUBLIC}
DATA = functools.partial(jax.make_mesh, (8,), ("data",), axis_types=(AxisType.Auto,))


def has_rows(name, x):
  return x.ndim > 0 and name not in SHARED and x.shape[0] in (modes.ROWS, modes.ROWS // modes.GROUP)


def computed(name):
  """floats, others -> outputs, and gradients where the function does something about a mesh."""
  if hasattr(modes.PUBLIC[name], "__wrapped__"):  # By `any_mesh`.
    return modes.with_gradients(FIRST[name])
  return lambda floats, others: (FIRST[name].function(**floats, **others), {})


def all_of(arrays):
  """name -> what is computed of every function, in one program."""
  return {name: computed(name)(*modes.split(arrays[name])) for name in FIRST}


def arrays_of(change):
  """name -> its arrays, each as `change(its name, itself)` has it."""
  return {
    name: {key: change(key, x) for key, x in case.arrays.items()} for name, case in FIRST.items()
  }


def close(found, wanted):
  for name in wanted:
    for ours, theirs in zip(*map(jax.tree.leaves, (found[name], wanted[name])), strict=True):
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


@functools.cache
def explicit_mesh():
  return jax.make_mesh((4, 2), ("data", "tensor"))


def on_explicit_axes(key, x, *, tokens=True):
  """Rows over data; over tensor the tokens of a row, or else the vocabulary."""
  if key in SHARED:
    spec = P() if tokens else P("tensor")
  elif not has_rows(key, x):
    spec = P()
  else:
    spec = P("data", "tensor") if tokens and x.shape[1:2] == (modes.T,) else P("data")
  return jax.device_put(x, NamedSharding(explicit_mesh(), spec))


def test_on_explicit_axes_everything_is_what_it_is_on_one_device():
  with jax.set_mesh(explicit_mesh()):
    found = jax.jit(all_of)(arrays_of(on_explicit_axes))
  close(found, jax.jit(all_of)(arrays_of(lambda key, x: x)))
  assert jax.typeof(found["top_entropy"][0]).sharding.spec == P("data", "tensor")


@pytest.mark.parametrize("name", modes.PUBLIC)
def test_every_choice_is_traced_on_explicit_axes_and_in_shard_map(name):
  """Types alone: which devices an array lies on, and over which axes it varies."""
  for case in modes.cases(name):
    for tokens in {True, not SHARED & case.arrays.keys()}:
      placed = {k: on_explicit_axes(k, x, tokens=tokens) for k, x in case.arrays.items()}
      jax.eval_shape(jax.jit(modes.with_gradients(case)), *modes.split(placed))
    jax.eval_shape(in_shard_map(modes.with_gradients(case), case), *modes.split(case.arrays))


def in_shard_map(call, case):
  """The call on each device's rows; what it returns is stacked."""
  specs = [
    {key: P("data") if has_rows(key, x) else P() for key, x in part.items()}
    for part in modes.split(case.arrays)
  ]
  stacked = lambda *parts: jax.tree.map(lambda x: x[None], call(*parts))  # noqa: E731
  return jax.shard_map(stacked, mesh=DATA(), in_specs=tuple(specs), out_specs=P("data"))


def test_in_shard_map_each_device_computes_what_it_would_alone():
  """The same rows on all, so that one device has the answer for each; a shared array's gradient
  is added up over them."""
  few = arrays_of(lambda key, x: x[: len(x) // 8] if has_rows(key, x) else x)
  many = arrays_of(lambda key, x: np.concatenate([x[: len(x) // 8]] * 8) if has_rows(key, x) else x)

  def everywhere(arrays):
    return {
      name: in_shard_map(computed(name), case)(*modes.split(arrays[name]))
      for name, case in FIRST.items()
    }

  wanted, found = jax.jit(all_of)(few), jax.jit(everywhere)(many)
  for name, (outputs, gradients) in wanted.items():
    for key in gradients:
      if not has_rows(key, FIRST[name].arrays[key]):
        gradients[key] = 8 * gradients[key]
    wanted[name] = jax.tree.map(lambda x: np.stack([x] * 8), (outputs, gradients))
  close(found, wanted)


# As many tokens as 64 blocks of 128 have: 151,936 = 2^7 * 1187 has no block of rows that is a
# multiple of 4 shards from there on.
@pytest.mark.parametrize("vocabulary", [151_936, 128_256])
def test_smaller_chunks_take_less_memory_where_the_vocabulary_is_sharded(vocabulary):
  mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

  def placed(shape, spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def temporaries(chunk_size):
    def loss(hidden, unembedding, tokens):
      found = chunked_logprobs_and_entropy(hidden, unembedding, tokens, chunk_size=chunk_size)
      return jnp.sum(sum(found))

    compiled = (
      jax.jit(jax.grad(loss, (0, 1)))
      .lower(
        placed((8, 1024, 16), P("data")),
        placed((vocabulary, 16), P("tensor")),
        placed((8, 1024), P("data"), jnp.int32),
      )
      .compile()
    )
    assert "all-gather" not in compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes

  sizes = [temporaries(chunk_size) for chunk_size in (512, 256, 128, 64)]
  for large, small in zip(sizes, sizes[1:], strict=False):
    assert 0.4 * large < small < 0.6 * large, sizes
  logits = 4 * 64 * vocabulary / 8
  assert sizes[-1] < 3 * logits, sizes


@pytest.mark.parametrize("tokens, chunk_size", [(125, 256), (125, 100), (150, 64)])
def test_chunks_of_sharded_tokens_stay_where_they_are(tokens, chunk_size):
  """1,000 tokens in 4 chunks would be 250 rows, which eight devices cannot share."""

  def place(*shape):
    sharding = NamedSharding(DATA(), P("data") if shape[1:] else P())
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  unembedding = jnp.ones((64, 4))

  def loss(hidden, teacher_hidden, weights):
    arrays = hidden, unembedding, teacher_hidden, unembedding, weights
    return chunked_gkd_loss(*arrays, chunk_size=chunk_size)[0]

  rows = [place(8, tokens, 4), place(8, tokens, 4), place(8, tokens)]
  text = jax.jit(jax.grad(loss)).lower(*rows).compile().as_text()
  assert not re.findall("all-gather|collective-permute|all-to-all", text)


@pytest.mark.parametrize("vocabulary", [152, 120])
def test_blocks_that_end_within_a_shard_add_up(vocabulary):
  """152 = 8 * 19 rows in blocks of 8 * 3: the last of 7 overlaps; 120 tokens are in 8 blocks."""
  mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(0)
  hidden, unembedding = rng.normal(size=(30, 4)), rng.normal(size=(vocabulary, 4))
  tokens = rng.integers(0, vocabulary, size=30)

  def loss(hidden, unembedding, *, chunk_size):
    found = chunked_logprobs_and_entropy(hidden, unembedding, tokens, chunk_size=chunk_size)
    return jnp.sum(found[0] * hidden[:, 0] + 0.5 * found[1]), found

  def call(unembedding, chunk_size):
    both = jax.value_and_grad(functools.partial(loss, chunk_size=chunk_size), (0, 1), has_aux=True)
    return jax.jit(both)(jnp.float32(hidden), unembedding)

  placed = jax.device_put(jnp.float32(unembedding), NamedSharding(mesh, P("tensor")))
  found, wanted = call(placed, 5), call(jnp.float32(unembedding), 30)
  for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
