"""A small file that holds far too much stops at a stated bound, in little memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rl_llm.data import DataError, read_dataset, read_rows, read_table
from rl_llm.data.jsonl import MAX_ROWS
from rl_llm.tasks import TaskError, load_task
from rl_llm.tasks.jsonl import JsonlOptions
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent
ROW = b'{"prompt": "a", "completion": "b"}\n'


def zipped(path, count, line=ROW):
  """`count` lines; each block of a million is compressed once."""
  block = gzip.compress(line * 1_000_000)
  path.write_bytes(block * (count // 1_000_000) + gzip.compress(line * (count % 1_000_000)))
  return str(path)


def test_six_million_rows_in_a_small_file(tmp_path):
  path = zipped(tmp_path / "rows.jsonl.gz", 6_000_000, b"{}\n")
  assert Path(path).stat().st_size < 200_000
  assert MAX_ROWS < 6_000_000
  with pytest.raises(DataError, match=r"more than 50000 rows, the limit \(max_rows\)"):
    read_rows(path, max_rows=50_000)


@pytest.mark.parametrize("line", [b"\n", b" " * 2000 + b"\n", b"x" * 999_999])
def test_what_is_no_row_counts_too(tmp_path, line, monkeypatch):
  """Empty lines, and one that never ends."""
  monkeypatch.setattr("rl_llm.data.jsonl._BYTES", 1 << 20)
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(gzip.compress(ROW + line * (10_000 if len(line) < 10_000 else 20)))
  for strict in (True, False):
    with pytest.raises(DataError, match="more than 5000 rows|more than 1 MiB"):
      read_rows(str(path), strict=strict, max_rows=5_000, max_row_bytes=1 << 16)


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet"])
def test_the_bound_is_exact_and_a_setting(tmp_path, kind):
  path = tmp_path / f"rows.{kind}"
  if kind == "parquet":
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow.Table.from_pylist([json.loads(ROW)] * 20), path)
  else:
    path.write_bytes(ROW * 20 if kind == "jsonl" else gzip.compress(ROW * 20))
  assert len(read_table(str(path), max_rows=20).rows) == 20
  assert len(read_dataset(str(path), max_rows=20).examples) == 20
  for read in (read_table, read_dataset):
    with pytest.raises(DataError, match=f"{path}: more than 19 rows.*raise it"):
      read(str(path), max_rows=19)
  options = {"reward_function": "exact_match", "held_out_fraction": 0.0}
  load_task(f"jsonl:{path}", **options, max_rows=20)
  with pytest.raises(DataError, match="more than 19 rows"):
    load_task(f"jsonl:{path}", **options, max_rows=19)
  with pytest.raises(TaskError, match="jsonl.max_rows=0: must be at least 1"):
    JsonlOptions(max_rows=0)


BOMB = r"""
import re, sys
from rl_llm.data import DataError, read_table
try:
  read_table(sys.argv[1], strict=False)
except DataError as error:
  peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())
  print(int(peak[1]) >> 10, error)
"""


@pytest.mark.parametrize("nested", [False, True])
def test_a_parquet_file_of_1_gb_in_few_bytes(tmp_path, nested):
  """One text of 1.5 MB a thousand times."""
  arrow = pytest.importorskip("pyarrow")
  pq = pytest.importorskip("pyarrow.parquet")
  column = arrow.DictionaryArray.from_arrays([0] * 1000, ["x" * 1_500_000])
  if nested:
    turns = arrow.StructArray.from_arrays([column], ["content"])
    column = arrow.ListArray.from_arrays(list(range(1001)), turns)
  path = tmp_path / "rows.parquet"
  pq.write_table(arrow.table({"prompt": column}), path, compression="zstd")
  assert path.stat().st_size < 25_000
  done = subprocess.run(
    [sys.executable, "-c", BOMB, str(path)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=PATIENCE,
  )
  megabytes, _, said = done.stdout.partition(" ")
  assert "decompresses to more than 512 MiB, the most for a file of its size" in said, done.stderr
  assert int(megabytes) < 600


def test_texts_that_repeat_within_bounds_are_read(tmp_path, monkeypatch):
  """Row by row, where a batch as a whole would take too much."""
  arrow = pytest.importorskip("pyarrow")
  pq = pytest.importorskip("pyarrow.parquet")
  rows = [
    {"prompt": "ab"[i % 2] * 500, "n": [{"x": None, "y": "z" * 9}], "i": i} for i in range(64)
  ]
  path = tmp_path / "rows.parquet"
  pq.write_table(arrow.Table.from_pylist(rows), path)
  whole = read_table(str(path)).rows
  monkeypatch.setattr("rl_llm.data.parquet._AT_ONCE", 1000)
  assert read_table(str(path)).rows == whole
  assert whole[1] == {"prompt": "b" * 500, "n": [{"y": "z" * 9}], "i": 1}


def test_a_name_with_nul(tmp_path):
  with pytest.raises(DataError, match="NUL"):
    read_rows("a\0b")
