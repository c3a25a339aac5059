"""The problems of a step or of an evaluation, and their prompts as token ids."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rl_llm.data.prompts import Overlong, PromptTooLong, limit_length
from rl_llm.parallel import hosts
from rl_llm.tasks import Problem, Task, check_held_out
from rl_llm.text.conversations import check_no_names, format_prompts, resolve_format
from rl_llm.text.messages import template_names
from rl_llm.text.tokenizers import Tokenizer
from rl_llm.text.turn_end import check_turn_end


class Drawn(NamedTuple):
  """Problems that fit the length limit, with their tokens, and how many were over it."""

  problems: list[Problem]
  prompts: list[list[int]]
  overlong: int


def encode_problems(
  problems: Sequence[Problem],
  tokenizer: Tokenizer,
  *,
  prompt_format: str,
  system_prompt: str | None = None,
  max_prompt_tokens: int,
  overlong: Overlong = "error",
) -> Drawn:
  """Formats and tokenizes prompts, and treats those that are too long as `overlong` says.

  Args:
    problems: what to ask; under "plain" a conversation becomes its messages' texts, a line each.
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
    for prompt in prompts:
      calls = isinstance(prompt, list) and any(m.get("tool_calls") for m in prompt)
      check_no_names({"tool_calls": True} if calls else {})
    prompts = [prompt_text(prompt) for prompt in prompts]
  layout = {"prompt_format": prompt_format, "system_prompt": system_prompt}
  names = [template_names(problem.columns) for problem in problems]
  encoded = format_prompts(prompts, tokenizer, names=names, **layout)
  limited, count = limit_length(encoded, limit=max_prompt_tokens, overlong=overlong)
  kept = [pair for pair in zip(problems, limited, strict=True) if pair[1] is not None]
  return Drawn([problem for problem, _ in kept], [prompt for _, prompt in kept], count)


def draw_problems(
  task: Task, seed: int, step: int, count: int, encode: Callable[[Sequence[Problem]], Drawn]
) -> Drawn:
  """The step's problems, a function of (seed, step) alone; dropped ones are replaced.

  Args:
    task: where problems come from.
    seed: of the run.
    step: of the run.
    count: P, how many problems to return.
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


def make_encode(
  tokenizer: Tokenizer, *, prompt_format: str = "auto", **settings: Any
) -> Callable[[Sequence[Problem]], Drawn]:
  """`encode_problems` for one model; "auto" uses the chat format if the model has a template.

  Args:
    tokenizer: the model's.
    prompt_format: "auto", "chat" or "plain".
    **settings: the other keywords of `encode_problems`.

  Raises:
    ChatTemplateError: under the model's chat template, no response would ever end.
  """
  prompt_format = resolve_format(prompt_format, tokenizer)
  if prompt_format == "chat" and tokenizer.chat_template:
    check_turn_end(tokenizer)
  return functools.partial(
    encode_problems, tokenizer=tokenizer, prompt_format=prompt_format, **settings
  )


def held_out_problems(
  task: Task, encode: Callable[[Sequence[Problem]], Drawn], *, limit: int = 0
) -> Drawn:
  """The task's held-out problems, or the first `limit` of them, encoded.

  Raises:
    TaskError: there are no held-out problems.
    PromptTooLong: none of them fits.
  """
  check_held_out(task, otherwise="--eval.every=0")
  drawn = encode(task.held_out[:limit] if limit else task.held_out)
  if drawn.overlong and not drawn.problems:
    raise PromptTooLong(
      f"all {drawn.overlong} held-out prompts are over --max_prompt_tokens; raise it, or choose "
      "--overlong_prompt=truncate_left"
    )
  return drawn


def assert_same_data(sequences: Iterable[Sequence[int]]) -> None:
  """Checks that all processes have the same data in the same order.

  Each process draws all of a step's rows from (seed, step) and gives its devices their part. If the
  order differed in another process, rewards would silently go to the wrong responses.

  Args:
    sequences: tokens of the first step, or of all that is trained on.

  Raises:
    HostsDiffer: they differ.
  """
  if hosts.count() > 1:
    digest = hashlib.sha256()
    for tokens in sequences:
      digest.update(np.asarray([len(tokens), *tokens], np.int64).tobytes())
    hosts.assert_equal("the data", {"the order of the data": digest.hexdigest()})


def prompt_text(prompt: str | list[dict[str, str]]) -> str:
  """A prompt for a person to read: the text, or the messages' texts, a line each.

  >>> prompt_text([{"role": "user", "content": "What is 7 + 5?"}])
  'What is 7 + 5?'
  """
  if isinstance(prompt, str):
    return prompt
  said = ([m.get("content"), *map(json.dumps, m.get("tool_calls") or ())] for m in prompt)
  return "\n".join(text for texts in said for text in texts if text is not None)
