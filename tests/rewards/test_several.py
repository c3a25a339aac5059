"""Several rewards of one response: which are named, how they add up, and how each is normalised."""

import doctest

import numpy as np
import pytest

from experiments import grpo
from rl_llm import advantages
from rl_llm.errors import ConfigError
from rl_llm.rewards import InProcess, RewardError, RewardResult, Several, several, terms
from rl_llm.rollout.grading import is_correct, reward_parts
from rl_llm.runs import identity, report_figures, report_plots
from tests.experiments.conftest import files, small  # noqa: F401  (fixtures)
from tests.experiments.helpers import run, settings
from tests.representatives import mostly_slow


def test_what_a_setting_lists():
  found = terms("a.py:f*1.0, b.py:g*0.2,task*-1e-1")
  assert found == (("f", 1.0, "a.py:f"), ("g", 0.2, "b.py:g"), ("task", -0.1, "task"))
  assert terms("a.py:f*2") == (("f", 2.0, "a.py:f"),)
  for one in ("task", "a.py:f", "model:runs/rm/model", "python:mine.f@0123"):
    assert terms(one) == ()


def test_functions_of_one_name_are_told_apart_by_their_file():
  assert [term.name for term in terms("x/a.py:reward,b.py:reward,b.py:g")] == [
    "a.reward",
    "b.reward",
    "g",
  ]


@pytest.mark.parametrize(
  ("text", "part"),
  [
    ("a.py:f,model:runs/rm", "model:runs/rm"),
    ("a.py:f*much", "a.py:f.much"),
    ("a.py:f*nan,task", "a.py:f.nan"),
    ("task,", "''"),
    ("task,task*2", "twice"),
  ],
)
def test_what_is_no_list_of_rewards_is_one_line(text, part):
  with pytest.raises(RewardError, match=part) as caught:
    terms(text)
  assert "\n" not in str(caught.value) and str(caught.value).startswith("rewards ")


def lengths(completions, **columns):
  return [float(len(text)) for text in completions]


def shouts(completions, log_metric, **columns):
  log_metric("shouting", 0.5)
  return [None if text == "" else float(text.isupper()) for text in completions]


def fails_on_b(completions, **columns):
  return ["no number" if text == "b" else 1.0 for text in completions]


def graded(*named, texts):
  with Several(
    [InProcess(f, unit="batch") for f, _ in named], [(f.__name__, w) for f, w in named]
  ) as g:
    return g.score(["q"] * len(texts), texts, [{}] * len(texts))


def test_rewards_add_up_by_their_weights():
  found = graded((lengths, 0.5), (shouts, 2.0), texts=["AB", "abc", ""])
  assert [result.value for result in found] == [0.5 * 2 + 2, 1.5, 0.0]
  assert [result.parts for result in found] == [
    {"lengths": 2.0, "shouts": 1.0},
    {"lengths": 3.0, "shouts": 0.0},
    {"lengths": 0.0, "shouts": None},
  ]
  assert found[0].metrics == {"shouting": 0.5}
  means = {"reward_lengths": pytest.approx(5 / 3), "reward_shouts": 0.5}
  assert reward_parts(found) == means


def test_a_response_that_one_cannot_grade_has_no_sum():
  found = graded((lengths, 1.0), (fails_on_b, 1.0), texts=["b", "cc", "d"])
  assert [result.status for result in found] == ["invalid", "ok", "ok"]
  assert found[0].value is None and found[0].detail.startswith("fails_on_b: ")
  assert found[0].parts == {"lengths": 1.0, "fails_on_b": None}


def test_the_first_says_what_is_right():
  part = {"right": 1.0, "short": 0.0}
  assert is_correct(RewardResult(0.2, "ok", parts=part), 1.0)
  assert not is_correct(RewardResult(2.0, "ok", parts={"right": 0.5, "short": 9.0}), 1.0)


def test_their_files_are_part_of_what_a_run_is(tmp_path):
  for name in "ab":
    (tmp_path / f"{name}.py").write_text("def f(completions, **c):\n  return [1.0]\n")
  text = f"{tmp_path}/a.py:f,{tmp_path}/b.py:f*0.5"
  config = grpo.Config(model="tiny", task="copy", reward=text)
  before = identity.hashes(config)["reward"]
  (tmp_path / "b.py").write_text("def f(completions, **c):\n  return [2.0]\n")
  assert identity.hashes(config)["reward"] != before and identity.is_code("reward", config)


def test_each_has_a_curve():
  rows = [{"step": s, "reward_mean": 1.0, "reward_f": s / 9, "reward_g": 1.0} for s in range(9)]
  page = report_figures.curves(rows)
  assert "Each of several rewards" in page and ">f<" in page and ">g<" in page
  assert report_plots.several_rewards([{"reward_mean": 1.0, "reward_best": 2.0}]) == ()


def test_gdpo_refuses_what_it_has_no_use_for():
  with pytest.raises(ConfigError, match="--advantage=gdpo: .*one reward.*--reward=task,FILE.py"):
    grpo.check(grpo.Config(model="tiny", task="copy", advantage="gdpo"))
  reward = "task,mine.py:f*0.2"
  further = {"overlong.cache": 2.0}
  config = grpo.Config(model="tiny", task="copy", advantage="gdpo", reward=reward, **further)
  with pytest.raises(ConfigError, match="--overlong.cache"):
    grpo.check(config)
  grpo.check(grpo.Config(model="tiny", task="copy", advantage="gdpo", reward=reward))


@pytest.mark.parametrize("advantage", mostly_slow(["group_relative", "gdpo"], quick=[1]))
def test_a_run_with_two_rewards(advantage, tmp_path, small, files):  # noqa: F811
  path = files / "reward.py"
  reward = f"{path}:fraction*1.0,{path}:lonely*0.2"
  changes = {"reward": reward, "advantage.name": advantage, "steps": 1, "eval.every": 1}
  found = run(grpo, tmp_path, settings(files, **changes))
  rows = [row for row in found.samples if row["split"] == "train"]
  for row in rows:
    lonely = row["reward_lonely"]
    assert row["reward"] == pytest.approx(row["reward_fraction"] + 0.2 * (lonely or 0.0))
  first = found.metrics[0]
  assert first["reward_mean"] == pytest.approx(np.mean([row["reward"] for row in rows]))
  fractions = [row["reward_fraction"] for row in rows]
  assert first["reward_fraction"] == pytest.approx(np.mean(fractions))
  assert first["reward_lonely"] == 1.0
  assert first["accuracy"] == np.mean([value >= 1 for value in fractions])
  names = ("reward_fraction", "reward_lonely")
  values = np.array([[row[n] if row[n] is not None else np.nan for n in names] for row in rows])
  groups = values.reshape(-1, 4, 2)
  if advantage == "gdpo":
    known = np.isfinite(groups)
    wanted = advantages.gdpo(np.nan_to_num(groups), np.array([1.0, 0.2]), where=known)
  else:
    wanted = advantages.group_relative(np.nan_to_num(groups) @ np.array([1.0, 0.2]))
  given = np.array([row["advantage"] for row in rows])
  np.testing.assert_allclose(given, np.asarray(wanted).reshape(-1), atol=1e-5)


def test_doctests():
  assert doctest.testmod(several).failed == 0
  assert doctest.testmod(report_plots).failed == 0
