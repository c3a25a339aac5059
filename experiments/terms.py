"""Groups of flags of a policy gradient's further terms: what corrects, holds or stops its updates.

They are parts of `experiments.flags.Updates`, so every script that updates from responses has them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

from rl_llm.errors import ConfigError
from rl_llm.runs.config import option
from rl_llm.weighting import truncated_importance


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
