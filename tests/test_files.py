"""A file is replaced whole or left alone; a lock keeps a second process out."""

import subprocess
import sys

import pytest

from rl_llm.files import locked, write_atomically


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
