"""The benchmark's own arithmetic: what a step costs, that both sides do the same work, one run."""

import contextlib
import dataclasses
import io

import pytest

from benchmarks import population, rollout
from benchmarks.grpo_step import BenchmarkError, Config, check_same, main, table
from benchmarks.peers import prompt_texts, reward
from rl_llm.chips import Chip
from rl_llm.config import ConfigError
from rl_llm.policy import tiny_config


def test_prompts_have_the_length_asked_for():
  def encode(text):
    return text.split(" ")

  texts = prompt_texts(encode, count=3, tokens=20)
  assert [len(encode(text)) for text in texts] == [20, 20, 20]
  assert len(set(texts)) == 3
  with pytest.raises(ValueError, match="prompt_tokens: 100000; .* fewer"):
    prompt_texts(encode, count=1, tokens=100_000)


def test_rewards_depend_on_the_text_and_lie_in_the_unit_interval():
  completions = [str(number) for number in range(1000)]
  rewards = reward(["?"] * 1000, completions)
  assert rewards == reward(["!"] * 1000, completions)
  assert 0 <= min(rewards) and max(rewards) <= 1
  assert abs(sum(rewards) / 1000 - 0.5) < 0.05  # 5 standard errors of a uniform draw's mean.


def test_table_shows_median_spread_ratio_and_floor():
  def step(seconds, peak):
    rest = {"generation": 0.25 * seconds, "reward": 0.0, "update": 0.75 * seconds, "tokens": 4}
    return {"seconds": seconds, **rest, "peak_mb": peak}

  steps = {
    "ours": [step(2.0, 100.0), step(4.0, 300.0), step(2.5, 200.0)],
    "trl": [step(10.0, 900.0), step(12.5, 900.0), step(15.0, 900.0)],
  }
  lines = table(steps, forward=2_500_000_000, gflops=10.0)
  ours = next(line for line in lines if line.startswith("ours"))
  assert ours.split() == ["ours", "2.50", "2.00", "..", "4.00", "0.62", "0.00", "1.88", "0.29"]
  text = "\n".join(lines)
  assert "ours is 5.00 times as fast as trl" in text  # 12.5 / 2.5
  assert "3.00 times the memory" in text  # 900 / 300
  assert "take 1.00 s (generation 0.25, update 0.75)" in text  # 4 x 2.5 GFLOP at 10 GFLOP/s
  assert "ours takes 2.50 times the floor (generation 2.50, update 2.50)" in text
  assert "trl takes 12.50 times the floor" in text


def test_sides_that_do_not_do_the_same_work_are_refused():
  ready = {"prompt_ids": [[1, 2, 3]], "prompt_logprob": -2.0}
  check_same({"ours": ready, "trl": dict(ready)}, prompt_tokens=3)
  for change, word in [
    ({"prompt_ids": [[1, 2, 4]]}, "other ids"),
    ({"prompt_logprob": -2.1}, "other weights"),
  ]:
    with pytest.raises(BenchmarkError, match=word):
      check_same({"ours": ready, "trl": ready | change}, prompt_tokens=3)
  with pytest.raises(BenchmarkError, match="3 tokens"):
    check_same({"ours": ready}, prompt_tokens=4)


def test_one_step_of_the_tiny_model_runs_end_to_end(monkeypatch):
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # Compiling is most of it.
  config = Config(
    model="tiny", peer="none", prompts=2, responses=4, prompt_tokens=9, new_tokens=3, steps=1,
    warmup=1, microbatch_prompts=1,
  )
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert main(config) == 0
  assert "2 prompts of 9 tokens x 4 responses of 3" in out.getvalue()
  assert "\nours" in out.getvalue()


def test_a_missing_peer_is_one_line_with_the_command():
  with pytest.raises(BenchmarkError, match="make bench-peers"):
    main(Config(trl_python="nowhere/bin/python"))


def test_slots_and_batches_say_the_same(capsys):
  sizes = {"model": "tiny", "prompts": 4, "responses": 2, "prompt_tokens": 5, "mean": 4}
  rollout.main(rollout.Config(**sizes, limit=12, slots=4))
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first.startswith("tiny: 8 responses") and last.endswith(")")
  with pytest.raises(ConfigError, match="slots=3: .* multiple of --responses=2"):
    rollout.measure(rollout.Config(**sizes, slots=3))


def test_a_decode_step_reads_the_base_once_and_each_rows_cache():
  shape = dataclasses.replace(tiny_config(8), n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6)
  slow = Chip(hbm=1.0, flops=1e12, bandwidth=1.0, network=1.0)
  sizes = {"shared": 100, "own": 10, "rows": 5, "context": 7}
  cache = 5 * 7 * 3 * 2 * 6 * 2 * 2  # rows, tokens, layers, heads, size, key and value, bytes
  for members in (1, 8):
    seconds = population.decode_seconds(shape, slow, members=members, **sizes)
    assert seconds == 2 * (100 + members * 10) + members * cache
  weak = Chip(hbm=1.0, flops=1.0, bandwidth=1e12, network=1.0)
  attention = 5 * 7 * 3 * 4 * 6 * 2 * 2  # every query head with every key, and its value
  assert population.decode_seconds(shape, weak, members=1, **sizes) == 2 * 5 * 110 + attention
