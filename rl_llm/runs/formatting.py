"""Numbers, times and a model's words as a person reads them: short, literal and safe to show.

The display of a run, its report, its trackers and the tables of a sweep show the same figures in
the same form. This module imports no display, so that whoever only writes text needs none.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from rl_llm.errors import redact


def printable(text: str, *, limit: int | None = None, keep_newlines: bool = False) -> str:
  r"""The text in a form that is safe to show anywhere: every character is visible, none acts.

  Control characters, invisible characters, direction changes and lone surrogates become escapes;
  credentials are redacted. A text over the limit loses its middle, since a prompt's question is
  often at its end.

  >>> printable("\x1b[31mred\x1b[0m\n")
  '\\x1b[31mred\\x1b[0m\\n'
  >>> printable("0123456789" * 5, limit=20)
  '01234567890 ... 6789'

  Args:
    text: anything, as a model wrote it.
    limit: the most characters to show, at least 12; None for all.
    keep_newlines: whether to keep line ends, where the text may take several lines.

  Returns:
    The text; it encodes as UTF-8.
  """
  text = redact(text)
  if limit is not None and len(text) > limit:
    tail = limit // 5
    text = f"{text[: limit - tail - 5]} ... {text[len(text) - tail :]}"
  return "".join(
    ch if ch.isprintable() or (keep_newlines and ch == "\n") else _escape(ch) for ch in text
  )


def _escape(character: str) -> str:
  # A non-ASCII space is only wide or narrow; any other unprintable character has an effect or is
  # invisible.
  if unicodedata.category(character) == "Zs":
    return " "
  return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def data_size(count: float) -> str:
  """Formats a number of bytes for a person, in units of 1000.

  >>> data_size(512), data_size(1_620_000_000)
  ('0.000512 MB', '1.62 GB')
  """
  return f"{number(count / 1e9)} GB" if count >= 1e9 else f"{number(count / 1e6)} MB"


def number(value: Any, digits: int = 3) -> str:
  """Formats a number for a person: few digits, and a dash for None.

  >>> number(0.123456), number(1234.5), number(12), number(2e-5), number(None), number("nan")
  ('0.123', '1234', '12', '2e-5', '-', 'nan')
  >>> number(163.2, 2), number(99.7, 2), number(1e7)
  ('163', '100', '1e7')

  Args:
    value: a number, a record's text for a non-finite number, or None.
    digits: significant digits of a fraction.

  Returns:
    A short text.
  """
  if value is None:
    return "-"
  if isinstance(value, int):
    return str(value)
  value = float(value)
  text = f"{value:.{digits}g}"
  if "e" in text and 1 <= abs(value) < 1e6:
    text = f"{value:.0f}"
  return text.replace("e-0", "e-").replace("e+0", "e")


def duration(seconds: float) -> str:
  """Formats a time for a person.

  >>> duration(42.4), duration(600), duration(9000)
  ('42s', '10m', '2.5h')

  Args:
    seconds: a time in seconds.

  Returns:
    Seconds, minutes or hours, whichever reads best.
  """
  if seconds < 120:
    return f"{seconds:.0f}s"
  return f"{seconds / 60:.0f}m" if seconds < 7200 else f"{seconds / 3600:.1f}h"
