"""Runs whose responses are episodes: what they record, and that a kill in one changes nothing."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from experiments import agents, evaluate, grpo, ppo, reinforce, setup
from rl_llm.errors import UserError
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import check, replace
from rl_llm.runs.metrics import read
from rl_llm.runs.signals import Interrupted, StopSignals
from rl_llm.tasks import Problem
from rl_llm.tasks.environments.problems import owned_by_environment
from rl_llm.text.tokenizers import ByteTokenizer
from rl_llm.training import loop
from tests.experiments import helpers
from tests.experiments.helpers import equal, outcome
from tests.test_tokenizer_families import loaded

COUNTER = '''
class Counter:
  """Adds up what it is told."""

  def reset(self, **columns) -> str | None:
    self.total, self.last = 0, 0
    return None

  def add(self, number: int) -> str:
    """Adds a number.

    Args:
      number: What to add.
    """
    if number % 5 == 4:
      raise ValueError("not this one")
    self.total, self.last = self.total + number, number
    return str(self.total)

  def get_turn_reward(self) -> float:
    return self.last / 8

  def get_reward(self) -> float:
    return float(self.total % 3)
'''


@pytest.fixture
def counting(tmp_path, small, files, monkeypatch):
  """Settings of episodes whose calls are made from the ids of random turns."""

  def decode_turn(tokenizer, ids):
    number = sum(ids) % 16
    return {0: "call subtract: 1", 1: "Done."}.get(number, f"call add: {number}")

  monkeypatch.setattr(agents.turn_text, "decode_turn", decode_turn)
  path = tmp_path / "counter.py"
  path.write_text(COUNTER)
  episodes = {"env": f"{path}:Counter", "max_turns": 3, "episode_tokens": 40}
  return helpers.settings(files) | episodes


def test_a_run_learns_from_episodes_and_otherwise_by_turn(counting, tmp_path):
  found = helpers.run(grpo, tmp_path / "run", counting | {"steps": 1})
  first = found.metrics[0]
  assert first["grad_norm"] > 0
  assert 1 < first["episode/turns"] < 3 and first["episode/environment_tokens"] > 1
  assert first["episode/malformed"] > 0 and first["episode/tool_errors"] > 0
  assert 0 < first["truncated_fraction"] < 1
  train = [row for row in found.samples if row["split"] == "train" and row["step"] == 0]
  assert {len(row["turns"]) for row in train} == {1, 2, 3}
  for row in train:
    paid = sum(turn.get("reward") or 0 for turn in row["turns"])
    assert (row["reward"] - paid) % 1 < 1e-6  # get_reward's whole number, and what turns earned
  assert {row["split"] for row in found.samples} == {"train", "eval"}
  assert found.metrics[-1]["eval/failed_grades"] == 0
  once = counting | {"steps": 1, "eval.every": 0, "credit": "turn"}
  turn = helpers.run(grpo, tmp_path / "turn", once)
  for row in (first, turn.metrics[0]):  # One update a step: trainer and sampler agree.
    assert row["logprob_gap_mean"] < 1e-5
  of = lambda rows, key: [row[key] for row in rows]  # noqa: E731
  assert of(turn.samples, "reward") == of(train, "reward")
  assert of(turn.samples, "advantage") != of(train, "advantage")


@pytest.mark.slow
def test_credit_by_turn_is_another_update(counting, tmp_path):
  once = counting | {"steps": 1, "sampling.parts": 2, "eval.every": 0}
  by = {
    credit: helpers.run(grpo, tmp_path / credit, once | {"credit": credit})
    for credit in ("trajectory", "turn")
  }
  assert by["turn"].samples != by["trajectory"].samples  # Their advantages.
  for found in by.values():  # One update a step: trainer and sampler have the same weights.
    assert found.metrics[0]["logprob_gap_mean"] < 1e-5
  rewards = [[row["reward"] for row in found.samples] for found in by.values()]
  assert rewards[0] == rewards[1]
  assert not equal(by["turn"].params, by["trajectory"].params)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"max_turns": 3}, "max_turns=3: .*left out without --env"),
    ({"credit": "turn"}, "credit=turn: .*left out without --env"),
    ({"env": "guess", "episode_tokens": 4}, "episode_tokens=4: .*at least max_new_tokens"),
    ({"env": "guess", "sampling.slots": 4}, "sampling.slots=4: .*left out with --env"),
    ({"env": "guess", "dynamic.groups": "informative"}, "dynamic.groups=informative: .*left out"),
    ({"env": "guess", "overlong.cache": 0.5}, "overlong.cache=0.5: .*left out with --env"),
    ({"env": "guess", "reward": "model:x"}, "reward=model:x: .*left out with --env"),
    ({"env": "guess", "advantage.name": "remax"}, "advantage=remax: .*another with --env"),
    ({"task": "env"}, "task='env': no such task"),
    (
      {"env": "guess", "credit": "turn", "kl.coef": 0.1, "kl.place": "reward"},
      "credit=turn: .*trajectory with --kl.place=reward",
    ),
  ],
)
def test_what_episodes_do_not_have_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    check(replace(grpo.Config(), changes))


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [reinforce, ppo])
def test_the_other_scripts_learn_from_episodes(experiment, counting, tmp_path):
  settings = dict(counting)
  if experiment is ppo:  # One update a step, so that the log-probs are those sampled with.
    settings |= {"kl.coef": 0.1, "credit": "turn", "minibatches": 1}
  found = helpers.run(experiment, tmp_path / "run", settings)
  assert found.metrics[0]["logprob_gap_mean"] < 1e-5 and found.metrics[0]["episode/turns"] > 1
  assert np.isfinite([row["loss"] for row in found.metrics[:-1]]).all()


@pytest.mark.slow
def test_an_evaluation_plays_episodes(counting, tmp_path):
  names = ("model", "task", "jsonl.reward_file", "jsonl.reward_function", "prompt_format")
  names += ("jsonl.held_out_fraction", "max_new_tokens", "env", "max_turns", "episode_tokens")
  changes = {name: counting[name] for name in names} | {"samples": 2, "k": (1, 2), "problems": 5}
  result = evaluate.measure(replace(evaluate.Config(), changes), str(tmp_path / "run"))
  assert result["failed_grades"] == 0 and result["responses"] == 15
  assert {len(row["turns"]) for row in read(tmp_path / "run" / "samples.jsonl")} == {1, 2, 3}


def test_what_brings_the_problems_names_a_result():
  own = {"env": "calculator", "task": "env"}
  assert agents.data_name(replace(evaluate.Config(), own)) == "calculator"
  given = {"env": "calculator", "task": "copy"}
  assert agents.data_name(replace(evaluate.Config(), given)) == "copy"


class Killed(BaseException):
  """As if the process had ended here: nothing is saved, only what was open is closed."""


class Stopping(StopSignals):
  """Stops at the check number `extra` after the record has `rows` lines."""

  def check(self):
    if self.record.exists() and len(read(self.record)) >= Stopping.rows:
      Stopping.extra -= 1
      if Stopping.extra < 0:
        raise self.error


@pytest.mark.slow
def test_a_run_killed_within_episodes_ends_as_one_that_was_not(counting, tmp_path, monkeypatch):
  changes = {"steps": 6, "epochs": 2, "kl.coef": 0.1, "checkpoint.every": 2, "eval.every": 3}
  settings = counting | changes | {"sampling.parts": 2}
  straight = helpers.run(grpo, tmp_path / "straight", settings)
  config, cut = replace(grpo.Config(), settings), tmp_path / "cut"
  # Between two turns of an episode but for the first, which is between two steps.
  points = (
    (Interrupted(signal.SIGTERM), 1, 0),
    (Killed(), 2, 3),
    (Interrupted(signal.SIGTERM), 3, 2),
    (Killed(), 4, 5),
    (Killed(), 5, 4),
  )
  with monkeypatch.context() as patch:
    patch.setattr(loop, "StopSignals", Stopping)
    Stopping.record = cut / "metrics.jsonl"
    for Stopping.error, Stopping.rows, Stopping.extra in points:
      with pytest.raises(type(Stopping.error)):
        grpo.train(config, str(cut))
      assert Checkpointer(cut / "checkpoints").latest() is not None
  grpo.train(config, str(cut))
  again = outcome(cut)
  assert [row["step"] for row in straight.metrics] == list(range(7))
  assert again.metrics == straight.metrics and again.samples == straight.samples
  assert straight.state.keys() == again.state.keys() and equal(straight.state, again.state)


@pytest.mark.parametrize("prompt_format", ["chat", "plain"])
def test_a_prompt_shows_the_tools_of_its_own_environment(prompt_format):
  options = agents.Environments(env="guess,wordle")
  how = {"make_begin": dict, "prompt_format": prompt_format, "weak": False}
  with agents.opened(options, loaded("zephyr"), **how) as episodic:
    for name, kind in (("guess", "integer"), ("wordle", "string")):
      problem = Problem([{"role": "user", "content": "Find it."}], {"environment": name}, name)
      [message], names = episodic.opening(problem, "Go.")
      assert message["content"].endswith("Find it.\nGo.") and names == {}
      assert (f"({kind}" in message["content"].replace(": ", "(")) == (prompt_format == "chat")


LIMITED = '''
import time

class Limited:
  """Takes time, memory and words."""

  def reset(self, **columns) -> str | None:
    return None

  def wait(self, seconds: float) -> str:
    """Waits.

    Args:
      seconds: How long.
    """
    time.sleep(seconds)
    return "waited"

  def hold(self, megabytes: int) -> str:
    """Holds memory.

    Args:
      megabytes: How much.
    """
    return f"held {len(bytes(megabytes << 20)) >> 20}"

  def say(self, count: int) -> str:
    """Says many words.

    Args:
      count: How many.
    """
    return "word " * count
'''


@pytest.mark.parametrize(
  "limit, calls, without, within",
  [
    ({"tool_deadline": 0.5}, ["wait: 1"], ["waited"], ["a call took over 0.5 s"]),
    ({"episode_deadline": 1.5}, ["wait: 1.6"], ["waited"], ["all its calls took over 1.5 s"]),
    ({"episode_memory_mb": 256}, ["hold: 400"], ["held 400"], ["error: "]),
    ({"tool_answer_chars": 8}, ["say: 4"], ["word word word word "], ["word wor\n[12 more"]),
  ],
)
def test_a_limit_of_episodes_is_that_of_its_flag(tmp_path, limit, calls, without, within):
  path = tmp_path / "limited.py"
  path.write_text(LIMITED)
  how = {"make_begin": dict, "prompt_format": "plain", "weak": False}
  for flags, expected in (({}, without), (limit, within)):
    options = replace(agents.Environments(), {"env": f"{path}:Limited"} | flags)
    with agents.opened(options, ByteTokenizer(), **how) as episodic:
      episodic.environments.start([{}])
      for call, text in zip(calls, expected, strict=True):
        said = episodic.environments.turn({0: f"call {call}"})[0]
        assert text in said.text


def test_calls_are_written_as_the_flag_says():
  how = {"make_begin": dict, "prompt_format": "chat", "weak": False}
  problem = Problem([{"role": "user", "content": "Find it."}], {}, "0")
  for protocol, call in (
    ("auto", "call guess: 5"),
    ("text", "call guess: 5"),
    ("hermes", '<tool_call>{"name": "guess", "arguments": {"number": 5}}</tool_call>'),
    ("llama3", '{"name": "guess", "parameters": {"number": 5}}'),
  ):
    options = agents.Environments(env="guess", tool_protocol=protocol)
    with agents.opened(options, loaded("zephyr"), **how) as episodic:
      [message], _ = episodic.opening(problem, "")
      assert call.partition("5")[0].partition(": ")[0].partition("{")[0] in message["content"]
      episodic.environments.start([{"secret": 5}])
      assert episodic.environments.turn({0: call})[0].text == "correct"


def test_rows_need_no_grader_where_the_environment_gives_the_rewards(tmp_path):
  path, rows = tmp_path / "counter.py", tmp_path / "rows.jsonl"
  path.write_text(COUNTER)
  rows.write_text("".join(f'{{"prompt": "Count {i}."}}\n' for i in range(40)))
  own = {"env": f"{path}:Counter", "task": f"jsonl:{rows}"}
  grader = tmp_path / "grade.py"
  grader.write_text(
    "def reward(prompts, completions, **columns): return [1.0] * len(completions)\n"
  )

  def reward(changes):
    return setup.load_task(replace(grpo.Config(), changes)).reward

  assert reward(own) is owned_by_environment
  assert reward(own | {"jsonl.reward_file": str(grader)}).location == str(grader)
  assert reward(own | {"reward": f"{grader}:reward"}).location == str(grader)
  for env in ("", "calculator"):
    with pytest.raises(UserError, match="without jsonl.reward_file"):
      reward(own | {"env": env})
