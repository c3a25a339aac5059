"""REINFORCE: its advantages against plain loops, its baseline, and what each flag does."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments import reinforce, setup, terms
from rl_llm.errors import ConfigError
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout import ResponseBatch, response_hidden
from rl_llm.runs.config import replace
from rl_llm.training import credit
from tests.experiments import helpers
from tests.experiments.helpers import FULL, equal, settings
from tests.experiments.test_sft import STOPS, stopped
from tests.representatives import mostly_slow

run = functools.partial(helpers.run, reinforce)


# Advantages.

REWARDS = np.array([[1.0, 0.25, 0.5], [0.0, 0.0, 1.0]], np.float32)
FAILED = np.array([[True, True, False], [True, True, True]])  # False: no grade
LENGTHS = [3, 1, 4, 2, 5, 1]


def by_loops(name, rewards, ok, kl, *, coef, discount, baseline):
  """[B][T]: the formulas of the paper that each name stands for, one token after another."""
  groups, size = rewards.shape
  returns = [[] for _ in range(groups * size)]
  centred = np.array(rewards, np.float64)
  for p in range(groups):
    graded = [float(rewards[p, g]) for g in range(size) if ok[p, g]]
    for g in range(size):
      row = p * size + g
      if not ok[p, g]:
        continue
      if name == "reinforce_plus_plus_baseline":
        centred[p, g] = rewards[p, g] - sum(graded) / len(graded)
      following = 0.0
      for t in reversed(range(LENGTHS[row])):
        last = t == LENGTHS[row] - 1
        reward = (centred[p, g] if last else 0.0) - coef * kl[row, t]
        following = reward + discount * following
        returns[row].insert(0, following)
  if name == "plain":
    return returns
  if name == "moving_average":
    return [[each - baseline for each in row] for row in returns]
  if name.startswith("reinforce_plus_plus"):
    every = [each for row in returns for each in row]
    mean = sum(every) / len(every)
    variance = sum((each - mean) ** 2 for each in every) / (len(every) - 1)
    return [[(each - mean) / (variance + 1e-8) ** 0.5 for each in row] for row in returns]
  assert name == "leave_one_out"
  found = []
  for p in range(groups):
    totals = {
      g: rewards[p, g] - coef * sum(kl[p * size + g, : LENGTHS[p * size + g]])
      for g in range(size)
      if ok[p, g]
    }
    for g in range(size):
      others = [total for other, total in totals.items() if other != g]
      row = [totals[g] - sum(others) / len(others)] if g in totals else []
      found.append(row * LENGTHS[p * size + g])
  return found


@pytest.mark.parametrize("coef", [0.0, 0.3])
@pytest.mark.parametrize("ok", [np.ones((2, 3), bool), FAILED], ids=["all_graded", "one_failed"])
@pytest.mark.parametrize(
  ("name", "discount"),
  [
    ("plain", 1.0),
    ("plain", 0.5),
    ("moving_average", 0.5),
    ("leave_one_out", 1.0),
    ("reinforce_plus_plus", 1.0),
    ("reinforce_plus_plus", 0.5),
    ("reinforce_plus_plus_baseline", 1.0),
    ("reinforce_plus_plus_baseline", 0.5),
  ],
)
def test_advantages_are_those_of_the_formulas(name, discount, ok, coef):
  width = 8
  mask = np.arange(width) < np.array(LENGTHS)[:, None]
  mask &= ok.reshape(-1, 1)
  kl = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
  found = reinforce.token_advantages(
    terms.Baseline(name=name, discount=discount),
    np.where(ok, REWARDS, 0),
    ok,
    mask,
    np.where(mask, kl, 0),
    kl_coef=coef,
    baseline=0.375,
  )
  wanted = np.zeros(mask.shape)
  rows = by_loops(name, REWARDS, ok, kl, coef=coef, discount=discount, baseline=0.375)
  for row, values in enumerate(rows):
    wanted[row, : len(values)] = values
  assert np.any(wanted)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["track_values", "role_baseline"])
def test_remembered_baselines_come_off_their_problem_s_rewards(name):
  mask = np.arange(8) < np.array(LENGTHS)[:, None]
  mask &= FAILED.reshape(-1, 1)
  baseline = np.float32([0.5, 0.25])
  options = terms.Baseline(name=name, role="r")
  rewards = np.where(FAILED, REWARDS, 0)
  zero = np.zeros(mask.shape, np.float32)
  found = reinforce.token_advantages(options, rewards, FAILED, mask, zero, 0.0, baseline)
  wanted = REWARDS - baseline[:, None]
  if name == "track_values":  # Whitened over all responses of the step.
    known = wanted[FAILED]
    wanted = (wanted - known.mean()) / np.sqrt(known.var(ddof=1))
  np.testing.assert_allclose(found, np.where(mask, wanted.reshape(-1, 1), 0), atol=1e-6)


def test_the_optimal_token_baseline_reads_whole_distributions():
  """Squared probabilities from all logits, at the temperature, against the passes of the run."""
  policy = make_policy(dataclasses.replace(tiny_config(12), width=32, n_layers=1))
  params, rng = jax.jit(policy.init)(jax.random.key(2)), np.random.default_rng(2)
  mask = np.arange(4) < np.array([4, 2, 3, 1])[:, None]
  batch = ResponseBatch(
    prompts=np.int32([[1, 2], [0, 3]]),
    prompt_lengths=np.int32([2, 1]),
    tokens=rng.integers(0, 12, (4, 4)).astype(np.int32),
    attended=mask,
    mask=mask,
  )
  returns = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
  how = {"policy": policy, "temperature": 0.7, "group_size": 2}
  found = credit.less_optimal_baseline(params, batch, returns, **how)
  logits = response_hidden(params, batch, policy=policy) @ policy.unembed(params).T
  p = np.asarray(jax.nn.softmax(logits / 0.7), np.float64)
  own = np.take_along_axis(p, np.asarray(batch.tokens)[..., None], axis=2)[..., 0]
  moved = np.cumsum(np.where(mask, 1 - 2 * own + (p**2).sum(axis=2), 0), axis=1) * mask
  wanted = np.zeros(mask.shape)
  for b in range(4):
    for t in range(4):
      rows = [j for j in (b // 2 * 2, b // 2 * 2 + 1) if mask[j, t]]
      if mask[b, t] and len(rows) == 2:
        shares = [moved[j, t] for j in rows]
        wanted[b, t] = returns[b, t] - np.dot(shares, [returns[j, t] for j in rows]) / sum(shares)
  assert np.any(wanted)
  np.testing.assert_allclose(found, wanted, atol=1e-5)


TRACKED = {"advantage.name": "track_values", "responses_per_prompt": 1}
ROLES = {"advantage.name": "role_baseline", "advantage.role": "side", "advantage.rows": 8}


@pytest.mark.parametrize(
  ("changes", "stops"),
  mostly_slow(
    [(ROLES, ()), (TRACKED, STOPS[1:2]), (ROLES, STOPS[1:2]), (TRACKED, STOPS), (ROLES, STOPS)],
    quick=[0, 1],
  ),
)
def test_a_remembered_baseline_is_of_the_steps_before_and_survives_a_stop(
  changes, stops, tmp_path, small, files, monkeypatch
):
  changes = settings(files, steps=6, **{"checkpoint.every": 2, "eval.every": 4}, **changes)
  changes |= {"optimizer.learning_rate": 0.01}
  found = run(tmp_path / "straight", changes)
  first, *later = found.metrics[:-1]
  assert first["baseline"] == (0.5 if "track" in changes["advantage.name"] else 0)
  assert len({row["baseline"] for row in later}) == 5
  if not stops:
    return
  cut = stopped(monkeypatch, reinforce, tmp_path / "cut", changes, stops)
  assert cut.metrics == found.metrics and cut.samples == found.samples
  assert equal(cut.state, found.state)


def test_a_reward_that_is_no_share_of_right_is_refused(tmp_path, small, files):
  changes = {"advantage.name": "track_values", "jsonl.reward_function": "signed"}
  with pytest.raises(ConfigError, match="it counts right and wrong.*moving_average"):
    run(tmp_path, settings(files, **changes))


@pytest.mark.parametrize(
  "changes",
  [
    {"advantage.name": "role_baseline"},
    {"advantage.name": "plain", "advantage.role": "side"},
    {"advantage.name": "plain", "advantage.rows": 8},
  ],
)
def test_settings_of_remembered_baselines_go_with_them(changes, files):
  with pytest.raises(ConfigError, match="advantage.ro"):
    reinforce.check(replace(reinforce.Config(), settings(files, **changes)))


# The baseline.


def test_the_moving_average_is_that_of_the_steps_before(tmp_path, small, files):
  changes = {"advantage.name": "moving_average", "advantage.decay": 0.75, "steps": 4}
  found = run(tmp_path, settings(files, **changes) | {"jsonl.reward_function": "lonely"})
  means = []
  for step, row in enumerate(found.metrics[:4]):
    shares = [0.75 ** (step - 1 - before) * 0.25 for before in range(step)]
    wanted = sum(s * m for s, m in zip(shares, means, strict=True)) / sum(shares) if step else 0
    assert row["baseline"] == pytest.approx(wanted, abs=1e-6)
    samples = [s for s in found.samples if s["step"] == step and s["split"] == "train"]
    assert {s["reward"] for s in samples} == {None, 1.0}
    for sample in samples:  # A response without a grade is as if it had not been sampled.
      advantage = 0 if sample["reward"] is None else sample["reward"] - row["baseline"]
      assert sample["advantage"] == pytest.approx(advantage, abs=1e-6)
    means.append(np.mean([s["reward"] for s in samples if s["reward"] is not None]))


def test_the_kl_is_in_the_reward_and_counts_from_the_first_weights(tmp_path, small, files):
  changes = {"advantage.name": "plain", "kl.coef": 0.5, "optimizer.learning_rate": 0.03}
  found = run(tmp_path, settings(files, **changes, steps=3))
  assert abs(found.metrics[0]["kl_ref"]) < 1e-4  # Nothing has moved yet.
  assert abs(found.metrics[2]["kl_ref"]) > 1e-2
  rows = [row for row in found.samples if row["split"] == "train"]
  assert all(abs(r["advantage"] - r["reward"]) < 1e-3 for r in rows if r["step"] == 0)
  assert any(abs(r["advantage"] - r["reward"]) > 1e-3 for r in rows if r["step"] == 2)


@pytest.mark.slow
def test_the_estimator_of_the_kl_is_what_is_reported_and_priced(tmp_path, small, files):
  changes = {"advantage.name": "plain", "kl.coef": 0.5, "optimizer.learning_rate": 0.03}
  rows, priced = {}, {}
  for value in ("k1", "k2"):
    found = run(tmp_path / value, settings(files, **changes, steps=2) | {"kl.value": value})
    rows[value] = found.metrics[1]
    priced[value] = [
      row["reward"] - row["advantage"]
      for row in found.samples
      if row["split"] == "train" and row["step"] == 1
    ]
  # Its mean may have either sign, and a token's part of it too; a square has one.
  assert rows["k2"]["kl_ref"] > 0 and rows["k1"]["kl_ref"] != rows["k2"]["kl_ref"]
  assert min(priced["k1"]) < 0 < max(priced["k1"])
  assert min(priced["k2"]) > 0


# Every flag does something.

FLAGS = [
  {"dtype": "bfloat16"},
  {"advantage.name": "plain", "advantage.discount": 0.9},
  {"advantage.name": "moving_average"},
  {"advantage.name": "moving_average", "advantage.decay": 0.5},
  {"advantage.name": "leave_one_out"},
  {"advantage.name": "leave_one_out", "kl.coef": 0.1},
  {"advantage.name": "reinforce_plus_plus"},
  {"advantage.name": "reinforce_plus_plus_baseline"},
  {"kl.coef": 0.1},
  {"kl.coef": 0.1, "kl.value": "k2"},
  {"loss.name": "ppo_loss", "epochs": 2},
  {"responses_per_prompt": 1, "microbatch_prompts": 4},
]
if FULL:  # Further values, and flags that another experiment's tests hold to the same code.
  FLAGS += [
    {"advantage.name": "moving_average", "advantage.discount": 0.9},
    {"advantage.name": "reinforce_plus_plus", "advantage.discount": 0.9},
    {"loss.name": "ppo_loss", "epochs": 2, "loss.clip_high": 0.01},
    {"loss.name": "ppo_loss", "minibatches": 2},
    {"loss.name": "gspo_loss", "epochs": 2},
    {"loss.entropy_coef": 0.5},
    {"weighting.name": "sequence_sum"},
    {"weighting.drop_truncated": True},
    {"sampling.temperature": 0.7},
    {"optimizer.schedule": "linear"},
    {"seed": 1},
  ]


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_every_flag_changes_the_weights_that_come_out(tmp_path, small, files):
  """Each against the base run, and against each other: no two of these mean the same."""
  base = settings(files, steps=3) | {"optimizer.learning_rate": 0.03, "advantage.name": "plain"}
  weights = [run(tmp_path / "base", base).params]
  for number, changes in enumerate(FLAGS):
    weights.append(run(tmp_path / str(number), base | changes).params)
    same = [i for i, earlier in enumerate(weights[:-1]) if equal(earlier, weights[-1])]
    assert not same, (changes, ["base", *FLAGS][same[0]])


@pytest.mark.parametrize("name", ["reinforce_loss", "ppo_loss"])
def test_the_gradient_of_one_update_is_that_of_the_log_probs_times_advantages(name, monkeypatch):
  """With one update a step the ratio is 1, so PPO's surrogate has REINFORCE's gradient."""
  monkeypatch.setattr(reinforce, "response_logprobs", lambda params, *_, **__: (params, params))
  rng, mask = np.random.default_rng(0), np.arange(3) < np.array([3, 1, 2])[:, None]
  weights, advantages = (np.float32(np.where(mask, rng.normal(size=(3, 3)), 0)) for _ in range(2))
  logprobs = np.float32(np.where(mask, -1, 0))
  batch = ResponseBatch(
    np.zeros((3, 1), int), np.ones(3, int), mask.astype(int), mask, mask,
    sampler_logprobs=logprobs, advantages=advantages, weights=weights,
  )  # fmt: skip
  config = replace(reinforce.Config(), {"loss.name": name})
  loss_fn = reinforce.make_loss(config, None)
  numbers = setup.hyperparameters(config, 0)
  found, _ = jax.grad(loss_fn, has_aux=True)(
    jax.numpy.float32(np.where(mask, -1.0, 0.0)), batch, numbers
  )
  np.testing.assert_allclose(found, -weights * advantages, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_without_a_ratio_a_step_is_the_gradient_of_the_first_update(tmp_path, small, files):
  """With one update a step the ratio is 1, so PPO's surrogate has REINFORCE's gradient."""
  # An eps that is not tiny: Adam else turns rounding of a gradient near 0 into a whole step.
  base = settings(files) | {"optimizer.eps": 1e-2}
  plain, clipped = (
    run(tmp_path / name, base | {"loss.name": name}).params
    for name in ("reinforce_loss", "ppo_loss")
  )
  for path, leaf in plain.items():
    np.testing.assert_allclose(leaf, clipped[path], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_groups_whose_responses_are_alike_are_left_out_and_change_nothing(tmp_path, small, files):
  """A term that every token feels, too small to matter, has all of them computed."""
  base = settings(files) | {
    "jsonl.reward_function": "spread_for_some",
    "microbatch_prompts": 1,
    "optimizer.eps": 1e-2,
    "sampling.temperature": 0.9,
  }
  left_out = run(tmp_path / "left_out", base)
  computed = run(tmp_path / "computed", base | {"loss.entropy_coef": 1e-20})
  for path, leaf in left_out.params.items():
    np.testing.assert_allclose(leaf, computed.params[path], rtol=0, atol=1e-6)
  # The metric of the update reads only what it computes.
  assert left_out.metrics[0]["logprob_gap_mean"] != computed.metrics[0]["logprob_gap_mean"]


# What is refused.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"epochs": 2}, "--loss.name=reinforce_loss.*epochs.*minibatches.*--loss=ppo_loss"),
    ({"minibatches": 2}, "--loss.name=reinforce_loss.*--loss=ppo_loss"),
    ({"responses_per_prompt": 1}, "--advantage.name=leave_one_out.*--advantage=moving_average"),
    ({"advantage.discount": 0.9}, "--advantage.name=leave_one_out.*with --advantage.discount"),
    ({"loss.clip_low": 0.1}, "--loss.clip_low=0.1.*--loss=reinforce_loss.*no keywords"),
    ({"sampling.top_k": 5}, "--sampling.top_k=5.*another distribution"),
    ({"microbatch_prompts": 3}, "--microbatch_prompts=3.*a divisor of"),
    ({"optimizer.schedule": "linear", "optimizer.warmup_steps": 9}, "--optimizer.warmup_steps=9"),
  ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path, files, changes, message):
  config = replace(reinforce.Config(), settings(files) | changes)
  with pytest.raises(ConfigError, match=message):
    reinforce.train(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_presets_set_weighting_and_loss(tmp_path):
  typed = replace(reinforce.Config(), {"preset": "dapo"})
  changes = reinforce.overrides(typed)
  assert changes["loss.clip_high"] == 0.28 and changes["weighting.name"] == "token_mean"
  assert not any(name.startswith(("advantage", "kl")) for name in changes)
  reinforce.check(replace(typed, changes))


def test_a_run_with_the_optimal_token_baseline_has_less_to_learn_than_its_rewards(
  tmp_path, small, files
):
  """Its advantages are what is left of the returns: of less variance than the rewards alone."""
  changes = {"advantage.name": "optimal_token_baseline", "steps": 1, "eval.every": 0}
  found = run(tmp_path, settings(files, **changes))
  rewards, advantages = (
    np.array([row[key] for row in found.samples]) for key in ("reward", "advantage")
  )
  assert 0 < np.var(advantages) < np.var(rewards) and np.sum(advantages < 0) > 2
  assert found.metrics[0]["grad_norm"] > 0
