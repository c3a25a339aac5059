"""Advantages, and the factors that correct for the sampler."""

import functools

import jax.numpy as jnp
import numpy as np

from rl_llm import advantages, kl, presets, weighting
from rl_llm.masked import whiten
from tests.parity import inputs as x
from tests.parity.case import Case

CASES = []


def constant(system, golden, function, f, *, per_row=False, where=x.MASK):
  """An advantage or factor; `per_row` ones are spread over their rows' tokens first."""
  spread = lambda: jnp.broadcast_to(jnp.reshape(f(), (-1, 1)), (x.B, x.T))  # noqa: E731
  CASES.append(Case(function.__name__, system, golden, spread if per_row else f, where=where))


ROW = functools.partial(constant, "verl", per_row=True)
VERL_ADVANTAGE = {k: v for k, v in presets.grpo("verl").advantage.items() if k != "name"}
TRL_ADVANTAGE = {k: v for k, v in presets.grpo("trl").advantage.items() if k != "name"}
GAE = functools.partial(
  advantages.gae, x.TOKEN_REWARDS, x.VALUES, x.MASK, discount=0.97, gae_lambda=0.9
)
group, rloo_of = advantages.group_relative, advantages.leave_one_out
ALONE = x.REWARDS.reshape(-1, 1)
constant("verl", "advantage gae whitened", advantages.gae, lambda: whiten(GAE()[0], x.MASK))
constant("verl", "advantage gae returns", advantages.gae, lambda: GAE()[1])
ROW("advantage group_relative", group, lambda: group(x.REWARDS, **VERL_ADVANTAGE))
ROW("advantage group_relative none", group, lambda: group(x.REWARDS, scale="none"))
ROW(
  "advantage group_relative, one response",
  group,
  lambda: group(ALONE, **VERL_ADVANTAGE | {"singleton": "raw"}),
)
ROW("advantage leave_one_out", rloo_of, lambda: rloo_of(x.REWARDS))
ROW(
  "advantage leave_one_out, one response",
  group,
  lambda: group(ALONE, scale="none", baseline="leave_one_out", singleton="raw"),
)
ROW("advantage leave_one_out vectorized, one response", rloo_of, lambda: rloo_of(ALONE))
constant(
  "verl",
  "advantage reinforce_plus_plus",
  advantages.reinforce_plus_plus,
  lambda: advantages.reinforce_plus_plus(x.TOKEN_REWARDS, x.MASK, discount=0.9),
)
constant(
  "verl",
  "advantage reinforce_plus_plus_baseline",
  advantages.reinforce_plus_plus_baseline,
  lambda: advantages.reinforce_plus_plus_baseline(x.REWARDS, x.MASK),
)
ROW(
  "advantage opo",
  advantages.opo,
  lambda: advantages.opo(x.REWARDS, x.MASK.sum(1).reshape(x.P, x.G)),
)
ROW("advantage gpg", advantages.gpg, lambda: advantages.gpg(x.REWARDS, alpha="nonzero"))
ROW("advantage remax", advantages.remax, lambda: advantages.remax(x.REWARDS, x.GREEDY))
for scale in ("std", "none"):
  ROW(
    f"advantage pass_at_k {scale}",
    advantages.pass_at_k,
    lambda scale=scale: advantages.pass_at_k(x.REWARDS, scale=scale),
  )
BOTH = np.stack([x.REWARDS, x.MORE_REWARDS], axis=-1)


def gdpo_over_tokens():
  """verl whitens over all tokens, TRL over responses."""
  rows = advantages.gdpo(BOTH, np.array([1.0, 0.5])).reshape(-1, 1)
  return whiten(jnp.broadcast_to(rows, (x.B, x.T)), jnp.ones((x.B, x.T), bool))


constant("verl", "advantage gdpo", advantages.gdpo, gdpo_over_tokens, where=True)


def token_baseline(singleton):
  returns = advantages.discounted_returns(x.TOKEN_REWARDS, x.MASK)
  return advantages.optimal_token_baseline(
    returns, x.OLD, x.SUM_SQUARES, x.MASK, group_size=x.G, singleton=singleton
  )


# With a tool's tokens inside a response, verl's end of the longest one begins elsewhere.
NO_HOLE = x.MASK & (np.arange(x.B) >= x.G)[:, None]
OTB = functools.partial(constant, "verl", function=advantages.optimal_token_baseline)
OTB("advantage optimal_token_baseline", f=lambda: token_baseline("raw"), where=NO_HOLE)
OTB("advantage optimal_token_baseline, tail kept", f=lambda: token_baseline("zero"))
OTB(
  "advantage optimal_token_baseline multi-turn, tail kept",
  f=lambda: token_baseline("zero"),
  where=NO_HOLE,
)
constant(
  "verl",
  "advantage token_rewards",
  advantages.token_rewards,
  lambda: advantages.token_rewards(
    x.REWARDS.reshape(-1), x.MASK, kl=kl.k1(x.OLD, x.REF), kl_coef=0.05
  ),
)

ROW = functools.partial(constant, "trl", per_row=True)
VALID = np.arange(x.B).reshape(x.P, x.G) != 1
FAILED = np.where(VALID, x.REWARDS, np.nan)
ROW("advantage group_relative", group, lambda: group(x.REWARDS, **TRL_ADVANTAGE))
ROW("advantage group_relative none", group, lambda: group(x.REWARDS, scale="none"))
ROW(
  "advantage group_relative batch",
  group,
  lambda: group(x.REWARDS, **TRL_ADVANTAGE | {"scale": "batch"}),
)
ROW(
  "advantage group_relative, one failed", group, lambda: group(FAILED, where=VALID, **TRL_ADVANTAGE)
)
ROW(
  "advantage gdpo", advantages.gdpo, lambda: advantages.gdpo(BOTH, np.array([1.0, 0.5]), eps=1e-4)
)
ROW("advantage leave_one_out", rloo_of, lambda: rloo_of(x.REWARDS))
ROW("advantage leave_one_out, one failed", rloo_of, lambda: rloo_of(FAILED, where=VALID))

for system, golden, keywords in (
  ("verl", "importance token", {"high": 1.5}),
  ("verl", "importance sequence", {"level": "sequence"}),
  ("verl", "importance icepop", {"mode": "mask", "low": 0.7, "high": 1.4}),
  # verl's bounds 0.8 and 1.6 are of 1 / w.
  ("verl", "rejection token", {"mode": "reject", "low": 1 / 1.6, "high": 1 / 0.8}),
  (
    "verl",
    "rejection geometric",
    {"level": "geometric", "mode": "reject", "low": 1 / 1.6, "high": 1 / 0.8},
  ),
  (
    "verl",
    "rejection sequence",
    {"level": "sequence", "mode": "reject", "low": 1 / 1.6, "high": 1 / 0.8},
  ),
  ("trl", "importance token_truncate", {"high": 1.5}),
  ("trl", "importance sequence_truncate", {"level": "sequence", "low": 0.5}),
  ("trl", "importance token_mask", {"mode": "mask", "low": 0.7, "high": 1.4}),
  ("trl", "importance sequence_mask", {"level": "sequence", "mode": "mask", "high": 3.0}),
):
  constant(
    system,
    golden,
    weighting.truncated_importance,
    functools.partial(weighting.truncated_importance, x.OLD, x.SAMPLER, x.MASK, **keywords),
  )

for kind in ("seq_max_k3", "seq_max_k2", "seq_mean_k3"):
  constant(
    "verl",
    f"trust region {kind}",
    weighting.trust_region_mask,
    functools.partial(
      weighting.trust_region_mask,
      x.OLD,
      x.SAMPLER,
      x.MASK,
      threshold=0.15,
      statistic=kind.split("_")[1],
      estimator=kind.split("_")[2],
    ),
  )
