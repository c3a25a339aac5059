"""Does refilling a step pay? DAPO's recipe with and without it, on the problems of `make run`.

Without refill, a group whose responses all earn the same teaches nothing: the step trains on what
is left. With refill, the step samples on until P groups teach. A step then costs more samples, so
the two are compared at equal samples, and at equal seconds of training.

  python -m benchmarks.refill                       three seeds each, an hour or two on 2 cores
  python -m benchmarks.refill --out=docs/results    writes refill.md and refill.svg there too

Each run resumes: rerunning the same command continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import compare
from rl_llm import files
from rl_llm.evaluation import curves
from rl_llm.runs import config as configs
from rl_llm.runs import metrics, signals
from rl_llm.runs.config import option
from rl_llm.training import loop

ARMS = {"any": "DAPO without refill", "informative": "DAPO with refill"}
PROMPTS, RESPONSES = 12, 8


@dataclasses.dataclass(frozen=True)
class Config:
  """What is compared."""

  model: str = option("smollm2", "the model that both arms begin with, as in experiments.grpo")
  task: str = option("arithmetic", "the task of both, as in experiments.grpo")
  seeds: tuple[int, ...] = option((0, 1, 2), "one run of each arm for each", min=0)
  steps: int = option(16, "steps without refill; with it half as many, of about twice the samples")
  workdir: str = option("runs/refill", "where the runs and what came of them are kept")
  out: str = option("", "a second directory for the page and the figure, such as docs/results")


def settings(config: Config, arm: str, seed: int) -> dict[str, Any]:
  """The flags of one run, but for its directory."""
  steps = config.steps if arm == "any" else config.steps // 2
  return {
    "model": config.model,
    "task": config.task,
    "preset": "dapo",
    "dynamic.groups": arm,
    "seed": seed,
    "steps": steps,
    "prompts_per_step": PROMPTS,
    "responses_per_prompt": RESPONSES,
    "eval.every": max(1, steps // 4),
    "eval.samples": 2,
    "checkpoint.keep": 1,
  }


def at(points: Sequence[Mapping[str, float]], cost: str, budget: float) -> Mapping[str, float]:
  """The last evaluation whose cost is within the budget.

  >>> at([{"samples": 0, "accuracy": 0.2}, {"samples": 96, "accuracy": 0.5}], "samples", 95)
  {'samples': 0, 'accuracy': 0.2}
  """
  return [point for point in points if point[cost] <= budget][-1]


def measure(config: Config) -> dict[str, list[dict[str, Any]]]:
  """Of each arm, for each seed: its evaluations, and what its steps sampled."""
  found: dict[str, list[dict[str, Any]]] = {}
  for arm, name in ARMS.items():
    for seed in config.seeds:
      rows = metrics.read(Path(config.workdir) / f"{arm}-seed{seed}" / "metrics.jsonl")
      rounds = [row.get("refill/rounds", 1) for row in rows if "response_length_mean" in row]
      points = curves.curve(rows, responses=PROMPTS * RESPONSES)
      run = {"seed": seed, "points": points, "rounds": sum(rounds) / len(rounds)}
      found.setdefault(name, []).append(run)
  return found


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  """Both arms at the samples, and at the seconds, that both of a seed's runs reached."""
  columns = [{"": name} for name in found]
  for runs in zip(*found.values(), strict=True):
    for cost, unit in (("samples", "samples"), ("seconds", "s of training")):
      budget = min(run["points"][-1][cost] for run in runs)
      for column, run in zip(columns, runs, strict=True):
        point = at(run["points"], cost, budget)
        shown = "{accuracy:.2f} ({low:.2f} to {high:.2f})".format(**point)
        name = f"accuracy within {budget:,.0f} {unit}, seed {run['seed']}"
        column[name] = f"{shown}, at {point[cost]:,.0f}"
    for column, run in zip(columns, runs, strict=True):
      column[f"rounds a step, seed {run['seed']}"] = f"{run['rounds']:.1f}"
  return curves.markdown(columns)


def page(config: Config, text: str) -> str:
  """The table, with what is needed to read and to reproduce it."""
  named = ("model", "task", "seeds", "steps")
  given = [name for name in named if getattr(config, name) != getattr(Config(), name)]
  command = " ".join(["python -m benchmarks.refill", *configs.to_flags(config, given)])
  setup = f"""`{command}` on {os.cpu_count()} cores, {platform.machine()}, JAX {jax.__version__}: \
{config.model}, {config.task}, rounds of {PROMPTS} problems x {RESPONSES} responses; \
{config.steps} steps without refill, {config.steps // 2} with it. Accuracy is that of sampled \
answers to held-out problems, with its 95 % interval: the last evaluation within the budget."""
  return f"""# DAPO with and without refill

{textwrap.fill(setup, 100, break_on_hyphens=False)}

{text}
![accuracy against samples and time](refill.svg)
"""


def measure_refill(config: Config) -> None:
  """Runs what is left to run, prints the table, and writes refill.md and refill.svg."""
  root = Path(config.workdir)
  with signals.StopSignals() as stop:
    for seed in config.seeds:
      for arm in ARMS:
        compare.do("grpo", settings(config, arm, seed), root / f"{arm}-seed{seed}", stop)
  found = measure(config)
  text = table(found)
  for directory in dict.fromkeys((root, Path(config.out or root))):
    directory.mkdir(parents=True, exist_ok=True)
    files.write_atomically(directory / "refill.md", page(config, text).encode())
    curves.draw(found, directory / "refill.svg", cost="samples")
  print(text, f"figure: {root / 'refill.svg'}", sep="\n")


if __name__ == "__main__":
  configs.run(lambda config: loop.exit_code(lambda: measure_refill(config)), Config)
