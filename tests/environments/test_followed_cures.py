"""The cures that errors of `rl_llm.tasks.environments` name without a flag, followed.

As in tests/test_followed_advice.py: each `follow_...` brings errors about, does what they say and
sees that the environment works; the last test holds what was said against the sources.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import socket
import sys
import types

import pytest

from rl_llm.tasks.environments import EnvironmentError, Episodes, load
from rl_llm.tasks.environments.builtin import search
from rl_llm.tasks.environments.builtin.calculator import Calculator
from tests import advice
from tests.test_followed_advice import refused
from tests.test_followed_cures import extras

RESET = "  def reset(self, **columns): pass\n"
GO = '  def go(self) -> str:\n    """Goes."""\n'
REWARD = "  def get_reward(self): return 1\n"


def names(environment):
  return [tool["function"]["name"] for tool in environment.tools]


def follow_classes(said, path):
  """One is written as its author is told, from nothing at all to a tool with choices."""
  file, class_ = path / "mine.py", "class Mine:\n  pass\n"

  def told(text):
    file.write_text(text)
    return refused(said, load, f"{file}:Mine")

  assert "give the path of a Python file" in refused(said, load, f"{file}:Mine")
  class_ += f"  def {re.search('write (reset.+)', told(class_))[1]}: pass\n"
  assert "write a public method with type hints and a docstring" in told(class_)

  def tool(arguments, docstring=""):
    return f"{class_}  def go({arguments}) -> str:\n    {docstring}\n    return way\n"

  says = '"""Goes."""'
  assert "no docstring; write one" in told(tool("self, *way", "way = 1"))
  assert "takes *way; name each argument" in told(tool("self, *way", says))
  hint = re.search("write (way: .+)", told(tool("self, way", says)))[1]
  assert "has no line for way under 'Args:'; write one" in told(tool(f"self, {hint}", says))
  says = '"""Goes.\n\n    Args:\n      way: Which. {}\n    """'
  message = told(tool(f"self, {hint}", says.format("(choices: a, b)")))
  choices = re.search(r"write (\(choices: .+\))", message)[1]
  file.write_text(tool(f"self, {hint}", says.format(choices)))
  with Episodes(load(f"{file}:Mine", protocol="text")) as episodes:
    [shown] = episodes.environment.tools
    assert shown["function"]["description"] == "Goes."
    assert shown["function"]["parameters"]["properties"]["way"] == {
      "enum": ["a", "b"],
      "description": "Which.",
      "type": "string",
    }
    episodes.start([{}])
    assert episodes.turn({0: "call go: b"})[0].text == "b"


def follow_names_of_tools(said, path):
  """A function that is called as a method is, and one that is called otherwise."""
  file = path / "mine.py"
  function = 'def go() -> str:\n  """Goes as well."""\n'
  file.write_text(f"class Mine:\n{RESET}{GO}{function}")
  assert "two tools are called 'go'; rename one" in refused(
    said, load, f"{file}:Mine", f"{file}:go"
  )
  file.write_text(f"class Mine:\n{RESET}{GO}{function.replace('go', 'walk')}")
  assert names(load(f"{file}:Mine", f"{file}:walk")) == ["go", "walk"]


def follow_files_of_tools(said, path):
  file = path / "tools.py"
  assert "give the path of a Python file" in refused(said, load, "", f"{file}:go")
  file.write_text('def go() -> str:\n  """Goes."""\n')
  assert names(load("", f"{file}:go")) == ["go"]


def follow_rewards(said, path):
  """Of two classes: one has it, then both, then none."""
  file = path / "two.py"

  def loaded(*rewards):
    both = zip(("One", "Two"), rewards, strict=True)
    file.write_text("".join(f"class {name}:\n{RESET}{GO}{reward}" for name, reward in both))
    return load(f"{file}:One,{file}:Two").owns_reward

  message = refused(said, loaded, REWARD, "")
  assert "One has get_reward and another has not; give it to all or to none" in message
  assert loaded(REWARD, REWARD) and not loaded("", "")


def follow_open_files(said, path):
  """More episodes than there may be files; then half as many, and then more files."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with Episodes(load("guess", protocol="text")) as episodes:

    def started(count):
      return [seen.status for seen in episodes.start([{"secret": 5}] * count)]

    assert started(3) == ["ok"] * 3
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(33)]
    for number in free:
      os.close(number)
    try:
      resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
      message = refused(said, started, 40)
      count = int(re.match(r"(\d+) episodes are more than", message)[1])
      assert 30 < count < 40
      assert refused(said, started, 40) == message  # Of this batch alone.
      assert started(count // 2) == ["ok"] * (count // 2)
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert started(count) == ["ok"] * count  # As after `ulimit -n`, with more.


def follow_searches(said, path, monkeypatch):
  """The package is missing; one in its place; and then what it would read is."""

  class Own(search.Search):
    """What is prepared here stays here."""

  def prepared(directory):
    try:
      Own._prepare(str(directory))
    except (ImportError, OSError) as error:  # Which a server turns into text.
      raise EnvironmentError(str(error)) from None
    return Own._names, Own._texts

  monkeypatch.setitem(sys.modules, "bm25s", None)
  message = refused(said, prepared, path)
  extra, package = re.search(r"rl_llm\[(\w+)\]' \(or pip install (\w+)\)", message).groups()
  assert [package] == [re.split("[><=]", wanted)[0] for wanted in extras()[extra]]
  index = types.SimpleNamespace(index=lambda *given, **options: None)
  made = types.SimpleNamespace(tokenize=lambda texts, **options: texts, BM25=lambda: index)
  monkeypatch.setitem(sys.modules, package, made)
  assert refused(said, prepared, path / "texts").endswith("give one of .txt or .md files")
  (path / "texts").mkdir()
  assert refused(said, prepared, path / "texts").endswith("put some there")
  for name in ("a.txt", "b.md"):
    (path / "texts" / name).write_text(name)
    assert prepared(path / "texts")[1][-1] == name
  assert Own._names == ["a.txt", "b.md"]


def follow_servers(said, path, monkeypatch):
  """The package is missing; nothing answers; then a server is there, with tools of its own."""
  served = importlib.import_module("tests.environments.test_openenv")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    env = f"openenv:http://127.0.0.1:{free.getsockname()[1]}"
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "websockets.sync.client", None)
    message = refused(said, load, env, network=True)
  extra, package = re.search(r"rl_llm\[(\w+)\]' \(or pip install (\w+)\)", message).groups()
  assert [package] == [re.split("[><=]", wanted)[0] for wanted in extras()[extra]]
  assert "start it, and give its address" in refused(said, load, env, network=True)
  with served.serving(served.Guessing) as running:
    assert names(load(running.url, network=True)) == ["step"]


def follow_sums(said, path):
  """As a model does, which reads the error."""
  message = refused(said, Calculator().calculate, "12 times 34")
  assert Calculator().calculate(re.search("write such as (.+)", message)[1]) == "408"


CASES = {name: case for name, case in list(globals().items()) if name.startswith("follow_")}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
  """What was said in all cases, and by case what went wrong."""
  return advice.follow(CASES, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", CASES)
def test_what_an_error_says_to_do_helps(outcomes, name):
  if name in outcomes[1]:
    raise outcomes[1][name]


def test_every_cure_of_an_environment_was_followed(outcomes):
  texts = tuple(t for t in advice.cures() if t.node[0].startswith("rl_llm.tasks.environments"))
  assert len(texts) > 12, "they are found"
  assert not advice.unsaid(texts, outcomes[0])
