"""What `pip install` puts into an environment: the library alone, typed, and nothing else."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.test_importing import PROGRAMS

ROOT = pathlib.Path(__file__).parent.parent
BUILD = "import setuptools.build_meta as b, sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(kind, source, out):
  """The wheel that pip would build of a directory."""
  out.mkdir()
  said = subprocess.run(
    [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True
  )
  assert said.returncode == 0, said.stderr
  return out / said.stdout.strip().splitlines()[-1]


def environment(place, wheel):
  """An interpreter that has the wheel, and what it depends on, but no package of this clone."""
  venv.create(place, symlinks=True)
  python = place / "bin" / "python"
  query = "import sysconfig; print(sysconfig.get_path('purelib'))"
  site = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout
  site = pathlib.Path(site.strip())
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site)
  # A directory that a .pth file names is searched, but its own .pth files are not read.
  (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
  return python


def run(python, code, place):
  """What a program prints, started in a directory that holds nothing."""
  place.mkdir(exist_ok=True)
  environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  return subprocess.run(
    [python, "-c", code], cwd=place, env=environ, capture_output=True, text=True
  )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
  """A copy of what a wheel is built from, since building leaves files behind."""
  place = tmp_path_factory.mktemp("clone")
  for name in ("setup.py", "pyproject.toml", "README.md"):
    shutil.copy(ROOT / name, place)
  for name in ("rl_llm", "experiments", "launch", "tests", "benchmarks"):
    ignored = shutil.ignore_patterns("__pycache__", "goldens")
    shutil.copytree(ROOT / name, place / name, ignore=ignored)
  return place


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
  return build("build_wheel", clone, tmp_path_factory.mktemp("out") / "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  return environment(tmp_path_factory.mktemp("environment"), wheel)


def test_the_wheel_holds_the_library_alone(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  tops = {name.partition("/")[0] for name in names}
  assert {top for top in tops if not top.endswith(".dist-info")} == {"rl_llm"}
  assert "rl_llm/py.typed" in names
  held = {name for name in names if name.endswith(".py")}
  wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "rl_llm").rglob("*.py")}
  assert held == wanted


@pytest.mark.slow
def test_nothing_else_can_be_imported_from_it(installed, tmp_path):
  for name in ("experiments", "launch", "benchmarks", "tests"):
    said = run(installed, f"import {name}", tmp_path / "empty")
    assert f"No module named '{name}'" in said.stderr


@pytest.mark.slow  # test_importing.py runs them in this clone.
@pytest.mark.parametrize("name, program, printed", PROGRAMS, ids=[p[0] for p in PROGRAMS])
def test_the_import_page_runs_against_it(installed, tmp_path, name, program, printed):
  del name
  said = run(installed, program, tmp_path / "empty")
  assert (said.stdout, said.returncode) == (printed, 0), said.stderr


@pytest.mark.slow
def test_an_editable_install_finds_the_experiments_from_anywhere(clone, tmp_path):
  python = environment(tmp_path / "env", build("build_editable", clone, tmp_path / "out"))
  code = "import experiments, launch, rl_llm; print(experiments.__file__, rl_llm.__file__)"
  said = run(python, code, tmp_path / "empty")
  assert re.findall(r"\S+", said.stdout) == [
    str(clone / "experiments" / "__init__.py"),
    str(clone / "rl_llm" / "__init__.py"),
  ], said.stderr
