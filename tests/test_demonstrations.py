"""A task's own right answers: graded as right by its grader, and laid out as its prompts are."""

import functools
import importlib
import json

import pytest

from rl_llm.data import DataError
from rl_llm.data.encoding import encode
from rl_llm.rollout.demonstrations import demonstrations, encode_answers
from rl_llm.rollout.drawing import encode_problems
from rl_llm.tasks import Problem, TaskError, load_task
from rl_llm.text.tokenizers import ByteTokenizer
from tests.tasks.test_gsm8k import SAMPLE

PUZZLES = ("leg_counting", "spiral_matrix", "countdown", "string_insertion", "coin_flip")


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture
def tasks(tmp_path):
  gsm8k = write(tmp_path / "gsm8k.jsonl", [{"question": q, "answer": a} for q, a in SAMPLE])
  rows = [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(5)]
  plain = write(tmp_path / "plain.jsonl", rows)
  solved = [row | {"completion": f"{n} and 1\n#### {n + 1}"} for n, row in enumerate(rows)]
  worked = write(tmp_path / "worked.jsonl", solved)
  found = [
    load_task("arithmetic", operators="+-*", operand_min=-5, held_out=10),
    load_task("copy", alphabet="ab", max_length=5),
    load_task(f"gsm8k:{gsm8k}", held_out_fraction=0.0),
    load_task(f"jsonl:{plain}", reward_function="exact_match", held_out_fraction=0.0),
    load_task(f"jsonl:{worked}", reward_function="gsm8k", held_out_fraction=0.0),
  ]
  if importlib.util.find_spec("reasoning_gym"):
    found += [load_task(f"reasoning_gym:{name}", held_out=2) for name in PUZZLES]
  return found


def graded(task, problems, completions):
  """By the task's function itself; that workers return the same is for tests/rewards to show."""
  function = getattr(importlib.import_module(task.reward.location), task.reward.function)
  names = problems[0].columns.keys()
  columns = {name: [problem.columns[name] for problem in problems] for name in names}
  return function([problem.prompt for problem in problems], completions, **columns)


def test_every_task_grades_its_own_answers_as_right(tasks):
  for task in tasks:
    problems = [*task.sample(0, 0, 20), *task.held_out]
    answers = [example.completion for example in demonstrations(problems)]
    rewards = graded(task, problems, answers)
    assert min(rewards) >= task.max_reward, (task.name, answers, rewards)
    # A test of the test: the neighbour's answers are not all right.
    assert min(graded(task, problems, answers[1:] + answers[:1])) < task.max_reward, task.name


def test_the_prompt_is_the_one_a_sampler_gets(tasks):
  tokenizer = ByteTokenizer()
  for task in tasks:
    problems = task.sample(0, 0, 3)
    prompts = encode_problems(
      problems, tokenizer, prompt_format="plain", max_prompt_tokens=10_000
    ).prompts
    examples = demonstrations(problems, prompt_format="plain")
    for prompt, example in zip(prompts, examples, strict=True):
      encoded = encode(example, tokenizer, prompt_format="plain")
      assert encoded.tokens[: encoded.prompt_length] == prompt
      answer = encoded.tokens[encoded.prompt_length :]
      assert answer == tokenizer.encode(example.completion) + [tokenizer.eos_ids[0]]


def test_a_completion_goes_before_an_answer_and_numbers_become_text():
  question = [{"role": "user", "content": "6*7?"}]
  [example] = demonstrations([Problem(question, {"completion": "So 42.", "answer": 42}, "")])
  assert (example.prompt, example.completion) == (question, "So 42.")
  assert example.columns == {"completion": "So 42.", "answer": 42}
  [example] = demonstrations([Problem("6*7?", {"answer": 42}, "")])
  assert example.completion == "42"


@pytest.mark.parametrize("columns", [{}, {"answer": None}, {"answer": " "}, {"answer": ["4"]}])
def test_a_task_without_answers(columns):
  problems = [Problem("2+2", {"answer": "4"}, "2+2"), Problem("Tell a story.", columns, "story")]
  with pytest.raises(TaskError, match=r"problem 'story': no answer to learn from; .* 'completion'"):
    demonstrations(problems)


def test_puzzles_whose_package_knows_no_answer():
  pytest.importorskip("reasoning_gym")
  task = load_task("reasoning_gym:graph_color", held_out=0)
  with pytest.raises(TaskError, match="no answer to learn from"):
    demonstrations(task.sample(0, 0, 1))


# With their end 3, 4 and 6 tokens.
PROBLEMS = [Problem("a", {"answer": text}, f"key {text}") for text in ("b", "cd", "efgh")]


def encoded_answers(problems, **settings):
  encoding = functools.partial(encode, tokenizer=ByteTokenizer(), prompt_format="plain")
  return encode_answers(problems, encode=encoding, **settings)


def test_answers_as_tokens_without_those_that_are_dropped():
  every, *counts = encoded_answers(PROBLEMS, limit=6, overlong="error")
  assert counts == [0, 0]
  assert [bytes(one.tokens[:-1]).decode() for one in every] == ["ab", "acd", "aefgh"]
  assert [one.mask for one in every] == [[False] + [True] * size for size in (2, 3, 5)]
  assert encoded_answers(PROBLEMS, limit=5, overlong="drop") == (every[:2], 1, 1)
  cut, *counts = encoded_answers(PROBLEMS, limit=5, overlong="truncate_right")
  assert counts == [1, 0]
  assert cut[:2] == every[:2] and cut[2].tokens == every[2].tokens[:5]
  assert encoded_answers([], limit=5, overlong="error") == ([], 0, 0)


def test_answers_that_are_too_long():
  message = r"problem 'key cd': 4 tokens with its answer, over --max_tokens=3; raise it, or choose"
  with pytest.raises(DataError, match=message):
    encoded_answers(PROBLEMS, limit=3, overlong="error")
  with pytest.raises(DataError, match="all 3 examples are over --max_tokens=2; raise it"):
    encoded_answers(PROBLEMS, limit=2, overlong="drop")
