"""Covariance methods: the statistic, exact selections, and what a selected token feels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(0)
SHAPE = (6, 20)
MASK = RNG.uniform(size=SHAPE) < 0.8
OLD = np.log(RNG.uniform(0.1, 0.9, SHAPE))
LOGPROBS = OLD + RNG.normal(scale=0.5, size=SHAPE)
ADVANTAGES = RNG.normal(scale=2.0, size=SHAPE[:1])
WEIGHTS = np.asarray(weighting.token_mean(MASK))
SELECTED = RNG.uniform(size=SHAPE) < 0.3
COVARIANCE = RNG.normal(scale=3.0, size=SHAPE)


def test_covariance_is_the_product_of_deviations_and_sums_to_the_covariance():
  garbage = np.where(MASK, LOGPROBS, -np.inf)
  got = np.asarray(losses.token_covariance(garbage, ADVANTAGES, MASK))
  tokens = [(LOGPROBS[b, t], ADVANTAGES[b]) for b, t in np.argwhere(MASK)]
  mean_l, mean_a = (sum(x) / len(tokens) for x in zip(*tokens, strict=True))
  expected = [(logprob - mean_l) * (a - mean_a) for logprob, a in tokens]
  np.testing.assert_allclose(got[MASK], expected, rtol=1e-4, atol=1e-6)
  assert not np.any(got[~MASK])
  exact = np.cov(*zip(*tokens, strict=True), ddof=0)[0, 1]
  np.testing.assert_allclose(got.sum() / len(tokens), exact, rtol=1e-4)
  gradient = jax.grad(lambda x: losses.token_covariance(x, ADVANTAGES, MASK).sum())(LOGPROBS)
  assert not np.any(gradient)


def test_covariance_predicts_how_entropy_falls():
  """A natural policy-gradient step of size eta moves the log-prob of token v by eta * A_v."""
  logits, advantages, eta = np.array([0.3, -0.5, 1.0]), np.array([0.2, -1.0, 0.7]), 1e-3
  entropy = lambda z: -np.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z))  # noqa: E731
  with jax.enable_x64(True):
    p, logp = (np.asarray(f(jnp.asarray(logits))) for f in (jax.nn.softmax, jax.nn.log_softmax))
    fall = entropy(jnp.asarray(logits + eta * advantages)) - entropy(jnp.asarray(logits))
  covariance = np.sum(p * (logp - p @ logp) * (advantages - p @ advantages))
  np.testing.assert_allclose(fall, -eta * covariance, rtol=1e-2)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.7, 1.0])
def test_kl_cov_takes_exactly_the_largest(fraction):
  got = np.asarray(losses.kl_cov_mask(COVARIANCE, MASK, fraction=fraction))
  count = int(np.floor(fraction * MASK.sum()))
  largest = sorted(np.argwhere(MASK).tolist(), key=lambda bt: -COVARIANCE[*bt])[:count]
  assert sorted(np.argwhere(got).tolist()) == sorted(largest)


def test_clip_cov_draws_exactly_the_share_from_the_band():
  clipped = RNG.uniform(size=SHAPE) < 0.3
  f = jax.jit(losses.clip_cov_mask)
  draws = np.stack(
    [f(jax.random.key(i), COVARIANCE, MASK, fraction=0.05, clipped=clipped) for i in range(200)]
  )
  candidates = MASK & ~clipped & (COVARIANCE >= 1) & (COVARIANCE <= 5)
  count = int(np.floor(0.05 * MASK.sum()))
  assert 1 < count < candidates.sum()
  assert np.all(draws.sum((1, 2)) == count) and not np.any(draws & ~candidates)
  assert np.array_equal(
    draws[0], f(jax.random.key(0), COVARIANCE, MASK, fraction=0.05, clipped=clipped)
  )
  # Every candidate is as likely: 200 draws of a share p scatter by sqrt(200 p (1 - p)).
  share = count / candidates.sum()
  assert np.abs(draws.sum(0)[candidates] - 200 * share).max() < 4.5 * np.sqrt(200 * share)


def test_a_band_with_too_few_is_taken_whole():
  got = losses.clip_cov_mask(jax.random.key(0), COVARIANCE, MASK, fraction=1.0, low=2.0, high=3.0)
  np.testing.assert_array_equal(got, MASK & (COVARIANCE >= 2) & (COVARIANCE <= 3))


def test_shares_are_rounded_down_as_in_the_decimals_they_are_written_in():
  ones = jnp.ones((1, 1000), bool)
  f = jax.jit(
    lambda fraction, n: losses.kl_cov_mask(
      jnp.ones(ones.shape), ones & (jnp.arange(1000) < n), fraction=fraction
    ).sum()
  )
  for percent in (1, 13, 21, 29, 39):
    for n in (10, 99, 300, 900):
      assert f(percent / 100, n) == percent * n // 100, (percent, n)


def test_the_least_number_selected():
  """By default a small batch selects nothing; verl selects one token."""
  for at_least in (0, 1):
    assert losses.kl_cov_mask(COVARIANCE, MASK, at_least=at_least).sum() == at_least
    draw = losses.clip_cov_mask(jax.random.key(0), COVARIANCE, MASK, at_least=at_least)
    assert draw.sum() == at_least


def test_ppo_clipped_are_the_tokens_without_a_gradient():
  _, gradient = PPO(LOGPROBS, OLD, ADVANTAGES, WEIGHTS)
  got = losses.ppo_clipped(LOGPROBS, OLD, ADVANTAGES, MASK)
  np.testing.assert_array_equal(got, MASK & (np.asarray(gradient) == 0))
  assert np.any(got)


PPO, CLIP_COV, KL_COV = (
  jax.jit(jax.value_and_grad(f, has_aux=True))
  for f in (losses.ppo_loss, losses.clip_cov_loss, losses.kl_cov_loss)
)
NONE = np.zeros(SHAPE, bool)


def test_clip_cov_is_ppo_where_nothing_is_selected():
  (loss, metrics), gradient = CLIP_COV(LOGPROBS, OLD, ADVANTAGES, NONE, WEIGHTS)
  (expected, ppo_metrics), slope = PPO(LOGPROBS, OLD, ADVANTAGES, WEIGHTS)
  assert loss == expected and metrics.items() >= ppo_metrics.items()
  np.testing.assert_array_equal(gradient, slope)


def test_clip_cov_silences_the_selected_and_keeps_them_as_members():
  (loss, metrics), gradient = CLIP_COV(LOGPROBS, OLD, ADVANTAGES, SELECTED, WEIGHTS)
  total = 0.0
  for b, t in np.argwhere(MASK & ~SELECTED):
    ratio, a = np.exp(LOGPROBS[b, t] - OLD[b, t]), ADVANTAGES[b]
    total += WEIGHTS[b, t] * max(-ratio * a, -min(max(ratio, 0.8), 1.2) * a)
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  assert not np.any(gradient[SELECTED]) and np.any(gradient)
  assert metrics["selected_fraction"] == ((MASK & SELECTED).sum(), MASK.sum())
  assert metrics["ratio"][1] == MASK.sum()


@pytest.mark.parametrize("coef", [1.0, 0.1])
def test_kl_cov_matches_the_loop(coef):
  (loss, metrics), gradient = KL_COV(LOGPROBS, OLD, ADVANTAGES, SELECTED, WEIGHTS, coef=coef)
  total, slope = 0.0, np.zeros(SHAPE)
  for b, t in np.argwhere(MASK):
    moved, a = LOGPROBS[b, t] - OLD[b, t], ADVANTAGES[b]
    total += WEIGHTS[b, t] * (-np.exp(moved) * a + coef * abs(moved) * SELECTED[b, t])
    slope[b, t] = WEIGHTS[b, t] * (-np.exp(moved) * a + coef * np.sign(moved) * SELECTED[b, t])
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
  assert metrics["selected_fraction"] == ((MASK & SELECTED).sum(), MASK.sum())
  (default, _), _ = KL_COV(LOGPROBS, OLD, ADVANTAGES, SELECTED, WEIGHTS)
  assert np.isclose(loss, default, rtol=1e-6) == (coef == 1.0)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: losses.kl_cov_mask(COVARIANCE, MASK, fraction=2), "fraction is 2.*between 0 and 1"),
    (lambda: losses.kl_cov_mask(COVARIANCE[:1], MASK), "covariance has shape"),
    (
      lambda: losses.clip_cov_mask(jax.random.key(0), COVARIANCE, MASK, clipped=MASK * 1.0),
      "clipped has dtype",
    ),
    (lambda: losses.token_covariance(LOGPROBS, ADVANTAGES, WEIGHTS), "mask has dtype"),
    (lambda: losses.token_covariance(LOGPROBS, ADVANTAGES[:2], MASK), "advantages has shape"),
    (lambda: losses.ppo_clipped(LOGPROBS, OLD, ADVANTAGES, MASK, clip_low=0), "clip_low is 0"),
    (
      lambda: losses.clip_cov_loss(LOGPROBS, OLD, ADVANTAGES, NONE, WEIGHTS, clip_high=0),
      "clip_high is 0",
    ),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
