"""Talks to a model in the terminal; its answer appears as it is sampled.

  python -m experiments.chat                                              SmolLM2-135M-Instruct
  python -m experiments.chat --model=runs/grpo-smollm2-arithmetic-seed0   what a run has trained
  python -m experiments.chat --model=RUN@20 --temperature=0               at step 20, greedily

A model with a chat template reads the whole conversation, as its template lays it out; one without
reads each line alone. /new begins another conversation. Ctrl-C ends an answer, Ctrl-D the program.
The tiny model of a `copy` run answers prompts of that task, such as abc>. Where the input is no
terminal, it is a line a turn, and answers are all that is printed.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from experiments import flags, setup
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.streaming import stream
from rl_llm.runs import compile_cache
from rl_llm.runs import config as configs
from rl_llm.runs.config import option
from rl_llm.text.conversations import format_prompts, resolve_format


@dataclasses.dataclass(frozen=True)
class Seeded:
  """What the answers are a function of, besides the conversation."""

  seed: int = option(0, "random seed; also of the tiny model's weights", min=0)


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Which model, and how it answers."""

  run: Seeded = configs.inline(Seeded())
  model: flags.Weights = configs.inline(flags.Weights())
  layout: flags.Layout = configs.inline(flags.Layout())
  max_new_tokens: int = option(256, "limit of an answer's length", min=1)
  temperature: float = option(0.7, "sampling temperature; 0 = greedy", min=0)
  top_k: int = option(0, "keep the k likeliest tokens, 0 = all", min=0)
  top_p: float = option(1.0, "keep the likeliest tokens that reach p", above=0, max=1)


# (messages so far, number of the turn) -> the answer, piece by piece
Answer = Callable[[list[dict[str, str]], int], Iterator[str]]


def open_model(config: Config, say: Callable[[str], None]) -> Answer:
  """The function that answers, with the model's weights in it."""
  run = types.SimpleNamespace(console=types.SimpleNamespace(say=say))
  policy, params, tokenizer = setup.load_language_model(config, run, None)
  layout = config.layout
  prompt_format = resolve_format(layout.prompt_format, tokenizer)
  sampling = SamplingConfig(config.temperature, config.top_k, config.top_p)

  def answer(messages: list[dict[str, str]], turn: int) -> Iterator[str]:
    prompt = messages if prompt_format == "chat" else messages[-1]["content"]
    how = {"prompt_format": prompt_format, "system_prompt": layout.system_prompt}
    (ids,) = format_prompts([prompt], tokenizer, **how)
    key = jax.random.fold_in(jax.random.key(config.run.seed), turn)
    settings = {"tokenizer": tokenizer, "max_new_tokens": config.max_new_tokens}
    yield from pieces(stream(params, ids, key, sampling, policy=policy, **settings), tokenizer)

  return answer


def pieces(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
  """The text of tokens as they come; a character whose bytes are not all there yet waits."""
  seen: list[int] = []
  shown = ""
  for token in tokens:
    seen.append(token)
    text = tokenizer.decode(seen)
    if not text.endswith("\ufffd") and text.startswith(shown):
      yield text[len(shown) :]
      shown = text
  text = tokenizer.decode(seen)
  yield text[len(shown) :] if text.startswith(shown) else ""


def talk(answer: Answer, lines: Iterable[str], write: Callable[[str], Any]) -> None:
  """Answers one line after another."""
  messages: list[dict[str, str]] = []
  for turn, line in enumerate(lines):
    if line.strip() == "/new":
      messages = []
      write("a new conversation\n")
      continue
    if not line.strip():
      continue
    messages.append({"role": "user", "content": line})
    said = ""
    try:
      for piece in answer(messages, turn):
        said += piece
        write(piece)
    except KeyboardInterrupt:
      write(" ...")
    write("\n")
    messages.append({"role": "assistant", "content": said})


def typed(prompt: str) -> Iterator[str]:
  """The lines that a person types, until Ctrl-D or Ctrl-C."""
  while True:
    try:
      yield input(prompt)
    except (EOFError, KeyboardInterrupt):
      return


def main(config: Config) -> int:
  """Runs the command line; returns the exit code."""
  terminal = sys.stdin.isatty()
  say = functools.partial(print, file=sys.stderr) if terminal else lambda line: None
  how = jax.default_matmul_precision(setup.precision(config.model))
  with compile_cache.kept("auto"), how:
    answer = open_model(config, say)
    say("/new begins another conversation, Ctrl-C ends an answer, Ctrl-D the program")

    def write(text: str) -> None:
      sys.stdout.write(text)
      sys.stdout.flush()

    talk(answer, typed("> " if terminal else ""), write)
  return 0


if __name__ == "__main__":
  configs.run(main, Config)
