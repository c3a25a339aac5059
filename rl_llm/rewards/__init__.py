"""Rewards: graders in isolated worker processes, with a deadline and a status per sample."""

from rl_llm.rewards.calls import ISOLATION, RewardSource, completion_text, isolated
from rl_llm.rewards.in_process import InProcess
from rl_llm.rewards.layers import describe
from rl_llm.rewards.pool import RewardPool
from rl_llm.rewards.results import FAILED, RewardError, RewardResult, failure_share, to_arrays

__all__ = [
  "FAILED",
  "ISOLATION",
  "InProcess",
  "RewardError",
  "RewardPool",
  "RewardResult",
  "RewardSource",
  "completion_text",
  "describe",
  "failure_share",
  "isolated",
  "to_arrays",
]
