"""Functions as settings, named for the record, and as graders in the trainer's process."""

from __future__ import annotations

import importlib.util

import pytest

from rl_llm.errors import ConfigError
from rl_llm.rewards import InProcess, RewardError, RewardPool, RewardSource
from rl_llm.runs.functions import Function, from_file, named

SOURCE = """
def letters(prompts, completions, answer, **columns):
  if "boom" in completions:
    raise ValueError("no")
  return [None if text == "?" else float(text == right)
          for text, right in zip(completions, answer)]

def broken(prompts, completions, **columns):
  return [1.0]

def runs(prompts, completions, **columns):
  return [eval(text) for text in completions]

def messages(prompts, completions, log_extra, log_metric, **columns):
  log_extra("said", [message[0]["content"] for message in completions])
  log_metric("count", len(completions))
  return [1.0 for _ in completions]
"""


@pytest.fixture
def module(tmp_path):
  path = tmp_path / "graders.py"
  path.write_text(SOURCE)
  spec = importlib.util.spec_from_file_location("graders", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_a_function_is_graded_as_in_a_worker(module):
  prompts, right = [*"pppp", *"qqqq", *"rrrr"], [{"answer": "a"}] * 12
  said = ["a", "b", "?", "a", "boom", "a", "b", "c", *"aaaa"]
  how = {"group_size": 4, "step": 3, "steps": 9}
  with InProcess(module.letters) as grader:
    here = grader.score(prompts, said, right, **how)
  source = RewardSource(module.__file__, "letters")
  with RewardPool(source, workers=1, deadline=60, allow_weak_sandbox=True) as pool:
    there = pool.score(prompts, said, right, **how)
  assert here == there
  statuses = ["ok"] * 2 + ["not_applicable", "ok"] + ["raised"] * 4 + ["ok"] * 4
  assert [result.status for result in here] == statuses


def test_what_a_function_logs_and_the_form_of_messages(module):
  prompt = [{"role": "user", "content": "hi"}]
  with InProcess(module.messages, unit="batch") as grader:
    one, two = grader.score([prompt] * 2, ["a", "b"], [{}, {}])
  assert (one.extra, two.extra) == ({"said": "a"}, {"said": "b"}) and one.metrics == {"count": 2.0}


def test_a_function_that_fails_everywhere_ends_the_run_with_its_name(module):
  with InProcess(module.broken) as grader:
    with pytest.raises(RewardError, match="graders.broken failed on 4 of 4 .*returned 1 reward"):
      grader.score(["p"] * 4, list("abcd"), [{}] * 4, group_size=2)


def test_a_function_that_runs_what_a_model_wrote_is_refused(module):
  with pytest.raises(RewardError, match="graders.runs uses eval: .* --jsonl.reward_file"):
    InProcess(module.runs)


def test_the_text_of_a_function_names_it_and_its_source(tmp_path, module):
  def text_of(source):
    (tmp_path / "one.py").write_text(source)
    from_file.cache_clear()
    return str(Function.of("reward", from_file("reward", str(tmp_path / "one.py"), "f")))

  first = text_of("def f(x):\n  return 1\n")
  assert first.startswith("python:one.f@") and len(first) == len("python:one.f@") + 12
  assert Function.of("reward", module.letters).function is module.letters
  with pytest.raises(ConfigError, match="--reward=builtins.len: must be a function whose source"):
    Function.of("reward", len)


def test_functions_of_files(tmp_path):
  path = tmp_path / "mine.py"
  (tmp_path / "neighbour.py").write_text("value = 7\n")
  path.write_text("import neighbour\ndef f():\n  return neighbour.value\n\ndef _g(): ...\n")
  assert named("task", f"{path}:f")() == 7 and named("task", "copy") is None
  for text, said in (
    (f"{tmp_path}/no.py:f", "a file that exists"),
    (f"{path}:g", "a function of .*mine.py; it has f"),
  ):
    with pytest.raises(ConfigError, match=said):
      named("task", text)
  path = tmp_path / "bad.py"
  path.write_text("x = 1\n\n1 / 0\n")
  with pytest.raises(ConfigError, match=r"can run; .*bad.py:3: ZeroDivisionError"):
    named("task", f"{path}:f")
  path = tmp_path / "cut.py"
  path.write_text("x = 1\ndef f(:\n")
  with pytest.raises(ConfigError, match=r"can run; .*cut.py:2: SyntaxError"):
    named("task", f"{path}:f")
