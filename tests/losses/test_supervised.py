"""Likelihood terms against their formulas."""

import jax
import numpy as np

from rl_llm import losses, weighting

LOGPROBS = np.log(np.array([[0.5, 0.25, 0.9], [0.1, 0.9, 0.9]]))
MASK = np.array([[True, True, False], [True, False, False]])


def test_sft_loss_is_the_mean_negative_log_likelihood():
  (loss, metrics), gradient = jax.value_and_grad(losses.sft_loss, has_aux=True)(
    LOGPROBS, weighting.token_mean(MASK)
  )
  np.testing.assert_allclose(loss, -np.log(0.5 * 0.25 * 0.1) / 3, rtol=1e-6)
  np.testing.assert_allclose(gradient, np.where(MASK, -1 / 3, 0), rtol=1e-6)
  np.testing.assert_allclose(metrics["nll"][0], -np.log(0.5 * 0.25 * 0.1), rtol=1e-6)
  assert metrics["nll"][1] == 3


def test_dft_loss_counts_each_token_by_its_probability():
  (loss, metrics), gradient = jax.value_and_grad(losses.dft_loss, has_aux=True)(
    LOGPROBS, weighting.token_mean(MASK)
  )
  p = np.array([0.5, 0.25, 0.1])
  np.testing.assert_allclose(loss, -np.sum(p * np.log(p)) / 3, rtol=1e-6)
  np.testing.assert_allclose(gradient[MASK], -p / 3, rtol=1e-6)
  assert not np.any(gradient[~MASK])
  np.testing.assert_allclose(metrics["probability"], (p.sum(), 3), rtol=1e-6)
  np.testing.assert_allclose(metrics["nll"], (-np.log(p).sum(), 3), rtol=1e-6)
