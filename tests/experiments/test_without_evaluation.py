"""A run without evaluation, `--eval.every=0`: of data too few to hold any out, and of any other."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments import dpo, evaluate, grpo, population, ppo, reinforce, reward_model, sft
from rl_llm.errors import ConfigError
from rl_llm.policy import load, make_policy
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read
from rl_llm.runs.report import write_report
from rl_llm.tasks import TaskError
from tests.representatives import mostly_slow

SUMS = [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n} for n in range(3)]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def sampled(tmp_path, **changes):
  """GRPO on three problems, of which no fraction below a third need hold any out."""
  return {
    "model": "tiny",
    "task": f"jsonl:{write(tmp_path / 'three.jsonl', SUMS)}",
    "jsonl.reward_function": "gsm8k",
    "prompt_format": "plain",
    "steps": 2,
    "prompts_per_step": 4,
    "responses_per_prompt": 4,
    "max_new_tokens": 8,
    "microbatch_prompts": 4,
  } | changes


def learned(tmp_path, **changes):
  """SFT on three examples and no task, from which nothing is held out."""
  rows = [{"prompt": row["prompt"], "completion": row["answer"], "level": 1} for row in SUMS]
  return {
    "model": "tiny",
    "data": write(tmp_path / "three_answers.jsonl", rows),
    "task": "none",
    "held_out_fraction": 0.0,
    "prompt_format": "plain",
    "steps": 2,
    "examples_per_step": 4,
    "max_tokens": 16,
    "microbatch_rows": 4,
  } | changes


def preferred(tmp_path, **changes):
  """The same of preference pairs."""
  rows = [row | {"chosen": row["answer"], "rejected": "0"} for row in SUMS]
  rows = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
  return {
    "model": "tiny",
    "data": write(tmp_path / "three_pairs.jsonl", rows),
    "held_out_fraction": 0.0,
    "prompt_format": "plain",
    "steps": 2,
    "pairs_per_step": 4,
    "microbatch_pairs": 4,
  } | changes


@pytest.fixture
def read_to_five(small, monkeypatch):
  """The small model, as if it had been trained to read five tokens and no more."""
  original = load.load_model

  def load_short(*arguments, **keywords):
    loaded = original(*arguments, **keywords)
    config = dataclasses.replace(loaded.policy.config, max_position=5)
    return loaded._replace(policy=make_policy(config))

  monkeypatch.setattr("rl_llm.policy.load.load_model", load_short)


@pytest.mark.parametrize(
  ("experiment", "settings"),
  mostly_slow([(grpo, sampled), (sft, learned), (reward_model, preferred)], quick=[1]),
)
def test_it_trains_and_records_no_evaluation(tmp_path, read_to_five, experiment, settings, capsys):
  changes = settings(tmp_path, **{"eval.every": 0})
  workdir = tmp_path / "run"
  result = experiment.train(replace(experiment.Config(), changes), str(workdir))
  rows = read(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == [0, 1, 2] and "loss" in rows[1]
  assert not [key for row in rows for key in row if key.startswith("eval/")]
  assert (result["before"], result["after"], result["steps"]) == ({}, {}, 2)
  said = capsys.readouterr().out
  assert write_report(workdir).exists() and "held-out accuracy" not in said
  assert said.count("sequences of over 5 tokens") == 1, "all have six or more; one line a run"
  assert said.count("columns that nothing reads: level") == said.count("nothing reads") == 1
  if experiment is grpo:
    assert {line["split"] for line in read(workdir / "samples.jsonl")} == {"train"}


@pytest.mark.parametrize(
  ("experiment", "settings", "wanted"),
  [
    *[(e, sampled, "jsonl: no problem is held out") for e in (grpo, ppo, reinforce)],
    (sft, learned, "--held_out_fraction=0"),
    (dpo, lambda path: preferred(path, task="none"), "--held_out_fraction=0"),
    (reward_model, preferred, "--held_out_fraction=0"),
  ],
)
def test_the_refusal_names_it_before_a_model_loads(
  tmp_path, monkeypatch, experiment, settings, wanted
):
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  with pytest.raises((ConfigError, TaskError), match=wanted + ".*--eval.every=0"):
    experiment.train(replace(experiment.Config(), settings(tmp_path)), str(tmp_path / "run"))


def test_the_other_script_that_evaluates_names_its_own_way_out(tmp_path):
  changes = {"task": f"jsonl:{write(tmp_path / 'three.jsonl', SUMS)}", "model": "tiny"}
  changes |= {"jsonl.reward_function": "gsm8k"}
  with pytest.raises(TaskError, match="raise --jsonl.held_out_fraction, or choose --split=train"):
    evaluate.measure(replace(evaluate.Config(), changes), str(tmp_path / "run"))


@pytest.mark.slow
def test_members_of_a_population_need_none_either(tmp_path, small):
  changes = sampled(tmp_path, **{"eval.every": 0, "lora.rank": 2, "steps": 1})
  members = [replace(grpo.Config(), changes | {"optimizer.learning_rate": x}) for x in (0.1, 0.2)]
  places = [tmp_path / "first", tmp_path / "second"]
  population.train(members, places, tmp_path / "whole")
  for place in places:
    result = json.loads((place / "result.json").read_text())
    assert (result["before"], result["after"], result["steps"]) == ({}, {}, 1)
