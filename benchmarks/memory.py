"""Is a plan's memory what a run takes? One GRPO update on this machine's CPU, planned and run.

  python -m benchmarks.memory

Before anything runs, the compiler says how many bytes of temporaries the update needs. Then the
update runs, and the operating system says by how much the process grew at its peak, without the
arguments. Only on a CPU are both available without an accelerator. The comparison shows whether the
figure means what `launch.plan` takes it for, not how good a TPU compiler's figure is.

Measured with the command above on 2 cores, x86_64, JAX 0.10.2: 32 MB of weights, 1,622 MB planned
in addition to the arguments, 1,730 MB measured, 1.07 times. One run; the excess is the runtime's.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import setup
from experiments.flags import SamplingMesh
from launch import plan
from launch.models import find_model
from launch.programs import programs
from rl_llm.policy import make_policy
from rl_llm.runs.config import option, run


@dataclasses.dataclass(frozen=True)
class Config:
  """An update of a model of 32 MB of weights."""

  prompts: int = option(16, "problems", min=1)
  microbatch_prompts: int = option(8, "problems at once", min=1)
  responses_per_prompt: int = option(8, "responses a problem", min=2)
  prompt_tokens: int = option(32, "length of a prompt", min=1)
  new_tokens: int = option(96, "length of a response", min=2)
  remat: bool = option(False, "compute activations twice instead of holding them")
  scan_layers: bool = option(False, "loop over the layers")


class Found(NamedTuple):
  """Bytes."""

  weights: int
  planned: float  # temporaries, and output without the memory of an argument
  measured: int  # growth of the process at its largest


def small_model():
  """8 million parameters: six layers, and a vocabulary large enough to be cut into blocks."""
  tiny = find_model("tiny", vocab_size=8192)
  return dataclasses.replace(tiny, width=256, n_layers=6, head_dim=64, mlp_width=1024)


def measure(config: Config) -> Found:
  """Plans an update, then runs it."""
  planned = plan.Config(
    topology="cpu:1",
    model="tiny",
    prompts_per_step=config.prompts,
    microbatch_prompts=config.microbatch_prompts,
    responses_per_prompt=config.responses_per_prompt,
    prompt_tokens=config.prompt_tokens,
    max_new_tokens=config.new_tokens,
    remat=config.remat,
    scan_layers=config.scan_layers,
    dtype="float32",
    mesh=SamplingMesh(1, 1, 1),
  )
  mesh = setup.open_mesh(planned, per_step={}, at_once={})
  policy = make_policy(small_model(), remat=config.remat, scan_layers=config.scan_layers, mesh=mesh)
  lowered = programs(planned, policy, mesh)[0].lower()
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  (*shapes, _, frozen), _ = lowered.args_info
  microbatches = config.prompts // config.microbatch_prompts
  arguments = *jax.tree.map(fill, shapes), microbatches, frozen
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0].params))
  jax.block_until_ready(arguments)
  del lowered
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)  # Memory left over from compiling must not be reused.
  before = reset_peak()
  jax.block_until_ready(compiled(*arguments))
  return Found(
    weights,
    memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
    resident("VmHWM") - before,
  )


def fill(shape) -> jax.Array:
  """Something of that shape, such as weights, moments and a batch could be."""
  rng = np.random.default_rng(0)
  if shape.dtype == jnp.float32:
    return jnp.asarray(0.02 * np.abs(rng.standard_normal(shape.shape, np.float32)))
  return jnp.ones(shape.shape, shape.dtype)


def reset_peak() -> int:
  """Forgets how large the process has been, and says how large it is."""
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
  return resident("VmRSS")


def resident(field: str) -> int:
  """Bytes that Linux counts as this process's."""
  with open("/proc/self/status") as file:
    line = next(line for line in file if line.startswith(field + ":"))
  return 1024 * int(line.split()[1])


def main(config: Config) -> None:
  found = measure(config)
  print(
    f"{found.weights / 1e6:.0f} MB of weights: planned {found.planned / 1e6:.0f} MB next to the "
    f"arguments, measured {found.measured / 1e6:.0f} MB, {found.measured / found.planned:.2f} times"
  )


if __name__ == "__main__":
  run(main, Config)
