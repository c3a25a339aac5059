"""Keeps right responses likely: terms that hold or raise the likelihood of good responses."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  Array,
  Metrics,
  any_mesh,
  check_choice,
  check_int,
  check_mask,
  check_members,
  check_same_shape,
)
from rl_llm.losses import _checks


@any_mesh
def action_ids_of(mask) -> Array:
  """Numbers the actions of each row: the texts of an agent between its tools' outputs.

  An agent's row is action, tool output, action, ...; the mask is True on the actions, so each run
  of True is one action:

  >>> action_ids_of(jnp.array([[False, True, True, False, True]])).tolist()
  [[-1, 0, 0, -1, 1]]

  Args:
    mask: [B, T] bool, the tokens the policy produced.

  Returns:
    [B, T] int32, 0, 1, ... along each row; -1 outside the mask.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Needs: samples.
  """
  check_members(mask)
  mask = jnp.asarray(mask)
  before = jnp.pad(mask, ((0, 0), (1, 0)))[:, :-1]
  return jnp.where(mask, jnp.cumsum(mask & ~before, axis=1) - 1, -1).astype(jnp.int32)


def llds_weights(
  advantages, mask, *, normalizer="preserving", answer_mask=None, answer_weight=1.0
) -> Array:
  """Weights for `llds_loss`: the mean over the tokens whose likelihood should be preserved.

      weights[b, t] = mask[b, t] * (answer_weight if answer_mask[b, t] else 1) / N

      normalizer "preserving":  N = tokens of responses with advantage >= 0    (the paper)
      normalizer "all":         N = all tokens of the batch                    (the authors' code)

  Every token gets a weight, since weights also say which tokens exist; `llds_loss` itself leaves
  out responses with a negative advantage. One good response of three tokens, one bad of one:

  >>> mask = jnp.array([[True, True, True], [True, False, False]])
  >>> [round(float(w), 3) for w in llds_weights(jnp.array([1.0, -1.0]), mask)[0]]
  [0.333, 0.333, 0.333]
  >>> llds_weights(jnp.array([1.0, -1.0]), mask, normalizer="all")[0].tolist()
  [0.25, 0.25, 0.25]

  LLDS-MA counts the final answer differently from the steps that led to it. The answer's weight may
  grow during training, such as min(searches / 2, 1), with the mean number of valid searches:

  >>> answer = jnp.array([[False, False, True], [False, False, False]])
  >>> weights = llds_weights(jnp.array([1.0, -1.0]), mask, answer_mask=answer, answer_weight=0.5)
  >>> [round(float(w), 3) for w in weights[0]]
  [0.333, 0.333, 0.167]

  Args:
    advantages: [B] or [B, T] float, of the whole batch of one optimiser step; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    normalizer: what N counts, as above.
    answer_mask: None, or [B, T] bool, the tokens of the final answer.
    answer_weight: how much each of them counts. At 0, pass the mask to `llds_loss`, or they no
      longer belong to the response there.

  Returns:
    [B, T] float32; all 0 if there is nothing to preserve.

  Raises:
    ValueError: shapes differ, a mask is not bool, or `normalizer` is none of the above.

  Needs: samples, advantages.

  Reference: Deng et al., 2025, On GRPO Collapse in Agent Search, https://arxiv.org/abs/2512.04220
  """
  check_choice("normalizer", normalizer, ("preserving", "all"))
  check_members(mask)
  mask = jnp.asarray(mask)
  advantages = _checks.per_token("advantages", advantages, mask)
  counted = mask & (advantages >= 0) if normalizer == "preserving" else mask
  count = jnp.sum(counted)
  each = jnp.where(count > 0, 1 / jnp.maximum(count, 1).astype(jnp.float32), 0)
  weights = jnp.where(mask, each, 0)
  if answer_mask is None:
    return weights
  check_mask("answer_mask", answer_mask)
  check_same_shape("answer_mask", answer_mask, "mask", mask)
  return jnp.where(answer_mask, weights * answer_weight, weights)


@any_mesh
def llds_loss(
  logprobs, old_logprobs, advantages, weights, *, mask=None, level="action", action_ids=None
) -> tuple[Array, Metrics]:
  """The likelihood that responses worth keeping have lost since before this batch's updates.

  A wrong response shares words with the right ones, so pushing it down pulls them down too. As they
  become unlikely their gradients grow, which lowers them further: GRPO on agents that use tools
  collapses this way. This term holds up responses that were not bad, and only where they fell:

      lost      = old_logprobs - logprobs
      gate      = 1 if sum of lost over the token's unit > 0 else 0     not differentiated
      per_token = gate * max(0, lost)      where advantage >= 0, else 0
      loss      = sum(weights * per_token)

  The unit is the action (default), the token (then the gate changes nothing), or the response. With
  actions, a token may fall as long as its action does not. Here are two actions of two tokens; the
  first token of each fell from 1/2 to 1/4, losing log 2. In the first action the other token rose
  by as much, so its gate is closed:

  >>> old = jnp.log(jnp.array([[0.5, 0.25, 0.5, 0.5, 0.5]]))
  >>> now = jnp.log(jnp.array([[0.25, 0.5, 0.5, 0.25, 0.5]]))
  >>> mask, good = jnp.array([[True, True, False, True, True]]), jnp.array([1.0])
  >>> loss, _ = llds_loss(now, old, good, llds_weights(good, mask))
  >>> round(float(loss / jnp.log(2)), 3)  # of four tokens
  0.25
  >>> loss, _ = llds_loss(now, old, good, llds_weights(good, mask), level="token")
  >>> round(float(loss / jnp.log(2)), 3)
  0.5

  Before the first update nothing has been lost, so loss and gradient are exactly 0: the term only
  acts from the second update on the same batch. The paper adds 0.2 times it to GRPO's loss.

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    old_logprobs: [B, T] float, the same under the policy before this batch's updates; a constant.
    advantages: [B] or [B, T]; a constant.
    weights: [B, T] float, from `llds_weights`; a constant.
    mask: [B, T] bool, which tokens belong to a response. None is `weights != 0`.
    level: the unit of the gate, "action", "token" or "response".
    action_ids: None, or [B, T] int in [0, T), which action of its row a token belongs to; read at
      level "action" only. None is `action_ids_of(mask)`.

  Returns:
    The scalar loss, at least float32, and metrics {"lost_likelihood", "gate_open",
    "log_ratio_positive", "log_ratio_negative", "logprob_positive"}: per token, `per_token`; per
    unit worth keeping, how many are open; per token of responses with advantage above and below 0,
    logprobs - old_logprobs; per token of those above 0, logprobs. Collapse shows first in the last
    one, over time.

  Raises:
    ValueError: shapes differ, a dtype does not fit, or `level` is none of the above; the message
      names the argument.

  Needs: samples, advantages, old policy.

  Reference: Deng et al., 2025, On GRPO Collapse in Agent Search, https://arxiv.org/abs/2512.04220
  """
  check_choice("level", level, ("action", "token", "response"))
  like = logprobs
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights, mask)
  old_logprobs = _checks.constant("old_logprobs", old_logprobs, "logprobs", like, mask)
  advantages = _checks.per_token("advantages", advantages, mask)
  width = mask.shape[1]
  if level != "action":
    units = jnp.broadcast_to(jnp.arange(width) if level == "token" else 0, mask.shape)
  elif action_ids is None:
    units = action_ids_of(mask)
  else:
    check_int("action_ids", action_ids)
    check_same_shape("action_ids", action_ids, "logprobs", like)
    units = jnp.asarray(action_ids)
  units = jnp.where(mask, units, 0)  # what lies outside the mask adds 0 to any unit

  def over_unit(x):
    """[B, T]: the sum of x over the unit that each token belongs to."""
    total = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=width))(x, units)
    return jnp.take_along_axis(total, units, axis=1)

  lost = old_logprobs - logprobs
  kept = mask & (advantages >= 0)
  # Close the gate where likelihood rose, rather than open it where it fell: a nan log-prob did
  # neither, and must be seen.
  is_open = kept & ~(over_unit(jax.lax.stop_gradient(lost)) <= 0)
  per_token = jnp.where(is_open & ~(lost <= 0), lost, 0)
  members = over_unit(mask.astype(lost.dtype))
  share = kept.astype(lost.dtype) / jnp.maximum(members, 1)  # sums to 1 over a unit
  metrics = {
    "lost_likelihood": _checks.metric(per_token, mask),
    "gate_open": (jnp.sum(jnp.where(is_open, share, 0)), jnp.sum(share)),
    "log_ratio_positive": _checks.metric(-lost, mask & (advantages > 0)),
    "log_ratio_negative": _checks.metric(-lost, mask & (advantages < 0)),
    "logprob_positive": _checks.metric(logprobs, mask & (advantages > 0)),
  }
  return jnp.sum(weights * per_token), metrics


def positive_nll_loss(logprobs, correct, weights) -> tuple[Array, Metrics]:
  """Negative log-likelihood of the sampled responses that were right: learns from lucky samples.

      loss = -sum(weights * correct * logprobs)

  Right answers to a hard problem are rare and costly to find. The policy gradient uses each in
  proportion to its advantage; this term uses it in full, like a demonstration. VAPO adds 0.1 times
  this term, averaged over the tokens of right answers. Here a right answer has tokens of
  probability 1/2 and 1/8, and the wrong answer counts nothing:

  >>> from rl_llm.weighting import token_mean
  >>> logprobs = jnp.log(jnp.array([[0.5, 0.125], [0.9, 0.9]]))
  >>> mask, correct = jnp.ones((2, 2), bool), jnp.array([True, False])
  >>> loss, _ = positive_nll_loss(logprobs, correct, token_mean(mask & correct[:, None]))
  >>> round(float(loss / jnp.log(2)), 3)
  2.0

  Args:
    logprobs: [B, T] float, log-probs of the sampled tokens under the policy being trained, in nats.
    correct: [B] bool, whether the response was right; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.

  Returns:
    The scalar loss, at least float32, and metrics {"positive_nll"}: per token of right answers,
    unweighted.

  Raises:
    ValueError: shapes differ, or a dtype does not fit; the message names the argument.

  Needs: samples, reward.

  Reference: Yue et al., 2025, VAPO, https://arxiv.org/abs/2504.05118
  """
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights)
  check_mask("correct", correct)
  if jnp.shape(correct) != mask.shape[:1]:
    raise ValueError(f"correct has shape {jnp.shape(correct)}; it must be [B] = {mask.shape[:1]}.")
  right = mask & jnp.asarray(correct)[:, None]
  nll = jnp.where(right, -logprobs, 0)
  return jnp.sum(weights * nll), {"positive_nll": _checks.metric(nll, right)}
