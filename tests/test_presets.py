"""Presets name real functions and real keywords, and reproduce what their papers say."""

import inspect
import pathlib
import runpy

import jax
import numpy as np
import pytest

from experiments import grpo
from rl_llm import advantages, kl, losses, presets, weighting
from rl_llm.errors import ConfigError
from tests.representatives import mostly_slow

NAMES = tuple(presets.SOURCES)
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_keyword_of_the_function_it_names(name):
  recipe = presets.grpo(name)
  parts = ((advantages, recipe.advantage), (weighting, recipe.weighting), (losses, recipe.loss))
  for module, part in parts:
    function = getattr(module, part["name"])
    keywords = inspect.signature(function).parameters
    for key in part.keys() - {"name"}:
      assert keywords[key].kind is inspect.Parameter.KEYWORD_ONLY, key
  assert recipe.kl.keys() - {"weighting"} == {"coef", "value", "gradient"}
  assert getattr(weighting, recipe.kl.get("weighting", "token_mean"))
  assert recipe.entropy.keys() == {"coef"}
  assert {recipe.kl["value"], recipe.kl["gradient"]} <= set(kl.ESTIMATORS)


def objective(name, logprobs, old, ref, rewards, mask, **weighting_kwargs):
  """The objective a recipe describes, built from the public functions it names."""
  recipe = presets.grpo(name)

  def call(module, part, *args, **extra):
    keywords = {k: v for k, v in part.items() if k != "name"} | extra
    return getattr(module, part["name"])(*args, **keywords)

  advantage = call(advantages, recipe.advantage, rewards).reshape(-1)
  weights = call(weighting, recipe.weighting, mask, **weighting_kwargs)
  loss, _ = call(losses, recipe.loss, logprobs, old, advantage, weights)
  estimators = {k: v for k, v in recipe.kl.items() if k in ("value", "gradient")}
  of_kl = {"name": recipe.kl.get("weighting", recipe.weighting["name"])}
  own = weights if of_kl == recipe.weighting else call(weighting, of_kl, mask)
  bonus = losses.entropy_loss(ENTROPIES, weights)[0]
  kl_term = losses.kl_loss(logprobs, ref, own, **estimators)[0]
  return loss + recipe.kl["coef"] * kl_term + recipe.entropy["coef"] * bonus


RNG = np.random.default_rng(0)
OLD, REF = np.log(RNG.uniform(0.2, 0.9, size=(2, 4, 5)))
LOGPROBS = OLD + RNG.normal(scale=0.5, size=OLD.shape)
REWARDS = np.array([[1.0, 0.0], [0.3, 0.9]])
ENTROPIES = RNG.uniform(0.5, 1.5, size=OLD.shape)
MASK = np.arange(5) < np.array([[5], [3], [1], [4]])


def mean_and_std(reward, group):
  return (reward - group.mean()) / (group.std(ddof=1) + 1e-6)


def k1(d):
  return d


def k3(d):
  return np.exp(-d) + d - 1


def paper(
  low,
  high,
  advantage,
  aggregate,
  dual=None,
  beta=0.0,
  kl=k3,
  rewards=REWARDS,
  aggregate_kl=None,
  entropy=0.0,
):
  """The objective as its source writes it, in loops over responses and tokens."""
  rows, penalties, size = [], [], rewards.shape[1]
  for b in range(4):
    group = rewards[b // size]
    a = advantage(group[b % size], group)
    row = []
    for t in range(MASK[b].sum()):
      ratio = np.exp(LOGPROBS[b, t] - OLD[b, t])
      loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
      if dual and a < 0:
        loss = min(loss, -dual * a)
      row.append(loss - entropy * ENTROPIES[b, t])
    rows.append(np.array(row))
    penalties.append(kl(LOGPROBS[b] - REF[b])[: MASK[b].sum()])
  return aggregate(rows) + beta * (aggregate_kl or aggregate)(penalties)


def by_token(rows):
  return np.concatenate(rows).mean()


def by_sequence(rows):
  return np.mean([row.mean() for row in rows])


@pytest.mark.parametrize(
  "name, expected",
  [
    ("grpo", lambda: paper(0.2, 0.2, mean_and_std, by_sequence, beta=0.04)),
    (
      "dr_grpo",
      lambda: paper(
        0.2,
        0.2,
        lambda r, group: r - group.mean(),
        lambda rows: np.mean([r.sum() / 8 for r in rows]),
      ),
    ),
    ("dapo", lambda: paper(0.2, 0.28, mean_and_std, by_token)),
    (
      "trl",
      lambda: paper(
        0.2, 0.2, lambda r, group: (r - group.mean()) / (group.std(ddof=1) + 1e-4), by_token
      ),
    ),
    ("verl", lambda: paper(0.2, 0.2, mean_and_std, by_token, dual=3.0)),
    ("nexrl", lambda: paper(0.2, 0.2, mean_and_std, by_token, entropy=1e-4)),
    (
      "openrlhf",
      lambda: paper(
        0.2, 0.2, lambda r, group: (r - group.mean()) / (group.std(ddof=1) + 1e-9), by_token
      ),
    ),
    ("tunix", lambda: paper(0.2, 0.2, mean_and_std, by_sequence, beta=0.04, kl=k1)),
    (
      "simply",
      lambda: paper(
        0.2, 0.2, lambda r, group: (r - group.mean()) / max(group.std(), 1e-5), by_token, beta=0.001
      ),
    ),
    (
      "skyrl",
      lambda: paper(0.2, 0.2, mean_and_std, by_token, beta=0.001, aggregate_kl=by_sequence),
    ),
  ],
)
def test_a_recipe_is_the_objective_its_source_writes(name, expected):
  extra = {"length": 8} if name == "dr_grpo" else {}
  got = objective(name, LOGPROBS, OLD, REF, REWARDS, MASK, **extra)
  np.testing.assert_allclose(got, expected(), rtol=3e-6)


@pytest.mark.parametrize(
  "rewards",
  mostly_slow(
    [np.array([[1.0, 0.0, 0.3, 0.9]]), REWARDS, np.array([[1.0, 0.0, 0.0, 0.0]])], quick=[0, 2]
  ),
)
def test_nemo_compares_with_the_others_alone(rewards):
  def advantage(r, group):
    others = np.delete(group, np.flatnonzero(group == r)[0])
    std = others.std(ddof=1) if len(others) > 1 else 0
    return (r - others.mean()) / (std + 1e-6 if std > 0 else 1)

  got = objective("nemo", LOGPROBS, OLD, REF, rewards, MASK)
  expected = paper(0.2, 0.2, advantage, by_token, beta=0.01, rewards=rewards)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
  "name, terms",
  [
    ("skyrl", {"beta": 0.001, "aggregate_kl": by_sequence}),
    ("verl", {"dual": 3.0}),
    ("nexrl", {"entropy": 1e-4}),
  ],
)
def test_a_lone_response_is_trained_on_its_raw_reward(name, terms):
  rewards = np.array([[1.0], [0.0], [0.3], [0.9]])
  got = objective(name, LOGPROBS, OLD, REF, rewards, MASK)
  expected = paper(0.2, 0.2, lambda r, group: r, by_token, rewards=rewards, **terms)
  np.testing.assert_allclose(got, expected, rtol=3e-6)


def test_simply_has_no_cap_on_the_ratio_of_a_bad_token():
  """`apply_simple_rl` sets policy_ratio_cap to None; 10 is the default of a function of its own."""
  old = np.full((1, 1), np.log(0.01))
  loss = recipe_loss("simply", np.zeros((1, 1)), old, np.array([-1.0]), np.ones((1, 1)))
  np.testing.assert_allclose(loss, 100.0, rtol=1e-6)


def recipe_loss(name, *args):
  keywords = {k: v for k, v in presets.grpo(name).loss.items() if k != "name"}
  return losses.grpo_loss(*args, **keywords)[0]


def test_openrlhf_has_the_kl_in_the_reward():
  """Normalised outcome at the end, minus 0.01 * k1 per token, summed from each token on."""
  recipe = presets.grpo("openrlhf")
  keywords = {k: v for k, v in recipe.advantage.items() if k != "name"}
  outcomes = advantages.group_relative(REWARDS, **keywords).reshape(-1)
  rewards = advantages.token_rewards(outcomes, MASK, kl=OLD - REF, kl_coef=0.01)
  got = advantages.discounted_returns(rewards, MASK)
  expected = np.zeros(MASK.shape)
  for b, t in np.argwhere(MASK):
    group = REWARDS[b // 2]
    outcome = (group[b % 2] - group.mean()) / (group.std(ddof=1) + 1e-9)
    expected[b, t] = outcome - 0.01 * sum(OLD[b, s] - REF[b, s] for s in range(t, MASK[b].sum()))
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
  assert recipe.kl["coef"] == 0


@pytest.mark.parametrize(
  "name, slope",
  [
    ("grpo", lambda d: 0.04 * (1 - np.exp(-d))),
    ("nemo", lambda d: 0.01 * d),  # of exp(x - sg(x)) * k3: k3 + 1 - exp(-d)
    ("tunix", lambda d: 0.04 * np.ones_like(d)),
    ("skyrl", lambda d: 0.001 * (1 - np.exp(-d))),
  ],
)
def test_the_gradient_of_the_kl_term(name, slope):
  recipe = presets.grpo(name)
  made_by = getattr(weighting, recipe.kl.get("weighting", recipe.weighting["name"]))
  weights = np.asarray(made_by(MASK))
  estimators = {k: v for k, v in recipe.kl.items() if k in ("value", "gradient")}
  gradient = jax.grad(lambda x: losses.kl_loss(x, REF, weights, **estimators)[0])(LOGPROBS)
  np.testing.assert_allclose(
    recipe.kl["coef"] * gradient, weights * slope(LOGPROBS - REF), rtol=1e-5, atol=1e-9
  )


def test_every_recipe_says_how_it_differs_and_where_it_was_read():
  """One table of what differs, of all; one of versions and files, of those that are programs."""
  tables = presets.grpo.__doc__.split("Each was read from these files:")
  rows = [
    [line.split("|")[1].strip() for line in part.splitlines() if line.strip().startswith("|")][2:]
    for part in tables
  ]
  assert tuple(rows[0]) == NAMES
  assert tuple(rows[1]) == NAMES[6:]


def test_a_recipe_is_the_callers_to_change():
  presets.grpo("grpo").loss["clip_low"] = 9.0
  assert presets.grpo("grpo").loss["clip_low"] == 0.2


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
  with pytest.raises(ValueError, match="name is 'dr-grpo'.*Did you mean 'dr_grpo'") as error:
    presets.grpo("dr-grpo")
  assert all(name in str(error.value) for name in NAMES)


def test_a_recipe_sets_the_groups_and_the_length_penalty_that_its_paper_has():
  found = {name: (presets.grpo(name).groups, presets.grpo(name).overlong) for name in NAMES}
  assert found.pop("dapo") == ("informative", 4096 / 20480)
  assert found.pop("scalerl") == ("drop", 0)
  assert set(found.values()) == {("any", 0)}
  found = {name: presets.grpo(name).reward_kl for name in NAMES}
  assert found.pop("openrlhf") == {"coef": 0.01, "value": "k1"}
  assert set(found.values()) == {None}


@pytest.mark.parametrize("name", presets.REFUSED)
def test_a_recipe_that_cannot_be_expressed_is_refused_with_the_reason(name):
  with pytest.raises(ValueError, match=f"name is '{name}'; it must be another: it"):
    presets.grpo(name)


def test_a_preset_sets_all_flags_of_its_recipe():
  config = grpo.Config(preset="dapo", max_new_tokens=100)
  assert (config.loss.clip_high, config.weighting.name) == (0.28, "token_mean")
  assert config.task.dynamic.groups == "informative"
  assert config.task.overlong.penalty(config) == (100, 20.0, 1.0)
  config = grpo.Config(preset="openrlhf")
  assert (config.kl.coef, config.kl.value, config.kl.place) == (0.01, "k1", "reward")
  assert grpo.Config(preset="dapo", **{"dynamic.groups": "any"}).task.dynamic.groups == "any"
  for name in NAMES:
    grpo.check(grpo.Config(preset=name))
  with pytest.raises(ConfigError, match="--preset=vapo: must be another; its value network"):
    grpo.Config(preset="vapo")


def test_the_page_of_recipes_is_up_to_date():
  page = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))["page"]()
  assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == page, "run `make docs`"
