"""The environments that ship, and their problems."""

import importlib.util

import pytest

from rl_llm.tasks.environments import EnvironmentError, Episodes, load
from rl_llm.tasks.environments.builtin.search import towns
from rl_llm.tasks.environments.builtin.wordle import WORDS, marks
from rl_llm.tasks.environments.problems import default_task, owned_by_environment, reward


def needs(package):
  missing = importlib.util.find_spec(package) is None
  return pytest.mark.skipif(missing, reason=f"pip install {package}")


@pytest.fixture(scope="module")
def python():
  with Episodes(load("python", protocol="text")) as episodes:
    yield episodes


@pytest.mark.parametrize(
  ("code", "shown"),
  [
    ("print(2**64)", "18446744073709551616"),
    ("x = 1", "[no output; print what you want to see]"),
    ("print(1)\n1/0", "ZeroDivisionError: division by zero\n\n[code 1]"),
    ("while True: print('x' * 1000)", "x\n[ended: too much output]"),
    ("import os\nif not os.fork():\n  os.setsid()\nprint('y')", "y"),
    ("import os\nos.kill(1, 9)\nprint('alive')", "alive"),
    ("open('/etc/passwd')", "No such file or directory: '/etc/passwd'\n\n[code 1]"),
    ("import socket\nsocket.create_connection(('127.0.0.1', 1))", "[code 1]"),
    ("print(open('/proc/1/mem', 'rb').read(1))", "[code 1]"),
  ],
)
def test_a_program_runs_in_a_fresh_process(python, code, shown):
  python.start([{"answer": "a secret answer"}])
  seen = python.turn({0: f"call python:\n```python\n{code}\n```"})[0]
  assert seen.text.endswith(shown) and seen.status == "ok" and not seen.done
  assert len(seen.text) < 2100
  again = python.turn({0: "call python: print(1 + 1)"})[0]
  assert again.text == "2"


def test_a_program_knows_nothing_of_the_answer_or_of_the_last_program(python):
  python.start([{"answer": "Eyjafjalla"}])
  look = (
    "import gc\nprint('Eyjaf-jalla'.replace('-', '') in str(gc.get_objects()), 'x' in globals())"
  )
  python.turn({0: "call python: x = 1"})
  assert python.turn({0: f"call python:\n```\n{look}\n```"})[0].text == "False False"


@needs("bm25s")
def test_two_searches_answer_a_question_of_the_demo():
  environment = load("search:demo", protocol="text")
  problem = default_task(environment).held_out[0]
  town = next(town for town in towns() if town.name == problem.key)
  with Episodes(environment) as episodes:
    episodes.start([problem.columns])
    first = episodes.turn({0: f"call search: mayor of {town.name}"})[0]
    assert town.mayor in first.text and str(town.born) not in first.text.split("\n")[0]
    second = episodes.turn({0: f"call search: {town.mayor}"})[0]
    assert second.text.startswith(f"[{town.mayor}.txt] {town.mayor} was born in {town.born}.")
    assert episodes.turn({0: "call search: the"})[0].text == "nothing found; use other words"
    episodes.finish([0])
    assert episodes.attributes([0]) == [{"searches": 3}]
  assert reward([""] * 3, [str(town.born), "1 and 2", ""], answer=[str(town.born)] * 3) == [1, 0, 0]


@needs("bm25s")
def test_a_directory_of_ones_own_is_searched(tmp_path):
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "blue_whale.md").write_text("It weighs 150 tonnes.")
  (tmp_path / "ant.txt").write_text("It weighs 3 milligrams.")
  (tmp_path / "image.png").write_bytes(b"whale")
  with Episodes(load(f"search:{tmp_path}", protocol="text")) as episodes:
    episodes.start([{}])
    assert episodes.turn({0: "call search: whale"})[0].text == (
      "[deep/blue_whale.md] It weighs 150 tonnes."
    )
  with pytest.raises(EnvironmentError, match="--task=jsonl:FILE, or try --env=search:demo"):
    default_task(load(f"search:{tmp_path}"))
  (tmp_path / "empty").mkdir()
  with pytest.raises(EnvironmentError, match="no .txt or .md file in it; put some there"):
    load(f"search:{tmp_path}/empty")


@pytest.mark.parametrize(
  ("guess", "word", "found"),
  [("speed", "speed", "GGGGG"), ("sleep", "speed", "G-GGY"), ("eerie", "speed", "YY---"),
   ("allow", "world", "-Y-YY")],
)  # fmt: skip
def test_letters_are_marked_as_often_as_the_word_has_them(guess, word, found):
  assert marks(guess, word) == found


def test_wordle():
  assert len(set(WORDS)) == len(WORDS) > 400 and {len(word) for word in WORDS} == {5}
  with Episodes(load("wordle", protocol="text")) as episodes:
    assert episodes.start([{"word": "speed", "tries": 2}] * 2)[0].text == "You have 2 tries."
    seen = episodes.turn({0: "call guess: sleep", 1: "call guess: sleep\ncall guess: speed"})
    assert (seen[0].text, seen[0].done) == ("G-GGY, 1 left", False)
    assert (seen[1].text, seen[1].done) == ("G-GGY, 1 left\nGGGGG, 0 left", True)
    assert "no word of 5 letters" in episodes.turn({0: "call guess: 12345"})[0].text
    assert [each.value for each in episodes.finish([0, 1])] == [0.3, 1.0]


@pytest.mark.slow
@needs("reasoning_gym")
def test_a_puzzle_may_be_answered_several_times():
  environment = load("reasoning_gym:leg_counting", protocol="text")
  task = default_task(environment)
  columns = task.held_out[0].columns
  with Episodes(environment) as episodes:
    assert episodes.start([columns] * 2)[0].text == "You may answer 3 times."
    seen = episodes.turn({0: "call answer: 1", 1: "call answer: x\ncall answer: y\ncall answer: z"})
    assert seen[0].text == "wrong, 2 left" and seen[1].done
    right = episodes.turn({0: f"call answer: {columns['answer']}"})[0]
    assert right.text == "right" and right.done
    first, second = episodes.finish([0, 1])
    assert first.value == 1.0 > second.value


@pytest.mark.parametrize("name", ["calculator", "python", "guess", "wordle"])
def test_each_has_problems_of_which_it_keeps_some(name):
  task = default_task(load(name))
  kept = {problem.key for problem in task.held_out}
  drawn = task.sample(0, 1, 100)
  assert kept and not kept & {problem.key for problem in drawn}
  assert drawn[:10] == task.sample(0, 1, 10)
  assert drawn != task.sample(0, 2, 100)


def test_a_grader_without_an_opinion_gives_none():
  assert owned_by_environment(["p"] * 2, ["a"] * 2, secret=[1, 2]) == [None, None]


def test_programs_need_barriers(monkeypatch):
  environment = load("python", protocol="text")
  with Episodes(environment) as episodes:
    monkeypatch.setattr(Episodes, "_received", without_network(Episodes._received))
    with pytest.raises(EnvironmentError, match="cannot bar them from network; .*weak"):
      episodes.start([{}])
  with Episodes(environment, allow_weak_sandbox=True) as episodes:
    episodes.start([{}])
    assert episodes.turn({0: "call python: print(1)"})[0].text == "1"


def without_network(received):
  """As on a system that cannot bar a process from the network."""

  def found(self, episode):
    answer = received(self, episode)
    self.layers = tuple(layer for layer in self.layers if layer != "network")
    return answer

  return found
