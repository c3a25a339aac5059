"""Groups of flags of a policy gradient's further terms: what corrects, holds or stops its updates.

They are parts of `experiments.flags.Updates`, so every script that updates from responses has them.
What `--loss` and `--advantage` may name is not here: `POLICY_LOSSES` and `PREFERENCE_LOSSES` of
rl_llm/losses/__init__.py, `GROUP_ADVANTAGES` of rl_llm/advantages/group.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

from rl_llm.errors import ConfigError
from rl_llm.runs.config import option
from rl_llm.runs.keywords import chosen, settings
from rl_llm.training import trackers
from rl_llm.weighting import truncated_importance

# What a step of a whole population does not have: groups and fields that stay at their defaults.
ALONE = (
  *("overlong.", "dynamic.", "correction.", "llds.", "entropy.", "clip.", "weighting.top_entropy"),
  "weighting.shared_tokens",
  *("laps", "positive_nll_coef", "target_kl", "kl.place", "kl.refresh", "init_moments"),
  *("env", "tools"),
)


class Limits(NamedTuple):
  """What a correction is by default: keywords of `rl_llm.weighting.truncated_importance`."""

  level: str
  low: float
  high: float
  mode: str


CORRECTIONS = {
  "token": Limits("token", 0.0, 2.0, "truncate"),
  "sequence": Limits("sequence", 0.0, 2.0, "truncate"),
  "geometric": Limits("geometric", 0.999, 1.001, "reject"),
  "icepop": Limits("token", 0.5, 5.0, "mask"),
}


@dataclasses.dataclass(frozen=True)
class Correction:
  """What makes up for a sampler whose probabilities differ from the trainer's."""

  name: Literal["none", *CORRECTIONS] = option(  # type: ignore[valid-type]
    "none",
    "importance weights old / sampler of a token, or of a response by the product or the geometric "
    "mean of its tokens'; icepop = of a token, 0 outside the bounds",
  )
  low: float | None = option(
    None, "lower bound; none = 0, of geometric 0.999, of icepop 0.5", min=0
  )
  high: float | None = option(
    None, "upper bound; none = 2, of geometric 1.001, of icepop 5", above=0
  )
  mode: Literal["auto", "truncate", "mask", "reject"] = option(
    "auto",
    "outside the bounds: truncate = the bound, mask = 0, reject = 0 and else 1; auto = truncate, "
    "of geometric reject, of icepop mask",
  )
  off_policy_mask: float | None = option(
    None,
    "drop responses of negative advantage that the policy has left by more than this, in nats a "
    "token; none = drop none",
  )
  second_moment_mask: float | None = option(
    None, "drop the tokens of the largest squared log-ratio until its mean is at most this (M2PO)"
  )
  trust_region_mask: float | None = option(
    None, "drop responses one of whose tokens is further than this from the sampler, in nats"
  )

  def check(self, config: Any) -> None:
    """Refuses bounds without a correction, or in the wrong order."""
    for name in ("low", "high", "mode"):
      if self.name == "none" and getattr(self, name) != getattr(Correction(), name):
        allowed = "left out without --correction"
        raise ConfigError(f"correction.{name}", getattr(self, name), allowed)
    found = self.factors.get(truncated_importance.__name__, {"low": 0, "high": 1})
    if found["low"] >= found["high"]:
      raise ConfigError("correction.low", found["low"], f"below the upper bound, {found['high']}")

  @property
  def factors(self) -> dict[str, dict[str, Any]]:
    """Functions of `rl_llm.weighting` that compare the old policy with the sampler: keywords."""
    masks = ("second_moment_mask", "trust_region_mask")
    found = {name: {"threshold": getattr(self, name)} for name in masks}
    found = {name: given for name, given in found.items() if given["threshold"] is not None}
    if self.name == "none":
      return found
    own = {"low": self.low, "high": self.high, "mode": self.mode if self.mode != "auto" else None}
    given = {name: value for name, value in own.items() if value is not None}
    return {truncated_importance.__name__: CORRECTIONS[self.name]._asdict() | given} | found


@dataclasses.dataclass(frozen=True)
class Llds:
  """Holds up the likelihood of responses that were not bad; see `rl_llm.losses.llds_loss`."""

  coef: float = option(0.0, "factor of the term; the paper has 0.2; 0 = no such term", min=0)
  level: Literal["action", "token", "response"] = option(
    "action", "what has to fall as a whole before one of its tokens is held up"
  )
  normalizer: Literal["preserving", "all"] = option(
    "preserving", "tokens to average over: of responses not below average, or all"
  )

  def check(self, config: Any) -> None:
    """Refuses a term that is always 0."""
    if self.coef and config.updates.count < 2:
      allowed = "0 with one update a step, before which nothing has fallen"
      raise ConfigError("llds.coef", self.coef, allowed, "try --epochs=2")
    for name in ("level", "normalizer"):
      if not self.coef and getattr(self, name) != getattr(Llds(), name):
        raise ConfigError(f"llds.{name}", getattr(self, name), "left out without --llds.coef")


REINFORCE_PLUS_PLUS = "reinforce_plus_plus", "reinforce_plus_plus_baseline"
BASELINES = Literal[
  *("plain", "moving_average", "leave_one_out", "optimal_token_baseline"),
  *REINFORCE_PLUS_PLUS,
  *trackers.NAMES,
]


@dataclasses.dataclass(frozen=True)
class Baseline:
  """What a reward is compared with."""

  name: BASELINES = option("leave_one_out", "the baseline; see above")
  decay: float = option(
    0.9, "share of moving_average or role_baseline that a step keeps", min=0, below=1
  )
  role: str = option("", "the column of problems whose values are role_baseline's roles")
  rows: int = option(
    65536, "rows of the table of problems or roles, which are found by a hash", min=1
  )
  discount: float = option(1.0, "discount factor per token", min=0, max=1)

  def check(self, config: Any) -> None:
    """Refuses settings that the baseline cannot handle."""
    error = functools.partial(ConfigError, "advantage.name", self.name)
    compares = self.name in ("leave_one_out", "optimal_token_baseline")
    if compares and config.updates.responses_per_prompt == 1:
      raise error("another one with --responses_per_prompt=1", "try --advantage=moving_average")
    if (self.name == "role_baseline") != bool(self.role):
      allowed = "a column's name with --advantage=role_baseline, and left out without"
      raise ConfigError("advantage.role", self.role, allowed)
    if self.rows != Baseline().rows and self.name not in trackers.NAMES:
      allowed = f"left out with --advantage={self.name}"
      raise ConfigError("advantage.rows", self.rows, allowed)
    if self.name == "leave_one_out" and self.discount != 1:
      raise error("another one with --advantage.discount", "try --advantage=reinforce_plus_plus")


@dataclasses.dataclass(frozen=True)
class Gae:
  """Generalised advantage estimation."""

  discount: float = option(1.0, "discount factor per token", min=0, max=1)
  gae_lambda: float = option(0.95, "1 trusts rewards, 0 the values", min=0, max=1)
  alpha: float | None = option(
    None,
    "instead of gae_lambda: the share of a response over which advantages look ahead, while values "
    "learn with lambda 1; VAPO has 0.05",
    above=0,
  )
  whiten: bool = option(True, "scale the step's advantages to mean 0 and variance 1")

  def check(self, config: Any) -> None:
    """Refuses two lambdas."""
    if self.alpha is not None and self.gae_lambda != Gae().gae_lambda:
      allowed = "left out with --advantage.alpha"
      raise ConfigError("advantage.gae_lambda", self.gae_lambda, allowed)


@dataclasses.dataclass(frozen=True)
class Entropy:
  """How the coefficient of the entropy bonus changes; --loss.entropy_coef is the first."""

  controller: Literal["constant", "linear", "target", "lagged"] = option(
    "constant",
    "linear = towards `final` at the end; target = applied, and growing, only while the entropy is "
    "below the target; lagged = the same, a step late, as TRL has it",
  )
  final: float = option(0.0, "last coefficient of linear", min=0)
  target: float = option(0.2, "entropy to hold, in nats a token", above=0)
  delta: float = option(0.005, "how far a step moves the coefficient", above=0)
  low: float = option(0.0, "least coefficient", min=0)
  high: float = option(1.0, "greatest coefficient", above=0)

  def check(self, config: Any) -> None:
    """Refuses numbers that the controller does not have."""
    own = {"linear": ("final",), "target": ("target", "delta", "low", "high")}
    own["lagged"] = own["target"]
    for name in ("final", "target", "delta", "low", "high"):
      value = getattr(self, name)
      if name not in own.get(self.controller, ()) and value != getattr(Entropy(), name):
        allowed = f"left out with --entropy.controller={self.controller}"
        raise ConfigError(f"entropy.{name}", value, allowed)
    if self.high < self.low:
      raise ConfigError("entropy.high", self.high, f"at least entropy.low ({self.low})")


@dataclasses.dataclass(frozen=True)
class Clip:
  """How the ratio's upper clip changes, for losses with a `clip_high` near 1."""

  controller: Literal["none", "adaptive"] = option(
    "none", "adaptive = up while the entropy is below the target, down above it"
  )
  target: float = option(0.3, "entropy to hold, in nats a token", above=0)
  delta: float = option(0.25, "how far a step moves the upper clip", above=0)
  high: float = option(2.5, "greatest distance of the upper clip from 1 / (1 - clip_low)", above=0)

  def check(self, config: Any) -> None:
    """Refuses a controller without a clip that it could move."""
    known = settings(chosen(config.loss))
    if self.controller == "adaptive" and "clip_high" not in known:
      fix = "try --loss=ppo_loss"
      raise ConfigError("clip.controller", "adaptive", "none for a loss without clip_high", fix)
    if self.controller == "adaptive" and config.loss.clip_high is not None:
      allowed = "left out with --clip.controller=adaptive, which sets it"
      raise ConfigError("loss.clip_high", config.loss.clip_high, allowed)
    for name in ("target", "delta", "high"):
      if self.controller == "none" and getattr(self, name) != getattr(Clip(), name):
        allowed = "left out without --clip.controller"
        raise ConfigError(f"clip.{name}", getattr(self, name), allowed)
