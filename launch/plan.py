"""Does it fit? Compiles a run's own programs for devices that need not be there.

A pod is paid for by the minute, and the first thing it prints is often RESOURCE_EXHAUSTED. The
compiler can tell beforehand: on any machine it compiles for a named slice of TPUs if `libtpu` is
installed (pip install jax[tpu]), or for NVIDIA's GPUs with jax[cuda12], and reports the memory that
each chip would need.

  python -m launch.plan --topology=v5e:16x16 --model=qwen2.5-7b
  python -m launch.plan --topology=v5p:2x2x4 --model=DIR --mesh.fsdp=4 --mesh.tensor=4
  python -m launch.plan --topology=v5e:4x4 --model=qwen2.5-1.5b --experiment=ppo --kl_coef=0.1
  python -m launch.plan --topology=v5e:8x8 --model=qwen2.5-7b --search     meshes and microbatches
  python -m launch.plan --topology=v5e:16x16 --num_slices=2 --mesh.data=2 --mesh.fsdp=256
  python -m launch.plan --topology=h100:8 --model=qwen2.5-7b     by formula without jax[cuda12]
  python -m launch.plan --topology=cpu:8 --model=tiny --vocab_size=264     needs no libtpu
  python -m launch.plan --topology=v5e:4x4 --model=DIR --flagfile=RUN/flags.txt   a run's own flags

It compiles what the experiment runs: its updates, its rollout, and its passes for log-probs and
values, with the same mesh and the same flags (dpo: on a file of pairs). Weights and Adam's moments
are float32; the arithmetic is --dtype.

  memory       per chip, from the compiler: arguments (weights, moments, batch) and temporaries; and
               what is resident, weights and moments that stay while a program runs that needs none
  network      bytes a chip sends or receives in collectives, read off the compiled program
  compute      operations of the matrix products, by formula, over the chips' peak
  HBM          bytes of weights, moments and cache read and written, by formula

The three times are lower bounds: the largest binds, and a real step takes longer. Tokens per second
assume that all programs reach --efficiency of their bounds. Nothing is run, so nothing here is
measured on such a chip. Compile time is in CPU seconds. Links between the slices of --num_slices
are slower than those within a slice, but are counted as equally fast.

The experiment's own flags are taken too, those of a flagfile as well: what decides memory or speed
is planned, and the rest is named and left out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments import setup
from experiments.flags import SamplingMesh
from launch import estimate
from launch.chips import find_chip, find_devices, has_compiler
from launch.hlo import collectives
from launch.models import find_model
from launch.own_flags import translated
from launch.plan_flags import Config
from launch.programs import Lowering, command, programs, updates_of
from launch.quiet import noise_in
from rl_llm.errors import ConfigError, UserError
from rl_llm.parallel import sharding
from rl_llm.policy import TransformerConfig, make_policy
from rl_llm.runs.chips import Chip
from rl_llm.runs.config import run
from rl_llm.runs.console import timed


class Program(NamedTuple):
  """What one program needs of a chip."""

  name: str
  arguments: float  # bytes
  temporaries: float  # bytes
  output: float  # bytes that no argument's memory is reused for
  collectives: dict[str, tuple[int, float]]  # kind -> how many, bytes through a chip
  flops: float  # of a chip, by formula
  moved: float  # bytes between HBM and a chip, by formula, at least
  compile_seconds: float  # of the processors; 0 = by formula, not compiled
  resident: float = 0.0  # bytes that lie there unused
  calls: int = 1  # a step

  @property
  def peak(self) -> float:
    return self.arguments + self.temporaries + self.output + self.resident

  def times(self, chip: Chip) -> dict[str, float]:
    """Seconds that each part takes at least."""
    return {
      "compute": self.flops / chip.flops,
      "HBM": self.moved / chip.bandwidth,
      "network": sum(moved for _, moved in self.collectives.values()) / chip.network,
    }

  def bound(self, chip: Chip) -> float:
    """The longest of them."""
    return max(self.times(chip).values())


def plan(config: Config) -> list[Program]:
  """Compiles all programs, or computes their figures where there is no compiler."""
  shape = find_model(config.model, vocab_size=config.vocab_size)
  check(config)
  if not has_compiler(config.topology):
    return by_formula(config, shape)
  mesh = setup.open_mesh(
    config,
    per_step={"prompts_per_step": config.prompts_per_step},
    at_once={"microbatch_prompts": config.microbatch_prompts},
    minibatches=updates_of(config).minibatches,
    devices=find_devices(config.topology, num_slices=config.num_slices),
  )
  policy = make_policy(
    shape,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
    scan_layers=config.scan_layers,
    attention=config.attention,
    mesh=mesh,
  )
  return [compile_program(lowering, mesh) for lowering in programs(config, policy, mesh)]


def check(config: Config) -> None:
  """Refuses sizes that do not divide."""
  minibatches = updates_of(config).minibatches
  update = config.prompts_per_step // minibatches
  if config.prompts_per_step % minibatches or update % min(config.microbatch_prompts, update):
    raise ConfigError(
      "microbatch_prompts",
      config.microbatch_prompts,
      f"a divisor of prompts_per_step / minibatches ({config.prompts_per_step} / {minibatches})",
    )


def by_formula(config: Config, shape: TransformerConfig) -> list[Program]:
  """The figures of `launch.estimate`, on a mesh that is checked like a real one."""
  count, found = find_chip(config.topology)[1] * config.num_slices, estimate.mesh_sizes(config)
  if math.prod(found) != count or found not in estimate.meshes(config, shape, count):
    raise sharding.ShardingError(
      f"mesh {' x '.join(f'{name}={size}' for name, size in found._asdict().items())}: does not "
      f"divide {count} devices, the model or prompts_per_step ({config.prompts_per_step})"
    )
  return [
    Program(
      name=part.name,
      arguments=part.arguments,
      temporaries=part.temporaries,
      output=0.0,
      collectives={kind: found for kind, found in part.collectives.items() if found[0]},
      flops=part.flops,
      moved=part.moved,
      compile_seconds=0.0,
      resident=part.resident,
      calls=part.calls,
    )
    for part in estimate.estimate(config, shape, found)
  ]


def compile_program(lowering: Lowering, mesh: jax.sharding.Mesh) -> Program:
  """Compiles, and reads off what the compiler says."""
  begin = time.process_time()
  line = f"compiling the {lowering.name} for {mesh.size} devices{usual_time(lowering, mesh)}"
  try:
    with timed(line, functools.partial(print, file=sys.stderr, flush=True)):
      compiled = lowering.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return too_large(lowering, str(error), time.process_time() - begin)
  seconds = time.process_time() - begin
  memory = compiled.memory_analysis()
  return Program(
    lowering.name,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    collectives(compiled.as_text(), loop=lowering.loop),
    lowering.flops,
    lowering.moved,
    seconds,
    lowering.resident,
    lowering.calls,
  )


def usual_time(lowering: Lowering, mesh: jax.sharding.Mesh) -> str:
  """How long such programs took to compile, of the models of docs/results/plan.md on 2 cores.

  An update took 262 s for 16 devices, 466 and 530 for 64, 430 to 672 for 256; a rollout a third.
  """
  if mesh.devices.flat[0].platform == "cpu":
    return ""
  update = 70 * math.log2(mesh.size + 1)
  seconds = update if "update" in lowering.name else update / 3
  return f", about {max(1, round(seconds / 60))} min of CPU time for a model of 30 to 80 layers"


def too_large(lowering: Lowering, said: str, seconds: float) -> Program:
  """A program that the compiler gave up on: it says what would not fit, and nothing else."""
  print(f"the {lowering.name}: {said.splitlines()[0]}", file=sys.stderr, flush=True)
  found = re.search(r"temporaries \((\d+(?:\.\d+)?)([KMGT])\)", said)
  needed = float(found[1]) * 2 ** (10 * "_KMGT".index(found[2])) if found else math.inf
  return Program(
    lowering.name,
    0.0,
    needed,
    0.0,
    {},
    lowering.flops,
    lowering.moved,
    seconds,
    lowering.resident,
    lowering.calls,
  )


def candidates(config: Config, chip: Chip) -> tuple[list[Config], int]:
  """Meshes and microbatches that fit by formula, fastest first; and how many were considered."""
  shape = find_model(config.model, vocab_size=config.vocab_size)
  count = find_chip(config.topology)[1] * config.num_slices
  update = config.prompts_per_step // updates_of(config).minibatches
  ranked, tried = [], 0
  for sizes, gather, microbatch in itertools.product(
    estimate.meshes(config, shape, count), ("step", "token"), estimate.divisors(update)
  ):
    if microbatch % (sizes.data * sizes.fsdp) or sizes.data % config.num_slices:
      continue
    if gather == "token" and (sizes.fsdp == 1 or config.experiment == "dpo"):
      continue  # Nothing to gather.
    tried += 1
    mesh = SamplingMesh(**sizes._asdict(), gather=gather)
    trial = dataclasses.replace(config, mesh=mesh, microbatch_prompts=microbatch)
    found = by_formula(trial, shape)
    if max(program.peak for program in found) <= chip.hbm:
      ranked.append((step_seconds(found, chip), len(ranked), trial))
  return [trial for _, _, trial in sorted(ranked)], tried


def step_seconds(found: Sequence[Program], chip: Chip) -> float:
  """What a step takes at least."""
  return sum(program.calls * program.bound(chip) for program in found)


def search(config: Config, chip: Chip) -> list[tuple[Config, list[Program]]]:
  """The best candidates, compiled: those that fit come first, the fastest of them at the top.

  Raises:
    ConfigError: none fits, by formula.
  """
  trials, tried = candidates(config, chip)
  chosen = trials[: config.candidates]
  verb = "compiling" if has_compiler(config.topology) else "showing"
  print(
    f"{tried} meshes and microbatches, {len(trials)} fit by formula; {verb} the best {len(chosen)}",
    file=sys.stderr,
    flush=True,
  )
  if not chosen:
    raise ConfigError(
      "topology",
      config.topology,
      "a larger slice: by formula no mesh and no microbatch fits",
      "or try --lora.rank=16, fewer --responses_per_prompt, a smaller --max_new_tokens",
    )
  found = [(trial, plan(trial)) for trial in chosen]
  return sorted(found, key=lambda pair: (not fits(pair[1], chip), step_seconds(pair[1], chip)))


def fits(found: Sequence[Program], chip: Chip | None) -> bool:
  return chip is None or all(program.peak <= chip.hbm for program in found)


def table(config: Config, found: Sequence[Program], chip: Chip | None) -> list[str]:
  """The figures as lines, and what to change where they do not fit."""
  shape = find_model(config.model, vocab_size=config.vocab_size)
  parameters, _ = estimate.count_parameters(shape)
  slices = f"{config.num_slices} x " if config.num_slices > 1 else ""
  lines = [f"{config.model}: {parameters / 1e9:.2f}B parameters on {slices}{config.topology}"]
  if not has_compiler(config.topology):
    lines.append("by formula, not compiled: see launch/estimate.py")
  columns = "{:<12} {:>9} {:>11} {:>8} {:>6} {:>8}  {}"
  lines.append(
    columns.format(
      "GB a chip", "arguments", "temporaries", "resident", "peak", "compiled", "collectives"
    )
  )
  for program in found:
    kinds = [
      f"{count} {kind} {moved / 1e9:.1f} GB" for kind, (count, moved) in program.collectives.items()
    ]
    figures = (program.arguments, program.temporaries, program.resident, program.peak)
    seconds = f"{program.compile_seconds:.0f} s" if program.compile_seconds else "-"
    lines.append(
      columns.format(
        program.name, *(f"{x / 1e9:.2f}" for x in figures), seconds, ", ".join(kinds) or "none"
      )
    )
  if chip is None:
    return lines
  for program in found:
    times = program.times(chip)
    binding = max(times, key=times.get)
    shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
    lines.append(f"{program.name}: at least {times[binding]:.2f} s, bound by {binding} ({shown})")
  lines.append(throughput(config, found, chip))
  worst = max(found, key=lambda program: program.peak)
  if fits(found, chip):
    lines.append(f"set: {command(config)}")
    lines.append(f"fits: {worst.peak / 1e9:.1f} of {chip.hbm / 1e9:.0f} GB a chip ({worst.name})")
    return lines
  lines.append(
    f"does NOT fit: the {worst.name} needs {worst.peak / 1e9:.1f} of {chip.hbm / 1e9:.0f} GB a chip"
  )
  advice = []
  whole = config.mesh.gather == "step" and config.mesh.fsdp != 1
  if worst.name in ("gather", "rollout") and whole:
    advice += ["a larger --mesh.tensor", "--mesh.gather=token", "fewer --prompts_per_step"]
  elif worst.arguments + worst.resident > worst.temporaries:
    advice += ["more devices along --mesh.fsdp", "--lora.rank=16"]
  elif "update" in worst.name:
    advice += ["a smaller --microbatch_prompts"] + ["--remat"] * (not config.remat)
  else:
    advice += ["fewer --prompts_per_step or --responses_per_prompt", "a larger --mesh.tensor"]
  lines.append(f"try {', or '.join(advice)}")
  return lines


def throughput(config: Config, found: Sequence[Program], chip: Chip) -> str:
  """Tokens per second, at the assumed efficiency."""
  seconds = step_seconds(found, chip) / config.efficiency
  if config.experiment == "dpo":
    tokens = 2 * config.prompts_per_step * (config.prompt_tokens + config.max_new_tokens)
  else:
    tokens = config.prompts_per_step * config.responses_per_prompt * config.max_new_tokens
  kind = "read" if config.experiment == "dpo" else "sampled and trained on"
  return (
    f"a step: at least {step_seconds(found, chip):.1f} s; assuming {config.efficiency:.0%} of the "
    f"bounds, {seconds:.0f} s, {tokens / seconds:,.0f} tokens {kind} a second"
  )


def flags(config: Config) -> str:
  """The command that plans only this: all flags that differ from the defaults."""
  said = ["python -m launch.plan"]
  for field in dataclasses.fields(Config):
    value, default = getattr(config, field.name), getattr(Config(), field.name)
    if field.name in ("search", "candidates", "json") or value == default:
      continue
    if dataclasses.is_dataclass(value):
      parts = dataclasses.asdict(default)
      said += [
        f"--{field.name}.{name}={part}"
        for name, part in dataclasses.asdict(value).items()
        if part != parts[name]
      ]
    else:
      said.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
  return " ".join(said)


def write_json(path: str, config: Config, found: Sequence[Program]) -> None:
  """The figures for other programs, such as benchmarks/plan_table.py."""
  with open(path, "w") as file:
    json.dump({"command": flags(config), "programs": [p._asdict() for p in found]}, file)


def main(config: Config) -> int:
  # A plan runs nothing: leave an accelerator of this machine free, and do not look for one.
  jax.config.update("jax_platforms", "cpu")
  chip, _ = find_chip(config.topology)
  if config.search:
    if chip is None:
      raise ConfigError("search", True, "off for a CPU, whose limits are not known here")
    with noise_in(config.topology):
      found = search(dataclasses.replace(config, microbatch_prompts=1), chip)
    for trial, programs_of in found:
      print(flags(trial), *table(trial, programs_of, chip), "", sep="\n")
    best = found[0]
  else:
    config = estimate.settled(config)
    with noise_in(config.topology):
      best = config, plan(config)
    print(*table(*best, chip), sep="\n")
  if config.json:
    write_json(config.json, *best)
  return 0 if fits(best[1], chip) else 3


if __name__ == "__main__":
  try:
    words = translated(sys.argv)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  run(main, Config, argv=words)
