"""SFT: its objective against plain Python, what it reads, and that an interruption changes nothing.

Other flags (evaluation, checkpoints, export) go the way they go in test_grpo.py.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
import signal

import jax
import numpy as np
import pytest

from experiments import sft
from rl_llm.data import DataError, batches
from rl_llm.data.encoding import Encoded
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from rl_llm.runs.signals import Interrupted
from rl_llm.tasks import TaskError
from tests.experiments.helpers import FULL, equal, run, wrap_seams
from tests.representatives import mostly_slow


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def data(tmp_path):
  """20 prompts, each with another letter, of 2 to 5 bytes; answers of 3 to 7."""
  rows = [
    {"prompt": f"{chr(97 + n)}{'?' * (n % 4 + 1)}", "completion": "y" * (n % 5 + 3)}
    for n in range(20)
  ]
  return write(tmp_path / "rows.jsonl", rows)


def settings(data, **changes):
  return {
    "model": "tiny",
    "data": str(data),
    "task": "none",
    "prompt_format": "plain",
    "held_out_fraction": 0.2,
    "steps": 3,
    "examples_per_step": 4,
    "max_tokens": 16,
    "microbatch_rows": 4,
    "optimizer.learning_rate": 0.01,
  } | changes


# The objective.

SEQUENCES = [
  Encoded([97, 98, 99, 100, 258], [False, False, True, True, True], 2),
  Encoded([104, 105, 258], [False, True, True], 1),
  Encoded([120, 121, 122, 122, 122, 122, 258], [False] * 3 + [True] * 4, 3),
]


@functools.cache
def logits_of(policy):
  def logits(params, tokens):
    hidden, _ = policy.hidden(params, tokens, np.arange(8)[None], np.ones((1, 8), int))
    return hidden[0] @ policy.unembed(params).T

  return jax.jit(logits)


def nll(policy, params, sequence):
  """-log p of each trained token of one sequence, from the logits of the whole vocabulary."""
  tokens = np.zeros((1, 8), np.int32)  # What follows a token does not change its logits.
  tokens[0, : len(sequence.tokens)] = sequence.tokens
  logits = np.asarray(logits_of(policy)(params, tokens), np.float64)
  found = []
  for t, trained in enumerate(sequence.mask):
    if trained:
      row = logits[t - 1]
      peak = row.max()
      found.append(peak + math.log(sum(math.exp(z - peak) for z in row)) - row[tokens[0, t]])
  return found


def test_the_objective_is_the_formula_padded_and_packed(small):
  params = jax.jit(small.init)(jax.random.key(0))
  params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])
  each = [nll(small, params, sequence) for sequence in SEQUENCES]
  wanted = {
    "token_mean": sum(map(sum, each)) / (3 + 2 + 4),
    "sequence_mean": (sum(each[0]) / 3 + sum(each[1]) / 2 + sum(each[2]) / 4) / 3,
    "sequence_sum": sum(map(sum, each)) / 3,
  }
  assert len({round(value, 2) for value in wanted.values()}) == 3
  loss_fn = jax.jit(sft.make_loss(sft.Config(), small))
  for name, value in wanted.items():
    for packing in (0, 8):
      batch = sft.make_batch(SEQUENCES, name=name, packing=packing, rows=4, pad_id=0)
      loss, metrics = loss_fn(params, batch, {})
      assert float(loss) == pytest.approx(value, abs=1e-5), (name, packing)
      assert float(metrics["nll"][0]) == pytest.approx(sum(map(sum, each)), abs=1e-4)
      assert int(metrics["nll"][1]) == 9
  assert np.any(batch.sequences.segment_ids == 2)  # Two of them do share a row.
  dft, _ = jax.jit(sft.make_loss(sft.Config(loss="dft_loss"), small))(params, batch, {})
  assert float(dft) == pytest.approx(sum(n * math.exp(-n) for n in sum(each, [])) / 3, abs=1e-5)


# What a run does.


def test_the_loss_falls_each_example_comes_once_an_epoch_and_no_held_out_one(
  tmp_path, small, data, monkeypatch
):
  original, drawn = sft.make_batch, []

  def make_batch(sequences, **keywords):
    drawn.extend(bytes(sequence.tokens[:1]).decode() for sequence in sequences)
    return original(sequences, **keywords)

  monkeypatch.setattr(sft, "make_batch", make_batch)
  found = run(sft, tmp_path / "run", settings(data, steps=16))
  losses = [row["loss"] for row in found.metrics[:-1]]
  assert max(losses[-3:]) < min(losses[:3]) - 1
  assert found.metrics[-1]["eval/token_loss"] < found.metrics[0]["eval/token_loss"] - 0.3
  assert all(row["loss"] == pytest.approx(row["nll"], abs=1e-6) for row in found.metrics[:-1])
  size = len(set(drawn))
  assert 10 < size < 20  # The rest is held out.
  first, second = drawn[:size], drawn[size : 2 * size]
  assert sorted(first) == sorted(second) == sorted(set(drawn)) and first != second


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_every_flag_changes_the_weights_that_come_out(tmp_path, small, data):
  base = settings(data)
  flags = [
    {"seed": 1},
    {"examples_per_step": 8},
    {"held_out_fraction": 0.5},
    {"max_tokens": 11, "overlong": "drop"},
    {"max_tokens": 11, "overlong": "truncate_left"},
    {"max_tokens": 11, "overlong": "truncate_right"},
    {"weighting": "sequence_mean"},
    {"weighting": "sequence_sum", "optimizer.max_grad_norm": 0.0, "optimizer.eps": 0.1},
    {"prompt_format": "chat"},
    {"prompt_format": "chat", "system_prompt": "Be brief.", "max_tokens": 64},
    {"optimizer.schedule": "linear"},
    {"loss": "dft_loss"},
  ]
  weights = [run(sft, tmp_path / "base", base).params]
  for number, changes in enumerate(flags):
    weights.append(run(sft, tmp_path / str(number), base | {"max_tokens": 40} | changes).params)
    same = [i for i, earlier in enumerate(weights[:-1]) if equal(earlier, weights[-1])]
    assert not same, (changes, ["base", *flags][same[0]])


@pytest.mark.slow
def test_microbatches_and_packing_change_nothing(tmp_path, small, data):
  # An eps that is not tiny: Adam else turns rounding of a gradient near 0 into a whole step.
  base = settings(data) | {"optimizer.eps": 1e-2, "weighting": "sequence_mean"}
  whole = run(sft, tmp_path / "whole", base)
  parts = run(sft, tmp_path / "parts", base | {"microbatch_rows": 1})
  packed = run(sft, tmp_path / "packed", base | {"microbatch_rows": 1, "packing": 24})
  assert packed.metrics[0]["padding_fraction"] < whole.metrics[0]["padding_fraction"]
  for other in (parts, packed):
    for name, leaf in whole.params.items():
      np.testing.assert_allclose(leaf, other.params[name], rtol=0, atol=1e-5)


def test_held_out_examples_bounds_what_is_evaluated_and_nothing_else(tmp_path, small, data):
  every = run(sft, tmp_path / "all", settings(data))
  one = run(sft, tmp_path / "one", settings(data, held_out_examples=1))
  assert equal(every.params, one.params)
  assert every.metrics[0]["eval/token_loss"] != one.metrics[0]["eval/token_loss"]


@pytest.mark.slow
def test_answers_of_a_task_are_learned_and_graded(tmp_path, small):
  changes = {
    "model": "tiny",
    "task": "copy",
    "copy.alphabet": "ab",
    "copy.held_out": 2,
    "prompt_format": "plain",
    "steps": 60,
    "examples_per_step": 16,
    "microbatch_rows": 16,
    "max_new_tokens": 4,
    "optimizer.learning_rate": 0.01,
    "eval.every": 100,
    "eval.samples": 1,
  }
  found = run(sft, tmp_path, changes)
  assert found.metrics[-1]["eval/token_loss"] < 0.5 * found.metrics[0]["eval/token_loss"]
  assert {"eval/greedy_accuracy", "eval/sampled_accuracy"} <= found.metrics[-1].keys()
  assert [row["split"] for row in found.samples] == ["eval"] * 4


# Data.


def parquet(path, rows):
  pytest.importorskip("pyarrow")
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def zipped(path, rows):
  path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def talk(n):
  return [
    {"role": "user", "content": f"{n}?"},
    {"role": "assistant", "content": "a" * (n % 4 + 1)},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes."},
  ]


class Made(Exception):
  """A step has its batch."""


@pytest.mark.parametrize(
  ("save", "row", "chat", "answers"),
  mostly_slow(
    [  # What is trained on, any number of a for one; in chat with the header, which no prompt holds
      (write, lambda n: {"prompt": f"{n}?", "completion": "a" * (n % 4 + 1)}, False, "a"),
      (zipped, lambda n: {"messages": talk(n)}, True, "a:a~a:Yes.~"),
      (parquet, lambda n: {"messages": talk(n)}, True, "a:a~a:Yes.~"),
      (write, lambda n: {"text": "a" * (n % 4 + 2)}, True, "a"),  # "auto" knows bare text.
      (
        write,
        lambda n: {"text": f"\n\nHuman: {n}\n\nAssistant: {'a' * (n % 4 + 1)}"},
        True,
        "a:a~",
      ),
    ],
    quick=[0, 2, 3],
  ),
)
def test_formats(tmp_path, small, monkeypatch, save, row, chat, answers):
  path = tmp_path / "data"
  save(path, [row(n) for n in range(1, 25)])
  changes = {"prompt_format": "auto" if chat else "plain", "max_tokens": 128, "steps": 1}
  original, trained = sft.make_batch, []

  def make_batch(sequences, **keywords):
    for sequence in sequences:
      own = [t for t, m in zip(sequence.tokens, sequence.mask, strict=True) if m and t < 256]
      trained.append(bytes(own).decode())
    if save is not write:
      raise Made  # A program for each length of rows would take most of the time.
    return original(sequences, **keywords)

  monkeypatch.setattr(sft, "make_batch", make_batch)
  try:
    found = run(sft, tmp_path / "run", settings(path, **changes) | {"eval.every": 0})
    assert math.isfinite(found.metrics[0]["loss"])
  except Made:
    pass
  assert len(trained) == 4 and {re.sub("a+", "a", text) for text in trained} == {answers}


BROKEN = ["{", '{"prompt": "a"}', '{"prompt": "a", "completion": ""}', '{"prompt": 1}']


def test_a_broken_row_stops_with_its_line_or_is_dropped_and_counted(tmp_path, small, data, capsys):
  lines = data.read_text().splitlines()
  data.write_text("\n".join([*lines[:5], *BROKEN, *lines[5:]]) + "\n")
  with pytest.raises(DataError, match=r"rows\.jsonl:6: not JSON"):
    run(sft, tmp_path / "strict", settings(data))
  found = run(sft, tmp_path / "lenient", settings(data, data_errors="lenient"))
  assert found.metrics[0]["data_broken"] == len(BROKEN)
  said = " ".join(capsys.readouterr().out.split())
  assert "4 broken rows dropped" in said and "1 not JSON" in said


def test_too_long_rows_stop_with_their_line_or_are_counted(tmp_path, small, data):
  lengths = [
    len(json.loads(line)["prompt"]) + len(json.loads(line)["completion"]) + 1
    for line in data.read_text().splitlines()
  ]
  limit = sorted(lengths)[-3] - 1
  first = next(n for n, length in enumerate(lengths, 1) if length > limit)
  with pytest.raises(DataError, match=rf"rows\.jsonl:\d+: {lengths[first - 1]} tokens.*overlong"):
    run(sft, tmp_path / "error", settings(data, max_tokens=limit))
  found = run(sft, tmp_path / "drop", settings(data, max_tokens=limit, overlong="drop"))
  assert found.metrics[0]["data_overlong"] == sum(length > limit for length in lengths)
  assert found.metrics[0]["data_dropped"] == found.metrics[0]["data_overlong"]


def test_too_long_answers_of_a_task_stop_with_their_problem(tmp_path, small):
  changes = {"data": "task", "task": "copy", "max_tokens": 5}  # abc>abc and the end are 8
  with pytest.raises(DataError, match=r"problem .*: 8 tokens .*--max_tokens=5; raise"):
    run(sft, tmp_path / "error", settings(tmp_path) | changes)
  with pytest.raises(DataError, match="all 20 examples are over --max_tokens=5"):
    run(sft, tmp_path / "drop", settings(tmp_path) | changes | {"overlong": "drop"})


def test_rows_of_another_kind_and_answers_that_do_not_exist(tmp_path, small, files):
  pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
  with pytest.raises(DataError, match=r"pairs\.jsonl: rows of the format preference, .*completion"):
    run(sft, tmp_path / "run", settings(pairs))
  changes = {
    "data": "task",
    "task": f"jsonl:{files / 'rows.jsonl'}",
    "jsonl.reward_file": str(files / "reward.py"),
    "jsonl.reward_function": "fraction",
  }
  with pytest.raises(TaskError, match="no answer to learn from"):
    run(sft, tmp_path / "run", settings(tmp_path) | changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": "task"}, r"--data=task: must be a file where there is no task"),
    ({"held_out_fraction": 0.0}, r"--held_out_fraction=0: must be above 0, where nothing else"),
    ({"microbatch_rows": 3}, r"--microbatch_rows=3: must be a divisor .*try --microbatch_rows=2"),
    ({"packing": 8}, r"--packing=8: must be 0, or at least .* \(16\)"),
    ({"optimizer.schedule": "linear", "optimizer.warmup_steps": 3}, r"warmup_steps=3"),
  ],
)
def test_settings_that_do_not_fit(data, changes, message):
  with pytest.raises(ConfigError, match=message):
    sft.check(replace(sft.Config(), settings(data) | changes))


# Interruptions.


def stopped(monkeypatch, experiment, workdir, changes, stops):
  """Runs until each of the stops in turn, (step, exception), then to the end.

  A stop comes once the step has its experience, the last moment at which a run can be interrupted.
  """
  for at, error in stops:

    def wrap(sample, at=at, error=error):
      def stopping(state, step, clock):
        found = sample(state, step, clock)
        if step == at:
          raise error
        return found

      return stopping

    with monkeypatch.context() as patch, pytest.raises(type(error)):
      wrap_seams(patch, sample=wrap)
      run(experiment, workdir, changes)
  return run(experiment, workdir, changes)


# Asked to stop, it saves; killed, it falls back to the last checkpoint.
STOPS = [
  (1, Interrupted(signal.SIGINT)),
  (4, RuntimeError("killed")),
  (5, Interrupted(signal.SIGTERM)),
]
# A script's own state has to come back after the kill; what a signal does is the loop's, for all.
KILL_OR_ALL = [STOPS[1:2], pytest.param(STOPS, marks=pytest.mark.slow)]


def test_a_run_stopped_three_times_ends_as_one_that_was_not(tmp_path, small, data, monkeypatch):
  changes = settings(data, steps=7, packing=24, microbatch_rows=2, weighting="sequence_mean") | {
    "checkpoint.every": 3,
    "eval.every": 3,
  }
  original, packed = batches.pack, []

  def pack(sequences, **sizes):
    packed.append(len(sequences))
    return original(sequences, **sizes)

  with monkeypatch.context() as patch:
    patch.setattr(batches, "pack", pack)
    straight = run(sft, tmp_path / "straight", changes)
  assert packed == [4] * 7  # Once a step.
  cut = stopped(monkeypatch, sft, tmp_path / "cut", changes, STOPS)
  assert [row["step"] for row in cut.metrics] == list(range(8))
  assert cut.metrics == straight.metrics
  assert cut.samples == straight.samples
  assert equal(cut.state, straight.state)
