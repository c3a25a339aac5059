"""From problems to rows of a record: who is drawn, what is cut, which grade belongs to whom."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from rl_llm.data.prompts import PromptTooLong
from rl_llm.experience import (
  Drawn,
  answer,
  draw_problems,
  encode_problems,
  make_generate,
  prompt_text,
  response_texts,
  sample_rows,
  score,
  step_keys,
  trim,
)
from rl_llm.metrics import PhaseClock
from rl_llm.model import load_model
from rl_llm.rewards import RewardResult, RewardSource
from rl_llm.rollout import STOP_EOS, STOP_LENGTH, Rollout
from rl_llm.sampling import SamplingConfig
from rl_llm.tasks import Problem, Task
from rl_llm.tokenizers import ByteTokenizer, TokenizerError


def problem(text, **columns):
  return Problem(text, columns, text)


def make_rollout(texts, width):
  """Texts as a sampler would give them; those below the width end with 258."""
  tokens = np.full((len(texts), width), 256, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, text in enumerate(texts):
    ids = [*text.encode(), 258][:width]
    tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
  ended = (tokens == 258).any(axis=1)
  return Rollout(
    tokens=tokens,
    mask=mask,
    sampler_logprobs=np.where(mask, -1.5, 0).astype(np.float32),
    entropies=np.where(mask, 2.5, 0).astype(np.float32),
    lengths=mask.sum(axis=1).astype(np.int32),
    stop_reason=np.where(ended, STOP_EOS, STOP_LENGTH).astype(np.int32),
  )


def encoder(limit, overlong):
  return functools.partial(
    encode_problems,
    tokenizer=ByteTokenizer(),
    prompt_format="plain",
    max_prompt_tokens=limit,
    overlong=overlong,
  )


def ragged_task():
  """Problem i of a step has 1 + (step + i) % 8 letters."""

  def sample(seed, step, count):
    return [problem("x" * (1 + (step + index) % 8), index=index) for index in range(count)]

  return Task("ragged", sample, (), RewardSource("none"))


def test_encoding_keeps_problems_and_prompts_together():
  problems = [problem("abc"), problem("abcdef"), problem("é")]
  dropped = encoder(3, "drop")(problems)
  assert dropped == ([problems[0], problems[2]], [[97, 98, 99], [195, 169]], 1)
  cut = encoder(3, "truncate_left")(problems)
  assert cut == (problems, [[97, 98, 99], [100, 101, 102], [195, 169]], 1)
  with pytest.raises(PromptTooLong, match="prompt 1 has 6 tokens"):
    encoder(3, "error")(problems)


def test_plain_messages_are_their_texts_a_line_each_and_chat_needs_a_template():
  messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
  assert prompt_text(messages) == "Add.\n1+1"
  found = encoder(99, "error")([Problem(messages, {}, "k")])
  assert found.prompts == [list(b"Add.\n1+1")]
  with pytest.raises(TokenizerError, match="no chat template"):
    encode_problems([problem("a")], ByteTokenizer(), prompt_format="chat", max_prompt_tokens=9)


def test_dropped_problems_are_made_up_for_by_the_next_that_fit():
  drawn = draw_problems(ragged_task(), 0, 2, 5, encoder(4, "drop"))
  # Lengths from step 2 on: 3 4 5 6 7 8 1 2 3 ...; 5 draws hold 2 that fit, 20 hold enough.
  assert [len(prompt) for prompt in drawn.prompts] == [3, 4, 1, 2, 3]
  assert [found.columns["index"] for found in drawn.problems] == [0, 1, 6, 7, 8]
  assert drawn.overlong == sum((2 + index) % 8 >= 4 for index in range(20))


def test_a_task_of_overlong_prompts_is_an_error_and_no_endless_search():
  with pytest.raises(PromptTooLong, match="128 of 128 prompts are over --max_prompt_tokens"):
    draw_problems(
      ragged_task(),
      0,
      0,
      2,
      lambda problems: encoder(1, "drop")([problem("long") for _ in problems]),
    )


@pytest.mark.parametrize(("longest", "width"), [(3, 8), (8, 12), (19, 20)])
def test_trimming_takes_only_columns_that_nobody_reached(longest, width):
  """Kept: the bucket (8, 16, 24) of the longest, end included, but no more than there were."""
  whole = make_rollout(["a" * longest, "b"], 20 if longest != 8 else 12)
  trimmed = trim(whole)
  assert trimmed.tokens.shape == (2, width)
  assert trimmed.mask.sum() == whole.mask.sum()
  for before, after in zip(whole, trimmed, strict=True):
    np.testing.assert_array_equal(before[:, :width] if before.ndim == 2 else before, after)


def test_texts_are_as_long_as_the_sampler_says():
  rollout = make_rollout(["one", "", "three"], 4)
  assert response_texts(rollout, ByteTokenizer()) == ["one", "", "thre"]


class Pool:
  """Grades with 0.5 for each character, fails on "!", and keeps what it was given."""

  def score(self, prompts, completions, columns):
    self.seen = list(zip(prompts, completions, columns, strict=True))
    return [
      RewardResult(None, "raised", "ValueError: !")
      if text == "!"
      else RewardResult(0.5 * len(text), "ok")
      for text in completions
    ]


def test_grades_and_rows_belong_to_their_problems():
  problems, pool = [problem("p", n=1), problem("q", n=2)], Pool()
  texts = ["a", "bb", "!", "cc"]
  rollout = make_rollout(texts, 3)
  scores = score(pool, problems, texts, group_size=2)
  assert pool.seen == [
    ("p", "a", {"n": 1}),
    ("p", "bb", {"n": 1}),
    ("q", "!", {"n": 2}),
    ("q", "cc", {"n": 2}),
  ]
  assert scores.rewards.tolist() == [[0.5, 1.0], [0.0, 1.0]]
  assert scores.ok.tolist() == [[True, True], [False, True]]
  assert (scores.counts["ok"], scores.counts["raised"]) == (3, 1)

  rows = sample_rows(
    problems,
    texts,
    rollout,
    scores,
    split="train",
    max_reward=1.0,
    advantages=np.array([[-1.0, 1.0], [0.0, 0.25]]),
  )
  assert [row["prompt"] for row in rows] == ["p", "p", "q", "q"]
  assert [row["response"] for row in rows] == texts
  assert [row["reward"] for row in rows] == [0.5, 1.0, None, 1.0]
  assert [row["correct"] for row in rows] == [False, True, False, True]
  assert [row["advantage"] for row in rows] == [-1.0, 1.0, 0.0, 0.25]
  assert [row["length"] for row in rows] == [2, 3, 2, 3]
  assert [row.get("detail") for row in rows] == [None, None, "ValueError: !", None]
  plain = sample_rows(problems, texts, rollout, scores, split="eval", max_reward=0.5)
  assert all(row["advantage"] is None and row["split"] == "eval" for row in plain)
  assert [row["correct"] for row in plain] == [True, True, False, True]


def test_a_part_is_graded_once_the_next_is_under_way():
  events = []
  said = ["a", "bb", "!", "cc", "ddd", "e", "f", "gg"]

  def generate(params, prompts, keys, sampling, group):
    first = keys[0]
    events.append(f"sample {prompts.tokens[0, -1]}")
    assert sampling.temperature.tolist() == [0.5] * 2 and group == 2
    return make_rollout(said[first : first + len(keys)], 4)

  class Watched(Pool):
    def score(self, prompts, completions, columns):
      events.append(f"grade {prompts[0]}")
      return super().score(prompts, completions, columns)

  problems = [problem(name) for name in "wxyz"]
  experience = answer(
    None,
    Drawn(problems, [[10], [11], [12], [13]], 0),
    np.arange(8),
    responses_per_prompt=2,
    sampling=SamplingConfig(0.5),
    generate=generate,
    pool=Watched(),
    tokenizer=ByteTokenizer(),
    parts=4,
    clock=PhaseClock(),
  )
  assert events == [
    "sample 10", "sample 11", "grade w", "sample 12", "grade x", "sample 13", "grade y", "grade z",
  ]
  assert experience.texts == said
  assert experience.scores.rewards.tolist() == [[0.5, 1.0], [0.0, 1.0], [1.5, 0.5], [0.5, 1.0]]
  assert experience.scores.ok.tolist() == [[True, True], [False, True], [True, True], [True, True]]
  assert experience.rollout.lengths.tolist() == [2, 3, 2, 3, 4, 2, 2, 3]


def test_what_is_sampled_does_not_depend_on_the_number_of_parts():
  model = load_model("tiny")
  generate = make_generate(model.policy, model.tokenizer, max_new_tokens=9, say=lambda line: None)
  problems = [problem("a" * (1 + 3 * n)) for n in range(4)]
  drawn = Drawn(problems, [list(p.prompt.encode()) for p in problems], 0)

  def found(parts):
    return answer(
      model.params,
      drawn,
      step_keys(0, 3, 4, 3),
      responses_per_prompt=3,
      sampling=SamplingConfig(1.0),
      generate=generate,
      pool=Pool(),
      tokenizer=model.tokenizer,
      parts=parts,
      clock=PhaseClock(),
    )

  whole, halves = found(1), found(2)
  assert whole.texts == halves.texts and len(set(whole.texts)) > 6
  for one, other in zip(whole.rollout, halves.rollout, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  np.testing.assert_array_equal(whole.scores.rewards, halves.scores.rewards)
