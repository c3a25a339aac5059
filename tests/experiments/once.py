"""What the runs of tests have in common is made once: their programs and their graders.

Of a short run of a tiny model most of the time goes into what it makes anew from its config, though
an earlier run has made the same: JAX traces and lowers every program, and a pool starts processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from rl_llm.rewards import RewardPool, RewardSource

PROGRAMS: dict[Hashable, Callable] = {}  # of this process
POOLS: dict[Hashable, RewardPool] = {}
SHARED: set[str] = set()
OURS = "rl_llm.", "experiments."


def meaning(value: Any) -> Hashable:
  """Equal for two values where a program may use one for the other; of a function, its code and
  what it reads from around it, but for the globals of its module.

  >>> add = lambda n: lambda x: x + n
  >>> meaning(add(1)) == meaning(add(1)), meaning(add(1)) == meaning(add(1.0))
  (True, False)

  Raises:
    TypeError: the value, or a part of it, may change, as an array may.
    ValueError: a part of it is not yet there.
    RecursionError: it is a part of itself.
  """
  kind = type(value)
  if value is None or kind in (bool, int, float, str, bytes):
    return kind, repr(value)
  if isinstance(value, functools.partial):
    return kind, *map(meaning, (value.func, value.args, value.keywords))
  if isinstance(value, tuple | list):
    return kind, *map(meaning, value)
  if isinstance(value, dict | types.MappingProxyType):
    return kind, *((name, meaning(part)) for name, part in value.items())
  if isinstance(value, types.FunctionType):
    around = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    read = [_read(value.__code__, name, cell.cell_contents) for name, cell in around]
    parts = read, value.__defaults__, value.__kwdefaults__
    return value.__code__, id(value.__globals__), *map(meaning, parts)
  if dataclasses.is_dataclass(kind):
    return kind, *(meaning(getattr(value, each.name)) for each in dataclasses.fields(kind))
  hash(value)
  return kind, value


def _read(code: types.CodeType, name: str, value: Any) -> Any:
  """What a function's code reads of a value around it: these fields, or all of the value."""
  fields = _fields(code, name) if dataclasses.is_dataclass(value) else None
  return value if fields is None else {field: getattr(value, field) for field in fields}


@functools.cache
def _fields(code: types.CodeType, name: str) -> tuple[str, ...] | None:
  """The attributes that code reads of a variable around it; None: it takes the variable itself."""
  found = set()
  inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
  for fields in (_fields(part, name) for part in inner if name in part.co_freevars):
    if fields is None:
      return None
    found.update(fields)
  steps = list(dis.get_instructions(code))
  for step, following in zip(steps, [*steps[1:], None], strict=True):
    if step.argval == name and "DEREF" in step.opname:
      if following is None or following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return None
      found.add(following.argval)
  return tuple(sorted(found))


def jit_of(known: dict[Hashable, Callable]) -> Callable:
  """`jax.jit`, which gives the program in `known` where it has one of the same meaning.

  Whoever replaces a global that a program reads makes the run's programs with `jax.jit` itself.
  """
  original = jax.jit

  def jit(function: Callable, **how: Any) -> Callable:
    module = getattr(getattr(function, "func", function), "__module__", None) or ""
    if not module.startswith(OURS):
      return original(function, **how)
    try:
      key = meaning(function), meaning(how)
    except (TypeError, ValueError, RecursionError):
      return original(function, **how)
    if key not in known:
      known[key] = original(function, **how)
    return known[key]

  return jit


class Kept(RewardPool):
  """A pool that outlives the run that opened it."""

  def __exit__(self, *unused) -> None:
    pass


@contextlib.contextmanager
def pools_of(location: str) -> Iterator[None]:
  """While it lasts, `open_pool` gives the pool of an earlier run for graders at this place."""
  SHARED.add(location)
  try:
    yield
  finally:
    SHARED.remove(location)
    for pool in POOLS.values():
      pool.close()
    POOLS.clear()


def open_pool(source: RewardSource, **how: Any) -> RewardPool:
  """`RewardPool`, which keeps the latest few of shared places."""
  if source.location not in SHARED:
    return RewardPool(source, **how)
  key = source, *sorted(how.items())
  POOLS[key] = POOLS.pop(key, None) or Kept(source, **how)
  if len(POOLS) > 4:
    POOLS.pop(next(iter(POOLS))).close()
  return POOLS[key]
