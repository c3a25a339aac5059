"""The header of a GGUF file: its metadata, and whether what it claims fits into the file.

Every count in it may be damaged, or made to be followed forever. None is believed before the bytes
that it stands for are found to be there.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

_SCALARS = {
  0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SMALLEST_FIELD = 13  # bytes: a name's length, a kind, and a value of one byte
_SMALLEST_TENSOR = 24  # bytes: a name's length, the number of dimensions, a kind and a place
_MOST_DIMENSIONS = 4


def metadata(path: str | os.PathLike) -> dict[str, Any]:
  """The key-value header of a GGUF file, without touching the tensors.

  Read here rather than with the package gguf, which makes an array of each of the 98,000 strings of
  SmolLM2's header: 3 s against 0.1 s.

  Args:
    path: the file.

  Raises:
    OSError: it cannot be read.
    ValueError: it is no GGUF file, or damaged.
  """
  with _header(path) as header:
    return header.fields()[0]


def check(path: str | os.PathLike) -> None:
  """Refuses a file whose header claims more than the file holds.

  Args:
    path: the file.

  Raises:
    OSError, ValueError: as for `metadata`; or a tensor has more dimensions or numbers than can be.
  """
  with _header(path) as header:
    _, count = header.fields()
    header.refuse_over(count * _SMALLEST_TENSOR, "tensors")
    names, size = set(), len(header.data)
    for _ in range(count):
      name, (dimensions,) = header.string(), header.unpack("I")
      if name in names or dimensions > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name!r:.60} is there twice, or has {dimensions} dimensions")
      names.add(name)
      shape = header.unpack(f"{dimensions}Q")
      _, start = header.unpack("IQ")
      # No quantisation stores a number in less than a bit.
      if start > size or math.prod(shape) > 8 * size:
        raise ValueError(f"tensor {name!r:.60} of shape {shape} does not fit into {size} bytes")


@contextlib.contextmanager
def _header(path: str | os.PathLike) -> Iterator[_Header]:
  if "\0" in os.fspath(path):
    raise ValueError("no file has a name with NUL in it")
  with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    try:
      yield _Header(data)
    except (struct.error, OverflowError, MemoryError) as error:
      raise ValueError(str(error)) from None


class _Header:
  """Reads consecutive little-endian values in the layout of the GGUF specification."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def fields(self) -> tuple[dict[str, Any], int]:
    """(the metadata, the number of tensors, whose descriptions follow)."""
    if self.data[:4] != b"GGUF":
      raise ValueError("it does not begin with GGUF")
    self.at = 4
    version, tensors, count = self.unpack("IQQ")
    if version not in (2, 3):
      raise ValueError(f"GGUF version {version}, known are 2 and 3")
    self.refuse_over(count * _SMALLEST_FIELD, "fields")
    fields = {}
    for _ in range(count):
      key = self.string()
      fields[key] = self.value(*self.unpack("I"))
    return fields, tensors

  def refuse_over(self, size: int, what: str) -> None:
    """Refuses a size in bytes that reaches beyond the end of the file."""
    if size > len(self.data) - self.at:
      raise ValueError(f"its {what} at byte {self.at} go past the end")

  def unpack(self, form: str) -> tuple:
    values = struct.unpack_from(f"<{form}", self.data, self.at)
    self.at += struct.calcsize(f"<{form}")
    return values

  def string(self) -> str:
    (length,) = self.unpack("Q")
    self.refuse_over(length, "text")
    self.at += length
    return self.data[self.at - length : self.at].decode()

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind in _SCALARS:
      return self.unpack(_SCALARS[kind])[0]
    if kind != _ARRAY:
      raise ValueError(f"a value of the unknown kind {kind} before byte {self.at}")
    kind, length = self.unpack("IQ")
    if kind == _STRING:
      self.refuse_over(length * struct.calcsize("<Q"), "texts")
      return [self.string() for _ in range(length)]
    if kind in _SCALARS:
      self.refuse_over(length * struct.calcsize(f"<{_SCALARS[kind]}"), "numbers")
      return list(self.unpack(f"{length}{_SCALARS[kind]}"))
    raise ValueError(f"an array of the unknown kind {kind} before byte {self.at}")
