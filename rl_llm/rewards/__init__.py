"""Rewards: graders in isolated worker processes, with a deadline and a status per sample.

A Python function given as `reward=` is the exception: it runs in the trainer's process.
"""

from rl_llm.rewards.calls import ISOLATION, RewardSource, completion_text, isolated
from rl_llm.rewards.in_process import InProcess
from rl_llm.rewards.layers import describe
from rl_llm.rewards.pool import RewardPool
from rl_llm.rewards.results import FAILED, RewardError, RewardResult, failure_share, to_arrays
from rl_llm.rewards.several import Several, Term, terms

__all__ = [
  "FAILED",
  "ISOLATION",
  "InProcess",
  "RewardError",
  "RewardPool",
  "RewardResult",
  "RewardSource",
  "Several",
  "Term",
  "completion_text",
  "describe",
  "failure_share",
  "isolated",
  "terms",
  "to_arrays",
]
