"""The reference's log-probs of a data set: computed once, kept on disk, never trusted blindly.

DPO and its family compare the policy with a frozen model at every step. The data set and that model
are both fixed, so its log-probs can be computed before training, which then holds one network
instead of two and does a third less work. The cached values must belong to exactly these weights
and these tokens, or training silently pulls towards the wrong model. So the file is named and
signed by a hash of both.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from rl_llm.data.batches import SequenceBatch, sequence_batch
from rl_llm.data.encoding import Encoded
from rl_llm.errors import ConfigError
from rl_llm.files import write_atomically
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import gather_to_host, shard_rows
from rl_llm.policy import Policy
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.runs.checkpoint import fingerprint
from rl_llm.runs.finite import check_finite

FORMAT_VERSION = 1
_DIGEST_SIZE = 64  # Hexadecimal digits of SHA-256.


def reference_logprobs(
  directory: str | os.PathLike,
  params: Any,
  sequences: Sequence[Encoded],
  *,
  policy: Policy,
  temperature: float = 1.0,
  rows_per_batch: int,
  pad_id: int,
  mesh: jax.sharding.Mesh | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
  """`compute_logprobs`, or what an earlier call with the same weights and sequences kept.

  Args:
    directory: where the file is; created if missing. Several data sets, models and runs may share
      it.
    params: as for `compute_logprobs`, like the other arguments.
    progress: called after each computed batch; raises to stop, and then nothing is kept.

  Returns:
    Log-probs of each sequence, as from `compute_logprobs`, bit for bit those of the call that
    computed them.

  Raises:
    ConfigError: the directory cannot be written.
  """
  key = cache_key(params, sequences, policy=policy, temperature=temperature)
  directory = Path(directory)
  compute = functools.partial(
    compute_logprobs,
    params,
    sequences,
    policy=policy,
    temperature=temperature,
    rows_per_batch=rows_per_batch,
    pad_id=pad_id,
    mesh=mesh,
    progress=progress,
  )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    return cached_logprobs(directory / f"reference-{key[:16]}.npz", key, compute)
  except OSError as error:
    raise ConfigError(
      "reference_cache", str(directory), "a directory that can be written", str(error)
    ) from None


def compute_logprobs(
  params: Any,
  sequences: Sequence[Encoded],
  *,
  policy: Policy,
  temperature: float = 1.0,
  rows_per_batch: int,
  pad_id: int,
  mesh: jax.sharding.Mesh | None = None,
  check: Callable[[], None] = lambda: None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[np.ndarray]:
  """Log-probs of every token of a data set, with one program for each width.

  Sequences of similar length share a batch, so little of it is padding. The longest come first, so
  a lack of memory shows at once and not at the end.

  Args:
    params: the weights to score under.
    sequences: from `encode`; of pairs, both.
    policy: the pure functions of `rl_llm.policy.Policy`.
    temperature: that of the policy to compare with.
    rows_per_batch: sequences at once, >= 1.
    pad_id: as for `sequence_batch`.
    mesh: the devices over which the weights lie, None: the first; `rows_per_batch` must be a
      multiple of `rl_llm.parallel.sharding.row_shards`.
    check: called before each batch; raises to stop.
    progress: called after each batch with how many sequences are done, and how many there are.

  Returns:
    For each sequence float32 log-probs of its tokens, nats, 0 outside its mask;
    `rl_llm.data.batches.pad_values` makes a [B, T] array of some of them.

  Raises:
    ValueError: `rows_per_batch` is below 1, or `sequence_batch` does not accept a sequence.
    NotFiniteError: a log-prob is not finite; the message says which weights are not.
  """
  if rows_per_batch < 1:
    raise ValueError(f"rows_per_batch={rows_per_batch}: must be 1 or more")
  order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].tokens))
  found: dict[int, np.ndarray] = {}
  for start in range(0, len(order), rows_per_batch):
    check()
    chosen = order[start : start + rows_per_batch]
    batch = sequence_batch(
      [sequences[index] for index in chosen], pad_id=pad_id, rows=rows_per_batch
    )
    found_rows = score(params, shard_rows(batch, mesh), temperature, policy=policy)
    logprobs = np.asarray(gather_to_host(found_rows), np.float32)
    check_finite(logprobs, params, what="the log-probs of given texts")
    for index, row in zip(chosen, logprobs, strict=False):
      found[index] = row[: len(sequences[index].tokens)].copy()
    progress(len(found), len(sequences))
  return [found[index] for index in range(len(sequences))]


@functools.partial(jax.jit, static_argnames="policy")
def score(params: Any, batch: SequenceBatch, temperature: Any, *, policy: Policy) -> jax.Array:
  """[B, T] float32: the log-probs of a batch's tokens, in nats, 0 outside its mask.

  Compiled once for each shape of the batch; arguments as for `compute_logprobs`, which calls it.
  """
  return teacher_forced_logprobs(params, *batch, policy=policy, temperature=temperature)[0]


def cache_key(
  params: Any, sequences: Sequence[Encoded], *, policy: Policy, temperature: float
) -> str:
  """The SHA-256 of everything that determines the log-probs.

  That is the weights, the model's shape and arithmetic, the temperature, and the tokens and masks
  in their order. The batch size is left out: it changes a log-prob only by rounding.

  Args:
    params: the weights.
    sequences: the data set.
    policy: as for `compute_logprobs`.
    temperature: as for `compute_logprobs`.
  """
  dtype = jax.eval_shape(lambda: policy.init_cache(1, 1)).keys[0].dtype
  settings = f"{FORMAT_VERSION} {float(temperature)!r} {dtype} {policy.config!r}"
  return fingerprint(
    {
      "settings": np.frombuffer(settings.encode(), np.uint8),
      "weights": params,
      "lengths": np.array([len(sequence.tokens) for sequence in sequences], np.int64),
      "tokens": np.array([i for sequence in sequences for i in sequence.tokens], np.int64),
      "mask": np.array([m for sequence in sequences for m in sequence.mask], bool),
    }
  )


def cached_logprobs(
  path: str | os.PathLike, key: str, compute: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
  """The arrays in a file, if it is whole and belongs to the key; else computes and writes them.

  The file is an .npz without pickles. Its last 64 bytes (the comment of the zip archive) are the
  SHA-256 of everything before them. It is replaced atomically, so half a file never has its name. A
  file that is damaged, or belongs to another key, is reported and computed again.

  >>> import tempfile
  >>> path = os.path.join(tempfile.mkdtemp(), "cache.npz")
  >>> for _ in range(2):
  ...   found = cached_logprobs(path, "the key", lambda: print("computing") or [np.float32([-0.5])])
  computing
  >>> found[0].tolist()
  [-0.5]

  Args:
    path: of the file; its directory exists.
    key: what the arrays belong to, such as `cache_key` gives.
    compute: called without arguments if the file cannot be used; returns float32 vectors.

  Returns:
    The arrays, float32.

  Raises:
    OSError: the file cannot be written.
  """
  path = Path(path)
  found = None
  if hosts.is_main():  # One process decides for all, since they compute together.
    try:
      found = _read(path.read_bytes(), key)
    except FileNotFoundError:
      pass
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
      logging.warning("%s is computed again: %s", path, error)
  if hosts.broadcast("the log-probs of the reference", found is not None):
    return _read(path.read_bytes(), key) if found is None else found
  found = compute()
  if hosts.is_main():
    write_atomically(path, _content(key, found))
  return found


def _content(key: str, arrays: list[np.ndarray]) -> bytes:
  buffer = io.BytesIO()
  np.savez(
    buffer,
    key=np.array(key),
    lengths=np.array([len(array) for array in arrays], np.int64),
    values=np.concatenate([np.zeros(0, np.float32), *arrays]),
  )
  with zipfile.ZipFile(buffer, "a") as archive:
    archive.comment = bytes(_DIGEST_SIZE)  # Reserves room for the digest in the zip format.
  body = buffer.getvalue()[:-_DIGEST_SIZE]
  return body + hashlib.sha256(body).hexdigest().encode()


def _read(content: bytes, key: str) -> list[np.ndarray]:
  body, digest = content[:-_DIGEST_SIZE], content[-_DIGEST_SIZE:]
  if hashlib.sha256(body).hexdigest().encode() != digest:
    raise ValueError("the file is damaged, its checksum differs")
  with np.load(io.BytesIO(content), allow_pickle=False) as file:
    if str(file["key"]) != key:
      raise ValueError("the file belongs to other weights or other data")
    return np.split(file["values"], np.cumsum(file["lengths"]))[:-1]
