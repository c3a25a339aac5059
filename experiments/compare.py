"""REINFORCE, PPO, DPO and GRPO on the same model, task, seeds and samples: the table, measured.

Which of the four needs a reward model, what does each cost, and what does it buy? Every method gets
the same problems and the same number of sampled responses a step; they differ in how they use them.
DPO makes pairs from its own graded responses, so no method needs data or a reward model.

  python -m experiments.compare                             three seeds, about two hours on 2 cores
  python -m experiments.compare --model=tiny --task=copy --seeds=0 --variance_batches=0
  python -m experiments.compare --methods=dpo,grpo --seeds=0

Each run is `python -m experiments.<method>` with the flags that are printed. They run one after
another, and each resumes: rerunning the same command continues where it stopped.

The variance of the gradient estimate is measured separately, at the model that training starts
from. A run with a learning rate too small to move a weight, and Adam's b1 = 0 so that the first
moment *is* the gradient, gives the gradients of independent batches. The table has
trace(covariance) / |mean|^2: how many batches to average until the signal is as large as the noise.
PPO's value network trains meanwhile, and its first batches do not count.

The table and the figure are written to the directory --workdir, and to --out if that is given. Each
run leaves its last checkpoint there: on the real model 24 GB in all, and 26 GB more while the noise
of PPO's gradients is measured, whose checkpoints hold two networks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rl_llm import files
from rl_llm.errors import ConfigError
from rl_llm.evaluation import curves
from rl_llm.runs import config as configs
from rl_llm.runs import metrics, signals
from rl_llm.runs.checkpoint import first_moments
from rl_llm.runs.config import option
from rl_llm.training import loop

# Of each: its name, whether it needs a reward model, the networks it holds, and what a step takes
# of them for every token that is trained on, one update a batch: F is a forward pass, B a backward
# pass (about twice the work). Sampling comes on top, the same for all.
METHODS = {
  "reinforce": ("REINFORCE", "no", "policy", "policy F + B; none where a group agrees"),
  "ppo": ("PPO", "no (or --reward=model:DIR)", "policy, value", "policy 2F + B, value 2F + B"),
  "dpo": ("DPO", "no: preferences", "policy, reference", "policy F + B, reference F; 2 of G"),
  "grpo": ("GRPO", "no", "policy", "policy F + B; none where a group agrees"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What is compared."""

  model: str = option("smollm2", "the model that every method begins with, as in experiments.grpo")
  task: str = option("arithmetic", "the task of all, as in experiments.grpo")
  methods: tuple[str, ...] = option(tuple(METHODS), "methods to compare", choices=METHODS)
  seeds: tuple[int, ...] = option((0, 1, 2), "one run of each method for each", min=0)
  steps: int = option(16, "rollouts of each run", min=1)
  prompts_per_step: int = option(12, "problems a rollout", min=1)
  responses_per_prompt: int = option(8, "responses a problem", min=2)
  eval_every: int = option(8, "steps between evaluations", min=1)
  eval_samples: int = option(2, "responses a problem at temperature 1, and one greedy", min=1)
  target: float = option(0.8, "the accuracy to which sampled tokens are counted", above=0, below=1)
  variance_batches: int = option(8, "gradients whose variance is taken; 0 = none", min=0)
  variance_warmup: int = option(8, "steps before them in which PPO's values are learned", min=0)
  workdir: str = option("runs/compare", "where the runs and what came of them are kept")
  out: str = option("", "a second directory for the table and the figure, such as docs/results")


def settings(config: Config, method: str, seed: int) -> dict[str, Any]:
  """The flags of one run, but for its directory."""
  return {
    "model": config.model,
    "task": config.task,
    "seed": seed,
    "steps": config.steps,
    "pairs_per_step" if method == "dpo" else "prompts_per_step": config.prompts_per_step,
    "responses_per_prompt": config.responses_per_prompt,
    "eval.every": config.eval_every,
    "eval.samples": config.eval_samples,
    "checkpoint.keep": 1,
  }


def variance_settings(config: Config, method: str) -> dict[str, Any]:
  """The same for gradients of independent batches at the parameters that training begins with."""
  steps = config.variance_batches + (config.variance_warmup if method == "ppo" else 0)
  whole = {"minibatches": 1} if method == "ppo" else {}  # One update a step, of the whole batch.
  return (
    settings(config, method, 1000)
    | whole
    | {
      "steps": steps,
      "optimizer.learning_rate": 1e-30,
      "optimizer.b1": 0,
      "optimizer.max_grad_norm": 0,
      "checkpoint.every": 1,
      "checkpoint.keep": config.variance_batches,
      "eval.every": steps,
      "eval.problems": 1,
      "eval.samples": 1,
    }
  )


def do(method: str, given: dict[str, Any], workdir: Path, stop: signals.StopSignals) -> None:
  """Runs one experiment to its end, unless that is done; notes what memory it took.

  Raises `Interrupted` once the experiment has saved what it did, or `ConfigError` where it failed.
  """
  if (workdir / "result.json").exists():
    return
  command = [sys.executable, "-m", f"experiments.{method}"]
  command += [f"--{name}={value}" for name, value in (given | {"workdir": workdir}).items()]
  print("$", *command[1:], flush=True)
  stop.check()
  code, peak = signals.run_child(command, stop, environment=os.environ)
  if workdir.is_dir():
    with open(workdir / "peak_memory.txt", "a") as file:  # A line a piece, KiB.
      file.write(f"{peak}\n")
  stop.check()
  if code:
    raise ConfigError(
      "methods", method, "one whose run ends well", f"it ended with {code}; see above"
    )


def measure(config: Config, method: str) -> dict[str, Any]:
  """All figures of a method, from the records of its runs."""
  runs, root = [], Path(config.workdir)
  for seed in config.seeds:
    rows = metrics.read(root / f"{method}-seed{seed}" / "metrics.jsonl")
    memory = (root / f"{method}-seed{seed}" / "peak_memory.txt").read_text().split()
    points = curves.curve(rows, responses=config.prompts_per_step * config.responses_per_prompt)
    trained = [row for row in rows if "time/rollout" in row][1:]  # The first compiles.
    runs.append(
      {
        "seed": seed,
        "points": points,
        "tokens_to_target": curves.tokens_to(points, config.target),
        "phases": {
          name: statistics.median(row.get(f"time/{name}", 0.0) for row in trained)
          for name in curves.phases(trained)
        },
        "peak_gib": max(map(int, memory)) / 2**20,
      }
    )
  noise = root / f"{method}-variance" / "noise.json"
  measured = json.loads(noise.read_text()) if config.variance_batches > 1 else None
  return {"method": method, "runs": runs, "noise": measured}


def table(config: Config, found: Sequence[dict[str, Any]]) -> str:
  """The comparison as Markdown, a column a method."""
  names = ("", "reward model needed", "networks held", "passes per token trained")
  known = {method: dict(zip(names, cells, strict=True)) for method, cells in METHODS.items()}
  return curves.table(found, known, target=config.target)


def page(config: Config, text: str) -> str:
  """The table, with what is needed to read and to reproduce it."""
  values, defaults = configs.flatten(config), configs.flatten(Config())
  given = [n for n in values if values[n] != defaults[n] and n not in ("workdir", "out")]
  command = " ".join(["python -m experiments.compare", *configs.to_flags(config, given)])
  responses = config.prompts_per_step * config.responses_per_prompt
  setup = f"""`{command}` on {os.cpu_count()} cores, {platform.machine()}, JAX {jax.__version__}: \
{config.model}, {config.task}, {config.steps} steps of {config.prompts_per_step} problems x \
{config.responses_per_prompt} responses."""
  notes = """Accuracy is that of sampled answers to held-out problems, with its 95 % interval. \
Seconds of phases are medians over steps and seeds without the first step, which compiles; memory \
is the most of any run."""
  if config.variance_batches > 1:
    notes += f""" Gradient noise is trace(covariance) / |mean|^2 of the gradients of \
{config.variance_batches} batches of {responses} responses at the model that training begins \
with."""
  return f"""# {", ".join(METHODS[method][0] for method in config.methods)} side by side

{textwrap.fill(setup, 100, break_on_hyphens=False)}

{text}
{textwrap.fill(notes, 100, break_on_hyphens=False)}

![accuracy against tokens and time](compare.svg)
"""


def compare(config: Config) -> list[dict[str, Any]]:
  """Does what is left to do, writes compare.json, compare.md and compare.svg; gives the figures.

  Raises `Interrupted` after a signal, or `ConfigError`: a run failed, or there is no matplotlib.
  """
  if importlib.util.find_spec("matplotlib") is None:  # Fail now rather than after two hours.
    raise ConfigError(
      "out", config.out, "used where matplotlib is installed", "pip install matplotlib"
    )
  root = Path(config.workdir)
  with signals.StopSignals() as stop:
    for seed in config.seeds:
      for method in config.methods:
        do(method, settings(config, method, seed), root / f"{method}-seed{seed}", stop)
    for method in config.methods if config.variance_batches > 1 else ():
      directory = root / f"{method}-variance"
      if not (directory / "noise.json").exists():
        do(method, variance_settings(config, method), directory, stop)
        gradients = first_moments(directory / "checkpoints", config.variance_batches)
        found = json.dumps(metrics.json_number(metrics.noise_to_signal(gradients)))
        files.write_atomically(directory / "noise.json", found.encode())
        shutil.rmtree(directory / "checkpoints")  # Gigabytes that nothing reads any more.
  found = [measure(config, method) for method in config.methods]
  text = table(config, found)
  for directory in dict.fromkeys((root, Path(config.out or root))):
    directory.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(found, indent=1) + "\n"
    files.write_atomically(directory / "compare.json", figures.encode())
    files.write_atomically(directory / "compare.md", page(config, text).encode())
    named = {METHODS[method["method"]][0]: method["runs"] for method in found}
    curves.draw(named, directory / "compare.svg", target=config.target)
  print(text, f"figure: {root / 'compare.svg'}", sep="\n")
  return found


if __name__ == "__main__":
  configs.run(lambda config: loop.exit_code(lambda: compare(config)), Config)
