"""The page of all benchmarks: what is kept, what is run again, what says that it is missing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import performance
from rl_llm.errors import ConfigError

RESULTS = pathlib.Path(__file__).parent.parent / "docs" / "results"
FIRST, *REST = performance.BENCHMARKS


def stand_in(monkeypatch, *, fails=()):
  """Each benchmark prints its words instead of running."""
  called = []

  def run(words, **keywords):
    called.append(words[2])
    code = f"print('of', {words[2:]!r}); raise SystemExit({int(words[2] in fails)})"
    return subprocess.CompletedProcess(
      words, *_outcome(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
    )

  monkeypatch.setattr(performance.subprocess, "run", run)
  return called


def _outcome(process):
  printed = process.communicate()[0].decode()
  return process.returncode, printed


def test_what_has_ended_is_kept_and_only_the_rest_is_run_again(tmp_path, monkeypatch):
  failing = "benchmarks.packing"
  called = stand_in(monkeypatch, fails=[failing])
  config = performance.Config(out=str(tmp_path))
  performance.main(config)
  assert len(called) == len(performance.BENCHMARKS)
  page = (tmp_path / "performance.md").read_text()
  assert page.count("not measured here") == 1 and f"$ {performance.command(FIRST)}" in page
  command = performance.command(next(b for b in performance.BENCHMARKS if b.name == "update"))
  assert f"```console\n$ {command}\nof ['benchmarks.update']\n```\n" in page
  kept = json.loads((tmp_path / "performance.json").read_text())
  assert len(kept) == len(performance.BENCHMARKS) - 1
  called.clear()
  performance.main(config)
  assert called == [failing]
  called.clear()
  performance.main(performance.Config(out=str(tmp_path), only="update,logprobs"))
  assert called == ["benchmarks.update", "benchmarks.logprobs"]


def test_the_committed_page_is_what_the_program_writes():
  found = json.loads((RESULTS / "performance.json").read_text())
  assert (RESULTS / "performance.md").read_text() == performance.page(found)


def test_a_benchmark_that_is_not_there_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="only.*grpo_step"):
    performance.main(performance.Config(out=str(tmp_path), only="updates"))


def test_every_benchmark_of_the_page_exists_and_takes_its_flags():
  for benchmark in performance.BENCHMARKS:
    module = importlib.import_module(f"benchmarks.{benchmark.name}")
    flags = {flag.removeprefix("--").split("=")[0] for flag in benchmark.flags.split()}
    assert flags <= {field.name for field in dataclasses.fields(module.Config)}
