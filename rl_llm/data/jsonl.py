"""Rows of a JSONL file, each of them good or reported by file and line.

A data set of ten thousand rows has a few broken ones, and what a reader silently makes of them (a
BOM inside the first key, a second `"answer"` that replaces the first, half a character) is trained
into the model. So the rules are few and the same for every file, and a row that breaks one is
either an error or counted.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from rl_llm.errors import UserError

MAX_ROWS = 1_000_000
# What a file may hold: 50 times its size, and a small one this much. Text is compressed 3 to 30
# times, a file made to fill a memory 100,000 times.
_BYTES, _RATIO = 512 << 20, 50


class DataError(UserError, ValueError):
  """A file or a row of it cannot be used; the message begins with `path:line:`."""


class Rows(NamedTuple):
  """The good rows of a file.

  Attributes:
    rows: one dict per good row.
    lines: the line number of each, from 1.
    errors: one message `path:line: what; fix` per dropped row; always empty in strict reading.
  """

  rows: tuple[dict[str, Any], ...]
  lines: tuple[int, ...]
  errors: tuple[str, ...]


class Bounds:
  """Counts what is read of a file, and stops where it is more than a file of its size may hold.

  Args:
    path: the file.
    max_rows: the most rows, broken and empty ones included.
  """

  def __init__(self, path: str, max_rows: int):
    self.path, self.max_rows, self.rows, self.bytes = path, max_rows, 0, 0
    self.max_bytes = max(_BYTES, _RATIO * os.path.getsize(path))

  def add(self, rows: int, size: int) -> None:
    """Counts rows that were read, and bytes of text.

    Raises:
      DataError: it is too much.
    """
    self.rows += rows
    self.bytes += size
    if self.rows > self.max_rows:
      raise TooMuchError(
        f"{self.path}: more than {self.max_rows} rows, the limit (max_rows); raise it, or split "
        "the file"
      )
    if self.bytes > self.max_bytes:
      raise TooMuchError(
        f"{self.path}: decompresses to more than {self.max_bytes >> 20} MiB, the most for a file "
        "of its size; write it as plain JSONL if that is right"
      )


class TooMuchError(DataError):
  """A file that holds more than is read: no matter of a single row."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(pairs)
  if len(row) != len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise DataError(f"the key {twice!r} appears twice; keep one")
  return row


def _no_constant(name: str) -> None:
  raise DataError(f"{name} is not JSON; write null or a number")


def _finite(number: str) -> float:
  value = float(number)
  if not math.isfinite(value):  # 1e400 is JSON, which Python reads as infinity.
    raise DataError(f"{number:.40} is more than a float can hold; write it as text, or null")
  return value


def check_text(value: Any) -> None:
  """Refuses text, at any depth, that no tokenizer or file can carry."""
  if isinstance(value, str):
    if "\0" in value:
      raise DataError("text contains a NUL character; remove it")
    if any("\ud800" <= character <= "\udfff" for character in value):
      raise DataError(
        "text contains half a character (a lone surrogate); repair the text's encoding"
      )
  elif isinstance(value, dict):
    for key, inner in value.items():
      check_text(key)
      check_text(inner)
  elif isinstance(value, list):
    for inner in value:
      check_text(inner)


def _parse(line: bytes) -> dict[str, Any]:
  try:
    text = line.decode("utf-8")
  except UnicodeDecodeError as error:
    raise DataError(
      f"not UTF-8 at byte {error.start + 1} of the line; convert the file to UTF-8"
    ) from None
  if "\0" in text:
    raise DataError("contains a NUL byte; remove it")
  try:
    hooks = {"parse_float": _finite, "parse_constant": _no_constant}
    row = json.loads(text, object_pairs_hook=_unique, **hooks)
  except json.JSONDecodeError as error:
    raise DataError(
      f"not JSON: {error.msg} at column {error.colno}; write one JSON object per line"
    ) from None
  except RecursionError:
    raise DataError("nested too deeply; flatten it") from None
  except DataError:
    raise
  except ValueError as error:  # an integer of thousands of digits
    raise DataError(f"not usable: {error}; write it as text") from None
  if not isinstance(row, dict):
    raise DataError(f"a JSON {type(row).__name__}; every line must be an object {{...}}")
  check_text(row)
  return row


def read_rows(
  path: str,
  *,
  check: Callable[[dict[str, Any]], str] = lambda row: "",
  strict: bool = True,
  max_row_bytes: int = 4 << 20,
  max_rows: int = MAX_ROWS,
) -> Rows:
  r"""Reads JSONL, plain or gzip, one object per line.

  The rules: a byte order mark at the start is skipped; lines end in LF or CRLF; blank lines are
  skipped. A row is broken if it is not UTF-8, not a JSON object, has a key twice, NaN or Infinity,
  a NUL, a lone surrogate, more than `max_row_bytes`, or if `check` says so. The text U+2028 does
  not end a line.

  >>> import tempfile
  >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
  ...   _ = file.write('{"prompt": "1+1?"}\n\n{"prompt": "1+2?", "prompt": "2+2?"}\n'); file.flush()
  ...   found = read_rows(file.name, strict=False)
  >>> found.rows, found.lines
  (({'prompt': '1+1?'},), (1,))
  >>> found.errors[0].partition(":")[2]
  "3: the key 'prompt' appears twice; keep one"

  Args:
    path: the file; compressed if its first bytes say so, whatever its name.
    check: what is wrong with a parsed row and how to repair it, "" if nothing: missing keys, wrong
      types.
    strict: whether the first broken row is an error; otherwise broken rows are dropped, each with
      its message.
    max_row_bytes: longest line, in bytes; a longer one is never held in memory.
    max_rows: the most lines. What a gzip file holds is limited too, by its size.

  Returns:
    The good rows, their line numbers, and the messages of those dropped.

  Raises:
    DataError: no such file, a damaged gzip stream, more in it than is read, no good row, or
      (strict) a broken row.
  """
  rows, lines, errors = [], [], []
  number = 0
  try:
    with open(path, "rb") as raw:
      bounds = Bounds(path, max_rows)
      start = raw.read(2)
      raw.seek(0)
      with gzip.open(raw, "rb") if start == b"\x1f\x8b" else raw as file:
        while line := file.readline(max_row_bytes + 2):
          number += 1
          bounds.add(1, len(line))
          try:
            if len(line.rstrip(b"\r\n")) > max_row_bytes:
              while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
                bounds.add(0, len(line))
              raise DataError(f"longer than {max_row_bytes} bytes; split or remove it")
            if number == 1:
              line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip(b" \t\r\n"):
              continue
            row = _parse(line.rstrip(b"\r\n"))
            if problem := check(row):
              raise DataError(problem)
            rows.append(row)
            lines.append(number)
          except TooMuchError:
            raise
          except DataError as error:
            if strict:
              raise DataError(f"{path}:{number}: {error}") from None
            errors.append(f"{path}:{number}: {error}")
  except FileNotFoundError:
    raise DataError(f"{path}: no such file; looked in {os.getcwd()}") from None
  except ValueError as error:
    if isinstance(error, DataError) or "\0" not in path:
      raise
    raise DataError(f"{path!r}: no file has a name with NUL in it; check the path") from None
  except IsADirectoryError:
    raise DataError(f"{path}: a directory; give the path of a .jsonl file") from None
  except PermissionError:
    raise DataError(f"{path}: not readable by this user; change its permissions") from None
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise DataError(
      f"{path}:{number + 1}: damaged gzip stream ({error}); fetch the file again"
    ) from None
  if not rows:
    dropped = f" ({len(errors)} broken; the first: {errors[0]})" if errors else ""
    raise DataError(f"{path}: no usable row{dropped}; write one JSON object per line")
  return Rows(tuple(rows), tuple(lines), tuple(errors))
