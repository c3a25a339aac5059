"""A run begins with another run's weights, and an evaluation measures them."""

from __future__ import annotations

import shutil
import types

import jax
import numpy as np
import pytest

from experiments import distill, grpo, ppo, setup
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read
from tests.experiments import helpers
from tests.experiments.helpers import outcome, settings

RATE = {"optimizer.learning_rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return tmp_path_factory.mktemp("begun_with") / "earlier"


@pytest.fixture
def earlier(place, small, files):
  """A run of two steps, both of which it has kept; tests share it and leave it as it is."""
  if not place.exists():
    helpers.run(grpo, place, settings(files, **RATE) | {"checkpoint.every": 1})
  return place


def loaded(**changes):
  """The weights that a command with these settings would load."""
  run = types.SimpleNamespace(console=types.SimpleNamespace(say=lambda line: None))
  return leaves(setup.load_language_model(replace(grpo.Config(), changes), run, None).params)


def teacher(name):
  """The model that distillation would load as its teacher."""
  run = types.SimpleNamespace(console=types.SimpleNamespace(say=lambda line: None))
  config = replace(distill.Config(), {"model": "tiny", "teacher": name})
  student = setup.load_language_model(config, run, None)
  return setup.load_teacher(config, run, setup.Model(*student[::2], None, None))


def leaves(params):
  """{path: leaf} of a tree of dictionaries."""
  found = jax.tree_util.tree_leaves_with_path(params)
  return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in found}


def saved(run, step):
  """The weights in a checkpoint, without the prefix of the state's field."""
  manifest = run / "checkpoints" / str(step)
  assert manifest.exists()
  return {
    path.partition("params/")[2]: leaf
    for path, leaf in outcome(run).params.items()
    if path.startswith("params/")
  }


def equal(a, b):
  return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_run_begins_with_the_weights_of_another(tmp_path, earlier, files):
  last = saved(earlier, 2)
  assert equal(loaded(model=str(earlier)), last)
  assert equal(loaded(model=f"{earlier}@2"), last)
  assert equal(loaded(model="tiny", init_from=str(earlier)), last)
  first = loaded(model=f"{earlier}@1")
  assert first.keys() == last.keys() and not equal(first, last)
  for name, wanted in ((earlier, last), (f"{earlier}@1", first)):
    assert equal(leaves(teacher(str(name)).params), wanted)
  changes = settings(files, steps=1, init_from=str(earlier), seed=5, **RATE)
  later = helpers.run(grpo, tmp_path / "later", changes)
  before = read(earlier / "metrics.jsonl")[-1]
  figures = {name: value for name, value in before.items() if name.startswith("eval/")}
  assert figures and figures.items() <= read(tmp_path / "later/metrics.jsonl")[0].items()
  assert [row["step"] for row in later.metrics] == [0, 1]


@pytest.mark.slow
def test_the_moments_come_along_where_they_are_asked_for(tmp_path, earlier, files):
  def updates(name, **changes):
    changes = settings(files, steps=1, init_from=str(earlier), **RATE) | changes
    state = helpers.run(grpo, tmp_path / name, changes).state
    return {int(leaf) for path, leaf in state.items() if path.endswith("/count")}

  assert updates("fresh") == {1}
  assert updates("continued", init_moments=True) == {3}


@pytest.mark.slow
def test_adapters_are_merged(tmp_path, small, files):
  changes = settings(files, steps=1, **RATE) | {"lora.rank": 2}
  helpers.run(grpo, tmp_path / "adapted", changes)
  plain, merged = loaded(model="tiny"), loaded(model=str(tmp_path / "adapted"))
  assert plain.keys() == merged.keys()
  differ = {name for name in plain if not np.array_equal(plain[name], merged[name])}
  assert differ and all("attention" in name or "mlp" in name for name in differ)


@pytest.mark.slow
def test_a_policy_among_several_networks_is_found(tmp_path, small, files):
  helpers.run(ppo, tmp_path / "ppo", settings(files, steps=1, **RATE))
  weights = loaded(model=str(tmp_path / "ppo"))
  state = outcome(tmp_path / "ppo").state
  own = {p.removeprefix("policy/params/"): x for p, x in state.items() if "policy/params/" in p}
  assert all(np.array_equal(weights[name], own[name]) for name in weights)


def test_what_cannot_be_begun_with_is_refused(tmp_path, earlier, files):
  for changes, said in (
    ({"init_from": "nowhere"}, "--init_from=nowhere: must be RUN or RUN@STEP"),
    ({"init_from": f"{earlier}@7"}, f"a step that the run has kept: .*@1, {earlier}@2"),
    ({"init_from": str(earlier), "model": "smollm2"}, "--model=smollm2: must be tiny"),
  ):
    with pytest.raises(ConfigError, match=said):
      loaded(**{"model": "tiny"} | changes)
  for changes, said in (
    ({"init_moments": True}, "left out without --init_from"),
    ({"init_moments": True, "init_from": "x", "lora.rank": 2}, "left out with --lora.rank"),
  ):
    with pytest.raises(ConfigError, match=said):
      grpo.check(replace(grpo.Config(), changes))


@pytest.mark.slow
def test_a_run_that_trains_on_meanwhile_is_not_the_one_that_another_began_with(
  tmp_path, earlier, files
):
  changes = settings(files, steps=1, init_from=str(earlier), **RATE)
  own = shutil.copytree(earlier, tmp_path / "earlier")
  changes["init_from"] = str(own)
  helpers.run(grpo, tmp_path / "later", changes)
  helpers.run(grpo, own, settings(files, steps=3, **RATE) | {"checkpoint.every": 1})
  with pytest.raises(ConfigError, match="--init_from=.*as it was when"):
    helpers.run(grpo, tmp_path / "later", changes | {"steps": 2})
