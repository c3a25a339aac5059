"""Checkpoints that are either whole or do not count.

A killed run resumes from its newest checkpoint, so that checkpoint must be right. Orbax writes the
arrays, but it does not protect them: in some modes it lists a half-made directory as the newest
step, and it silently reads flipped bits in array data, casts dtypes, and stores two leaves whose
dotted names agree as one. This module adds what is missing:

    DIRECTORY/40/state/...        the arrays, written by Orbax
    DIRECTORY/40/manifest.json    size and SHA-256 of every file; path, dtype, shape of every leaf;
                                  and `extra`
    DIRECTORY/.saving-50/         an unfinished save: never read, removed by the next save

A step is written to a temporary directory, flushed to disk, described by its manifest (whose first
line is a hash of the rest), and only then renamed to its number. It is read only after every file
has been hashed again and the tree of leaves compared with the one asked for.

What is in `state`: `rl_llm.training.train_state.TrainState` (the weights, the optimiser's moments,
counts of updates, controllers, a refreshed reference), or an experiment's `State` that holds one
(experiments/ppo.py, reinforce.py). What is in `extra`: `rl_llm/runs/origin.py`. When it is
written, and why a kill loses nothing: docs/design.md, "What a checkpoint holds".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging as python_logging
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from rl_llm.errors import UserError
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import gather_to_host, make_mesh, replicate
from rl_llm.runs.bucket import Bucket, BucketError

FORMAT_VERSION = 1

_MANIFEST = "manifest.json"
_STATE = "state"
_SAVING = ".saving-"
_DELETING = ".deleting-"
_MAX_LISTED = 10  # leaf paths in one message
_DATA_FILE_BYTES = 256 * 1024**2  # splits the data into files that are hashed in parallel


class CheckpointError(UserError, RuntimeError):
  """A checkpoint cannot be written, trusted or used; the message says which, and what to do."""


class _DamagedError(CheckpointError):
  """A step whose files are not those its manifest describes."""


class Checkpointer:
  """The checkpoints of one run, in one directory that belongs to it.

  Nothing is cached and nothing stays open: once `save` returns, the step is on disk, and every call
  reads the directory again. `start_save` leaves the writing to a thread, of one save at a time, and
  every later call waits for it. In a run of several processes, all of them make the same calls on
  one shared directory.

  >>> import tempfile
  >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
  ...   checkpointer.save(40, {"w": jnp.arange(3.0)}, {"seed": 7})
  ...   step, state, extra = checkpointer.restore({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
  >>> step, state["w"].tolist(), extra
  (40, [0.0, 1.0, 2.0], {'seed': 7})

  Args:
    directory: where the steps go, on a mounted local or network file system; created if missing.
    keep: how many steps stay after a save, >= 1; older ones are deleted once the new one has been
      read back from the disk.
    keep_best: whether the step that `protect` names stays too.
    copy_to: gs:// or s3:// address to which each step is copied once it is on disk; see `fetch`.

  Raises:
    CheckpointError: the directory cannot be made, or is an object-store address such as gs://.
    ValueError: keep < 1.
  """

  def __init__(
    self, directory: str | os.PathLike, *, keep: int = 2, keep_best: bool = False, copy_to: str = ""
  ):
    if keep < 1:
      raise ValueError(f"keep is {keep}; it must be at least 1, for the newest checkpoint")
    if "://" in str(directory):
      raise CheckpointError(
        f"directory is {directory}; a file system path is needed: give the address of a bucket "
        "as copy_to"
      )
    self.directory = Path(directory).absolute()
    self.keep, self.keep_best = keep, keep_best
    self._best: int | None = None
    self._copies = Bucket(copy_to) if copy_to and hosts.is_main() else None
    self._reported: set[int] = set()  # damaged steps, so that each is reported once
    self._writer, self._saving = ThreadPoolExecutor(1), None
    python_logging.getLogger("absl").addFilter(_quiet_orbax)
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise CheckpointError(
        f"cannot make the checkpoint directory {self.directory}: {error.strerror}. "
        "Give a writable path"
      ) from None

  def __enter__(self) -> Checkpointer:
    return self

  def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
    """Waits for a save that has been started; its error is logged if another one is on its way."""
    try:
      self.wait()
    except CheckpointError as error:
      if kind is None:
        raise
      logging.error("%s", error)

  def save(self, step: int, state: Any, extra: dict | None = None) -> None:
    """Writes one step; on return it is on disk, and the oldest steps beyond `keep` are gone.

    If it is killed, interrupted or out of space at any point, the earlier steps stay as they were,
    and no half-written step is left.

    Args:
      step: the step's number, >= 0. A sound step of that number is never overwritten: the save is
        refused. Anything else there is replaced.
      state: any pytree of jax arrays (typed PRNG keys and bfloat16 included). Python numbers belong
        in `extra`.
      extra: a small dict that JSON can hold, returned by `restore`. Tuples come back as lists.

    Raises:
      CheckpointError: the number is taken; a leaf holds NaN or infinity (checked on the device), so
        no run could resume from it; or the step cannot be written. The message names the path.
      TypeError: a leaf is not a jax array, or JSON cannot hold `extra`.
      ValueError: step is not an int >= 0.
    """
    self._write(step, *self._checked(step, state, extra))

  def start_save(self, step: int, state: Any, extra: dict | None = None) -> None:
    """`save`, but the step is written while the caller computes; `wait` ends when it is on disk.

    On return the state is checked and copied to the host's memory, so the caller may donate its
    arrays. The next call of any method waits first, and raises what went wrong with this save.
    With several processes it is `save`: they write one checkpoint together.

    >>> import tempfile
    >>> update = jax.jit(lambda w: w + 1, donate_argnums=0)
    >>> w = jnp.zeros(3)
    >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
    ...   checkpointer.start_save(0, {"w": w})
    ...   w = update(w)
    ...   checkpointer.restore({"w": w})[1]["w"].tolist(), w.tolist()
    ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])

    Args:
      step, state, extra: as for `save`.

    Raises:
      CheckpointError: as for `save`, or that an earlier save could not be written.
      TypeError, ValueError: as for `save`.
    """
    leaves, extra = self._checked(step, state, extra)
    if hosts.count() > 1:
      self._write(step, leaves, extra)
    else:
      self._saving = self._writer.submit(self._write, step, _on_host(leaves), extra)

  def wait(self) -> None:
    """Returns once the save that `start_save` began, if any, is on disk.

    Raises:
      CheckpointError: it could not be written; raised once.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def _checked(self, step: int, state: Any, extra: dict | None) -> tuple[dict[str, Any], dict]:
    """The state's leaves by name, and `extra` as JSON has it, if they may be saved as this step."""
    self.wait()
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
      raise ValueError(f"step is {step!r}; it must be an int >= 0 (for an array: int(step))")
    leaves = _named_leaves(_of_all_processes(state))
    for name, leaf in leaves.items():
      if not isinstance(leaf, jax.Array):
        raise TypeError(
          f"state leaf {name} is a {type(leaf).__name__}; make it a jax array "
          "(jnp.asarray) or put it in `extra`"
        )
    extra = _checked_extra(extra)
    _refuse_nonfinite(step, leaves)
    taken = hosts.is_main() and step in self.steps() and bool(self._sound(step))
    if hosts.broadcast(f"the checkpoint of step {step}", taken):
      raise CheckpointError(
        f"{self.directory / str(step)} holds a sound checkpoint already; save under another "
        "number, or move that directory away first"
      )
    return leaves, extra

  def _write(self, step: int, leaves: dict[str, Any], extra: dict) -> None:
    """Writes a step that has been checked, deletes the oldest ones, and copies it to the bucket."""
    final, aside = self.directory / str(step), self.directory / f"{_SAVING}{step}"
    first = hosts.is_main()
    try:
      if first:
        self._remove_leftovers()
        aside.mkdir()
      hosts.barrier(f"the beginning of the checkpoint of step {step}")
      # Orbax refuses empty arrays; the manifest already holds their shapes and dtypes.
      stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
      if stored:
        with _orbax_context(), _quiet_after_failure():
          ocp.save(aside / _STATE, _nested(stored))
      if first:
        _write_manifest(aside, step, leaves, extra)
        if os.path.lexists(final):
          os.rename(final, self.directory / f"{_DELETING}{step}")
        os.rename(aside, final)
        _sync(self.directory)
        self._reported.discard(step)
      hosts.barrier(f"the end of the checkpoint of step {step}")
    except BaseException as error:
      if first:
        _remove(aside)
      if isinstance(error, hosts.HostLost):
        raise
      # Orbax waits for all processes too, and raises when one of them does not arrive.
      if hosts.count() > 1 and (isinstance(error, TimeoutError) or hosts.is_of_network(error)):
        raise hosts.HostLost(hosts.lost(error)) from None
      if isinstance(error, Exception):
        raise CheckpointError(
          f"step {step} could not be saved in {self.directory}: {_brief(error)}. Earlier "
          f"checkpoints are untouched. {_save_hint(self.directory, error)}"
        ) from None
      raise
    if first:
      try:
        self._drop_from_cache(step)
        if self._sound(step):  # Else the older ones are still needed.
          self._prune(step)
      except OSError as error:
        logging.warning("step %d is saved; older ones could not be deleted: %s", step, error)
      self._copy(step)

  def _copy(self, step: int) -> None:
    """Copies a step to the bucket, and deletes there what is not here any more."""
    try:
      if self._copies is not None:
        self._copies.upload(self.directory, step)
        for old in set(self._copies.steps()) - set(_steps_in(self.directory)):
          self._copies.delete(old)
    except BucketError as error:
      where = self.directory / str(step)
      logging.error("step %d is saved in %s and could not be copied: %s", step, where, error)

  def fetch(self, origin: Mapping[str, Any]) -> int | None:
    """Fetches the newest copy if it is newer than all that lies here; its step, or None.

    Its files are not verified here: `latest` and `restore` do that, as for every step.

    Args:
      origin: entries of `extra` that this run's steps have; a copy with other values is another
        run's.

    Raises:
      BucketError: it cannot be read, or is another run's.
    """
    if self._copies is None:
      return None
    copies, here = self._copies.steps(), self.steps()
    if not copies or (here and here[-1] >= copies[-1]):
      return None
    found = self._copies.manifest(copies[-1])["extra"]
    if any(found.get(name, value) != value for name, value in origin.items()):
      raise BucketError(
        f"{self._copies.address}/{copies[-1]} is another run's; give an address of this run alone"
      )
    self._copies.download(self.directory, copies[-1])
    return copies[-1]

  def latest(self) -> int | None:
    """The newest step that verifies, or None.

    Hashes every file, so it reads the whole step (about 1 GB/s per core). A newer step that does
    not verify is skipped, with one line in the log that names the file and what is wrong with it.

    Raises:
      CheckpointError: there are steps but none verifies (only a person may decide to start over),
        or the newest sound step has a later format than this package reads.
    """
    found = self._newest()
    if found is None and self._reported:
      raise CheckpointError(
        f"no checkpoint in {self.directory} verifies (damaged: {sorted(self._reported)}); "
        "restore one from a backup, or delete the run's directory to begin anew"
      )
    return None if found is None else found["step"]

  def restore(
    self, abstract_state: Any, step: int | None = None, *, below: str = ""
  ) -> tuple[int, Any, dict]:
    """Reads a step into the structure, dtypes and shardings of `abstract_state`.

    First compares the two trees, leaf by leaf, by path, shape and dtype. Container types do not
    matter: a NamedTuple may become a dict with the same names.

    Args:
      abstract_state: a pytree of `jax.ShapeDtypeStruct` (from `jax.eval_shape`) or of
        arrays. A leaf with a sharding is read into it, on whatever devices it names; a leaf
        without one goes to the first local device.
      step: which step; by default the newest that verifies.
      below: the beginning of the paths of a part of the state, such as "params/": what is asked for
        is looked up there, and the rest is neither compared nor read.

    Returns:
      The step, the state, and `extra` as given to `save`.

    Raises:
      CheckpointError: there is no such step, it does not verify, or the trees differ (up to ten
        leaves are listed).
    """
    self.wait()
    if step is None:
      manifest = self._newest()
      if manifest is None:
        raise CheckpointError(
          f"no sound checkpoint in {self.directory}; start from scratch, or check the path"
        )
    else:
      manifest = _verified(self.directory / str(step), step)
    wanted = {f"{below}{name}": leaf for name, leaf in _named_leaves(abstract_state).items()}
    saved = [leaf for leaf in manifest["leaves"] if not below or leaf[0] in wanted]
    _compare_trees(self.directory / str(manifest["step"]), saved, wanted)
    wanted = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
      for name, leaf in wanted.items()
    }
    stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
    arrays = {
      name: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
      for name, leaf in wanted.items()
      if not leaf.size
    }
    path = self.directory / str(manifest["step"]) / _STATE
    if stored:
      try:
        with _orbax_context(partial=bool(below)), _quiet_after_failure():
          arrays |= _named_leaves(ocp.load(path, _nested(stored)))
      except Exception as error:
        raise CheckpointError(
          f"{path} verifies but could not be read: {_brief(error)}. Check the memory, and that "
          "the shardings of abstract_state divide the shapes"
        ) from None
    ordered = [arrays[name] for name in wanted]
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), ordered)
    return manifest["step"], state, manifest["extra"]

  def bytes_needed(self, shapes: Any) -> tuple[int, int]:
    """(bytes of one checkpoint, bytes of free disk that the saves to come need at most).

    A save writes the new step next to the `keep` that stay until it has been read back, so `keep`
    + 1 lie there at once, and one more with `keep_best`. Those that lie there already need no
    further room.

    Args:
      shapes: a pytree of arrays or `jax.ShapeDtypeStruct`: the state.
    """
    size = sum(_bytes(leaf) for leaf in jax.tree.leaves(shapes))
    return size, size * max(self.keep + self.keep_best + 1 - len(self.steps()), 1)

  def steps(self) -> list[int]:
    """The numbers of the steps that lie there, sound or not, in order."""
    self.wait()
    return _steps_in(self.directory)

  def protect(self, step: int) -> None:
    """Keeps this step, the best so far, whatever is newer; the one named before may go.

    >>> import tempfile
    >>> checkpointer = Checkpointer(tempfile.mkdtemp(), keep=1, keep_best=True)
    >>> for step in range(3):
    ...   checkpointer.save(step, {"w": jnp.ones(1)})
    ...   if step == 1:
    ...     checkpointer.protect(1)
    >>> checkpointer.steps()
    [1, 2]

    Args:
      step: one that has been saved.
    """
    self.wait()
    self._best = step
    if hosts.is_main() and (steps := self.steps()):
      self._prune(steps[-1])

  def _sound(self, step: int) -> dict | None:
    """The step's manifest if the step verifies, else None; reports a damaged step once."""
    try:
      return _verified(self.directory / str(step), step)
    except _DamagedError as error:
      if step not in self._reported:
        self._reported.add(step)
        logging.error("DAMAGED CHECKPOINT, passed over: %s", error)
    return None

  def _newest(self) -> dict | None:
    """The manifest of the newest sound step; the first process reads it for all."""
    found = None
    if hosts.is_main():
      sound = (self._sound(step) for step in reversed(self.steps()))
      found = next((manifest for manifest in sound if manifest is not None), None)
    found, reported = hosts.broadcast("the newest checkpoint", [found, sorted(self._reported)])
    self._reported = set(reported)
    return found

  def _drop_from_cache(self, step: int) -> None:
    """Makes the next read of a step's files come from the disk; what is not there yet stays."""
    for root, _, names in os.walk(self.directory / str(step)):
      for name in names:
        with open(os.path.join(root, name), "rb") as file:
          os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

  def keep_only(self, count: int) -> None:
    """Deletes all but the newest `count` steps, of a run that has ended, and the protected one."""
    if hosts.is_main():
      steps = self.steps()
      older = steps[: max(0, len(steps) - count)]
      self._delete([step for step in older if step != self._best])

  def _prune(self, step: int) -> None:
    """Deletes all but the newest `keep` up to `step` and the best; no damaged one is kept."""
    older = [s for s in _steps_in(self.directory) if s < step and s != self._best]
    kept = sorted(set(older) - self._reported, reverse=True)[: self.keep - 1]
    self._delete([old for old in older if old not in kept])

  def _delete(self, steps: list[int]) -> None:
    for step in steps:  # renamed first: a deletion cut short must not look like damage
      os.rename(self.directory / str(step), self.directory / f"{_DELETING}{step}")
    self._remove_leftovers()

  def _remove_leftovers(self) -> None:
    for entry in list(os.scandir(self.directory)):
      if entry.name.startswith((_SAVING, _DELETING)):
        if entry.is_dir(follow_symlinks=False):
          shutil.rmtree(entry.path, ignore_errors=True)
        else:
          os.unlink(entry.path)


def extras(directory: Path) -> dict[int, dict]:
  """{step: `extra`} of the steps whose manifests are sound; no array data is read.

  Args:
    directory: of a run's checkpoints; it may be missing.
  """
  found = {}
  for step in _steps_in(directory) if directory.is_dir() else []:
    try:
      found[step] = _manifest(directory / str(step), step)["extra"]
    except CheckpointError:  # Whoever reads the step will say so.
      continue
  return found


def leaves_of(directory: Path, step: int) -> list[str]:
  """The paths of the leaves of a step, in the order of the state.

  Args:
    directory: of a run's checkpoints.
    step: one of them.
  """
  return [name for name, _, _ in _manifest(directory / str(step), step)["leaves"]]


def first_moments(directory: Path, count: int) -> list[np.ndarray]:
  """Adam's first moments for the policy in the last `count` checkpoints, each as one vector.

  If b1 is 0, they are the gradients.
  """
  found = []
  for step in sorted(int(path.name) for path in directory.iterdir())[-count:]:
    leaves = json.loads((directory / str(step) / "manifest.json").read_text())["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype, shape in leaves}
    _, state, _ = Checkpointer(directory, keep=count).restore(wanted, step)
    # PPO's value network is the state's field `value`.
    moments = [n for n in sorted(state) if "/mu/" in n and not n.startswith("value/")]
    found.append(np.concatenate([np.asarray(state[name]).ravel() for name in moments]))
  return found


# Trees


def _named_leaves(tree: Any) -> dict[str, Any]:
  """{"params/layer_0/kernel": leaf}, in the tree's order, whatever the container types."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") or "value" for path, _ in flat]
  _refuse_clashes(names)
  return dict(zip(names, (leaf for _, leaf in flat), strict=True))


def _refuse_clashes(names: list[str]) -> None:
  """Orbax joins keys with dots: {"a.b": x, "a": {"b": y}} would come back as x twice."""
  seen: dict[str, str] = {}
  for name in names:
    dotted = name.replace("/", ".")
    if dotted in seen:
      raise CheckpointError(
        f"state leaves {seen[dotted]!r} and {name!r} would be stored as one; rename one of the keys"
      )
    seen[dotted] = name
  for name in names:  # {"a/b": x, "a": y}: a leaf cannot also be a folder of leaves
    parents = {name[:i] for i, character in enumerate(name) if character == "/"}
    for parent in parents.intersection(names):
      raise CheckpointError(
        f"state leaves {parent!r} and {name!r} would be stored one inside the "
        "other; rename one of the keys"
      )


def _nested(leaves: dict[str, Any]) -> dict:
  """The leaves as nested dicts, so that any Orbax program reads `state` without our classes."""
  tree: dict = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _describe(leaves: dict[str, Any]) -> list[list]:
  return [[name, str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()]


def _compare_trees(path: Path, saved: list[list], wanted: dict[str, Any]) -> None:
  """Raises CheckpointError listing the first leaves whose presence, shape or dtype differs."""
  have = {name: (dtype, tuple(shape)) for name, dtype, shape in saved}
  want = {name: (dtype, tuple(shape)) for name, dtype, shape in _describe(wanted)}
  structure, dtypes = [], []
  for name in [*have, *(name for name in want if name not in have)]:
    if name not in want:
      structure.append(f"{name}: in the checkpoint, not in the state asked for")
    elif name not in have:
      structure.append(f"{name}: in the state asked for, not in the checkpoint")
    elif have[name][1] != want[name][1]:
      structure.append(
        f"{name}: shape {have[name][1]} in the checkpoint, {want[name][1]} asked for"
      )
    elif have[name][0] != want[name][0]:
      dtypes.append(f"{name}: dtype {have[name][0]} in the checkpoint, {want[name][0]} asked for")
  differences = structure + dtypes
  if differences:
    lines = differences[:_MAX_LISTED]
    if len(differences) > len(lines):
      lines.append(f"and {len(differences) - len(lines)} more")
    fix = (
      "use the model and optimiser settings it was saved with"
      if structure
      else "use the dtypes it was saved with"
    )
    listed = "\n  ".join(lines)
    raise CheckpointError(
      f"{path} does not fit the state asked for; {len(differences)} leaves "
      f"differ:\n  {listed}\nFix: {fix}"
    )


def _bytes(leaf: Any) -> int:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _sharding(leaf: Any) -> jax.sharding.Sharding:
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return getattr(leaf, "sharding", None) or first


def _on_host(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Copies of the leaves in the host's memory, which no donation touches.

  They are arrays of the CPU backend, so that a checkpoint's files are those of `save`, or NumPy's
  where JAX_PLATFORMS leaves out the CPU. On a CPU, JAX may return a replicated array's own buffer
  for its copy, and never one device's: so one of the replicas is copied.
  """
  leaves = {
    name: leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
    for name, leaf in leaves.items()
  }
  try:
    cpu = jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    is_key = {name: jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for name, x in leaves.items()}
    return {name: jnp.copy(x) if is_key[name] else np.array(x) for name, x in leaves.items()}
  return jax.block_until_ready(jax.device_put(leaves, cpu, may_alias=False))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
  """Whether each leaf is finite, computed in one program.

  With one program per leaf, CPU devices could start different programs, and each would wait for the
  others in its own collective.
  """
  return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]


def _refuse_nonfinite(step: int, leaves: dict[str, jax.Array]) -> None:
  floats = [name for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)]
  finite = gather_to_host(_all_finite([leaves[name] for name in floats]))
  bad = [name for name, good in zip(floats, finite, strict=True) if not good]
  if bad:
    listed = ", ".join(bad[:_MAX_LISTED])
    raise CheckpointError(
      f"step {step} is not saved: {len(bad)} of {len(leaves)} leaves hold NaN or infinity, first "
      f"{listed}. Resume from the last checkpoint with a lower learning rate"
    )


# Files


def _remove(directory: Path) -> None:
  """Removes what a failed save left; Orbax's threads may still be writing after it raised."""
  for _ in range(20):
    shutil.rmtree(directory, ignore_errors=True)
    if not directory.exists():
      return
    time.sleep(0.1)


def _checked_extra(extra: dict | None) -> dict:
  try:
    return json.loads(json.dumps({} if extra is None else extra, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"extra must hold what JSON can (dict, list, str, finite number, bool, None): {error}"
    ) from None


def _manifest_text(body: dict) -> str:
  """JSON whose first line is the SHA-256 of the rest, so that the manifest verifies itself."""
  rest = json.dumps(body, indent=1)[1:].lstrip("\n")
  digest = hashlib.sha256(rest.encode()).hexdigest()
  return f'{{"manifest_sha256": "{digest}",\n{rest}'


def _write_manifest(path: Path, step: int, leaves: dict[str, Any], extra: dict) -> None:
  """Flushes every file of a step, writes their sizes and hashes, and flushes the manifest."""
  directories, files = [path], []
  for root, names, filenames in os.walk(path):
    directories += [Path(root, name) for name in names]
    files += [Path(root, name) for name in filenames]
  for item in [*files, *directories]:
    _sync(item)
  body = {
    "format_version": FORMAT_VERSION,
    "step": step,
    "extra": extra,
    "leaves": _describe(leaves),
    "files": dict(zip((str(f.relative_to(path)) for f in files), _hashes(files), strict=True)),
  }
  (path / _MANIFEST).write_text(_manifest_text(body))
  _sync(path / _MANIFEST)
  _sync(path)


def _steps_in(directory: Path) -> list[int]:
  """Numbers of the directories that look like ours, ascending; links and files are ignored."""
  try:
    entries = list(os.scandir(directory))
  except OSError as error:
    raise CheckpointError(
      f"cannot read the checkpoint directory {directory}: {error.strerror}. "
      "Was it moved or deleted?"
    ) from None
  return sorted(
    int(entry.name)
    for entry in entries
    if entry.name.isascii()
    and entry.name.isdigit()
    and str(int(entry.name)) == entry.name
    and entry.is_dir(follow_symlinks=False)
    and any(os.path.lexists(os.path.join(entry.path, name)) for name in (_MANIFEST, _STATE))
  )


_INSTRUCTION = "Restore the files from a copy, or delete the step's directory"


def _manifest(path: Path, step: int) -> dict:
  """The manifest of a step if it is sound in itself; else raises as `_verified` does."""
  if not path.is_dir():
    raise CheckpointError(
      f"no checkpoint {path}; give a step that is there, or none for the newest"
    )
  try:
    text = (path / _MANIFEST).read_bytes().decode()
    head, _, rest = text.partition("\n")
    if head != f'{{"manifest_sha256": "{hashlib.sha256(rest.encode()).hexdigest()}",':
      raise _DamagedError(f"{path / _MANIFEST} does not match its own hash. {_INSTRUCTION}")
    manifest = json.loads(text)
    known = _is_manifest(manifest)
  except OSError as error:
    raise _DamagedError(
      f"{error.filename or path} cannot be read: {error.strerror}. {_INSTRUCTION}"
    ) from None
  except (ValueError, RecursionError):
    raise _DamagedError(f"{path / _MANIFEST} is not JSON text. {_INSTRUCTION}") from None
  if not known:
    raise _DamagedError(f"{path / _MANIFEST} is not a manifest. {_INSTRUCTION}")
  if manifest["format_version"] > FORMAT_VERSION:
    raise CheckpointError(
      f"{path} has format {manifest['format_version']}, this rl_llm reads up to "
      f"{FORMAT_VERSION}: upgrade rl_llm to open it"
    )
  if manifest["step"] != step:
    raise _DamagedError(f"{path} holds step {manifest['step']}: rename it back")
  return manifest


def _is_manifest(found: Any) -> bool:
  """Whether JSON is what `_write_manifest` writes; of a later format only the version counts."""
  if not isinstance(found, dict) or type(found.get("format_version")) is not int:
    return False
  if found["format_version"] > FORMAT_VERSION:
    return True
  kinds = {"step": int, "extra": dict, "leaves": list, "files": dict}
  if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
    return False
  parts = [
    *((leaf, 3) for leaf in found["leaves"]),
    *((file, 2) for file in found["files"].values()),
  ]
  return all(isinstance(part, list) and len(part) == size for part, size in parts)


def _verified(path: Path, step: int) -> dict:
  """The manifest of a step if all files match it; else raises _DamagedError naming the file."""
  manifest = _manifest(path, step)
  try:
    files = [path / name for name in manifest["files"]]
    for file, (size, _) in zip(files, manifest["files"].values(), strict=True):
      if file.stat().st_size != size:
        raise _DamagedError(
          f"{file} has {file.stat().st_size} bytes, {size} were written. {_INSTRUCTION}"
        )
    for file, found, written in zip(files, _hashes(files), manifest["files"].values(), strict=True):
      if found != written:
        raise _DamagedError(
          f"{file} has changed since it was written (SHA-256 differs). {_INSTRUCTION}"
        )
  except OSError as error:
    raise _DamagedError(
      f"{error.filename or path} cannot be read: {error.strerror}. {_INSTRUCTION}"
    ) from None
  return manifest


def _hashes(files: list[Path]) -> list[list]:
  """[bytes, SHA-256] of each file, in threads: hashing releases the interpreter lock."""

  def one(file: Path) -> list:
    with open(file, "rb") as stream:
      return [os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()]

  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    return list(pool.map(one, files))


def _sync(path: Path) -> None:
  """Waits until a file, or a directory's list of names, is on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


# Orbax


def _orbax_context(*, partial: bool = False) -> ocp.Context:
  context = ocp.Context()
  context.pytree.loading.partial_load = partial
  context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
  context.array.saving.use_compression = False  # 8 % smaller is not worth 4 times the wait
  context.array.saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
  if hosts.count() > 1:  # Naming the processes makes Orbax use the barrier with a timeout.
    context.multiprocessing.active_processes = set(range(hosts.count()))
  return context


def _of_all_processes(state: Any) -> Any:
  """The state, with arrays that every process holds in full made global and replicated."""
  if hosts.count() == 1:
    return state
  mesh = make_mesh()
  return jax.tree.map(
    lambda x: replicate(x, mesh) if isinstance(x, jax.Array) and x.is_fully_addressable else x,
    state,
  )


def _quiet_orbax(record: python_logging.LogRecord) -> bool:
  """Drops Orbax's log lines and tracebacks: we raise its errors and report them in one line."""
  ours = f"{os.sep}orbax{os.sep}" not in record.pathname
  return ours or (record.levelno >= python_logging.WARNING and not record.exc_info)


@contextlib.contextmanager
def _quiet_after_failure():
  """Drops the traceback of each read or write that is on its way when another has failed.

  Orbax closes its event loop at the first that fails, and Python prints "Event loop is closed"
  for each that ends after it. We raise the first; so after a failure this stays in place.
  """
  print_unraisable = sys.unraisablehook

  def print_others(unraisable: Any) -> None:
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
      print_unraisable(unraisable)

  sys.unraisablehook = print_others
  yield
  sys.unraisablehook = print_unraisable


def _brief(error: Exception) -> str:
  """An error's first line, shortened: TensorStore appends hundreds of lines of its specs."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:300]}"


def _save_hint(directory: Path, error: Exception) -> str:
  if not directory.is_dir():
    return "The directory is gone: was it moved or deleted?"
  if "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):
    return "The disk is full: free some space, lower `keep`, or choose another disk"
  return "Check that the directory is writable"


def fingerprint(tree: Any) -> str:
  """The SHA-256 of every leaf's path, dtype, shape and bytes, in hexadecimal digits.

  >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.zeros(2)})
  True
  >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.array([0.0, 5e-324])})
  False

  Args:
    tree: a pytree of arrays, on whatever device.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(gather_to_host(leaf))
    digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
  return digest.hexdigest()
