"""Episodes as TRL's documentation writes environments, each in a process of its own."""

import os
import resource

import pytest

from rl_llm.rewards import RewardPool, RewardSource
from rl_llm.tasks.environments import EnvironmentError, Episodes, load
from rl_llm.tasks.environments.problems import default_task

MINE = '''
import random

class Counter:
  """Counts up to a goal, in TRL's form."""

  def __init__(self):
    self.value = 0
    self.reward = 0.0
    self.done = False
    self._hidden = 1

  def reset(self, goal: int, **columns) -> str | None:
    self.goal = goal
    self.draw = random.random()
    return f"Reach {goal}. {sorted(columns)}"

  def add(self, amount: int) -> dict:
    """Adds to the counter.

    Args:
      amount: How much.
    """
    if amount < 0:
      raise ValueError("only upwards")
    self.value += amount
    self.reward += 1
    self.done = self.value >= self.goal
    return {"value": self.value}

  async def look(self) -> str:
    """Says the value."""
    return f"at {self.value}"

class Owner(Counter):
  def get_turn_reward(self) -> float:
    return 0.5

  def get_reward(self) -> float:
    return self.reward / 2

def double(number: float) -> float:
  """Doubles.

  Args:
    number: What.
  """
  return 2 * number
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
  path = tmp_path_factory.mktemp("mine") / "mine.py"
  path.write_text(MINE)
  return path


@pytest.fixture(scope="module")
def counter(mine):
  with Episodes(load(f"{mine}:Counter", f"{mine}:double", protocol="text")) as episodes:
    yield episodes


def test_tools_are_methods_and_functions(counter):
  names = [tool["function"]["name"] for tool in counter.environment.tools]
  assert names == ["add", "look", "double"]
  assert not counter.environment.owns_reward


def test_an_episode(counter):
  first, second = counter.start([{"goal": 3, "answer": "x"}, {"goal": 5, "answer": "y"}])
  assert first.text == "Reach 3. ['answer']" and not first.done
  seen = counter.turn({0: "call add: 2\ncall look:", 1: "call double: 2.5"})
  assert seen[0].answers == ('{"value": 2}', "at 2") and seen[0].calls == 2
  assert seen[1].text == "5.0" and seen[1].status == "ok" and not seen[1].done
  seen = counter.turn({0: "call add: 1", 1: "call add: -1"})
  assert seen[0].done and not seen[1].done
  assert seen[1].text == "error: ValueError: only upwards" and seen[1].status == "tool_error"
  assert counter.turn({1: "I give up."})[1].done
  assert counter.finish([0, 1]) == [None, None]
  first, second = counter.attributes([0, 1])
  assert (first["value"], first["reward"], second["value"]) == (3, 2.0, 0)
  assert "_hidden" not in first


def test_rows_that_are_equal_get_equal_random_numbers(counter):
  counter.start([{"goal": 1}, {"goal": 1}, {"goal": 2}])
  counter.finish(range(3))
  draws = [each["draw"] for each in counter.attributes(range(3))]
  assert draws[0] == draws[1] != draws[2]


def test_the_environment_owns_the_reward(mine):
  with Episodes(load(f"{mine}:Owner", protocol="text")) as episodes:
    assert episodes.environment.owns_reward
    episodes.start([{"goal": 9}] * 2)
    seen = episodes.turn({0: "call add: 1\ncall add: 1", 1: "call add: x"})
    assert (seen[0].reward, seen[1].reward) == (1.0, None)
    assert seen[1].malformed == 1 and seen[1].status == "malformed"
    assert [(r.value, r.status) for r in episodes.finish([0, 1])] == [(1.0, "ok"), (0.0, "ok")]


def test_a_column_chooses_the_environment(mine):
  environment = load(f"guess,{mine}:Owner", protocol="text")
  with Episodes(environment) as episodes:
    first, second = episodes.start(
      [{"environment": "guess", "secret": 5}, {"environment": "Owner", "goal": 1}]
    )
    assert first.text == "You have 7 guesses." and second.text.startswith("Reach 1")
    seen = episodes.turn({0: "call guess: 5", 1: "call guess: 5"})
    assert seen[0].text == "correct" and "no tool 'guess'" in seen[1].text
    with pytest.raises(EnvironmentError, match="must name one of Guess, Owner"):
      episodes.start([{"secret": 5}])


def test_guess_is_played_to_its_end():
  environment = load("guess", protocol="text")
  problem = default_task(environment).sample(0, 0, 1)[0]
  with Episodes(environment) as episodes:
    episodes.start([problem.columns | {"tries": 2}])
    low, secret = 1, problem.columns["secret"]
    wrong = low if secret != low else 2
    seen = episodes.turn({0: f"call guess: {wrong}"})[0]
    assert seen.text == ("higher" if secret > wrong else "lower") + ", 1 left"
    assert episodes.turn({0: f"call guess: {secret}"})[0].done
    assert episodes.finish([0])[0].value == 1.0


@pytest.mark.parametrize(
  ("expression", "answer"),
  [
    ("12*34", "408"), ("2 + 3 * (4 - 1)", "11"), ("7 / 2", "3.5"), ("-5 % 3", "1"),
    ("10**10", "error: ValueError: only numbers, + - * / // % and brackets"),
    ("__import__('os')", "error: ValueError: only numbers, + - * / // % and brackets"),
    ("1/0", "error: ZeroDivisionError: division by zero"),
  ],
)  # fmt: skip
def test_the_calculator(calculator, expression, answer):
  calculator.start([{}])
  assert calculator.turn({0: f"call calculate: {expression}"})[0].text == answer


@pytest.fixture(scope="module")
def calculator():
  with Episodes(load("calculator", protocol="text")) as episodes:
    yield episodes


def test_the_products_have_two_digits_and_stay_apart():
  task = default_task(load("calculator"))
  held_out = {problem.key for problem in task.held_out}
  problems = task.sample(3, 1, 50)
  assert not held_out & {problem.key for problem in problems}
  assert all(10 <= int(x) <= 99 for p in problems for x in p.key.split(" * "))


@pytest.mark.parametrize(
  ("env", "tools", "fix"),
  [
    ("calculater", "", "did you mean calculator?"),
    ("calculator:x", "", "must be written calculator"),
    ("{mine}:None_", "", "nothing called 'None_' in .*; it has: Counter, Owner, double"),
    ("{mine}:double", "", "name tools that are functions with --tools"),
    ("{mine}", "", "must be FILE.py:Class"),
    ("gone.py:A", "", "no such file"),
    ("", "{mine}:Counter.add", "must be FILE.py:function"),
    ("", "", "must be one of calculator"),
    ("calculator,guess", "", "give it to all or to none"),
  ],
)
def test_what_is_wrong_is_said_in_a_line(mine, env, tools, fix):
  with pytest.raises(EnvironmentError, match=fix) as found:
    load(env.format(mine=mine), tools.format(mine=mine))
  assert "\n" not in str(found.value)


def test_several_without_problems_ask_for_them(mine):
  with pytest.raises(EnvironmentError, match="--task=jsonl:FILE"):
    default_task(load(f"{mine}:Owner"))


def test_more_episodes_than_open_files_are_refused():
  environment = load("guess", protocol="text")
  with Episodes(environment) as episodes:
    own = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
      resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 6, own[1]))
      with pytest.raises(EnvironmentError, match="ulimit -n 8192, or sample fewer"):
        episodes.start([{"secret": 1}] * 20)
    finally:
      resource.setrlimit(resource.RLIMIT_NOFILE, own)
    assert len(episodes.start([{"secret": 1}] * 20)) == 20


def test_a_reward_function_reads_the_environments_as_trls_does(mine, tmp_path):
  path = tmp_path / "reward.py"
  path.write_text(
    "def reward(completions, environments, **columns):\n"
    "  return [environment.reward + environment.value for environment in environments]\n"
  )
  with Episodes(load(f"{mine}:Counter", protocol="text")) as episodes:
    episodes.start([{"goal": 9}] * 2)
    episodes.turn({0: "call add: 2", 1: "call add: 1\ncall add: 4"})
    assert episodes.finish([0, 1]) == [None, None]
    columns = [{"environments": state} for state in episodes.attributes([0, 1])]
  with RewardPool(RewardSource(str(path), "reward"), workers=1) as pool:
    found = pool.score(["p"] * 2, ["a"] * 2, columns, group_size=2)
  assert [result.value for result in found] == [3.0, 7.0]
