"""Full disks, read-only directories and broken files of a run: one line each, and it resumes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rl_llm.errors import ConfigError, UserError
from rl_llm.files import WriteError, write_atomically, writing
from rl_llm.runs.config import option
from rl_llm.runs.metrics import MetricsWriter, read
from rl_llm.runs.run_directory import open_run
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = option(3, "how many", volatile=True)
  seed: int = option(0, "where randomness begins")


def test_what_cannot_be_written_is_one_line(tmp_path):
  with pytest.raises(WriteError) as caught:
    write_atomically(tmp_path / "gone" / "x", b"")
  assert str(caught.value) == (
    f"{tmp_path}/gone/x: No such file or directory; was its directory moved or deleted?"
  )
  assert caught.value.errno == errno.ENOENT and isinstance(caught.value, OSError)
  with pytest.raises(WriteError, match="No space left on device; free some space"):
    with writing("x"):  # As packages in Rust say it.
      raise Exception("I/O error: No space left on device (os error 28)")
  for error in (ValueError("no"), UserError("no")):
    with pytest.raises(type(error), match="^no$"):
      with writing("x"):
        raise error


class Filling:
  """A file on a disk with room for `room` bytes more; a write takes what fits."""

  def __init__(self, file, room):
    self.file, self.room = file, room

  def write(self, content):
    taken = self.file.write(bytes(content[: self.room]))
    if not taken:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self.room -= taken
    return taken

  def __getattr__(self, name):
    return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_disk_that_fills_up_during_a_record(tmp_path, room, monkeypatch):
  """Half a line may be left, which the resumed run drops."""
  path = tmp_path / "metrics.jsonl"
  writer = MetricsWriter(path)
  writer.write(0, {"loss": 1.0})
  writer._file = Filling(writer._file, room)
  with pytest.raises(
    WriteError, match=f"{path}: No space left on device; free some space.*resumes"
  ):
    writer.write(1, {"loss": 2.0}, {"loss": 3.0})
  writer.close()
  with MetricsWriter(path, resume_step=0) as writer:
    writer.write(1, {"loss": 2.0})
  assert [row["loss"] for row in read(path)] == [1.0, 2.0]


def test_a_short_write_is_finished(tmp_path):
  """A write that takes a part is no error, and no lost half of a line either."""

  class Hesitant(Filling):
    def write(self, content):
      return self.file.write(bytes(content[:7]))

  with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
    writer._file = Hesitant(writer._file, 0)
    writer.write(0, {"loss": 1.0, "text": "x" * 100})
  assert read(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0, "text": "x" * 100}]


READ_ONLY = """
    import subprocess, sys
    from pathlib import Path
    import jax
    from rl_llm.errors import UserError
    from rl_llm.files import locked
    from rl_llm.policy import make_policy, save_hf, tiny_config
    from rl_llm.runs.metrics import MetricsWriter
    from rl_llm.runs.report import write_report
    from rl_llm.runs.run_directory import write_result
    from rl_llm.text.tokenizers import ByteTokenizer, save_tokenizer
    place = Path(sys.argv[1])
    with MetricsWriter(place / "metrics.jsonl") as writer:
      writer.write(0, {"loss": 0.5, "time/step": 1.0})
    config = tiny_config(32)
    params = jax.jit(make_policy(config).init)(jax.random.key(0))
    def lock(path):
      with locked(path / ".lock"):
        pass
    def attempt():
      for act in (
        write_report,
        lambda place: write_result(place, {}),
        lambda place: save_hf(place / "model", config, params),
        lambda place: save_tokenizer(place, ByteTokenizer()),
        lambda place: MetricsWriter(place / "metrics.jsonl", resume_step=0),
        lock,
      ):
        try:
          act(place)
        except UserError as error:
          print(error)
        else:
          print("written")
    attempt()
"""


@pytest.mark.parametrize("how", ["read-only", "full"])
def test_a_directory_that_is_read_only_or_full_at_the_end(tmp_path, how):
  """In a mount namespace of its own, which ends with the process."""
  end = {
    "read-only": 'subprocess.run(["mount", "-o", "remount,ro", place], check=True)',
    "full": 'subprocess.run(["sh", "-c", f"cat /dev/zero > {place}/fill 2>/dev/null"])',
  }[how]
  code = textwrap.dedent(READ_ONLY).replace("\nattempt()\n", f"\n{end}\nattempt()\n")
  mount = 'mount -t tmpfs -o size=3m tmpfs "$0" && exec "$@"'
  space = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(tmp_path)]
  if subprocess.run([*space, "true"], capture_output=True).returncode:
    pytest.skip("no private tmpfs on this machine")
  done = subprocess.run(
    [*space, sys.executable, "-c", code, str(tmp_path)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=PATIENCE,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  said = done.stdout.splitlines()
  assert len(said) == 6
  wanted = {
    "read-only": "Read-only file system; make it writable, or choose another place",
    "full": "No space left on device; free some space; the same command then resumes",
  }[how]
  for line in said[:-1] if how == "full" else said:  # An empty lock file needs no space.
    assert line.startswith(f"{tmp_path}") and line.endswith(wanted), said


@pytest.mark.parametrize("name", ["config.json", "inputs.json", "result.json"])
@pytest.mark.parametrize(
  "text",
  [
    "[]",
    "[1, 2",
    "{",
    "3",
    "null",
    '"x"',
    '{"steps": []}',
    '{"program": 3}',
    '{"seed": {}}',
    "\xff",
  ]
  + ['{"program": {"module": []}}', "[" * 100_000, '{"steps": "4"}'],
)
def test_broken_files_of_a_run(tmp_path, name, text):
  open_run(tmp_path, Config(), volatile=("steps",), steps=3)
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  (tmp_path / "result.json").write_text('{"steps": 3}')
  (tmp_path / name).write_text(text, "latin-1")
  try:
    open_run(tmp_path, Config(), volatile=("steps",), steps=3)
  except ConfigError as error:
    assert "\n" not in str(error)
    if name in str(error):
      assert f"restore {name}, or choose another directory" in str(error)
  else:
    assert isinstance(json.loads(text), dict)
