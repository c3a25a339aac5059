import itertools

import pytest

from rl_llm.rewards import RewardPool
from rl_llm.tasks import CopyOptions, TaskError, copy_task
from rl_llm.tasks.copy_text import credit


@pytest.mark.parametrize("alphabet, low, high, held_out", [("abc", 1, 3, 12), ("xy", 2, 4, 14)])
def test_training_draws_every_string_but_the_held_out(alphabet, low, high, held_out):
  everything = {
    "".join(letters)
    for length in range(low, high + 1)
    for letters in itertools.product(alphabet, repeat=length)
  }
  options = CopyOptions(alphabet=alphabet, min_length=low, max_length=high, held_out=held_out)
  assert options.strings() == len(everything)
  task = copy_task(options)
  kept = {problem.prompt for problem in task.held_out}
  assert len(kept) == held_out
  assert {p.prompt for p in task.sample(0, 0, 3000)} == {text + ">" for text in everything} - kept


def test_a_length_that_is_all_held_out_is_not_drawn():
  """With 2 letters and half held out, some choice of lengths leaves none of length 1."""
  for low, high in itertools.combinations_with_replacement(range(1, 5), 2):
    options = CopyOptions(alphabet="ab", min_length=low, max_length=high, held_out=0)
    task = copy_task(
      CopyOptions(alphabet="ab", min_length=low, max_length=high, held_out=options.strings() // 2)
    )
    kept = {p.key for p in task.held_out}
    assert not kept & {p.key for p in task.sample(0, 0, 200)}


def test_problem_and_determinism():
  task = copy_task(CopyOptions())
  problems = task.sample(5, 6, 10)
  assert all(p.prompt == p.columns["answer"] + ">" == p.key + ">" for p in problems)
  assert problems == copy_task(CopyOptions()).sample(5, 6, 20)[:10] != task.sample(5, 7, 10)


@pytest.mark.parametrize(
  "completion, answer, value",
  [
    ("abc", "abc", 1.0),
    ("", "abc", 0.0),
    ("xyz", "abc", 0.0),
    ("ab", "abc", 0.5 * 2 / 3 + 0.1 * 2 / 3),
    ("abx", "abc", 0.5 * 2 / 3 + 0.1 * 2 / 3),
    ("xbc", "abc", 0.5 * 2 / 3 + 0.1 * 2 / 3),
    ("abcx", "abc", 0.5 * 3 / 4 + 0.1 * 3 / 4),
    ("abc ", "abc", 0.5 * 3 / 4 + 0.1 * 3 / 4),
    ("aaaa", "a", 0.5 / 4 + 0.1 / 4),
  ],
)
def test_credit(completion, answer, value):
  assert credit(completion, answer) == pytest.approx(value, abs=1e-12)


def test_only_the_exact_string_is_correct_and_every_right_step_pays():
  texts = ["".join(t) for n in range(6) for t in itertools.product("abx", repeat=n)]
  assert max(credit(text, "abba") for text in texts if text != "abba") < 0.6
  path = [credit("abba"[:n], "abba") for n in range(5)]
  assert path == sorted(path) and len(set(path)) == 5


@pytest.mark.parametrize("written", ["", "c", "ca", "cad", "abc", "bbb", "xyz"])
def test_what_is_written_behind_the_answer_costs_the_same_whatever_it_is(written):
  one_more = [credit(written.ljust(3, "x") + extra, "abc") for extra in "abcx"]
  assert len(set(one_more)) == 1 and one_more[0] <= credit(written.ljust(3, "x"), "abc")


def test_reward_in_a_worker():
  task = copy_task(CopyOptions())
  with RewardPool(task.reward, workers=1) as pool:
    results = pool.score(["ab>"] * 2, ["ab", "a"], [{"answer": "ab"}] * 2)
  assert [r.value for r in results] == [1.0, 0.5 / 2 + 0.1 / 2]


@pytest.mark.parametrize(
  "options, said",
  [
    ({"alphabet": ""}, "copy.alphabet=''"),
    ({"alphabet": "aab"}, "copy.alphabet='aab'"),
    ({"alphabet": "a>"}, "copy.alphabet='a>'"),
    ({"min_length": 0}, "copy.min_length=0"),
    ({"min_length": 4}, "copy.max_length=3: must be at least min_length=4"),
    ({"held_out": 33}, r"copy.held_out=33: must be in 0..32 \(half of the 64 strings\)"),
  ],
)
def test_bad_options(options, said):
  with pytest.raises(TaskError, match=said):
    CopyOptions(**options)
