"""Preference losses on pairs that need no reference: half the memory, and no second forward pass.

Without a reference nothing anchors the policy to where it started, so each of these losses keeps
its likelihoods up by other means: a likelihood term (CPO, ORPO) or a margin per token (SimPO).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import LOG_RATIO_LIMIT, Array, Metrics, check_above, check_between
from rl_llm.losses import _checks
from rl_llm.losses._pairs import pair_metrics

# The odds of a probability of 1 are infinite; above this log-prob (p = 0.999999) ORPO's stay put.
LOGPROB_LIMIT = -1e-6


def orpo_loss(chosen_logprobs, rejected_logprobs, weights, *, beta=0.1) -> tuple[Array, Metrics]:
  """ORPO: learn the chosen answers, and in the same step prefer them by their odds.

      log_odds = logprob - log(1 - exp(logprob))          of an answer's average token
      loss     = sum(weights * (-chosen_logprobs
                                - beta * log sigmoid(chosen log_odds - rejected log_odds)))

  Fine-tuning on chosen answers makes rejected ones likelier too, as they are similar. The second
  term undoes that, so no fine-tuning stage is needed first. Probabilities 3/4 and 1/2 have odds 3
  and 1: with beta 1, the likelihood term is log(4/3), and the odds term is the same:

  >>> chosen, rejected = jnp.log(jnp.array([0.75])), jnp.log(jnp.array([0.5]))
  >>> loss, _ = orpo_loss(chosen, rejected, jnp.ones(1), beta=1.0)
  >>> round(float(loss / jnp.log(4 / 3)), 3)
  2.0

  Odds differ from probabilities only near 1, and a whole answer's probability is near 0, hence the
  averages. Some systems pass sums, for which the odds ratio is the ratio of probabilities.
  Log-probs above -1e-6 get the odds of -1e-6, so that their gradient stays finite.

  Args:
    chosen_logprobs: [B] float, average log-probs per token of the chosen answers under the policy
      being trained, in nats: `logprobs.sequence_logprobs(..., average=True)`.
    rejected_logprobs: [B] float, the same of the rejected answers.
    weights: [B] float, how much each pair counts, usually 1 / B; a constant.
    beta: factor of the odds term, > 0; the paper's lambda.

  Returns:
    The scalar loss, at least float32, and metrics {"accuracy", "margin", "chosen_reward",
    "rejected_reward"}, of beta times the log-probs, and {"log_odds_ratio"}.

  Raises:
    ValueError: shapes differ, a dtype is not float, or `beta` is not above 0; the message names the
      argument.

  Needs: pairs.

  Reference: Hong et al., 2024, ORPO: Monolithic Preference Optimization without Reference Model,
    https://arxiv.org/abs/2403.07691
  """
  chosen, rejected, weights, mask = _pair(chosen_logprobs, rejected_logprobs, weights, beta)
  ratio = _log_odds(chosen) - _log_odds(rejected)
  per_pair = -chosen - beta * jax.nn.log_sigmoid(ratio)
  metrics = pair_metrics(beta * chosen, beta * rejected, mask)
  return jnp.sum(weights * per_pair), metrics | {"log_odds_ratio": _checks.metric(ratio, mask)}


def simpo_loss(
  chosen_logprobs, rejected_logprobs, weights, *, beta=2.0, gamma=1.0
) -> tuple[Array, Metrics]:
  """SimPO: the average log-prob is the reward, and must win by a margin.

      reward = beta * average log-prob per token
      loss   = sum(weights * -log sigmoid(chosen reward - rejected reward - gamma))

  Generation follows the likelihood per token, but DPO's reward does not: an answer may have the
  higher reward and yet be less likely. Here both are the same, and no length is favoured. With
  probabilities e^-1 and e^-1.5 per token and beta 2, the win is exactly gamma 1: log 2.

  >>> loss, _ = simpo_loss(jnp.array([-1.0]), jnp.array([-1.5]), jnp.ones(1))
  >>> round(float(loss), 3)
  0.693

  Also written with beta * (difference - gamma / beta): gamma / beta is the margin in nats per
  token, 1/2 here. Some trainers add a likelihood term by default: see `sft_loss`.

  Args:
    chosen_logprobs: [B] float, average log-probs per token of the chosen answers under the policy
      being trained, in nats: `logprobs.sequence_logprobs(..., average=True)`.
    rejected_logprobs: [B] float, the same of the rejected answers.
    weights: [B] float, how much each pair counts, usually 1 / B; a constant.
    beta: reward per nat, > 0; larger than DPO's, since averages are smaller than sums.
    gamma: the reward by which a chosen answer must win; 0 or more.

  Returns:
    The scalar loss, at least float32, and metrics {"accuracy", "margin", "chosen_reward",
    "rejected_reward"} per pair, unweighted.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs.

  Reference: Meng et al., 2024, SimPO, https://arxiv.org/abs/2405.14734
  """
  check_between("gamma", gamma, 0, float("inf"))
  chosen, rejected, weights, mask = _pair(chosen_logprobs, rejected_logprobs, weights, beta)
  per_pair = -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)
  return jnp.sum(weights * per_pair), pair_metrics(beta * chosen, beta * rejected, mask)


def alphapo_loss(
  chosen_logprobs, rejected_logprobs, weights, *, beta=2.5, gamma=0.1, alpha=0.25
) -> tuple[Array, Metrics]:
  """AlphaPO: SimPO with a reward that bends, so that likely answers gain less than unlikely lose.

      reward = beta * (1 - exp(-alpha * average log-prob per token)) / alpha
      loss   = sum(weights * -log sigmoid(chosen reward - rejected reward - gamma))

  A margin can grow while both answers become less likely. With `alpha` above 0 the reward of an
  answer falls faster the less likely the answer is, so once the rejected one is rare, what counts
  is that the chosen one is not; below 0 it is the other way round, and 0 is SimPO. Of an average
  token with probability 1/2 and `alpha` 1 the reward is 1 - 2 = -1, and of one with 1/4 it is -3,
  where SimPO's are -0.69 and -1.39. So with beta 1 the chosen answer leads by 2:

  >>> chosen, rejected = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
  >>> loss, metrics = alphapo_loss(
  ...   chosen, rejected, jnp.ones(1), beta=1.0, gamma=0.0, alpha=1.0)
  >>> float(metrics["margin"][0]), round(float(loss), 3)  # log(1 + e^-2)
  (2.0, 0.127)

  Args:
    chosen_logprobs: [B] float, average log-probs per token of the chosen answers under the policy
      being trained, in nats: `logprobs.sequence_logprobs(..., average=True)`.
    rejected_logprobs: [B] float, the same of the rejected answers.
    weights: [B] float, how much each pair counts, usually 1 / B; a constant.
    beta: reward per nat of a certain answer, > 0.
    gamma: the reward by which a chosen answer must win; 0 or more.
    alpha: how much the reward bends; any number.

  Returns:
    The scalar loss, at least float32, and metrics {"accuracy", "margin", "chosen_reward",
    "rejected_reward"} per pair, unweighted. alpha times a log-prob is limited to +-20; an answer
    beyond has no gradient.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs.

  Reference: Gupta et al., 2025, AlphaPO: Reward Shape Matters for LLM Alignment,
    https://arxiv.org/abs/2501.03884
  """
  check_between("gamma", gamma, 0, float("inf"))
  chosen, rejected, weights, mask = _pair(chosen_logprobs, rejected_logprobs, weights, beta)
  chosen, rejected = beta * _bent(chosen, alpha), beta * _bent(rejected, alpha)
  per_pair = -jax.nn.log_sigmoid(chosen - rejected - gamma)
  return jnp.sum(weights * per_pair), pair_metrics(chosen, rejected, mask)


def cpo_loss(
  chosen_logprobs, rejected_logprobs, weights, *, beta=0.1, nll_coef=1.0
) -> tuple[Array, Metrics]:
  """CPO: DPO with a uniform reference, plus a likelihood term that holds up the chosen answer.

      loss = sum(weights * (-log sigmoid(beta * (chosen_logprobs - rejected_logprobs))
                            - nll_coef * chosen_logprobs))

  Without a reference, lowering the rejected answer is the cheapest way to a margin; the likelihood
  term stops the chosen one from falling with it. Two answers of probability 1/2 give log 2 for the
  coin flip and log 2 for the likelihood:

  >>> half = jnp.log(jnp.array([0.5]))
  >>> loss, _ = cpo_loss(half, half, jnp.ones(1))
  >>> round(float(loss / jnp.log(2)), 3)
  2.0

  The paper's likelihood is that of the whole answer. Trainers often take the mean over tokens
  instead: set `nll_coef` to 0 and add `sft_loss` with token weights.

  Args:
    chosen_logprobs: [B] float, log-probs of the chosen answers under the policy being trained, in
      nats: sums from `logprobs.sequence_logprobs`.
    rejected_logprobs: [B] float, the same of the rejected answers.
    weights: [B] float, how much each pair counts, usually 1 / B; a constant.
    beta: reward per nat, > 0.
    nll_coef: factor of the likelihood term, 0 or more.

  Returns:
    The scalar loss, at least float32, and metrics {"accuracy", "margin", "chosen_reward",
    "rejected_reward"}, of beta times the log-probs.

  Raises:
    ValueError: shapes differ, a dtype is not float, or a number is out of range; the message names
      the argument.

  Needs: pairs.

  Reference: Xu et al., 2024, Contrastive Preference Optimization, https://arxiv.org/abs/2401.08417
  """
  check_between("nll_coef", nll_coef, 0, float("inf"))
  chosen, rejected, weights, mask = _pair(chosen_logprobs, rejected_logprobs, weights, beta)
  per_pair = -jax.nn.log_sigmoid(beta * (chosen - rejected)) - nll_coef * chosen
  return jnp.sum(weights * per_pair), pair_metrics(beta * chosen, beta * rejected, mask)


def _pair(chosen_logprobs, rejected_logprobs, weights, beta):
  """Checked and masked: chosen, rejected, weights, mask."""
  check_above("beta", beta, 0)
  chosen, weights, mask = _checks.rows("chosen_logprobs", chosen_logprobs, weights)
  rejected = _checks.trained(
    "rejected_logprobs", rejected_logprobs, "chosen_logprobs", chosen_logprobs, mask
  )
  return chosen, rejected, weights, mask


def _log_odds(logprobs):
  logprobs = jnp.minimum(logprobs, LOGPROB_LIMIT)
  return logprobs - jax.nn.log1mexp(-logprobs)


def _bent(logprobs, alpha):
  """(1 - exp(-alpha * logprobs)) / alpha; the log-probs themselves where alpha is 0."""
  alpha = jnp.asarray(alpha, logprobs.dtype)
  straight = alpha == 0
  alpha = jnp.where(straight, 1, alpha)
  bent = -jnp.expm1(jnp.clip(-alpha * logprobs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) / alpha
  return jnp.where(straight, logprobs, bent)
