"""Named recipes: what each paper or system means by an algorithm's name, as keyword arguments.

"GRPO" computes at least eight different numbers in published code: the versions disagree on the
standard deviation, on what is averaged over what, on the clip and on the KL term. A preset spells
the choices out. It is data: dicts with the `name` of a public function and that function's
keywords, to read, print, change and pass to the function:

>>> recipe = grpo("dapo")
>>> recipe.loss
{'name': 'grpo_loss', 'clip_low': 0.2, 'clip_high': 0.28}
>>> recipe.weighting
{'name': 'token_mean'}
"""

from __future__ import annotations

import difflib
from typing import Any, Literal, NamedTuple


class Recipe(NamedTuple):
  """Keyword dicts. The first three hold their function's "name" in addition to its keywords.

  Fields:
    advantage: of a function in `rl_llm.advantages`.
    weighting: of a function in `rl_llm.weighting`.
    loss: of a function in `rl_llm.losses`.
    kl: {"coef", "value", "gradient"}: the coefficient of `kl_loss` and its keywords; coef 0 needs
      no reference. A "weighting" names the function that makes this term's own weights; without it
      they are those of the loss.
    entropy: {"coef"}: the coefficient of `entropy_loss`, with the weights of the loss.
    reward_kl: {"coef", "value"} of a KL that is taken off each token's reward; None: there is none.
    groups: which groups of responses are trained on: "any"; "drop", those that teach something;
      "informative", as many of those as a step has problems, by sampling further problems.
    overlong: over which share of the length limit the soft penalty for length grows; 0: no penalty.
  """

  advantage: dict[str, Any]
  weighting: dict[str, Any]
  loss: dict[str, Any]
  kl: dict[str, Any]
  entropy: dict[str, Any]
  reward_kl: dict[str, Any] | None = None
  groups: Literal["any", "drop", "informative"] = "any"
  overlong: float = 0.0


class Source(NamedTuple):
  """Where a recipe was read, and what of it the functions here do not have."""

  where: str
  version: str
  lacks: str = ""  # "": nothing


SOURCES = {
  "grpo": Source("https://arxiv.org/abs/2402.03300", "2024"),
  "dr_grpo": Source("https://arxiv.org/abs/2503.20783", "2025"),
  "dapo": Source("https://arxiv.org/abs/2503.14476", "2025"),
  "gspo": Source("https://arxiv.org/abs/2507.18071", "2025"),
  "litepo": Source("https://arxiv.org/abs/2508.08221", "2025"),
  "scalerl": Source(
    "https://arxiv.org/abs/2510.13786",
    "2025",
    "prompts that are solved 9 times in 10 are drawn again; CISPO's bound is our default",
  ),
  "trl": Source("TRL", "1.16.0"),
  "verl": Source("verl", "0.9.1"),
  "nexrl": Source("NexRL", "6860191"),
  "openrlhf": Source("OpenRLHF", "0.11.2, `group_norm`", "rewards are not clipped to +-10"),
  "nemo": Source("NeMo RL", "7ea279a"),
  "tunix": Source("Tunix", "0.1.7"),
  "simply": Source("Simply", "0.3.9, e14c061"),
  "skyrl": Source("SkyRL", "0.3.0"),
}

# Published under a name that is no recipe here, and why.
REFUSED = {
  "vapo": "its value network is trained first and has a lambda of its own, which ppo does not have",
  "reinforce_plus_plus": (
    "it is another algorithm, experiments.reinforce with its advantage of that name, "
    "--loss=ppo_loss and --kl.coef=0.01"
  ),
}


def grpo(name: str) -> Recipe:
  """The GRPO recipe of that name: what a paper or system means by GRPO, or does by default.

  | name | differs from the paper in |
  |---|---|
  | grpo | nothing: (R - mean) / std, every response counts the same, clip 0.2, KL 0.04 * k3 |
  | dr_grpo | no division by std nor by own length, no KL; `constant_length` needs a `length` |
  | dapo | token mean, clip 0.2 below and 0.28 above, no KL; refilled groups, a price for length |
  | gspo | the ratio of a whole response, clip 3e-4 below and 4e-4 above, no KL |
  | litepo | divides by the std of the whole batch, token mean, no KL |
  | scalerl | CISPO, std of the whole batch, every prompt counts the same, no KL; drops groups |
  | trl | eps 1e-4, token mean, no KL (with a coefficient, pass `ratio` to `kl_loss`) |
  | verl | a lone response keeps its raw reward, token mean, dual clip 3, no KL |
  | nexrl | a lone response keeps its raw reward, token mean, no KL, entropy 1e-4 |
  | openrlhf | eps 1e-9, token mean, no KL in the loss: 0.01 * k1 is in the reward (1) |
  | nemo | mean and std of the *other* responses, token mean, KL 0.01 * k3 with k2's gradient (2) |
  | tunix | KL 0.04 * k1, whose expected gradient is 0: it adds noise and holds nothing |
  | simply | divides by max(std, 1e-5), ddof 0; token mean, KL 0.001 * k3 |
  | skyrl | a lone response keeps its raw reward, token mean; KL 0.001 * k3, by sequence mean (3) |

  1. `discounted_returns(token_rewards(advantages, mask, kl=k1, kl_coef=0.01), mask)` are OpenRLHF's
     advantages, of rewards clipped to +-10.
  2. NeMo multiplies k3 by exp(logprobs - stop_gradient(logprobs)), which has k2's gradient. A
     response that stands apart from others that nearly agree gets an advantage beyond 10, where
     mean and std of all responses would give at most (G - 1) / sqrt(G).
  3. A row without tokens counts there as a KL of 0: `sequence_mean(mask, count_empty=True)`.

  Each was read from these files:

  | name | version | files |
  |---|---|---|
  | trl | 1.16.0 | trl/trainer/grpo_config.py, grpo_trainer.py |
  | verl | 0.9.1 | verl/trainer/config/actor/actor.yaml, ppo_trainer.yaml; ppo/core_algos.py |
  | nexrl | 6860191 (2026-03-10) | recipe/math/self_hosted.yaml; core_algos.py, fsdp_actor.py |
  | openrlhf | 0.11.2, `group_norm` | cli/train_ppo_ray.py; experience_maker.py; models/loss.py |
  | nemo | 7ea279a (2026-08-22) | examples/configs/grpo_math_1B.yaml; nemo_rl/algorithms/ |
  | tunix | 0.1.7 | tunix/rl/grpo/grpo_learner.py, algo_core.py, common.py |
  | simply | 0.3.9, e14c061 | simply/config_lib.py, `apply_simple_rl`; rl_lib.py |
  | skyrl | 0.3.0 | skyrl/train/config/config.py; ppo_utils.py, worker.py |

  `verl` and `trl` are tested against numbers from those systems' own functions (docs/parity.md).
  For the other six, the functions for advantages and KL, and those of nexrl, nemo and simply for
  the loss, were run once and agreed to 1e-6. Those numbers are not kept; the tests have the
  formulas. No whole program was run. `grpo`, `dr_grpo` and `dapo` follow the papers, not a program.
  We know of no clip range that DeepSeekMath states: 0.2 is PPO's.

  Not part of a recipe: limits that only act once training has failed (some cut log-ratios and KL
  estimates at +-10 or +-20; here log-ratios at +-20), corrections for the sampler, and means over
  microbatches instead of the batch (NexRL). TRL counts empty rows as responses, the others do not
  (`count_empty`); this matters only for means over responses.

  The papers do not say whether the variance divides by G or G - 1, nor what is added to a standard
  deviation of 0. Where they are silent, we use G - 1 and 1e-6, as most systems do.

  Args:
    name: one of the above.

  Returns:
    The recipe; the dicts are the caller's to change.

  Raises:
    ValueError: no such name; the message has the nearest one, and all.

  Reference: Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300; Liu et al., 2025,
    Dr. GRPO, https://arxiv.org/abs/2503.20783; Yu et al., 2025, DAPO,
    https://arxiv.org/abs/2503.14476
  """
  recipes = _recipes()
  if name in REFUSED:
    raise ValueError(f"name is {name!r}; it must be another: {REFUSED[name]}.")
  if name not in recipes:
    nearest = difflib.get_close_matches(str(name), recipes, n=1, cutoff=0.4)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"name is {name!r}; it must be one of {', '.join(recipes)}.{hint}")
  return recipes[name]


def _recipes() -> dict[str, Recipe]:
  return _of_papers(*_usual()) | _of_systems(*_usual())


def _usual() -> tuple[dict[str, Any], ...]:
  """What most recipes have; new dicts, since a recipe is the caller's to change."""
  advantage = {"name": "group_relative", "scale": "std", "ddof": 1, "eps": 1e-6}
  token_mean, sequence_mean = {"name": "token_mean"}, {"name": "sequence_mean"}
  clip = {"name": "grpo_loss", "clip_low": 0.2, "clip_high": 0.2}
  no_kl = {"coef": 0.0, "value": "k3", "gradient": "k3"}
  bonus = {"coef": 0.0}
  return advantage, token_mean, sequence_mean, clip, no_kl, bonus


def _of_papers(advantage, token_mean, sequence_mean, clip, no_kl, bonus) -> dict[str, Recipe]:
  return {
    "grpo": Recipe(advantage, sequence_mean, clip, no_kl | {"coef": 0.04}, bonus),
    "dr_grpo": Recipe(
      {"name": "group_relative", "scale": "none"}, {"name": "constant_length"}, clip, no_kl, bonus
    ),
    "dapo": Recipe(
      advantage,
      token_mean,
      clip | {"clip_high": 0.28},
      no_kl,
      bonus,
      groups="informative",
      overlong=0.2,  # 4,096 of 20,480 tokens
    ),
    "gspo": Recipe(
      advantage,
      sequence_mean,
      {"name": "gspo_loss", "clip_low": 3e-4, "clip_high": 4e-4},
      no_kl,
      bonus,
    ),
    "litepo": Recipe(advantage | {"scale": "batch"}, token_mean, clip, no_kl, bonus),
    "scalerl": Recipe(
      advantage | {"scale": "batch"},
      {"name": "prompt_mean"},
      {"name": "cispo_loss"},
      no_kl,
      bonus,
      groups="drop",
    ),
  }


def _of_systems(advantage, token_mean, sequence_mean, clip, no_kl, bonus) -> dict[str, Recipe]:
  raw = advantage | {"singleton": "raw"}
  return {
    "trl": Recipe(advantage | {"eps": 1e-4}, token_mean, clip, no_kl, bonus),
    "verl": Recipe(raw, token_mean, clip | {"dual_clip": 3.0}, no_kl, bonus),
    "nexrl": Recipe(raw, token_mean, clip, no_kl, {"coef": 1e-4}),
    "openrlhf": Recipe(
      advantage | {"eps": 1e-9},
      token_mean,
      clip,
      no_kl,
      bonus,
      reward_kl={"coef": 0.01, "value": "k1"},
    ),
    "nemo": Recipe(
      advantage | {"scale": "leave_one_out", "baseline": "leave_one_out"},
      token_mean,
      clip,
      {"coef": 0.01, "value": "k3", "gradient": "k2"},
      bonus,
    ),
    "tunix": Recipe(
      advantage, sequence_mean, clip, {"coef": 0.04, "value": "k1", "gradient": "k1"}, bonus
    ),
    "simply": Recipe(
      advantage | {"ddof": 0, "eps": 1e-5, "eps_rule": "max"},
      token_mean,
      clip,
      no_kl | {"coef": 0.001},
      bonus,
    ),
    "skyrl": Recipe(
      raw, token_mean, clip, no_kl | {"coef": 0.001, "weighting": "sequence_mean"}, bonus
    ),
  }
