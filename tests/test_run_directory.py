"""A directory holds one run: other settings are refused, a finished one is known by its result."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import pytest

from rl_llm.errors import ConfigError, UserError
from rl_llm.files import locked
from rl_llm.runs.config import option, volatile
from rl_llm.runs.run_directory import default_workdir, found_workdir, open_run, opened, write_result


@dataclasses.dataclass(frozen=True)
class Loss:
  clip: float = option(0.2, "how far")


@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = option(3, "how many")
  sizes: tuple[int, ...] = option((1, 2), "some")
  prompt: str | None = option(None, "which")
  loss: Loss = Loss()


def test_the_same_command_opens_it_again_and_volatile_settings_may_change(tmp_path):
  workdir = tmp_path / "runs" / "one"
  assert open_run(workdir, Config(), volatile=("steps",)) is None
  assert open_run(workdir, Config(), volatile=("steps",)) is None
  assert open_run(workdir, Config(steps=9), volatile=("steps",)) is None
  assert json.loads((workdir / "config.json").read_text())["steps"] == 9
  assert "--steps=9\n" in (workdir / "flags.txt").read_text()


@dataclasses.dataclass(frozen=True)
class Falling:
  steps: int = option(3, "how many", volatile=lambda config: not config.falls)
  falls: bool = option(False, "whether steps say where it is to end")
  shown: int = option(5, "how often", volatile=True)


def test_what_may_change_is_what_the_config_itself_says(tmp_path):
  def go(config):
    with opened(tmp_path, config, volatile=volatile(config), doing="trains in") as result:
      (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
      return result

  assert go(Falling()) is None and go(Falling(steps=9, shown=1)) is None
  for changed, said in ((Falling(falls=True), "--steps=3: must be 9"), (Falling(9, True), "falls")):
    with pytest.raises(ConfigError, match=said):
      go(changed)


def test_one_process_has_a_directory_to_itself_and_finds_its_result(tmp_path):
  def go():
    with opened(tmp_path, Config(), volatile=(), doing="trains in") as result:
      with locked(tmp_path / ".lock") as free:
        assert not free
      return result

  assert go() is None
  write_result(tmp_path, {"steps": 3})
  assert go() == {"steps": 3}
  with locked(tmp_path / ".lock") as free:
    assert free
    with pytest.raises(ConfigError, match="--workdir=.*that no other process trains in"):
      go()


def test_a_directory_in_which_another_process_trains_is_not_written_into(tmp_path):
  """Not even where the settings may change: the record is that of the run at work."""
  with opened(tmp_path, Config(steps=3), volatile=("steps",), doing="trains in"):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="no other process trains in"):
      with opened(tmp_path, Config(steps=9), volatile=("steps",), doing="trains in"):
        raise AssertionError("two runs at work")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_error_is_told_also_where_the_directory_is_gone(tmp_path):
  with pytest.raises(UserError, match="^the cause$"):
    with opened(tmp_path / "run", Config(), volatile=(), doing="trains in"):
      shutil.rmtree(tmp_path / "run")
      raise UserError("the cause")


@pytest.mark.parametrize(
  ("config", "said"),
  [
    (Config(loss=Loss(0.3)), r"--loss\.clip=0\.3: must be 0\.2, as in the run that .*one holds"),
    (Config(sizes=(2, 1)), r"--sizes=.*must be \[1, 2\]"),
    (Config(prompt="hi"), "--prompt=hi: must be None"),
    (Config(steps=4), "--steps=4: must be 3"),
  ],
)
def test_other_settings_are_refused_and_change_nothing(tmp_path, config, said):
  workdir = tmp_path / "one"
  open_run(workdir, Config(), volatile=())
  (workdir / "metrics.jsonl").write_text('{"step": 0}\n')
  before = {path: path.read_bytes() for path in workdir.iterdir()}
  with pytest.raises(ConfigError, match=said) as caught:
    open_run(workdir, config, volatile=())
  assert "another --workdir" in str(caught.value)
  assert {path: path.read_bytes() for path in workdir.iterdir()} == before


def test_any_text_may_stand_where_a_file_might(tmp_path):
  open_run(tmp_path, Config(prompt="x" * 5000), volatile=())
  with pytest.raises(ConfigError, match=r"--prompt=a b: must be text.*holds a NUL"):
    open_run(tmp_path, Config(prompt="a\0b"), volatile=())
  assert json.loads((tmp_path / "inputs.json").read_text()).keys() == {"program"}


@pytest.mark.parametrize("prompt", ["{}", "jsonl:{}"])
def test_a_file_that_changed_since_is_refused(tmp_path, prompt):
  workdir, data = tmp_path / "one", tmp_path / "data.jsonl"
  config = Config(prompt=prompt.format(data))
  data.write_text("first")
  open_run(workdir, config, volatile=())
  data.write_text("second")  # No step yet: the run begins with this one.
  open_run(workdir, config, volatile=())
  (workdir / "metrics.jsonl").write_text('{"step": 0}\n')
  open_run(workdir, config, volatile=())
  data.write_text("third")
  open_run(workdir, config, volatile=("prompt",))
  with pytest.raises(ConfigError, match="the file as it was when the run .* began"):
    open_run(workdir, config, volatile=())
  data.unlink()  # Whoever reads it will say so.
  open_run(workdir, config, volatile=())


def test_a_start_that_recorded_no_step_binds_nobody(tmp_path):
  open_run(tmp_path, Config(), volatile=())
  (tmp_path / "metrics.jsonl").write_text("")
  open_run(tmp_path, Config(prompt="hi"), volatile=())
  assert json.loads((tmp_path / "config.json").read_text())["prompt"] == "hi"


@pytest.mark.parametrize(
  "error, recorded, before, stays",
  [
    (ConfigError("x", 1, "2"), False, False, False),
    (ConfigError("x", 1, "2"), True, False, True),  # A step is on record.
    (ConfigError("x", 1, "2"), False, True, True),  # It was there already.
    (ZeroDivisionError(), False, False, True),  # A fault of ours: somebody may want to look.
    (KeyboardInterrupt(), False, False, True),
  ],
)
def test_a_start_that_failed_leaves_no_directory(tmp_path, error, recorded, before, stays):
  workdir = tmp_path / "runs" / "one"
  if before:
    workdir.mkdir(parents=True)
  with pytest.raises(type(error)):
    with opened(workdir, Config(), volatile=(), doing="trains in"):
      (workdir / "checkpoints").mkdir()
      if recorded:
        (workdir / "metrics.jsonl").write_text('{"step": 0}\n')
      raise error
  assert workdir.exists() == stays


def test_a_setting_that_was_redacted_is_the_same_setting(tmp_path):
  config = Config(prompt="snapshots/" + "0123456789" * 4)
  open_run(tmp_path, config, volatile=())
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  assert "0123456789" not in (tmp_path / "config.json").read_text()
  open_run(tmp_path, config, volatile=())


def test_a_result_is_the_proof_of_the_end(tmp_path):
  open_run(tmp_path, Config(), volatile=())
  write_result(tmp_path, {"steps": 3, "after": {"accuracy": 0.5}})
  assert open_run(tmp_path, Config(), volatile=()) == {"steps": 3, "after": {"accuracy": 0.5}}
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "changed.json",
    "config.json",
    "defaults.json",
    "flags.txt",
    "inputs.json",
    "result.json",
  ]


@dataclasses.dataclass(frozen=True)
class Measured:
  NOTED = ("rate",)

  rate: float = option(0.5, "how fast")
  batch: int = option(8, "how many")


def test_a_noted_setting_may_change_from_a_step_on(tmp_path):
  said = []

  def start(config, **how):
    return open_run(tmp_path, config, volatile=(), say=said.append, **how)

  start(Measured())
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
  start(Measured(rate=0.25))
  assert said == ["other settings from step 2 on: rate 0.5 -> 0.25"]
  (line,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
  assert line == {"step": 2, "settings": {"rate": [0.5, 0.25]}}
  start(Measured(rate=0.25))
  assert len(said) == 1 and json.loads((tmp_path / "config.json").read_text())["rate"] == 0.25
  with pytest.raises(ConfigError, match="--batch=9: must be 8"):
    start(Measured(rate=0.125, batch=9))
  write_result(tmp_path, {"steps": 2})  # Nothing is left that another rate could compute.
  with pytest.raises(ConfigError, match="--rate=0.125: must be 0.25, .* more steps"):
    start(Measured(rate=0.125), steps=2)
  assert len(said) == 1 and json.loads((tmp_path / "config.json").read_text())["rate"] == 0.25


def test_a_directory_is_named_after_the_settings_that_are_changed():
  name = functools.partial(default_workdir, "grpo", model="tiny", data="copy", seed=3)
  base = name()
  repeated = {"model": "tiny", "task": "copy", "seed": "3", "steps": "9"}
  assert base == name(changed=repeated) == "runs/grpo-tiny-copy-seed3"
  changes = repeated | {"loss.entropy_coef": "0.0", "jsonl.reward_file": "/my files/r.py"}
  suffix = "-loss.entropy_coef=0.0-jsonl.reward_file=_my_files_r.py"
  assert name(changed=changes) == base + suffix
  texts = [name(changed={"a": "1", "prompt": "x" * 90 + end}) for end in ("", "y")]
  assert texts[0] != texts[1] and all(len(text) == len(base + "-a=1-12345678") for text in texts)
  rows = functools.partial(default_workdir, "sft", model="tiny", data="rows.jsonl", seed=0)
  assert rows(changed={"data": "some/rows.jsonl"}) == rows() == "runs/sft-tiny-rows.jsonl-seed0"


def test_an_older_directory_without_changes_in_its_name_is_found(tmp_path):
  old, new = str(tmp_path / "old"), str(tmp_path / "new")
  config = Config(prompt="hi")
  assert found_workdir(config, new, old) == new
  open_run(tmp_path / "old", config, volatile=())
  assert found_workdir(config, new, old) == old
  assert found_workdir(Config(prompt="ho"), new, old) == new
  open_run(tmp_path / "new", config, volatile=())
  assert found_workdir(config, new, old) == new


def test_a_field_the_record_lacks_is_not_held_against_it(tmp_path):
  """A run of an older version resumes: a field that did not exist then had its default's effect."""
  open_run(tmp_path, Config(), volatile=())
  recorded = json.loads((tmp_path / "config.json").read_text())
  del recorded["prompt"]
  (tmp_path / "config.json").write_text(json.dumps(recorded))
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
  assert open_run(tmp_path, Config(), volatile=()) is None
  with pytest.raises(ConfigError, match="--prompt=hi: must be .*, as in the run"):
    open_run(tmp_path, Config(prompt="hi"), volatile=())


def test_a_models_directory_is_not_written_into(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(ConfigError, match="a config.json that no run wrote.*goes to --model"):
    open_run(tmp_path, Config(), volatile=())
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_directories_that_cannot_be_used(tmp_path):
  (tmp_path / "file").write_text("")
  for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(ConfigError, match="--workdir=.*a directory that can be written"):
      open_run(workdir, Config(), volatile=())
  (tmp_path / "cut").mkdir()
  (tmp_path / "cut" / "flags.txt").write_text("")
  (tmp_path / "cut" / "config.json").write_text('{"steps": ')
  (tmp_path / "cut" / "metrics.jsonl").write_text('{"step": 0}\n')
  with pytest.raises(ConfigError, match="whose JSON files are whole.*choose another"):
    open_run(tmp_path / "cut", Config(), volatile=())
