"""What the sources advise exists: each flag, value, keyword, package and module that they name.

Whether following it helps is asked in test_followed_advice.py.
"""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from rl_llm.errors import ConfigError
from rl_llm.runs.config import _check, _leaves, _parse
from tests import advice

# Flags of absl and of other programs, which the sources call or explain.
FOREIGN = {
  "help",
  "helpfull",
  "logdir",
  "flagfile",
  "no-deps",
  "signal",
  "worker",
  "command",
  "project",
  "zone",
  "mount",
  "accelerator-type",
  "runtime-version",
  "node-id",
  "format",
  "spot",
  "recurse",
  "force",
  "quiet",
  "cpus-per-task",
  "ntasks",
  "requeue",
  "name",  # as in "write every setting as --name=value"
}
PLAY_NONE = "distill dpo kto make_preferences online_dpo sft".split()
OF_EPISODES = (
  "experiments.agents",
  *(f"rl_llm.tasks.environments.{name}" for name in ("environment", "problems", "episodes")),
)
# Texts that a command leads to and never shows, by (command, where): why.
NEVER_SHOWN = {
  **{(f"experiments.{c}", where): "it has no --env" for c in PLAY_NONE for where in OF_EPISODES},
  ("experiments.evaluate", "experiments.agents.Agents"): "it has `Environments`",
  ("experiments.reinforce", "experiments.agents.Agents"): "as above",
  ("experiments.ppo", "experiments.agents.Agents"): "what compares groups is GRPO's",
  ("experiments.compare", "rl_llm.parallel.hosts"): "it starts other commands and joins no process",
  ("experiments.compare", "rl_llm.parallel.stderr_filter"): "as above",
  ("experiments.chat", "rl_llm.parallel.hosts"): "it joins no process",
  ("experiments.chat", "rl_llm.parallel.stderr_filter"): "as above",
  ("experiments.chat", "rl_llm.runs.compile_cache"): "its own directory is only warned about",
  ("experiments.chat", "rl_llm.runs.identity"): "it has no --init_from",
  ("experiments.chat", "rl_llm.runs.peer_names"): "only what names flags that it has",
  ("experiments.reward_model", "experiments.flags.Data"): "it asks for --data before",
  ("experiments.kto", "rl_llm.rollout.judge.make_judge"): "without --reward it is the grader",
  ("experiments.distill", "rl_llm.rollout.judge.make_judge"): "as above",
  ("experiments.evaluate", "experiments.setup.load_task"): "it has no group eval, and asks itself",
  ("experiments.make_preferences", "experiments.setup.load_task"): "it has no group eval",
  ("experiments.sft", "rl_llm.rollout.judge.make_judge"): "without --reward it is the grader",
  ("experiments.evaluate", "rl_llm.rollout.judge.make_judge"): "as above",
  ("experiments.make_preferences", "rl_llm.rollout.judge.make_judge"): "as above",
}


def shown_by(node):
  """{command: its flags} of those that may show a text there.

  What starts or plans experiments speaks of their flags too.
  """
  experiments = [c for c in advice.commands() if c.startswith("experiments.")]
  theirs = frozenset().union(*(advice.commands()[c] for c in experiments))
  return {
    command: flags | (theirs if command.startswith("launch.") or "compare" in command else set())
    for command, flags in advice.commands().items()
    if node in advice.reached(command)
    and not {(command, node[0]), (command, ".".join(node))} & NEVER_SHOWN.keys()
  }


def shown_texts():
  """The texts that name a flag: short ones, since a page of HTML has dashes too."""
  for text in advice.texts():
    names = [name for name in advice.flags_in(text.text) if name not in FOREIGN]
    if names and len(text.text) < 600:
      yield text, names


def flags_by_command(text):
  """(flag, command) of all that a text names: with the command that it writes out, or any."""
  parts = re.split(r"python -m (experiments\.\w+)", text.text)
  for command, part in zip(parts[1::2], parts[2::2], strict=True):
    yield from ((name, command) for name in advice.flags_in(part))
  for command in shown_by(text.node):
    yield from ((name, command) for name in advice.flags_in(parts[0]) if name not in FOREIGN)


def test_every_flag_that_is_named_is_one_of_every_command_that_may_name_it():
  unknown = [
    (text.where, f"--{name}", command)
    for text, _ in shown_texts()
    for name, command in flags_by_command(text)
    if not advice.is_flag(name, shown_by(text.node).get(command, advice.commands()[command]))
  ]
  assert not unknown
  assert sum(1 for _ in shown_texts()) > 100, "they are found"


def test_every_value_that_is_named_is_one_that_the_flag_takes():
  refused = []
  for text, _ in shown_texts():
    given = re.findall(r"--([a-z][\w.]*)=([a-z0-9][\w.]*(?<!\.))(?![\w\0=:({])", text.text)
    for command in shown_by(text.node):
      config = importlib.import_module(command).Config
      leaves = {leaf.path: leaf for leaf in _leaves(config)}
      for name, value in given:
        leaf = leaves.get(name) or leaves.get(f"{name}.name")
        try:
          if leaf is not None:
            _check(leaf, _parse(leaf, value))
        except ConfigError:
          refused.append((text.where, f"--{name}={value}", command))
  assert not refused


def test_every_setting_that_an_error_is_about_is_one_of_its_command():
  wrong = []
  for module in advice.trees():
    for name, statements in advice.defined(module).items():
      for call in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("ConfigError"):
          about = advice.text_of(call.args[0]) if call.args else None
          for command, flags in shown_by((module, name)).items():
            if about is not None and not advice.is_flag(about, flags):
              wrong.append((f"{module}:{call.lineno}", about, command))
  assert not wrong


def test_a_keyword_that_is_named_is_a_flag_or_an_argument_of_who_refuses_it():
  """From a command line no other can be given."""
  wrong = []
  for text in advice.texts():
    if text.raised and "frozen" not in text.text and "from Python" not in text.text:
      own = advice.arguments(text.node)
      for keyword in re.findall(r"(?<![-\w.'\[\]\0])([a-z][\w.]*)=(?!=)", text.text):
        wrong += [
          (text.where, keyword, command)
          for command, flags in shown_by(text.node).items()
          if keyword not in own and not advice.is_flag(keyword, flags)
        ]
  assert not wrong


def test_every_package_and_module_that_is_named_exists():
  setup = (advice.ROOT / "setup.py").read_text() + (advice.ROOT / "Makefile").read_text()
  extras = set(re.findall(r'"(\w+)": \[', setup))
  named = 0
  for text in advice.texts():
    for extra in re.findall(r"rl_llm\[(\w+)\]", text.text):
      assert extra in extras, text.where
      named += 1
    for package in re.findall(r"pip install (?:--no-deps )?\"?'?([a-z][\w-]+)", text.text):
      known = package in ("rl_llm", "xprof") or re.search(rf"\b{package}\b", setup)
      assert known, (text.where, package)
      named += 1
    for module in re.findall(r"python -m ([\w.]+\w)", text.text):
      assert module in advice.trees(), text.where
      named += 1
  assert named > 10


@pytest.mark.parametrize(
  ("text", "flags", "unknown"),
  [
    ("raise --max_tokens, or --overlong=drop.", {"max_tokens", "overlong"}, []),
    ("--loss.clip=1 or --no_such", {"loss.clip_low"}, ["loss.clip", "no_such"]),
    ("give --\0.held_out_file", {"jsonl.held_out_file"}, []),
    ("give --\0.held_out_row", {"jsonl.held_out_file"}, ["\0.held_out_row"]),
    ("a--b, --c-d", {"c-d"}, []),
  ],
)
def test_the_rule_for_flags_itself(text, flags, unknown):
  found = advice.flags_in(text)
  assert [name for name in found if not advice.is_flag(name, frozenset(flags))] == unknown


def test_who_may_show_what():
  """One command's own check, what all share, and what only those with files of examples read."""
  assert "experiments.sft" not in shown_by(("experiments.ppo", "KL"))
  assert set(shown_by(("rl_llm.data.formats", "recognise"))) == {
    "experiments.dpo",
    "experiments.kto",
    "experiments.reward_model",
    "experiments.sft",
  }
  assert "experiments.make_preferences" in shown_by(("rl_llm.data.prompts", "limit_length"))
