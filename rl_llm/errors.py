"""Errors that the user can fix, reported in one line without a traceback."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(
  r"(?<![A-Za-z0-9])("
  r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v\d_[A-Za-z0-9_]{16,}|[0-9a-f]{40}"
  r"|gh[opsu]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}"
  r")(?![A-Za-z0-9])"
)
_SECRET_NAME = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.I)


class UserError(Exception):
  """A setting, a file or a device that cannot be used; the message names it and the fix.

  Every error of this kind in the library derives from it, so a command, a launcher or another
  project catches one class and prints `error: ...` with exit code 2 instead of a traceback.
  """


def redact(text: str, *, environ: Mapping[str, str] | None = None) -> str:
  """Replaces what looks like a credential by "[redacted]"; every writer of this library calls it.

  A token given as a flag, or repeated by a model that saw it in a prompt, must not end up in a
  report that is shared. Two rules find them: the published shapes of tokens (`hf_...`, `sk-...`,
  W&B's 40 hexadecimal digits, GitHub, AWS, Google), and the exact values, of 8 characters or more,
  of environment variables named like a secret (`HF_TOKEN`, `WANDB_API_KEY`, `DB_PASSWORD`).

  >>> redact("push with hf_abcdefghijklmnopqrstuvwx")
  'push with [redacted]'
  >>> redact("password hunter22", environ={"DB_PASSWORD": "hunter22"})
  'password [redacted]'

  Args:
    text: any text about to be printed or written.
    environ: name -> value; the process environment when None.

  Returns:
    The text, with each credential replaced.
  """
  for name, value in (os.environ if environ is None else environ).items():
    if len(value) >= 8 and value in text and _SECRET_NAME.search(name):
      text = text.replace(value, "[redacted]")
  return _TOKEN.sub("[redacted]", text)


class ConfigError(UserError, ValueError):
  """A setting that cannot work, in one line: the field, the value, what is allowed, the fix.

  >>> print(ConfigError("batch", 6, "a multiple of microbatch (4)", "try --batch=8"))
  --batch=6: must be a multiple of microbatch (4); try --batch=8

  Args:
    field: dotted path of the field, which is also its flag.
    value: what was given.
    allowed: what is accepted, phrased to follow "must be".
    fix: what to type instead; may be empty.
  """

  def __init__(self, field: str, value: Any, allowed: str, fix: str = ""):
    self.field, self.value, self.allowed, self.fix = field, value, allowed, fix
    shown = "none" if value is None else redact(str(value))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    text = f"--{field}={shown}: must be {allowed}" + (f"; {fix}" if fix else "")
    super().__init__(one_line(redact(text)))


def one_line(text: str) -> str:
  return " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())
