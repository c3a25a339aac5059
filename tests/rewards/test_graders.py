"""What this library's graders pay for: one table, held against every grader that reads numbers."""

import importlib
import json
import time
from decimal import Decimal

import pytest

from rl_llm.rewards.graders import exact_match, final_answer, find_numbers, gsm8k, right_number
from rl_llm.tasks import load_task

# The answer; what says it; what does not.
ANSWERS = [
  (
    "72",
    [
      "72",
      "72.",
      " 72\n",
      "72.0",
      "72.00",
      "072",
      "$72",
      "#### 72",
      "####72.",
      "**72**",
      "The answer is 72!",
      "so \\boxed{72}",
      "$\\boxed{72.00}$",
      "\\boxed{\\text{72 clips}}",
      "72 clips, yes 72",
      "#### 72 clips, yes, 72",
      "72 = 72.0",
    ],
    [
      "",
      "none",
      "seventy-two",
      "73",
      "-72",
      "−72",
      "720",
      "172",
      "7.2",
      "72.5",
      "7 2",
      "72 or 73",
      "71 or 72",
      "either 73, or 72.",
      "72or73",
      "71 OR 72",
      "#### 72#### 73",
      "#### 72 or 73",
      "\\boxed{72} \\boxed{73}",
      "\\boxed{71, 72}",
      "#### 71\n\\boxed{72}",
      "72/1",
      "1/72",
      "3 / 72",
      "\\frac{1}{72}",
      "#### 144/2",
      "1e72",
      "72e0",
      "7२",
      "７２",
    ],
  ),
  (
    "1000",
    [
      "1000",
      "1,000",
      "$1,000.00",
      "\\boxed{1{,}000}",
      "#### 1{,}000",
      "\\$1{,}000",
      "\\boxed{1\\,000}",
      "\\boxed{\\$1,000 a day}",
    ],
    ["1", "0", "1.000", "1,0000", "1,00", "1 000", "1{,}0000", "1,000 or 1,001", "10{,}00"],
  ),
  (
    "-5",
    ["-5", "−5", "-$5", "$-5", "−\\$5", "#### -5", "\\boxed{-5}", "\\boxed{-\\$5}", "(-5)", "=-5"],
    ["5", "10-5", "#### 10-5", "x-5", "(3)-5", "5-", "--", "-5 or 5", "-1/5"],
  ),
  ("-3", ["-3", "-3.0"], ["10-3", "the range 10-3", "#### 10-3", "3"]),
  ("0.5", [".5", "0.5", "0.50", "$.5", "#### .5", "\\boxed{.50}"], ["5", "0", "..5", "1/2", "-.5"]),
  ("-" + "123" * 11, ["-" + "123" * 11, "-$" + "123" * 11], ["-" + "123" * 10 + "124", "123" * 11]),
  ("5", ["5", "... 5", "5.0"], [".5", "0.5", "#### 5#### 6", "#### 5 of 9", "5e-1", "50%"]),
]


def graders(tmp_path):
  """{name: grades a text by the problem's answer}, of all tasks and functions that read numbers."""
  rows = tmp_path / "rows.jsonl"
  rows.write_text(json.dumps({"question": "q", "prompt": "q", "answer": "#### 1"}) + "\n")
  tasks = [
    load_task("arithmetic"),
    load_task(f"gsm8k:{rows}", held_out_fraction=0.0),
    load_task(f"jsonl:{rows}", reward_function="gsm8k", held_out_fraction=0.0),
  ]
  found = {}
  for number, task in enumerate(tasks):
    function = getattr(importlib.import_module(task.reward.location), task.reward.function)

    def grade(text, answer, function=function):
      return function(["q"], [text], answer=[answer], expression=["40 + 2"])[0]

    found[f"{number} {task.name}"] = grade
  return found


@pytest.mark.parametrize("answer, right, wrong", ANSWERS, ids=[row[0] for row in ANSWERS])
def test_all_that_read_numbers_agree_on_every_answer(tmp_path, answer, right, wrong):
  for name, grade in graders(tmp_path).items():
    assert [text for text in right if grade(text, answer) != 1.0] == [], name
    assert [text for text in wrong if grade(text, answer) != 0.0] == [], name
    conversation = [{"role": "assistant", "content": right[0]}]
    assert grade(conversation, answer) == 1.0, "as TRL hands completions over"


def test_the_task_and_the_function_of_gsm8k_are_one(tmp_path):
  rows = tmp_path / "rows.jsonl"
  rows.write_text(json.dumps({"question": "q", "prompt": "q", "answer": "#### 1"}) + "\n")
  task = load_task(f"gsm8k:{rows}", held_out_fraction=0.0)
  other = load_task(f"jsonl:{rows}", reward_function="gsm8k", held_out_fraction=0.0)
  assert task.reward == other.reward


@pytest.mark.parametrize(
  "answer, number",
  [
    (72, "72"),
    (72.5, "72.5"),
    (0.1, "0.1"),
    (1e-05, "0.00001"),  # As text it ends in 05.
    (1e21, "1000000000000000000000"),
    ("6*7=42\n#### 42", "42"),
    ("about 5", "5"),
    ("none", None),
    (True, None),
    (None, None),
    (float("nan"), None),
    (float("inf"), None),
  ],
)
def test_an_answer_of_the_data_is_a_number_or_text_that_ends_in_one(answer, number):
  assert right_number(answer) == (None if number is None else Decimal(number))
  said = "7" if number is None else number
  assert gsm8k(["q"], [said], answer=[answer]) == [None if number is None else 1.0]


def test_long_text_takes_no_longer_than_its_length():
  """Each would take minutes if a digit were read again for every digit before it."""
  start = time.process_time()
  for text in (
    "1" * 200_000,
    "1," * 100_000,
    "1 or " * 40_000,
    "\\boxed{" * 30_000,
    "####1\n" * 30_000,
    "1" + " " * 200_000 + "x",
    "\\frac{1}{" * 20_000,
  ):
    find_numbers(text)
    final_answer(text)
  assert time.process_time() - start < 5


ODD = [
  "", " ", "nan", "NaN", "Infinity", "-inf", "1e400", "9" * 5000, "-" + "9" * 5000, "\ud800", "é\0",
  "####", "#### ", "\\boxed{", "\\boxed{}", "\\frac{1}{", "$", "-", "--5", "1,,000", "٣", "²", "½",
]  # fmt: skip


@pytest.mark.parametrize(
  "name", ["arithmetic", "copy", "gsm8k", "jsonl gsm8k", "jsonl exact_match"]
)
def test_odd_text_is_graded_and_read_like_any_other(tmp_path, name):
  """`answer_of` is called on it too, and in the trainer's own process."""
  rows = tmp_path / "rows.jsonl"
  rows.write_text(json.dumps({"question": "q", "prompt": "q", "answer": "#### 7"}) + "\n")
  family, _, function = name.partition(" ")
  spec = family if family in ("arithmetic", "copy") else f"{family}:{rows}"
  options = {} if spec == family else {"held_out_fraction": 0.0}
  task = load_task(spec, **options | ({"reward_function": function} if function else {}))
  grade = getattr(importlib.import_module(task.reward.location), task.reward.function)
  (problem,) = task.sample(0, 0, 1)
  columns = {column: [value] * len(ODD) for column, value in problem.columns.items()}
  grades = grade([problem.prompt] * len(ODD), ODD, **columns)
  assert all(isinstance(grade, float) and 0 <= grade < 1 for grade in grades)
  assert all(isinstance(task.answer_of(problem, text), str | None) for text in ODD)


def test_exact_match():
  assert exact_match(["q"] * 3, [" yes\n", "Yes", "3"], answer=["yes", "yes", 3]) == [1.0, 0.0, 1.0]
  message = [{"role": "assistant", "content": "yes "}]
  assert exact_match(["q"], [message], answer=["yes"]) == [1.0]
