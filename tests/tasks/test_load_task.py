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


def test_the_forms_of_names_are_read_off_the_table():
  assert tasks.FORMS == (
    "arithmetic",
    "copy",
    "reasoning_gym:<name>",
    "jsonl:<path>",
    "gsm8k:<path>",
    "FILE.py:<function>",
  )


def test_a_row_of_the_table_is_all_that_a_task_needs(monkeypatch):
  """Its options, and a function of them and, if it takes something, of what its name says."""

  @dataclasses.dataclass(frozen=True)
  class Options:
    loud: bool = False

  calls = []
  for name, make in (
    ("plain", lambda options: calls.append(options)),
    ("shout", lambda word, options: calls.append((word, options))),
  ):
    monkeypatch.setitem(tasks.TASKS, name, (Options, make))
  load_task("plain", loud=True)
  load_task("shout:a:b")
  assert calls == [Options(loud=True), ("a:b", Options())]
  with pytest.raises(TaskError, match="shout.lout: no such option; did you mean loud"):
    load_task("shout:a", lout=True)
  with pytest.raises(TaskError, match="no such task; did you mean shout"):
    task_family("shoot")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_options_are_frozen_with_help_for_every_flag(name):
  options, _ = tasks.TASKS[name]
  assert all(field.metadata.get("help") for field in dataclasses.fields(options))
  with pytest.raises(dataclasses.FrozenInstanceError):
    options().held_out_fraction = 0.5


def test_paths_with_colons_survive(tmp_path):
  path = tmp_path / "a:b.jsonl"
  path.write_text('{"prompt": "x", "answer": "y"}\n')
  task = load_task(f"jsonl:{path}", reward_function="exact_match", held_out_fraction=0.0)
  assert task.sample(0, 0, 1)[0].prompt == "x"
