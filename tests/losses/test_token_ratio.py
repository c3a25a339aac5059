"""CISPO, SAPO, DPPO, DRO, SPO and DRPO: slow loops, tables of limits, identities."""

import math

import jax
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(1)
SHAPE = (4, 5)
OLD = np.log(RNG.uniform(0.1, 0.9, SHAPE))
LOGPROBS = np.minimum(OLD + RNG.normal(scale=0.7, size=SHAPE), -0.02)
ADVANTAGES = RNG.normal(size=SHAPE)
MASK = np.arange(5) < np.array([[5], [3], [1], [4]])
WEIGHTS = np.asarray(weighting.sequence_mean(MASK))

NAMES = ["cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "spo", "drpo"]
F = {
  name: jax.jit(jax.value_and_grad(getattr(losses, f"{name}_loss"), has_aux=True))
  for name in [*NAMES, "ppo"]
}


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


# One token: (value, gradient with respect to its log-prob), differentiated by hand.
def cispo(a, now, old, low=0.0, high=5.0):
  count = min(max(math.exp(now - old), low), high)
  return -count * a * now, -count * a


def sapo(a, now, old, tau_positive=1.0, tau_negative=1.05):
  ratio, tau = math.exp(now - old), tau_positive if a > 0 else tau_negative
  s = sigmoid(tau * (ratio - 1))
  return -4 / tau * s * a, -4 * s * (1 - s) * ratio * a  # s' = tau * s * (1 - s) * ratio


def dppo(moved, a, now, old, low, high, ratio_cap):
  if (a > 0 and now > old and moved > high) or (a < 0 and now < old and moved > low):
    return 0.0, 0.0
  count = min(math.exp(now - old), ratio_cap)
  return -count * a, -count * a


def dppo_tv(a, now, old, threshold_low=0.15, threshold_high=0.15, ratio_cap=math.inf):
  moved = abs(math.exp(now) - math.exp(old))
  return dppo(moved, a, now, old, threshold_low, threshold_high, ratio_cap)


def dppo_kl(a, now, old, threshold_low=0.05, threshold_high=0.05, ratio_cap=math.inf):
  p, q = math.exp(old), math.exp(now)
  moved = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
  return dppo(moved, a, now, old, threshold_low, threshold_high, ratio_cap)


def dro(a, now, old, beta=0.05):
  return -(a * now - beta / 2 * (now - old) ** 2), -(a - beta * (now - old))


def spo(a, now, old, threshold=0.2, curvature=1.0):
  ratio = math.exp(now - old)
  value = -a * ratio + abs(a) * curvature * (ratio - 1) ** 2 / (2 * threshold)
  return value, ratio * (-a + abs(a) * curvature * (ratio - 1) / threshold)


def drpo(a, now, old, threshold=12.5):
  return spo(a, now, old, threshold, curvature=math.exp(old))


@pytest.mark.parametrize(
  "name, settings",
  [
    ("cispo", {}),
    ("cispo", {"low": 0.8, "high": 1.28}),
    ("sapo", {}),
    ("sapo", {"tau_positive": 0.5, "tau_negative": 2.0}),
    ("dppo_tv", {}),
    ("dppo_tv", {"threshold_low": 0.05, "threshold_high": 0.3, "ratio_cap": 1.2}),
    ("dppo_kl", {}),
    ("dppo_kl", {"threshold_low": 0.3, "threshold_high": 0.01, "ratio_cap": 1.2}),
    ("dro", {}),
    ("dro", {"beta": 1.5}),
    ("spo", {}),
    ("spo", {"threshold": 3.0}),
    ("drpo", {}),
    ("drpo", {"threshold": 0.15}),
  ],
)
def test_value_and_gradient_match_the_loop(name, settings):
  (loss, metrics), gradient = F[name](LOGPROBS, OLD, ADVANTAGES, WEIGHTS, mask=MASK, **settings)
  value, slopes = 0.0, np.zeros(SHAPE)
  for b, t in np.argwhere(MASK):
    one = globals()[name](ADVANTAGES[b, t], LOGPROBS[b, t], OLD[b, t], **settings)
    value += WEIGHTS[b, t] * one[0]
    slopes[b, t] = WEIGHTS[b, t] * one[1]
  np.testing.assert_allclose(loss, value, rtol=2e-5)
  np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=1e-7)
  ratio = np.exp(LOGPROBS - OLD)[MASK]
  np.testing.assert_allclose(metrics["ratio"], (ratio.sum(), MASK.sum()), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["approx_kl"], (np.sum(ratio - 1 - np.log(ratio)), MASK.sum()), rtol=1e-5
  )


@pytest.mark.parametrize("name", [*NAMES, "ppo"])
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
  """-weight * A. SAPO: 4/tau * tau * sigmoid'(0) = 1; DRO: the spring is at rest."""
  _, gradient = F[name](OLD, OLD, ADVANTAGES, WEIGHTS, mask=MASK)
  np.testing.assert_allclose(gradient, -WEIGHTS * ADVANTAGES, rtol=1e-5, atol=1e-7)


# Each token: A, old and new probability, and its gradient with weight 1.
TABLES = {
  # A * clip(ratio, 0.5, 2) whatever the sign and the side: no token is ever dropped.
  "cispo": (
    {"low": 0.5, "high": 2.0},
    [
      (+1, 0.4, 0.1, -0.5),
      (+1, 0.4, 0.44, -1.1),
      (+1, 0.1, 0.4, -2.0),
      (-1, 0.4, 0.1, +0.5),
      (-1, 0.4, 0.44, +1.1),
      (-1, 0.1, 0.4, +2.0),
    ],
  ),
  # Dropped: the good token that won more than 0.15 and the bad one that lost more.
  "dppo_tv": (
    {},
    [
      (+1, 0.50, 0.25, -0.5),
      (+1, 0.01, 0.05, -5.0),
      (+1, 0.50, 0.70, 0.0),
      (-1, 0.50, 0.25, 0.0),
      (-1, 0.05, 0.01, +0.2),
      (-1, 0.50, 0.70, +1.4),
    ],
  ),
  # KL from 0.5 to 0.25 is log 2 / 2 + log(2/3) / 2 = 0.144, to 0.7 0.087; 0.01 to 0.05 is 0.025.
  "dppo_kl": (
    {},
    [
      (+1, 0.50, 0.25, -0.5),
      (+1, 0.01, 0.05, -5.0),
      (+1, 0.50, 0.70, 0.0),
      (-1, 0.50, 0.25, 0.0),
      (-1, 0.05, 0.01, +0.2),
      (-1, 0.50, 0.70, +1.4),
    ],
  ),
}
# The weight of -A * ratio is 1 - sign(A * (ratio - 1)) * |ratio - 1| / threshold, and DRPO's
# 1 - sign(A * (ratio - 1)) * |pi - mu| / threshold: 0 at the threshold, negative beyond it.
PULLS = {
  "spo": [
    (+1, 0.40, 0.60, 0.0),  # ratio 1.5
    (+1, 0.40, 0.80, -2.0 * -1.0),  # ratio 2: pulled back
    (+1, 0.40, 0.20, -0.5 * 2.0),  # a good token that fell: pushed twice as hard
    (-1, 0.40, 0.20, +0.5 * 0.0),
    (-1, 0.40, 0.60, +1.5 * 2.0),
    (-1, 0.40, 0.10, +0.25 * -0.5),  # a bad token that fell too far: pulled back
  ],
  "drpo": [
    (+1, 0.10, 0.60, 0.0),
    (+1, 0.10, 0.85, -8.5 * -0.5),
    (+1, 0.01, 0.05, -5.0 * 0.92),  # a rare token: its ratio is 5, its move small
    (-1, 0.90, 0.40, 0.0),
    (-1, 0.10, 0.60, +6.0 * 2.0),
    (-1, 0.90, 0.15, +(0.15 / 0.9) * -0.5),
  ],
}


@pytest.mark.parametrize("name", TABLES)
def test_table_of_limits(name):
  settings, table = TABLES[name]
  a, old, now, expected = np.array(table).T[:, None]
  (_, metrics), gradient = F[name](np.log(now), np.log(old), a, np.ones(a.shape), **settings)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)
  limited = (now / old < 0.5) & (name == "cispo") | (expected == 0) & (a < 0)
  assert metrics["clip_low_fraction"] == (limited.sum(), 6)
  limited = (now / old > 2.0) & (name == "cispo") | (expected == 0) & (a > 0)
  assert metrics["clip_high_fraction"] == (limited.sum(), 6)


@pytest.mark.parametrize("name", PULLS)
def test_a_token_beyond_the_threshold_is_pulled_back(name):
  a, old, now, expected = np.array(PULLS[name]).T[:, None]
  ones = np.ones(a.shape)
  (_, metrics), gradient = F[name](np.log(now), np.log(old), a, ones, threshold=0.5)
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=2e-6)
  pulled = gradient * -a < -1e-5
  assert metrics["clip_high_fraction"] == ((pulled & (a > 0)).sum(), 6)
  assert metrics["clip_low_fraction"] == ((pulled & (a < 0)).sum(), 6)


def test_the_weights_of_drpo_are_bounded_whatever_the_ratio():
  """[1 - 1 / threshold, 1 + 1 / threshold], as no probability moves by more than 1."""
  old = np.log(np.array([[1e-7, 1e-3, 0.5, 0.999]]))
  now = np.log(np.array([[0.9, 0.2, 1e-6, 1e-5]]))
  ratio = np.exp(now - old)
  for a in (1.0, -1.0):
    given = now, old, np.full(1, a), np.ones((1, 4))
    weight = -F["drpo"](*given, threshold=2.0)[1] / (a * ratio)
    assert np.all(np.abs(weight - 1) <= 0.5 + 1e-5)
  spo = -F["spo"](now, old, np.ones(1), np.ones((1, 4)), threshold=2.0)[1] / ratio
  assert spo[0, 0] < -1e6


def test_binary_kl_is_of_new_from_old():
  """A rise from 0.1 to 0.3 is KL(old || new) = 0.116; KL(new || old) would be 0.154."""
  p, q = 0.1, 0.3
  kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
  now, old, a = (np.full(SHAPE, x) for x in (math.log(q), math.log(p), 1.0))
  for threshold, kept in ((kl + 1e-4, True), (kl - 1e-4, False)):
    _, gradient = F["dppo_kl"](
      now, old, a, WEIGHTS, mask=MASK, threshold_low=0.1, threshold_high=threshold, ratio_cap=10.0
    )
    np.testing.assert_allclose(gradient, -q / p * WEIGHTS * kept, rtol=1e-5)


def test_binary_kl_of_certain_tokens():
  """1 -> 1 is no move, 0.5 -> 1 an infinite one: neither may give a NaN."""
  now, old = np.log([[1.0, 1.0]]), np.log([[1.0, 0.5]])
  (loss, _), gradient = F["dppo_kl"](now, old, np.ones(1), np.ones((1, 2)))
  assert loss == -1 and gradient.tolist() == [[-1.0, 0.0]]


def test_without_its_stop_gradient_cispo_would_push_a_good_token_down():
  """d(ratio * A * logprob) = ratio * A * (1 + logprob): for probability 0.1 the sign is wrong."""
  now, a = np.full(SHAPE, math.log(0.1)), np.ones(SHAPE)
  _, gradient = F["cispo"](now, now, a, WEIGHTS, mask=MASK)
  np.testing.assert_allclose(gradient, -WEIGHTS, rtol=1e-6)
  assert -(1 + math.log(0.1)) > 1  # what it would be


def test_conventions_of_cispo():
  """eps_high as an absolute cap of 0.2, one system's default, cuts nearly all tokens to 0.2."""
  given = LOGPROBS, OLD, ADVANTAGES, WEIGHTS
  _, capped = F["cispo"](*given, mask=MASK, low=0.0, high=0.2)
  assert np.mean(np.isclose(capped, -0.2 * WEIGHTS * ADVANTAGES)[MASK]) > 0.9
  (one, _), reinforce = F["cispo"](*given, mask=MASK, low=1.0, high=1.0)
  np.testing.assert_allclose(one, -np.sum(WEIGHTS * ADVANTAGES * LOGPROBS), rtol=1e-5)
  np.testing.assert_allclose(reinforce, -WEIGHTS * ADVANTAGES, rtol=1e-5, atol=1e-7)


def test_a_mask_in_both_directions_is_a_factor_of_the_weights():
  """The symmetric rule "drop if |pi - mu| > 0.1, plus a squared log-ratio" composes."""
  keep = np.abs(np.exp(LOGPROBS) - np.exp(OLD)) <= 0.1
  (policy, _), _ = F["dppo_tv"](
    LOGPROBS,
    OLD,
    ADVANTAGES,
    WEIGHTS * keep,
    mask=MASK,
    threshold_low=1.0,
    threshold_high=1.0,
    ratio_cap=1e9,
  )
  spring, _ = losses.kl_loss(LOGPROBS, OLD, WEIGHTS, value="k2", gradient="k2")
  expected = 0.0
  for b, t in np.argwhere(MASK):
    d = LOGPROBS[b, t] - OLD[b, t]
    if abs(math.exp(LOGPROBS[b, t]) - math.exp(OLD[b, t])) <= 0.1:
      expected -= WEIGHTS[b, t] * ADVANTAGES[b, t] * math.exp(d)
    expected += WEIGHTS[b, t] * 1e-3 * d**2
  assert 0 < keep[MASK].sum() < MASK.sum()
  np.testing.assert_allclose(policy + 2e-3 * spring, expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_zero_factor_silences_a_token_and_leaves_it_a_member(name):
  keep = ADVANTAGES > 0
  _, all_tokens = F[name](LOGPROBS, OLD, ADVANTAGES, WEIGHTS, mask=MASK)
  (_, metrics), gradient = F[name](LOGPROBS, OLD, ADVANTAGES, WEIGHTS * keep, mask=MASK)
  np.testing.assert_allclose(gradient, all_tokens * keep, rtol=1e-6)
  assert metrics["ratio"][1] == MASK.sum() > np.sum(WEIGHTS * keep != 0)


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("cispo", {"low": -0.1}, "low is -0.1.*between 0"),
    ("cispo", {"low": 0.5, "high": 0.4}, "high is 0.4.*between 0.5"),
    ("sapo", {"tau_positive": 0}, "tau_positive is 0.*above 0"),
    ("sapo", {"tau_negative": -1.0}, "tau_negative is -1.0"),
    ("dppo_tv", {"threshold_low": 0.0}, "threshold_low is 0.0"),
    ("dppo_kl", {"threshold_high": -0.1}, "threshold_high is -0.1"),
    ("dppo_kl", {"ratio_cap": 0}, "ratio_cap is 0"),
    ("dro", {"beta": 0.0}, "beta is 0.0"),
    ("spo", {"threshold": 0.0}, "threshold is 0.0.*above 0"),
    ("drpo", {"threshold": -1.0}, "threshold is -1.0"),
    ("sapo", {"mask": np.ones(SHAPE)}, "mask has dtype float"),
  ],
)
def test_bad_settings_are_named(name, settings, message):
  with pytest.raises(ValueError, match=message):
    getattr(losses, f"{name}_loss")(LOGPROBS, OLD, ADVANTAGES, WEIGHTS, **settings)
