"""Preference losses on pairs of answers: raise the chosen one over the rejected one.

The classical way to learn from preferences is to fit a reward model to them and then run
reinforcement learning against it. These losses skip both: a policy that differs from its reference
already *is* a reward model, whose reward for an answer is

    reward = beta * (log policy(answer) - log reference(answer))

and they fit that reward to the preferences. They differ in which errors of the two rewards they
penalise.
All take the log-probs of whole answers, [B] sums (or averages) from `logprobs.sequence_logprobs`,
and weights [B], usually 1 / B. A pair of weight 0 is as if absent.

Their metrics describe the pairs: "accuracy" is how often the chosen answer has the higher reward,
"margin" by how much, "chosen_reward" and "rejected_reward" the rewards themselves. A common
misconception is that the chosen answer becomes likelier: most of these losses see only the
difference, and often both answers become less likely. Watch "chosen_reward".
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, check_above, check_choice
from rl_llm.losses import _checks
from rl_llm.losses._pairs import (
  check_smoothing,
  log_ratios,
  pair_metrics,
  rewards,
  smoothed_logistic,
)


def dpo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=0.0,
  divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
  alpha=0.5,
) -> tuple[Array, Metrics]:
  """DPO: the log-likelihood of the preferences, under the reward that the policy implies.

      reward = beta * (logprobs - ref_logprobs)          of the chosen and the rejected answer
      margin = chosen reward - rejected reward
      loss   = sum(weights * -log sigmoid(margin))

  For a policy that still equals its reference every pair is a coin flip, log 2 = 0.693. One that
  has doubled the odds between the answers, with beta 1, gives the chosen one 2/3:

  >>> same = jnp.log(jnp.array([0.5]))
  >>> loss, _ = dpo_loss(same, same, same, same, jnp.ones(1))
  >>> round(float(loss), 3)
  0.693
  >>> loss, _ = dpo_loss(same, same, same, same + jnp.log(2), jnp.ones(1), beta=1.0)
  >>> round(float(jnp.exp(-loss)), 3)
  0.667

  Labels may be wrong. `label_smoothing` e (conservative DPO) is the assumed share of swapped pairs;
  the loss then has its minimum at sigmoid(margin) = 1 - e, while without it there is none:

      loss = sum(weights * (-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)))

  The logarithm in the reward comes from a reverse KL between policy and reference. Another
  `divergence` replaces it by another function of the log-ratio c (f-DPO):

      reverse_kl   c                     forward_kl   -exp(-c)
      js           log sigmoid(c)        alpha        -exp(-alpha * c) / alpha

  With alpha 1 it is the forward KL, and as alpha goes to 0 the reverse one. Some systems write the
  last as exp((a - 1) * c) / (a - 1): their a is 1 - alpha, and 0.5 is the same in both. The
  exponents -c and -alpha * c are limited to +-20, and an answer beyond has no gradient. The limit
  is this library's; TRL has none.

  Length-normalised DPO is this function on `sequence_logprobs(..., average=True)`. RPO, which keeps
  the chosen answer likely, is a sum of two terms:

  >>> from rl_llm.losses.supervised import sft_loss
  >>> def rpo(pairs, chosen_token_logprobs, weights, token_weights, coef=1.0):
  ...   preference, metrics = dpo_loss(*pairs, weights)
  ...   likelihood, _ = sft_loss(chosen_token_logprobs, token_weights)
  ...   return preference + coef * likelihood, metrics
  >>> loss, _ = rpo([same] * 4, same[:, None], jnp.ones(1), jnp.ones((1, 1)))
  >>> round(float(loss / jnp.log(2)), 3)
  2.0

  Args:
    chosen_logprobs: [B] float, log-probs of the chosen answers under the policy being trained, in
      nats.
    rejected_logprobs: [B] float, the same of the rejected answers.
    ref_chosen_logprobs: [B] float, of the chosen answers under the reference, at the same
      temperature; a constant.
    ref_rejected_logprobs: [B] float, the same of the rejected answers; a constant.
    weights: [B] float, how much each pair counts, usually 1 / B; a constant. Made before any split.
    beta: reward per nat of log-ratio, > 0: how strongly the reference holds.
    label_smoothing: the share of wrong labels, at least 0 and below 1/2.
    divergence: "reverse_kl", "forward_kl", "js" or "alpha".
    alpha: order of the divergence "alpha", > 0.

  Returns:
    The scalar loss, at least float32, and metrics {"accuracy", "margin", "chosen_reward",
    "rejected_reward"} per pair, unweighted.

  Raises:
    ValueError: shapes differ, a dtype is not float, a number is out of range, or the divergence is
      unknown; the message names the argument.

  Needs: pairs, reference.

  Reference: Rafailov et al., 2023, Direct Preference Optimization,
    https://arxiv.org/abs/2305.18290; conservative DPO: Mitchell, 2023,
    https://ericmitchell.ai/cdpo.pdf; divergences: Wang et al., 2023, Beyond Reverse KL,
    https://arxiv.org/abs/2309.16240; RPO: Pang et al., 2024, https://arxiv.org/abs/2404.19733
  """
  check_smoothing(label_smoothing)
  check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
  check_above("alpha", alpha, 0)
  pair, weights, mask = log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  if divergence == "forward_kl":
    pair = [-_checks.ratio_of(-c) for c in pair]
  elif divergence == "js":
    pair = [jax.nn.log_sigmoid(c) for c in pair]
  elif divergence == "alpha":
    pair = [-_checks.ratio_of(-alpha * c) / alpha for c in pair]
  chosen, rejected = beta * pair[0], beta * pair[1]
  per_pair = smoothed_logistic(chosen - rejected, label_smoothing)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def robust_dpo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=0.1,
) -> tuple[Array, Metrics]:
  """Robust DPO: what the DPO loss would be on average, had no label been flipped.

      per_pair = (-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2 e)
      loss     = sum(weights * per_pair)

  with e = `label_smoothing`, the chance that a label is swapped. Conservative DPO (`dpo_loss` with
  `label_smoothing`) aims at a smaller margin. This loss subtracts the expected effect of the flips,
  so noisy labels give the gradient of clean ones in expectation. Averaged over a clean and a
  flipped label at their rates it is the clean loss: at margin 1, log(1 + 1/e) = 0.313.

  >>> zero, one = jnp.zeros(1), jnp.ones(1)
  >>> f = lambda x: robust_dpo_loss(x, zero, zero, zero, one, beta=1.0, label_smoothing=0.2)[0]
  >>> round(float(0.8 * f(one) + 0.2 * f(-one)), 3)
  0.313

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: the chance that a label is swapped, at least 0 and below 1/2.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Chowdhury et al., 2024, Provably Robust DPO, https://arxiv.org/abs/2403.00409
  """
  check_smoothing(label_smoothing)
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  margin = chosen - rejected
  # -log sigmoid(-x) = x - log sigmoid(x): the two terms partly cancel, and do so exactly here.
  per_pair = -jax.nn.log_sigmoid(margin) - margin * label_smoothing / (1 - 2 * label_smoothing)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def hinge_dpo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """A hinge on DPO's margin: leaves pairs alone that are far enough apart.

      loss = sum(weights * max(0, 1 - margin))

  DPO never stops pushing a pair apart. Here a margin of 1 is enough; 0.4 is 0.6 short:

  >>> zero, weights = jnp.zeros(2), jnp.ones(2)
  >>> loss, _ = hinge_dpo_loss(jnp.array([4.0, 15.0]), zero, zero, zero, weights)
  >>> round(float(loss), 3)
  0.6

  SLiC's rank loss is this with the reference at 0 and beta = 1 / its margin.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Liu et al., 2023, Statistical Rejection Sampling Improves Preference Optimization,
    https://arxiv.org/abs/2309.06657; Zhao et al., 2023, SLiC-HF, https://arxiv.org/abs/2305.10425
  """
  (chosen, rejected), weights, mask = rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jnp.maximum(0, 1 - (chosen - rejected))
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def wpo_weights(chosen_logprobs, rejected_logprobs, weights) -> Array:
  """WPO: weights pairs by how likely the policy is to write them.

      weights * min(1, exp(chosen_logprobs + rejected_logprobs))

  Preference data was written by other policies. On-policy data works better, and weighting a pair
  by its probability imitates it. A whole answer's probability is close to 0, so the paper takes the
  mean per token, and measures each token relative to how certain the policy is there. For
  log-probs `logp` [B, T, V] of the whole vocabulary and the tokens' `token_logp` [B, T]:

      aligned  = token_logp - logsumexp(2 * logp, axis=-1)
      argument = sequence_logprobs(aligned, mask, average=True)

  so a token drawn from a uniform distribution counts fully. With averages log 1/2 and log 1/4:

  >>> wpo_weights(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.ones(1)).tolist()
  [0.125]

  Args:
    chosen_logprobs: [B] float, averages per token of the aligned log-probs of the chosen answers
      under the policy, in nats; a constant.
    rejected_logprobs: [B] float, the same of the rejected answers; a constant.
    weights: [B] float, how much each pair counts.

  Returns:
    [B] weights for any loss of this module, at least float32, without gradient; 0 stays 0.

  Raises:
    ValueError: shapes differ, or a dtype is not float; the message names the argument.

  Needs: pairs.

  Reference: Zhou et al., 2024, WPO, https://arxiv.org/abs/2406.11827
  """
  chosen, weights, mask = _checks.rows("chosen_logprobs", chosen_logprobs, weights)
  rejected = _checks.constant(
    "rejected_logprobs", rejected_logprobs, "chosen_logprobs", chosen_logprobs, mask
  )
  return jax.lax.stop_gradient(weights * jnp.exp(jnp.minimum(chosen + rejected, 0)))
