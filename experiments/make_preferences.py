"""Preference pairs from a model's own answers and a grader: data for DPO and reward models.

People compare answers because they cannot say how good one is. A grader can, so pairs cost nothing
but samples: of several answers to one problem, any that was graded higher is preferred to any that
was graded lower. A problem whose answers are all graded alike gives none.

  python -m experiments.make_preferences --out=pairs.jsonl       SmolLM2-135M adds, 2 CPU cores
  python -m experiments.make_preferences --model=runs/sft-tiny-copy-seed0/model --task=copy
  python -m experiments.make_preferences --task=jsonl:train.jsonl --jsonl.reward_file=reward.py ...

Each line has the columns prompt, chosen, rejected (messages, or text where the prompt is text), as
TRL reads them, and besides: problem (its key), chosen_reward, rejected_reward, margin (their
difference), and the problem's own columns, such as its answer. Held-out problems never appear. Nor
do answers that were cut off at --max_new_tokens, since whoever reads the file would take the cut
for their end.

In the run's directory: samples.jsonl, a line a response; metrics.jsonl, a line a batch;
result.json. Rerunning the same command goes on after the last batch on record; another --out or
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

import jax.numpy as jnp
import numpy as np

from experiments.options import MESH_FLAGS, Distributed, SamplingMesh, device_mesh, joined
from rl_llm import hosts
from rl_llm.config import ConfigError, option, run
from rl_llm.console import Console
from rl_llm.data import DataError
from rl_llm.data.held_out import hashed
from rl_llm.data.jsonl import check_text
from rl_llm.data.prompts import PromptTooLong
from rl_llm.evaluation import record_responses
from rl_llm.experience import Drawn, agree_on_data, make_encode, make_generate, prompt_text
from rl_llm.files import write_atomically
from rl_llm.interrupt import StopSignals
from rl_llm.metrics import read
from rl_llm.model import load_model
from rl_llm.run_directory import opened, write_result
from rl_llm.tasks import (
  ArithmeticOptions,
  CopyOptions,
  Gsm8kOptions,
  JsonlOptions,
  Problem,
  ReasoningGymOptions,
  Task,
  load_task,
  task_family,
)
from rl_llm.training import USER_ERRORS, default_workdir, exit_code, open_console

# What a line says beside the problem's own columns.
OWN = ("prompt", "chosen", "rejected", "problem", "chosen_reward", "rejected_reward", "margin")
# Names that would make a preference file look like another format.
TAKEN = {*OWN, "completion", "text", "messages"}


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a file of pairs."""

  model: str = option(
    "smollm2", "smollm2, tiny, a Hugging Face directory (also a run's model), or a .gguf file"
  )
  task: str = option(
    "arithmetic", "arithmetic, copy, reasoning_gym:<name>, jsonl:<path> or gsm8k:<path>"
  )
  out: str = option("", "the file of pairs; empty = WORKDIR/pairs.jsonl")
  workdir: str = option(
    "", "where the record goes; empty = runs/make_preferences-<model>-<task>-seed<seed>"
  )
  seed: int = option(0, "of problems, responses and pairs, and of tiny's weights", min=0)
  problems: int = option(64, "different training problems, or all if there are fewer", min=1)
  samples: int = option(16, "S, responses sampled for each problem", min=2)
  pairs_per_problem: int = option(8, "pairs of a problem, at most", min=1)
  temperature: float = option(1.0, "of the sampler", above=0)
  top_k: int = option(0, "keep the k likeliest tokens, 0 = all", min=0)
  top_p: float = option(1.0, "keep the likeliest tokens that reach p", above=0, max=1)
  max_new_tokens: int = option(16, "limit of a response's length", min=1)
  max_prompt_tokens: int = option(512, "limit of a prompt's length", min=1)
  overlong_prompt: Literal["error", "drop"] = option("error", "what to do with longer prompts")
  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto", "chat = the model's own chat template, plain = bare text; auto = chat if it has one"
  )
  system_prompt: str | None = option(None, "none = as the chat template has it; may be empty")
  prompts_per_batch: int = option(16, "problems sampled at once, at most", min=1)
  slots: int = option(
    0, "responses decoded at once; the next takes the place of one that has ended; 0 = all", min=0
  )
  dtype: Literal["float32", "bfloat16"] = option("float32", "of the arithmetic")
  reward_deadline: float = option(5.0, "seconds a grader may take for one response", above=0)
  reward_workers: int = option(2, "grader processes", min=1)
  mesh: SamplingMesh = SamplingMesh()
  distributed: Distributed = Distributed()
  arithmetic: ArithmeticOptions = ArithmeticOptions()
  copy: CopyOptions = CopyOptions()
  reasoning_gym: ReasoningGymOptions = ReasoningGymOptions()
  jsonl: JsonlOptions = JsonlOptions()
  gsm8k: Gsm8kOptions = Gsm8kOptions()


# What may change from one call to the next: none of it changes a response.
VOLATILE = ("workdir", "out", "pairs_per_problem", "reward_workers", *MESH_FLAGS)


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return {"max_new_tokens": 4} if config.model == "tiny" else {}


def make(config: Config, workdir: str) -> dict[str, Any]:
  """Samples, grades and pairs, or goes on after the batches that an earlier call recorded.

  Returns:
    What result.json holds: how many pairs, problems, problems without a pair, responses of each
    kind that no pair may hold, failed grades, seconds.

  Raises:
    DataError: no problem gave a pair.
    Interrupted: SIGINT or SIGTERM came; finished batches are on record.
  """
  task = load_task(config.task, **vars(getattr(config, task_family(config.task))))
  problems = different_problems(task, config.seed, limit=config.problems)
  check_columns(config.task, problems)
  workdir = Path(workdir)
  out = Path(config.out) if config.out else workdir / "pairs.jsonl"
  if not out.parent.is_dir() and config.out:
    raise ConfigError("out", config.out, "a file in a directory that exists", f"make {out.parent}")
  batches = -(-len(problems) // config.prompts_per_batch)
  with StopSignals() as stop, open_console(batches) as console:
    with opened(workdir, config, volatile=VOLATILE, doing="writes to"):
      drawn, prompts = respond(config, workdir, task, problems, console, stop)
      result = None
      if hosts.is_main():
        result = write_pairs(config, workdir, out, drawn, prompts, console)
      return hosts.share("the end of the run", result)


def write_pairs(
  config: Config, workdir: Path, out: Path, drawn: Drawn, prompts: list[Any], console: Console
) -> dict[str, Any]:
  """Pairs the recorded responses up and writes the file; gives what result.json holds."""
  rows, counts = pair_up(config, drawn.problems, prompts, read(workdir / "samples.jsonl"))
  if not rows:
    raise DataError(
      f"--task={config.task}: none of {len(drawn.problems)} problems has a better and a worse "
      f"answer that can be paired ({in_words(counts)}); raise --samples, --temperature or "
      "--max_new_tokens, or take another model"
    )
  content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
  write_atomically(out, content.encode("ascii"))  # Last of all that the grader has to do with.
  batches = read(workdir / "metrics.jsonl")
  result = {
    "model": config.model,
    "task": config.task,
    "out": str(out),
    "pairs": len(rows),
    "problems": len(drawn.problems),
    "overlong_prompts": drawn.overlong,
    **counts,
    "seconds": sum(row["time/step"] for row in batches),
  }
  write_result(workdir, result)
  console.say(f"{len(rows)} pairs of {len(drawn.problems)} problems; {in_words(counts)}")
  console.say(f"{result['seconds']:.0f} s; {out}")
  return result


def respond(
  config: Config,
  workdir: Path,
  task: Task,
  problems: Sequence[Problem],
  console: Console,
  stop: StopSignals,
) -> tuple[Drawn, list[Any]]:
  """Writes the responses that are not on record yet: samples.jsonl, then metrics.jsonl.

  Returns:
    The problems that fit, and their prompts as the model was asked them.
  """
  mesh = device_mesh(
    config.mesh, per_step={"prompts_per_batch": config.prompts_per_batch}, at_once={}
  )
  console.say(f"loading {config.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  model = load_model(config.model, seed=config.seed, dtype=jnp.dtype(config.dtype), mesh=mesh)
  encode = make_encode(
    model.tokenizer,
    prompt_format=config.prompt_format,
    system_prompt=config.system_prompt,
    max_prompt_tokens=config.max_prompt_tokens,
    overlong=config.overlong_prompt,
  )
  drawn = encode(problems)
  if not drawn.problems:
    raise PromptTooLong(
      f"all {drawn.overlong} prompts are over --max_prompt_tokens={config.max_prompt_tokens}; "
      "raise it"
    )
  agree_on_data(drawn.prompts)
  generate = make_generate(
    model.policy,
    model.tokenizer,
    max_new_tokens=config.max_new_tokens,
    slots=config.slots,
    say=console.say,
    mesh=mesh,
    gather=config.mesh.gather,
  )

  record_responses(
    workdir,
    model,
    drawn,
    seed=config.seed,
    temperatures=[config.temperature] * config.samples,
    top_k=config.top_k,
    top_p=config.top_p,
    prompts_per_batch=config.prompts_per_batch,
    generate=generate,
    task=task,
    workers=config.reward_workers,
    deadline=config.reward_deadline,
    describe=lambda problem, sample, line: {"split": "train"},
    console=console,
    stop=stop,
    mesh=mesh,
  )
  return drawn, [as_asked(problem, encode.keywords) for problem in drawn.problems]


def as_asked(problem: Problem, layout: dict[str, Any]) -> str | list[dict[str, str]]:
  """The prompt as a file can hold it: text where it was laid out as such, else with its system."""
  if layout["prompt_format"] == "plain":
    return prompt_text(problem.prompt)
  system, prompt = layout["system_prompt"], problem.prompt
  if system is None:
    return prompt
  messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
  first = [{"role": "system", "content": system}] if messages[0]["role"] != "system" else []
  return first + messages


def different_problems(task: Task, seed: int, *, limit: int) -> list[Problem]:
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


def check_columns(spec: str, problems: Sequence[Problem]) -> None:
  """Refuses columns that a file of pairs has no room for."""
  for name in sorted({name for problem in problems for name in problem.columns}):
    if name in TAKEN:
      raise DataError(
        f"--task={spec}: its problems have a column {name!r}, which means something else in a file "
        "of pairs; rename it"
      )


def pair_up(
  config: Config,
  problems: Sequence[Problem],
  prompts: Sequence[Any],
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
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, hashed(problem.key)]))
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


def answer(prompt: str | list[dict[str, str]], text: str) -> str | list[dict[str, str]]:
  """The answer in the form of its prompt."""
  return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def readable(text: str) -> bool:
  """Whether a data file can hold the text as an answer: not blank, and nothing but characters."""
  try:
    check_text(text)
  except DataError:
    return False
  return bool(text.strip())


def in_words(counts: dict[str, int]) -> str:
  """The counts for a person."""
  return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def main(config: Config) -> int:
  model = Path(config.model)
  if model.name == "model" and model.parent.name:  # As a run exports it: the run's name says more.
    model = model.parent
  workdir = config.workdir or default_workdir(
    "make_preferences", model=str(model), data=config.task, seed=config.seed
  )
  return exit_code(lambda: make(config, workdir), distributed=joined(config.distributed))


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
