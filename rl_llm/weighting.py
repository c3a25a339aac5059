"""How much each token counts: every aggregation of a loss, as an array of weights.

Every loss here is `sum(per_token * weights)`. What other code calls a loss mode (token mean,
sequence mean, Dr. GRPO) and what it calls a correction (truncated importance sampling, IcePop,
top-entropy masks) are then the same thing: numbers in a [B, T] array. Weights (first half of this
file) turn the sum into a mean; factors (second half) multiply the weights.

A common misconception is that each microbatch may have its own weights, since each is "a mean". For
ragged rows, the mean of means is not the mean. Two rows, one of 3 tokens with loss 1 and one of 1
token with loss 0, have the token mean 3/4; the mean of the rows' own means is 1/2:

>>> mask = jnp.array([[True, True, True], [True, False, False]])
>>> loss = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
>>> float(jnp.sum(loss * token_mean(mask)))
0.75
>>> float(jnp.mean(jnp.array([jnp.sum(loss[i] * token_mean(mask[i:i+1])[0]) for i in (0, 1)])))
0.5

So make the weights once, for the whole batch of one optimiser step, and split them along with the
tokens. The gradients of the microbatches then add up to the gradient of the whole batch.

In other words, the mask says which tokens belong to a response, and the weights say how much they
count. A factor of 0 changes the weights, never the membership.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import (
  LOG_RATIO_LIMIT,
  Array,
  any_mesh,
  at_least_float32,
  check_above,
  check_between,
  check_choice,
  check_mask,
  check_members,
  check_same_shape,
  is_number,
)


def token_mean(mask) -> Array:
  """Weights for the mean over all tokens of the batch; long responses count more (DAPO).

      weights[b, t] = mask[b, t] / sum(mask)

  Three tokens in two responses count 1/3 each, so the response of two tokens counts 2/3:

  >>> token_mean(jnp.array([[True, True], [True, False]])).tolist()
  [[0.3333333432674408, 0.3333333432674408], [0.3333333432674408, 0.0]]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.

  Returns:
    [B, T] float32, summing to 1; all 0 if the mask is empty.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Reference: Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476
  """
  check_members(mask)
  return _float(mask) / _float(jnp.maximum(jnp.sum(mask), 1))


def sequence_mean(mask, *, count_empty=False) -> Array:
  """Weights for the mean over responses of their token means; each counts the same (GRPO).

      weights[b, t] = mask[b, t] / (n_b * B)        n_b = sum_t mask[b, t]

  The response of two tokens and the response of one both count 1/2:

  >>> sequence_mean(jnp.array([[True, True], [True, False]])).tolist()
  [[0.25, 0.25], [0.5, 0.0]]

  A row without tokens is not a response: by default it is left out of the count, so adding one
  changes nothing. With `count_empty=True` it counts in B (TRL does so, verl, OpenRLHF and Tunix do
  not):

  >>> float(sequence_mean(jnp.array([[True, True], [False, False]])).sum())
  1.0
  >>> float(sequence_mean(jnp.array([[True, True], [False, False]]), count_empty=True).sum())
  0.5

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    count_empty: whether rows without tokens count in B.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Reference: Shao et al., 2024, DeepSeekMath, https://arxiv.org/abs/2402.03300
  """
  return sequence_sum(mask, count_empty=count_empty) / jnp.maximum(_lengths(mask), 1)


def sequence_sum(mask, *, count_empty=False) -> Array:
  """Weights for the mean over responses of each one's sum over tokens.

      weights[b, t] = mask[b, t] / B

  A response's log-prob is the sum of its tokens' log-probs, so this is the textbook policy
  gradient: nothing is divided by a length that the policy itself chooses.

  >>> sequence_sum(jnp.array([[True, True], [True, False]])).tolist()
  [[0.5, 0.5], [0.5, 0.0]]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    count_empty: whether rows without tokens count in B, see `sequence_mean`.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: `mask` is not a bool array of two axes.
  """
  check_members(mask)
  rows = mask.shape[0] if count_empty else jnp.maximum(jnp.sum(jnp.any(mask, axis=1)), 1)
  return _float(mask) / _float(rows)


def constant_length(mask, *, length, count_empty=False) -> Array:
  """Weights for the sum over tokens divided by the same length for every response (Dr. GRPO).

      weights[b, t] = mask[b, t] / (length * B)

  Dividing each response by its own length makes a wrong answer cheaper the longer it gets: the same
  push is spread over more tokens. One constant for all responses avoids that and keeps the scale of
  a token mean:

  >>> constant_length(jnp.array([[True, True], [True, False]]), length=4).tolist()
  [[0.125, 0.125], [0.125, 0.0]]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    length: a constant of the run, such as the maximum number of new tokens; > 0. Not the padded
      width, which changes with the batch.
    count_empty: whether rows without tokens count in B, see `sequence_mean`.

  Returns:
    [B, T] float32.

  Raises:
    ValueError: `mask` is not a bool array of two axes, or `length` is not above 0.

  Reference: Liu et al., 2025, Understanding R1-Zero-Like Training, https://arxiv.org/abs/2503.20783
  """
  check_above("length", length, 0)
  return sequence_sum(mask, count_empty=count_empty) / length


@any_mesh
def prompt_mean(mask, *, group_size) -> Array:
  """Weights for the mean over prompts of the token mean among each prompt's responses.

      weights[b, t] = mask[b, t] / (tokens of the group of b * P)

  Each prompt counts the same, however long its answers are; within a prompt, long answers count
  more. Two groups of two responses, one group with three tokens and one with one:

  >>> mask = jnp.array([[True, True], [True, False], [True, False], [False, False]])
  >>> [round(float(w), 3) for w in prompt_mean(mask, group_size=2).sum(axis=1)]
  [0.333, 0.167, 0.5, 0.0]

  Args:
    mask: [B, T] bool, the tokens the policy produced; rows are `b = p * group_size + g`.
    group_size: G, responses per prompt.

  Returns:
    [B, T] float32, summing to 1; prompts without any token are left out of the count P.

  Raises:
    ValueError: `mask` is not a bool array of two axes, or B is not a multiple of `group_size`.
  """
  check_members(mask)
  if group_size < 1 or mask.shape[0] % group_size:
    raise ValueError(
      f"group_size is {group_size}; it must divide the number of rows of mask, {mask.shape[0]}."
    )
  groups = mask.shape[0] // group_size, group_size
  tokens = jnp.sum(jnp.reshape(jnp.sum(mask, axis=1), groups), axis=1)
  prompts = jnp.maximum(jnp.sum(tokens > 0), 1)
  per_row = jnp.repeat(jnp.maximum(tokens, 1) * prompts, group_size)
  return _float(mask) / _float(per_row)[:, None]


def length_power(mask, *, power) -> Array:
  """Weights between the mean over responses and the mean over tokens (LBPO).

      weights[b, t] = mask[b, t] * n_b^(power - 1) / sum_j n_j^power        n_b = sum_t mask[b, t]

  The total weight of a response of n tokens is proportional to n^power. Power 0 is `sequence_mean`,
  1 is `token_mean`. Responses of 4 tokens and of 1 token weigh 4 to 1 at power 1, 1 to 1 at power
  0, and 2 to 1 at power 1/2:

  >>> weights = length_power(jnp.arange(4) < jnp.array([[4], [1]]), power=0.5)
  >>> [round(float(w), 3) for w in weights.sum(axis=1)]
  [0.667, 0.333]

  Args:
    mask: [B, T] bool, the tokens the policy produced, of the whole batch of one optimiser step.
    power: usually between 0 and 1.

  Returns:
    [B, T] float32, summing to 1; all 0 if the mask is empty. Rows without tokens are left out.

  Raises:
    ValueError: `mask` is not a bool array of two axes.

  Reference: as "LBPO" in NexRL, https://github.com/nex-agi/NexRL
  """
  check_members(mask)
  lengths = _lengths(mask)
  safe = jnp.maximum(lengths, 1)
  total = jnp.sum(jnp.where(lengths > 0, safe**power, 0))
  return jnp.where(mask, safe ** (power - 1) / jnp.where(total > 0, total, 1), 0)


def truncated_importance(
  old_logprobs, sampler_logprobs, mask, *, level="token", low=0.0, high=2.0, mode="truncate"
) -> Array:
  """Factors that correct for a sampler whose probabilities differ from the trainer's (TIS, IcePop).

  Two programs, or two precisions, give the same token different probabilities. The policy gradient
  is then an average over the wrong distribution. Importance weights correct it, but their variance
  is unbounded, so they are limited:

      w     = exp(old_logprobs - sampler_logprobs)        level "token"
      w     = exp(sum_t mask * log-ratio)                 level "sequence"
      w     = exp(sum_t mask * log-ratio / n)             level "geometric"
      factor = clip(w, low, high)                         mode "truncate": TIS is low 0, high 2
      factor = w if low <= w <= high else 0               mode "mask": IcePop is low 0.5, high 5
      factor = 1 if low <= w <= high else 0               mode "reject": keeps or drops, unweighted

  A token that is three times as likely under the trainer as under the sampler counts twice, or not
  at all:

  >>> old, sampler = jnp.log(jnp.array([[0.6, 0.3]])), jnp.log(jnp.array([[0.2, 0.3]]))
  >>> mask = jnp.array([[True, True]])
  >>> truncated_importance(old, sampler, mask).tolist()
  [[2.0, 1.0]]
  >>> truncated_importance(old, sampler, mask, low=0.5, high=2.0, mode="mask").tolist()
  [[0.0, 1.0]]

  Factors multiply. For example, judge each response as a whole by its geometric mean, whose bounds
  do not depend on its length, and weight its tokens one by one ("seq-mask-tis"):

  >>> whole = truncated_importance(
  ...   old, sampler, mask, level="geometric", mode="reject", low=0.5, high=2.0)
  >>> [round(float(w), 3) for w in (whole * truncated_importance(old, sampler, mask, high=1e6))[0]]
  [3.0, 1.0]

  Conventions: TIS caps at 2 per token in Tunix, verl, SkyRL and slime, where verl's default is the
  level "sequence"; TRL masks sequences with `high` 3; IcePop's limits are 0.5 and 5; rejection by
  geometric mean is 0.999 to 1.001 in verl. Some state bounds on -log w ("k1"), which mirrors them:
  `low` 1 / hi and `high` 1 / lo here.

  Args:
    old_logprobs: [B, T] float, the trainer's log-probs before this batch's updates, in nats; a
      constant.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    level: "token", or "sequence" and "geometric", which give one factor to all tokens of a row.
    low: the lower limit, >= 0.
    high: the upper limit, above `low`.
    mode: what happens outside the limits, as above.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask. Ratios are limited to
    exp(20).

  Raises:
    ValueError: shapes differ, or `level` or `mode` is none of the above.

  Reference: Yao et al., 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training, https://fengyao.notion.site/off-policy-rl; Ling Team, 2025, Every Step Evolves
    (IcePop), https://arxiv.org/abs/2510.18855
  """
  check_choice("level", level, ("token", "sequence", "geometric"))
  check_choice("mode", mode, ("truncate", "mask", "reject"))
  check_between("low", low, 0, float("inf"))
  if is_number(low):
    check_above("high", high, low)
  check_members(mask)
  check_same_shape("old_logprobs", old_logprobs, "mask", mask)
  check_same_shape("sampler_logprobs", sampler_logprobs, "mask", mask)
  log_ratio = _masked_difference(old_logprobs, sampler_logprobs, mask)
  if level == "sequence":
    log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
  elif level == "geometric":
    log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(_lengths(mask), 1)
  ratio = jnp.exp(jnp.minimum(log_ratio, LOG_RATIO_LIMIT))
  outside = (ratio < low) | (ratio > high)  # False for a nan, which stays.
  if mode == "truncate":
    factors = jnp.clip(ratio, low, high)
  elif mode == "mask":
    factors = jnp.where(outside, 0, ratio)
  else:
    factors = jnp.where(outside, 0, jnp.where(jnp.isnan(ratio), ratio, 1))
  return jax.lax.stop_gradient(jnp.where(mask, factors, 0))


def drop_truncated(mask, truncated) -> Array:
  """Factors that silence responses cut off at the length limit (DAPO's overlong filter).

  A response that hit the limit was never finished; scoring it as wrong punishes sound reasoning for
  its length.

  >>> drop_truncated(jnp.array([[True, True], [True, True]]), jnp.array([True, False])).tolist()
  [[0.0, 0.0], [1.0, 1.0]]

  Factors leave the dropped tokens in the denominator that the weights were made with. To count as
  if the response had never been sampled, drop it from the mask before making the weights:
  `token_mean(mask & ~truncated[:, None])`.

  Args:
    mask: [B, T] bool, the tokens the policy produced.
    truncated: [B] bool, from the sampler's stop reason.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask.

  Raises:
    ValueError: an argument is not bool, or `truncated` has not one entry per row.

  Reference: Yu et al., 2025, DAPO, https://arxiv.org/abs/2503.14476
  """
  check_members(mask)
  check_mask("truncated", truncated)
  _check_rows("truncated", truncated, mask)
  return (mask & ~jnp.asarray(truncated)[:, None]).astype(jnp.float32)


@any_mesh
def top_entropy(entropies, mask, *, fraction) -> Array:
  """Factors that keep the tokens at which the policy was least sure (the 80/20 rule).

      factor = 1 where entropy >= the (1 - fraction) quantile over all masked tokens, else 0

  Most tokens of a chain of thought follow from the one before. The few forks decide the answer and
  have the highest entropy. The top half of four tokens:

  >>> entropies = jnp.array([[0.1, 2.0, 0.3, 1.0]])
  >>> top_entropy(entropies, jnp.ones((1, 4), bool), fraction=0.5).tolist()
  [[0.0, 1.0, 0.0, 1.0]]

  The quantile is one number for the batch: compute it before the batch is split. Dropped tokens
  stay in the denominator of the weights. Tokens tied with the quantile are all kept.

  Args:
    entropies: [B, T] float, in nats; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    fraction: the share of tokens to keep, between 0 and 1.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask. An entropy of nan within it
    makes them all nan: there is no quantile.

  Raises:
    ValueError: shapes differ, or `fraction` is outside [0, 1].

  Reference: Wang et al., 2025, Beyond the 80/20 Rule, https://arxiv.org/abs/2506.01939
  """
  check_between("fraction", fraction, 0, 1)
  check_members(mask)
  check_same_shape("entropies", entropies, "mask", mask)
  if not mask.size:
    return jnp.zeros(mask.shape)
  entropies = jax.lax.stop_gradient(at_least_float32(entropies))
  kept = _float(entropies >= _masked_quantile(entropies, mask, 1 - fraction))
  lost = jnp.any(mask & jnp.isnan(entropies))
  return jnp.where(mask, jnp.where(lost, jnp.nan, kept), 0)


def off_policy_mask(logprobs, sampler_logprobs, advantages, mask, *, threshold) -> Array:
  """Factors that drop bad responses the policy has already moved away from (DeepSeek-V3.2).

      factor = 0 where advantage < 0 and mean_t(sampler_logprobs - logprobs) > threshold, else 1

  The mean estimates KL(sampler || policy) on that response. A wrong answer that the policy would
  hardly give any more teaches little, and pushing it down further moves its probability to
  arbitrary places. A good answer is kept, however old. Both rows have fallen from 0.5 to 0.1, by
  log 5 = 1.61, which is above the limit, but only the first one was bad:

  >>> sampler, now = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.1], [0.1]]))
  >>> advantages, mask = jnp.array([-1.0, 1.0]), jnp.ones((2, 1), bool)
  >>> off_policy_mask(now, sampler, advantages, mask, threshold=1.0).tolist()
  [[0.0], [1.0]]

  Args:
    logprobs: [B, T] float, of the policy being trained, in nats; a constant here.
    sampler_logprobs: [B, T] float, what the sampler reported, in nats; a constant.
    advantages: [B] float; a constant.
    mask: [B, T] bool, the tokens the policy produced.
    threshold: the mean log-ratio in nats above which a bad response is dropped.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask.

  Raises:
    ValueError: shapes differ.

  Reference: DeepSeek-AI, 2025, DeepSeek-V3.2, https://arxiv.org/abs/2512.02556
  """
  check_members(mask)
  check_same_shape("logprobs", logprobs, "mask", mask)
  check_same_shape("sampler_logprobs", sampler_logprobs, "mask", mask)
  _check_rows("advantages", advantages, mask)
  moved = jnp.sum(_masked_difference(sampler_logprobs, logprobs, mask), axis=1, keepdims=True)
  moved = moved / jnp.maximum(_lengths(mask), 1)
  dropped = (jnp.asarray(advantages)[:, None] < 0) & (moved > threshold)
  return jax.lax.stop_gradient((mask & ~dropped).astype(jnp.float32))


def _check_rows(name, x, mask):
  if jnp.shape(x) != jnp.shape(mask)[:1]:
    raise ValueError(f"{name} has shape {jnp.shape(x)}; it must be [B] = {jnp.shape(mask)[:1]}.")


def _float(x):
  return jnp.asarray(x, jnp.float32)


def _lengths(mask):
  return _float(jnp.sum(mask, axis=1, keepdims=True))


def _masked_quantile(x, mask, q):
  """The q quantile of the masked-in values of x, interpolated as `jnp.quantile` does.

  All other values are sorted to the end. Setting them to nan for `jnp.nanquantile` to skip would
  trip `jax_debug_nans`, and a nan among the masked-in values would be skipped too.
  """
  ordered = jnp.sort(jnp.where(mask, x, jnp.finfo(x.dtype).max), axis=None)
  last = jnp.maximum(jnp.sum(mask) - 1, 0)
  place = jnp.asarray(q, ordered.dtype) * last.astype(ordered.dtype)
  low, high = jnp.floor(place), jnp.ceil(place)
  low_value, high_value = (ordered[jnp.minimum(i.astype(int), last)] for i in (low, high))
  share = place - low
  return low_value * (1 - share) + high_value * share


def _masked_difference(a, b, mask):
  """a - b in float32, 0 outside the mask, where either may be infinite."""
  difference = _float(a) - _float(b)
  return jnp.where(mask, difference, 0)
