"""The host's side of a step: problems to token arrays, sampled tokens to texts and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rl_llm.data.prompts import Overlong, PromptTooLong, bucket, limit_length
from rl_llm.rewards import RewardPool, RewardResult, to_arrays
from rl_llm.rollout import STOP_EOS, Rollout
from rl_llm.tasks import Problem, Task
from rl_llm.tokenizers import Tokenizer, format_prompts


class Drawn(NamedTuple):
  """Problems that fit, with their tokens, and how many were over the length limit."""

  problems: list[Problem]
  prompts: list[list[int]]
  overlong: int


class Scores(NamedTuple):
  """What the grader said of P * G responses; a failed grade is masked out, never a zero."""

  rewards: np.ndarray  # [P, G] float32, 0 where there is none
  ok: np.ndarray  # [P, G] bool, True where there is a reward
  counts: dict[str, int]  # how many of each status
  results: list[RewardResult]  # [P * G]


def encode_problems(
  problems: Sequence[Problem],
  tokenizer: Tokenizer,
  *,
  prompt_format: str,
  system_prompt: str | None = None,
  max_prompt_tokens: int,
  overlong: Overlong = "error",
) -> Drawn:
  """Lays prompts out and tokenizes them; applies the policy for those that are too long.

  Args:
    problems: what to ask; under "plain" a conversation is its messages' texts, a line each.
    tokenizer: the model's.
    prompt_format: "chat" or "plain", as for `format_prompts`.
    system_prompt: as for `format_prompts`.
    max_prompt_tokens: the limit.
    overlong: "error", "drop" or "truncate_left".

  Raises:
    PromptTooLong: a prompt is over the limit and `overlong` is "error".
    TokenizerError: the prompts do not fit the format.
  """
  prompts = [problem.prompt for problem in problems]
  if prompt_format == "plain":
    prompts = [prompt_text(prompt) for prompt in prompts]
  encoded = format_prompts(
    prompts, tokenizer, prompt_format=prompt_format, system_prompt=system_prompt
  )
  limited, count = limit_length(encoded, limit=max_prompt_tokens, overlong=overlong)
  kept = [pair for pair in zip(problems, limited, strict=True) if pair[1] is not None]
  return Drawn([problem for problem, _ in kept], [prompt for _, prompt in kept], count)


def draw_problems(
  task: Task, seed: int, step: int, count: int, encode: Callable[[Sequence[Problem]], Drawn]
) -> Drawn:
  """The step's problems, a function of (seed, step) alone; dropped ones are made up for.

  Args:
    task: where problems come from.
    seed: of the run.
    step: of the run.
    count: P, how many problems must fit.
    encode: `encode_problems` with its settings.

  Raises:
    PromptTooLong: hardly any problem fits.
  """
  for drawn in (count, 4 * count, 64 * count):
    problems, prompts, overlong = encode(task.sample(seed, step, drawn))
    if len(problems) >= count:
      return Drawn(problems[:count], prompts[:count], overlong)
  raise PromptTooLong(
    f"{overlong} of {drawn} prompts are over --max_prompt_tokens, so no {count} could be found; "
    "raise it, or choose --overlong_prompt=truncate_left"
  )


def trim(rollout: Rollout) -> Rollout:
  """Brings a rollout to the host, without the columns that no response reached.

  Columns are kept up to a bucket, so that an update compiles for few widths and does not pay for
  the longest response allowed when all were short.
  """
  rollout = Rollout(*(np.asarray(x) for x in jax.device_get(rollout)))
  width = min(bucket(int(rollout.lengths.max())), rollout.tokens.shape[1])
  return rollout._replace(
    tokens=rollout.tokens[:, :width],
    mask=rollout.mask[:, :width],
    sampler_logprobs=rollout.sampler_logprobs[:, :width],
    entropies=rollout.entropies[:, :width],
  )


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
  """The responses as text, without special tokens; lengths come from the sampler."""
  return [
    tokenizer.decode(tokens[:length].tolist())
    for tokens, length in zip(rollout.tokens, rollout.lengths, strict=True)
  ]


def score(
  pool: RewardPool, problems: Sequence[Problem], texts: Sequence[str], *, group_size: int
) -> Scores:
  """Grades P * G responses, row p * G + g answering problem p.

  Args:
    pool: the grader's workers.
    problems: P problems.
    texts: P * G responses.
    group_size: G.
  """
  repeated = [problem for problem in problems for _ in range(group_size)]
  results = pool.score(
    [problem.prompt for problem in repeated], texts, [problem.columns for problem in repeated]
  )
  rewards, ok, counts = to_arrays(results)
  shape = (len(problems), group_size)
  return Scores(rewards.reshape(shape), ok.reshape(shape), counts, results)


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
  """A prompt as a person reads it: the text, or the messages' texts, a line each.

  >>> prompt_text([{"role": "user", "content": "What is 7 + 5?"}])
  'What is 7 + 5?'
  """
  if isinstance(prompt, str):
    return prompt
  return "\n".join(message["content"] for message in prompt)


def sample_rows(
  problems: Sequence[Problem],
  texts: Sequence[str],
  rollout: Rollout,
  scores: Scores,
  *,
  split: str,
  max_reward: float,
  advantages: np.ndarray | None = None,
) -> list[dict[str, Any]]:
  """One dict a response, as samples.jsonl holds them: what the model wrote and what came of it.

  Args:
    problems: P problems.
    texts: P * G responses.
    rollout: their tokens.
    scores: their grades.
    split: "train" or "eval".
    max_reward: a response with at least this reward is correct.
    advantages: [P, G], or None where there are none.
  """
  group_size = len(texts) // len(problems)
  rows = []
  for index, (text, result) in enumerate(zip(texts, scores.results, strict=True)):
    problem, (p, g) = problems[index // group_size], divmod(index, group_size)
    row = {
      "split": split,
      "problem": problem.key,
      "prompt": prompt_text(problem.prompt),
      "response": text,
      "reward": result.value,
      "status": result.status,
      "advantage": None if advantages is None else float(advantages[p, g]),
      "stop_reason": "eos" if rollout.stop_reason[index] == STOP_EOS else "length",
      "length": int(rollout.lengths[index]),
      "correct": result.value is not None and result.value >= max_reward,
    }
    if result.detail:
      row["detail"] = result.detail
    rows.append(row)
  return rows
