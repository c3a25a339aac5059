"""The reward model: its first loss by hand, what it learns and writes, what each flag does."""

from __future__ import annotations

import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest

from experiments import reward_model
from rl_llm.data import DataError, read_dataset
from rl_llm.data.batches import batch_indices, pair_batch
from rl_llm.data.encoding import encode_pair
from rl_llm.data.held_out import split_held_out
from rl_llm.errors import ConfigError
from rl_llm.policy import load as models
from rl_llm.policy.scalar_head import normal_head, with_head
from rl_llm.rollout.reward_model import load_reward_model, sequence_rewards
from rl_llm.runs.config import replace
from tests.experiments import helpers
from tests.experiments.helpers import FULL, Chatty, equal

run = functools.partial(helpers.run, reward_model)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """80 pairs to 20 prompts of ragged length: answers with a y are better than those with an n."""
  path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
  rows = []
  for i in range(20):
    for j in range(4):
      row = {"prompt": chr(97 + i) + "x" * (i % 6), "chosen": "yab"[: 1 + j % 3]}
      rows.append(row | {"rejected": "nab"[: 1 + (j + 1) % 3], "margin": j / 2})
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def settings(data, **changes):
  return {
    "model": "tiny",
    "data": str(data),
    "prompt_format": "plain",
    "held_out_fraction": 0.3,
    "steps": 2,
    "pairs_per_step": 4,
    "microbatch_pairs": 4,
    "optimizer.learning_rate": 0.01,
  } | changes


def sides(data):
  """Training and held-out pairs, with their margins."""
  found = []
  for side in split_held_out(read_dataset(str(data)).examples, fraction=0.3):
    pairs = [encode_pair(e, Chatty(), prompt_format="plain") for e in side]
    found.append((pairs, [e.columns["margin"] for e in side]))
  return found


def scores(policy, params, pairs):
  """[N, 2]: one pair at a time."""
  score = jax.jit(functools.partial(sequence_rewards, policy=policy))
  return np.array([score(params, *pair_batch([pair], pad_id=0)) for pair in pairs])


def test_the_first_loss_is_that_of_the_formula(tmp_path, small, data):
  changes = {"margin_column": "margin", "center_coef": 0.1, "steps": 1, "seed": 3}
  row = run(tmp_path, settings(data, **changes)).metrics[0]
  model = models.load_model("tiny", seed=3)
  params = with_head(model.params, normal_head(small.config.width, jax.random.key(3)))
  (pairs, margins), (held_out, held_out_margins) = sides(data)
  chosen = batch_indices(len(pairs), batch_size=4, seed=3, step=0)

  def formula(pairs, margins):
    total = 0.0
    rewards = scores(small, params, pairs)
    for (better, worse), margin in zip(rewards.tolist(), margins, strict=True):
      total += -math.log(1 / (1 + math.exp(-(better - worse - margin))))
      total += 0.1 * (better + worse) ** 2
    return total / len(pairs), rewards

  loss, rewards = formula([pairs[i] for i in chosen], [margins[i] for i in chosen])
  assert len({margins[i] for i in chosen}) > 1
  assert row["loss"] == pytest.approx(loss, abs=1e-5)
  assert row["chosen_reward"] == pytest.approx(rewards[:, 0].mean(), abs=1e-5)
  assert row["rejected_reward"] == pytest.approx(rewards[:, 1].mean(), abs=1e-5)
  assert row["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), abs=1e-5)
  assert row["accuracy"] == np.mean(rewards[:, 0] > rewards[:, 1])

  loss, rewards = formula(held_out, held_out_margins)
  assert row["eval/pair_loss"] == pytest.approx(loss, abs=1e-5)
  assert row["eval/chosen_reward"] == pytest.approx(rewards[:, 0].mean(), abs=1e-5)
  assert row["eval/rejected_reward"] == pytest.approx(rewards[:, 1].mean(), abs=1e-5)
  assert row["eval/pair_accuracy"] == np.mean(rewards[:, 0] > rewards[:, 1])


@pytest.mark.slow
def test_it_learns_and_what_is_written_scores_alike(tmp_path, small, data):
  found = run(tmp_path, settings(data, steps=30))
  last = found.metrics[-1]
  assert last["step"] == 30 and last["eval/pair_accuracy"] >= 0.9
  assert last["eval/margin"] > 1 > found.metrics[0]["eval/margin"]
  assert last["eval/pair_loss"] < math.log(2)
  assert 0 <= last["eval/calibration_error"] <= 0.5
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["after"]["eval/pair_accuracy"] == last["eval/pair_accuracy"]

  loaded = load_reward_model(tmp_path / "model")
  (training, _), (held_out, _) = sides(data)
  # Rewards are relative: what is written has mean 0 over training answers.
  assert scores(loaded.policy, loaded.params, training).mean() == pytest.approx(0, abs=1e-4)
  better, worse = scores(loaded.policy, loaded.params, held_out).T
  assert (better - worse).mean() == pytest.approx(last["eval/margin"], abs=1e-4)

  # A finished run writes a lost model anew, and nothing else.
  before = (tmp_path / "model" / "model.safetensors").read_bytes()
  shutil.rmtree(tmp_path / "model")
  again = run(tmp_path, settings(data, steps=30))
  assert again.metrics == found.metrics and equal(again.state, found.state)
  assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


FLAGS = [
  {"dtype": "bfloat16"},
  {"margin_column": "margin"},
  {"center_coef": 0.0},
  {"pairs_per_step": 2},
  {"max_tokens": 7, "overlong": "drop"},
  {"max_tokens": 7, "overlong": "truncate_left"},
  {"prompt_format": "chat", "system_prompt": "Be brief."},
  {"seed": 1},
]
if FULL:  # Further values, and flags that another experiment's tests hold to the same code.
  FLAGS += [
    {"center_coef": 0.5},
    {"held_out_fraction": 0.1},
    {"max_tokens": 7, "overlong": "truncate_right"},
    {"prompt_format": "chat"},
    {"optimizer.learning_rate": 0.02},
    {"optimizer.weight_decay": 0.1},
    {"optimizer.schedule": "linear"},
  ]


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_every_flag_changes_the_weights_that_come_out(tmp_path, small, data):
  base = settings(data)
  weights = [run(tmp_path / "base", base).params]
  for number, changes in enumerate(FLAGS):
    weights.append(run(tmp_path / str(number), base | changes).params)
    same = [i for i, earlier in enumerate(weights[:-1]) if equal(earlier, weights[-1])]
    assert not same, (changes, ["base", *FLAGS][same[0]])


@pytest.mark.slow
def test_what_only_shows_changes_no_weight(tmp_path, small, data):
  """How often and on how many pairs it is scored; microbatches change rounding alone."""
  # An eps that is not tiny: Adam else turns rounding of a gradient near 0 into a whole step.
  base = settings(data) | {"optimizer.eps": 1e-2}
  plain = run(tmp_path / "plain", base)
  fewer = run(tmp_path / "fewer", base | {"eval.pairs": 3, "eval.every": 1})
  assert equal(plain.params, fewer.params)
  assert [("eval/margin" in row) for row in plain.metrics] == [True, False, True]
  assert all("eval/margin" in row for row in fewer.metrics)
  assert fewer.metrics[0]["eval/margin"] != plain.metrics[0]["eval/margin"]
  parts = run(tmp_path / "parts", base | {"microbatch_pairs": 1})
  for path, leaf in plain.params.items():
    np.testing.assert_allclose(leaf, parts.params[path], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": ""}, "--data=: must be a file of preference pairs.*make_preferences"),
    ({"microbatch_pairs": 3}, "--microbatch_pairs=3: must be a divisor.*--microbatch_pairs=2"),
    ({"optimizer.schedule": "linear", "optimizer.warmup_steps": 9}, "--optimizer.warmup_steps=9"),
  ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, data, changes, message):
  config = replace(reward_model.Config(), settings(data) | changes)
  with pytest.raises(ConfigError, match=message):
    reward_model.train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
  ("rows", "changes", "message"),
  [
    ([{"prompt": "a", "completion": "b"}], {}, "pairs.jsonl: rows of the format prompt_completion"),
    (
      [
        {"prompt": "a", "chosen": "b", "rejected": "c", "m": 1},
        {"prompt": "d", "chosen": "b", "rejected": "c"},
      ],
      {"margin_column": "m"},
      "pairs.jsonl:2: margin_column='m' is missing; must be a number in every row",
    ),
    (
      [{"prompt": "a", "chosen": "b", "rejected": "c", "m": "1"}],
      {"margin_column": "m"},
      "pairs.jsonl:1: margin_column='m' is '1'; must be a number",
    ),
    ([{"prompt": "a", "chosen": "b"}], {}, "pairs.jsonl:1: "),
  ],
)
def test_files_of_no_use_are_refused_by_name_and_line(tmp_path, small, rows, changes, message):
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(DataError, match=message):
    run(tmp_path / "run", settings(path, **changes))
