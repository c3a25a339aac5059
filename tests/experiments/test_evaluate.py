"""Evaluation end to end on a small model: what is recorded, summed up, survived and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, make_preferences
from rl_llm import rollout
from rl_llm.data.prompts import PromptTooLong
from rl_llm.errors import ConfigError
from rl_llm.evaluation import estimate_interval
from rl_llm.evaluation import measure as evaluation
from rl_llm.files import locked
from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.load import LanguageModel
from rl_llm.runs.config import replace, volatile
from rl_llm.runs.metrics import proportion_interval, read, without_timings
from rl_llm.runs.signals import Interrupted
from rl_llm.tasks import TaskError, load_task
from rl_llm.text.tokenizers import ByteTokenizer
from tests.experiments.helpers import FULL

ROOT = Path(__file__).parents[2]


class Terse(ByteTokenizer):
  """Bytes of which a third ends a response: answers are short, and often the same."""

  eos_ids = (258, *range(0, 256, 3))


@pytest.fixture(scope="module")
def models():
  """One narrow layer that depends on its prompt; `tiny2` has other weights."""
  config = dataclasses.replace(
    tiny_config(ByteTokenizer.vocab_size),
    n_layers=1,
    width=32,
    n_heads=2,
    n_kv_heads=1,
    mlp_width=64,
  )
  policy = make_policy(config)
  init = jax.jit(policy.init)

  def load(name, *, seed, dtype=jnp.float32, mesh=None, say=None, fetch=False):
    params = init(jax.random.key(seed + (name == "tiny2")))
    params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])
    return LanguageModel(make_policy(config, dtype=dtype), params, Terse())

  return load


@pytest.fixture(autouse=True)
def small(models, monkeypatch):
  monkeypatch.setattr("rl_llm.policy.load.load_model", models)


# Right is what begins with a letter whose code is even; some responses cannot be graded.
REWARD = """
def reward(prompts, completions, **columns):
  kind = ord(completions[0][0]) if completions[0] else 1
  if kind % 7 == 0:
    raise ValueError("no")
  return [float(kind % 2 == 0)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """Eleven ragged problems of two levels; those of the first eight would fit in fewer columns."""
  directory = tmp_path_factory.mktemp("task")
  (directory / "reward.py").write_text(REWARD)
  rows = [
    {"prompt": chr(97 + i) + "x" * (6 * (i // 4) + i % 2), "level": 2 + 8 * (i % 2)}
    for i in range(11)
  ]
  (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (directory / "train.jsonl").write_text('{"prompt": "train"}\n')
  return directory


def settings(files, **changes) -> evaluate.Config:
  """Eleven problems in three batches of four, the last of them filled up."""
  base = {
    "model": "tiny",
    "task": f"jsonl:{files / 'train.jsonl'}",
    "jsonl.held_out_file": str(files / "rows.jsonl"),
    "jsonl.reward_file": str(files / "reward.py"),
    "reward_isolation": "sample",
    "difficulty_column": "level",
    "prompts_per_batch": 4,
    "samples": 4,
    "k": (1, 2, 4),
    "max_new_tokens": 4,
    "reward_workers": 1,
  }
  return replace(evaluate.Config(), base | changes)


# Of one shape whatever the split: five problems, four responses each.
COPY = {
  "task": "copy",
  "reward_isolation": "auto",
  "difficulty_column": "",
  "copy.held_out": 5,
  "prompts_per_batch": 5,
  "max_new_tokens": 3,
}


def outcome(workdir) -> tuple[Any, ...]:
  """All that an evaluation leaves, timings aside; samples.jsonl byte for byte."""
  workdir = Path(workdir)
  result = json.loads((workdir / "result.json").read_text())
  del result["seconds"]
  rows = without_timings(read(workdir / "metrics.jsonl"))
  return (workdir / "samples.jsonl").read_bytes(), rows, result


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  return tmp_path_factory.mktemp("straight")


@pytest.fixture
def finished(straight, files, small):
  """The directory of one finished evaluation that tests share and leave as it is."""
  if not (straight / "result.json").exists():
    before = rollout.generate._cache_size()
    evaluate.measure(settings(files), str(straight))
    assert rollout.generate._cache_size() == before + 1, "one shape, one compilation"
  return straight


def test_the_figures_are_those_of_the_record(finished):
  rows = read(finished / "samples.jsonl")
  result = json.loads((finished / "result.json").read_text())
  assert len(rows) == 11 * 5 == result["responses"] and result["problems"] == 11
  by_problem = {}
  for row in rows:
    by_problem.setdefault(row["problem"], []).append(row)
    kind = ord(row["response"][0]) if row["response"] else 1
    assert row["status"] == ("raised" if kind % 7 == 0 else "ok")
    assert row["correct"] is (kind % 7 != 0 and kind % 2 == 0)
    assert row["answer"] is None and row["split"] == "held_out"
  assert result["failed_grades"] == sum(row["status"] == "raised" for row in rows) > 0
  right, first = [], []
  for of_problem in by_problem.values():
    assert [row["sample"] for row in of_problem] == [0, 1, 2, 3, 4]
    assert [row["greedy"] for row in of_problem] == [False] * 4 + [True]
    right.append(sum(row["correct"] for row in of_problem[:4]))
    first.append(of_problem[4]["correct"])
  assert 0 < sum(right) < 44, "an evaluation in which there is something to count"
  found = result["all"]
  assert list(found) == ["problems", "pass@1", "pass@2", "pass@4", "greedy"]

  def interval(name):
    return pytest.approx(tuple(found[name][end] for end in ("value", "low", "high")), abs=1e-12)

  assert proportion_interval(right, 4) == interval("pass@1")
  assert proportion_interval(first, 1) == interval("greedy")
  # Of the 6 pairs of 4 responses, (4 - c)(3 - c) / 2 have none that is right.
  pairs = [1 - (4 - c) * (3 - c) / 12 for c in right]
  assert estimate_interval(pairs, samples=4, k=2) == interval("pass@2")
  assert proportion_interval([c > 0 for c in right], 1) == interval("pass@4")
  levels = result["by_difficulty"]
  assert list(levels) == ["2", "10"], "in the order of the numbers"
  assert [levels[level]["problems"] for level in levels] == [6, 5]
  weighted = sum(levels[level]["pass@1"]["value"] * levels[level]["problems"] for level in levels)
  assert weighted / 11 == pytest.approx(found["pass@1"]["value"])


def test_majority_counts_the_answers_the_task_reads(tmp_path, files):
  changes = COPY | {"k": (1, 3), "samples": 3, "temperature": 0.3}
  result = evaluate.measure(settings(files, **changes), str(tmp_path))
  rows = [row for row in read(tmp_path / "samples.jsonl") if not row["greedy"]]
  assert all(row["answer"] == row["response"] for row in rows)
  assert max(row["length"] for row in rows) == 3, "--max_new_tokens"
  values = []
  for start in range(0, len(rows), 3):
    votes = Counter(row["answer"] for row in rows[start : start + 3])
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    values.append(np.mean([answer == rows[start]["problem"] for answer in winners]))
  assert result["all"]["majority@3"]["value"] == pytest.approx(np.mean(values))
  assert list(result["by_difficulty"]) == ["length 3"]


def test_a_killed_evaluation_resumes_bit_for_bit(tmp_path, finished, files, monkeypatch, capsys):
  """Killed by a signal after a batch, then again in the middle of writing the next."""
  respond = evaluation.graded_responses
  calls = []

  def stopping(*args, **kwargs):
    calls.append(args)
    os.kill(os.getpid(), signal.SIGINT)
    return respond(*args, **kwargs)

  monkeypatch.setattr(evaluation, "graded_responses", stopping)
  with pytest.raises(Interrupted):
    evaluate.measure(settings(files), str(tmp_path))
  assert len(calls) == 1 and not (tmp_path / "result.json").exists()
  assert "SIGINT: 1 of 3 batches are on record; the same command resumes" in capsys.readouterr().out
  # Batch 1 got as far as its samples, and half a line of metrics.
  lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
  (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:37]) + lines[37][:30])
  with open(tmp_path / "metrics.jsonl", "ab") as file:
    file.write((finished / "metrics.jsonl").read_bytes().splitlines()[1][:40])
  monkeypatch.setattr(evaluation, "graded_responses", respond)
  evaluate.measure(settings(files), str(tmp_path))
  assert outcome(tmp_path) == outcome(finished)


def test_another_k_reads_the_record_anew(tmp_path, finished, files, monkeypatch):
  copied = tmp_path / "copied"
  subprocess.run(["cp", "-r", finished, copied], check=True)
  monkeypatch.setattr(evaluation, "graded_responses", None)
  result = evaluate.measure(settings(files, k=(3,)), str(copied))
  assert list(result["all"]) == ["problems", "pass@3", "greedy"]
  assert (copied / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"seed": 1}, "--seed=1: must be 0, as in the run"),
    ({"model": "tiny2"}, "--model=tiny2: must be tiny, as in the run"),
  ],
)
def test_two_evaluations_do_not_mix(finished, files, changes, said):
  with pytest.raises(ConfigError, match=said):
    evaluate.measure(settings(files, **changes), str(finished))
  with locked(finished / ".lock"), pytest.raises(ConfigError, match="no other process writes to"):
    evaluate.measure(settings(files), str(finished))


def test_what_changes_no_response_may_change_from_one_call_to_the_next():
  own = volatile(evaluate.Config())
  of_machines = {name for name in own if name.startswith(("mesh.", "distributed."))}
  assert len(of_machines) == 11
  always = {"workdir", "code", "reward_workers", "reward_sandbox", "compile_cache", "fetch"}
  assert own - of_machines == always | {"k"}
  pairs = volatile(make_preferences.Config())
  assert pairs - of_machines == always | {"out", "pairs_per_problem"}


def test_weights_that_changed_under_one_name_do_not_mix(finished, files, models, monkeypatch):
  load = "rl_llm.policy.load.load_model"
  monkeypatch.setattr(load, lambda name, **given: models("tiny2", **given))
  with pytest.raises(ConfigError, match="--workdir=.* it was begun with other weights of --model"):
    evaluate.measure(settings(files), str(finished))


def test_devices_that_take_other_batches_do_not_mix(finished, files, monkeypatch):
  """A batch is a line of the record: on eight devices it would have other problems."""
  monkeypatch.setattr("rl_llm.evaluation.measure.row_shards", lambda mesh: 8)
  with pytest.raises(ConfigError, match=r"--workdir=.* begun with batches of \d+ problems, and 8"):
    evaluate.measure(settings(files), str(finished))


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_every_flag_of_the_sampler_changes_the_responses(tmp_path, finished, files):
  """And what does not decide what is drawn changes none of them."""

  def responses(name, **changes):
    evaluate.measure(settings(files, **changes), str(tmp_path / name))
    rows = read(tmp_path / name / "samples.jsonl")
    return {(row["problem"], row["sample"]): row["response"] for row in rows}

  rows = read(finished / "samples.jsonl")
  base = {(row["problem"], row["sample"]): row["response"] for row in rows}
  seen = [base]
  changed = ({"seed": 1}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3}, {"dtype": "bfloat16"})
  for number, changes in enumerate(changed):
    found = responses(str(number), **changes)
    assert found.keys() == base.keys() and found not in seen, changes
    seen.append(found)
  fewer = responses("fewer", problems=7, samples=2, k=(1,), greedy=False, prompts_per_batch=7)
  assert len(fewer) == 14
  assert all(base[key] == response for key, response in fewer.items())


def test_training_problems(tmp_path, files):
  changes = COPY | {"split": "train", "problems": 5, "k": (1,), "greedy": False}
  evaluate.measure(settings(files, **changes), str(tmp_path))
  rows = read(tmp_path / "samples.jsonl")
  task = load_task("copy", held_out=5)
  keys = [problem.key for problem in task.sample(0, 0, 5)]
  assert [row["problem"] for row in rows] == [key for key in keys for _ in range(4)]
  assert {(row["split"], row["greedy"]) for row in rows} == {("train", False)}


def test_what_must_be_known_to_read_the_figures_is_said(tmp_path, files, capsys):
  changes = {"max_prompt_tokens": 12, "overlong_prompt": "truncate_left"}
  result = evaluate.measure(settings(files, **changes), str(tmp_path))
  assert result["overlong_prompts"] == 3, "the last three have 13 or 14 bytes"
  out = capsys.readouterr().out
  assert "3 prompts are over --max_prompt_tokens" in out
  assert out.count("rows to train on") == 1, "the task's note, which names columns that go nowhere"
  assert f"no majority@k: the grader of {settings(files).task.task} does not say" in out
  failed = f"{result['failed_grades']} of 55 grades failed and count as not correct"
  assert f"{failed} (0.0% timed out); samples.jsonl says why" in out


def test_no_prompt_fits(tmp_path, files):
  changes = COPY | {"max_prompt_tokens": 3, "overlong_prompt": "drop"}
  with pytest.raises(PromptTooLong, match="all 5 prompts are over --max_prompt_tokens=3; raise it"):
    evaluate.measure(settings(files, **changes), str(tmp_path))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"k": (1, 8)}, r"--k=1,8: must be at most samples \(4\); try --samples=8"),
    ({"k": ()}, "--k=: must be one or more integers"),
    ({"split": "train"}, "--problems=0: must be at least 1 with --split=train"),
    ({"difficulty_column": "depth"}, "--difficulty_column=depth: must be a column .*: level"),
    ({"task": "sum"}, "no such task"),
    (COPY | {"copy.held_out": 0}, "copy: no problem is held out .*, or choose --split=train"),
  ],
)
def test_what_is_refused_before_anything_is_loaded(tmp_path, files, monkeypatch, changes, said):
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  with pytest.raises((ConfigError, TaskError), match=said):
    evaluate.measure(settings(files, **changes), str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()


def test_overrides_keep_ks_within_the_samples():
  few = replace(evaluate.Config(), {"samples": 5, "model": "tiny"})
  assert evaluate.overrides(few) == {"k": (1, 4), "max_new_tokens": 4}


def test_a_runs_exported_model_is_named_after_the_run(monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(evaluate, "measure", lambda config, workdir: seen.append(workdir))
  for model in ("runs/grpo-a/model", "smollm2", "model"):
    evaluate.main(replace(evaluate.Config(), {"model": model}))
  names = ("grpo-a", "smollm2", "model")
  assert seen == [f"runs/evaluate-{name}-arithmetic-seed0" for name in names]
