"""Shared by benchmarks of two sides in one process: turns, ratios, and how near a limit is.

A machine's speed varies: others use it, and it heats up. So sides take turns, a ratio compares
neighbours in time, and its spread is shown next to it. And "twice as fast" can still be slow, so
the least work that a result needs is counted from its shapes, and compared with the best rates that
this machine reaches in the same minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side import matmul_gflops
from rl_llm.errors import UserError

MATMUL = 2048  # side of the square product whose rate is the ceiling of arithmetic
BYTES = 2**28  # of an array that no cache holds, whose reading is the ceiling of memory


class BenchmarkError(UserError, RuntimeError):
  """The sides do not do the same work; the message says how they differ."""


class Ceilings(NamedTuple):
  """The most this machine can do, as measured."""

  flops: float  # a second, float32
  bandwidth: float  # bytes a second, read or written

  def seconds(self, *, flops: float, bytes: float) -> float:
    """The least time for this work: arithmetic, or memory if that takes longer.

    >>> Ceilings(flops=10.0, bandwidth=2.0).seconds(flops=50, bytes=20)
    10.0
    """
    return max(flops / self.flops, bytes / self.bandwidth)

  def or_better(self, other: Ceilings) -> Ceilings:
    """The best of both, measured at different times.

    >>> Ceilings(flops=10.0, bandwidth=2.0).or_better(Ceilings(flops=9.0, bandwidth=3.0))
    Ceilings(flops=10.0, bandwidth=3.0)
    """
    return Ceilings(*map(max, self, other))

  def __str__(self) -> str:
    return f"{self.flops / 1e9:.0f} GFLOP/s and {self.bandwidth / 1e9:.1f} GB/s"


def measure_ceilings() -> Ceilings:
  """The best of a few runs: a large square product; a large array copied, or met by a vector."""
  multiply, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
  square = jnp.ones((MATMUL, MATMUL))
  gflops = matmul_gflops(lambda: multiply(square, square).block_until_ready(), MATMUL)
  matrix = jnp.ones((BYTES // 4 // 8192, 8192))
  vector = matrix[0]
  read = best_seconds(lambda: multiply(matrix, vector).block_until_ready())
  copied = best_seconds(lambda: copy(matrix).block_until_ready())
  return Ceilings(1e9 * gflops, max(BYTES / read, 2 * BYTES / copied))


def best_seconds(work: Callable[[], Any], *, trials: int = 5) -> float:
  """The shortest of a few runs, after one that is not counted."""
  work()
  return min(seconds_of(work)[0] for _ in range(trials))


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
  """How long the call took, and its result."""
  start = time.perf_counter()
  result = work()
  return time.perf_counter() - start, result


def alternate(
  sides: dict[str, Callable[[], Any]],
  *,
  runs: int,
  check: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, list[float]]:
  """Seconds of each side's runs; the sides take turns, and a first turn is not counted.

  Args:
    sides: by name; each returns its result when it is all there.
    runs: turns that are counted.
    check: is given each turn's results by side, and raises where they differ.
  """
  found: dict[str, list[float]] = {name: [] for name in sides}
  for turn in range(runs + 1):
    results = {}
    for name, side in sides.items():
      seconds, results[name] = seconds_of(side)
      if turn:
        found[name].append(seconds)
    check(results)
    del results  # Before the next turn makes its own.
  return found


def distance(tree: Any, wanted: Any) -> float:
  """|tree - wanted| / |wanted|, over all numbers of two trees of arrays.

  >>> distance({"a": np.array([3.0, 4.5])}, {"a": np.array([3.0, 4.0])})
  0.1
  """
  pairs = list(zip(*map(jax.tree.leaves, (tree, wanted)), strict=True))
  apart = sum(float(np.sum(np.square(np.subtract(x, y, dtype=np.float64)))) for x, y in pairs)
  length = sum(float(np.sum(np.square(y, dtype=np.float64))) for _, y in pairs)
  return (apart / length) ** 0.5


def check_close(results: dict[str, Any], *, tolerance: float) -> None:
  """Raises BenchmarkError unless each side's result is within `tolerance` of the first's."""
  first, *others = results
  for name in others:
    apart = distance(results[name], results[first])
    if not apart <= tolerance:
      raise BenchmarkError(
        f"{name} and {first} give other results: {apart:.1e} apart, allowed {tolerance:.0e}"
      )


def spread(values: Sequence[float], *, digits: int = 2) -> str:
  """The median, with the smallest and the largest value.

  >>> spread([3.0, 1.0, 2.25])
  '2.25 (1.00 to 3.00)'
  """
  shown = (f"{x:.{digits}f}" for x in (statistics.median(values), min(values), max(values)))
  return "{} ({} to {})".format(*shown)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
  """How many times as fast, turn by turn: what slows both at once cancels.

  >>> ratios([4.0, 9.0], [2.0, 3.0])
  [2.0, 3.0]
  """
  return [a / b for a, b in zip(slow, fast, strict=True)]
