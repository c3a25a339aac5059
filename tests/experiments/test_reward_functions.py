"""Reward functions as TRL's users write them, from the command's settings to the record."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import evaluate, grpo, make_preferences
from rl_llm.errors import ConfigError
from rl_llm.rewards import RewardError
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read
from rl_llm.runs.report import write_report
from tests.experiments.helpers import run, settings

REWARDS = """
def compares(prompts, completions, **columns):
  assert len(set(prompts)) == 1 or len(prompts) == 16
  mean = sum(map(len, completions)) / len(completions)
  return [float(len(c) > mean) for c in completions]

def silent(completions):
  return [None] * len(completions)

async def tells(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, name):
  texts = [completion[0]["content"] for completion in completions]
  log_extra("said", texts)
  log_extra("ids", [len(ids) for ids in completion_ids])
  log_extra("step", [trainer_state.global_step] * len(texts))
  log_extra("steps", [trainer_state.max_steps] * len(texts))
  log_metric("name", float(name[0]))
  # Right, wherever it has an opinion: not on the third problem, nor on about half of the others.
  return [None if n % 3 == 2 or sum(map(ord, t)) % 2 else 1.0 for n, t in zip(name, texts)]
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
  path = tmp_path_factory.mktemp("rewards") / "mine.py"
  path.write_text(REWARDS)
  return str(path)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
  path = tmp_path_factory.mktemp("conversations") / "rows.jsonl"
  rows = [{"prompt": [{"role": "user", "content": chr(97 + n) * 3}], "name": n} for n in range(12)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return {"task": f"jsonl:{path}", "prompt_format": "chat"}


def test_a_function_that_compares_within_a_group_gives_what_it_gives_in_trl(
  tmp_path, small, files, rewards
):
  changes = {"jsonl.reward_file": rewards, "jsonl.reward_function": "compares", "steps": 1}
  sizes = {"auto": 4, "batch": 16, "sample": 1}
  for isolation, size in sizes.items():
    found = run(
      grpo, tmp_path / isolation, settings(files) | changes | {"reward_isolation": isolation}
    )
    rows = [row for row in found.samples if row["split"] == "train"]
    lengths = np.array([len(row["response"]) for row in rows]).reshape(-1, size)
    wanted = lengths > lengths.mean(axis=1, keepdims=True)
    assert [row["reward"] for row in rows] == wanted.astype(float).reshape(-1).tolist()
    assert wanted.any() == (size > 1)


def test_what_a_function_is_told_and_what_it_tells(tmp_path, small, files, rewards, conversations):
  own = {"jsonl.reward_file": rewards, "jsonl.reward_function": "tells", "eval.problems": 4}
  found = run(grpo, tmp_path, settings(files) | conversations | own | {"eval.every": 1})
  assert {row["split"] for row in found.samples} == {"train", "eval"}
  statuses = set()
  for row in found.samples:
    assert row["extra/said"] == row["response"] and row["extra/ids"] == row["length"]
    assert row["extra/step"] == row["step"] and row["extra/steps"] == 2
    unknown = (ord(row["prompt"][0]) - 97) % 3 == 2 or sum(map(ord, row["response"])) % 2
    assert row["status"] == ("not_applicable" if unknown else "ok")
    assert row["correct"] is (None if unknown else True)
    statuses.add(row["status"])
  assert statuses == {"ok", "not_applicable"}
  for row in found.metrics:
    if "reward_mean" in row:
      names = [
        ord(s["prompt"][0]) - 97
        for s in found.samples
        if s["split"] == "train" and s["step"] == row["step"]
      ]
      assert row["reward/name"] == pytest.approx(np.mean(names))
      assert row["reward_mean"] == row["accuracy"] == 1.0
      assert row["rewards_not_applicable"] > 0 and row["timed_out_fraction"] == 0.0
    # Always right where there is an opinion: as numerator and denominator go.
    assert row["eval/sampled_accuracy"] == 1.0 and row["eval/no_opinion"] > 0
    assert row["eval/greedy_accuracy"] in (1.0, None) and row["eval/failed_grades"] == 0


def test_a_run_whose_grader_never_has_an_opinion_ends_without_a_figure(
  tmp_path, small, files, rewards, capsys
):
  own = {"jsonl.reward_file": rewards, "jsonl.reward_function": "silent", "steps": 1}
  found = run(grpo, tmp_path, settings(files) | own)
  row = found.metrics[0]
  for name in ("reward_mean", "accuracy", "timed_out_fraction", "frac_zero_std"):
    assert row[name] is None, name
  assert row["eval/sampled_accuracy"] is None and row["eval/no_opinion"] == 4
  assert "held-out accuracy, sampled: - -> -" in capsys.readouterr().out
  assert write_report(tmp_path).exists()


def test_no_figure_of_an_evaluation_counts_what_has_no_opinion(
  tmp_path, small, files, rewards, conversations, capsys
):
  changes = conversations | {
    "model": "tiny", "jsonl.reward_file": rewards, "jsonl.reward_function": "tells",
    "jsonl.held_out_fraction": 0.5, "prompts_per_batch": 4, "samples": 4, "k": (1, 2),
    "max_new_tokens": 4, "reward_workers": 1,
  }  # fmt: skip
  result = evaluate.measure(replace(evaluate.Config(), changes), str(tmp_path))
  rows = read(tmp_path / "samples.jsonl")
  unknown = sum(row["status"] == "not_applicable" for row in rows)
  assert result["no_opinion"] == unknown > 0 == result["failed_grades"]
  assert result["all"]["pass@1"]["value"] == result["all"]["pass@2"]["value"] == 1.0
  said = f"the grader has no opinion on {unknown} of {len(rows)} responses; no figure counts them"
  assert said in " ".join(capsys.readouterr().out.split())
  for row in read(tmp_path / "metrics.jsonl"):
    assert row["accuracy"] in (1.0, None)


@pytest.mark.slow
def test_an_isolation_that_does_not_fit_is_refused_before_a_model_is_loaded(
  tmp_path, files, monkeypatch
):
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  for task, isolation, said in (
    ("arithmetic", "group", "must be auto or sample or batch"),
    ("reasoning_gym:leg_counting", "batch", "must be auto or sample: .* runs a response"),
  ):
    config = replace(grpo.Config(), {"model": "tiny", "task": task, "reward_isolation": isolation})
    with pytest.raises(RewardError, match=f"reward_isolation={isolation}: {said}"):
      grpo.train(config, str(tmp_path / isolation))
    # As it says: auto fits every task. The model is the next thing to be loaded.
    with pytest.raises(TypeError, match="callable"):
      grpo.train(replace(config, {"reward_isolation": "auto"}), str(tmp_path / f"{isolation}2"))


def test_it_is_a_flag_of_every_script_that_grades_and_of_what_decides_a_run():
  for script in (grpo, evaluate, make_preferences):
    with pytest.raises(ConfigError, match="reward_isolation"):
      replace(script.Config(), {"reward_isolation": "batches"})
