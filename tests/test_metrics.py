"""The record of a run: what is written reads back, killed and resumed equals straight."""

from __future__ import annotations

import doctest
import json
import math
import random
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_llm.errors import UserError
from rl_llm.runs import metrics as metrics_lib
from rl_llm.runs.metrics import MetricsWriter, RecordError


def test_doctests():
  assert doctest.testmod(metrics_lib).failed == 0


def row_of(step):
  rng = random.Random(step)
  return {"loss": rng.gauss(0, 1), "reward": rng.random(), "time/step": time.time()}


def samples_of(step):
  rng = random.Random(step)
  return [{"response": "r" * rng.randrange(9), "index": i} for i in range(step % 3)]


@settings(max_examples=20, deadline=None)
@given(
  every=st.integers(1, 4),
  kills=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 80)), max_size=4),
)
def test_killed_and_resumed_the_record_equals_an_uninterrupted_one(every, kills, tmp_path_factory):
  """A run of 12 steps with a checkpoint every few; each kill cuts the file in its last write."""
  folder = tmp_path_factory.mktemp("run")

  def advance(name, start, stop, resume_step):
    with (
      MetricsWriter(folder / f"{name}.metrics", resume_step=resume_step) as metrics,
      MetricsWriter(folder / f"{name}.samples", resume_step=resume_step) as samples,
    ):
      for step in range(start, stop):
        metrics.write(step, row_of(step))
        samples.write(step, *samples_of(step))

  advance("straight", 0, 13, None)
  start, checkpoint = 0, None
  for stop, cut in kills:
    if stop < start:
      continue
    advance("killed", start, stop + 1, checkpoint)
    saved = [step for step in range(start, stop) if step % every == 0]  # before the step in flight
    checkpoint = saved[-1] if saved else checkpoint
    start = 0 if checkpoint is None else checkpoint + 1
    for kind, rows in (("metrics", [row_of(stop)]), ("samples", samples_of(stop))):
      path = folder / f"killed.{kind}"
      content = path.read_bytes()
      lines = content.splitlines(keepends=True)
      size = sum(map(len, lines[len(lines) - len(rows) :]))  # of the last write
      path.write_bytes(content[: len(content) - min(cut, size)])
  advance("killed", start, 13, checkpoint)

  assert (folder / "killed.samples").read_bytes() == (folder / "straight.samples").read_bytes()
  straight, killed = (
    metrics_lib.read(folder / f"{name}.metrics") for name in ("straight", "killed")
  )
  assert [row["step"] for row in killed] == list(range(13))
  assert metrics_lib.without_timings(killed) == metrics_lib.without_timings(straight)


def test_opening_repairs_a_cut_last_line_and_drops_later_steps(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(
    b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3, "a"'
  )
  MetricsWriter(path, resume_step=1).close()
  assert path.read_bytes() == b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n'
  MetricsWriter(path, resume_step=1).close()
  assert path.read_bytes() == b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n'
  MetricsWriter(path).close()
  assert path.read_bytes() == b""
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary left


def test_a_line_that_lacks_only_its_end_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}')
  assert metrics_lib.read(path) == [{"step": 0, "a": 1}, {"step": 1, "a": 2}]
  with MetricsWriter(path, resume_step=1) as writer:
    writer.write(2, {"a": 3})
  assert path.read_bytes() == b'{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n{"step": 2, "a": 3}\n'


@pytest.mark.parametrize(
  "end", [b'{"step": 1, "a', b"\x00\x00\x00", b"12", b"\xff\xfe", b'{"a": 1}']
)
def test_read_leaves_out_a_cut_last_line_but_refuses_a_broken_one_before(end, tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 0}\n' + end)
  assert metrics_lib.read(path) == [{"step": 0}]
  path.write_bytes(b'{"step": 0}\n' + end + b'\n{"step": 2}\n')
  with pytest.raises(RecordError, match=r"metrics\.jsonl:2: must be a JSON object"):
    metrics_lib.read(path)
  with pytest.raises(RecordError, match=r"metrics\.jsonl:2: must be a JSON object"):
    MetricsWriter(path, resume_step=5)
  assert issubclass(RecordError, UserError)  # one line for whoever runs an experiment
  assert path.read_bytes().endswith(b'{"step": 2}\n')  # nothing was thrown away


scalars = (
  st.floats()
  | st.integers()
  | st.booleans()
  | st.none()
  | st.text(st.characters(exclude_categories=()))
)


@settings(max_examples=100, deadline=None)
@given(row=st.dictionaries(st.text(max_size=5).filter(lambda key: key != "step"), scalars))
def test_what_is_written_is_strict_json_and_reads_back(row, tmp_path_factory):
  path = tmp_path_factory.getbasetemp() / "row.jsonl"
  with MetricsWriter(path) as writer:
    writer.write(3, row)
  text = path.read_text("ascii")
  json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
  (back,) = metrics_lib.read(path)
  assert list(back) == ["step", *sorted(row)]
  for key, value in row.items():
    if isinstance(value, float) and not math.isfinite(value):
      assert back[key] in ("nan", "inf", "-inf")
      np.testing.assert_equal(float(back[key]), value)
    else:
      assert back[key] == value and type(back[key]) is type(value)


def test_numpy_and_jax_scalars_keep_their_value(tmp_path):
  row = {
    "f32": np.float32(0.1),
    "jax": jnp.float32(0.1),
    "bf16": jnp.bfloat16(0.1),
    "int": np.int64(2**53 + 1),
    "bool": np.bool_(True),
    "nan": jnp.float32(jnp.nan),
    "big": 2**80,
  }
  with MetricsWriter(tmp_path / "m") as writer:
    writer.write(np.int32(1), row)
  (back,) = metrics_lib.read(tmp_path / "m")
  assert back == {
    "step": 1,
    "f32": float(np.float32(0.1)),
    "jax": float(np.float32(0.1)),
    "bf16": float(jnp.bfloat16(0.1)),
    "int": 2**53 + 1,
    "bool": True,
    "nan": "nan",
    "big": 2**80,
  }


@pytest.mark.parametrize(
  ("row", "error", "message"),
  [
    ({"loss": np.zeros(2)}, TypeError, r"'loss' is a ndarray of shape \(2,\), must be a scalar"),
    ({"loss": {"a": 1}}, TypeError, "'loss' is a dict, must be a scalar"),
    ({"step": 1}, ValueError, 'a row has its own "step"'),
  ],
)
def test_rows_hold_scalars_only_and_a_refused_row_leaves_no_trace(row, error, message, tmp_path):
  with MetricsWriter(tmp_path / "m") as writer:
    with pytest.raises(error, match=message):
      writer.write(1, {"ok": 1}, row)
  assert (tmp_path / "m").read_bytes() == b""


def test_steps_never_go_back_also_after_resuming(tmp_path):
  with MetricsWriter(tmp_path / "m") as writer:
    writer.write(4, {})
  with MetricsWriter(tmp_path / "m", resume_step=9) as writer:
    with pytest.raises(ValueError, match="step is 3, must be at least 4"):
      writer.write(3, {})


def test_credentials_are_redacted(tmp_path, monkeypatch):
  monkeypatch.setenv("SOME_API_KEY", "swordfish-1")
  with MetricsWriter(tmp_path / "m") as writer:
    writer.write(1, {"response": "take hf_" + "a1B2" * 8 + " and swordfish-1"})
  assert metrics_lib.read(tmp_path / "m")[0]["response"] == "take [redacted] and [redacted]"


def test_the_environment_is_read_once_a_write(tmp_path, monkeypatch):
  """Python decodes `os.environ` anew at each reading: 30 us, with 3,000 texts a step 0.1 s."""

  class Counted(dict):
    read = 0

    def __iter__(self):
      self.read += 1
      return super().__iter__()

  environ = Counted(SOME_API_KEY="swordfish-1")
  monkeypatch.setattr("os.environ", environ)
  with MetricsWriter(tmp_path / "m") as writer:
    writer.write(1, *[{"response": f"take swordfish-{n}", "status": "ok"} for n in range(5)])
    assert environ.read == 1
    environ["LATER_TOKEN"] = "marlin-42"
    writer.write(2, {"response": "a swordfish-1 and a marlin-42"})
    assert environ.read == 2
  said = [row["response"] for row in metrics_lib.read(tmp_path / "m")]
  assert said == [
    "take swordfish-0",
    "take [redacted]",
    "take swordfish-2",
    "take swordfish-3",
    "take swordfish-4",
    "a [redacted] and a [redacted]",
  ]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(0, 100)), max_size=5))
def test_finalize_divides_the_sums_by_the_counts(parts):
  total, count = sum(p[0] for p in parts), sum(p[1] for p in parts)
  value = metrics_lib.finalize({"a": (jnp.asarray(0.5), np.int32(2)), "b": (total, count)})
  assert value == {"a": 0.25, "b": total / count if count else None}


def test_finalize_divides_arrays_and_leaves_alone_what_is_no_pair():
  found = metrics_lib.finalize(
    {
      "leaves": (jnp.array([0.0, 3.0]), jnp.float32(2)),
      "none": (np.zeros(2), 0),
      "rate": 0.5,
      "text": "as it is",
    }
  )
  assert found.pop("leaves").tolist() == [0.0, 1.5]
  assert found == {"none": None, "rate": 0.5, "text": "as it is"}
  whole = metrics_lib.finalize({"a": (np.float32(1), 2)})["a"]
  assert type(whole) is float and whole == 0.5


def test_noise_is_the_trace_over_the_squared_mean():
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(6, 40)) + 1.0
  mean = vectors.mean(axis=0)
  trace = sum(((v - mean) ** 2).sum() for v in vectors) / 5
  wanted = trace / ((mean**2).sum() - trace / 6)
  assert metrics_lib.noise_to_signal(list(vectors)) == pytest.approx(wanted, rel=1e-9)
  assert metrics_lib.noise_to_signal([np.array([1.0]), np.array([-1.0])]) == float("inf")


def wilson(successes, n, z=1.959963984540054):
  """Both p for which |successes/n - p| = z sqrt(p (1 - p) / n): the roots of a quadratic."""
  share = successes / n
  roots = np.roots([1 + z * z / n, -(2 * share + z * z / n), share * share])
  return share, min(roots), max(roots)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (57, 128), (1, 1)])
def test_with_one_sample_per_problem_the_interval_is_wilsons(successes, n):
  counts = [1] * successes + [0] * (n - successes)
  np.testing.assert_allclose(
    metrics_lib.proportion_interval(counts, 1), wilson(successes, n), rtol=1e-9, atol=1e-9
  )


def test_problems_that_are_all_or_nothing_count_once_each():
  counts = [8] * 30 + [0] * 70
  np.testing.assert_allclose(
    metrics_lib.proportion_interval(counts, 8), wilson(30, 100), atol=2e-3
  )  # n = N - 1 before it is kept within [N, N S]


def test_problems_of_one_difficulty_count_every_sample():
  counts = np.random.default_rng(0).binomial(8, 0.3, size=4000)
  _, low, high = metrics_lib.proportion_interval(counts, 8)
  _, expected_low, expected_high = wilson(counts.sum(), 8 * 4000)
  assert high - low == pytest.approx(expected_high - expected_low, rel=0.05)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("right", [0, 1])
def test_the_interval_has_width_where_all_are_right_or_all_wrong(right, samples):
  mean, low, high = metrics_lib.proportion_interval([right * samples] * 50, samples)
  assert mean == right and 0 <= low <= mean <= high <= 1
  assert high - low == pytest.approx(1.959963984540054**2 / (50 + 1.959963984540054**2))


@settings(max_examples=200, deadline=None)
@given(
  st.integers(1, 9).flatmap(
    lambda s: st.tuples(st.just(s), st.lists(st.integers(0, s), min_size=1))
  )
)
def test_the_interval_contains_its_mean_and_stays_within_0_and_1(case):
  samples, counts = case
  mean, low, high = metrics_lib.proportion_interval(counts, samples)
  assert 0 <= low <= mean <= high <= 1 and high > low
  assert mean == pytest.approx(sum(counts) / (samples * len(counts)))


@pytest.mark.parametrize(
  ("problems", "samples", "a", "b"),
  [
    (50, 1, 2.0, 2.0),
    (100, 4, 0.5, 0.5),
    (100, 4, 1.0, 4.0),
    (128, 8, 20.0, 20.0),
    (40, 8, 3.0, 1.0),
  ],
)
def test_the_interval_covers_the_truth_19_times_of_20(problems, samples, a, b):
  """Problems whose difficulty is drawn from Beta(a, b); the truth is the mean over all of them."""
  rng = np.random.default_rng(0)
  trials, truth, covered, naive = 2000, a / (a + b), 0, 0
  for _ in range(trials):
    counts = rng.binomial(samples, rng.beta(a, b, size=problems))
    _, low, high = metrics_lib.proportion_interval(counts, samples)
    covered += low <= truth <= high
    _, low, high = metrics_lib.proportion_interval(
      np.repeat([1, 0], [counts.sum(), problems * samples - counts.sum()]), 1
    )
    naive += low <= truth <= high
  # The share of 2000 trials is within 0.015 (three standard errors) of the coverage itself, which
  # for Wilson's interval is 0.95 give or take 0.01 at these sizes.
  assert abs(covered / trials - 0.95) < 0.025
  if (samples, a) == (4, 0.5):
    assert naive / trials < 0.85  # what counting every sample as a problem would do


def test_it_covers_the_truth_where_problems_have_different_numbers_of_samples():
  """1 to 8 of each; equal numbers are the case of one number for all."""
  rng, covered = np.random.default_rng(1), 0
  for _ in range(1000):
    samples = rng.integers(1, 9, size=100)
    counts = rng.binomial(samples, rng.beta(0.5, 0.5, size=100))
    mean, low, high = metrics_lib.proportion_interval(counts, samples)
    assert mean == pytest.approx(np.mean(counts / samples))
    covered += low <= 0.5 <= high
  assert abs(covered / 1000 - 0.95) < 0.01 + 3 * (0.95 * 0.05 / 1000) ** 0.5
  same = metrics_lib.proportion_interval([1, 3, 2], [4, 4, 4])
  assert same == metrics_lib.proportion_interval([1, 3, 2], 4)


@pytest.mark.parametrize(
  ("counts", "samples", "message"),
  [
    ([], 1, r"correct_counts has shape \(0,\)"),
    ([[1]], 1, r"correct_counts has shape \(1, 1\)"),
    ([3], 2, "must be within 0 and samples_per_problem"),
    ([-1], 2, "must be within 0"),
    ([float("nan")], 2, "must be within 0"),
    ([0], 0, "samples_per_problem is 0"),
    ([1, 1], [1, 0], r"samples_per_problem is \[1, 0\], must be at least 1"),
    ([1, 2], [2, 1], "must be within 0 and samples_per_problem"),
    ([1, 1], [1], r"samples_per_problem has shape \(1,\), must be one number, or \(2,\)"),
  ],
)
def test_impossible_counts_are_refused(counts, samples, message):
  with pytest.raises(ValueError, match=message):
    metrics_lib.proportion_interval(counts, samples)
