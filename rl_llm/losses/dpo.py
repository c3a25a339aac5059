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

import math
from typing import Literal

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, Metrics, any_mesh, check_above, check_between, check_choice
from rl_llm.losses import _checks

# The losses that compare the rows of a batch with each other, so that no microbatch can compute its
# share. An experiment that offers them checks:
#   if name in losses.BATCH_COUPLED and microbatches > 1: raise ValueError(...)
BATCH_COUPLED = frozenset({"aot_loss", "aot_unpaired_loss"})


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
    label_smoothing: the share of wrong labels, between 0 and 1.
    divergence: "reverse_kl", "forward_kl", "js" or "alpha".
    alpha: of the divergence "alpha", > 0.

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
  check_between("label_smoothing", label_smoothing, 0, 1)
  check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
  check_above("alpha", alpha, 0)
  pair, weights, mask = _log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  if divergence == "forward_kl":
    pair = [-_checks.ratio_of(-c) for c in pair]
  elif divergence == "js":
    pair = [jax.nn.log_sigmoid(c) for c in pair]
  elif divergence == "alpha":
    pair = [-_checks.ratio_of(-alpha * c) / alpha for c in pair]
  chosen, rejected = beta * pair[0], beta * pair[1]
  per_pair = _smoothed_logistic(chosen - rejected, label_smoothing)
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
  check_between("label_smoothing", label_smoothing, 0, math.nextafter(0.5, 0))
  (chosen, rejected), weights, mask = _rewards(
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
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jnp.maximum(0, 1 - (chosen - rejected))
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def ipo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """IPO: pull the difference of log-ratios to a target, instead of pushing it without end.

      difference = (chosen - ref chosen) - (rejected - ref rejected)          in nats
      loss       = sum(weights * (difference - 1 / (2 beta))^2)

  If an answer always wins in the data, DPO's best margin is infinite, whatever beta is, and the
  reference holds nothing back. The square has its minimum at 1 / (2 beta): 5 nats at beta 0.1. At
  the reference, 0 nats, the loss is 25:

  >>> zero = jnp.zeros(1)
  >>> float(ipo_loss(zero, zero, zero, zero, jnp.ones(1))[0])
  25.0

  Two normalisations are in use, and the caller chooses one by the log-probs it passes. The paper's
  formula takes those of whole answers: sums, with a target of 5 nats per answer. Most trainers pass
  averages (`sequence_logprobs(average=True)`), with a target of 5 nats per *token*, so long answers
  need not change less. A beta tuned for one is wrong for the other by about the answers' length.

  Args:
    chosen_logprobs: [B] float, sums or averages, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: sets the target, > 0; the paper's tau.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Azar et al., 2023, A General Theoretical Paradigm to Understand Learning from Human
    Preferences, https://arxiv.org/abs/2310.12036
  """
  (chosen, rejected), weights, mask = _log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jnp.square(chosen - rejected - 1 / (2 * beta))
  return jnp.sum(weights * per_pair), pair_metrics(beta * chosen, beta * rejected, mask)


def exo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=1e-3,
) -> tuple[Array, Metrics]:
  """EXO on pairs: DPO's fit with the KL the other way round.

      q    = sigmoid(margin)                        what the policy says
      loss = sum(weights * (q log(q / (1 - e)) + (1 - q) log((1 - q) / e)))

  DPO minimises KL(labels || policy), which spreads over everything the labels allow. EXO minimises
  KL(policy || labels), as reinforcement learning does, which seeks one mode. The labels must allow
  both answers, so e = `label_smoothing` is above 0. At the reference q is 1/2; with e = 1/4 the KL
  from (1/2, 1/2) to (3/4, 1/4) is log(2) - log(3) / 2 = 0.144:

  >>> zero = jnp.zeros(1)
  >>> loss, _ = exo_loss(zero, zero, zero, zero, jnp.ones(1), label_smoothing=0.25)
  >>> round(float(loss), 3)
  0.144

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: the e above, between 0 and 1, both excluded.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Ji et al., 2024, Towards Efficient Exact Optimization of Language Model Alignment,
    https://arxiv.org/abs/2402.00856
  """
  check_above("label_smoothing", label_smoothing, 0)
  check_between("label_smoothing", label_smoothing, 0, math.nextafter(1, 0))
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  margin = chosen - rejected
  right = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - jnp.log1p(-label_smoothing))
  wrong = jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - jnp.log(label_smoothing))
  return jnp.sum(weights * (right + wrong)), pair_metrics(chosen, rejected, mask)


def nca_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """NCA on pairs: each answer against the reference, so that the chosen one cannot fall.

      loss = sum(weights * (-log sigmoid(chosen) - log sigmoid(-chosen) / 2
                            - log sigmoid(-rejected) / 2))

  with the rewards `chosen` and `rejected`. DPO sees only their difference, and often makes both
  answers less likely. Noise contrast judges each separately: is it from the data, or from the
  reference? At the reference every term is a coin flip, 2 log 2 = 1.386:

  >>> zero = jnp.zeros(1)
  >>> round(float(nca_loss(zero, zero, zero, zero, jnp.ones(1))[0]), 3)
  1.386

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

  Reference: Chen et al., 2024, Noise Contrastive Alignment of Language Models with Explicit
    Rewards, https://arxiv.org/abs/2402.05369
  """
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = -jax.nn.log_sigmoid(chosen) - 0.5 * (
    jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
  )
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def bco_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  shift=0.0,
) -> tuple[Array, Metrics]:
  """BCO on pairs: a classifier of good and bad answers whose logit is the reward.

      loss = sum(weights * (-log sigmoid(chosen - shift) - log sigmoid(-(rejected - shift))))

  with the rewards `chosen` and `rejected`. At the reference that is two coin flips, 2 log 2:

  >>> zero = jnp.zeros(1)
  >>> round(float(bco_loss(zero, zero, zero, zero, jnp.ones(1))[0]), 3)
  1.386

  The shift tightens the bound on DPO's loss. The paper uses the running mean of all rewards, see
  `bco_shift`; pairwise trainers leave it at 0.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    shift: [] or [B] float, the reward of an answer that is neither good nor bad; a constant.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`, of rewards without shift.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Jung et al., 2024, Binary Classifier Optimization for Large Language Model Alignment,
    https://arxiv.org/abs/2404.04656
  """
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  shift = _checks.per_row("shift", shift, mask)
  per_pair = -jax.nn.log_sigmoid(chosen - shift) - jax.nn.log_sigmoid(shift - rejected)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def sppo_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """SPPO with hard labels: pull each answer's log-ratio to its own target.

      loss = sum(weights * ((chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2))

  with `chosen` and `rejected` the log-ratios to the reference, in nats. In self-play, the
  probability of an answer that wins against the policy with probability P should grow by the factor
  exp((P - 1/2) / beta); with certain labels P is 1 or 0. Unlike in IPO, moving both answers down
  together is penalised. At the reference, with beta 1/2, both targets are 1 nat away:

  >>> zero = jnp.zeros(1)
  >>> float(sppo_loss(zero, zero, zero, zero, jnp.ones(1), beta=0.5)[0])
  2.0

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; here the policy of the last iteration; a
      constant.
    ref_rejected_logprobs: [B] float, the same of the rejected answers; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: sets the targets, > 0; the paper's 1 / eta.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Wu et al., 2024, Self-Play Preference Optimization, https://arxiv.org/abs/2405.00675
  """
  (chosen, rejected), weights, mask = _log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  target = 1 / (2 * beta)
  per_pair = jnp.square(chosen - target) + jnp.square(rejected + target)
  return jnp.sum(weights * per_pair), pair_metrics(beta * chosen, beta * rejected, mask)


def apo_zero_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """APO-zero: chosen answers up, rejected answers down, each anchored at the reference.

      loss = sum(weights * (1 - sigmoid(chosen) + sigmoid(rejected)))

  with the rewards `chosen` and `rejected`. Use it if the chosen answers are better than what the
  policy writes; if they are worse, use `apo_down_loss`. At the reference it is 1:

  >>> zero = jnp.zeros(1)
  >>> float(apo_zero_loss(zero, zero, zero, zero, jnp.ones(1))[0])
  1.0

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

  Reference: D'Oosterlinck et al., 2024, Anchored Preference Optimization,
    https://arxiv.org/abs/2408.06266
  """
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def apo_down_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
) -> tuple[Array, Metrics]:
  """APO-down: both answers down, the rejected one further.

      loss = sum(weights * (sigmoid(chosen) + 1 - sigmoid(chosen - rejected)))

  with the rewards `chosen` and `rejected`. When the policy already writes better than the data,
  even the chosen answers should become less likely: only their order is worth learning. At the
  reference it is 1:

  >>> zero = jnp.zeros(1)
  >>> float(apo_down_loss(zero, zero, zero, zero, jnp.ones(1))[0])
  1.0

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

  Reference: D'Oosterlinck et al., 2024, Anchored Preference Optimization,
    https://arxiv.org/abs/2408.06266
  """
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  per_pair = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def discopop_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  temperature=0.05,
) -> tuple[Array, Metrics]:
  """DiscoPOP: logistic for pairs in the wrong order, exponential for pairs in the right one.

      s    = sigmoid(margin / temperature)
      loss = sum(weights * ((1 - s) * -log sigmoid(margin) + s * exp(-margin)))

  A language model found this form by proposing losses and reading their results. At the reference
  s is 1/2: (log 2 + 1) / 2 = 0.847.

  >>> zero = jnp.zeros(1)
  >>> round(float(discopop_loss(zero, zero, zero, zero, jnp.ones(1))[0]), 3)
  0.847

  It is not convex: around margin 0 it *rises* with the margin, so a pair must be pushed over a
  small hill.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    temperature: the width of the transition between the two forms, in units of reward, > 0.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`. The logarithm of
    s * exp(-margin) is limited to +-20.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference.

  Reference: Lu et al., 2024, Discovering Preference Optimization Algorithms with and for Large
    Language Models, https://arxiv.org/abs/2406.08414
  """
  check_above("temperature", temperature, 0)
  (chosen, rejected), weights, mask = _rewards(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  margin = chosen - rejected
  logistic = jax.nn.sigmoid(-margin / temperature) * -jax.nn.log_sigmoid(margin)
  # s * exp(-margin) in one exponential, as s vanishes faster than exp(-margin) grows.
  exponential = _checks.ratio_of(jax.nn.log_sigmoid(margin / temperature) - margin)
  return jnp.sum(weights * (logistic + exponential)), pair_metrics(chosen, rejected, mask)


@any_mesh
def aot_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=0.0,
) -> tuple[Array, Metrics]:
  """AOT for pairs: raises the distribution of the policy's margins above the reference's.

      policy_i    = the i-th smallest of chosen - rejected          over the batch, in nats
      reference_i = the i-th smallest of ref chosen - ref rejected
      loss        = sum(weights * -log sigmoid(beta * (policy_i - reference_i)))

  DPO asks each pair for more than its own reference margin. Comparing quantiles asks less of any
  one pair and more of the whole: the worst margin should beat the reference's worst margin, and so
  on upwards. Margins (2, 1) and (1, 2) are equal once sorted, so the loss is log 2:

  >>> zero = jnp.zeros(2)
  >>> loss, _ = aot_loss(jnp.array([2.0, 1.0]), zero, jnp.array([1.0, 2.0]), zero, jnp.ones(2) / 2)
  >>> round(float(loss), 3)
  0.693

  Sorting couples the batch: microbatches sort among fewer rows and do *not* add up to the whole, so
  use one (`losses.BATCH_COUPLED` names such losses). Weights should be equal, or 0 for rows that do
  not count; where they differ, the weight is that of the row with the policy's margin.

  Args:
    chosen_logprobs: [B] float, as in `dpo_loss`.
    rejected_logprobs: [B] float, as in `dpo_loss`.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each pair counts; a constant.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: as in `dpo_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`, of pairs as given.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs, reference, unsplit batch.

  Reference: Melnyk et al., 2024, Distributional Preference Alignment of LLMs via Optimal Transport,
    https://arxiv.org/abs/2406.05882
  """
  check_between("label_smoothing", label_smoothing, 0, 1)
  logprobs, reference, weights, mask = _pairs(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  difference, order = _sorted_difference(
    logprobs[0] - logprobs[1], reference[0] - reference[1], mask
  )
  per_pair = _smoothed_logistic(beta * difference, label_smoothing)
  chosen, rejected = (beta * (x - ref) for x, ref in zip(logprobs, reference, strict=True))
  return jnp.sum(weights[order] * per_pair), pair_metrics(chosen, rejected, mask)


@any_mesh
def aot_unpaired_loss(
  chosen_logprobs,
  rejected_logprobs,
  ref_chosen_logprobs,
  ref_rejected_logprobs,
  weights,
  *,
  beta=0.1,
  label_smoothing=0.0,
) -> tuple[Array, Metrics]:
  """AOT without pairs: raises the distribution of good answers' rewards above bad ones'.

      chosen_i   = the i-th smallest of chosen - ref chosen          over the batch, in nats
      rejected_i = the i-th smallest of rejected - ref rejected
      loss       = sum(weights * -log sigmoid(beta * (chosen_i - rejected_i)))

  Good and bad answers may belong to different prompts: only the two sorted lists are compared. Good
  log-ratios (0, 3) and bad ones (2, 1), with beta 1, compare 0 with 1 and 3 with 2:

  >>> zero = jnp.zeros(2)
  >>> loss, _ = aot_unpaired_loss(
  ...   jnp.array([0.0, 3.0]), jnp.array([2.0, 1.0]), zero, zero, jnp.array([1.0, 1.0]), beta=1.0)
  >>> round(float(loss - jnp.log1p(jnp.exp(1.0)) - jnp.log1p(jnp.exp(-1.0))), 3)
  0.0

  Sorting couples the batch, as in `aot_loss`: use one microbatch.

  Args:
    chosen_logprobs: [B] float, log-probs of B good answers, as in `dpo_loss`.
    rejected_logprobs: [B] float, of B bad answers, to any prompts.
    ref_chosen_logprobs: [B] float, as in `dpo_loss`; a constant.
    ref_rejected_logprobs: [B] float, as in `dpo_loss`; a constant.
    weights: [B] float, how much each row counts; a constant. A row of weight 0 leaves out both of
      its answers; where weights differ, that of the row with the good answer counts.
    beta: reward per nat of log-ratio, > 0.
    label_smoothing: as in `dpo_loss`.

  Returns:
    The scalar loss, at least float32, and the metrics of `dpo_loss`, of rows as given.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: labels, reference, unsplit batch.

  Reference: Melnyk et al., 2024, Distributional Preference Alignment of LLMs via Optimal Transport,
    https://arxiv.org/abs/2406.05882
  """
  check_between("label_smoothing", label_smoothing, 0, 1)
  (chosen, rejected), weights, mask = _log_ratios(
    chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, beta
  )
  difference, order = _sorted_difference(chosen, rejected, mask)
  per_pair = _smoothed_logistic(beta * difference, label_smoothing)
  metrics = pair_metrics(beta * chosen, beta * rejected, mask)
  return jnp.sum(weights[order] * per_pair), metrics


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


def pair_metrics(chosen, rejected, mask) -> Metrics:
  """The metrics of every loss over pairs, from rewards [B] and the pairs that count [B] bool."""
  return {
    "accuracy": _checks.metric(chosen > rejected, mask),
    "margin": _checks.metric(chosen - rejected, mask),
    "chosen_reward": _checks.metric(chosen, mask),
    "rejected_reward": _checks.metric(rejected, mask),
  }


def _pairs(chosen, rejected, ref_chosen, ref_rejected, weights, beta):
  """Checked and masked: (chosen, rejected), (ref chosen, ref rejected), weights, mask."""
  check_above("beta", beta, 0)
  name, like = "chosen_logprobs", chosen
  chosen, weights, mask = _checks.rows(name, chosen, weights)
  rejected = _checks.trained("rejected_logprobs", rejected, name, like, mask)
  ref_chosen = _checks.constant("ref_chosen_logprobs", ref_chosen, name, like, mask)
  ref_rejected = _checks.constant("ref_rejected_logprobs", ref_rejected, name, like, mask)
  return (chosen, rejected), (ref_chosen, ref_rejected), weights, mask


def _log_ratios(*pairs_weights_beta):
  """((chosen, rejected) log-ratios to the reference in nats, 0 outside the mask), weights, mask."""
  (chosen, rejected), (ref_chosen, ref_rejected), weights, mask = _pairs(*pairs_weights_beta)
  return (chosen - ref_chosen, rejected - ref_rejected), weights, mask


def _rewards(*pairs_weights_beta):
  """`_log_ratios`, times beta."""
  (chosen, rejected), weights, mask = _log_ratios(*pairs_weights_beta)
  beta = pairs_weights_beta[-1]
  return (beta * chosen, beta * rejected), weights, mask


def _smoothed_logistic(margin, label_smoothing):
  """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin), as one softplus and a line."""
  return label_smoothing * margin - jax.nn.log_sigmoid(margin)


def _sorted_difference(x, y, mask):
  """Sorts the members of x and of y, and subtracts: [B], 0 beyond them; and the order of x."""
  # Members first; among them a nan is last, where it is seen.
  order, others = (jnp.lexsort((values, ~mask)) for values in (x, y))
  return jnp.where(mask[order], x[order] - y[others], 0), order
