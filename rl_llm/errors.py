"""Errors that the user can fix, reported in one line without a traceback."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any

_TOKEN = re.compile(
  r"(?<![A-Za-z0-9])("
  r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_v\d_[A-Za-z0-9_]{16,}|[0-9a-f]{40}"
  r"|gh[opsu]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|A[KS]IA[A-Z0-9]{16}"
  r"|AIza[A-Za-z0-9_-]{35}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}|glpat-[A-Za-z0-9_-]{16,}"
  r"|xox[abeoprs]-[A-Za-z0-9-]{10,}|[sr]k_(live|test)_[A-Za-z0-9]{16,}"
  r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # A JSON Web Token.
  r")(?![A-Za-z0-9])"
  # A private key to its end; the line ends may be written as in JSON.
  r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[A-Za-z0-9+/=:,.\\\s-]*"
  r"|(?<=:/hooks\.slack\.com/)[\w/-]+|(?<=//hooks\.slack\.com/)[\w/-]+"
  r"|(?<=/api/webhooks/)\d+/[\w-]+"
  # user:password of an address, also of one that was taken for a path and so lost a slash.
  r"|(?:(?<=://)|(?<=:/))[^\s/:@\"']*:[^\s/@\"']+(?=@)"
)
_SECRET_NAME = re.compile(
  r"(API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SECRET_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE"
  r"|MYSQL_PWD|CREDENTIALS?|WEBHOOK(_URL)?|DSN|(DATABASE|DB|REDIS|MONGO(DB)?|BROKER|AMQP)_UR[IL])$",
  re.I,
)
_SHORT = 8  # characters; shorter values are replaced where they are words of their own
_JSON_WORD = re.compile(r"true|false|null|-?[\d.]+([eE][+-]?\d+)?")


@functools.cache
def _is_secret(name: str) -> bool:
  return _SECRET_NAME.search(name) is not None


class UserError(Exception):
  """A setting, a file or a device that cannot be used; the message names it and the fix.

  Every error of this kind in the library derives from it, so a command, a launcher or another
  project catches one class and prints `error: ...` with exit code 2 instead of a traceback.
  """


def secrets() -> dict[str, str]:
  """The environment's variables that are named like a secret, for `redact` of many texts at once.

  Python decodes the environment at every reading, which takes longer than redacting a short text.
  """
  return {name: os.environ[name] for name in os.environ if _is_secret(name)}


def redact(text: str, *, environ: Mapping[str, str] | None = None) -> str:
  """Replaces what looks like a credential by "[redacted]"; every writer of this library calls it.

  A token given as a flag, or repeated by a model that saw it in a prompt, must not end up in a
  report that is shared. Two rules find them: the published shapes of tokens (`hf_...`, `sk-...`,
  W&B's 40 hexadecimal digits, GitHub, GitLab, npm, PyPI, Slack, AWS, Google, JSON Web Tokens,
  private keys, webhooks, passwords in addresses), and the exact values of environment variables
  named like a secret (`HF_TOKEN`, `PGPASSWORD`, `DATABASE_URL`). Values of 4 to 7 characters are
  replaced where they are words of their own and no numbers; shorter ones are too likely to be text.

  >>> redact("push with hf_abcdefghijklmnopqrstuvwx")
  'push with [redacted]'
  >>> redact("password hunter22", environ={"DB_PASSWORD": "hunter22"})
  'password [redacted]'
  >>> redact("postgres://me:pw@host/db and tokens", environ={"API_TOKEN": "token"})
  'postgres://[redacted]@host/db and tokens'
  >>> redact("no such file: postgres:/me:pw@host/db, https:/hooks.slack.com/services/T0/B0/X")
  'no such file: postgres:/[redacted]@host/db, https:/hooks.slack.com/[redacted]'

  Args:
    text: any text about to be printed or written.
    environ: name -> value; the process environment when None. Whoever redacts many texts reads it
      once: `environ=secrets()`.

  Returns:
    The text, with each credential replaced.
  """
  for name, value in (secrets() if environ is None else environ).items():
    if len(value) < 4 or not _is_secret(name):
      continue
    # Texts that are JSON have quotes and backslashes escaped.
    for written in {value, json.dumps(value)[1:-1]}:
      if written not in text:
        continue
      if len(value) >= _SHORT:
        text = text.replace(written, "[redacted]")
      elif not _JSON_WORD.fullmatch(value):
        text = re.sub(rf"(?<!\w){re.escape(written)}(?!\w)", "[redacted]", text)
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
