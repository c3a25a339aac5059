"""Flags are a promise: each that there was is there still, with its type and its default.

Command lines, flagfiles of old runs and sweeps name flags, and rely on the defaults of those they
do not name. goldens/flags.json holds all of them as of commit 10a5d9f:

  python -m tests.experiments.test_help
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import experiments
from rl_llm.runs.config import _leaves

GOLDENS = Path(__file__).parent / "goldens" / "flags.json"

# Flags that came after the goldens, by script.
EVERYWHERE = {"code", "compile_cache", "distributed.bind", "fetch", "matmul_precision"}
TRAINED = {  # where something is trained
  *("checkpoint.best", "checkpoint.copy_to", "checkpoint.keep_at_end", "init_from", "init_moments"),
  "track",
}
GRADED = {"reward_files", "reward_sandbox"}  # where a task's grader is called
GRADED |= {"gsm8k.max_rows", "jsonl.max_rows"}
LOSSES = {"loss.threshold"}  # keywords of losses that came later
SAMPLED = {  # of policy gradients
  *("overlong.cache", "overlong.coef", "overlong.limit"),
  *("correction.name", "correction.low", "correction.high", "correction.mode"),
  *("correction.off_policy_mask", "llds.coef", "llds.level", "llds.normalizer"),
  *("correction.second_moment_mask", "correction.trust_region_mask"),
  *("positive_nll_coef", "target_kl", "weighting.power", "weighting.shared_tokens"),
  "weighting.top_entropy",
  *("loss.coef", "loss.selected", "loss.covariance_low", "loss.covariance_high", "kl.place"),
}
SAMPLED |= {
  *("entropy.controller", "entropy.final", "entropy.target", "entropy.delta", "entropy.low"),
  *("entropy.high", "clip.controller", "clip.target", "clip.delta", "clip.high"),
  *("kl.refresh", "kl.keep", "dynamic.groups", "dynamic.max_rounds", "laps"),
}
EPISODES = {"env", "tools", "max_turns", "episode_tokens", "episode_deadline", "episode_memory_mb"}
EPISODES |= {"env_network", "tool_protocol", "tool_deadline", "tool_answer_chars"}
SAMPLED |= EPISODES
OPTIMIZER = {"optimizer.name", "optimizer.decayed"}
OPTIMIZER |= {"optimizer.spike_sigma", "optimizer.spike_window"}
REWARD_KL = {"kl.gradient", "kl.weighting"}  # Of the loss, where they had it in the reward alone.
ADDED: dict[str, set[str]] = {
  "chat": {"fetch"},
  "dpo": {
    *("data_format", "loss.tail_weight", "loss.wpo", "max_rows", "reward", "reward_isolation"),
    *("laps", "reference.refresh", "reference.keep"),
  },
  "evaluate": {"reward_isolation"} | EPISODES,
  "grpo": {
    *("advantage.alpha", "advantage.k", "advantage.name", "kl.weighting", "reward_isolation"),
    *("weighting.truncated", "loss.temperature", "credit", *SAMPLED, *LOSSES),
  },
  "make_preferences": {"reward_isolation"},
  "ppo": {"advantage.alpha", "credit", "reward_isolation", "weighting.truncated"}
  | SAMPLED
  | REWARD_KL
  | LOSSES,
  "reinforce": {
    *("advantage.role", "advantage.rows"),
    *("kl.value", "reward", "reward_isolation", "weighting.truncated"),
  }
  | (SAMPLED | REWARD_KL | LOSSES),
  "reward_model": {"data_format", "max_rows"},
  "sft": {"data_format", "laps", "loss", "max_rows", "reward_isolation"},
}
# Defaults that are others now.
CHANGED = {"checkpoint.keep": 2}  # One flipped bit in the only checkpoint ended a run for good.


def flags(config_class):
  """{flag: what it takes, and what it is by default}."""
  return {
    leaf.path: {
      "type": leaf.kind.__name__,
      "tuple": leaf.is_tuple,
      "optional": leaf.optional,
      "choices": list(leaf.choices),
      "default": list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default,
    }
    for leaf in _leaves(config_class)
  }


def scripts():
  """{name: module} of all that have flags."""
  names = [module.name for module in pkgutil.iter_modules(experiments.__path__)]
  modules = {name: importlib.import_module(f"experiments.{name}") for name in names}
  return {
    name: module
    for name, module in modules.items()
    if getattr(getattr(module, "Config", None), "__module__", "") == module.__name__
  }


def goldens():
  return json.loads(GOLDENS.read_text())


@pytest.mark.parametrize("name", goldens() if GOLDENS.exists() else [])
def test_flags_are_what_they_were(name):
  wanted, found = goldens()[name], flags(scripts()[name].Config)
  assert wanted.keys() - found.keys() == set()
  of_all = EVERYWHERE if {"seed", "workdir"} <= wanted.keys() else set()
  of_all = of_all | (TRAINED if "steps" in wanted and of_all else set())
  of_all = of_all | (OPTIMIZER if "optimizer.b1" in wanted else set())
  of_all = of_all | GRADED if "reward_deadline" in wanted else of_all
  came_later = ADDED.get(name, set()) | of_all
  # A script that came later still has what its goldens were written with.
  assert found.keys() - wanted.keys() == came_later - wanted.keys()
  for flag, before in wanted.items():
    now = found[flag]
    before["default"] = CHANGED.get(flag, before["default"])
    choices = before.pop("choices")
    # More of them may come, but neither may all texts become allowed nor a list appear.
    assert set(choices) <= set(now["choices"]) and bool(choices) == bool(now["choices"]), flag
    assert {key: now[key] for key in before} == before, flag


TRANSLATED = r"^of\b|\bgo(es|ing)? on\b|\bbeside\b|\balike\b|\bfor ever\b|\bso many\b|\bas above\b"


@pytest.mark.parametrize("name", scripts())
def test_a_help_text_is_plain_and_says_more_than_the_flag(name):
  """It starts with what the flag is, and needs no text around it."""
  for leaf in _leaves(scripts()[name].Config):
    assert not re.search(TRANSLATED, leaf.help), (leaf.path, leaf.help)
    text = leaf.help.partition(" [")[0]
    assert len(text.split()) > 1 and text != leaf.path.split(".")[-1], (leaf.path, leaf.help)


def test_every_script_is_looked_at():
  assert goldens().keys() == scripts().keys()


def write_goldens():
  GOLDENS.parent.mkdir(exist_ok=True)
  lines = []
  for name, module in scripts().items():
    rows = [
      f"  {json.dumps(flag)}: {json.dumps(what)}" for flag, what in flags(module.Config).items()
    ]
    lines.append(f"{json.dumps(name)}: {{\n" + ",\n".join(rows) + "\n}")
  GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
  write_goldens()
