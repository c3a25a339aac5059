"""GSPO, GSPO-token, GMPO and VESPO: slow loops with gradients by hand, a clip table, identities."""

import math

import jax
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(2)
SHAPE = (5, 5)
OLD = np.log(RNG.uniform(0.1, 0.9, SHAPE))
LOGPROBS = OLD + RNG.normal(scale=0.5, size=SHAPE)
ADVANTAGES = RNG.normal(size=SHAPE)
MASK = np.arange(5) < np.array([[5], [3], [1], [4], [0]])
MASK[0, 2] = False  # a tool's token
# A correction set two members to 0 and doubled one.
FACTORS = np.where(np.eye(5) > 0, [[0], [0], [1], [2], [1]], 1)
WEIGHTS = np.asarray(weighting.sequence_mean(MASK)) * FACTORS

NAMES = ["gspo", "gspo_token", "gmpo", "vespo"]
F = {
  name: jax.jit(jax.value_and_grad(getattr(losses, f"{name}_loss"), has_aux=True))
  for name in [*NAMES, "ppo"]
}


# One response: a list of (A, log-ratio, log-prob, weight) -> value, gradients; derived by hand.
def gspo(tokens, clip_low=3e-4, clip_high=4e-4):
  value, slopes = gspo_token(tokens, clip_low, clip_high)
  return value, [sum(slopes) / len(tokens)] * len(tokens)  # d mean / d log-prob = 1 / n


def gspo_token(tokens, clip_low=3e-4, clip_high=4e-4):
  s = math.exp(sum(x for _, x, _, _ in tokens) / len(tokens))
  value, slopes = 0.0, []
  for a, _, _, weight in tokens:
    value += weight * max(-s * a, -min(max(s, 1 - clip_low), 1 + clip_high) * a)
    clipped = s > 1 + clip_high if a > 0 else s < 1 - clip_low
    slopes.append(0.0 if clipped else -weight * s * a)
  return value, slopes


def gmpo(tokens, clip_low=0.4, clip_high=0.4):
  """With sgn(A) * min(sgn(A) * x, sgn(A) * clip(x)), as the paper has it."""
  cut = []
  for a, x, _, _ in tokens:
    sign = math.copysign(1, a)
    cut.append(sign * min(sign * x, sign * min(max(x, -clip_low), clip_high)))
  g = math.exp(sum(cut) / len(tokens))
  pull = -sum(weight * a for a, _, _, weight in tokens) * g
  moved = [token[1] for token in tokens]
  return pull, [pull / len(cut) if c == x else 0.0 for c, x in zip(cut, moved, strict=True)]


def vespo(tokens, k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0):
  w = math.exp(sum(x for _, x, _, _ in tokens))
  value, slopes = 0.0, []
  for a, _, logprob, weight in tokens:
    k, rate = (k_positive, lambda_positive) if a >= 0 else (k_negative, lambda_negative)
    phi = w**k * math.exp(rate - rate * w)
    value -= weight * phi * a * logprob
    slopes.append(-weight * phi * a)
  return value, slopes


def loop(name, logprobs=LOGPROBS, advantages=ADVANTAGES, weights=WEIGHTS, **settings):
  value, gradient = 0.0, np.zeros(SHAPE)
  for b in np.flatnonzero(MASK.any(axis=1)):
    tokens = [
      (advantages[b, t], logprobs[b, t] - OLD[b, t], logprobs[b, t], weights[b, t])
      for t in np.flatnonzero(MASK[b])
    ]
    one, slopes = globals()[name](tokens, **settings)
    value += one
    gradient[b, MASK[b]] = slopes
  return value, gradient


@pytest.mark.parametrize(
  "name, settings",
  [
    ("gspo", {}),
    ("gspo", {"clip_low": 0.05, "clip_high": 0.3}),
    ("gspo_token", {}),
    ("gspo_token", {"clip_low": 0.05, "clip_high": 0.3}),
    ("gmpo", {}),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.7}),
    ("vespo", {}),
    (
      "vespo",
      {"k_positive": 1.0, "lambda_positive": 1.5, "k_negative": 0.5, "lambda_negative": 0.7},
    ),
  ],
)
def test_value_and_gradient_match_the_loop(name, settings):
  (loss, _), gradient = F[name](LOGPROBS, OLD, ADVANTAGES, WEIGHTS, mask=MASK, **settings)
  value, slopes = loop(name, **settings)
  assert np.any(slopes) and (name == "vespo" or np.any(slopes[MASK] == 0))  # some are clipped
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  np.testing.assert_allclose(gradient, slopes, rtol=2e-5, atol=1e-7)


# A response of one token has the ratio of that token, so that one table serves all: value and
# gradient of a step from ratio 1 with bounds of 0.8 and 1.25.
CLIP_TABLE = [
  # A, ratio, value, gradient
  (+1.0, 0.5, -0.5, -0.5),
  (+1.0, 1.1, -1.1, -1.1),
  (+1.0, 1.5, -1.25, 0.0),
  (-1.0, 0.5, +0.8, 0.0),
  (-1.0, 1.1, +1.1, +1.1),
  (-1.0, 1.5, +1.5, +1.5),
]
BOUNDS = {"clip_low": 0.2, "clip_high": 0.25}
LOG_BOUNDS = {"clip_low": -math.log(0.8), "clip_high": math.log(1.25)}


@pytest.mark.parametrize("name", ["ppo", "gspo", "gspo_token", "gmpo"])
def test_clip_table(name):
  """Also the guard against a known defect, the maximum of the two terms where A < 0.

  It lets go of the bad token that became likelier and pushes on the one that fell: the last row
  would have gradient 0 and the fourth 0.5.
  """
  a, ratio, values, slopes = np.array(CLIP_TABLE).T
  bounds = LOG_BOUNDS if name == "gmpo" else BOUNDS
  old = np.full((6, 1), math.log(0.1))
  new = old + np.log(ratio)[:, None]
  weights = 2.0 ** np.arange(6)[:, None]  # no two subsets of rows have one sum
  (loss, metrics), gradient = F[name](new, old, a, weights, **bounds)
  np.testing.assert_allclose(loss, weights[:, 0] @ values, rtol=1e-6)
  np.testing.assert_allclose((gradient / weights)[:, 0], slopes, rtol=1e-5, atol=1e-7)
  assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == (1, 6)


def test_gspo_has_the_gradient_of_gspo_token_where_a_response_is_constant():
  advantages, weights = ADVANTAGES[:, 0], np.asarray(weighting.sequence_mean(MASK))
  settings = {"mask": MASK, "clip_low": 0.05, "clip_high": 0.3}
  (loss, _), together = F["gspo"](LOGPROBS, OLD, advantages, weights, **settings)
  (same, _), apart = F["gspo_token"](LOGPROBS, OLD, advantages, weights, **settings)
  np.testing.assert_allclose(loss, same, rtol=1e-6)
  np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-7)
  (loss, _), together = F["gspo"](LOGPROBS, OLD, ADVANTAGES, weights, **settings)
  (same, _), apart = F["gspo_token"](LOGPROBS, OLD, ADVANTAGES, weights, **settings)
  np.testing.assert_allclose(loss, same, rtol=1e-6)
  assert np.abs(together - apart).max() > 0.01  # but not where the advantages differ


@pytest.mark.parametrize("name", NAMES)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name):
  """-w * A per token; where the gradient runs through the mean, its mean over the response."""
  _, gradient = F[name](OLD, OLD, ADVANTAGES, WEIGHTS, mask=MASK)
  expected = -WEIGHTS * ADVANTAGES
  if name in ("gspo", "gmpo"):
    n = np.maximum(MASK.sum(axis=1, keepdims=True), 1)
    expected = MASK * expected.sum(axis=1, keepdims=True) / n
  np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_a_zero_factor_does_not_change_the_mean_log_ratio():
  """IcePop drops the third token: it loses its weight, and stays in the mean over its response."""
  now, old = np.array([[0.2, 0.1, 0.6]]), np.zeros((1, 3))
  keep, mask = np.array([[1.0, 1.0, 0.0]]), np.ones((1, 3), bool)
  for name in ("gspo", "gspo_token", "gmpo"):
    for given, mean in ((mask, 0.3), (None, 0.15)):  # without a mask it would leave the response
      settings = {"clip_low": 1.0, "clip_high": 1.0, "mask": given}
      (loss, metrics), _ = F[name](now, old, np.ones(1), keep, **settings)
      np.testing.assert_allclose(loss, -2 * math.exp(mean), rtol=1e-6)
      np.testing.assert_allclose(metrics["sequence_ratio"], (math.exp(mean), 1), rtol=1e-6)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_microbatches_of_ragged_rows_add_where_a_mean_of_their_means_is_wrong(name):
  """A known defect of GMPO: the mean over the local rows, whatever weights were asked for."""
  weights = np.asarray(weighting.token_mean(MASK))
  settings = {"mask": MASK, "clip_low": 0.05, "clip_high": 0.3}
  given = LOGPROBS, OLD, ADVANTAGES[:, 0]
  (whole, _), _ = F[name](*given, weights, **settings)
  first = np.arange(5)[:, None] < 1
  parts = [F[name](*given, weights * half, **settings)[0][0] for half in (first, ~first)]
  np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)
  local = [
    F[name](*given, np.asarray(weighting.sequence_mean(MASK & half)), **settings)[0][0]
    for half in (first, ~first)
  ]
  assert abs(sum(local) / 2 - whole) > 0.05


def test_luspo_is_gspo_with_sequence_sums():
  """LUSPO is each response's GSPO term times its length, and the mean over responses."""
  advantages = ADVANTAGES[:, 0]
  settings = {"clip_low": 0.05, "clip_high": 0.3}
  weights = np.asarray(weighting.sequence_sum(MASK))
  (loss, _), _ = F["gspo"](LOGPROBS, OLD, advantages, weights, mask=MASK, **settings)
  expected = 0.0
  for b in range(4):  # the fifth row is empty
    n = MASK[b].sum()
    s = math.exp((LOGPROBS - OLD)[b, MASK[b]].sum() / n)
    term = max(-s * advantages[b], -min(max(s, 0.95), 1.3) * advantages[b])
    expected += n * term / 4
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_rloo_is_ppo_on_the_sums_of_responses():
  """exp of the summed log-ratio, not of its mean; clipped; the mean over responses."""
  now, old = (np.where(MASK, x, 0).sum(axis=1, keepdims=True) for x in (LOGPROBS, OLD))
  rows = MASK.any(axis=1, keepdims=True)
  (loss, _), gradient = F["ppo"](now, old, ADVANTAGES[:, 0], rows / 4.0)
  expected = 0.0
  for b in range(4):
    ratio, a = math.exp(sum((LOGPROBS - OLD)[b, MASK[b]])), ADVANTAGES[b, 0]
    expected += max(-ratio * a, -min(max(ratio, 0.8), 1.2) * a) / 4
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert gradient.shape == (5, 1)


def test_vespo_weighs_most_at_k_over_lambda():
  """d/dw (k log w + lambda (1 - w)) = 0 there; and at w = 1 it weighs 1."""
  for a, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
    w = np.array([[1.0], [peak], [peak * 0.99], [peak * 1.01], [50.0]])
    _, gradient = F["vespo"](np.log(w), np.zeros((5, 1)), np.full(5, a), np.ones((5, 1)))
    phi = -a * np.asarray(gradient)[:, 0]
    np.testing.assert_allclose(phi[0], 1, rtol=1e-6)
    assert phi[1] > max(phi[2], phi[3]) and phi[4] < 1e-30


def test_metrics_match_their_formulas():
  log_ratio = np.where(MASK, LOGPROBS - OLD, 0)
  n = np.maximum(MASK.sum(axis=1), 1)
  s = np.exp(log_ratio.sum(axis=1) / n)
  a = np.where(MASK, ADVANTAGES, 0)
  per_token = np.broadcast_to(s[:, None], SHAPE)
  settings = {"mask": MASK, "clip_low": 0.05, "clip_high": 0.3}
  for name in ("gspo", "gspo_token"):
    (_, metrics), _ = F[name](LOGPROBS, OLD, ADVANTAGES, WEIGHTS, **settings)
    expected = {
      "sequence_ratio": (s[:4].sum(), 4),
      "approx_kl": (np.sum(np.exp(log_ratio) - 1 - log_ratio), MASK.sum()),
      "clip_low_fraction": (np.sum((a < 0) & (per_token < 0.95)), MASK.sum()),
      "clip_high_fraction": (np.sum((a > 0) & (per_token > 1.3)), MASK.sum()),
    }
    assert metrics.keys() == expected.keys()
    for key in expected:
      np.testing.assert_allclose(metrics[key], expected[key], rtol=1e-5, err_msg=key)


@pytest.mark.parametrize(
  "name, settings, message",
  [
    ("gspo", {"clip_low": 0.0}, "clip_low is 0.0.*above 0"),
    ("gspo_token", {"clip_high": -1}, "clip_high is -1"),
    ("gmpo", {"clip_high": 0}, "clip_high is 0"),
    ("vespo", {"k_positive": -1}, "k_positive is -1.*between 0"),
    ("vespo", {"lambda_negative": -0.5}, "lambda_negative is -0.5"),
    ("gmpo", {"mask": np.ones(SHAPE)}, "mask has dtype float"),
    ("gspo", {"mask": np.ones((1, 5), bool)}, "mask has shape"),
  ],
)
def test_bad_settings_are_named(name, settings, message):
  with pytest.raises(ValueError, match=message):
    getattr(losses, f"{name}_loss")(LOGPROBS, OLD, ADVANTAGES, WEIGHTS, **settings)


@pytest.mark.parametrize("advantage, ratio", [(1.0, 0.5), (1.0, 2.0), (-1.0, 0.5), (-1.0, 2.0)])
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "gmpo"])
def test_a_ratio_at_the_end_of_the_range_has_its_whole_slope(name, advantage, ratio):
  logprobs, ones = np.log(np.float32([[ratio]])), np.ones((1, 1), np.float32)
  # GMPO's range is that of the log-ratio.
  low, high = (np.float32(math.log(2)),) * 2 if name == "gmpo" else (0.5, 1.0)
  arrays = logprobs, np.zeros((1, 1), np.float32), np.float32([advantage]), ones
  (loss, _), slope = F[name](*arrays, clip_low=low, clip_high=high)
  np.testing.assert_allclose([float(loss), slope[0, 0]], -ratio * advantage, rtol=1e-6)
