"""Preference losses, reward model and distillation, as TRL has them: means over pairs or tokens."""

import functools

import jax.numpy as jnp
import numpy as np

from rl_llm import losses, weighting
from rl_llm.logprobs import sequence_logprobs
from tests.parity import inputs as x
from tests.parity.case import Case

CASES = []
WEIGHTS = np.full(x.PAIRS, 1 / x.PAIRS, np.float32)
HALVES = slice(0, x.PAIRS), slice(x.PAIRS, None)


def answers(logprobs, *, average=False):
  """Log-probs [PAIRS] of the chosen and of the rejected answers."""
  per_answer = sequence_logprobs(logprobs, x.PAIR_MASK, average=average)
  return [per_answer[half] for half in HALVES]


def pairs(golden, loss, *, average=False, reference=x.PAIR_REF, weights=WEIGHTS, **keywords):
  """A loss over pairs; `reference` None is for losses without one."""

  def f(logprobs):
    past = [] if reference is None else answers(reference, average=average)
    w = weights() if callable(weights) else weights
    return loss(*answers(logprobs, average=average), *past, w, **keywords)[0]

  add(golden, loss, f)


def add(golden, loss, f, trained="pairs", array=x.PAIR_LOGPROBS):
  CASES.append(Case(loss.__name__, "trl", golden, f, (trained, array)))


pairs("dpo sigmoid", losses.dpo_loss)
pairs("dpo sigmoid_norm", losses.dpo_loss, average=True)
pairs("dpo hinge", losses.hinge_dpo_loss)
pairs("dpo hinge beta 1", losses.hinge_dpo_loss, beta=1.0)
pairs("dpo ipo", losses.ipo_loss, average=True)
pairs("dpo exo_pair", losses.exo_loss, label_smoothing=0.1)
pairs("dpo nca_pair", losses.nca_loss)
pairs("dpo robust", losses.robust_dpo_loss)
pairs("dpo bco_pair", losses.bco_loss)
pairs("dpo sppo_hard", losses.sppo_loss)
pairs("dpo aot", losses.aot_loss, label_smoothing=0.1)
pairs("dpo aot_unpaired", losses.aot_unpaired_loss, label_smoothing=0.1)
pairs("dpo apo_zero", losses.apo_zero_loss)
pairs("dpo apo_down", losses.apo_down_loss)
pairs("dpo discopop", losses.discopop_loss)
pairs("dpo forward_kl", losses.dpo_loss, divergence="forward_kl")
pairs("dpo js_divergence", losses.dpo_loss, divergence="js")
pairs("dpo alpha_divergence", losses.dpo_loss, divergence="alpha", alpha=0.5)


def aligned(log_sum_of_squares):
  """Averages of each token's log-prob minus the log of the sum of all squared probabilities."""
  return answers(x.PAIR_LOGPROBS - log_sum_of_squares, average=True)


pairs("dpo wpo", losses.dpo_loss, weights=lambda: losses.wpo_weights(*aligned(-0.2), WEIGHTS))
# Our weights end at 1, TRL's may exceed it.
pairs("dpo wpo above 1", losses.dpo_loss, weights=lambda: WEIGHTS * jnp.exp(sum(aligned(-0.7))))


def length_desensitized(logprobs):
  lengths = x.PAIR_MASK.sum(axis=1)
  shorter = jnp.tile(jnp.minimum(*(lengths[half] for half in HALVES)), 2)
  sums, past = (
    sequence_logprobs(y, x.PAIR_MASK, tail_weight=0.3, head_length=shorter)
    for y in (logprobs, x.PAIR_REF)
  )
  return losses.dpo_loss(*(y[half] for y in (sums, past) for half in HALVES), WEIGHTS)[0]


add("dpo ld 0.3", losses.dpo_loss, length_desensitized)

CHOSEN = x.PAIR_MASK[: x.PAIRS]
add(
  "dpo sft",
  losses.sft_loss,
  lambda logprobs: losses.sft_loss(logprobs[: x.PAIRS], weighting.token_mean(CHOSEN))[0],
)


def kto(logprobs, baseline):
  per_answer = (sequence_logprobs(y, x.PAIR_MASK) for y in (logprobs, x.PAIR_REF))
  weights = jnp.full(2 * x.PAIRS, 1 / (2 * x.PAIRS))
  return losses.kto_loss(*per_answer, x.DESIRABLE, baseline, weights, undesirable_weight=1.3)[0]


add("kto", losses.kto_loss, functools.partial(kto, baseline=x.Z0))
add("kto apo_zero_unpaired", losses.kto_loss, functools.partial(kto, baseline=0.0))

# TRL's likelihood term is another method's; ours is part of the loss, and taken out here.
add(
  "orpo odds ratio",
  losses.orpo_loss,
  lambda logprobs: (
    losses.orpo_loss(*answers(logprobs, average=True), WEIGHTS)[0]
    + jnp.mean(answers(logprobs, average=True)[0])
  ),
)
pairs("simpo", losses.simpo_loss, average=True, reference=None, gamma=0.5)
pairs("alphapo", losses.alphapo_loss, average=True, reference=None, beta=2.0, gamma=0.5)
pairs("cpo", losses.cpo_loss, reference=None, nll_coef=0.0)
pairs("cpo hinge", losses.hinge_dpo_loss, reference=np.zeros_like(x.PAIR_REF))
pairs("cpo ipo", losses.ipo_loss, average=True, reference=np.zeros_like(x.PAIR_REF))

add(
  "reward model",
  losses.reward_model_loss,
  lambda scores: losses.reward_model_loss(*scores, WEIGHTS)[0],
  "scores",
  x.SCORES,
)
add(
  "reward model margin",
  losses.reward_model_loss,
  lambda scores: losses.reward_model_loss(*scores, WEIGHTS, margin=x.MARGINS, center_coef=0.02)[0],
  "scores",
  x.SCORES,
)

for beta in (0.0, 0.1, 0.5, 1.0):
  add(
    f"gkd beta {beta}",
    losses.gkd_loss,
    lambda logits, beta=beta: losses.gkd_loss(
      logits, x.TEACHER_LOGITS, weighting.token_mean(x.MASK), beta=beta, temperature=0.9
    )[0],
    "logits",
    x.LOGITS,
  )

add(
  "dft",
  losses.dft_loss,
  lambda logprobs: losses.dft_loss(logprobs, weighting.token_mean(x.MASK))[0],
  "logprobs",
  x.LOGPROBS,
)


def astar_po(logprobs):
  sums, ref = (sequence_logprobs(y, x.MASK) for y in (logprobs, x.REF))
  advantages = x.REWARDS.reshape(-1) - 0.4
  return losses.astar_po_loss(sums, ref, advantages, np.full(x.B, 1 / x.B), beta=0.3)[0]


add("a*-po", losses.astar_po_loss, astar_po, "logprobs", x.LOGPROBS)
