"""Weights against explicit loops, and the invariances that make gradients of microbatches add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import weighting
from rl_llm.rollout import ResponseBatch
from rl_llm.training.minibatches import token_weights

MASK = np.array(
  [
    [True, True, True, False],
    [True, False, False, False],
    [False, True, True, False],
    [True, True, True, True],
  ]
)
LOSS = np.random.default_rng(0).normal(size=MASK.shape)
WEIGHTINGS = {
  "token_mean": weighting.token_mean,
  "sequence_mean": weighting.sequence_mean,
  "sequence_sum": weighting.sequence_sum,
  "constant_length": lambda mask: weighting.constant_length(mask, length=7),
  "prompt_mean": lambda mask: weighting.prompt_mean(mask, group_size=2),
  "length_power": lambda mask: weighting.length_power(mask, power=0.3),
}


def slow(name, loss, mask):
  """The aggregation as its paper words it, row by row."""
  rows = [loss[b][mask[b]] for b in range(len(mask))]
  full = [row for row in rows if len(row)]
  if name == "token_mean":
    return np.mean(np.concatenate(rows))
  if name == "sequence_mean":
    return np.mean([row.mean() for row in full])
  if name == "sequence_sum":
    return np.mean([row.sum() for row in full])
  if name == "constant_length":
    return np.mean([row.sum() / 7 for row in full])
  if name == "length_power":
    powers = [len(row) ** 0.3 for row in full]
    return sum(w * row.mean() for w, row in zip(powers, full, strict=True)) / sum(powers)
  groups = [np.concatenate(rows[b : b + 2]) for b in range(0, len(rows), 2)]
  return np.mean([group.mean() for group in groups if len(group)])


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_give_the_aggregation_of_that_name(name):
  weights = WEIGHTINGS[name](MASK)
  assert weights.dtype == jnp.float32 and weights.shape == MASK.shape
  np.testing.assert_allclose(np.sum(LOSS * weights), slow(name, LOSS, MASK), rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_padding_columns_and_empty_rows_change_nothing(name):
  padded = np.zeros((8, 6), bool)
  padded[:4, 1:5] = MASK
  weights = np.asarray(WEIGHTINGS[name](padded))
  np.testing.assert_array_equal(weights[:4, 1:5], WEIGHTINGS[name](MASK))
  assert (weights[~padded] == 0).all()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_empty_mask_gives_zeros(name):
  assert (np.asarray(WEIGHTINGS[name](np.zeros((4, 3), bool))) == 0).all()


@pytest.mark.parametrize(
  "f, rate",
  [
    (weighting.sequence_mean, 1),
    (weighting.sequence_sum, 2),
    (lambda mask, **k: weighting.constant_length(mask, length=4, **k), 0.5),
  ],
)
def test_count_empty_counts_the_rows_without_tokens(f, rate):
  mask = np.array([[True, True], [False, False]])
  assert np.sum(f(mask)) == rate and np.sum(f(mask, count_empty=True)) == rate / 2


def test_all_weightings_compile_and_take_a_traced_length():
  for name, f in WEIGHTINGS.items():
    np.testing.assert_array_equal(jax.jit(f)(MASK), f(MASK), err_msg=name)
  traced = jax.jit(lambda mask, n: weighting.constant_length(mask, length=n))(MASK, 7)
  np.testing.assert_array_equal(traced, weighting.constant_length(MASK, length=7))


def test_length_power_runs_from_the_sequence_mean_to_the_token_mean():
  for power, f in ((0.0, weighting.sequence_mean), (1.0, weighting.token_mean)):
    np.testing.assert_allclose(weighting.length_power(MASK, power=power), f(MASK), rtol=1e-6)


def importance_loop(old, sampler, mask, level, low, high, mode):
  out = np.zeros(mask.shape)
  for b in range(mask.shape[0]):
    d = (old - sampler)[b][mask[b]]
    for t in range(mask.shape[1]):
      if mask[b, t]:
        w = {
          "token": np.exp((old - sampler)[b, t]),
          "sequence": np.exp(d.sum()),
          "geometric": np.exp(d.sum() / max(len(d), 1)),
        }[level]
        inside = low <= w <= high
        out[b, t] = {"truncate": min(max(w, low), high), "mask": w * inside, "reject": inside}[mode]
  return out


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask", "reject"])
def test_truncated_importance_matches_the_loop(level, mode):
  rng = np.random.default_rng(1)
  old, sampler = 0.4 * rng.normal(size=(2, *MASK.shape))
  got = weighting.truncated_importance(
    old, sampler, MASK, level=level, low=0.5, high=1.5, mode=mode
  )
  expected = importance_loop(old, sampler, MASK, level, 0.5, 1.5, mode)
  assert np.count_nonzero(expected) > 0
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask", "reject"])
def test_truncated_importance_is_finite_at_extremes(level, mode):
  f = jax.jit(
    lambda old, mask: weighting.truncated_importance(
      old, jnp.zeros_like(old), mask, level=level, mode=mode
    )
  )
  for extreme in (1e4, -1e4, np.inf, -np.inf):
    old = np.zeros(MASK.shape, np.float32)
    old[0] = extreme
    for mask in (MASK, MASK & (old == 0)):
      assert np.isfinite(f(old, mask)).all()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask", "reject"])
def test_a_ratio_that_is_nan_is_neither_inside_nor_dropped(level, mode):
  old = np.zeros(MASK.shape)
  old[1, 0] = np.nan
  got = weighting.truncated_importance(old, 0 * old, MASK, level=level, mode=mode, high=3.0)
  assert np.isnan(got[1, 0]) and np.isfinite(np.delete(got, 1, axis=0)).all()


def test_an_entropy_that_is_nan_leaves_no_quantile():
  entropies = np.random.default_rng(4).uniform(size=MASK.shape)
  dirty = np.where(MASK, entropies, np.nan)
  clean = weighting.top_entropy(entropies, MASK, fraction=0.5)
  np.testing.assert_array_equal(weighting.top_entropy(dirty, MASK, fraction=0.5), clean)
  dirty[0, 0] = np.nan
  got = weighting.top_entropy(dirty, MASK, fraction=0.5)
  assert np.isnan(got[MASK]).all() and not np.any(np.asarray(got)[~MASK])


def test_a_rejected_sequence_is_silent_whatever_its_unclamped_token_weights():
  """ "seq-mask-tis": 1[lo <= exp(mean log w) <= hi] times w itself; exp(200) is inf in float32."""
  old, sampler = 0.4 * np.random.default_rng(3).normal(size=(2, *MASK.shape))
  old[0] = 200
  bounds = {"low": 0.8, "high": 1.5}
  product = weighting.truncated_importance(
    old, sampler, MASK, level="geometric", mode="reject", **bounds
  ) * weighting.truncated_importance(old, sampler, MASK, high=float("inf"))
  keep = importance_loop(old, sampler, MASK, "geometric", 0.8, 1.5, "reject")
  assert not keep[0].any() and keep[1:].any()
  expected = keep * importance_loop(old, sampler, MASK, "token", 0, np.inf, "truncate")
  np.testing.assert_allclose(product, expected, rtol=1e-5)


@pytest.mark.parametrize("lo, hi", [(0.5, 2.0), (0.5, 5.0)])
def test_bounds_on_minus_log_w_are_mirrored(lo, hi):
  """verl's k1 options keep log lo <= -log w <= log hi: for 0.5 to 5 that is w in [0.2, 2]."""
  w = np.array([[0.15, 0.25, 0.4, 1.0, 1.9, 2.1, 4.0, 6.0]])
  k1 = -np.log(w)
  expected = (np.log(lo) <= k1) & (k1 <= np.log(hi))
  got = weighting.truncated_importance(
    np.log(w), np.zeros_like(w), np.ones_like(w, bool), low=1 / hi, high=1 / lo, mode="reject"
  )
  np.testing.assert_array_equal(got, expected)
  plain = weighting.truncated_importance(
    np.log(w), np.zeros_like(w), np.ones_like(w, bool), low=lo, high=hi, mode="reject"
  )
  assert np.array_equal(got, plain) == (lo * hi == 1)


def test_factors_pass_no_gradient():
  old = jnp.array([[-1.0, -2.0]])
  mask, ones = np.array([[True, True]]), jnp.ones(1)
  for f in (
    lambda x: weighting.truncated_importance(x, old + 0.1, mask),
    lambda x: weighting.off_policy_mask(x, old, ones, mask, threshold=0.1),
    lambda x: weighting.top_entropy(x, mask, fraction=0.5),
  ):
    assert (np.asarray(jax.grad(lambda x, f=f: f(x).sum())(old)) == 0).all()


def test_drop_truncated_silences_whole_rows_and_leaves_the_denominator():
  truncated = np.array([True, False, False, True])
  factors = weighting.drop_truncated(MASK, truncated)
  np.testing.assert_array_equal(factors, MASK & ~truncated[:, None])
  weights = weighting.token_mean(MASK) * factors
  np.testing.assert_allclose(weights.sum(), (1 + 2) / MASK.sum(), rtol=1e-6)


@pytest.mark.parametrize(
  "name", ["token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean"]
)
def test_what_is_cut_off_is_kept_silenced_or_left_out_of_the_mean(name):
  """Of responses of 3, 1, 2 and 2 tokens to two prompts, the first is cut off at the limit."""
  mask = np.arange(3) < np.array([[3], [1], [2], [2]])
  cut = jnp.array([True, False, False, False])
  batch = ResponseBatch(np.zeros((2, 1), int), np.ones(2, int), mask * 1, mask, mask, truncated=cut)
  kept, zeroed, dropped = (
    np.asarray(token_weights(batch, name=name, length=6, truncated=kind)).sum(axis=1)
    for kind in ("keep", "zero", "drop")
  )
  # What each response counts in all: its tokens' loss over what the mean divides by.
  lengths = np.array([3, 1, 2, 2])
  whole, others = {
    "token_mean": (lengths / 8, lengths / 5),
    "sequence_mean": (np.full(4, 1 / 4), np.full(4, 1 / 3)),
    "sequence_sum": (lengths / 4, lengths / 3),
    "constant_length": (lengths / (4 * 6), lengths / (3 * 6)),
    "prompt_mean": (lengths / [8, 8, 8, 8], lengths / [2, 2, 8, 8]),
  }[name]
  np.testing.assert_allclose(kept, whole, rtol=1e-6)
  np.testing.assert_allclose(zeroed, [0, *whole[1:]], rtol=1e-6)
  np.testing.assert_allclose(dropped, [0, *others[1:]], rtol=1e-6)


def test_nothing_is_left_of_a_batch_that_is_cut_off_whole():
  mask = np.ones((2, 3), bool)
  cut = jnp.array([True, True])
  batch = ResponseBatch(np.zeros((1, 1), int), np.ones(1, int), mask * 1, mask, mask, truncated=cut)
  for kind in ("zero", "drop"):
    assert not np.any(token_weights(batch, name="sequence_mean", length=3, truncated=kind)), kind


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 1.0])
def test_top_entropy_keeps_the_quantile_of_the_masked_tokens(fraction):
  entropies = np.random.default_rng(2).uniform(size=MASK.shape).astype(np.float32)
  entropies[~MASK] = 1e4
  quantile = np.quantile(entropies[MASK], 1 - fraction)
  got = weighting.top_entropy(entropies, MASK, fraction=fraction)
  np.testing.assert_array_equal(got, MASK & (entropies >= quantile))
  assert not np.any(weighting.top_entropy(entropies, np.zeros_like(MASK), fraction=fraction))


def test_off_policy_mask_drops_bad_and_stale_rows_alone():
  logprobs = np.zeros((4, 3))
  sampler = np.array([[0.3, 0.3, 99], [0.3, 0.3, 99], [0.1, 0.1, 99], [0.1, 0.1, 99]])
  mask = np.array([[True, True, False]] * 4)
  advantages = np.array([-1.0, 1.0, -1.0, 1.0])
  got = weighting.off_policy_mask(logprobs, sampler, advantages, mask, threshold=0.2)
  np.testing.assert_array_equal(got[:, 0], [0, 1, 1, 1])
  assert not np.any(got[:, 2])


@pytest.mark.parametrize(
  "call, message",
  [
    (
      lambda: weighting.token_mean(np.ones((2, 2))),
      "mask has dtype float64|mask has dtype float32",
    ),
    (lambda: weighting.token_mean(np.ones(2, bool)), r"mask has shape \(2,\).*\[B, T\]"),
    (lambda: weighting.constant_length(MASK, length=0), "length is 0"),
    (lambda: weighting.prompt_mean(MASK, group_size=3), "group_size is 3.*rows of mask, 4"),
    (lambda: weighting.truncated_importance(LOSS, LOSS[:1], MASK), "sampler_logprobs has shape"),
    (
      lambda: weighting.truncated_importance(LOSS, LOSS, MASK, mode="clip"),
      "mode is 'clip'.*'mask'",
    ),
    (lambda: weighting.truncated_importance(LOSS, LOSS, MASK, low=3.0), "high is 2.0.*above 3.0"),
    (
      lambda: weighting.drop_truncated(MASK, np.ones(3, bool)),
      r"truncated has shape \(3,\).*\(4,\)",
    ),
    (lambda: weighting.top_entropy(LOSS, MASK, fraction=20), "fraction is 20"),
    (
      lambda: weighting.off_policy_mask(LOSS, LOSS, LOSS, MASK, threshold=0),
      "advantages has shape",
    ),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
