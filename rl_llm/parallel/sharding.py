"""Which device holds which part of each array: one mesh, rules by path, and the batch's rows.

A program of this library is written as if for one device. Given arrays that are laid out over a
mesh, JAX compiles the same program for all of its devices and inserts the communication. So a
person chooses only three numbers, the sizes of the mesh's axes:

    data     copies of the weights; each reads other rows of the batch
    fsdp     the same, but each device keeps a slice of every matrix and gathers it to use it
    tensor   devices that read the same rows, each with some of the heads and of the MLP's columns

The layouts of the weights and of the batch determine all others; rows lie over `data` and `fsdp`
together. The results are those of one device, up to the order of sums.

The devices may belong to several processes. All processes have the whole array on the host; each
gives its own devices their part, and `gather_to_host` brings back the whole.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rl_llm.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes over which the rows of a batch lie

# The first rule whose pattern is found in a leaf's path gives its layout; all other leaves (norms,
# counters, adapters, a scalar head) are whole on every device. The path of an optimiser moment ends
# with the path of its weight, so it has the same layout. Weights are [out, in].
RULES = (
  (r"(^|/)(v|v_row|v_col)/", P()),  # Adafactor's factors do not have their weights' shapes.
  (r"embedding$", P("tensor", "fsdp")),
  (r"(attention/(query|key|value)|mlp/(gate|up))/weight$", P("tensor", "fsdp")),
  (r"attention/output/weight$", P("fsdp", "tensor")),
  (r"mlp/down/weight$", P("fsdp", "tensor")),
  (r"attention/(query|key|value)/bias$", P("tensor")),
)


class ShardingError(UserError, ValueError):
  """Arrays or devices cannot be divided as asked; the message says which, and what to do."""


def make_mesh(
  *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges the devices; -1 takes what the other axes leave, for one axis at most.

  >>> dict(make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices()[:1]).shape)
  {'data': 1, 'fsdp': 1, 'tensor': 1}

  Neighbours along the mesh's last axis are neighbours in the machine, if JAX knows its topology, so
  tensor parallelism, which communicates most, gets the shortest links. Several TPU slices, with a
  slow network between them, are joined along `data`, which communicates least.

  Args:
    data: how many copies of the weights. Sizes that need fewer devices use the first ones.
    fsdp: over how many devices each copy is cut.
    tensor: over how many devices heads and MLP columns are cut.
    devices: by default all devices of the run.

  Raises:
    ShardingError: there are not enough devices, the size for -1 would be a fraction, or one of
      several processes would have no device.
  """
  everything = devices is None
  devices = jax.devices() if devices is None else list(devices)
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise ShardingError(f"mesh {asked}: a size is a number of devices, or -1 for the rest")
  rest = [name for name, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise ShardingError(f"mesh {asked}: only one axis can take the rest; give the others a size")
  given = math.prod(size for size in sizes.values() if size != -1)
  if rest:
    if len(devices) % given:
      raise ShardingError(
        f"mesh {asked}: {len(devices)} devices are not {given} times something; choose sizes whose "
        f"product divides {len(devices)}"
      )
    sizes[rest[0]] = len(devices) // given
  elif given > len(devices):
    raise ShardingError(
      f"mesh {asked}: {given} devices are needed, and there are {len(devices)}; choose less"
    )
  if everything and jax.process_count() > 1 and math.prod(sizes.values()) < len(devices):
    raise ShardingError(
      f"mesh {asked}: takes {math.prod(sizes.values())} of the {len(devices)} devices of "
      f"{jax.process_count()} processes; take all, or start fewer processes"
    )
  devices = devices[: math.prod(sizes.values())]
  # Axes of type Auto: the compiler lays out everything between the arrays that we place.
  types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  # An axis may be part of a side of the slice: tensor=4 is a quarter of a side of 16 chips.
  split = {"devices": devices, "allow_split_physical_axes": True}
  if slices == 1:
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), **split)
    return Mesh(grid, AXES, axis_types=types)
  if sizes["data"] % slices:
    raise ShardingError(
      f"mesh {asked}: {slices} slices of TPUs are joined along data; choose a multiple of {slices}"
    )
  within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
  grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **split)
  return Mesh(grid, AXES, axis_types=types)


def whole_along_fsdp(mesh: Mesh) -> Mesh:
  """The same devices without `fsdp`: rows keep their layout, weights are cut along `tensor` only.

  Sampling reads every matrix at every token, and would gather a matrix that is cut along `fsdp`
  each time. If the gathered weights fit in memory, sample on this mesh.

  >>> devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
  >>> dict(whole_along_fsdp(Mesh(devices, AXES)).shape)
  {'data': 1, 'fsdp': 1, 'tensor': 1}
  """
  data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
  return Mesh(mesh.devices.reshape(data * fsdp, 1, tensor), AXES, axis_types=mesh.axis_types)


def row_shards(mesh: Mesh) -> int:
  """The number of parts that a batch's rows are cut into; the row count must be a multiple."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(mesh: Mesh, settings: dict[str, int], *, minibatches: int = 1) -> None:
  """Refuses a batch that cannot be cut for the mesh.

  Args:
    mesh: from `make_mesh`.
    settings: flag name -> size that must be divisible.
    minibatches: how many minibatches each is cut into first.

  Raises:
    ShardingError: a size is not a multiple of the number of devices over which rows lie.
  """
  parts = row_shards(mesh)
  multiple = parts * minibatches
  shares = f" in each of {minibatches} minibatches" if minibatches > 1 else ""
  for name, value in settings.items():
    if value % multiple:
      raise ShardingError(
        f"--{name}={value}: must be a multiple of {multiple}: rows lie over data x fsdp = {parts} "
        f"devices{shares}; try --{name}={-(-value // multiple) * multiple}, or a smaller "
        "--mesh.data"
      )


def row_sharding(mesh: Mesh) -> NamedSharding:
  """The layout of an array whose first axis is the rows of a batch."""
  return _layout(mesh, P(ROWS))


def tree_shardings(tree: Any, mesh: Mesh, *, rules: Sequence[tuple[str, P]] = RULES) -> Any:
  """The layout on the mesh of each leaf of a tree of weights, or of a train state.

  >>> from jax.sharding import AbstractMesh  # Eight devices that need not be there.
  >>> mesh = AbstractMesh((1, 4, 2), AXES)
  >>> weights = {"mlp": {"down": {"weight": jax.ShapeDtypeStruct((64, 256), "float32")}}}
  >>> tuple(tree_shardings(weights, mesh)["mlp"]["down"]["weight"].spec)
  ('fsdp', 'tensor')

  Args:
    tree: arrays, or the shapes from `jax.eval_shape`.
    mesh: from `make_mesh`.
    rules: (pattern, PartitionSpec). The first rule whose pattern `re.search` finds in the leaf's
      path ("params/layers_0/mlp/up/weight") applies; without one, the leaf is whole on every
      device.

  Returns:
    The tree with a `NamedSharding` for each leaf.

  Raises:
    ShardingError: an axis does not divide a dimension, or a rule has more dimensions than its leaf.
  """

  def sharding(path, leaf) -> NamedSharding:
    name, spec = _rule(path, rules)
    if len(spec) > len(leaf.shape):
      raise ShardingError(f"{name}: shape {leaf.shape} has fewer dimensions than its rule, {spec}")
    for dimension, axes in enumerate(spec):
      size = math.prod(mesh.shape[axis] for axis in _names(axes))
      if leaf.shape[dimension] % size:
        raise ShardingError(
          f"{name}: dimension {dimension} of {tuple(leaf.shape)} cannot be cut into {size} parts "
          f"(mesh axis {'+'.join(_names(axes))}); choose a divisor of {leaf.shape[dimension]}"
        )
    return _layout(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def sharded_shapes(shapes: Any, mesh: Mesh) -> Any:
  """Shapes with the layout of `tree_shardings`, to restore a checkpoint into, or to compile a
  program for without an array."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    tree_shardings(shapes, mesh),
  )


def constrain(tree: Any, mesh: Mesh) -> Any:
  """Within a compiled function: keeps weights, gradients or a state as `tree_shardings` says."""
  return jax.lax.with_sharding_constraint(tree, tree_shardings(tree, mesh))


def constrain_stacked(tree: Any, mesh: Mesh) -> Any:
  """Within a compiled function: keeps stacked layers laid out, each slice by its rule.

  Args:
    tree: with one layer's paths; each leaf is [layers, ...] of a leaf for `tree_shardings`.
    mesh: from `make_mesh`.
  """
  one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
  layouts = jax.tree.map(
    lambda layout: NamedSharding(mesh, P(None, *layout.spec)), tree_shardings(one, mesh)
  )
  return jax.lax.with_sharding_constraint(tree, layouts)


def copy_to_rows(tree: Any, mesh: Mesh) -> Any:
  """Within a compiled function: copies the weights, one copy for each part of the rows.

  A matrix [out, in] becomes [parts, out, in], with one part on each device along `data` and `fsdp`
  (`row_shards`): a device gathers its copy and multiplies its own rows with it. XLA cannot keep a
  partial sum: left alone, it all-reduces the full gradient at every use of the matrix. A copy's
  gradient stays on its device, however often the copy is used. The copies' gradients are added up
  once, in float32, and each device takes its slice of the sum:

      gradient[slice] = sum over parts of gradient[part, slice]

  >>> mesh = make_mesh(devices=jax.devices()[:1])
  >>> weights = {"mlp": {"up": {"weight": np.ones((8, 2))}}, "norm": {"scale": np.ones(2)}}
  >>> jax.tree.map(lambda x: x.shape, jax.jit(lambda w: copy_to_rows(w, mesh))(weights))
  {'mlp': {'up': {'weight': (1, 8, 2)}}, 'norm': {'scale': (2,)}}

  Args:
    tree: weights, by paths that `tree_shardings` knows. A leaf that no rule cuts along `fsdp` stays
      as it is.
    mesh: from `make_mesh`.
  """

  def copy(path, leaf: chex.Array) -> chex.Array:
    _, spec = _rule(path, RULES)
    axis = next((n for n, axes in enumerate(spec) if "fsdp" in _names(axes)), None)
    if axis is None:
      return jax.lax.with_sharding_constraint(leaf, _layout(mesh, spec))
    copies = P(ROWS, *(None if n == axis else axes for n, axes in enumerate(spec)))

    # All communication is explicit and need not be checked: gradients come from `added`.
    on_each = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)

    @functools.partial(on_each, in_specs=spec, out_specs=copies)
    def gathered(part):
      if mesh.shape["fsdp"] > 1:
        part = jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)
      return part[None]

    @functools.partial(on_each, in_specs=copies, out_specs=spec)
    def added(gradient):
      part = gradient[0].astype(jnp.promote_types(gradient.dtype, jnp.float32))
      if mesh.shape["fsdp"] > 1:
        part = jax.lax.psum_scatter(part, "fsdp", scatter_dimension=axis, tiled=True)
      if mesh.shape["data"] > 1:
        part = jax.lax.psum(part, "data")
      return part.astype(gradient.dtype)

    function = jax.custom_vjp(gathered)
    function.defvjp(lambda part: (gathered(part), None), lambda _, gradient: (added(gradient),))
    return function(leaf)

  return jax.tree_util.tree_map_with_path(copy, tree)


def constrain_rows(tree: Any, mesh: Mesh, *, axis: int = 0) -> Any:
  """Within a compiled function: cuts the given axis of every array over the devices like rows."""
  return jax.lax.with_sharding_constraint(tree, _layout(mesh, P(*[None] * axis, ROWS)))


def shard(tree: Any, mesh: Mesh) -> Any:
  """Puts weights or a state on their devices, laid out by `tree_shardings`."""
  return jax.tree.map(_put, tree, tree_shardings(tree, mesh))


def shard_rows(tree: Any, mesh: Mesh | None) -> Any:
  """Puts a batch on the devices: the first axis of every array is cut over `data` and `fsdp`.

  Args:
    tree: arrays whose rows are the batch; scalars are whole on every device.
    mesh: from `make_mesh`; None leaves the batch as it is.

  Raises:
    ShardingError: the number of rows is not a multiple of `row_shards`.
  """
  if mesh is None:
    return tree
  parts = row_shards(mesh)

  def put(path, x: chex.Array) -> jax.Array:
    if x.ndim and x.shape[0] % parts:
      name = jax.tree_util.keystr(path, simple=True, separator="/") or "batch"
      raise ShardingError(
        f"{name}: {x.shape[0]} rows cannot be cut into {parts} parts (mesh axes data and fsdp); "
        f"choose a multiple of {parts}"
      )
    return _put(x, row_sharding(mesh) if x.ndim else NamedSharding(mesh, P()))

  return jax.tree_util.tree_map_with_path(put, tree)


def row_owners(mesh: Mesh, rows: int) -> np.ndarray:
  """[rows] which process holds each row of a batch; if several do, the first of them.

  >>> row_owners(make_mesh(devices=jax.devices()[:1]), 3).tolist()
  [0, 0, 0]

  Args:
    mesh: from `make_mesh`.
    rows: of the batch, a multiple of `row_shards`.
  """
  owners = np.full(rows, np.iinfo(np.int32).max)
  for device, index in row_sharding(mesh).devices_indices_map((rows,)).items():
    owners[index] = np.minimum(owners[index], device.process_index)
  return owners


def gather_to_host(tree: Any) -> Any:
  """Device arrays as whole NumPy arrays in every process; all processes must call it together.

  Args:
    tree: arrays with any layout; anything else is returned as it is.
  """
  leaves, treedef = jax.tree.flatten(tree)
  # Those of which other processes hold parts that this process does not.
  ours = [not isinstance(x, jax.Array) or x.is_fully_addressable for x in leaves]
  parts = [n for n, x in enumerate(leaves) if not ours[n] and not x.is_fully_replicated]
  if parts:
    whole = [NamedSharding(leaves[n].sharding.mesh, P()) for n in parts]
    gathered = _same(tuple(whole))([leaves[n] for n in parts])
    for n, x in zip(parts, gathered, strict=True):
      leaves[n] = x
  return jax.device_get(jax.tree.unflatten(treedef, leaves))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Arrays that are the same in every process, whole on every device of the mesh."""
  return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, P())), tree)


@functools.cache
def _same(shardings: tuple[NamedSharding, ...]):
  return jax.jit(lambda arrays: arrays, out_shardings=list(shardings))


def _put(x: chex.Array, sharding: NamedSharding) -> jax.Array:
  """The array in that layout; each process has the whole array and puts its own part."""
  if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
    return jax.device_put(x, sharding)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _put(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)


def _rule(path: Any, rules: Sequence[tuple[str, P]]) -> tuple[str, P]:
  """A leaf's name, and the spec of the first rule that matches it."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return name, next((spec for pattern, spec in rules if re.search(pattern, name)), P())


def _layout(mesh: Mesh, spec: P) -> NamedSharding:
  """The spec without axes of size 1, as JAX describes the output of a compiled function.

  Equal layouts that are written differently would make a function compile twice.
  """
  kept = [tuple(axis for axis in _names(axes) if mesh.shape[axis] > 1) for axes in spec]
  while kept and not kept[-1]:
    kept.pop()
  return NamedSharding(mesh, P(*(axes[0] if len(axes) == 1 else axes or None for axes in kept)))


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The axes of one entry of a PartitionSpec."""
  return (axes,) if isinstance(axes, str) else axes or ()
