"""Preference pairs: which there are, what the file holds, what is counted, survived and refused."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from experiments import make_preferences
from rl_llm.data import DataError, read_dataset
from rl_llm.errors import ConfigError
from rl_llm.evaluation import measure as evaluation
from rl_llm.rollout import preferences
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read, without_timings
from rl_llm.runs.signals import Interrupted, StopSignals
from rl_llm.tasks import Problem, load_task
from tests.experiments.helpers import FULL

CHANGES = {
  "model": "tiny",
  "jsonl.reward_function": "fraction",
  "jsonl.held_out_fraction": 0.3,
  "prompt_format": "plain",
  "problems": 6,
  "samples": 8,
  "pairs_per_problem": 5,
  "prompts_per_batch": 2,
  "max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def task(files):
  """The shared task, whose problems have columns of their own here."""
  rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
  rows = [row | {"answer": str(i), "level": i % 3} for i, row in enumerate(rows)]
  path = files / "columns.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return {"task": f"jsonl:{path}", "jsonl.reward_file": str(files / "reward.py")}


def make(workdir, changes):
  return make_preferences.make(replace(make_preferences.Config(), CHANGES | changes), str(workdir))


def pairs(workdir):
  return [json.loads(line) for line in (workdir / "pairs.jsonl").read_text().splitlines()]


def expected(workdir, *, samples=8):
  """By problem: every pair of different texts of which the first was graded higher."""
  rows = read(workdir / "samples.jsonl")
  found, counts = {}, dict.fromkeys(("failed", "cut_off", "unusable", "equal"), 0)
  for start in range(0, len(rows), samples):
    graded = {}
    for row in rows[start : start + samples]:
      if row["reward"] is None:
        counts["failed"] += 1
      elif row["stop_reason"] != "eos":
        counts["cut_off"] += 1
      elif not row["response"].strip() or "\0" in row["response"]:
        counts["unusable"] += 1
      else:
        graded.setdefault(row["response"], row["reward"])
    candidates = {(a, b) for a in graded for b in graded if graded[a] > graded[b]}
    counts["equal"] += not candidates
    found[rows[start]["problem"]] = (candidates, graded)
  return found, counts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("made") / "run"


@pytest.fixture
def made(place, small, task):
  """The result and the directory of one run, which the tests share and leave as it is."""
  if not (place / "result.json").exists():
    make(place, task)
  return json.loads((place / "result.json").read_text()), place


def test_pairs_are_a_better_and_a_worse_answer_to_one_training_problem(made, task):
  result, workdir = made
  rows, (wanted, counts) = pairs(workdir), expected(workdir)
  assert result["pairs"] == len(rows) > 10
  source = {
    row["prompt"]: row for row in map(json.loads, open(task["task"].removeprefix("jsonl:")))
  }
  assert len(wanted) == result["problems"] == 6
  for problem, (candidates, graded) in wanted.items():
    own = [row for row in rows if row["problem"] == problem]
    texts = {(row["chosen"], row["rejected"]) for row in own}
    assert texts <= candidates
    assert len(texts) == len(own) == min(len(candidates), 5)
    for row in own:
      assert row["chosen_reward"] == graded[row["chosen"]]
      assert row["rejected_reward"] == graded[row["rejected"]]
      assert row["margin"] == row["chosen_reward"] - row["rejected_reward"] > 0
      assert source[row["prompt"]].items() <= row.items()  # With its answer and its level.
  assert result["responses"] == 48
  assert (result["failed_grades"], result["cut_off"]) == (counts["failed"], counts["cut_off"])
  assert (result["unusable"], result["problems_without_spread"]) == (
    counts["unusable"],
    counts["equal"],
  )
  assert counts["cut_off"] > 0
  assert json.loads((workdir / "result.json").read_text()) == result


def test_the_file_is_one_that_dpo_reads(made):
  _, workdir = made
  dataset = read_dataset(str(workdir / "pairs.jsonl"))
  assert dataset.format == "preference"
  assert [example.prompt for example in dataset.examples] == [r["prompt"] for r in pairs(workdir)]
  assert set(dataset.examples[0].columns) == {
    "answer",
    "level",
    "problem",
    "chosen_reward",
    "rejected_reward",
    "margin",
  }


def test_conversations_stay_conversations():
  messages = [{"role": "user", "content": "7 + 5"}]
  problem = Problem(messages, {"answer": "12"}, "7 + 5")
  graded = [
    {"reward": reward, "status": "ok", "stop_reason": "eos", "response": text}
    for reward, text in ((1.0, "12"), (0.0, "13"), (1.0, "12"))
  ]
  [line], _ = preferences.pair_up([problem], [messages], graded, pairs_per_problem=8, seed=0)
  assert line["prompt"] == messages
  assert line["chosen"] == [{"role": "assistant", "content": "12"}]
  assert line["rejected"] == [{"role": "assistant", "content": "13"}]


@pytest.mark.parametrize(
  ("layout", "prompt", "wanted"),
  [
    (("chat", None), "2+2", "2+2"),
    (
      ("chat", "Be brief."),
      "2+2",
      [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2"}],
    ),
    (
      ("chat", "Be brief."),
      [{"role": "system", "content": "Hi."}, {"role": "user", "content": "2+2"}],
      [{"role": "system", "content": "Hi."}, {"role": "user", "content": "2+2"}],
    ),
    (("plain", None), [{"role": "user", "content": "2+2"}], "2+2"),
  ],
)
def test_the_prompt_is_what_the_model_was_asked(layout, prompt, wanted):
  prompt_format, system_prompt = layout
  found = preferences.as_asked(prompt, prompt_format, system_prompt=system_prompt)
  assert found == wanted


def test_held_out_problems_never_appear(made, task):
  _, workdir = made
  options = {"held_out_fraction": 0.3, "reward_function": "fraction"}
  jsonl = load_task(task["task"], reward_file=task["jsonl.reward_file"], **options)
  assert len(jsonl.held_out) > 3
  assert not {row["problem"] for row in pairs(workdir)} & {p.key for p in jsonl.held_out}

  arithmetic = load_task("arithmetic")
  every = preferences.different_problems(arithmetic, 0, limit=1000)
  keys = [problem.key for problem in every]
  assert len(set(keys)) == len(keys) == 144 - len(arithmetic.held_out)
  assert not set(keys) & {p.key for p in arithmetic.held_out}
  few = preferences.different_problems(arithmetic, 0, limit=10)
  assert [problem.key for problem in few] == keys[:10]
  other = preferences.different_problems(arithmetic, 1, limit=10)
  assert [problem.key for problem in other] != keys[:10]


def test_an_interrupted_run_resumes_and_ends_the_same(made, tmp_path, small, task, monkeypatch):
  result, straight = made
  out = tmp_path / "chosen.jsonl"
  changes = task | {"out": str(out)}
  for batch in (2, 0):  # Before the third batch, and before it again.
    checks = iter([False] * batch + [True])

    def check(signals, checks=checks):
      if next(checks):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
      patched.setattr(StopSignals, "check", check)
      make(tmp_path / "cut", changes)
    assert not out.exists()
    assert {row["step"] for row in read(tmp_path / "cut" / "samples.jsonl")} == {0, 1}
  resumed = make(tmp_path / "cut", changes)
  assert out.read_bytes() == (straight / "pairs.jsonl").read_bytes()
  records = [
    (without_timings(read(w / "metrics.jsonl")), read(w / "samples.jsonl"))
    for w in (straight, tmp_path / "cut")
  ]
  assert records[0] == records[1]
  timed = {"seconds", "out"}
  assert {k: v for k, v in resumed.items() if k not in timed} == {
    k: v for k, v in result.items() if k not in timed
  }

  # All is on record: other pairs need no sample.
  monkeypatch.setattr(evaluation, "graded_responses", None)
  fewer = make(tmp_path / "cut", changes | {"pairs_per_problem": 2})
  assert 0 < fewer["pairs"] < result["pairs"]
  with pytest.raises(ConfigError, match="--temperature=0.5.*another --workdir"):
    make(tmp_path / "cut", changes | {"temperature": 0.5})


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_flags_that_change_what_is_sampled(tmp_path, small, task):
  flags = [
    {"seed": 1},
    {"temperature": 0.5},
    {"top_k": 20},
    {"top_p": 0.5},
    {"max_new_tokens": 4},
    {"prompt_format": "chat"},
    {"prompt_format": "chat", "system_prompt": "Be brief."},
    {"overlong_prompt": "drop", "max_prompt_tokens": 12, "problems": 6},
  ]
  sampled = []
  for number, changes in enumerate([{}, *flags]):
    make(tmp_path / str(number), task | {"problems": 2} | changes)
    rows = read(tmp_path / str(number) / "samples.jsonl")
    texts = [(row["problem"], row["response"]) for row in rows]
    assert texts not in sampled, changes
    sampled.append(texts)


def test_failed_grades_are_no_answers(tmp_path, small, task):
  changes = task | {"jsonl.reward_function": "lonely"}
  with pytest.raises(
    DataError,
    match=r"none of 6 problems has a better and a worse answer.*"
    r"0 failed grades, [1-9]\d* no opinion, .*"
    r"6 problems without spread.*--samples",
  ):
    make(tmp_path / "run", changes)
  rows = read(tmp_path / "run" / "samples.jsonl")
  assert {row["reward"] for row in rows} == {None, 1.0}
  assert not (tmp_path / "run" / "result.json").exists()


def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, files, task, monkeypatch):
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  path = tmp_path / "rows.jsonl"
  path.write_text('{"prompt": "a", "margin": 1}\n{"prompt": "b", "margin": 1}\n')
  with pytest.raises(DataError, match=r"a column 'margin'.*rename it"):
    make(tmp_path / "run", task | {"task": f"jsonl:{path}", "jsonl.held_out_fraction": 0.0})
  with pytest.raises(ConfigError, match=r"--out=.*a directory that exists"):
    make(tmp_path / "run", task | {"out": str(tmp_path / "nowhere" / "pairs.jsonl")})


def test_weights_that_changed_are_refused(tmp_path, small, task, monkeypatch):
  make(tmp_path, task | {"problems": 2})
  monkeypatch.setattr(evaluation, "fingerprint", lambda params: "other weights")
  with pytest.raises(ConfigError, match="--workdir=.* it was begun with other weights of --model"):
    make(tmp_path, task | {"problems": 2})


def test_text_that_no_file_can_hold_is_left_out():
  assert [preferences.readable(text) for text in ("a", " \n", "a\0", "\ud800")] == [
    True,
    False,
    False,
    False,
  ]
  assert np.all([preferences.readable(text) for text in ("é", "\x1b[31m", " 4")])
