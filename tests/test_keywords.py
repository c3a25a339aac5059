"""Flags read off functions: what each keyword becomes, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import numpy as np
import pytest
from absl import flags

from rl_llm import losses
from rl_llm.advantages.group import GROUP_ADVANTAGES
from rl_llm.errors import ConfigError
from rl_llm.runs import config as configs
from rl_llm.runs.keywords import call, described, given, keyword_group, settings

CALLED = []  # what the functions below were called with


def near(scores, old_scores, weights, *, mask=None, low=0.2, high=None, steps=2):
  """Near.

  Args:
    scores: [B, T] float.
    old_scores: [B, T] float.
    weights: [B, T] float.
    mask: None, or [B, T] bool, the members.
    low: how far below 1,
      > 0.
    high: None, or how far above.
    steps: how many.

  Raises:
    ValueError: steps: is no argument of this section.
  """
  if low <= 0:
    raise ValueError(f"low is {low}; it must be > 0")
  CALLED.append(("near", low, high, steps, mask))


def far(scores, weights, *, baseline=None, low=0.5, kind: Literal["a", "b"] = "a", sure=False):
  """Far.

  Args:
    scores: [B, T] float.
    weights: [B, T] float.
    baseline: None, or [B] float.
    low: as for `near`.
    kind, sure: which, and whether.
  """
  CALLED.append(("far", low, kind, sure))


def plain(scores, weights):
  """Takes nothing.

  Args:
    scores: [B, T] float.
    weights: [B, T] float.
  """
  if not scores.shape:
    raise ValueError("scores has no axes; it must be [B, T].")
  CALLED.append(("plain",))


Group = keyword_group("term", "Which term.", (near, far, plain), shape=(1, 1))


@dataclasses.dataclass(frozen=True)
class Config:
  """All."""

  term: Group = Group()


def refused(group, config=None):
  with pytest.raises(ConfigError) as caught:
    group.check(config)
  return str(caught.value)


# What a signature becomes.


def test_keywords_that_are_no_arrays_are_settings_of_the_type_of_their_default():
  assert settings(near) == {"low": (float, 0.2), "high": (float, None), "steps": (int, 2)}
  assert settings(far) == {
    "low": (float, 0.5),
    "kind": (Literal["a", "b"], "a"),
    "sure": (bool, False),
  }
  assert settings(plain) == {}


def test_a_description_is_that_of_args_in_one_line():
  assert described(near, "low") == "how far below 1, > 0"
  assert described(far, "kind") == described(far, "sure") == "which, and whether"
  assert described(far, "low") == "" and described(far, "low", see_others=True) == "as for `near`"
  assert described(near, "nowhere") == "" and described(lambda: None, "low") == ""


def test_the_group_has_every_keyword_once_with_the_words_of_who_describes_it():
  fields = {field.name: field for field in dataclasses.fields(Group)}
  assert list(fields) == ["name", "low", "high", "steps", "kind", "sure"]
  helps = {name: field.metadata["help"] for name, field in fields.items()}
  assert helps["low"] == "how far below 1, > 0 [near, far]"
  assert helps["steps"] == "how many [near]" and helps["sure"] == "which, and whether [far]"
  assert Group() == Group("near", None, None, None, None, None)
  of_one = keyword_group("term", "Which.", (near,), shape=(1, 1))
  assert of_one.__dataclass_fields__["low"].metadata["help"] == "how far below 1, > 0"


def test_the_keywords_are_flags():
  values = flags.FlagValues()
  configs.define_flags(Config, flag_values=values)
  values(["program", "--term.name=far", "--term.kind=b", "--term.sure=true", "--term.low=1"])
  found = configs.from_flags(Config, flag_values=values)
  assert found.term == Group("far", low=1.0, kind="b", sure=True)
  assert configs.replace(Config(), configs.flatten(found)) == found
  for changes, allowed in (
    ({"term.kind": "c"}, "one of a, b, or none"),
    ({"term.name": "nea"}, "one of near, far, plain; did you mean near?"),
    ({"term.steps": 1.5}, "an integer, or none"),
  ):
    with pytest.raises(ConfigError, match=f"must be {allowed}"):
      configs.replace(Config(), changes)


def test_settings_of_no_function_may_be_added():
  further = {"coef": (float, configs.option(0.5, "how much"))}
  kind = keyword_group("term", "Which.", (near,), shape=(1, 1), further=further)
  assert kind().coef == 0.5 and given(kind(coef=2.0, steps=3)) == {"steps": 3}


# What is called.


def test_what_was_given_goes_to_the_function_and_the_rest_is_its_own():
  assert given(Group()) == {} and given(Group("far", low=0.0, sure=False)) == {
    "low": 0.0,
    "sure": False,
  }
  assert given(Group("plain", low=0.3)) == {}
  one = np.ones((1, 1))
  arrays = {"scores": one, "old_scores": one, "weights": one, "mask": None, "baseline": one}
  CALLED.clear()
  for group in (Group(high=3.0), Group("far", kind="b"), Group("plain")):
    call(group, **arrays)
  assert CALLED == [("near", 0.2, 3.0, 2, None), ("far", 0.5, "b", False), ("plain",)]


def test_keywords_may_be_brought_as_traced_numbers_are():
  one = np.ones((1, 1))
  call(Group(low=9.0), keywords={"low": 0.7}, scores=one, old_scores=one, weights=one)
  assert CALLED[-1] == ("near", 0.7, None, 2, None)


# What is refused.


def test_a_keyword_that_the_function_lacks_is_refused():
  assert refused(Group(kind="a")) == (
    "--term.kind=a: must be left out with --term=near; which has low, high, steps"
  )
  assert refused(Group("plain", low=0.2)) == (
    "--term.low=0.2: must be left out with --term=plain; which has no keywords"
  )
  Group(low=0.3, high=1.0, steps=1).check(None)


def test_a_value_that_the_function_refuses_is_named_by_its_flag():
  assert refused(Group(low=-1.0)) == "--term.low=-1.0: must be > 0"
  ready = keyword_group("term", "Which.", (plain,), shape=())
  assert refused(ready()) == (
    "--term.name=plain: must be [B, T]; scores has no axes; it must be [B, T]"
  )


def test_defaults_that_differ_are_refused_where_a_keyword_has_one_for_all():
  with pytest.raises(TypeError, match=r"term\.low: \['near', 'far'\] disagree on its default"):
    keyword_group("term", "Which.", (near, far), shape=(1, 1), unset=False)


def test_where_a_keyword_has_one_default_for_all_it_is_that():
  kind = keyword_group("term", "Which.", (near, plain), shape=(1, 1), unset=False)
  assert kind() == kind("near", 0.2, None, 2)
  assert given(kind()) == {"low": 0.2, "steps": 2}
  kind("plain").check(None)  # All keywords are as they were: none was given.
  assert refused(kind("plain", low=0.3)).startswith("--term.low=0.3: must be left out")


# The families of the library.


@pytest.mark.parametrize(
  "function",
  [*losses.POLICY_LOSSES, *losses.PREFERENCE_LOSSES, *GROUP_ADVANTAGES],
  ids=lambda function: function.__name__,
)
def test_every_keyword_of_the_librarys_families_can_be_a_flag(function):
  """A number or one of some words, with a description; whatever is an array is no setting."""
  for name, (kind, default) in settings(function).items():
    choice = typing.get_origin(kind) is Literal
    assert kind in (int, float, bool) or choice and default in typing.get_args(kind), name
    assert described(function, name, see_others=True), name
