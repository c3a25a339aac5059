"""Losses on pairs against their formulas in plain Python, identities, and a sort by hand."""

import functools
import inspect
import math
from math import exp, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses

RNG = np.random.default_rng(0)
B = 5
# chosen, rejected, and the reference of each: sums over answers that have moved by a few nats.
REF = RNG.uniform(-30, -10, (2, B))
PAIRS = np.concatenate([REF + RNG.normal(scale=2, size=(2, B)), REF])
WEIGHTS = np.array([0.1, 0.4, 0.0, 0.2, 0.3])
BETA = 0.3


def sigma(x):
  return 1 / (1 + exp(-x))


def smoothed(x, e):
  return -(1 - e) * log(sigma(x)) - e * log(sigma(-x))


def dpo_with(reward):
  return lambda cw, cl: -log(sigma(BETA * (reward(cw) - reward(cl))))


def robust(cw, cl, e=0.2):
  x = BETA * (cw - cl)
  return (-(1 - e) * log(sigma(x)) + e * log(sigma(-x))) / (1 - 2 * e)


def exo(cw, cl, e=1e-3):
  q = sigma(BETA * (cw - cl))
  return q * log(q / (1 - e)) + (1 - q) * log((1 - q) / e)


def discopop(cw, cl, tau=0.05):
  x = BETA * (cw - cl)
  s = sigma(x / tau)
  return (1 - s) * -log(sigma(x)) + s * exp(-x)


# The loss of one pair from its log-ratios, as the papers and the trainers' tables write it.
FORMULAS = {
  "dpo": (losses.dpo_loss, {}, lambda cw, cl: -log(sigma(BETA * (cw - cl)))),
  "cdpo": (
    losses.dpo_loss,
    {"label_smoothing": 0.2},
    lambda cw, cl: smoothed(BETA * (cw - cl), 0.2),
  ),
  "forward_kl": (losses.dpo_loss, {"divergence": "forward_kl"}, dpo_with(lambda c: -exp(-c))),
  "js": (losses.dpo_loss, {"divergence": "js"}, dpo_with(lambda c: log(sigma(c)))),
  "alpha": (
    losses.dpo_loss,
    {"divergence": "alpha", "alpha": 0.3},
    dpo_with(lambda c: -exp(-0.3 * c) / 0.3),
  ),
  "alpha, in the other convention": (
    losses.dpo_loss,
    {"divergence": "alpha", "alpha": 1 - 0.7},
    dpo_with(lambda c: exp((0.7 - 1) * c) / (0.7 - 1)),
  ),
  "robust": (losses.robust_dpo_loss, {"label_smoothing": 0.2}, robust),
  "hinge": (losses.hinge_dpo_loss, {}, lambda cw, cl: max(0, 1 - BETA * (cw - cl))),
  "ipo": (losses.ipo_loss, {}, lambda cw, cl: (cw - cl - 1 / (2 * BETA)) ** 2),
  "exo": (losses.exo_loss, {}, exo),
  "nca": (
    losses.nca_loss,
    {},
    lambda cw, cl: (
      -log(sigma(BETA * cw)) - 0.5 * log(sigma(-BETA * cw)) - 0.5 * log(sigma(-BETA * cl))
    ),
  ),
  "bco": (losses.bco_loss, {}, lambda cw, cl: -log(sigma(BETA * cw)) - log(sigma(-BETA * cl))),
  "bco with a shift": (
    losses.bco_loss,
    {"shift": 0.7},
    lambda cw, cl: -log(sigma(BETA * cw - 0.7)) - log(sigma(-(BETA * cl - 0.7))),
  ),
  "sppo": (
    losses.sppo_loss,
    {},
    lambda cw, cl: (cw - 1 / (2 * BETA)) ** 2 + (cl + 1 / (2 * BETA)) ** 2,
  ),
  "apo_zero": (losses.apo_zero_loss, {}, lambda cw, cl: 1 - sigma(BETA * cw) + sigma(BETA * cl)),
  "apo_down": (
    losses.apo_down_loss,
    {},
    lambda cw, cl: sigma(BETA * cw) + 1 - sigma(BETA * (cw - cl)),
  ),
  "discopop": (losses.discopop_loss, {}, discopop),
}


@functools.cache
def computed():
  """Loss and metrics of every row of the table, in one compilation."""
  return jax.jit(
    lambda beta: {
      name: f(*PAIRS, WEIGHTS, beta=beta, **settings) for name, (f, settings, _) in FORMULAS.items()
    }
  )(BETA)


@pytest.mark.parametrize("name", FORMULAS)
def test_losses_match_their_formulas(name):
  log_ratios = zip(PAIRS[0] - PAIRS[2], PAIRS[1] - PAIRS[3], strict=True)
  per_pair = [FORMULAS[name][2](cw, cl) for cw, cl in log_ratios]
  np.testing.assert_allclose(computed()[name][0], WEIGHTS @ per_pair, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "sppo", "apo_down"])
def test_metrics_are_rewards_of_the_pairs_that_count(name):
  counts = WEIGHTS != 0
  chosen, rejected = BETA * (PAIRS[:2] - PAIRS[2:])[:, counts]
  metrics = computed()[name][1]
  assert metrics["accuracy"] == (np.sum(chosen > rejected), 4)
  for key, x in [
    ("margin", chosen - rejected),
    ("chosen_reward", chosen),
    ("rejected_reward", rejected),
  ]:
    np.testing.assert_allclose(metrics[key], (x.sum(), 4), rtol=1e-5)


# At the reference: by hand, from sigma(0) = 1/2.
AT_REFERENCE = {
  "dpo": log(2),
  "cdpo": log(2),
  "robust": log(2),
  "hinge": 1,
  "ipo": 1 / (4 * BETA**2),
  "exo": -log(2) - (log(0.999) + log(0.001)) / 2,
  "nca": 2 * log(2),
  "bco": 2 * log(2),
  "sppo": 1 / (2 * BETA**2),
  "apo_zero": 1,
  "apo_down": 1,
  "discopop": (log(2) + 1) / 2,
  "forward_kl": log(2),
  "js": log(2),
  "alpha": log(2),
}


def test_values_at_the_reference():
  at = jax.jit(
    lambda: {
      name: FORMULAS[name][0](*REF, *REF, np.full(B, 1 / B), beta=BETA, **FORMULAS[name][1])[0]
      for name in AT_REFERENCE
    }
  )()
  for name, value in AT_REFERENCE.items():
    np.testing.assert_allclose(at[name], value, rtol=1e-5, err_msg=name)


def test_a_common_move_of_both_answers_is_seen_by_the_losses_that_say_so():
  down = np.concatenate([PAIRS[:2] - 5, PAIRS[2:]])
  moved = jax.jit(
    lambda: {
      name: FORMULAS[name][0](*down, WEIGHTS, beta=BETA, **FORMULAS[name][1])[0]
      for name in ("dpo", "robust", "hinge", "ipo", "exo", "discopop", "nca", "sppo", "bco")
    }
  )()
  blind = {k for k, x in moved.items() if np.isclose(x, computed()[k][0], rtol=1e-4)}
  assert blind == {"dpo", "robust", "hinge", "ipo", "exo", "discopop"}


def aot_loop(x, y, beta, e):
  """Sorts the two lists and compares them rank by rank."""
  terms = [smoothed(beta * (a - b), e) for a, b in zip(sorted(x), sorted(y), strict=True)]
  return sum(terms) / len(terms)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot_compares_sorted_lists(e):
  counts = np.array([True, True, False, True, True])
  inputs = np.where(counts, PAIRS, np.nan)
  both = jax.jit(
    lambda w: [
      f(*inputs, w, beta=BETA, label_smoothing=e)[0]
      for f in (losses.aot_loss, losses.aot_unpaired_loss)
    ]
  )(counts / 4)
  chosen, rejected, ref_chosen, ref_rejected = PAIRS[:, counts]
  expected = (
    aot_loop(chosen - rejected, ref_chosen - ref_rejected, BETA, e),
    aot_loop(chosen - ref_chosen, rejected - ref_rejected, BETA, e),
  )
  np.testing.assert_allclose(both, expected, rtol=1e-5)


def test_batch_coupled_losses_are_those_whose_parts_do_not_add_up():
  pairs = np.array([[5.0, 6, 0, 1], [0, 1, 5, 6], [0, 0, 0, 0], [9, 9, 0, 0]])
  weights = np.full(4, 0.25)
  names = [
    name
    for name, f in vars(losses).items()
    if name.endswith("_loss") and "ref_chosen_logprobs" in inspect.signature(f).parameters
  ]

  @jax.jit
  def excess(pairs):
    whole = lambda f, rows: f(*pairs[:, rows], weights[rows])[0]  # noqa: E731
    return {
      name: whole(f, slice(None)) - whole(f, slice(2)) - whole(f, slice(2, None))
      for name, f in ((name, getattr(losses, name)) for name in names)
    }

  assert {name for name, x in excess(pairs).items() if abs(x) > 1e-3} == losses.BATCH_COUPLED


def test_wpo_weights_are_probabilities_that_cut_at_one_and_keep_zero():
  aligned = np.array([[-0.5, 0.4, np.nan], [-0.2, 0.3, np.inf]])
  f = jax.jit(jax.value_and_grad(lambda x, y, w: losses.wpo_weights(x, y, w).sum()))
  np.testing.assert_allclose(
    losses.wpo_weights(*aligned, np.array([0.5, 0.5, 0.0])), [0.5 * exp(-0.7), 0.5, 0], rtol=1e-6
  )
  assert not np.any(f(*aligned, np.array([0.5, 0.5, 0.0]))[1])


@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha", "exo", "discopop"])
def test_far_from_the_reference_gradients_are_finite_and_push_the_right_way(name):
  f, settings, _ = FORMULAS[name]
  zero, one = jnp.zeros(1), jnp.ones(1)
  gradient = jax.jit(jax.grad(lambda x: f(x, zero, zero, zero, one, **settings)[0]))
  values = [float(gradient(jnp.array([x]))[0]) for x in (-1e4, -15.0, 1e4)]
  assert np.isfinite(values).all() and values[1] < 0, values


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda f: f(*PAIRS, WEIGHTS, beta=0), "beta is 0; .*above 0"),
    (lambda f: f(*PAIRS, WEIGHTS, label_smoothing=1.5), "label_smoothing is 1.5"),
    (lambda f: f(*PAIRS, WEIGHTS, label_smoothing=0.5), "label_smoothing is 0.5"),
    (lambda f: f(*PAIRS, WEIGHTS, label_smoothing=-0.1), "label_smoothing is -0.1"),
    (lambda f: losses.exo_loss(*PAIRS, WEIGHTS, label_smoothing=0.5), "label_smoothing is 0.5"),
    (lambda f: losses.aot_loss(*PAIRS, WEIGHTS, label_smoothing=0.5), "label_smoothing is 0.5"),
    (
      lambda f: losses.aot_unpaired_loss(*PAIRS, WEIGHTS, label_smoothing=0.5),
      "label_smoothing is 0.5",
    ),
    (lambda f: f(*PAIRS, WEIGHTS, divergence="kl"), "divergence is 'kl'"),
    (lambda f: f(*PAIRS, WEIGHTS, divergence="alpha", alpha=0.0), "alpha is 0.0"),
    (
      lambda f: losses.robust_dpo_loss(*PAIRS, WEIGHTS, label_smoothing=0.5),
      "label_smoothing is 0.5; it must be at least 0 and below 0.5, from which on a label says",
    ),
    (lambda f: losses.exo_loss(*PAIRS, WEIGHTS, label_smoothing=0.0), "label_smoothing is 0.0"),
    (lambda f: losses.discopop_loss(*PAIRS, WEIGHTS, temperature=0.0), "temperature is 0.0"),
    (lambda f: losses.bco_loss(*PAIRS, WEIGHTS, shift=np.zeros(2)), r"shift has shape \(2,\)"),
    (lambda f: f(*PAIRS[:, :, None], WEIGHTS), r"chosen_logprobs has shape \(5, 1\).*\[B\]"),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(losses.dpo_loss)


def test_label_smoothing_has_its_minimum_where_it_says():
  """Gradient 0 at sigmoid(margin) = 1 - e."""
  margin, zero, one = jnp.array([math.log(0.8 / 0.2)]), jnp.zeros(1), jnp.ones(1)
  gradient = jax.grad(
    lambda x: losses.dpo_loss(x, zero, zero, zero, one, beta=1.0, label_smoothing=0.2)[0]
  )(margin)
  np.testing.assert_allclose(gradient, 0, atol=1e-6)
