"""Preference pairs from a model's own graded responses, as the rows of a data file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl_llm.data import DataError
from rl_llm.data.held_out import hashed
from rl_llm.data.jsonl import check_text
from rl_llm.files import write_atomically
from rl_llm.rollout.drawing import prompt_text
from rl_llm.tasks import Problem, Task

# The columns of a line in addition to the problem's own.
OWN = ("prompt", "chosen", "rejected", "problem", "chosen_reward", "rejected_reward", "margin")
# Names that would make a preference file look like another format.
TAKEN = {*OWN, "completion", "text", "messages"}

Prompt = str | list[dict[str, str]]


def as_asked(prompt: Prompt, prompt_format: str, *, system_prompt: str | None) -> Prompt:
  """The prompt for a file: text if it was formatted as text, else with its system prompt."""
  if prompt_format == "plain":
    return prompt_text(prompt)
  if system_prompt is None:
    return prompt
  messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
  own = messages[0]["role"] == "system"
  return messages if own else [{"role": "system", "content": system_prompt}, *messages]


def different_problems(task: Task, seed: int, *, limit: int) -> list[Problem]:
  """The first `limit` different training problems of a seed; fewer if there are no more.

  They are drawn at random, so the last problems of a small task take many draws. The search ends
  when a round that doubles the draws finds nothing new.
  """
  count, found = limit, {}
  while True:
    before = len(found)
    for problem in task.sample(seed, 0, count):
      found.setdefault(problem.key, problem)
    if len(found) >= limit or len(found) == before:
      return list(found.values())[:limit]
    count *= 2


def check_columns(spec: str, problems: Sequence[Problem]) -> None:
  """Refuses columns that a file of pairs has no room for."""
  for name in sorted({name for problem in problems for name in problem.columns}):
    if name in TAKEN:
      raise DataError(
        f"--task={spec}: its problems have a column {name!r}, which means something else in a file "
        "of pairs; rename it"
      )


def pair_up(
  problems: Sequence[Problem],
  prompts: Sequence[Prompt],
  samples: Sequence[dict[str, Any]],
  *,
  pairs_per_problem: int,
  seed: int,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """The lines of the file, problem by problem, and how many problems and responses are left out.

  Args:
    problems: P problems.
    prompts: in the form to write to the file.
    samples: P * S rows of samples.jsonl.
    pairs_per_problem: the most pairs per problem.
    seed: for the choice among a problem's pairs.
  """
  counts = dict.fromkeys(
    ("responses", "failed_grades", "no_opinion", "cut_off", "unusable", "problems_without_spread"),
    0,
  )
  rows, size = [], len(samples) // max(len(problems), 1)
  for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
    rewards: dict[str, float] = {}  # By text: the same text twice is one answer.
    for sample in samples[index * size : (index + 1) * size]:
      counts["responses"] += 1
      if sample["status"] == "not_applicable":
        counts["no_opinion"] += 1
      elif sample["reward"] is None:
        counts["failed_grades"] += 1
      elif sample["stop_reason"] == "length":
        counts["cut_off"] += 1
      elif not readable(sample["response"]):
        counts["unusable"] += 1
      else:
        rewards.setdefault(sample["response"], sample["reward"])
    candidates = [(a, b) for a in rewards for b in rewards if rewards[a] > rewards[b]]
    counts["problems_without_spread"] += not candidates
    rng = np.random.default_rng(np.random.SeedSequence([seed, hashed(problem.key)]))
    for place in rng.permutation(len(candidates))[:pairs_per_problem]:
      better, worse = candidates[place]
      rows.append(
        {
          "prompt": prompt,
          "chosen": answer(prompt, better),
          "rejected": answer(prompt, worse),
          **problem.columns,
          "problem": problem.key,
          "chosen_reward": rewards[better],
          "rejected_reward": rewards[worse],
          "margin": rewards[better] - rewards[worse],
        }
      )
  return rows, counts


def answer(prompt: Prompt, text: str) -> Prompt:
  """The answer in the form of its prompt."""
  return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def readable(text: str) -> bool:
  """Whether a data file can hold the text as an answer: not blank, and all characters valid."""
  try:
    check_text(text)
  except DataError:
    return False
  return bool(text.strip())


def in_words(counts: Mapping[str, int]) -> str:
  """Counts in words, for a person.

  >>> in_words({"cut_off": 2, "failed_grades": 0})
  '2 cut off, 0 failed grades'
  """
  return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def write_pairs(
  path: Path,
  problems: Sequence[Problem],
  prompts: Sequence[Prompt],
  samples: Sequence[dict[str, Any]],
  *,
  pairs_per_problem: int,
  seed: int,
) -> tuple[int, dict[str, int]]:
  """Writes the pairs of `pair_up` as a JSONL file, atomically, once every check has passed.

  Args:
    path: of the file.
    problems: as for `pair_up`, like the other arguments.

  Returns:
    How many pairs there are, and the counts of `pair_up`.

  Raises:
    DataError: there are no pairs.
  """
  sizes = {"pairs_per_problem": pairs_per_problem, "seed": seed}
  rows, counts = pair_up(problems, prompts, samples, **sizes)
  if not rows:
    raise DataError(
      f"none of {len(problems)} problems has a better and a worse answer that can be paired "
      f"({in_words(counts)}); raise --samples, --temperature or --max_new_tokens, or take another "
      "model"
    )
  content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
  write_atomically(path, content.encode("ascii"))
  return len(rows), counts
