"""Advantages against loops that read like the papers, and edges where published code differs."""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import advantages as adv
from rl_llm.advantages.group import REWARD_ADVANTAGES
from rl_llm.runs.keywords import settings

MASK = np.array(
  [
    [True, True, True, True, True],
    [True, True, False, False, True],  # a tool wrote the middle
    [True, False, False, False, False],
    [False, False, False, False, False],
  ]
)
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
  return np.array(
    [sum((discount * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
  )


@pytest.mark.parametrize("discount, lam", [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.9, 1.0)])
@pytest.mark.parametrize("bootstrap", [None, np.array([0.3, -0.2, 0.8, 5.0])])
def test_gae_matches_the_sum_of_deltas_and_skips_masked_tokens(discount, lam, bootstrap):
  got, returns = adv.gae(
    REWARDS, VALUES, MASK, discount=discount, gae_lambda=lam, bootstrap=bootstrap
  )
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
    adv.discounted_returns(dirty, MASK), adv.discounted_returns(REWARDS, MASK)
  )
  for got, clean in zip(
    adv.gae(dirty, np.where(MASK, VALUES, np.inf), MASK),
    adv.gae(REWARDS, VALUES, MASK),
    strict=True,
  ):
    np.testing.assert_array_equal(got, clean)


def group_loop(rewards, scale, ddof, eps, baseline, where, singleton="zero", rule="add"):
  out = np.zeros(rewards.shape)
  for p, row in enumerate(rewards):
    ok = np.flatnonzero(where[p])
    if len(ok) < 2:
      out[p, ok] = row[ok] if singleton == "raw" else 0
      continue
    for g in ok:
      others = [row[j] for j in ok if j != g]
      base = np.mean(others) if baseline == "leave_one_out" else np.mean(row[ok])
      out[p, g] = row[g] - base
      if scale == "none":
        continue
      if scale == "leave_one_out":
        std = np.std(others, ddof=ddof) if len(set(others)) > 1 else None
      else:
        std = np.std(row[ok] if scale == "std" else rewards[where], ddof=ddof)
      if std is not None:
        out[p, g] /= std + eps if rule == "add" else max(std, eps)
  return out


@pytest.mark.parametrize("scale", ["std", "batch", "leave_one_out", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("ddof, eps", [(1, 1e-6), (0, 1e-4), (0, 0.8)])
def test_group_relative_matches_the_loop(scale, baseline, ddof, eps):
  failed = np.array([[False, False, True, True], [True, False, True, True], [False] * 4])
  failed[1] = [True, True, True, False]  # one answer left: a singleton
  singleton, rule = ("raw", "max") if eps == 0.8 else ("zero", "add")
  for where in (None, ~failed):
    expected = group_loop(
      GROUPS,
      scale,
      ddof,
      eps,
      baseline,
      np.ones_like(failed) if where is None else where,
      singleton,
      rule,
    )
    rewards = GROUPS if where is None else np.where(where, GROUPS, np.nan)
    got = adv.group_relative(
      rewards,
      scale=scale,
      ddof=ddof,
      eps=eps,
      baseline=baseline,
      singleton=singleton,
      eps_rule=rule,
      where=where,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7])
def test_an_outlier_among_equals_is_not_divided(reward):
  """The rounded mean of equal numbers may miss them by a digit: not a spread to divide by."""
  rewards = np.full((5, 17), reward, np.float32)
  rewards[:, 0] = 1
  sizes = np.arange(17) < np.array([[4], [6], [7], [12], [17]])
  got = jax.jit(
    lambda x, where: adv.group_relative(
      x, scale="leave_one_out", baseline="leave_one_out", eps=1e-9, where=where
    )
  )(rewards, sizes)
  np.testing.assert_allclose(got[:, 0], 1 - reward, rtol=1e-5)


def test_the_std_of_the_others_makes_an_outlier_large():
  """The others nearly agree on 0: where mean / std stays within 2, this one is -17.9."""
  rewards = np.array(3 * [[-1.0, 0.0, 0.1, 0.0]])
  others = np.std([0.0, 0.1, 0.0], ddof=1)
  got = adv.group_relative(rewards, scale="leave_one_out", baseline="leave_one_out")[0, 0]
  np.testing.assert_allclose(got, (-1 - 0.1 / 3) / (others + 1e-6), rtol=1e-5)
  assert got < -17 and abs(adv.group_relative(rewards)[0, 0]) < 2


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.7, 12345.678])
@pytest.mark.parametrize("ddof, eps", [(1, 1e-6), (0, 1e-9)])
def test_a_group_without_spread_is_exactly_zero(reward, ddof, eps):
  rewards = np.full((2, 7), reward, np.float32)
  for scale in ("std", "batch", "leave_one_out", "none"):
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


WHERE = np.array([[True, True, False, True], [True] * 4, [False, True, True, True]])
# An eager call would compile operation by operation.
GDPO = jax.jit(
  lambda rewards, where, scale: adv.gdpo(rewards, np.array([2.0, 0.5]), scale=scale, where=where),
  static_argnames="scale",
)
OTB = jax.jit(adv.optimal_token_baseline, static_argnames=("group_size", "singleton"))


def test_a_lambda_per_response_is_gae_row_by_row():
  lambdas = np.array([0.0, 0.5, 0.9, 1.0], np.float32)
  got, _ = adv.gae(REWARDS, VALUES, MASK, gae_lambda=lambdas)
  for b in range(4):
    alone, _ = adv.gae(REWARDS, VALUES, MASK, gae_lambda=float(lambdas[b]))
    np.testing.assert_allclose(got[b], alone[b], rtol=1e-6)


def test_the_length_adaptive_lambda_looks_ahead_over_a_share_of_the_response():
  """sum_k lambda^k = 1 / (1 - lambda) = alpha * n, never below 0."""
  mask = np.arange(200) < np.array([[200], [40], [10], [0]])
  got = adv.length_adaptive_lambda(mask, alpha=0.05)
  np.testing.assert_allclose(got, [1 - 1 / 10, 1 - 1 / 2, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_reinforce_plus_plus_whitens_over_the_valid_tokens(ddof):
  returns = np.asarray(adv.discounted_returns(REWARDS, MASK, discount=0.9), np.float64)
  inside = returns[MASK]
  expected = np.where(MASK, (returns - inside.mean()) / np.sqrt(inside.var(ddof=ddof) + 1e-8), 0)
  got = adv.reinforce_plus_plus(REWARDS, MASK, discount=0.9, ddof=ddof)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_reinforce_plus_plus_baseline_counts_tokens_not_responses():
  rewards, where = GROUPS[[0, 2], :2], np.array([[True, False], [True, True]])
  for ok in (None, where):
    valid = np.ones((2, 2), bool) if ok is None else ok
    tokens = [
      (p * 2 + g, rewards[p, g] - rewards[p][valid[p]].mean())
      for p in range(2)
      for g in range(2)
      if valid[p, g]
      for _ in range(MASK[p * 2 + g].sum())
    ]
    values = np.array([value for _, value in tokens])
    expected = np.zeros(4)
    for b, value in tokens:
      expected[b] = (value - values.mean()) / np.sqrt(values.var(ddof=1) + 1e-8)
    got = adv.reinforce_plus_plus_baseline(rewards, MASK, where=ok)
    np.testing.assert_allclose(got, MASK * expected[:, None], rtol=1e-5, atol=1e-5)


def test_opo_gpg_maxrl_and_remax_match_their_formulas():
  lengths, greedy = np.array([[3, 1, 0, 4], [1, 1, 1, 1], [5, 2, 9, 1]]), np.array([0.5, 0.0, 2.0])
  rewards = np.array([[1.0, 0.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 2.0, 7.0]])
  for where in (np.ones((3, 4), bool), WHERE):
    expected = {name: np.zeros((3, 4)) for name in ("opo", "gpg", "nonzero", "maxrl", "remax")}
    groups = [row[ok] for row, ok in zip(rewards, where, strict=True)]
    informative = sum(len(x) for x in groups if len(set(x)) > 1)
    nonzero = np.sum(rewards[where] != 0)
    for p, g in np.argwhere(where):
      n, x = lengths[p][where[p]], groups[p]
      r, centred = rewards[p, g], rewards[p, g] - x.mean()
      expected["opo"][p, g] = r - np.sum(n * x) / n.sum()
      expected["gpg"][p, g] = where.sum() / informative * centred
      expected["nonzero"][p, g] = where.sum() / nonzero * centred
      expected["maxrl"][p, g] = centred / (x.mean() + 1e-6)
      expected["remax"][p, g] = r - greedy[p]
    dirty = np.where(where, rewards, np.nan)
    got = {
      "opo": adv.opo(dirty, np.where(where, lengths, 99), where=where),
      "gpg": adv.gpg(dirty, where=where),
      "nonzero": adv.gpg(dirty, alpha="nonzero", where=where),
      "maxrl": adv.maxrl(dirty, where=where),
      "remax": adv.remax(dirty, greedy, where=where),
    }
    for name, x in got.items():
      np.testing.assert_allclose(x, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_equal_and_empty_groups_are_exactly_zero_everywhere():
  equal, nothing = np.full((3, 4), 0.1, np.float32), np.zeros((3, 4), bool)
  for f in (
    adv.group_relative,
    adv.leave_one_out,
    adv.gpg,
    adv.maxrl,
    adv.pass_at_k,
    lambda x, where=None: adv.pass_at_k(x, k=3, scale="std", where=where),
    lambda x, where=None: adv.opo(x, np.arange(12).reshape(3, 4), where=where),
    lambda x, where: GDPO(np.stack([x, x], 2), np.stack([where, where], 2), scale="std"),
  ):
    assert not np.any(f(equal, where=WHERE))  # three equal numbers: their mean is rounded
    assert not np.any(f(np.full((3, 4), np.nan), where=nothing))


def pass_at_k_loop(row, k):
  """Over all sets of k: what the maximum loses without i."""
  sets = list(itertools.combinations(range(len(row)), k))
  out = np.zeros(len(row))
  for chosen in sets:
    for i in chosen:
      rest = [row[j] for j in chosen if j != i]
      out[i] += (max(row[j] for j in chosen) - max(rest)) / len(sets)
  return out


@pytest.mark.parametrize("k", [2, 3, 4, None])
def test_pass_at_k_is_the_mean_loss_of_the_best_over_all_sets(k):
  for where in (np.ones((3, 4), bool), WHERE):
    expected = np.zeros((3, 4))
    for p in range(3):
      row = GROUPS[p][where[p]]
      expected[p, where[p]] = pass_at_k_loop(row, min(k or 4, len(row)))
    got = adv.pass_at_k(np.where(where, GROUPS, np.nan), k=k, where=where)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  std = GROUPS.std(axis=1, ddof=1, keepdims=True) + 1e-6
  np.testing.assert_allclose(
    adv.pass_at_k(GROUPS, k=k, scale="std"), adv.pass_at_k(GROUPS, k=k) / std, rtol=1e-5
  )


def test_pass_at_k_is_unbiased_for_the_gradient_of_the_best_of_k():
  """All 27 groups of 3 answers out of 3: sum_i A_i grad log p_i against grad E[max of 2]."""
  logits, reward = np.array([0.2, -0.5, 0.9]), np.array([0.1, 1.0, 0.4])
  p = np.exp(logits) / np.exp(logits).sum()
  scores = np.eye(3) - p  # d log p_a / d logits
  groups = np.array(list(itertools.product(range(3), repeat=3)))
  advantages = np.asarray(jax.jit(lambda x: adv.pass_at_k(x, k=2))(reward[groups]))
  got = np.einsum("n,ng,ngd->d", p[groups].prod(1), advantages, scores[groups])
  exact = sum(
    p[a] * p[b] * max(reward[a], reward[b]) * (scores[a] + scores[b])
    for a in range(3)
    for b in range(3)
  )
  np.testing.assert_allclose(got, exact, atol=1e-6)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_gdpo_normalises_each_reward_then_the_sum(scale):
  rewards = np.stack([GROUPS, 10 * GROUPS[:, ::-1] ** 2], axis=2)
  applies = np.stack([WHERE, np.ones((3, 4), bool)], axis=2)
  applies[0, 2] = False  # a response without any reward
  for where in (np.ones((3, 4, 2), bool), applies):
    total = sum(
      w * group_loop(rewards[..., k], scale, 1, 1e-6, "mean", where[..., k])
      for k, w in enumerate([2.0, 0.5])
    )
    valid = where.any(axis=2)
    expected = (total - total[valid].mean()) / (total[valid].std(ddof=1) + 1e-6)
    got = GDPO(np.where(where, rewards, np.nan), where, scale=scale)
    np.testing.assert_allclose(got, np.where(valid, expected, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("singleton", ["zero", "raw"])
def test_the_optimal_token_baseline_matches_the_loop(singleton):
  probabilities = np.random.default_rng(1).dirichlet(np.ones(6), size=MASK.shape)  # [B, T, V]
  p, squares = probabilities[..., 0], np.sum(probabilities**2, axis=-1)
  returns = np.asarray(adv.discounted_returns(REWARDS, MASK))
  expected = np.zeros(MASK.shape)
  for b, t in np.argwhere(MASK):
    rows = [j for j in (b // 2 * 2, b // 2 * 2 + 1) if MASK[j, t]]
    w = [sum(1 - 2 * p[j, s] + squares[j, s] for s in range(t + 1) if MASK[j, s]) for j in rows]
    baseline = np.sum(w * returns[rows, t]) / np.sum(w)
    if len(rows) == 1 and singleton == "raw":
      baseline = 0
    expected[b, t] = returns[b, t] - baseline
  got = OTB(
    np.where(MASK, returns, np.nan),
    np.where(MASK, np.log(p), np.inf),
    squares,
    MASK,
    group_size=2,
    singleton=singleton,
  )
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_distance_is_the_squared_gradient_of_the_logits():
  logits = np.array([0.3, -1.0, 2.0])
  p = np.exp(logits) / np.exp(logits).sum()
  gradient = jax.grad(lambda x: jax.nn.log_softmax(x)[1])(logits)
  np.testing.assert_allclose(np.sum(gradient**2), 1 - 2 * p[1] + np.sum(p**2), rtol=1e-5)


def test_the_overlong_penalty_is_piecewise_linear_in_tokens():
  got = adv.overlong_penalty(np.array([0, 11, 12, 13, 15, 16, 17, 99]), limit=16, cache=4)
  assert got.tolist() == [0, 0, 0, -0.25, -0.75, -1, -1, -1]


def test_informative_groups_are_those_with_a_gradient():
  rewards = np.array([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2], [np.nan, 1.0, 1.0], [np.nan, 1.0, 0.0]])
  got = adv.informative_groups(rewards, where=~np.isnan(rewards))
  assert got.tolist() == [False, True, False, True]
  gradient = np.any(np.asarray(adv.group_relative(rewards, where=~np.isnan(rewards))), axis=1)
  np.testing.assert_array_equal(got, gradient)


def test_all_of_it_compiles():
  for f in (
    lambda: adv.gae(REWARDS, VALUES, MASK),
    lambda: adv.discounted_returns(REWARDS, MASK),
    lambda: adv.group_relative(GROUPS, scale="leave_one_out", singleton="raw"),
    lambda: adv.token_rewards(np.ones(4), MASK),
    lambda: adv.gpg(GROUPS),
  ):
    for jitted, plain in zip(jax.tree.leaves(jax.jit(f)()), jax.tree.leaves(f()), strict=True):
      np.testing.assert_allclose(jitted, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  "call, message",
  [
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
    (lambda: adv.group_relative(GROUPS, singleton="one"), "singleton is 'one'"),
    (lambda: adv.group_relative(GROUPS, eps_rule="min"), "eps_rule is 'min'"),
    (lambda: adv.gae(REWARDS, VALUES, MASK, gae_lambda=np.ones(3)), "gae_lambda has shape"),
    (lambda: adv.length_adaptive_lambda(MASK, alpha=0), "alpha is 0"),
    (lambda: adv.reinforce_plus_plus(REWARDS, MASK, eps=0), "eps is 0"),
    (lambda: adv.reinforce_plus_plus_baseline(GROUPS, MASK), "mask has shape.*12 rows"),
    (lambda: adv.remax(GROUPS, np.ones(4)), r"greedy_rewards has shape \(4,\).*\(3,\)"),
    (lambda: adv.opo(GROUPS, np.ones(4)), "lengths has shape"),
    (lambda: adv.gpg(GROUPS, alpha="all"), "alpha is 'all'"),
    (lambda: adv.maxrl(GROUPS, eps=0), "eps is 0"),
    (lambda: adv.pass_at_k(GROUPS, k=5), "k is 5.*between 2 and 4"),
    (lambda: adv.gdpo(GROUPS, np.ones(4)), "rewards has shape.*P, G, K"),
    (lambda: adv.gdpo(GROUPS[..., None], np.ones(2)), "weights has shape"),
    (
      lambda: adv.optimal_token_baseline(REWARDS, VALUES, VALUES, MASK, group_size=3),
      "group_size is 3.*rows of mask, 4",
    ),
    (lambda: adv.overlong_penalty(np.ones(2), limit=4, cache=5), "cache is 5"),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# What an experiment offers by name.


@pytest.mark.parametrize("advantage", REWARD_ADVANTAGES, ids=lambda f: f.__name__)
def test_group_advantages_are_called_in_one_way(advantage):
  """(rewards, *, where=None, ...) -> [P, G], in which what is masked out is as if absent."""
  first, *keywords = inspect.signature(advantage).parameters.values()
  assert first.name == "rewards" and first.kind is first.POSITIONAL_OR_KEYWORD
  assert {p.kind for p in keywords} == {first.KEYWORD_ONLY}
  assert settings(advantage).keys() == {p.name for p in keywords} - {"where"}
  groups = np.abs(GROUPS)  # MaxRL has no value below 0.
  where = np.array([[True, True, False, True], [True] * 4, [False, True, True, True]])
  rewards = np.where(where, groups, 1e4)
  found = np.asarray(advantage(rewards, where=where))
  assert found.shape == GROUPS.shape and found.dtype == np.float32
  assert (found[~where] == 0).all() and np.isfinite(found).all()
  for p, kept in enumerate(where):
    alone = advantage(groups[p : p + 1, kept])[0]
    np.testing.assert_allclose(found[p, kept], alone, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    advantage(groups), advantage(groups, where=np.ones_like(where)), rtol=1e-6
  )


def test_the_standard_deviation_divides_by_one_less_or_not():
  rewards = np.array([[1.0, 0.0, 0.0, 0.0]])
  for ddof in (0, 1):
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / (4 - ddof))
    found = adv.group_relative(rewards, ddof=ddof, eps=1e-9)
    np.testing.assert_allclose(found[0, 0], 0.75 / std, rtol=1e-5)
  for ddof in (-1, 2):
    with pytest.raises(ValueError, match=f"ddof is {ddof}; it must be"):
      adv.group_relative(rewards, ddof=ddof)


def test_maxrl_has_no_value_where_a_reward_is_below_zero():
  """The mean of -3 and 1 is -1: divided by it, the better one would be pushed down."""
  rewards = np.array([[1.0, 0.0], [-3.0, 1.0], [-3.0, 1.0]])
  where = np.array([[True, True], [True, True], [False, True]])
  got = adv.maxrl(rewards, where=where)
  np.testing.assert_allclose(got[0], [1, -1], rtol=1e-5)
  assert np.isnan(got[1]).all() and not np.any(got[2])


@pytest.mark.parametrize(
  "f, alone",
  [
    (lambda r, **k: adv.gpg(r, alpha="nonzero", **k), 1.5),  # Times alpha = 3 / 2.
    (lambda r, **k: adv.gpg(r, **k), 1.5),
    (lambda r, **k: adv.opo(r, np.ones_like(r), **k), 1.0),
    (lambda r, **k: adv.group_relative(r, **k), 1.0),
  ],
  ids=["gpg nonzero", "gpg", "opo", "group_relative"],
)
def test_a_lone_response_keeps_its_reward_where_asked(f, alone):
  """verl takes a mean of 0 for a group of one."""
  rewards = np.array([[1.0, 0.0], [1.0, 0.5]])
  where = np.array([[True, True], [True, False]])
  zero, raw = f(rewards, where=where), f(rewards, where=where, singleton="raw")
  np.testing.assert_allclose(raw[1], [alone, 0], rtol=1e-6)
  np.testing.assert_array_equal(zero[1], [0, 0])
  np.testing.assert_array_equal(zero[0], raw[0])


def test_reinforce_plus_plus_baseline_whitens_a_lone_reward():
  rewards, mask = np.array([[2.0], [0.0], [1.0]]), np.ones((3, 1), bool)
  got = adv.reinforce_plus_plus_baseline(rewards, mask, singleton="raw", ddof=0)
  np.testing.assert_allclose(got[:, 0], (rewards[:, 0] - 1) / np.sqrt(2 / 3), rtol=1e-5)
  assert not np.any(adv.reinforce_plus_plus_baseline(rewards, mask))


def test_a_group_with_a_nan_is_not_dropped_in_silence():
  rewards = np.array([[np.nan, 1.0], [1.0, 1.0], [np.nan, np.nan]])
  assert adv.informative_groups(rewards).tolist() == [True, False, True]
