"""Controllers against loops in plain Python, and in a loop with what they control."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import controllers as c

OBSERVED = [0.1, 0.35, 0.2, 0.3, 0.19, 0.02, 0.5, 0.21, 0.0, 0.3]


def clip(x, low, high):
  return min(max(x, low), high)


def history(step, state, observed=OBSERVED):
  """All states of a run, through one compiled scan."""

  def body(state, x):
    state = step(state, x)
    return state, state

  return jax.jit(lambda s, x: jax.lax.scan(body, s, x)[1])(state, jnp.array(observed))


def test_adaptive_kl_is_the_proportional_controller():
  coef, expected = 0.05, []
  for kl in OBSERVED:
    coef *= 1 + clip(kl / 0.2 - 1, -0.2, 0.2) * 500 / 10_000
    expected.append(coef)
  got = history(lambda s, x: c.adaptive_kl(s, x, target=0.2, samples=500), c.init_adaptive_kl(0.05))
  np.testing.assert_allclose(got.coef, expected, rtol=1e-5)


@pytest.mark.parametrize("low, high", [(0.0, math.inf), (0.005, 0.02), (-math.inf, math.inf)])
def test_adaptive_entropy_applies_the_coefficient_of_this_step_where_it_is_low(low, high):
  coef, expected = 0.01, []
  for entropy in OBSERVED:
    applied = coef if entropy <= 0.2 else 0.0
    coef = clip(coef + 0.005 if entropy < 0.2 else coef - 0.005, low, high)
    expected.append((coef, applied))
  got = history(
    lambda s, x: c.adaptive_entropy(s, x, low=low, high=high), c.init_adaptive_entropy(0.01)
  )
  np.testing.assert_allclose(np.stack(got, axis=1), expected, rtol=1e-5, atol=1e-8)


def test_the_lagged_one_applies_the_new_coefficient_in_the_next_step():
  coef, expected = 0.01, []
  for entropy in OBSERVED:
    coef = clip(coef + 0.005 if entropy <= 0.2 else coef - 0.005, 0.0, 0.02)
    expected.append((coef, coef if entropy <= 0.2 else 0.0))
  got = history(
    lambda s, x: c.adaptive_entropy_lagged(s, x, high=0.02), c.init_adaptive_entropy(0.01)
  )
  np.testing.assert_allclose(np.stack(got, axis=1), expected, rtol=1e-5, atol=1e-8)


def test_the_two_differ_at_the_target_itself():
  state = c.init_adaptive_entropy(0.01)
  target = np.float32(0.2)
  now = c.adaptive_entropy(state, target, target=target)
  late = c.adaptive_entropy_lagged(state, target, target=target)
  np.testing.assert_allclose([now.applied, now.coef], [0.01, 0.005], rtol=1e-6)
  np.testing.assert_allclose([late.applied, late.coef], [0.015, 0.015], rtol=1e-6)


def test_adaptive_clip_moves_the_upper_bound_and_stays_inside():
  extra, expected = 0.0, []
  for entropy in [0.5, 0.6] + 3 * OBSERVED:
    sign = (entropy < 0.3) - (entropy > 0.3)
    extra = clip(extra + 0.25 * sign, 0.0, 1.0)
    expected.append(extra)
  # 0.3 is not the same number in float32 as in float64; ask at the float32 target.
  observed = np.float32([0.5, 0.6] + 3 * OBSERVED)
  got = history(
    lambda s, x: c.adaptive_clip(s, x, target=np.float32(0.3), high=1.0),
    c.init_adaptive_clip(),
    observed,
  )
  np.testing.assert_allclose(got.extra, expected, atol=1e-6)
  np.testing.assert_allclose(
    c.clip_high(c.AdaptiveClip(got.extra), clip_low=0.6),
    1 / 0.4 + np.array(expected) - 1,
    rtol=1e-6,
  )


def test_without_extra_the_clip_is_symmetric_in_log_ratio():
  high = float(c.clip_high(c.init_adaptive_clip(), clip_low=0.3))
  assert math.isclose(math.log(1 + high), -math.log(1 - 0.3), rel_tol=1e-6)


def test_each_holds_what_it_controls_at_its_target():
  """Simulated plants: a KL that falls with its coefficient, entropies that rise with theirs."""

  def kl_of(coef):
    return 0.02 / coef  # target 0.1 at coef 0.2

  kl_step = jax.jit(lambda s: c.adaptive_kl(s, kl_of(s.coef), target=0.1, samples=1000))
  state = c.init_adaptive_kl(0.02)
  for _ in range(400):
    state = kl_step(state)
  np.testing.assert_allclose(kl_of(state.coef), 0.1, rtol=0.02)

  step = jax.jit(lambda s, x: c.adaptive_entropy(s, x, target=0.2, delta=0.001))
  state, entropy, trace = c.init_adaptive_entropy(), 0.6, []
  for _ in range(600):
    state = step(state, entropy)
    entropy += 0.5 * float(state.applied) - 0.01 * entropy  # collapses unaided
    trace.append(entropy)
  assert abs(np.mean(trace[-200:]) - 0.2) < 0.03 and trace[100] < trace[0]

  step = jax.jit(lambda s, x: c.adaptive_clip(s, x))
  state, entropy, trace = c.init_adaptive_clip(), 0.6, []
  for _ in range(400):
    state = step(state, entropy)
    entropy += 0.01 * (float(state.extra) - 3 * entropy)
    trace.append(entropy)
  assert abs(np.mean(trace[-200:]) - 0.3) < 0.03


def test_states_vmap_over_settings_and_do_not_recompile():
  targets = jnp.array([0.1, 0.2, 0.4])
  states = jax.vmap(lambda _: c.init_adaptive_entropy(0.01))(targets)
  step = jax.jit(
    jax.vmap(lambda s, target, x: c.adaptive_entropy(s, x, target=target), in_axes=(0, 0, None))
  )
  for entropy in (0.15, 0.3):
    states = step(states, targets, entropy)
  assert step._cache_size() == 1
  np.testing.assert_allclose(states.coef, [0.0, 0.01, 0.02], atol=1e-7)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: c.init_adaptive_kl(0.0), "coef is 0.0"),
    (lambda: c.adaptive_kl(c.init_adaptive_kl(1.0), 1.0, target=0, samples=1), "target is 0"),
    (
      lambda: c.adaptive_kl(c.init_adaptive_kl(1.0), 1.0, target=1, samples=1, horizon=0),
      "horizon is 0",
    ),
    (
      lambda: c.adaptive_kl(c.init_adaptive_kl(1.0), 1.0, target=1, samples=1, limit=-1),
      "limit is -1",
    ),
    (lambda: c.init_adaptive_entropy(-0.1), "coef is -0.1"),
    (lambda: c.adaptive_entropy(c.init_adaptive_entropy(), 0.1, delta=0), "delta is 0"),
    (
      lambda: c.adaptive_entropy_lagged(c.init_adaptive_entropy(), 0.1, low=2.0),
      "high is 1.0.*2.0",
    ),
    (lambda: c.init_adaptive_clip(-1.0), "extra is -1.0"),
    (lambda: c.adaptive_clip(c.init_adaptive_clip(), 0.1, delta=0), "delta is 0"),
    (lambda: c.adaptive_clip(c.init_adaptive_clip(), 0.1, high=0), "high is 0"),
    (lambda: c.clip_high(c.init_adaptive_clip(), clip_low=1.5), "clip_low is 1.5"),
    (lambda: c.clip_high(c.init_adaptive_clip(), clip_low=1.0), "1 - clip_low is 0.0"),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
