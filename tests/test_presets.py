"""Presets name real functions and real keywords, and reproduce what their papers say."""

import inspect

import numpy as np
import pytest

from rl_llm import advantages, kl, losses, presets, weighting

NAMES = ("grpo", "dr_grpo", "dapo", "trl", "verl", "nexrl")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_a_keyword_of_the_function_it_names(name):
  recipe = presets.grpo(name)
  parts = ((advantages, recipe.advantage), (weighting, recipe.weighting), (losses, recipe.loss))
  for module, part in parts:
    function = getattr(module, part["name"])
    keywords = inspect.signature(function).parameters
    for key in part.keys() - {"name"}:
      assert keywords[key].kind is inspect.Parameter.KEYWORD_ONLY, key
  assert recipe.kl.keys() == {"coef", "value", "gradient"}
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
  coef = recipe.kl["coef"]
  estimators = {k: v for k, v in recipe.kl.items() if k != "coef"}
  return loss + coef * losses.kl_loss(logprobs, ref, weights, **estimators)[0]


RNG = np.random.default_rng(0)
OLD, REF = np.log(RNG.uniform(0.2, 0.9, size=(2, 4, 5)))
LOGPROBS = OLD + RNG.normal(scale=0.5, size=OLD.shape)
REWARDS = np.array([[1.0, 0.0], [0.3, 0.9]])
MASK = np.arange(5) < np.array([[5], [3], [1], [4]])


def paper(low, high, eps, std, aggregate, dual=None, beta=0.0):
  """The objective as the papers write it, in loops over responses and tokens."""
  rows = []
  for b in range(4):
    group = REWARDS[b // 2]
    a = group[b % 2] - group.mean()
    if std:
      a /= group.std(ddof=1) + eps
    row = []
    for t in range(MASK[b].sum()):
      ratio = np.exp(LOGPROBS[b, t] - OLD[b, t])
      loss = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
      if dual and a < 0:
        loss = min(loss, -dual * a)
      d = LOGPROBS[b, t] - REF[b, t]
      row.append(loss + beta * (np.exp(-d) + d - 1))
    rows.append(np.array(row))
  return aggregate(rows)


def by_token(rows):
  return np.concatenate(rows).mean()


def by_sequence(rows):
  return np.mean([row.mean() for row in rows])


@pytest.mark.parametrize("name, expected", [
  ("grpo", lambda: paper(0.2, 0.2, 1e-6, True, by_sequence, beta=0.04)),
  ("dr_grpo", lambda: paper(0.2, 0.2, 0, False, lambda rows: np.mean([r.sum() / 8 for r in rows]))),
  ("dapo", lambda: paper(0.2, 0.28, 1e-6, True, by_token)),
  ("trl", lambda: paper(0.2, 0.2, 1e-4, True, by_token)),
  ("verl", lambda: paper(0.2, 0.2, 1e-6, True, by_token, dual=3.0)),
  ("nexrl", lambda: paper(0.2, 0.2, 1e-6, True, by_token)),
])
def test_a_recipe_is_the_objective_its_source_writes(name, expected):
  extra = {"length": 8} if name == "dr_grpo" else {}
  got = objective(name, LOGPROBS, OLD, REF, REWARDS, MASK, **extra)
  np.testing.assert_allclose(got, expected(), rtol=1e-5)


def test_a_recipe_is_the_callers_to_change():
  presets.grpo("grpo").loss["clip_low"] = 9.0
  assert presets.grpo("grpo").loss["clip_low"] == 0.2


def test_an_unknown_name_is_answered_with_the_nearest_and_all():
  with pytest.raises(ValueError, match="name is 'dr-grpo'.*Did you mean 'dr_grpo'") as error:
    presets.grpo("dr-grpo")
  assert all(name in str(error.value) for name in NAMES)
