"""Training on spikes and on groups that teach nothing, and what a step costs."""

from __future__ import annotations

import time

import jax
import numpy as np
import pytest

from experiments import grpo
from rl_llm.rewards import RewardPool
from rl_llm.tasks import load_task
from rl_llm.training.loop import NO_SPREAD
from tests.experiments import helpers
from tests.experiments.conftest import files, small  # noqa: F401  fixtures
from tests.rewards.test_pool import _descendants, processor_seconds

pytestmark = pytest.mark.slow


def test_a_spike_is_skipped_and_the_run_recovers(tmp_path, small, files, monkeypatch):  # noqa: F811
  """F17: in a whole run, which is stopped after the spike and resumes with the same limit."""
  original = grpo.group_advantages
  spike, calls = 6, iter(range(1000))

  def group_advantages(*args):
    return original(*args) * (1e6 if next(calls) == spike else 1.0)

  changes = {"optimizer.spike_window": 4, "optimizer.spike_sigma": 8.0, "checkpoint.every": 4}
  given = helpers.settings(files, **changes)
  with monkeypatch.context() as patch:
    patch.setattr(grpo, "group_advantages", group_advantages)
    found = helpers.run(grpo, tmp_path / "run", given | {"steps": 12})
    calls = iter(range(1000))
    helpers.run(grpo, tmp_path / "cut", given | {"steps": 8})
    cut = helpers.run(grpo, tmp_path / "cut", given | {"steps": 12})
  skipped = [row["spike_skipped"] for row in found.metrics[:12]]
  assert skipped == [float(step == spike) for step in range(12)]
  assert [row["updates_skipped"] for row in found.metrics[:12]] == [0] * 12
  assert found.metrics[spike]["grad_norm"] > 1e4 * max(
    row["grad_norm"] for row in found.metrics[:12] if row["step"] != spike
  )
  assert cut.metrics[8:] == found.metrics[8:] and helpers.equal(cut.state, found.state)


REWARDS = """
def alike(prompts, completions, **columns):
  return [0.5] * len(completions)

def none(prompts, completions, **columns):
  return [None] * len(completions)

def one(prompts, completions, **columns):
  # A single response of each group has a reward.
  return [1.0] + [None] * (len(completions) - 1)
"""
KINDS = {
  "all rewards equal": ("alike", {}),
  "groups of one": ("one", {}),
  "no row is trained on": ("none", {}),
  "empty responses": ("alike", {"sampling.temperature": 1e-3}),
  "all cut off": ("alike", {"sampling.min_new_tokens": 8, "weighting.truncated": "zero"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_groups_teach_nothing_and_are_said_once(
  tmp_path,
  small,  # noqa: F811
  files,  # noqa: F811
  monkeypatch,
  capfd,
  kind,
):
  """F18: no NaN, no weight moves, frac_zero_std is 1 where there is a group; it is said once."""
  function, changes = KINDS[kind]
  (tmp_path / "reward.py").write_text(REWARDS)
  changes = {"jsonl.reward_file": str(tmp_path / "reward.py"), "steps": 3} | changes
  if kind == "empty responses":
    # Whatever token comes first is an end.
    monkeypatch.setattr(helpers.Chatty, "eos_ids", tuple(range(helpers.Chatty.vocab_size)))
  given = helpers.settings(files, **{"jsonl.reward_function": function}, **changes)
  found = helpers.run(grpo, tmp_path / "run", given)
  rows = [row for row in found.samples if row["split"] == "train"]
  assert len(rows) == 3 * 16 and all(row["advantage"] == 0 for row in rows)
  if kind == "empty responses":
    assert all(row["length"] == 1 for row in rows)
  if kind == "all cut off":
    assert all(row["stop_reason"] == "length" for row in rows)
  graded = function != "none"
  for row in found.metrics[:3]:
    assert row["frac_zero_std"] == (1 if graded else None)
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    assert row["updates_skipped"] == 0
  first = helpers.run(grpo, tmp_path / "first", given | {"steps": 1, "checkpoint.every": 1})
  assert helpers.equal(first.params, found.params), "three steps moved what one did: nothing"
  out = capfd.readouterr().out
  said = out[: out.index("steps in ")].replace("\n", " ")
  assert said.count("a step taught nothing") == int(graded), NO_SPREAD


def test_own_graders_are_fast(record_property):
  """F26: in processor time, the worker's and the trainer's together, for which a busy machine takes
  no longer: below 5 ms an answer, and two cores then grade over 200 a second."""
  count = 512
  task = load_task("arithmetic", held_out=10)
  problems = task.sample(0, 0, count // 8)
  prompts = [problem.prompt for problem in problems for _ in range(8)]
  columns = [problem.columns for problem in problems for _ in range(8)]
  texts = [f"It is {n}." for n in range(count)]
  with RewardPool(task.reward) as pool:
    pool.score(prompts[:8], texts[:8], columns[:8], group_size=8)
    pids = {pool._server.pid, *_descendants(pool._server.pid)}
    before, own, begun = processor_seconds(pids), time.process_time(), time.monotonic()
    found = pool.score(prompts, texts, columns, group_size=8)
    seconds = time.monotonic() - begun
    used = processor_seconds(pids) - before + time.process_time() - own
  assert [result.status for result in found] == ["ok"] * count
  print(
    f"{count / seconds:.0f} answers a second, {1000 * used / count:.2f} ms of processor time each"
  )
  assert used < 0.005 * count
  record_property("F26", count)


def test_an_update_transfers_nothing_unasked(tmp_path, small, files, monkeypatch):  # noqa: F811
  """F40: of a step, only what is put on the devices, or fetched, by name goes there or back."""

  def wrap(seam):
    def guarded(*args):
      with jax.transfer_guard("disallow"):
        return seam(*args)

    return guarded

  helpers.wrap_seams(monkeypatch, learn=wrap)
  changes = {"steps": 3, "kl.coef": 0.1, "epochs": 2, "minibatches": 2, "microbatch_prompts": 2}
  found = helpers.run(grpo, tmp_path, helpers.settings(files, **changes))
  assert len(found.metrics) == 4
