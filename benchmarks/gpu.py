"""One GPU: how near an update and decoding come to what it can do, and what models need of it.

  python -m benchmarks.gpu                     on the GPU that is here
  python -m benchmarks.gpu --predict=h100      compiled for one that is not (pip install ".[cuda]")
  python -m benchmarks.gpu --torch_python=P    and PyTorch with transformers, on the same GPU
  python -m benchmarks.gpu --trace=DIR         and where the time of each goes

Weights are random, arithmetic is in bfloat16, weights and moments are float32. Three things:

  update   one of GRPO, 8 responses of 1,024 tokens to each prompt of 512, 16,384 tokens at least
           in one microbatch. Its MFU is the work it must do by formula (`rl_llm.runs.flops`) over
           the GPU's peak according to its maker. PyTorch's side has a row of prompt and response
           for each response.
  decode   a token of 64 rows, and of 256: what a rollout of 288 tokens takes longer than one of 32,
           over 256. Its bound: all weights and the keys and values of all rows read once at the
           maker's bandwidth, or the products at the peak if that takes longer.
  memory   the largest that a step of 8 x 8 responses needs, of models of 0.5, 1.5 and 7 billion
           weights, the last with adapters of rank 16; layers in a loop, and computed twice. Each in
           a process of its own.

Each figure is measured in a process of its own, and PyTorch's in another one once ours has ended,
so that none holds memory that another needs. It is printed as soon as it is there; a failure is one
line. Where PyTorch's update runs out of memory, it is made again with recomputation.

--trace=DIR writes, for update and decode, a trace of one more run and DIR/PART/kernels.md: time by
kind of kernel and by name (benchmarks/gpu_kernels.py).

Predicted means that the same programs are compiled for a GPU that is not there. Memory is what the
compiler reports. Time is the sum over kinds of kernels, each at the rate that it reached on an
H200; next to it, for the update, what the maker's rates allow: the longer of the operations and the
bytes that the compiler counts, to their sum. `benchmarks.gpu_count` counts both kernel by kernel.

Measured on an H200 on 2026-11-29 (JAX 0.11.2, CUDA 13; before vocabulary products were in bfloat16
the update took 0.378 s), and not since:

  update, 17,408 tokens at once, 168 TFLOP: 0.359 s, MFU 47 %
  decode,  64 rows: at least 0.90 ms a token; 2.57 ms, 35 % of the bound
  decode, 256 rows: at least 1.67 ms a token; 5.54 ms, 30 % of the bound
  PyTorch 2.11, transformers 5.17: update of 16 rows with recomputation 0.788 s, 2 x 8 rows 0.66 s;
  `generate`, 64 rows: 57 ms a token

Predicted for an H100, not measured (JAX 0.10.2; the update's 439 GB of memory traffic are found
from the time that an earlier --predict=h100 printed, not counted again):

  update 0.390 s, MFU 44 %; decode 3.77 ms a token of 64 rows, 7.28 of 256
  memory: 0.5 billion weights 11.6 GB, 1.5 billion 34.1 GB, 7 billion with adapters 58.3 GB of 80
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.gpu_kernels import predict_decode, predict_update, read_trace, table, touches_logits
from benchmarks.timing import seconds_of, spread
from experiments import grpo, setup
from experiments.flags import Lora, SamplingMesh
from launch import plan
from launch.chips import find_devices, has_compiler
from launch.models import find_model
from launch.programs import Lowering, Programs, programs, settings_of
from rl_llm.errors import ConfigError
from rl_llm.parallel import sharding
from rl_llm.policy import Policy, TransformerConfig, make_policy
from rl_llm.policy.layer_stack import cast_weights
from rl_llm.rollout.sampling import SamplingConfig, sample
from rl_llm.runs.chips import DEVICE_KINDS, GPUS, Chip
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import forward_flops

GROUP = 8  # responses a prompt
SHORT, LONG = 32, 288  # tokens of the two rollouts whose difference is timed
ONE = r"update:1|decode:\d+|memory:.+:\d+"  # one figure, which a process of its own measures
MODELS = (("qwen2.5-0.5b", 0), ("qwen2.5-1.5b", 0), ("qwen2.5-7b", 16))  # and adapters' rank


@dataclasses.dataclass(frozen=True)
class Config:
  """What is measured, and where."""

  predict: str = option("", f"a GPU that is not here: {', '.join(GPUS)}; empty = the one that is")
  model: str = option(
    "qwen2.5-1.5b", "model of update and decode: a name of launch.models, or a directory"
  )
  prompt_tokens: int = option(512, "length of each prompt", min=2)
  new_tokens: int = option(1024, "length of each response in an update", min=2)
  microbatch_tokens: int = option(16_384, "read by an update at once, at least", min=1)
  rows: tuple[int, ...] = option((64, 256), "decoded at once", min=GROUP)
  remat: bool = option(False, "compute activations twice instead of holding them")
  runs: int = option(5, "timed, after one that is not", min=1)
  part: str = option(
    "all",
    "all, update, decode, memory; or one figure as JSON: update:1, decode:ROWS, memory:MODEL:RANK",
  )
  trace: str = option("", "directory for traces of update and decode; empty = none")
  torch_python: str = option("", "an interpreter with torch and transformers; empty = ours alone")


class Cost(NamedTuple):
  """What a compiled program does, by its compiler."""

  flops: float
  bytes: float

  def seconds(self, chip: Chip) -> tuple[float, float]:
    """If operations and memory overlap, and if they do not.

    >>> Cost(flops=4.0, bytes=3.0).seconds(Chip(hbm=1, flops=2.0, bandwidth=1.0, network=1))
    (3.0, 5.0)
    """
    compute, memory = self.flops / chip.flops, self.bytes / chip.bandwidth
    return max(compute, memory), compute + memory


def planned(config: Config, *, prompts: int, new_tokens: int, model: str, rank: int) -> plan.Config:
  """A step of one microbatch, as `launch.programs` takes it."""
  return plan.Config(
    topology="cpu:1",  # Not read: the devices are given.
    model=model,
    prompts_per_step=prompts,
    microbatch_prompts=prompts,
    responses_per_prompt=GROUP,
    prompt_tokens=config.prompt_tokens,
    max_new_tokens=new_tokens,
    remat=config.remat,
    scan_layers=False,
    dtype="bfloat16",
    mesh=SamplingMesh(1, 1, 1),
    lora=Lora(rank=rank),
  )


def policy_of(step: plan.Config, devices: list) -> tuple[Policy, jax.sharding.Mesh]:
  mesh = setup.open_mesh(step, per_step={}, at_once={}, devices=devices)
  make = {"remat": step.remat, "scan_layers": step.scan_layers, "mesh": mesh}
  return make_policy(find_model(step.model), dtype=jnp.bfloat16, **make), mesh


def lowerings(step: plan.Config, devices: list) -> dict[str, Lowering]:
  """The update and the rollout."""
  return {found.name: found for found in programs(step, *policy_of(step, devices))}


def filled(shapes: Any) -> Any:
  """Arrays of these shapes on the device: small random weights, tokens, keys."""

  def fill(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.split(jax.random.key(0), x.shape)
    if jnp.issubdtype(x.dtype, jnp.floating) and x.shape:
      return 0.02 * jnp.abs(jax.random.normal(jax.random.key(1), x.shape, x.dtype))
    return jnp.ones(x.shape, x.dtype)

  return jax.jit(lambda: jax.tree.map(fill, shapes))()


# Update.


def update_prompts(config: Config) -> int:
  """As many as have the tokens of a microbatch, a prompt read once for its responses.

  >>> update_prompts(Config())  # 2 x (512 + 8 x 1,024) = 17,408
  2
  """
  return -(-config.microbatch_tokens // (config.prompt_tokens + GROUP * config.new_tokens))


def update_flops(config: Config, shape: TransformerConfig) -> int:
  """What three passes over prompts and responses must compute."""
  prompts = update_prompts(config)
  responses = [config.new_tokens] * (prompts * GROUP)
  return 3 * forward_flops(shape, [config.prompt_tokens] * prompts, responses)


def update_step(config: Config) -> plan.Config:
  prompts = update_prompts(config)
  return planned(config, prompts=prompts, new_tokens=config.new_tokens, model=config.model, rank=0)


def timed_update(config: Config, devices: list) -> list[float]:
  """Seconds of each run."""
  lowered = lowerings(update_step(config), devices)["update"].lower()
  (*shapes, _, frozen), _ = lowered.args_info
  compiled = lowered.compile()
  state, batch, hparams = filled(shapes)
  seconds = []
  for _ in range(config.runs + 1):
    taken, (state, _) = seconds_of(
      lambda s=state: jax.block_until_ready(compiled(s, batch, hparams, 1, frozen))
    )
    seconds.append(taken)
  traced(config, "update", compiled, lambda: compiled(state, batch, hparams, 1, frozen))
  return seconds[1:]


def traced(config: Config, part: str, compiled: Any, call: Callable[[], Any]) -> None:
  """Runs it once more under the profiler, if asked, and writes what its kernels took."""
  if not config.trace:
    return
  directory = Path(config.trace, part)
  with jax.profiler.trace(str(directory)):
    jax.block_until_ready(call())
  vocabulary = find_model(config.model).vocab_size
  events, logits = read_trace(directory), touches_logits(compiled.as_text(), vocabulary)
  (directory / "kernels.md").write_text(table(events, logits))


def update_cost(config: Config, devices: list) -> Cost:
  """By the compiler, of the update with its logits in one piece: it counts a loop's body once."""
  step = update_step(config)
  parts = Programs(step, settings_of(step), *policy_of(step, devices))
  loss = grpo.make_loss(parts.settings, parts.policy, chunk_size=parts.batch.tokens.size)
  made = setup.make_programs(parts.settings, parts.policy, parts.mesh, loss)
  batch, numbers = parts.minibatch(made.take), parts.numbers(kl_coef=0.0)
  return cost(parts.update("update", made.update, parts.state, batch, numbers).lower().compile())


def cost(compiled: Any) -> Cost:
  """Of a device that is here, or of the compiled program alone."""
  found = compiled.cost_analysis()
  if found is None:  # Nothing public counts a program that no device has loaded.
    from jax._src.lib import xla_client

    (module,) = compiled.runtime_executable().hlo_modules()
    client = jax.devices("cpu")[0].client
    found = xla_client._xla.hlo_module_cost_analysis(client, module)
  return Cost(found["flops"], found["bytes accessed"])


# Decode.


def decode_bound(config: Config, shape: TransformerConfig, rows: int, chip: Chip) -> float:
  """The least that a token of all rows takes, halfway between the two rollouts' lengths."""
  seen = config.prompt_tokens + (SHORT + LONG) // 2
  total = forward_flops(shape, [seen] * rows, [2] * rows)
  flops = total - forward_flops(shape, [seen] * rows, [1] * rows)
  projections = 2 * shape.width * (shape.n_heads + shape.n_kv_heads) * shape.head_dim
  layer = projections + 3 * shape.width * shape.mlp_width
  weights = shape.n_layers * layer + shape.width * shape.vocab_size
  cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * seen * rows
  return Cost(flops, 2 * (weights + cache)).seconds(chip)[0]


def timed_decode(config: Config, rows: int, devices: list) -> list[float]:
  """Seconds a token of all rows, of each pair of rollouts."""
  found = []
  for length in (SHORT, LONG):
    step = planned(config, prompts=rows // GROUP, new_tokens=length, model=config.model, rank=0)
    lowered = lowerings(step, devices)["rollout"].lower()
    arguments, compiled = filled(lowered.args_info[0]), lowered.compile()
    runs = [
      seconds_of(lambda: jax.block_until_ready(compiled(*arguments)))[0]  # noqa: B023
      for _ in range(config.runs + 1)
    ]
    found.append(runs[1:])
    if length == LONG:
      traced(config, f"decode-{rows}", compiled, lambda: compiled(*arguments))  # noqa: B023
  return [(long - short) / (LONG - SHORT) for short, long in zip(*found, strict=True)]


def decode_cost(config: Config, rows: int, devices: list) -> Cost:
  """By the compiler, of what a rollout's loop runs once: a token of every row, and its choice."""
  step = planned(config, prompts=rows // GROUP, new_tokens=LONG, model=config.model, rank=0)
  policy, mesh = policy_of(step, devices)

  def decode(params, cache, tokens, keys):
    zeros = jnp.zeros((rows, 1), jnp.int32)
    hidden, cache = policy.hidden(params, tokens[:, None], zeros, zeros, cache)
    logits = policy.logits(params, hidden[:, 0])
    return sample(keys, logits, SamplingConfig(jnp.ones(rows))), cache

  params = jax.eval_shape(policy.init, jax.random.key(0))
  shapes = jax.eval_shape(
    lambda params: (
      cast_weights(params, jnp.bfloat16),
      policy.init_cache(rows, config.prompt_tokens + (SHORT + LONG) // 2),
      jnp.zeros(rows, jnp.int32),
      jax.random.split(jax.random.key(0), rows),
    ),
    params,
  )
  lowered = jax.jit(decode, donate_argnums=1).lower(*sharding.sharded_shapes(shapes, mesh))
  counted = cost(lowered.compile())
  # The compiler counts the whole table of embeddings for the one row of it that each token reads.
  table = 2 * policy.config.vocab_size * policy.config.width
  return counted._replace(bytes=counted.bytes - table)


# Memory.


def memory_step(config: Config, model: str, rank: int) -> plan.Config:
  """As a deep model is trained: layers in a loop, two prompts' activations at a time, and twice."""
  step = planned(config, prompts=GROUP, new_tokens=config.new_tokens, model=model, rank=rank)
  return dataclasses.replace(step, microbatch_prompts=2, remat=True, scan_layers=True)


def predicted_memory(config: Config, model: str, rank: int, devices: list) -> float:
  """Bytes, of the larger of update and rollout."""
  step = memory_step(config, model, rank)
  policy, mesh = policy_of(step, devices)
  return max(plan.compile_program(each, mesh).peak for each in programs(step, policy, mesh))


def measured_memory(config: Config, model: str, rank: int, devices: list) -> float:
  """Bytes that the device has held at most in this process, after a rollout and an update."""
  step = memory_step(config, model, rank)
  lowered = {name: each.lower() for name, each in lowerings(step, devices).items()}
  (*shapes, _, frozen), _ = lowered["update"].args_info
  state, batch, hparams, frozen = filled((*shapes, frozen))
  (params, *others), _ = lowered["rollout"].args_info
  rest = filled(others)
  weights = state.params if frozen is None else filled(params)
  jax.block_until_ready(lowered["rollout"].compile()(weights, *rest))
  del weights, rest
  microbatches = step.prompts_per_step // step.microbatch_prompts
  compiled = lowered["update"].compile()
  jax.block_until_ready(compiled(state, batch, hparams, microbatches, frozen))
  return devices[0].memory_stats()["peak_bytes_in_use"]


# What is printed.


def alone(config: Config, part: str) -> tuple[dict[str, Any], str]:
  """What `--part=PART` prints, from a process of its own; or {}, and why there is nothing."""
  flags = [f"--{name}={text(value)}" for name, value in dataclasses.asdict(config).items()]
  words = [sys.executable, "-m", "benchmarks.gpu", *flags, f"--part={part}"]
  return last_line(words)


def text(value: Any) -> str:
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def last_line(words: list[Any]) -> tuple[dict[str, Any], str]:
  """The JSON that a command prints last; or {}, and the line that says why it failed."""
  done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
  if done.returncode == 0:
    return json.loads(done.stdout.splitlines()[-1]), ""
  said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no output"]
  memory = [line for line in said if re.search("out of memory|RESOURCE_EXHAUSTED", line, re.I)]
  return {}, f"failed, exit code {done.returncode}: {(memory or said)[-1][:200]}"


def report_update(config: Config, devices: list, chip: Chip) -> Iterator[str]:
  shape, prompts = find_model(config.model), update_prompts(config)
  flops = update_flops(config, shape)
  tokens = prompts * (config.prompt_tokens + GROUP * config.new_tokens)
  what = f"update, {tokens:,} tokens at once, {flops / 1e12:.0f} TFLOP"
  if config.predict:
    found = update_cost(config, devices)
    # A fused kernel's products are not among those counted.
    least, most = found._replace(flops=max(found.flops, flops)).seconds(chip)
    lengths = [config.prompt_tokens] * prompts, [config.new_tokens] * (prompts * GROUP)
    seconds = predict_update(shape, *lengths, found.bytes, chip)
    yield (
      f"{what}: predicted {seconds:.3f} s, MFU {100 * flops / chip.flops / seconds:.0f} %; at the "
      f"maker's rates {least:.3f} to {most:.3f} s; the compiler counts {found.flops / 1e12:.0f} "
      f"TFLOP and {found.bytes / 1e9:.0f} GB"
    )
    return
  found, failure = alone(config, "update:1")
  if failure:
    yield f"{what}: {failure}"
    return
  shares = [100 * flops / chip.flops / each for each in found["seconds"]]
  yield f"{what}: {spread(found['seconds'], digits=3)} s, MFU {spread(shares, digits=0)} %"
  yield from against_torch(config, "update", rows=prompts * GROUP, seconds=found["seconds"])


def report_decode(config: Config, devices: list, chip: Chip) -> Iterator[str]:
  shape = find_model(config.model)
  for rows in config.rows:
    bound = decode_bound(config, shape, rows, chip)
    what = f"decode, {rows} rows: at least {1e3 * bound:.2f} ms a token"
    if config.predict:
      found = decode_cost(config, rows, devices)
      seconds = predict_decode(shape, config.prompt_tokens + (SHORT + LONG) // 2, rows, chip)
      yield (
        f"{what}; predicted {1e3 * seconds:.2f} ms, {100 * bound / seconds:.0f} % of the bound; "
        f"the compiler counts {found.bytes / 1e9:.2f} GB"
      )
      continue
    found, failure = alone(config, f"decode:{rows}")
    if failure:
      yield f"{what}; {failure}"
      continue
    shares = [100 * bound / each for each in found["seconds"]]
    taken = spread([1e3 * each for each in found["seconds"]])
    yield f"{what}; {taken} ms, {spread(shares, digits=0)} % of the bound"
    yield from against_torch(config, "decode", rows=rows, seconds=found["seconds"])


def report_memory(config: Config, chip: Chip) -> Iterator[str]:
  for model, rank in MODELS:
    how = f"rank {rank}" if rank else "all weights"
    said = "predicted " if config.predict else ""
    found, failure = alone(config, f"memory:{model}:{rank}")
    largest = failure or f"{said}{found['bytes'] / 1e9:.1f} of {chip.hbm / 1e9:.0f} GB"
    yield f"memory, {model}, {how}: {largest}"


def against_torch(config: Config, part: str, *, rows: int, seconds: list[float]) -> Iterator[str]:
  """How long PyTorch and transformers take for it, in a process of their own.

  An update that does not fit is made again with recomputation.
  """
  if not config.torch_python:
    return
  shape = find_model(config.model)
  job = {
    "part": part,
    "shape": dataclasses.asdict(shape),
    "rows": rows,
    "prompt_tokens": config.prompt_tokens,
    "new_tokens": config.new_tokens,
    "lengths": (SHORT, LONG),
    "runs": config.runs,
    "remat": config.remat,
  }
  script = Path(__file__).with_name("gpu_torch.py")
  theirs, failure = last_line([config.torch_python, script, json.dumps(job)])
  if "out of memory" in failure.lower() and part == "update" and not config.remat:
    yield f"  PyTorch without recomputation: {failure}"
    job["remat"] = True
    theirs, failure = last_line([config.torch_python, script, json.dumps(job)])
  if failure:
    yield f"  PyTorch: {failure}"
    return
  ratio = [a / b for a, b in zip(sorted(theirs["seconds"]), sorted(seconds), strict=True)]
  scale, unit = (1, "s") if part == "update" else (1e3, "ms a token")
  taken = spread([scale * each for each in theirs["seconds"]], digits=3)
  how = " with recomputation" if job["remat"] else ""
  yield f"  {theirs['versions']}{how}: {taken} {unit}, {spread(ratio)} times as long as ours"


def one_figure(config: Config, devices: list) -> dict[str, Any] | None:
  """What `--part=update:1`, `decode:ROWS` or `memory:MODEL:RANK` prints; None if it is none."""
  if config.part == "update:1" and not config.predict:
    return {"seconds": timed_update(config, devices)}
  if (found := re.fullmatch(r"decode:(\d+)", config.part)) and not config.predict:
    return {"seconds": timed_decode(config, int(found[1]), devices)}
  if found := re.fullmatch(r"memory:(.+):(\d+)", config.part):
    largest = predicted_memory if config.predict else measured_memory
    return {"bytes": largest(config, found[1], int(found[2]), devices)}
  return None


def find_gpu(config: Config) -> tuple[list, str]:
  """The devices to run on or to compile for, and which row of the table of limits is theirs."""
  if config.predict:
    if config.predict not in GPUS:
      raise ConfigError("predict", config.predict, f"one of {', '.join(GPUS)}")
    topology = f"{config.predict}:1"
    if not has_compiler(topology):
      raise ConfigError(
        "predict", config.predict, "compiled for with jax[cuda12]", 'pip install ".[cuda]"'
      )
    jax.config.update("jax_platforms", "cpu")
    return find_devices(topology), config.predict
  devices = jax.devices()[:1]
  kind = DEVICE_KINDS.get(devices[0].device_kind)
  if kind not in GPUS:
    raise ConfigError(
      "predict",
      config.predict,
      f"one of {', '.join(GPUS)}",
      f"here is no GPU that is known, but {devices[0].device_kind}",
    )
  return devices, kind


def main(config: Config) -> None:
  for rows in config.rows:
    if rows % GROUP:
      raise ConfigError("rows", rows, f"multiples of {GROUP}")
  parts = ("all", "update", "decode", "memory")
  if config.part not in parts and not re.fullmatch(ONE, config.part):
    raise ConfigError("part", config.part, f"{', '.join(parts)} or memory:MODEL:RANK")
  if config.trace and config.predict:
    raise ConfigError("trace", config.trace, "given where kernels run, so without --predict")
  devices, kind = find_gpu(config)
  chip = GPUS[kind]
  if (figure := one_figure(config, devices)) is not None:
    print(json.dumps(figure))
    return
  how = "compiled for, not run" if config.predict else devices[0].device_kind
  print(f"{kind} ({how}), {config.model}, bfloat16 with float32 weights, jax {jax.__version__}")
  reports = {
    "update": lambda: report_update(config, devices, chip),
    "decode": lambda: report_decode(config, devices, chip),
    "memory": lambda: report_memory(config, chip),
  }
  for part, report in reports.items():
    for line in report() if config.part in ("all", part) else ():
      print(line, flush=True)
  if config.trace:
    print(f"kernels by time: {config.trace}/*/kernels.md")


if __name__ == "__main__":
  # A process takes only the memory it needs: other processes measure at the same time.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  run(main, Config)
