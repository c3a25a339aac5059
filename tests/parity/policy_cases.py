"""Policy gradients, KL, entropy and value, as verl and TRL aggregate them."""

import functools

import jax
import jax.numpy as jnp

from rl_llm import kl, losses, presets, weighting
from rl_llm.logprobs import entropy, sequence_logprobs
from tests.parity import inputs as x
from tests.parity.case import Case

# Weights are functions of the mask, called while a case is traced: eager, each would be compiled
# alone.
TOKEN, SEQUENCE = weighting.token_mean, weighting.sequence_mean
ALL_ROWS = functools.partial(SEQUENCE, count_empty=True)
NINTH = functools.partial(weighting.constant_length, length=9)
CASES = []


def policy(
  system,
  golden,
  loss,
  weights,
  *,
  given=x.ADVANTAGES,
  rows=slice(None),
  factors=1.0,
  extra=None,
  value=True,
  trained=x.LOGPROBS,
  **keywords,
):
  """A policy-gradient loss on some rows, `extra(logprobs)` being added to it."""
  keywords |= {"mask": x.MASK[rows]} if loss is not losses.reinforce_loss else {}
  past = () if loss is losses.reinforce_loss else (x.OLD[rows],)

  def f(logprobs):
    w = weights(x.MASK) * (factors() if callable(factors) else factors)
    total = loss(logprobs, *past, given[rows], w[rows], **keywords)[0]
    return total if extra is None else total + extra(logprobs)

  CASES.append(Case(loss.__name__, system, golden, f, ("logprobs", trained[rows]), value=value))


def recipe(name):
  """The keywords of a preset's loss, and its weights."""
  made = presets.grpo(name)
  keywords = {k: v for k, v in made.loss.items() if k != "name"}
  return keywords, getattr(weighting, made.weighting["name"])


VERL, VERL_WEIGHTS = recipe("verl")
TRL, TRL_WEIGHTS = recipe("trl")
PPO = functools.partial(policy, "verl", loss=losses.ppo_loss)
PPO("ppo token_mean", weights=VERL_WEIGHTS, **VERL)
# `clip_ratio` is not read, as `clip_ratio_low` and `clip_ratio_high` have defaults of their own.
PPO("ppo clip_ratio 0.01", weights=VERL_WEIGHTS, **VERL)
PPO("ppo sequence_mean", weights=SEQUENCE, **VERL)
PPO("ppo sequence_sum", weights=weighting.sequence_sum, **VERL)
PPO("ppo constant_length", weights=NINTH, **VERL)
PPO("ppo clip-higher, factors", weights=TOKEN, factors=x.FACTORS, **VERL | {"clip_high": 0.28})
PPO(
  "ppo dual clip 1.5, token advantages",
  weights=TOKEN,
  given=x.TOKEN_ADVANTAGES,
  **VERL | {"dual_clip": 1.5},
)
for i in (0, 2, 4):
  PPO(f"ppo rows {i}", weights=TOKEN, rows=slice(i, i + 2), **VERL)
  PPO(f"ppo sequence_mean rows {i}", weights=SEQUENCE, rows=slice(i, i + 2), **VERL)
# verl's value is that of -A * min(ratio, c) * logprob with a constant ratio.
policy(
  "verl",
  "dppo_tv",
  losses.dppo_tv_loss,
  TOKEN,
  given=x.TOKEN_ADVANTAGES,
  value=False,
  threshold_low=0.2,
  threshold_high=0.2,
  ratio_cap=3.0,
)
policy(
  "verl",
  "dppo_tv cap 1.1, factors",
  losses.dppo_tv_loss,
  TOKEN,
  factors=x.FACTORS,
  value=False,
  threshold_low=0.2,
  threshold_high=0.2,
  ratio_cap=1.1,
)
policy(
  "verl",
  "dppo_kl",
  losses.dppo_kl_loss,
  TOKEN,
  given=x.TOKEN_ADVANTAGES,
  value=False,
  threshold_low=0.05,
  threshold_high=0.03,
  ratio_cap=3.0,
)
policy("verl", "gspo", losses.gspo_loss, SEQUENCE, clip_low=0.2, clip_high=0.2)
policy("verl", "gspo", losses.gspo_token_loss, SEQUENCE, clip_low=0.2, clip_high=0.2)
policy(
  "verl",
  "gspo factors",
  losses.gspo_token_loss,
  TOKEN,
  factors=x.FACTORS,
  clip_low=0.05,
  clip_high=0.1,
)
policy("verl", "sapo", losses.sapo_loss, SEQUENCE)
policy("verl", "gpg", losses.reinforce_loss, TOKEN, factors=x.FACTORS)
policy("verl", "gmpo", losses.gmpo_loss, ALL_ROWS, clip_low=0.2, clip_high=0.2)
policy("verl", "gmpo clip 0.4", losses.gmpo_loss, ALL_ROWS)
policy("verl", "dro", losses.dro_loss, TOKEN, beta=0.3)
policy("verl", "cispo", losses.cispo_loss, TOKEN, low=0.8, high=1.2)
policy("verl", "cispo factors", losses.cispo_loss, TOKEN, factors=x.FACTORS, low=0.0, high=1.5)
policy(
  "verl",
  "reinforce token_mean",
  losses.reinforce_loss,
  TOKEN,
  given=x.TOKEN_ADVANTAGES,
  factors=x.FACTORS,
)
policy(
  "verl",
  "reinforce sequence_mean",
  losses.reinforce_loss,
  SEQUENCE,
  given=x.TOKEN_ADVANTAGES,
  factors=x.FACTORS,
)


# Both select on the whole batch, from the log-probs as they are. The key plays no part, as every
# candidate fits into the selection.
def selected(name):
  covariance = losses.token_covariance(x.LOGPROBS, x.TOKEN_ADVANTAGES, x.MASK)
  if name == "kl_cov":
    return losses.kl_cov_mask(covariance, x.MASK, fraction=0.2)
  return losses.clip_cov_mask(
    jax.random.key(0),
    covariance,
    x.MASK,
    fraction=1.0,
    low=0.1,
    high=0.5,
    clipped=losses.ppo_clipped(x.LOGPROBS, x.OLD, x.TOKEN_ADVANTAGES, x.MASK),
  )


def covariance(name, loss, **keywords):
  CASES.append(
    Case(
      loss.__name__,
      "verl",
      name,
      lambda logprobs: loss(
        logprobs, x.OLD, x.TOKEN_ADVANTAGES, selected(name), TOKEN(x.MASK), **keywords
      )[0],
      ("logprobs", x.LOGPROBS),
    )
  )


covariance("clip_cov", losses.clip_cov_loss)
covariance("kl_cov", losses.kl_cov_loss, coef=0.7)

GRPO = functools.partial(policy, "trl", loss=losses.grpo_loss)
GRPO("dapo", weights=TRL_WEIGHTS, **TRL)
GRPO("bnpo", weights=TRL_WEIGHTS, **TRL)
GRPO("dapo clip-higher, factors", weights=TOKEN, factors=x.FACTORS, clip_high=0.28)
GRPO("dapo delta 1.5", weights=TOKEN, delta=1.5)
GRPO("grpo", weights=ALL_ROWS)
GRPO("dr_grpo", weights=functools.partial(NINTH, count_empty=True))
GRPO("dapo token advantages", weights=TOKEN, given=x.TOKEN_ADVANTAGES)
GRPO(
  "grpo kl 0.04",
  weights=ALL_ROWS,
  extra=lambda logprobs: 0.04 * losses.kl_loss(logprobs, x.REF, ALL_ROWS(x.MASK), gradient="k3")[0],
)
GRPO(
  "dapo ratio * kl 0.04",
  weights=TOKEN,
  extra=lambda logprobs: (
    0.04
    * losses.kl_loss(
      logprobs, x.REF, TOKEN(x.MASK), gradient="k3", ratio=jnp.exp(logprobs - x.OLD)
    )[0]
  ),
)
GRPO(
  "dapo entropy 0.01",
  weights=TOKEN,
  extra=lambda _: 0.01 * losses.entropy_loss(x.ENTROPIES, TOKEN(x.MASK))[0],
)
GRPO(
  "dapo top entropy 0.4",
  weights=TOKEN,
  factors=lambda: weighting.top_entropy(x.ENTROPIES, x.MASK, fraction=0.4),
)
GRPO(
  "dapo off-policy mask 0.05",
  weights=TOKEN,
  factors=lambda: weighting.off_policy_mask(
    x.LOGPROBS, x.SAMPLER, x.ADVANTAGES, x.MASK, threshold=0.05
  ),
)
policy("trl", "gspo", losses.gspo_loss, ALL_ROWS, clip_low=0.2, clip_high=0.2)
policy("trl", "gspo clip 0.05", losses.gspo_loss, TOKEN, clip_low=0.05, clip_high=0.1)
policy(
  "trl",
  "luspo",
  losses.gspo_loss,
  functools.partial(weighting.sequence_sum, count_empty=True),
  clip_low=0.2,
  clip_high=0.2,
)
policy("trl", "cispo", losses.cispo_loss, TOKEN, high=1.3)
policy("trl", "sapo", losses.sapo_loss, ALL_ROWS)
policy("trl", "vespo", losses.vespo_loss, TOKEN)
# TRL gives the row without tokens a ratio of 1, and so a loss of -A / B that has no gradient.
policy("trl", "gmpo", losses.gmpo_loss, ALL_ROWS, extra=lambda _: -x.ADVANTAGES[3] / x.B)


def rloo(logprobs, clip):
  sums, old = (sequence_logprobs(y, x.MASK)[:, None] for y in (logprobs, x.OLD))
  weights = jnp.full((x.B, 1), 1 / x.B)
  return losses.ppo_loss(sums, old, x.ADVANTAGES, weights, clip_low=clip, clip_high=clip)[0]


for name, clip in (("rloo", 0.2), ("rloo clip 0.5", 0.5)):
  CASES.append(
    Case("ppo_loss", "trl", name, functools.partial(rloo, clip=clip), ("logprobs", x.LOGPROBS))
  )


def term(system, golden, name, f, trained, array):
  CASES.append(Case(name, system, golden, f, (trained, array)))


for name, weights in (("token_mean", TOKEN), ("sequence_mean", SEQUENCE)):
  term(
    "verl",
    f"value {name}",
    "value_loss",
    lambda values, w=weights: losses.value_loss(
      values, x.OLD_VALUES, x.RETURNS, w(x.MASK), clip=0.5
    )[0],
    "values",
    x.VALUES,
  )
  term(
    "verl",
    f"entropy {name}",
    "entropy_loss",
    lambda logits, w=weights: -losses.entropy_loss(entropy(logits), w(x.MASK))[0],
    "logits",
    x.LOGITS,
  )
term(
  "trl",
  "dapo entropy 0.01",
  "entropy_loss",
  lambda entropies: (
    0.01 * losses.entropy_loss(entropies, TOKEN(x.MASK))[0]
    + losses.grpo_loss(x.LOGPROBS, x.OLD, x.ADVANTAGES, TOKEN(x.MASK))[0]
  ),
  "entropies",
  x.ENTROPIES,
)
for kind in ("k1", "k2", "k3", "k1+", "k3+"):
  CASES.append(
    Case(
      "kl_penalty",
      "verl",
      f"kl {kind}",
      lambda logprobs, kind=kind: kl.kl_penalty(
        logprobs, x.REF, value=kind[:2], gradient="k2" if "+" in kind else kind[:2]
      ),
      ("logprobs", x.LOGPROBS),
      where=x.MASK,
    )
  )
