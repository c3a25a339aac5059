"""What people type who come from elsewhere is answered with our name for it."""

import importlib
import pathlib
import runpy
import subprocess
import sys

import pytest

from rl_llm.errors import ConfigError
from rl_llm.runs import peer_names
from rl_llm.runs.config import flatten, replace
from tests.representatives import mostly_slow

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = (
  "grpo",
  "reinforce",
  "ppo",
  "dpo",
  "sft",
  "reward_model",
  "evaluate",
  "kto",
  "distill",
  "online_dpo",
)
FLAGS = {
  name: set(flatten(importlib.import_module(f"experiments.{name}").Config())) for name in SCRIPTS
}


@pytest.mark.parametrize("known", peer_names.KNOWN, ids=lambda known: known.what)
def test_what_is_advised_exists(known):
  for flag in known.ours:
    assert any({flag, f"{flag}.name"} & flags for flags in FLAGS.values()), flag


def test_choices_of_other_systems_are_choices_of_ours():
  every = str([vars(importlib.import_module(f"experiments.{name}")) for name in SCRIPTS])
  from rl_llm import advantages, losses

  known = {*losses.__all__, *advantages.__all__, *every.split()}
  known |= {"token_mean", "sequence_mean", "bfloat16", "float32", "k1", "k2", "k3"}
  assert set(peer_names.CHOICES.values()) <= known


@pytest.mark.parametrize(
  "script, typed, said",
  [
    ("grpo", "num_generations", "responses_per_prompt"),
    ("grpo", "beta", "kl.coef"),
    ("dpo", "beta", "loss.beta"),
    ("grpo", "lr", "optimizer.learning_rate"),
    ("grpo", "batch_size", "prompts_per_step"),
    ("dpo", "per_device_train_batch_size", "pairs_per_step"),
    ("sft", "train_batch_size", "examples_per_step"),
    ("grpo", "actor_rollout_ref.rollout.n", "responses_per_prompt"),
    ("ppo", "algo.advantage.gamma", "advantage.discount"),
    ("grpo", "adv_estimator", "advantage.name"),
    ("dpo", "data.max_len", "max_tokens"),
    ("grpo", "data.max_len", "max_prompt_tokens"),
  ],
)
def test_a_field_of_another_system(script, typed, said):
  module = importlib.import_module(f"experiments.{script}")
  with pytest.raises(ConfigError, match=f"did you mean {said}\\?"):
    replace(module.Config(), {typed: "1"})


@pytest.mark.parametrize(
  "flag, said",
  mostly_slow(
    [
      ("--num_generations=16", "did you mean --responses_per_prompt?"),
      ("--report_to=wandb", "did you mean --track?"),
      ("--logging_steps=1", "metrics.jsonl has every step"),
      ("--advantage=rloo", "did you mean leave_one_out?"),
    ],
    quick=[2],
  ),
)
def test_a_command_line_of_another_system(flag, said):
  command = [sys.executable, "-m", "experiments.grpo", flag]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr


def test_the_page_is_up_to_date():
  made = runpy.run_path(str(ROOT / "docs" / "make_coming_from.py"))
  page = made["PAGE"].read_text(encoding="utf-8")
  assert made["filled"](page) == page, "run `make docs`"
