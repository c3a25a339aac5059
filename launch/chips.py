"""The slices and boxes that can be planned for: how many accelerators of which kind lie how."""

from __future__ import annotations

import math
import os
import re

import jax

from rl_llm.chips import GPUS, TPUS, Chip
from rl_llm.config import ConfigError

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
