"""The model's flags are read in one place, to which every experiment comes with its mesh."""

from __future__ import annotations

import json
import types

import jax.numpy as jnp
import pytest

from experiments import (
  distill,
  dpo,
  grpo,
  kto,
  online_dpo,
  ppo,
  reinforce,
  reward_model,
  setup,
  sft,
)
from rl_llm.parallel.sharding import make_mesh
from rl_llm.policy import make_policy
from rl_llm.policy.load import load_model
from rl_llm.runs.config import replace

# The flags of a model, of its arithmetic and of its devices, each unlike its default.
FLAGS = {
  "model": "some/directory",
  "seed": 3,
  "dtype": "bfloat16",
  "remat": True,
  "scan_layers": True,
  "attention": "xla",
  "fetch": True,
}


class Loaded(Exception):
  """The run has come to its model."""


def load(name, **given):
  raise Loaded(name, given)


def test_each_flag_comes_to_the_model(monkeypatch):
  monkeypatch.setattr("rl_llm.policy.load.load_model", load)
  run, mesh = types.SimpleNamespace(console=types.SimpleNamespace(say=print)), make_mesh(data=1)
  for changes in ({}, FLAGS):
    config = replace(grpo.Config(), changes)
    with pytest.raises(Loaded) as loaded:
      setup.load_language_model(config, run, mesh)
    name, given = loaded.value.args
    wanted = {"model": "smollm2", "seed": 0, "dtype": "float32", "remat": False}
    wanted |= {"scan_layers": False, "attention": "auto", "fetch": False} | changes
    assert given.pop("mesh") is mesh and given.pop("say") is print
    assert {"model": name} | given | {"dtype": jnp.dtype(given["dtype"]).name} == wanted


@pytest.mark.parametrize(
  "experiment",
  [distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft],
  ids=lambda module: module.__name__,
)
def test_every_experiment_comes_there_with_its_config(tmp_path, monkeypatch, experiment):
  monkeypatch.setattr("rl_llm.policy.load.load_model", load)
  changes = FLAGS | {"mesh.data": 1, "task": "copy"}
  if experiment is distill:
    changes["teacher"] = "tiny"
  if experiment in (kto, reward_model):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    del changes["task"]
    changes |= {"data": str(pairs)}
  with pytest.raises(Loaded) as loaded:
    experiment.train(replace(experiment.Config(), changes), str(tmp_path / "run"))
  name, given = loaded.value.args
  assert given.pop("mesh").shape == {"data": 1, "fsdp": 1, "tensor": 1}
  assert callable(given.pop("say"))
  given |= {"model": name, "dtype": jnp.dtype(given["dtype"]).name}
  assert given == FLAGS


def test_a_loaded_model_loops_over_its_layers():
  mesh = make_mesh(data=1)
  policy = load_model("tiny", scan_layers=True, mesh=mesh).policy
  assert policy is make_policy(policy.config, scan_layers=True, mesh=mesh)
  assert policy is not load_model("tiny", mesh=mesh).policy and policy.row_shards == 1
