"""Evaluation: pass@k and majority@k against every subset, their intervals, and graded batches."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from rl_llm.evaluation import (
  estimate_interval,
  evaluate,
  majority_at_k,
  over_opinions,
  pass_at_k,
  summarize,
)
from rl_llm.rewards import RewardPool, RewardSource, graders
from rl_llm.rollout import STOP_EOS, Rollout
from rl_llm.rollout.collect import Sampler
from rl_llm.rollout.drawing import Drawn, make_encode
from rl_llm.runs.metrics import proportion_interval
from rl_llm.tasks import arithmetic, copy_text, load_task
from rl_llm.tasks.problem import number_text
from rl_llm.text.tokenizers import ByteTokenizer

# Estimators, by their definition.


def pass_by_enumeration(correct, k):
  subsets = list(itertools.combinations(correct, k))
  return Fraction(sum(any(subset) for subset in subsets), len(subsets))


def majority_by_enumeration(correct, answers, k):
  """Over every subset, every way to break the tie, and every response that gives the winner."""
  total, subsets = Fraction(0), list(itertools.combinations(range(len(correct)), k))
  for subset in subsets:
    votes = Counter(answers[i] for i in subset if answers[i] is not None)
    winners = [answer for answer, count in votes.items() if count == max(votes.values())]
    for winner in winners:
      graded = [bool(correct[i]) for i in subset if answers[i] == winner]
      total += Fraction(sum(graded), len(graded) * len(winners))
  return total / len(subsets)


def voters(rng, problems, samples):
  """Answers, some missing, and flags that mostly agree with them: a grade may have failed."""
  answers = rng.choice([None, "12", "12", "11", "7", "1"], size=(problems, samples))
  correct = (answers == "12") & (rng.random((problems, samples)) < 0.9)
  return correct, answers


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(samples):
  # Every number of right samples there can be, right ones last: their order must not matter.
  correct = [[i >= samples - right for i in range(samples)] for right in range(samples + 1)]
  for k in range(1, samples + 1):
    wanted = [float(pass_by_enumeration(row, k)) for row in correct]
    np.testing.assert_allclose(pass_at_k(np.array(correct), k=k), wanted, rtol=0, atol=1e-12)


def test_pass_at_k_is_right_where_binomials_overflow():
  # C(4000, 2000) has 1,203 digits. 1 right of S: the subset has it with probability k / S.
  correct = np.zeros((1, 4000), bool)
  correct[0, 17] = True
  np.testing.assert_allclose(pass_at_k(correct, k=2000), [0.5], rtol=1e-9)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_majority_at_k_is_the_mean_over_all_subsets(samples):
  correct, answers = voters(np.random.default_rng(samples), 25, samples)
  for k in range(1, samples + 1):
    wanted = [float(majority_by_enumeration(*row, k)) for row in zip(correct, answers, strict=True)]
    np.testing.assert_allclose(majority_at_k(correct, answers, k=k), wanted, rtol=0, atol=1e-12)


def test_majority_of_one_is_the_accuracy_of_what_votes():
  correct, answers = voters(np.random.default_rng(0), 20, 6)
  wanted = np.mean(correct & (answers != None), axis=1)  # noqa: E711
  np.testing.assert_allclose(majority_at_k(correct, answers, k=1), wanted, rtol=0, atol=1e-12)


def test_majority_at_k_of_many_samples():
  """One subset, then two answers of which one is right: a hypergeometric sum by hand."""
  answers = np.array([["a"] * 60 + ["b"] * 40 + [None] * 28])
  correct = answers == "a"
  assert majority_at_k(correct, answers, k=128) == pytest.approx([1.0])
  wins = Fraction(0)
  for a, b in itertools.product(range(17), repeat=2):
    if a + b <= 16 and a >= b and a:
      ways = math.comb(60, a) * math.comb(40, b) * math.comb(28, 16 - a - b)
      wins += Fraction(ways, 1 + (a == b))
  wanted = float(wins / math.comb(128, 16))
  np.testing.assert_allclose(majority_at_k(correct, answers, k=16), [wanted], rtol=1e-12)


def test_nobody_votes():
  nothing = np.full((2, 3), None)
  assert majority_at_k(np.zeros((2, 3), bool), nothing, k=2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("k", [0, 4])
def test_k_beyond_the_samples_is_refused(k):
  correct, answers = voters(np.random.default_rng(0), 2, 3)
  for call in (lambda: pass_at_k(correct, k=k), lambda: majority_at_k(correct, answers, k=k)):
    with pytest.raises(ValueError, match=rf"k is {k}; .* 1 to 3"):
      call()


def test_shapes_are_checked():
  with pytest.raises(ValueError, match=r"correct has shape \(3,\)"):
    pass_at_k(np.zeros(3, bool), k=1)
  with pytest.raises(ValueError, match=r"answers has shape \(2, 4\)"):
    majority_at_k(np.zeros((2, 3), bool), np.full((2, 4), "a"), k=1)


# Intervals.


def test_interval_of_pass_at_1_is_that_of_the_accuracy():
  correct = np.random.default_rng(0).random((30, 8)) < 0.3
  wanted = proportion_interval(correct.sum(axis=1), 8)
  assert estimate_interval(pass_at_k(correct, k=1), samples=8, k=1) == pytest.approx(wanted)


def test_interval_by_hand():
  # Estimates 1, 1/2, 0, 1/2 (S = 4, k = 2): mean 1/2, variance of the mean (1/4 + 1/4) / (4 * 3)
  # = 1/24, so they are worth (1/4) / (1/24) = 6 answers, within N = 4 and N S / k = 8.
  n, z = 6, 1.959963984540054
  half = z * math.sqrt(1 / (4 * n) + z * z / (4 * n * n)) / (1 + z * z / n)
  found = estimate_interval(np.array([1, 0.5, 0, 0.5]), samples=4, k=2)
  assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-12)


def test_equal_estimates_are_worth_no_more_than_disjoint_draws():
  # No spread at all: N S / k = 4 * 2 answers, not infinitely many.
  n, z = 8, 1.959963984540054
  half = z * math.sqrt(1 / (4 * n) + z * z / (4 * n * n)) / (1 + z * z / n)
  found = estimate_interval(np.full(4, 0.5), samples=4, k=2)
  assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-12)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(k):
  """400 evaluations of 60 problems: 95 % within three standard errors of the count, 3.3 %."""
  rng = np.random.default_rng(k)
  easy = rng.beta(0.5, 1.0, size=(400, 60))
  truth = np.mean(1 - (1 - rng.beta(0.5, 1.0, size=1_000_000)) ** k)
  held = 0
  for chances in easy:
    correct = rng.random((60, 8)) < chances[:, None]
    _, low, high = estimate_interval(pass_at_k(correct, k=k), samples=8, k=k)
    held += low <= truth <= high
  assert 0.95 - 0.033 <= held / 400 <= 0.95 + 0.033


# Responses on which the grader has no opinion.


def rows_of(statuses, answers=None):
  """Lines of samples.jsonl: two sampled responses a problem and a greedy one."""
  rows = []
  for index, status in enumerate(statuses):
    right = {"right": True, "wrong": False, "not_applicable": None}.get(status, False)
    rows.append(
      {
        "status": "ok" if status in ("right", "wrong") else status,
        "correct": right,
        "sample": index % 3,
        "greedy": index % 3 == 2,
        "answer": answers[index] if answers else None,
        "difficulty": None,
      }
    )
  return rows


BATCH = [{"weights": "w", "time/step": 1.0}]
NONE = "not_applicable"


def test_a_model_that_is_always_right_scores_1_whatever_has_no_opinion():
  """As a wrong answer each None would cost: 3 of 6 sampled and 1 of 3 greedy ones are right."""
  rows = rows_of(["right", NONE, "right", NONE, NONE, NONE, "right", "right", NONE])
  found = summarize(rows, BATCH, ks=[1, 2], votes=False)
  assert found["all"]["pass@1"]["value"] == found["all"]["greedy"]["value"] == 1.0
  # Of the problems only the last has two opinions: that and no more is what pass@2 knows.
  assert tuple(found["all"]["pass@2"].values()) == proportion_interval([1], 1)
  assert tuple(found["all"]["pass@1"].values()) == proportion_interval([1, 2], [1, 2])
  assert (found["no_opinion"], found["failed_grades"], found["responses"]) == (5, 0, 9)


def test_what_failed_counts_as_wrong_and_is_counted_apart():
  rows = rows_of(["right", "timed_out", "raised", NONE, "right", "wrong"])
  rows[5]["unreadable"] = True
  found = summarize(rows, BATCH, ks=[1], votes=False)
  assert found["all"]["pass@1"]["value"] == (1 / 2 + 1) / 2
  counts = {key: found[key] for key in ("failed_grades", "no_opinion", "unreadable")}
  assert counts == {"failed_grades": 2, "no_opinion": 1, "unreadable": 1}
  assert found["timed_out_fraction"] == 1 / 5


def test_a_grader_without_any_opinion_gives_no_figure():
  found = summarize(rows_of([NONE] * 6), BATCH, ks=[1], votes=False)
  assert set(found["all"]["pass@1"].values()) == {None} == set(found["all"]["greedy"].values())
  assert found["timed_out_fraction"] is None


def test_estimates_over_opinions_are_those_of_the_responses_that_have_one():
  rng = np.random.default_rng(3)
  correct, answers = voters(rng, 40, 6)
  known = rng.random(correct.shape) < 0.6
  table = np.where(known, correct, np.nan)
  for k in (1, 2, 3):
    kept = [row for row in range(40) if known[row].sum() >= k]
    values, opinions = over_opinions(pass_at_k, table, k=k)
    wanted = [float(pass_by_enumeration(correct[row][known[row]], k)) for row in kept]
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-12)
    assert opinions.tolist() == [known[row].sum() for row in kept]
    values, _ = over_opinions(majority_at_k, table, answers, k=k)
    wanted = [
      float(majority_by_enumeration(correct[row][known[row]], answers[row][known[row]], k))
      for row in kept
    ]
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-12)


# What a response commits to, and how hard its problem is.

NUMBERS = [
  "12",
  "7 + 5 = 12.",
  "It is 12.0",
  "11 or 12",
  "12 or 12",
  "13",
  "-12",
  "",
  "no idea",
  " 12\n",
  "0012",
  "#### 12",
  "#### 1,2",
  "\\boxed{12.00}",
  "1" * 40 + "2",
  "1" * 40 + "3",
  "-0",
  "0",
]


def tasks(tmp_path):
  """(task, a held-out problem of it, its grader), for each that can say what an answer is."""
  here, there = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
  for path, text in ((here, "3*4=12"), (there, "7+5=12\n\nso 12")):
    row = {"question": path.name, "answer": f"{text}\n#### 12"}
    path.write_text(json.dumps(row | {"prompt": row["question"]}) + "\n")
  rows = {"held_out_file": str(there)}
  yield load_task("arithmetic", operand_min=7, operand_max=15, held_out=10), arithmetic.reward
  yield load_task("copy", held_out=10), copy_text.reward
  yield load_task(f"gsm8k:{here}", **rows), graders.gsm8k
  for function in graders.FUNCTIONS:
    yield (load_task(f"jsonl:{here}", **rows, reward_function=function), getattr(graders, function))


def test_votes_and_grades_read_responses_alike(tmp_path):
  """Responses with one answer have one grade, and those that are right have one answer."""
  for task, reward in tasks(tmp_path):
    for problem in task.held_out:
      right = problem.columns["answer"]
      completions = [*NUMBERS, right, f" {right}", right + "0", f"{right} or {right}1"]
      columns = {name: [value] * len(completions) for name, value in problem.columns.items()}
      grades = reward([problem.prompt] * len(completions), completions, **columns)
      answers = [task.answer_of(problem, text) for text in completions]
      grades_of = defaultdict(set)
      for answer, grade in zip(answers, grades, strict=True):
        grades_of[answer].add(grade == 1)
      assert all(len(found) == 1 for found in grades_of.values()), (task.name, problem, grades_of)
      assert sum(found == {True} for found in grades_of.values()) == 1, (task.name, problem)
      assert grades_of.get(None, {False}) == {False}


def test_long_answers_that_differ_are_two_votes():
  """Decimals are rounded to 28 digits by what computes with them."""
  said = ["1" * 40 + last for last in "23"]
  read = {number_text(graders.final_answer(sign + text)) for text in said for sign in ("", "-")}
  assert len(read) == 4


def test_a_grader_of_ones_own_leaves_votes_out(tmp_path):
  (tmp_path / "reward.py").write_text("def reward(prompts, completions, **columns): ...\n")
  (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
  task = load_task(
    f"jsonl:{tmp_path / 'rows.jsonl'}",
    reward_file=str(tmp_path / "reward.py"),
    held_out_fraction=0.0,
  )
  assert task.answer_of is None and task.difficulty is None


def test_difficulty(tmp_path):
  wide = load_task("arithmetic", operators="+-*", operand_min=-12, operand_max=120, held_out=300)
  for problem in wide.held_out:
    a, op, b = problem.key.split(" ")
    digits = len(str(max(abs(int(a)), abs(int(b)))))
    assert wide.difficulty(problem) == f"{op}, {digits} digit" + "s" * (digits != 1)
  copy = load_task("copy", min_length=1, max_length=4)
  assert all(copy.difficulty(p) == f"length {len(p.prompt) - 1}" for p in copy.held_out)
  solved = next(task for task, _ in tasks(tmp_path) if task.name.startswith("gsm8k"))
  assert [solved.difficulty(problem) for problem in solved.held_out] == ["2 steps"]


# `evaluate`.


def test_evaluate_grades_every_problem_once_greedily_and_by_samples():
  """A model of glass: greedy rows copy the prompt, sampled ones of even problems too."""
  tokenizer, task = ByteTokenizer(), load_task("copy")
  problems = list(task.held_out[:5])
  drawn = Drawn(problems, [tokenizer.encode(problem.prompt) for problem in problems], 0)
  even = {problem.key for problem in problems[::2]}
  shapes, checks = [], []

  def generate(params, prompts, keys, sampling, group):
    assert params == "weights"
    shapes.append((*prompts.tokens.shape, len(keys)))
    temperature = np.asarray(sampling.temperature).reshape(-1, group)
    assert (temperature == [0.0, 1.0, 1.0]).all()
    rows = []
    for tokens, length in zip(prompts.tokens, prompts.lengths, strict=True):
      text = tokenizer.decode(tokens[-length:].tolist()).removesuffix(">")
      rows += [text] + [text if text in even else "no"] * 2
    tokens = np.zeros((len(rows), 4), np.int32)
    lengths = np.array([len(row) for row in rows], np.int32)
    for row, text in zip(tokens, rows, strict=True):
      row[: len(text)] = tokenizer.encode(text)
    mask = np.arange(4) < lengths[:, None]
    return Rollout(
      tokens, mask, mask * 0.0, mask * 0.0, lengths, np.full(len(rows), STOP_EOS, np.int32)
    )

  with RewardPool(RewardSource("rl_llm.tasks.copy_text", own_grader=True), workers=1) as pool:
    sampler = Sampler(
      task,
      tokenizer,
      make_encode(tokenizer, max_prompt_tokens=99),
      generate,
      pool,
      check=lambda: checks.append(len(shapes)),
    )
    found = evaluate(sampler, "weights", drawn, samples=2, prompts_per_batch=2)
  assert shapes == [(2, 8, 6)] * 3  # the last batch is filled up
  assert checks == [0, 1, 2]  # before each batch
  assert [row["problem"] for row in found.rows] == [problem.key for problem in problems]
  assert all(row["correct"] and row["split"] == "eval" for row in found.rows)
  assert found.metrics["eval/greedy_accuracy"] == 1.0
  assert found.metrics["eval/sampled_accuracy"] == 3 / 5
  assert found.metrics["eval/sampled_low"] == proportion_interval([2, 0, 2, 0, 2], 2)[1]
  assert found.metrics["eval/failed_grades"] == 0


def test_all_batches_of_an_evaluation_have_the_shape_that_is_compiled():
  """Prompts of 3 and of 20 tokens, in batches of two."""
  tokenizer, task, shapes = ByteTokenizer(), load_task("copy"), []
  prompts = [tokenizer.encode("a" * count) for count in (3, 3, 20, 3, 3)]
  drawn = Drawn(list(task.held_out[:5]), prompts, 0)

  def generate(params, prompts, keys, sampling, group):
    shapes.append(prompts.tokens.shape)
    wanted = [[97] * length for length in prompts.lengths]
    assert [list(row[row != tokenizer.pad_id]) for row in prompts.tokens] == wanted
    ones = np.ones((len(keys), 1), np.int32)
    ended = np.full(len(keys), STOP_EOS, np.int32)
    return Rollout(97 * ones, ones == 1, ones * 0.0, ones * 0.0, ones[:, 0], ended)

  with RewardPool(RewardSource("rl_llm.tasks.copy_text", own_grader=True), workers=1) as pool:
    encode = make_encode(tokenizer, max_prompt_tokens=99)
    sampler = Sampler(task, tokenizer, encode, generate, pool)
    evaluate(sampler, "weights", drawn, samples=1, prompts_per_batch=2)
  assert shapes == [(2, 24)] * 3
