"""Shared by all sides of a benchmark: the same texts, the same reward, the same clocks.

Nothing here imports JAX or this library: TRL and Tunix run under interpreters that have neither.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

STORY = (
  "A ferry carries cars and people over a wide river. On Monday it makes eleven trips, with nine "
  "cars and forty people on each. On Tuesday the water is high, so it makes only seven trips, but "
  "each of them is full: fourteen cars and ninety people. The captain writes every number into a "
  "book, draws a line, and adds them up twice, since the owner once paid for a car that nobody had "
  "seen. In the evening she reads the sums to the engineer and asks what he makes of them. "
)


def prompt_texts(encode: Callable[[str], list], *, count: int, tokens: int) -> list[str]:
  """Different texts that all have exactly this many tokens: one story, cut where the count fits.

  Raises:
    ValueError: no cut has that many tokens.
  """
  texts = []
  for number in range(1, count + 1):
    story = f"Story {number}. {STORY}"
    cuts = (story[:end] for end in range(len(story)))
    text = next((cut for cut in cuts if len(encode(cut)) == tokens), None)
    if text is None:
      raise ValueError(
        f"prompt_tokens: {tokens}; the story has fewer ({len(encode(story))}) or cannot be cut "
        "there; choose another number"
      )
    texts.append(text)
  return texts


def reward(prompts: list, completions: list[str], **columns) -> list[float]:
  """A pseudo-random reward in [0, 1], fixed by the text: advantages are not 0, the time is."""
  return [zlib.crc32(completion.encode()) / 0xFFFFFFFF for completion in completions]


def cores() -> int:
  """The cores this process may use; both sides compute with all of them."""
  return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def peak_mb() -> float:
  """The most memory this process has held so far, in MB of 2^20 bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def matmul_gflops(product: Callable[[], Any], size: int, trials: int = 8) -> float:
  """The best rate of a few runs of one [size, size] product, after one to warm up."""
  product()
  seconds = []
  for _ in range(trials):
    begin = time.perf_counter()
    product()
    seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / min(seconds) / 1e9


def memory_gbytes(trials: int = 8, size: int = 2**28) -> float:
  """The best rate at which all cores together read or copy memory that no cache holds, in 1e9 B/s.

  Each core has a part of `size` bytes of its own; a copy counts what it reads and what it writes.
  """
  import numpy as np

  workers = cores()
  parts = [
    (np.ones(size // 4 // workers, np.float32), np.ones(size // 4 // workers, np.float32))
    for _ in range(workers)
  ]
  ways = {1: lambda part: np.dot(part[0], part[0]), 2: lambda part: np.copyto(part[1], part[0])}
  rates = []
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for (times, way), _ in itertools.product(ways.items(), range(trials)):
      begin = time.perf_counter()
      list(pool.map(way, parts))
      rates.append(times * size / (time.perf_counter() - begin) / 1e9)
  return max(rates)


class Channel:
  """Lines of JSON to the benchmark; what libraries print goes to standard error instead."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

  def send(self, message: dict) -> None:
    self._out.write(json.dumps(message) + "\n")
    self._out.flush()

  def wait(self) -> None:
    """Waits until the next step is asked for; this side ends with the benchmark."""
    if not sys.stdin.readline():
      raise SystemExit(0)


class Stopwatch:
  """Seconds of named parts of a step; "update" is what no other part accounts for."""

  def __init__(self):
    self._begin = time.perf_counter()
    self.parts = {"generation": 0.0, "reward": 0.0}

  @contextlib.contextmanager
  def __call__(self, part: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    self.parts[part] += time.perf_counter() - begin

  def stop(self, tokens: int) -> dict[str, float]:
    seconds = time.perf_counter() - self._begin
    update = seconds - sum(self.parts.values())
    return {
      "seconds": seconds,
      **self.parts,
      "update": update,
      "tokens": tokens,
      "peak_mb": peak_mb(),
    }


def serve(channel: Channel, ready: dict, generate: Callable[[int], int]) -> None:
  """Generates on each request; `generate` takes the turn and returns the number of tokens."""
  channel.send(ready)
  for turn in itertools.count():
    channel.wait()
    begin = time.perf_counter()
    tokens = generate(turn)
    seconds = time.perf_counter() - begin
    channel.send({"seconds": seconds, "tokens": tokens, "peak_mb": peak_mb()})
