"""What one run has compiled, the next one reads: a directory of compiled programs.

What lies there is executed, so it must belong to this user alone, and an entry counts only if it
still has the digest that was noted when it was written: a program cut short by a kill, or damaged
on disk, is removed and compiled again. Programs are compiled for one processor, so each kind of
machine has a directory of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import stat
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging as absl_logging
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from rl_llm.errors import ConfigError

LIMIT = 2 << 30  # Bytes; the oldest programs make room.
_DIGESTS = "sha256sums"


@contextlib.contextmanager
def kept(where: str) -> Iterator[Path | None]:
  """Keeps what is compiled within the block, and reads what earlier blocks have compiled.

  A program is looked up by all that decides what it computes: results are the same bit for bit
  with an empty directory, a full one, or none.

  Args:
    where: a directory; "auto", the user's own, `$XDG_CACHE_HOME/rl_llm/compiled`; "none". Where
      JAX has been given a directory already (`JAX_COMPILATION_CACHE_DIR`), that one stays.

  Yields:
    The directory; None where nothing is kept.

  Raises:
    ConfigError: the directory cannot be made or written, or others may write into it.
  """
  path = None if jax.config.jax_compilation_cache_dir else _directory(where)
  if path is None:
    yield None
    return
  known = _sound(path)
  logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)  # It tells of resets.
  names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
  before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax_cache.reset_cache()

  def listen(event: str, start: float, end: float, **_: object) -> None:
    # A long compilation is noted at once, so that a kill does not lose it.
    if event.startswith("/jax/core/compile/backend_compile") and end - start > 1:
      _note(path, known)

  jax.monitoring.register_event_time_span_listener(listen)
  try:
    yield path
  finally:
    jax.monitoring.unregister_event_time_span_listener(listen)
    for name, value in before.items():
      jax.config.update(name, value)
    jax_cache.reset_cache()
    _note(path, known)


def _directory(where: str) -> Path | None:
  """This machine's directory below the one asked for, if it can be trusted."""
  if where == "none":
    return None
  base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl_llm" / "compiled"
  path = (base if where == "auto" else Path(where).absolute()) / _machine()
  fault = _fault(path)
  if fault and where != "auto":
    raise ConfigError("compile_cache", where, "a directory that only you can write", fault)
  if fault:
    absl_logging.warning("nothing compiled is kept: %s", fault)
    return None
  return path


def _fault(path: Path) -> str:
  """Why a directory cannot be used; makes it if it is not there."""
  try:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
  except OSError as error:
    return f"{path}: {error.strerror or error}"
  if found.st_uid != os.getuid():
    return f"{path} belongs to another user"
  if stat.S_IMODE(found.st_mode) & 0o022:
    return f"others may write to {path}: chmod go-w"
  return "" if os.access(path, os.W_OK | os.X_OK) else f"{path} cannot be written"


def _machine() -> str:
  """A name for what programs are compiled for besides what JAX itself looks at."""
  described = [jax.__version__, platform.machine()]
  with contextlib.suppress(OSError):  # Linux; elsewhere the architecture must do.
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    described += sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
  return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _entries(path: Path) -> list[Path]:
  return [entry for entry in path.iterdir() if entry.is_file() and entry.name != _DIGESTS]


def _digest(entry: Path) -> str:
  return f"{hashlib.sha256(entry.read_bytes()).hexdigest()}  {entry.name}"


def _sound(path: Path) -> set[str]:
  """Names of the entries that are whole; the others are removed, and the oldest above the limit."""
  noted = path / _DIGESTS
  lines = set(noted.read_text(errors="replace").splitlines()) if noted.exists() else set()
  known, size = set(), 0
  for entry in sorted(_entries(path), key=lambda entry: -entry.stat().st_mtime):
    with contextlib.suppress(FileNotFoundError):  # Another run's removal.
      size += entry.stat().st_size
      if size > LIMIT or _digest(entry) not in lines:
        entry.unlink()
      else:
        known.add(entry.name)
  return known


def _note(path: Path, known: set[str]) -> None:
  """Appends the digests of new entries: a line each, so that several runs may do it at once."""
  with contextlib.suppress(OSError):
    new = [entry for entry in _entries(path) if entry.name not in known]
    with open(path / _DIGESTS, "a") as file:
      file.writelines(_digest(entry) + "\n" for entry in new)
    known |= {entry.name for entry in new}
