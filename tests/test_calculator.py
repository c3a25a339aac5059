"""The calculator of the site says what `python -m rl_llm explain` says, number by number."""

import functools
import itertools
import json
import re
import runpy

import pytest
from py_mini_racer import MiniRacer

from rl_llm import explain
from rl_llm.runs.keywords import settings
from tests.test_markdown import ROOT

PATHS = runpy.run_path(str(ROOT / "docs" / "site_hooks.py"))["CALCULATOR"]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
TOPICS = {topic.__name__: topic for topic in explain.TOPICS}


def grid(**axes):
  return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


# Both signs of each slope, each branch and each last sentence; on no edge, where rounding decides.
MOVES = ((0.5, 0.5), (0.5, 0.55), (0.5, 0.3), (0.5, 0.9), (0.01, 0.05), (0.01, 0.001), (0.1, 0.9))
TOKENS = [{"advantage": 0.0}] + [
  {"p_old": old, "p_new": new, "advantage": advantage}
  for old, new in MOVES
  for advantage in (-1.5, 1.0)
]
GRIDS = {  # topic -> its numbers
  "reinforce": grid(p=(0.05, 0.9), reward=(-1.0, 0.0, 3.0), baseline=(0.0, 1.5)),
  "ppo": [*TOKENS, {**TOKENS[1], "clip_low": 0.3, "clip_high": 0.1}],
  "clip": TOKENS,
  "grpo": grid(
    rewards=((1.0, 0.0, 0.0, 0.0), (1.0, 1.0), (0.0, 0.0, 0.0), (0.3, -2.0, 7.0)),
    scale=("std", "none"),
  ),
  "gae": grid(
    rewards=((0.0, 0.0, 1.0), (0.5, -1.0, 2.0)),
    values=((0.4, 0.6, 0.8), (-1.0, 0.3, 0.0)),
    discount=(0.9, 1.0),
    gae_lambda=(0.0, 0.5, 1.0),
  ),
  "dpo": grid(
    p_chosen=(0.05, 0.1, 0.6), p_rejected=(0.1, 0.4), ref_chosen=(0.1,), ref_rejected=(0.4,)
  )
  + grid(p_chosen=(0.2, 0.9), p_rejected=(0.01,), beta=(0.1, 1.0, 5.0)),
  "kl": [
    {"policy": policy, "reference": reference}
    for policy, reference in (
      ((0.5, 0.5), (0.25, 0.75)),
      ((0.9, 0.1), (0.9, 0.1)),
      ((0.2, 0.3, 0.5), (0.6, 0.3, 0.1)),
    )
  ],
  "entropy": grid(p=(0.05, 0.75, 0.99), gap=(-1.0, 0.0, 2.0), coef=(0.1, 1.0))
  + [{"p": 0.5, "gap": 0.0, "coef": 0.5}],
}


@functools.cache
def page():
  engine = MiniRacer()
  engine.eval("\n".join((ROOT / "docs" / path).read_text(encoding="utf-8") for path in PATHS))
  return engine


def said(topic, numbers, lang="en"):
  """What the page's JavaScript makes of the numbers, or its complaint."""
  call = f"explained({json.dumps(topic)}, {json.dumps(numbers)}, {json.dumps(lang)})"
  return json.loads(page().eval(wrap(call)))


def wrap(call):
  catch = "catch (wrong) { return JSON.stringify(wrong) }"
  return f"(() => {{ try {{ return JSON.stringify({call}) }} {catch} }})()"


def near(value):
  return pytest.approx(value, rel=3e-4, abs=2e-5)


def check(topic, numbers):
  example = TOPICS[topic](**numbers)
  for lang in explain.LANGUAGES:
    found = said(topic, numbers, lang)
    ours = "\n".join([found["title"], "", *found["lines"]])
    theirs = explain.render(example, lang=lang)
    assert NUMBER.sub("#", ours) == NUMBER.sub("#", theirs), numbers
    shown = [[float(x) for x in NUMBER.findall(text)] for text in (ours, theirs)]
    assert shown[0] == near(shown[1]), numbers
  for name, value in example.values.items():
    ours = found["values"][name]
    theirs = value if isinstance(value, str) else near(value)
    assert (tuple(ours) if isinstance(ours, list) else ours) == theirs, (name, numbers)


@pytest.mark.parametrize("topic", TOPICS)
def test_it_says_what_the_library_says(topic):
  check(topic, {})


@pytest.mark.slow
@pytest.mark.parametrize("topic", TOPICS)
def test_it_says_so_over_a_grid(topic):
  for numbers in GRIDS[topic]:
    check(topic, numbers)


def test_it_has_every_topic_and_number():
  engine = page()
  kept = json.loads(engine.eval("JSON.stringify(TOPICS)"))
  ours = {topic: kept[topic][2] for topic in kept}
  assert list(ours) == list(TOPICS)
  for topic, numbers in ours.items():
    theirs = {name: default for name, (_, default) in settings(TOPICS[topic]).items()}
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in numbers.items()}
    assert tuples == theirs


@pytest.mark.parametrize(
  "topic, numbers, named",
  [
    ("ppo", {"p_new": 1.0}, "p_new"),
    ("ppo", {"clip_low": 0.0}, "clip_low"),
    ("dpo", {"ref_chosen": 0.0}, "ref_chosen"),
    ("grpo", {"rewards": [1.0]}, "two rewards"),
    ("gae", {"values": [1.0]}, "as many values"),
    ("gae", {"discount": 1.5}, "discount"),
    ("kl", {"policy": [0.5, 0.6]}, "add up to 1"),
    ("kl", {"policy": [0.2, 0.3, 0.5]}, "as many reference"),
    ("entropy", {"coef": 0.0}, "coef"),
  ],
)
def test_a_number_that_cannot_be_is_said_in_both_languages(topic, numbers, named):
  english, japanese = said(topic, numbers)
  assert named in english and re.search(r"[\u3040-\u30ff]", japanese)


@pytest.mark.parametrize(
  "typed, like, read",
  [
    ("0.5", 1, 0.5),
    ("1, 0,0", [1], [1, 0, 0]),
    ("1、2", [1], [1, 2]),
    ("a", 1, None),
    ("", 1, None),
  ],
)
def test_what_is_typed_is_read(typed, like, read):
  code = wrap(f'read("x", {json.dumps(typed)}, {json.dumps(like)})')
  found = json.loads(page().eval(code))
  assert found == read if read is not None else found[0].startswith("x: a number")


def test_numbers_are_written_as_python_writes_them():
  for value in (0.0, 1.0, -0.5, 1 / 3, 12345.678, 123456.7, 1e-4, 1.5e-5, -3e-9, 1e20):
    assert page().eval(f"shown({value!r})") == f"{value + 0.0:.5g}"
