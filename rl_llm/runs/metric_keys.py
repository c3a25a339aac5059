"""What every key of metrics.jsonl means: the source of docs/metrics.md, checked against real runs.

A name such as `frac_zero_std` says little to whoever did not write it. Each entry says which
quantity it is, in which unit, and over what it is averaged.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Key(NamedTuple):
  """One key, or all keys of one form.

  Attributes:
    name: the key; `<word>` stands for any text without a slash.
    unit: of the value; "" if it has none.
    meaning: what it is.
  """

  name: str
  unit: str
  meaning: str


KEYS: dict[str, tuple[Key, ...]] = {
  "Every step": (
    Key("step", "", "Number of the step, from 0. The last line of a run only evaluates."),
    Key(
      "loss",
      "nats",
      "What was minimised, mean over the step's updates. Of sampled responses it hovers around "
      "0, however well a policy learns.",
    ),
    Key(
      "grad_norm",
      "",
      "Norm of the whole gradient before it is clipped, mean over the step's updates.",
    ),
    Key("learning_rate", "", "Of the step's updates, by the schedule."),
    Key(
      "updates_skipped",
      "updates",
      "How many were skipped since the run began, because their gradient was not finite.",
    ),
    Key(
      "spike_skipped",
      "fraction",
      "With --optimizer.spike_window: updates of this step skipped because their gradient was far "
      "larger than those before.",
    ),
  ),
  "Responses": (
    Key("reward_mean", "reward", "Mean over the responses that have a reward: what is trained on."),
    Key("reward_<name>", "reward", "Mean of one of several rewards, before its weight."),
    Key(
      "accuracy",
      "fraction",
      "Responses whose grade is at least the task's greatest reward. Where a reward model "
      "trains, the task's own grader says so.",
    ),
    Key(
      "grade_mean",
      "reward",
      "Mean of the task's own grades, where a reward model gives the reward.",
    ),
    Key(
      "entropy",
      "nats per token",
      "Entropy of the sampling distribution, mean over response tokens; in SFT, of the policy "
      "at the tokens that it imitates. Near 0 all samples of a problem are the same.",
    ),
    Key("response_length_mean", "tokens", "Mean length of a response."),
    Key("truncated_fraction", "fraction", "Responses cut off at --max_new_tokens."),
    Key(
      "overlong_prompts",
      "prompts",
      "Prompts longer than --max_prompt_tokens, which were dropped or cut.",
    ),
    Key(
      "frac_zero_std",
      "fraction",
      "Groups, of those with a reward, whose responses are all worth the same: they teach nothing.",
    ),
    Key(
      "logprob_gap_mean",
      "nats",
      "Absolute difference of the trainer's and the sampler's log-probs, mean over response "
      "tokens. With one update a step it is rounding.",
    ),
    Key(
      "baseline",
      "reward",
      "What REINFORCE takes off each reward; in KTO, beta times the log-ratio that answers are "
      "compared with.",
    ),
  ),
  "Episodes (--env)": (
    Key("episode/turns", "turns", "Turns of the model, mean over episodes."),
    Key(
      "episode/tool_calls",
      "calls",
      "Calls of tools in an episode, malformed ones included, mean over episodes.",
    ),
    Key(
      "episode/malformed",
      "calls",
      "Calls in an episode that could not be made: no such tool, or not in the form of a call.",
    ),
    Key(
      "episode/tool_errors",
      "calls",
      "Calls in an episode whose tool raised, exceeded its deadline or died.",
    ),
    Key(
      "episode/environment_tokens",
      "tokens",
      "What the environment said in an episode: read by the model, and never trained on.",
    ),
    Key(
      "speed/environment_seconds",
      "seconds",
      "What the tools of all episodes took, summed; many run at once.",
    ),
  ),
  "Grades": (
    Key("rewards_ok", "responses", "Graded."),
    Key("overlong_penalty", "reward", "What --overlong.cache adds to a reward, mean."),
    Key(
      "greedy_reward_mean",
      "reward",
      "Mean reward of the greedy responses that ReMax compares with.",
    ),
    Key("dropped_groups", "fraction", "Groups without spread, with --dynamic.groups=drop."),
    Key(
      "refill/rounds", "rounds", "How often the step sampled, with --dynamic.groups=informative."
    ),
    Key("refill/lacked", "groups", "Groups that differ in reward, missing after the last round."),
    Key("refill/tokens_beyond", "tokens", "Sampled in groups that were not trained on."),
    Key("speed/refill_seconds", "seconds", "Time that the rounds after the first took."),
    Key(
      "rewards_not_applicable", "responses", "The grader had no opinion (None); they count nowhere."
    ),
    Key(
      "rewards_raised",
      "responses",
      "The grader raised an exception; not trained on, like the next three.",
    ),
    Key("rewards_timed_out", "responses", "The grader took longer than --reward_deadline."),
    Key("rewards_died", "responses", "The grader's process ended."),
    Key("rewards_invalid", "responses", "The grader returned something else than a finite number."),
    Key(
      "rewards_unreadable",
      "responses",
      "A grader of this library could not read them: wrong answers, which rewards_ok includes.",
    ),
    Key(
      "timed_out_fraction",
      "fraction",
      "Responses whose grade timed out, of those on which there could be an opinion.",
    ),
    Key(
      "reward/<name>",
      "",
      "Mean over responses of a value that the reward function passed to log_metric.",
    ),
  ),
  "Losses on responses": (
    Key(
      "approx_kl",
      "nats per token",
      "The k3 estimate of the KL between the policy that sampled and the one being trained, "
      "mean over response tokens. It is 0 where each batch is used once.",
    ),
    Key(
      "ratio",
      "",
      "Probability of a token now over that when it was sampled, mean over response tokens.",
    ),
    Key(
      "sequence_ratio", "", "The same of whole responses, as the sequence-level losses define it."
    ),
    Key(
      "clip_low_fraction",
      "fraction",
      "Tokens without a gradient because their ratio is below the clip range.",
    ),
    Key("clip_high_fraction", "fraction", "The same above the range."),
    Key(
      "logprob",
      "nats",
      "Log-prob of the sampled tokens under the policy, mean over response tokens.",
    ),
    Key("log_ratio_size", "nats", "Absolute log-ratio, mean over response tokens."),
    Key("selected_fraction", "fraction", "Tokens that a covariance loss selects."),
    Key("phi", "", "VESPO's factor, mean over response tokens."),
    Key(
      "target_gap",
      "fraction",
      "How far a response's share of its group is from TPO's target, mean over responses.",
    ),
    Key("implicit_reward", "reward", "A*-PO's beta times the log-ratio, mean over responses."),
    Key("residual", "reward", "How far that is from the advantage, mean over responses."),
    Key(
      "opponent_reward_mean",
      "reward",
      "Mean reward of the opponent's responses to the same problems.",
    ),
    Key("own_texts", "fraction", "Texts of the step that the student itself wrote."),
    Key("kl_ref", "nats per token", "KL to the reference model, by the estimator --kl.value."),
    Key("kl_coef", "reward per nat", "Price of the KL, which a controller may change."),
    Key(
      "factor_mean",
      "",
      "What the surrogate's weights are multiplied by, mean over response tokens (--correction, "
      "--weighting.top_entropy and the like).",
    ),
    Key(
      "off_policy_fraction", "fraction", "Response tokens that --correction.off_policy_mask drops."
    ),
    Key(
      "kl_old",
      "nats per token",
      "KL of the policy before the step's updates to the policy in them, with --target_kl.",
    ),
    Key("entropy_coef", "", "Coefficient of the entropy bonus, where a controller sets it."),
    Key("clip_high", "", "Upper clip of the ratio, above 1, where a controller sets it."),
  ),
  "The value network (PPO)": (
    Key(
      "explained_variance",
      "fraction",
      "Part of the returns' variance that the values predict: 0 is no better than one number "
      "for all. None where all returns are equal.",
    ),
    Key("values_mean", "reward", "What the network predicts, mean over response tokens."),
    Key("returns_mean", "reward", "What it is to predict, mean over response tokens."),
    Key("value_loss", "reward squared", "Its loss, mean over the step's updates."),
    Key("value_error", "reward squared", "Squared error of the values, mean over response tokens."),
    Key(
      "value_clip_fraction",
      "fraction",
      "Tokens at which the clipped value has the larger error, which then counts.",
    ),
    Key("value_learning_rate", "", "Of its updates."),
    Key("value_grad_norm", "", "Norm of its gradient before it is clipped."),
    Key("value_updates_skipped", "updates", "As updates_skipped, of this network."),
    Key("value_spike_skipped", "fraction", "As spike_skipped, of this network."),
  ),
  "Examples and pairs": (
    Key("nll", "nats per token", "Negative log-likelihood of the given answers' tokens."),
    Key("probability", "fraction", "Of the given answers' tokens, as DFT weights them."),
    Key(
      "chosen_nll",
      "nats per token",
      "The same of the chosen answers of pairs, where --loss.sft_coef trains on it.",
    ),
    Key("examples", "examples", "Examples in the step."),
    Key(
      "pairs",
      "pairs",
      "Pairs in the step: of sampled responses, the problems whose best and worst response "
      "differ in reward.",
    ),
    Key("trained_tokens", "tokens", "Tokens that the loss sums over."),
    Key("padding_fraction", "fraction", "Positions of the batch that hold no token."),
    Key(
      "pair_accuracy",
      "fraction",
      "Pairs in which the chosen answer has the higher reward, implicit or modelled.",
    ),
    Key(
      "chosen_reward",
      "reward",
      "Mean reward of the chosen answers: implicit (from log-probs) or the reward model's.",
    ),
    Key("rejected_reward", "reward", "The same of the rejected answers."),
    Key("margin", "reward", "Mean of chosen minus rejected reward."),
    Key("chosen_logprobs", "nats", "Mean log-prob of a whole chosen answer."),
    Key("rejected_logprobs", "nats", "Mean log-prob of a whole rejected answer."),
    Key("chosen_length", "tokens", "Mean length of the chosen answers."),
    Key("rejected_length", "tokens", "Mean length of the rejected answers."),
    Key("desirable_reward", "reward", "Mean implicit reward of answers whose label is true."),
    Key("undesirable_reward", "reward", "The same of those whose label is false."),
    Key("desirable_logprobs", "nats", "Mean log-prob of a whole answer whose label is true."),
    Key("undesirable_logprobs", "nats", "The same of those whose label is false."),
    Key("desirable_fraction", "fraction", "Answers of the step whose label is true."),
    Key("shift", "reward", "BCO's reward shift, its running mean over the steps."),
    Key("log_odds_ratio", "nats", "ORPO's log of the ratio of the two answers' odds."),
    Key(
      "data_broken",
      "rows",
      "Rows of the data that cannot be used, dropped with --data_errors=drop.",
    ),
    Key("data_rows", "sequences", "Examples or pairs of the data; of a task's, those held out."),
    Key("data_overlong", "sequences", "Sequences longer than --max_tokens."),
    Key("data_dropped", "sequences", "Those of them that were dropped."),
  ),
  "Evaluation on held-out problems and pairs": (
    Key(
      "eval/<how>_accuracy",
      "fraction",
      'Right responses, "sampled" at temperature 1 or "greedy"; of pairs ("pair"), those '
      "in which the chosen answer has the higher reward.",
    ),
    Key("eval/<how>_low", "fraction", "Lower end of its 95 % interval."),
    Key("eval/<how>_high", "fraction", "Upper end of its 95 % interval."),
    Key(
      "eval/failed_grades",
      "responses",
      "The grader raised, timed out, died or returned no number; they count as not right.",
    ),
    Key("eval/no_opinion", "responses", "The grader returned None; they count in no figure."),
    Key(
      "eval/unreadable",
      "responses",
      "A grader of this library could not read them; they count as not right.",
    ),
    Key("eval/timed_out_fraction", "fraction", "Responses whose grade timed out."),
    Key("eval/token_loss", "nats per token", "Negative log-likelihood of held-out answers."),
    Key("eval/pair_loss", "nats", "The preference or reward model's loss on held-out pairs."),
    Key("eval/answer_loss", "nats", "The loss on held-out answers with labels."),
    Key(
      "eval/label_auc",
      "fraction",
      "Of a held-out answer that is wanted and one that is not, how often the first has the larger "
      "reward; a tie counts half.",
    ),
    Key("eval/desirable_reward", "reward", "As desirable_reward, held out."),
    Key("eval/undesirable_reward", "reward", "As undesirable_reward, held out."),
    Key("eval/desirable_logprobs", "nats", "As desirable_logprobs, held out."),
    Key("eval/undesirable_logprobs", "nats", "As undesirable_logprobs, held out."),
    Key(
      "eval/reverse_kl",
      "nats per token",
      "KL of the student from its teacher, over all tokens of the vocabulary, along the student's "
      "own responses to held-out problems.",
    ),
    Key("eval/forward_kl", "nats per token", "KL of the teacher from the student, there."),
    Key("eval/margin", "reward", "As margin, held out."),
    Key("eval/chosen_reward", "reward", "As chosen_reward, held out."),
    Key("eval/rejected_reward", "reward", "As rejected_reward, held out."),
    Key("eval/chosen_logprobs", "nats", "Mean log-prob of a whole chosen answer."),
    Key("eval/rejected_logprobs", "nats", "Mean log-prob of a whole rejected answer."),
    Key(
      "eval/calibration_error",
      "fraction",
      "Distance between how sure a reward model is of its preferences and how often they are "
      "right.",
    ),
    Key("eval/<how>_mean", "fraction", "In a population: the mean accuracy over its members."),
    Key("eval/<how>_best", "fraction", "In a population: the highest accuracy of a member."),
  ),
  "Time and speed": (
    Key("time/step", "seconds", "The whole step."),
    Key(
      "time/<phase>",
      "seconds",
      "A phase of it: rollout, reward, logprobs, update, eval or checkpoint. Phases may overlap.",
    ),
    Key(
      "speed/generated_tokens_per_second",
      "tokens per second",
      "Tokens of responses, over the time of the rollout.",
    ),
    Key(
      "speed/rollout_flops_per_second",
      "FLOP per second",
      "One forward pass over prompts and responses, over the time of the rollout.",
    ),
    Key(
      "speed/trained_tokens_per_second",
      "tokens per second",
      "Tokens that the losses sum over, over the time of the update.",
    ),
    Key(
      "speed/update_flops_per_second",
      "FLOP per second",
      "Forward and backward passes over these tokens, over the time of the update.",
    ),
    Key("speed/mfu", "fraction", "MFU: speed/update_flops_per_second over speed/peak_flops."),
    Key("speed/peak_flops", "FLOP per second", "The most that all devices do together."),
    Key(
      "speed/peak_measured",
      "true or false",
      "Whether that was measured at the start, since no maker states it.",
    ),
    Key("speed/compile_seconds", "seconds", "Part of time/step spent compiling."),
  ),
  "Populations": (
    Key("failure", "", "Why a member stopped, if it did."),
    Key("members", "members", "Members that still train."),
    Key("reward_best", "reward", "The highest mean reward of a member."),
  ),
  "Losses of other kinds": (
    Key("kl", "nats", "KL of the policy to the reference, as the loss estimates it."),
    Key("preference", "fraction", "Mean probability that an answer beats the opponent's."),
    Key("reference_logprob", "nats", "Mean log-prob that the reference gives to an answer."),
    Key("divergence", "nats", "Distillation's divergence from the teacher, per token."),
    Key("reverse_kl", "nats", "KL from the student to the teacher at the student's own tokens."),
    Key(
      "dropped_fraction",
      "fraction",
      "Tokens that distillation drops, the student having left where it sampled.",
    ),
    Key(
      "lost_likelihood",
      "nats",
      "Likelihood that right answers lost, per token, which LLDS gives back.",
    ),
    Key("gate_open", "fraction", "Units worth keeping whose gate is open in LLDS."),
    Key(
      "log_ratio_positive",
      "nats",
      "Log-ratio of the tokens of responses with an advantage above 0.",
    ),
    Key("log_ratio_negative", "nats", "The same below 0."),
    Key(
      "logprob_positive", "nats", "Log-prob of the tokens of responses with an advantage above 0."
    ),
    Key("positive_nll", "nats", "Negative log-likelihood of right answers, per token."),
  ),
}


def explained(key: str) -> Key | None:
  """The entry of a key, an exact one before one of its form; None if there is none.

  >>> explained("eval/greedy_low").name, explained("time/step").name, explained("rewrad_mean")
  ('eval/<how>_low', 'time/step', None)
  """
  entries = [entry for section in KEYS.values() for entry in section]
  for entry in sorted(entries, key=lambda entry: "<" in entry.name):
    pattern = re.sub("<[a-z]+>", "[^/]+", entry.name)
    if re.fullmatch(pattern, key):
      return entry
  return None
