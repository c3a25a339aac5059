"""Rows of a Parquet file, held to the rules of `read_rows`: what JSON cannot say is broken."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from rl_llm.data.jsonl import MAX_ROWS, Bounds, DataError, Rows, check_text, read_rows


def read_table(
  path: str,
  *,
  check: Callable[[dict[str, Any]], str] = lambda row: "",
  strict: bool = True,
  max_row_bytes: int = 4 << 20,
  max_rows: int = MAX_ROWS,
) -> Rows:
  """`read_parquet` where the file's first bytes say Parquet, else `read_rows`."""
  read = read_rows
  if os.path.isfile(path) and os.access(path, os.R_OK):
    with open(path, "rb") as file:
      read = read_parquet if file.read(4) == b"PAR1" else read_rows
  return read(path, check=check, strict=strict, max_row_bytes=max_row_bytes, max_rows=max_rows)


def read_parquet(
  path: str,
  *,
  check: Callable[[dict[str, Any]], str] = lambda row: "",
  strict: bool = True,
  max_row_bytes: int = 4 << 20,
  max_rows: int = MAX_ROWS,
) -> Rows:
  """Reads Parquet, with row numbers from 1 in the place of line numbers.

  Parquet has a value in every column of every row, so a missing one is null. A null column stays,
  as None, but null keys inside messages and other nested values are left out, since a chat template
  would take `"tool_calls": null` for a call. A row is broken by a value that JSON cannot express (a
  date, bytes, NaN), by NUL characters, by text that is not UTF-8, or by its size.

  Args:
    path: the file.
    check: as for `read_rows`.
    strict: as for `read_rows`.
    max_row_bytes: the longest row, in bytes of its JSON.
    max_rows: the most rows. What the file may hold in all is limited too, by its size.

  Returns:
    As `read_rows`.

  Raises:
    DataError: not a Parquet file, a damaged one, a column twice, more in it than is read, no good
      row, the package pyarrow is missing, or (strict) a broken row.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise DataError(
      f"{path}: Parquet needs the package pyarrow (the extra parquet): pip install pyarrow"
    ) from None
  rows, lines, errors = [], [], []
  number = 0
  try:
    with _opened(path, max_rows) as file:
      names = file.schema_arrow.names
      if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: the column {twice[0]!r} appears twice; keep one")
      bounds = Bounds(path, max_rows)
      for batch in file.iter_batches(batch_size=1024):
        size = sum(map(_decoded_bytes, batch.columns))
        bounds.add(batch.num_rows, size)
        for read_row in _row_readers(batch, together=size <= _AT_ONCE):
          number += 1
          try:
            row = {name: _without_nulls(value) for name, value in _row(read_row).items()}
            _check_json(row, max_row_bytes)
            if problem := check(row):
              raise DataError(problem)
            rows.append(row)
            lines.append(number)
          except DataError as error:
            if strict:
              raise DataError(f"{path}:{number}: {error}") from None
            errors.append(f"{path}:{number}: {error}")
  except FileNotFoundError:
    raise DataError(f"{path}: no such file; looked in {os.getcwd()}") from None
  except (pyarrow.ArrowException, OSError) as error:
    said = " ".join(str(error).split())
    raise DataError(
      f"{path}:{number + 1}: not a Parquet file, or damaged ({said:.200}); fetch the file again"
    ) from None
  if not rows:
    dropped = f" ({len(errors)} broken; the first: {errors[0]})" if errors else ""
    raise DataError(f"{path}: no usable row{dropped}; write at least one")
  return Rows(tuple(rows), tuple(lines), tuple(errors))


_AT_ONCE = 64 << 20  # bytes of text that a batch may have to be converted as a whole


def _opened(path: str, max_rows: int) -> Any:
  """The file, whose texts stay as they are stored: each that is repeated is there once.

  A thousand rows of one text of 1.5 MB take 4 MB so, and fit into a file of 1,400 bytes.
  """
  import pyarrow.parquet

  with pyarrow.parquet.ParquetFile(path) as file:
    stored, columns = file.metadata, file.schema
    groups = map(stored.row_group, range(stored.num_row_groups))
    Bounds(path, max_rows).add(stored.num_rows, sum(group.total_byte_size for group in groups))
    leaves = map(columns.column, range(len(columns)))
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
  return pyarrow.parquet.ParquetFile(path, read_dictionary=texts)


def _decoded_bytes(array: Any) -> int:
  """How much memory a column takes with every repeated text written out."""
  import pyarrow
  import pyarrow.compute as compute

  if isinstance(array, pyarrow.DictionaryArray):
    lengths = compute.take(compute.binary_length(array.dictionary), array.indices)
    return compute.sum(lengths).as_py() or 0
  if isinstance(array, pyarrow.StructArray):
    return sum(_decoded_bytes(array.field(i)) for i in range(array.type.num_fields))
  if isinstance(array, (pyarrow.ListArray, pyarrow.LargeListArray)):
    return array.nbytes - array.values.nbytes + _decoded_bytes(array.flatten())
  return array.nbytes


def _row_readers(batch, *, together: bool) -> Iterator[Callable[[], dict[str, Any]]]:
  """One function per row: converting all at once is fast, but one bad text spoils the batch."""
  rows = None
  if together:
    try:
      rows = batch.to_pylist()
    except (ValueError, OverflowError):  # OverflowError: a date beyond the year 9999.
      pass
  for index in range(batch.num_rows):
    if rows is None:
      yield lambda index=index: batch.slice(index, 1).to_pylist()[0]
    else:
      yield lambda index=index: rows[index]


def _row(read_row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  try:
    return read_row()
  except UnicodeDecodeError:
    raise DataError("text that is not UTF-8; convert it") from None
  except (ValueError, OverflowError) as error:
    raise DataError(f"not usable: {error}; write it as text") from None


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
  return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _check_json(row: dict[str, Any], max_row_bytes: int) -> None:
  try:
    size = len(json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace"))
  except TypeError as error:
    raise DataError(f"not JSON: {error}; write it as text or a number") from None
  except ValueError:
    raise DataError("NaN or Infinity is not JSON; write null or a number") from None
  if size > max_row_bytes:
    raise DataError(f"longer than {max_row_bytes} bytes; split or remove it")
  check_text(row)
