"""Losses on single answers, and terms of online DPO, against loops and formulas in plain Python."""

from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses

RNG = np.random.default_rng(0)
REF = RNG.uniform(-30, -10, 6)
LOGPROBS = REF + RNG.normal(scale=3, size=6)
GOOD = np.array([True, False, True, False, False, True])
WEIGHTS = np.array([0.1, 0.2, 0.0, 0.3, 0.2, 0.2])
BETA, Z0, LIKED, DISLIKED = 0.3, 0.8, 1.5, 0.7


def sigma(x):
  return 1 / (1 + exp(-x))


@pytest.mark.parametrize("baseline", [Z0, np.full(6, Z0)], ids=["scalar", "row"])
def test_kto_matches_the_loop(baseline):
  expected = 0.0
  for c, good, weight in zip(LOGPROBS - REF, GOOD, WEIGHTS, strict=True):
    value = (
      LIKED * (1 - sigma(BETA * (c - Z0))) if good else (DISLIKED * (1 - sigma(BETA * (Z0 - c))))
    )
    expected += weight * value
  loss, metrics = jax.jit(losses.kto_loss)(
    LOGPROBS,
    REF,
    GOOD,
    baseline,
    WEIGHTS,
    beta=BETA,
    desirable_weight=LIKED,
    undesirable_weight=DISLIKED,
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  reward = BETA * (LOGPROBS - REF)
  np.testing.assert_allclose(metrics["desirable_reward"], (reward[[0, 5]].sum(), 2), rtol=1e-5)
  np.testing.assert_allclose(metrics["undesirable_reward"], (reward[~GOOD].sum(), 3), rtol=1e-5)


def test_kto_at_baseline_zero_is_apo_zero_of_the_pairs():
  chosen, rejected = LOGPROBS[GOOD], LOGPROBS[~GOOD]
  third = np.full(3, 1 / 3)
  pairs = losses.apo_zero_loss(chosen, rejected, REF[GOOD], REF[~GOOD], third)[0]
  single = losses.kto_loss(LOGPROBS, REF, GOOD, 0.0, np.full(6, 1 / 3))[0]
  np.testing.assert_allclose(single, pairs, rtol=1e-6)


def test_kto_baseline_is_the_clipped_mean_of_the_rows_that_count_without_gradient():
  now, before = jnp.array([-1.0, -5.0, jnp.nan]), jnp.array([-2.0, -2.0, -1.0])
  first, both = jnp.array([True, False, False]), jnp.array([True, True, False])
  assert losses.kto_baseline(now, before, where=first) == 1.0
  assert losses.kto_baseline(now, before, where=both) == 0.0  # the mean is -1
  assert losses.kto_baseline(now, before, where=both & ~both) == 0.0
  assert jax.grad(losses.kto_baseline)(jnp.ones(2), jnp.zeros(2)).tolist() == [0, 0]


def test_bco_matches_the_loop_and_the_paired_form():
  shift = 0.4
  f = jax.jit(losses.bco_unpaired_loss)
  expected = sum(
    weight * -log(sigma(BETA * c - shift) if good else sigma(shift - BETA * c))
    for c, good, weight in zip(LOGPROBS - REF, GOOD, WEIGHTS, strict=True)
  )
  got, _ = f(LOGPROBS, REF, GOOD, WEIGHTS, beta=BETA, shift=shift)
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  paired, _ = losses.bco_loss(
    LOGPROBS[GOOD],
    LOGPROBS[~GOOD],
    REF[GOOD],
    REF[~GOOD],
    np.full(3, 1 / 3),
    beta=BETA,
    shift=shift,
  )
  single, _ = f(LOGPROBS, REF, GOOD, np.full(6, 1 / 3), beta=BETA, shift=shift)
  np.testing.assert_allclose(single, paired, rtol=1e-5)


def test_bco_shift_is_half_way_between_the_means_of_the_kinds():
  now = jnp.array([2.0, 6.0, 1.0, jnp.nan])
  good, where = jnp.array([True, True, False, False]), jnp.array([True, True, True, False])
  shift = losses.bco_shift(now, jnp.zeros(4), good, beta=0.5, where=where)
  np.testing.assert_allclose(shift, (0.5 * 4 + 0.5 * 1) / 2)
  assert not np.any(jax.grad(losses.bco_shift)(now[:2], jnp.zeros(2), good[:2]))


def test_xpo_pushes_down_what_the_reference_sampled():
  (loss, metrics), gradient = jax.value_and_grad(losses.xpo_loss, has_aux=True)(
    LOGPROBS, WEIGHTS, alpha=0.01
  )
  np.testing.assert_allclose(loss, 0.01 * WEIGHTS @ LOGPROBS, rtol=1e-6)
  np.testing.assert_allclose(gradient, 0.01 * WEIGHTS, rtol=1e-6)
  assert metrics["reference_logprob"][1] == 5


def test_nash_md_has_the_gradient_of_its_game():
  """-(p - 1/2 - beta * log(policy / reference)) per row, which is 0 at the game's solution."""
  wins = RNG.uniform(size=6)
  f = jax.jit(jax.value_and_grad(losses.nash_md_loss, has_aux=True))
  (loss, metrics), gradient = f(LOGPROBS, REF, wins, WEIGHTS, beta=BETA)
  c = LOGPROBS - REF
  np.testing.assert_allclose(gradient, -WEIGHTS * (wins - 0.5 - BETA * c), atol=1e-6)
  np.testing.assert_allclose(
    loss, WEIGHTS @ (-(wins - 0.5) * LOGPROBS + BETA / 2 * c**2), rtol=1e-5
  )
  np.testing.assert_allclose(metrics["kl"], (c[WEIGHTS != 0].sum(), 5), rtol=1e-5)
  _, at_solution = f(REF + (wins - 0.5) / BETA, REF, wins, WEIGHTS, beta=BETA)
  np.testing.assert_allclose(at_solution, 0, atol=1e-6)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: losses.kto_loss(LOGPROBS, REF, GOOD, Z0, WEIGHTS, beta=0.0), "beta is 0.0"),
    (lambda: losses.kto_loss(LOGPROBS, REF, GOOD, Z0, WEIGHTS, desirable_weight=0), "desirable_we"),
    (
      lambda: losses.kto_loss(LOGPROBS, REF, GOOD, np.zeros(2), WEIGHTS),
      r"baseline has shape \(2,",
    ),
    (lambda: losses.kto_baseline(LOGPROBS, REF[:2]), "ref_response_logprobs has shape"),
    (lambda: losses.kto_baseline(LOGPROBS, REF, where=WEIGHTS), "where has dtype float"),
    (lambda: losses.bco_shift(LOGPROBS, REF, WEIGHTS), "desirable has dtype float"),
    (lambda: losses.xpo_loss(LOGPROBS, WEIGHTS, alpha=0.0), "alpha is 0.0"),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
