"""A checkpoint that is written while the next step computes: what it holds, who waits, its errors.

How it is written, and kills within that: tests/test_checkpoint.py.
"""

from __future__ import annotations

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging

from experiments import grpo
from rl_llm.runs import checkpoint
from rl_llm.runs.checkpoint import Checkpointer, CheckpointError
from tests import processes
from tests.experiments import helpers
from tests.experiments.conftest import files, small  # noqa: F401  fixtures
from tests.representatives import mostly_slow
from tests.test_checkpoint import W, run_python


class Slow:
  """Stands for Orbax's save: it begins when the test lets it, and then may fail."""

  def __init__(self):
    self.may, self.begun, self.error = threading.Event(), threading.Event(), None
    self._save = checkpoint.ocp.save

  def __call__(self, *args):
    self.begun.set()
    assert self.may.wait(processes.PATIENCE)
    if self.error is not None:
      raise self.error
    return self._save(*args)


@pytest.fixture
def slow(monkeypatch):
  slow = Slow()
  monkeypatch.setattr(checkpoint.ocp, "save", slow)
  yield slow
  slow.may.set()


OVERWRITE = jax.jit(lambda w: -w, donate_argnums=0)


@pytest.mark.parametrize("backend", ["cpu", "none"])
def test_it_holds_the_state_before_its_arrays_were_donated(tmp_path, slow, monkeypatch, backend):
  if backend == "none":  # JAX_PLATFORMS=cuda leaves out the CPU.
    found = jax.local_devices

    def devices(*_, backend=None, **__):
      if backend == "cpu":
        raise RuntimeError("Unknown backend cpu")
      return found()

    monkeypatch.setattr(jax, "local_devices", devices)
  w, key = jnp.arange(1.0, 4.0), jax.random.key(5)
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.start_save(1, {"w": w, "key": key, "n": jnp.int32(7)}, {"seed": 3})
    after = OVERWRITE(w)
    assert w.is_deleted() and after.tolist() == [-1, -2, -3]
    assert slow.begun.wait(processes.PATIENCE) and not (tmp_path / "1").exists()
    slow.may.set()
    checkpointer.wait()
    assert (tmp_path / "1" / "manifest.json").exists()
    wanted = {"w": after, "key": key, "n": jnp.int32(0)}
    step, state, extra = checkpointer.restore(wanted)
  assert (step, state["w"].tolist(), int(state["n"]), extra) == (1, [1, 2, 3], 7, {"seed": 3})
  assert (jax.random.key_data(state["key"]) == jax.random.key_data(key)).all()


def test_it_holds_arrays_of_every_layout(tmp_path):
  """Of a replicated array, JAX gives out the first device's own buffer as its copy there."""
  done = run_python(
    f"""
      import threading
      import jax, jax.numpy as jnp, numpy as np
      from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      from rl_llm.runs import checkpoint
      mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
      specs = {{"whole": P(), "rows": P("a"), "both": P("a", "b"), "columns": P(None, "b")}}
      layouts = {{name: NamedSharding(mesh, spec) for name, spec in specs.items()}}
      value = np.arange(32, dtype=np.float32).reshape(8, 4)
      state = {{name: jax.device_put(value, layout) for name, layout in layouts.items()}}
      wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
      save, may = checkpoint.ocp.save, threading.Event()
      checkpoint.ocp.save = lambda *args: may.wait() and save(*args)
      checkpointer = checkpoint.Checkpointer({str(tmp_path)!r})
      checkpointer.start_save(1, state)
      overwrite = jax.jit(lambda w: -w, donate_argnums=0)
      after = jax.block_until_ready({{name: overwrite(x) for name, x in state.items()}})
      assert all(x.is_deleted() for x in state.values())
      may.set()
      for name, x in checkpointer.restore(wanted)[1].items():
        assert (np.asarray(x) == value).all() and x.sharding == layouts[name], name
        assert (np.asarray(after[name]) == -value).all(), name
  """,
    devices=4,
  )
  assert done.returncode == 0, done.stderr[-2000:]


CALLS = {
  "wait": lambda c: c.wait(),
  "latest": lambda c: c.latest(),
  "steps": lambda c: c.steps(),
  "restore": lambda c: c.restore(W),
  "restore one": lambda c: c.restore(W, 1),
  "bytes_needed": lambda c: c.bytes_needed(W),
  "protect": lambda c: c.protect(1),
  "keep_only": lambda c: c.keep_only(1),
  "save": lambda c: c.save(3, {"w": jnp.ones(3)}),
  "start_save": lambda c: c.start_save(3, {"w": jnp.ones(3)}),
  "exit": lambda c: c.__exit__(None, None, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_waits_for_it(tmp_path, slow, name):
  checkpointer = Checkpointer(tmp_path)
  slow.may.set()
  checkpointer.save(1, {"w": jnp.ones(3)})
  slow.may.clear()
  checkpointer.start_save(2, {"w": jnp.ones(3)})
  assert not (tmp_path / "2").exists()
  timer = threading.Timer(0.2, slow.may.set)
  timer.start()
  CALLS[name](checkpointer)
  assert slow.may.is_set() and (tmp_path / "2").exists()
  checkpointer.wait()


def test_an_error_is_raised_once_at_the_next_call_in_one_line(tmp_path, slow):
  checkpointer = Checkpointer(tmp_path)
  slow.may.set()
  checkpointer.save(1, {"w": jnp.ones(3)})
  slow.error = OSError(28, "No space left on device")
  checkpointer.start_save(2, {"w": jnp.ones(3)})
  with pytest.raises(CheckpointError, match="step 2 could not be saved .*disk is full") as said:
    checkpointer.start_save(3, {"w": jnp.ones(3)})
  assert "\n" not in str(said.value)
  slow.error = None
  assert [path.name for path in tmp_path.iterdir()] == ["1"] and checkpointer.latest() == 1
  checkpointer.start_save(3, {"w": jnp.ones(3)})
  assert checkpointer.latest() == 3


def test_what_must_not_be_saved_is_refused_at_once(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, {"w": jnp.ones(3)})
  with pytest.raises(CheckpointError, match="step 2 is not saved: 1 of 1 leaves hold NaN"):
    checkpointer.start_save(2, {"w": jnp.full(3, jnp.nan)})
  with pytest.raises(CheckpointError, match="/1 holds a sound checkpoint already"):
    checkpointer.start_save(1, {"w": jnp.ones(3)})
  assert checkpointer.steps() == [1]


def test_an_error_of_the_caller_is_not_hidden_by_that_of_a_save(tmp_path, slow, monkeypatch):
  lines = []
  monkeypatch.setattr(absl_logging, "error", lambda text, *args: lines.append(text % args))
  slow.error = OSError("disk on fire")
  slow.may.set()
  with pytest.raises(KeyError), Checkpointer(tmp_path) as checkpointer:
    checkpointer.start_save(1, {"w": jnp.ones(3)})
    raise KeyError
  assert len(lines) == 1 and "step 1 could not be saved" in lines[0] and "on fire" in lines[0]
  with pytest.raises(CheckpointError, match="on fire"), Checkpointer(tmp_path) as checkpointer:
    checkpointer.start_save(1, {"w": jnp.ones(3)})


# Within a run.


def restored(directory, step):
  """What a step holds, by path."""
  manifest = json.loads((directory / str(step) / "manifest.json").read_text())
  wanted = {path: jax.ShapeDtypeStruct(shape, dtype) for path, dtype, shape in manifest["leaves"]}
  return jax.tree.map(np.asarray, Checkpointer(directory).restore(wanted, step)[1])


def test_the_next_step_is_taken_while_a_checkpoint_is_written(
  tmp_path,
  small,  # noqa: F811
  files,  # noqa: F811
  monkeypatch,
):
  changes = helpers.settings(files, **{"steps": 4, "checkpoint.every": 2, "eval.every": 0})
  straight = helpers.run(grpo, tmp_path / "straight", changes)
  slow, learned = Slow(), []

  def wrap(learn):
    def learn_and_tell(state, experience, step, clock):
      found = learn(state, experience, step, clock)
      learned.append((step, slow.begun.is_set() and not slow.may.is_set()))
      if step == 2:  # This step's update has overwritten the arrays that are being saved.
        jax.block_until_ready(found)
        slow.may.set()
      return found

    return learn_and_tell

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, "save", slow)
    helpers.wrap_seams(patch, learn=wrap)
    slowly = helpers.run(grpo, tmp_path / "slow", changes)
  assert learned == [(0, False), (1, False), (2, True), (3, False)]
  assert Checkpointer(tmp_path / "slow" / "checkpoints").steps() == [2, 4]
  assert slowly.metrics == straight.metrics and helpers.equal(slowly.state, straight.state)
  saved = [restored(tmp_path / name / "checkpoints", 2) for name in ("straight", "slow")]
  assert helpers.equal(*saved)


@pytest.mark.parametrize("at", mostly_slow([2, 4], quick=[1]))
def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(
  tmp_path,
  small,  # noqa: F811
  files,  # noqa: F811
  monkeypatch,
  at,
):
  """At the next save, or at the end: without a result, so that the command resumes."""
  changes = helpers.settings(files, **{"steps": 4, "checkpoint.every": 2, "eval.every": 0})
  save = checkpoint.ocp.save

  def fail(path, tree):
    if path.parent.name == f".saving-{at}":
      raise OSError(28, "No space left on device")
    return save(path, tree)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp, "save", fail)
    with pytest.raises(CheckpointError, match=rf"step {at} could not be saved .*disk is full") as e:
      helpers.run(grpo, tmp_path, changes)
  assert "\n" not in str(e.value) and not (tmp_path / "result.json").exists()
  found = helpers.run(grpo, tmp_path, changes)
  assert [row["step"] for row in found.metrics] == list(range(5))
  assert (tmp_path / "result.json").exists()


KILLS = """
    import os, random, signal, sys, time, traceback
    from pathlib import Path
    from experiments import grpo, setup
    from rl_llm.runs.config import replace

    place, kills = Path(sys.argv[1]), int(sys.argv[2])
    changes = {"model": "tiny", "task": "copy", "prompts_per_step": 2, "responses_per_prompt": 2}
    changes |= {"microbatch_prompts": 2, "max_new_tokens": 4, "eval.every": 0}
    changes |= {"loss.entropy_coef": 0.01}  # Weights move where no response is rewarded.
    changes |= {"checkpoint.every": 1, "steps": 8 * (kills + 1)}

    def start(name):
      pid = os.fork()  # The parent never touches a device, so forking it is safe.
      if pid:
        return pid
      code = 9
      try:
        said = os.open(place / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        config = replace(grpo.Config(), changes | {"workdir": str(place / name)})
        code = setup.main(grpo.train, config)
      except BaseException:
        traceback.print_exc()
      finally:
        os._exit(code)

    def ended(pid):
      return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def lines(name):
      assert not os.waitpid(pid, os.WNOHANG)[0], "it ended before it was killed"
      record = place / name / "metrics.jsonl"
      return record.read_bytes().count(b"\\n") if record.exists() else 0

    begun, pid = time.monotonic(), start("straight")
    while not lines("straight"):
      time.sleep(0.01)
    starting = time.monotonic() - begun
    assert ended(pid) == 0
    rng, cut = random.Random(0), 0
    for trial in range(kills):
      pid = start("cut")
      known = lines("cut")
      if trial % 5 == 4:  # While it starts,
        until = time.monotonic() + rng.uniform(0, starting)
        while time.monotonic() < until and lines("cut") <= known:
          time.sleep(0.01)
      else:  # or after one of its next three steps.
        until = known + rng.randrange(3)
        while lines("cut") <= min(until, changes["steps"] - 2):
          time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
      os.kill(pid, signal.SIGKILL)
      assert ended(pid) == -signal.SIGKILL
      cut += any((place / "cut" / "checkpoints").glob(".saving-*"))
    assert ended(start("cut")) == 0
    print("killed", kills, "cut", cut)
"""


@pytest.mark.slow
def test_killed_while_it_saves_each_step_a_run_ends_as_one_that_was_not(tmp_path, record_property):
  """F1, F2: bit for bit. RL_LLM_FULL=1 kills it 50 times."""
  kills = 50 if helpers.FULL else 3
  done = run_python(KILLS, arguments=[str(tmp_path), str(kills)])
  said = "".join(path.read_text() for path in sorted(tmp_path.glob("*.txt")))
  assert done.returncode == 0, said[-3000:] + done.stderr[-2000:]
  print(done.stdout)
  straight, cut = (helpers.outcome(tmp_path / name) for name in ("straight", "cut"))
  assert [row["step"] for row in straight.metrics] == list(range(8 * (kills + 1) + 1))
  assert cut.metrics == straight.metrics and cut.samples == straight.samples
  assert straight.state.keys() == cut.state.keys() and helpers.equal(straight.state, cut.state)
  assert any(np.any(leaf) for path, leaf in straight.state.items() if "/mu/" in path)
  assert "DAMAGED" not in said
  record_property("F1", kills)
