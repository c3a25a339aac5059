"""Runs the examples of every module: a docstring whose number is wrong is a failing test."""

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import benchmarks
import experiments
import launch
import rl_llm

# Modules whose examples need the package of an extra.
NEEDS = {
  "rl_llm.text.chat_template": "jinja2",
  "rl_llm.tasks.reasoning_gym_reward": "reasoning_gym",
  "rl_llm.rewards.math_answers": "math_verify",
}

PACKAGES = (rl_llm, launch, experiments, benchmarks)
MODULES = ["rl_llm"] + [
  module.name
  for package in PACKAGES
  for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
  package = NEEDS.get(name)
  if package and importlib.util.find_spec(package) is None:
    pytest.skip(f"{package} is not installed")
  result = doctest.testmod(importlib.import_module(name))
  assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed"
