"""The mesh over devices that only say where they are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.parallel import sharding
from rl_llm.rollout.generation import gather_weights


@dataclasses.dataclass(frozen=True)
class Device:
  """One of a pod, as far as laying out a mesh asks."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "cpu"
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0


def test_slices_are_joined_along_data_alone():
  """Two slices of four: neighbours along fsdp and tensor are of one slice."""
  devices = [Device(i, slice_index=i % 2) for i in range(8)]
  grid = sharding.make_mesh(data=-1, fsdp=2, tensor=1, devices=devices).devices
  slices = [[device.slice_index for device in row.ravel()] for row in grid]
  assert grid.shape == (4, 2, 1)
  assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_an_axis_may_be_part_of_a_side_of_a_slice():
  """16 x 16 chips as 64 x 4: four that share a matrix lie in one line, with no other between."""
  chips = [
    Device(16 * y + x, 0, platform="tpu", device_kind="TPU v6 lite", coords=(x, y, 0))
    for y in range(16)
    for x in range(16)
  ]
  grid = sharding.make_mesh(data=1, fsdp=64, tensor=4, devices=chips).devices
  assert grid.shape == (1, 64, 4) and len(set(grid.ravel())) == 256
  for row in grid[0]:
    across, along = sorted((sorted({chip.coords[n] for chip in row}) for n in (0, 1)), key=len)
    assert len(across) == 1 and along == list(range(along[0], along[0] + 4))


def test_an_axis_other_than_data_is_not_cut_over_slices():
  devices = [Device(i, slice_index=i % 2) for i in range(8)]
  with pytest.raises(sharding.ShardingError, match="2 slices .* joined along data; choose a mult"):
    sharding.make_mesh(data=1, fsdp=8, devices=devices)


def test_without_fsdp_devices_keep_their_order_and_rows_their_parts():
  devices = [Device(i, slice_index=0) for i in range(8)]
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
  whole = sharding.whole_along_fsdp(mesh)
  assert dict(whole.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
  assert list(whole.devices.ravel()) == list(mesh.devices.ravel())
  assert sharding.row_shards(whole) == sharding.row_shards(mesh) == 4


def test_gathered_weights_are_rounded_and_whole():
  mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
  weights = {"layers_0": {"mlp": {"up": {"weight": jnp.linspace(0, 1, 12).reshape(4, 3)}}}}
  found = gather_weights(weights, dtype=jnp.bfloat16, mesh=sharding.whole_along_fsdp(mesh))
  (leaf,), (wanted,) = jax.tree.leaves(found), jax.tree.leaves(weights)
  assert jax.tree.structure(found) == jax.tree.structure(weights)
  assert leaf.dtype == jnp.bfloat16 and leaf.sharding.is_fully_replicated
  np.testing.assert_array_equal(leaf, wanted.astype(jnp.bfloat16))
