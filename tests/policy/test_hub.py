"""Models by their name on the Hub: found in the cache, fetched only where that is asked for."""

import doctest
import hashlib
import os

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants

from rl_llm.errors import UserError
from rl_llm.files import leads_outside
from rl_llm.policy import hub, make_policy, save_hf, tiny_config
from rl_llm.policy.load import load_model
from rl_llm.text.tokenizers import ByteTokenizer

NAME = "Somebody/Small-1.5B"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and no network."""
  place = tmp_path / "hub"
  place.mkdir()
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return place


def put(cache, files):
  """A repository as huggingface_hub lays it out: a snapshot of links to blobs."""
  repository = cache / f"models--{NAME.replace('/', '--')}"
  for folder in ("refs", "blobs", "snapshots/abc"):
    (repository / folder).mkdir(parents=True)
  (repository / "refs" / "main").write_text("abc")
  for path in files.iterdir():
    content = path.read_bytes()
    blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (repository / "snapshots" / "abc" / path.name).symlink_to(f"../../blobs/{blob.name}")
  return repository / "snapshots" / "abc"


def test_a_model_in_the_cache_is_loaded_by_its_name(cache, tmp_path, monkeypatch):
  config = tiny_config(ByteTokenizer.vocab_size)
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  save_hf(tmp_path / "model", config, params, token_ids={})
  put(cache, tmp_path / "model")
  monkeypatch.setattr("rl_llm.policy.load.load_tokenizer", lambda name: ByteTokenizer())
  loaded = load_model(NAME)
  for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_links_to_the_blobs_stay_within_and_others_do_not(cache, tmp_path):
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text("{}")
  snapshot = put(cache, tmp_path / "model")
  (tmp_path / "secret").write_text("secret")
  (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
  (snapshot / "refs.json").symlink_to("../../refs/main")
  assert not leads_outside(snapshot, "config.json")
  assert leads_outside(snapshot, "tokenizer.json") and leads_outside(snapshot, "refs.json")
  blobs = snapshot.parent.parent / "blobs"
  blobs.rename(tmp_path / "blobs")
  blobs.symlink_to(tmp_path)  # A downloaded directory may say so.
  assert leads_outside(snapshot, "tokenizer.json")


def test_what_is_not_there_says_the_command_and_fetches_nothing(cache, monkeypatch):
  asked = []
  monkeypatch.setattr(
    huggingface_hub, "snapshot_download", lambda *a, **k: asked.append(k) or 1 / 0
  )
  with pytest.raises(UserError, match=f"hf download {NAME} fetches it, and so does --fetch"):
    load_model(NAME)
  assert [call["local_files_only"] for call in asked] == [True]


def test_a_download_is_asked_for_and_has_no_pickles(cache, monkeypatch):
  said, asked = [], []

  def download(name, *, local_files_only=False, allow_patterns):
    if local_files_only:
      raise FileNotFoundError
    asked.append((name, allow_patterns))
    return "/somewhere"

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert hub.local_model(NAME, fetch=True, say=said.append) == "/somewhere"
  ((name, patterns),) = asked
  assert name == NAME and not any("bin" in pattern or "pt" in pattern for pattern in patterns)
  assert said == [f"fetching {NAME} from huggingface.co"]


def test_one_that_cannot_be_fetched_is_one_line(cache):
  with pytest.raises(UserError, match="cannot be fetched") as caught:
    hub.local_model(NAME, fetch=True, say=lambda line: None)
  assert "\n" not in str(caught.value)


def test_other_names_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.makedirs("runs/mine")
  for name in ("smollm2", "tiny", "runs/mine", "/a/b", "models/x.gguf", "a/b/c"):
    assert hub.local_model(name) == name


def test_doctests():
  assert doctest.testmod(hub).failed == 0
