"""What a checkpoint holds is looked at: heads, names, parts, models of images and text."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from rl_llm.parallel.sharding import make_mesh, tree_shardings
from rl_llm.policy import (
  WeightsError,
  config_from_hf,
  join,
  load_adapter,
  load_gguf,
  load_hf,
  load_weights,
  make_policy,
  save_adapter,
  save_hf,
  split_lora,
  tiny_config,
)
from rl_llm.policy.hf import leaf_shapes
from rl_llm.policy.hf_names import hf_name
from rl_llm.policy.model_files import plain_name
from rl_llm.policy.positions import rope_frequencies
from rl_llm.text.tokenizers import TokenizerError, from_gguf
from tests.policy.make_goldens import FAMILIES, family_model
from tests.policy.test_weights import assert_equal, edit_json, flat, write_gguf

safetensors_numpy = pytest.importorskip("safetensors.numpy")
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def tiny():
  config = tiny_config(32)
  return config, jax.jit(make_policy(config).init)(jax.random.key(0))


@pytest.fixture
def directory(tmp_path, tiny):
  save_hf(tmp_path / "model", *tiny)
  return tmp_path / "model"


def edit(directory, change):
  """The file's tensors are what `change` makes of them."""
  file = directory / "model.safetensors"
  safetensors_numpy.save_file(change(safetensors_numpy.load_file(file)), file)


def heard(load, path):
  """(config, params, the lines that were said)."""
  said = []
  config, params = load(path, say=said.append)
  return config, params, said


def logits(config, params):
  policy, tokens = make_policy(config), np.arange(12)[None]
  return policy.logits(params, policy.hidden(params, tokens, tokens)[0])[0]


# Heads.


def test_a_head_that_is_the_embedding_is_dropped(directory, tiny):
  edit(directory, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()})
  config, params, said = heard(load_hf, directory)
  assert (config, said) == (tiny[0], [])
  assert_equal(params, tiny[1])


def test_a_head_of_its_own_is_read_though_the_config_says_tied(directory, tiny):
  """As transformers does: it ties nothing where both are there and differ."""
  head = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
  edit(directory, lambda t: t | {"lm_head.weight": head})
  config, params, said = heard(load_hf, directory)
  assert config == dataclasses.replace(tiny[0], tie_embeddings=False)
  assert_equal(params, tiny[1] | {"unembed": {"embedding": head}})
  [line] = said
  assert "'lm_head.weight' is not the embedding" in line and str(directory) in line
  # The right logits: those of hidden states times that head.
  policy, tokens = make_policy(config), np.arange(12)[None]
  hidden = np.asarray(policy.hidden(params, tokens, tokens)[0][0], np.float64)
  np.testing.assert_allclose(logits(config, params), hidden @ head.T, atol=1e-4)
  # One entry is enough, and it goes into an export.
  edit(directory, lambda t: t | {"lm_head.weight": _with_one_changed(t)})
  config, params, said = heard(load_hf, directory)
  assert not config.tie_embeddings and len(said) == 1
  save_hf(directory.parent / "again", config, params)
  assert heard(load_hf, directory.parent / "again")[::2] == (config, [])


def _with_one_changed(tensors):
  head = tensors["model.embed_tokens.weight"].copy()
  head[-1, -1] += 0.5
  return head


def test_a_missing_head_is_named(tmp_path, tiny):
  config = dataclasses.replace(tiny[0], tie_embeddings=False)
  params = tiny[1] | {"unembed": tiny[1]["embed"]}
  save_hf(tmp_path / "model", config, params)
  edit(tmp_path / "model", lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
  with pytest.raises(WeightsError, match="'lm_head.weight' is missing.*the language-model head"):
    load_hf(tmp_path / "model")
  # The cure that the error names.
  edit_json(tmp_path / "model/config.json", tie_word_embeddings=True)
  assert_equal(load_hf(tmp_path / "model")[1], tiny[1])


# Numbers.


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("mesh", [False, True])
def test_weights_that_are_no_numbers_are_refused_by_name(directory, value, mesh):
  name = "model.layers.1.mlp.up_proj.weight"

  def change(tensors):
    tensors[name][3, 5] = value
    return tensors

  edit(directory, change)
  layout = functools.partial(tree_shardings, mesh=make_mesh(data=1)) if mesh else None
  with pytest.raises(WeightsError, match=f"tensor '{name}' holds NaN or infinity; download"):
    load_hf(directory, layout=layout)


def test_large_weights_are_numbers(directory):
  """Their sum is none."""
  edit(directory, lambda t: t | {"model.norm.weight": np.full(64, 3e38, np.float32)})
  assert np.isinf(np.sum(load_hf(directory)[1]["final_norm"]["scale"]))


def test_a_gguf_and_an_adapter_that_hold_nan_are_refused(tmp_path, tiny):
  config, params = tiny
  broken = params | {"final_norm": {"scale": params["final_norm"]["scale"].at[0].set(np.nan)}}
  write_gguf(tmp_path / "model.gguf", config, broken, "llama")
  with pytest.raises(WeightsError, match="tensor 'output_norm.weight' holds NaN or infinity"):
    load_gguf(tmp_path / "model.gguf")
  settings = {"rank": 2, "alpha": 4.0, "targets": "mlp/up"}
  frozen, trained = split_lora(params, jax.random.key(0), **settings)
  trained["layers_0"]["mlp"]["up"]["lora_a"] *= np.nan
  save_adapter(tmp_path / "adapter", join(frozen, trained), base="x")
  asked = join(*split_lora(params, jax.random.key(1), **settings))
  with pytest.raises(WeightsError, match="leaf 'layers_0/mlp/up/lora_a' holds NaN or infinity"):
    load_adapter(tmp_path / "adapter", asked)


# Names.


@pytest.mark.parametrize(
  "rename",
  [
    lambda name: f"_orig_mod.{name}",
    lambda name: f"module._orig_mod.{name}",
    lambda name: name.replace(".mlp.", "._orig_mod.mlp."),  # Layers compiled one by one.
    lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    lambda name: name.removeprefix("model."),  # AutoModel's: tied, so all is there.
  ],
)
def test_names_of_wrappers_are_read_and_said(directory, tiny, rename):
  edit(directory, lambda t: {rename(name): x for name, x in t.items()})
  config, params, said = heard(load_weights, directory)
  assert config == tiny[0] and len(said) == 1 and "read by another name" in said[0]
  assert_equal(params, tiny[1])


def test_a_plain_name_stays():
  for family in FAMILIES:
    config = config_from_hf(FAMILIES[family])
    for path in leaf_shapes(config):
      assert plain_name(hf_name(config, path)) == hf_name(config, path)


def test_a_tensor_under_two_names_is_refused(directory):
  edit(directory, lambda t: t | {"_orig_mod.model.norm.weight": t["model.norm.weight"] + 1})
  with pytest.raises(WeightsError, match="'model.norm.weight' is there twice"):
    load_hf(directory)


@pytest.mark.parametrize(
  "name, says",
  [
    ("model.layers.0.mlp.up_proj.lora_A.weight", "PEFT's adapters next to the weights: merge them"),
    ("score.weight", "a sequence classifier.*--reward=model:DIR"),
    ("v_head.summary.weight", "TRL's value head"),
    ("model.layers.0.mlp.experts.weight", "use the config.json that belongs"),
  ],
)
def test_what_else_a_file_holds_is_named(directory, name, says):
  edit(directory, lambda t: t | {name: np.ones((1, 64), np.float32)})
  with pytest.raises(WeightsError, match=f"'{name}' has no place.*{says}"):
    load_hf(directory)


def test_directories_of_something_else_are_named(directory):
  shard = directory / "model-00001-of-00002.safetensors"
  (directory / "model.safetensors").rename(shard)
  with pytest.raises(WeightsError, match=rf"1 parts such as {shard.name}, and no .*index.json"):
    load_hf(directory)
  (directory / "config.json").unlink()
  (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "the/base"}')
  with pytest.raises(WeightsError, match="adapters alone.*the/base.*--lora.adapter"):
    load_hf(directory)


def test_frequencies_in_the_file_are_compared_with_the_config(directory, tiny):
  name, right = "model.layers.0.self_attn.rotary_emb.inv_freq", rope_frequencies(16, 1e4)
  for stored, lines in ((right.astype(np.float16), 0), (rope_frequencies(16, 5e5), 1)):
    edit(directory, lambda t, x=stored: t | {name: x.astype(np.float32)})
    config, params, said = heard(load_hf, directory)
    assert config == tiny[0] and len(said) == lines
    assert_equal(params, tiny[1])


# Gemma 3's models of images and text.

# As google/gemma-3-27b-it has them, in small; 4B leaves out even more.
WRAPPER = {
  "architectures": ["Gemma3ForConditionalGeneration"],
  "model_type": "gemma3",
  "eos_token_id": [1, 106],
  "image_token_index": 262144,
  "vision_config": {"hidden_size": 8, "model_type": "siglip_vision_model"},
}


@pytest.mark.parametrize("style", ["language_model.model.", "model.language_model."])
def test_gemma_3_with_images_loads_its_text_model(tmp_path, style):
  config, params = family_model("gemma3")
  directory = tmp_path / "model"
  save_hf(directory, config, params)
  text = dict(FAMILIES["gemma3"])
  (directory / "config.json").write_text(json.dumps(WRAPPER | {"text_config": text}))
  images = {
    "vision_tower.vision_model.embeddings.weight": np.ones((2, 2), np.float32),
    "multi_modal_projector.mm_input_projection_weight": np.ones((2, 2), np.float32),
  }
  if style == "model.language_model.":
    images = {f"model.{name}": x for name, x in images.items()}
  edit(directory, lambda t: {n.replace("model.", style, 1): x for n, x in t.items()} | images)
  found, read, said = heard(load_hf, directory)
  assert found == config
  assert_equal(read, params)
  assert len(said) == 2 and "without 2 tensors for images" in said[1]
  save_hf(tmp_path / "export", found, read)  # A text model now.
  assert heard(load_hf, tmp_path / "export")[::2] == (config, [])


def test_what_gemma_3s_text_config_leaves_out():
  """google/gemma-3-4b-it's text_config, whole; the rest is Gemma3TextConfig's defaults."""
  text = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  }
  config = config_from_hf(WRAPPER | {"text_config": text})
  assert (config.vocab_size, config.width, config.n_layers) == (262_208, 2560, 34)
  assert (config.n_heads, config.n_kv_heads, config.head_dim) == (8, 4, 256)
  assert config.tie_embeddings and config.max_position == 131_072 and config.sliding_window == 1024
  assert config.layer_types[:7] == ("sliding",) * 5 + ("full", "sliding")
  assert config.rope_scaling.factor == 8 and config.rope_theta == 1e6
  assert config.attention_scale == 256**-0.5


# GGUF.


@pytest.fixture
def parts(tmp_path, tiny):
  """A model of 20 tensors in three files."""
  write_gguf(tmp_path / "small.gguf", *tiny, "llama", per_file=7)
  found = sorted(tmp_path.glob("small-*.gguf"))
  assert [path.name for path in found] == [f"small-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
  return found


def test_a_split_gguf_is_read_whole_from_any_part(parts, tiny):
  for part in parts:
    config, params = load_weights(part)
    assert config == tiny[0]
    assert_equal(params, tiny[1])


def test_a_split_gguf_with_a_part_missing_or_renamed(parts):
  other = parts[1].rename(parts[1].with_name("other.gguf"))
  for part in (parts[0], parts[2]):
    with pytest.raises(WeightsError, match=f"split into 3 files, and {parts[1].name} is not there"):
      load_gguf(part)
  with pytest.raises(WeightsError, match=r"part 2 of a model split into 3 files.*-of-00003\.gguf"):
    load_gguf(other)
  parts[1].write_bytes(parts[2].read_bytes())  # The right name of another part.
  with pytest.raises(WeightsError, match=r"3 parts hold \d+ tensors, and say that they hold 20"):
    load_gguf(parts[0])


def test_the_tokenizer_of_a_split_gguf_is_in_its_first_part(tmp_path):
  pytest.importorskip("tokenizers")
  from tests.test_tokenizers import FIELDS, gguf_bytes

  split = {"split.no": 0, "split.count": 2}
  first, second = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
  first.write_bytes(gguf_bytes(FIELDS | split))
  second.write_bytes(gguf_bytes(split | {"split.no": 1}))
  assert from_gguf(second).encode("hello") == from_gguf(first).encode("hello")
  first.unlink()
  with pytest.raises(TokenizerError, match=f"{first.name}: No such file"):
    from_gguf(second)


def test_equal_heads_of_a_gguf_are_one_and_others_two(tmp_path, tiny):
  config, params = tiny
  untied = dataclasses.replace(config, tie_embeddings=False)
  path = tmp_path / "model.gguf"
  write_gguf(path, untied, params | {"unembed": params["embed"]}, "llama")
  found, read, said = heard(load_gguf, path)
  assert found == config and len(said) == 1 and "the embedding once more" in said[0]
  assert_equal(read, params)
  head = jax.tree.map(lambda x: x.at[0, 0].add(1), params["embed"])
  write_gguf(path, untied, params | {"unembed": head}, "llama")
  found, read, said = heard(load_gguf, path)
  assert found == untied and not said
  assert flat(read)["unembed/embedding"][0, 0] == flat(params)["embed/embedding"][0, 0] + 1
