"""Temporary directories: those of killed runs are swept, and no tree is too deep or too closed."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rl_llm.rewards import directories


def deep(folder, levels):
  """A chain of directories, each with a file."""
  here = os.open(folder, os.O_RDONLY)
  for _ in range(levels):
    os.mkdir("d", 0o700, dir_fd=here)
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
    below = os.open("d", os.O_RDONLY, dir_fd=here)
    os.close(here)
    here = below
  os.close(here)


def test_a_tree_deeper_than_python_recurses_and_than_files_may_be_open(tmp_path):
  """`shutil.rmtree` of Python 3.11 raises RecursionError at 1,000 levels."""
  (tmp_path / "kept").mkdir()
  (tmp_path / "other").write_text("x")
  deep(tmp_path, 1500)
  before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
  directories.empty(tmp_path, ["kept"])
  assert os.listdir(tmp_path) == ["kept"]
  if before:
    assert len(os.listdir("/proc/self/fd")) == before


def test_wide_trees_links_and_all_kinds_of_files(tmp_path):
  """Equal names on all levels meet nowhere; what a link shows stays."""
  outside = tmp_path / "outside"
  (outside / "in").mkdir(parents=True)
  (outside / "in" / "file").write_text("stays")
  tree = tmp_path / "tree"
  for first in range(3):
    for second in range(3):
      folder = tree / f"{first}" / f"{second}" / f"{first}"
      folder.mkdir(parents=True)
      (folder / "file").write_text("x")
      (folder / "link").symlink_to(outside)
      (folder / "loop").symlink_to("loop")
      os.mkfifo(folder / "pipe")
  directories.remove(tree)
  assert not tree.exists() and (outside / "in" / "file").read_text() == "stays"
  link = tmp_path / "link"
  link.symlink_to(outside)
  directories.remove(link)
  with pytest.raises(OSError):
    directories.empty(link)
  assert link.is_symlink() and (outside / "in").exists()
  directories.remove(tmp_path / "missing")


CLOSED = """
import os, sys
from rl_llm.rewards import directories
if os.geteuid() == 0:
  os.setgid(65534)
  os.setuid(65534)
os.chdir(sys.argv[1])
for name, mode in (("no_list", 0o300), ("no_write", 0o500), ("nothing", 0)):
  os.makedirs(f"{name}/{name}/x")
  open(f"{name}/{name}/f", "w").close()
  os.chmod(f"{name}/{name}", mode)
  os.chmod(name, mode)
directories.empty(sys.argv[1])
print(os.listdir("."))
"""


def test_modes_that_bar_their_owner(tmp_path):
  """As an ordinary user, whom a mode binds."""
  with tempfile.TemporaryDirectory() as folder:  # that other users reach, unlike pytest's
    os.chmod(folder, 0o777)
    source = Path(folder) / "rl_llm" / "rewards"
    source.mkdir(parents=True)
    for package in (source, source.parent):
      (package / "__init__.py").write_text("")
    (source / "directories.py").write_bytes(Path(directories.__file__).read_bytes())
    (Path(folder) / "closed").mkdir()
    (Path(folder) / "closed").chmod(0o777)
    command = [sys.executable, "-c", CLOSED, f"{folder}/closed"]
    done = subprocess.run(
      command, env={"PYTHONPATH": folder}, cwd="/", capture_output=True, text=True, check=False
    )
  assert done.stdout == "[]\n", done.stderr[-2000:]


def test_what_is_added_without_end_ends_it(tmp_path, monkeypatch):
  monkeypatch.setattr(directories, "_LONGEST", 0)
  (tmp_path / "x").write_text("")
  with pytest.raises(TimeoutError, match="over 0 s"):
    directories.empty(tmp_path)
  directories.remove(tmp_path)
  assert tmp_path.exists()


def test_directories_of_killed_processes_are_swept_and_no_others(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  code = (
    "import os, sys, time\nfrom rl_llm.rewards.directories import scratch\n"
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
  deep(dead, 1100)
  if os.getuid() == 0:  # graders have become another user, and their directory is theirs
    os.chown(dead, 65534, 65534)
  for path in (alive, dead, other):
    os.utime(path, (0, 0))
  with directories.scratch("own_") as path:
    assert not dead.exists() and path.exists()
    assert alive.exists() and young.exists() and other.exists() and link.is_symlink()
  assert not path.exists()
  started[0].kill()
  started[0].wait()
