"""A run is of its code: other code is refused, or named and noted, and never resumed silently."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from rl_llm.errors import ConfigError
from rl_llm.runs import code
from rl_llm.runs.config import volatile
from rl_llm.runs.run_directory import open_run

EXPERIMENT = '''
import dataclasses

import helper
from rl_llm.runs.config import option


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings."""

  steps: int = option(3, "how many", volatile=True)
  reward: str = option("", "a file")


def learn(rewards):
  return sum(rewards) - len(rewards)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A directory of scripts, from which `of` imports one anew."""
  folder = tmp_path / "research"
  folder.mkdir()
  (folder / "mine.py").write_text(EXPERIMENT)
  (folder / "helper.py").write_text("def double(x):\n  return 2 * x\n")
  monkeypatch.syspath_prepend(folder)
  yield folder
  for name in ("mine", "other", "helper"):
    sys.modules.pop(name, None)


def of(folder, name="mine", **settings):
  """A config of the script as it is now on disk."""
  spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
  sys.modules[name] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.Config(**settings)


class Trial:
  """Opens one directory again and again, as a run with one more step on record each time."""

  def __init__(self, workdir):
    self.workdir, self.said = workdir, []

  def __call__(self, config, **how):
    self.said.clear()
    how = {"say": self.said.append, "volatile": volatile(config)} | how
    result = open_run(self.workdir, config, **how)
    with open(self.workdir / "metrics.jsonl", "a") as file:
      file.write('{"step": 0}\n')
    return result

  def changes(self):
    path = self.workdir / "changes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_does_not_compute_does_not_count(folder):
  trial = Trial(folder / "run")
  trial(of(folder))
  text = EXPERIMENT.replace('"""Settings."""', '"""Other words."""  # a comment')
  (folder / "mine.py").write_text(
    '"""What it is."""\n\n\n' + text.replace("(rewards) - ", "(rewards)- ")
  )
  trial(of(folder))
  assert trial.said == trial.changes() == []


def test_other_code_of_the_experiment_is_refused_until_it_is_asked_for(folder):
  trial = Trial(folder / "run")
  trial(of(folder))
  (folder / "mine.py").write_text(EXPERIMENT.replace("- len", "+ len"))
  before = {path: path.read_bytes() for path in trial.workdir.iterdir()}
  with pytest.raises(ConfigError, match="mine is not the code .*--code=changed.*--workdir"):
    trial(of(folder))
  assert {path: path.read_bytes() for path in trial.workdir.iterdir()} == before
  trial(of(folder), new_code=True)
  assert trial.said == ["other code from step 1 on: mine"]
  assert [(line["step"], line["code"]) for line in trial.changes()] == [(1, ["mine"])]
  trial(of(folder))  # Asked for once: this is the run's code now.
  assert trial.said == [] and len(trial.changes()) == 1


def test_other_code_that_the_experiment_imports_is_named_and_noted(folder):
  trial = Trial(folder / "run")
  trial(of(folder))
  (trial.workdir / "checkpoints" / "7").mkdir(parents=True)
  (folder / "helper.py").write_text("def double(x):\n  return x + x\n")
  trial(of(folder))
  assert trial.said == ["other code from step 7 on: helper"]
  (note,) = trial.changes()
  assert note == {"step": 7, "code": ["helper"], "commit": "", "uncommitted": False}
  trial(of(folder))
  assert trial.said == []


def test_the_directory_of_another_experiment_is_refused_by_name(folder):
  (folder / "other.py").write_text(EXPERIMENT)
  trial = Trial(folder / "run")
  trial(of(folder))
  said = "must be a directory for other, and .*run holds a run of mine; give another"
  with pytest.raises(ConfigError, match=said):
    trial(of(folder, "other"))


@pytest.mark.parametrize("form", ["{}", "jsonl:{}", "{}:reward"])
def test_a_python_file_that_a_setting_names_is_code(folder, form):
  """With what it imports from its directory: the sandbox lets it read that."""
  reward = folder / "reward.py"
  reward.write_text("import helper\nreward = helper.double\n")
  config, trial = of(folder, reward=form.format(reward)), Trial(folder / "run")
  trial(config)
  reward.write_text("import helper  # mine\nreward = helper.double\n")
  trial(config)
  assert trial.said == []
  for changed in (reward, folder / "helper.py"):
    changed.write_text(changed.read_text() + "x = 1\n")
    with pytest.raises(ConfigError, match="--reward=.*the file as it was.*or --code=changed"):
      trial(config)
    trial(config, new_code=True)
    assert "--reward" in trial.said[0] and "--reward" in trial.changes()[-1]["code"]


def test_a_run_that_does_not_know_its_code_resumes_with_a_line(folder):
  trial = Trial(folder / "run")
  trial(of(folder))
  (trial.workdir / "inputs.json").write_text("{}\n")
  trial(of(folder))
  (said,) = trial.said
  assert "does not say which code it is of" in said
  (folder / "mine.py").write_text(EXPERIMENT.replace("- len", "+ len"))
  with pytest.raises(ConfigError, match="mine is not the code"):
    trial(of(folder))


def test_a_finished_run_stays_of_the_code_that_computed_it(folder):
  """Until it takes further steps."""
  trial = Trial(folder / "run")
  trial(of(folder))
  (trial.workdir / "result.json").write_text('{"steps": 3}')
  before = (trial.workdir / "inputs.json").read_bytes()
  (folder / "helper.py").write_text("def double(x):\n  return x + x\n")
  assert trial(of(folder), steps=3) == {"steps": 3}
  assert trial.said == trial.changes() == []
  assert (trial.workdir / "inputs.json").read_bytes() == before
  trial(of(folder, steps=9), steps=9)
  assert trial.changes()[0]["code"] == ["helper"]


def test_the_commit_is_on_record_and_whether_it_is_all(folder):
  def git(*arguments):
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
      ["git", "-C", str(folder), *name, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()

  git("init", "-q")
  git("add", "mine.py")
  git("commit", "-qm", "first")
  found = code.program(of(folder))
  assert found.commit and git("rev-parse", "HEAD").startswith(found.commit)
  assert not found.uncommitted  # What git does not track is not part of a commit.
  (folder / "mine.py").write_text(EXPERIMENT + "\n")
  assert code.program(of(folder)).uncommitted


def test_what_is_imported_is_found_however_it_is_written(tmp_path):
  package = tmp_path / "lab"
  (package / "parts").mkdir(parents=True)
  for name, text in {
    "__init__.py": "",
    "script.py": "from lab import parts\nfrom .near import f\ndef late():\n  import lab.later as l",
    "near.py": "import jax, rl_llm.kl\nfrom . import further",
    "further.py": "import lab.script",
    "later.py": "from rl_llm import masked",
    "parts/__init__.py": "from lab.parts.deep import *",
    "parts/deep.py": "",
    "unused.py": "",
  }.items():
    (package / name).write_text(text)
  found = code.sources(package / "script.py")
  names = {"lab", "script", "near", "further", "later", "parts", "parts.deep"}
  library = {name for name in found if name.startswith("rl_llm")}
  assert found.keys() - library == {n if n == "lab" else f"lab.{n}" for n in names}
  assert {"rl_llm", "rl_llm.kl", "rl_llm.masked", "rl_llm.checks"} <= library
  assert not {"rl_llm.runs.code", "rl_llm.losses"} & library


def test_older_hashes_of_code_are_not_compared(folder):
  reward = folder / "reward.py"
  reward.write_text("reward = sum\n")
  config, trial = of(folder, reward=str(reward)), Trial(folder / "run")
  trial(config)
  (trial.workdir / "inputs.json").write_text('{"reward": "of bytes"}\n')
  trial(config)
  reward.write_text("reward = max\n")
  with pytest.raises(ConfigError, match="--reward=.*the file as it was"):
    trial(config)
