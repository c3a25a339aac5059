"""Writes docs/recipes.md, the recipes by part and source, from `rl_llm.presets`: `make docs`."""

from __future__ import annotations

import pathlib

from rl_llm import presets

PAGE = pathlib.Path(__file__).parent / "recipes.md"
HEAD = """# Recipes

`python -m experiments.grpo --preset=NAME` sets every part of a recipe; flags given by hand win over
it. REINFORCE and PPO take the parts that are theirs, weighting and loss. `docs/make_recipes.py`
writes this page from `rl_llm.presets`, which says which files were read.

The parts are functions of `rl_llm.advantages`, `rl_llm.weighting` and `rl_llm.losses` with their
keywords. A KL in the reward is taken off each token. Groups without spread in their rewards are
trained on like others ("any"), left out ("drop"), or replaced by further samples ("informative").
Overlong is the share of the length limit over which DAPO's penalty for length grows.

Further samples are not free. On the sums of `make run` a step of `dapo` takes 2.5 rounds, so equal
samples are 0.4 times as many updates: held-out accuracy is 0.80, 0.82 and 0.78 with them, and 0.92,
0.89 and 0.93 without ([figures](results/refill.md)).

```pycon
>>> from rl_llm import presets
>>> presets.grpo("dapo").groups, presets.grpo("openrlhf").reward_kl
('informative', {'coef': 0.01, 'value': 'k1'})
```

"""


def called(part: dict) -> str:
  """A function with its keywords, as code."""
  given = ", ".join(f"{key}={value!r}" for key, value in part.items() if key != "name")
  return f"`{part['name']}({given})`"


def kl(recipe: presets.Recipe) -> str:
  """Where the KL is, and what it costs."""
  if recipe.reward_kl:
    return "reward: {coef} {value}".format(**recipe.reward_kl)
  if not recipe.kl["coef"]:
    return "none"
  own = f", {recipe.kl['weighting']}" if "weighting" in recipe.kl else ""
  return "loss: {coef} {value}, gradient of {gradient}".format(**recipe.kl) + own


def page() -> str:
  """The whole page."""
  names = "recipe", "advantage", "weighting", "loss", "KL", "entropy", "groups", "overlong"
  rows = [names, ["---"] * len(names)]
  sources = [("recipe", "source", "version", "what of these parts is missing"), ["---"] * 4]
  for name, source in presets.SOURCES.items():
    recipe = presets.grpo(name)
    parts = [called(recipe.advantage), called(recipe.weighting), called(recipe.loss), kl(recipe)]
    further = [f"{recipe.entropy['coef']:g}", recipe.groups, f"{recipe.overlong:g}"]
    rows.append([f"`{name}`", *parts, *further])
    sources.append([f"`{name}`", source.where, source.version, source.lacks or "nothing"])
  refused = [("name", "why it is refused"), ["---"] * 2]
  refused += [(f"`{name}`", why) for name, why in presets.REFUSED.items()]
  tables = (rows, sources, refused)
  return HEAD + "\n".join("".join(f"| {' | '.join(row)} |\n" for row in table) for table in tables)


if __name__ == "__main__":
  PAGE.write_text(page(), encoding="utf-8")
