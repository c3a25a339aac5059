"""KTO's script: its objectives against plain Python, labels, training, interruptions, refusals."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import kto
from rl_llm import losses
from rl_llm.data import DataError
from rl_llm.data.batches import SequenceBatch
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from rl_llm.training import reference_cache, unpaired
from rl_llm.training.pairs import PairBatch
from tests.experiments.helpers import equal, run
from tests.experiments.test_sft import KILL_OR_ALL, stopped, write
from tests.representatives import mostly_slow


@pytest.fixture
def data(tmp_path):
  """40 prompts; answers of y are wanted, those of n are not, a third of all."""
  rows = []
  for n in range(40):
    wanted = n % 3 != 0
    prompt = f"{chr(97 + n % 26)}{'?' * (n % 4 + 1)}"
    completion = "y" * (n % 5 + 3) if wanted else "n" * (n % 3 + 2)
    rows.append({"prompt": prompt, "completion": completion, "label": wanted})
  return write(tmp_path / "feedback.jsonl", rows)


def settings(file, **changes):
  return {
    "model": "tiny",
    "data": str(file),
    "prompt_format": "plain",
    "held_out_fraction": 0.3,
    "steps": 3,
    "examples_per_step": 8,
    "max_tokens": 16,
    "microbatch_rows": 8,
    "optimizer.learning_rate": 0.01,
  } | changes


def test_rounding_is_no_reward():
  """The policy is the reference, and its log-probs were computed in other batches."""
  desirable, ref = np.array([True, False] * 4), np.full(8, -3.0, np.float32)
  held_out = unpaired.Answers(list(range(8)), desirable, ref, [], np.float32([]))
  rounding = 1e-6 * np.where(desirable, 1, -1)

  def score(params, rows):
    return [np.array([-3.0 + rounding[row]]) for row in rows]

  aot = kto.Loss(name="aot_unpaired_loss")
  figures = kto.answer_figures(aot, held_out, score, 0, None)
  assert figures["eval/label_auc"] == 0.5

  def moved(params, rows):
    return [np.array([-3.0 + 1e3 * rounding[row]]) for row in rows]

  assert kto.answer_figures(aot, held_out, moved, 0, None)["eval/label_auc"] == 1.0


def steps_points(monkeypatch):
  """A list to which each step of training will add the shift of its own answers."""
  points, point_of = [], kto.point_of

  def recorded(options, score, params, drawn):
    point = point_of(options, score, params, drawn)
    points.extend([point] * (len(drawn.rows) == 8))  # An evaluation has more answers.
    return point

  monkeypatch.setattr(kto, "point_of", recorded)
  return points


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def test_the_baseline_and_the_shift_are_of_the_whole_batch_before_it_is_split():
  desirable = np.array([True, False, True, False])
  ref = np.array([-3.0, -2.0, -5.0, -4.0], np.float32)
  rows, others = ["r0", "r1", "r2", "r3"], ["o0", "o1", "o2", "o3"]
  policy = {"r": [-1.0, -2.5, -5.5, -3.0], "o": [-1.0, -2.0, -3.5, -4.0]}
  answers = unpaired.Answers(rows, desirable, ref, others, np.float32([-2.0, -2.0, -3.0, -5.0]))

  def score(params, asked):
    # Two tokens each: the answer's log-prob is their sum.
    return [np.array([value - 1, 1.0]) for value in policy[asked[0][0]]]

  point = kto.point_of(kto.Loss(), score, None, answers)
  assert point == pytest.approx((1 + 0 - 0.5 + 1) / 4)
  shift = kto.point_of(kto.Loss(name="bco_unpaired_loss", beta=0.5), score, None, answers)
  good, bad = 0.5 * np.mean([2.0, -0.5]), 0.5 * np.mean([-0.5, 1.0])
  assert shift == pytest.approx((good + bad) / 2)
  taken = answers.take([2, 1])
  assert taken.rows == ["r2", "r1"] and taken.others == ["o2", "o1"]
  assert taken.desirable.tolist() == [True, False] and taken.ref_answers.tolist() == [-5.0, -2.0]
  assert taken.ref_others.tolist() == [-3.0, -2.0]


# Of an answer: its log-ratio, whether it is wanted, and the point; with the default numbers.
FORMULAS = {
  "kto_loss": lambda c, good, z: 1 - sigmoid(0.1 * (c - z) if good else 0.1 * (z - c)),
  "bco_unpaired_loss": lambda c, good, z: -math.log(sigmoid((0.1 * c - z) * (1 if good else -1))),
}


@pytest.mark.parametrize("name", [*FORMULAS, "aot_unpaired_loss"])
def test_objective(name, monkeypatch):
  """Six answers and two free places, whose numbers must not count."""
  rng = np.random.default_rng(0)
  mask = np.arange(6) < rng.integers(2, 6, size=(8, 1))
  logprobs = np.where(mask, -rng.uniform(0.1, 2.0, size=mask.shape), 0).astype(np.float32)
  ref = (logprobs.sum(1) + rng.normal(0, 2, 8)).astype(np.float32)
  good, point = np.arange(8) % 2 == 0, 0.3
  weights = np.float32([1 / 6] * 6 + [0, 0])
  answers = PairBatch(SequenceBatch(None, mask, None, None), None, weights)
  batch = kto.Batch(answers, good, ref, np.full(8, point, np.float32))
  name_of = "rl_llm.training.pairs.teacher_forced_logprobs"
  monkeypatch.setattr(name_of, lambda params, *_, **__: (params, 0))
  config = replace(kto.Config(), {"loss.name": name})
  loss_fn = kto.make_loss(config, None)
  loss, found = loss_fn(jnp.asarray(logprobs), batch, {"loss": {}})
  ratios = (logprobs.sum(1) - ref)[:6]
  if name in FORMULAS:
    terms = [FORMULAS[name](c, g, point) for c, g in zip(ratios, good, strict=False)]
    halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], (logprobs, batch)) for i in (0, 1)]
    parts = [float(loss_fn(jnp.asarray(of), part, {"loss": {}})[0]) for of, part in halves]
    assert sum(parts) == pytest.approx(np.mean(terms), rel=1e-5) and all(parts)
  else:
    pairs = zip(np.sort(ratios[0::2]), np.sort(ratios[1::2]), strict=True)
    terms = [-math.log(sigmoid(0.1 * (a - b))) for a, b in pairs]
  assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
  for kind, rows in (("desirable", slice(0, 6, 2)), ("undesirable", slice(1, 6, 2))):
    total, count = found[f"{kind}_reward"]
    assert (float(total), int(count)) == (pytest.approx(0.1 * ratios[rows].sum(), rel=1e-4), 3)
    total, count = found[f"{kind}_logprobs"]
    assert float(total) == pytest.approx(logprobs.sum(1)[rows].sum(), rel=1e-5) and int(count) == 3


def test_what_each_loss_reads_is_computed_for_it_alone():
  assert set(kto.Loss().functions) == {"kto_loss", "bco_unpaired_loss", "aot_unpaired_loss"}
  assert losses.BATCH_COUPLED & set(kto.Loss().functions) == {"aot_unpaired_loss"}
  assert kto.beta_of(kto.Loss()) == 0.1 and kto.beta_of(kto.Loss(beta=0.3)) == 0.3
  assert not replace(kto.Config(), {"data": "x"}).halves
  assert replace(kto.Config(), {"data": "x", "loss.name": "aot_unpaired_loss"}).halves


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kto_loss", "bco_unpaired_loss", "aot_unpaired_loss"])
def test_it_learns_which_answers_are_wanted(name, data, tmp_path):
  changes = {"steps": 20, "eval.every": 20, "loss.name": name}
  found = run(kto, tmp_path / "run", settings(data, **changes))
  first, last = found.metrics[0], found.metrics[-1]
  assert first["eval/label_auc"] == 0.5 and last["eval/label_auc"] > 0.9
  assert last["eval/desirable_reward"] > 0 > last["eval/undesirable_reward"]
  assert last["eval/desirable_logprobs"] > first["eval/desirable_logprobs"]
  if name != "aot_unpaired_loss":
    assert last["eval/answer_loss"] < first["eval/answer_loss"]


@pytest.mark.parametrize("stops", KILL_OR_ALL, ids=len)
def test_a_killed_run_resumes_bit_for_bit(stops, data, small, tmp_path, monkeypatch):
  """With BCO's running shift, which is a part of the state, and with packed rows."""
  changes = settings(data, steps=6, packing=32, **{"loss.name": "bco_unpaired_loss"})
  changes |= {"checkpoint.every": 2, "eval.every": 4}
  points = steps_points(monkeypatch)
  straight = run(kto, tmp_path / "straight", changes)
  of_steps = [*points]
  cut = stopped(monkeypatch, kto, tmp_path / "cut", changes, stops)
  assert cut.metrics == straight.metrics and equal(cut.state, straight.state)
  shifts = [row["shift"] for row in straight.metrics[:-1]]
  # Nothing has moved at first, but for rounding. Then it is the mean of all steps so far, in which
  # each counts 0.9 times what the next one does.
  assert abs(shifts[0]) < 1e-6 and len({*shifts}) == len(of_steps) == 6
  for step, shift in enumerate(shifts):
    shares = 0.9 ** np.arange(step, -1.0, -1.0)
    assert shift == pytest.approx(np.average(of_steps[: step + 1], weights=shares), rel=1e-4)


@pytest.mark.parametrize(
  "sizes",
  mostly_slow(
    [{"packing": 32, "microbatch_rows": 4}, {"packing": 32}, {"microbatch_rows": 2}], quick=[0]
  ),
)
def test_microbatches_and_packing_add_up_to_the_whole(data, small, tmp_path, sizes):
  whole = run(kto, tmp_path / "whole", settings(data, steps=2))
  other = run(kto, tmp_path / "other", settings(data, steps=2, **sizes))
  for one, two in zip(whole.metrics, other.metrics, strict=True):
    for key in ("loss", "baseline", "desirable_reward", "undesirable_logprobs"):
      if key in one:
        assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-5)


def test_the_reference_is_computed_once(data, small, tmp_path, monkeypatch):
  changes = settings(data, reference_cache=str(tmp_path / "kept"), steps=1, **{"eval.every": 0})
  first = run(kto, tmp_path / "run", changes)
  counts, original = [], reference_cache.compute_logprobs
  monkeypatch.setattr(
    reference_cache,
    "compute_logprobs",
    lambda params, rows, **how: counts.append(len(rows)) or original(params, rows, **how),
  )
  again = run(kto, tmp_path / "again", changes)
  assert counts == [8]  # The policy's, of the step's mismatched answers.
  assert again.metrics == first.metrics


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"data": ""}, "a file of labelled answers"),
    ({"microbatch_rows": 3}, "microbatch_rows"),
    ({"loss.name": "aot_unpaired_loss", "microbatch_rows": 4}, "at least examples_per_step"),
    ({"balanced": True, "examples_per_step": 7, "microbatch_rows": 7}, "even number"),
    ({"loss.decay": 0.5}, "bco_unpaired_loss has it"),
    ({"loss.label_smoothing": 0.1}, "loss.label_smoothing"),
    ({"loss.beta": -1.0}, "loss.beta"),
    ({"packing": 8}, "packing"),
  ],
)
def test_refused(changes, says, data):
  with pytest.raises(ConfigError, match=says):
    kto.check(replace(kto.Config(), settings(data, **changes)))


def test_labels_of_one_kind_teach_nothing(tmp_path):
  rows = [{"prompt": f"{n}?", "completion": "y", "label": True} for n in range(9)]
  with pytest.raises(DataError, match="every label is true.*experiments.sft"):
    run(kto, tmp_path / "run", settings(write(tmp_path / "rows.jsonl", rows)))


def test_kto_needs_two_prompts(tmp_path):
  rows = [{"prompt": "?", "completion": "y" * (n + 1), "label": n % 2} for n in range(9)]
  changes = settings(write(tmp_path / "rows.jsonl", rows), **{"held_out_fraction": 0.0})
  with pytest.raises(DataError, match="bco_unpaired_loss"):
    run(kto, tmp_path / "run", changes | {"eval.every": 0})


def test_pairs_are_taken_apart(small, tmp_path):
  # As wide as the other data, for which a program is compiled.
  rows = [{"prompt": f"{chr(97 + n)}????", "chosen": "y" * 6, "rejected": "n"} for n in range(20)]
  path = write(tmp_path / "pairs.jsonl", rows)
  found = run(kto, tmp_path / "run", settings(path, steps=1, balanced=True))
  assert found.metrics[0]["desirable_fraction"] == 0.5
  assert found.metrics[0]["eval/label_auc"] == 0.5
