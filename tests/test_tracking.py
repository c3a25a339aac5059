"""What trackers are given: the rows of the record, once each, redacted, over resumes too."""

import json
import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from experiments import grpo
from rl_llm.errors import ConfigError
from rl_llm.runs import config as configs
from rl_llm.runs import tracking
from rl_llm.runs.metrics import MetricsWriter, read

SECRET = "hf_abcdefghijklmnopqrstuvwx"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def seen(monkeypatch):
  """What a stand-in for `tensorboard` is called with; a step of its set `fails` raises."""

  class Seen(list):
    fails, opened, closed = frozenset(), [], []

  calls = Seen()
  calls.opened, calls.closed = [], []

  def opener(workdir, config, run):
    calls.opened.append((config, run))

    def log(step, row, lines):
      if step in calls.fails:
        raise OSError("no route to host")
      calls.append((step, row, lines))

    return tracking.Tracker(log, calls.closed.append, "nowhere")

  monkeypatch.setitem(tracking.TRACKERS, "tensorboard", opener)
  monkeypatch.setitem(tracking.TRACKERS, "trackio", opener)
  return calls


def start(workdir, rows, names=("tensorboard",), *, resume=None, say=lambda line: None):
  """A start of a run that writes these steps."""
  (workdir / "config.json").write_text('{"steps": 9}')
  with MetricsWriter(workdir / "metrics.jsonl", resume_step=resume) as writer:
    with tracking.tracking(names, workdir, say=say) as track:
      for step in rows:
        row = {"loss": step / 2, "kl": float("inf"), "failure": SECRET}
        writer.write(step, row)
        track(step, row, [{"prompt": "1+1", "response": SECRET, "split": "eval"}])


def test_a_tracker_gets_what_the_record_gets(tmp_path, seen):
  start(tmp_path, range(3))
  lines = [line | {"step": step} for step, line, _ in seen]
  assert lines == read(tmp_path / "metrics.jsonl")
  assert SECRET not in repr(seen) and seen[0][2][0]["response"] == "[redacted]"
  assert seen.opened[0][0] == {"steps": 9} and seen.closed == [True]


def test_a_resumed_run_is_the_same_one_and_no_step_is_given_twice(tmp_path, seen):
  start(tmp_path, range(5))
  start(tmp_path, range(3, 8), resume=2)  # The checkpoint was of step 3; 4 was on record.
  assert [step for step, _, _ in seen] == list(range(8))
  assert seen.opened[0][1] == seen.opened[1][1]


def test_a_longer_run_follows_the_evaluation_that_ended_the_shorter_one(tmp_path, seen):
  (tmp_path / "config.json").write_text("{}")
  for resume, rows in ((None, [{"loss": 1}, {"eval/greedy_accuracy": 0.5}]), (0, [{"loss": 2}])):
    with MetricsWriter(tmp_path / "metrics.jsonl", resume_step=resume):
      with tracking.tracking(("tensorboard",), tmp_path, say=print) as track:
        for step, row in enumerate(rows, 0 if resume is None else 1):
          track(step, row, ())
  assert [(step, [*row]) for step, row, _ in seen] == [
    (0, ["loss"]),
    (1, ["eval/greedy_accuracy"]),
    (1, ["loss"]),
  ]


def test_a_run_that_begins_anew_is_another_one(tmp_path, seen):
  start(tmp_path, range(2))
  start(tmp_path, range(2))
  assert [step for step, _, _ in seen] == [0, 1, 0, 1]
  assert seen.opened[0][1] != seen.opened[1][1]


def test_a_tracker_that_is_named_later_gets_the_steps_before(tmp_path, seen):
  start(tmp_path, range(3), names=())
  start(tmp_path, range(3, 5), resume=2)
  assert [step for step, _, _ in seen] == list(range(5))


def test_a_tracker_that_fails_is_left_out_and_the_run_trains_on(tmp_path, seen):
  said, seen.fails = [], {2}
  start(tmp_path, range(5), say=said.append)
  assert [step for step, _, _ in seen] == [0, 1]
  assert len(read(tmp_path / "metrics.jsonl")) == 5
  (line,) = [line for line in said if "fail" in line]
  assert line.startswith("tensorboard failed at step 2") and "no route to host" in line
  seen.fails = set()
  start(tmp_path, range(5, 6), resume=4)
  assert [step for step, _, _ in seen] == list(range(6))


def test_one_that_does_not_open_is_one_line(tmp_path, seen, monkeypatch):
  def refuses(workdir, config, run):
    raise RuntimeError("bad\nkey")

  monkeypatch.setitem(tracking.TRACKERS, "trackio", refuses)
  with pytest.raises(ConfigError, match="--track=trackio.*bad.*key; leave it out") as caught:
    start(tmp_path, range(1), names=("tensorboard", "trackio"))
  assert "\n" not in str(caught.value) and seen.closed == [False]


def test_a_missing_package_is_one_line_before_anything_is_loaded(monkeypatch):
  monkeypatch.setitem(tracking.PACKAGES, "wandb", "no_such_package")
  config = grpo.Config(model="tiny", task="copy", track=("wandb",))
  with pytest.raises(ConfigError, match="--track=wandb: .* pip install no_such_package"):
    grpo.check(config)


def test_the_command_installs_what_the_extra_has():
  setup = (ROOT / "setup.py").read_text()
  for name, package in tracking.PACKAGES.items():
    assert f'"{name}": ["{package}>=' in setup


def test_trackers_are_no_part_of_what_a_run_is():
  assert "track" in configs.volatile(grpo.Config())


def test_cells_stay_in_their_table():
  assert tracking._markdown("a|b\nc") == "a\\|b ⏎ c"
  assert tracking._numbers({"a": True, "b": "nan", "c": "text", "d": None, "e": 2}) == {
    "a": 1.0,
    "b": pytest.approx(float("nan"), nan_ok=True),
    "e": 2.0,
  }


# The real packages, each in an environment of its own.

PLANTED = "planted-secret-4711"
READERS = {
  "wandb": """
import json, pathlib, struct, sys
from wandb.proto import wandb_internal_pb2

def records(data):
  # Blocks of 32 KiB, in which a record has a checksum, its length, and 1 or 4 where it ends.
  at, parts = 7, b""
  while at < len(data):
    if 32768 - at % 32768 < 7:
      at += 32768 - at % 32768
      continue
    _, size, kind = struct.unpack_from("<IHB", data, at)
    parts += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):
      yield wandb_internal_pb2.Record.FromString(parts)
      parts = b""

loss, samples, names = [], 0, set()
for path in sorted(pathlib.Path(sys.argv[1], "wandb").glob("offline-run-*/*.wandb")):
  names.add(path.stem)
  for record in records(path.read_bytes()):
    if record.WhichOneof("record_type") == "history":
      items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
      samples += any(key.startswith("samples") for key in items)
      if "loss" in items:
        loss.append((json.loads(items["step"]), json.loads(items["loss"])))
print(json.dumps([loss, samples, len(names)]))
""",
  "trackio": """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("rl_llm")
rows = SQLiteStorage.get_logs("rl_llm", name)
loss = [(row["step"], row["loss"]) for row in rows if "loss" in row]
print(json.dumps([loss, sum("samples" in row for row in rows), 1]))
""",
  "tensorboard": """
import json, pathlib, struct, sys
from tensorboardX.proto import event_pb2
loss, samples = [], 0
for path in sorted(pathlib.Path(sys.argv[1], "tensorboard").glob("events*")):
  data, at = path.read_bytes(), 0
  while at < len(data):
    (size,) = struct.unpack_from("<Q", data, at)
    event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
    at += size + 16
    for value in event.summary.value:
      if value.tag == "loss":
        loss.append((event.step, value.simple_value))
      samples += value.tag.startswith("samples")
print(json.dumps([loss, samples, 1]))
""",
}


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
  """A function that gives an interpreter with a package; all else comes from this one's."""

  def environment(package):
    place = tmp_path_factory.mktemp("env") / package
    venv.create(place, symlinks=True, with_pip=True)
    python = place / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", package]
    said = subprocess.run(pip, capture_output=True, text=True)
    if said.returncode:
      pytest.skip(f"pip cannot get {package}: {said.stderr.strip().splitlines()[-1]}")
    return python

  return environment


@pytest.mark.slow
@pytest.mark.parametrize("name", tracking.TRACKERS)
def test_the_real_package_writes_the_run_to_disk(name, environments, tmp_path):
  python, workdir = environments(tracking.PACKAGES[name]), tmp_path / "run"
  unset = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT", "TRACKIO_SPACE_ID")
  environ = {key: value for key, value in os.environ.items() if key not in unset}
  environ |= {"HOME": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
  environ |= {"PYTHONPATH": str(ROOT), "OTHER_TOKEN": PLANTED}
  given = tmp_path / "given"
  given.mkdir()
  rows = "".join(json.dumps({"prompt": f"{PLANTED} {n}"}) + "\n" for n in range(16))
  (given / "rows.jsonl").write_text(rows)
  (given / "reward.py").write_text(
    "def reward(completions, **columns):\n  return [len(text) % 3 / 2 for text in completions]\n"
  )
  sizes = ("prompts_per_step=8", "microbatch_prompts=8", "max_new_tokens=4", "samples_every=1")
  sizes += ("responses_per_prompt=2", "eval.every=2", "jsonl.held_out_fraction=0.2")
  command = [python, "-m", "experiments.grpo", "--model=tiny", f"--task=jsonl:{given}/rows.jsonl"]
  command += [f"--{size}" for size in (*sizes, f"jsonl.reward_file={given}/reward.py")]
  command += [f"--track={name}", f"--workdir={workdir}"]
  for steps in (2, 4):
    said = subprocess.run(
      [*command, f"--steps={steps}"], env=environ, cwd=tmp_path, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
  found = subprocess.run(
    [python, "-c", READERS[name], str(workdir)], env=environ, capture_output=True, text=True
  )
  assert found.returncode == 0, found.stderr
  loss, samples, runs = json.loads(found.stdout)
  wanted = [(row["step"], row["loss"]) for row in read(workdir / "metrics.jsonl") if "loss" in row]
  assert [step for step, _ in loss] == [step for step, _ in wanted] == [0, 1, 2, 3]
  assert [value for _, value in loss] == pytest.approx([value for _, value in wanted], rel=1e-6)
  assert samples >= 4 and runs == 1
  for path in (
    path for path in tmp_path.rglob("*") if path.is_file() and given not in path.parents
  ):
    assert PLANTED.encode() not in path.read_bytes(), path
