"""The mesh over devices that only say where they are."""

from __future__ import annotations

import dataclasses

import pytest

from rl_llm import sharding


@dataclasses.dataclass(frozen=True)
class Device:
  """One of a pod, as far as laying out a mesh asks."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"


def test_slices_are_joined_along_data_alone():
  """Two slices of four: neighbours along fsdp and tensor are of one slice."""
  devices = [Device(i, slice_index=i % 2) for i in range(8)]
  grid = sharding.make_mesh(data=-1, fsdp=2, tensor=1, devices=devices).devices
  slices = [[device.slice_index for device in row.ravel()] for row in grid]
  assert grid.shape == (4, 2, 1)
  assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_an_axis_other_than_data_is_not_cut_over_slices():
  devices = [Device(i, slice_index=i % 2) for i in range(8)]
  with pytest.raises(sharding.ShardingError, match="2 slices .* joined along data; choose a mult"):
    sharding.make_mesh(data=1, fsdp=8, devices=devices)
