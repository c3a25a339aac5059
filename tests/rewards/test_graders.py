from decimal import Decimal

import pytest

from rl_llm.rewards.graders import exact_match, final_number, gsm8k


@pytest.mark.parametrize(
  "text, number",
  [
    ("#### 72", 72),
    ("9 * 2 = 18\n#### 18", 18),
    ("#### 1,234", 1234),
    ("#### 5 apples of 9", 5),
    ("first #### 1 then #### 2", 2),
    ("6 and 7 make 13.", 13),
    ("-4", -4),
    ("it costs $2.50", Decimal("2.50")),
    ("none at all", None),
    ("3 #### nothing", None),
    ("", None),
  ],
)
def test_final_number(text, number):
  assert final_number(text) == number


def test_gsm8k_compares_numbers_and_skips_rows_without_one():
  completions = ["so #### 18", "18.0", "the answer is 19", "", "18"]
  answers = ["worked <<9*2=18>>18\n#### 18"] * 4 + ["no number"]
  assert gsm8k(["q"] * 5, completions, answer=answers) == [1.0, 1.0, 0.0, 0.0, None]


def test_exact_match():
  assert exact_match(["q"] * 3, [" yes\n", "Yes", "3"], answer=["yes", "yes", 3]) == [1.0, 0.0, 1.0]
