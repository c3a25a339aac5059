"""The plan: its shapes, what it reads off a compiled program, what it says to a person."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.options import Lora, MeshSizes
from launch import plan
from rl_llm.config import ConfigError
from rl_llm.policy import make_policy
from rl_llm.train_state import parameter_count

SMALL = plan.Config(
  topology="cpu:1",
  model="tiny",
  prompts_per_step=4,
  responses_per_prompt=2,
  microbatch_prompts=2,
  prompt_tokens=8,
  max_new_tokens=6,
  dtype="float32",
  mesh=MeshSizes(),
)


planned = functools.cache(plan.plan)


@pytest.mark.parametrize(
  ("name", "billions"),
  [("qwen2.5-1.5b", 1.54), ("qwen2.5-7b", 7.62), ("qwen2.5-32b", 32.8), ("qwen2.5-72b", 72.7),
   ("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.6)],
)  # As their model cards count them.
def test_models_have_as_many_parameters_as_they_say(name, billions):
  shapes = jax.eval_shape(make_policy(plan.MODELS[name]).init, jax.random.key(0))
  assert parameter_count(shapes) / 1e9 == pytest.approx(billions, rel=0.005)


def test_collectives_in_loops_count_as_often_as_these_run():
  text = """
%inner (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %s = (bf16[1,8]{1,0}, bf16[4,8]{1,0:T(8,128)}) all-gather-start(bf16[1,8]{1,0} %p)
}
%fused (p: f32[8]) -> f32[8] {
  %x = f32[2]{0} reduce-scatter(f32[8]{0} %p), dimensions={0}
}
%outer (p: f32[8]) -> f32[8] {
  %w = f32[8]{0} while(f32[8]{0} %p), body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %f = f32[8]{0} fusion(f32[8]{0} %w), kind=kLoop, calls=%fused
  %d = bf16[4,8]{1,0} all-gather-done(%s)
}
ENTRY %main.7 (x: f32[8]) -> f32[8] {
  %v = (f32[8]{0}, s32[]) while((f32[8]{0}, s32[]) %t), condition=%c, body=%outer
  %a = (f32[8]{0}, f32[3]{0}) all-reduce(f32[8]{0} %v, f32[3]{0} %u), to_apply=%sum
}
"""
  assert plan.collectives(text, loop=3) == {
    "all-gather": (15, 15 * 64.0),
    "all-reduce": (1, 2 * 44.0),
    "reduce-scatter": (3, 3 * 32.0),
  }


def test_the_update_holds_the_state_and_runs_here(capsys):
  """On one device nothing is communicated, and the arguments are weights, two moments, a batch."""
  shape, chip, (update, rollout) = planned(SMALL)
  count = parameter_count(jax.eval_shape(make_policy(shape).init, jax.random.key(0)))
  assert chip is None and not update.collectives and not rollout.collectives
  assert 3 * 4 * count < update.arguments < 3 * 4 * count + 4000
  assert 4 * count < rollout.arguments < 4 * count + 1000
  assert update.temporaries > 4 * count  # The gradient.
  print(*plan.table(SMALL, shape, chip, (update, rollout)), sep="\n")
  assert "tiny: 0.00B parameters on cpu:1" in capsys.readouterr().out


def test_adapters_have_moments_and_weights_do_not():
  shape, _, (update, _) = plan.plan(dataclasses.replace(SMALL, lora=Lora(rank=1)))
  count = parameter_count(jax.eval_shape(make_policy(shape).init, jax.random.key(0)))
  assert update.arguments < 1.2 * 4 * count


def test_the_limit_that_binds_is_named_and_so_is_what_to_change():
  chip = plan.Chip(hbm=10e9, flops=1e12, bandwidth=1e9, network=1e8)
  gathered = {"all-gather": (4, 3e8)}
  fits = plan.Program("update", 2e9, 3e9, 0.0, gathered, 1e12, 2e9, 1.0)
  assert fits.times(chip) == {"compute": 1.0, "HBM": 2.0, "network": 3.0}
  shape = plan.find_model(SMALL)
  lines = plan.table(SMALL, shape, chip, [fits])
  assert "update: at least 3.00 s, bound by network" in lines[-2]
  assert lines[-1] == "fits: 5.0 of 10 GB a chip (update)"
  lines = plan.table(SMALL, shape, chip, [fits, fits._replace(name="rollout", temporaries=9e9)])
  assert "does NOT fit: the rollout needs 11.0 of 10 GB a chip" in lines[-2]
  assert "--prompts_per_step" in lines[-1]
  lines = plan.table(SMALL, shape, chip, [fits._replace(arguments=9e9)])
  assert lines[-1] == "try more devices along --mesh.fsdp, or --lora.rank=16"


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"topology": "v9:4"}, "--topology=v9:4: must be cpu:N, or one of v4, v5e, v5p, v6e with a"),
    ({"topology": "cpu:99"}, "--topology=cpu:99: must be as many devices as JAX sees"),
    ({"model": "gpt5"}, "--model=gpt5: must be a directory with a config.json, tiny, or qwen2.5"),
    ({"microbatch_prompts": 3}, "--microbatch_prompts=3: must be a divisor of prompts_per_step"),
    ({"lora": Lora(rank=2, targets="conv")}, "--lora.targets=conv: must be a pattern of weights'"),
  ],
)
def test_what_cannot_be_planned_is_refused(changes, said):
  with pytest.raises(ConfigError) as refused:
    plan.plan(dataclasses.replace(SMALL, **changes))
  assert said in str(refused.value)


def test_a_person_is_told_in_one_line():
  found = subprocess.run(
    [sys.executable, "-m", "launch.plan", "--topology=v9:4"], capture_output=True, text=True
  )
  assert found.returncode == 2 and "Traceback" not in found.stderr
  assert "--topology=v9:4: must be cpu:N" in found.stderr


def test_the_formula_of_the_rollout_reads_weights_at_every_token():
  """Float32, one device: T tokens read all weights, and half of the cache on average."""
  _, _, (_, rollout) = planned(SMALL)
  shape = plan.find_model(SMALL)
  count = parameter_count(jax.eval_shape(make_policy(shape).init, jax.random.key(0)))
  keys = shape.n_layers * shape.n_kv_heads * shape.head_dim * 8 * (8 + 3)
  np.testing.assert_allclose(rollout.moved, 6 * 4 * (count + 2 * keys))
