"""Policy-gradient losses against loops, a table of clips, identities and exact enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses, weighting
from rl_llm.advantages import group_relative, leave_one_out

RNG = np.random.default_rng(0)
SHAPE = (4, 5)
OLD = np.log(RNG.uniform(0.1, 0.9, SHAPE))
LOGPROBS = OLD + RNG.normal(scale=0.7, size=SHAPE)
ADVANTAGES = RNG.normal(size=SHAPE)
MASK = np.arange(5) < np.array([[5], [3], [1], [4]])
WEIGHTS = np.asarray(weighting.sequence_mean(MASK))

# ((loss, metrics), gradient) of each loss; eager calls would compile operation by operation.
REINFORCE, PPO, GRPO = (
  jax.jit(jax.value_and_grad(f, has_aux=True))
  for f in (losses.reinforce_loss, losses.ppo_loss, losses.grpo_loss)
)


def ppo_loop(advantages, low, high, dual, delta):
  total = 0.0
  for b, t in itertools.product(*map(range, SHAPE)):
    a, ratio = advantages[b, t], np.exp(LOGPROBS[b, t] - OLD[b, t])
    unclipped = ratio if delta is None else min(ratio, delta)
    loss = max(-unclipped * a, -min(max(ratio, 1 - low), 1 + high) * a)
    if dual is not None and a < 0:
      loss = min(loss, -dual * a)
    total += WEIGHTS[b, t] * loss
  return total


@pytest.mark.parametrize(
  "low, high, dual, delta",
  [(0.2, 0.2, None, None), (0.1, 0.4, None, None), (0.2, 0.2, 1.3, None), (0.2, 0.2, None, 1.4)],
)
@pytest.mark.parametrize("f", [PPO, GRPO], ids=["ppo", "grpo"])
def test_ppo_and_grpo_match_the_loop(f, low, high, dual, delta):
  for advantages in (ADVANTAGES, ADVANTAGES[:, 0]):
    (got, _), _ = f(
      LOGPROBS, OLD, advantages, WEIGHTS, clip_low=low, clip_high=high, dual_clip=dual, delta=delta
    )
    full = np.broadcast_to(advantages if advantages.ndim == 2 else advantages[:, None], SHAPE)
    np.testing.assert_allclose(got, ppo_loop(full, low, high, dual, delta), rtol=1e-5)
    if dual or delta:  # the limit is reached in this data, or the row would prove nothing
      assert abs(got - ppo_loop(full, low, high, None, None)) > 1e-4


def test_reinforce_matches_its_formula():
  (got, _), _ = REINFORCE(LOGPROBS, ADVANTAGES, WEIGHTS)
  np.testing.assert_allclose(got, -np.sum(WEIGHTS * ADVANTAGES * LOGPROBS), rtol=1e-5)


# Sign of A x where the ratio lies: value, and gradient with respect to the log-prob. By hand, from
# max(-ratio * A, -clip(ratio, 0.8, 1.2) * A), and d ratio / d logprob = ratio.
CLIP_TABLE = [
  # A, ratio, value, gradient, limit
  (+1.0, 0.5, -0.5, -0.5, {}),
  (+1.0, 1.1, -1.1, -1.1, {}),
  (+1.0, 1.5, -1.2, 0.0, {}),
  (-1.0, 0.5, +0.8, 0.0, {}),
  (-1.0, 1.1, +1.1, +1.1, {}),
  (-1.0, 1.5, +1.5, +1.5, {}),
  (-1.0, 5.0, +5.0, +5.0, {}),
  (-1.0, 5.0, +3.0, 0.0, {"dual_clip": 3.0}),
  (-1.0, 2.5, +2.5, +2.5, {"dual_clip": 3.0}),
  (+1.0, 5.0, -1.2, 0.0, {"dual_clip": 3.0}),
  (-1.0, 5.0, +4.0, 0.0, {"delta": 4.0}),
  (-1.0, 3.5, +3.5, +3.5, {"delta": 4.0}),
  (+1.0, 5.0, -1.2, 0.0, {"delta": 4.0}),
]


@pytest.mark.parametrize("advantage, ratio, value, gradient, limit", CLIP_TABLE)
def test_clip_table(advantage, ratio, value, gradient, limit):
  old = np.full((1, 1), np.log(0.1))
  (loss, metrics), slope = PPO(
    old + np.log(ratio), old, np.array([advantage]), np.ones((1, 1)), **limit
  )
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  np.testing.assert_allclose(slope[0, 0], gradient, rtol=1e-5)
  assert metrics["clip_low_fraction"] == (float(gradient == 0 and ratio < 0.8), 1)
  assert metrics["clip_high_fraction"] == (float(gradient == 0 and ratio > 1.2), 1)


@pytest.mark.parametrize(
  "limit, bad",
  [
    ({}, 1),
    ({"dual_clip": 3.0}, 3),
    ({"delta": 4.0}, 2),
    ({"delta": 1.1}, 5),
    ({"dual_clip": 2.0, "delta": 4.0}, 4),
    ({"dual_clip": 5.0, "delta": 4.0}, 2),
  ],
  ids=str,
)
def test_the_clip_fractions_count_every_token_without_a_gradient(limit, bad):
  """Whatever stopped it: the clip, the dual clip, delta, or the limit of log-ratios."""
  log_ratios = np.log([1e-10, 0.5, 0.9, 1.05, 1.15, 1.5, 2.5, 3.5, 6.0, 1e10])
  now = np.float32([log_ratios, log_ratios])
  advantages, weights = np.float32([1.0, -1.0]), np.ones(now.shape, np.float32)
  (_, metrics), gradient = PPO(now, np.zeros_like(now), advantages, weights, **limit)
  stopped = np.asarray(gradient) == 0
  for key, beyond in (("clip_low_fraction", now < 0), ("clip_high_fraction", now > 0)):
    total, count = metrics[key]
    assert count == now.size and total == np.sum(stopped & beyond), (key, gradient)
  assert np.sum(stopped[1] & (log_ratios > 0)) == bad


@pytest.mark.parametrize("advantage, ratio", [(1.0, 0.5), (1.0, 2.0), (-1.0, 0.5), (-1.0, 2.0)])
def test_a_ratio_at_the_end_of_the_range_has_its_whole_slope(advantage, ratio):
  logprobs, ones = jnp.log(jnp.array([[ratio]])), jnp.ones((1, 1))
  assert jnp.exp(logprobs) == ratio  # so that both branches are equal
  bounds = {"clip_low": 0.5, "clip_high": 1.0}
  arrays = logprobs, jnp.zeros((1, 1)), jnp.array([advantage]), ones
  (loss, _), slope = PPO(*arrays, **bounds)
  assert loss == -ratio * advantage and slope == -ratio * advantage


def test_at_ratio_one_ppo_has_the_gradient_of_reinforce():
  for weights in (WEIGHTS, np.asarray(weighting.token_mean(MASK))):
    _, reinforce = REINFORCE(OLD, ADVANTAGES, weights)
    _, ppo = PPO(OLD, OLD, ADVANTAGES, weights)
    np.testing.assert_allclose(ppo, reinforce, rtol=1e-6)


def test_a_zero_factor_leaves_membership_to_the_mask():
  """A token whose weight a correction set to 0 still belongs to its response."""
  weights = WEIGHTS * (ADVANTAGES > 0)
  by_weights, _ = PPO(LOGPROBS, OLD, ADVANTAGES, weights)
  by_mask, _ = PPO(LOGPROBS, OLD, ADVANTAGES, weights, mask=MASK)
  np.testing.assert_allclose(by_mask[0], by_weights[0], rtol=1e-6)
  assert by_weights[1]["ratio"][1] == np.sum(weights != 0)
  assert by_mask[1]["ratio"][1] == MASK.sum()


def test_a_weight_outside_the_mask_counts_nothing():
  everywhere = np.ones(SHAPE, np.float32)
  (got, _), _ = PPO(LOGPROBS, OLD, ADVANTAGES, everywhere, mask=MASK)
  (expected, _), _ = PPO(LOGPROBS, OLD, ADVANTAGES, MASK.astype(np.float32))
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_metrics_match_their_formulas():
  (_, metrics), _ = PPO(LOGPROBS, OLD, ADVANTAGES, WEIGHTS)
  log_ratio, a = (LOGPROBS - OLD)[MASK], ADVANTAGES[MASK]
  ratio = np.exp(log_ratio)
  expected = {
    "ratio": ratio.sum(),
    "approx_kl": np.sum(ratio - 1 - log_ratio),
    "clip_low_fraction": np.sum((a < 0) & (ratio < 0.8)),
    "clip_high_fraction": np.sum((a > 0) & (ratio > 1.2)),
  }
  assert metrics.keys() == expected.keys()
  for name, total in expected.items():
    np.testing.assert_allclose(metrics[name][0], total, rtol=1e-5, err_msg=name)
    assert metrics[name][1] == MASK.sum()


# Exact enumeration: all 9 responses of two tokens out of 3, the second depending on the first.
RESPONSES = np.array(list(itertools.product(range(3), repeat=2)))
REWARD = np.array([0.0, 1.0, -0.5, 0.3, 0.0, 2.0, 0.1, -1.0, 0.7])
PARAMS = {
  "first": np.array([0.2, -0.3, 0.5], np.float32),
  "second": RNG.normal(size=(3, 3)).astype(np.float32),
}


@jax.jit
def response_logprobs(params):
  """[9, 2]: the log-prob of each token of each response."""
  first = jax.nn.log_softmax(params["first"])[RESPONSES[:, 0]]
  second = jax.nn.log_softmax(params["second"], axis=-1)[RESPONSES[:, 0], RESPONSES[:, 1]]
  return jnp.stack([first, second], axis=1)


def expected_reward(params):
  return jnp.sum(jnp.exp(response_logprobs(params).sum(1)) * REWARD)


def assert_gradient_is(loss, scale):
  """The gradient of a loss in which sampling is a weight, against the exact one of the reward."""
  got, exact = jax.jit(lambda p: (jax.grad(loss)(p), jax.grad(expected_reward)(p)))(PARAMS)
  for key in got:
    np.testing.assert_allclose(got[key], scale * np.asarray(exact[key]), atol=1e-6)


@pytest.mark.parametrize("baseline", [0.0, 0.4])
@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_the_expected_gradient_is_that_of_the_expected_reward(name, baseline):
  """REINFORCE, with or without a constant baseline, and PPO at ratio 1 are unbiased."""
  probability = np.exp(np.asarray(response_logprobs(PARAMS)).sum(1))
  weights = np.repeat(probability[:, None], 2, axis=1)  # the sampling, as weights

  def loss(params):
    logprobs = response_logprobs(params)
    if name == "reinforce":
      return losses.reinforce_loss(logprobs, REWARD - baseline, weights)[0]
    return losses.ppo_loss(logprobs, response_logprobs(PARAMS), REWARD - baseline, weights)[0]

  assert_gradient_is(loss, scale=-1.0)


@pytest.mark.parametrize(
  "estimator, scale",
  [(leave_one_out, 1.0), (lambda rewards: group_relative(rewards, scale="none"), 0.5)],
)
def test_group_baselines_are_unbiased_up_to_their_known_factor(estimator, scale):
  """All 81 groups of two responses: RLOO is exact, the group mean shrinks by (G - 1) / G."""
  pairs = np.array(list(itertools.product(range(9), repeat=2)))
  advantages = estimator(REWARD[pairs])
  probability = np.exp(np.asarray(response_logprobs(PARAMS)).sum(1))[pairs].prod(axis=1)
  weights = np.repeat(probability, 2)[:, None] * np.full((162, 2), 0.5, np.float32)

  def loss(params):
    logprobs = response_logprobs(params)[pairs].reshape(-1, 2)
    return losses.grpo_loss(
      logprobs, jax.lax.stop_gradient(logprobs), advantages.reshape(-1), weights
    )[0]

  assert_gradient_is(loss, scale=-scale)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"clip_low": 0.0}, "clip_low is 0.0.*above 0"),
    ({"clip_high": -1}, "clip_high is -1"),
    ({"dual_clip": 0.5}, "dual_clip is 0.5.*above 1"),
    ({"delta": 1.0}, "delta is 1.0.*above 1"),
    ({"mask": np.ones(SHAPE)}, "mask has dtype float"),
    ({"mask": np.ones((1, 5), bool)}, "mask has shape"),
  ],
)
@pytest.mark.parametrize("loss", [losses.ppo_loss, losses.grpo_loss])
def test_bad_settings_are_named(loss, kwargs, message):
  with pytest.raises(ValueError, match=message):
    loss(LOGPROBS, OLD, ADVANTAGES, WEIGHTS, **kwargs)
