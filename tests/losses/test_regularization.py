"""KL, entropy, value and likelihood terms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(0)
SHAPE = (3, 4)
MASK = np.arange(4) < np.array([[4], [2], [1]])
WEIGHTS = np.asarray(weighting.token_mean(MASK))
LOGPROBS, REF = np.log(RNG.uniform(0.1, 0.9, size=(2, *SHAPE)))
VALUES, OLD_VALUES, RETURNS = RNG.normal(size=(3, *SHAPE))
D = LOGPROBS - REF

VALUE = {"k1": D, "k2": D**2 / 2, "k3": np.exp(-D) + D - 1}
SLOPE = {"k1": np.ones(SHAPE), "k2": D, "k3": 1 - np.exp(-D)}
KL = jax.jit(
  jax.value_and_grad(losses.kl_loss, has_aux=True), static_argnames=("value", "gradient")
)


@pytest.mark.parametrize("gradient", ["k1", "k2", "k3"])
@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
def test_kl_loss_has_the_value_of_one_and_the_gradient_of_another(value, gradient):
  (loss, metrics), slope = KL(LOGPROBS, REF, WEIGHTS, value=value, gradient=gradient)
  np.testing.assert_allclose(loss, np.sum(WEIGHTS * VALUE[value]), rtol=1e-5)
  np.testing.assert_allclose(slope, WEIGHTS * SLOPE[gradient], rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(metrics["kl"][0], VALUE[value][MASK].sum(), rtol=1e-5)


def test_kl_loss_defaults_to_the_value_k3_and_the_gradient_k2():
  (loss, _), slope = KL(LOGPROBS, REF, WEIGHTS)
  np.testing.assert_allclose(loss, np.sum(WEIGHTS * VALUE["k3"]), rtol=1e-5)
  np.testing.assert_allclose(slope, WEIGHTS * D, rtol=1e-5, atol=1e-7)


def test_differentiating_ratio_times_k3_is_the_ratio_times_d():
  old = LOGPROBS - RNG.normal(scale=0.3, size=SHAPE)
  garbage = np.where(MASK, old, -np.inf)

  def loss(logprobs):
    ratio = jnp.exp(logprobs - garbage)
    return losses.kl_loss(logprobs, REF, WEIGHTS, value="k3", gradient="k3", ratio=ratio)[0]

  ratio = np.exp(LOGPROBS - old)
  np.testing.assert_allclose(loss(LOGPROBS), np.sum(WEIGHTS * ratio * VALUE["k3"]), rtol=1e-5)
  slope = np.asarray(jax.grad(loss)(jnp.asarray(LOGPROBS)))
  np.testing.assert_allclose(slope[MASK], (WEIGHTS * ratio * D)[MASK], rtol=1e-5, atol=1e-6)


def test_kl_loss_is_zero_at_the_reference():
  (loss, _), slope = KL(REF, REF, WEIGHTS)
  assert loss == 0 and not np.any(slope)


def test_entropy_loss_is_minus_the_weighted_entropy():
  entropies = RNG.uniform(size=SHAPE)
  loss, metrics = losses.entropy_loss(entropies, WEIGHTS)
  np.testing.assert_allclose(loss, -np.sum(WEIGHTS * entropies), rtol=1e-6)
  np.testing.assert_allclose(metrics["entropy"][0], entropies[MASK].sum(), rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.2, 0.5])
def test_value_loss_matches_the_loop(clip):
  total = 0.0
  for b, t in np.ndindex(SHAPE):
    v, old, target = VALUES[b, t], OLD_VALUES[b, t], RETURNS[b, t]
    error = (v - target) ** 2
    if clip is not None:
      error = max(error, (min(max(v, old - clip), old + clip) - target) ** 2)
    total += WEIGHTS[b, t] * error / 2
  got, metrics = losses.value_loss(VALUES, OLD_VALUES, RETURNS, WEIGHTS, clip=clip)
  np.testing.assert_allclose(got, total, rtol=1e-5)
  assert (metrics["value_clip_fraction"][0] > 0) == (clip is not None)
  expected = np.square(VALUES - RETURNS)[MASK].sum()
  np.testing.assert_allclose(metrics["value_error"][0], expected, rtol=1e-5)


def test_bad_settings_are_named():
  with pytest.raises(ValueError, match="clip is 0.*above 0"):
    losses.value_loss(VALUES, OLD_VALUES, RETURNS, WEIGHTS, clip=0)
  with pytest.raises(ValueError, match="value is 'k4'"):
    losses.kl_loss(LOGPROBS, REF, WEIGHTS, value="k4")
  with pytest.raises(ValueError, match="ratio has shape"):
    losses.kl_loss(LOGPROBS, REF, WEIGHTS, ratio=np.ones(3))


def test_a_value_that_moved_less_than_the_clip_is_not_counted_as_clipped():
  """Added up as old + (value - old) it comes back with another last bit, which is no clipping."""
  rng = np.random.default_rng(0)
  old = rng.uniform(-1e-3, 1e-3, (20, 50)).astype(np.float32)  # As of a new value head.
  values = rng.uniform(-0.19, 0.19, old.shape).astype(np.float32)
  returns = rng.normal(scale=0.01, size=old.shape).astype(np.float32)
  weights = np.ones_like(old)
  _, metrics = jax.jit(losses.value_loss, static_argnames="clip")(
    values, old, returns, weights, clip=0.2
  )
  assert float(metrics["value_clip_fraction"][0]) == 0


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("returns", [-1.0, 3.0])
def test_a_value_at_the_end_of_the_clips_range_has_its_whole_slope(value, returns):
  of = jax.grad(lambda values: losses.value_loss(values, ones, returns * ones, ones, clip=1.0)[0])
  ones = jnp.ones((1, 1))
  assert of(value * ones)[0, 0] == value - returns
