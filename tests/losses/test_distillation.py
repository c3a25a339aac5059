"""Distillation against float64 loops, limits, and exact enumeration of all texts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(0)
B, T, V, D, E = 2, 5, 7, 4, 3
MASK = np.arange(T) < np.array([[5], [3]])
WEIGHTS = np.asarray(weighting.token_mean(MASK))
HIDDEN, TEACHER_HIDDEN = (RNG.normal(size=(B, T, n)).astype(np.float32) for n in (D, E))
UNEMBEDDING, TEACHER_UNEMBEDDING = (RNG.normal(size=(V, n)).astype(np.float32) for n in (D, E))
LOGITS, TEACHER_LOGITS = HIDDEN @ UNEMBEDDING.T, TEACHER_HIDDEN @ TEACHER_UNEMBEDDING.T
GKD = jax.jit(jax.value_and_grad(losses.gkd_loss, has_aux=True))


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def kl(p, q):
  return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def gkd_loop(logits, teacher_logits, beta, temperature):
  total = 0.0
  for b, t in np.argwhere(MASK):
    q, p = (softmax(np.float64(z[b, t]) / temperature) for z in (logits, teacher_logits))
    if beta in (0, 1):
      divergence = kl(q, p) if beta else kl(p, q)
    else:
      m = beta * p + (1 - beta) * q
      divergence = beta * kl(p, m) + (1 - beta) * kl(q, m)
    total += WEIGHTS[b, t] * divergence
  return total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_gkd_matches_the_loop(beta, temperature):
  (loss, metrics), _ = GKD(LOGITS, TEACHER_LOGITS, WEIGHTS, beta=beta, temperature=temperature)
  np.testing.assert_allclose(loss, gkd_loop(LOGITS, TEACHER_LOGITS, beta, temperature), rtol=1e-5)
  np.testing.assert_allclose(metrics["divergence"][0] / MASK.sum(), loss, rtol=1e-6)


def test_the_ends_are_what_the_middle_tends_to():
  """JSD / beta tends to KL(p || q), JSD / (1 - beta) to KL(q || p)."""
  for end, near, scale in [(0.0, 1e-6, 1e-6), (1.0, 1 - 1e-6, 1e-6)]:
    expected = gkd_loop(LOGITS, TEACHER_LOGITS, end, 1.0)
    np.testing.assert_allclose(
      gkd_loop(LOGITS, TEACHER_LOGITS, near, 1.0) / scale, expected, rtol=1e-3
    )


def test_gradients_at_the_ends_are_the_known_ones():
  """Forward: q - p. Reverse: q (log q - log p - KL)."""
  _, forward = GKD(LOGITS, TEACHER_LOGITS, WEIGHTS, beta=0.0)
  _, reverse = GKD(LOGITS, TEACHER_LOGITS, WEIGHTS, beta=1.0)
  for b, t in np.argwhere(MASK):
    q, p = softmax(np.float64(LOGITS[b, t])), softmax(np.float64(TEACHER_LOGITS[b, t]))
    w = WEIGHTS[b, t]
    np.testing.assert_allclose(forward[b, t], w * (q - p), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
      reverse[b, t], w * q * (np.log(q / p) - kl(q, p)), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(beta):
  (loss, _), gradient = GKD(LOGITS, LOGITS, WEIGHTS, beta=beta)
  np.testing.assert_allclose(loss, 0, atol=1e-6)
  np.testing.assert_allclose(gradient, np.zeros_like(LOGITS), atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_token_forbidden_to_both_is_as_if_absent(beta):
  add = lambda x: np.concatenate([x, np.full((B, T, 1), -np.inf, np.float32)], -1)  # noqa: E731
  (loss, _), gradient = GKD(add(LOGITS), add(TEACHER_LOGITS), WEIGHTS, beta=beta)
  (expected, _), slope = GKD(LOGITS, TEACHER_LOGITS, WEIGHTS, beta=beta)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient[..., :-1], slope, rtol=1e-5, atol=1e-7)
  assert not np.any(gradient[..., -1])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_what_only_one_forbids(beta):
  """Finite where the divergence is, about 1e30 where it is infinite; never nan."""
  for forbidden, endless in [(LOGITS, beta == 0.0), (TEACHER_LOGITS, beta == 1.0)]:
    logits = np.where(np.arange(V) == 2, -np.inf, forbidden)
    pair = (logits, TEACHER_LOGITS) if forbidden is LOGITS else (LOGITS, logits)
    (loss, _), gradient = GKD(*pair, WEIGHTS, beta=beta)
    assert np.isfinite(gradient).all()
    if endless:
      assert loss > 1e27
    else:
      np.testing.assert_allclose(loss, gkd_loop(*pair, beta, 1.0), rtol=1e-5)


@pytest.mark.parametrize("beta, temperature, softcap", [(0.5, 1.0, None), (0.0, 0.7, 2.0)])
def test_chunked_gkd_equals_dense_in_value_and_gradients(beta, temperature, softcap):
  settings = {"beta": beta, "temperature": temperature}
  cap = lambda z: z if softcap is None else softcap * jnp.tanh(z / softcap)  # noqa: E731

  def dense(hidden, unembedding):
    logits = cap(hidden @ unembedding.T)
    return losses.gkd_loss(logits, TEACHER_LOGITS, WEIGHTS, **settings)

  def chunked(hidden, unembedding, chunk_size):
    return losses.chunked_gkd_loss(
      hidden,
      unembedding,
      TEACHER_HIDDEN,
      TEACHER_UNEMBEDDING,
      WEIGHTS,
      chunk_size=chunk_size,
      softcaps=(softcap, None),
      **settings,
    )

  both = lambda f: jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))  # noqa: E731
  expected = both(dense)(HIDDEN, UNEMBEDDING)
  for chunk_size in (4, 64) if softcap is None else (1,):  # of the 10 tokens: 3, 1 and 10 chunks
    got = both(lambda h, u, n=chunk_size: chunked(h, u, n))(HIDDEN, UNEMBEDDING)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(left, right, rtol=2e-5, atol=1e-6)


def test_chunked_gkd_caps_the_teacher_and_gives_it_no_gradient():
  def loss(teacher_hidden, teacher_unembedding):
    return losses.chunked_gkd_loss(
      HIDDEN,
      UNEMBEDDING,
      teacher_hidden,
      teacher_unembedding,
      WEIGHTS,
      softcaps=(None, 1.5),
      chunk_size=4,
    )[0]

  value, gradients = jax.value_and_grad(loss, (0, 1))(TEACHER_HIDDEN, TEACHER_UNEMBEDDING)
  expected = gkd_loop(LOGITS, 1.5 * np.tanh(TEACHER_LOGITS / 1.5), 0.5, 1.0)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert not any(np.any(g) for g in gradients)


def test_chunked_gkd_never_holds_all_logits():
  """Temporaries shrink with the chunk: 4 tokens of 64 have logits, not all."""
  hidden, unembedding = jnp.ones((4, 16, D)), jnp.ones((5000, D))
  weights = jnp.full((4, 16), 1 / 64)

  def bytes_needed(loss):
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, unembedding).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  dense = bytes_needed(lambda h, u: losses.gkd_loss(h @ u.T, 2 * h @ u.T, weights)[0])
  chunked = bytes_needed(
    lambda h, u: losses.chunked_gkd_loss(h, u, 2 * h, unembedding, weights, chunk_size=4)[0]
  )
  assert dense > 64 * 5000 * 4 and chunked < dense / 6


# MiniLLM: all 9 texts of two tokens out of 3.
TEXTS = np.array(list(itertools.product(range(3), repeat=2)))


def text_logprobs(params):
  first = jax.nn.log_softmax(params["first"])[TEXTS[:, 0]]
  second = jax.nn.log_softmax(params["second"], axis=-1)[TEXTS[:, 0], TEXTS[:, 1]]
  return jnp.stack([first, second], axis=1)


def random_params():
  return {
    "first": RNG.normal(size=3).astype(np.float32),
    "second": RNG.normal(size=(3, 3)).astype(np.float32),
  }


def test_minillm_descends_the_reverse_kl_of_whole_texts():
  params, teacher = random_params(), text_logprobs(random_params())
  mask = np.ones((9, 2), bool)

  def reverse_kl(params):
    logprobs = text_logprobs(params)
    return jnp.sum(jnp.exp(logprobs.sum(1)) * (logprobs - teacher).sum(1))

  def surrogate(params, discount):
    logprobs = text_logprobs(params)
    advantages = losses.minillm_advantages(logprobs, teacher, mask, discount=discount)
    sampling = jnp.broadcast_to(jnp.exp(logprobs.sum(1))[:, None], mask.shape)
    return losses.reinforce_loss(logprobs, advantages, sampling)[0]

  gradient = jax.jit(jax.grad(surrogate))
  exact = jax.jit(jax.grad(reverse_kl))(params)
  for key, slope in gradient(params, 1.0).items():
    np.testing.assert_allclose(slope, exact[key], atol=1e-6)
  # Without what follows it, the first token's gradient is another one.
  assert np.abs(gradient(params, 0.0)["first"] - exact["first"]).max() > 1e-3


@pytest.mark.parametrize("length_normalize", [False, True])
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_minillm_matches_the_loop(discount, length_normalize):
  mask = np.array([[True, True, False, True], [False, True, True, True], [False] * 4])
  student, teacher = np.log(RNG.uniform(0.1, 0.9, size=(2, *mask.shape)))
  garbage = np.where(mask, student, np.nan)
  got = losses.minillm_advantages(
    garbage, teacher, mask, discount=discount, length_normalize=length_normalize
  )
  expected = np.zeros(mask.shape)
  for b in range(len(mask)):
    tokens = np.flatnonzero(mask[b])
    for i, t in enumerate(tokens):
      terms = [discount**k * (teacher - student)[b, s] for k, s in enumerate(tokens[i:])]
      length = sum(discount**k for k in range(len(terms)))
      expected[b, t] = sum(terms) / (length if length_normalize else 1)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


MU, TEACHER = np.log(RNG.uniform(0.1, 0.9, size=(2, B, T)))
LOGPROBS = np.minimum(MU + RNG.normal(scale=0.7, size=(B, T)), -0.01)
OPD = jax.jit(
  jax.value_and_grad(losses.on_policy_distillation_loss, has_aux=True), static_argnames="max_drop"
)


@pytest.mark.parametrize("max_drop, coef", [(0.2, 1e-3), (None, 0.5), (0.05, 0.0)])
def test_on_policy_distillation_matches_the_loop(max_drop, coef):
  (loss, metrics), gradient = OPD(
    LOGPROBS, MU, TEACHER, WEIGHTS, max_drop=max_drop, sampler_coef=coef
  )
  total, slope, drops = 0.0, np.zeros((B, T)), 0
  for b, t in np.argwhere(MASK):
    l, mu, a = LOGPROBS[b, t], MU[b, t], TEACHER[b, t] - LOGPROBS[b, t]  # noqa: E741
    push = -a * np.exp(l - mu)  # its own slope, with a held
    if max_drop is not None and np.exp(l) - np.exp(mu) < -max_drop:
      push, drops = 0.0, drops + 1
    total += WEIGHTS[b, t] * (push + coef * (l - mu) ** 2)
    slope[b, t] = WEIGHTS[b, t] * (push + 2 * coef * (l - mu))
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
  assert metrics["dropped_fraction"] == (drops, MASK.sum())
  assert (drops > 0) == (max_drop is not None)


def test_on_policy_distillation_defaults():
  given = OPD(LOGPROBS, MU, TEACHER, WEIGHTS, max_drop=0.2, sampler_coef=1e-3)
  assert given[0][0] == OPD(LOGPROBS, MU, TEACHER, WEIGHTS)[0][0]


def test_before_the_first_update_it_is_the_gradient_of_the_reverse_kl():
  _, gradient = OPD(MU, MU, TEACHER, WEIGHTS)
  kl_gradient = jax.grad(lambda x: losses.kl_loss(x, TEACHER, WEIGHTS, gradient="k2")[0])(MU)
  np.testing.assert_allclose(gradient, kl_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  "call",
  [
    lambda **k: losses.gkd_loss(LOGITS, TEACHER_LOGITS, WEIGHTS, **k),
    lambda **k: losses.chunked_gkd_loss(
      HIDDEN, UNEMBEDDING, TEACHER_HIDDEN, TEACHER_UNEMBEDDING, WEIGHTS, **k
    ),
  ],
  ids=["gkd", "chunked"],
)
def test_bad_settings_are_named(call):
  for key, value in [("beta", 1.5), ("temperature", 0)]:
    with pytest.raises(ValueError, match=f"{key} is {value}"):
      call(**{key: value})


@pytest.mark.parametrize(
  "wrong, message",
  [
    ({"unembedding": UNEMBEDDING.T}, "unembedding has shape.*D = 4 as in hidden: transpose"),
    ({"teacher_unembedding": UNEMBEDDING}, "teacher_unembedding has shape.*D = 3 as in teacher_h"),
    ({"teacher_unembedding": TEACHER_UNEMBEDDING[:5]}, "teacher_unembedding.*V = 7 rows"),
    ({"unembedding": UNEMBEDDING.astype(int)}, "unembedding has dtype int"),
    ({"teacher_hidden": TEACHER_HIDDEN[:1]}, "teacher_hidden has shape"),
    ({"chunk_size": 0}, "chunk_size is 0"),
    ({"softcaps": (0, None)}, r"softcaps\[0\] is 0"),
    ({"softcaps": (None, -1)}, r"softcaps\[1\] is -1"),
  ],
)
def test_wrong_unembeddings_are_named(wrong, message):
  good = {
    "hidden": HIDDEN,
    "unembedding": UNEMBEDDING,
    "teacher_hidden": TEACHER_HIDDEN,
    "teacher_unembedding": TEACHER_UNEMBEDDING,
    "weights": WEIGHTS,
  }
  with pytest.raises(ValueError, match=message):
    losses.chunked_gkd_loss(**good | wrong)
