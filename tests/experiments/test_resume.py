"""Every experiment, stopped three times and started again, ends as if nothing had happened.

Interrupted at one of its own safe points, a run saves what it has; killed there, it has what its
last checkpoint holds. The tests of most experiments each do the same on their own, so these are
stopped here, at the same points as the others, in the long trials alone.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from experiments import distill, dpo, grpo, kto, online_dpo, ppo, reinforce, reward_model, sft
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read
from rl_llm.runs.signals import Interrupted, StopSignals
from rl_llm.training import loop
from tests.experiments import helpers
from tests.experiments.helpers import FULL, equal, outcome, settings

STEPS = 6


class Killed(BaseException):
  """As if the process had ended here: nothing is saved, only what was open is closed."""


class Stopping(StopSignals):
  """The run's stop signals, of which one comes: `extra` checks after the record has `rows` lines.

  Counted from the record, since an experiment that loads a file checks once an example.
  """

  record: Path
  rows, extra = 0, 0
  error: BaseException

  def check(self):
    if self.record.exists() and len(read(self.record)) >= Stopping.rows:
      Stopping.extra -= 1
      if Stopping.extra < 0:
        raise self.error


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Files of preference pairs and of demonstrations, ragged."""
  directory = tmp_path_factory.mktemp("data")
  rows = [
    {"prompt": chr(97 + i % 20) + "x" * (i % 5), "chosen": "y" + "a" * (i % 3), "rejected": "n"}
    for i in range(40)
  ]
  path = directory / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
  path = directory / "demonstrations.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return directory


def sampling(files, **changes):
  """What experiments with a rollout have in common."""
  common = {"optimizer.learning_rate": 0.01, "steps": STEPS}
  common |= {"eval.every": 4, "checkpoint.every": 2}
  return settings(files) | common | changes


def policy_gradient(files, **changes):
  """Several updates a step, and a reference."""
  return sampling(files, **{"epochs": 2, "kl.coef": 0.1}, **changes)


def on_data(path, **changes):
  """The same for experiments that read a file."""
  common = {"model": "tiny", "data": str(path), "prompt_format": "plain", "steps": STEPS}
  common |= {"held_out_fraction": 0.3, "eval.every": 4, "checkpoint.every": 2}
  return common | {"optimizer.learning_rate": 0.01} | changes


CASES = {
  "grpo": lambda files, data: (grpo, policy_gradient(files)),
  "reinforce": lambda files, data: (
    reinforce,
    policy_gradient(files, **{"loss.name": "ppo_loss", "advantage.name": "moving_average"}),
  ),
  "ppo": lambda files, data: (ppo, policy_gradient(files, **{"kl.controller": "adaptive"})),
  "distill": lambda files, data: (distill, sampling(files, teacher="another", epochs=2)),
  "online_dpo": lambda files, data: (online_dpo, sampling(files)),
  "sft": lambda files, data: (
    sft,
    on_data(
      data / "demonstrations.jsonl",
      task="none",
      packing=16,
      max_tokens=16,
      examples_per_step=4,
      microbatch_rows=2,
    ),
  ),
  "reward_model": lambda files, data: (
    reward_model,
    on_data(data / "pairs.jsonl", pairs_per_step=4, microbatch_pairs=2),
  ),
  "kto": lambda files, data: (
    kto,
    on_data(data / "pairs.jsonl", examples_per_step=8, microbatch_rows=4),
  ),
  "dpo": lambda files, data: (
    dpo,
    on_data(data / "pairs.jsonl", task="none", pairs_per_step=4, microbatch_pairs=2),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES if FULL else ["reinforce", "reward_model"])
def test_a_run_stopped_three_times_ends_as_one_that_was_not(
  case, tmp_path, small, files, data, monkeypatch, record_property
):
  experiment, changes = CASES[case](files, data)
  config = replace(experiment.Config(), changes)
  experiment.train(config, str(tmp_path / "straight"))

  # Between two steps, within one, and within one that evaluates.
  points = (
    (Interrupted(signal.SIGTERM), 1, 0, 1),
    (Killed(), 3, 1, 2),
    (Interrupted(signal.SIGTERM), 4, 1, 4),
  )
  with monkeypatch.context() as patch:
    patch.setattr(loop, "StopSignals", Stopping)
    Stopping.record = tmp_path / "cut" / "metrics.jsonl"
    for Stopping.error, Stopping.rows, Stopping.extra, saved in points:
      with pytest.raises(type(Stopping.error)):
        experiment.train(config, str(tmp_path / "cut"))
      assert Checkpointer(tmp_path / "cut" / "checkpoints").latest() == saved
  experiment.train(config, str(tmp_path / "cut"))

  straight, cut = outcome(tmp_path / "straight"), outcome(tmp_path / "cut")
  assert [row["step"] for row in straight.metrics] == list(range(STEPS + 1))
  assert cut.metrics == straight.metrics
  assert cut.samples == straight.samples
  assert straight.state.keys() == cut.state.keys() and equal(straight.state, cut.state)
  record_property("F6", len(points))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grpo", "reinforce", "ppo"] if FULL else ["grpo"])
def test_a_signal_within_a_step_s_updates_waits_until_all_are_made_and_on_record(
  case, tmp_path, small, files, monkeypatch
):
  """What is saved is the state after that step, and nothing of the next one has begun."""
  experiment, changes = CASES[case](files, None)
  changes |= {"checkpoint.every": 100}
  straight = helpers.run(experiment, tmp_path / "straight", changes | {"steps": 2})
  updates, sampled = [], []

  def wrap_update(update):
    def update_and_signal(*args):
      found = update(*args)
      if sampled == [0, 1] and 1 not in updates:
        os.kill(os.getpid(), signal.SIGTERM)
      updates.append(sampled[-1])
      return found

    return update_and_signal

  def wrap_sample(sample):
    def sample_and_note(state, step, clock):
      sampled.append(step)
      return sample(state, step, clock)

    return sample_and_note

  with monkeypatch.context() as patch:
    helpers.wrap_updates(patch, experiment, wrap_update)
    helpers.wrap_seams(patch, sample=wrap_sample)
    config = replace(experiment.Config(), changes | {"workdir": str(tmp_path / "cut")})
    assert helpers.main(experiment, config) == 128 + signal.SIGTERM
  assert sampled == [0, 1]
  assert updates.count(0) == updates.count(1) > 1
  assert Checkpointer(tmp_path / "cut" / "checkpoints").latest() == 2
  cut = outcome(tmp_path / "cut")
  assert cut.metrics == straight.metrics[:2]
  assert cut.samples == [row for row in straight.samples if row["step"] < 2]
  assert straight.state.keys() == cut.state.keys() and equal(straight.state, cut.state)
