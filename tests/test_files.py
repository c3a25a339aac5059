"""A file is replaced whole or left alone; a lock keeps a second process out."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rl_llm.files import locked, scratch, write_atomically


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path):
  path = tmp_path / "x"
  write_atomically(path, b"old")
  with pytest.raises(TypeError):
    write_atomically(path, "not bytes")
  assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_keeps_another_process_out_until_it_is_let_go(tmp_path):
  path = tmp_path / ".lock"
  other = (
    "import sys\nfrom rl_llm.files import locked\nwith locked(sys.argv[1]) as alone: print(alone)"
  )

  def elsewhere():
    done = subprocess.run([sys.executable, "-c", other, str(path)], capture_output=True, text=True)
    return done.stdout.strip()

  with locked(path) as alone:
    assert alone and elsewhere() == "False"
  assert elsewhere() == "True"


def test_directories_of_killed_processes_are_swept_and_no_others(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  code = (
    "import os, sys, time\nfrom rl_llm.files import scratch\n"
    "with scratch('own_') as path: print(path, flush=True); time.sleep(600)"
  )
  started = [
    subprocess.Popen(
      [sys.executable, "-c", code],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    for _ in range(2)
  ]
  alive, dead = (Path(process.stdout.readline().strip()) for process in started)
  started[1].kill()
  started[1].wait()
  young, other, link = tmp_path / "own_young", tmp_path / "other", tmp_path / "own_link"
  for path in (young, other):
    path.mkdir()
  link.symlink_to(other)
  for path in (alive, dead, other):
    os.utime(path, (0, 0))
  with scratch("own_") as path:
    assert not dead.exists() and path.exists()
    assert alive.exists() and young.exists() and other.exists() and link.is_symlink()
  assert not path.exists()
  started[0].kill()
  started[0].wait()
