"""Settings, the values with which runs ordinarily learn, and what other values do to a run.

The table of `rl_llm.runs.verdicts_suspects`. A bound is a judgement from common practice, with room
to spare, and not a measured one: a value outside is suspected only where a run does badly, so what
is unusual and works costs nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# What a value does to a run: too little changes; too much does; or what is sampled, shown or graded
# is not what is to be learned.
STILL, WILD, BLIND = "still", "wild", "blind"
# Bounds are multiples of a setting's default.
DEFAULT = "default"


class Effect(NamedTuple):
  """What a value outside the ordinary ones does."""

  kind: str
  says: str  # continues "--setting=value, which"


class Ordinary(NamedTuple):
  """The values of a setting with which runs ordinarily learn, and what those outside do.

  Attributes:
    low, high: the bounds, both included.
    under, over: what values below and above do.
    of: what the bounds are multiples of: 1, `DEFAULT`, or another setting.
    off: whether 0 is no value, but turns the setting off.
  """

  low: float
  high: float
  under: Effect | None
  over: Effect | None
  of: str | int = 1
  off: bool = False


_NONE = math.inf
SMALL = Effect(STILL, "makes updates small")
LARGE = Effect(WILD, "makes updates large")
HELD = Effect(STILL, "holds the policy where it began")
FEW = Effect(STILL, "leaves a step so few responses that what they tell is noise")
ALIKE = Effect(BLIND, "leaves little to compare a response with")
COLD = Effect(BLIND, "makes all samples of a problem alike")
HOT = Effect(BLIND, "samples noise")
CUT = Effect(BLIND, "cuts what is read or written")
FORM = Effect(BLIND, "gives prompts another form")
ENDS = Effect(BLIND, "leaves a response no room to end")
FORGETS = Effect(WILD, "takes the weights apart")
CLIPS = Effect(STILL, "takes the gradient of nearly every token")
PASSES = Effect(WILD, "takes many updates of samples that the policy has left")
NO_CREDIT = Effect(STILL, "gives early tokens hardly any credit for the reward")
BONUS = Effect(WILD, "lets the entropy outweigh the reward")
CERTAIN = Effect(WILD, "lets the policy become certain too early")
PENALTY = Effect(BLIND, "lets length outweigh the grade")
LABELS = Effect(STILL, "takes so many labels for wrong that they say little")
LOOSE = Effect(WILD, "hardly holds the policy to its reference")
STEEP = Effect(STILL, "is steep, so that pairs soon have no gradient and the policy stays near")
ONE_SIDE = Effect(WILD, "lets one kind of answer outweigh the other")
OTHER_TERM = Effect(WILD, "lets another term of the loss outweigh it")
VALUES = Effect(WILD, "lets the value network lag behind or run away")
UNSEEN = Effect(BLIND, "leaves few problems to learn from")
DROPPED = Effect(STILL, "drops much of what was sampled")
FOLLOWS = Effect(WILD, "takes the reference along so soon that it holds nothing")
HARD = Effect(BLIND, "makes problems harder")
OFTEN = Effect(BLIND, "counts as right what the grader pays less for")
NEVER = Effect(BLIND, "counts nothing as right that the grader does not pay so much for")
STALE = Effect(WILD, "makes updates follow gradients long past")

ORDINARY = {
  "optimizer.learning_rate": Ordinary(0.2, 4, SMALL, LARGE, DEFAULT),
  "optimizer.warmup_steps": Ordinary(0, 0.4, None, SMALL, "steps"),
  "optimizer.b1": Ordinary(0, 0.98, None, STALE),
  "optimizer.b2": Ordinary(0.5, 0.9999, LARGE, STALE),
  "optimizer.eps": Ordinary(0, 1e-5, None, SMALL),
  "optimizer.weight_decay": Ordinary(0, 0.2, None, FORGETS),
  "optimizer.max_grad_norm": Ordinary(1e-2, _NONE, SMALL, None, off=True),
  "optimizer.spike_sigma": Ordinary(2, _NONE, DROPPED, None),
  "lora.rank": Ordinary(0, 512, None, LARGE),
  "lora.alpha": Ordinary(2, 512, SMALL, LARGE),
  "sampling.temperature": Ordinary(0.6, 1.5, COLD, HOT),
  "sampling.top_k": Ordinary(4, _NONE, COLD, None, off=True),
  "sampling.top_p": Ordinary(0.8, 1, COLD, None),
  "sampling.min_new_tokens": Ordinary(0, 0.5, None, ENDS, "max_new_tokens"),
  "max_tokens": Ordinary(0.9, _NONE, CUT, None, DEFAULT),
  "max_prompt_tokens": Ordinary(0.9, _NONE, CUT, None, DEFAULT),
  "max_new_tokens": Ordinary(0.75, _NONE, CUT, None, DEFAULT),
  "episode_tokens": Ordinary(0.25, _NONE, CUT, None, DEFAULT),
  "max_turns": Ordinary(2, _NONE, CUT, None),
  "prompts_per_step": Ordinary(0.15, _NONE, FEW, None, DEFAULT),
  "pairs_per_step": Ordinary(0.15, _NONE, FEW, None, DEFAULT),
  "examples_per_step": Ordinary(0.15, _NONE, FEW, None, DEFAULT),
  "responses_per_prompt": Ordinary(3, _NONE, ALIKE, None),
  "epochs": Ordinary(1, 8, None, PASSES),
  "minibatches": Ordinary(1, 16, None, PASSES),
  "target_kl": Ordinary(1e-3, _NONE, HELD, None, off=True),
  "positive_nll_coef": Ordinary(0, 0.5, None, OTHER_TERM),
  "correction.low": Ordinary(0, 0.9, None, DROPPED),
  "correction.high": Ordinary(1, _NONE, DROPPED, None),
  "correction.off_policy_mask": Ordinary(1e-3, _NONE, DROPPED, None),
  "correction.second_moment_mask": Ordinary(1e-4, _NONE, DROPPED, None),
  "correction.trust_region_mask": Ordinary(1e-2, _NONE, DROPPED, None),
  "llds.coef": Ordinary(0, 1, None, OTHER_TERM),
  "entropy.final": Ordinary(0, 0.3, None, BONUS),
  "entropy.target": Ordinary(0, 1.5, None, BONUS),
  "entropy.low": Ordinary(0, 0.3, None, BONUS),
  "weighting.length": Ordinary(0.5, 2, LARGE, SMALL, "max_new_tokens", off=True),
  "weighting.top_entropy": Ordinary(0.1, 1, DROPPED, None),
  "advantage.eps": Ordinary(0, 0.1, None, SMALL),
  "advantage.decay": Ordinary(0.5, 0.99, None, STALE),
  "advantage.discount": Ordinary(0.9, 1, NO_CREDIT, None),
  "advantage.gae_lambda": Ordinary(0.5, 1, NO_CREDIT, None),
  "advantage.alpha": Ordinary(0, 1, None, NO_CREDIT),
  "loss.clip_low": Ordinary(1e-2, _NONE, CLIPS, None),
  "loss.clip_high": Ordinary(1e-2, _NONE, CLIPS, None),
  "loss.high": Ordinary(0.5, _NONE, SMALL, None),
  "loss.ratio_cap": Ordinary(0.5, _NONE, SMALL, None),
  "loss.entropy_coef": Ordinary(0.1, 10, CERTAIN, BONUS, DEFAULT),
  "loss.label_smoothing": Ordinary(0, 0.25, None, LABELS),
  "loss.beta": Ordinary(0.02, 3, LOOSE, STEEP),
  "loss.alpha": Ordinary(0, 100, None, OTHER_TERM, DEFAULT),
  "loss.temperature": Ordinary(0.2, 5, LARGE, SMALL, DEFAULT),
  "loss.gamma": Ordinary(0, 3, None, OTHER_TERM),
  "loss.nll_coef": Ordinary(0, 3, None, OTHER_TERM),
  "loss.sft_coef": Ordinary(0, 3, None, OTHER_TERM),
  "loss.tail_weight": Ordinary(0.1, 1, DROPPED, None),
  "loss.desirable_weight": Ordinary(0.3, 3, ONE_SIDE, ONE_SIDE),
  "loss.undesirable_weight": Ordinary(0.3, 3, ONE_SIDE, ONE_SIDE),
  "loss.mixture": Ordinary(0, 0.95, None, HELD),
  "loss.discount": Ordinary(0.5, 1, NO_CREDIT, None),
  "loss.max_drop": Ordinary(1e-2, _NONE, DROPPED, None),
  "loss.sampler_coef": Ordinary(0, 1, None, OTHER_TERM),
  "preference_scale": Ordinary(0.5, _NONE, SMALL, None),
  "kl.coef": Ordinary(0, 0.1, None, HELD),
  "kl.target": Ordinary(1e-2, _NONE, HELD, None),
  "overlong.cache": Ordinary(0, 0.75, None, PENALTY, "max_new_tokens"),
  "overlong.limit": Ordinary(0.5, _NONE, PENALTY, None, "max_new_tokens", off=True),
  "overlong.coef": Ordinary(0, 2, None, PENALTY),
  "value.learning_rate": Ordinary(0.1, 8, VALUES, VALUES, DEFAULT),
  "value.coef": Ordinary(0.05, 10, VALUES, VALUES, DEFAULT),
  "value.clip": Ordinary(1e-2, _NONE, VALUES, None),
  "center_coef": Ordinary(0, 0.3, None, HELD),
  "kl.refresh": Ordinary(5, _NONE, FOLLOWS, None, off=True),
  "reference.refresh": Ordinary(5, _NONE, FOLLOWS, None, off=True),
  "arithmetic.operand_max": Ordinary(0.5, 2, UNSEEN, HARD, DEFAULT),
  "arithmetic.held_out": Ordinary(0, 2.5, None, UNSEEN, DEFAULT),
  "copy.min_length": Ordinary(0, 1.9, None, HARD, DEFAULT),
  "copy.max_length": Ordinary(0, 1.9, None, HARD, DEFAULT),
  "copy.held_out": Ordinary(0, 2.5, None, UNSEEN, DEFAULT),
  "reasoning_gym.held_out": Ordinary(0, 2.5, None, UNSEEN, DEFAULT),
  "jsonl.max_reward": Ordinary(0.9, 1.1, OFTEN, NEVER, DEFAULT),
  "held_out_fraction": Ordinary(0, 0.5, None, UNSEEN),
  "jsonl.held_out_fraction": Ordinary(0, 0.5, None, UNSEEN),
  "gsm8k.held_out_fraction": Ordinary(0, 0.5, None, UNSEEN),
}
SWITCHED = {
  ("optimizer.name", "sgd"): SMALL,
  ("advantage.name", "plain"): Effect(WILD, "compares a reward with nothing"),
  ("advantage.whiten", False): LARGE,
  ("weighting.name", "sequence_sum"): LARGE,
  ("weighting", "sequence_sum"): LARGE,
  ("loss", "dft_loss"): Effect(STILL, "hardly counts an answer that is unlikely as yet"),
  ("weighting.truncated", "zero"): DROPPED,
  ("weighting.truncated", "drop"): DROPPED,
  ("weighting.drop_truncated", True): DROPPED,
  ("overlong", "truncate_left"): CUT,
  ("overlong", "truncate_right"): CUT,
  ("overlong", "drop"): CUT,
  ("overlong_prompt", "truncate_left"): CUT,
  ("overlong_prompt", "drop"): CUT,
  ("prompt_format", "plain"): FORM,
  ("prompt_format", "chat"): FORM,
  ("kl.gradient", "k1"): Effect(WILD, "has no gradient on average"),
  ("own_share", 0.0): Effect(BLIND, "never lets the student write"),
}
