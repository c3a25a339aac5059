"""docs/algorithms.md is what the docstrings say, and nothing public is missing from it."""

import ast
import inspect
import pathlib
import runpy

import pytest

from rl_llm import advantages, kl, losses
from tests.test_reachable import HELPERS

ROOT = pathlib.Path(__file__).parent.parent
INDEX = runpy.run_path(str(ROOT / "docs" / "make_index.py"))
ALGORITHMS = [each for family in INDEX["ALGORITHMS"].values() for each in family]


def documented(docstring):
  """A function with that docstring."""
  function = lambda: None  # noqa: E731
  function.__doc__ = inspect.cleandoc(docstring)
  return function


def test_the_page_is_up_to_date():
  text = INDEX["PAGE"].read_text(encoding="utf-8")
  assert INDEX["filled"](text) == text, "run `make docs`"


@pytest.mark.parametrize(
  "name",
  [
    name
    for module in (losses, advantages)
    for name in module.__all__
    if callable(getattr(module, name))
  ],
)
def test_every_public_function_has_an_entry(name):
  _, _, entry = INDEX["functions"]().partition(f"#### `{name}`\n")
  entry = entry.partition("\n#### ")[0]
  assert "- needs: " in entry and "- cost: " in entry
  if name.endswith("_loss"):
    assert "\n    " in entry and "- paper: " in entry, "a loss has a formula and a paper"


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.endswith("_loss")])
def test_every_loss_is_part_of_an_algorithm(name):
  assert any(name in dict(INDEX["calls"](each)) for each in ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda each: each.name)
def test_algorithms_name_functions_and_keywords_that_exist(algorithm):
  for name, arguments in INDEX["calls"](algorithm):
    known = inspect.signature(INDEX["find"](name)).parameters
    for keyword in ast.parse(f"f({arguments})", mode="eval").body.keywords:
      assert keyword.arg in known
      assert not isinstance(keyword.value, ast.Name) or hasattr(kl, keyword.value.id)


def test_the_commands_are_of_all_functions_that_one_reaches():
  """If this fails: a new command belongs into CALLED of docs/make_index.py."""
  listed = {name for name in INDEX["public"]() if not INDEX["commands"](name)}
  assert listed == {name for name in HELPERS if name in INDEX["public"]()}


def test_the_flags_of_the_commands_exist():
  every = {each for name in INDEX["CALLED"] for each in INDEX["CALLED"][name]}
  every |= {each.strip("`") for each in map(INDEX["command"], ALGORITHMS) if each}
  assert len(every) > 40
  for script, *given in map(str.split, every):
    defaults, _ = INDEX["flags"](script)
    for flag, _, value in (each.removeprefix("--").partition("=") for each in given):
      path = flag if flag in defaults else f"{flag}.name"
      assert path in defaults and value and value != str(defaults[path])


@pytest.mark.parametrize(
  "name, command",
  [
    ("GRPO", "grpo --weighting=sequence_mean --kl.coef=0.04 --kl.gradient=k3"),
    ("KL-Cov", "grpo --loss=kl_cov_loss"),
    ("RPO", "dpo --loss.sft_coef=1"),
    ("SFT", "sft"),
  ],
)
def test_an_algorithms_command_has_the_flags_of_all_its_functions(name, command):
  (found,) = (INDEX["command"](each) for each in ALGORITHMS if each.name == name)
  assert found == f"`{command}`"


def test_what_the_study_notes_say_of_the_four_methods():
  needs = {each.name: INDEX["needs_of"](each) for each in ALGORITHMS}
  assert "value network" in needs["PPO"] and "value network" not in needs["GRPO"]
  assert "several responses" in needs["GRPO"] and "several responses" not in needs["PPO"]
  assert needs["REINFORCE"] == ["samples", "reward"]
  assert needs["DPO"] == ["pairs", "reference"]


def test_the_line_of_needs_itself():
  needs = INDEX["needs"]
  assert needs(documented("F.\n\n    Needs: samples, reward.\n")) == ["samples", "reward"]
  for line, message in [
    ("Reference: none", "has no line 'Needs"),
    ("Needs: samples, reward", "has no line 'Needs"),
    ("Needs: samples, luck.", "the known of them in order are"),
    ("Needs: reward, samples.", "the known of them in order are"),
  ]:
    with pytest.raises(ValueError, match=message):
      needs(documented("F.\n\n    " + line))


def test_the_formula_is_the_first_block_with_what_its_letters_are():
  docstring = "F.\n\n    loss = e\n\nwith e = 2.718 of Euler. More.\n\n    other = 1\n\nArgs:\n  x."
  assert INDEX["formula"](documented(docstring)) == ("    loss = e", "with e = 2.718 of Euler")
