"""Losses that say where the policy should end up, instead of which way it should go.

A policy gradient has a direction: how far to follow it is up to the learning rate and the clip. The
best policy under a KL penalty is known in closed form, though: the old one, with each response
weighted by exp(reward / temperature). These losses are 0, or have no gradient, once the policy is
there. They are about whole responses: pass sums of log-probs from `logprobs.sequence_logprobs`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above
from rl_llm.losses import _checks


def tpo_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, temperature=1.0
) -> tuple[Array, Metrics]:
  """TPO (Target Policy Optimization): fits a prompt's responses to a target distribution.

  Among the G responses to a prompt, renormalised to sum to 1, the target tilts the old policy
  towards those with a high score:

      p      = softmax over the group of logprobs
      target = softmax over the group of (old_logprobs + advantages / temperature)
      loss   = -sum(weights * target * log p)

  With equal weights in a group the gradient of each response is weight * (p - target): it vanishes
  when the policy is there, however many updates are made. Two responses of the same probability, of
  which the first is right, have the advantages 1 and -1, so the target is 0.88 to 0.12:

  >>> logprobs, weights = jnp.log(jnp.array([[0.2, 0.2]])), jnp.ones((1, 2))
  >>> gradient = jax.grad(lambda x: tpo_loss(x, logprobs, jnp.array([[1.0, -1.0]]), weights)[0])
  >>> [round(float(g), 3) for g in gradient(logprobs)[0]]
  [-0.381, 0.381]
  >>> there = logprobs + jnp.array([[1.0, -1.0]])
  >>> bool(jnp.abs(gradient(there)).max() < 1e-6)
  True

  A row is a group here, so that a group is never split over microbatches.

  Args:
    logprobs: [P, G] float, log-probs of each prompt's responses under the policy being trained, in
      nats: sums from `logprobs.sequence_logprobs`.
    old_logprobs: [P, G] float, the same under the policy before this batch's updates; a constant.
    advantages: [P] or [P, G]; a constant. The paper's are standardised: `group_relative(rewards,
      ddof=0)`, and 0 in a group without spread.
    weights: [P, G] float, how much each response counts, usually 1 / P; a constant.
    mask: [P, G] bool, which responses are in the group; None is `weights != 0`.
    temperature: how gently the target is tilted, > 0; the paper's eta.

  Returns:
    The scalar loss, at least float32, and metrics {"target_gap"}: |p - target| of a response.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `temperature` is not above 0; the message
      names the argument.

  Needs: samples, advantages, several responses, old policy.

  Reference: Kaddour, 2026, Target Policy Optimization, https://arxiv.org/abs/2604.06159
  """
  check_above("temperature", temperature, 0)
  logprobs, log_ratio, advantages, weights, mask = _checks.policy_gradient(
    logprobs, old_logprobs, advantages, weights, mask
  )
  old = jax.lax.stop_gradient(logprobs - log_ratio)
  target = jnp.exp(_group_log_softmax(old + advantages / temperature, mask))
  log_p = _group_log_softmax(logprobs, mask)
  gap = jnp.abs(jnp.exp(log_p) - target)
  per_response = jnp.where(mask, -target * log_p, 0)
  return jnp.sum(weights * per_response), {"target_gap": _checks.metric(gap, mask)}


def astar_po_loss(
  response_logprobs, ref_response_logprobs, advantages, weights, *, beta=1e-3
) -> tuple[Array, Metrics]:
  """A*-PO: regresses the log-ratio to the reference on the optimal advantage.

      log_ratio = response_logprobs - ref_response_logprobs
      loss      = sum(weights * (beta * log_ratio - advantages)^2)

  The best policy under a KL penalty of strength beta has beta * log(policy / reference) = reward -
  V*(prompt) for *every* response, so one response per prompt is enough to say how far the policy is
  from it. V* is known before training, from the reference's own responses: the advantages are those
  of `rl_llm.advantages.optimal_advantage`. A response with an advantage of 0.2 and beta 0.1, not
  moved yet, is 0.2 from where it should be; two nats up it is there:

  >>> ref, advantage = jnp.array([-3.0]), jnp.array([0.2])
  >>> loss = lambda x: float(astar_po_loss(x, ref, advantage, jnp.ones(1), beta=0.1)[0])
  >>> round(loss(ref), 3), round(loss(ref + 2.0), 3)
  (0.04, 0.0)

  The gradient is 2 * beta times that of `dro_loss` on [B, 1] sums.

  Args:
    response_logprobs: [B] float, log-probs of the policy's own responses under the policy being
      trained, in nats: sums from `logprobs.sequence_logprobs`.
    ref_response_logprobs: [B] float, the same under the reference; a constant.
    advantages: [B] float, reward - V*; a constant.
    weights: [B] float, how much each row counts, usually 1 / B; a constant.
    beta: reward per nat, > 0; the paper's beta 2.

  Returns:
    The scalar loss, at least float32, and metrics {"implicit_reward", "residual"} per row,
    unweighted: beta times the log-ratio, and how far it is from the advantage.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `beta` is not above 0; the message names the
      argument.

  Needs: samples, advantages, reference.

  Reference: Brantley et al., 2025, Accelerating RL for LLM Reasoning with Optimal Advantage
    Regression, https://arxiv.org/abs/2505.20686
  """
  check_above("beta", beta, 0)
  like, name = response_logprobs, "response_logprobs"
  logprobs, weights, mask = _checks.rows(name, response_logprobs, weights)
  ref = _checks.constant("ref_response_logprobs", ref_response_logprobs, name, like, mask)
  advantages = _checks.constant("advantages", advantages, name, like, mask)
  implicit = beta * (logprobs - ref)
  residual = implicit - advantages
  metrics = {
    "implicit_reward": _checks.metric(implicit, mask),
    "residual": _checks.metric(jnp.abs(residual), mask),
  }
  return jnp.sum(weights * jnp.square(residual)), metrics


def _group_log_softmax(x, mask):
  """log softmax over the members of each row; no number outside the mask, or in an empty row."""
  least = jnp.finfo(x.dtype).min
  top = jax.lax.stop_gradient(
    jnp.max(jnp.where(mask, x, least), axis=1, keepdims=True, initial=least)
  )
  shifted = x - jnp.where(jnp.any(mask, axis=1, keepdims=True), top, 0)
  shifted = jnp.where(mask, shifted, 0)
  total = jnp.sum(jnp.where(mask, jnp.exp(shifted), 0), axis=1, keepdims=True)
  return shifted - jnp.log(jnp.where(total == 0, 1, total))
