"""A run is the same bit for bit whether its programs are compiled, read from disk, or both."""

import os
import subprocess
import sys

import pytest

from tests.experiments.helpers import equal, outcome

COMMAND = [
  "--model=tiny",
  "--task=copy",
  "--prompts_per_step=4",
  "--responses_per_prompt=4",
  "--microbatch_prompts=4",
  "--eval.problems=2",
  "--eval.samples=1",
  "--eval.every=2",
]


def run(workdir, steps, cache):
  names = ("JAX_COMPILATION_CACHE_DIR",)
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "experiments.grpo",
      *COMMAND,
      f"--workdir={workdir}",
      f"--steps={steps}",
      f"--compile_cache={cache}",
    ],
    env={name: value for name, value in os.environ.items() if name not in names},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def compiled(directory):
  return {p.name for p in directory.rglob("jit_*")}


@pytest.mark.slow
def test_cold_warm_and_off_are_one_run(tmp_path):
  run(tmp_path / "off", 3, "none")
  run(tmp_path / "kept", 2, tmp_path / "cache")
  cold = compiled(tmp_path / "cache")
  assert cold
  run(tmp_path / "kept", 3, tmp_path / "cache")
  assert any(name.startswith("jit_update") for name in cold)
  new = compiled(tmp_path / "cache") - cold
  assert not any(name.startswith(("jit_update", "jit_generate")) for name in new)
  off, kept = outcome(tmp_path / "off"), outcome(tmp_path / "kept")
  assert equal(kept.params, off.params)
  # The shorter run's last evaluation, after step 1, is one that the longer one does not make.
  assert [row["loss"] for row in kept.metrics if "loss" in row] == [
    row["loss"] for row in off.metrics if "loss" in row
  ]
