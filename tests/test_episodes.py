"""Whole episodes with environments that answer: what is kept, what ends them, what they earn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
import types
from concurrent.futures import Future
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.data.prompts import bucket
from rl_llm.losses import llds_loss
from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.load import load_model
from rl_llm.rewards import RewardResult
from rl_llm.rollout import STOP_EOS, STOP_LENGTH, episodes, response_logprobs, turns
from rl_llm.rollout.collect import Sampler, response_batch
from rl_llm.rollout.drawing import encode_problems
from rl_llm.rollout.episodes import EpisodeError, Episodic, collect_episodes
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.rollout.turns import NO_TURN, Running, make_begin
from rl_llm.runs.metrics import PhaseClock
from rl_llm.tasks import Problem, Task
from rl_llm.text.tokenizers import ByteTokenizer
from rl_llm.training import credit
from rl_llm.training.value_network import turn_gae
from tests.representatives import mostly_slow

PROMPTS, GROUP = 4, 2


class Tokenizer(ByteTokenizer):
  """Bytes, of which every third ends a turn: random weights then write short turns."""

  eos_ids = tuple(range(0, 259, 3))


class Heard(NamedTuple):
  """An observation, as `rl_llm.tasks.environments` gives it."""

  text: str
  done: bool
  status: str = "ok"
  calls: int = 1
  seconds: float = 0.5
  reward: float | None = None
  answers: tuple[str, ...] = ()
  malformed: int = 0
  errors: int = 0


class Echo:
  """Tells each turn how long it was, and the episode's number of turns as its reward."""

  def __init__(self, *, turns=99, reward=True, paid=None, first=lambda columns: ""):
    self.turns, self.reward, self.paid, self.first = turns, reward, paid, first

  def start(self, rows):
    self.texts = [[] for _ in rows]
    self.columns = list(rows)
    return [Heard(self.first(row), False) for row in rows]

  def turn(self, texts):
    found = {}
    for index, text in texts.items():
      self.texts[index].append(text)
      answer = "é" * (len(text) % 3)  # sometimes nothing at all
      done = len(self.texts[index]) >= self.turns + index % 3
      found[index] = Heard(answer, done, reward=self.paid, answers=(answer,))
    return found

  def finish(self, indices):
    if not self.reward:
      return [None for _ in indices]
    return [RewardResult(float(len(self.texts[index])), "ok") for index in indices]

  def attributes(self, indices):
    return [{"heard": len(self.texts[index])} for index in indices]


@pytest.fixture(scope="module")
def tiny():
  policy, params, _ = load_model("tiny")
  return policy, params | {"embed": jax.tree.map(lambda x: 15 * x, params["embed"])}


@functools.cache
def begin_for(policy, turn_tokens, episode_tokens):
  return make_begin(
    policy, Tokenizer(), turn_tokens=turn_tokens, episode_tokens=episode_tokens, say=lambda _: None
  )


def sampler_for(policy, environments, *, max_turns=4, turn_tokens=6, episode_tokens=40):
  def sample(seed, step, count):
    return [Problem("x" * (1 + i), {"answer": str(i)}, str(i)) for i in range(count)]

  def opening(problem, said):
    return problem.prompt + said, {}

  def observation_ids(observation):
    return list("".join(observation.answers).encode())

  def score(prompts, completions, columns, ids, **_):
    heard = [column["environments"]["heard"] for column in columns]
    texts = zip(completions, heard, strict=True)
    return [RewardResult(float(len(text) + 100 * turns), "ok") for text, turns in texts]

  encode = functools.partial(
    encode_problems, tokenizer=Tokenizer(), prompt_format="plain", max_prompt_tokens=20
  )
  return Sampler(
    Task("fake", sample, (), None),
    Tokenizer(),
    encode,
    None,
    types.SimpleNamespace(score=score),
    episodic=Episodic(
      begin_for(policy, turn_tokens, episode_tokens),
      environments,
      opening,
      Tokenizer().decode,
      observation_ids,
      max_turns,
    ),
  )


def collected(model, environments, *, parts=1, step=0, **sizes):
  policy, params = model
  return collect_episodes(
    sampler_for(policy, environments, **sizes),
    params,
    0,
    step,
    PhaseClock(),
    prompts=PROMPTS,
    responses=GROUP,
    sampling=SamplingConfig(1.0),
    parts=parts,
  )


def assert_same(found, wanted):
  """The same episodes; log-probs within rounding, which depends on the rows computed at once."""
  assert found.samples == wanted.samples and found.texts == wanted.texts
  pairs = zip((*found.rollout, *found.turns), (*wanted.rollout, *wanted.turns), strict=True)
  for ours, theirs in pairs:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_rows_are_what_was_sampled_and_what_was_said(tiny):
  found = collected(tiny, Echo())
  rollout, ids = found.rollout, found.turns.ids
  assert max(len(sample["turns"]) for sample in found.samples) >= 3
  for row, sample in enumerate(found.samples):
    column = 0
    for number, turn in enumerate(sample["turns"]):
      end = column + turn["tokens"]
      sampled = rollout.tokens[row, column:end].tolist()
      assert turn["text"] == Tokenizer().decode(sampled)
      assert rollout.mask[row, column:end].all() and (ids[row, column:end] == number).all()
      column = end + turn.get("read", 0)
      if turn.get("read"):
        assert rollout.tokens[row, end:column].tolist() == list(turn["observation"].encode())
        assert not rollout.mask[row, end:column].any() and (ids[row, end:column] == NO_TURN).all()
        assert not rollout.sampler_logprobs[row, end:column].any()
    assert column == rollout.lengths[row]
    assert not rollout.mask[row, column:].any()


@pytest.mark.parametrize("parts", mostly_slow([2, 4], quick=[0]))
def test_parts_change_nothing(tiny, parts):
  together = collected(tiny, Echo(turns=3))
  assert max(len(sample["turns"]) for sample in together.samples) >= 3
  assert_same(collected(tiny, Echo(turns=3), parts=parts), together)


def test_one_part_decodes_while_the_tools_of_another_run(tiny):
  """The first part's tools answer only once the second part's have been called."""
  second, calls, waited = threading.Event(), itertools.count(), []

  class Slow(Echo):
    def turn(self, texts):
      if next(calls) == 0:
        waited.append(second.wait(120))
      else:
        second.set()
      return super().turn(texts)

  found = collected(tiny, Slow(turns=2), parts=2)
  assert waited == [True]
  assert_same(found, collected(tiny, Echo(turns=2)))


def test_slow_tools_cost_no_time_where_another_part_decodes(tiny, monkeypatch):
  """Decoding and tools sleep equally long: in two parts, half of the tools' time is hidden."""
  policy, params = tiny
  seconds, decoding, tools, waited = 0.4, [], [], []

  def sleep(slept):
    time.sleep(seconds)
    slept.append(seconds)

  def timed(wait):
    def wait_and_note(*args, **how):
      begun = time.monotonic()
      found = wait(*args, **how)
      waited.append(time.monotonic() - begun)
      return found

    return wait_and_note

  class Slow(Echo):
    def turn(self, texts):
      sleep(tools)
      return super().turn(texts)

  def slowly(begin):
    def run(*args):
      state, resume = begin(*args)

      def resume_slowly(*args):
        sleep(decoding)
        return resume(*args)

      return Running(state, resume_slowly)

    return run

  def played(environments, wrapped):
    sampler = sampler_for(policy, environments)
    episodic = sampler.episodic
    begin = (lambda params: slowly(episodic.begin(params))) if wrapped else episodic.begin
    sizes = {"prompts": PROMPTS, "responses": GROUP, "sampling": SamplingConfig(1.0), "parts": 2}
    sampler = sampler._replace(episodic=episodic._replace(begin=begin))
    return collect_episodes(sampler, params, 0, 0, PhaseClock(), **sizes)

  expected = played(Echo(), wrapped=False)
  monkeypatch.setattr(episodes, "wait", timed(episodes.wait))
  monkeypatch.setattr(Future, "result", timed(Future.result))
  assert_same(played(Slow(), wrapped=True), expected)
  # Of two parts: three turns after the first, four.
  assert (len(decoding), len(tools)) == (6, 8)
  print(f"{sum(waited):.2f} s of {sum(tools):.1f} s of tools were waited for")
  # All of it if one part stood still for the other's tools; half if both parts' tools run at once.
  assert sum(waited) < 0.75 * sum(tools)


def test_each_part_has_the_shape_of_the_others(tiny):
  programs = turns.start, turns.decode_turns, turns.append
  sizes = {"episode_tokens": 43, "turn_tokens": 5}  # A length that no other test has.
  before = [program._cache_size() for program in programs]
  for step in range(2):
    collected(tiny, Echo(turns=3), parts=2, step=step, **sizes)
  grown = [program._cache_size() - size for program, size in zip(programs, before, strict=True)]
  assert grown == [1, 1, 1]


def test_compiling_is_shown_while_it_lasts(tiny):
  policy, params = tiny
  under_way, shown = [], []

  @contextlib.contextmanager
  def timed(line):
    under_way.append(line)
    yield
    shown.append(under_way.pop())

  sizes = {"turn_tokens": 6, "episode_tokens": 40, "say": print}
  begin = make_begin(policy, Tokenizer(), **sizes, timed=timed)
  sampler = sampler_for(policy, Echo(turns=3))
  sampler = sampler._replace(episodic=sampler.episodic._replace(begin=begin))
  how = {"prompts": PROMPTS, "responses": GROUP, "sampling": SamplingConfig(1.0)}
  collect_episodes(sampler, params, 0, 0, PhaseClock(), **how)
  columns, width = bucket(PROMPTS), bucket(4)  # Prompts of 1 to 4 tokens, answers of 0 to 4.
  assert shown[0] == f"compiling the episodes: {PROMPTS} prompts of up to {columns} tokens x 2 rows"
  assert set(shown[1:]) == {f"compiling the reading of answers: 8 rows of up to {width} tokens"}


def test_weights_are_rounded_once_for_all_turns_and_parts(tiny):
  policy = make_policy(dataclasses.replace(tiny_config(259), n_layers=1), dtype=jnp.bfloat16)
  params = jax.jit(policy.init)(jax.random.key(0))
  found = []

  read = turns.append

  def append(params, *args, **how):
    found.append(params)
    return read(params, *args, **how)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(turns, "append", append)
    collected((policy, params), Echo(turns=3), parts=2)
  assert len(found) >= 4 and all(params is found[0] for params in found)
  leaves = jax.tree_util.tree_leaves_with_path(found[0])
  kinds = {leaf.dtype for path, leaf in leaves if path[-1].key != "scale"}
  assert kinds == {jnp.dtype(jnp.bfloat16)}


def test_an_episode_ends_by_its_environment_or_is_truncated_by_a_limit(tiny):
  found = collected(tiny, Echo(turns=2), max_turns=3)
  assert {len(sample["turns"]) for sample in found.samples} >= {2, 3}
  for row, sample in enumerate(found.samples):
    last = sample["turns"][-1]
    over = "observation" in last and len(sample["turns"]) == 2 + row % 3
    assert found.rollout.stop_reason[row] == (STOP_EOS if over else STOP_LENGTH)
    assert "read" not in last or last["read"] == 0  # Nobody reads what comes after the last turn.
    if "observation" not in last:  # The turn itself was cut off.
      assert last["tokens"] == 6 or found.rollout.lengths[row] == 40
  assert len({*found.rollout.stop_reason.tolist()}) == 2
  batch = response_batch(found)
  np.testing.assert_array_equal(batch.truncated, found.rollout.stop_reason == STOP_LENGTH)


def test_a_budget_ends_an_episode_before_what_does_not_fit(tiny):
  found = collected(tiny, Echo(), max_turns=50, episode_tokens=16)
  assert found.rollout.lengths.max() <= 16 and (found.rollout.stop_reason == STOP_LENGTH).all()
  assert found.rollout.lengths.min() > 4  # Not before it must.


def test_the_environment_or_the_grader_owns_the_reward(tiny):
  own = collected(tiny, Echo(turns=2))
  turns = [sum("observation" in turn for turn in sample["turns"]) for sample in own.samples]
  assert own.scores.rewards.reshape(-1).tolist() == turns
  graded = collected(tiny, Echo(turns=2, reward=False))
  last = [len(sample["turns"][-1]["text"]) for sample in graded.samples]
  expected = np.array(last) + 100 * np.array(turns)  # The text, and what the environment heard.
  assert graded.scores.rewards.reshape(-1).tolist() == expected.tolist()
  paid = collected(tiny, Echo(turns=2, paid=0.25))
  expected = np.array(turns) * 1.25
  np.testing.assert_allclose(paid.scores.rewards.reshape(-1), expected)
  np.testing.assert_allclose(paid.turns.rewards.sum(axis=1), expected)
  several = [row for row, count in enumerate(turns) if count > 1]
  assert several and (paid.turns.rewards[several, 0] == 0.25).all()


def test_a_failure_is_a_status_and_teaches_nothing(tiny):
  class Dies(Echo):
    def finish(self, indices):
      found = super().finish(indices)
      return [RewardResult(None, "died", "gone"), *found[1:]]

  found = collected(tiny, Dies(turns=2))
  assert not found.scores.ok[0, 0] and found.scores.ok.sum() == PROMPTS * GROUP - 1
  assert found.metrics["rewards_died"] == 1
  assert not response_batch(found).mask[0].any() and response_batch(found).attended[0].any()
  assert not found.turns.rewards[0].any()


def test_what_an_environment_says_first_is_in_the_prompt_of_its_whole_group(tiny):
  found = collected(tiny, Echo(turns=1, first=lambda columns: f"!{columns['answer']}"))
  expected = [list(f"{'x' * (1 + i)}!{i}".encode()) for i in range(PROMPTS)]
  assert found.drawn.prompts == expected
  lengths = found.prompts.lengths
  rows = zip(found.prompts.tokens, lengths, strict=True)
  assert [row[-n:].tolist() for row, n in rows] == expected
  told = iter(range(100))
  with pytest.raises(EpisodeError, match="problem '0' in 2 ways"):
    collected(tiny, Echo(first=lambda columns: str(next(told))))


class Beginning(Echo):
  """Of which these rows do not begin."""

  def __init__(self, lost, **how):
    super().__init__(**how)
    self.lost = lost

  def start(self, rows):
    begun = super().start(rows)
    for row in self.lost:
      begun[row] = Heard("", True, status="tool_error", answers=("reset: full",))
    return begun

  def finish(self, indices):
    return [
      RewardResult(None, "raised", "reset: full") if index in self.lost else result
      for index, result in zip(indices, super().finish(indices), strict=True)
    ]


def test_an_episode_that_does_not_begin_leaves_its_group(tiny):
  found = collected(tiny, Beginning({0, 5}, turns=1, first=lambda columns: "!"))
  assert found.drawn.prompts == [list(f"{'x' * (1 + i)}!".encode()) for i in range(PROMPTS)]
  assert np.flatnonzero(~found.scores.ok.reshape(-1)).tolist() == [0, 5]
  with pytest.raises(
    EpisodeError, match="reset failed in 5 of 8 episodes, .* reset: full; mend it"
  ):
    collected(tiny, Beginning({0, 1, 2, 3, 4}))


def test_metrics_count_turns_calls_and_what_was_read(tiny):
  found = collected(tiny, Echo(turns=2))
  turns = [turn for sample in found.samples for turn in sample["turns"]]
  rows = PROMPTS * GROUP
  assert found.metrics["episode/turns"] == len(turns) / rows
  heard = [turn for turn in turns if "observation" in turn]
  assert found.metrics["episode/tool_calls"] == len(heard) / rows
  assert found.metrics["speed/environment_seconds"] == 0.5 * len(heard)
  read = sum(turn.get("read", 0) for turn in turns)
  assert found.metrics["episode/environment_tokens"] == read / rows
  unsampled = found.rollout.lengths.sum() - found.rollout.mask.sum()
  assert read == unsampled > 0


def test_the_gradient_is_that_of_the_plain_rows(tiny):
  """Read with shared prompts or as whole rows of their own: the same log-probs, and gradients."""
  policy, params = tiny
  found = collected(tiny, Echo())
  batch = response_batch(found)
  advantages = np.linspace(-1, 1, PROMPTS * GROUP)[:, None]
  assert max(len(sample["turns"]) for sample in found.samples) == 4

  def shared(params):
    logprobs, _ = response_logprobs(params, batch, policy=policy)
    return jnp.sum(logprobs * advantages)

  width = batch.prompts.shape[1] + batch.tokens.shape[1]
  rows = len(batch.tokens)
  tokens, mask = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
  segments = np.full((rows, width), -1, np.int32)
  for row in range(rows):
    prompt = found.drawn.prompts[row // GROUP]
    length = int(found.rollout.lengths[row])
    tokens[row, : len(prompt) + length] = [*prompt, *batch.tokens[row, :length]]
    mask[row, len(prompt) : len(prompt) + length] = batch.mask[row, :length]
    segments[row, : len(prompt) + length] = 1
  positions = np.broadcast_to(np.arange(width), tokens.shape)

  def whole(params):
    logprobs, _ = teacher_forced_logprobs(params, tokens, mask, positions, segments, policy=policy)
    return jnp.sum(logprobs * advantages)

  (a, of_shared), (b, of_whole) = (jax.jit(jax.value_and_grad(f))(params) for f in (shared, whole))
  assert abs(a - b) <= 1e-5 * abs(b)
  norm = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(of_whole))
  for x, y in zip(jax.tree.leaves(of_shared), jax.tree.leaves(of_whole), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * norm)


def test_an_action_is_a_turn_even_where_nothing_was_said_between_two(tiny):
  found = collected(tiny, Echo())
  batch = response_batch(found)
  np.testing.assert_array_equal(batch.turns, found.turns.ids)
  empty = [
    row
    for row, sample in enumerate(found.samples)
    if any(turn.get("observation") == "" for turn in sample["turns"][:-1])
  ]
  assert empty
  old = np.where(batch.mask, -1.0, 0.0).astype(np.float32)
  rng = np.random.default_rng(0)
  now = old + np.where(batch.mask, rng.normal(size=old.shape), 0).astype(np.float32)
  good, weights = np.ones(len(old), np.float32), np.where(batch.mask, 1.0, 0.0)
  how = {"mask": batch.mask}
  loss, _ = llds_loss(now, old, good, weights, **how, action_ids=batch.turns)
  lost, expected = np.where(batch.mask, old - now, 0.0), 0.0
  for row in range(len(old)):
    for turn in range(batch.turns[row].max() + 1):
      own = batch.turns[row] == turn
      expected += np.maximum(lost[row, own], 0).sum() * (lost[row, own].sum() > 0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_credit_by_turn_compares_turns_of_the_same_number(tiny):
  found = collected(tiny, Echo(turns=2, paid=0.25))
  last = found.turns.ids.max(axis=1)
  inputs = credit.turn_inputs(found)
  assert len(inputs) == last.max() + 1
  for turn, (returns, ok, lengths, greedy) in enumerate(inputs):
    expected = [row[turn:].sum() for row in found.turns.rewards]
    np.testing.assert_allclose(returns.reshape(-1), expected, rtol=1e-6)
    np.testing.assert_array_equal(ok.reshape(-1), last >= turn)
    assert greedy is None and lengths.shape == (PROMPTS, GROUP)
  of_turns = [10.0 * turn + np.arange(8.0).reshape(4, 2) for turn in range(len(inputs))]
  batch = credit.with_turn_advantages(response_batch(found), of_turns)
  expected = np.where(batch.mask, 10 * batch.turns + np.arange(8)[:, None], 0)
  np.testing.assert_array_equal(batch.advantages, expected)


def test_gae_over_turns_is_gae_of_one_token_a_turn():
  rng = np.random.default_rng(0)
  turns = np.array([[0, 0, -1, 1, 2, 2, -1, -1], [0, -1, -1, 1, 1, 1, 1, 1], [-1] * 8])
  mask, rewards = turns >= 0, rng.normal(size=(3, 4)).astype(np.float32)
  values = rng.normal(size=turns.shape).astype(np.float32)
  kl = rng.normal(size=turns.shape).astype(np.float32)
  how = {"kl": kl, "kl_coef": 0.1, "discount": 0.9, "gae_lambda": 0.8}
  found, returns = turn_gae(rewards, values, turns, mask, **how)
  for row in range(2):
    count, following, ahead = turns[row].max() + 1, 0.0, 0.0
    for turn in reversed(range(count)):
      own = np.flatnonzero(turns[row] == turn)
      reward = rewards[row, turn] - 0.1 * kl[row, own].sum()
      delta = reward + 0.9 * ahead - values[row, own[0]]
      following, ahead = delta + 0.9 * 0.8 * following, values[row, own[0]]
      np.testing.assert_allclose(found[row, own], following, rtol=1e-5)
      np.testing.assert_allclose(returns[row, own], following + ahead, rtol=1e-5)
  assert not np.asarray(found)[~mask].any() and not np.asarray(returns)[~mask].any()


@pytest.mark.slow
def test_in_ten_thousand_turns_no_id_changes_and_nothing_else_is_trained_on(tiny):
  """Random unicode, calls that fail, turns that are cut, and answers of nothing."""
  policy, params = tiny
  rng = np.random.default_rng(0)

  class Random(Echo):
    def turn(self, texts):
      found = {}
      for index in texts:
        points = rng.integers(1, 0x11000, size=rng.integers(0, 5))
        answer = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        status = str(rng.choice(["ok", "malformed", "tool_error"]))
        done = bool(rng.random() < 0.1)
        found[index] = Heard(answer, done, status=status, answers=(answer,))
      return found

    def finish(self, indices):
      return [RewardResult(float(rng.random()), "ok") for _ in indices]

  turns, largest, step = 0, 0.0, 0
  score = jax.jit(functools.partial(response_logprobs, policy=policy))
  while turns < 10_000:
    sampled, told = [], []
    sampler = sampler_for(policy, Random(), max_turns=9, episode_tokens=64)
    episodic = sampler.episodic

    def decode(ids, sampled=sampled):
      sampled.append(list(ids))
      return Tokenizer().decode(ids)

    def observation_ids(observation, told=told):
      told.append(list("".join(observation.answers).encode()))
      return told[-1]

    sampler = sampler._replace(
      episodic=episodic._replace(decode=decode, observation_ids=observation_ids)
    )
    found = collect_episodes(
      sampler,
      params,
      0,
      step,
      PhaseClock(),
      prompts=PROMPTS,
      responses=GROUP,
      sampling=SamplingConfig(1.0),
    )
    batch, rollout = response_batch(found), found.rollout
    of_model = [rollout.tokens[found.turns.ids == n].size for n in range(9)]
    assert sum(of_model) == batch.mask.sum() == sum(map(len, sampled))
    for row, sample in enumerate(found.samples):
      column = 0
      for turn in sample["turns"]:
        end = column + turn["tokens"]
        assert batch.mask[row, column:end].all()
        assert rollout.tokens[row, column:end].tolist() in sampled
        column = end + turn.get("read", 0)
        assert not batch.mask[row, end:column].any()
        assert end == column or rollout.tokens[row, end:column].tolist() in told
      assert column == rollout.lengths[row]
    width = 64 - batch.tokens.shape[1]
    padded = batch._replace(
      **{
        name: np.pad(getattr(batch, name), ((0, 0), (0, width)))
        for name in ("tokens", "attended", "mask", "sampler_logprobs", "turns")
      }
    )
    gap = np.abs(np.asarray(score(params, padded)[0]) - padded.sampler_logprobs)
    turns, largest, step = turns + len(sampled), max(largest, gap.max()), step + 1
  print(f"{turns} turns, {step} steps, largest gap of a log-prob {largest:.1e}")
  assert largest < 1e-5
