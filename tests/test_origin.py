"""Another run's checkpoints are refused, lost lines are named, and a full disk is known at once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import NamedTuple
from unittest import mock

import jax.numpy as jnp
import pytest

from rl_llm.errors import ConfigError
from rl_llm.evaluation import Evaluation
from rl_llm.parallel.sharding import make_mesh
from rl_llm.runs import checkpoint, origin
from rl_llm.runs.checkpoint import Checkpointer, CheckpointError
from rl_llm.runs.config import option
from rl_llm.runs.metrics import PhaseClock, read
from rl_llm.training import loop


@dataclasses.dataclass(frozen=True)
class Config:
  NOTED = ("rate",)

  steps: int = option(6, "how many", volatile=True)
  seed: int = option(0, "where randomness begins")
  data: str = option("", "a file")
  rate: float = option(0.5, "how fast")


class Counted(NamedTuple):
  steps: jnp.ndarray


class Drawn(NamedTuple):
  metrics: dict
  samples: list


def train(workdir, config=Config(), *, until=None, keep=2):
  """Adds 1 to the state at each step; killed before the step `until`. The result, and the state."""

  def sample(state, step, clock):
    if step == until:
      raise KeyboardInterrupt
    return Drawn(
      {"x": step},
      [{"split": "train", "problem": i, "prompt": "1", "response": "2"} for i in range(2)],
    )

  def learn(state, drawn, step, clock):
    return Counted(state.steps + 1), loop.Learned({})

  def evaluate(state, step):
    return Evaluation({"eval/loss": float(step)}, [])

  with loop.open_run(config, workdir, steps=config.steps, checkpoints_kept=keep) as run:
    if run.result is not None:
      return run.result, None
    begun = loop.begin(run, Counted, jnp.float32(0), steps=config.steps, mesh=make_mesh())
    with loop.open_record(run, begun[0], samples_every=0, max_skipped=9) as record:
      state = loop.train_loop(
        run,
        *begun,
        sample=sample,
        learn=learn,
        evaluate=evaluate,
        record=record,
        schedule=loop.Schedule(config.steps, 6, 2),
      )
    return loop.finish(run), float(state.steps)


def killed(workdir, config=Config(), *, before=5, **how):
  with pytest.raises(KeyboardInterrupt):
    train(workdir, config, until=before, **how)


def extra_of(workdir, step):
  return json.loads((workdir / "checkpoints" / str(step) / "manifest.json").read_text())["extra"]


def test_a_checkpoint_says_of_which_run_it_is(tmp_path):
  data = tmp_path / "data"
  data.write_text("x")
  killed(tmp_path / "run", Config(seed=7, data=str(data)))
  extra = extra_of(tmp_path / "run", 4)
  assert extra["settings"] == {"seed": 7, "data": str(data), "rate": 0.5}
  assert list(extra["files"]) == ["data"] and extra["recorded"] == 3
  lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
  assert extra["bytes"]["metrics.jsonl"] == sum(map(len, lines[:4]))


def test_nothing_is_said_where_nothing_is_missing(tmp_path, capsys):
  killed(tmp_path / "run")
  result, state = train(tmp_path / "run")
  assert state == 6 and "steps_missing" not in result and "missing" not in capsys.readouterr().out


@pytest.mark.parametrize(
  "kept, said",
  [
    ((), "lines 0 to 3 of metrics.jsonl are missing"),
    ((3, 4), "lines 0 to 2 of metrics.jsonl are missing"),
    ((0, 2, 3, 4), "line 1 of metrics.jsonl is missing"),
    ((0, 1), "lines 2 to 3 of metrics.jsonl are missing"),
  ],
)
def test_lost_lines_are_named_at_the_resume_and_in_the_result(tmp_path, capsys, kept, said):
  workdir = tmp_path / "run"
  killed(workdir)
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[i] for i in kept)) if kept else path.unlink()
  result, state = train(workdir)
  out = capsys.readouterr().out
  assert state == 6 and f"{said}: the run resumes without them" in out
  lost = said.partition(" ")[2].partition(" of ")[0]
  assert result["steps_missing"] == lost and f"has lost the lines of steps {lost}" in out
  # What came first is not called the state before training.
  assert result["before"] == ({"eval/loss": 0.0} if 0 in kept else {})
  assert result["after"] == {"eval/loss": 6.0}
  assert f"has lost the lines of steps {lost}" in (workdir / "report.html").read_text()


def test_lost_samples_are_named(tmp_path, capsys):
  killed(tmp_path / "run")
  path = tmp_path / "run" / "samples.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[1:]))
  whole = sum(map(len, lines[:8]))
  train(tmp_path / "run")
  said = f"{len(lines[0])} of {whole} bytes of samples.jsonl are missing"
  assert said in capsys.readouterr().out


@pytest.mark.parametrize("step", [2, 4])
def test_checkpoints_of_another_run_are_refused(tmp_path, step):
  killed(tmp_path / "one")
  killed(tmp_path / "other", Config(seed=1))
  name = f"checkpoints/{step}"
  shutil.rmtree(tmp_path / "one" / name)
  shutil.copytree(tmp_path / "other" / name, tmp_path / "one" / name)
  with pytest.raises(ConfigError, match=rf"--seed=0: must be 1, as in the run whose .*/{step};"):
    train(tmp_path / "one")


def test_without_config_json_other_settings_are_refused_and_its_own_resume(tmp_path):
  killed(tmp_path)
  os.unlink(tmp_path / "config.json")
  with pytest.raises(ConfigError, match="--seed=3: must be 0, as in the run whose checkpoint is"):
    train(tmp_path, Config(seed=3))
  assert train(tmp_path)[1] == 6


def test_without_config_json_a_setting_that_may_change_is_said_to_have(tmp_path, capsys):
  killed(tmp_path)
  os.unlink(tmp_path / "config.json")
  capsys.readouterr()
  train(tmp_path, Config(rate=0.25))
  assert "other settings from step 4 on: rate 0.5 -> 0.25" in capsys.readouterr().out
  assert read(tmp_path / "changes.jsonl")[-1]["settings"] == {"rate": [0.5, 0.25]}


def test_without_inputs_json_another_file_is_refused(tmp_path):
  data, workdir = tmp_path / "data", tmp_path / "run"
  data.write_text("x")
  killed(workdir, Config(data=str(data)))
  os.unlink(workdir / "inputs.json")
  data.write_text("y")
  with pytest.raises(ConfigError, match="the file as it was when the run whose checkpoint is"):
    train(workdir, Config(data=str(data)))


def test_a_record_that_nothing_says_the_settings_of_is_refused(tmp_path):
  killed(tmp_path, before=1)  # No checkpoint yet.
  os.unlink(tmp_path / "config.json")
  with pytest.raises(ConfigError, match=r"whose config\.json is there.*another --workdir"):
    train(tmp_path, Config(seed=3))
  assert len(read(tmp_path / "metrics.jsonl")) == 1


def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_other(tmp_path):
  killed(tmp_path)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
  damaged = next(p for p in (tmp_path / "checkpoints" / "4" / "state").rglob("d/*"))
  damaged.write_bytes(bytes(len(damaged.read_bytes())))
  result, state = train(tmp_path)
  assert state == 6 and [row["step"] for row in read(tmp_path / "metrics.jsonl")] == list(range(7))


def test_old_checkpoints_go_only_once_the_new_one_reads_back(tmp_path, monkeypatch):
  """A disk that took what was written and does not give it back."""
  checkpointer = Checkpointer(tmp_path, keep=1)
  checkpointer.save(1, jnp.ones(3))
  rename = os.rename

  def rename_and_damage(source, target):
    rename(source, target)
    if str(target).endswith("/2"):
      path = next(p for p in (tmp_path / "2" / "state").rglob("d/*"))
      path.write_bytes(bytes(len(path.read_bytes())))

  monkeypatch.setattr(os, "rename", rename_and_damage)
  checkpointer.save(2, jnp.ones(3) * 2)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
  assert checkpointer.latest() == 1
  checkpointer.save(3, jnp.ones(3) * 3)
  assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_too_small_a_disk_is_refused_at_the_start(tmp_path, capsys):
  """keep + 1 checkpoints of 4 MB lie there at once; those that are there already need no more."""
  checkpointer = Checkpointer(tmp_path / "checkpoints", keep=2)
  shapes, run = {"w": jnp.zeros((1000, 1000))}, mock.Mock(workdir=tmp_path)
  run.checkpoints = checkpointer
  for there, needed in ((0, 12), (1, 8), (2, 4), (3, 4)):
    if there:
      checkpointer.keep = 9
      checkpointer.save(there, shapes)
      checkpointer.keep = 2
    free = mock.Mock(free=needed * 1e6)
    with mock.patch.object(shutil, "disk_usage", return_value=free):
      loop.say_room(run, shapes)
    free = mock.Mock(free=needed * 1e6 - 1)
    with mock.patch.object(shutil, "disk_usage", return_value=free):
      with pytest.raises(ConfigError, match=rf"another {needed} MB of.*lower --checkpoint\.keep"):
        loop.say_room(run, shapes)
  said = run.console.say.call_args[0][0]
  assert "at most 12 MB of disk for 2 checkpoints" in said
  assert said.endswith("; 4 MB of memory while one is being written")


def test_a_manifest_of_another_kind_is_damage(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, jnp.ones(3))
  for body in ([], {"format_version": 1}, {"format_version": 1, "step": 1, "extra": 3}):
    text = checkpoint._manifest_text(body) if body else "[]"
    (tmp_path / "1" / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
      Checkpointer(tmp_path).restore(jnp.ones(3), 1)


def test_the_record_waits_for_the_disk_before_a_checkpoint_and_not_at_each_step(
  tmp_path, monkeypatch
):
  synced, fsync = [], os.fsync

  def watched(descriptor):
    synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", watched)
  monkeypatch.setattr(loop, "write_report", lambda *_, **__: None)
  run = mock.Mock(workdir=tmp_path)
  with loop.open_record(run, 0, samples_every=0, max_skipped=1) as record:
    synced.clear()
    for step in range(3):
      record(loop.Step(step, PhaseClock()))
    assert synced == [] and len(read(tmp_path / "metrics.jsonl")) == 3
    assert origin.recorded(tmp_path, 3)["bytes"]["metrics.jsonl"] > 0
    assert sorted(synced) == ["metrics.jsonl", "samples.jsonl"]
    synced.clear()
  assert sorted(synced) == ["metrics.jsonl", "samples.jsonl"]
