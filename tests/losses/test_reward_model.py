"""The Bradley-Terry loss against its formula in plain Python."""

from math import exp, log

import jax
import numpy as np
import pytest

from rl_llm import losses

CHOSEN, REJECTED = np.array([1.0, -0.5, np.nan, 2.0]), np.array([0.2, 0.3, np.inf, -1.0])
MARGIN = np.array([0.5, 1.0, np.nan, 2.0])
WEIGHTS = np.array([0.2, 0.5, 0.0, 0.3])
F = jax.jit(jax.value_and_grad(losses.reward_model_loss, has_aux=True))


@pytest.mark.parametrize("margin, coef", [(None, 0.0), (MARGIN, 0.0), (MARGIN, 0.01)])
def test_loss_matches_its_formula(margin, coef):
  expected, slope = 0.0, np.zeros(4)
  for i in (0, 1, 3):
    difference = CHOSEN[i] - REJECTED[i] - (0 if margin is None else margin[i])
    total = CHOSEN[i] + REJECTED[i]
    expected += WEIGHTS[i] * (log(1 + exp(-difference)) + coef * total**2)
    slope[i] = WEIGHTS[i] * (-1 / (1 + exp(difference)) + 2 * coef * total)
  (loss, metrics), gradient = F(CHOSEN, REJECTED, WEIGHTS, margin=margin, center_coef=coef)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5)
  assert metrics["accuracy"] == (2, 3)
  np.testing.assert_allclose(metrics["margin"], (0.8 - 0.8 + 3.0, 3), rtol=1e-5)


def test_without_centering_only_differences_count():
  kept = WEIGHTS != 0
  (loss, _), _ = F(CHOSEN[kept], REJECTED[kept], WEIGHTS[kept], center_coef=0.0)
  (moved, _), _ = F(CHOSEN[kept] + 100, REJECTED[kept] + 100, WEIGHTS[kept], center_coef=0.0)
  np.testing.assert_allclose(moved, loss, rtol=1e-4)
  (centred, _), _ = F(CHOSEN[kept] + 100, REJECTED[kept] + 100, WEIGHTS[kept], center_coef=0.01)
  assert centred > loss + 100


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"margin": 0.5}, "margin has shape"),
    ({"margin": np.ones(4, int)}, "margin has dtype int"),
    ({"center_coef": -1.0}, "center_coef is -1.0"),
  ],
)
def test_bad_arguments_are_named(settings, message):
  with pytest.raises(ValueError, match=message):
    losses.reward_model_loss(CHOSEN, REJECTED, WEIGHTS, **settings)
