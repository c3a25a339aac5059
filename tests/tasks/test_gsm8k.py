"""The GSM8K task: what a solution commits to, and every row of the real files where they are."""

import json
import os
import pathlib
from decimal import Decimal

import pytest

from rl_llm.data import DataError
from rl_llm.rewards import RewardPool
from rl_llm.rewards.graders import final_answer
from rl_llm.rewards.graders import gsm8k as reward
from rl_llm.tasks import TaskError, check_held_out, load_task

# Written for this test, in the shape of the real rows: signs, money, commas, a number that appears
# before as well, a "####" directly behind the text, trailing space.
SAMPLE = [
  ("Ana has 3 boxes of 14 pens. How many pens?", "3*14=<<3*14=42>>42 pens\n#### 42"),
  ("A house cost $1,000 a month for a year.", "12*1000=$<<12*1000=12000>>12,000\n#### 12,000"),
  ("5 degrees, then 8 less. Now?", "It is 5-8=<<5-8=-3>>-3 degrees.\n#### -3"),
  ("Half of 5 dollars?", "5/2=$<<5/2=2.5>>2.50\n#### 2.50"),
  ("Two of seven apples are left over. Left?", "2 of 7 are left.\nSo 2.\n#### 2"),
  ("The final answer is what?", "The final answer is 5 * 4 = 20.\n#### 20 "),
]
REAL = os.environ.get("RL_LLM_GSM8K", "")


def spoiled(solution):
  """A solution with its last number changed, moved, or given twice differently; all wrong."""
  steps, number = (part.strip() for part in solution.rsplit("####", 1))
  other = str(Decimal(number.replace(",", "")) + 1)
  return {
    "changed": f"{steps}\n#### {other}",
    "a digit more": f"{steps}\n#### {number}1",
    "sign": f"{steps}\n#### -{number}" if number[0] != "-" else f"{steps}\n#### {number[1:]}",
    "moved to the top": f"#### {number}\n{steps}",
    "moved before the mark": f"{steps}\n{number} ####",
    "moved into the steps": f"{number}\n{steps}\n####",
    "moved behind a line": f"{steps}\n#### see below\n{number}",
    "twice, right first": f"{steps}\n#### {number}\n#### {other}",
    "twice, right last": f"{steps}\n#### {other}\n#### {number}",
    "twice on one line": f"{steps}\n#### {number} or {other}",
    "two marks": f"{steps} \\boxed{{{other}}}\n#### {number}",
  }


def check_all(rows):
  solutions = [solution for _, solution in rows]
  questions = [question for question, _ in rows]
  assert reward(questions, solutions, answer=solutions) == [1.0] * len(rows)
  for kind in spoiled(solutions[0]):
    wrong = [spoiled(solution)[kind] for solution in solutions]
    accepted = [
      w for w, r in zip(wrong, reward(questions, wrong, answer=solutions), strict=True) if r
    ]
    # -0 is 0: only there changing the sign changes nothing.
    assert kind == "sign" and all("#### -0" in w for w in accepted) or not accepted, kind


def test_sample_rows_are_accepted_and_spoiled_ones_are_not():
  check_all(SAMPLE)


@pytest.mark.skipif(not REAL, reason="RL_LLM_GSM8K=directory with train.jsonl and test.jsonl")
def test_real_rows_are_accepted_and_spoiled_ones_are_not():
  rows = []
  for name in ("train.jsonl", "test.jsonl"):
    with open(pathlib.Path(REAL) / name, encoding="utf-8") as file:
      rows += [(row["question"], row["answer"]) for row in map(json.loads, file)]
  assert len(rows) == 8_792
  check_all(rows)


@pytest.mark.skipif(not REAL, reason="RL_LLM_GSM8K=directory with train.jsonl and test.jsonl")
def test_real_files_as_a_task():
  task = load_task(f"gsm8k:{REAL}/train.jsonl", held_out_file=f"{REAL}/test.jsonl")
  assert task.note.startswith("7473 rows to train on, 1319 held out, 0 broken dropped, 0 left out")


@pytest.mark.parametrize(
  "text, number",
  [
    ("#### 72", "72"),
    ("####72.", "72"),
    ("so\n#### $1,234.50 in all\n", "1234.50"),
    ("#### -5", "-5"),
    ("#### −5", "-5"),
    ("#### -$5", "-5"),
    ("#### .5", "0.5"),
    ("#### 72 clips, yes, 72", "72"),
    ("#### 72\n#### 72.0", "72"),
    ("#### 10-12", None),
    ("#### 1,2345", None),
    ("#### 3/4", None),
    ("#### none", None),
    ("72 ####", None),
    (r"so \boxed{72} it is, not 7", "72"),
    (r"so $\boxed{\text{\$1{,}072 a day}}$", "1072"),
    (r"\boxed{72} or \boxed{73}", None),
    (r"\boxed{\frac{1}{2}}", None),
    (r"\boxed{}72", None),
    ("48+24=72", "72"),
    ("5-3", "3"),
    ("She sold 1,072.", "1072"),
    ("72 or 73", None),
    ("either 72, or 73.", None),
    ("1 or 2 a day make 30 a month", "30"),
    ("none at all", None),
    ("", None),
  ],
)
def test_final_answer(text, number):
  assert final_answer(text) == (None if number is None else Decimal(number))


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return f"gsm8k:{path}"


def rows(copies=1):
  return [{"question": f"{q} ({n})", "answer": a} for n in range(copies) for q, a in SAMPLE]


def test_problems_and_grading(tmp_path):
  task = load_task(write(tmp_path / "train.jsonl", rows(20)), held_out_fraction=0.2)
  drawn = task.sample(0, 0, 200)
  assert task.name == "gsm8k" and 0 < len(task.held_out) < 60
  assert not {p.prompt for p in drawn} & {p.prompt for p in task.held_out}
  problem = drawn[0]
  question, instruction = problem.prompt.split("\n")
  assert {"question": question, **problem.columns} in rows(20) and "####" in instruction
  texts = [problem.columns["answer"], "#### 31415"]
  with RewardPool(task.reward, workers=1) as pool:
    results = pool.score([problem.prompt] * 2, texts, [problem.columns] * 2)
  assert [result.value for result in results] == [1.0, 0.0]


def test_instruction_and_held_out_file(tmp_path):
  spec = write(tmp_path / "train.jsonl", rows(2))
  write(tmp_path / "test.jsonl", rows(1))
  held_out = str(tmp_path / "test.jsonl")
  task = load_task(spec, instruction="Number only.", held_out_file=held_out)
  assert len(task.held_out) == 6 and "6 rows to train on" in task.note
  assert task.held_out[0].prompt == "Ana has 3 boxes of 14 pens. How many pens? (0)\nNumber only."


@pytest.mark.parametrize(
  "row, said",
  [
    ({"question": "x"}, "no key 'answer'"),
    ({"answer": "#### 1"}, "no key 'question'"),
    ({"question": "x", "answer": None}, "'answer' is of type NoneType"),
    ({"question": "x", "answer": 3}, "'answer' is of type int"),
    ({"question": "x", "answer": "it is 3"}, "'answer' does not end in '#### '"),
    ({"question": "x", "answer": "#### 3 or 4"}, "'answer' does not end in '#### '"),
  ],
)
def test_broken_rows(tmp_path, row, said):
  spec = write(tmp_path / "train.jsonl", rows()[:3] + [row] + rows()[3:])
  with pytest.raises(DataError, match=f"train.jsonl:4: {said}"):
    load_task(spec, held_out_fraction=0.0)
  note = load_task(spec, held_out_fraction=0.0, lenient=True).note
  assert note.startswith("6 rows to train on, 0 held out, 1 broken dropped")


@pytest.mark.parametrize(
  "fraction, said",
  [
    (1.0, "gsm8k.held_out_fraction=1.0: must be at least 0"),
    (1e-9, "give --gsm8k.held_out_file, raise --gsm8k.held_out_fraction, or choose another"),
  ],
)
def test_options_are_named_as_the_flags_are(tmp_path, fraction, said):
  with pytest.raises(TaskError, match=said):
    task = load_task(write(tmp_path / "train.jsonl", rows()), held_out_fraction=fraction)
    check_held_out(task, otherwise="another")
