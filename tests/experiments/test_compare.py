"""The figures of the comparison: each against a hand calculation, the gradients against a run's."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import compare, grpo
from rl_llm.evaluation import curves
from rl_llm.runs.checkpoint import Checkpointer, first_moments
from rl_llm.runs.config import flatten, replace
from rl_llm.runs.signals import Interrupted, StopSignals
from tests.experiments.helpers import outcome, settings

TOY = compare.Config(steps=4, variance_batches=3, variance_warmup=2)


def test_examples():
  assert doctest.testmod(compare).failed == 0


@pytest.mark.parametrize("method", compare.METHODS)
def test_every_method_has_the_flags_it_is_given(method):
  config = importlib.import_module(f"experiments.{method}").Config()
  for given in (compare.settings(TOY, method, 1), compare.variance_settings(TOY, method)):
    found = flatten(replace(config, given))
    assert {name: found[name] for name in given} == given


def test_the_variance_is_that_of_whole_batches():
  """One update a step, of which the policy's gradient is kept, also for PPO, which warms up."""
  for method, steps in (("grpo", 3), ("ppo", 5)):
    config = importlib.import_module(f"experiments.{method}").Config()
    given = replace(config, compare.variance_settings(TOY, method))
    assert given.updates.count == 1 and given.run.steps == steps
    assert (given.run.checkpoint.every, given.run.checkpoint.keep) == (1, 3)


@pytest.mark.slow
def test_gradients_are_those_of_independent_batches_at_unmoved_parameters(tmp_path, small, files):
  kept = ("optimizer.", "checkpoint.", "steps", "eval.")
  given = compare.variance_settings(TOY, "grpo")
  changes = {name: value for name, value in given.items() if name.startswith(kept)}
  grpo.train(replace(grpo.Config(), settings(files) | changes), str(tmp_path))
  found = first_moments(tmp_path / "checkpoints", 3)
  rows = outcome(tmp_path).metrics
  np.testing.assert_allclose(
    [np.linalg.norm(g) for g in found], [row["grad_norm"] for row in rows[:3]], rtol=1e-5
  )
  assert len({g.tobytes() for g in found}) == 3
  first, last = (saved(tmp_path / "checkpoints", step) for step in (1, 3))
  weights = [name for name in first if name.startswith("params/")]
  # By 1e-30 at most, which only a weight of 0 shows.
  assert weights and max(np.abs(last[name] - first[name]).max() for name in weights) < 1e-25


def saved(directory, step):
  manifest = json.loads((directory / str(step) / "manifest.json").read_text())
  wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype, shape in manifest["leaves"]}
  _, state, _ = Checkpointer(directory, keep=3).restore(wanted, step)
  return {name: np.asarray(leaf) for name, leaf in state.items()}


ROWS = [
  {
    "step": 0,
    "eval/sampled_accuracy": 0.2,
    "eval/sampled_low": 0.1,
    "eval/sampled_high": 0.3,
    "response_length_mean": 5.0,
    "time/rollout": 2.0,
    "time/update": 4.0,
    "time/eval": 50.0,
    "time/step": 56.0,
  },
  {
    "step": 1,
    "response_length_mean": 7.0,
    "time/rollout": 1.0,
    "time/update": 3.0,
    "time/checkpoint": 9.0,
    "time/step": 13.0,
  },
  {
    "step": 2,
    "eval/sampled_accuracy": 0.9,
    "eval/sampled_low": 0.8,
    "eval/sampled_high": 1.0,
    "time/eval": 50.0,
    "time/step": 50.0,
  },
]


def test_the_curve_counts_what_was_sampled_and_what_trained():
  points = curves.curve(ROWS, responses=10)
  assert [(p["tokens"], p["seconds"], p["accuracy"]) for p in points] == [
    (0, 0, 0.2),
    (10 * (5 + 7), 2 + 4 + 1 + 3, 0.9),
  ]
  # 0.8 lies 6/7 of the way from 0.2 to 0.9.
  assert curves.tokens_to(points, 0.8) == pytest.approx(120 * 6 / 7)
  assert curves.tokens_to(points, 0.95) is None and curves.tokens_to(points, 0.1) == 0


def test_the_curve_counts_every_round_of_a_step_that_refilled():
  first, last = ROWS[0] | {"refill/rounds": 3}, ROWS[-1]
  points = curves.curve([first, last], responses=10)
  assert [(p["samples"], p["tokens"]) for p in points] == [(0, 0), (3 * 10, 3 * 10 * 5)]


def test_the_table_has_a_column_a_method_and_a_row_a_seed(tmp_path):
  config = dataclasses.replace(
    TOY, methods=("dpo", "grpo"), seeds=(3,), variance_batches=0, workdir=str(tmp_path)
  )
  for method in config.methods:
    directory = tmp_path / f"{method}-seed3"
    directory.mkdir()
    (directory / "peak_memory.txt").write_text("1048576\n2097152\n")
    lines = [str(row).replace("'", '"') for row in ROWS]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  found = [compare.measure(config, method) for method in config.methods]
  assert found[0]["runs"][0]["peak_gib"] == 2.0
  text = compare.table(config, found).splitlines()
  assert text[0] == "| | DPO | GRPO |" and {line.count("|") for line in text} == {4}
  assert "| seconds a step, in all | 4.0 | 4.0 |" in text
  assert "| accuracy after, seed 3 | 0.90 (0.80 to 1.00) | 0.90 (0.80 to 1.00) |" in text
  page = compare.page(config, "\n".join(text))
  assert "--methods=dpo,grpo --seeds=3 " in page and "--workdir" not in page
  assert "# DPO, GRPO side by side" in page and "\n".join(text) in page


def test_a_signal_reaches_the_run_once_and_is_passed_on(tmp_path, monkeypatch):
  """The run is a script that takes a while to stop, in the place of Python."""
  script, python = tmp_path / "run.sh", sys.executable
  script.write_text(
    '#!/bin/sh\ntrap "echo stopped >> $0.log; exit 143" TERM\ntouch $0.ready\n'
    "while :; do sleep 0.1; done\n"
  )
  script.chmod(0o755)
  monkeypatch.setattr(sys, "executable", str(script))
  with StopSignals() as stop:
    interrupter = subprocess.Popen(
      [
        python,
        "-c",
        "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
        f"os.kill({os.getpid()}, {int(signal.SIGINT)})",
        f"{script}.ready",
      ]
    )
    with pytest.raises(Interrupted):
      compare.do("grpo", {}, tmp_path, stop)
    interrupter.wait()
  assert Path(f"{script}.log").read_text() == "stopped\n"
  assert len((tmp_path / "peak_memory.txt").read_text().split()) == 1


def test_what_is_done_is_not_done_again(tmp_path):
  (tmp_path / "result.json").write_text("{}")
  with StopSignals() as stop:
    compare.do("no_such_method", {}, tmp_path, stop)
