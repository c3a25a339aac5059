"""Parquet: the rules of JSONL hold, and what JSON has no form for is broken."""

import datetime

import pytest

from rl_llm.data import DataError, read_dataset, read_parquet, read_table
from rl_llm.rewards import RewardPool
from rl_llm.tasks import load_task

arrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, table):
  pq.write_table(table, path)
  return str(path)


def test_rows_and_nulls(tmp_path):
  rows = [
    {"prompt": "a", "n": 1, "m": [{"role": "x", "name": None}]},
    {"prompt": "b", "n": None, "m": [{"role": "y", "name": "z"}]},
  ]
  path = write(tmp_path / "rows.parquet", arrow.Table.from_pylist(rows))
  found = read_table(path)
  rows[0]["m"] = [{"role": "x"}]
  assert found == (tuple(rows), (1, 2), ())


def test_broken_rows_are_named_or_counted_over_many_batches(tmp_path):
  count = 3_000
  texts = [f"q{n}" for n in range(1, count + 1)]
  texts[1_500], texts[2_999] = "a\0b", None
  numbers = [0.5] * count
  numbers[10] = float("nan")
  table = arrow.table({"prompt": texts, "x": numbers})
  path = write(tmp_path / "rows.parquet", table)
  with pytest.raises(DataError, match="rows.parquet:11: NaN or Infinity is not JSON"):
    read_dataset(path)
  found = read_dataset(path, strict=False)
  assert found.lines == tuple(n for n in range(1, count + 1) if n not in (11, 1_501, 3_000))
  said = ["11: NaN or Infinity is not JSON", "1501: text contains a NUL", "3000: 'prompt' is null"]
  for error, start in zip(found.errors, said, strict=True):
    assert error.startswith(f"{path}:{start}")


def test_text_that_is_not_utf8_spoils_its_row_alone(tmp_path):
  data = arrow.array([b"a", b"\xff", b"c"]).cast(arrow.binary())
  text = arrow.Array.from_buffers(arrow.string(), 3, data.buffers())
  path = write(tmp_path / "rows.parquet", arrow.table({"prompt": text}))
  found = read_parquet(path, strict=False)
  assert found.lines == (1, 3) and found.rows == ({"prompt": "a"}, {"prompt": "c"})
  assert found.errors == (f"{path}:2: text that is not UTF-8; convert it",)


@pytest.mark.parametrize(
  "values, said",
  [
    ([datetime.date(2026, 1, 2)], "not JSON: Object of type date"),
    ([b"x"], "not JSON: Object of type bytes"),
    (arrow.array([10**18], arrow.timestamp("us")), "not usable: date value out of range; write it"),
    (["x" * 5_000_000], "longer than 4194304 bytes"),
  ],
)
def test_values_json_has_no_form_for(tmp_path, values, said):
  path = write(tmp_path / "rows.parquet", arrow.table({"prompt": ["a"], "x": values}))
  with pytest.raises(DataError, match=f"rows.parquet:1: {said}"):
    read_parquet(path)
  with pytest.raises(DataError, match="no usable row"):
    read_parquet(path, strict=False)


def test_files_that_cannot_be_used(tmp_path):
  table = arrow.table([["a"], ["b"]], names=["prompt", "prompt"])
  with pytest.raises(DataError, match="the column 'prompt' appears twice"):
    read_table(write(tmp_path / "twice.parquet", table))
  path = write(tmp_path / "rows.parquet", arrow.table({"prompt": ["a"] * 100}))
  content = (tmp_path / "rows.parquet").read_bytes()
  (tmp_path / "rows.parquet").write_bytes(content[: len(content) // 2])
  with pytest.raises(DataError, match="rows.parquet:1: not a Parquet file, or damaged"):
    read_table(path)
  with pytest.raises(DataError, match="absent.parquet: no such file"):
    read_parquet(str(tmp_path / "absent.parquet"))


def test_columns_reach_the_reward_function(tmp_path):
  rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(4)]
  path = write(tmp_path / "rows.parquet", arrow.Table.from_pylist(rows))
  task = load_task(f"jsonl:{path}", reward_function="exact_match", held_out_fraction=0.0)
  problems = task.sample(0, 0, 4)
  texts = [str(int(p.prompt[0]) + 1) for p in problems[:3]] + ["no"]
  with RewardPool(task.reward, workers=1) as pool:
    results = pool.score([p.prompt for p in problems], texts, [p.columns for p in problems])
  assert [result.value for result in results] == [1.0, 1.0, 1.0, 0.0]
