"""A run that an earlier version began resumes with this one, and ends as it would have ended there.

goldens/NAME.tar.gz holds what commit 10a5d9f left of a run of four steps: `stopped`, the directory
as a kill after its second step leaves it, and `straight`, the record and the state of the run that
went on to its end. Both are of a model that a command line makes (--model=tiny --lora.rank=1), so a
state is adapters and moments alone. Written by

  python -m tests.experiments.test_old_runs
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from experiments import grpo, ppo
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read
from rl_llm.runs.report import write_report
from tests.experiments.helpers import outcome
from tests.representatives import mostly_slow

RUNS = Path(__file__).parent / "goldens"
STOPPED = 2

COMMON = {
  "model": "tiny",
  "task": "copy",
  "copy.min_length": 2,
  "copy.max_length": 6,
  "steps": 4,
  "prompts_per_step": 8,
  "responses_per_prompt": 4,
  "max_new_tokens": 6,
  "microbatch_prompts": 8,
  "loss.entropy_coef": 0.1,
  "kl.coef": 0.1,
  "lora.rank": 1,
  "optimizer.learning_rate": 0.01,
  "optimizer.eps": 1e-2,  # Adam else turns rounding of a gradient near 0 into a whole step.
  "eval.every": 2,
  "eval.problems": 2,
  "eval.samples": 3,
  "checkpoint.every": 2,
  "checkpoint.keep": 2,
}
CASES = {
  "grpo": (grpo, COMMON | {"epochs": 2, "weighting.name": "sequence_mean"}),
  "ppo": (
    ppo,
    COMMON
    | {
      "kl.controller": "adaptive",
      "advantage.whiten": False,
      "optimizer.learning_rate": 0.02,
      "value.learning_rate": 0.02,
    },
  ),
}


@pytest.mark.parametrize("name", mostly_slow(CASES, quick=[list(CASES).index("grpo")]))
def test_an_old_run_resumes(name, tmp_path):
  experiment, settings = CASES[name]
  with tarfile.open(RUNS / f"{name}.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  stopped, straight = tmp_path / "stopped", tmp_path / "straight"
  before = read(stopped / "metrics.jsonl")
  result = experiment.train(replace(experiment.Config(), settings), str(stopped))
  assert result["steps"] == settings["steps"]
  assert read(stopped / "metrics.jsonl")[:STOPPED] == before
  found = outcome(stopped)
  wanted = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
  texts = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
  with np.load(straight / "state.npz") as stored:
    state = dict(stored)
  assert [row["step"] for row in found.metrics] == [row["step"] for row in wanted]
  for ours, theirs in zip(found.metrics, wanted, strict=True):
    for gone in ("update_skipped", "value_update_skipped"):  # What updates_skipped says as well.
      theirs.pop(gone, None)
    assert theirs.keys() <= ours.keys(), ours["step"]
  shapes = [{path: (x.shape, x.dtype) for path, x in of.items()} for of in (found.state, state)]
  assert shapes[0] == shapes[1]
  said = [{key: row[key] for key in ("step", "problem", "response")} for row in found.samples]
  if said != texts:
    pytest.skip("it resumes; the values are not compared: another token was drawn on this machine")
  for ours, theirs in zip(found.metrics, wanted, strict=True):
    for key, value in theirs.items():
      # Of responses that are not on record an evaluation says how many were right, and no more.
      if not key.startswith("eval/sampled"):
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, ours["step"])
  scales = {}  # The largest number of all layers: a gradient is rounded where it is largest.
  for path, leaf in state.items():
    scales[kind(path)] = max(scales.get(kind(path), 0), np.max(np.abs(leaf), initial=0))
  for path, leaf in state.items():
    atol = 1e-5 * scales[kind(path)]
    np.testing.assert_allclose(found.state[path], leaf, rtol=0, atol=atol, err_msg=path)


def test_a_report_reads_an_old_record_of_skipped_updates(tmp_path):
  """Rows of commit 10a5d9f say it twice: a share of the step, `update_skipped`, and a count."""
  with tarfile.open(RUNS / "grpo.tar.gz") as archive:
    archive.extractall(tmp_path, filter="data")
  record = tmp_path / "stopped" / "metrics.jsonl"
  rows = [json.loads(line) for line in record.read_text().splitlines()]
  assert {"update_skipped", "updates_skipped"} <= rows[-1].keys()
  assert "were skipped" not in write_report(record.parent).read_text()
  rows[-1] |= {"update_skipped": 1.0, "updates_skipped": 2}
  record.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert "2 updates were skipped" in write_report(record.parent).read_text()


def kind(path):
  """What is the same of all layers: where a leaf is in the state, and its name."""
  where, _, name = path.partition("/layers_")
  return where, name.rpartition("/")[2]


def write_run(name, workdir):
  """Runs it to its end, and packs what a kill after step 2 had left next to what came of it."""
  experiment, settings = CASES[name]
  straight, stopped, kept = workdir / "run", workdir / "stopped", workdir / "straight"
  experiment.train(replace(experiment.Config(), settings), str(straight))
  found = outcome(straight)
  kept.mkdir()
  np.savez(kept / "state.npz", **found.state)
  (kept / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found.metrics))
  texts = [{key: row[key] for key in ("step", "problem", "response")} for row in found.samples]
  (kept / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
  shutil.copytree(straight, stopped)
  shutil.rmtree(stopped / "checkpoints" / str(settings["steps"]))
  for path in ("result.json", "report.html", ".lock"):
    (stopped / path).unlink(missing_ok=True)
  for path in (stopped / "metrics.jsonl", stopped / "samples.jsonl"):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(row) + "\n" for row in rows if row["step"] < STOPPED]
    path.write_text("".join(lines))
  pack(RUNS / f"{name}.tar.gz", stopped, kept)


def pack(archive, *directories):
  """A tar of the directories without times and owners: equal files make an equal archive."""
  raw = io.BytesIO()
  with tarfile.open(fileobj=raw, mode="w") as tar:
    for directory in directories:
      for path in sorted(directory.rglob("*")):
        if path.is_file():
          info = tarfile.TarInfo(str(path.relative_to(directory.parent)))
          info.size, info.mode = path.stat().st_size, 0o644
          tar.addfile(info, io.BytesIO(path.read_bytes()))
  archive.write_bytes(gzip.compress(raw.getvalue(), 9, mtime=0))


def write_runs():
  RUNS.mkdir(exist_ok=True)
  for name in CASES:
    with tempfile.TemporaryDirectory() as workdir:
      write_run(name, Path(workdir))


if __name__ == "__main__":
  write_runs()
