"""Learning from a teacher that says how likely every token is, not only which one is right.

A teacher is another language model with the same vocabulary. A student that copies the teacher's
texts (`sft_loss`) sees one random token of each distribution and never what follows its own
mistakes. Distillation on the student's own texts fixes both: the teacher's whole distribution is
the target, at the places that the student really reaches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.advantages import discounted_returns
from rl_llm.checks import (
  Array,
  Metrics,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_float,
  check_members,
  check_ndim,
  check_same_shape,
)
from rl_llm.logprobs import map_chunks, unembed
from rl_llm.losses import _checks

# Stands for log 0: small enough that exp gives 0, but 0 times it is 0, while 0 * -inf is nan.
LOG_ZERO = -1e30


def gkd_loss(
  logits, teacher_logits, weights, *, beta=0.5, temperature=1.0
) -> tuple[Array, Metrics]:
  """Generalised Jensen-Shannon divergence between the teacher's and the student's distributions.

      p = softmax(teacher_logits / temperature)      q = softmax(logits / temperature)
      m = beta * p + (1 - beta) * q
      per_token = beta * KL(p || m) + (1 - beta) * KL(q || m)
      loss      = sum(weights * per_token)

  beta is a dial between two kinds of error. Towards 0 the student must cover everything the teacher
  may say; towards 1 it must say nothing the teacher would not. The divergence itself vanishes at
  both ends, where its limit after division by beta, or by 1 - beta, replaces it:

      beta 0:  per_token = KL(p || q), forward        beta 1:  per_token = KL(q || p), reverse

  A teacher that is certain and a student that tosses a coin: KL(p || q) = log 2, and m is 3/4, 1/4:

  >>> teacher, student = jnp.array([[[0.0, -jnp.inf]]]), jnp.zeros((1, 1, 2))
  >>> loss, _ = gkd_loss(student, teacher, jnp.ones((1, 1)), beta=0.0)
  >>> round(float(loss / jnp.log(2)), 3)
  1.0
  >>> loss, _ = gkd_loss(student, teacher, jnp.ones((1, 1)))
  >>> expected = 0.5 * jnp.log(4 / 3) + 0.5 * (0.5 * jnp.log(0.5 / 0.75) + 0.5 * jnp.log(2))
  >>> round(float(loss), 4), round(float(expected), 4)
  (0.2158, 0.2158)

  In GKD a share of the texts (half, in the paper) is the student's own. The sampling code decides
  which: this term is the same for all texts, and no gradient flows through the sampling.

  Args:
    logits: [B, T, V] float, of the student, before division by the temperature.
    teacher_logits: [B, T, V] float, of the teacher; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    beta: the divergence, between 0 (forward KL) and 1 (reverse KL).
    temperature: divides the logits of both models, > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"divergence"}: per token, unweighted. Where the
    divergence is infinite, because one side forbids what the other says, it is about 1e30.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: samples, teacher, vocabulary.

  Reference: Agarwal et al., 2023, On-Policy Distillation of Language Models (GKD),
    https://arxiv.org/abs/2306.13649
  """
  check_between("beta", beta, 0, 1)
  check_above("temperature", temperature, 0)
  check_ndim("logits", logits, 3, "[B, T, V]")
  check_float("logits", logits)
  check_same_shape("teacher_logits", teacher_logits, "logits", logits)
  check_float("teacher_logits", teacher_logits)
  weights, mask = _weights_of(weights, "logits", logits)
  logits, teacher_logits = (jnp.where(mask[..., None], x, 0) for x in (logits, teacher_logits))
  per_token = jnp.where(mask, _divergence(logits, teacher_logits, beta, temperature), 0)
  return jnp.sum(weights * per_token), {"divergence": _checks.metric(per_token, mask)}


@any_mesh
def chunked_gkd_loss(
  hidden,
  unembedding,
  teacher_hidden,
  teacher_unembedding,
  weights,
  *,
  beta=0.5,
  temperature=1.0,
  softcaps=(None, None),
  chunk_size=256,
) -> tuple[Array, Metrics]:
  """`gkd_loss` from hidden states, without building [B, T, V].

  Logits of two models take twice the memory, and autodiff keeps several arrays of that size. Here
  at most `chunk_size` tokens have logits at a time; the backward pass computes them again.

      logits = hidden @ unembedding.T
      logits = softcap * tanh(logits / softcap)    if softcap is given

  Teacher and student may have different widths, but not different vocabularies:

  >>> hidden, teacher_hidden = jnp.ones((1, 3, 2)), jnp.ones((1, 3, 1))
  >>> unembedding, teacher_unembedding = jnp.eye(4, 2), jnp.eye(4, 1)
  >>> weights = jnp.full((1, 3), 1 / 3)
  >>> loss, _ = chunked_gkd_loss(
  ...   hidden, unembedding, teacher_hidden, teacher_unembedding, weights, chunk_size=2)
  >>> dense, _ = gkd_loss(hidden @ unembedding.T, teacher_hidden @ teacher_unembedding.T, weights)
  >>> bool(jnp.allclose(loss, dense))
  True

  Args:
    hidden: [B, T, D] float, the student's last hidden states.
    unembedding: [V, D] float, the student's, such as the embedding matrix as it is stored.
    teacher_hidden: [B, T, E] float, the teacher's last hidden states; a constant.
    teacher_unembedding: [V, E] float, the teacher's; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    beta: as in `gkd_loss`.
    temperature: as in `gkd_loss`.
    softcaps: the student's bound on its logits and the teacher's, each > 0 or None.
    chunk_size: the most tokens whose logits may exist at once; any number of tokens works.

  Returns:
    The loss and metrics of `gkd_loss`; gradients flow to `hidden` and `unembedding`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: samples, teacher, vocabulary.

  Reference: Agarwal et al., 2023, On-Policy Distillation of Language Models (GKD),
    https://arxiv.org/abs/2306.13649
  """
  check_between("beta", beta, 0, 1)
  check_above("temperature", temperature, 0)
  softcap, teacher_softcap = softcaps
  check_above("softcaps[0]", softcap, 0)
  check_above("softcaps[1]", teacher_softcap, 0)
  check_above("chunk_size", chunk_size, 0)
  check_ndim("hidden", hidden, 3, "[B, T, D]")
  check_float("hidden", hidden)
  check_ndim("teacher_hidden", teacher_hidden, 3, "[B, T, E]")
  check_float("teacher_hidden", teacher_hidden)
  if teacher_hidden.shape[:2] != hidden.shape[:2]:
    raise ValueError(
      f"teacher_hidden has shape {teacher_hidden.shape}; it must be [B, T, E], the shape of "
      f"hidden, {hidden.shape}, but for the last axis."
    )
  _check_unembedding("unembedding", unembedding, "hidden", hidden)
  _check_unembedding("teacher_unembedding", teacher_unembedding, "teacher_hidden", teacher_hidden)
  if len(unembedding) != len(teacher_unembedding):
    raise ValueError(
      f"teacher_unembedding has shape {teacher_unembedding.shape}; it must have V = "
      f"{len(unembedding)} rows as unembedding has: one vocabulary."
    )
  weights, mask = _weights_of(weights, "hidden", hidden)
  hidden, teacher_hidden = (jnp.where(mask[..., None], x, 0) for x in (hidden, teacher_hidden))
  teacher_unembedding = jax.lax.stop_gradient(teacher_unembedding)

  def chunk(hidden, teacher_hidden):
    logits = unembed(hidden, unembedding, softcap=softcap)
    teacher_logits = unembed(teacher_hidden, teacher_unembedding, softcap=teacher_softcap)
    return _divergence(logits, teacher_logits, beta, temperature)

  per_token = map_chunks(jax.checkpoint(chunk), chunk_size, hidden, teacher_hidden)
  per_token = jnp.where(mask, per_token, 0)
  return jnp.sum(weights * per_token), {"divergence": _checks.metric(per_token, mask)}


def minillm_advantages(
  logprobs, teacher_logprobs, mask, *, discount=1.0, length_normalize=False
) -> Array:
  """MiniLLM's advantages: how much likelier the teacher finds the rest of the student's text.

      r_t = teacher_logprobs - logprobs
      A_t = sum_{s >= t} discount^(s - t) r_s
      A_t = that / sum_{s >= t} discount^(s - t)      with length_normalize

  The student's KL to the teacher over whole texts depends on which texts it writes. So its gradient
  is a policy gradient with this return: `reinforce_loss` with these advantages descends
  KL(student || teacher). If two tokens have probabilities 1/2, 1/2 for the student and 1/4, 1/8 for
  the teacher, they lose log 2 and log 4; the first token is charged for both:

  >>> student, teacher = jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.25, 0.125]]))
  >>> advantages = minillm_advantages(student, teacher, jnp.ones((1, 2), bool))
  >>> [round(float(a / jnp.log(2)), 3) for a in advantages[0]]
  [-3.0, -2.0]

  With discount 0 each token is charged only for itself, which is on-policy distillation (TRL's
  default; the paper has 1). Long answers have more terms, so the paper divides by the remaining
  length, which is no longer the exact gradient.

  Args:
    logprobs: [B, T] float, the student's log-probs of the tokens it sampled, in nats; a constant.
    teacher_logprobs: [B, T] float, the teacher's, at the same temperature; a constant.
    mask: [B, T] bool, the tokens the student produced.
    discount: discount factor per token, between 0 and 1.
    length_normalize: take the discounted mean of the terms still to come, not the sum.

  Returns:
    [B, T] advantages, at least float32, without gradient; 0 outside the mask.

  Raises:
    ValueError: shapes differ, `mask` is not bool, or `discount` is outside [0, 1].

  Needs: samples, teacher.

  Reference: Gu et al., 2023, MiniLLM, https://arxiv.org/abs/2306.08543
  """
  check_between("discount", discount, 0, 1)
  check_members(mask)
  mask = jnp.asarray(mask)
  logprobs = _checks.constant("logprobs", logprobs, "mask", mask, mask)
  teacher_logprobs = _checks.constant("teacher_logprobs", teacher_logprobs, "mask", mask, mask)
  returns = discounted_returns(teacher_logprobs - logprobs, mask, discount=discount)
  if not length_normalize:
    return returns
  length = discounted_returns(mask.astype(returns.dtype), mask, discount=discount)
  return returns / jnp.maximum(length, 1)


def on_policy_distillation_loss(
  logprobs, sampler_logprobs, teacher_logprobs, weights, *, max_drop=0.2, sampler_coef=1e-3
) -> tuple[Array, Metrics]:
  """On-policy distillation: each token the student sampled, graded by the teacher at once.

      A         = teacher_logprobs - logprobs                  not differentiated
      ratio     = exp(logprobs - sampler_logprobs)
      push      = -A * ratio, or 0 where exp(logprobs) - exp(sampler_logprobs) < -max_drop
      per_token = push + sampler_coef * (logprobs - sampler_logprobs)^2
      loss      = sum(weights * per_token)

  Reinforcement learning gets one number per text; here every token has its own, and no reward is
  needed. The gradient is that of KL(student || teacher) at each token, with the texts fixed. A
  token that the student finds twice as likely as the teacher has A = -log 2, and is pushed down:

  >>> student, teacher = jnp.log(jnp.array([[0.5]])), jnp.log(jnp.array([[0.25]]))
  >>> gradient, _ = jax.grad(on_policy_distillation_loss, has_aux=True)(
  ...   student, student, teacher, jnp.ones((1, 1)))
  >>> round(float(gradient[0, 0] / jnp.log(2)), 3)
  1.0

  A token whose probability has fallen by more than `max_drop` since it was sampled is not pushed in
  either direction. The small quadratic term on every token holds the trainer near the sampler. Both
  come from prime-rl; `max_drop=None, sampler_coef=0` is the plain form.

  Args:
    logprobs: [B, T] float, the student's log-probs of the tokens it sampled, in nats.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    teacher_logprobs: [B, T] float, the teacher's, at the same temperature; a constant.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.
    max_drop: how far a probability may have fallen, > 0, or None for no limit.
    sampler_coef: the penalty per squared nat between trainer and sampler.

  Returns:
    The scalar loss, at least float32, and metrics {"reverse_kl", "ratio", "dropped_fraction"}: over
    tokens, logprobs - teacher_logprobs, the ratio, and how many are not pushed. In the ratio,
    log-ratios are limited to +-20; beyond, it has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `max_drop` is not above 0; the message names
      the argument.

  Needs: samples, sampler, teacher.

  Reference: Lu and Thinking Machines Lab, 2025, On-Policy Distillation,
    https://thinkingmachines.ai/blog/on-policy-distillation
  """
  check_above("max_drop", max_drop, 0)
  like = logprobs
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights)
  sampler_logprobs = _checks.constant("sampler_logprobs", sampler_logprobs, "logprobs", like, mask)
  teacher_logprobs = _checks.constant("teacher_logprobs", teacher_logprobs, "logprobs", like, mask)
  log_ratio = logprobs - sampler_logprobs
  ratio = _checks.ratio_of(log_ratio)
  advantages = jax.lax.stop_gradient(teacher_logprobs - logprobs)
  dropped = jnp.zeros(mask.shape, bool)
  if max_drop is not None:
    dropped = jnp.exp(jax.lax.stop_gradient(logprobs)) - jnp.exp(sampler_logprobs) < -max_drop
  per_token = jnp.where(dropped, 0, -advantages * ratio) + sampler_coef * jnp.square(log_ratio)
  metrics = {
    "reverse_kl": _checks.metric(-advantages, mask),
    "ratio": _checks.metric(ratio, mask),
    "dropped_fraction": _checks.metric(dropped, mask),
  }
  return jnp.sum(weights * per_token), metrics


def _divergence(logits, teacher_logits, beta, temperature):
  """The generalised JSD of the last axis [..., V], without gradient to the teacher."""
  log_q, log_p = (
    jnp.maximum(jax.nn.log_softmax(at_least_float32(x) / temperature, axis=-1), LOG_ZERO)
    for x in (logits, jax.lax.stop_gradient(teacher_logits))
  )
  beta = jnp.asarray(beta, log_q.dtype)
  log_m = jnp.logaddexp(_log(beta) + log_p, _log(1 - beta) + log_q)
  kl = lambda log_a, log_b: jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)  # noqa: E731
  # At beta 0, m is q, and at 1 it is p: one of the two terms is 0, the other counts in full.
  of_p, of_q = jnp.where(beta == 0, 1, beta), jnp.where(beta == 1, 1, 1 - beta)
  return of_p * kl(log_p, log_m) + of_q * kl(log_q, log_m)


def _log(x):
  return jnp.maximum(jnp.log(x), LOG_ZERO)


def _weights_of(weights, like_name, like):
  """The weights [B, T] without gradient, and where they are not 0."""
  if jnp.shape(weights) != jnp.shape(like)[:2]:
    raise ValueError(
      f"weights has shape {jnp.shape(weights)}; it must be [B, T] = {jnp.shape(like)[:2]}, the "
      f"shape of {like_name} without its last axis."
    )
  check_float("weights", weights)
  weights = jax.lax.stop_gradient(at_least_float32(weights))
  return weights, weights != 0


def _check_unembedding(name, unembedding, hidden_name, hidden):
  check_float(name, unembedding)
  check_ndim(name, unembedding, 2, "[V, D]")
  if unembedding.shape[1] != hidden.shape[-1]:
    raise ValueError(
      f"{name} has shape {unembedding.shape}; it must be [V, D] with D = {hidden.shape[-1]} as in "
      f"{hidden_name}: transpose it if it is stored as [D, V]."
    )
