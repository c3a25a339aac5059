"""The reference's log-probs: right, computed once, and never read from a file that is not sound."""

import dataclasses
import hashlib
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.data.batches import pad_values, sequence_batch
from rl_llm.data.encoding import Encoded
from rl_llm.errors import ConfigError
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.runs.checkpoint import fingerprint
from rl_llm.training.reference_cache import (
  cache_key,
  cached_logprobs,
  compute_logprobs,
  reference_logprobs,
)


class Computed(Exception):
  """Stands for a computation that should, or should not, happen."""


def recompute():
  raise Computed


class Setting:
  def __init__(self):
    config = dataclasses.replace(tiny_config(vocab_size=32), n_layers=1)
    made = make_policy(config)
    self.shapes = []

    def hidden(params, tokens, *rest):
      self.shapes.append(tokens.shape)  # Runs when a program is traced, not when it is run.
      return made.hidden(params, tokens, *rest)

    self.policy = dataclasses.replace(made, hidden=hidden)
    self.params = jax.jit(made.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    self.sequences = [
      Encoded(rng.integers(0, 32, n).tolist(), [False, *(rng.random(n - 1) < 0.6)], 1)
      for n in (5, 3, 12, 7, 15, 8, 2)
    ]

  def run(self, directory, **changed):
    given = {"policy": self.policy, "temperature": 0.8, "rows_per_batch": 2, "pad_id": 0}
    return reference_logprobs(directory, self.params, self.sequences, **given | changed)


@pytest.fixture(scope="module")
def setting():
  return Setting()


@pytest.fixture(scope="module")
def computed(setting, tmp_path_factory):
  directory = tmp_path_factory.mktemp("cache")
  steps = []
  found = setting.run(directory / "made", progress=lambda *done: steps.append(done))
  return found, directory / "made", steps


def test_they_are_those_of_one_batch_of_all(setting, computed):
  batch = sequence_batch(setting.sequences, pad_id=9)
  score = jax.jit(teacher_forced_logprobs, static_argnames="policy")
  expected, _ = score(setting.params, *batch, policy=setting.policy, temperature=0.8)
  assert [len(x) for x in computed[0]] == [5, 3, 12, 7, 15, 8, 2]
  found = pad_values(computed[0], width=16)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
  assert found.dtype == np.float32 and (found[~batch.mask] == 0).all()


def test_two_widths_make_two_programs_whatever_is_left_for_the_last_batch(computed, setting):
  assert set(setting.shapes[:2]) == {(2, 16), (2, 8)}
  assert setting.shapes[0] == (2, 16)  # The longest come first: too little memory shows at once.
  assert computed[2] == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_the_second_call_reads_the_file_bit_for_bit(setting, computed):
  steps = []
  again = setting.run(computed[1], progress=lambda *done: steps.append(done))
  assert not steps
  for one, other in zip(again, computed[0], strict=True):
    assert one.dtype == other.dtype == np.float32 and one.tobytes() == other.tobytes()


def test_the_key_changes_with_all_that_decides_the_numbers(setting):
  policy, params, sequences = setting.policy, setting.params, setting.sequences

  def key(params=params, sequences=sequences, policy=policy, temperature=0.8):
    return cache_key(params, sequences, policy=policy, temperature=temperature)

  def edited(**fields):
    return [sequences[0]._replace(**fields), *sequences[1:]]

  one_bit = jax.tree.map(lambda x: x, params)
  scale = one_bit["final_norm"]["scale"]
  one_bit["final_norm"]["scale"] = scale.at[3].set(np.nextafter(scale[3], np.float32(2)))
  bfloat16 = make_policy(policy.config, dtype=jnp.bfloat16)
  tokens, mask, prompt_length = sequences[0]
  keys = [
    key(),
    key(params=one_bit),
    key(sequences=edited(tokens=[*tokens[:-1], tokens[-1] ^ 1])),
    key(sequences=edited(mask=[*mask[:-1], not mask[-1]])),
    key(sequences=sequences[::-1]),
    key(sequences=sequences[:-1]),
    # The same ids in a row, cut elsewhere.
    key(
      sequences=[
        Encoded(tokens[:-1], mask[:-1], prompt_length),
        Encoded([tokens[-1], *sequences[1].tokens], [mask[-1], *sequences[1].mask], 1),
        *sequences[2:],
      ]
    ),
    key(temperature=1.0),
    key(
      policy=dataclasses.replace(policy, config=dataclasses.replace(policy.config, rope_theta=5e5))
    ),
    key(policy=dataclasses.replace(bfloat16, config=policy.config)),
  ]
  assert len(set(keys)) == len(keys) and all(len(each) == 64 for each in keys)
  assert key(params=jax.tree.map(np.asarray, params)) == keys[0]  # Where they lie is no matter.
  assert key(sequences=edited(prompt_length=3)) == keys[0]


def test_fingerprints_tell_names_shapes_and_dtypes_apart():
  zeros = np.zeros(4, np.float32)
  trees = [
    {"a": zeros},
    {"b": zeros},
    {"a": zeros[:3]},
    {"a": zeros.reshape(2, 2)},
    {"a": {"a": zeros}},
    {"a": zeros.astype(np.int32)},
    {"a": jnp.zeros(8, jnp.bfloat16)},
    {"a": zeros, "b": zeros},
    {"a": np.float32(0)},
    {"a": -zeros},
    {},
  ]
  assert len({fingerprint(tree) for tree in trees}) == len(trees)
  matrix = np.arange(6.0).reshape(2, 3)
  assert fingerprint({"a": matrix.T}) == fingerprint({"a": matrix.T.copy()})


VALUES = [np.array([0, -1.5, -0.25], np.float32), np.array([0.0], np.float32)]
KEY = hashlib.sha256(b"this").hexdigest()


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "cache.npz"
  cached_logprobs(path, KEY, lambda: VALUES)
  return path


def test_a_sound_file_is_read(path):
  found = cached_logprobs(path, KEY, recompute)
  assert [x.tolist() for x in found] == [x.tolist() for x in VALUES]
  with np.load(path, allow_pickle=False) as file:  # It is an .npz that others can open.
    assert file["values"].tolist() == [0, -1.5, -0.25, 0] and file["lengths"].tolist() == [3, 1]


def test_every_flipped_byte_and_every_cut_is_noticed(path, caplog):
  sound = path.read_bytes()
  rng = np.random.default_rng(0)
  for place in range(len(sound)):
    damaged = bytearray(sound)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(damaged)
    with pytest.raises(Computed):
      cached_logprobs(path, KEY, recompute)
  for size in (0, 1, 64, 65, len(sound) // 2, len(sound) - 1):
    path.write_bytes(sound[:size])
    with pytest.raises(Computed):
      cached_logprobs(path, KEY, recompute)
  path.write_bytes(sound + b"\n")
  with pytest.raises(Computed):
    cached_logprobs(path, KEY, recompute)
  assert cached_logprobs(path, KEY, lambda: VALUES)[0].tolist() == [0, -1.5, -0.25]
  assert path.read_bytes() == sound  # Written anew.


def test_a_sound_file_of_something_else_is_not_trusted(path):
  other = hashlib.sha256(b"that").hexdigest()
  with pytest.raises(Computed):
    cached_logprobs(path, other, recompute)
  cached_logprobs(path, other, lambda: VALUES[:1])
  assert len(cached_logprobs(path, other, recompute)) == 1


class Marker:
  """What a pickle could do when it is read."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_a_file_with_a_right_checksum_around_a_pickle_runs_nothing(path, tmp_path):
  marker = tmp_path / "marker"
  evil = tmp_path / "evil.npz"
  np.savez(evil, key=np.array(KEY), lengths=np.array([1]), values=np.array([Marker(str(marker))]))
  body = evil.read_bytes()
  for content in (body, b"not a zip at all"):
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    with pytest.raises(Computed):
      cached_logprobs(path, KEY, recompute)
  assert not marker.exists()


def test_stopped_in_the_middle_nothing_is_left(setting, tmp_path):
  calls = []

  def progress(done, total):
    calls.append(done)
    if len(calls) == 3:
      raise Computed

  with pytest.raises(Computed):
    setting.run(tmp_path / "made", progress=progress)
  assert calls == [2, 4, 6]
  assert [file for _, _, files in os.walk(tmp_path) for file in files] == []


@pytest.mark.parametrize("below", [False, True])
def test_a_directory_that_cannot_be_written(setting, tmp_path, below):
  place = tmp_path / "file"
  place.write_text("no directory")
  place = place / "below" if below else place
  # The value may be shortened there; the system's own words have all of it.
  wanted = f"--reference_cache=.*: must be a directory that can be written; .*{place}"
  with pytest.raises(ConfigError, match=wanted):
    setting.run(place, progress=lambda done, total: recompute())


def test_no_sequences_and_no_rows(setting, tmp_path):
  setting_like = {"policy": setting.policy, "temperature": 1.0, "pad_id": 0}
  assert compute_logprobs(setting.params, [], rows_per_batch=2, **setting_like) == []
  assert cached_logprobs(tmp_path / "empty.npz", KEY, lambda: []) == []
  assert cached_logprobs(tmp_path / "empty.npz", KEY, recompute) == []
  with pytest.raises(ValueError, match="rows_per_batch=0: must be 1 or more"):
    compute_logprobs(setting.params, [], rows_per_batch=0, **setting_like)


def test_a_copy_under_another_name_is_only_found_there(setting, computed, tmp_path):
  [file] = os.listdir(computed[1])
  shutil.copy(computed[1] / file, tmp_path / "other.npz")
  with pytest.raises(Computed):
    setting.run(tmp_path, progress=lambda done, total: recompute())
  shutil.copy(computed[1] / file, tmp_path / file)
  setting.run(tmp_path, progress=lambda done, total: recompute())
