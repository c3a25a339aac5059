"""REINFORCE, PPO, DPO and GRPO on the same model, task, seeds and samples: the table, measured.

Which of the four needs a reward model, what does each cost, and what does it buy? Every method gets
the same problems and the same number of sampled responses a step; they differ in what they do with
them. DPO makes its pairs of its own graded responses, so none of them needs data or a reward model.

  python -m experiments.compare                             three seeds, about two hours on 2 cores
  python -m experiments.compare --model=tiny --task=copy --seeds=0 --variance_batches=0
  python -m experiments.compare --methods=dpo,grpo --seeds=0

Each run is `python -m experiments.<method>` with the flags that are printed. They are done one
after another, and each resumes: rerunning the same command continues where it stopped.

The variance of the gradient estimate is measured apart, at the model that training begins with: the
gradients of independent batches, from a run whose learning rate is too small to move a weight and
whose Adam has b1 = 0, so that its first moment *is* the gradient. Reported is trace(covariance) /
|mean|^2, the number of batches to average before the signal is as long as the noise. PPO's value
network is trained meanwhile, and its first batches do not count.

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
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rl_llm import config as configs
from rl_llm import files, interrupt, metrics, training
from rl_llm.checkpoint import Checkpointer
from rl_llm.config import ConfigError, option

# Of each: its name, whether it needs a reward model, the networks it holds, and what a step takes
# of them for every token that is trained on, one update a batch: F is a forward pass, B a backward
# pass (about twice the work). Sampling comes on top, the same for all.
METHODS = {
  "reinforce": ("REINFORCE", "no", "policy", "policy F + B; none where a group agrees"),
  "ppo": (
    "PPO", "no (a grader; or --reward=model:DIR)", "policy, value", "policy 2F + B, value 2F + B"
  ),
  "dpo": (
    "DPO", "no: preferences", "policy, reference", "policy F + B, reference F; 2 responses of G"
  ),
  "grpo": ("GRPO", "no", "policy", "policy F + B; none where a group agrees"),
}

@dataclasses.dataclass(frozen=True)
class Config:
  """What is compared."""

  model: str = option("smollm2", "what every method begins with, as in experiments.grpo")
  task: str = option("arithmetic", "the task of all, as in experiments.grpo")
  methods: tuple[str, ...] = option(tuple(METHODS), "which of them", choices=METHODS)
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
  }


def variance_settings(config: Config, method: str) -> dict[str, Any]:
  """The same for gradients of independent batches at the parameters that training begins with."""
  steps = config.variance_batches + (config.variance_warmup if method == "ppo" else 0)
  whole = {"minibatches": 1} if method == "ppo" else {}  # One update a step, of the whole batch.
  return settings(config, method, 1000) | whole | {
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


def do(method: str, given: dict[str, Any], workdir: Path, stop: interrupt.StopSignals) -> None:
  """Runs one experiment to its end, unless that is done; notes what memory it took.

  Raises `Interrupted` once the experiment has saved what it did, or `ConfigError` where it failed.
  """
  if (workdir / "result.json").exists():
    return
  command = [sys.executable, "-m", f"experiments.{method}"]
  command += [f"--{name}={value}" for name, value in (given | {"workdir": workdir}).items()]
  print("$", *command[1:], flush=True)
  stop.check()
  # What one run has compiled, the next one of the method reads.
  environment = {"JAX_COMPILATION_CACHE_DIR": str(workdir.absolute().parent / "compiled")}
  # A session of its own: Ctrl-C reaches us, and the run gets the one signal that we send.
  child = subprocess.Popen(command, env=environment | os.environ, start_new_session=True)
  received, done = None, 0
  while not done:
    time.sleep(0.2)
    try:
      stop.check()
    except interrupt.Interrupted as interruption:
      if received is None:
        child.send_signal(signal.SIGTERM)
      received = interruption
    done, status, usage = os.wait4(child.pid, os.WNOHANG)
  child.returncode = os.waitstatus_to_exitcode(status)
  if workdir.is_dir():
    with open(workdir / "peak_memory.txt", "a") as file:  # A line a piece, KiB.
      file.write(f"{usage.ru_maxrss}\n")
  if received is not None:
    raise received
  if child.returncode:
    raise ConfigError(
      "methods", method, "one whose run ends well", f"it ended with {child.returncode}; see above"
    )


def gradients(workdir: Path, count: int) -> list[np.ndarray]:
  """The policy's gradients that the last `count` checkpoints hold, each as one vector."""
  directory, found = workdir / "checkpoints", []
  for step in sorted(int(path.name) for path in directory.iterdir())[-count:]:
    leaves = json.loads((directory / str(step) / "manifest.json").read_text())["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype, shape in leaves}
    _, state, _ = Checkpointer(directory, keep=count).restore(wanted, step)
    # PPO's value network is the state's field `value`.
    moments = [n for n in sorted(state) if "/mu/" in n and not n.startswith("value/")]
    found.append(np.concatenate([np.asarray(state[name]).ravel() for name in moments]))
  return found


def curve(rows: Sequence[dict], *, responses: int) -> list[dict[str, float]]:
  """The evaluations of a run: tokens sampled and seconds of training before each, accuracy."""
  tokens = seconds = 0.0
  points = []
  for row in rows:
    if "eval/sampled_accuracy" in row:
      found = {name: row[f"eval/sampled_{name}"] for name in ("accuracy", "low", "high")}
      points.append({"tokens": tokens, "seconds": seconds, **found})
    tokens += responses * row.get("response_length_mean", 0.0)
    seconds += sum(row.get(f"time/{phase}", 0.0) for phase in phases([row]))
  return points


def phases(rows: Sequence[dict]) -> list[str]:
  """The phases of a step that train: not evaluations, not checkpoints."""
  names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")}
  return sorted(names - {"step", "eval", "checkpoint"})


def tokens_to(points: Sequence[dict[str, float]], target: float) -> float | None:
  """Tokens sampled before the accuracy first reaches the target, between two evaluations by the
  straight line; None where it never does.

  >>> tokens_to([{"tokens": 0, "accuracy": 0.2}, {"tokens": 100, "accuracy": 1.0}], 0.8)
  75.0
  """
  for before, after in zip(points, points[1:], strict=False):
    if before["accuracy"] < target <= after["accuracy"]:
      share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
      return round(before["tokens"] + share * (after["tokens"] - before["tokens"]), 6)
  return 0.0 if points[0]["accuracy"] >= target else None


def measure(config: Config, method: str) -> dict[str, Any]:
  """All figures of a method, from the records of its runs."""
  runs, root = [], Path(config.workdir)
  for seed in config.seeds:
    rows = metrics.read(root / f"{method}-seed{seed}" / "metrics.jsonl")
    memory = (root / f"{method}-seed{seed}" / "peak_memory.txt").read_text().split()
    points = curve(rows, responses=config.prompts_per_step * config.responses_per_prompt)
    trained = [row for row in rows if "time/rollout" in row][1:]  # The first compiles.
    runs.append({
      "seed": seed,
      "points": points,
      "tokens_to_target": tokens_to(points, config.target),
      "phases": {
        name: statistics.median(row.get(f"time/{name}", 0.0) for row in trained)
        for name in phases(trained)
      },
      "peak_gib": max(map(int, memory)) / 2**20,
    })
  noise = root / f"{method}-variance" / "noise.json"
  measured = json.loads(noise.read_text()) if config.variance_batches > 1 else None
  return {"method": method, "runs": runs, "noise": measured}


def table(config: Config, found: Sequence[dict[str, Any]]) -> str:
  """The comparison as Markdown, a column a method."""
  names = sorted({name for method in found for trial in method["runs"] for name in trial["phases"]})

  def column(method: dict[str, Any]) -> dict[str, str]:
    """Its cells by the names of their rows."""
    title, reward_model, networks, passes = METHODS[method["method"]]
    trials = method["runs"]
    seconds = {
      name: statistics.median(trial["phases"].get(name, 0.0) for trial in trials) for name in names
    }
    cells = {
      "": title,
      "reward model needed": reward_model,
      "networks held": networks,
      "passes per token trained": passes,
      **{f"seconds a step, {name}": f"{median:.1f}" for name, median in seconds.items()},
      "seconds a step, in all": f"{sum(seconds.values()):.1f}",
      "peak memory, GiB": f"{max(trial['peak_gib'] for trial in trials):.1f}",
    }
    if method["noise"] is not None:
      cells["gradient noise at the start"] = f"{float(method['noise']):.1f}"
    reached = (trial["tokens_to_target"] for trial in trials)
    shown = ("not reached" if count is None else f"{count:,.0f}" for count in reached)
    cells[f"tokens sampled to {config.target:.0%}"] = ", ".join(shown)
    for trial in trials:
      for when, point in (("before", trial["points"][0]), ("after", trial["points"][-1])):
        shown = "{accuracy:.2f} ({low:.2f} to {high:.2f})".format(**point)
        cells[f"accuracy {when}, seed {trial['seed']}"] = shown
    return cells

  columns = [column(method) for method in found]
  rows = [[name, *(cells[name] for cells in columns)] for name in columns[0]]
  lines = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in rows]
  return "\n".join([lines[0], "|---" * (len(found) + 1) + "|", *lines[1:], ""])


def page(config: Config, text: str) -> str:
  """The table with what it takes to read it and to get it again."""
  values, defaults = configs.flatten(config), configs.flatten(Config())
  given = [n for n in values if values[n] != defaults[n] and n not in ("workdir", "out")]
  command = " ".join(["python -m experiments.compare", *configs.to_flags(config, given)])
  noise = f"""
Gradient noise is trace(covariance) / |mean|^2 of the gradients of {config.variance_batches} \
batches of {config.prompts_per_step * config.responses_per_prompt} responses at the model that \
training begins with."""
  return f"""# {", ".join(METHODS[method][0] for method in config.methods)} side by side

`{command}` on {os.cpu_count()} cores, {platform.machine()}, JAX {jax.__version__}: \
{config.model}, {config.task}, {config.steps} steps of {config.prompts_per_step} problems x \
{config.responses_per_prompt} responses.

{text}
Accuracy is that of sampled answers to held-out problems, with its 95 % interval. Seconds of \
phases are medians over steps and seeds without the first step, which compiles; memory is the \
most of any run.{noise if config.variance_batches > 1 else ""}

![accuracy against tokens and time](compare.svg)
"""


def draw(config: Config, found: Sequence[dict[str, Any]], path: Path) -> None:
  """Accuracy against tokens sampled, and against seconds of training."""
  import matplotlib

  matplotlib.use("Agg")
  matplotlib.rcParams["svg.hashsalt"] = "rl_llm"  # The same figures give the same file.
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
  for color, method in enumerate(found):
    for axis, key, scale in ((axes[0], "tokens", 1e3), (axes[1], "seconds", 60)):
      for number, trial in enumerate(method["runs"]):
        axis.plot(
          [point[key] / scale for point in trial["points"]],
          [point["accuracy"] for point in trial["points"]],
          color=f"C{color}",
          marker="o",
          markersize=3,
          linewidth=1.2,
          label=METHODS[method["method"]][0] if number == 0 else None,
        )
  axes[0].set(xlabel="tokens sampled, thousands", ylabel="held-out accuracy at temperature 1")
  axes[1].set(xlabel="minutes of training, evaluations left out", ylim=(0, 1))
  for axis in axes:
    axis.axhline(config.target, color="0.7", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].legend(frameon=False)
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)


def compare(config: Config) -> list[dict[str, Any]]:
  """Does what is left to do, writes compare.json, compare.md and compare.svg; gives the figures.

  Raises `Interrupted` after a signal, or `ConfigError`: a run failed, or there is no matplotlib.
  """
  if importlib.util.find_spec("matplotlib") is None:  # Better now than after two hours.
    raise ConfigError(
      "out", config.out, "used where matplotlib is installed", "pip install matplotlib"
    )
  root = Path(config.workdir)
  with interrupt.StopSignals() as stop:
    for seed in config.seeds:
      for method in config.methods:
        do(method, settings(config, method, seed), root / f"{method}-seed{seed}", stop)
    for method in config.methods if config.variance_batches > 1 else ():
      directory = root / f"{method}-variance"
      if not (directory / "noise.json").exists():
        do(method, variance_settings(config, method), directory, stop)
        found = metrics.noise_to_signal(gradients(directory, config.variance_batches))
        files.write_atomically(directory / "noise.json", json.dumps(found).encode())
        shutil.rmtree(directory / "checkpoints")  # Gigabytes that nothing reads any more.
  found = [measure(config, method) for method in config.methods]
  text = table(config, found)
  for directory in dict.fromkeys((root, Path(config.out or root))):
    directory.mkdir(parents=True, exist_ok=True)
    figures = json.dumps(found, indent=1) + "\n"
    files.write_atomically(directory / "compare.json", figures.encode())
    files.write_atomically(directory / "compare.md", page(config, text).encode())
    draw(config, found, directory / "compare.svg")
  print(text, f"figure: {root / 'compare.svg'}", sep="\n")
  return found


if __name__ == "__main__":
  configs.run(lambda config: training.exit_code(lambda: compare(config)), Config)
