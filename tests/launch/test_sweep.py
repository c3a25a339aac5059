"""The algebra of sweeps, and what makes two dictionaries one trial."""

from __future__ import annotations

import doctest
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import sweep as sweep_lib
from launch.sweep import (
  SweepError,
  chain,
  fixed,
  load,
  log_uniform,
  plan,
  product,
  random,
  uniform,
  varying,
  zipped,
)

ROOT = Path(__file__).parents[2]
STANDIN = "tests.launch.standin"

values = st.lists(st.integers(0, 9), max_size=3)


def sweeps(keys):
  """Any sweep over some of the keys."""
  settings = st.fixed_dictionaries({}, optional={key: st.integers(0, 9) for key in keys})
  return st.lists(settings, max_size=4)


def test_doctests():
  assert doctest.testmod(sweep_lib).failed == 0


@given(a=sweeps("ab"), b=sweeps("cd"), c=sweeps("ef"))
def test_product_and_chain_are_an_algebra(a, b, c):
  assert len(product(a, b)) == len(a) * len(b)
  assert product(a) == a == product(a, fixed()) == product(fixed(), a) == chain(a)
  assert product(a, chain()) == chain()
  assert product(product(a, b), c) == product(a, b, c) == product(a, product(b, c))
  assert chain(chain(a, b), c) == chain(a, b, c) == chain(a, chain(b, c))
  assert product(chain(a, b), c) == chain(product(a, c), product(b, c))
  assert all(x | y in product(a, b) for x in a for y in b)


@given(x=values, y=values)
def test_axes_are_sweeps_of_one_key(x, y):
  assert product({"p.x": x}, y=y) == product([{"p.x": i} for i in x], [{"y": i} for i in y])


@given(rows=st.lists(st.tuples(st.integers(), st.integers()), max_size=4))
def test_zipped_axes_move_together(rows):
  axes = {"x": [x for x, _ in rows], "y": [y for _, y in rows]}
  assert zipped(axes) == [{"x": x, "y": y} for x, y in rows]
  assert all(settings in product(axes) for settings in zipped(axes))


@given(
  count=st.integers(0, 6), seed=st.integers(), low=st.floats(1e-8, 1), factor=st.floats(1, 1e4)
)
def test_random_draws_are_kept_when_the_sweep_grows(count, seed, low, factor):
  axes = {"rate": log_uniform(low, low * factor), "shift": uniform(-1, 1)}
  few, many = random(count, seed, axes), random(count + 3, seed, axes)
  assert len(few) == count and many[:count] == few
  assert all(low <= draw["rate"] <= low * factor and -1 <= draw["shift"] <= 1 for draw in many)
  more = random(count, seed, {"loss": ["a", "b"]}, **axes)
  assert [{key: draw[key] for key in axes} for draw in more] == few


def test_log_uniform_is_uniform_in_the_logarithm():
  draws = [each["x"] for each in random(4000, 0, x=log_uniform(1e-6, 1.0))]
  for low in (1e-6, 1e-4, 1e-2):  # A third of the draws in each third of the exponents.
    share = sum(low <= x < 100 * low for x in draws) / 4000
    assert share == pytest.approx(1 / 3, abs=0.03)  # 4 standard deviations of sqrt(2/9 / 4000).
  assert random(8, 0, x=log_uniform(1, 2)) != random(8, 1, x=log_uniform(1, 2))


@pytest.mark.parametrize(
  ("make", "says"),
  [
    (lambda: product({"a": [1]}, a=[2]), "a is set twice, to 1 and to 2"),
    (lambda: product(fixed(a=1), a=[2]), "a is set twice"),
    (lambda: fixed({"a": 1}, a=2), "a is set twice"),
    (lambda: product(task="copy"), r"task='copy': must be a list of values; for one value, fixed"),
    (lambda: product(seed=3), "must be a list of values"),
    (lambda: zipped(a=[1, 2], b=[1]), "of one length; a has 2, b has 1"),
    (lambda: log_uniform(0, 1), r"log_uniform\(0, 1\): must be 0 < low"),
    (lambda: uniform(2, 1), "low <= high"),
  ],
)
def test_what_cannot_be_meant_is_refused(make, says):
  with pytest.raises(SweepError, match=says):
    make()


# --- trials --------------------------------------------------------------------------------------


def ids(*settings):
  return [trial.id for each in settings for trial in plan(STANDIN, [each])]


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ({}, {"steps": 4}),  # a default
    ({}, {"steps": 9}),  # the budget
    ({}, {"journal": "j"}),  # what the experiment calls volatile
    ({"model": "tiny"}, {"model": "tiny", "optimizer.learning_rate": 0.5}),  # the preset's
    ({"loss": "absolute"}, {"loss.name": "absolute"}),
    ({"optimizer.learning_rate": 1}, {"optimizer.learning_rate": 1.0}),
  ],
)
def test_settings_that_resolve_alike_are_one_trial(one, other):
  assert len(set(ids(one, other))) == 1
  assert len(plan(STANDIN, [one, other])) == 1


@pytest.mark.parametrize(
  ("one", "other"),
  [
    ({}, {"seed": 1}),
    ({}, {"optimizer.learning_rate": 0.5}),
    ({"model": "tiny"}, {"optimizer.learning_rate": 0.5}),
    # Where a learning rate falls to, its end belongs to what is computed.
    ({"optimizer.schedule": "linear"}, {"optimizer.schedule": "linear", "steps": 9}),
  ],
)
def test_settings_that_compute_something_else_are_another_trial(one, other):
  assert len(set(ids(one, other))) == 2


def test_another_experiment_is_another_trial_and_a_changed_default_too(monkeypatch):
  import tests.launch.standin as standin

  before = ids({})
  assert [trial.id for trial in plan("experiments.grpo", [{}])] != before
  import dataclasses

  fields = {f.name: f for f in dataclasses.fields(standin.Config)}
  changed = dataclasses.make_dataclass(
    "Config",
    [
      (
        name,
        f.type,
        dataclasses.field(default=5 if name == "fault_at" else f.default, metadata=f.metadata),
      )
      for name, f in fields.items()
    ],
    frozen=True,
  )
  changed.__module__ = standin.__name__  # Where the names in its types are looked up.
  monkeypatch.setattr(standin, "Config", changed)
  assert ids({}) != before


def test_of_equal_trials_the_one_with_most_steps_counts():
  trials = plan(STANDIN, [{"steps": 2}, {"seed": 1}, {"steps": 9}, {"steps": 3}])
  assert [(trial.steps, trial.flags) for trial in trials] == [(9, ["--steps=9"]), (4, ["--seed=1"])]


def test_the_command_is_an_ordinary_one(tmp_path):
  settings = {"loss": "square", "loss.clip": None, "seed": 3, "journal": "a file"}
  (trial,) = plan(STANDIN, [settings])
  command = trial.command(tmp_path, python="python")
  assert command == [
    "python",
    "-m",
    STANDIN,
    "--loss.name=square",
    "--loss.clip=none",
    "--seed=3",
    "--journal=a file",
    f"--workdir={tmp_path / trial.id}",
  ]
  # Pasted into a shell, it runs what the trial says it is.
  line = shlex.join(trial.command(tmp_path)).replace("'--journal=a file'", "--journal=/dev/null")
  assert subprocess.run(line, shell=True, cwd=ROOT).returncode == 0
  recorded = json.loads((tmp_path / trial.id / "config.json").read_text())
  ignored = ("workdir", "journal")
  assert {k: v for k, v in recorded.items() if k not in ignored} == {
    k: v for k, v in trial.config.items() if k not in ignored
  }


def spec(tmp_path, body, experiment=f'EXPERIMENT = "{STANDIN}"'):
  path = tmp_path / "spec.py"
  path.write_text(f"{experiment}\ndef sweep():\n  {body}\n")
  return str(path)


@pytest.mark.parametrize(
  ("body", "says"),
  [
    (
      "yield {}; yield {'optimizer.learningrate': 1.0}",
      "trial 2: --optimizer.learningrate=1.0: must be a field of Config; "
      "did you mean optimizer.learning_rate?",
    ),
    (
      "yield {'optimizer.learning_rate': -1.0}",
      "trial 1: --optimizer.learning_rate=-1.0: must be a finite number > 0",
    ),
    ("yield {'optimizer.learning_rate': float('nan')}", "trial 1: --optimizer.learning_rate=nan"),
    ("yield {'optimizer.learning_rate': '0.1'}", "must be a finite number > 0"),
    ("yield {'seed': True}", "--seed=True: must be an integer"),
    ("yield {'loss': 'sqare'}", "did you mean square?"),
    ("yield {'loss': 'absolute', 'loss.clip': 1.0}", "--loss.clip=1.0: must be left out with"),
    ("yield {'workdir': 'x'}", "--workdir=x: must be left to the launcher"),
    ("import numpy; yield {'seed': numpy.int64(1)}", "not int64; float(...) or int(...)"),
    ("yield {'seed': object()}", "trial 1: seed=<object"),
    ("yield 3", "trial 1: 3: must be a dictionary"),
    ("return []", "must yield at least one"),
    ("from launch.sweep import product; yield from product(seed=3)", "seed=3: must be a list"),
  ],
)
def test_a_wrong_key_or_value_is_found_when_planning(tmp_path, body, says):
  path = spec(tmp_path, body)
  with pytest.raises(SweepError) as error:
    plan(*load(path), where=path)
  assert says in str(error.value) and str(error.value).startswith(path)


def test_an_experiment_with_a_check_of_its_own_is_asked():
  with pytest.raises(SweepError, match="trial 2: --responses_per_prompt=1: must be at least 2"):
    plan("experiments.grpo", [{}, {"responses_per_prompt": 1}])


@pytest.mark.parametrize(
  ("experiment", "says"),
  [
    ("", "must say what to run, such as EXPERIMENT"),
    ('EXPERIMENT = "experiments.grop"', "EXPERIMENT='experiments.grop' cannot be imported"),
  ],
)
def test_a_sweep_says_what_it_runs(tmp_path, experiment, says):
  with pytest.raises(SweepError, match=says):
    plan(*load(spec(tmp_path, "yield {}", experiment)))


def test_no_such_file():
  with pytest.raises(SweepError, match="--sweep=nowhere.py: must be a Python file"):
    load("nowhere.py")


def test_the_sweep_of_the_readme(tmp_path, monkeypatch):
  text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
  program = text.partition("```python\n")[2].partition("```")[0]
  monkeypatch.chdir(tmp_path)
  Path("mine.py").write_text(program)
  assert len(plan(*load("mine.py"))) == 16
  Path("mine.py").write_text(program.replace("learning_rate", "learningrate"))
  with pytest.raises(SweepError) as error:
    plan(*load("mine.py"), where="mine.py")
  assert f"error: {error.value}\n" in text


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "sweeps").glob("*.py")), ids=str)
def test_the_sweeps_that_come_with_it(path):
  experiment, settings = load(str(path))
  trials = plan(experiment, settings)
  assert len(trials) == len(settings) >= 12
  assert len(varying([trial.config for trial in trials])) >= 2
  assert sys.modules.get("sweep_file") is None


@pytest.mark.parametrize(
  "text, said",
  [
    ("EXPERIMENT = 'x'\ndef sweep(:\n  return []\n", r"bad\.py:2: invalid syntax"),
    ("EXPERIMENT = 'x'\nimport nowhere\n", r"bad\.py:2: ModuleNotFoundError: No module named"),
    ("EXPERIMENT = 'x'\ndef sweep():\n  return [1 / 0]\n", r"bad\.py:3: ZeroDivisionError: "),
  ],
)
def test_a_broken_file_is_one_line_that_says_where(tmp_path, text, said):
  path = tmp_path / "bad.py"
  path.write_text(text)
  with pytest.raises(SweepError, match=said) as error:
    load(str(path))
  assert "\n" not in str(error.value)
