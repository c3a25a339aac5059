"""Masked reductions against numpy on the selected items alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import masked

X = np.array([[1.5, -2.0, 4.0], [0.25, 8.0, -1.0]], np.float32)
MASK = np.array([[True, False, True], [True, True, True]])


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_reductions_see_only_the_selected_items(axis):
  chosen = np.where(MASK, X, np.nan).astype(np.float64)
  np.testing.assert_allclose(masked.masked_sum(X, MASK, axis), np.nansum(chosen, axis), rtol=1e-6)
  np.testing.assert_allclose(masked.masked_mean(X, MASK, axis), np.nanmean(chosen, axis), rtol=1e-6)
  np.testing.assert_allclose(masked.masked_var(X, MASK, axis), np.nanvar(chosen, axis), rtol=1e-6)


def test_variance_divides_by_the_count_less_ddof():
  for ddof in (0, 1, 2):
    expected = np.var(X[MASK].astype(np.float64), ddof=ddof)
    np.testing.assert_allclose(masked.masked_var(X, MASK, ddof=ddof), expected, rtol=1e-6)


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan, 1e30])
@pytest.mark.parametrize(
  "f",
  [
    masked.masked_sum,
    masked.masked_mean,
    masked.masked_var,
    lambda x, mask: masked.whiten(x, mask)[0, 0],
  ],
)
def test_garbage_under_the_mask_reaches_neither_value_nor_gradient(f, garbage):
  clean, dirty = np.where(MASK, X, 0), np.where(MASK, X, garbage)
  np.testing.assert_array_equal(f(clean, MASK), f(dirty, MASK))
  gradient = jax.grad(f)(jnp.asarray(dirty), MASK)
  assert np.isfinite(gradient).all() and (np.asarray(gradient)[~MASK] == 0).all()


@pytest.mark.parametrize("f", [masked.masked_sum, masked.masked_mean, masked.masked_var])
def test_an_empty_selection_is_zero_with_zero_gradient(f):
  nothing = np.zeros_like(MASK)
  value, gradient = jax.value_and_grad(f)(jnp.asarray(X), nothing)
  assert value == 0 and (np.asarray(gradient) == 0).all()


def test_a_selected_nan_is_not_hidden():
  assert np.isnan(masked.masked_mean(np.array([np.nan, 1.0]), np.array([True, False])))


def test_integers_are_averaged_as_floats():
  assert masked.masked_mean(np.array([0, 1]), np.array([True, True])) == 0.5


def test_variance_of_large_offsets_keeps_its_digits():
  x = np.array([10000.0, 10001.0, 10002.0], np.float32)
  np.testing.assert_allclose(masked.masked_var(x, np.ones(3, bool)), 2 / 3, rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
  x = jnp.full(1000, 1.0, jnp.bfloat16)
  total = masked.masked_sum(x, np.ones(1000, bool))
  assert total == 1000 and total.dtype == jnp.float32


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_matches_its_formula(ddof):
  chosen = X[MASK].astype(np.float64)
  expected = np.zeros(X.shape)
  expected[MASK] = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=ddof) + 1e-8)
  np.testing.assert_allclose(masked.whiten(X, MASK, ddof=ddof), expected, rtol=1e-5)
  expected[MASK] += chosen.mean()
  unshifted = masked.whiten(X, MASK, ddof=ddof, shift_mean=False)
  np.testing.assert_allclose(unshifted, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_of_one_token_is_zero(ddof):
  mask = np.zeros((2, 3), bool)
  mask[1, 1] = True
  assert (np.asarray(masked.whiten(X, mask, ddof=ddof)) == 0).all()


def test_errors_name_the_argument_and_the_fix():
  with pytest.raises(ValueError, match="mask has dtype float32.*mask != 0"):
    masked.masked_mean(X, MASK.astype(np.float32))
  with pytest.raises(ValueError, match=r"mask has shape \(2,\).*x, \(2, 3\)"):
    masked.masked_mean(X, np.ones(2, bool))
