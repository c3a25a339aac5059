"""Log-probs and entropies against float64 numpy; the chunked form against the dense one."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import logprobs as lp

B, T, D, V = 2, 5, 6, 11
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
UNEMBEDDING = RNG.normal(size=(V, D)).astype(np.float32)
TOKENS = RNG.integers(0, V, size=(B, T))


def exact(logits, tokens, temperature):
  z = np.asarray(logits, np.float64) / temperature
  logp = z - z.max(-1, keepdims=True)
  logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
  chosen = np.take_along_axis(logp, tokens[..., None], -1)[..., 0]
  return chosen, -(np.exp(logp) * logp).sum(-1)


def dense(hidden, unembedding, tokens, temperature=1.0, softcap=None):
  logits = jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type=jnp.float32)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  return (
    lp.token_logprobs(logits, tokens, temperature=temperature),
    lp.entropy(logits, temperature=temperature),
  )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_dense_forms_match_float64(temperature):
  logits = HIDDEN @ UNEMBEDDING.T
  chosen, entropies = exact(logits, TOKENS, temperature)
  got = lp.token_logprobs(logits, TOKENS, temperature=temperature)
  np.testing.assert_allclose(got, chosen, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(lp.entropy(logits, temperature=temperature), entropies, rtol=1e-5)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_softmax_is_shift_invariant_and_survives_huge_logits(shift):
  logits = np.array([[0.0, 1.0, -2.0]], np.float32)
  tokens = np.array([2])
  for f in (lambda z: lp.token_logprobs(z, tokens), lp.entropy):
    np.testing.assert_allclose(f(logits + shift), f(logits), rtol=1e-6)
  spread = jnp.array([[shift, 0.0, -shift]])
  both = lambda z: (lp.token_logprobs(z, tokens) + lp.entropy(z)).sum()  # noqa: E731
  gradient = jax.jit(jax.grad(both))(spread)
  assert np.isfinite(gradient).all() and np.isfinite(lp.token_logprobs(spread, tokens)).all()


def test_a_forbidden_token_is_as_if_absent():
  logits = jnp.array([[0.5, -jnp.inf, 1.5]])
  rest = jnp.array([[0.5, 1.5]])
  f = jax.jit(jax.value_and_grad(lambda z: lp.entropy(z).sum()))
  (value, gradient), (expected, expected_gradient) = f(logits), f(rest)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient[:, [0, 2]], expected_gradient, rtol=1e-6)
  assert gradient[0, 1] == 0


def value_and_gradients(f, hidden, unembedding):
  """Values, and gradients of a sum in which each log-prob and each entropy counts differently."""
  a, b = jnp.asarray(np.random.default_rng(1).normal(size=(2, *hidden.shape[:-1])))

  def scalar(hidden, unembedding):
    logprobs, entropies = f(hidden, unembedding)
    return jnp.sum(a * logprobs + b * entropies), (logprobs, entropies)

  return jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(hidden, unembedding)


@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, 2.0)])
def test_chunked_equals_dense_in_value_and_both_gradients(temperature, softcap):
  kwargs = {"temperature": temperature, "softcap": softcap}
  expected = value_and_gradients(
    lambda h, w: dense(h, w, TOKENS, **kwargs), jnp.asarray(HIDDEN), jnp.asarray(UNEMBEDDING)
  )
  for chunk_size in (1, 4, 64):  # of the 10 tokens: 10 chunks; 3 with 2 tokens of padding; 1
    got = value_and_gradients(
      lambda h, w, n=chunk_size: lp.chunked_logprobs_and_entropy(
        h, w, TOKENS, chunk_size=n, **kwargs
      ),
      jnp.asarray(HIDDEN),
      jnp.asarray(UNEMBEDDING),
    )
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-6)


def test_chunked_gradient_matches_finite_differences_in_float64():
  def loss(hidden, unembedding):
    z = 2 * np.tanh((hidden @ unembedding.T) / 2)
    chosen, entropies = exact(z, TOKENS, 0.7)
    return np.sum(chosen + 0.5 * entropies)

  def chunked(hidden, unembedding):
    logprobs, entropies = lp.chunked_logprobs_and_entropy(
      hidden, unembedding, TOKENS, chunk_size=4, temperature=0.7, softcap=2.0
    )
    return jnp.sum(logprobs + 0.5 * entropies)

  gradients = jax.jit(jax.grad(chunked, (0, 1)))(HIDDEN, UNEMBEDDING)
  arrays = [HIDDEN.astype(np.float64), UNEMBEDDING.astype(np.float64)]
  for i, index in [(0, (0, 0, 0)), (0, (1, 4, 5)), (1, (0, 0)), (1, (TOKENS[0, 0], 3))]:
    sides = []
    for step in (1e-5, -1e-5):
      moved = [a.copy() for a in arrays]
      moved[i][index] += step
      sides.append(loss(*moved))
    slope = (sides[0] - sides[1]) / 2e-5
    np.testing.assert_allclose(gradients[i][index], slope, rtol=1e-4, atol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from rl_llm.logprobs import chunked_logprobs_and_entropy
from rl_llm.losses import chunked_gkd_loss

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
hidden, other = rng.normal(size=(2, 4, 6, 8)).astype(np.float32)
unembedding = rng.normal(size=(24, 8)).astype(np.float32)
tokens = rng.integers(0, 24, size=(4, 6))
weights = rng.normal(size=(4, 6)).astype(np.float32)

def loss(hidden, unembedding, other, tokens, weights):
  logprobs, entropies = chunked_logprobs_and_entropy(
    hidden, unembedding, tokens, chunk_size=5, temperature=0.7)
  gkd, _ = chunked_gkd_loss(hidden, unembedding, other, unembedding, weights, chunk_size=5)
  return jnp.sum(weights * (logprobs + 0.5 * entropies)) + gkd, (logprobs, entropies)

step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
expected = step(hidden, unembedding, other, tokens, weights)
for of_vocabulary in (P("model"), P(("data", "model"))):
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  rows = [put(x, P("data")) for x in (hidden, other, tokens, weights)]
  unembeddings = put(unembedding, of_vocabulary)
  assert len(rows[0].sharding.device_set) == len(unembeddings.sharding.device_set) == 4
  got = step(rows[0], unembeddings, *rows[1:])
  for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-6)
print("equal")
"""


@pytest.mark.slow
def test_chunked_forms_are_the_same_under_sharding_of_batch_and_vocabulary():
  """On four devices, so in a process that was started with them."""
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run(
    [sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def test_blocks_of_any_vocabulary_add_up():
  """V of 1, a prime, and more blocks than rows; with padding rows in the last block."""
  for vocabulary, chunk_size in [(1, 3), (2, 1), (7, 4), (11, 3)]:
    unembedding = UNEMBEDDING[:vocabulary] * 2  # peaks move from block to block
    tokens = TOKENS % vocabulary
    got = lp.chunked_logprobs_and_entropy(HIDDEN, unembedding, tokens, chunk_size=chunk_size)
    for left, right in zip(got, exact(HIDDEN @ unembedding.T, tokens, 1.0), strict=True):
      np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


def test_chunked_memory_is_a_fraction_of_the_dense():
  """Nothing of the size of all logits, and nothing of the size of the unembedding."""
  hidden, unembedding = jnp.ones((256, 64)), jnp.ones((4096, 64))
  tokens = jnp.zeros(256, int)

  def temporaries(f):
    loss = lambda h, w: jnp.sum(sum(f(h, w)))  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembedding).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  chunked = temporaries(lambda h, w: lp.chunked_logprobs_and_entropy(h, w, tokens, chunk_size=16))
  assert chunked < temporaries(lambda h, w: dense(h, w, tokens)) / 8
  assert chunked < unembedding.nbytes


def test_chunked_accepts_bfloat16_and_accumulates_in_float32():
  """A logit's slope is rounded once where it meets bfloat16, and so is a gradient in bfloat16."""
  hidden, unembedding = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(UNEMBEDDING, jnp.bfloat16)
  for w in (unembedding, unembedding.astype(jnp.float32)):
    f = functools.partial(lp.chunked_logprobs_and_entropy, tokens=TOKENS, chunk_size=3)
    (value, aux), (of_h, of_w) = value_and_gradients(f, hidden, w)
    wide = hidden.astype(jnp.float32), w.astype(jnp.float32)
    (exact_value, _), (exact_h, exact_w) = value_and_gradients(
      lambda h, w: dense(h, w, TOKENS), *wide
    )
    assert aux[0].dtype == jnp.float32 and of_h.dtype == hidden.dtype and of_w.dtype == w.dtype
    np.testing.assert_allclose(value, exact_value, rtol=1e-5)
    # The slopes themselves: the gradient of the objective in the logits h @ w.T of w = identity.
    logits = jnp.einsum("btd,vd->btv", *wide)
    _, (slopes, _) = value_and_gradients(lambda z, w: dense(z, w, TOKENS), logits, jnp.eye(V))
    slopes, half_ulp = np.abs(slopes), 2.0**-8
    sizes_h = np.einsum("btv,vd->btd", slopes, np.abs(wide[1]))
    sizes_w = np.einsum("btv,btd->vd", slopes, np.abs(wide[0]))
    for got, exactly, sizes, meets, rounded in (
      (of_h, exact_h, sizes_h, w.dtype == jnp.bfloat16, True),
      (of_w, exact_w, sizes_w, True, w.dtype == jnp.bfloat16),
    ):
      bound = 1.01 * half_ulp * (meets * sizes + rounded * np.abs(exactly)) + 1e-5
      assert np.all(np.abs(got.astype(np.float32) - exactly) <= bound)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_products_over_the_vocabulary_are_in_the_dtype_of_what_they_multiply(softcap):
  """In float32 they would be four times as slow on an accelerator; float32 stays float32."""
  for dtype, short in ((jnp.bfloat16, "bf16"), (jnp.float32, "f32")):
    arrays = jnp.asarray(HIDDEN, dtype), jnp.asarray(UNEMBEDDING, dtype)
    f = lambda h, w: sum(  # noqa: E731
      x.sum()
      for x in lp.chunked_logprobs_and_entropy(
        h,
        w,
        TOKENS,
        chunk_size=3,
        softcap=softcap,  # noqa: B023
      )
    )
    text = jax.jit(jax.grad(f, (0, 1))).lower(*arrays).as_text()
    types = (
      r"dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>"
    )
    products = re.findall(types, text)
    assert len(products) == text.count("stablehlo.dot_general") >= 4
    assert set(products) == {(short, short, "f32")}


def test_chunked_takes_traced_settings_any_rank_and_no_tokens():
  def f(temperature, softcap):
    return lp.chunked_logprobs_and_entropy(
      HIDDEN, UNEMBEDDING, TOKENS, chunk_size=4, temperature=temperature, softcap=softcap
    )

  for got, expected in zip(jax.jit(f)(0.7, 3), f(0.7, 3), strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-6)
  assert jax.grad(lambda t: f(t, None)[0].sum())(0.7) == 0  # a constant, by contract
  one = lp.chunked_logprobs_and_entropy(HIDDEN[0, 0], UNEMBEDDING, TOKENS[0, 0], chunk_size=4)
  assert one[0].shape == ()
  none = lp.chunked_logprobs_and_entropy(HIDDEN[:0], UNEMBEDDING, TOKENS[:0], chunk_size=4)
  assert none[0].shape == (0, T)


def test_chunked_survives_huge_logits():
  hidden = jnp.asarray(HIDDEN) * 1e4
  (_, values), gradients = value_and_gradients(
    lambda h, w: lp.chunked_logprobs_and_entropy(h, w, TOKENS, chunk_size=4),
    hidden,
    jnp.asarray(UNEMBEDDING),
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((values, gradients)))


def test_chunked_never_builds_the_logits():
  tokens, width, vocabulary = 512, 4, 2048
  shapes = (
    jax.ShapeDtypeStruct((tokens, width), jnp.float32),
    jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
    jax.ShapeDtypeStruct((tokens,), jnp.int32),
  )

  def temporaries(f):
    scalar = lambda h, w, t: sum(x.sum() for x in f(h, w, t))  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(scalar, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  chunked = functools.partial(lp.chunked_logprobs_and_entropy, chunk_size=32)
  assert temporaries(chunked) < temporaries(dense) / 8


def test_sequence_logprobs_sums_or_averages_the_response():
  logprobs = np.array([[-1.0, -2.0, -4.0], [np.nan, -np.inf, -1.0]], np.float32)
  mask = np.array([[True, True, False], [False, False, False]])
  np.testing.assert_array_equal(lp.sequence_logprobs(logprobs, mask), [-3.0, 0.0])
  np.testing.assert_array_equal(lp.sequence_logprobs(logprobs, mask, average=True), [-1.5, 0.0])


def test_tokens_past_the_head_count_tail_weight_times():
  logprobs = np.array([[9.0, -1.0, -2.0, -4.0], [-1.0, -1.0, np.nan, -1.0]], np.float32)
  mask = np.array([[False, True, True, True], [True, True, False, True]])
  got = lambda **k: lp.sequence_logprobs(logprobs, mask, head_length=np.array([1, 5]), **k)  # noqa: E731
  np.testing.assert_allclose(got(tail_weight=0.25), [-1 - 0.25 * 6, -3], rtol=1e-6)
  np.testing.assert_allclose(got(tail_weight=0.25, average=True), [-2.5 / 3, -1], rtol=1e-6)
  np.testing.assert_allclose(got(), lp.sequence_logprobs(logprobs, mask))
  np.testing.assert_allclose(jax.jit(lambda w: got(tail_weight=w))(0.0), [-1, -3], rtol=1e-6)


chunked = functools.partial(lp.chunked_logprobs_and_entropy, chunk_size=4)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: lp.token_logprobs(HIDDEN, TOKENS[:1]), r"tokens has shape \(1, 5\); .* \(2, 5\)"),
    (lambda: lp.token_logprobs(HIDDEN, TOKENS * 1.0), "tokens has dtype float"),
    (lambda: lp.token_logprobs(HIDDEN, TOKENS, temperature=0.0), "temperature is 0.0.*above 0"),
    (lambda: lp.entropy(TOKENS), "logits has dtype int"),
    (
      lambda: lp.sequence_logprobs(HIDDEN[0], HIDDEN[0] < 0, tail_weight=0.5),
      "without head_length",
    ),
    (
      lambda: lp.sequence_logprobs(HIDDEN[0], HIDDEN[0] < 0, head_length=TOKENS[0, :2]),
      r"head_length has shape .2,.*\[B\] = \(5,\)",
    ),
    (lambda: chunked(HIDDEN, UNEMBEDDING.T, TOKENS), "unembedding has shape .6, 11.*transpose"),
    (lambda: chunked(HIDDEN, UNEMBEDDING, TOKENS[:1]), "tokens has shape"),
    (lambda: chunked(HIDDEN, UNEMBEDDING, TOKENS, softcap=-1), "softcap is -1"),
    (lambda: chunked(HIDDEN, UNEMBEDDING, TOKENS, chunk_size=0), "chunk_size is 0"),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
