"""Many settings of GRPO: one program for all against a run for each.

  python -m benchmarks.population                                             8 adapters, SmolLM2
  python -m benchmarks.population --model=tiny --settings=32 --lora_rank=0    32 times all weights

The settings differ in their learning rate, so the two sides differ only in which settings run
together. Both run `train` of their experiment to the end in this process, and compile everything
again. All settings cost the same, so --alone of them run alone, and their median counts for each.

What one program saves depends on the machine. On a CPU it saves compilations and the overhead of
every operation, but not the arithmetic. On an accelerator a decode step of few rows waits for
weights to be read from memory, and the base is read once for all: the last lines are what bandwidth
and arithmetic allow there, by formula, not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import grpo, population, setup
from rl_llm.policy import TransformerConfig
from rl_llm.policy.load import load_model
from rl_llm.runs import chips
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import option, replace, run
from rl_llm.runs.metrics import read
from rl_llm.training.train_state import init_state, parameter_count


@dataclasses.dataclass(frozen=True)
class Config:
  """What is trained, and how much of it."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, a .gguf file")
  settings: int = option(8, "N, how many", min=1)
  lora_rank: int = option(8, "rank of each setting's adapters; 0 = weights of its own", min=0)
  alone: int = option(2, "how many of them are also run by themselves", min=1)
  prompts: int = option(4, "P, problems a step", min=1)
  responses: int = option(4, "G, responses a problem", min=2)
  new_tokens: int = option(16, "tokens of a response, at most", min=1)
  steps: int = option(4, "steps; the first, which compiles, counts only in the whole run", min=2)
  chips: tuple[str, ...] = option(("h100", "v5e"), "whose decode step is estimated")


def settings(config: Config) -> list[grpo.Config]:
  """The settings of all runs."""
  shared = {
    "model": config.model,
    "task": "copy" if config.model == "tiny" else "arithmetic",
    "steps": config.steps,
    "prompts_per_step": config.prompts,
    "microbatch_prompts": config.prompts,
    "responses_per_prompt": config.responses,
    "max_new_tokens": config.new_tokens,
    "lora.rank": config.lora_rank,
    "loss.entropy_coef": 0.01,  # Otherwise a step in which all groups agree would have no gradient.
    "eval.problems": config.prompts,
    "eval.samples": config.responses - 1,
    "eval.every": config.steps,
    "checkpoint.every": 1,
    "checkpoint.keep": config.steps,
  }
  rates = [1e-5 * (1 + number) for number in range(config.settings)]
  return [replace(grpo.Config(), shared | {"optimizer.learning_rate": rate}) for rate in rates]


def measure(config: Config, directory: Path) -> dict[str, list[float]]:
  """Seconds of whole runs and of their steps, and how far first updates are apart."""
  configs = settings(config)
  members = [directory / f"member{number}" for number in range(config.settings)]
  found: dict[str, list[float]] = {
    "whole together": [],
    "steps together": [],
    "whole alone": [],
    "steps alone": [],
    "apart": [],
  }

  def timed(train, workdir, side):
    jax.clear_caches()
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
      train(str(workdir))
    found[f"whole {side}"].append(time.perf_counter() - start)
    rows = read(workdir / "metrics.jsonl")[1 : config.steps]
    others = ("time/eval", "time/checkpoint")
    found[f"steps {side}"] += [
      row["time/step"] - sum(row.get(name, 0.0) for name in others) for row in rows
    ]

  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    train = functools.partial(population.train, configs, members)
    timed(train, directory / "population", "together")
    for number in range(min(config.alone, config.settings)):
      alone = directory / f"alone{number}"
      timed(functools.partial(grpo.train, configs[number]), alone, "alone")
      found["apart"].append(apart(configs, number, directory / "population", alone))
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
  return found


def apart(configs: Sequence[grpo.Config], number: int, together: Path, alone: Path) -> float:
  """|u - v| / |v| of a member's first update u and its run's alone, v."""
  one = setup.split_weights(configs[number], load_model(configs[number].model.model).params).trained
  all_ = jax.tree.map(lambda x: jnp.stack([x] * len(configs)), one)
  init = functools.partial(init_state, optimizer=setup.make_optimizer(configs[0].optimizer))

  def restored(shapes: Any, workdir: Path) -> Any:
    return Checkpointer(workdir / "checkpoints").restore(shapes, 1)[1].params

  own = jax.tree.map(lambda x: x[number], restored(jax.eval_shape(jax.vmap(init), all_), together))
  wanted = restored(jax.eval_shape(init, one), alone)

  def norm_between(a: Any, b: Any) -> float:
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return float(np.sqrt(sum(np.sum(np.square(np.subtract(x, y))) for x, y in pairs)))

  return norm_between(own, wanted) / norm_between(wanted, one)


def decode_seconds(
  shape: TransformerConfig,
  chip: chips.Chip,
  *,
  shared: int,
  own: int,
  members: int,
  rows: int,
  context: int,
) -> float:
  """The least that one decode step can take: reading, or arithmetic if that is more.

      bytes      = 2 (shared + N own) + N R C 4 L K H      weights, and each row's cache
      operations = 2 N R (shared + own) + 4 N R C L Q H

  A model of 100 weights that all share and 10 of each, with nothing in its cache, on a chip that
  reads 2 bytes a second: one member reads 220 bytes, eight read 360, in 180 s instead of 8 * 110 s.

  >>> from rl_llm.policy import tiny_config
  >>> slow = chips.Chip(hbm=1.0, flops=1e9, bandwidth=2.0, network=1.0)
  >>> sizes = {"shared": 100, "own": 10, "rows": 1, "context": 0}
  >>> [decode_seconds(tiny_config(8), slow, members=members, **sizes) for members in (1, 8)]
  [110.0, 180.0]

  Args:
    shape: L layers, K heads of keys, Q of queries, of size H.
    chip: its limits.
    shared: weights that all members share.
    own: weights of each.
    members: N.
    rows: R, of each member.
    context: C, tokens in each row's cache.
  """
  keys = members * rows * context * shape.n_layers * shape.head_dim
  read = 2 * (shared + members * own) + 4 * keys * shape.n_kv_heads
  flops = 2 * members * rows * (shared + own) + 4 * keys * shape.n_heads
  return max(read / chip.bandwidth, flops / chip.flops)


def roofline(config: Config) -> list[str]:
  """What accelerators allow, in bfloat16, one chip per line."""
  model = load_model(config.model)
  weights = setup.split_weights(settings(config)[0], model.params)
  rows, context = config.prompts * config.responses, 46 + config.new_tokens // 2
  step = functools.partial(
    decode_seconds,
    model.policy.config,
    shared=parameter_count(weights.frozen),
    own=parameter_count(weights.trained),
    rows=rows,
    context=context,
  )
  lines = []
  for name in config.chips:
    chip = (chips.TPUS | chips.GPUS)[name]
    together = step(chip, members=config.settings)
    alone = config.settings * step(chip, members=1)
    lines.append(
      f"  {name}, by formula: a decode step of {rows} rows a setting, {context} tokens read, takes "
      f"{1e6 * alone:.0f} us for one setting after another and {1e6 * together:.0f} us for all at "
      f"once, {alone / together:.1f} times less"
    )
  return lines


def main(config: Config) -> None:
  with tempfile.TemporaryDirectory() as directory:
    found = measure(config, Path(directory))
  what = f"adapters of rank {config.lora_rank}" if config.lora_rank else "all weights"
  print(
    f"{config.model}: {config.settings} settings of {what}, {config.prompts} problems x "
    f"{config.responses} responses of at most {config.new_tokens} tokens, {config.steps} steps"
  )
  for name, unit in (("whole", "run, compilation included"), ("steps", "step, once compiled")):
    together, alone = found[f"{name} together"], found[f"{name} alone"]
    apiece = statistics.median(alone)
    print(
      f"  a {unit}: {statistics.median(together):.2f} s ({min(together):.2f} to "
      f"{max(together):.2f}) for all at once, {apiece:.2f} s ({min(alone):.2f} to {max(alone):.2f})"
      f" for one alone; one after another takes "
      f"{config.settings * apiece / statistics.median(together):.2f} times as long"
    )
  print(f"  first updates differ by at most {max(found['apart']):.1e} of themselves")
  print("\n".join(roofline(config)))


if __name__ == "__main__":
  run(main, Config)
