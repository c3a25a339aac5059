"""math-verify as a grader: what it accepts, behind the sandbox and within its time."""

import time

import pytest

from rl_llm.rewards import RewardError, RewardPool, isolated
from rl_llm.tasks import TaskError, load_task

pytest.importorskip("math_verify", reason="the extra math is not installed")


@pytest.fixture
def task(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(f'{{"prompt": "half of {n}?", "answer": "{n}/2"}}\n' for n in range(40)))
  return load_task(f"jsonl:{path}", reward_function="math_verify")


def grade(task, texts, answer):
  with RewardPool(task.reward, workers=2, allow_weak_sandbox=True) as pool:
    return pool.score(["q"] * len(texts), texts, [{"answer": answer}] * len(texts))


@pytest.mark.slow
def test_equal_mathematics_is_right_however_it_is_written(task):
  right = ["$\\frac{1}{2}$", "so it is \\boxed{0.5}.", "The answer is 1/2", "$2^{-1}$"]
  wrong = ["$\\frac{1}{3}$", "\\boxed{2}", "no idea", ""]
  found = grade(task, right + wrong, "1/2")
  assert [result.value for result in found] == [1.0] * 4 + [0.0] * 4
  assert [result.value for result in grade(task, ["$x+y$"], "$y + x$")] == [1.0]


@pytest.mark.slow
def test_what_takes_too_long_is_wrong_and_no_failure(task):
  begun = time.monotonic()
  texts = ["$9^{9^{9^{9^{9}}}}$", "$1000000!!!$", "$\\frac{1}{2}$"]
  found = grade(task, texts, "1/2")
  assert [(result.value, result.status) for result in found] == [(0.0, "ok")] * 2 + [(1.0, "ok")]
  assert time.monotonic() - begun < 60


def test_it_runs_text_so_each_response_is_a_call(task):
  assert task.reward.runs_text and task.reward.unit == "sample" and not task.reward.shares_process
  with pytest.raises(RewardError, match="runs a response as a program"):
    isolated(task.reward, "batch")


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(TaskError, match="pip install math-verify"):
    load_task(f"jsonl:{tmp_path}/rows.jsonl", reward_function="math_verify")
