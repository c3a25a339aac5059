"""Sampling draws from the distribution it reports, and reports the full tempered one."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.rollout.sampling import SamplingConfig, _invert
from rl_llm.rollout.sampling import sample as eager_sample
from tests.representatives import mostly_slow

sample = jax.jit(eager_sample)
invert = jax.jit(_invert, static_argnums=2)


def draw(logits, config, *, n, suppress=None, seed=0):
  """n independent draws from one row of logits, as counts."""
  logits = jnp.asarray(logits, jnp.float32)
  keys = jax.random.split(jax.random.key(seed), n)
  rows = jnp.broadcast_to(logits, (n, logits.size))
  if suppress is not None:
    suppress = jnp.broadcast_to(jnp.asarray(suppress), rows.shape)
  drawn = sample(keys, rows, config, suppress=suppress)
  return np.bincount(np.asarray(drawn.token), minlength=logits.size), drawn


def chi_square(counts, probabilities):
  """Pearson's statistic over the cells with mass; cells without must be empty."""
  probabilities = np.asarray(probabilities, np.float64)
  assert counts[probabilities == 0].sum() == 0
  expected = probabilities * counts.sum()
  cells = expected > 0
  return np.sum((counts[cells] - expected[cells]) ** 2 / expected[cells]), cells.sum() - 1


def assert_distribution(counts, probabilities):
  """Five standard deviations of the statistic's own distribution, mean k and variance 2k."""
  statistic, freedom = chi_square(counts, probabilities)
  assert statistic <= freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize(
  ("vocab", "temperature"),
  mostly_slow(itertools.product((7, 256, 1000), (0.7, 1.0, 2.0)), quick=[1, 3, 8]),
)
def test_draws_follow_the_tempered_softmax(vocab, temperature):
  logits = np.random.default_rng(vocab).normal(size=vocab) * 0.7
  counts, _ = draw(logits, SamplingConfig(temperature=temperature), n=20_000)
  exact = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  assert_distribution(counts, exact)


def test_the_chi_square_test_notices_a_wrong_temperature():
  logits = np.random.default_rng(0).normal(size=50)
  counts, _ = draw(logits, SamplingConfig(temperature=1.0), n=20_000)
  wrong = np.exp(logits / 1.1) / np.exp(logits / 1.1).sum()
  with pytest.raises(AssertionError):
    assert_distribution(counts, wrong)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprob_and_entropy_are_of_the_full_distribution_under_top_k_and_top_p(temperature):
  logits = np.array([2.0, 1.0, 0.0, -1.0])
  config = SamplingConfig(temperature=temperature, top_k=2, top_p=0.9)
  counts, drawn = draw(logits, config, n=1000)
  p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
  np.testing.assert_allclose(drawn.logprob, np.log(p)[np.asarray(drawn.token)], atol=1e-6)
  np.testing.assert_allclose(drawn.entropy, -np.sum(p * np.log(p)), atol=1e-6)
  assert counts[2:].sum() == 0


def test_top_k_renormalises_over_the_k_likeliest():
  logits = np.log([0.1, 0.4, 0.2, 0.3])
  counts, _ = draw(logits, SamplingConfig(top_k=2), n=40_000)
  assert_distribution(counts, [0, 4 / 7, 0, 3 / 7])


@pytest.mark.parametrize(
  "p, kept",
  mostly_slow(
    [(0.35, [1]), (0.4, [1]), (0.41, [1, 3]), (0.9, [1, 2, 3]), (0.95, [0, 1, 2, 3])], quick=[1, 2]
  ),
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, kept):
  probabilities = np.array([0.1, 0.4, 0.2, 0.3])
  counts, _ = draw(np.log(probabilities), SamplingConfig(top_p=p), n=20_000)
  exact = np.where(np.isin(np.arange(4), kept), probabilities, 0)
  assert_distribution(counts, exact / exact.sum())


def test_zero_temperature_is_argmax_and_rows_may_differ():
  logits = jnp.array([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0]])
  keys = jax.random.split(jax.random.key(1), 2)
  drawn = sample(keys, logits, SamplingConfig(temperature=jnp.array([0.0, 1.0])))
  assert drawn.token[0] == 1
  total = math.log(1 + math.exp(3) + math.exp(1))
  assert drawn.logprob[0] == pytest.approx(3 - total, abs=1e-6)
  assert drawn.entropy[1] == pytest.approx(math.log(3), abs=1e-6)


def test_suppressed_tokens_are_never_drawn_even_when_they_hold_all_the_mass():
  logits = np.array([200.0, 0.0, math.log(3.0)])
  counts, drawn = draw(logits, SamplingConfig(), n=20_000, suppress=[True, False, False])
  assert_distribution(counts, [0, 0.25, 0.75])
  np.testing.assert_allclose(drawn.logprob, logits[np.asarray(drawn.token)] - 200, atol=1e-4)


def test_extreme_logits_stay_finite():
  logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [-jnp.inf, 0.0, -jnp.inf]])
  drawn = sample(jax.random.split(jax.random.key(0), 3), logits, SamplingConfig())
  assert jnp.all(jnp.isfinite(drawn.logprob)) and jnp.all(jnp.isfinite(drawn.entropy))
  assert drawn.token[0] == 0 and drawn.token[2] == 1


def test_inversion_lands_where_the_cumulative_mass_says():
  """Every boundary of a small distribution, against an explicit loop."""
  masses = np.array([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
  cumulative = np.cumsum(masses) / masses.sum()
  uniforms = [0.0, 0.1, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999, np.nextafter(np.float32(1), 0)]
  for u, block in itertools.product(uniforms, [1, 2, 4, 256]):
    expected = next(i for i, c in enumerate(cumulative) if c > u)
    got = invert(jnp.asarray(masses[None], jnp.float32), jnp.array([u], jnp.float32), block)
    assert int(got[0]) == expected, (u, block)


def test_a_row_draws_the_same_whatever_its_neighbours():
  logits = jax.random.normal(jax.random.key(3), (6, 40))
  keys = jax.random.split(jax.random.key(4), 6)
  together = sample(keys, logits, SamplingConfig()).token
  alone = [sample(keys[i : i + 1], logits[i : i + 1], SamplingConfig()).token[0] for i in range(6)]
  assert together.tolist() == [int(token) for token in alone]


def test_what_finds_the_likeliest_token_reads_the_logits_and_nothing_made_of_them():
  """An array that a branch reads is written to memory first, as large as the logits."""
  keys, logits = jax.random.split(jax.random.key(0), 3), jnp.zeros((3, 500))
  traced = jax.make_jaxpr(lambda *x: eager_sample(*x, SamplingConfig(jnp.ones(3))))(
    keys, logits
  ).jaxpr
  (branch,) = (e for e in traced.eqns if e.primitive.name == "cond")
  large = [v for v in branch.invars if getattr(v.aval, "shape", ()) == logits.shape]
  assert large == [traced.invars[1]]
