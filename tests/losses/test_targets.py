"""TPO and A*-PO: their formulas in plain Python, and where they come to rest."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import advantages, losses

RNG = np.random.default_rng(5)
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
OLD = -RNG.uniform(1, 40, MASK.shape)  # sums over many tokens
LOGPROBS = OLD + RNG.normal(size=MASK.shape)
ADVANTAGES = RNG.normal(size=MASK.shape)
WEIGHTS = MASK / 2


def softmax(x):
  top = max(x)
  total = sum(math.exp(y - top) for y in x)
  return [math.exp(y - top) / total for y in x]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_tpo_is_the_cross_entropy_to_the_tilted_group(temperature):
  value, slopes, gaps = 0.0, np.zeros(MASK.shape), []
  for row in range(2):
    on = np.flatnonzero(MASK[row])
    q = softmax([OLD[row, i] + ADVANTAGES[row, i] / temperature for i in on])
    p = softmax([LOGPROBS[row, i] for i in on])
    value -= 0.5 * sum(a * math.log(b) for a, b in zip(q, p, strict=True))
    slopes[row, on] = 0.5 * (np.array(p) - q)
    gaps += [abs(a - b) for a, b in zip(p, q, strict=True)]
  (loss, metrics), gradient = jax.value_and_grad(losses.tpo_loss, has_aux=True)(
    jnp.asarray(np.where(MASK, LOGPROBS, np.inf)), OLD, ADVANTAGES, WEIGHTS, temperature=temperature
  )
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  np.testing.assert_allclose(gradient, slopes, atol=1e-5)
  np.testing.assert_allclose(metrics["target_gap"], (sum(gaps), 7), rtol=1e-4)


def test_tpo_comes_to_rest_at_the_target_and_not_where_the_learning_rate_takes_it():
  logprobs = jnp.asarray(OLD, jnp.float32)
  step = jax.jit(jax.grad(lambda x: losses.tpo_loss(x, OLD, ADVANTAGES, WEIGHTS)[0]))
  for _ in range(300):
    logprobs = logprobs - 2.0 * step(logprobs)
  for row in range(2):
    on = np.flatnonzero(MASK[row])
    target = softmax([OLD[row, i] + ADVANTAGES[row, i] for i in on])
    np.testing.assert_allclose(softmax([float(logprobs[row, i]) for i in on]), target, atol=1e-3)


def test_a_group_without_spread_has_no_gradient_before_the_policy_moves():
  gradient = jax.grad(lambda x: losses.tpo_loss(x, OLD, np.zeros(3), WEIGHTS)[0])(jnp.asarray(OLD))
  np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_astar_po_is_a_regression_and_twice_beta_times_dro_on_sums():
  now, ref, a = LOGPROBS[0], OLD[0], ADVANTAGES[0]
  weights = np.array([0.5, 0.25, 0.0, 0.25])
  (loss, metrics), gradient = jax.value_and_grad(losses.astar_po_loss, has_aux=True)(
    jnp.asarray(now), ref, a, weights, beta=0.2
  )
  residual = [0.2 * (n - r) - b for n, r, b in zip(now, ref, a, strict=True)]
  np.testing.assert_allclose(loss, sum(weights * np.square(residual)), rtol=1e-5)
  counted = np.abs(residual)[weights > 0].sum()
  np.testing.assert_allclose(metrics["residual"], (counted, 3), rtol=1e-5)
  sums = [x[:, None] for x in (now, ref, a, weights)]
  dro = jax.grad(lambda x: losses.dro_loss(x, *sums[1:], beta=0.2)[0])(jnp.asarray(sums[0]))
  np.testing.assert_allclose(gradient, 2 * 0.2 * dro[:, 0], rtol=1e-4, atol=1e-6)


def test_the_optimal_value_is_a_soft_maximum_of_the_references_rewards():
  rewards, ref = RNG.uniform(size=(3, 2)), RNG.uniform(size=(3, 5))
  where = np.array([[True, True], [True, False], [True, True]])
  ref_where = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
  got = advantages.optimal_advantage(
    rewards, ref, temperature=0.2, where=where, ref_where=ref_where
  )
  for p in range(2):
    drawn = ref[p][ref_where[p]]
    value = 0.2 * math.log(sum(math.exp(r / 0.2) for r in drawn) / len(drawn))
    np.testing.assert_allclose(got[p], (rewards[p] - value) * where[p], rtol=1e-5)
  assert not np.any(got[2])  # Nothing of the reference is known.
  for temperature, expected in ((1e3, ref[0].mean()), (1e-3, ref[0].max())):
    value = rewards[0] - advantages.optimal_advantage(rewards, ref, temperature=temperature)[0]
    np.testing.assert_allclose(value, expected, atol=2e-3)


def test_a_policy_that_is_optimal_has_no_loss():
  """Two answers, of probability 1/4 and 3/4 and rewards 1 and 0: the tilted policy, by hand."""
  beta, reward = 0.5, np.array([1.0, 0.0])
  ref = np.array([0.25, 0.75])
  tilted = ref * np.exp(reward / beta)
  drawn = np.array([[1.0, 0.0, 0.0, 0.0]])  # in the reference's proportions
  a = advantages.optimal_advantage(reward[None], drawn, temperature=beta)[0]
  best = np.log(tilted / tilted.sum())
  loss, _ = losses.astar_po_loss(best, np.log(ref), a, np.full(2, 0.5), beta=beta)
  assert loss < 1e-10
