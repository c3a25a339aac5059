"""Rewards from a reward model, in the place of the task's grades."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from rl_llm.data.prompts import PromptBatch
from rl_llm.errors import ConfigError
from rl_llm.parallel.sharding import shard
from rl_llm.rewards import RewardError, terms
from rl_llm.rollout.generation import Rollout
from rl_llm.rollout.reward_model import load_reward_model, score_responses
from rl_llm.rollout.scoring import ResponseBatch
from rl_llm.runs.finite import cause_in
from rl_llm.runs.functions import Function
from rl_llm.text.tokenizers import Tokenizer, vocabulary

# (prompts, rollout) -> rewards [B]
Judge = Callable[[PromptBatch, Rollout], np.ndarray]


def make_judge(
  reward: str, tokenizer: Tokenizer, *, rows_per_batch: int, mesh: jax.sharding.Mesh | None = None
) -> Judge | None:
  """The source of the rewards that are trained on: a reward model, or None for the task's grader.

  The grader still grades every response: only a comparison of both figures shows a policy that
  exploits what its reward model overlooks.

  Args:
    reward: "task", or "model:" and a directory for `rl_llm.rollout.reward_model.load_reward_model`;
      a function is the grader itself, as `rl_llm.tasks.load_task` has it.
    tokenizer: the policy's.
    rows_per_batch: responses scored at once on the devices, at least those to one prompt.
    mesh: the devices to lay the reward model over; None: the first device.

  Returns:
    (prompts, rollout) -> rewards [B], or None. The function raises a `RewardError` for rewards that
    are not finite.

  Raises:
    ConfigError: `reward` is neither form, or the reward model's token ids differ from the policy's.
    WeightsError: there is no such directory, or no reward model in it.
    TokenizerError: its tokenizer cannot be used.
  """
  kind, _, directory = reward.partition(":")
  if reward == "task" or isinstance(reward, Function) or ".py:" in reward or terms(reward):
    return None
  if kind != "model" or not directory:
    raise ConfigError(
      "reward", reward, "task, FILE.py:function, or model:DIR with a reward model in DIR"
    )
  model = load_reward_model(directory)
  params = model.params if mesh is None else shard(model.params, mesh)
  if vocabulary(model.tokenizer) != vocabulary(tokenizer):
    raise ConfigError(
      "reward",
      reward,
      "a reward model over the policy's vocabulary, since it reads the ids that the policy samples",
      "train one from the same --model",
    )

  rows = model.policy.config.vocab_size

  def judge(prompts: PromptBatch, rollout: Rollout) -> np.ndarray:
    largest = int(np.max(rollout.tokens, where=rollout.mask, initial=0))
    if largest >= rows:  # The policy's embedding may be larger than its tokenizer.
      raise RewardError(
        f"the policy sampled id {largest}, and the embedding of {directory} has {rows} rows (ids 0 "
        f"to {rows - 1}); train a reward model from the same --model"
      )
    rewards = score_responses(
      params,
      ResponseBatch(*prompts, rollout.tokens, rollout.mask, rollout.mask),
      policy=model.policy,
      rows_per_batch=rows_per_batch,
      mesh=mesh,
    )
    bad = np.count_nonzero(~np.isfinite(rewards))
    if bad:
      raise RewardError(
        f"{bad} of {rewards.size} rewards of {directory} are not finite: {cause_in(params)}"
      )
    return rewards

  return judge
