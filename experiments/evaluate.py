r"""How good a model is at a task: pass@1, pass@k and majority@k, with intervals, by difficulty.

Pass@k asks whether one of k responses is right, majority@k whether the most frequent of k answers
is. Training does not touch what it is measured with: the held-out problems of the task, graded as
training grades. Every response is kept, so that what a figure means can be read.

  python -m experiments.evaluate                                    SmolLM2-135M adds
  python -m experiments.evaluate --model=runs/grpo-tiny-copy-seed0/model --task=copy
  python -m experiments.evaluate --model=DIR --task=gsm8k:train.jsonl \
    --gsm8k.held_out_file=test.jsonl --max_new_tokens=256

In the directory: samples.jsonl, a line a response (prompt, response, reward, status, what was read
as its answer, correct); metrics.jsonl, a line a batch; result.json, written last. Rerunning the
same command goes on after the last batch on record; another --k only reads the record anew.

Measured with the first command and --problems=20 --samples=4, on one core: pass@1 0.14 (95 % 0.08
to 0.23), pass@4 0.45 (0.26 to 0.66), majority@4 0.29 (0.14 to 0.51), greedily 0.75 (0.53 to 0.89);
27 s for the first half, compiling included, and 12 s for the second.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from experiments.options import MESH_FLAGS, Distributed, SamplingMesh, device_mesh, joined
from rl_llm import hosts
from rl_llm.config import ConfigError, option, run
from rl_llm.console import Console
from rl_llm.data.prompts import PromptTooLong
from rl_llm.evaluation import estimate_interval, majority_at_k, pass_at_k, record_responses
from rl_llm.experience import agree_on_data, make_encode, make_generate
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
  TaskError,
  load_task,
  task_family,
)
from rl_llm.training import USER_ERRORS, default_workdir, exit_code, open_console


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines an evaluation."""

  model: str = option(
    "smollm2", "smollm2, tiny, a Hugging Face directory (also a run's model), or a .gguf file"
  )
  task: str = option(
    "arithmetic", "arithmetic, copy, reasoning_gym:<name>, jsonl:<path> or gsm8k:<path>"
  )
  workdir: str = option("", "where results go; empty = runs/evaluate-<model>-<task>-seed<seed>")
  seed: int = option(0, "of the responses, of training problems, and of tiny's weights", min=0)
  split: Literal["held_out", "train"] = option("held_out", "which of the task's problems")
  problems: int = option(0, "how many; 0 = all that are held out", min=0)
  samples: int = option(8, "S, responses sampled for each problem", min=1, max=256)
  k: tuple[int, ...] = option((1, 4, 8), "of pass@k and majority@k, each at most samples", min=1)
  greedy: bool = option(True, "also report the greedy response")
  temperature: float = option(1.0, "of the sampler", above=0)
  top_k: int = option(0, "keep the k likeliest tokens, 0 = all", min=0)
  top_p: float = option(1.0, "keep the likeliest tokens that reach p", above=0, max=1)
  max_new_tokens: int = option(16, "limit of a response's length", min=1)
  max_prompt_tokens: int = option(512, "limit of a prompt's length", min=1)
  overlong_prompt: Literal["error", "drop", "truncate_left"] = option(
    "error", "what to do with longer prompts"
  )
  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto", "chat = the model's own chat template, plain = bare text; auto = chat if it has one"
  )
  system_prompt: str | None = option(None, "none = as the chat template has it; may be empty")
  prompts_per_batch: int = option(16, "problems sampled at once, at most", min=1)
  slots: int = option(
    0, "responses decoded at once; the next takes the place of one that has ended; 0 = all", min=0
  )
  difficulty_column: str = option(
    "", "a column of the problems to tell them apart by; empty = as the task does"
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
VOLATILE = ("workdir", "k", "reward_workers", *MESH_FLAGS)


def overrides(config: Config) -> dict[str, Any]:
  """What the model and the samples change, unless the command line says otherwise."""
  changes = {"max_new_tokens": 4} if config.model == "tiny" else {}
  return changes | {"k": tuple(k for k in config.k if k <= config.samples)}


def measure(config: Config, workdir: str) -> dict[str, Any]:
  """Samples, grades and sums up, or goes on after the batches that an earlier call recorded.

  Returns:
    What result.json holds: "all" and "by_difficulty" map names such as "pass@4" to
    {"value", "low", "high"}; sizes, failed grades, seconds, and a fingerprint of the weights.

  Raises:
    Interrupted: SIGINT or SIGTERM came; finished batches are on record.
  """
  check(config)
  task = load_task(config.task, **vars(getattr(config, task_family(config.task))))
  problems = choose_problems(config, task)
  difficulty = difficulty_of(config, task, problems)
  workdir = Path(workdir)
  batches = -(-len(problems) // config.prompts_per_batch)
  with StopSignals() as stop, open_console(batches) as console:
    with opened(workdir, config, volatile=VOLATILE, doing="writes to"):
      result = respond(config, workdir, task, problems, difficulty, console, stop)
      if hosts.is_main():
        result |= summary(
          read(workdir / "samples.jsonl"),
          read(workdir / "metrics.jsonl"),
          ks=sorted(set(config.k)),
          votes=task.answer_of is not None,
        )
        write_result(workdir, result)
        show_result(console, workdir, result)
      return hosts.share("the end of the run", result)


def respond(
  config: Config,
  workdir: Path,
  task: Task,
  problems: Sequence[Problem],
  difficulty: Callable[[Problem], str] | None,
  console: Console,
  stop: StopSignals,
) -> dict[str, Any]:
  """Writes the responses that are not on record yet: samples.jsonl, then metrics.jsonl."""
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
      "raise it, or choose --overlong_prompt=truncate_left"
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

  def describe(problem: Problem, sample: int, line: dict[str, Any]) -> dict[str, Any]:
    return {
      "split": config.split,
      "sample": sample,
      "greedy": sample == config.samples,
      "answer": task.answer_of and task.answer_of(problem, line["response"]),
      "difficulty": difficulty and difficulty(problem),
    }

  record_responses(
    workdir,
    model,
    drawn,
    seed=config.seed,
    # The greedy response comes last: with or without it, the others are the same.
    temperatures=[config.temperature] * config.samples + [0.0] * config.greedy,
    top_k=config.top_k,
    top_p=config.top_p,
    prompts_per_batch=config.prompts_per_batch,
    generate=generate,
    task=task,
    workers=config.reward_workers,
    deadline=config.reward_deadline,
    describe=describe,
    console=console,
    stop=stop,
    mesh=mesh,
  )
  return {
    "model": config.model,
    "task": config.task,
    "split": config.split,
    "problems": len(drawn.problems),
    "samples": config.samples,
    "overlong_prompts": drawn.overlong,
  }


def check(config: Config) -> None:
  """Refuses what does not fit together, before anything is loaded."""
  if not config.k:
    raise ConfigError("k", "", "one or more integers, such as 1,4,8")
  if max(config.k) > config.samples:
    raise ConfigError(
      "k",
      ",".join(map(str, config.k)),
      f"at most samples ({config.samples})",
      f"try --samples={max(config.k)}",
    )
  if config.split == "train" and not config.problems:
    raise ConfigError("problems", 0, "at least 1 with --split=train, which has no end")
  task_family(config.task)


def choose_problems(config: Config, task: Task) -> Sequence[Problem]:
  """The problems to put to the model."""
  if config.split == "train":
    return task.sample(config.seed, 0, config.problems)
  if not task.held_out:
    raise TaskError(
      f"task={config.task!r}: no held-out problem to evaluate on; hold some out, give a file of "
      "them (see the task's flags), or choose --split=train"
    )
  return task.held_out[: config.problems or None]


def difficulty_of(
  config: Config, task: Task, problems: Sequence[Problem]
) -> Callable[[Problem], str] | None:
  """What tells problems apart: the column that was asked for, or the task's own measure."""
  column = config.difficulty_column
  if not column:
    return task.difficulty
  shared = set.intersection(*(set(problem.columns) for problem in problems))
  if column not in shared:
    raise ConfigError(
      "difficulty_column", column, f"a column that all problems have: {', '.join(sorted(shared))}"
    )
  return lambda problem: str(problem.columns[column])


def summary(
  samples: list[dict[str, Any]], batches: list[dict[str, Any]], *, ks: Sequence[int], votes: bool
) -> dict[str, Any]:
  """The figures of a record."""
  sampled = [row for row in samples if not row["greedy"]]
  size = 1 + max(row["sample"] for row in sampled)

  def table(key: str, rows: list[dict[str, Any]], width: int) -> np.ndarray:
    return np.array([row[key] for row in rows], object).reshape(-1, width)

  correct, answers = table("correct", sampled, size).astype(bool), table("answer", sampled, size)
  greedy = table("correct", [row for row in samples if row["greedy"]], 1).astype(bool)
  levels = table("difficulty", sampled, size)[:, 0]

  def figures(chosen: np.ndarray) -> dict[str, Any]:
    found = {"problems": int(chosen.sum())}
    estimates = {f"pass@{k}": (pass_at_k(correct[chosen], k=k), size, k) for k in ks}
    if votes:
      estimates |= {
        f"majority@{k}": (majority_at_k(correct[chosen], answers[chosen], k=k), size, k)
        for k in ks
        if k > 1  # One vote is pass@1.
      }
    if len(greedy):
      estimates["greedy"] = (pass_at_k(greedy[chosen], k=1), 1, 1)
    for name, (values, samples, k) in estimates.items():
      interval = estimate_interval(values, samples=samples, k=k)
      found[name] = dict(zip(("value", "low", "high"), interval, strict=True))
    return found

  return {
    "weights": batches[0]["weights"],
    "responses": len(samples),
    "failed_grades": sum(row["failed_grades"] for row in batches),
    "seconds": sum(row["time/step"] for row in batches),
    "all": figures(np.ones(len(levels), bool)),
    "by_difficulty": {
      level: figures(levels == level)
      for level in sorted(set(levels) - {None}, key=natural_order)
    },
  }


def natural_order(text: str) -> list[tuple[bool, int, str]]:
  """A sorting key by which "2 steps" comes before "10 steps"."""
  return [
    (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
    for part in re.split(r"([0-9]+)", text)
    if part
  ]


def show_result(console: Console, workdir: Path, result: dict[str, Any]) -> None:
  """The tables, and what must be known to read them."""
  names = [name for name in result["all"] if name != "problems"]
  console.table(
    f"{result['model']} on {result['problems']} problems of {result['task']}, "
    f"{result['samples']} samples each",
    ("", "value", "95 % from", "to"),
    [(name, *result["all"][name].values()) for name in names],
  )
  if len(result["by_difficulty"]) > 1:
    console.table(
      "by difficulty (intervals are in result.json)",
      ("", "problems", *names),
      [
        (level, found["problems"], *(found[name]["value"] for name in names))
        for level, found in result["by_difficulty"].items()
      ],
    )
  if not any(name.startswith("majority@") for name in names) and result["samples"] > 1:
    console.say(
      f"no majority@k: the grader of {result['task']} does not say what a response's answer is"
    )
  if result["failed_grades"]:
    console.say(
      f"{result['failed_grades']} of {result['responses']} grades failed and count as not correct; "
      "samples.jsonl says why"
    )
  if result["overlong_prompts"]:
    console.say(f"{result['overlong_prompts']} prompts are over --max_prompt_tokens")
  console.say(f"{result['seconds']:.0f} s; {workdir / 'samples.jsonl'} has every response")


def main(config: Config) -> int:
  model = Path(config.model)
  if model.name == "model" and model.parent.name:  # As a run exports it: the run's name says more.
    model = model.parent
  data = config.task if config.split == "held_out" else f"{config.task}:{config.split}"
  workdir = config.workdir or default_workdir(
    "evaluate", model=str(model), data=data, seed=config.seed
  )
  return exit_code(lambda: measure(config, workdir), distributed=joined(config.distributed))


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
