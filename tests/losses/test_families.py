"""What an experiment offers by name is called in one way: the signatures of the families."""

from __future__ import annotations

import inspect
import typing

import pytest

from rl_llm import losses
from rl_llm.runs.keywords import settings

POLICY = ["logprobs", "old_logprobs", "advantages", "weights"]
CHOSEN, REFERENCE = (
  ["chosen_logprobs", "rejected_logprobs"],
  ["ref_chosen_logprobs", "ref_rejected_logprobs"],
)


def parameters(function):
  """Its positional parameters and its keywords, by name."""
  found = inspect.signature(function).parameters.values()
  assert {p.kind for p in found} <= {
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
  }
  positional = {p.name: p for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}
  assert all(p.default is p.empty for p in positional.values())
  keywords = {p.name: p for p in found if p.kind is p.KEYWORD_ONLY}
  assert all(p.default is not p.empty for p in keywords.values())
  return list(positional), keywords


def by_name(functions):
  return pytest.mark.parametrize("loss", functions, ids=lambda loss: loss.__name__)


@by_name(losses.POLICY_LOSSES)
def test_policy_losses(loss):
  positional, keywords = parameters(loss)
  if loss is losses.reinforce_loss:  # The one without an old policy, and so without a ratio.
    assert positional == [name for name in POLICY if name != "old_logprobs"] and not keywords
    return
  assert positional == POLICY
  assert next(iter(keywords)) == "mask" and keywords["mask"].default is None
  # The update takes them as data, so that none of them compiles anew.
  assert {kind for kind, _ in settings(loss).values()} == {float}
  assert settings(loss).keys() == keywords.keys() - {"mask"}


@by_name(losses.PREFERENCE_LOSSES)
def test_preference_losses(loss):
  positional, keywords = parameters(loss)
  free = {losses.alphapo_loss, losses.simpo_loss, losses.cpo_loss, losses.orpo_loss}
  assert positional == [*CHOSEN, *([] if loss in free else REFERENCE), "weights"]
  # BCO's shift is of the whole batch: computed, not set.
  assert next(iter(keywords)) == "beta" and settings(loss).keys() == keywords.keys() - {"shift"}
  for kind, _ in settings(loss).values():
    assert kind is float or typing.get_origin(kind) is typing.Literal


def test_families_are_exported_and_begin_with_the_usual_one():
  families = losses.POLICY_LOSSES, losses.PREFERENCE_LOSSES
  assert [family[0] for family in families] == [losses.grpo_loss, losses.dpo_loss]
  names = [loss.__name__ for family in families for loss in family]
  assert len(set(names)) == len(names) and set(names) <= set(losses.__all__)
  free = losses.alphapo_loss, losses.simpo_loss, losses.cpo_loss, losses.orpo_loss
  assert losses.PREFERENCE_LOSSES[-4:] == free
