"""Puzzles and their scorers, some of which run what the model wrote as Python."""

import os
import socket
from datetime import date
from fractions import Fraction

import pytest

from rl_llm.rewards import RewardPool
from rl_llm.tasks import ReasoningGymOptions, TaskError, load_task, reasoning_gym_task
from rl_llm.tasks.reasoning_gym import pack, unpack

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def task():
  return load_task("reasoning_gym:string_insertion", held_out=20)


@pytest.fixture(scope="module")
def pool(task):
  with RewardPool(task.reward, workers=2, max_failure_rate=1.0) as made:
    yield made


def score(pool, problems, texts):
  return pool.score([p.prompt for p in problems], texts, [p.columns for p in problems])


def test_training_never_meets_the_held_out(task):
  kept = {p.prompt[0]["content"] for p in task.held_out}
  drawn = {p.prompt[0]["content"] for p in task.sample(0, 0, 50)}
  assert len(kept) == 20 and not kept & drawn and len(drawn) == 50


def test_samples_depend_on_seed_and_step_alone(task):
  again = reasoning_gym_task("string_insertion", ReasoningGymOptions(held_out=20))
  assert task.held_out == again.held_out
  assert task.sample(1, 2, 3) == again.sample(1, 2, 6)[:3] != task.sample(1, 3, 3)


def test_a_small_kind_redraws_what_is_held_out():
  """Questions of one digit of arithmetic repeat: seeds differ, texts do not."""
  small = load_task("reasoning_gym:coin_flip", held_out=3)
  kept = {p.key for p in small.held_out}
  assert not kept & {p.key for p in small.sample(0, 0, 200)}


def test_right_wrong_and_partial(task, pool):
  problems = task.sample(0, 0, 2)
  right = [p.columns["answer"] for p in problems]
  assert [r.value for r in score(pool, problems, right)] == [1.0, 1.0]
  wrong = [r.value for r in score(pool, problems, ["nonsense", ""])]
  assert all(0 <= value < task.max_reward for value in wrong)


@pytest.mark.parametrize("name", ["rearc", "leg_counting", "countdown", "calendar_arithmetic"])
def test_scores_survive_the_way_to_the_worker(pool, name):
  import reasoning_gym

  other = load_task(f"reasoning_gym:{name}", held_out=0)
  problems = other.sample(0, 0, 2)
  scorer = reasoning_gym.get_score_answer_fn(name)
  for text in (problems[0].columns["answer"], "7"):
    expected = [float(scorer(text, unpack(p.columns["entry"]))) for p in problems]
    assert [r.value for r in score(pool, problems, [text, text])] == expected


@pytest.mark.parametrize("name", ["string_insertion", "spiral_matrix", "binary_matrix"])
def test_payloads_stay_inside(pool, tmp_path, name):
  """These scorers call eval on the response: it may run, it must reach nothing."""
  missing = {"network", "files"} - set(pool.active_layers())
  if missing:
    pytest.skip(f"this kernel does not offer {missing}")
  marker = tmp_path / "marker"
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(0.1)
    address = server.getsockname()
    payloads = [
      f"[open({str(marker)!r}, 'w').write('x')]",
      f"[__import__('os').system('touch {marker}')]",
      f"[__import__('subprocess').run(['/usr/bin/touch', {str(marker)!r}])]",
      f"[__import__('socket').create_connection({address!r}, 1)]",
      f"[__import__('os').kill({os.getpid()}, 9)]",
      "[open('/etc/shadow').read()]",
    ]
    problem = load_task(f"reasoning_gym:{name}", held_out=0).sample(0, 0, 1)[0]
    results = score(pool, [problem] * 6, payloads)
    with pytest.raises(TimeoutError):
      server.accept()
  assert not marker.exists()
  assert all(r.status in ("ok", "raised") and (r.value or 0.0) < 1.0 for r in results)


def test_a_payload_really_runs_there(pool):
  """Otherwise the test above would pass with a scorer that evaluates nothing."""
  problem = load_task("reasoning_gym:string_insertion", held_out=0).sample(0, 0, 1)[0]
  result = score(pool, [problem], ["[__import__('os')._exit(9)]"])[0]
  assert (result.status, result.detail) == ("died", "exited with code 9 and no reward")


def test_text_that_forges_its_grader_changes_no_other(pool):
  forge = (
    "[setattr(__import__('reasoning_gym').algorithmic.string_insertion.StringInsertionDataset,"
    " 'score_answer', lambda *a: 1.0)]"
  )
  problem = load_task("reasoning_gym:string_insertion", held_out=0).sample(0, 0, 1)[0]
  results = score(pool, [problem] * 6, [forge, forge, forge, "wrong", "wrong", "wrong"])
  assert all(r.value < 1.0 for r in results[3:])


def test_pack_keeps_types():
  value = {"a": (1, [2, (3,)]), 4: {5}, (6, 7): None, "f": Fraction(1, 3), "d": date(2026, 1, 2)}
  back = unpack(pack({**value, "b": b"\0", "dict": {"dict": []}}))
  assert back == {**value, "b": b"\0", "dict": {"dict": []}}
  assert type(back["a"]) is tuple and type(back["a"][1][1]) is tuple
  with pytest.raises(TaskError, match="holds a object"):
    pack(object())


def test_instruction_follows_the_question():
  plain = load_task("reasoning_gym:leg_counting", held_out=1).held_out[0]
  asked = load_task("reasoning_gym:leg_counting", held_out=1, instruction="Number only.")
  question = plain.prompt[0]["content"]
  assert asked.held_out[0].prompt[0]["content"] == question + "\nNumber only."


def test_bad_names_and_options():
  with pytest.raises(TaskError, match="leg_countin: no such puzzle; did you mean leg_counting"):
    load_task("reasoning_gym:leg_countin")
  with pytest.raises(TaskError, match="reasoning_gym.held_out=-1"):
    ReasoningGymOptions(held_out=-1)


def test_missing_package_names_the_command(monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  with pytest.raises(TaskError, match="pip install 'rl_llm.tasks.'"):
    load_task("reasoning_gym:leg_counting")
