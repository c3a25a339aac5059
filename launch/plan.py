"""Does it fit? Compiles a run's own programs for devices that need not be there.

A pod is paid for by the minute, and the first thing it says is often RESOURCE_EXHAUSTED. The
compiler knows that beforehand: with `libtpu` installed (pip install jax[tpu]) it compiles on any
machine for a named slice, and reports the memory that each chip would need.

  python -m launch.plan --topology=v5e:16x16 --model=qwen2.5-7b
  python -m launch.plan --topology=v5p:2x2x4 --model=DIR --mesh.fsdp=4 --mesh.tensor=4
  python -m launch.plan --topology=v5e:4x4 --model=qwen2.5-1.5b --lora.rank=16
  python -m launch.plan --topology=cpu:8 --model=tiny --vocab_size=264    needs no libtpu

What is compiled is what `experiments.grpo` runs: its update and its rollout, with the same mesh and
the same flags. Weights are float32 and so are Adam's moments; the arithmetic is --dtype.

  memory       per chip, from the compiler: arguments (weights, moments, batch) and temporaries
  network      bytes a chip sends or receives in collectives, read off the compiled program
  compute      operations of the matrix products, by formula, over the chips' peak
  HBM          bytes of weights, moments and cache read and written, by formula

The three times are lower bounds: the largest binds, and a real step takes longer. Nothing is run,
so nothing here is measured on such a chip.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments import grpo
from experiments.options import Lora, MeshSizes, adamw, device_mesh, split_weights
from rl_llm import sharding
from rl_llm.config import ConfigError, option, run
from rl_llm.flops import forward_flops
from rl_llm.policy import TransformerConfig, WeightsError, join, make_policy, tiny_config
from rl_llm.policy.hf import read_config
from rl_llm.rollout import generate, row_keys
from rl_llm.sampling import SamplingConfig
from rl_llm.train_state import init_state, parameter_count
from rl_llm.update import make_update


class Chip(NamedTuple):
  """One accelerator's limits."""

  hbm: float  # bytes
  flops: float  # bfloat16 operations a second
  bandwidth: float  # bytes a second between HBM and the chip
  network: float  # bytes a second to and from its neighbours, all links together, both ways


# cloud.google.com/tpu/docs: system architecture of each version; links as in
# jax-ml.github.io/scaling-book/tpus (two directions; 4 links in a 2D torus, 6 in a 3D one).
CHIPS = {
  "v4": Chip(32e9, 275e12, 1.2e12, 270e9),
  "v5e": Chip(16e9, 197e12, 0.82e12, 180e9),
  "v5p": Chip(95e9, 459e12, 2.8e12, 540e9),
  "v6e": Chip(32e9, 918e12, 1.6e12, 360e9),
}


def _shape(width, layers, heads, kv_heads, mlp_width, *, tied=False, **others):
  return TransformerConfig(
    width=width,
    n_layers=layers,
    n_heads=heads,
    n_kv_heads=kv_heads,
    head_dim=128,
    mlp_width=mlp_width,
    tie_embeddings=tied,
    **others,
  )


_QWEN = {"vocab_size": 152_064, "rope_theta": 1e6, "qkv_bias": True}
_LLAMA = {"vocab_size": 128_256, "rope_theta": 5e5, "rms_eps": 1e-5}
# Shapes, from the models' config.json. A directory with one takes any other model.
MODELS = {
  "qwen2.5-1.5b": _shape(1536, 28, 12, 2, 8960, **_QWEN | {"vocab_size": 151_936}, tied=True),
  "qwen2.5-7b": _shape(3584, 28, 28, 4, 18_944, **_QWEN),
  "qwen2.5-32b": _shape(5120, 64, 40, 8, 27_648, **_QWEN),
  "qwen2.5-72b": _shape(8192, 80, 64, 8, 29_568, **_QWEN),
  "llama-3.1-8b": _shape(4096, 32, 32, 8, 14_336, **_LLAMA),
  "llama-3.1-70b": _shape(8192, 80, 64, 8, 28_672, **_LLAMA),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A run, and where it is to fit."""

  topology: str = option("v5e:16x16", "chips and how they lie: v5e:16x16, v5p:2x2x4, cpu:8")
  model: str = option(
    "qwen2.5-7b", f"{', '.join(MODELS)}, tiny, or a directory with a config.json"
  )
  vocab_size: int = option(0, "another vocabulary than the model's; 0 = its own", min=0)
  prompts_per_step: int = option(256, "P, problems a step", min=1)
  responses_per_prompt: int = option(8, "G, responses a problem", min=2)
  prompt_tokens: int = option(512, "L, padded length of the prompts", min=1)
  max_new_tokens: int = option(1024, "T, limit of a response's length", min=2)
  microbatch_prompts: int = option(256, "problems whose activations are held at once", min=1)
  remat: bool = option(True, "compute activations twice instead of holding them")
  dtype: Literal["bfloat16", "float32"] = option("bfloat16", "of the arithmetic")
  kl_coef: float = option(0.0, "above 0 holds a reference model too", min=0)
  mesh: MeshSizes = MeshSizes(data=1, fsdp=-1)
  lora: Lora = Lora()


class Program(NamedTuple):
  """What one compiled program needs of a chip."""

  name: str
  arguments: float  # bytes
  temporaries: float  # bytes
  output: float  # bytes that no argument's memory is reused for
  collectives: dict[str, tuple[int, float]]  # kind -> how many, bytes through a chip
  flops: float  # of a chip, by formula
  moved: float  # bytes between HBM and a chip, by formula, at least
  compile_seconds: float

  @property
  def peak(self) -> float:
    return self.arguments + self.temporaries + self.output

  def times(self, chip: Chip) -> dict[str, float]:
    """Seconds that each part takes at least."""
    return {
      "compute": self.flops / chip.flops,
      "HBM": self.moved / chip.bandwidth,
      "network": sum(moved for _, moved in self.collectives.values()) / chip.network,
    }


def find_model(config: Config) -> TransformerConfig:
  """The shape by name or from a directory."""
  if config.model == "tiny":
    found = tiny_config(config.vocab_size or 256)
  elif config.model in MODELS:
    found = MODELS[config.model]
  elif os.path.isdir(config.model):
    found, _ = read_config(config.model)
  else:
    raise ConfigError(
      "model", config.model, f"a directory with a config.json, tiny, or {', '.join(MODELS)}"
    )
  return dataclasses.replace(found, vocab_size=config.vocab_size or found.vocab_size)


def find_devices(topology: str) -> tuple[list, Chip | None]:
  """The slice's devices, and the limits of each; this machine's for cpu:N.

  Raises:
    ConfigError: there is no such topology, or nothing to compile for it with.
  """
  kind, _, shape = topology.partition(":")
  if kind == "cpu" and shape.isdigit():
    if len(jax.devices("cpu")) < int(shape):
      raise ConfigError(
        "topology", topology, "as many devices as JAX sees", f"set JAX_NUM_CPU_DEVICES={shape}"
      )
    return jax.devices("cpu")[: int(shape)], None
  if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
    raise ConfigError(
      "topology", topology, f"cpu:N, or one of {', '.join(CHIPS)} with a shape, as in v5e:4x4"
    )
  from jax.experimental import topologies

  # No metadata server tells what machine this is, and libtpu need not say so.
  for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_MIN_LOG_LEVEL", "3")):
    os.environ.setdefault(name, value)
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # Whatever libtpu says of it.
    raise ConfigError(
      "topology", topology, "one that libtpu can compile for",
      f"pip install 'jax[tpu]', and check the shape ({str(error).splitlines()[0]:.80})",
    ) from None
  return list(found.devices), CHIPS[kind]


def plan(config: Config) -> tuple[TransformerConfig, Chip | None, list[Program]]:
  """Compiles the update and the rollout."""
  shape = find_model(config)
  devices, chip = find_devices(config.topology)
  mesh = device_mesh(
    config.mesh,
    per_step={"prompts_per_step": config.prompts_per_step},
    at_once={"microbatch_prompts": config.microbatch_prompts},
    devices=devices,
  )
  if config.prompts_per_step % min(config.microbatch_prompts, config.prompts_per_step):
    raise ConfigError(
      "microbatch_prompts", config.microbatch_prompts,
      f"a divisor of prompts_per_step ({config.prompts_per_step})",
    )
  policy = make_policy(shape, dtype=jnp.dtype(config.dtype), remat=config.remat)
  return shape, chip, [
    compile_program(name, make(config, policy, mesh), mesh)
    for name, make in (("update", update_program), ("rollout", rollout_program))
  ]


class Lowering(NamedTuple):
  """A program before it is compiled, and what the formulas say of it."""

  lower: Callable[[], Any]
  loop: int  # how often a loop runs whose count the program does not know
  flops: float
  moved: float


def weights_of(config: Config, policy, mesh):
  """(frozen, trained) as shapes that know their devices."""

  def split():
    # Saved adapters have the shapes of new ones.
    lora = dataclasses.replace(config.lora, adapter="")
    return split_weights(lora, policy.init(jax.random.key(0)), seed=0)

  return sharding.placed_shapes(jax.eval_shape(split), mesh)


def rows(shapes, mesh):
  """Shapes of a batch, whose rows lie over the mesh."""
  layout = sharding.row_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)


def update_program(config: Config, policy, mesh) -> Lowering:
  """The update of `experiments.grpo`, on the batch that its step would make."""
  settings = grpo.Config(
    prompts_per_step=config.prompts_per_step,
    responses_per_prompt=config.responses_per_prompt,
    max_new_tokens=config.max_new_tokens,
    microbatch_prompts=config.microbatch_prompts,
  )
  optimizer = adamw(settings.optimizer)
  microbatches = max(1, config.prompts_per_step // config.microbatch_prompts)
  update = make_update(
    grpo.make_loss(settings, policy), optimizer, microbatches=microbatches, mesh=mesh
  )
  frozen, trained = weights_of(config, policy, mesh)
  state = jax.eval_shape(lambda p: init_state(p, optimizer), trained)
  state = sharding.placed_shapes(state, mesh)
  prompts, total = config.prompts_per_step, config.prompts_per_step * config.responses_per_prompt

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  batch = {
    "prompts": array(jnp.int32, prompts, config.prompt_tokens),
    "prompt_lengths": array(jnp.int32, prompts),
    "tokens": array(jnp.int32, total, config.max_new_tokens),
    "mask": array(bool, total, config.max_new_tokens),
    "sampler_logprobs": array(jnp.float32, total, config.max_new_tokens),
    "advantages": array(jnp.float32, total),
    "weights": array(jnp.float32, total, config.max_new_tokens),
  }
  if config.kl_coef:
    batch["ref_logprobs"] = array(jnp.float32, total, config.max_new_tokens)
  names = ("learning_rate", "kl_coef", "entropy_coef")
  hparams = {name: array(jnp.float32) for name in names} | {"loss": {}}
  count = parameter_count(frozen or trained)
  each = 4 * count / mesh.size
  passes = (4 if config.remat else 3) if frozen is None else (3 if config.remat else 2)
  return Lowering(
    lambda: update.lower(state, rows(batch, mesh), hparams, microbatches, frozen),
    loop=microbatches,
    flops=passes * work(config, policy.config) / mesh.size,
    # Weights once a pass of every microbatch, as they are gathered; the state read and written.
    moved=passes * microbatches * itemsize(config) * count / mesh.shape["tensor"]
    + (6 * each if frozen is None else 0),
  )


def rollout_program(config: Config, policy, mesh) -> Lowering:
  """The rollout of a step: all its prompts at once."""
  frozen, trained = weights_of(config, policy, mesh)
  params = join(frozen, trained)
  total = config.prompts_per_step * config.responses_per_prompt
  keys = jax.eval_shape(
    lambda: row_keys(jax.random.key(0), config.prompts_per_step, config.responses_per_prompt)
  )
  arrays = (
    jax.ShapeDtypeStruct((config.prompts_per_step, config.prompt_tokens), jnp.int32),
    jax.ShapeDtypeStruct((config.prompts_per_step,), jnp.int32),
    keys,
    SamplingConfig(jax.ShapeDtypeStruct((total,), jnp.float32)),
  )
  count = parameter_count(params)
  shape = policy.config
  length = config.prompt_tokens + config.max_new_tokens / 2  # On average.
  cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * itemsize(config) * total * length
  return Lowering(
    lambda: generate.lower(
      params,
      *rows(arrays, mesh),
      policy=policy,
      responses_per_prompt=config.responses_per_prompt,
      max_new_tokens=config.max_new_tokens,
      eos_ids=(0,),
      pad_id=0,
    ),
    loop=config.max_new_tokens,
    flops=work(config, shape) / mesh.size,
    # Each token reads all weights that its device computes with, and the cache of its rows.
    moved=config.max_new_tokens
    * (itemsize(config) * count / mesh.shape["tensor"] + cache / mesh.size),
  )


def itemsize(config: Config) -> int:
  return jnp.dtype(config.dtype).itemsize


def work(config: Config, shape: TransformerConfig) -> float:
  """Operations of one pass over all prompts and responses."""
  fields = ("vocab_size", "width", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_width")
  return forward_flops(
    **{field: getattr(shape, field) for field in fields},
    prompts=config.prompts_per_step,
    responses=config.responses_per_prompt,
    prompt_tokens=config.prompt_tokens,
    new_tokens=config.max_new_tokens,
  )


def compile_program(name: str, lowering: Lowering, mesh) -> Program:
  """Compiles, and reads off what the compiler says."""
  print(f"compiling the {name} for {mesh.size} devices", file=sys.stderr, flush=True)
  begin = time.perf_counter()
  compiled = lowering.lower().compile()
  seconds = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  return Program(
    name,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    collectives(compiled.as_text(), loop=lowering.loop),
    lowering.flops,
    lowering.moved,
    seconds,
  )


BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
  "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str, *, loop: int = 1) -> dict[str, tuple[int, float]]:
  """Counts a compiled program's collectives, those in loops as often as these run.

  A chip of a ring of n passes on all but its own part: what an all-gather puts out, what a
  reduce-scatter takes in, and both for an all-reduce, which is one after the other.

  >>> text = '''
  ... %body (p: f32[8]) -> f32[8] {
  ...   %g = f32[8]{0} all-gather(f32[2]{0} %p), dimensions={0}
  ... }
  ... ENTRY %main (x: f32[8]) -> f32[8] {
  ...   %r = f32[8]{0} all-reduce(f32[8]{0} %x), to_apply=%sum
  ...   %w = f32[8]{0} while(f32[8]{0} %r), condition=%c, body=%body
  ... }'''
  >>> collectives(text, loop=3)
  {'all-gather': (3, 96.0), 'all-reduce': (1, 64.0)}

  Args:
    text: of the compiled module.
    loop: how often a loop runs whose count is not in the text.

  Returns:
    {kind: (how many, bytes)}.
  """
  bodies: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    head = re.match(r"\s*(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
    if head and "=" not in line.split("(")[0]:
      lines = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  counts: Counter[str] = Counter()
  moved: Counter[str] = Counter()

  def walk(name: str, times: int) -> None:
    for line in bodies.get(name, ()):
      found = re.search(r"= (.*?) ([\w\-]+)\(", line)
      if not found:
        continue
      kind = found[2].removesuffix("-start")
      if kind in KINDS:
        sizes = [_bytes(*s) for s in re.findall(r"(\w+)\[([\d,]*)\]", found[1])]
        size = max(sizes) if found[2].endswith("-start") else sum(sizes)
        if kind == "reduce-scatter":
          size = max(_bytes(*s) for s in re.findall(r"(\w+)\[([\d,]*)\]", line))
        counts[kind] += times
        moved[kind] += times * size * (2 if kind == "all-reduce" else 1)
      inner = times
      if kind == "while":
        known = re.search(r'known_trip_count[\\":{n\s]+(\d+)', line)
        inner = times * (int(known[1]) if known else loop)
      for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
        walk(called, inner)

  walk(entry, 1)
  return {kind: (counts[kind], float(moved[kind])) for kind in KINDS if counts[kind]}


def _bytes(dtype: str, sizes: str) -> int:
  """Of an array as HLO writes it: f32 and 8,128."""
  count = 1
  for size in filter(None, sizes.split(",")):
    count *= int(size)
  return BYTES.get(dtype, 0) * count


def table(config: Config, shape: TransformerConfig, chip: Chip | None, programs) -> list[str]:
  """The figures as lines, and what to change where they do not fit."""
  policy = make_policy(shape)
  parameters = parameter_count(jax.eval_shape(policy.init, jax.random.key(0)))
  lines = [f"{config.model}: {parameters / 1e9:.2f}B parameters on {config.topology}"]
  columns = "{:<9} {:>10} {:>12} {:>9} {:>9}  {}"
  lines.append(
    columns.format("GB a chip", "arguments", "temporaries", "peak", "compiled", "collectives")
  )
  for program in programs:
    kinds = [
      f"{count} {kind} {moved / 1e9:.1f} GB" for kind, (count, moved) in program.collectives.items()
    ]
    figures = (program.arguments, program.temporaries, program.peak)
    lines.append(
      columns.format(
        program.name,
        *(f"{x / 1e9:.2f}" for x in figures),
        f"{program.compile_seconds:.0f} s",
        ", ".join(kinds) or "none",
      )
    )
  if chip is None:
    return lines
  for program in programs:
    times = program.times(chip)
    binding = max(times, key=times.get)
    shown = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times.items())
    lines.append(f"{program.name}: at least {times[binding]:.2f} s, bound by {binding} ({shown})")
  worst = max(programs, key=lambda program: program.peak)
  if worst.peak <= chip.hbm:
    lines.append(f"fits: {worst.peak / 1e9:.1f} of {chip.hbm / 1e9:.0f} GB a chip ({worst.name})")
    return lines
  lines.append(
    f"does NOT fit: the {worst.name} needs {worst.peak / 1e9:.1f} of {chip.hbm / 1e9:.0f} GB a chip"
  )
  advice = []
  if worst.arguments > worst.temporaries:
    advice += ["more devices along --mesh.fsdp", "--lora.rank=16"]
  elif worst.name == "update":
    advice += ["a smaller --microbatch_prompts"] + ["--remat"] * (not config.remat)
  else:
    advice += ["fewer --prompts_per_step or --responses_per_prompt", "a larger --mesh.tensor"]
  lines.append(f"try {', or '.join(advice)}")
  return lines


def main(config: Config) -> int:
  # A plan runs nothing: an accelerator that is there stays free, and one that is not is not sought.
  jax.config.update("jax_platforms", "cpu")
  shape, chip, programs = plan(config)
  print(*table(config, shape, chip, programs), sep="\n")
  fits = chip is None or all(program.peak <= chip.hbm for program in programs)
  return 0 if fits else 3


if __name__ == "__main__":
  run(main, Config, errors=(sharding.ShardingError, WeightsError))
