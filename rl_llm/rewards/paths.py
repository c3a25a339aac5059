"""What the process of a reward function finds on disk: what it may import, and what it may read."""

from __future__ import annotations

import importlib.util
import os
import sys

from rl_llm.rewards.calls import RewardSource
from rl_llm.rewards.results import RewardError

# Libraries and programs of the system; nothing of a user's, and no socket of a service (/run).
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")


def _interpreter() -> set[str]:
  """The interpreter's own directories: not its prefix, which may be a home."""
  prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
  parts = ("bin", "lib", "lib64", "pyvenv.cfg")
  return {os.path.join(prefix, part) for prefix in prefixes for part in parts}


def import_path(source: RewardSource) -> list[str]:
  """The directories that the function and its imports are looked for in."""
  path = [os.path.abspath(entry) for entry in sys.path if entry and os.path.isdir(entry)]
  if source.location.endswith(".py"):
    return [*path, os.path.dirname(os.path.abspath(source.location))]
  return path + [os.path.dirname(place) for place in _package(source.location)]


def readable_paths(source: RewardSource) -> list[str]:
  """What stays readable once text is graded, in addition to the modules imported until then.

  These are the system's libraries, the interpreter with its packages, the package of a grader that
  is a module, and the source's own `files`.

  Raises:
    RewardError: one of these `files` does not exist.
  """
  for path in source.files:
    if not os.path.exists(path):
      raise RewardError(f"reward_files={path}: no such file or directory; correct the path")
  packages = {
    os.path.abspath(entry)
    for entry in sys.path
    if entry.rstrip("/").endswith(("site-packages", "dist-packages"))
  }
  own = [] if source.location.endswith(".py") else _package(source.location)
  given = map(os.path.abspath, source.files)
  return sorted({*_SYSTEM, *_interpreter(), *packages, *own, *given})


def _package(location: str) -> list[str]:
  """Where the package of a module lies."""
  try:
    spec = importlib.util.find_spec(location.partition(".")[0])
  except (ImportError, ValueError):
    spec = None
  places = (spec.submodule_search_locations or [spec.origin]) if spec and spec.origin else ()
  return [os.path.abspath(place) for place in places]
