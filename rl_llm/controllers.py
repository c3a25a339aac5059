"""Feedback controllers that adapt the KL coefficient, the entropy bonus and the upper clip.

A fixed coefficient fits only one moment of a run: a KL term that costs too much at the start costs
nothing later, and an entropy bonus that saves one run floods another. After every step, a
controller compares a measurement with its target and adjusts its coefficient.

    state = init_adaptive_kl(0.001)
    for each step:
      loss = policy + state.coef * kl
      state = adaptive_kl(state, measured_kl, target=0.1, samples=256)

Each is a pure function (state, observation) -> state. A state is a NamedTuple of float32 arrays: it
can be jitted, vmapped over settings, put in the train state and saved in a checkpoint. The
observation is one number for the whole batch of the optimiser step, over all microbatches and
hosts: sum / count of a metric. A nan in it stays visible in the coefficient. Do not call a
controller in evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from rl_llm.checks import Array, check_above, check_between, is_number


class AdaptiveKL(NamedTuple):
  """State of `adaptive_kl`.

  Fields:
    coef: [] float32, what multiplies the KL in this step.
  """

  coef: Array


class AdaptiveEntropy(NamedTuple):
  """State of `adaptive_entropy` and `adaptive_entropy_lagged`.

  Fields:
    coef: [] float32, c: grows while the entropy is too low.
    applied: [] float32, what multiplies the entropy bonus: c or 0.
  """

  coef: Array
  applied: Array


class AdaptiveClip(NamedTuple):
  """State of `adaptive_clip`.

  Fields:
    extra: [] float32, k: how far the upper bound of the ratio lies above 1 / (1 - clip_low).
  """

  extra: Array


def init_adaptive_kl(coef) -> AdaptiveKL:
  """The state before the first step.

  Args:
    coef: the first coefficient, > 0: from 0 it would never leave 0. verl has 0.001, OpenRLHF 0.01.

  Returns:
    The state.

  Raises:
    ValueError: `coef` is not above 0.
  """
  check_above("coef", coef, 0)
  return AdaptiveKL(jnp.asarray(coef, jnp.float32))


def adaptive_kl(state, kl, *, target, samples, horizon=10_000, limit=0.2) -> AdaptiveKL:
  """Moves the KL coefficient in proportion to how far the KL is from its target.

      coef <- coef * (1 + clip(kl / target - 1, -limit, limit) * samples / horizon)

  The coefficient changes by at most `limit` per `horizon` samples, however far off the KL is. A KL
  of twice the target, in a step of 1,000 samples, raises it by 20 % of 1/10:

  >>> state = adaptive_kl(init_adaptive_kl(0.1), 0.2, target=0.1, samples=1000)
  >>> round(float(state.coef), 4)
  0.102

  Args:
    state: from `init_adaptive_kl` or the last step.
    kl: [] float, measured in this step, in the unit of `target` (per token or per response).
    target: the KL to hold, in nats, > 0.
    samples: how many responses the step had, 0 or more.
    horizon: in how many samples the coefficient may change by `limit`, > 0.
    limit: of the relative error, > 0.

  Returns:
    The state for the next step.

  Raises:
    ValueError: a hyperparameter is out of range.

  Reference: Ziegler et al., 2019, Fine-Tuning Language Models from Human Preferences,
    https://arxiv.org/abs/1909.08593
  """
  check_above("target", target, 0)
  check_above("horizon", horizon, 0)
  check_above("limit", limit, 0)
  check_between("samples", samples, 0, float("inf"))
  error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1, -limit, limit)
  return AdaptiveKL(state.coef * (1 + error * samples / horizon))


def init_adaptive_entropy(coef=0.0) -> AdaptiveEntropy:
  """The state before the first step.

  Args:
    coef: the first coefficient, >= 0.

  Returns:
    The state; the bonus is applied from the first step on.

  Raises:
    ValueError: `coef` is below 0.
  """
  check_between("coef", coef, 0, float("inf"))
  coef = jnp.asarray(coef, jnp.float32)
  return AdaptiveEntropy(coef, coef)


def adaptive_entropy(
  state, entropy, *, target=0.2, delta=0.005, low=0.0, high=float("inf")
) -> AdaptiveEntropy:
  """Skywork-OR1's entropy bonus: it is on only while the entropy is too low, and grows then.

      applied = coef if entropy <= target else 0                      in this step
      coef   <- clip(coef + delta if entropy < target else coef - delta, low, high)

  Policies collapse onto few answers, and then no sample teaches anything new. A constant bonus
  keeps some policies open and drives others apart; this bonus is 0 where it is not needed. Call it
  once the entropy of the step's batch is known, before the update that uses `applied`. At entropy
  0.1, below 0.2, this step pays 0.01, and the next one would pay 0.015:

  >>> state = adaptive_entropy(init_adaptive_entropy(0.01), 0.1)
  >>> round(float(state.applied), 4), round(float(state.coef), 4)
  (0.01, 0.015)

  Args:
    state: from `init_adaptive_entropy` or the last step.
    entropy: [] float, the mean per token of this step's batch, in nats.
    target: the entropy to hold, in nats.
    delta: how much the coefficient moves per step, > 0 (the paper's; its script has 0.0001).
    low: the least coefficient. The paper states none (-inf): then long stretches of high entropy
      pile up a debt that must be paid back first.
    high: the greatest coefficient (the script's 0.005).

  Returns:
    The state: `applied` for this step, `coef` for the next.

  Raises:
    ValueError: `delta` is not above 0, or `high` is below `low`.

  Reference: He et al., 2025, Skywork Open Reasoner 1, https://arxiv.org/abs/2505.22312
  """
  entropy = jnp.asarray(entropy, jnp.float32)
  coef = _stepped(state.coef, entropy, entropy < target, delta, low, high)
  return AdaptiveEntropy(coef, _unless_nan(entropy, jnp.where(entropy <= target, state.coef, 0)))


def adaptive_entropy_lagged(
  state, entropy, *, target=0.2, delta=0.005, low=0.0, high=1.0
) -> AdaptiveEntropy:
  """`adaptive_entropy` for loops that know the entropy only after the update (TRL's convention).

      coef    <- clip(coef + delta if entropy <= target else coef - delta, low, high)
      applied <- coef if entropy <= target else 0                     in the next step

  The entropy of the current policy comes from the same pass as its loss, so a loop without a pass
  before the update is one step late. Besides that lag, it differs from `adaptive_entropy` in one
  thing: an entropy equal to the target counts as too low. At entropy 0.1 the next step pays 0.015:

  >>> state = adaptive_entropy_lagged(init_adaptive_entropy(0.01), 0.1)
  >>> round(float(state.applied), 4), round(float(state.coef), 4)
  (0.015, 0.015)

  Args:
    state: from `init_adaptive_entropy` or the last step.
    entropy: [] float, the mean per token of the step just done, in nats.
    target: the entropy to hold, in nats.
    delta: how much the coefficient moves per step, > 0.
    low: the least coefficient.
    high: the greatest coefficient.

  Returns:
    The state for the next step.

  Raises:
    ValueError: `delta` is not above 0, or `high` is below `low`.

  Reference: He et al., 2025, Skywork Open Reasoner 1, https://arxiv.org/abs/2505.22312
  """
  entropy = jnp.asarray(entropy, jnp.float32)
  coef = _stepped(state.coef, entropy, entropy <= target, delta, low, high)
  return AdaptiveEntropy(coef, _unless_nan(entropy, jnp.where(entropy <= target, coef, 0)))


def init_adaptive_clip(extra=0.0) -> AdaptiveClip:
  """The state before the first step.

  Args:
    extra: k, >= 0; 0 makes the bounds symmetric in log-ratio.

  Returns:
    The state.

  Raises:
    ValueError: `extra` is below 0.
  """
  check_between("extra", extra, 0, float("inf"))
  return AdaptiveClip(jnp.asarray(extra, jnp.float32))


def adaptive_clip(state, entropy, *, target=0.3, delta=0.25, high=2.5) -> AdaptiveClip:
  """Holds the entropy by moving the ratio's upper clip instead of adding a bonus (MAI-Thinking-1).

      extra <- clip(extra + delta * sign(target - entropy), 0, high)

  Good tokens that were unlikely need the largest ratios. The upper clip stops them, and so holds
  the entropy down. A bonus adds a gradient of its own and shifts where training converges; moving
  the clip only decides how much of the policy's gradient passes. `clip_high` turns the state into
  the argument of a loss. At entropy 0.1, below 0.3:

  >>> state = adaptive_clip(init_adaptive_clip(), 0.1)
  >>> float(state.extra), round(float(clip_high(state)), 3)
  (0.25, 1.75)

  Args:
    state: from `init_adaptive_clip` or the last step.
    entropy: [] float, the mean per token of the step just done, in nats.
    target: the entropy to hold, in nats.
    delta: how much the bound moves per step, > 0.
    high: the greatest `extra`, > 0.

  Returns:
    The state for the next step.

  Raises:
    ValueError: `delta` or `high` is not above 0.

  Reference: Microsoft AI, 2026, MAI-Thinking-1: Building a Hill-Climbing Machine,
    https://microsoft.ai/wp-content/uploads/2026/06/main_20260602_2.pdf
  """
  check_above("delta", delta, 0)
  check_above("high", high, 0)
  direction = jnp.sign(target - jnp.asarray(entropy, jnp.float32))
  return AdaptiveClip(jnp.clip(state.extra + delta * direction, 0, high))


def clip_high(state, *, clip_low=0.6) -> Array:
  """The `clip_high` of a loss for a state of `adaptive_clip`.

      1 + clip_high = 1 / (1 - clip_low) + extra

  With `clip_low` 0.6 a ratio may fall to 0.4 and, without any extra, rise to 1 / 0.4 = 2.5: the
  same distance in logs.

  >>> float(clip_high(init_adaptive_clip()))
  1.5

  Args:
    state: from `adaptive_clip`.
    clip_low: how far below 1 the ratio may matter, from 0 to below 1.

  Returns:
    [] float32, how far above 1 the ratio may matter.

  Raises:
    ValueError: `clip_low` is not in that range.
  """
  check_between("clip_low", clip_low, 0, 1)
  check_above("1 - clip_low", 1 - clip_low, 0)
  return 1 / (1 - clip_low) + state.extra - 1


def _stepped(coef, entropy, up, delta, low, high):
  check_above("delta", delta, 0)
  if is_number(high) and is_number(low) and high < low:
    raise ValueError(f"high is {high}; it must be at least low, {low}.")
  return _unless_nan(entropy, jnp.clip(jnp.where(up, coef + delta, coef - delta), low, high))


def _unless_nan(measured, x):
  """x, or nan if the measurement is: a comparison with nan is False, and would hide it."""
  return jnp.where(jnp.isnan(measured), measured, x)
