"""Preference pairs from a model's own answers and a grader: data for DPO and reward models.

People compare answers because they cannot say how good one is. A grader can, so pairs cost nothing
but samples: of several answers to one problem, any with a higher grade is preferred to any with a
lower one. A problem whose answers all get the same grade gives none.

  python -m experiments.make_preferences --out=pairs.jsonl       SmolLM2-135M adds, 2 CPU cores
  python -m experiments.make_preferences --model=runs/sft-tiny-copy-seed0/model --task=copy
  python -m experiments.make_preferences --task=jsonl:train.jsonl --jsonl.reward_file=reward.py ...

Each line has the columns prompt, chosen, rejected (messages, or text where the prompt is text), as
TRL reads them, and in addition problem (its key), chosen_reward, rejected_reward, margin (their
difference), and the problem's own columns, such as its answer. Held-out problems never appear. Nor
do answers that were cut off at --max_new_tokens, since a reader of the file would mistake the cut
for their end.

In the run's directory: samples.jsonl, a line a response; metrics.jsonl, a line a batch;
result.json. Rerunning the same command resumes after the last batch on record; changing --out or
--pairs_per_problem only reads the record again.

Measured with the first command, seed 0, on 2 busy cores: 183 pairs of 32 of the 44 training sums
in 108 s. 449 of 704 answers were cut off; a larger --max_new_tokens leaves more to pair.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from experiments import flags, setup
from rl_llm.errors import ConfigError
from rl_llm.parallel import hosts
from rl_llm.rollout import drawing, preferences
from rl_llm.runs import config as configs
from rl_llm.runs import metrics, run_directory
from rl_llm.runs.config import option


@dataclasses.dataclass(frozen=True)
class Prompts(flags.Prompts):
  """Prompts and responses where the model samples; none is cut, since a pair has both whole."""

  overlong_prompt: Literal["error", "drop"] = option("error", "what to do with longer prompts")


@configs.experiment
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
  task = setup.load_task(config)
  problems = preferences.different_problems(task, config.run.seed, limit=config.problems)
  preferences.check_columns(config.task.task, problems)
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
    return hosts.broadcast("the end of the run", result)


def write_pairs(
  config: Config, run: run_directory.Run, drawn: drawing.Drawn, prompt_format: str
) -> dict[str, Any]:
  """Pairs the recorded responses up and writes the file; gives what result.json holds."""
  samples, batches = (
    metrics.read(run.workdir / name) for name in ("samples.jsonl", "metrics.jsonl")
  )
  system = config.prompts.layout.system_prompt
  prompts = [
    preferences.as_asked(p.prompt, prompt_format, system_prompt=system) for p in drawn.problems
  ]
  sizes = {"pairs_per_problem": config.pairs_per_problem, "seed": config.run.seed}
  out = Path(config.out) if config.out else run.workdir / "pairs.jsonl"
  count, counts = preferences.write_pairs(out, drawn.problems, prompts, samples, **sizes)
  result = {
    "model": config.model.model,
    "task": config.task.task,
    "out": str(out),
    "pairs": count,
    "problems": len(drawn.problems),
    "overlong_prompts": drawn.overlong,
    **counts,
    "seconds": sum(row["time/step"] for row in batches),
  }
  run_directory.write_result(run.workdir, result)
  words = preferences.in_words(counts)
  run.console.say(f"{count} pairs of {len(drawn.problems)} problems; {words}")
  run.console.say(f"{result['seconds']:.0f} s; {out}")
  return result


def main(config: Config) -> int:
  return setup.main(make, config, model=run_directory.run_name(config.model.model))


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
