import dataclasses

import pytest

from rl_llm import tasks
from rl_llm.tasks import TaskError, load_task, task_family


def test_names_lead_to_tasks():
  assert load_task("arithmetic", operand_max=30).note.startswith("961 different problems")
  assert load_task("copy", alphabet="ab", held_out=3).note == "8 different strings, 3 held out"
  assert load_task("arithmetic").name == "arithmetic" and load_task("copy").name == "copy"


@pytest.mark.parametrize(
  "spec, said",
  [
    ("aritmetic", "no such task; did you mean arithmetic. must be one of arithmetic, copy, reas"),
    ("", "no such task; must be one of"),
    ("copy:abc", "must be written copy$"),
    ("copy:", "must be written copy$"),
    ("jsonl", "must be written jsonl:<path>"),
    ("jsonl:", "must be written jsonl:<path>"),
    ("gsm8k", "must be written gsm8k:<path>"),
    ("reasoning_gym", "must be written reasoning_gym:<name>"),
  ],
)
def test_bad_names(spec, said):
  with pytest.raises(TaskError, match=said):
    task_family(spec)


def test_unknown_option_names_the_nearest():
  with pytest.raises(TaskError, match="arithmetic.operandmax: no such option; did you mean opera"):
    load_task("arithmetic", operandmax=3)


@pytest.mark.parametrize(
  "options",
  [
    tasks.ArithmeticOptions,
    tasks.CopyOptions,
    tasks.Gsm8kOptions,
    tasks.JsonlOptions,
    tasks.ReasoningGymOptions,
  ],
)
def test_options_are_frozen_with_help_for_every_flag(options):
  assert all(field.metadata.get("help") for field in dataclasses.fields(options))
  with pytest.raises(dataclasses.FrozenInstanceError):
    options().held_out_fraction = 0.5


def test_paths_with_colons_survive(tmp_path):
  path = tmp_path / "a:b.jsonl"
  path.write_text('{"prompt": "x", "answer": "y"}\n')
  task = load_task(f"jsonl:{path}", reward_function="exact_match", held_out_fraction=0.0)
  assert task.sample(0, 0, 1)[0].prompt == "x"
