"""Weights are read into their shards: each device's part, and nothing else."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from rl_llm.parallel import sharding
from rl_llm.policy import load_hf, make_policy, save_hf, tiny_config
from rl_llm.policy.hf import assemble, leaf_shapes

CONFIG = dataclasses.replace(tiny_config(64), n_layers=1)
LAYOUT = functools.partial(sharding.tree_shardings, mesh=sharding.make_mesh(data=2, fsdp=4))


def test_a_directory_comes_back_in_parts(tmp_path):
  params = jax.jit(make_policy(CONFIG).init)(jax.random.key(0))
  save_hf(tmp_path / "model", CONFIG, params)
  _, loaded = load_hf(tmp_path / "model", layout=LAYOUT)
  wanted = LAYOUT(params)
  for ours, theirs, place in zip(*map(jax.tree.leaves, (loaded, params, wanted)), strict=True):
    assert ours.sharding == place
    np.testing.assert_array_equal(ours, theirs)


def test_no_more_is_read_than_the_devices_hold_and_nothing_twice():
  shapes = leaf_shapes(CONFIG)
  tensors = {path: np.random.default_rng(0).normal(size=shape) for path, shape in shapes.items()}
  numbers: dict[str, list[int]] = {path: [] for path in shapes}

  def read(name, part):
    numbers[name].append(tensors[name][part].size)
    return tensors[name][part]

  params = assemble(shapes, lambda path: path, shapes, read, "a test", layout=LAYOUT)
  for path in ("embed/embedding", "layers_0/mlp/down/weight"):
    assert numbers[path] == 4 * [tensors[path].size // 4]
  assert numbers["final_norm/scale"] == [CONFIG.width]
  np.testing.assert_array_equal(
    params["embed"]["embedding"], tensors["embed/embedding"].astype(np.float32)
  )
