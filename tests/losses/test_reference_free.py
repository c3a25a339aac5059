"""ORPO, SimPO, AlphaPO and CPO against their formulas in plain Python."""

from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = -RNG.uniform(0.05, 3, (2, 5))  # averages per token
WEIGHTS = np.array([0.1, 0.4, 0.0, 0.2, 0.3])


def sigma(x):
  return 1 / (1 + exp(-x))


def orpo(c, r, beta=0.25):
  odds = lambda x: exp(x) / (1 - exp(x))  # noqa: E731
  return -c - beta * log(sigma(log(odds(c) / odds(r))))


FORMULAS = {
  losses.orpo_loss: ({"beta": 0.25}, orpo),
  losses.simpo_loss: ({"beta": 2.5, "gamma": 1.4}, lambda c, r: -log(sigma(2.5 * (c - r) - 1.4))),
  losses.cpo_loss: (
    {"beta": 0.2, "nll_coef": 0.5},
    lambda c, r: -log(sigma(0.2 * (c - r))) - 0.5 * c,
  ),
}


def alphapo(c, r, beta=2.5, gamma=0.4, alpha=0.3):
  reward = lambda x: beta * (1 - exp(x) ** -alpha) / alpha  # noqa: E731
  return reward(c), reward(r), -log(sigma(reward(c) - reward(r) - gamma))


@pytest.mark.parametrize("alpha", [0.3, 1.0, -0.5])
def test_alphapo_bends_the_reward(alpha):
  loss, metrics = losses.alphapo_loss(
    CHOSEN, REJECTED, WEIGHTS, beta=2.5, gamma=0.4, alpha=np.float32(alpha)
  )
  pairs = zip(CHOSEN, REJECTED, strict=True)
  chosen, rejected, each = np.array([alphapo(c, r, alpha=alpha) for c, r in pairs]).T
  np.testing.assert_allclose(loss, WEIGHTS @ each, rtol=1e-5)
  counts = WEIGHTS != 0
  np.testing.assert_allclose(metrics["chosen_reward"], (chosen[counts].sum(), 4), rtol=1e-5)
  np.testing.assert_allclose(metrics["rejected_reward"], (rejected[counts].sum(), 4), rtol=1e-5)


def test_alphapo_with_alpha_0_is_simpo():
  settings = {"beta": 2.5, "gamma": 0.4}
  simpo = losses.simpo_loss(CHOSEN, REJECTED, WEIGHTS, **settings)[0]
  for alpha, tolerance in ((0.0, 1e-6), (1e-4, 1e-3)):
    f = lambda c: losses.alphapo_loss(c, REJECTED, WEIGHTS, alpha=alpha, **settings)[0]  # noqa: B023,E731
    loss, gradient = jax.value_and_grad(f)(jnp.asarray(CHOSEN))
    np.testing.assert_allclose(loss, simpo, rtol=tolerance)
    assert np.isfinite(gradient).all() and np.all(gradient[WEIGHTS != 0] < 0)


@pytest.mark.parametrize("f", FORMULAS, ids=lambda f: f.__name__)
def test_losses_match_their_formulas(f):
  settings, formula = FORMULAS[f]
  loss, metrics = jax.jit(f)(CHOSEN, REJECTED, WEIGHTS, **settings)
  expected = WEIGHTS @ [formula(c, r) for c, r in zip(CHOSEN, REJECTED, strict=True)]
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  counts = WEIGHTS != 0
  assert metrics["accuracy"] == (np.sum((CHOSEN > REJECTED)[counts]), 4)
  margin = settings["beta"] * np.sum((CHOSEN - REJECTED)[counts])
  np.testing.assert_allclose(metrics["margin"], (margin, 4), rtol=1e-5)


def test_simpo_is_the_form_with_gamma_over_beta():
  difference, beta, ratio = 0.3, 2.0, 0.5
  loss, _ = losses.simpo_loss(
    np.array([-1.0]), np.array([-1.0 - difference]), np.ones(1), beta=beta, gamma=ratio * beta
  )
  np.testing.assert_allclose(loss, -log(sigma(beta * (difference - ratio))), rtol=1e-6)


def test_simpo_without_margin_is_cpo_without_likelihood():
  simpo = losses.simpo_loss(CHOSEN, REJECTED, WEIGHTS, beta=0.1, gamma=0.0)[0]
  cpo = losses.cpo_loss(CHOSEN, REJECTED, WEIGHTS, beta=0.1, nll_coef=0.0)[0]
  np.testing.assert_allclose(simpo, cpo, rtol=1e-6)


def test_cpo_without_reference_is_dpo_with_a_uniform_one():
  uniform = np.full(5, -7.0)
  dpo = losses.dpo_loss(CHOSEN, REJECTED, uniform, uniform, WEIGHTS)[0]
  np.testing.assert_allclose(
    losses.cpo_loss(CHOSEN, REJECTED, WEIGHTS, nll_coef=0.0)[0], dpo, rtol=1e-6
  )


def test_orpo_is_exact_next_to_probability_one_and_finite_beyond():
  """The slope of log odds is 1 / (1 - p): about 1e4 at log-prob -1e-4, where 1 - exp cancels."""
  one, other = jnp.ones(1), jnp.array([-1e-4])
  gradient = jax.jit(jax.grad(lambda c, r: losses.orpo_loss(c, r, one, beta=1.0)[0], (0, 1)))
  # Equal odds: sigmoid(0) = 1/2 of that slope each way, and -1 for the likelihood.
  slope = 0.5 / -np.expm1(-1e-4)
  np.testing.assert_allclose(gradient(other, other), [[-1 - slope], [slope]], rtol=1e-5)
  for c in (0.0, -1e-30, -1e-7, 1e4, -1e4):
    for r in (0.0, -1e-30, -1e4):
      assert np.isfinite(gradient(jnp.array([c]), jnp.array([r]))).all(), (c, r)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: losses.orpo_loss(CHOSEN, REJECTED, WEIGHTS, beta=0.0), "beta is 0.0"),
    (lambda: losses.simpo_loss(CHOSEN, REJECTED, WEIGHTS, gamma=-1.0), "gamma is -1.0"),
    (lambda: losses.cpo_loss(CHOSEN, REJECTED, WEIGHTS, nll_coef=-1.0), "nll_coef is -1.0"),
    (lambda: losses.cpo_loss(CHOSEN, REJECTED[:2], WEIGHTS), "rejected_logprobs has shape"),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
