"""Rewards: graders in isolated worker processes, with a deadline and a status per sample."""

from rl_llm.rewards.pool import RewardError, RewardPool, RewardResult, RewardSource, to_arrays

__all__ = ["RewardError", "RewardPool", "RewardResult", "RewardSource", "to_arrays"]
