"""Many settings in one program: each member's first step is its own, and a kill changes nothing."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from experiments import grpo, population
from launch import run, state
from launch.sweep import SweepError, plan
from rl_llm.parallel import sharding
from rl_llm.runs.config import resolve
from rl_llm.runs.metrics import read, without_timings
from rl_llm.training import loop
from tests.experiments import helpers
from tests.experiments.test_resume import Killed, Stopping

# Of the change of the weights: by so much may a member's first update differ from its run's alone.
TOLERANCE = 1e-3
MEMBERS = [
  {"optimizer.learning_rate": 0.01, "loss.clip_high": 0.1, "seed": 0},
  {"optimizer.learning_rate": 0.03, "loss.clip_high": 0.3, "kl.coef": 0.2, "seed": 1},
  {"optimizer.learning_rate": 0.003, "loss.clip_high": 0.3, "loss.entropy_coef": 0.3, "seed": 1},
]
# The clip and the reference matter from the second update of a step on. Adam's first direction is
# g / (|g| + eps): with the usual eps rounding decides it where g is 0, and the second one differs.
TWICE = {"steps": 1, "epochs": 2, "optimizer.eps": 1e-3}
ADAPTERS = {"steps": 1, "lora.rank": 2, "lora.alpha": 8.0, "seed": 0}


def members(files, **changes):
  return [helpers.settings(files) | each | (changes or TWICE) for each in MEMBERS]


def sweep(path, trials, **flags):
  """The exit code of `python -m launch.run --backend=population`, and the ids of the trials."""
  path.mkdir(exist_ok=True)
  (path / "spec.py").write_text(
    f"EXPERIMENT = 'experiments.grpo'\ndef sweep():\n  return {trials!r}\n"
  )
  config = run.Config(
    sweep=str(path / "spec.py"), workdir=str(path / "work"), backend="population", **flags
  )
  return run.main(config), [trial.id for trial in plan("experiments.grpo", trials)]


def records(path, ids):
  """What the members said and what became of them, timings aside."""
  return [
    (
      without_timings(read(path / "work" / id / "metrics.jsonl")),
      read(path / "work" / id / "samples.jsonl"),
    )
    for id in ids
  ]


def population_of(path):
  (found,) = (path / "work").glob("population-*")
  return found


ALONE = {"adapters": ADAPTERS} | ({"all weights, two updates": TWICE} if helpers.FULL else {})


@pytest.mark.slow
@pytest.mark.parametrize("changes", ALONE.values(), ids=ALONE)
def test_the_first_step_is_that_of_the_run_alone(tmp_path, small, files, changes):
  trials = members(files, **changes)
  code, ids = sweep(tmp_path, trials)
  assert code == 0
  together = helpers.outcome(population_of(tmp_path))
  for number, (trial, id) in enumerate(zip(trials, ids, strict=True)):
    config = resolve(grpo.Config, trial, overrides=grpo.overrides)[0]
    grpo.train(config, str(tmp_path / f"alone{number}"))
    alone = helpers.outcome(tmp_path / f"alone{number}")
    metrics, samples = records(tmp_path, ids)[number]
    assert [row["response"] for row in samples] == [row["response"] for row in alone.samples]
    for ours, theirs in zip(metrics, alone.metrics, strict=True):
      for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, number)
    assert state.is_done(tmp_path / "work" / id, 1)
    opened = types.SimpleNamespace(console=types.SimpleNamespace(say=print))
    model = population.load_members([config], opened, sharding.make_mesh(data=1))[2]
    first = {f"params/{path}": leaf[0] for path, leaf in flat(model)}
    assert first.keys() == alone.params.keys()
    moved = norm(alone.params[path] - first[path] for path in first)
    apart = norm(together.params[path][number] - alone.params[path] for path in first)
    assert 0 < moved and apart < TOLERANCE * moved, number


def flat(tree, prefix=""):
  """(path, leaf) of a tree of dictionaries."""
  for name, child in tree.items():
    if isinstance(child, dict):
      yield from flat(child, f"{prefix}{name}/")
    else:
      yield f"{prefix}{name}", np.asarray(child)


def norm(leaves):
  return float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves)))


@pytest.mark.slow
def test_a_kill_changes_nothing_and_what_is_done_is_left(tmp_path, small, files, monkeypatch):
  trials = members(files, **TWICE | {"steps": 4, "eval.every": 2, "checkpoint.every": 2})
  code, ids = sweep(tmp_path / "straight", trials)
  assert code == 0
  cut = tmp_path / "cut"
  for rows in (1, 3):
    with monkeypatch.context() as patch:
      patch.setattr(loop, "StopSignals", Stopping)
      name = population_of(tmp_path / "straight").name
      Stopping.record = cut / "work" / name / "metrics.jsonl"
      Stopping.rows, Stopping.extra = rows, 1
      Stopping.error = Killed()
      with pytest.raises(Killed):
        sweep(cut, trials)
  # Killed once more, while it wrote the results.
  write, written = population.write_result, []

  def write_one(directory, result):
    if written:
      raise Killed
    written.append(directory.name)
    write(directory, result)

  with monkeypatch.context() as patch:
    patch.setattr(population, "write_result", write_one)
    with pytest.raises(Killed):
      sweep(cut, trials)
  assert written == ids[:1] and not state.is_done(cut / "work" / ids[1], 4)
  assert sweep(cut, trials)[0] == 0
  assert records(cut, ids) == records(tmp_path / "straight", ids)
  assert helpers.equal(
    *(helpers.outcome(population_of(path)).state for path in (cut, tmp_path / "straight"))
  )

  # All done: nothing is computed again, and the table shows them as it shows other trials.
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  monkeypatch.setattr(loop, "train_loop", None)
  assert sweep(cut, trials)[0] == 0
  status = [state.read_json(cut / "work" / id / "status.json")["status"] for id in ids]
  assert status == ["done"] * 3


@pytest.mark.slow
def test_lost_lines_of_a_member_are_named(tmp_path, small, files, monkeypatch, capfd):
  """At the resume, and in the result of that member alone."""
  trials = members(files, steps=4, **{"eval.every": 2, "checkpoint.every": 2})
  with monkeypatch.context() as patch:
    patch.setattr(loop, "StopSignals", Stopping)
    # The first member's record: it has a line when the population's has.
    first = plan("experiments.grpo", trials)[0].id
    Stopping.record = tmp_path / "work" / first / "metrics.jsonl"
    Stopping.rows, Stopping.extra = 3, 1
    Stopping.error = Killed()
    with pytest.raises(Killed):
      sweep(tmp_path, trials)
  ids = [trial.id for trial in plan("experiments.grpo", trials)]
  capfd.readouterr()
  places = [tmp_path / "work" / id / "metrics.jsonl" for id in ids]
  places[0].write_text("".join(places[0].read_text().splitlines(keepends=True)[1:]))
  places[1].unlink()
  assert sweep(tmp_path, trials)[0] == 0
  said = [line for line in capfd.readouterr().out.splitlines() if "missing" in line]
  assert [line.partition(": the run resumes")[0] for line in said] == [
    f"{ids[0]}: line 0 of metrics.jsonl is missing",
    f"{ids[1]}: lines 0 to 1 of metrics.jsonl are missing",
  ]
  results = [json.loads((place.parent / "result.json").read_text()) for place in places]
  assert [result.get("steps_missing") for result in results] == ["0", "0 to 1", None]


@pytest.mark.slow
def test_a_member_that_diverges_fails_alone(tmp_path, small, files):
  trials = members(files, **TWICE | {"steps": 3, "optimizer.max_skipped": 1})
  ids = sweep(tmp_path / "well", trials)[1]
  ill = [*trials[:2], trials[2] | {"optimizer.learning_rate": 1e38}]
  code, ill_ids = sweep(tmp_path / "ill", ill)
  assert code == 1
  assert records(tmp_path / "ill", ill_ids)[:2] == records(tmp_path / "well", ids)[:2]
  failed = tmp_path / "ill" / "work" / ill_ids[2]
  assert not state.is_done(failed, 3)
  status = json.loads((failed / "status.json").read_text())
  assert status["status"] == "failed" and "not finite" in status["reason"]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"responses_per_prompt": 8}, "--responses_per_prompt=8: must be 4, as in the first member"),
    ({"optimizer.b1": 0.5}, "--optimizer.b1=0.5: must be 0.9, as in the first"),
    ({"sampling.temperature": 0.7}, "--sampling.temperature=0.7: must be 1.0, as"),
    ({"loss.name": "ppo_loss"}, "--loss.name=ppo_loss: must be grpo_loss, as"),
    ({"loss.clip_high": None}, "--loss.clip_high=none: must be 0.1, as"),
    ({"steps": 2}, "--steps=2: must be 1, as"),
  ],
)
def test_settings_that_change_the_program_are_refused(tmp_path, files, changes, message):
  trials = members(files)
  with pytest.raises(SweepError, match=message):
    sweep(tmp_path, [*trials[:2], trials[2] | changes])


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"sampling.slots": 4}, "--sampling.slots=4: must be 0 in a population"),
    ({"reward_isolation": "batch"}, "--reward_isolation=batch: must be auto, sample or group in a"),
    ({"sampling.parts": 2}, "--sampling.parts=2: must be 1 in a population"),
    ({"mesh.fsdp": 2}, "--mesh.fsdp=2: must be 1 in a population"),
    ({"lora.rank": 2}, "--seed=1: must be 0 for all, with --model=tiny and --lora.rank"),
  ],
)
def test_settings_that_no_population_can_have_are_refused(tmp_path, files, changes, message):
  with pytest.raises(SweepError, match=message):
    sweep(tmp_path, members(files, **TWICE | changes))


def test_a_trial_that_has_begun_by_itself_or_is_at_work_is_not_touched(tmp_path, small, files):
  trials = members(files)
  ids = [trial.id for trial in plan("experiments.grpo", trials)]
  begun = tmp_path / "work" / ids[1]
  (begun / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(SweepError, match=f"trial {ids[1]} has begun on its own: --only={ids[1]} "):
    sweep(tmp_path, trials)
  (begun / "checkpoints" / "3").rmdir()
  lease = state.take_lease(begun)
  with pytest.raises(SweepError, match=f"trial {ids[1]} is at work under another launcher"):
    sweep(tmp_path, trials)
  state.release_lease(lease)


def test_another_experiment_is_refused(tmp_path):
  (tmp_path / "spec.py").write_text(
    "EXPERIMENT = 'experiments.reinforce'\ndef sweep():\n  return [{'model': 'tiny'}]\n"
  )
  config = run.Config(sweep=str(tmp_path / "spec.py"), workdir=str(tmp_path), backend="population")
  with pytest.raises(SweepError, match="must be 'experiments.grpo' with --backend=population"):
    run.main(config)
