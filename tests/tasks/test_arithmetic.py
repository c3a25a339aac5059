import itertools

import pytest

from rl_llm.rewards import RewardPool
from rl_llm.tasks import ArithmeticOptions, TaskError, arithmetic_task
from rl_llm.tasks.arithmetic import is_answer

APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def read(problem):
  """(operator, a, b), read from the prompt itself."""
  a, op, b = problem.prompt[0]["content"].split("is ")[1].split("?")[0].split(" ")
  return op, int(a), int(b)


@pytest.mark.parametrize("operators, low, high", [("+", 1, 9), ("+-*", -3, 4), ("-", 0, 6)])
def test_training_draws_every_problem_but_the_held_out(operators, low, high):
  width = high - low + 1
  everything = set(itertools.product(operators, range(low, high + 1), range(low, high + 1)))
  options = ArithmeticOptions(
    operators=operators, operand_min=low, operand_max=high, held_out=len(everything) // 3
  )
  assert options.problems() == len(everything)
  task = arithmetic_task(options)
  held_out = {read(problem) for problem in task.held_out}
  assert len(held_out) == len(task.held_out)
  assert options.held_out <= len(held_out) <= options.held_out + 1
  drawn = {read(p) for p in task.sample(3, 0, 60 * width * width)}
  assert drawn == everything - held_out
  for op, a, b in everything:  # Who has seen 3 + 8 knows 8 + 3.
    assert op == "-" or ((op, a, b) in held_out) == ((op, b, a) in held_out)


def test_the_defaults_hold_out_a_hundred():
  task = arithmetic_task(ArithmeticOptions())
  held_out = {read(p) for p in task.held_out}
  drawn = {read(p) for step in range(50) for p in task.sample(0, step, 64)}
  assert len(held_out) == 100 and len(drawn) == 44 and not drawn & held_out


def test_samples_depend_on_seed_and_step_alone():
  one, two = arithmetic_task(ArithmeticOptions()), arithmetic_task(ArithmeticOptions())
  assert one.sample(1, 2, 8) == two.sample(1, 2, 8) == one.sample(1, 2, 100)[:8]
  assert one.held_out == two.held_out
  different = [one.sample(1, 2, 8), one.sample(1, 3, 8), one.sample(2, 2, 8)]
  assert all(a != b for a, b in itertools.combinations(different, 2))


def test_problem_says_what_the_columns_say():
  for problem in arithmetic_task(ArithmeticOptions(operators="+-*")).sample(0, 0, 50):
    (message,) = problem.prompt
    a, op, b = problem.columns["expression"].split(" ")
    assert message == {
      "role": "user", "content": f"What is {a} {op} {b}? Give one number as the answer."
    }  # fmt: skip
    assert int(problem.columns["answer"]) == APPLY[op](int(a), int(b))


def test_question_is_an_option():
  task = arithmetic_task(ArithmeticOptions(question="{a}{op}{b}="))
  problem = task.sample(0, 0, 1)[0]
  assert problem.prompt[0]["content"] == problem.columns["expression"].replace(" ", "") + "="


@pytest.mark.parametrize(
  "completion, right",
  [
    ("12", True),
    (" 12\n", True),
    ("12.", True),
    ("**12**", True),
    ("12.0", True),
    ("The answer is 12!", True),
    ("7 + 5 = 12", True),
    ("7+5=12", True),
    ("5 + 7 = 12", True),
    ("$7 + 5 = 12$, so it is 12", True),
    ("", False),
    ("twelve", False),
    ("13", False),
    ("-12", False),
    ("112", False),
    ("12.5", False),
    ("1 2", False),
    ("11 12 13", False),
    ("11, or 12", False),
    ("12 or 13", False),
    ("13. No, 12", False),
    ("7 + 6 = 12", False),
    ("7 + 5", False),
    ("7 + 5 = 13", False),
    ("12, since 7 is 5 less", False),
    ("10,11,12", False),
    ("101112", False),
    ("12e0", False),
    ("१२", False),
    ("17 + 5 = 12", False),
    ("7 + 50 = 12", False),
  ],
)
def test_one_number_and_the_right_one(completion, right):
  assert is_answer(completion, "12", "7 + 5") is right


@pytest.mark.parametrize(
  "completion, answer, expression, right",
  [
    ("3 - 8 = -5", "-5", "3 - 8", True),
    ("−5", "-5", "3 - 8", True),
    ("5", "-5", "3 - 8", False),
    ("8 - 3 = -5", "-5", "3 - 8", False),
    ("40 × 30 = 1,200", "1200", "40 * 30", True),
    ("30*40=1200", "1200", "40 * 30", True),
    ("2 + -3 = -1", "-1", "2 + -3", True),
    ("the range 10-3", "-3", "0 - 3", False),
  ],
)
def test_signs_and_other_operators(completion, answer, expression, right):
  assert is_answer(completion, answer, expression) is right


def test_reward_in_a_worker():
  task = arithmetic_task(ArithmeticOptions())
  problems = task.sample(0, 0, 4)
  texts = [p.columns["answer"] for p in problems[:2]] + ["no idea", "1 2 3"]
  with RewardPool(task.reward, workers=1) as pool:
    results = pool.score([p.prompt for p in problems], texts, [p.columns for p in problems])
  assert [r.value for r in results] == [1.0, 1.0, 0.0, 0.0]
  assert task.max_reward == 1.0


@pytest.mark.parametrize(
  "options, said",
  [
    ({"operators": "/"}, "arithmetic.operators='/': must be one or more of"),
    ({"operators": ""}, "arithmetic.operators=''"),
    ({"operators": "++"}, "arithmetic.operators"),
    ({"operand_max": -1}, "arithmetic.operand_max=-1: must be at least operand_min=0"),
    ({"held_out": 109}, r"arithmetic.held_out=109: must be in 0..108 \(three quarters of the 144"),
    ({"held_out": -1}, "arithmetic.held_out=-1"),
    ({"question": "What is {a}?"}, "arithmetic.question="),
    ({"question": "{a}{op}{b}{c}"}, "arithmetic.question="),
  ],
)
def test_bad_options(options, said):
  with pytest.raises(TaskError, match=said):
    ArithmeticOptions(**options)


def test_negative_seed():
  with pytest.raises(TaskError, match="seed=-1"):
    arithmetic_task(ArithmeticOptions()).sample(-1, 0, 1)


def test_a_range_too_wide_to_list():
  task = arithmetic_task(ArithmeticOptions(operand_max=10**9))
  assert len(task.held_out) == 100 and len(task.sample(0, 0, 10)) == 10
