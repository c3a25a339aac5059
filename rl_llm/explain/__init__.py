"""Worked examples of the library's functions, line by line, in English and Japanese.

`python -m rl_llm explain ppo --p_old=0.5 --p_new=0.3 --advantage=1` prints how a loss comes about,
what its slope is, and what it will do. Every number is what a function of this library returned;
nothing is computed a second time, so what is explained is what trains.

>>> from rl_llm import explain
>>> example = explain.ppo(p_old=0.5, p_new=0.3, advantage=-1.0)
>>> print(explain.render(example, lang="en").splitlines()[-1])
It has already fallen below 1 - 0.2 times: this batch pushes it down no further.
>>> round(example.values["loss"], 3), example.values["slope"]
(0.8, 0.0)
"""

from rl_llm.explain.estimates import gae, grpo
from rl_llm.explain.explanation import LANGUAGES, Curve, Explanation, Figure, Text, TokenRow, render
from rl_llm.explain.figure import draw
from rl_llm.explain.policies import dpo, entropy, kl
from rl_llm.explain.tokens import clip, ppo, reinforce

# A topic is a function from numbers, all keyword-only and with defaults, to an `Explanation`: add
# it here and `python -m rl_llm explain` has it, with a flag for each number.
TOPICS = (reinforce, ppo, clip, grpo, gae, dpo, kl, entropy)

__all__ = [
  "LANGUAGES",
  "TOPICS",
  "Curve",
  "Explanation",
  "Figure",
  "Text",
  "TokenRow",
  "clip",
  "dpo",
  "draw",
  "entropy",
  "gae",
  "grpo",
  "kl",
  "ppo",
  "reinforce",
  "render",
]
