"""Everything that the library can do, a command can do: each public function is reached by a flag.

A function is reached if a flag's choices name it, or if an experiment, or what experiments are made
of, calls it. Helpers that no command needs are listed here, each with its reason.
"""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from experiments import (
  distill,
  dpo,
  flags,
  grpo,
  kto,
  online_dpo,
  ppo,
  reinforce,
  reward_model,
  sft,
)
from rl_llm import advantages, controllers, kl, losses, weighting

ROOT = Path(__file__).parent.parent
EXPERIMENTS = distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft

HELPERS = {
  "ppo_clipped": "tokens for `clip_cov_mask` to leave out; there are none before a step's updates",
  "action_ids_of": "how `llds_loss` numbers actions where it is given none",
  "kl_penalty": "what `kl_loss` sums",
  "init_adaptive_kl": "ppo begins at any coefficient, 0 too",
}


def public(module) -> list[str]:
  """The module's names: its `__all__`, or the functions that it defines."""
  defined = inspect.getmembers(module, inspect.isfunction)
  own = [name for name, each in defined if each.__module__ == module.__name__]
  return getattr(module, "__all__", [name for name in own if not name.startswith("_")])


def choices(group: type) -> set[str]:
  """The words that the flags of a group, and of the groups in it, can be set to."""
  found = set()
  for hint in get_type_hints(group).values():
    if get_origin(hint) is Literal:
      found |= set(get_args(hint))
    elif hasattr(hint, "__dataclass_fields__"):
      found |= choices(hint)
  return found


@functools.cache
def reached() -> set[str]:
  """Names that flags can choose, and names that the code behind the experiments calls."""
  found = set().union(*(choices(each.Config) for each in EXPERIMENTS))
  files = [*ROOT.glob("experiments/*.py")]
  for package in ("training", "rollout"):
    files += ROOT.glob(f"rl_llm/{package}/*.py")
  for path in files:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Attribute):
        found.add(node.attr)
      elif isinstance(node, ast.Name):
        found.add(node.id)
  return found


NAMES = [
  name for module in (losses, advantages, weighting, kl, controllers) for name in public(module)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_reaches_it_or_it_is_a_helper(name):
  assert name in HELPERS or name in reached(), "give it a flag, or list it as a helper"


def test_the_lists_are_short_and_true():
  assert len(HELPERS) <= 12
  assert not HELPERS.keys() - set(NAMES), "no such name any more"


def test_what_has_no_flag_is_not_reached():
  assert {"cispo_loss", "opo", "prompt_mean", "k2", "gae"} <= reached()
  assert "no_such_loss" not in reached() and flags.__name__ not in reached()
