"""A reward and a task of one's own: as a file's, as FILE.py:function, and as a Python function."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import grpo
from rl_llm.errors import ConfigError, UserError
from rl_llm.rewards import InProcess, RewardSource
from rl_llm.runs.functions import from_file
from rl_llm.tasks import Problem, Task, load_task
from tests.experiments.helpers import outcome, settings

TASK = """
from rl_llm.rewards import RewardSource
from rl_llm.tasks import load_task

def make():
  return load_task("copy", held_out=4)

def nothing():
  return None
"""


def trained(workdir, **changes):
  config = grpo.Config(**changes)
  grpo.train(config, str(workdir))
  return outcome(workdir), json.loads((workdir / "config.json").read_text())


@pytest.mark.slow
def test_a_reward_is_the_same_from_a_file_a_flag_and_a_function(tmp_path, small, files, capfd):
  common = settings(files, **{"jsonl.held_out_fraction": 0.3})
  by_file, _ = trained(tmp_path / "file", **common)
  path = str(files / "reward.py")
  del common["jsonl.reward_file"], common["jsonl.reward_function"]
  by_flag, flagged = trained(tmp_path / "flag", reward=f"{path}:fraction", **common)
  assert flagged["reward"] == f"{path}:fraction"
  capfd.readouterr()
  function = from_file("reward", path, "fraction")
  by_function, recorded = trained(tmp_path / "function", reward=function, **common)
  assert "rewards come from a function in this process" in capfd.readouterr().out
  assert recorded["reward"].startswith("python:reward.fraction@")
  for found in (by_flag, by_function):
    assert found.metrics == by_file.metrics and found.samples == by_file.samples
  other = from_file("reward", path, "signed")
  with pytest.raises(ConfigError, match="--reward=python:reward.signed@.*must be python:reward"):
    trained(tmp_path / "function", reward=other, **common | {"steps": 3})


@pytest.mark.slow
def test_a_task_of_ones_own_is_trained_on(tmp_path, small):
  (tmp_path / "mine.py").write_text(TASK)
  changes = {"model": "tiny", "steps": 1, "prompts_per_step": 4, "responses_per_prompt": 4}
  changes |= {"microbatch_prompts": 4, "eval.samples": 3, "samples_every": 100}
  copy, _ = trained(tmp_path / "copy", task="copy", **changes | {"copy.held_out": 4})
  mine, _ = trained(tmp_path / "mine", task=f"{tmp_path}/mine.py:make", **changes)
  assert mine.metrics == copy.metrics and mine.samples == copy.samples
  with pytest.raises(UserError, match="returned NoneType, must return rl_llm.tasks.Task"):
    trained(tmp_path / "none", task=f"{tmp_path}/mine.py:nothing", **changes)


def test_a_task_may_have_a_function_as_its_grader(tmp_path, small):
  def reward(prompts, completions, right, **columns):
    return [len(text) % 3 / 2 for text in completions]

  def own():
    problems = [Problem(f"{letter * 9}>", {"right": letter}, letter) for letter in "abcdef"]
    return Task("own", lambda seed, step, count: problems[:count], tuple(problems[4:]), reward)

  changes = {"model": "tiny", "steps": 1, "prompts_per_step": 4, "responses_per_prompt": 4}
  changes |= {"microbatch_prompts": 4, "eval.samples": 3, "samples_every": 100}
  changes |= {"max_new_tokens": 8, "prompt_format": "plain"}  # Of shapes that others compile too.
  found, recorded = trained(tmp_path / "own", task=own, **changes)
  assert recorded["task"].startswith("python:tests.experiments.test_functions.test_a_task_may_")
  assert {row["reward"] for row in found.samples} <= {0.0, 0.5, 1.0}
  assert isinstance(load_task("copy").reward, RewardSource)


LOSS = '''
from rl_llm import losses

def clipped(logprobs, old_logprobs, advantages, weights, *, mask=None, clip_high=0.2):
  """PPO's, written anew."""
  return losses.ppo_loss(
    logprobs, old_logprobs, advantages, weights, mask=mask, clip_high=clip_high, clip_low=0.2
  )

def flipped(logprobs, old_logprobs, advantages, weights):
  return losses.ppo_loss(logprobs, old_logprobs, -advantages, weights)
'''


@pytest.mark.slow
def test_a_loss_of_ones_own_is_trained_with(tmp_path, small, files):
  path = tmp_path / "mine.py"
  path.write_text(LOSS)
  common = settings(files, steps=1, epochs=2, **{"optimizer.learning_rate": 0.01})
  clip = {"loss.clip_high": 0.3}
  shipped, _ = trained(tmp_path / "shipped", loss="ppo_loss", **clip, **common)
  by_flag, recorded = trained(tmp_path / "flag", loss=f"{path}:clipped", **clip, **common)
  assert recorded["loss.name"] == f"{path}:clipped"
  assert np.array_equal(*(flat(found.params) for found in (shipped, by_flag)))
  function = from_file("loss", str(path), "flipped")
  other, recorded = trained(tmp_path / "other", loss=function, **common)
  assert recorded["loss.name"].startswith("python:mine.flipped@")
  assert not np.array_equal(*(flat(found.params) for found in (shipped, other)))
  for changes, said in (
    ({"loss.clip_high": 0.3}, "--loss.clip_high=0.3: must be left out with --loss="),
    ({}, "a function of .*mine.py; it has clipped, flipped"),
  ):
    name = "flipped" if changes else "missing"
    with pytest.raises(ConfigError, match=said):
      grpo.check(grpo.Config(loss=f"{path}:{name}", **changes))


def flat(params):
  return np.concatenate([np.ravel(params[name]) for name in sorted(params)])


def test_a_batch_in_this_process_is_checked_as_a_pools_is():
  """As many of each, in whole groups: a row too few would be graded with another's columns."""
  with InProcess(lambda prompts, completions, **columns: [1.0] * len(prompts)) as grader:
    with pytest.raises(ValueError, match="2 prompts, 2 completions, 1 columns: must be as many"):
      grader.score(["q", "q"], ["a", "b"], [{}])
    with pytest.raises(ValueError, match="3 prompts: must be whole groups of group_size=2"):
      grader.score(["q"] * 3, ["a"] * 3, [{}] * 3, group_size=2)
