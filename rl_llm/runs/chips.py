"""The peak rates of accelerators, to compare measured and planned times with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


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
# From the same sheets: float32 that is not rounded to TF32. The B200's sheet does not state it.
FLOAT32 = {"a100": 19.5e12, "h100": 67e12, "h200": 67e12}
# JAX's names for them. Other models of a family (H100 PCIe, H100 NVL) have other limits.
DEVICE_KINDS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA A100-SXM4-40GB": "a100",
  "NVIDIA A100-SXM4-80GB": "a100",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA B200": "b200",
}


def matmul_precision(asked: str, dtype: Any, platform: str) -> str | None:
  """JAX's name for the precision of float32 products on a platform; None is JAX's default.

  By default a GPU multiplies float32 in TF32 and a TPU in bfloat16, so "auto" asks for more:

  >>> matmul_precision("auto", "float32", "tpu"), matmul_precision("auto", "bfloat16", "tpu")
  ('highest', None)

  Args:
    asked: "auto", or one of JAX's precisions, which is returned as it is.
    dtype: of the arithmetic.
    platform: JAX's name of a CPU, GPU or TPU platform.
  """
  if asked != "auto":
    return asked
  return "highest" if jnp.dtype(dtype) == jnp.float32 and platform != "cpu" else None


class Peak(NamedTuple):
  """The most operations a second that all devices can do together."""

  flops: float
  measured: bool  # True: measured here, since no maker publishes it


def published_flops(device_kind: str, dtype: Any, precision: str | None = None) -> float | None:
  """One device's operations a second as its maker states them; None if it is not in the table.

  By default JAX rounds float32 to bfloat16 on a TPU, which multiplies at the same rate, and to TF32
  on a GPU, at half the rate of bfloat16. At higher precision a TPU adds up three products of
  bfloat16 parts ("high") or six ("highest"), and a GPU does not use its tensor cores ("highest").

  >>> published_flops("TPU v5 lite", "float32") / 1e12
  197.0
  >>> published_flops("NVIDIA H100 80GB HBM3", "float32") / 1e12
  494.5
  >>> published_flops("NVIDIA H100 80GB HBM3", "float32", "highest") / 1e12
  67.0
  >>> published_flops("NVIDIA H100 PCIe", "bfloat16") is None
  True

  Args:
    device_kind: of a `jax.Device`.
    dtype: of the arithmetic, float32 or bfloat16.
    precision: of products of float32, as `jax.default_matmul_precision` has it.
  """
  kind = DEVICE_KINDS.get(device_kind)
  if kind is None or jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    return None
  flops = (TPUS | GPUS)[kind].flops
  if jnp.dtype(dtype) == jnp.bfloat16:
    return flops
  if kind in TPUS:
    return flops / {"high": 3, "highest": 6}.get(precision, 1)
  return FLOAT32.get(kind) if precision == "highest" else flops / 2


def product_flops(device: Any, dtype: Any, *, size: int = 768, seconds: float = 0.2) -> float:
  """Operations a second of a square matrix product: the fastest of all that fit into the time.

  On cores that other programs use too, it measures what those programs leave.

  Args:
    device: a `jax.Device`.
    dtype: of the matrices.
    size: of their sides: large enough to use all cores, small enough that many products fit.
    seconds: to spend after compiling; at least one product is computed.
  """
  square = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
  multiply = jax.jit(jnp.matmul)
  multiply(square, square).block_until_ready()
  best, until = float("inf"), time.perf_counter() + seconds
  while best == float("inf") or time.perf_counter() < until:
    started = time.perf_counter()
    multiply(square, square).block_until_ready()
    best = min(best, time.perf_counter() - started)
  return 2 * size**3 / best


def find_peak(
  devices: Sequence[Any],
  dtype: Any,
  *,
  precision: str | None = None,
  measure: Callable[..., float] = product_flops,
) -> Peak | None:
  """The peak of devices of one kind; None if it is not known.

  The peak of a CPU is measured. The CPU devices of a process share one machine's cores, and each
  product uses all of them, so together they have the peak of one device.

  Args:
    devices: all that train, of this process and of others.
    dtype: of the arithmetic.
    precision: as for `published_flops`.
    measure: (device, dtype) -> operations a second of a CPU.
  """
  kinds = {device.device_kind for device in devices}
  if len(kinds) > 1:
    return None
  own = [device for device in devices if device.process_index == jax.process_index()]
  if devices[0].platform == "cpu":
    return Peak(measure(own[0], dtype) * len(devices) / len(own), True)
  flops = published_flops(kinds.pop(), dtype, precision)
  return None if flops is None else Peak(flops * len(devices), False)
