"""Copies of checkpoints in an object store (gs://, s3://), through TensorStore, which Orbax has.

An object store has no rename and no lock, so a run cannot live in one; but machines that may be
taken away at any time have no disk that stays. So a run saves on its own disk, where a save is
atomic, and then copies the step: every file that its manifest lists, and the manifest last, without
which a step does not count. A run whose directory is gone begins with the newest copy, which is
verified as any other step is: file by file, by its hash.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError

MANIFEST = "manifest.json"
_ADDRESS = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]{1,221})((?:/[^/\s?#]+)*)/?")
# What `ConfigError` says of an address given as a directory.
NO_DIRECTORY = (
  "a directory on a disk: an object store cannot add a line to a record, rename a whole "
  "checkpoint, or lock a run"
)
_SECONDS = 600  # for one file, of at most 256 MB
_RETRIES = {"max_retries": 4, "initial_delay": "500ms", "max_delay": "10s"}


class BucketError(UserError):
  """An object store that cannot be read or written; the message says where, and what to do."""


def is_address(text: str) -> bool:
  """Whether a text is an address that `parse` reads."""
  return _ADDRESS.fullmatch(text) is not None


def parse(address: str) -> tuple[str, str, str]:
  """The scheme, the bucket, and the path of an address.

  >>> parse("gs://mine/runs/a")
  ('gs', 'mine', 'runs/a/')

  Args:
    address: gs://BUCKET/PATH or s3://BUCKET/PATH.

  Raises:
    BucketError: it is neither.
  """
  found = _ADDRESS.fullmatch(address)
  if found is None:
    raise BucketError(f"{address}: must be gs://BUCKET/PATH or s3://BUCKET/PATH")
  scheme, bucket, path = found.groups()
  return scheme, bucket, f"{path.strip('/')}/" if path.strip("/") else ""


class Bucket:
  """The copies of one run's checkpoints, below one address that belongs to it.

  Credentials are those of the machine: of gcloud or the metadata server for gs://, the variables or
  files of the AWS tools for s3://. AWS_ENDPOINT_URL names another store that speaks S3.

  Args:
    address: see `parse`.

  Raises:
    BucketError: what lies there cannot be listed.
  """

  def __init__(self, address: str):
    import tensorstore  # Here, so that only runs with copies wait for it.

    scheme, bucket, path = parse(address)
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    spec |= {"path": path, "context": {f"{spec['driver']}_request_retries": _RETRIES}}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
      region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
      spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    self.address, self._range = address, tensorstore.KvStore.KeyRange
    self._store = self._done(tensorstore.KvStore.open(spec))
    self.steps()

  def _done(self, future: Any) -> Any:
    """What an operation gives."""
    try:
      return future.result(timeout=_SECONDS)
    except Exception as error:  # Of many types: TensorStore has no one of its own.
      said = " ".join(str(error).split())[:300] or type(error).__name__
      raise BucketError(
        f"{self.address}: {said}; check the name, the network and the credentials"
      ) from None

  def steps(self) -> list[int]:
    """The steps that have been copied whole, in order."""
    names = [key.decode("utf-8", "replace") for key in self._done(self._store.list())]
    found = (re.fullmatch(rf"(0|[1-9]\d*)/{re.escape(MANIFEST)}", name) for name in names)
    return sorted(int(match[1]) for match in found if match)

  def upload(self, directory: Path, step: int) -> None:
    """Copies a step; what lies there under its number is replaced.

    Args:
      directory: of the checkpoints.
      step: one that lies there.
    """
    self.delete(step)  # A manifest of earlier would vouch for a mixture of files.
    place = directory / str(step)
    for name in [*json.loads((place / MANIFEST).read_text())["files"], MANIFEST]:
      self._done(self._store.write(f"{step}/{name}", (place / name).read_bytes()))

  def download(self, directory: Path, step: int) -> None:
    """Fetches a step into the directory; it appears there whole or not at all.

    Args:
      directory: of the checkpoints, which lacks this step.
      step: one of `steps`.

    Raises:
      BucketError: it cannot be read, or its manifest names a file elsewhere.
    """
    aside = directory / f".saving-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    for name in [*self.manifest(step)["files"], MANIFEST]:
      path = aside / name
      if ".." in Path(name).parts or "\0" in name or not path.is_relative_to(aside):
        raise BucketError(f"{self.address}/{step}/{MANIFEST} names {name!r}; delete this step")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self._read(step, name))
    os.rename(aside, directory / str(step))

  def manifest(self, step: int) -> dict[str, Any]:
    """What a step's manifest says; nothing of it is verified but its form.

    Raises:
      BucketError: it cannot be read, or has another form.
    """
    try:
      found = json.loads(self._read(step, MANIFEST))
      if isinstance(found["files"], dict) and isinstance(found["extra"], dict):
        return found
    except (ValueError, TypeError, KeyError, RecursionError):
      pass
    raise BucketError(f"{self.address}/{step}/{MANIFEST} is damaged; delete this step")

  def _read(self, step: int, name: str) -> bytes:
    found = self._done(self._store.read(f"{step}/{name}"))
    if found.state != "value":
      raise BucketError(f"{self.address}/{step}/{name} is missing; delete this step there")
    return found.value

  def delete(self, step: int) -> None:
    """Deletes a step, its manifest first."""
    self._done(self._store.write(f"{step}/{MANIFEST}", None))
    self._done(self._store.delete_range(self._range(f"{step}/", f"{step}0")))
