"""The split by prompt: equal prompts on one side, whatever the rest of the data set."""

import hashlib
import json

import pytest

from rl_llm.data import DataError, Demonstration, Preference
from rl_llm.data.held_out import is_held_out, prompt_key, split_held_out
from rl_llm.tasks import load_task

PROMPTS = [f"question {n}" for n in range(400)]


def expected(prompt, fraction):
  """Whether the first 64 bits of SHA-256 of the prompt's JSON lie below the fraction."""
  text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
  return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < fraction


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_examples_are_split_by_the_hash_of_their_prompt(fraction):
  examples = [Demonstration(p, f"answer {n}", {}) for p in PROMPTS for n in range(2)]
  training, held_out = split_held_out(examples, fraction=fraction)
  assert held_out == [e for e in examples if expected(e.prompt, fraction)]
  assert training == [e for e in examples if not expected(e.prompt, fraction)]
  # Four standard deviations of a binomial over 400 prompts.
  spread = 4 * (fraction * (1 - fraction) * 400) ** 0.5
  assert abs(len(held_out) / 2 - 400 * fraction) < spread


def test_more_examples_move_none_and_more_held_out_only_adds():
  examples = [Preference(p, "a", "b", {}) for p in PROMPTS]
  all_held_out = split_held_out(examples, fraction=0.2)[1]
  assert split_held_out(examples[:200], fraction=0.2)[1] == [
    e for e in all_held_out if e in examples[:200]
  ]
  assert set(p.prompt for p in all_held_out) < {
    p.prompt for p in split_held_out(examples, fraction=0.3)[1]
  }


def test_what_stands_for_the_prompt_in_language_modelling():
  turns = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
  ]
  whole = Demonstration([], turns, {})
  assert prompt_key(whole) == prompt_key(Demonstration(turns[:1], turns[1:], {}))
  assert prompt_key(Demonstration("", "a text", {})) != prompt_key(Demonstration("", "other", {}))
  # A first message of the assistant's is part of what comes before its answer.
  greeting = [{"role": "assistant", "content": "Hello."}]
  assert prompt_key(Demonstration([], greeting + turns, {})) == prompt_key(
    Demonstration(greeting + turns[:1], turns[1:], {})
  )


def test_the_split_is_that_of_the_task_of_the_same_file(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text("".join(json.dumps({"prompt": p, "answer": "x"}) + "\n" for p in PROMPTS))
  task = load_task(f"jsonl:{path}", reward_function="exact_match", held_out_fraction=0.25)
  examples = [Demonstration(p, "x", {}) for p in PROMPTS]
  held_out = split_held_out(examples, fraction=0.25)[1]
  assert [e.prompt for e in held_out] == [p.prompt for p in task.held_out]


def test_all_or_nothing():
  examples = [Demonstration(p, "a", {}) for p in PROMPTS[:5]]
  assert split_held_out(examples, fraction=0.0) == (examples, [])
  assert not is_held_out("anything", fraction=0.0)
  with pytest.raises(DataError, match=r"held_out_fraction=1e-06: takes none of the 5 examples"):
    split_held_out(examples, fraction=1e-6)
  with pytest.raises(DataError, match=r"held_out_fraction=0.9999: takes all of the 5 examples"):
    split_held_out(examples, fraction=0.9999)
  for fraction in (-0.1, 1.0):
    with pytest.raises(DataError, match="must be at least 0 and below 1"):
      split_held_out(examples, fraction=fraction)
