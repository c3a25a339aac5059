"""The benchmarks' own arithmetic: what a step costs, that all sides do the same work, one run."""

import contextlib
import dataclasses
import io
import re
import sys
import typing

import numpy as np
import pytest

from benchmarks import (
  generation,
  grpo_step,
  logprobs,
  packing,
  population,
  refill,
  rollout,
  timing,
  update,
)
from benchmarks.grpo_step import BenchmarkError, Config, check_same, interpreters, main, table
from benchmarks.peers import SIDES, side
from benchmarks.side import memory_gbytes, prompt_texts, reward
from benchmarks.side_tunix import check_read
from experiments import sft
from rl_llm.data.batches import SequenceBatch
from rl_llm.errors import ConfigError
from rl_llm.policy import tiny_config
from rl_llm.runs.chips import Chip
from rl_llm.runs.flops import forward_flops
from tests.experiments.helpers import FULL
from tests.test_flops import SHAPE, slow_forward


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
  lines = table(steps | {"tunix": steps["ours"]}, forward=2_500_000_000, gflops=10.0)
  assert "ours is 1.00 times as fast as tunix" in "\n".join(lines)


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


def test_a_sampler_that_reads_other_ids_is_refused():
  rows = np.array([[5, 6], [5, 6], [7, 8], [7, 8]])
  check_read(rows, [[5, 6], [7, 8]], responses=2)
  with pytest.raises(ValueError, match="other ids"):
    check_read(rows, [[5, 6], [5, 6]], responses=2)
  with pytest.raises(ValueError, match="other ids"):  # A BOS before each.
    check_read(np.pad(rows, ((0, 0), (1, 0))), [[5, 6], [7, 8]], responses=2)


@pytest.mark.parametrize("peer", ["none", "mixed"] if FULL else ["mixed"])
@pytest.mark.slow
def test_one_step_of_the_tiny_model_runs_end_to_end(peer):
  config = Config(
    model="tiny",
    peer=peer,
    prompts=2,
    responses=4,
    prompt_tokens=9,
    new_tokens=3,
    steps=1,
    warmup=1,
    microbatch_prompts=1,
  )
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    assert main(config) == 0
  assert "2 prompts of 9 tokens x 4 responses of 3" in out.getvalue()
  printed = out.getvalue()
  assert "\nours" in printed
  gaps = dict(re.findall(r"(\w+): the sampler's .* differ by (\S+) nats", printed))
  assert float(gaps["ours"]) < 1e-4
  if peer == "mixed":
    assert "mixed: jax" in printed and "bfloat16 with float32 weights" in printed
    assert float(gaps["mixed"]) < 0.1


@pytest.mark.parametrize("module", [grpo_step, generation], ids=["grpo_step", "generation"])
@pytest.mark.parametrize("flag", ["trl_python", "tunix_python"])
def test_a_missing_peer_is_one_line_with_the_command(module, flag):
  here = {"trl_python": sys.executable, "tunix_python": sys.executable}
  config = module.Config(**here | {flag: "nowhere/bin/python"})
  with pytest.raises(BenchmarkError, match=f"--{flag}=nowhere.*make bench-peers") as error:
    module.main(config)
  assert "\n" not in str(error.value)


def test_peer_chooses_who_is_started():
  pythons = {"trl": sys.executable, "tunix": sys.executable}
  for peer, names in [
    ("all", ["ours", "trl", "tunix"]),
    ("tunix", ["ours", "tunix"]),
    ("none", ["ours"]),
  ]:
    assert list(interpreters(Config(peer=peer), pythons)) == names
  # A peer that is not asked for need not be there.
  assert list(interpreters(Config(peer="trl"), pythons | {"tunix": "nowhere"})) == ["ours", "trl"]
  for prefix, module in [("", grpo_step), ("generate_", generation)]:
    field = next(f for f in dataclasses.fields(module.Config) if f.name == "peer")
    peers = set(typing.get_args(typing.get_type_hints(module.Config)[field.name]))
    assert {prefix + name for name in peers - {"all", "none"} | {"ours"}} <= SIDES.keys()
  assert [side(name).__name__ for name in SIDES] == list(SIDES)


def slow_floor(prompts, responses, prompt_tokens, new_tokens, gflops, gbytes):
  """Every step alone: its products, and every number it must read."""
  weights = 0
  for _ in range(3):
    for rows, columns in [(8, 24), (8, 12), (8, 12), (24, 8), (8, 10), (8, 10), (10, 8)]:
      weights += rows * columns
  weights += 8 * 11
  total, done = 0.0, 0
  for step in range(1, new_tokens + 1):
    flops = slow_forward(SHAPE, [prompt_tokens] * prompts, [[step] * responses] * prompts) - done
    done += flops
    numbers = weights
    if step > 1:
      for _ in range(prompts):
        for _ in range(prompt_tokens):
          numbers += 3 * 2 * (6 + 6)  # layers, heads, key and value
        for _ in range(responses):
          for _ in range(step - 1):
            numbers += 3 * 2 * (6 + 6)
    total += max(flops / gflops, 4 * numbers / gbytes) / 1e9
  return total


@pytest.mark.parametrize("gbytes", [1e9, 1.0, 1e-6], ids=["compute", "both", "memory"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 4, 5), (1, 2, 3, 40)])
def test_generations_floor_is_that_of_counting_every_step(sizes, gbytes):
  names = ("prompts", "responses", "prompt_tokens", "new_tokens")
  rates = {"gflops": 1.0, "gbytes": gbytes}
  floor = generation.floor_seconds(SHAPE, **dict(zip(names, sizes, strict=True)), **rates)
  assert sum(floor.values()) == pytest.approx(slow_floor(*sizes, **rates), rel=1e-12)
  if gbytes > 1e6:
    assert floor["memory"] == 0 < floor["compute"]
  if gbytes < 1e-3:
    assert floor["compute"] == 0 < floor["memory"]


def test_generations_table_compares_turn_by_turn():
  def turns(*seconds):
    return [{"seconds": each, "tokens": 100, "peak_mb": 512.0} for each in seconds]

  lines = generation.table(
    {"ours": turns(1.0, 2.0, 4.0), "tunix": turns(3.0, 4.0, 20.0)},
    tokens=100,
    floor={"compute": 0.25, "memory": 0.25},
  )
  assert lines[1].split() == ["ours", "50", "25", "..", "100", "2.00", "0.50", "4.00"]
  assert lines[2].split() == ["tunix", "25", "5", "..", "33", "4.00", "0.50", "8.00"]
  assert lines[3].startswith("ours is 3.00 times as fast as tunix (2.00 to 5.00 over 3 turns)")
  assert lines[4].startswith("floor: 0.50 s, 200 tokens/s; 0.25 s bound by compute and 0.25 s")


@pytest.mark.slow
def test_generation_of_the_tiny_model_runs_end_to_end(monkeypatch, capsys):
  monkeypatch.setattr(generation, "memory_gbytes", lambda: 10.0)
  config = generation.Config(
    model="tiny", peer="none", prompts=2, responses=2, prompt_tokens=9, new_tokens=3, turns=2
  )
  assert generation.main(config) == 0
  out = capsys.readouterr().out
  assert "2 prompts of 9 tokens x 2 responses of 3" in out
  assert "turn 0 ours" in out and "turn 2 ours" in out and "\nfloor: " in out


def test_memory_is_read_at_some_rate():
  assert 0.01 < memory_gbytes(trials=1, size=2**20) < 1e5


@pytest.mark.slow
def test_slots_and_batches_say_the_same(capsys):
  sizes = {"model": "tiny", "prompts": 4, "responses": 2, "prompt_tokens": 5, "mean": 4}
  rollout.main(rollout.Config(**sizes, limit=12, slots=4))
  first, *_, last = capsys.readouterr().out.splitlines()
  assert first.startswith("tiny: 8 responses") and last.endswith(" times as fast")
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


@pytest.mark.slow
def test_an_update_is_timed_where_both_forms_give_one_gradient(monkeypatch, capsys):
  sizes = {"model": "tiny", "prompts": 2, "responses": 3, "prompt_tokens": 7, "new_tokens": 4}
  config = update.Config(**sizes, runs=1)
  assert update.main(config) == 0
  said = capsys.readouterr().out
  assert "2 x 3 responses of 4 tokens to prompts of 7" in said and "times as fast" in said
  _, policy = update.make_sides(config)
  forward = forward_flops(policy.config, [7] * 6, [4] * 6)
  assert update.flops_of(config, policy)["plain"] == 3 * forward
  right = update.plain_logprobs
  monkeypatch.setattr(update, "plain_logprobs", lambda *args, **kw: 1.001 * right(*args, **kw))
  with pytest.raises(timing.BenchmarkError, match="1.0e-03 apart"):
    update.main(config)


@pytest.mark.slow
def test_packed_and_padded_texts_give_one_gradient(monkeypatch, capsys):
  config = packing.Config(model="tiny", texts=9, mean=6, limit=16, rows_at_once=2, runs=1)
  assert packing.main(config) == 0
  said = capsys.readouterr().out
  assert "9 texts of" in said and "rows of 16" in said and "times as fast" in said
  texts = packing.make_texts(config, range(3, 60))
  lengths = [len(text.tokens) for text in texts]
  assert max(lengths) == 16 and min(lengths) >= 2
  mask = np.arange(6)[:, None] < 3
  parts = packing.cut(sft.Batch(SequenceBatch(*[mask] * 4), mask), 2)
  assert [part.sequences.mask.sum() for part in parts] == [2, 1]
  monkeypatch.setattr(packing, "TOLERANCE", -1.0)
  with pytest.raises(timing.BenchmarkError, match="apart, allowed"):
    packing.main(config)


@pytest.mark.slow
def test_log_probs_in_blocks_are_timed_against_dense_ones(capsys):
  config = logprobs.Config(tokens=24, width=16, vocabulary=40, chunk_size=8, runs=1)
  assert logprobs.main(config) == 0
  said = capsys.readouterr().out
  assert "24 tokens, D = 16, V = 40" in said and "times the floor" in said


@pytest.mark.slow
def test_refill_is_compared_at_equal_samples_and_at_equal_seconds(tmp_path, capsys):
  config = refill.Config(model="tiny", task="copy", seeds=(0,), steps=4, workdir=str(tmp_path))
  refill.measure_refill(config)
  said = capsys.readouterr().out
  assert "| | DAPO without refill | DAPO with refill |" in said
  both = refill.measure(config)
  plain, refilled = (runs[0] for runs in both.values())
  assert plain["rounds"] == 1 and plain["points"][-1]["samples"] == 4 * 12 * 8
  # Half the steps, each of at least one round.
  assert refilled["points"][-1]["samples"] >= 2 * 12 * 8
  budget = min(run["points"][-1]["samples"] for run in (plain, refilled))
  assert f"accuracy within {budget:,.0f} samples, seed 0" in said
  assert (tmp_path / "refill.svg").exists() and "refill.svg" in (tmp_path / "refill.md").read_text()
