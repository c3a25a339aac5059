"""Successive halving: who is promoted, that nothing runs twice, that a killed search resumes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import time

import pytest

from launch import halving, run, state
from launch.halving import Halving, survivors, with_steps
from launch.sweep import SweepError, plan
from rl_llm.errors import ConfigError
from tests.launch.test_local import PATIENCE, Sweep

RATES = [0.1, 0.2, 0.3, 0.4, 0.5]
BUDGETS = "--halving.steps=2,4,9"


@pytest.mark.parametrize("seed", range(20))
def test_survivors_against_a_loop(seed):
  rng = random.Random(seed)
  settings, keep = rng.randint(1, 9), rng.randint(2, 4)
  groups = {f"{s}-{r}": str(s) for s in range(settings) for r in range(rng.randint(1, 3))}
  scores = {trial: rng.choice([None, *range(50)]) for trial in groups}
  ranked = []
  for setting in map(str, range(settings)):
    of_setting = [scores[trial] for trial, group in groups.items() if group == setting]
    if None not in of_setting:
      ranked.append((-sum(of_setting) / len(of_setting), int(setting)))
  best = [str(setting) for _, setting in sorted(ranked)[: math.ceil(settings / keep)]]
  assert survivors(scores, groups, keep) == {t for t, group in groups.items() if group in best}


def steps_of(sweep):
  """How often each trial took each step."""
  taken = {}
  for line in sweep.journal.read_text().splitlines():
    trial, _, *words = line.split()
    if words[0] == "step":
      taken.setdefault(trial, []).append(int(words[1]))
  return taken


def expected():
  """Rate -> steps, the highest being best: 5 rates, then 3 of them, then 2."""
  return {0.1: 2, 0.2: 2, 0.3: 4, 0.4: 9, 0.5: 9}


def by_rate(sweep):
  """learning rate -> the directories of its trials."""
  found = {}
  for path in sweep.workdir.glob("*/trial.json"):
    config = json.loads(path.read_text())["config"]
    found.setdefault(config["optimizer.learning_rate"], []).append(path.parent)
  return found


def check_outcome(sweep):
  for rate, (directory,) in by_rate(sweep).items():
    assert state.read_json(directory / "result.json")["steps"] == expected()[rate]
  assert sorted(by_rate(sweep)) == RATES


@pytest.mark.slow
def test_the_best_half_goes_on_from_where_it_was(tmp_path):
  sweep = Sweep(tmp_path, {"optimizer.learning_rate": RATES})
  code, said = sweep.run(BUDGETS, "--halving.keep=2", "--parallel=4")
  assert code == 0, said
  assert "2 steps: 3 of 5 trials continue" in said and "4 steps: 2 of 3 trials continue" in said
  check_outcome(sweep)
  wanted = {
    directory.name: list(range(expected()[rate]))
    for rate, directories in by_rate(sweep).items()
    for directory in directories
  }
  assert steps_of(sweep) == wanted  # Each step once: nothing was begun anew.
  code, said = sweep.run(BUDGETS, "--halving.keep=2")
  assert code == 0 and steps_of(sweep) == wanted
  code, said = sweep.run("--halving.steps=1,9")
  assert code == 2 and "has gone on to 2 steps" in said


@pytest.mark.slow
def test_a_killed_search_goes_on(tmp_path):
  sweep = Sweep(tmp_path, {"optimizer.learning_rate": RATES}, seconds=0.1)
  flags = (BUDGETS, "--halving.keep=2", "--parallel=4")
  launcher = sweep.start(*flags)
  until = time.monotonic() + PATIENCE
  while "2 of 3 trials continue" not in sweep.output() and time.monotonic() < until:
    time.sleep(0.05)
  os.kill(launcher.pid, signal.SIGKILL)
  launcher.wait()
  first = json.loads((sweep.workdir / "halving.json").read_text())
  assert len(first) == 2
  code, said = sweep.run(*flags)
  assert code == 0, said
  check_outcome(sweep)
  last = json.loads((sweep.workdir / "halving.json").read_text())
  assert len(last) == 3 and first.items() <= last.items()


@pytest.mark.slow
def test_a_failed_trial_takes_its_setting_out(tmp_path):
  sweep = Sweep(tmp_path, {"optimizer.learning_rate": [0.1, 0.9]})
  spec = (sweep.path / "spec.py").read_text()
  (sweep.path / "spec.py").write_text(
    spec.replace("  return ", "  trials = ") + "  trials[1]['fault'] = 'raise'\n  return trials\n"
  )
  code, said = sweep.run("--halving.steps=2,4", "--halving.keep=2", "--retries=0")
  assert code == 1 and "2 steps: 1 of 2 trials continue" in said, said
  assert state.read_json(by_rate(sweep)[0.1][0] / "result.json")["steps"] == 4


def trials(**settings):
  return plan("tests.launch.standin", [{"journal": "x", "seed": s, **settings} for s in (0, 1)])


def test_what_does_not_fit(tmp_path):
  assert [t.steps for t in with_steps(trials(), 7)] == [7, 7]
  assert [t.id for t in with_steps(trials(), 7)] == [t.id for t in trials()]
  with pytest.raises(SweepError, match="halving.steps=7: .* other trials .*schedule=constant"):
    with_steps(trials(**{"optimizer.schedule": "linear"}), 7)
  for steps in ((5, 5), (0, 3), (9, 3)):
    with pytest.raises(ConfigError, match="halving.steps=.*rising"):
      halving.check(Halving(steps=steps))
  with pytest.raises(ConfigError, match="halving.steps=1,2: .*left out with --backend=slurm"):
    run.check(run.Config(sweep="x.py", backend="slurm", halving=Halving(steps=(1, 2))))
  (trial, _) = with_steps(trials(), 7)
  directory = tmp_path / trial.id
  directory.mkdir()

  def score(metric="eval/sampled_accuracy"):
    return halving.score(directory, trial, metric, flag="halving.metric")

  assert score() is None
  state.write_json(directory / "result.json", {"steps": 7, "after": {"loss": 2.0}})
  with pytest.raises(SweepError, match="halving.metric=eval/sampled_accuracy: .* has loss"):
    score()
  assert score("loss") == 2.0


@pytest.mark.slow
def test_lowest_is_best(tmp_path):
  """With a loss, the smallest figure is promoted."""
  sweep = Sweep(tmp_path, {"optimizer.learning_rate": [0.1, 0.9]})
  code, said = sweep.run("--halving.steps=2,4", "--halving.keep=2", "--halving.lowest")
  assert code == 0, said
  steps = {r: state.read_json(d[0] / "result.json")["steps"] for r, d in by_rate(sweep).items()}
  assert steps == {0.1: 4, 0.9: 2}
