"""Runs that are killed, stopped, robbed of their files, or given odd settings, data and secrets."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import dpo, evaluate, grpo, ppo, reinforce, reward_model, sft
from rl_llm.data.jsonl import DataError
from rl_llm.errors import UserError
from rl_llm.rewards import memory
from rl_llm.runs import config as configs
from rl_llm.runs.checkpoint import CheckpointError
from rl_llm.tasks import load_task
from tests import processes
from tests.experiments import helpers
from tests.experiments.conftest import files, small  # noqa: F401  fixtures
from tests.experiments.helpers import FULL, outcome
from tests.experiments.test_grpo import assert_as_uninterrupted, interrupt
from tests.faults import trials
from tests.processes import PATIENCE

pytestmark = pytest.mark.slow

# Signals.


@pytest.mark.skipif(not FULL, reason="52 starts of a run: RL_LLM_FULL=1")
def test_killed_at_random_moments_a_run_ends_as_one_that_was_not(tmp_path, record_property):
  """F1: among its steps, and while it starts."""
  kills = trials(50)
  steps = 4 * (kills + 1)
  interrupt(tmp_path, [signal.SIGKILL] * kills, steps=steps)
  assert_as_uninterrupted(outcome(tmp_path / "straight"), outcome(tmp_path / "cut"), steps)
  record_property("F1", kills)


@pytest.mark.skipif(not FULL, reason="22 starts of a run: RL_LLM_FULL=1")
def test_stopped_at_random_steps_a_run_saves_the_step_in_flight(tmp_path, record_property):
  """F3: and no more than that one, in a few seconds."""
  stops = trials(20)
  steps = 4 * (stops + 1)
  stopped = interrupt(tmp_path, [signal.SIGTERM] * stops, steps=steps)
  assert_as_uninterrupted(outcome(tmp_path / "straight"), outcome(tmp_path / "cut"), steps)
  # The record that was read a moment before the signal may lack a step that ended meanwhile.
  assert len(stopped) == stops and all(0 <= further <= 2 for further, _ in stopped), stopped
  print("seconds from the signal to the end:", sorted(round(s, 1) for _, s in stopped))
  record_property("F3", stops)


# Files that vanish, disks that fill up.


def robbed(tmp_path, files, monkeypatch, rob):  # noqa: F811
  """A run of whose directory something is taken before its fourth step: what it says."""

  def wrap(sample):
    def sample_and_rob(state, step, clock):
      if step == 3:
        while not (tmp_path / "run" / "checkpoints" / "2").exists():  # It is being written.
          time.sleep(0.01)
        rob(tmp_path / "run")
      steps.append(step)
      return sample(state, step, clock)

    return sample_and_rob

  steps = []
  with monkeypatch.context() as patch:
    helpers.wrap_seams(patch, sample=wrap)
    changes = {"steps": 8, "checkpoint.every": 2}
    with pytest.raises(UserError) as raised:
      helpers.run(grpo, tmp_path / "run", helpers.settings(files, **changes))
  assert max(steps) == 3, "the next save is due before step 4"
  assert "\n" not in str(raised.value) and str(tmp_path / "run") in str(raised.value)
  return raised


def test_checkpoints_that_vanish_are_named_at_the_next_save(tmp_path, small, files, monkeypatch):  # noqa: F811
  """F12."""
  raised = robbed(tmp_path, files, monkeypatch, lambda run: shutil.rmtree(run / "checkpoints"))
  assert raised.type is CheckpointError and "moved or deleted" in str(raised.value)


def test_a_record_that_vanishes_ends_a_run_in_one_line(tmp_path, small, files, monkeypatch):  # noqa: F811
  """F39: its directory, with all that is in it."""
  robbed(tmp_path, files, monkeypatch, shutil.rmtree)


FILLED = """
    import sys, threading, time
    from pathlib import Path
    from experiments import grpo, setup
    from rl_llm.errors import UserError
    from rl_llm.runs.checkpoint import Checkpointer
    from rl_llm.runs.config import replace
    place = Path(sys.argv[1])
    def fill():  # Once there is a checkpoint to resume from, which follows the record's lines.
      while Checkpointer(place / "run" / "checkpoints").latest() is None:
        time.sleep(0.01)
      try:
        with open(place / "filled", "wb", buffering=0) as file:
          while True:
            file.write(bytes(4096))
      except OSError:
        pass
    threading.Thread(target=fill, daemon=True).start()
    changes = {"model": "tiny", "task": "copy", "steps": 4000, "workdir": str(place / "run")}
    changes |= {"prompts_per_step": 2, "responses_per_prompt": 2, "microbatch_prompts": 2}
    changes |= {"eval.every": 0, "checkpoint.every": 2}
    config = replace(grpo.Config(), changes)
    try:
      print("ended with", setup.main(grpo.train, config))
    except UserError as error:
      print("said", error)
    saved = Checkpointer(place / "run" / "checkpoints").latest()
    (place / "filled").unlink()
    config = replace(config, {"steps": saved + 4})
    print("saved", saved, "then", setup.main(grpo.train, config))
"""


def test_a_disk_that_fills_up_ends_a_run_in_one_line(tmp_path):
  """F11: in a mount namespace of its own, which ends with the process; with space it resumes."""
  mount = 'mount -t tmpfs -o size=64m tmpfs "$0" && exec "$@"'
  space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path)]
  if subprocess.run([*space, "true"], capture_output=True).returncode:
    pytest.skip("no private tmpfs on this machine")
  done = subprocess.run(
    [*space, sys.executable, "-c", textwrap.dedent(FILLED), str(tmp_path)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(processes.ROOT)},
    capture_output=True,
    text=True,
    timeout=PATIENCE,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  said = [line for line in done.stdout.splitlines() if line.startswith(("said", "saved", "ended"))]
  assert len(said) == 2 and str(tmp_path) in said[0] and "Traceback" not in done.stderr, said
  assert "space" in said[0] or "disk is full" in said[0], said
  assert said[1].endswith("then 0"), said


# Settings, data, secrets.

EXPERIMENTS = (grpo, reinforce, ppo, dpo, sft, reward_model, evaluate)
ODD = st.one_of(
  st.text(max_size=12),
  st.sampled_from(["", "nan", "-inf", "1e400", "-1", "0", "9" * 30, "1.5", "none", "true", "\0"]),
  st.integers(-5, 2**70).map(str),
  st.floats().map(str),
)


@settings(max_examples=500 if FULL else 25, deadline=None)
@given(data=st.data())
def draw_settings(count, data):
  """One to four settings at random of an experiment; counts those that were tried."""
  module = data.draw(st.sampled_from(EXPERIMENTS))
  names = sorted(configs.flatten(module.Config()))
  given = data.draw(st.dictionaries(st.sampled_from(names), ODD, min_size=1, max_size=4))
  values = flags.FlagValues()
  configs.define_flags(module.Config, flag_values=values)
  try:
    values(["program", *(f"--{name}={text}" for name, text in given.items())])
    config = configs.from_flags(module.Config, flag_values=values)
    overrides = configs.overrides_of(module.Config)(config)
    config = configs.from_flags(module.Config, overrides=overrides, flag_values=values)
    getattr(module, "check", configs.check)(config)
  except (UserError, flags.Error) as error:
    assert "\n" not in str(error) and any(name in str(error) for name in names), error
  count.append(given)


def test_any_text_for_any_flag_is_fine_or_named(monkeypatch, record_property):
  """F28: nothing else is raised, and nothing is compiled."""
  monkeypatch.setattr("jax.jit", lambda *_, **__: pytest.fail("compiled"))
  count = []
  draw_settings(count)
  record_property("F28", len(count))


BROKEN = (
  b'{"prompt": "half',
  b'{"question": "no prompt"}',
  b'{"prompt": null}',
  b'{"prompt": 7}',
  b'{"prompt": "\\ud800"}',
  b'{"prompt": "a\\u0000b"}',
  b'{"prompt": "' + b"x" * 10_000_000 + b'"}',
  b'{"prompt": "a", "prompt": "b"}',
  b'{"prompt": "\xff"}',
  b'["a"]',
)


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_broken_rows_are_named_or_counted(tmp_path, end, record_property):
  """F27: 1 % of the rows, of ten kinds, behind a byte order mark."""
  count = 10_000 if FULL else 1_000
  path, broken = tmp_path / "rows.jsonl", set(range(50, count, 100))
  with open(path, "wb") as file:
    file.write(b"\xef\xbb\xbf")
    for number in range(count):
      row = json.dumps({"prompt": f"p{number}"}).encode()
      file.write((BROKEN[number // 100 % 10] if number in broken else row) + end)
  options = {"reward_function": "exact_match", "held_out_fraction": 0.0}
  with pytest.raises(DataError, match=rf"rows.jsonl:{min(broken) + 1}: not JSON"):
    load_task(f"jsonl:{path}", **options)
  task = load_task(f"jsonl:{path}", lenient=True, **options)
  assert f"{len(broken)} broken dropped" in task.note
  found = {problem.prompt for problem in task.sample(0, 0, count - len(broken))}
  assert found == {f"p{number}" for number in range(count) if number not in broken}
  record_property("F27", len(broken))


def test_credentials_are_nowhere_in_what_a_run_leaves(tmp_path, record_property):
  """F32: those of the environment, of the command line, and of the data that is shown."""
  # Put together here, so that no scanner of repositories takes them for real ones.
  secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HF_TOKEN": "hf_" + "aB3" * 11}
  secrets |= {"OPENAI_API_KEY": "sk-proj-" + "Zz9_" * 8, "PGPASSWORD": "hunter22"}
  rows = [{"prompt": f"{i} {secrets['WANDB_API_KEY']} hunter22"} for i in range(20)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "reward.py").write_text(
    "import os\ndef reward(prompts, completions, **columns):\n"
    "  return [len(text) % 3 / 2 for text in completions]\n"
    "def broken(prompts, completions, **columns):\n"
    f"  raise ValueError({secrets['HF_TOKEN']!r} + str(os.environ.get('HF_TOKEN')))\n"
  )
  given = {"model": "tiny", "task": f"jsonl:{tmp_path / 'rows.jsonl'}", "steps": 2}
  given |= {"jsonl.instruction": secrets["OPENAI_API_KEY"], "workdir": tmp_path / "run"}
  given |= {"prompts_per_step": 2, "responses_per_prompt": 2, "microbatch_prompts": 2}
  given |= {
    "jsonl.reward_file": tmp_path / "reward.py",
    "eval.problems": 1,
    "eval.samples": 1,
    "samples_every": 1,
    "max_prompt_tokens": 200,
  }
  command = ["-m", "experiments.grpo", *(f"--{name}={value}" for name, value in given.items())]
  other = [*command, f"--workdir={tmp_path / 'other'}"]
  broken = [*other, "--jsonl.reward_function=broken"]
  nowhere = [*other, f"--model=/nowhere/{secrets['HF_TOKEN']}"]
  for arguments, code in ((command, 0), (broken, 2), (nowhere, 2)):
    found = processes.ended(processes.start(arguments, **secrets))
    assert found.code == code, (found.out[-2000:], found.err[-2000:])
    assert "[redacted]" in found.out + found.err
    assert not [name for name, secret in secrets.items() if secret in found.out + found.err]
  paths = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
  assert {"config.json", "samples.jsonl", "report.html"} <= {path.name for path in paths}
  for path in paths:
    content = path.read_bytes()
    assert not [name for name, secret in secrets.items() if secret.encode() in content], path
  record_property("F32", 3)


# What a long run leaves.


def held(pid):
  """(MB resident, open files, sockets, processes started) of a process."""
  pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
  opened = []
  for each in os.scandir(f"/proc/{pid}/fd"):
    with contextlib.suppress(OSError):  # it was closed just now
      opened.append(os.readlink(each.path))
  sockets = sum(name.startswith("socket:") for name in opened)
  return pages * 4096 / 1e6, len(opened) - sockets, sockets, memory.descendants(pid)


@pytest.mark.skipif(not FULL, reason="5,000 steps: RL_LLM_FULL=1")
def test_five_thousand_steps_grow_little_and_leave_nothing(tmp_path):
  """F14: a save every ten steps; at most 8 MB for each 1,000 steps after the first 1,000."""
  (tmp_path / "tmp").mkdir()
  steps, every = 5000, 1000
  given = {"model": "tiny", "task": "copy", "steps": steps, "workdir": tmp_path / "run"}
  given |= {"prompts_per_step": 2, "responses_per_prompt": 2, "microbatch_prompts": 2}
  given |= {"max_new_tokens": 2, "eval.every": 0, "checkpoint.every": 10, "samples_every": 1000}
  command = ["-m", "experiments.grpo", *(f"--{name}={value}" for name, value in given.items())]
  out = tmp_path / "out"
  with open(out, "w") as file:
    process = processes.start(command, stdout=file, TMPDIR=str(tmp_path / "tmp"))
  seen = {}
  record = tmp_path / "run" / "metrics.jsonl"
  while process.poll() is None:
    done = record.read_bytes().count(b"\n") if record.exists() else 0
    if done >= every * (len(seen) + 1) and done < steps:
      seen[done] = held(process.pid)
    time.sleep(0.2)
  assert process.returncode == 0, out.read_text()[-2000:]
  points = list(seen.items())
  print("step: MB, open files, sockets, processes:")
  print({step: (round(mb), *opened, len(own)) for step, (mb, *opened, own) in points})
  (first, before), (last, after) = points[0], points[-1]
  growth = (after[0] - before[0]) * 1000 / (last - first)
  print(f"{growth:.2f} MB for each 1,000 steps")
  assert growth < 8
  # Some are open for a moment, as six sockets are during a save; one that each of the 300 saves had
  # left would be hundreds.
  assert after[1] < before[1] + 10 and after[2] < before[2] + 10
  assert len(after[3]) == len(before[3]) > 0
  assert not [pid for _, (*_, own) in points for pid in own if memory.status_of(pid)]
  assert os.listdir(tmp_path / "tmp") == []
  assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
