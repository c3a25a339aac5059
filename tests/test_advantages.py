"""Advantages against loops that read like the papers, and edges where published code differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import advantages as adv

MASK = np.array([
  [True, True, True, True, True],
  [True, True, False, False, True],  # a tool wrote the middle
  [True, False, False, False, False],
  [False, False, False, False, False],
])
RNG = np.random.default_rng(0)
REWARDS, VALUES = RNG.normal(size=(2, *MASK.shape))
GROUPS = np.array([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0], [3.0, -1.0, 2.0, 7.0]])


def test_the_outcome_sits_on_the_last_token_and_kl_on_all():
  outcomes, kl = np.array([0.5, -1.0, 2.0, 3.0]), np.abs(VALUES)
  expected = np.zeros(MASK.shape)
  for b in range(4):
    inside = np.flatnonzero(MASK[b])
    expected[b, inside] = -0.1 * kl[b, inside]
    if len(inside):
      expected[b, inside[-1]] += outcomes[b]
  got = adv.token_rewards(outcomes, MASK, kl=kl, kl_coef=0.1)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_garbage_kl_outside_the_mask_does_not_leak():
  kl = np.where(MASK, 0.1, np.nan)
  assert np.isfinite(adv.token_rewards(np.ones(4), MASK, kl=kl, kl_coef=1.0)).all()


def test_a_fractional_reward_survives_integer_neighbours():
  got = adv.token_rewards(np.array([0.5, 1, 0, 0]), MASK)
  assert got[0, 4] == 0.5 and got.dtype == jnp.float32
  assert adv.group_relative(np.array([[1, 0]]), scale="none").tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_returns_match_the_loop_over_valid_tokens(discount):
  expected = np.zeros(MASK.shape)
  for b in range(4):
    inside = np.flatnonzero(MASK[b])
    for i, t in enumerate(inside):
      expected[b, t] = sum(discount**k * REWARDS[b, s] for k, s in enumerate(inside[i:]))
  got = adv.discounted_returns(REWARDS, MASK, discount=discount)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def gae_loop(rewards, values, discount, lam, end):
  """One row without masked tokens: the sum of (discount * lam)^k * delta_{t+k}, term by term."""
  following = np.append(values[1:], end)
  delta = rewards + discount * following - values
  n = len(rewards)
  return np.array([
    sum((discount * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])


@pytest.mark.parametrize("discount, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.9, 1.0)])
@pytest.mark.parametrize("bootstrap", [None, np.array([0.3, -0.2, 0.8, 5.0])])
def test_gae_matches_the_sum_of_deltas_and_skips_masked_tokens(discount, lam, bootstrap):
  got, returns = adv.gae(
    REWARDS, VALUES, MASK, discount=discount, gae_lambda=lam, bootstrap=bootstrap)
  expected = np.zeros(MASK.shape)
  for b in range(4):
    m = MASK[b]
    end = 0.0 if bootstrap is None else bootstrap[b]
    if m.any():
      expected[b, m] = gae_loop(REWARDS[b, m], VALUES[b, m], discount, lam, end)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(returns, np.where(MASK, expected + VALUES, 0), rtol=1e-5, atol=1e-6)


def test_gae_with_lambda_one_is_return_minus_value_and_zero_is_the_td_error():
  returns = adv.discounted_returns(REWARDS, MASK, discount=0.9)
  one, targets = adv.gae(REWARDS, VALUES, MASK, discount=0.9, gae_lambda=1.0)
  np.testing.assert_allclose(one, np.where(MASK, returns - VALUES, 0), atol=1e-5)
  np.testing.assert_allclose(targets, returns, atol=1e-5)
  zero, _ = adv.gae(REWARDS, VALUES, MASK, discount=0.9, gae_lambda=0.0)
  expected = REWARDS[0, 0] + 0.9 * VALUES[0, 1] - VALUES[0, 0]
  np.testing.assert_allclose(zero[0, 0], expected, rtol=1e-5)


def test_recursions_ignore_garbage_outside_the_mask():
  dirty = np.where(MASK, REWARDS, np.nan)
  np.testing.assert_array_equal(
    adv.discounted_returns(dirty, MASK), adv.discounted_returns(REWARDS, MASK))
  for got, clean in zip(adv.gae(dirty, np.where(MASK, VALUES, np.inf), MASK),
                        adv.gae(REWARDS, VALUES, MASK), strict=True):
    np.testing.assert_array_equal(got, clean)


def group_loop(rewards, scale, ddof, eps, baseline, where):
  out = np.zeros(rewards.shape)
  for p, row in enumerate(rewards):
    ok = np.flatnonzero(where[p])
    if len(ok) < 2:
      continue
    for g in ok:
      others = [row[j] for j in ok if j != g]
      base = np.mean(others) if baseline == "leave_one_out" else np.mean(row[ok])
      spread = {"std": np.std(row[ok], ddof=ddof), "batch": np.std(rewards[where], ddof=ddof)}
      out[p, g] = (row[g] - base) / (1 if scale == "none" else spread[scale] + eps)
  return out


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("ddof, eps", [(1, 1e-6), (0, 1e-4)])
def test_group_relative_matches_the_loop(scale, baseline, ddof, eps):
  failed = np.array([[False, False, True, True], [True, False, True, True], [False] * 4])
  failed[1] = [True, True, True, False]  # one answer left: a singleton
  for where in (None, ~failed):
    expected = group_loop(
      GROUPS, scale, ddof, eps, baseline, np.ones_like(failed) if where is None else where)
    rewards = GROUPS if where is None else np.where(where, GROUPS, np.nan)
    got = adv.group_relative(
      rewards, scale=scale, ddof=ddof, eps=eps, baseline=baseline, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 12345.678])
@pytest.mark.parametrize("ddof, eps", [(1, 1e-6), (0, 1e-9)])
def test_a_group_without_spread_is_exactly_zero(reward, ddof, eps):
  rewards = np.full((2, 7), reward, np.float32)
  for scale in ("std", "batch", "none"):
    got = adv.group_relative(rewards, scale=scale, ddof=ddof, eps=eps)
    assert (np.asarray(got) == 0).all()


def test_groups_of_one_and_groups_that_all_failed_are_zero():
  assert adv.group_relative(np.array([[5.0], [3.0]])).tolist() == [[0.0], [0.0]]
  nothing = adv.group_relative(np.full((2, 3), np.nan), where=np.zeros((2, 3), bool))
  assert (np.asarray(nothing) == 0).all()


def test_a_nan_that_is_not_marked_as_failed_is_not_hidden():
  got = adv.group_relative(np.array([[np.nan, 1.0], [0.0, 1.0]]))
  assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one():
  expected = (GROUPS - GROUPS.mean(1, keepdims=True)) * 4 / 3
  np.testing.assert_allclose(adv.leave_one_out(GROUPS), expected, rtol=1e-5, atol=1e-6)


def test_all_of_it_compiles():
  for f in (
    lambda: adv.gae(REWARDS, VALUES, MASK), lambda: adv.discounted_returns(REWARDS, MASK),
    lambda: adv.group_relative(GROUPS), lambda: adv.token_rewards(np.ones(4), MASK),
  ):
    for jitted, plain in zip(jax.tree.leaves(jax.jit(f)()), jax.tree.leaves(f()), strict=True):
      np.testing.assert_allclose(jitted, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call, message", [
  (lambda: adv.token_rewards(np.ones(3), MASK), r"outcomes has shape \(3,\).*\(4,\)"),
  (lambda: adv.token_rewards(np.ones(4), MASK, kl=np.ones(4)), "kl has shape"),
  (lambda: adv.discounted_returns(REWARDS[:1], MASK), "rewards has shape"),
  (lambda: adv.gae(REWARDS, VALUES[:, :1], MASK), "values has shape"),
  (lambda: adv.gae(REWARDS, VALUES, MASK, bootstrap=np.ones(2)), "bootstrap has shape"),
  (lambda: adv.gae(REWARDS, VALUES, MASK * 1.0), "mask has dtype float"),
  (lambda: adv.group_relative(np.ones(4)), r"rewards has shape \(4,\).*reshape"),
  (lambda: adv.group_relative(GROUPS, scale="Std"), "scale is 'Std'.*'batch'"),
  (lambda: adv.group_relative(GROUPS, eps=0), "eps is 0"),
  (lambda: adv.group_relative(GROUPS, baseline="loo"), "baseline is 'loo'"),
  (lambda: adv.group_relative(GROUPS, where=np.ones((1, 4), bool)), "where has shape"),
])
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
