"""Which figures a report has: their curves, and what to look for in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rl_llm.runs.speed import MFU_MEANS


class Plot(NamedTuple):
  """What one figure shows, and what to look for in it."""

  title: str
  unit: str
  curves: tuple[tuple[str, str], ...]  # (key of metrics.jsonl, name in the legend)
  caption: str
  low: float | None = None  # the axis reaches at least this far down
  high: float | None = None


PLOTS = (
  Plot(
    "Held-out accuracy",
    "fraction right",
    (
      ("eval/sampled_accuracy", "sampled"),
      ("eval/greedy_accuracy", "greedy"),
      ("eval/pair_accuracy", "pairs"),
    ),
    "The curve that counts, on problems that training never draws: a reward that rises while it"
    " stays flat means that the model learns the grader's weaknesses.",
    0.0,
    1.0,
  ),
  Plot(
    "Reward",
    "mean of the batch",
    (("reward_mean", "reward"), ("accuracy", "fraction right")),
    "The batch of each step, so look through the noise for the trend: flat from the start, the "
    "model never finds a right answer to learn from.",
  ),
  Plot(
    "The same responses, graded",
    "mean grade",
    (("grade_mean", "grade"),),
    "A reward model gave the reward, and the task's own grader, which nobody trained on, gave this:"
    " where the reward keeps rising and this does not, the policy has found what the reward model"
    " overlooks.",
  ),
  Plot(
    "Held-out loss",
    "nats",
    (
      ("eval/token_loss", "per token"),
      ("eval/pair_loss", "per pair"),
      ("eval/answer_loss", "per answer"),
    ),
    "On examples that training never sees: once it rises while the training loss falls, the model"
    " learns its examples by heart.",
  ),
  Plot(
    "Pairs told apart",
    "fraction",
    (("pair_accuracy", "of the batch"),),
    "How often the better answer has the higher reward, implicit or modelled: the share that the"
    " model would have ranked as the labels do.",
    0.0,
    1.0,
  ),
  Plot(
    "Wanted and unwanted answers told apart",
    "fraction",
    (("eval/label_auc", "held out"),),
    "Of a wanted and an unwanted answer, how often the wanted one has the larger reward: 0.5 is"
    " what a coin would get.",
    0.0,
    1.0,
  ),
  Plot(
    "Divergence from the teacher",
    "nats per token",
    (("eval/reverse_kl", "student from teacher"), ("eval/forward_kl", "teacher from student")),
    "Along the student's own answers to held-out problems: towards 0 the student writes as its"
    " teacher would.",
    0.0,
  ),
  Plot(
    "Log-probs of held-out answers",
    "nats per answer",
    (
      ("eval/chosen_logprobs", "chosen"),
      ("eval/rejected_logprobs", "rejected"),
      ("eval/desirable_logprobs", "wanted"),
      ("eval/undesirable_logprobs", "unwanted"),
    ),
    "The gap is all that most preference losses see, so both may fall; where the chosen answers"
    " fall far, the model comes to prefer answers that are in no pair.",
  ),
  Plot(
    "Rewards of the two answers",
    "reward",
    (
      ("chosen_reward", "chosen"),
      ("rejected_reward", "rejected"),
      ("margin", "margin"),
      ("desirable_reward", "wanted"),
      ("undesirable_reward", "unwanted"),
    ),
    "Implicit (beta times the log-ratio to the reference) or modelled: the margin should rise, and"
    " the chosen answers' own reward tells how.",
  ),
  Plot(
    "Response length",
    "tokens",
    (("response_length_mean", "mean"),),
    "Length that climbs without accuracy is padding that the loss rewards, and length that falls "
    "to nothing is a grader that pays for silence.",
    0.0,
  ),
  Plot(
    "Turns and calls",
    "per episode",
    (
      ("episode/turns", "turns"),
      ("episode/tool_calls", "calls"),
      ("episode/malformed", "malformed calls"),
      ("episode/tool_errors", "tool errors"),
    ),
    "Calls that rise without accuracy are a reward for calling, and calls that fall to none a tool"
    " that does not pay. Malformed ones should go first: until a call can be read, no answer of the"
    " environment teaches anything.",
    0.0,
  ),
  Plot(
    "Entropy",
    "nats per token",
    (("entropy", "entropy"),),
    "How undecided the model is: some fall is what learning looks like, but at 0 all samples of a"
    " problem are the same and learning stops, while a steep rise is a policy that falls apart.",
    0.0,
  ),
  Plot(
    "KL to the reference",
    "nats",
    (("kl_ref", "KL"),),
    "How far the model has moved from where it began: a steady climb is the price of learning, a "
    "jump is an update that was too large.",
    0.0,
  ),
  Plot(
    "Price of the KL",
    "reward per nat",
    (("kl_coef", "coefficient"),),
    "What a nat away from the reference costs: the controller raises it while the KL is over its "
    "target and lowers it while it is under.",
    0.0,
  ),
  Plot(
    "KL of one step's updates",
    "nats",
    (("approx_kl", "KL"),),
    "How far one batch's updates move the policy from the one that sampled it: above about 0.1 "
    "the batch no longer describes the policy.",
  ),
  Plot(
    "Explained variance of the value network",
    "fraction",
    (("explained_variance", "explained"),),
    "How much of the difference between returns was foreseen: 0 is no better than one number for "
    "all, and below 0 its baseline adds noise. Where all returns are equal there is nothing to "
    "explain, and no value.",
    high=1.0,
  ),
  Plot(
    "Gradient norm",
    "before clipping",
    (("grad_norm", "norm"),),
    "Spikes are batches that pull hard, and a norm that grows step by step announces divergence.",
    0.0,
  ),
  Plot(
    "Sampler-trainer log-prob gap",
    "nats",
    (("logprob_gap_mean", "mean"),),
    "Sampler and trainer should compute the same log-probs up to rounding, so a gap that grows "
    "means that the model learns from another distribution than the sampled one.",
    0.0,
  ),
  Plot(
    "Groups with no spread, responses cut short",
    "fraction",
    (("frac_zero_std", "groups with no spread"), ("truncated_fraction", "cut at the limit")),
    "A group whose rewards are all equal teaches nothing (near 1, the problems are too easy or "
    "too hard), and a response cut at the length limit never came to its answer.",
    0.0,
    1.0,
  ),
  Plot(
    "Clipped tokens",
    "fraction",
    (
      ("clip_low_fraction", "below"),
      ("clip_high_fraction", "above"),
      ("value_clip_fraction", "values"),
    ),
    "Tokens whose update the loss cut off: none where each batch is used once, and above about "
    "0.2 the steps are too large or too many.",
    0.0,
  ),
  Plot(
    "Reward failures",
    "rewards per step",
    (
      ("rewards_raised", "raised"),
      ("rewards_timed_out", "timed out"),
      ("rewards_not_applicable", "not applicable"),
      ("rewards_unreadable", "unreadable"),
    ),
    "Responses without a reward, which are left out of the update rather than counted as 0: those"
    " that raised or timed out are faults of the grader and should stay at 0. Unreadable ones are"
    " wrong answers in a form that the grader does not know.",
    0.0,
  ),
  Plot(
    "Loss",
    "dimensionless",
    (("loss", "loss"),),
    "Of sampled responses it is no measure of progress: advantages average to about zero, so it"
    " hovers around 0 however well a policy learns. Of given answers and pairs it should fall.",
  ),
  Plot(
    "Learning rate",
    "per update",
    (("learning_rate", "learning rate"),),
    "The schedule as it was applied.",
    0.0,
  ),
  Plot(
    "Tokens a second",
    "tokens per second",
    (
      ("speed/generated_tokens_per_second", "generated, in the rollout"),
      ("speed/trained_tokens_per_second", "trained, in the update"),
    ),
    "A rollout slows down where responses differ in length and the short ones wait for the longest;"
    " steps that compile are slow too.",
    0.0,
  ),
  Plot(
    "MFU of the update",
    "fraction of the peak",
    (("speed/mfu", "MFU"),),
    f"MFU is {MFU_MEANS}. What is missing to 1 is waiting, moving data, and work on padding.",
    0.0,
  ),
)


def several_rewards(rows: Sequence[Mapping[str, Any]]) -> tuple[Plot, ...]:
  """The figure of several rewards, each by its name; () where a run has one.

  >>> several_rewards([{"reward_mean": 1.2, "reward_right": 1.0, "reward_short": 1.0}])[0].curves
  (('reward_right', 'right'), ('reward_short', 'short'))

  Args:
    rows: of metrics.jsonl.
  """
  names = {key.removeprefix("reward_") for row in rows for key in row if key.startswith("reward_")}
  curves = tuple((f"reward_{name}", name) for name in sorted(names - {"mean", "best"}))
  said = (
    "Each reward for itself, before its weight: one that rises while another falls is bought at "
    "its price, and the weights decide whether that is worth it."
  )
  return (Plot("Each of several rewards", "mean of the batch", curves, said),) if curves else ()
