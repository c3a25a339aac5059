"""`--checkpoint.best`: the best step's checkpoint outlives newer ones, also across kills."""

from __future__ import annotations

import doctest

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo
from rl_llm.errors import ConfigError
from rl_llm.evaluation import Evaluation
from rl_llm.parallel.sharding import make_mesh
from rl_llm.runs import best as best_steps
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import check, replace
from rl_llm.training import loop
from tests.experiments import helpers
from tests.experiments.conftest import files, small  # noqa: F401  fixtures
from tests.representatives import mostly_slow
from tests.test_origin import Config, Counted, Drawn

ACCURACIES = {0: 0.9, 2: 0.2, 4: 0.8, 6: 0.5, 8: 0.8, 10: 0.1, 12: 0.3}


def train(workdir, *, until=None, keep_best=True, accuracies=ACCURACIES):
  """Twelve steps, evaluated at every second and saved at every third; killed before `until`."""

  def sample(state, step, clock):
    if step == until:
      raise KeyboardInterrupt
    return Drawn({}, [])

  def learn(state, drawn, step, clock):
    return Counted(state.steps + 1), loop.Learned({})

  def evaluate(state, step):
    assert float(state.steps) == step
    figures = {"accuracy": accuracies[step], "low": 0.0, "high": 1.0}
    return Evaluation({f"eval/sampled_{name}": value for name, value in figures.items()}, [])

  kept = {"checkpoints_kept": 1, "keep_best": keep_best}
  with loop.open_run(Config(steps=12), workdir, steps=12, **kept) as run:
    begun = loop.begin(run, Counted, jnp.float32(0), steps=12, mesh=make_mesh())
    with loop.open_record(run, begun[0], samples_every=0, max_skipped=9) as record:
      seams = {"sample": sample, "learn": learn, "evaluate": evaluate, "record": record}
      loop.train_loop(run, *begun, **seams, schedule=loop.Schedule(12, 2, 3))
    loop.finish(run, checkpoints_kept=1)
  return Checkpointer(workdir / "checkpoints").steps()


def test_doctests():
  assert doctest.testmod(best_steps).failed == 0


def test_the_best_stays_next_to_the_newest(tmp_path, capsys):
  """Step 4, the first of two that are equal, is saved though no checkpoint was due there."""
  assert train(tmp_path / "run") == [4, 12]
  assert train(tmp_path / "without", keep_best=False) == [12]
  said = [line for line in capsys.readouterr().out.splitlines() if "the best so far" in line]
  assert [line.rpartition("@")[2] for line in said] == ["2", "4"]
  state = Checkpointer(tmp_path / "run" / "checkpoints")
  assert float(state.restore(Counted(jnp.float32(0)), 4)[1].steps) == 4


@pytest.mark.parametrize("until", mostly_slow(range(3, 12), quick=[2, 5]))
def test_killed_at_any_step_it_keeps_the_same(tmp_path, until):
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, until=until)
  assert train(tmp_path) == [4, 12]


def test_the_best_of_a_run_that_asks_for_it_later_is_the_best_that_is_left(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    train(tmp_path, until=7, keep_best=False)  # Step 4 was never saved, step 6 was.
  assert train(tmp_path) == [8, 12]


def test_what_is_not_measured_is_never_best():
  assert best_steps.better(None, 5, {"eval/sampled_accuracy": None}) is None
  assert best_steps.better(None, 5, {"eval/sampled_accuracy": np.nan}) is None
  assert best_steps.better(None, 5, {"eval/pair_accuracy": 0.5}).step == 5
  assert best_steps.score({"eval/token_loss": 1.0}) > best_steps.score({"eval/token_loss": 2.0})


@pytest.mark.slow
def test_the_flag_reaches_the_checkpoints_and_needs_an_evaluation(tmp_path, small, files):  # noqa: F811
  changes = {"checkpoint.best": True, "checkpoint.keep": 1, "eval.every": 1, "steps": 3}
  helpers.run(grpo, tmp_path, helpers.settings(files, **changes))
  lines = helpers.outcome(tmp_path).metrics
  kept = Checkpointer(tmp_path / "checkpoints").steps()
  found = best_steps.best_recorded(lines, range(1, 4))
  assert kept == sorted({found.step, 3})
  with pytest.raises(ConfigError, match="checkpoint.best=true.*left out with --eval.every=0"):
    check(replace(grpo.Config(), {"checkpoint.best": True, "eval.every": 0}))
