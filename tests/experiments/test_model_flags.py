"""--scan_layers and --attention come to the model in every experiment, and with them the mesh."""

from __future__ import annotations

import dataclasses
import types

import pytest

from experiments import dpo, grpo, ppo, reinforce, reward_model, sft
from rl_llm.model import load_model
from rl_llm.policy import make_policy
from rl_llm.sharding import make_mesh


class Loaded(Exception):
  """The run has come to its model."""


@pytest.mark.parametrize("wanted", [(False, "auto"), (True, "xla")])
@pytest.mark.parametrize(
  "experiment", [dpo, grpo, ppo, reinforce, reward_model, sft], ids=lambda module: module.__name__
)
def test_the_flags_come_to_the_model(monkeypatch, experiment, wanted):
  def load(name, *, scan_layers, attention, mesh, **_):
    raise Loaded((scan_layers, attention), mesh.size)

  monkeypatch.setattr(experiment, "load_model", load)
  if experiment is reward_model:
    monkeypatch.setattr(experiment, "read_examples", lambda *_, **__: None)
    monkeypatch.setattr(experiment, "check_margins", lambda *_: None)
  scan_layers, attention = wanted
  config = dataclasses.replace(
    experiment.Config(), scan_layers=scan_layers, attention=attention
  )
  run = types.SimpleNamespace(console=types.SimpleNamespace(say=print), stop=None)
  with pytest.raises(Loaded) as loaded:
    experiment._train(config, run)
  assert loaded.value.args[0] == wanted


def test_a_loaded_model_loops_over_its_layers():
  mesh = make_mesh(data=1)
  policy = load_model("tiny", scan_layers=True, mesh=mesh).policy
  assert policy is make_policy(policy.config, scan_layers=True, mesh=mesh)
  assert policy is not load_model("tiny", mesh=mesh).policy and policy.row_shards == 1
