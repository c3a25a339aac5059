"""All benchmarks one after another: docs/results/performance.md, what each printed and on what.

  make bench                                                 all that are missing, and the page
  python -m benchmarks.performance --again=true              all, whatever there is
  python -m benchmarks.performance --only=update,packing     these, whatever there is

Each is a process of its own, and its output is kept as soon as it has ended: an interruption loses
one, and the same command continues with the rest. If one ends with an error, as when a peer is not
installed, the page says so in its place, and it is tried again next time.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benchmarks.side import cores
from rl_llm.errors import ConfigError
from rl_llm.files import write_atomically
from rl_llm.runs.config import option, run


class Benchmark(NamedTuple):
  """A module of this package, its flags, and what it is there to show."""

  name: str
  flags: str
  why: str


BENCHMARKS = (
  Benchmark(
    "grpo_step",
    "--peer=trl --steps=3",
    "A whole GRPO step, sampling, grading and update, against TRL's GRPOTrainer: same weights, "
    "same prompts, as many tokens.",
  ),
  Benchmark(
    "grpo_step",
    "--peer=trl --steps=3 --remat",
    "The same where we compute activations again too, as TRL does unless told otherwise: less "
    "memory, and a longer update.",
  ),
  Benchmark("grpo_step", "--peer=tunix --steps=3", "The same against Tunix's GRPO learner."),
  Benchmark(
    "grpo_step",
    "--peer=mixed --steps=3",
    "Our own step in bfloat16 with float32 weights. A processor without bfloat16 units has to "
    "convert every number, so there this is the slower of the two.",
  ),
  Benchmark(
    "generation",
    "--turns=3",
    "Sampling alone, against Hugging Face's generate and Tunix's sampler with a cache no longer "
    "than it need be.",
  ),
  Benchmark(
    "rollout",
    "",
    "Responses of exponential length: a slot goes to the next response when its own has ended, "
    "against batches that wait for their longest.",
  ),
  Benchmark(
    "update",
    "",
    "The gradient of 8 responses to one prompt: the prompt read once, against a copy for each.",
  ),
  Benchmark("packing", "", "Texts of unequal length: several in a row, against a row each."),
  Benchmark(
    "scaling",
    "",
    "How the cost of a step grows with the model, the batch, the responses' length and their "
    "number, next to what the count of operations predicts.",
  ),
  Benchmark(
    "logprobs",
    "",
    "Log-probs and entropies over a vocabulary of 151,936: in blocks of tokens, against all at "
    "once.",
  ),
)
HEAD = """# Performance

`make bench` runs these one after another and writes this page: each command, and what it printed.
Sides that are compared take turns within one run, so that whatever else the machine does meets both
the same; ratios are medians. A floor is what the products alone would take at the rate of a large
square product in the same run, or the bytes at the rate of memory where that is longer.
"""


@dataclasses.dataclass(frozen=True)
class Config:
  """Which, and where the page goes."""

  out: str = option("docs/results", "directory of performance.md and performance.json")
  only: str = option("", "names of benchmarks, with commas; empty = those that are missing")
  again: bool = option(False, "all, whatever there is")
  minutes: float = option(60.0, "after which one is given up", above=0)


def command(benchmark: Benchmark) -> str:
  return f"python -m benchmarks.{benchmark.name} {benchmark.flags}".strip()


def machine() -> str:
  """What it ran on.

  >>> machine().count(",")
  5
  """
  model = platform.machine()
  if os.path.exists("/proc/cpuinfo"):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
  gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  day = datetime.date.today().isoformat()
  versions = f"Python {platform.python_version()}, jax {metadata.version('jax')}"
  return f"{model}, {cores()} cores, {gigabytes:.0f} GB, {versions}, {day}"


def measure(benchmark: Benchmark, *, seconds: float) -> dict[str, str] | None:
  """What it printed and where; None: it ended with an error, and has said why."""
  words = [sys.executable, *command(benchmark).split()[1:]]
  try:
    ended = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=seconds)
  except subprocess.TimeoutExpired:
    print(f"not done in {seconds / 60:.0f} minutes", flush=True)
    return None
  print(ended.stdout, end="", flush=True)
  return None if ended.returncode else {"printed": ended.stdout, "machine": machine()}


def page(found: dict[str, dict[str, str]]) -> str:
  """The whole page; what is missing says so."""
  parts = [HEAD]
  for benchmark in BENCHMARKS:
    line = command(benchmark)
    result = found.get(line)
    printed = result["printed"].rstrip() if result else "not measured here"
    parts.append(f"## {benchmark.name}\n\n{textwrap.fill(benchmark.why, 100)}\n")
    parts.append(f"```console\n$ {line}\n{printed}\n```\n")
    if result:
      parts.append(f"{result['machine']}.\n")
  return "\n".join(parts)


def main(config: Config) -> None:
  names = [name for name in config.only.split(",") if name]
  known = sorted({benchmark.name for benchmark in BENCHMARKS})
  for name in names:
    if name not in known:
      raise ConfigError("only", config.only, f"names out of {', '.join(known)}, with commas")
  out = Path(config.out)
  kept = out / "performance.json"
  found = json.loads(kept.read_text()) if kept.exists() else {}
  for benchmark in BENCHMARKS:
    line = command(benchmark)
    if benchmark.name in names or not names and (config.again or line not in found):
      print(f"$ {line}", flush=True)
      result = measure(benchmark, seconds=60 * config.minutes)
      if result is not None:
        found[line] = result
        write_atomically(kept, json.dumps(found, indent=1).encode())
    write_atomically(out / "performance.md", page(found).encode())


if __name__ == "__main__":
  run(main, Config)
