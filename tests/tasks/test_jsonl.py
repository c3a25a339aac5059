import gzip
import json

import pytest

from rl_llm.data import DataError
from rl_llm.rewards import RewardError, RewardPool
from rl_llm.tasks import TaskError, check_held_out, load_task

ROWS = [{"question": f"{n} + {n}?", "answer": f"so #### {2 * n}", "level": n} for n in range(200)]


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return f"jsonl:{path}"


@pytest.fixture
def spec(tmp_path):
  return write(tmp_path / "rows.jsonl", ROWS)


def load(spec, **options):
  return load_task(spec, prompt_column="question", reward_function="gsm8k", **options)


def prompts(problems):
  return {str(problem.prompt) for problem in problems}


def test_rows_become_problems_and_split_without_overlap(spec):
  task = load(spec)
  drawn = task.sample(0, 0, 1000)
  assert prompts(drawn) | prompts(task.held_out) == {row["question"] for row in ROWS}
  assert not prompts(drawn) & prompts(task.held_out)
  assert 5 <= len(task.held_out) <= 40  # 200 rows at 0.1: 20, with a standard deviation of 4.2
  by_prompt = {row["question"]: row for row in ROWS}
  for problem in drawn[:20]:
    row = by_prompt[problem.prompt]
    assert problem.columns == {"answer": row["answer"], "level": row["level"]}


def test_a_step_repeats_no_row_before_all_came_up(spec):
  task = load(spec)
  size = 200 - len(task.held_out)
  drawn = [p.prompt for p in task.sample(1, 2, 2 * size)]
  assert len(set(drawn[:size])) == len(set(drawn[size:])) == size
  assert drawn[:size] != drawn[size:]
  assert [p.prompt for p in task.sample(1, 2, 5)] == drawn[:5]
  assert [p.prompt for p in task.sample(1, 3, 5)] != drawn[:5]


def test_split_is_by_prompt_so_new_rows_move_none(tmp_path, spec):
  more = ROWS + [{"question": f"new {n}", "answer": "#### 1"} for n in range(50)] + ROWS[:100]
  again = load(write(tmp_path / "more.jsonl", more))
  assert prompts(load(spec).held_out) <= prompts(again.held_out)
  assert not prompts(again.held_out) & prompts(again.sample(0, 0, 500))


def test_held_out_file_wins_over_training_rows(tmp_path, spec):
  other = write(tmp_path / "test.jsonl", ROWS[:30])
  task = load(spec, held_out_file=other.removeprefix("jsonl:"))
  assert prompts(task.held_out) == {row["question"] for row in ROWS[:30]}
  assert prompts(task.sample(0, 0, 170)) == {row["question"] for row in ROWS[30:]}
  assert "170 rows to train on, 30 held out, 0 broken dropped, 30 left out" in task.note


def test_fraction_none_and_too_small(tmp_path, spec):
  assert load(spec, held_out_fraction=0.0).held_out == ()
  assert len(load(spec, held_out_fraction=0.5).held_out) > 60
  few = write(tmp_path / "few.jsonl", ROWS[:3])
  none = load(few, held_out_fraction=1e-9)
  with pytest.raises(TaskError, match=r"\(3 rows to train on, 0 held out.*choose to look"):
    check_held_out(none, otherwise="to look elsewhere")
  with pytest.raises(TaskError, match="all 3 rows are held out.*leave the prompts of .*few.jsonl"):
    load(few, held_out_file=few.removeprefix("jsonl:"))
  with pytest.raises(TaskError, match="all 3 rows are held out.*lower --jsonl.held_out_fraction"):
    load(few, held_out_fraction=0.999)


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def test_messages_instruction_and_gzip(tmp_path):
  messages = [{"role": "user", "content": "hi"}]
  rows = [{"prompt": messages, "answer": "a"}, {"prompt": "plain", "answer": "b"}]
  path = tmp_path / "rows.jsonl.gz"
  path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
  task = load_task(
    f"jsonl:{path}", reward_function="exact_match", held_out_fraction=0.0, instruction="Be brief."
  )
  found = [problem.prompt for problem in task.sample(0, 0, 2)]
  assert messages in found and "plain\nBe brief." in found


@pytest.mark.parametrize(
  "row, said",
  [
    ({"answer": "x"}, "no key 'question' .it has 'answer'.; .* --jsonl.prompt_column"),
    ({"question": None}, "'question' is of type NoneType"),
    ({"question": 3}, "'question' is of type int"),
    ({"question": " "}, "'question' is empty"),
    ({"question": []}, "'question' has no message"),
    ({"question": [{"role": "user"}]}, "without content"),
    ({"question": ["hi"]}, "without a role"),
    ({"question": [USER | {"content": " "}]}, "holds an empty message of 'user'"),
    ({"question": [USER, ASSISTANT]}, "ends with the assistant's message.*remove that message"),
    ({"question": [USER, ASSISTANT | {"weight": 1}, USER]}, "gives a turn the weight 1"),
    ({"question": "x", "tools": ["hammer"]}, "'tools' is no list of JSON schemas"),
    ({"question": "x", "chat_template_kwargs": "thinking"}, "'chat_template_kwargs' is no object"),
    ({"question": "x", "completions": "y"}, "a key 'completions'"),
  ],
)
def test_broken_row_is_named_or_counted(tmp_path, row, said):
  spec = write(tmp_path / "rows.jsonl", ROWS[:5] + [row] + ROWS[5:])
  with pytest.raises(DataError, match=f"rows.jsonl:6: .*{said}"):
    load(spec)
  assert "1 broken dropped" in load(spec, lenient=True).note


def test_own_reward_file(tmp_path, spec):
  path = tmp_path / "mine.py"
  path.write_text(
    "def level(prompts, completions, level, **columns):\n"
    "  return [None if n == 3 else n / 200 for n in level]\n"
  )
  task = load(spec, held_out_fraction=0.0) and load_task(
    spec, prompt_column="question", reward_file=str(path), reward_function="level", max_reward=0.5
  )
  assert task.max_reward == 0.5
  problems = sorted(task.sample(0, 0, 100), key=lambda p: p.columns["level"])
  with RewardPool(task.reward) as pool:
    results = pool.score([p.prompt for p in problems], ["x"] * 100, [p.columns for p in problems])
  expected = [None if p.columns["level"] == 3 else p.columns["level"] / 200 for p in problems]
  assert [r.value for r in results] == expected


def test_reward_file_without_the_function(tmp_path, spec):
  path = tmp_path / "mine.py"
  path.write_text("def grade(prompts, completions, **columns): return [1.0]\n")
  task = load_task(spec, prompt_column="question", reward_file=str(path))
  with pytest.raises(RewardError, match="reward of .*mine.py: .*no function 'reward'.*grade"):
    RewardPool(task.reward)


def test_gsm8k_rows_end_to_end(spec):
  task = load(spec)
  problem = task.held_out[0]
  right = problem.columns["answer"].split()[-1]
  with RewardPool(task.reward, workers=1) as pool:
    results = pool.score([problem.prompt] * 2, [f"It is {right}.", "7777"], [problem.columns] * 2)
  assert [r.value for r in results] == [1.0, 0.0]


@pytest.mark.parametrize(
  "options, said",
  [
    ({}, "jsonl.reward_function='reward' without jsonl.reward_file: must be one of gsm8k, exact"),
    ({"reward_file": "grader.txt"}, "jsonl.reward_file='grader.txt'"),
    ({"held_out_fraction": 1.0}, "jsonl.held_out_fraction=1.0"),
    ({"held_out_fraction": float("nan")}, "jsonl.held_out_fraction=nan"),
    ({"prompt_column": ""}, "jsonl.prompt_column=''"),
  ],
)
def test_bad_options(spec, options, said):
  with pytest.raises(TaskError, match=said):
    load_task(spec, **options)


def test_missing_file():
  with pytest.raises(DataError, match="absent.jsonl: no such file"):
    load("jsonl:absent.jsonl")


def test_columns_that_go_nowhere_are_named(tmp_path):
  rows = [{"prompt": f"{n}+1?", "answer": str(n + 1), "level": 1, "tools": []} for n in range(30)]
  rows[7]["source"] = "mine"
  spec = write(tmp_path / "rows.jsonl", rows)
  note = load_task(spec, reward_function="gsm8k").note
  assert note.endswith("; columns that nothing reads: level, source")
  (tmp_path / "own.py").write_text("def reward(prompts, completions, **columns): pass")
  assert "nothing reads" not in load_task(spec, reward_file=str(tmp_path / "own.py")).note
