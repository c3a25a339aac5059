"""Whole runs on eight devices: what is said, recorded and learned is what one device says."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft
from rl_llm.parallel import sharding
from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.load import LanguageModel
from rl_llm.runs.checkpoint import Checkpointer
from tests.experiments import helpers
from tests.experiments.conftest import files  # noqa: F401  a fixture
from tests.experiments.helpers import FULL, Chatty

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
TRIALS = [(grpo, (2, 2, 2))]
if FULL:
  everything = [grpo, ppo, dpo, kto, reinforce, sft, reward_model, distill, online_dpo]
  TRIALS = list(itertools.product(everything, MESHES))


class Padded(Chatty):
  """A vocabulary that eight devices can share."""

  vocab_size = 264


POLICY = make_policy(dataclasses.replace(tiny_config(Padded.vocab_size), n_layers=1))


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """`--model=tiny` is one layer over `Padded`; `--teacher=another` has other weights."""

  def load(name, *, seed, mesh, **_):
    assert seed == 0
    params = first_params() if name == "tiny" else first_params(seed=1)
    return LanguageModel(POLICY, params if mesh is None else sharding.shard(params, mesh), Padded())

  monkeypatch.setattr("rl_llm.policy.load.load_model", load)


def settings(experiment, files, sizes, **changes):  # noqa: F811
  """Three steps at learning rate 1e-5 of 8 problems, examples or pairs, on such a mesh."""
  found = helpers.settings(files, steps=3, prompts_per_step=8, microbatch_prompts=8)
  if experiment is dpo:
    del found["prompts_per_step"], found["microbatch_prompts"], found["responses_per_prompt"]
  if experiment in (kto, sft, reward_model):
    found = {"model": "tiny", "prompt_format": "plain", "steps": 3, "held_out_fraction": 0.3}
    found["data"] = str(files / f"{experiment.__name__}.jsonl")
    answers = ["completion"] if experiment is sft else ["chosen", "rejected"]
    with open(found["data"], "w") as file:
      for i in range(24):
        row = {name: (n + 1) * name[i % 4 :] for n, name in enumerate(answers)}
        file.write(json.dumps({"prompt": chr(97 + i) * (i % 5 + 1)} | row) + "\n")
  found |= {
    sft: {"task": "none", "examples_per_step": 8, "microbatch_rows": 8},
    kto: {"examples_per_step": 8, "microbatch_rows": 8},
    reward_model: {"pairs_per_step": 8, "microbatch_pairs": 8},
    dpo: {"pairs_per_step": 8, "microbatch_pairs": 8, "responses_per_prompt": 4},
    ppo: {"kl.coef": 0.1, "prompts_per_step": 16},
    distill: {"teacher": "another", "responses_per_prompt": 4},
    # At temperature 1 one draw lies within rounding of the border between two tokens.
    grpo: {"kl.coef": 0.1, "sampling.temperature": 0.9},
  }.get(experiment, {})
  mesh = {f"mesh.{name}": size for name, size in zip(sharding.AXES, sizes, strict=True)}
  return found | {"optimizer.learning_rate": 1e-5} | mesh | changes


@functools.cache
def first_params(seed=0):
  """The weights that every run begins with."""
  params = jax.jit(POLICY.init)(jax.random.key(seed))
  params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])
  return params


def change(outcome):
  """What became of the policy's parameters, as one vector."""
  vectors = []
  for keys, leaf in jax.tree_util.tree_leaves_with_path(first_params()):
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    new = outcome.params.get(f"params/{path}", outcome.params.get(f"policy/params/{path}"))
    vectors.append((np.asarray(new, np.float64) - leaf).ravel())
  return np.concatenate(vectors)


@pytest.mark.parametrize(
  ("experiment", "sizes"), TRIALS, ids=lambda x: x if isinstance(x, tuple) else x.__name__
)
def test_a_run_is_that_of_one_device(tmp_path, files, experiment, sizes):  # noqa: F811
  run = functools.partial(helpers.run, experiment)
  wanted = run(tmp_path / "one", settings(experiment, files, (1, 1, 1)))
  found = run(tmp_path / "eight", settings(experiment, files, sizes))
  assert [row["response"] for row in found.samples] == [row["response"] for row in wanted.samples]
  for ours, theirs in zip(found.metrics, wanted.metrics, strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      assert ours[name] == pytest.approx(value, rel=1e-5, abs=2e-6), (name, ours["step"])
  moved = np.linalg.norm(change(wanted))
  assert moved > 0
  assert np.linalg.norm(change(found) - change(wanted)) < 1e-3 * moved


@pytest.mark.skipif(not FULL, reason="two runs: RL_LLM_FULL=1")
def test_a_run_goes_on_with_other_devices(tmp_path, files):  # noqa: F811
  """Two steps on one device, the third on eight."""
  run = functools.partial(helpers.run, grpo)
  run(tmp_path / "moved", settings(grpo, files, (1, 1, 1), steps=2))
  moved = run(tmp_path / "moved", settings(grpo, files, (2, 2, 2)))
  stayed = run(tmp_path / "stayed", settings(grpo, files, (1, 1, 1)))
  distance = np.linalg.norm(change(moved) - change(stayed))
  assert distance < 1e-3 * np.linalg.norm(change(stayed))


def test_a_state_is_the_same_bits_on_any_number_of_devices(tmp_path, record_property):
  """From 1 device to 2, 4 and 8, and back."""
  params = first_params()
  shapes = jax.eval_shape(lambda: params)
  saved = Checkpointer(tmp_path, keep=10)
  saved.save(0, sharding.shard(params, sharding.make_mesh(data=1)))
  for step, sizes in enumerate([(1, 2, 1), (1, 2, 2), (2, 2, 2), (1, 1, 8), (1, 1, 1)]):
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    layout = sharding.tree_shardings(shapes, mesh)
    wanted = sharding.sharded_shapes(shapes, mesh)
    _, state, _ = saved.restore(wanted, step)
    for leaf, sharding_of_leaf in zip(*map(jax.tree.leaves, (state, layout)), strict=True):
      assert leaf.sharding.is_equivalent_to(sharding_of_leaf, leaf.ndim)
    assert helpers.equal(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, params))
    saved.save(step + 1, state)
    record_property("F5", 1)


def test_a_batch_that_cannot_be_cut_is_refused_with_the_flag(tmp_path, files):  # noqa: F811
  refused = functools.partial(pytest.raises, sharding.ShardingError)
  with refused(match=r"--microbatch_prompts=4: must be a multiple of 8: .*8"):
    helpers.run(grpo, tmp_path, settings(grpo, files, (-1, 1, 1), microbatch_prompts=4))
  with refused(match=r"--prompts_per_step=8: must be a multiple of 16: "):
    helpers.run(grpo, tmp_path, settings(grpo, files, (-1, 1, 1), minibatches=2))
