"""Preference pairs from a model's own answers and a grader: data for DPO and reward models.

People compare answers because they cannot say how good one is. A grader can, so pairs cost nothing
but samples: of several answers to one problem, any that was graded higher is preferred to any that
was graded lower. A problem whose answers are all graded alike gives none.

  python -m experiments.make_preferences --out=pairs.jsonl       SmolLM2-135M adds, 2 CPU cores
  python -m experiments.make_preferences --model=runs/sft-tiny-copy-seed0/model --task=copy
  python -m experiments.make_preferences --task=jsonl:train.jsonl --jsonl.reward_file=reward.py ...

Each line has the columns prompt, chosen, rejected (messages, or text where the prompt is text), as
TRL reads them, and in addition problem (its key), chosen_reward, rejected_reward, margin (their
difference), and the problem's own columns, such as its answer. Held-out problems never appear. Nor
do answers that were cut off at --max_new_tokens, since whoever reads the file would take the cut
for their end.

In the run's directory: samples.jsonl, a line a response; metrics.jsonl, a line a batch;
result.json. Rerunning the same command resumes after the last batch on record; another --out or
--pairs_per_problem only reads the record anew.

Measured with the first command, seed 0, on 2 busy cores: 183 pairs of 32 of the 44 training sums
in 108 s. 449 of 704 answers were cut off; a larger --max_new_tokens leaves more to pair.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import flags, setup
from rl_llm import config as configs
from rl_llm import experience, files, hosts, metrics, run_directory, tasks
from rl_llm.config import ConfigError, option
from rl_llm.data import DataError
from rl_llm.data.held_out import hashed
from rl_llm.data.jsonl import check_text

# What a line says in addition to the problem's own columns.
OWN = ("prompt", "chosen", "rejected", "problem", "chosen_reward", "rejected_reward", "margin")
# Names that would make a preference file look like another format.
TAKEN = {*OWN, "completion", "text", "messages"}

Prompt = str | list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Prompts(flags.Prompts):
  """Prompts and responses where the model samples; none is cut, since a pair has both whole."""

  overlong_prompt: Literal["error", "drop"] = option("error", "what to do with longer prompts")


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a file of pairs."""

  run: flags.Record = configs.inline(flags.Record())
  model: flags.Weights = configs.inline(flags.Weights())
  task: flags.Task = configs.inline(flags.Task())
  prompts: Prompts = configs.inline(Prompts())
  out: str = option("", "the file of pairs; empty = WORKDIR/pairs.jsonl", volatile=True)
  problems: int = option(64, "different training problems, or all if there are fewer", min=1)
  samples: int = option(16, "S, responses sampled for each problem", min=2)
  pairs_per_problem: int = option(8, "pairs of a problem, at most", min=1, volatile=True)
  responses: flags.Responses = configs.inline(flags.Responses())
  mesh: flags.SamplingMesh = flags.SamplingMesh()


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return {"max_new_tokens": 4} if config.model.model == "tiny" else {}


def make(config: Config, workdir: str) -> dict[str, Any]:
  """Samples, grades and pairs; what an earlier call has on record is not sampled again.

  Returns:
    What result.json holds: how many pairs, problems, problems without a pair, responses of each
    kind that no pair may hold, failed grades, seconds.

  Raises:
    DataError: no problem gave a pair.
    Interrupted: SIGINT or SIGTERM came; finished batches are on record.
  """
  configs.check(config)
  task = setup.load_task(config.task)
  problems = different_problems(task, config.run.seed, limit=config.problems)
  check_columns(config.task.task, problems)
  directory = Path(config.out).parent
  if config.out and not directory.is_dir():
    raise ConfigError("out", config.out, "a file in a directory that exists", f"make {directory}")
  temperatures = [config.responses.temperature] * config.samples
  with setup.open_record(config, workdir, problems) as run:
    drawn, prompt_format = setup.record_responses(
      config,
      run,
      task,
      problems,
      temperatures=temperatures,
      describe=lambda problem, sample, line: {"split": "train"},
    )
    result = write_pairs(config, run, drawn, prompt_format) if hosts.is_main() else None
    return hosts.share("the end of the run", result)


def write_pairs(
  config: Config, run: run_directory.Run, drawn: experience.Drawn, prompt_format: str
) -> dict[str, Any]:
  """Pairs the recorded responses up and writes the file; gives what result.json holds."""
  samples, batches = (
    metrics.read(run.workdir / name) for name in ("samples.jsonl", "metrics.jsonl")
  )
  system = config.prompts.layout.system_prompt
  prompts = [as_asked(p.prompt, prompt_format, system_prompt=system) for p in drawn.problems]
  rows, counts = pair_up(config, drawn.problems, prompts, samples)
  in_words = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
  if not rows:
    raise DataError(
      f"--task={config.task.task}: none of {len(drawn.problems)} problems has a better and a worse "
      f"answer that can be paired ({in_words}); raise --samples, --temperature or "
      "--max_new_tokens, or take another model"
    )
  out = Path(config.out) if config.out else run.workdir / "pairs.jsonl"
  content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
  files.write_atomically(out, content.encode("ascii"))  # Once nothing can be refused any more.
  result = {
    "model": config.model.model,
    "task": config.task.task,
    "out": str(out),
    "pairs": len(rows),
    "problems": len(drawn.problems),
    "overlong_prompts": drawn.overlong,
    **counts,
    "seconds": sum(row["time/step"] for row in batches),
  }
  run_directory.write_result(run.workdir, result)
  run.console.say(f"{len(rows)} pairs of {len(drawn.problems)} problems; {in_words}")
  run.console.say(f"{result['seconds']:.0f} s; {out}")
  return result


def as_asked(prompt: Prompt, prompt_format: str, *, system_prompt: str | None) -> Prompt:
  """The prompt as a file can hold it: text where it was laid out as such, else with its system."""
  if prompt_format == "plain":
    return experience.prompt_text(prompt)
  if system_prompt is None:
    return prompt
  messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
  own = messages[0]["role"] == "system"
  return messages if own else [{"role": "system", "content": system_prompt}, *messages]


def different_problems(task: tasks.Task, seed: int, *, limit: int) -> list[tasks.Problem]:
  """The first `limit` different training problems of a seed; fewer where there are no more.

  They are drawn at random, so of a small task the last ones take many draws; a round that doubles
  the draws and finds nothing new ends the search.
  """
  count, found = limit, {}
  while True:
    before = len(found)
    for problem in task.sample(seed, 0, count):
      found.setdefault(problem.key, problem)
    if len(found) >= limit or len(found) == before:
      return list(found.values())[:limit]
    count *= 2


def check_columns(spec: str, problems: Sequence[tasks.Problem]) -> None:
  """Refuses columns that a file of pairs has no room for."""
  for name in sorted({name for problem in problems for name in problem.columns}):
    if name in TAKEN:
      raise DataError(
        f"--task={spec}: its problems have a column {name!r}, which means something else in a file "
        "of pairs; rename it"
      )


def pair_up(
  config: Config,
  problems: Sequence[tasks.Problem],
  prompts: Sequence[Prompt],
  samples: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
  """The lines of the file, problem by problem, and how many problems and responses are left out.

  Args:
    config: of the run.
    problems: P problems.
    prompts: as the file is to hold them.
    samples: P * S rows of samples.jsonl.
  """
  counts = dict.fromkeys(
    ("responses", "failed_grades", "cut_off", "unusable", "problems_without_spread"), 0
  )
  rows = []
  for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
    rewards: dict[str, float] = {}  # By text: what was said twice is one answer.
    for sample in samples[index * config.samples : (index + 1) * config.samples]:
      counts["responses"] += 1
      if sample["reward"] is None:
        counts["failed_grades"] += 1
      elif sample["stop_reason"] == "length":
        counts["cut_off"] += 1
      elif not readable(sample["response"]):
        counts["unusable"] += 1
      else:
        rewards.setdefault(sample["response"], sample["reward"])
    candidates = [(a, b) for a in rewards for b in rewards if rewards[a] > rewards[b]]
    counts["problems_without_spread"] += not candidates
    rng = np.random.default_rng(np.random.SeedSequence([config.run.seed, hashed(problem.key)]))
    for place in rng.permutation(len(candidates))[: config.pairs_per_problem]:
      better, worse = candidates[place]
      rows.append({
        "prompt": prompt,
        "chosen": answer(prompt, better),
        "rejected": answer(prompt, worse),
        **problem.columns,
        "problem": problem.key,
        "chosen_reward": rewards[better],
        "rejected_reward": rewards[worse],
        "margin": rewards[better] - rewards[worse],
      })
  return rows, counts


def answer(prompt: Prompt, text: str) -> Prompt:
  """The answer in the form of its prompt."""
  return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def readable(text: str) -> bool:
  """Whether a data file can hold the text as an answer: not blank, and nothing but characters."""
  try:
    check_text(text)
  except DataError:
    return False
  return bool(text.strip())


def main(config: Config) -> int:
  return setup.main(make, config, model=setup.run_name(config.model.model))


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
