"""Coefficients that follow the entropy: what controllers know, and how a step moves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rl_llm import controllers


class Controls(NamedTuple):
  """What the controllers of a run know: a part of its state, and of its checkpoints."""

  entropy: controllers.AdaptiveEntropy | None = None
  clip: controllers.AdaptiveClip | None = None


class Steering(NamedTuple):
  """Which controllers a run has: the keywords of their functions; None: no such controller."""

  entropy: Mapping[str, float] | None = None
  lagged: bool = False  # whether the entropy's controller is a step late
  clip: Mapping[str, float] | None = None
  scheduled: bool = False  # whether the entropy's coefficient is a function of the step alone


def init_controls(steering: Steering, *, coef: float) -> Controls | None:
  """The controls before the first step; None without a controller.

  Args:
    steering: which there are.
    coef: the first coefficient of the entropy bonus.
  """
  entropy = None if steering.entropy is None else controllers.init_adaptive_entropy(coef)
  clip = None if steering.clip is None else controllers.init_adaptive_clip()
  return None if entropy is None and clip is None else Controls(entropy, clip)


def before_updates(
  steering: Steering, controls: Controls | None, entropy: float | None
) -> Controls | None:
  """The controls that a step's updates are made with.

  Args:
    steering: which controllers there are.
    controls: after the step before.
    entropy: the mean per token of the step's responses, in nats; None if there are none to count.
  """
  if controls is None or controls.entropy is None or steering.lagged or entropy is None:
    return controls
  found = controllers.adaptive_entropy(controls.entropy, entropy, **steering.entropy)
  return controls._replace(entropy=found)


def after_updates(
  steering: Steering, controls: Controls | None, entropy: float | None
) -> Controls | None:
  """The controls for the next step; the arguments are those of `before_updates`."""
  if controls is None or entropy is None:
    return controls
  if controls.entropy is not None and steering.lagged:
    found = controllers.adaptive_entropy_lagged(controls.entropy, entropy, **steering.entropy)
    controls = controls._replace(entropy=found)
  if controls.clip is not None:
    controls = controls._replace(
      clip=controllers.adaptive_clip(controls.clip, entropy, **steering.clip)
    )
  return controls


def steered(controls: Controls | None, *, clip_low: float) -> dict[str, Any]:
  """The numbers that the controls set in a step: "entropy_coef", "clip_high".

  Args:
    controls: of the step.
    clip_low: of the loss, by which the upper clip is symmetric in logs at first.
  """
  found = {}
  if controls is not None and controls.entropy is not None:
    found["entropy_coef"] = controls.entropy.applied
  if controls is not None and controls.clip is not None:
    found["clip_high"] = controllers.clip_high(controls.clip, clip_low=clip_low)
  return found
