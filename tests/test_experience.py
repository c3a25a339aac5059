"""From problems to rows of a record: who is drawn, what is cut, which grade belongs to whom."""

from __future__ import annotations

import functools
import types

import numpy as np
import pytest

from rl_llm.data.prompts import PromptTooLong
from rl_llm.policy.load import load_model
from rl_llm.rewards import RewardResult, RewardSource
from rl_llm.rollout import STOP_EOS, STOP_LENGTH, Rollout
from rl_llm.rollout.collect import (
  Sampler,
  answer,
  collect,
  make_generate,
  response_batch,
  sampled_pairs,
  split_experience,
  step_keys,
)
from rl_llm.rollout.drawing import Drawn, draw_problems, encode_problems, prompt_text
from rl_llm.rollout.generation import response_ids, response_texts, trim
from rl_llm.rollout.grading import as_scores, sample_rows, score
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.metrics import PhaseClock
from rl_llm.tasks import Problem, Task
from rl_llm.text.tokenizers import ByteTokenizer, TokenizerError
from rl_llm.training.minibatches import problem_order


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

  def score(self, prompts, completions, columns, ids, **told):
    self.ids, self.told = ids, told
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
  ids = response_ids(rollout)
  scores = score(pool, problems, texts, ids, group_size=2, step=4, steps=9)
  assert pool.told == {"group_size": 2, "step": 4, "steps": 9}
  assert pool.ids == [[97, 258], [98, 98, 258], [33, 258], [99, 99, 258]]
  assert pool.seen == [
    ("p", "a", {"n": 1}),
    ("p", "bb", {"n": 1}),
    ("q", "!", {"n": 2}),
    ("q", "cc", {"n": 2}),
  ]
  assert scores.rewards.tolist() == [[0.5, 1.0], [0.0, 1.0]]
  assert scores.ok.tolist() == [[True, True], [False, True]]
  assert (scores.counts["ok"], scores.counts["raised"]) == (3, 1)

  rows = sample_rows(problems, texts, rollout, scores, split="train", max_reward=1.0)
  assert [row["prompt"] for row in rows] == ["p", "p", "q", "q"]
  assert [row["response"] for row in rows] == texts
  assert [row["reward"] for row in rows] == [0.5, 1.0, None, 1.0]
  assert [row["correct"] for row in rows] == [False, True, False, True]
  assert [row["length"] for row in rows] == [2, 3, 2, 3]
  assert [row.get("detail") for row in rows] == [None, None, "ValueError: !", None]
  assert {(row["advantage"], row["split"]) for row in rows} == {(None, "train")}
  # What is trained on may be another's opinion than the grader's.
  judged = as_scores([RewardResult(r, "ok") for r in (3.0, -1.0, 2.0, 0.0)], group_size=2)
  other = sample_rows(problems, texts, rollout, judged, split="eval", max_reward=0.5, grades=scores)
  assert [row["reward"] for row in other] == [3.0, -1.0, 2.0, 0.0]
  assert [row["status"] for row in other] == ["ok", "ok", "raised", "ok"]
  assert [row["correct"] for row in other] == [True, True, False, True]


def test_a_part_is_graded_once_the_next_is_under_way():
  events = []
  said = ["a", "bb", "!", "cc", "ddd", "e", "f", "gg"]

  def generate(params, prompts, keys, sampling, group):
    first = keys[0]
    events.append(f"sample {prompts.tokens[0, -1]}")
    assert sampling.temperature.tolist() == [0.5] * 2 and group == 2
    return make_rollout(said[first : first + len(keys)], 4)

  class Watched(Pool):
    def score(self, prompts, *further, **told):
      events.append(f"grade {prompts[0]}")
      return super().score(prompts, *further, **told)

  problems = [problem(name) for name in "wxyz"]
  sampler = make_sampler(generate, Watched())
  experience = answer(
    sampler._replace(check=lambda: events.append("check")),
    None,
    Drawn(problems, [[10], [11], [12], [13]], 0),
    np.arange(8),
    PhaseClock(),
    responses=2,
    sampling=SamplingConfig(0.5),
    parts=4,
  )
  assert events == [
    "sample 10",
    "sample 11",
    "check",
    "grade w",
    "sample 12",
    "check",
    "grade x",
    "sample 13",
    "check",
    "grade y",
    "check",
    "grade z",
    "check",
  ]
  assert experience.texts == said
  assert experience.scores.rewards.tolist() == [[0.5, 1.0], [0.0, 1.0], [1.5, 0.5], [0.5, 1.0]]
  assert experience.scores.ok.tolist() == [[True, True], [False, True], [True, True], [True, True]]
  assert experience.rollout.lengths.tolist() == [2, 3, 2, 3, 4, 2, 2, 3]
  assert experience.scores is experience.grades


def make_sampler(generate, pool, **changes):
  encode = encoder(99, "error")
  return Sampler(ragged_task(), ByteTokenizer(), encode, generate, pool)._replace(**changes)


def glass(texts, width=4):
  """A model that says these texts, one a row, whatever it is asked."""
  return lambda params, prompts, keys, sampling, group: make_rollout(texts[: len(keys)], width)


def collected(texts, *, prompts=2, **changes):
  sampler = make_sampler(glass(texts), Pool(), **changes)
  return collect(
    sampler, None, 0, 3, PhaseClock(), prompts=prompts, responses=2, sampling=SamplingConfig(1.0)
  )


def test_the_record_of_a_step_is_that_of_its_responses():
  """Four responses: rewards 0.5, 1 and 2, and a grade that failed; one was cut off."""
  found = collected(["a", "bb", "!", "cccc"])
  metrics = found.metrics
  assert metrics["reward_mean"] == pytest.approx((0.5 + 1 + 2) / 3)
  assert metrics["accuracy"] == pytest.approx(2 / 3)
  assert metrics["response_length_mean"] == (2 + 3 + 2 + 4) / 4
  assert metrics["truncated_fraction"] == 1 / 4 and metrics["overlong_prompts"] == 0
  assert metrics["entropy"] == 2.5
  assert (metrics["rewards_ok"], metrics["rewards_raised"]) == (3, 1)
  assert "grade_mean" not in metrics
  assert [line["response"] for line in found.samples] == ["a", "bb", "!", "cccc"]
  # Problem i of step 3 has 4 + i letters.
  assert [line["prompt"] for line in found.samples] == ["xxxx"] * 2 + ["xxxxx"] * 2


def test_what_a_grader_tells_goes_on_record_and_no_opinion_is_in_no_figure():
  results = [
    RewardResult(1.0, "ok", extra={"read": "12"}, metrics={"seconds": 1.0}),
    RewardResult(None, "not_applicable", metrics={"seconds": 1.0}),
    RewardResult(0.0, "ok", "ValueError: x", unreadable=True, metrics={"seconds": 4.0}),
    RewardResult(None, "timed_out", "took over 5 s and was killed"),
  ]

  class Tells(Pool):
    def score(self, *batch, **told):
      return results

  sampler = make_sampler(glass(["a", "b", "c", "d"]), Tells())
  how = {"prompts": 2, "responses": 2, "sampling": SamplingConfig(1.0)}
  found = collect(sampler, None, 0, 3, PhaseClock(), **how)
  assert [line["correct"] for line in found.samples] == [True, None, False, False]
  assert [line.get("extra/read") for line in found.samples] == ["12", None, None, None]
  assert [line.get("unreadable") for line in found.samples] == [None, None, True, None]
  row = found.metrics
  assert row["reward/seconds"] == 2.0, "over the responses whose calls told"
  assert row["reward_mean"] == row["accuracy"] == 1 / 2 and row["timed_out_fraction"] == 1 / 3
  assert (row["rewards_ok"], row["rewards_unreadable"], row["rewards_not_applicable"]) == (2, 1, 1)


def test_a_judge_is_trained_on_and_the_grader_only_tells():
  seen = []

  def judge(prompts, rollout):
    seen.append((prompts.lengths.tolist(), rollout.tokens.shape))
    return np.array([-1.0, 2.0, 5.0, 0.0], np.float32)

  found = collected(["a", "bb", "!", "cc"], judge=judge)
  assert seen == [([4, 5], (4, 4))]
  assert found.scores.rewards.tolist() == [[-1, 2], [5, 0]] and found.scores.ok.all()
  assert found.grades.ok.tolist() == [[True, True], [False, True]]
  assert found.metrics["reward_mean"] == 1.5
  assert found.metrics["grade_mean"] == pytest.approx((0.5 + 1 + 1) / 3)
  assert found.metrics["rewards_raised"] == 1
  assert [line["reward"] for line in found.samples] == [-1, 2, 5, 0]
  assert [line["correct"] for line in found.samples] == [False, True, False, True]


def test_a_batch_has_the_responses_as_a_loss_reads_them():
  """A response without a reward is attended as ever; none of its tokens is trained on."""
  found = collected(["a", "bb", "!", "cccc"])
  batch = response_batch(found)
  assert batch.prompt_lengths.tolist() == [4, 5] and len(batch.prompts) == 2
  assert batch.tokens.tolist() == found.rollout.tokens.tolist()
  assert batch.attended.sum(axis=1).tolist() == [2, 3, 2, 4]
  assert batch.mask.sum(axis=1).tolist() == [2, 3, 0, 4]
  assert batch.truncated.tolist() == [False, False, False, True]
  assert (batch.sampler_logprobs[batch.attended] == -1.5).all()
  given = {name for name, value in batch._asdict().items() if value is not None}
  assert given == {
    "prompts",
    "prompt_lengths",
    "tokens",
    "attended",
    "mask",
    "sampler_logprobs",
    "truncated",
  }


def test_sampled_ids_are_trained_on_as_they_were_sampled():
  """Of half a character no text says what it was, so nothing may be encoded again."""

  class ReadsOnly(ByteTokenizer):
    def encode(self, text):
      raise AssertionError("encoded again")

    encode_with_places = encode

  halves = [bytes([0xC3, ord(letter)]) for letter in "bdfh"]  # The first of two bytes.
  said = [types.SimpleNamespace(encode=lambda half=half: half) for half in halves]
  found = collected(
    said, tokenizer=ReadsOnly(), judge=lambda prompts, rollout: np.arange(4.0, dtype=np.float32)
  )
  assert found.texts == ["\ufffdb", "\ufffdd", "\ufffdf", "\ufffdh"]
  assert response_batch(found).tokens[:, :2].tolist() == [list(half) for half in halves]
  pairs = sampled_pairs(found, [(0, 1, 0), (1, 0, 1)])
  answers = [side.tokens[side.prompt_length :] for pair in pairs for side in pair]
  assert answers == [[0xC3, ord(letter), 258] for letter in "dbfh"]


def test_each_of_several_gets_its_own_part_of_an_experience():
  texts = ["a", "bb", "!", "cccc", "d", "ee", "fff", "g"]
  whole = collected(texts, prompts=4)
  problems, prompts = whole.drawn.problems, whole.drawn.prompts
  drawn = [Drawn(problems[:2], prompts[:2], 0), Drawn(problems[2:], prompts[2:], 1)]
  first, second = split_experience(whole, drawn, max_reward=1.0)
  assert first.texts == texts[:4] and second.texts == texts[4:]
  assert first.drawn is drawn[0] and second.prompts.lengths.tolist() == [6, 7]
  assert first.scores.ok.tolist() == [[True, True], [False, True]] and second.scores.ok.all()
  assert second.rollout.lengths.tolist() == [2, 3, 4, 2]
  assert (first.metrics["rewards_raised"], second.metrics["rewards_raised"]) == (1, 0)
  assert (first.metrics["overlong_prompts"], second.metrics["overlong_prompts"]) == (0, 1)
  assert [line["response"] for line in second.samples] == texts[4:]
  assert first.samples + second.samples == whole.samples
  assert first.scores is first.grades


def test_what_is_sampled_does_not_depend_on_the_number_of_parts():
  model = load_model("tiny")
  generate = make_generate(model.policy, model.tokenizer, max_new_tokens=9, say=lambda line: None)
  problems = [problem("a" * (1 + 3 * n)) for n in range(4)]
  drawn = Drawn(problems, [list(p.prompt.encode()) for p in problems], 0)
  sampler = make_sampler(generate, Pool(), tokenizer=model.tokenizer)

  def found(parts):
    return answer(
      sampler,
      model.params,
      drawn,
      step_keys(0, 3, 4, 3),
      PhaseClock(),
      responses=3,
      sampling=SamplingConfig(1.0),
      parts=parts,
    )

  whole, halves = found(1), found(2)
  assert whole.texts == halves.texts and len(set(whole.texts)) > 6
  for one, other in zip(whole.rollout, halves.rollout, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)
  np.testing.assert_array_equal(whole.scores.rewards, halves.scores.rewards)


# A step's problems, shared out to its updates.


def test_every_epoch_deals_all_problems_out_anew():
  parts = [chosen for chosen, _ in problem_order(0, 5, prompts=12, epochs=2, count=3)]
  assert [len(chosen) for chosen in parts] == [4] * 6
  first, second = np.concatenate(parts[:3]), np.concatenate(parts[3:])
  assert sorted(first) == sorted(second) == list(range(12))
  assert first.tolist() != second.tolist() != list(range(12))
  again = [chosen for chosen, _ in problem_order(0, 5, prompts=12, epochs=2, count=3)]
  np.testing.assert_array_equal(parts, again)
  for seed, step in ((1, 5), (0, 6)):
    other = [chosen for chosen, _ in problem_order(seed, step, prompts=12, epochs=1, count=3)]
    assert not np.array_equal(parts[:3], other)


def test_problems_that_matter_come_first_and_are_counted():
  """In the order in which they were dealt, and to the same updates as without."""
  matters = np.arange(12) % 3 == 0
  plain = [chosen for chosen, _ in problem_order(0, 5, prompts=12, epochs=2, count=3)]
  found = list(problem_order(0, 5, prompts=12, epochs=2, count=3, matters=matters))
  assert len({used for _, used in found}) > 1  # Or the test shows little.
  for dealt, (chosen, used) in zip(plain, found, strict=True):
    assert chosen.tolist() == [*dealt[matters[dealt]], *dealt[~matters[dealt]]]
    assert used == matters[dealt].sum()
  assert [used for _, used in problem_order(0, 5, prompts=12, epochs=1, count=3)] == [4, 4, 4]
