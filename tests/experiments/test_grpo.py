"""GRPO end to end on a small model: what a run records, survives, refuses and obeys."""

from __future__ import annotations

import collections
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo, ppo, setup
from rl_llm.data.prompts import bucket
from rl_llm.errors import ConfigError
from rl_llm.files import locked
from rl_llm.rewards import RewardError
from rl_llm.rollout import generate
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import flatten, replace
from rl_llm.runs.metrics import read, without_timings
from rl_llm.training.loop import Diverged
from rl_llm.training.minibatches import problem_order
from tests.experiments import helpers
from tests.experiments.helpers import FULL, equal, outcome, settings
from tests.processes import PATIENCE
from tests.representatives import mostly_slow

ROOT = Path(__file__).parents[2]


# Two updates a step, and so large that ratios leave their clip range.
BUSY = {"epochs": 2, "kl.coef": 0.1, "loss.entropy_coef": 0.01, "optimizer.learning_rate": 0.03}


run = functools.partial(helpers.run, grpo)


# The first update.


def test_first_update_is_on_policy_and_fractional_rewards_survive_end_to_end(
  tmp_path, small, files
):
  """One update at temperature 0.7 with a KL term, from the weights that the reference has."""
  changes = {"steps": 1, "sampling.temperature": 0.7, "kl.coef": 0.1}
  first_step = run(tmp_path, settings(files, **changes))
  row = first_step.metrics[0]
  assert row["response_length_mean"] < 7  # ragged
  # Sampler and trainer agree, so the ratio is 1 to within the requirement's 1e-4 ...
  assert 0 < row["logprob_gap_mean"] < 1e-4
  # ... and k3 = exp(d) - 1 - d < d^2 of d < 1e-4. (The reference is scored by another program.)
  assert 0 <= row["kl_ref"] < 1e-8
  assert row["clip_low_fraction"] == row["clip_high_fraction"] == 0

  rows = [row for row in first_step.samples if row["split"] == "train"]
  rewards = np.array([row["reward"] for row in rows])
  assert rewards.tolist() == [sum(map(ord, row["response"])) % 8 / 8 for row in rows]
  assert len(set(rewards.tolist()) - {0.0, 1.0}) > 2
  assert first_step.metrics[0]["reward_mean"] == pytest.approx(rewards.mean(), abs=1e-6)
  groups = rewards.reshape(4, 4)
  spread = groups.std(axis=1, ddof=1, keepdims=True) + 1e-6
  wanted = (groups - groups.mean(axis=1, keepdims=True)) / spread
  found = np.array([row["advantage"] for row in rows]).reshape(4, 4)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


# Every flag does something.

# Quick tests of the flags of an update: test_flag_effects.py.
FLAGS = [
  {"epochs": 3},
  {"minibatches": 2},
  {"advantage.scale": "none"},
  {"weighting.name": "constant_length"},
  {"loss.name": "cispo_loss"},
  {"loss.entropy_coef": 0.5},
  {"kl.coef": 1.0},
  {"kl.weighting": "sequence_mean"},
  {"optimizer.mu_dtype": "bfloat16"},
  {"sampling.temperature": 0.7},
  {"loss.clip_high": 0.01},
  {"optimizer.learning_rate": 1e-3},
  {"dtype": "bfloat16"},
  {"optimizer.schedule": "linear"},
  {"prompt_format": "chat", "system_prompt": "Be brief."},
  {"seed": 1},
]
if FULL:  # Further values of the same flags, and arguments that tests of the library vary.
  FLAGS += [
    {"sampling.top_k": 20, "sampling.allow_truncated": True},
    {"sampling.min_new_tokens": 4},
    {"advantage.eps": 0.5},
    {"advantage.eps_rule": "max", "advantage.eps": 0.5},
    {"advantage.baseline": "leave_one_out"},
    {"advantage.name": "leave_one_out"},
    {"advantage.name": "maxrl"},
    {"advantage.name": "maxrl", "advantage.eps": 0.5},
    {"weighting.truncated": "zero"},
    {"weighting.truncated": "drop"},
    {"loss.clip_low": 0.01},
    {"loss.delta": 1.01},
    {"kl.gradient": "k3"},
    {"optimizer.max_grad_norm": 0.01},
    {"overlong_prompt": "truncate_left", "max_prompt_tokens": 12},
    {"sampling.top_p": 0.5, "sampling.allow_truncated": True},
    {"advantage.ddof": 0},
    {"weighting.name": "sequence_mean"},
    {"weighting.name": "constant_length", "weighting.length": 3},
    {"loss.name": "dro_loss"},
    {"loss.name": "reinforce_loss"},
    {"loss.dual_clip": 1.01},
    {"optimizer.warmup_steps": 3},
    {"optimizer.b1": 0.5},
    {"optimizer.b2": 0.5},
    {"optimizer.eps": 1e-2},
    {"optimizer.weight_decay": 0.1},
    {"prompt_format": "chat"},
    {"advantage.scale": "batch"},
    {"advantage.scale": "leave_one_out"},
    {"weighting.name": "sequence_sum"},
    {"weighting.name": "prompt_mean"},
    {"kl.gradient": "k1"},
    {"optimizer.schedule": "cosine"},
    {"epochs": 1},
    {"overlong_prompt": "drop", "max_prompt_tokens": 12},
    {"max_new_tokens": 6},
  ]


@pytest.mark.slow
def test_every_flag_changes_the_weights_that_come_out(tmp_path, small, files):
  """Each against the base run, and against each other: no two of these mean the same."""
  base = settings(files, steps=3, **BUSY)  # Two steps do not tell a line from a cosine.
  weights = [run(tmp_path / "base", base).params]
  for number, changes in enumerate(FLAGS):
    weights.append(run(tmp_path / str(number), base | changes).params)
    same = [i for i, earlier in enumerate(weights[:-1]) if equal(earlier, weights[-1])]
    assert not same, (changes, ["base", *FLAGS][same[0]])


@pytest.mark.slow
def test_a_response_alone_in_its_group_counts_only_where_asked(tmp_path, small, files):
  base = settings(files, steps=1, **{"eval.every": 0})
  base |= {"jsonl.reward_function": "lonely", "responses_per_prompt": 2}
  runs = {
    kind: run(tmp_path / kind, base | {"advantage.singleton": kind}) for kind in ("zero", "raw")
  }
  advantages = {
    kind: {row["advantage"] for row in found.samples if row["split"] == "train"}
    for kind, found in runs.items()
  }
  assert advantages == {"zero": {0.0}, "raw": {0.0, 1.0}}
  assert not equal(runs["zero"].params, runs["raw"].params)


@pytest.mark.parametrize(
  "name, formula",
  mostly_slow(
    [
      ("leave_one_out", lambda reward, mean: (reward - mean) * 4 / 3),
      ("maxrl", lambda reward, mean: (reward - mean) / (mean + 1e-6)),
    ],
    quick=[1],
  ),
)
def test_advantages_chosen_by_name_are_those_of_their_formula(
  tmp_path, small, files, name, formula
):
  found = run(tmp_path, settings(files, steps=1) | {"advantage.name": name})
  rows = [row for row in found.samples if row["split"] == "train"]
  rewards, advantages = (
    np.array([row[key] for row in rows]).reshape(4, 4) for key in ("reward", "advantage")
  )
  assert np.all(np.ptp(rewards, axis=1) > 0)
  wanted = formula(rewards, rewards.mean(axis=1, keepdims=True))
  np.testing.assert_allclose(advantages, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"loss.name": "reinforce_loss", "epochs": 2}, "--loss.name=reinforce_loss.*--loss=ppo_loss"),
    (
      {"advantage.name": "maxrl", "advantage.scale": "none"},
      "--advantage.scale=none: must be left out with --advantage=maxrl; which has eps$",
    ),
    (
      {"advantage.name": "leave_one_out", "advantage.eps": 1e-4},
      "--advantage.eps=0.0001: must be left out with --advantage=leave_one_out; .*no keywords",
    ),
  ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    grpo.check(replace(grpo.Config(), changes))


def test_an_advantage_that_divides_by_the_mean_refuses_rewards_below_zero(tmp_path, small, files):
  changes = {"advantage.name": "maxrl", "jsonl.reward_function": "signed"}
  message = "--advantage=maxrl: must be another, for a reward of -0.5; try"
  with pytest.raises(ConfigError, match=message):
    run(tmp_path, settings(files, steps=1) | changes)


def test_groups_without_spread_are_left_out_and_change_nothing(tmp_path, small, files):
  """A term that every token feels, too small to matter, has all of them computed."""
  base = settings(files) | {
    "jsonl.reward_function": "spread_for_some",
    "microbatch_prompts": 1,
    "optimizer.eps": 1e-2,
    "sampling.temperature": 0.9,
  }
  left_out = run(tmp_path / "left_out", base)
  computed = run(tmp_path / "computed", base | {"loss.entropy_coef": 1e-20})
  assert all(0 < row["frac_zero_std"] < 1 for row in left_out.metrics[:2])
  for a, b in zip(*map(jax.tree.leaves, (left_out.params, computed.params)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
  # The entropy is the sampler's, of all responses; the update reads only what it computes.
  assert left_out.metrics[0]["entropy"] == computed.metrics[0]["entropy"]
  assert left_out.metrics[0]["logprob_gap_mean"] != computed.metrics[0]["logprob_gap_mean"]


def test_two_processes_do_not_share_a_directory(tmp_path, small, files):
  config = replace(grpo.Config(), settings(files))
  with locked(tmp_path / ".lock"), pytest.raises(ConfigError, match="no other process trains in"):
    grpo.train(config, str(tmp_path))


@pytest.mark.parametrize("overlong", mostly_slow(["drop", "truncate_left"], quick=[0]))
def test_overlong_prompts_are_dropped_or_cut_and_counted(tmp_path, small, files, overlong):
  changes = {"overlong_prompt": overlong, "max_prompt_tokens": 12}
  found = run(tmp_path, settings(files, **changes))
  for row in found.metrics[:2]:
    at = [sample for sample in found.samples if sample["step"] == row["step"]]
    lengths = [len(sample["prompt"]) for sample in at if sample["split"] == "train"]
    if overlong == "drop":
      assert max(lengths) <= 12 and row["overlong_prompts"] > 0
    else:
      assert row["overlong_prompts"] == sum(length > 12 for length in lengths) / 4 > 0


@pytest.mark.slow
def test_kl_value_is_what_is_reported_and_nothing_else(tmp_path, small, files):
  """But for rounding: they are two programs. Of `eps` see below."""
  base = settings(files, **BUSY) | {"optimizer.eps": 1e-2}
  runs = [run(tmp_path / kind, base | {"kl.value": kind}) for kind in ("k1", "k3")]
  assert runs[0].metrics[0]["kl_ref"] != runs[1].metrics[0]["kl_ref"]
  for a, b in zip(*(jax.tree.leaves(run.params) for run in runs), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_microbatches_change_nothing(tmp_path, small, files):
  # An eps that is not tiny: Adam else turns rounding of a gradient near 0 into a whole step.
  base = settings(files, **BUSY) | {"optimizer.eps": 1e-2, "weighting.name": "sequence_mean"}
  whole = run(tmp_path / "whole", base).params
  parts = run(tmp_path / "parts", base | {"microbatch_prompts": 1}).params
  for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# Presets.


PARTS = "advantage.", "weighting.", "loss.", "kl."


PRESETS = {
  "grpo": {"weighting.name": "sequence_mean", "kl.coef": 0.04, "advantage.scale": "std"},
  "dr_grpo": {"weighting.name": "constant_length", "advantage.scale": "none", "kl.coef": 0},
  "dapo": {"weighting.name": "token_mean", "loss.clip_low": 0.2, "loss.clip_high": 0.28},
  "trl": {"weighting.name": "token_mean", "advantage.eps": 1e-4},
  "verl": {"advantage.singleton": "raw", "loss.dual_clip": 3.0, "loss.entropy_coef": 0},
  "nexrl": {"advantage.singleton": "raw", "loss.clip_high": 0.2, "loss.entropy_coef": 1e-4},
  "nemo": {"advantage.scale": "leave_one_out", "kl.coef": 0.01, "kl.gradient": "k2"},
  "tunix": {"weighting.name": "sequence_mean", "kl.value": "k1", "kl.gradient": "k1"},
  "simply": {"advantage.eps_rule": "max", "advantage.ddof": 0, "loss.delta": None},
  "skyrl": {"advantage.singleton": "raw", "kl.coef": 0.001, "kl.weighting": "sequence_mean"},
}


def preset_config(files, preset):
  """A step of the preset's own advantage, weighting, loss and KL."""
  typed = replace(grpo.Config(), {"model": "tiny", "preset": preset})
  changes = {k: v for k, v in grpo.overrides(typed).items() if k.startswith(PARTS)}
  return replace(grpo.Config(), settings(files, steps=1) | {"preset": preset} | changes)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_their_fields(files, preset):
  config = preset_config(files, preset)
  assert {path: flatten(config)[path] for path in PRESETS[preset]} == PRESETS[preset]
  grpo.check(config)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_run(tmp_path, small, files, preset):
  assert grpo.train(preset_config(files, preset), str(tmp_path))["steps"] == 1


# Graders that fail.


def test_failed_grades_are_masked_out_and_counted(tmp_path, small, files, monkeypatch):
  batches = []

  def wrap(update):
    def update_and_look(state, batch, *further):
      batches.append(batch)
      return update(state, batch, *further)

    return update_and_look

  helpers.wrap_updates(monkeypatch, grpo, wrap)
  changes = {"jsonl.reward_function": "failing", "reward_deadline": 2.0, "steps": 1}
  changes["reward_isolation"] = "sample"
  found = run(tmp_path, settings(files, **changes))
  rows = [row for row in found.samples if row["split"] == "train"]
  statuses = {1: "raised", 2: "timed_out", 3: "not_applicable"}
  kinds = [sum(map(ord, row["response"])) % 8 for row in rows]
  assert {1, 2, 3} < set(kinds)
  assert [row["status"] for row in rows] == [statuses.get(kind, "ok") for kind in kinds]
  trained = [row["length"] if row["status"] == "ok" else 0 for row in rows]
  matters = np.any(np.array([row["advantage"] for row in rows]).reshape(4, 4) != 0, axis=1)
  order, _ = next(problem_order(0, 0, prompts=4, epochs=1, count=1, matters=matters))
  wanted = np.array(trained).reshape(4, 4)[order].reshape(-1)
  (batch,) = batches
  np.testing.assert_array_equal(batch.mask.sum(axis=1), wanted)
  np.testing.assert_array_equal(batch.weights != 0, batch.mask)
  counts = collections.Counter(row["status"] for row in rows)
  for status in ("ok", "raised", "timed_out", "not_applicable", "died", "invalid"):
    assert found.metrics[0][f"rewards_{status}"] == counts[status]
  opinions = 16 - counts["not_applicable"]
  assert found.metrics[0]["timed_out_fraction"] == counts["timed_out"] / opinions > 0
  for start in range(0, 16, 4):
    group = rows[start : start + 4]
    rewards = np.array([row["reward"] for row in group if row["status"] == "ok"])
    for row in group:
      if row["status"] != "ok":
        assert row["reward"] is None and row["advantage"] == 0
        assert row["correct"] is (None if row["status"] == "not_applicable" else False)
      elif len(rewards) > 1:
        wanted = (row["reward"] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        assert row["advantage"] == pytest.approx(wanted, abs=1e-5)


def test_a_grader_that_always_fails_stops_the_run(tmp_path, small, files):
  changes = {"jsonl.reward_function": "hopeless"}
  with pytest.raises(RewardError, match=r"hopeless.* failed on \d+ of \d+ samples.*always"):
    run(tmp_path, settings(files, **changes))


# Gradients that are not finite.


def spoil(monkeypatch, calls):
  """Advantages are NaN in these calls, counted from 0, one a step."""
  original, count = grpo.group_advantages, iter(range(1000))

  def group_advantages(*args):
    found = original(*args)
    return found * np.nan if next(count) in calls else found

  monkeypatch.setattr(grpo, "group_advantages", group_advantages)


def test_an_update_that_is_not_finite_is_skipped_and_counted(
  tmp_path, small, files, monkeypatch, record_property
):
  spoilt = {1, 4, 6, 9, 13} if FULL else {1}
  spoil(monkeypatch, spoilt)
  steps = max(spoilt) + 3
  found = run(tmp_path, settings(files, steps=steps))
  skipped = [int(step in spoilt) for step in range(steps)]
  assert [row["updates_skipped"] for row in found.metrics[:steps]] == np.cumsum(skipped).tolist()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))
  record_property("F15", len(spoilt))


def test_three_in_a_row_stop_the_run_with_a_diagnosis(tmp_path, small, files, monkeypatch, capsys):
  spoil(monkeypatch, {0, 2, 3, 4})
  changes = {"steps": 9, "workdir": str(tmp_path / "run"), "optimizer.max_skipped": 3}
  assert helpers.main(grpo, replace(grpo.Config(), settings(files, **changes))) == 1
  error = capsys.readouterr().err.strip()
  assert error.startswith("error: 3 updates in a row had a gradient that is not finite, first in [")
  assert "--optimizer.learning_rate" in error and "\n" not in error
  # The step that broke is on record too, with what the model wrote in it.
  for name in ("metrics", "samples"):
    rows = read(tmp_path / "run" / f"{name}.jsonl")
    assert sorted({row["step"] for row in rows}) == [0, 1, 2, 3, 4]


def compiled_in(records):
  """The names of the programs that were compiled, as `jax.log_compiles` says them."""
  found = (re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()) for record in records)
  return [match[1] for match in found if match]


@pytest.mark.slow
@pytest.mark.parametrize(
  "experiment, loss",
  [
    (grpo, "make_loss"),
    pytest.param(ppo, "make_loss", marks=pytest.mark.slow),
    pytest.param(ppo, "make_value_loss", marks=pytest.mark.slow),
  ],
)
def test_the_update_itself_says_which_leaf_was_not_finite(
  tmp_path, small, files, monkeypatch, caplog, experiment, loss
):
  """Nothing is compiled in the step that ends the run: nothing is computed again to find it."""
  make_loss, learned = getattr(experiment, loss), []

  def make_broken_loss(*args, **keywords):
    loss_fn = make_loss(*args, **keywords)

    def broken(params, batch, hparams):
      value, found = loss_fn(params, batch, hparams)
      return value + jnp.nan * jnp.sum(params["layers_0"]["mlp"]["up"]["weight"]), found

    return broken

  def wrap(learn):
    def learn_and_note(state, drawn, step, clock):
      assert len(learned) == step
      learned.append(len(caplog.records))
      return learn(state, drawn, step, clock)

    return learn_and_note

  monkeypatch.setattr(experiment, loss, make_broken_loss)
  helpers.wrap_seams(monkeypatch, learn=wrap)
  # Prompts and responses of one length each, so that one step compiles for all.
  rows = [{"prompt": chr(97 + n) * 5} for n in range(20)]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = settings(files, steps=9) | {
    "task": f"jsonl:{tmp_path / 'rows.jsonl'}",
    "sampling.min_new_tokens": 8,
    "minibatches": 2,
    "microbatch_prompts": 1,
    "optimizer.max_skipped": 4,  # Two updates in each of two steps.
  }
  with jax.log_compiles(), caplog.at_level(logging.WARNING), pytest.raises(Diverged) as raised:
    helpers.run(experiment, tmp_path / "run", changes)
  leaf = "['layers_0']['mlp']['up']['weight']"
  said = f"4 updates in a row had a gradient that is not finite, first in {leaf};"
  assert str(raised.value).startswith(said)
  assert len(learned) == 2
  assert "update" in compiled_in(caplog.records[learned[0] : learned[1]])
  assert compiled_in(caplog.records[learned[1] :]) == []


# Compilations.


@pytest.mark.slow
def test_one_compilation_a_shape_over_ragged_steps(tmp_path, small, files, caplog, record_property):
  """Shapes as the samples say they were; nothing is compiled twice, nothing by step."""
  steps = 300 if FULL else 40
  rows = [{"prompt": "abc"}, {"prompt": "a" * 20}, {"prompt": "b" * 7}, {"prompt": "c" * 11}]
  held_out = tmp_path / "held_out.jsonl"
  held_out.write_text(json.dumps({"prompt": "e"}) + "\n")
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  changes = {
    "task": f"jsonl:{tmp_path / 'rows.jsonl'}",
    "jsonl.held_out_file": str(held_out),
    "steps": steps,
    "prompts_per_step": 1,
    "microbatch_prompts": 1,
    "max_new_tokens": 12,
    "eval.every": 10,
  }
  before = generate._cache_size()
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    found = run(tmp_path / "run", settings(files, **changes))
  compiled = collections.Counter(compiled_in(caplog.records))
  shapes = set()
  for step in range(steps):
    rows = [row for row in found.samples if row["step"] == step and row["split"] == "train"]
    columns = min(bucket(max(row["length"] for row in rows)), 12)
    shapes.add((bucket(max(len(row["prompt"]) for row in rows)), columns))
  widths = {width for width, _ in shapes} | {8}  # the held-out prompt's
  assert widths == {8, 16, 24} and len({columns for _, columns in shapes}) == 2
  assert generate._cache_size() - before == compiled["generate"] == len(widths)
  assert compiled["update"] == compiled["take"] == len(shapes)
  assert compiled["group_advantages"] == 1
  record_property("F40", steps)


def test_all_evaluations_of_a_run_share_what_the_first_compiles(
  tmp_path, small, files, monkeypatch, caplog
):
  """Three evaluations of 7 problems, in batches of 4 and of 3, with groups unlike training's."""
  evaluate, compiled = setup.evaluation.evaluate, []

  def counted(*args, **keywords):
    before = len(caplog.records)
    found = evaluate(*args, **keywords)
    compiled.append(compiled_in(caplog.records[before:]))
    return found

  monkeypatch.setattr(setup.evaluation, "evaluate", counted)
  changes = {"eval.every": 1, "eval.problems": 7, "eval.samples": 5, "max_new_tokens": 7}
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    found = run(tmp_path, settings(files, **changes))
  asked = [row["prompt"] for row in found.samples if row["split"] == "eval"]
  assert len(asked) == 3 * 7 and len(set(asked)) == 7
  first, *later = compiled
  assert first.count("generate") == 1
  assert later == [[], []]


# Interruptions, in processes of their own.

COMMAND = (
  "--model=tiny",
  "--task=copy",
  "--prompts_per_step=4",
  "--responses_per_prompt=4",
  "--eval.problems=4",
  "--eval.samples=3",
  "--eval.every=5",
  "--checkpoint.every=3",
  "--epochs=2",
)


def start(workdir, steps, *flags):
  return subprocess.Popen(
    [sys.executable, "-m", "experiments.grpo", *COMMAND, f"--steps={steps}"]
    + [f"--workdir={workdir}", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def wait_for_step(process, workdir, step):
  """Until the record holds the step."""
  path = Path(workdir) / "metrics.jsonl"
  deadline = time.monotonic() + PATIENCE
  while time.monotonic() < deadline:
    assert process.poll() is None, process.communicate()[0]
    if path.exists() and any(row["step"] >= step for row in read(path)):
      return
    time.sleep(0.005)
  raise TimeoutError(f"no step {step}")


def interrupt(directory, signals, *, steps):
  """Two runs of so many steps: `directory`/straight, and `directory`/cut, which gets these signals.

  Each signal comes a random time after one of the next steps, or, every fifth SIGKILL, within the
  seconds that a start takes, and at the latest with its first step. Gives, of each other signal,
  (steps that were saved and not yet on record when it came, seconds until the end).
  """
  begun = time.monotonic()
  process = start(directory / "straight", steps)
  wait_for_step(process, directory / "straight", 0)
  starting = time.monotonic() - begun
  output = process.communicate(timeout=PATIENCE)[0]
  assert process.returncode == 0, output
  rng, record = np.random.default_rng(0), directory / "cut" / "metrics.jsonl"
  stopped = []
  for number, signum in enumerate(signals):
    process = start(directory / "cut", steps)
    if number % 5 == 4 and signum == signal.SIGKILL:
      # A start may take less time than the first did: do not wait until the run has ended.
      known, until = len(read(record)), time.monotonic() + rng.uniform(0, starting)
      while time.monotonic() < until and len(read(record)) <= known:
        time.sleep(0.01)
    else:
      until = steps * number // (len(signals) + 1) + int(rng.integers(1, 4))
      wait_for_step(process, directory / "cut", until)
      time.sleep(rng.uniform(0, 0.1))
    recorded = len(read(record))
    process.send_signal(signum)
    sent = time.monotonic()
    output = process.communicate(timeout=PATIENCE)[0]
    if signum == signal.SIGKILL:
      assert process.returncode == -signal.SIGKILL, output
    else:
      assert process.returncode == 128 + signum, output
      said = rf"{signum.name}: saved at step (\d+) of {steps}; the same command resumes from it"
      saved = int(re.search(said, output)[1])
      assert Checkpointer(directory / "cut" / "checkpoints").latest() == saved
      stopped.append((saved - recorded, time.monotonic() - sent))
  process = start(directory / "cut", steps)
  output = process.communicate(timeout=PATIENCE)[0]
  assert process.returncode == 0, output
  assert "resuming from the checkpoint at step" in output
  return stopped


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
  """(workdir, what an uninterrupted run left, what interrupted ones left, steps)."""
  directory, steps = tmp_path_factory.mktemp("interrupted"), 16
  interrupt(directory, [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL], steps=steps)
  return (directory / "cut", outcome(directory / "straight"), outcome(directory / "cut"), steps)


def assert_as_uninterrupted(straight, cut, steps):
  """Bit for bit, without a step too many or too few."""
  assert [row["step"] for row in straight.metrics] == list(range(steps + 1))
  assert cut.metrics == straight.metrics
  assert cut.samples == straight.samples
  assert straight.state.keys() == cut.state.keys() and equal(straight.state, cut.state)


@pytest.mark.slow
def test_interrupted_runs_end_as_an_uninterrupted_one(interrupted, record_property):
  _, *runs = interrupted
  assert_as_uninterrupted(*runs)
  record_property("F1", 2)


@pytest.mark.slow
def test_a_finished_run_says_so_refuses_other_flags_and_goes_on_with_more_steps(
  interrupted, tmp_path, capsys
):
  workdir, straight, _, steps = interrupted
  recorded = json.loads((workdir / "config.json").read_text())
  result = json.loads((workdir / "result.json").read_text())
  config = replace(grpo.Config(), recorded)
  assert helpers.main(grpo, config) == 0
  assert f"{workdir} is finished; a larger --steps continues it" in capsys.readouterr().out
  with pytest.raises(ConfigError, match=r"--optimizer\.learning_rate=0\.5.*another --workdir"):
    grpo.train(replace(config, {"optimizer.learning_rate": 0.5}), str(workdir))
  assert json.loads((workdir / "config.json").read_text()) == recorded

  longer = grpo.train(replace(config, {"steps": steps + 2}), str(workdir))
  assert (result["steps"], longer["steps"]) == (steps, steps + 2)
  assert longer["before"] == result["before"]
  rows = without_timings(read(workdir / "metrics.jsonl"))
  assert [row["step"] for row in rows] == list(range(steps + 3))
  assert rows[:steps] == straight.metrics[:steps]


@pytest.mark.skipif(not FULL, reason="minutes of training: RL_LLM_FULL=1")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.slow
def test_the_tiny_model_learns_to_copy(tmp_path, seed):
  changes = {"model": "tiny", "task": "copy", "seed": seed} | grpo.TINY
  result = grpo.train(replace(grpo.Config(), changes), str(tmp_path))
  assert result["before"]["eval/greedy_accuracy"] < 0.1
  assert result["after"]["eval/greedy_accuracy"] >= 0.9


def test_laps_take_each_row_once_and_a_learning_rate_holds_from_the_step_of_a_resume(
  tmp_path, small, files
):
  """Over as many steps as a lap has, of a run that began anew in between."""
  changes = settings(files, laps=True, steps=3, **{"jsonl.held_out_fraction": 0.3})
  run(tmp_path, changes | {"steps": 1, "optimizer.learning_rate": 0.01})
  found = run(tmp_path, changes | {"optimizer.learning_rate": 0.02, "eval.every": 2})
  assert [row.get("learning_rate") for row in found.metrics] == [0.01, 0.02, 0.02, None]
  (note,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
  assert note["step"] == 1 and note["settings"] == {
    "optimizer.learning_rate": [0.01, 0.02],
    "eval.every": [16, 2],
  }
  asked = [row["problem"] for row in found.samples if row["split"] == "train"][::4]
  assert len(asked) == len({*asked}) == 12
