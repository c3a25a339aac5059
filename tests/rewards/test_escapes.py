"""A hostile text where people run graders: what each layer stops, and what is said of the rest.

`payloads` is what it tries, `situations` the places; each runs in a process of its own.
"""

import json
import subprocess
import sys

import pytest

from rl_llm.rewards.layers import REQUIRED, openings
from tests.processes import PATIENCE
from tests.rewards import payloads, situations

QUICK = ("root", "container root")
SLOW = (
  "user",
  "one uid",
  "namespaces off",
  "user without Landlock",
  "namespaces off without Landlock",
)


def attacked(situation, folder, *module):
  """What a module printed in a situation, or why that cannot be had here."""
  folder.chmod(0o777)
  command = [sys.executable, "-m", "tests.rewards.situations", str(folder), situation, *module]
  done = subprocess.run(
    command, capture_output=True, text=True, timeout=PATIENCE, cwd=situations.ROOT, check=False
  )
  if done.returncode == 77:
    return done.stdout.strip()
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout)


@pytest.fixture(
  params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)], scope="module"
)
def found(request, tmp_path_factory):
  found = attacked(request.param, tmp_path_factory.mktemp("situation"))
  if isinstance(found, str):
    pytest.skip(f"{request.param}: {found}")
  return found


def test_there_are_enough_payloads():
  assert len(payloads.PAYLOADS) + len(payloads.PAIRS) >= 88 + 40


def test_an_ordinary_grader_works(found):
  assert found["working"] == [[True, False], ["ok", "ok"]]


def test_nothing_gets_through_a_layer_that_is_there(found, record_property):
  """Where one is missing, what got through is of the kind that the line at the start names."""
  layers, opened = found["layers"], openings(found["layers"])
  assert not [name for name, layer in found["through"] if layer in layers]
  kinds = {layer for _, layer in found["through"]}
  named = {"files": "files", "network": "network", "own file system": "names and sizes of files"}
  for kind in kinds:
    assert named[kind] in opened or "files" in opened, found["through"]
  for opening in opened:
    assert opening in found["says"]
  record_property("F25", len(payloads.PAYLOADS) + len(payloads.PAIRS))


def test_the_outside_saw_nothing(found):
  assert found["signals"] == []
  if "network" in found["layers"]:
    assert found["reached"] == []
  if "files" in found["layers"]:
    assert found["left"] == [] and found["changed"] == []


def test_a_grader_that_runs_text_is_refused_where_network_or_files_are_open(found):
  missing = [layer for layer in REQUIRED if layer not in found["layers"]]
  assert bool(found["refused"]) == bool(missing)
  if missing:
    assert f"bar it from {' and '.join(missing)}" in found["refused"]
    assert "--reward_sandbox=weak" in found["refused"]
