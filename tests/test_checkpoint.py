"""Checkpoints under abuse: killed savers, flipped bits, missing files, full disks, wrong models.

`RL_LLM_FULL=1` runs the longer counts. The committed checkpoint of format 1 was written by

    python -c "from tests.test_checkpoint import write_golden; write_golden()"
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from rl_llm.parallel import hosts
from rl_llm.runs import checkpoint
from rl_llm.runs.checkpoint import Checkpointer, CheckpointError
from tests import processes
from tests.representatives import mostly_slow

FULL = os.environ.get("RL_LLM_FULL") == "1"
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "checkpoint_v1"


class Controller(NamedTuple):
  coef: jax.Array
  horizon: jax.Array


@flax.struct.dataclass
class State:
  step: jax.Array
  params: Any
  opt_state: Any
  key: jax.Array
  controller: Controller
  nothing: Any = None


def make_state(seed=0):
  key = jax.random.key(seed)
  params = {
    "layers": [{"kernel": jax.random.normal(jax.random.key(i), (4, 6))} for i in range(2)],
    "embed.weight": jax.random.normal(key, (5, 4), jnp.bfloat16),
    "empty": {},
    "none": jnp.zeros((0, 3)),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return State(
    jnp.int32(seed), params, optimizer.init(params), key, Controller(jnp.float32(0.1), jnp.int8(3))
  )


def bits(x):
  return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def assert_equal_states(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert bits(x).tobytes() == bits(y).tobytes()


def files_of(path):
  return sorted(f for f in Path(path).rglob("*") if f.is_file())


@pytest.fixture
def two_steps(tmp_path):
  """Sound steps 1 and 2, and the error lines logged while the test runs."""
  with Checkpointer(tmp_path / "run") as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, {"w": jnp.arange(3.0) + step}, {"step": step})
  return tmp_path / "run"


@pytest.fixture
def errors(monkeypatch):
  lines = []
  monkeypatch.setattr(absl_logging, "error", lambda text, *args: lines.append(text % args))
  return lines


W = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}


def run_python(code, *, devices=1, timeout=processes.PATIENCE, prefix=(), arguments=()):
  environment = dict(
    os.environ,
    JAX_PLATFORMS="cpu",
    PYTHONPATH=str(ROOT),
    XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
  )
  command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


# Round trip


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
  state = make_state(3)
  extra = {"seed": 7, "config": {"lr": 1e-05, "name": "Bézier"}, "list": [1, None, True]}
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    with Checkpointer(tmp_path / "run") as checkpointer:
      checkpointer.save(12, state, extra)
      step, restored, got = checkpointer.restore(jax.eval_shape(make_state))
  assert step == 12 and got == extra
  assert_equal_states(restored, state)
  assert isinstance(restored, State) and isinstance(restored.controller, Controller)


def test_one_array_is_a_state(tmp_path):
  value = jnp.arange(6.0)
  Checkpointer(tmp_path).save(0, value)
  assert Checkpointer(tmp_path).restore(value)[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_keeps_the_newest_and_restores_any_of_them(tmp_path):
  for keep in (1, 2, 4):
    checkpointer = Checkpointer(tmp_path / str(keep), keep=keep)
    for step in (2, 10, 9, 30, 100):
      checkpointer.save(step, {"w": jnp.full(3, float(step))})
      assert step != 9 or checkpointer.latest() == 10  # a newer step is never pruned
    names = sorted(int(p.name) for p in (tmp_path / str(keep)).iterdir())
    assert names == [2, 9, 10, 30, 100][-keep:]
    assert checkpointer.latest() == 100
    for step in names:
      assert checkpointer.restore(W, step)[1]["w"].tolist() == [step] * 3


def test_when_no_step_verifies_nothing_begins_anew_by_itself(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2)
  for step in (1, 2):
    checkpointer.save(step, {"w": jnp.full(3, 1.0)})
    manifest = tmp_path / str(step) / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
  with pytest.raises(CheckpointError, match=r"damaged: \[1, 2\].*delete the run's directory"):
    Checkpointer(tmp_path).latest()


def test_an_empty_directory_has_no_latest(tmp_path):
  checkpointer = Checkpointer(tmp_path / "new" / "run")
  assert checkpointer.latest() is None
  with pytest.raises(CheckpointError, match="no sound checkpoint in .*start from scratch"):
    checkpointer.restore(W)
  with pytest.raises(CheckpointError, match="no checkpoint .*/7;"):
    checkpointer.restore(W, 7)


@pytest.mark.slow
def test_restores_onto_other_devices(tmp_path):
  """F5: 1 device to 4 and back."""
  value = np.arange(32, dtype=np.float32).reshape(8, 4)
  Checkpointer(tmp_path).save(1, {"w": jnp.asarray(value), "key": jax.random.key(5)})
  done = run_python(
    f"""
      import jax, jax.numpy as jnp, numpy as np
      from jax.sharding import AxisType, NamedSharding, PartitionSpec
      from rl_llm.runs.checkpoint import Checkpointer
      mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
      split, copied = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("data",), ()))
      wanted = {{"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split),
                "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=copied)}}
      _, state, _ = Checkpointer({str(tmp_path)!r}).restore(wanted)
      assert state["w"].sharding == split and len(state["w"].addressable_shards) == 4
      assert state["w"].addressable_shards[1].data.shape == (2, 4)
      assert (np.asarray(state["w"]) == np.arange(32).reshape(8, 4)).all()
      assert (jax.random.key_data(state["key"]) == jax.random.key_data(jax.random.key(5))).all()
      Checkpointer({str(tmp_path)!r}).save(2, state)
  """,
    devices=4,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout == "" and done.stderr == ""
  wanted = {
    "w": jax.ShapeDtypeStruct((8, 4), jnp.float32),
    "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
  }
  step, state, _ = Checkpointer(tmp_path).restore(wanted)
  assert step == 2 and (np.asarray(state["w"]) == value).all()


TWO_PROCESSES = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    jax.distributed.initialize("localhost:{port}", 2, int(sys.argv[1]))
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from rl_llm.runs.checkpoint import Checkpointer
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    make = jax.jit(lambda: jnp.arange(8.0).reshape(4, 2), out_shardings=split)
    checkpointer = Checkpointer({directory!r}, keep=1)
    for step in (1, 2):
      checkpointer.save(step, {{"w": make() * step}})
    wanted = {{"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=split)}}
    step, state, _ = checkpointer.restore(wanted)
    shard, = state["w"].addressable_shards
    assert step == 2 and (shard.data == 2 * np.arange(8).reshape(4, 2)[shard.index]).all()
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_together(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  code = TWO_PROCESSES.format(port=port, directory=str(tmp_path))
  with ThreadPoolExecutor(2) as pool:
    ranks = list(pool.map(lambda rank: run_python(code, arguments=[str(rank)]), range(2)))
  assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-1500:]
  wanted = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32)}
  step, state, _ = Checkpointer(tmp_path).restore(wanted)
  assert step == 2 and state["w"].ravel().tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
  assert [p.name for p in tmp_path.iterdir()] == ["2"]


# What must not be saved


def test_nonfinite_state_is_refused(tmp_path):
  """F16."""
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, {"w": jnp.ones(3)})
  for bad in (jnp.nan, jnp.inf, -jnp.inf):
    state = {"n": jnp.arange(3), "w": jnp.ones(3).at[1].set(bad)}
    with pytest.raises(CheckpointError, match=r"step 2 is not saved: 1 of 2 .* first w\. "):
      checkpointer.save(2, state)
    assert checkpointer.latest() == 1


@pytest.mark.parametrize(
  "state, error, message",
  [
    ({"w": 1.0}, TypeError, "state leaf w is a float.*jnp.asarray"),
    ({"w": np.ones(3)}, TypeError, "state leaf w is a ndarray"),
    ({"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, CheckpointError, "stored as one; rename"),
    ({"a/b": jnp.ones(2), "a": jnp.zeros(2)}, CheckpointError, "inside the other; rename"),
  ],
)
def test_states_that_would_not_come_back_are_refused(tmp_path, state, error, message):
  with pytest.raises(error, match=message):
    Checkpointer(tmp_path).save(1, state)
  assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_named(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  for step in (-1, True, 1.0, "1", jnp.int32(1)):
    with pytest.raises(ValueError, match="step is .*must be an int >= 0"):
      checkpointer.save(step, {"w": jnp.ones(3)})
  for extra in ({"a": object()}, {"a": float("nan")}, {"a": {1, 2}}):
    with pytest.raises(TypeError, match="extra must hold what JSON can"):
      checkpointer.save(1, {"w": jnp.ones(3)}, extra)
  with pytest.raises(ValueError, match="keep is 0; it must be at least 1"):
    Checkpointer(tmp_path, keep=0)
  with pytest.raises(CheckpointError, match="gs://.*as copy_to"):
    Checkpointer("gs://bucket/run")
  (tmp_path / "file").write_text("x")
  with pytest.raises(CheckpointError, match="cannot make the checkpoint directory .*/file/run"):
    Checkpointer(tmp_path / "file" / "run")


def test_a_sound_step_is_never_overwritten(two_steps):
  with pytest.raises(CheckpointError, match="/2 holds a sound checkpoint already"):
    Checkpointer(two_steps).save(2, {"w": jnp.zeros(3)})
  assert Checkpointer(two_steps).restore(W)[1]["w"].tolist() == [2, 3, 4]


# Damage (F8, F9, F10)


def test_every_flipped_bit_is_detected(two_steps, errors, record_property):
  """Raw Orbax restores flipped array data without a word."""
  rng = random.Random(0)
  files = [f for f in files_of(two_steps / "2") if f.stat().st_size]
  for trial in range(200 if FULL else 40):
    file = files[trial % len(files)]
    good = file.read_bytes()
    bit = rng.randrange(8 * len(good))
    flipped = bytearray(good)
    flipped[bit // 8] ^= 1 << bit % 8
    file.write_bytes(flipped)
    assert Checkpointer(two_steps).latest() == 1, (file, bit)
    assert len(errors) == trial + 1 and str(file) in errors[-1]
    with pytest.raises(CheckpointError, match=file.name):
      Checkpointer(two_steps).restore(W, 2)
    file.write_bytes(good)
    record_property("F8", 1)
  assert Checkpointer(two_steps).latest() == 2


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_every_missing_or_short_file_is_detected_and_told_once(
  two_steps, errors, damage, record_property
):
  shutil.copytree(two_steps / "2", two_steps.parent / "good")
  for file in files_of(two_steps / "2"):
    size = file.stat().st_size
    if damage == "truncate" and not size:
      continue
    errors.clear()
    file.unlink() if damage == "delete" else os.truncate(file, size - 1)
    checkpointer = Checkpointer(two_steps)
    assert checkpointer.latest() == 1
    step, state, extra = checkpointer.restore(W)
    assert step == 1 and state["w"].tolist() == [1, 2, 3] and extra == {"step": 1}
    assert len(errors) == 1 and str(file) in errors[0] and "Restore the files" in errors[0]
    if damage == "truncate" and file.name != "manifest.json":
      assert f"has {size - 1} bytes, {size} were written" in errors[0]
    shutil.rmtree(two_steps / "2")
    shutil.copytree(two_steps.parent / "good", two_steps / "2")
    record_property("F9", 1)
  assert Checkpointer(two_steps).latest() == 2


def test_a_damaged_step_is_replaced_and_never_counts_as_kept(tmp_path, errors):
  checkpointer = Checkpointer(tmp_path, keep=2)
  for step in (1, 2):
    checkpointer.save(step, {"w": jnp.full(3, float(step))})
  os.remove(tmp_path / "2" / "manifest.json")
  assert checkpointer.latest() == 1
  checkpointer.save(3, {"w": jnp.full(3, 3.0)})
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "3"]
  os.remove(tmp_path / "3" / "manifest.json")
  checkpointer = Checkpointer(tmp_path, keep=1)
  checkpointer.save(2, {"w": jnp.full(3, 2.0)})  # the newest step is damaged: 2 is what is left
  assert checkpointer.latest() == 2
  checkpointer.save(3, {"w": jnp.full(3, 3.5)})
  assert checkpointer.restore(W)[1]["w"].tolist() == [3.5] * 3
  assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_junk_is_ignored(two_steps, errors):
  (two_steps / "9").mkdir()
  (two_steps / "9" / "notes").write_text("x")
  (two_steps / "10").write_text("a file")
  (two_steps / "11").symlink_to("11")  # a loop
  (two_steps / "12").symlink_to(two_steps / "1")
  (two_steps / "13.orbax-checkpoint-tmp").mkdir()
  for name in ("007", "²", "-3", "best", ".saving-14"):
    shutil.copytree(two_steps / "1", two_steps / name)
  checkpointer = Checkpointer(two_steps, keep=3)
  assert checkpointer.latest() == 2 and errors == []
  for step in (9, 10, 11, 12, 14):
    checkpointer.save(step, {"w": jnp.full(3, float(step))})
    assert checkpointer.restore(W)[1]["w"].tolist() == [step] * 3
  left = sorted(p.name for p in two_steps.iterdir())
  assert left == sorted(["11", "12", "14", "007", "²", "-3", "best", "13.orbax-checkpoint-tmp"])


def test_a_renamed_step_is_refused(two_steps, errors):
  (two_steps / "2").rename(two_steps / "5")
  assert Checkpointer(two_steps).latest() == 1
  assert "/5 holds step 2" in errors[0]


# The wrong model (F13)


def wrong(kind):
  leaf = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  tree = {f"layer_{i:02}": {"kernel": leaf} for i in range(30)}
  if kind == "shape":
    tree = {k: {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)} for k in tree}
  elif kind == "dtype":
    tree = {k: {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)} for k in tree}
  elif kind == "missing":
    tree = {k: {"kernel": v["kernel"], "bias": v["kernel"]} for k, v in tree.items()}
  else:
    tree = {"layer_00": tree["layer_00"]}
  return tree


@pytest.mark.parametrize(
  "kind, count, line",
  [
    ("shape", 30, "layer_00/kernel: shape (2, 3) in the checkpoint, (3, 2) asked for"),
    ("dtype", 30, "layer_00/kernel: dtype float32 in the checkpoint, bfloat16 asked for"),
    ("missing", 30, "layer_00/bias: in the state asked for, not in the checkpoint"),
    ("extra", 29, "layer_01/kernel: in the checkpoint, not in the state asked for"),
  ],
)
def test_another_model_is_refused_with_the_leaves_that_differ(tmp_path, capfd, kind, count, line):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, {f"layer_{i:02}": {"kernel": jnp.ones((2, 3))} for i in range(30)})
  with pytest.raises(CheckpointError) as caught:
    checkpointer.restore(wrong(kind))
  lines = str(caught.value).splitlines()
  assert f"{count} leaves differ" in lines[0] and lines[1].strip() == line
  assert len(lines) == 13  # the head, ten leaves, how many more, the fix
  assert lines[-2].strip() == f"and {count - 10} more"
  assert ("dtypes" in lines[-1]) == (kind == "dtype")
  assert capfd.readouterr() == ("", "")


def test_no_dtype_is_converted(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, {"w": jnp.ones(3), "n": jnp.int32(300), "key": jax.random.key(0)})
  want = {
    "w": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
    "n": jax.ShapeDtypeStruct((), jnp.int16),
    "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
  }
  with pytest.raises(CheckpointError, match="2 leaves differ"):
    checkpointer.restore(want)


def test_containers_may_change_names_may_not(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, Controller(jnp.float32(0.5), jnp.int32(2)))
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  whole = jax.ShapeDtypeStruct((), jnp.int32)
  assert float(checkpointer.restore({"coef": scalar, "horizon": whole})[1]["coef"]) == 0.5
  with pytest.raises(CheckpointError, match="horizon: in the checkpoint"):
    checkpointer.restore({"coef": scalar, "length": whole})


# Formats (F7)


def golden_state():
  return {
    "params": {
      "kernel": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 8,
      "scale": jnp.array([0.5, 2.0], jnp.bfloat16),
    },
    "key": jax.random.key(42),
    "step": jnp.int32(3),
  }


def write_golden():
  with tempfile.TemporaryDirectory() as directory:  # Orbax writes the path into one of its files
    Checkpointer(directory).save(3, golden_state(), {"seed": 42})
    shutil.copytree(directory, GOLDEN)


def test_format_1_still_loads():
  step, state, extra = Checkpointer(GOLDEN).restore(jax.eval_shape(golden_state))
  assert step == 3 and extra == {"seed": 42}
  assert_equal_states(state, golden_state())


def test_a_later_format_is_refused_in_one_line_and_not_passed_over(two_steps):
  path = two_steps / "2" / "manifest.json"
  body = json.loads(path.read_text())
  del body["manifest_sha256"]
  path.write_text(checkpoint._manifest_text(body | {"format_version": 2}))
  for call in (Checkpointer(two_steps).latest, lambda: Checkpointer(two_steps).restore(W)):
    with pytest.raises(CheckpointError) as caught:
      call()
    assert re.fullmatch(r".*/2 has format 2, .* up to 1: upgrade rl_llm.*", str(caught.value))


def test_the_manifest_is_json_that_vouches_for_itself(two_steps):
  manifest = json.loads((two_steps / "2" / "manifest.json").read_text())
  assert manifest["format_version"] == 1 and manifest["leaves"] == [["w", "float32", [3]]]
  listed = {two_steps / "2" / name for name in [*manifest["files"], "manifest.json"]}
  assert listed == set(files_of(two_steps / "2"))


# Crashes and disks (F2, F11, F12, F14)

KILLS = """
    import os, random, signal, sys, time
    import jax, jax.numpy as jnp
    import rl_llm.runs.checkpoint
    from rl_llm.runs.checkpoint import Checkpointer
    directory, kills = {directory!r}, {kills}
    rng, done, cut = random.Random(1), 0, 0

    def saver(pipe):
      checkpointer = Checkpointer(directory)
      wanted = {{"w": jax.ShapeDtypeStruct((256, 256), jnp.float32),
                "b": jax.ShapeDtypeStruct((), jnp.int32)}}
      step = 0
      overwrite = jax.jit(lambda state: jax.tree.map(lambda x: -x, state), donate_argnums=0)
      if checkpointer.latest() is not None:
        step, state, extra = checkpointer.restore(wanted)
        assert (state["w"] == step).all() and state["b"] == step and extra == {{"step": step}}
      while True:
        step += 1
        state = {{"w": jnp.full((256, 256), float(step)), "b": jnp.int32(step)}}
        jax.block_until_ready(state)
        os.write(pipe, b"s%08d" % step)
        checkpointer.{save}(step, state, {{"step": step}})
        if "{save}" == "save":
          os.write(pipe, b"d%08d" % step)
        else:  # It has waited for the step before, and this one's arrays are overwritten at once.
          os.write(pipe, b"d%08d" % (step - 1))
          jax.block_until_ready(overwrite(state))

    for trial in range(kills):
      read, write = os.pipe()
      child = os.fork()  # the parent never touches a device, so forking it is safe
      if not child:
        try:
          saver(write)
        finally:
          os._exit(9)
      os.close(write)
      starts = 0
      while starts < 1 + trial % 3:
        message = os.read(read, 9)
        assert message, "the saver died before it was killed"
        starts += message[:1] == b"s"
        done = max(done, int(message[1:]) if message[:1] == b"d" else done)
      time.sleep(rng.uniform(0, 0.05))
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      begun = int(message[1:])
      while message := os.read(read, 9):
        begun = max(begun, int(message[1:]))
        done = max(done, int(message[1:]) if message[:1] == b"d" else done)
      os.close(read)
      latest = Checkpointer(directory).latest()
      assert done <= (latest or 0) <= begun, (latest, done, begun)
      done = latest or 0
      cut += any(name.startswith(".saving-") for name in os.listdir(directory))
    print("killed", kills, "cut", cut)
"""


@pytest.mark.parametrize("save", mostly_slow(["save", "start_save"], quick=[1]))
def test_sigkill_inside_a_save_loses_nothing_finished(tmp_path, save, record_property):
  """F2: the step last acknowledged, or the one under way, is there and loads, each time."""
  kills = 30 if FULL else 5
  done = run_python(KILLS.format(directory=str(tmp_path / "run"), kills=kills, save=save))
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert "DAMAGED" not in done.stderr
  cut = int(done.stdout.split()[-1])
  assert cut > 0  # some kills did fall inside a save
  checkpointer = Checkpointer(tmp_path / "run")
  wanted = {
    "w": jax.ShapeDtypeStruct((256, 256), jnp.float32),
    "b": jax.ShapeDtypeStruct((), jnp.int32),
  }
  step, state, _ = checkpointer.restore(wanted)
  assert (state["w"] == step).all()
  record_property("F2", kills)


SMALL_DISK = """
    import os, subprocess, sys
    import jax, jax.numpy as jnp
    from rl_llm.runs.checkpoint import Checkpointer, CheckpointError
    directory = {directory!r} + "/run"
    checkpointer = Checkpointer(directory)
    small = {{"w": jnp.ones((256, 1024))}}  # 1 MiB on 3 MiB
    checkpointer.save(1, small)
    def refused(step, state):
      try:
        checkpointer.save(step, state)
      except CheckpointError as error:
        print(error)
      else:
        raise SystemExit("saved?")
      assert checkpointer.latest() == 1 and os.listdir(directory) == ["1"], os.listdir(directory)
    refused(2, {{"w": jnp.ones((1024, 1024))}})
    checkpointer.save(2, {{"w": jnp.ones(3)}})  # resumes once there is room
    assert checkpointer.latest() == 2
    os.rename(directory + "/2", {directory!r} + "/2")
    subprocess.run(["mount", "-o", "remount,ro", {directory!r}], check=True)
    refused(3, {{"w": jnp.ones(3)}})
"""


def test_writes_that_end_after_a_failed_save_print_nothing(tmp_path, monkeypatch):
  """Orbax has closed its loop by then; its error is ours already. Others are printed as ever."""

  class Ends:
    def __init__(self, error):
      self.error = error

    def __del__(self):  # Python has nowhere to raise what fails here.
      raise self.error

  printed = []
  monkeypatch.setattr(sys, "unraisablehook", lambda found: printed.append(str(found.exc_value)))
  before, checkpointer = sys.unraisablehook, Checkpointer(tmp_path)
  checkpointer.save(1, {"w": jnp.ones(3)})
  assert sys.unraisablehook is before
  with mock.patch.object(checkpoint.ocp, "save", side_effect=OSError(28, "No space left")):
    with pytest.raises(CheckpointError, match="No space left"):
      checkpointer.save(2, {"w": jnp.ones(3)})
  for error in (RuntimeError("Event loop is closed"), RuntimeError("else"), ValueError("other")):
    ends = Ends(error)
    del ends
  assert printed == ["else", "other"]


def test_full_and_read_only_disks_leave_the_earlier_steps(tmp_path):
  """F11, F12: in a mount namespace of its own, which ends with the process."""
  space = ["unshare", "--user", "--map-root-user", "--mount"]
  mount = 'mount -t tmpfs -o size=3m tmpfs "$0" && exec "$@"'
  prefix = [*space, "sh", "-c", mount, str(tmp_path)]
  try:
    subprocess.run([*prefix, "true"], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no private tmpfs on this machine: {error}")
  done = run_python(SMALL_DISK.format(directory=str(tmp_path)), prefix=prefix)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  full, read_only = done.stdout.splitlines()
  assert f"step 2 could not be saved in {tmp_path}/run" in full
  assert "The disk is full" in full and "Earlier checkpoints are untouched" in full
  assert f"step 3 could not be saved in {tmp_path}/run" in read_only
  assert "Read-only file system" in read_only and "writable" in read_only
  assert done.stderr == ""


def test_a_vanished_directory_is_named(two_steps):
  checkpointer = Checkpointer(two_steps)
  shutil.rmtree(two_steps)
  for call in (
    lambda: checkpointer.save(3, {"w": jnp.ones(3)}),
    checkpointer.latest,
    lambda: checkpointer.restore(W),
  ):
    with pytest.raises(CheckpointError, match=f"{two_steps}.*moved or deleted"):
      call()
  assert not two_steps.exists()


def test_a_save_that_waited_for_a_lost_process_names_it(tmp_path, monkeypatch):
  """Orbax says that a barrier was not met; whoever ends the run must say whose death it was."""

  def save(*_, **__):
    raise TimeoutError("Timeout waiting at a barrier")

  monkeypatch.setattr(checkpoint.ocp, "save", save)
  monkeypatch.setattr(hosts, "lost", lambda error: "process 1 (b) was lost")
  checkpointer = Checkpointer(tmp_path / "run")
  with pytest.raises(CheckpointError, match="could not be saved in .*: TimeoutError"):
    checkpointer.save(1, {"w": jnp.ones(3)})
  monkeypatch.setattr(hosts, "count", lambda: 2)
  monkeypatch.setattr(hosts, "barrier", lambda what: None)
  monkeypatch.setattr(hosts, "all_gather", lambda what, value: [value, value])
  with pytest.raises(hosts.HostLost, match=r"^process 1 \(b\) was lost$"):
    checkpointer.save(2, {"w": jnp.ones(3)})


def test_an_interrupted_save_leaves_nothing_and_can_be_repeated(two_steps, monkeypatch):
  checkpointer = Checkpointer(two_steps)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "_hashes", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      checkpointer.save(3, {"w": jnp.ones(3)})
  assert sorted(p.name for p in two_steps.iterdir()) == ["1", "2"]
  checkpointer.save(3, {"w": jnp.ones(3)})
  assert checkpointer.latest() == 3


@pytest.mark.slow
def test_saving_again_and_again_does_not_grow(tmp_path, record_property):
  """F14. A leak of one state per save would add 16 times 16 MB, or 180 times 50 MB."""

  def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()

  checkpointer = Checkpointer(tmp_path, keep=1)
  size, warm, saves = (50_000_000, 20, 200) if FULL else (16 << 20, 8, 24)
  states = {"w": jnp.ones(size // 4)}
  for step in range(saves):
    if step == warm:
      before = resident()
    checkpointer.save(step, states)
  assert resident() < 1.1 * before
  record_property("F14", saves)


def test_orbax_keeps_quiet(tmp_path):
  done = run_python(f"""
      import logging, jax.numpy as jnp
      from absl import logging as absl_logging
      absl_logging.set_verbosity(absl_logging.INFO)
      absl_logging.use_absl_handler()
      from rl_llm.runs.checkpoint import Checkpointer
      state = {{"w": jnp.ones(3)}}
      checkpointer = Checkpointer({str(tmp_path)!r})
      checkpointer.save(1, state)
      checkpointer.restore(state)
      absl_logging.info("ours")
  """)
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stderr.splitlines() if "before flag parsing" not in line]
  assert done.stdout == "" and len(lines) == 1 and lines[0].endswith("ours")
