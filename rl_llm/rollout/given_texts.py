"""Texts that nobody grades, as responses: what a distilled student is shown, and measured on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rl_llm.data.encoding import encode
from rl_llm.data.prompts import bucket, pad_prompts
from rl_llm.rollout.collect import Sampler, step_keys
from rl_llm.rollout.demonstrations import demonstrations
from rl_llm.rollout.drawing import draw_problems
from rl_llm.rollout.generation import checked, trim
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.scoring import ResponseBatch

HELD_OUT = 2**32 - 2  # Stands where a step's number does in the keys of samples.


def answer_batch(
  sampler: Sampler, seed: int, step: int, *, prompts: int, longest: int
) -> ResponseBatch:
  """The right answers to the problems of a step, as if they had been sampled: one to each.

  Args:
    sampler: its task, encoding and tokenizer are used.
    seed, step: of the run: the problems are those that it would sample responses to.
    prompts: P.
    longest: tokens that a response may have; answers are cut there.

  Returns:
    On the host, with tokens and masks alone: P rows.

  Raises:
    TaskError: a problem has no answer.
  """
  drawn = draw_problems(sampler.task, seed, step, prompts, sampler.encode)
  how = {name: sampler.encode.keywords[name] for name in ("prompt_format", "system_prompt")}
  encoded = functools.partial(encode, tokenizer=sampler.tokenizer, **how)
  shown = demonstrations(drawn.problems, prompt_format=how["prompt_format"])
  rows = [answer.tokens[answer.prompt_length :][:longest] for answer in map(encoded, shown)]
  lengths = np.array([len(row) for row in rows])
  tokens = np.full((prompts, bucket(int(lengths.max()))), sampler.tokenizer.pad_id, np.int32)
  for row, own in zip(tokens, rows, strict=True):
    row[: len(own)] = own
  mask = np.arange(tokens.shape[1]) < lengths[:, None]
  asked = pad_prompts(drawn.prompts, pad_id=sampler.tokenizer.pad_id)
  return ResponseBatch(asked.tokens, asked.lengths, tokens, mask, mask)


def sampled_batch(
  sampler: Sampler,
  params: Any,
  prompts: Sequence[Sequence[int]],
  seed: int,
  *,
  responses: int,
  sampling: SamplingConfig,
) -> ResponseBatch:
  """Responses of a model that no step trains on: the same keys whenever it is called.

  Args:
    sampler: what to sample with.
    params: the model's weights.
    prompts: P token lists.
    seed: of the run.
    responses: G, to each prompt.
    sampling: its temperature is a number.

  Returns:
    On the host, with tokens and masks alone: P * G rows.
  """
  asked = pad_prompts(prompts, pad_id=sampler.tokenizer.pad_id)
  keys = step_keys(seed, HELD_OUT, len(prompts), responses)
  sampling = sampling.per_row(len(keys))
  rollout = trim(checked(sampler.generate(params, asked, keys, sampling, responses), params))
  return ResponseBatch(asked.tokens, asked.lengths, rollout.tokens, rollout.mask, rollout.mask)
