"""Model files and settings from elsewhere: whatever they say, an answer comes soon, in one line.

Each entry of each file is replaced by values of every other kind and by huge counts. What must hold
is not which of them are refused but how: a `UserError` of one line, and no traceback.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import time
import warnings

import jax
import numpy as np
import pytest

from rl_llm.errors import UserError
from rl_llm.policy import (
  WeightsError,
  config_from_hf,
  load_gguf,
  load_weights,
  make_policy,
  save_hf,
  tiny_config,
)
from rl_llm.runs.config import replace
from rl_llm.tasks import TaskError
from rl_llm.tasks.arithmetic import ArithmeticOptions
from rl_llm.tasks.copy_text import CopyOptions
from rl_llm.text import gguf_header
from rl_llm.text.tokenizers import TokenizerError, load_tokenizer
from tests.policy.test_weights import write_gguf

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

BAD = (
  *(None, True, [], {}, "x", 5, -1, 0, 10**9, 2**31, 2**62, 1e300, 1.5, [1], ["x"], [[]], [{}]),
  *({"a": 1}, {"content": 5}, "a\0b", {"full_attention": "x"}, {"rope_type": []}),
  *({"rope_type": "llama3", "factor": "x"}, {"rope_type": "linear", "factor": {}}),
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
FURTHER = (
  *("rope_parameters", "rope_scaling", "layer_types", "sliding_window", "head_dim", "text_config"),
  *("quantization_config", "partial_rotary_factor", "max_window_layers", "sliding_window_pattern"),
  *("use_sliding_window", "eos_token_id", "hidden_activation"),
)
TOKENIZER = {
  "tokenizer_config.json": {
    "eos_token": "<e>",
    "bos_token": "a",
    "pad_token": {"content": "b"},
    "add_bos_token": False,
    "chat_template": "x",
    "added_tokens_decoder": {},
    "tokenizer_class": "x",
  },
  "generation_config.json": {"eos_token_id": 26},
}
CONFIG = tiny_config(32)


@pytest.fixture(scope="module")
def params():
  return jax.jit(make_policy(CONFIG).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory, params):
  directory = tmp_path_factory.mktemp("sound") / "model"
  save_hf(directory, CONFIG, params)
  model = tokenizers.models.BPE({chr(97 + i): i for i in range(26)}, [])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.add_special_tokens(["<e>"])
  tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "_")
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<e> $A", special_tokens=[("<e>", 26)]
  )
  tokenizer.save(str(directory / "tokenizer.json"))
  for name, entries in TOKENIZER.items():
    (directory / name).write_text(json.dumps(entries))
  return directory


@pytest.fixture
def directory(sound, tmp_path):
  return shutil.copytree(sound, tmp_path / "model")


def soon_in_a_line(call, what):
  """The call ends in time: well, or with an error for a person."""
  began = time.process_time()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      call()
    except UserError as error:
      assert "\n" not in str(error), what
    except BaseException as error:
      raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
  assert time.process_time() - began < 20, what


@pytest.mark.parametrize("family", FAMILIES)
def test_any_entry_of_a_config_may_be_anything(sound, family):
  entries = json.loads((sound / "config.json").read_text()) | {"model_type": family}
  for key in {*entries, *FURTHER}:
    for bad in BAD:
      soon_in_a_line(lambda: config_from_hf({**entries, key: bad}), (key, bad))  # noqa: B023


def test_any_entry_of_a_tokenizers_files_may_be_anything(directory):
  for name, entries in TOKENIZER.items():
    for key in entries:
      for bad in BAD:
        (directory / name).write_text(json.dumps({**entries, key: bad}))
        soon_in_a_line(lambda: load_tokenizer(directory), (name, key, bad))
    (directory / name).write_text(json.dumps(entries))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", *TOKENIZER])
def test_files_that_are_no_json_objects(directory, name):
  for raw in (b"", b"[]", b"[" * 100_000, b"\xff\xfe", b"null", b'{"a": 1e400}', b"9" * 5000):
    (directory / name).write_bytes(raw)
    soon_in_a_line(lambda: load_tokenizer(directory), (name, raw[:9]))
    soon_in_a_line(lambda: load_weights(directory), (name, raw[:9]))


def within(entries, path=()):
  """The path of every value in JSON, of lists the first two."""
  if path:
    yield path
  inner = entries.items() if isinstance(entries, dict) else ()
  inner = list(enumerate(entries))[:2] if isinstance(entries, list) else inner
  for key, value in inner:
    yield from within(value, (*path, key))


def test_any_entry_of_tokenizer_json_may_be_anything(directory):
  """The package tokenizers panics at some of these."""
  text = (directory / "tokenizer.json").read_text()
  for path in within(json.loads(text)):
    if path[:2] == ("model", "vocab") and path[2:] not in ((), ("a",)):
      continue
    for bad in (None, [], {}, "x", -1, 2**40, 1e300, "((((", [["a", "zz"]]):
      changed = json.loads(text)
      node = changed
      for key in path[:-1]:
        node = node[key]
      node[path[-1]] = bad
      (directory / "tokenizer.json").write_text(json.dumps(changed))
      soon_in_a_line(lambda: load_tokenizer(directory), (path, bad))


@pytest.mark.parametrize(
  "name",
  [
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
  ],
)
def test_no_file_of_a_tokenizer_leads_outside(directory, name):
  """What such a link leads to would be read, and exported with the model."""
  secret = directory.parent / "id_ed25519"
  secret.write_text('{"chat_template": "-----BEGIN"}')
  if name == "chat_template.json":
    entries = {k: v for k, v in TOKENIZER["tokenizer_config.json"].items() if k != "chat_template"}
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))
  (directory / name).unlink(missing_ok=True)
  for target in (secret, "../id_ed25519", "/dev/zero", name):
    (directory / name).symlink_to(target)
    with pytest.raises(TokenizerError, match=f"{name}: leads outside the model directory.*cp -rL"):
      load_tokenizer(directory)
    (directory / name).unlink()
  (directory / "inside").write_text(json.dumps(TOKENIZER.get(name, {})))
  (directory / name).symlink_to("inside")
  soon_in_a_line(lambda: load_tokenizer(directory), name)


def test_a_template_that_is_no_text(directory):
  (directory / "chat_template.jinja").write_bytes(b"\xff{{ x }}")
  with pytest.raises(TokenizerError, match=r"chat_template\.jinja: not UTF-8 at byte 0"):
    load_tokenizer(directory)


@pytest.mark.parametrize(
  "changes",
  [
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10_000},
    {"head_dim": 2**31},
    {"head_dim": 2**14},
    {"vocab_size": 2**40},
    {"hidden_size": 2**20, "intermediate_size": 2**22},
  ],
)
def test_counts_are_compared_with_the_files_before_anything_is_made(directory, changes):
  entries = json.loads((directory / "config.json").read_text())
  (directory / "config.json").write_text(json.dumps(entries | changes))
  began = time.process_time()
  with pytest.raises(WeightsError):
    load_weights(directory)
  assert time.process_time() - began < 5


def test_names_with_nul(directory):
  for load in (load_weights, load_tokenizer):
    for name in ("a\0b", "a\0b.gguf"):
      soon_in_a_line(lambda: load(name), name)  # noqa: B023
  shutil.move(directory / "model.safetensors", directory / "a.safetensors")
  index = {"weight_map": {"model.norm.weight": "a\0.safetensors"}}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(WeightsError, match="leads outside"):
    load_weights(directory)


# GGUF


@pytest.fixture
def gguf_file(tmp_path, params):
  pytest.importorskip("gguf")
  write_gguf(tmp_path / "model.gguf", CONFIG, params, "llama")
  return tmp_path / "model.gguf"


def number_after(raw, key):
  """Where the value of a number in the metadata is."""
  at = raw.index(key) + len(key)
  return at + 4


def test_layers_of_gguf_are_compared_with_its_tensors(gguf_file):
  raw = bytearray(gguf_file.read_bytes())
  at = number_after(raw, b"llama.block_count")
  raw[at : at + 4] = struct.pack("<I", 10**9)
  gguf_file.write_bytes(raw)
  began = time.process_time()
  with pytest.raises(WeightsError, match="says that it has 1000000000 layers"):
    load_gguf(gguf_file)
  assert time.process_time() - began < 5


def header(*fields, tensors=()):
  """A GGUF file of these fields, each (name, kind, bytes), and descriptions of tensors."""
  raw = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
  for name, kind, value in fields:
    raw += struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
  return raw + b"".join(tensors)


def tensor(name, *shape, kind=0, start=0):
  head = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
  return head + struct.pack(f"<{len(shape)}Q", *shape) + struct.pack("<IQ", kind, start)


@pytest.mark.parametrize(
  "raw, said",
  [
    (header((b"a", 9, struct.pack("<IQ", 4, 2**62))), "numbers at byte .* past the end"),
    (header((b"a", 9, struct.pack("<IQ", 8, 2**62))), "texts at byte .* past the end"),
    (header((b"a", 9, struct.pack("<IQ", 9, 2**62))), "an array of the unknown kind 9"),
    (header((b"a", 8, struct.pack("<Q", 2**63))), "text at byte .* past the end"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "fields at byte .* past the end"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "tensors at byte .* past the end"),
    (header(tensors=[tensor(b"t", 2**31, 2**31)]), "does not fit into"),
    (header(tensors=[tensor(b"t", 1, start=2**62)]), "does not fit into"),
    (header(tensors=[tensor(b"t", 1), tensor(b"t", 1)]), "is there twice"),
    (header(tensors=[tensor(b"t", *[1] * 9)]), "has 9 dimensions"),
  ],
)
def test_counts_in_a_gguf_header(tmp_path, raw, said):
  path = tmp_path / "a.gguf"
  path.write_bytes(raw)
  with pytest.raises(ValueError, match=said):
    gguf_header.check(path)
  pytest.importorskip("gguf")
  soon_in_a_line(lambda: load_gguf(path), said)
  soon_in_a_line(lambda: load_tokenizer(path), said)


def test_a_gguf_file_with_any_byte_changed(gguf_file):
  raw, rng = gguf_file.read_bytes(), random.Random(0)
  end = raw.index(b"blk.1.") + 100
  for trial in range(60):
    changed, at = bytearray(raw), rng.randrange(4, end)
    if trial % 3 == 0:
      changed[at] ^= 1 << rng.randrange(8)
    elif trial % 3 == 1:
      changed[at : at + 8] = struct.pack("<Q", rng.choice([2**62, 10**9, 2**63, 0]))
    else:
      del changed[at : at + rng.choice([1, 8, 1000, 10**6])]
    gguf_file.write_bytes(changed)
    soon_in_a_line(lambda: load_gguf(gguf_file), (trial, at))


def test_numbers_that_are_nan_are_refused(directory, gguf_file):
  raw = bytearray(gguf_file.read_bytes())
  raw[-8:-4] = np.float32("nan").tobytes()
  gguf_file.write_bytes(raw)
  with pytest.raises(WeightsError, match="holds NaN or infinity"):
    load_gguf(gguf_file)
  path = directory / "model.safetensors"
  raw = bytearray(path.read_bytes())
  raw[-4:] = np.float32("nan").tobytes()
  path.write_bytes(raw)
  with pytest.raises(WeightsError, match="holds NaN or infinity"):
    load_weights(directory)


# Normalizers and settings


@pytest.mark.parametrize("what", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_long_texts_of_short_ones(directory, what):
  """Forty doublings: 10^12 letters of one."""
  path = directory / "tokenizer.json"
  double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
  entries = json.loads(path.read_text())
  entries[what] = {"type": "Sequence", f"{what}s": [double] * 40}
  path.write_text(json.dumps(entries))
  with pytest.raises(TokenizerError, match=f"its {what} makes texts over 1000 times as long"):
    load_tokenizer(directory)


@pytest.mark.parametrize("value", [2**63 - 1, 10**9])
def test_options_of_tasks_have_bounds(value):
  for make in (
    lambda: CopyOptions(max_length=value),
    lambda: CopyOptions(max_length=100, held_out=value),
    lambda: ArithmeticOptions(operand_max=value + 1),
    lambda: ArithmeticOptions(operand_min=-value - 1),
    lambda: ArithmeticOptions(operand_max=10**9, held_out=value),
  ):
    with pytest.raises(TaskError, match="at most|at least"):
      make()


def test_settings_with_nul_are_refused():
  from experiments import grpo

  for name in ("workdir", "model", "task"):
    with pytest.raises(UserError, match=f"--{name}="):
      replace(grpo.Config(), {name: f"{os.sep}a\0b"})
