"""What is dropped for having moved too far: loops over rows and tokens, and their borders."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import weighting

RNG = np.random.default_rng(3)
MASK = np.array([[1, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
SAMPLER = np.log(RNG.uniform(0.1, 0.9, MASK.shape))
LOGPROBS = SAMPLER + RNG.normal(scale=0.5, size=MASK.shape)


def divergence(now, sampler, estimator):
  d = now - sampler
  return d * d / 2 if estimator == "k2" else math.exp(d) - 1 - d


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.5])
def test_a_response_is_kept_whole_or_not_at_all(estimator, statistic, threshold):
  garbage = np.where(MASK, LOGPROBS, np.inf)
  got = weighting.trust_region_mask(
    garbage, SAMPLER, MASK, threshold=threshold, estimator=estimator, statistic=statistic
  )
  expected = np.zeros(MASK.shape)
  for b in range(3):
    moved = [divergence(LOGPROBS[b, t], SAMPLER[b, t], estimator) for t in np.flatnonzero(MASK[b])]
    if (max(moved) if statistic == "max" else sum(moved) / len(moved)) <= threshold:
      expected[b] = MASK[b]
  np.testing.assert_array_equal(got, expected)


def test_a_long_response_is_judged_by_its_worst_token():
  """The mean of 100 tokens hides one of them; PPO's clip would silence that token alone."""
  log_ratio = np.zeros((1, 100))
  log_ratio[0, 50] = 1.0
  mask, one = np.ones((1, 100), bool), {"threshold": 0.1}
  assert not np.any(weighting.trust_region_mask(log_ratio, np.zeros((1, 100)), mask, **one))
  mean = weighting.trust_region_mask(log_ratio, 0 * log_ratio, mask, statistic="mean", **one)
  assert np.all(mean == 1)


def furthest_first(moved, threshold):
  """The tokens that are left once the furthest have been dropped one by one."""
  left = list(range(len(moved)))
  while left and sum(moved[i] for i in left) / len(left) > threshold:
    left.remove(max(left, key=lambda i: moved[i]))
  return left


@pytest.mark.parametrize("threshold", [0.001, 0.04, 0.1, 0.2, 10.0])
def test_the_furthest_tokens_are_dropped_until_the_mean_is_low_enough(threshold):
  got = weighting.second_moment_mask(
    np.where(MASK, LOGPROBS, np.nan), SAMPLER, MASK, threshold=threshold
  )
  places = np.argwhere(MASK)
  moved = [(LOGPROBS[b, t] - SAMPLER[b, t]) ** 2 for b, t in places]
  expected = np.zeros(MASK.shape)
  for i in furthest_first(moved, threshold):
    expected[tuple(places[i])] = 1
  np.testing.assert_array_equal(got, expected)


def test_tokens_that_moved_as_far_are_dropped_together():
  """Squares 0, 0.25, 0.25: with one of them the mean is 0.125, but which one?"""
  log_ratio, mask = np.array([[0.0, 0.5, -0.5]]), np.ones((1, 3), bool)
  got = weighting.second_moment_mask(log_ratio, np.zeros((1, 3)), mask, threshold=0.13)
  assert got.tolist() == [[1, 0, 0]]


def test_a_batch_that_has_not_moved_loses_nothing():
  for mask in (MASK, np.zeros_like(MASK)):
    kept = weighting.second_moment_mask(SAMPLER, SAMPLER, mask)
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_array_equal(
      weighting.trust_region_mask(SAMPLER, SAMPLER, mask, threshold=1e-6), mask
    )


def test_neither_has_a_gradient():
  f = lambda x: jnp.sum(  # noqa: E731
    weighting.second_moment_mask(x, SAMPLER, MASK)
    + weighting.trust_region_mask(x, SAMPLER, MASK, threshold=0.1)
  )
  assert not np.any(jax.grad(f)(jnp.asarray(LOGPROBS)))


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"threshold": 0.0}, "threshold is 0.0.*above 0"),
    ({"threshold": 1.0, "estimator": "k1"}, "estimator is 'k1'"),
    ({"threshold": 1.0, "statistic": "sum"}, "statistic is 'sum'"),
  ],
)
def test_errors_name_the_argument(settings, message):
  with pytest.raises(ValueError, match=message):
    weighting.trust_region_mask(LOGPROBS, SAMPLER, MASK, **settings)
