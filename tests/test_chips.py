"""The peak that MFU is held against: looked up by the device's name, measured on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import jax
import pytest

from rl_llm.runs import chips
from rl_llm.runs.chips import GPUS, TPUS, Peak, find_peak, product_flops, published_flops


class Device(NamedTuple):
  device_kind: str
  platform: str = "gpu"
  process_index: int = 0


@pytest.mark.parametrize("name", chips.DEVICE_KINDS)
def test_every_name_leads_to_a_chip(name):
  chip = (TPUS | GPUS)[chips.DEVICE_KINDS[name]]
  assert published_flops(name, "bfloat16") == chip.flops
  halves = 2 if name.startswith("NVIDIA") else 1
  assert published_flops(name, "float32") == chip.flops / halves


def test_devices_of_one_kind_add_up_and_unknown_or_mixed_ones_have_no_peak():
  def measure(device, dtype):
    raise AssertionError("only a CPU's peak is measured")

  h100 = Device("NVIDIA H100 80GB HBM3")
  assert find_peak([h100] * 8, "bfloat16", measure=measure) == Peak(8 * 989e12, False)
  assert find_peak([Device("NVIDIA H100 PCIe")], "bfloat16", measure=measure) is None
  assert find_peak([h100, Device("NVIDIA H200")], "bfloat16", measure=measure) is None
  assert find_peak([h100], "float64", measure=measure) is None


def test_the_cpu_devices_of_a_process_share_one_machine():
  asked = []

  def measure(device, dtype):
    asked.append((device, dtype))
    return 1e11

  one, other = Device("cpu", "cpu"), Device("cpu", "cpu", 1)
  assert find_peak([one], "float32", measure=measure) == Peak(1e11, True)
  assert find_peak([one] * 4, "float32", measure=measure) == Peak(1e11, True)
  # Two processes of four: as if on two machines, of which this process measures its own.
  assert find_peak([other] * 4 + [one] * 4, "bfloat16", measure=measure) == Peak(2e11, True)
  assert asked == [(one, "float32")] * 2 + [(one, "bfloat16")]


def test_a_product_is_measured_on_the_device_asked_for(monkeypatch):
  # The time is over at 5; products from 1 to 3 and from 4.5 to 5.
  ticks = iter([0.0, 1.0, 3.0, 4.0, 4.5, 5.0, 5.5])
  monkeypatch.setattr(chips, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
  rate = product_flops(jax.devices()[0], "float32", size=8, seconds=5.0)
  assert rate == 2 * 8**3 / 0.5
