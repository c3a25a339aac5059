"""A copy of an experiment is an experiment: what it changes is refused, asked for, or noted."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from experiments import grpo
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from tests.experiments.helpers import settings


def copy_of_grpo(path, old, new):
  """The script with a text replaced, as a module."""
  text = open(grpo.__file__).read()
  assert text.count(old) == 1
  path.write_text(text.replace(old, new))
  spec = importlib.util.spec_from_file_location("mine", path)
  sys.modules["mine"] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_a_copy_with_another_advantage_does_not_resume(tmp_path, small, files, monkeypatch):
  monkeypatch.setitem(sys.modules, "mine", None)
  call = "  return keywords.call(options,"
  mine = copy_of_grpo(tmp_path / "mine.py", call, call)

  def train(module, **changes):
    config = replace(module.Config(), settings(files, steps=1) | changes)
    return module.train(config, str(tmp_path / "run"))

  train(mine)
  with pytest.raises(ConfigError, match="a directory for experiments.grpo, and .* run of mine"):
    train(grpo)
  before = (tmp_path / "run/metrics.jsonl").read_bytes()
  flipped = copy_of_grpo(tmp_path / "mine.py", call, call.replace("keywords", "-keywords"))
  for steps in (1, 2):  # Neither its result nor further steps.
    with pytest.raises(ConfigError, match="--code=changed"):
      train(flipped, steps=steps)
  assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
  assert train(flipped, steps=2, code="changed")["steps"] == 2
  (note,) = map(json.loads, (tmp_path / "run/changes.jsonl").read_text().splitlines())
  assert note["step"] == 1 and note["code"] == ["mine"]


@pytest.mark.slow
def test_a_finished_run_keeps_the_checkpoints_that_it_is_to_keep(tmp_path, small, files, capfd):
  def train(**changes):
    config = replace(grpo.Config(), settings(files) | changes)
    return grpo.train(config, str(tmp_path / "run"))

  def kept():
    return sorted(path.name for path in (tmp_path / "run/checkpoints").glob("[0-9]*"))

  train(steps=3, **{"checkpoint.every": 1, "checkpoint.keep": 3, "checkpoint.keep_at_end": 2})
  assert kept() == ["2", "3"]
  *_, report, following = capfd.readouterr().out.strip().splitlines()
  assert report == f"report: {tmp_path}/run/report.html"
  assert following.startswith("next: ") or "--" in following
  train(steps=4, **{"checkpoint.keep_at_end": 0})
  assert kept() == []
  record = (tmp_path / "run/metrics.jsonl").read_bytes()
  assert train(steps=4)["steps"] == 4
  with pytest.raises(ConfigError, match="--steps=5: must be 4, the steps of the finished run in"):
    train(steps=5)
  with pytest.raises(ConfigError, match="--workdir=.*must be a run that has kept a checkpoint"):
    train(steps=4, export=True)
  assert (tmp_path / "run/metrics.jsonl").read_bytes() == record
