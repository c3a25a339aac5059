"""From rewards to advantages: how much better each response, or token, was than expected.

Advantages are statistics of the whole batch: compute them before it is split into microbatches or
over devices. They enter a loss as constants.

Tokens outside the mask (padding, or a tool's output in the row) are *skipped*: they receive 0, and
recursions over time treat the tokens on both sides as neighbours.
"""

from rl_llm.advantages.baselines import optimal_advantage
from rl_llm.advantages.group import (
  gdpo,
  gpg,
  group_relative,
  informative_groups,
  leave_one_out,
  maxrl,
  opo,
  pass_at_k,
  remax,
)
from rl_llm.advantages.token import (
  discounted_returns,
  gae,
  length_adaptive_lambda,
  optimal_token_baseline,
  overlong_penalty,
  reinforce_plus_plus,
  reinforce_plus_plus_baseline,
  token_rewards,
)
from rl_llm.advantages.trackers import role_baseline, track_values

__all__ = [
  "discounted_returns",
  "gae",
  "gdpo",
  "gpg",
  "group_relative",
  "informative_groups",
  "leave_one_out",
  "length_adaptive_lambda",
  "maxrl",
  "opo",
  "optimal_advantage",
  "optimal_token_baseline",
  "overlong_penalty",
  "pass_at_k",
  "reinforce_plus_plus",
  "reinforce_plus_plus_baseline",
  "remax",
  "role_baseline",
  "token_rewards",
  "track_values",
]
