"""What the process of an episode answers to each frame: here without the sandbox around it."""

import json
import socket
import sys
import types

import pytest

from rl_llm.rewards import worker
from rl_llm.tasks.environments import process

SHOP = '''
import random

class Shop:
  """Sells what is in stock."""

  def reset(self, stock):
    if stock == 0:
      raise ValueError("nothing to sell")
    self.stock, self.draw, self._till, self.done = stock, random.random(), 7, False
    self.shelf = {1, 2}
    return None if stock == 1 else 4 if stock == 4 else f"{stock} left"

  def buy(self, count: int) -> dict:
    """Buys.

    Args:
      count: How many.
    """
    self.stock -= count
    self.done = self.stock == 0
    return {"left": self.stock}

  async def wait(self) -> object:
    """Waits."""
    return Shop

  def leave(self) -> str:
    """Leaves."""
    raise SystemExit(3)

class Paid(Shop):
  def get_turn_reward(self) -> float:
    return 1 / self.stock

  async def get_reward(self) -> float | None:
    return self.stock / 4 if self.stock < 9 else None

class Sign:
  pass

def buy(count: int) -> str:
  """Buys.

  Args:
    count: How many.
  """
  return "bought"

def talk() -> str:
  """Talks."""
  return "x" * 70_000

def sulk() -> str:
  """Says nothing, and its error neither."""
  class Silent(Exception):
    def __str__(self):
      raise OSError
  raise Silent
'''


@pytest.fixture
def prepared(tmp_path, monkeypatch):
  """Prepares a class of the shop and some of its functions, as a server does."""
  path = tmp_path / "shop.py"
  path.write_text(SHOP)
  monkeypatch.setitem(sys.modules, "__main__", worker)  # It loads files for this one.
  monkeypatch.setitem(sys.modules, "environment_shop", None)
  monkeypatch.setattr(process.sys, "setrecursionlimit", lambda limit: None)
  process._loaded.cache_clear()

  def prepare(name, *functions):
    functions = [(str(path), function) for function in functions]
    config = {"location": str(path), "class": name, "functions": functions, "episode_deadline": 60}
    return process.prepare(config | {"argument": None})

  return prepare


@pytest.fixture
def ask(prepared, monkeypatch):
  """What one episode answers to frames that come through a socket."""
  limits = []
  monkeypatch.setattr(worker.sandbox, "limit_processes", limits.append)
  monkeypatch.setattr(worker.seccomp, "refuse_signals", lambda: limits.append("signals"))
  monkeypatch.setattr(process.resource, "setrlimit", lambda which, both: limits.append(both))

  def ask(name, *requests, functions=(), alone=True):
    _, live = prepared(name, *functions)
    ours, theirs = socket.socketpair()
    with ours, theirs:
      for number, request in enumerate(requests):
        worker.write_frame(ours.sendall, {"n": number} | request)
      ours.shutdown(socket.SHUT_WR)
      live(theirs, types.SimpleNamespace(processes=5, alone=alone))
      theirs.shutdown(socket.SHUT_WR)
      answers = [worker.read_frame(ours.recv) for _ in requests]
      assert worker.read_frame(ours.recv) is None
    assert [answer.pop("n") for answer in answers] == list(range(len(requests)))
    return answers

  ask.limits = limits
  return ask


def reset(**columns):
  return {"do": "reset", "columns": columns, "seed": 3}


def call(name, **arguments):
  return {"do": "call", "name": name, "arguments": arguments}


FINISH = {"do": "finish"}


def test_an_instance_lives_from_its_reset_to_its_reward(ask):
  begun, bought, waited, sold, over = ask(
    "Paid", reset(stock=8, answer="x"), call("buy", count=3), call("wait"), call("buy", count=5),
    FINISH,
  )  # fmt: skip
  assert begun == {"text": "8 left", "failed": False, "done": False}
  assert bought == {"text": '{"left": 5}', "failed": False, "done": False, "reward": 1 / 5}
  assert waited["text"].startswith("<class ") and not waited["failed"], "what JSON cannot hold"
  wrong = "error: get_turn_reward: ZeroDivisionError: division by zero"
  assert sold == {"text": wrong, "failed": True, "done": True, "reward": None}
  assert over["values"] == [0.0]
  state = json.loads(over["state"])
  assert state.keys() == {"stock", "draw", "done"}, "of JSON types, and public"


def test_a_seed_draws_the_same_and_no_opinion_is_no_reward(ask):
  draws = []
  for _ in range(2):
    begun, over = ask("Paid", reset(stock=9), FINISH)
    assert begun["text"] == "9 left" and over["values"] == [None]
    draws.append(json.loads(over["state"])["draw"])
  assert draws[0] == draws[1]


@pytest.mark.parametrize(
  "stock, text, failed",
  [
    (0, "ValueError: nothing to sell", True),
    (1, None, False),
    (4, "TypeError: reset returned int, must return text or None", True),
  ],
)
def test_a_reset_says_text_or_nothing(ask, stock, text, failed):
  (begun,) = ask("Shop", reset(stock=stock))
  assert begun == {"text": text, "failed": failed, "done": failed}


def test_what_a_tool_raises_is_its_answer(ask):
  asked = reset(stock=2), call("leave"), call("talk"), call("sulk"), FINISH
  _, left, talked, sulked, over = ask("Shop", *asked, functions=("talk", "sulk"))
  assert (left["text"], left["failed"], left["done"]) == ("error: SystemExit: 3", True, False)
  assert talked["text"] == "x" * 65_536, "what leaves the process is bounded"
  assert sulked["text"] == "error: Silent: its text cannot be read"
  assert "values" not in over, "the class has no get_reward"


def test_functions_alone_have_no_instance(ask):
  begun, bought, over = ask("", reset(stock=2), call("buy", count=1), FINISH, functions=["buy"])
  assert begun == {"text": None, "failed": False, "done": False}
  assert bought["text"] == "bought" and over == {"state": "{}"}


def test_an_episode_confines_itself_before_it_is_asked(ask):
  ask("Shop")
  assert ask.limits == [5, (70, 70)], "processes, and seconds of its processor: 10 after its end"
  ask.limits.clear()
  ask("Shop", alone=False)
  assert ask.limits == [5, "signals", (70, 70)], "others are in reach"


def test_an_error_in_finish_is_told(ask):
  _, over = ask("Paid", reset(stock="none"), FINISH)
  assert over["raised"].startswith("TypeError: ") and over["state"] == "{}"


def test_state_that_is_too_large_stays():
  def holding(*sizes):
    return types.SimpleNamespace(**{f"a{n}": "x" * size for n, size in enumerate(sizes)})

  quarter = process.MAX_STATE // 4
  assert process.public_state(holding(quarter - 2, 3)) != "{}"
  assert json.loads(process.public_state(holding(quarter - 1, 3))) == {"a1": "xxx"}
  assert process.public_state(holding(*[quarter - 2] * 4)) == "{}", "all together"


def test_tools_are_described_and_the_owner_of_the_reward_is_known(prepared):
  reply, _ = prepared("Paid", "talk")
  names = [tool["function"]["name"] for tool in reply["tools"]]
  assert names == ["buy", "leave", "wait", "talk"] and reply["owns_reward"] is True
  assert prepared("Shop")[0]["owns_reward"] is False


@pytest.mark.parametrize(
  "name, functions, says",
  [
    ("talk", [], "TypeError: talk is no class; name tools that are functions with --tools"),
    ("Sign", [], "TypeError: Sign has no method reset; write reset(self, **columns)"),
    ("Shop", ["buy"], "TypeError: two tools are called 'buy'; rename one"),
    ("", [], "TypeError: no tool in it; write a public method with type hints and a docstring"),
    ("Stall", [], "; it has: Paid, Shop, Sign, buy, sulk, talk"),
  ],
)
def test_what_cannot_be_an_environment_is_named(prepared, name, functions, says):
  with pytest.raises((TypeError, AttributeError)) as found:
    prepared(name, *functions)
  assert says in f"{found.type.__name__}: {found.value}"
