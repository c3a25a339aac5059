"""Generation alone, ours against Hugging Face's `generate` and Tunix's sampler, and the floor.

  make bench-peers                                   .venv-trl and .venv-tunix, once
  python -m benchmarks.generation                    all three sides
  python -m benchmarks.generation --tunix_cache=1024     Tunix's cache as long as its default
  python -m benchmarks.generation --peer=none        ours alone

All sides have the same weights and prompts, use float32, sample from the whole distribution at
temperature 1, and write the same number of tokens. As in `benchmarks.grpo_step` each side is a
process of its own; they take turns, ours first, and the first turns, which compile, do not count.
Before the clock starts the sides must agree on the prompts' ids and on how likely the model finds
them. A ratio compares a turn with our turn just before it, so a temporary slowdown cancels out.

The floor is the least time that the exact result can take on this machine. A step, which writes one
token of every response, takes the longer of two times: that of its matrix products at the best rate
any side reaches on a large square product, or that of reading the weights and the keys and values
seen once each, at the best rate at which all cores read or copy memory. A prompt is read once, and
so are its keys and values in each step, for all its responses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import tempfile
from typing import Literal

from benchmarks.grpo_step import MATMUL, BenchmarkError, check_same, interpreters, start_sides
from benchmarks.side import cores, memory_gbytes
from rl_llm.policy import TransformerConfig
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import forward_flops


@dataclasses.dataclass(frozen=True)
class Config:
  """What is generated, and the settings of each side."""

  model: str = option("smollm2", "smollm2, a Hugging Face directory, a .gguf file; tiny: ours only")
  peer: Literal["transformers", "tunix", "all", "none"] = option("all", "whom to measure against")
  prompts: int = option(4, "P, prompts", min=1)
  responses: int = option(8, "G, responses a prompt", min=1)
  prompt_tokens: int = option(64, "tokens of each prompt", min=8)
  new_tokens: int = option(64, "tokens of each response, no fewer and no more", min=1)
  turns: int = option(5, "turns timed on each side", min=1)
  warmup: int = option(1, "turns before them, not counted", min=1)
  trl_python: str = option(".venv-trl/bin/python", "interpreter that has transformers and torch")
  tunix_python: str = option(".venv-tunix/bin/python", "interpreter that has Tunix")
  tunix_cache: int = option(
    0, "Tunix: columns of the cache, 0 for as many as are filled; 1024 is its default", min=0
  )


def floor_seconds(
  shape: TransformerConfig,
  *,
  prompts: int,
  responses: int,
  prompt_tokens: int,
  new_tokens: int,
  gflops: float,
  gbytes: float,
) -> dict[str, float]:
  """The least that each step can take, summed over the steps, by what bounds it.

      step t = max(FLOPs / rate, 4 (weights + 2 layers K H (P L + P G (t - 1))) / bandwidth)

  The first step reads the prompts and has no cache yet; step t > 1 reads the token that step t - 1
  wrote, and sees the prompt and t - 1 tokens.

  Args:
    shape: of the model.
    prompts: P.
    responses: G, per prompt.
    prompt_tokens: L, tokens of each prompt.
    new_tokens: T, steps.
    gflops: 1e9 operations a second.
    gbytes: 1e9 bytes a second.

  Returns:
    "compute" and "memory": seconds of the steps that either bounds; their sum is the floor.
  """
  width, layers, head = shape.width, shape.n_layers, shape.head_dim
  projections = 2 * width * (shape.n_heads + shape.n_kv_heads) * head
  weights = layers * (projections + 3 * width * shape.mlp_width) + width * shape.vocab_size
  column = 2 * layers * shape.n_kv_heads * head
  bounds, before = {"compute": 0.0, "memory": 0.0}, 0
  for step in range(1, new_tokens + 1):
    total = forward_flops(shape, [prompt_tokens] * prompts, [step] * (prompts * responses))
    columns = prompts * prompt_tokens + prompts * responses * (step - 1) if step > 1 else 0
    compute = (total - before) / gflops / 1e9
    memory = 4 * (weights + column * columns) / gbytes / 1e9
    bounds["compute" if compute > memory else "memory"] += max(compute, memory)
    before = total
  return bounds


def table(
  turns: dict[str, list[dict[str, float]]], *, tokens: int, floor: dict[str, float]
) -> list[str]:
  """The figures as lines: tokens a second, seconds, memory; ratios turn by turn; the floor.

  Args:
    turns: by side, ours first, one dict a timed turn, as `benchmarks.peers` reports it.
    tokens: how many each turn wrote.
    floor: what `floor_seconds` gives.
  """
  columns = "{:<14} {:>9} {:>16} {:>9} {:>10} {:>16}"
  lines = [columns.format("side", "tokens/s", "min .. max", "s", "peak GiB", "times the floor")]
  least = sum(floor.values())
  seconds = {name: [turn["seconds"] for turn in taken] for name, taken in turns.items()}
  for name, taken in turns.items():
    middle = statistics.median(seconds[name])
    spread = f"{tokens / max(seconds[name]):.0f} .. {tokens / min(seconds[name]):.0f}"
    peak = max(turn["peak_mb"] for turn in taken) / 1024
    row = (f"{tokens / middle:.0f}", spread, f"{middle:.2f}", f"{peak:.2f}")
    lines.append(columns.format(name, *row, f"{middle / least:.2f}"))
  for name in turns:
    if name != "ours":
      ratios = [a / b for a, b in zip(seconds[name], seconds["ours"], strict=True)]
      lines.append(
        f"ours is {statistics.median(ratios):.2f} times as fast as {name} "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} turns)"
      )
  bounds = " and ".join(f"{part:.2f} s bound by {by}" for by, part in floor.items())
  lines.append(f"floor: {least:.2f} s, {tokens / least:.0f} tokens/s; {bounds}")
  return lines


def main(config: Config) -> int:
  commands = interpreters(config, {"transformers": config.trl_python, "tunix": config.tunix_python})
  rows = config.prompts * config.responses
  with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
    gbytes = memory_gbytes()
    job = dataclasses.asdict(config) | {"matmul": MATMUL}
    sides, ready = start_sides(commands, job, scratch, stack, prefix="generate_")
    check_same(ready, prompt_tokens=config.prompt_tokens)
    print(
      f"{config.model}, float32: {config.prompts} prompts of {config.prompt_tokens} tokens x "
      f"{config.responses} responses of {config.new_tokens}; {platform.machine()}, {cores()} "
      f"cores, memory {gbytes:.1f} GB/s"
    )
    for name, message in ready.items():
      print(f"{name}: {message['versions']}; {message['note']}; {message['gflops']:.0f} GFLOP/s")
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    for number in range(config.warmup + config.turns):
      for side in sides:
        taken = side.step()
        if taken["tokens"] != rows * config.new_tokens:
          raise BenchmarkError(
            f"{side.name}: wrote {taken['tokens']} tokens, not {rows * config.new_tokens}"
          )
        warm = number >= config.warmup
        if warm:
          turns[side.name].append(taken)
        word = "" if warm else " (not counted)"
        print(f"turn {number} {side.name}: {taken['seconds']:.2f} s{word}", flush=True)
  names = ("prompts", "responses", "prompt_tokens", "new_tokens")
  floor = floor_seconds(
    TransformerConfig(**ready["ours"]["shape"]),
    **{name: getattr(config, name) for name in names},
    gflops=max(side["gflops"] for side in ready.values()),
    gbytes=gbytes,
  )
  print(*table(turns, tokens=rows * config.new_tokens, floor=floor), sep="\n")
  return 0


if __name__ == "__main__":
  run(main, Config)
