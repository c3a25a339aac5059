"""Puzzles and their scorers, some of which run what the model wrote as Python."""

import contextlib
import os
import runpy
import signal
import socket
from datetime import date
from fractions import Fraction

import pytest

from rl_llm.rewards import RewardPool, grading
from rl_llm.tasks import ReasoningGymOptions, TaskError, load_task, reasoning_gym_task
from rl_llm.tasks.environments import Environment, environment, process, schema
from rl_llm.tasks.environments.problems import default_task, owned_by_environment
from rl_llm.tasks.reasoning_gym import pack, unpack
from tests.representatives import mostly_slow

pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def task():
  return load_task("reasoning_gym:string_insertion", held_out=20)


@pytest.fixture(scope="module")
def pool(task):
  with RewardPool(task.reward, workers=1, max_failure_rate=1.0) as made:
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


# All whose scorers evaluate the response: by `eval`, or by SymPy's parser, which calls it.
EVALUATING = (
  "string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "simple_integration",
  "intermediate_integration", "polynomial_multiplication", "puzzle24", "countdown",
)  # fmt: skip
# By `eval`, by SymPy's parser, and by what comes before it: each sample is a process of its own.
of_evaluating = pytest.mark.parametrize("name", mostly_slow(EVALUATING, quick=[0, 4, 7]))


def running(code):
  """A response with which such a scorer runs the code."""
  return f"[__import__('builtins').exec({code!r})]"


@of_evaluating
def test_payloads_stay_inside(pool, tmp_path, name, record_property):
  """These scorers run the response: it must reach no file, and no connection of any family."""
  missing = {"network", "files"} - set(pool.active_layers())
  if missing:
    pytest.skip(f"this kernel does not offer {missing}")
  marker, key = tmp_path / "marker", tmp_path / "key"
  key.write_text("secret")
  key.chmod(0o600)
  tmp_path.chmod(0o777)
  with contextlib.ExitStack() as opened:
    servers = [opened.enter_context(socket.create_server(("127.0.0.1", 0)))]
    for path, kind in (("stream", socket.SOCK_STREAM), ("datagram", socket.SOCK_DGRAM)):
      servers.append(opened.enter_context(socket.socket(socket.AF_UNIX, kind)))
      servers[-1].bind(str(tmp_path / path))
      (tmp_path / path).chmod(0o777)
    servers[1].listen()
    connect = "import socket; s = socket.socket({}, {}); s.settimeout(1); s.connect({!r})"
    unix, inet = int(socket.AF_UNIX), int(socket.AF_INET)
    payloads = [
      f"open({str(marker)!r}, 'w').write('x')",
      f"import os; os.system('touch {marker}')",
      f"import subprocess; subprocess.run(['/usr/bin/touch', {str(marker)!r}])",
      f"import os; os.chmod({str(key)!r}, 0o777)",
      f"import os; os.write(os.open({str(marker)!r}, 65), open({str(key)!r}, 'rb').read())",
      connect.format(inet, 1, servers[0].getsockname()),
      connect.format(unix, 1, str(tmp_path / "stream")),
      "import socket; a, b = socket.socketpair(type=2); "
      f"a.sendto(b'x', {str(tmp_path / 'datagram')!r})",
      f"import os; os.kill({os.getpid()}, 9)",
    ]
    problem = load_task(f"reasoning_gym:{name}", held_out=0).sample(0, 0, 1)[0]
    results = score(pool, [problem] * 9, [running(code) for code in payloads])
    for server, reached in zip(servers, ("accept", "accept", "recv"), strict=True):
      server.settimeout(0)
      with pytest.raises(BlockingIOError):
        getattr(server, reached)(*[1] * (reached == "recv"))
  assert not marker.exists() and key.stat().st_mode & 0o777 == 0o600
  assert all(r.status in ("ok", "raised") and (r.value or 0.0) < 1.0 for r in results)
  record_property("F24", len(payloads))


@of_evaluating
def test_a_payload_really_runs_there(pool, name):
  """Otherwise the test above would pass with a scorer that evaluates nothing."""
  problem = load_task(f"reasoning_gym:{name}", held_out=0).sample(0, 0, 1)[0]
  result = score(pool, [problem], [running("import os; os._exit(9)")])[0]
  assert (result.status, result.detail) == ("died", "exited with code 9 and no reward")


def test_text_that_forges_its_grader_changes_no_other(pool):
  forge = (
    "[setattr(__import__('reasoning_gym').algorithmic.string_insertion.StringInsertionDataset,"
    " 'score_answer', lambda *a: 1.0)]"
  )
  problem = load_task("reasoning_gym:string_insertion", held_out=0).sample(0, 0, 1)[0]
  results = score(pool, [problem] * 6, [forge, forge, forge, "wrong", "wrong", "wrong"])
  assert all(r.value < 1.0 for r in results[3:])


# What models write that no scorer expects.
ODD = [
  "", "nonsense", "7", "-1", "1/0", "nan", "1e400", "[", "{}", "[[1, 2], [3]]", '{"a": 1}',
  "\ud800é\0", "9" * 5000, "(x) = ²",
]  # fmt: skip
# Of what the others are known to raise on, something is here: else the test below shows nothing.
RAISING = {"prime_factorization", "boxnet", "game_of_life", "coin_flip"}


def scored(problem, texts):
  """What a worker answers of each text; here without a process of its own for each."""
  from rl_llm.tasks.reasoning_gym_reward import reward

  grade = grading.grader(reward)
  columns = {name: [value] for name, value in problem.columns.items()}
  request = {"prompts": [problem.prompt], "columns": columns, "completion_ids": None}
  request |= {"step": 0, "steps": 0}
  return [grading.grade_text(grade, request | {"completions": [text]}) for text in texts]


def test_no_kind_of_puzzle_raises_on_odd_text():
  """All kinds there are, each on 14 texts; on its own answer none is at a loss."""
  import reasoning_gym.factory

  raising, kinds = set(), set(reasoning_gym.factory.DATASETS) - {"composite"}
  assert len(kinds) >= 105
  signal.alarm(120)  # Some scorers run text as Python; none of these is to take long.
  for name in kinds:
    problem = load_task(f"reasoning_gym:{name}", held_out=0).sample(0, 0, 1)[0]
    for text, reply in zip(ODD, scored(problem, ODD), strict=True):
      (value,) = reply["values"]
      assert isinstance(value, float) and 0 <= value <= 1, (name, text, reply)
      if "unreadable" in reply:
        raising.add(name)
        assert value == 0, (name, text)
    own = problem.columns["answer"]
    assert own is None or "unreadable" not in scored(problem, [own])[0], name
  signal.alarm(0)
  assert raising >= RAISING


@pytest.mark.parametrize("name", sorted(RAISING))
def test_what_a_scorer_cannot_read_is_counted_apart_and_wrong(pool, name):
  problem = load_task(f"reasoning_gym:{name}", held_out=0).sample(0, 0, 1)[0]
  own = problem.columns["answer"] or ""  # boxnet names none.
  results = score(pool, [problem] * 3, ["1e400", '{"a": 1}', own])
  assert [result.status for result in results] == ["ok"] * 3
  unreadable = [result for result in results if result.unreadable]
  assert unreadable and all(r.value == 0 and "Error" in r.detail for r in unreadable)
  assert not results[2].unreadable


@pytest.mark.parametrize("text", ["nan", " NaN", "-nan", "nan + nanj", "(nani)", "1 - nani"])
def test_a_number_that_is_none_is_worth_nothing(text):
  """The scorer of complex numbers gives 1 for it, as no distance from it is large."""
  problem = load_task("reasoning_gym:complex_arithmetic", held_out=0).sample(0, 0, 1)[0]
  assert [reply["values"] for reply in scored(problem, [text, problem.columns["answer"]])] == [
    [0.0], [1.0]
  ]  # fmt: skip


def test_an_environment_takes_several_answers():
  """test_builtin.py plays it in its processes, each of which imports the package anew."""
  kind = environment._kind("reasoning_gym:leg_counting", ())
  assert kind.runs_text
  made = runpy.run_path(kind.location)[kind.made]
  assert list(process.tools_of(made, [])) == ["answer"]
  function = schema.tool_schema(made().answer, "answer")["function"]
  assert list(function["parameters"]["properties"]) == ["text"]
  task = default_task(Environment((kind,)))
  assert task.reward is owned_by_environment
  columns = task.held_out[0].columns
  for answers, said, best in (
    (["nonsense", columns["answer"]], ["wrong, 2 left", "right"], 1.0),
    (["x", "y", "z"], ["wrong, 2 left", "wrong, 1 left", "wrong, 0 left"], 0.0),
  ):
    puzzle = made()
    assert puzzle.reset(**columns) == "You may answer 3 times."
    assert [puzzle.answer(f" {text}\n") for text in answers] == said and puzzle.done
    assert puzzle.get_reward() == pytest.approx(best, abs=0.1)
    with pytest.raises(ValueError, match="no try is left"):
      puzzle.answer(columns["answer"])


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
