"""Copies of checkpoints in an object store, which this file starts on loopback itself."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from experiments import evaluate, grpo, sft
from launch import run
from rl_llm.errors import ConfigError
from rl_llm.runs import bucket
from rl_llm.runs import config as configs
from rl_llm.runs.bucket import Bucket, BucketError
from rl_llm.runs.checkpoint import Checkpointer, CheckpointError
from rl_llm.runs.config import replace
from tests import object_store
from tests.experiments import helpers
from tests.experiments.conftest import files, small  # noqa: F401  fixtures
from tests.test_checkpoint import files_of

W = {"w": jax.ShapeDtypeStruct((3,), jnp.float32), "n": jax.ShapeDtypeStruct((0,), jnp.float32)}


def state(step):
  return {"w": jnp.full(3, float(step)), "n": jnp.zeros(0)}


@pytest.fixture(scope="module")
def shared():
  with object_store.served() as server, pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment.items():
      patch.setenv(name, value)  # TensorStore reads some of them once in a process.
    yield server


@pytest.fixture
def server(shared):
  shared.objects.clear()
  shared.full = 10**6
  return shared


@pytest.fixture
def errors(monkeypatch):
  lines = []
  monkeypatch.setattr(logging, "error", lambda text, *args: lines.append(text % args))
  return lines


@pytest.fixture(params=["gs://mine/runs/a", "s3://mine/runs/a"])
def address(request):
  return request.param


def test_a_run_whose_directory_is_gone_begins_with_its_copy(server, address, tmp_path):
  with Checkpointer(tmp_path / "run", keep=2, copy_to=address) as saved:
    for step in (1, 2, 10):
      saved.save(step, state(step), {"step": step})
  # As many as here, file by file.
  wanted = {f"runs/a/{f.relative_to(tmp_path / 'run')}": f.read_bytes() for f in files_of(tmp_path)}
  assert server.objects == wanted and Bucket(address).steps() == [2, 10]
  shutil.rmtree(tmp_path / "run")
  again = Checkpointer(tmp_path / "run", copy_to=address)
  assert again.fetch({}) == 10 and again.fetch({}) is None and again.steps() == [10]
  step, found, extra = again.restore(W)
  assert (step, found["w"].tolist(), extra) == (10, [10.0] * 3, {"step": 10})


def test_a_copy_that_was_cut_short_does_not_count(server, address, tmp_path, errors):
  """The step is on disk all the same, and the next save copies again."""
  saved = Checkpointer(tmp_path, keep=3, copy_to=address)
  saved.save(1, state(1))
  server.full = len(server.objects) + 2
  saved.save(2, state(2))
  assert saved.latest() == 2 and Bucket(address).steps() == [1]
  (line,) = errors
  assert "step 2 is saved" in line and "could not be copied" in line and address in line
  server.full = 10**6
  saved.save(3, state(3))
  assert Bucket(address).steps() == [1, 3]


def test_what_was_changed_in_the_store_is_detected(server, address, tmp_path):
  Checkpointer(tmp_path / "a", copy_to=address).save(1, state(1))
  name = max(server.objects, key=lambda n: len(server.objects[n]) * ("/state/" in n))
  kept = server.objects[name]
  server.objects[name] = bytes([kept[0] ^ 1]) + kept[1:]
  other = Checkpointer(tmp_path / "b", copy_to=address)
  assert other.fetch({}) == 1
  with pytest.raises(CheckpointError, match="no checkpoint in .* verifies"):
    other.latest()
  del server.objects[name]
  with pytest.raises(BucketError, match="is missing; delete this step there"):
    Checkpointer(tmp_path / "c", copy_to=address).fetch({})


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_manifest_cannot_name_a_file_outside(server, tmp_path, name):
  server.objects["a/1/manifest.json"] = json.dumps({"files": {name: {}}, "extra": {}}).encode()
  server.objects[f"a/1/{name}"] = b"x"
  with pytest.raises(BucketError, match="names .*outside"):
    Checkpointer(tmp_path / "run", copy_to="s3://mine/a").fetch({})
  assert not (tmp_path / "outside").exists()
  server.objects["a/1/manifest.json"] = b"[" * 9
  with pytest.raises(BucketError, match="is damaged; delete this step"):
    Checkpointer(tmp_path / "run", copy_to="s3://mine/a").fetch({})


def test_the_copy_of_another_run_is_not_taken(server, address, tmp_path):
  Checkpointer(tmp_path / "a", copy_to=address).save(1, state(1), {"settings": {"seed": 0}})
  other = Checkpointer(tmp_path / "b", copy_to=address)
  with pytest.raises(BucketError, match="/1 is another run's; give an address of this run alone"):
    other.fetch({"settings": {"seed": 1}})
  assert other.steps() == [] and other.fetch({"settings": {"seed": 0}}) == 1


def test_a_store_that_cannot_be_read_is_one_line_at_the_start(server, tmp_path):
  for address in ("gs://other/a", "s3://other/a"):
    with pytest.raises(BucketError, match=f"^{address}: .*; check the name, the network and"):
      Checkpointer(tmp_path, copy_to=address)


@pytest.mark.parametrize("address", ["gs://", "gcs://a/b", "s3://Mine/x", "s3://mine/a//b", "/tmp"])
def test_addresses_are_checked(address, files):  # noqa: F811
  with pytest.raises(BucketError, match="must be gs://BUCKET/PATH or s3://BUCKET/PATH"):
    bucket.parse(address)
  with pytest.raises(ConfigError, match="--checkpoint.copy_to="):
    grpo.check(replace(grpo.Config(), {"checkpoint.copy_to": address}))


@pytest.mark.parametrize("address", ["gs://mine/a", "s3://mine", "hdfs://host/a"])
def test_no_bucket_is_the_directory_of_a_run(address, files):  # noqa: F811
  """As a path it would be a directory called "gs:", here."""
  why = f"--workdir={address}: must be a directory on a disk: .*; give --workdir=DIR"
  for module in (grpo, sft, evaluate):
    with pytest.raises(ConfigError, match=why):
      getattr(module, "check", configs.check)(replace(module.Config(), {"workdir": address}))
  with pytest.raises(ConfigError, match=why):
    run.check(run.Config(sweep="mine.py", workdir=address))


@pytest.mark.slow
def test_a_run_resumes_from_its_copy(server, address, tmp_path, small, files):  # noqa: F811
  """Another machine, with nothing but the command."""
  given = helpers.settings(files, **{"checkpoint.every": 2, "checkpoint.copy_to": address})
  straight = helpers.run(grpo, tmp_path / "straight", given | {"steps": 6})
  server.objects.clear()
  helpers.run(grpo, tmp_path / "cut", given | {"steps": 4})
  shutil.rmtree(tmp_path / "cut")
  cut = helpers.run(grpo, tmp_path / "cut", given | {"steps": 6})
  assert helpers.equal(cut.state, straight.state)
  assert [row["step"] for row in cut.metrics] == [4, 5, 6]
  assert cut.metrics == straight.metrics[4:]
  with pytest.raises(BucketError, match="another run's; give an address of this run alone"):
    helpers.run(grpo, tmp_path / "other", given | {"steps": 6, "seed": 1})
  helpers.run(grpo, tmp_path / "other", given | {"steps": 1, "seed": 1, "checkpoint.copy_to": ""})
