"""PPO end to end on a small model: its formulas, what it survives, and what each flag does."""

from __future__ import annotations

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo, ppo, reinforce, terms
from rl_llm.errors import ConfigError, UserError
from rl_llm.policy import WeightsError, make_policy, save_hf, tiny_config
from rl_llm.policy.scalar_head import normal_head, with_head
from rl_llm.rollout import ResponseBatch, response_logprobs
from rl_llm.rollout.reward_model import load_reward_model, response_rewards, save_reward_model
from rl_llm.runs.config import replace
from rl_llm.runs.report import write_report
from rl_llm.text.tokenizers import ByteTokenizer
from rl_llm.training import loop
from rl_llm.training.value_network import response_values
from tests.experiments import helpers
from tests.experiments.helpers import FULL, equal, outcome, settings
from tests.representatives import mostly_slow

run = functools.partial(helpers.run, ppo)

# Two problems, two responses each, ragged; the last has no reward and so no token.
LENGTHS = np.array([3, 1])
PROMPTS = np.array([[0, 3, 1, 4], [0, 0, 0, 5]])
TOKENS = np.array([[7, 8, 9], [2, 0, 0], [6, 7, 0], [9, 9, 9]])
MASK = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
RESPONSES = ResponseBatch(PROMPTS, LENGTHS, TOKENS, MASK, MASK)


@pytest.fixture(scope="module")
def head():
  rng = np.random.default_rng(0)
  weight = 0.3 * rng.normal(size=(1, 32)).astype(np.float32)
  return {"weight": jnp.asarray(weight), "bias": jnp.asarray([0.25], jnp.float32)}


@pytest.fixture
def params(small):
  params = jax.jit(small.init)(jax.random.key(0))
  return params | {"embed": jax.tree.map(lambda x: 10 * x, params["embed"])}


# The formulas.


def numpy_terms(batch, logprobs, values, entropies, hparams, clip):
  """PPO's loss in loops, with its derivatives by each log-prob, value and entropy."""
  loss, value_loss = 0.0, 0.0
  by_logprob, by_value, by_entropy = (np.zeros(MASK.shape) for _ in range(3))
  for b, t in np.argwhere(MASK):
    w, a = batch.weights[b, t], batch.advantages[b, t]
    ratio = np.exp(logprobs[b, t] - batch.old_logprobs[b, t])
    surrogate = min(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    loss -= w * surrogate
    if surrogate == ratio * a:
      by_logprob[b, t] = -w * ratio * a
    value, old, wanted = values[b, t], batch.old_values[b, t], batch.returns[b, t]
    near = old + np.clip(value - old, -clip, clip)
    errors = (value - wanted) ** 2, (near - wanted) ** 2
    value_loss += w * max(errors) / 2
    if errors[0] >= errors[1] or near == value:
      by_value[b, t] = w * (value - wanted)
    loss -= hparams["entropy_coef"] * w * entropies[b, t]
    by_entropy[b, t] = -hparams["entropy_coef"] * w
  return loss, value_loss, by_logprob, by_value, by_entropy


@pytest.fixture
def batch(params, small, head):
  """Old log-probs and values so far from the present ones that both clips act on either side."""
  logprobs, entropies = jax.jit(response_logprobs, static_argnames="policy")(
    params, RESPONSES, policy=small
  )
  values = jax.jit(response_values, static_argnames="policy")(
    with_head(params, head), RESPONSES, policy=small
  )
  away = np.array([[0.4, -0.4, 0.1], [0.4, 0, 0], [-0.4, -0.1, 0], [0, 0, 0]])
  advantages = np.array([[1.0, -1.0, 0.5], [-2.0, 0, 0], [1.5, -0.5, 0], [9, 9, 9]])
  beyond = np.array([[0.5, 0.5, 0.5], [-0.5, 0, 0], [0.05, -0.05, 0], [0, 0, 0]])
  below = np.array([[1.0, -1.0, 0.2], [0.3, 0, 0], [1.0, -1.0, 0], [0, 0, 0]])
  batch = RESPONSES._replace(
    sampler_logprobs=np.asarray(logprobs),
    old_logprobs=np.asarray(logprobs - away, np.float32),
    old_values=np.asarray(values - beyond, np.float32),
    returns=np.asarray(values + below, np.float32),
    advantages=advantages.astype(np.float32),
    weights=np.where(MASK, [[0.1], [0.4], [0.2], [0.3]], 0).astype(np.float32),
  )
  return batch, *(np.asarray(x, np.float64) for x in (logprobs, entropies, values))


HPARAMS = {"loss": {}, "entropy_coef": 0.03, "value_coef": 0.7}


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_losses_and_gradients_are_those_of_the_formulas(params, small, head, batch, trunk):
  """Derivatives by hand, pulled back through the log-probs and values to the parameters."""
  batch, logprobs, entropies, values = batch
  config = replace(ppo.Config(), {"value.trunk": trunk})
  loss, value_loss, by_logprob, by_value, by_entropy = numpy_terms(
    batch, logprobs, values, entropies, HPARAMS, config.value.clip
  )
  assert len(np.unique(np.sign(by_logprob[MASK]))) == len(np.unique(np.sign(by_value[MASK]))) == 3
  tower = with_head(params, head)

  @jax.jit
  def pulled(params, tower, by_value):
    def outputs(params, tower):
      found = response_logprobs(params, RESPONSES, policy=small)
      return *found, response_values(tower, RESPONSES, policy=small)

    cotangents = by_logprob, by_entropy, by_value
    _, pull = jax.vjp(outputs, params, tower)
    return pull(jax.tree.map(jnp.float32, cotangents))

  def check(found, wanted):
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, np.abs(b).max()))

  grad = functools.partial(jax.value_and_grad, has_aux=True)
  if trunk == "own":
    by_params, by_tower = pulled(params, tower, by_value)
    (found, _), gradient = jax.jit(grad(ppo.make_loss(config, small)))(params, batch, HPARAMS)
    assert found == pytest.approx(loss, abs=1e-5)
    check(gradient, by_params)
    (found, metrics), gradient = jax.jit(grad(ppo.make_value_loss(config, small)))(
      tower, batch, HPARAMS
    )
    assert found == pytest.approx(value_loss, abs=1e-5)
    check(gradient, by_tower)
  else:
    by_params, by_tower = pulled(params, tower, HPARAMS["value_coef"] * by_value)
    by_trunk = {name: leaf for name, leaf in by_tower.items() if name != "head"}
    both = {
      name: jax.tree.map(jnp.add, leaf, by_trunk[name]) if name in by_trunk else leaf
      for name, leaf in by_params.items()
    }
    (found, metrics), gradient = jax.jit(grad(ppo.make_loss(config, small)))(
      params | {"head": head}, batch, HPARAMS
    )
    assert found == pytest.approx(loss + HPARAMS["value_coef"] * value_loss, abs=1e-5)
    check(gradient, both | {"head": by_tower["head"]})
  total, count = metrics["value_loss"]
  assert total / count == pytest.approx(value_loss / batch.weights.sum(), abs=1e-5)
  total, count = metrics["value_clip_fraction"]
  assert (total, count) == (2, 6)  # Two ran away from where they were, and came nearer.


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_are_gae_of_rewards_less_the_price_of_the_kl(whiten):
  rng = np.random.default_rng(0)
  values, kl = rng.normal(size=(2, *MASK.shape))
  rewards = np.array([1.0, 0.5, -0.25, 7.0])
  gamma, lam, coef = 0.9, 0.8, 0.3
  advantages, returns = np.zeros(MASK.shape), np.zeros(MASK.shape)
  for b, n in enumerate(MASK.sum(axis=1)):
    following = 0.0
    for t in reversed(range(n)):
      reward = (rewards[b] if t == n - 1 else 0) - coef * kl[b, t]
      # Nothing is expected after the last token, of a response that was cut off either.
      delta = reward + gamma * (values[b, t + 1] if t + 1 < n else 0) - values[b, t]
      following = delta + gamma * lam * following
      advantages[b, t], returns[b, t] = following, following + values[b, t]
  if whiten:
    spread = np.sqrt(advantages[MASK].var(ddof=1))
    advantages = np.where(MASK, (advantages - advantages[MASK].mean()) / spread, 0)
  options = terms.Gae(discount=gamma, gae_lambda=lam, whiten=whiten)
  found = ppo.token_advantages(options, rewards, values, MASK, kl, coef)
  np.testing.assert_allclose(found[0], advantages, rtol=0, atol=1e-5)
  np.testing.assert_allclose(found[1], returns, rtol=0, atol=1e-5)


def test_alpha_looks_ahead_over_a_share_of_the_response_and_values_learn_with_lambda_1():
  """As two calls with numbers: each row's own lambda, and 1."""
  rng = np.random.default_rng(3)
  rewards, zero = rng.random(len(MASK)).astype(np.float32), np.zeros(MASK.shape, np.float32)
  values = rng.normal(size=MASK.shape).astype(np.float32)
  given = rewards, values, MASK, zero, 0.0
  alpha = 0.7
  found, returns = ppo.token_advantages(terms.Gae(alpha=alpha, whiten=False), *given)
  for row, n in enumerate(MASK.sum(axis=1)):
    lam = max(0.0, 1 - 1 / (alpha * max(n, 1)))
    alone, _ = ppo.token_advantages(terms.Gae(gae_lambda=lam, whiten=False), *given)
    np.testing.assert_allclose(found[row], alone[row], atol=1e-6)
  _, of_one = ppo.token_advantages(terms.Gae(gae_lambda=1.0, whiten=False), *given)
  np.testing.assert_allclose(returns, of_one, atol=1e-6)
  with pytest.raises(ConfigError, match="left out with --advantage.alpha"):
    changes = {"advantage.alpha": 0.05, "advantage.gae_lambda": 0.9}
    ppo.check(replace(ppo.Config(), changes))


def test_both_trunks_read_the_same_values_and_none_knows_its_own_token(params, small, head):
  def values_of(trunk, tokens):
    config = replace(ppo.Config(), {"value.trunk": trunk})
    policy, value, kl = jax.eval_shape(
      functools.partial(ppo.init_ppo, config=config, width=32), params
    )
    if trunk == "own":
      value, policy = value._replace(params=with_head(params, head)), policy._replace(params=params)
    else:
      policy = policy._replace(params=params | {"head": head})
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    state = ppo.State(
      zeros(policy._replace(params=()))._replace(params=policy.params),
      value and zeros(value._replace(params=()))._replace(params=value.params),
      zeros(kl),
    )
    before = ppo.make_before(config, small)
    of_value = state.value and state.value.params
    return before(state.policy.params, of_value, RESPONSES._replace(tokens=tokens))

  own, shared = values_of("own", TOKENS), values_of("shared", TOKENS)
  logprobs, _ = jax.jit(response_logprobs, static_argnames="policy")(
    params, RESPONSES, policy=small
  )
  for _, old_logprobs in (own, shared):
    np.testing.assert_allclose(old_logprobs, logprobs, rtol=0, atol=1e-5)
  np.testing.assert_allclose(own[0], shared[0], rtol=0, atol=1e-5)
  changed = TOKENS.copy()
  changed[0, 1] = 1
  after = np.asarray(values_of("own", changed)[0])
  moved = np.abs(after - own[0]) > 1e-4
  assert moved[0].tolist() == [False, False, True] and not moved[1:].any()


# A step of a run.


def test_a_known_value_network_gives_known_advantages(tmp_path, small, files, monkeypatch):
  """Every value is 0.3: only the last token of n surprises, and lambda carries it back."""
  constant = {"weight": jnp.zeros((1, 32)), "bias": jnp.full((1,), 0.3)}
  init = ppo.init_ppo

  def init_constant(*args, **keywords):
    state = init(*args, **keywords)
    params = state.value.params | {"head": jax.tree.map(jnp.copy, constant)}
    return state._replace(value=state.value._replace(params=params))

  monkeypatch.setattr(ppo, "init_ppo", init_constant)
  changes = {"steps": 1, "advantage.whiten": False, "advantage.gae_lambda": 0.5}
  found = run(tmp_path, settings(files, **changes))
  rows = [row for row in found.samples if row["split"] == "train"]
  returns = []
  for row in rows:
    parts = [0.5**k * (row["reward"] - 0.3) for k in range(row["length"])]
    assert row["advantage"] == pytest.approx(np.mean(parts), abs=1e-5)
    returns += [0.3 + part for part in parts]
  row = found.metrics[0]
  assert row["values_mean"] == pytest.approx(0.3, abs=1e-6)
  assert row["returns_mean"] == pytest.approx(np.mean(returns), abs=1e-5)
  assert row["explained_variance"] == pytest.approx(0, abs=1e-5)  # as any constant
  assert row["value_loss"] > 0 and row["ratio"] == pytest.approx(1, abs=0.1)


# Two passes of two updates, so large that ratios and values leave their clip ranges.
BUSY = {
  "epochs": 2,
  "kl.coef": 0.1,
  "loss.entropy_coef": 0.01,
  "optimizer.learning_rate": 0.03,
  "value.learning_rate": 0.03,
}
ADAPTIVE = {"kl.controller": "adaptive", "kl.horizon": 50, "kl.target": 0.01}

FLAGS = [
  {"dtype": "bfloat16"},
  {"advantage.discount": 0.9},
  {"advantage.gae_lambda": 0.5},
  {"advantage.whiten": False},
  {"value.learning_rate": 0.01},
  {"value.clip": None},
  {"kl.coef": 1.0},
  {"kl.value": "k2"},
  ADAPTIVE,
  ADAPTIVE | {"kl.target": 10.0},
  ADAPTIVE | {"kl.horizon": 100},
  {"epochs": 1},
  {"value.trunk": "shared"},
  {"value.trunk": "shared", "value.coef": 0.5},
]
if FULL:  # Further values, and flags that another experiment's tests hold to the same code.
  FLAGS += [
    {"value.clip": 0.01},
    {"kl.value": "k3"},
    {"minibatches": 1},
    {"weighting.name": "sequence_mean"},
    {"loss.name": "gspo_loss"},
    {"loss.clip_high": 0.01},
    {"loss.entropy_coef": 0.5},
    {"responses_per_prompt": 1},
    {"value.trunk": "shared", "value.learning_rate": 0.01},
    {"value.trunk": "shared", "value.clip": None},
  ]


@pytest.mark.skipif(not FULL, reason="a run for each flag: RL_LLM_FULL=1")
def test_every_flag_changes_the_weights_that_come_out(tmp_path, small, files, judge_directory):
  """Each against the base run, and against each other: no two of these mean the same."""
  base = settings(files, steps=3, **BUSY)
  flags = [*FLAGS, {"reward": f"model:{judge_directory}"}]
  weights = [run(tmp_path / "base", base).params]
  for number, changes in enumerate(flags):
    weights.append(run(tmp_path / str(number), base | changes).params)
    same = [
      i
      for i, earlier in enumerate(weights[:-1])
      if earlier.keys() == weights[-1].keys() and equal(earlier, weights[-1])
    ]
    assert not same, (changes, ["base", *flags][same[0]])


@pytest.mark.slow
def test_microbatches_change_nothing(tmp_path, small, files):
  # An eps that is not tiny: Adam else turns rounding of a gradient near 0 into a whole step.
  base = settings(files, **BUSY) | {"optimizer.eps": 1e-2}
  whole = run(tmp_path / "whole", base)
  parts = run(tmp_path / "parts", base | {"microbatch_prompts": 1})
  for path, leaf in whole.params.items():
    np.testing.assert_allclose(leaf, parts.params[path], rtol=0, atol=1e-5)
  for name in ("value_loss", "value_clip_fraction", "explained_variance", "approx_kl"):
    assert parts.metrics[1][name] == pytest.approx(whole.metrics[1][name], abs=1e-4), name


def test_the_coefficient_follows_the_kl(tmp_path, small, files):
  linear = {"optimizer.schedule": "linear", "optimizer.learning_rate": 4e-3}
  found = run(tmp_path, settings(files, steps=4, **BUSY, **ADAPTIVE) | linear)
  rows = found.metrics[:4]
  # Both networks follow the schedule.
  rates = [row["value_learning_rate"] / rows[0]["value_learning_rate"] for row in rows]
  np.testing.assert_allclose(rates, [1, 3 / 4, 1 / 2, 1 / 4], rtol=1e-6)
  assert rows[0]["kl_coef"] == pytest.approx(0.1) and abs(rows[0]["kl_ref"]) < 1e-4
  for before, after in zip(rows, rows[1:], strict=False):
    error = np.clip(before["kl_ref"] / 0.01 - 1, -0.2, 0.2)
    assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 16 / 50), rel=1e-5)
  assert rows[1]["kl_coef"] < 0.1 < rows[3]["kl_coef"]  # the KL rose past its target


class Killed(BaseException):
  """As if the process had gone."""


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["own", "shared"] if FULL else ["own"])
def test_stopped_at_three_points_it_ends_as_an_uninterrupted_run(
  tmp_path, small, files, monkeypatch, trunk
):
  """Before the first checkpoint, between two, and by a signal that saves."""
  changes = settings(files, steps=6, **BUSY, **ADAPTIVE)
  changes |= {"checkpoint.every": 2, "eval.every": 3, "value.trunk": trunk}
  straight = run(tmp_path / "straight", changes)

  def main_stopped_at(stop_step, stop):
    def wrap(sample):
      def sample_or_stop(state, step, clock):
        if step == stop_step:
          stop()
        return sample(state, step, clock)

      return sample_or_stop

    with monkeypatch.context() as patch:
      helpers.wrap_seams(patch, sample=wrap)
      return helpers.main(ppo, config)

  def killed():
    raise Killed

  def interrupted():
    os.kill(os.getpid(), signal.SIGTERM)

  config = replace(ppo.Config(), changes | {"workdir": str(tmp_path / "cut")})
  for step in (1, 3):
    with pytest.raises(Killed):
      main_stopped_at(step, killed)
  assert main_stopped_at(5, interrupted) == 128 + signal.SIGTERM
  assert helpers.main(ppo, config) == 0
  cut = outcome(tmp_path / "cut")
  assert cut.metrics == straight.metrics and cut.samples == straight.samples
  assert cut.state.keys() == straight.state.keys() and equal(cut.state, straight.state)
  assert any("kl" in path for path in cut.state)


@pytest.mark.parametrize("trunk", ["own", "shared"] if FULL else ["own"])
@pytest.mark.slow
def test_it_learns(tmp_path, small, files, trunk):
  """A response earns the share of its bytes that are capital letters."""
  (tmp_path / "reward.py").write_text(
    "def capitals(prompts, completions):\n"
    "  return [sum('A' <= c <= 'Z' for c in text) / max(len(text), 1) for text in completions]\n"
  )
  changes = {
    "jsonl.reward_file": str(tmp_path / "reward.py"),
    "jsonl.reward_function": "capitals",
    "steps": 20,
    "optimizer.learning_rate": 0.02,
    "value.learning_rate": 0.02,
    "value.trunk": trunk,
    "eval.every": 20,
  }
  found = run(tmp_path / "run", settings(files, **changes))
  rewards = [row["reward_mean"] for row in found.metrics[:20]]
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_values_foresee_what_the_prompt_decides_at_their_own_rate(tmp_path, small, files, trunk):
  """The policy hardly moves; on a shared trunk, only the head learns."""
  (tmp_path / "reward.py").write_text(
    "def long(prompts, completions):\n  return [float(len(prompt) > 12) for prompt in prompts]\n"
  )
  changes = {
    "jsonl.reward_file": str(tmp_path / "reward.py"),
    "jsonl.reward_function": "long",
    "steps": 20,
    "optimizer.learning_rate": 1e-9,
    "value.learning_rate": 0.01,
    "value.trunk": trunk,
    "eval.every": 20,
  }
  found = run(tmp_path / "run", settings(files, **changes))
  foreseen = [float(row["explained_variance"]) for row in found.metrics[:20]]
  assert foreseen[0] == 0  # the head's zeros
  assert np.nanmax(foreseen[7:14]) > 0.2  # in the middle third


# A reward model.


@pytest.fixture(scope="module")
def judge_directory(tmp_path_factory):
  """A reward model of random weights over bytes."""
  directory = tmp_path_factory.mktemp("judge") / "model"
  config = tiny_config(ByteTokenizer.vocab_size)
  params = jax.jit(make_policy(config).init)(jax.random.key(3))
  params = with_head(params, normal_head(config.width, jax.random.key(4)))
  save_reward_model(directory, config, params, ByteTokenizer(), center=0.5)
  return directory


@pytest.mark.parametrize(
  "experiment", [grpo, *(pytest.param(x, marks=pytest.mark.slow) for x in (reinforce, ppo))]
)
def test_a_reward_model_is_trained_on_and_the_grader_still_grades(
  tmp_path, small, files, monkeypatch, judge_directory, experiment
):
  seen = []

  def wrap(sample):
    def sample_and_look(*args):
      seen.append(sample(*args))
      return seen[-1]

    return sample_and_look

  helpers.wrap_seams(monkeypatch, sample=wrap)
  changes = {"reward": f"model:{judge_directory}", "microbatch_prompts": 2, "steps": 1}
  changes |= {"minibatches": 1, "jsonl.reward_function": "lonely"}
  found = helpers.run(experiment, tmp_path, settings(files, **changes))
  model = load_reward_model(judge_directory)
  [step] = seen
  mask = step.rollout.mask
  batch = ResponseBatch(*step.prompts, step.rollout.tokens, mask, mask)
  rewards = np.asarray(response_rewards(model.params, batch, policy=model.policy))
  assert np.std(rewards) > 0.1
  rows = [row for row in found.samples if row["split"] == "train"]
  np.testing.assert_allclose([row["reward"] for row in rows], rewards, rtol=0, atol=1e-5)
  # The grader has no opinion on some; these are trained on all the same.
  graded = [row for row in rows if sum(map(ord, row["response"])) % 2 == 0]
  assert 0 < len(graded) < len(rows)
  assert [row["correct"] for row in rows] == [True if row in graded else None for row in rows]
  row = found.metrics[0]
  assert row["reward_mean"] == pytest.approx(np.mean(rewards), abs=1e-5)
  assert row["accuracy"] == row["grade_mean"] == 1
  assert row["rewards_ok"] == len(graded)
  assert all(row["advantage"] != 0 for row in rows)
  report = write_report(tmp_path).read_text()
  assert "The same responses, graded" in report


@pytest.mark.parametrize(
  ("reward", "error", "message"),
  [
    ("modle:x", ConfigError, "--reward=modle:x: must be task, FILE.py:function, or model:DIR"),
    ("model:", ConfigError, "--reward=model:: must be task, FILE.py:function, or model:DIR"),
    ("model:nowhere", WeightsError, "nowhere: no such model directory"),
    ("model:{policy}", WeightsError, "has no reward head"),
    ("model:{judge}", ConfigError, "a reward model over the policy's vocabulary"),
  ],
)
@pytest.mark.parametrize("experiment", mostly_slow([grpo, reinforce, ppo], quick=[0]))
def test_a_reward_that_cannot_be_used_is_refused_before_a_rollout(
  tmp_path, small, files, monkeypatch, judge_directory, experiment, reward, error, message
):
  monkeypatch.setattr(loop, "train_loop", None)
  config = tiny_config(ByteTokenizer.vocab_size)
  if "{policy}" in reward:
    params = jax.jit(make_policy(config).init)(jax.random.key(0))
    save_hf(tmp_path / "policy", config, params)
  if "{judge}" in reward:
    vocabularies = iter([{"a": 0}, {"b": 0}])
    name = "rl_llm.rollout.judge.vocabulary"
    monkeypatch.setattr(name, lambda tokenizer: next(vocabularies))
  reward = reward.format(policy=tmp_path / "policy", judge=judge_directory)
  changes = settings(files) | {"reward": reward}
  with pytest.raises(error, match=message) as raised:
    helpers.run(experiment, tmp_path / "run", changes)
  assert isinstance(raised.value, UserError)
  assert "\n" not in str(raised.value)


def test_settings_that_cannot_work_are_refused():
  for changes, message in (
    ({"kl.controller": "adaptive"}, "--kl.coef=0.0: must be above 0"),
    ({"loss.name": "reinforce_loss"}, "a loss with a ratio where a step has several updates"),
  ):
    with pytest.raises(ConfigError, match=message):
      ppo.check(replace(ppo.Config(), changes))
