"""The slices and boxes that can be planned for: the kind, number and layout of accelerators."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax

from rl_llm.errors import ConfigError
from rl_llm.runs.chips import GPUS, TPUS, Chip

GPUS_A_BOX = 8  # Joined by NVLink; beyond, each has a network card of 400 Gb/s in the same systems.
NETWORK_CARD = 100e9  # bytes a second, both ways


class Die(NamedTuple):
  """What NVIDIA's compiler asks of a GPU that is not there."""

  name: str
  capability: tuple[int, int]
  cores: int  # streaming multiprocessors
  lanes: int  # float32 units of each
  shared: int  # bytes of each one's shared memory
  cache: int  # bytes, level 2
  gigahertz: float
  memory: int  # bytes
  bandwidth: int  # bytes a second


# As their drivers say (openxla.org: xla/backends/gpu/target_config/specs).
DIES = {
  "a100": Die(
    "NVIDIA A100-SXM4-80GB",
    (8, 0),
    108,
    64,
    167_936,
    41_943_040,
    1.41,
    85_100_068_864,
    2_039_040_000_000,
  ),
  "h100": Die(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    132,
    128,
    233_472,
    52_428_800,
    1.98,
    84_942_979_072,
    3_352_320_000_000,
  ),
  "h200": Die(
    "NVIDIA H200", (9, 0), 132, 128, 233_472, 52_428_800, 1.98, 151_397_597_184, 4_800_000_000_000
  ),
  "b200": Die(
    "NVIDIA B200",
    (10, 0),
    148,
    128,
    233_472,
    132_644_864,
    1.965,
    191_514_411_008,
    7_672_320_000_000,
  ),
}


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
  """The kind of chip, and their layout.

  >>> parse("v5e:4x4"), parse("h100:16")
  (('v5e', (4, 4)), ('h100', (16,)))

  Raises:
    ConfigError: it is not such a name.
  """
  kind, _, shape = topology.partition(":")
  by_shape, by_number = re.fullmatch(r"\d+(x\d+)*", shape), re.fullmatch(r"\d+", shape)
  if not (kind in TPUS and by_shape or kind in ("cpu", *GPUS) and by_number):
    raise ConfigError(
      "topology",
      topology,
      f"one of {', '.join(TPUS)} with a shape, as in v5e:4x4, or of cpu, {', '.join(GPUS)} with a "
      "number, as in h100:8",
    )
  return kind, tuple(int(size) for size in shape.split("x"))


def find_chip(topology: str) -> tuple[Chip | None, int]:
  """The limits of a chip (None for a CPU), and how many chips a slice has."""
  kind, shape = parse(topology)
  count = math.prod(shape)
  chip = (TPUS | GPUS).get(kind)
  if kind in GPUS and count > GPUS_A_BOX:
    chip = chip._replace(network=NETWORK_CARD)
  return chip, count


def has_compiler(topology: str) -> bool:
  """Whether programs can be compiled without the chip; a GPU's compiler comes with jax[cuda12]."""
  return parse(topology)[0] not in GPUS or _cuda_plugin()


def _cuda_plugin() -> bool:
  if not importlib.util.find_spec("jax_plugins"):
    return False
  return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


def target_config(die: Die) -> str:
  """A GPU as XLA's compiler describes it (GpuTargetConfigProto in protobuf's text format).

  >>> target_config(DIES["h100"]).splitlines()[-1]
  'device_description_str: "NVIDIA H100 80GB HBM3"'
  """
  major, minor = die.capability
  return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {die.shared}
  shared_memory_per_block_optin: {die.shared - 1024}
  core_count: {die.cores} fpus_per_core: {die.lanes} clock_rate_ghz: {die.gigahertz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {die.bandwidth} l2_cache_size: {die.cache} device_memory_size: {die.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{die.name}\""""


def find_devices(topology: str, *, num_slices: int = 1) -> list:
  """The devices to compile for.

  Raises:
    ConfigError: there is no such topology, or nothing to compile for it with.
  """
  kind, shape = parse(topology)
  if kind == "cpu":
    if len(jax.devices("cpu")) < shape[0]:
      raise ConfigError(
        "topology", topology, "as many devices as JAX sees", f"set JAX_NUM_CPU_DEVICES={shape[0]}"
      )
    return jax.devices("cpu")[: shape[0]]
  from jax.experimental import topologies

  if kind in GPUS:
    platform, installed = "cuda", "jax[cuda12]"
    boxes, rest = divmod(shape[0], GPUS_A_BOX)
    if boxes and rest:
      raise ConfigError("topology", topology, f"fewer than {GPUS_A_BOX} GPUs or a multiple of it")
    each = GPUS_A_BOX if boxes else rest
    settings = {
      "topology": f"{num_slices}x{boxes or 1}x{each}",
      "target_config": target_config(DIES[kind]),
    }
  else:
    # No metadata server says what machine this is: do not ask for one, nor log that. And allow
    # several libtpu on the machine: a plan takes no chip, yet a second plan at once was refused.
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
      os.environ.setdefault(name, "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    platform, installed = "tpu", "jax[tpu]"
    settings = {"topology_name": topology} | ({"num_slices": num_slices} if num_slices > 1 else {})
  try:
    found = topologies.get_topology_desc(platform=platform, **settings)
  except Exception as error:  # Whatever the plugin says of it.
    raise ConfigError(
      "topology",
      topology,
      "one that there is a compiler for",
      f"pip install '{installed}', and check the shape ({str(error).splitlines()[0]:.80})",
    ) from None
  return list(found.devices)
