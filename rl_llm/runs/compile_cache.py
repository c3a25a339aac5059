"""A directory of compiled programs, so that a run need not compile what an earlier run compiled.

Its contents are executed, so it must belong to this user alone, and an entry counts only if it
still has the digest that was recorded when it was written. A program cut short by a kill, or
damaged on disk, is removed and compiled again. Programs are compiled for one processor, so each
kind of machine has its own directory.
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

LIMIT = 2 << 30  # Bytes; beyond it the oldest programs are deleted.
_DIGESTS = "sha256sums"


@contextlib.contextmanager
def kept(where: str) -> Iterator[Path | None]:
  """Keeps what is compiled within the block, and reads what earlier blocks compiled.

  A program's key covers everything that decides what it computes, so results are the same bit for
  bit with an empty directory, a full one, or none.

  Args:
    where: a directory; "auto" for the user's own, `$XDG_CACHE_HOME/rl_llm/compiled`; or "none". If
      JAX already has a directory (`JAX_COMPILATION_CACHE_DIR`), that one stays.

  Yields:
    The directory; None if nothing is kept.

  Raises:
    ConfigError: the directory cannot be made or written, or others may write into it.
  """
  path = None if jax.config.jax_compilation_cache_dir else _directory(where)
  if path is None:
    yield None
    return
  known = _sound(path)
  logging.getLogger("jax._src.compilation_cache").setLevel(logging.WARNING)  # It logs resets.
  names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
  before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax_cache.reset_cache()

  def listen(event: str, start: float, end: float, **_: object) -> None:
    # Record a long compilation at once, so that a kill does not lose it.
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
  """This machine's subdirectory of the one asked for, if it can be trusted."""
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
  """Why a directory cannot be used; creates it if it is missing."""
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
  """A name for what a program is compiled for, beyond what JAX's own key covers."""
  described = [jax.__version__, platform.machine()]
  with contextlib.suppress(OSError):  # Only Linux has it; elsewhere use the architecture alone.
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    described += sorted({line for line in lines if line.startswith(("flags", "Features", "model"))})
  return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _entries(path: Path) -> list[Path]:
  return [entry for entry in path.iterdir() if entry.is_file() and entry.name != _DIGESTS]


def _digest(entry: Path) -> str:
  return f"{hashlib.sha256(entry.read_bytes()).hexdigest()}  {entry.name}"


def _sound(path: Path) -> set[str]:
  """Names of the intact entries; removes the others, and the oldest ones beyond the limit."""
  noted = path / _DIGESTS
  lines = set(noted.read_text(errors="replace").splitlines()) if noted.exists() else set()
  known, size = set(), 0
  for entry in sorted(_entries(path), key=lambda entry: -entry.stat().st_mtime):
    with contextlib.suppress(FileNotFoundError):  # Another run may have removed it.
      size += entry.stat().st_size
      if size > LIMIT or _digest(entry) not in lines:
        entry.unlink()
      else:
        known.add(entry.name)
  return known


def _note(path: Path, known: set[str]) -> None:
  """Appends the digests of new entries, a line each, so that several runs can do it at once."""
  with contextlib.suppress(OSError):
    new = [entry for entry in _entries(path) if entry.name not in known]
    with open(path / _DIGESTS, "a") as file:
      file.writelines(_digest(entry) + "\n" for entry in new)
    known |= {entry.name for entry in new}
