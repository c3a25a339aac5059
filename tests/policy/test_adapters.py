"""Adapters alone, in and out: what PEFT reads is written, and what is not meant is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.policy import (
  WeightsError,
  join,
  load_adapter,
  make_policy,
  save_adapter,
  split_lora,
  tiny_config,
)
from tests.policy.make_goldens import adapted

numpy_files = pytest.importorskip("safetensors.numpy")

CONFIG = dataclasses.replace(tiny_config(32), qkv_bias=True)
ASKED = {"rank": 3, "alpha": 6.0, "targets": "attention/(query|value)"}


@functools.cache  # At the first test, not when tests are collected.
def weights():
  return jax.jit(make_policy(CONFIG).init)(jax.random.key(0))


def split(seed=1, **changes):
  return split_lora(weights(), jax.random.key(seed), **(ASKED | changes))


def paths(tree):
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


@pytest.fixture
def saved(tmp_path):
  save_adapter(tmp_path / "adapter", adapted(weights(), **ASKED), base="models/base")
  return tmp_path / "adapter"


def config_of(directory):
  return json.loads((directory / "adapter_config.json").read_text())


def rewrite(directory, change=lambda tensors: tensors, **entries):
  """The directory with other tensors or entries, as another program might have written it."""
  file = directory / "adapter_model.safetensors"
  numpy_files.save_file(change(numpy_files.load_file(file)), file)
  (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | entries))


def test_names_shapes_and_config_are_those_of_peft(saved):
  assert sorted(os.listdir(saved)) == ["adapter_config.json", "adapter_model.safetensors"]
  assert os.listdir(saved.parent) == ["adapter"]  # Nothing temporary is left.
  found = numpy_files.load_file(saved / "adapter_model.safetensors")
  shapes = {  # 4 query heads and 2 of keys and values, 16 each, and a width of 64.
    f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{half}.weight": shape
    for layer in (0, 1)
    for name, out in (("q", 64), ("v", 32))
    for half, shape in (("A", (3, 64)), ("B", (out, 3)))
  }
  assert {name: leaf.shape for name, leaf in found.items()} == shapes
  assert (
    config_of(saved).items()
    >= {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": "models/base",
      "r": 3,
      "lora_alpha": 6,
      "target_modules": ["q_proj", "v_proj"],
      "bias": "none",
      "fan_in_fan_out": False,
    }.items()
  )


def test_what_was_saved_comes_back_bit_for_bit(saved):
  wanted = adapted(weights(), **ASKED)
  frozen, fresh = split()
  trained = load_adapter(saved, join(frozen, fresh))
  assert paths(trained) == paths(fresh)
  jax.tree.map(np.testing.assert_array_equal, join(frozen, trained), wanted)


@pytest.mark.parametrize("alpha", [32.0, 0.1, 1e-3, 1 / 3, 1e7])
@pytest.mark.parametrize("rank", [3, 7])
def test_alpha_survives_its_division_by_the_rank(tmp_path, rank, alpha):
  asked = ASKED | {"rank": rank, "alpha": alpha}
  save_adapter(tmp_path / "adapter", adapted(weights(), **asked), base="")
  written = config_of(tmp_path / "adapter")["lora_alpha"]
  assert written == pytest.approx(alpha, rel=1e-6) and len(str(written)) <= 12
  load_adapter(tmp_path / "adapter", join(*split(rank=rank, alpha=alpha)))


def test_matrices_of_some_layers_are_named_in_full(tmp_path):
  """The last part of a name means every layer to PEFT."""
  asked = ASKED | {"targets": "layers_1/attention/query|up"}
  save_adapter(tmp_path / "adapter", adapted(weights(), **asked), base="")
  assert config_of(tmp_path / "adapter")["target_modules"] == [
    "model.layers.1.self_attn.q_proj",
    "up_proj",
  ]


def test_half_precision_becomes_float32(saved):
  rewrite(saved, lambda tensors: {n: t.astype(jnp.bfloat16) for n, t in tensors.items()})
  trained = load_adapter(saved, join(*split()))
  wanted = adapted(weights(), **ASKED)["layers_1"]["attention"]["query"]["lora_a"]
  found = trained["layers_1"]["attention"]["query"]["lora_a"]
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, wanted.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (
      {"rank": 8},
      "leaf 'layers_0/attention/query/lora_a' has rank 3, the rank asked for is 8; ask"
      " for those that it has: --lora.rank=3 --lora.alpha=6 "
      "--lora.targets='attention/query|attention/value'",
    ),
    (
      {"alpha": 9.0},
      "leaf 'layers_0/attention/query/lora_a' has alpha 6, the alpha asked for is 9; ask",
    ),
    ({"targets": "attention"}, "leaf 'layers_0/attention/key/lora_a' is not there; ask for"),
    ({"targets": "query"}, "layers.0.self_attn.v_proj.lora_A.weight' was not asked for; ask"),
  ],
)
def test_other_adapters_than_those_asked_for_are_refused(saved, asked, message):
  with pytest.raises(WeightsError) as refused:
    load_adapter(saved, join(*split(**asked)))
  said = str(refused.value)  # Plain text: '|' in a pattern would allow much else.
  assert said.startswith(f"{saved}: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
  "targets",
  ["layers_1/", "layers_0/attention/(query|key)", "layers_1/attention/query|up", "0/mlp|key"],
)
def test_what_the_refusal_names_is_what_the_adapter_has(tmp_path, targets):
  """An adapter of some layers, such as PEFT's layers_to_transform makes: its advice, followed."""
  wanted = adapted(weights(), **ASKED | {"targets": targets})
  save_adapter(tmp_path / "adapter", wanted, base="")
  with pytest.raises(WeightsError) as refused:
    load_adapter(tmp_path / "adapter", join(*split(rank=2, targets=".")))
  advice = dict(re.findall(r"--lora\.(\w+)='?([^ ']+)", str(refused.value)))
  advice |= {"rank": int(advice["rank"]), "alpha": float(advice["alpha"])}
  frozen, fresh = split(**advice)
  trained = load_adapter(tmp_path / "adapter", join(frozen, fresh))
  jax.tree.map(np.testing.assert_array_equal, join(frozen, trained), wanted)


def test_an_adapter_of_the_head_cannot_be_asked_for(saved):
  name = "base_model.model.lm_head.lora_A.weight"
  rewrite(saved, lambda tensors: tensors | {name: np.zeros((3, 64), np.float32)})
  with pytest.raises(WeightsError, match=f"'{name}' is no matrix of a layer: use an adapter of"):
    load_adapter(saved, join(*split()))


def test_an_adapter_of_another_model_is_refused(saved):
  narrow = jax.tree.map(lambda x: x[:, :48] if x.shape[1:] == (64,) else x, weights())
  with pytest.raises(
    WeightsError,
    match=r"leaf 'layers_0/attention/query/lora_a' has shape \(3, 64\), the model's is \(3, 48\)",
  ):
    load_adapter(saved, join(*split_lora(narrow, jax.random.key(0), **ASKED)))


@pytest.mark.parametrize(
  ("entries", "message"),
  [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"use_rslora": True}, "'use_rslora' is True"),
    ({"use_dora": True}, "'use_dora' is True"),
    ({"alpha_pattern": {"q_proj": 1}}, "'alpha_pattern' is "),
    ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa'"),
    ({"lora_alpha": None}, "'lora_alpha' is None; must be a number"),
    ({"r": 5}, "leaf 'layers_0/attention/query/lora_a' has rank 3, .* says 'r' is 5"),
  ],
)
def test_what_plain_lora_does_not_have_is_refused(saved, entries, message):
  rewrite(saved, **entries)
  with pytest.raises(WeightsError, match=message):
    load_adapter(saved, join(*split()))


def test_damaged_and_missing_files_are_refused(saved, tmp_path):
  asked = join(*split())
  with pytest.raises(WeightsError, match="nowhere: no such adapter directory"):
    load_adapter(tmp_path / "nowhere", asked)
  file = saved / "adapter_model.safetensors"
  whole = file.read_bytes()
  file.write_bytes(whole[:-10])
  with pytest.raises(WeightsError, match="adapter_model.safetensors: damaged or truncated"):
    load_adapter(saved, asked)
  file.unlink()
  with pytest.raises(WeightsError, match="adapter_model.safetensors: is missing"):
    load_adapter(saved, asked)
  (saved / "adapter_config.json").unlink()
  with pytest.raises(WeightsError, match="adapter_config.json: is missing"):
    load_adapter(saved, asked)


def test_nothing_is_overwritten_and_weights_without_adapters_have_none(saved):
  with pytest.raises(WeightsError, match="already exists"):
    save_adapter(saved, adapted(weights(), **ASKED), base="")
  with pytest.raises(WeightsError, match="params: no adapters"):
    save_adapter(saved.parent / "other", weights(), base="")
  assert os.listdir(saved.parent) == ["adapter"]
