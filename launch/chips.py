"""The accelerators that can be planned for: their limits, and how many of them lie how."""

from __future__ import annotations

import math
import os
import re
from typing import NamedTuple

import jax

from rl_llm.config import ConfigError


class Chip(NamedTuple):
  """One accelerator's limits."""

  hbm: float  # bytes
  flops: float  # bfloat16 operations a second
  bandwidth: float  # bytes a second between HBM and the chip
  network: float  # bytes a second to and from its neighbours, all links together, both ways


# cloud.google.com/tpu/docs: system architecture of each version; links as in
# jax-ml.github.io/scaling-book/tpus (two directions; 4 links in a 2D torus, 6 in a 3D one).
TPUS = {
  "v4": Chip(32e9, 275e12, 1.2e12, 270e9),
  "v5e": Chip(16e9, 197e12, 0.82e12, 180e9),
  "v5p": Chip(95e9, 459e12, 2.8e12, 540e9),
  "v6e": Chip(32e9, 918e12, 1.6e12, 360e9),
}
# NVIDIA's data sheets (nvidia.com/en-us/data-center: a100 80GB SXM, h100 SXM, h200 SXM; DGX B200,
# an eighth of it): dense bfloat16, and NVLink in both directions together.
GPUS = {
  "a100": Chip(80e9, 312e12, 2.039e12, 600e9),
  "h100": Chip(80e9, 989e12, 3.35e12, 900e9),
  "h200": Chip(141e9, 989e12, 4.8e12, 900e9),
  "b200": Chip(180e9, 2250e12, 8e12, 1800e9),
}
GPUS_A_BOX = 8  # Joined by NVLink; beyond, each has a network card of 400 Gb/s in the same systems.
NETWORK_CARD = 100e9  # bytes a second, both ways


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
  """The kind of chip, and how they lie.

  >>> parse("v5e:4x4"), parse("h100:16")
  (('v5e', (4, 4)), ('h100', (16,)))

  Raises:
    ConfigError: it is not such a name.
  """
  kind, _, shape = topology.partition(":")
  by_shape, by_number = re.fullmatch(r"\d+(x\d+)*", shape), re.fullmatch(r"\d+", shape)
  if not (kind in TPUS and by_shape or kind in ("cpu", *GPUS) and by_number):
    raise ConfigError(
      "topology", topology,
      f"one of {', '.join(TPUS)} with a shape, as in v5e:4x4, or of cpu, {', '.join(GPUS)} with a "
      "number, as in h100:8",
    )
  return kind, tuple(int(size) for size in shape.split("x"))


def find_chip(topology: str) -> tuple[Chip | None, int]:
  """The limits of a chip, None of a CPU's, and how many there are of a slice."""
  kind, shape = parse(topology)
  count = math.prod(shape)
  chip = (TPUS | GPUS).get(kind)
  if kind in GPUS and count > GPUS_A_BOX:
    chip = chip._replace(network=NETWORK_CARD)
  return chip, count


def has_compiler(topology: str) -> bool:
  """Whether programs can be compiled for it without it."""
  return parse(topology)[0] not in GPUS


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

  # No metadata server tells what machine this is, and libtpu need not say so. Nor need it be the
  # only one on the machine: it takes no chip, and a second plan was refused beside a first.
  for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    os.environ.setdefault(name, "1")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  settings = {"num_slices": num_slices} if num_slices > 1 else {}
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings)
  except Exception as error:  # Whatever libtpu says of it.
    raise ConfigError(
      "topology", topology, "one that libtpu can compile for",
      f"pip install 'jax[tpu]', and check the shape ({str(error).splitlines()[0]:.80})",
    ) from None
  return list(found.devices)
