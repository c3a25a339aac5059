"""Rewards: graders in isolated worker processes, with a deadline and a status per sample."""

from rl_llm.rewards.calls import RewardSource, completion_text, isolated
from rl_llm.rewards.pool import RewardPool
from rl_llm.rewards.results import RewardError, RewardResult, to_arrays

__all__ = [
  "RewardError",
  "RewardPool",
  "RewardResult",
  "RewardSource",
  "completion_text",
  "isolated",
  "to_arrays",
]
