"""The files of a tokenizer: read from its own directory alone, and refused in one line."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from rl_llm.errors import UserError, one_line
from rl_llm.files import leads_outside


class TokenizerError(UserError, ValueError):
  """A tokenizer cannot be loaded, or cannot encode its input; one line says why."""


_MOST_GROWTH = 1000


def refuse_bombs(path: str | pathlib.Path, entries: dict[str, Any]) -> None:
  """Refuses a tokenizer.json that makes long texts of short ones.

  Each of 40 replacements of "a" by "aa" is harmless; together they make a terabyte of one letter.
  So the growth of all replacements and insertions is multiplied, and of real tokenizers it is 1.

  >>> double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
  >>> refuse_bombs("", {"normalizer": {"type": "Sequence", "normalizers": [double] * 9}})
  >>> decoder = {"type": "Sequence", "decoders": [double] * 10}
  >>> refuse_bombs("bomb", {"decoder": decoder})  # doctest: +ELLIPSIS
  Traceback (most recent call last):
  rl_llm.text.tokenizer_files.TokenizerError: bomb: its decoder makes texts over 1000 times as...

  Args:
    path: of the file, for the error.
    entries: what it holds.

  Raises:
    TokenizerError: the normalizer or the decoder makes texts over 1,000 times as long.
  """

  def growth(part: Any) -> float:
    if not isinstance(part, dict):
      return 1.0
    found, content, pattern = 1.0, part.get("content"), part.get("pattern")
    if isinstance(content, str):
      text = pattern.get("String") if isinstance(pattern, dict) else None
      # A regular expression may match nothing at every place.
      found = len(content) / len(text) if isinstance(text, str) and text else 1 + len(content)
    if isinstance(prepended := part.get("prepend"), str):
      found = 1 + len(prepended)
    return max(found, 1.0) * math.prod(
      growth(inner) for value in part.values() if isinstance(value, list) for inner in value
    )

  for name in ("normalizer", "pre_tokenizer", "decoder"):
    if growth(entries.get(name)) > _MOST_GROWTH:
      raise TokenizerError(
        f"{path}: its {name} makes texts over {_MOST_GROWTH} times as long, which no model's does; "
        "use a tokenizer from its author"
      )


def tried(failure: str, read: Callable[[], Any]) -> Any:
  """What the package tokenizers makes of a file; it raises bare Exception, or Rust's
  panics."""
  try:
    return read()
  except BaseException as error:
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise TokenizerError(f"{failure}: {one_line(str(error)):.200}") from None


def is_inside(path: pathlib.Path) -> bool:
  """Whether the file of a model directory is there; one that leads outside of it is refused."""
  if os.path.lexists(path) and leads_outside(path.parent, path.name):
    raise TokenizerError(
      f"{path}: leads outside the model directory, which is never read; copy the real files into "
      "one directory (cp -rL)"
    )
  return path.is_file()


def read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise TokenizerError(
      f"{path}: not UTF-8 at byte {error.start}; convert it, or download it again"
    ) from None
  except OSError as error:
    raise TokenizerError(
      f"{path}: cannot be read: {error.strerror}; check its permissions"
    ) from None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  if not is_inside(path):
    return {}
  text = read_text(path)
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise TokenizerError(f"{path}: not JSON: {error}") from None
  if not isinstance(value, dict):
    raise TokenizerError(f"{path}: must hold a JSON object, has a {type(value).__name__}")
  return value
