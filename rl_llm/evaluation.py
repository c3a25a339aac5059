"""Accuracy on held-out problems: greedy and at temperature 1, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.data.prompts import PromptBatch, pad_prompts
from rl_llm.experience import Drawn, response_texts, sample_rows, score, trim
from rl_llm.metrics import proportion_interval
from rl_llm.rewards import RewardPool
from rl_llm.rollout import Rollout, row_keys
from rl_llm.sampling import SamplingConfig
from rl_llm.tokenizers import Tokenizer

# (params, prompts, keys, sampling, responses_per_prompt) -> Rollout
Generate = Callable[[Any, PromptBatch, jax.Array, SamplingConfig, int], Rollout]


class Evaluation(NamedTuple):
  """What `evaluate` found."""

  metrics: dict[str, float]  # "eval/sampled_accuracy", "eval/greedy_low", ...
  rows: list[dict[str, Any]]  # the greedy response to each problem, for samples.jsonl


def evaluate(
  params: Any,
  drawn: Drawn,
  *,
  generate: Generate,
  pool: RewardPool,
  tokenizer: Tokenizer,
  samples: int,
  prompts_per_batch: int,
  max_reward: float,
  check: Callable[[], None] = lambda: None,
) -> Evaluation:
  """Answers every problem once greedily and `samples` times at temperature 1, and grades it all.

  Both kinds share one compiled program: the temperature is an argument, and it may differ by row.
  The random keys are the same at every call, so that two evaluations differ by the weights alone.
  A response whose grade failed counts as not correct; `eval/failed_grades` says how many did.

  Args:
    params: the weights to evaluate.
    drawn: the held-out problems, encoded.
    generate: samples responses.
    pool: the grader's workers.
    tokenizer: to read the responses with.
    samples: sampled responses a problem, >= 1.
    prompts_per_batch: problems a rollout.
    max_reward: a response with at least this reward is correct.
    check: called between batches; raises to stop.

  Returns:
    An `Evaluation`; accuracies come with 95 % intervals from `proportion_interval`.
  """
  group = samples + 1
  temperature = jnp.tile(jnp.array([0.0] + [1.0] * samples), prompts_per_batch)
  batches, failed = [], 0
  rows: list[dict[str, Any]] = []
  for start in range(0, len(drawn.problems), prompts_per_batch):
    check()
    problems = drawn.problems[start : start + prompts_per_batch]
    prompts = drawn.prompts[start : start + prompts_per_batch]
    missing = prompts_per_batch - len(problems)  # The last batch is filled up: one shape for all.
    batch = pad_prompts(prompts + prompts[:1] * missing, pad_id=tokenizer.pad_id)
    keys = row_keys(jax.random.fold_in(jax.random.key(0), start), prompts_per_batch, group)
    rollout = trim(generate(params, batch, keys, SamplingConfig(temperature), group))
    rollout = Rollout(*(x[: len(problems) * group] for x in rollout))
    texts = response_texts(rollout, tokenizer)
    scores = score(pool, problems, texts, group_size=group)
    batch_rows = sample_rows(problems, texts, rollout, scores, split="eval", max_reward=max_reward)
    batches.append(np.array([row["correct"] for row in batch_rows]).reshape(-1, group))
    failed += sum(row["reward"] is None for row in batch_rows)
    rows.extend(batch_rows[::group])
  correct = np.concatenate(batches)
  metrics = {"eval/failed_grades": failed}
  for name, columns in (("greedy", correct[:, :1]), ("sampled", correct[:, 1:])):
    mean, low, high = proportion_interval(columns.sum(axis=1), columns.shape[1])
    metrics |= {f"eval/{name}_accuracy": mean, f"eval/{name}_low": low, f"eval/{name}_high": high}
  return Evaluation(metrics, rows)


def first_problems(problems: Sequence[Any], limit: int) -> list[Any]:
  """The first `limit` problems; 0 means all."""
  return list(problems[:limit] if limit else problems)
