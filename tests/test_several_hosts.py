"""Whole runs of two processes with four devices each: what they record is what one process does."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path

import pytest

from rl_llm.runs.metrics import read, without_timings
from tests import processes
from tests.experiments.helpers import FULL, write_examples

pytestmark = pytest.mark.slow
COMMON = {"model": "tiny", "steps": 5, "eval.every": 4, "checkpoint.every": 2}
SAMPLING = {
  "task": "copy",
  "prompts_per_step": 16,
  "responses_per_prompt": 4,
  "microbatch_prompts": 8,
  "eval.problems": 12,  # Less than a batch: the rest is filled up.
  "eval.samples": 3,
  "samples_every": 100,
}
PAIRS = {"pairs_per_step": 16, "microbatch_pairs": 8, "held_out_fraction": 0.3}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  return write_examples(tmp_path_factory.mktemp("data"), count=60)


def command(experiment, workdir, settings, further=()):
  given = COMMON | {"workdir": workdir} | settings
  return [
    "-m",
    f"experiments.{experiment}",
    *(f"--{name}={value}" for name, value in given.items()),
    *further,
  ]


def alone(experiment, workdir, settings):
  """One process with eight devices."""
  found = processes.ended(processes.start(command(experiment, workdir, settings), devices=8))
  assert found.code == 0, found.err


def begin_two(experiment, workdir, settings, *, each=({}, {}), **further):
  port = processes.free_port()
  return [
    processes.start(
      command(experiment, workdir, settings | each[me], processes.flags(me, port=port, **further)),
      devices=4,
    )
    for me in (0, 1)
  ]


def two(*arguments, code=0, **settings):
  """Two processes with four devices each, to the end."""
  found = [processes.ended(process) for process in begin_two(*arguments, **settings)]
  assert [process.code for process in found] == [code] * 2, found
  return found


def records(workdir, name="metrics.jsonl"):
  return without_timings(read(Path(workdir) / name))


# How far two policies are apart that are almost one: what is left of log-probs of about 5, each
# rounded by 5e-7, once they are subtracted.
ALMOST_EQUAL = (
  *("logprob_gap_mean", "kl_ref", "approx_kl"),
  *("margin", "chosen_reward", "rejected_reward"),
  *("eval/margin", "eval/chosen_reward", "eval/rejected_reward"),
)


def largest_gap(found, wanted):
  """The largest relative difference of two records' floats; all else must be equal."""
  largest = (0.0, "")
  assert [row["step"] for row in found] == [row["step"] for row in wanted]
  for ours, theirs in zip(found, wanted, strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      if name in ALMOST_EQUAL and abs(ours[name] - value) < 1e-6:
        continue
      elif isinstance(value, float):
        gap = abs(ours[name] - value) / max(abs(value), 1e-6)
        largest = max(largest, (gap, f"{name} of step {ours['step']}"))
      else:
        assert ours[name] == value, (name, ours["step"])
  return largest


def wait_for_rows(workdir, count, started):
  """Until the record has `count` rows."""
  path = Path(workdir) / "metrics.jsonl"
  deadline = time.monotonic() + processes.PATIENCE
  while not path.exists() or len(read(path)) < count:
    assert all(process.poll() is None for process in started), "ended before it was to"
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_two_processes_are_one_with_as_many_devices(tmp_path):
  settings = SAMPLING | {"kl.coef": 0.1}
  alone("grpo", tmp_path / "one", settings)
  found = two("grpo", tmp_path / "two", settings)
  gap = largest_gap(records(tmp_path / "two"), records(tmp_path / "one"))
  print("largest relative gap:", gap)
  assert gap[0] < 1e-5, gap
  one, other = (records(tmp_path / name, "samples.jsonl") for name in ("one", "two"))
  assert len(one) == len(other)
  for ours, theirs in zip(other, one, strict=True):
    for name in ("step", "problem", "response", "reward", "status", "correct", "stop_reason"):
      assert ours[name] == theirs[name], (name, ours, theirs)
  names = {path.name for path in (tmp_path / "one").iterdir()}
  assert {path.name for path in (tmp_path / "two").iterdir()} == names
  assert "step 5/5" in found[0].out or "step 4/5" in found[0].out
  assert found[1].out == ""
  assert [process.errors for process in found] == [[], []]


def test_other_settings_are_refused_at_the_start_of_all(tmp_path):
  for setting, ours in (("seed", 1), ("optimizer.learning_rate", 0.5)):
    found = two("grpo", tmp_path / setting, SAMPLING, code=2, each=({}, {setting: ours}))
    for process in found:
      (line,) = process.errors
      assert f"--{setting} is {ours} in process 1 (" in line, line
    assert not (tmp_path / setting).exists()  # Before anything was written.


def test_each_with_a_directory_of_its_own_is_refused(tmp_path):
  found = two("grpo", tmp_path / "a", SAMPLING, code=2, each=({}, {"workdir": tmp_path / "b"}))
  for process in found:
    assert "is not in process 1" in process.errors[0], process


UNSAVED = SAMPLING | {"epochs": 2, "checkpoint.every": 100, "steps": 12}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of two processes that nothing stopped."""
  directory = tmp_path_factory.mktemp("straight")
  two("grpo", directory, UNSAVED)
  return directory


@pytest.mark.skipif(not FULL, reason="eleven runs of two processes: RL_LLM_FULL=1")
@pytest.mark.parametrize("trial", range(5))
def test_a_signal_to_one_stops_both_and_the_run_goes_on(tmp_path, straight, trial):
  """F4: to the one or the other, after two steps or more."""
  settings = UNSAVED
  started = begin_two("grpo", tmp_path / "cut", settings)
  wait_for_rows(tmp_path / "cut", 2 + trial, started)
  started[trial % 2].send_signal(signal.SIGTERM)
  found = [processes.ended(process) for process in started]
  assert [process.code for process in found] == [128 + signal.SIGTERM] * 2, found
  assert "saved at step" in found[0].out
  saved = len(records(tmp_path / "cut"))
  assert 2 + trial <= saved < 12
  found = two("grpo", tmp_path / "cut", settings)
  assert f"resuming from the checkpoint at step {saved}" in found[0].out
  assert records(tmp_path / "cut") == records(straight)


@pytest.mark.skipif(not FULL, reason="three runs of two processes: RL_LLM_FULL=1")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_of_which_one_was_killed_goes_on(tmp_path, killed):
  settings = SAMPLING | {"epochs": 2, "steps": 12}
  two("grpo", tmp_path / "straight", settings)
  started = begin_two("grpo", tmp_path / "cut", settings, heartbeat=10)
  wait_for_rows(tmp_path / "cut", 4, started)
  started[killed].kill()
  at = time.monotonic()
  survivor = processes.ended(started[1 - killed])
  seconds = time.monotonic() - at
  (line,) = survivor.errors
  print(f"{seconds:.1f} s: {line}")
  assert f"process {killed} (" in line and "lost" in line
  assert survivor.code not in (0, None) and seconds < 30
  processes.ended(started[killed])
  found = two("grpo", tmp_path / "cut", settings)
  assert "resuming from the checkpoint at step" in found[0].out
  assert records(tmp_path / "cut") == records(tmp_path / "straight")


# Random weights, whose turns end often and are calls: what they sampled says of what.
AGENT = """
import functools
from experiments import agents, grpo, setup
from rl_llm.runs import config
from rl_llm.text.tokenizers import ByteTokenizer

def decode_turn(tokenizer, ids):
  number = sum(ids) % 16
  return "Done." if number < 3 else f"call calculate: {number}*{len(ids)}"

ByteTokenizer.eos_ids = tuple(range(0, 259, 3))
agents.turn_text.decode_turn = decode_turn
config.run(functools.partial(setup.main, grpo.train), grpo.Config, overrides=grpo.overrides)
"""


def test_episodes_of_two_processes_are_those_of_one(tmp_path):
  """Each process has the environments of its own rows."""
  sizes = ("prompts_per_step", "responses_per_prompt", "microbatch_prompts")
  settings = {name: SAMPLING[name] for name in sizes} | {"samples_every": 100}
  settings |= {"env": "calculator", "eval.every": 0, "max_new_tokens": 6, "max_turns": 3}
  settings |= {"episode_tokens": 48, "steps": 2, "sampling.parts": 2}

  def started(workdir, devices, further=()):
    _, _, *flags = command("grpo", tmp_path / workdir, settings, further)
    return processes.start(["-c", AGENT, *flags], devices=devices)

  port = processes.free_port()
  found = [processes.ended(started("one", 4))]
  both = [started("two", 2, processes.flags(me, port=port)) for me in (0, 1)]
  found += [processes.ended(process) for process in both]
  assert [process.code for process in found] == [0, 0, 0], found
  gap = largest_gap(records(tmp_path / "two"), records(tmp_path / "one"))
  print("largest relative gap:", gap)
  assert gap[0] < 1e-5, gap
  one, two_of_them = (records(tmp_path / name, "samples.jsonl") for name in ("one", "two"))
  assert len(one) == len(two_of_them) and max(len(row["turns"]) for row in one) == 3
  for ours, theirs in zip(two_of_them, one, strict=True):
    for name in ("step", "problem", "turns", "reward", "status", "stop_reason"):
      assert ours[name] == theirs[name], (name, ours, theirs)


@pytest.mark.skipif(not FULL, reason="runs of every experiment: RL_LLM_FULL=1")
@pytest.mark.parametrize("mesh", [{}, {"mesh.data": 1, "mesh.fsdp": 8}], ids=str)
@pytest.mark.parametrize(
  "experiment",
  [
    *("grpo", "reinforce", "ppo", "sft", "dpo", "dpo on data", "reward_model"),
    *("kto", "distill", "online_dpo"),
  ],
)
def test_every_experiment_is_that_of_one_process(tmp_path, data, experiment, mesh):
  settings = {
    "grpo": SAMPLING | {"epochs": 2, "minibatches": 2, "microbatch_prompts": 8, "lora.rank": 4},
    "reinforce": SAMPLING | {"kl.coef": 0.1, "advantage.name": "moving_average"},
    "ppo": SAMPLING | {"kl.coef": 0.1, "kl.controller": "adaptive", "export": True},
    "sft": {"task": "copy", "examples_per_step": 16, "microbatch_rows": 8, "eval.problems": 12},
    "dpo": {"task": "copy", "pairs_per_step": 16, "microbatch_pairs": 8, "eval.problems": 12},
    "dpo on data": PAIRS | {"data": data / "pairs.jsonl", "task": "none"},
    "reward_model": PAIRS | {"data": data / "pairs.jsonl"},
    "kto": {"data": data / "pairs.jsonl", "examples_per_step": 16, "microbatch_rows": 8},
    "distill": SAMPLING | {"teacher": "tiny"},
    "online_dpo": SAMPLING | {"loss.name": "nash_md_loss"},
  }[experiment] | mesh
  settings["optimizer.learning_rate"] = 1e-5
  if "lora.rank" in settings and mesh:
    del settings["lora.rank"]
  module = experiment.split()[0]
  alone(module, tmp_path / "one", settings)
  two(module, tmp_path / "two", settings)
  gap = largest_gap(records(tmp_path / "two"), records(tmp_path / "one"))
  print("largest relative gap:", gap)
  assert gap[0] < 1e-5, gap
  names = {path.name for path in (tmp_path / "one").iterdir()}
  assert {path.name for path in (tmp_path / "two").iterdir()} == names


@pytest.mark.skipif(not FULL, reason="four runs: RL_LLM_FULL=1")
def test_evaluations_and_preferences_are_those_of_one_process(tmp_path):
  own = {"steps", "eval.every", "checkpoint.every"}
  common = {"model": "tiny", "task": "copy", "prompts_per_batch": 8, "samples": 8}
  for experiment, settings in (("evaluate", {}), ("make_preferences", {"max_new_tokens": 2})):
    for several in (False, True):
      workdir = tmp_path / f"{experiment} {several}"
      arguments = [
        argument
        for argument in command(experiment, workdir, common | settings)
        if argument[2:].partition("=")[0] not in own
      ]
      port = processes.free_port()
      joining = [processes.flags(me, port=port) for me in (0, 1)] if several else [[]]
      started = [processes.start(arguments + flags, devices=8 // len(joining)) for flags in joining]
      found = [processes.ended(process) for process in started]
      # A model of random weights may give no pair: the same in both.
      assert len({process.code for process in found}) == 1, found
    one, other = (records(tmp_path / f"{experiment} {x}", "samples.jsonl") for x in (False, True))
    assert one == other
    assert (
      largest_gap(*(records(tmp_path / f"{experiment} {x}") for x in (True, False)))[0] < math.inf
    )
