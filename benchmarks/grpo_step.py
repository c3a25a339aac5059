"""One GRPO step, ours, TRL's and Tunix's: same model, weights, prompts, machine, one run.

  make bench-peers                                           .venv-trl and .venv-tunix, once
  python -m benchmarks.grpo_step                             all three sides
  python -m benchmarks.grpo_step --peer=tunix                ours and Tunix's
  python -m benchmarks.grpo_step --trl_python=/path/python   TRL from an interpreter that has it
  python -m benchmarks.grpo_step --peer=mixed                ours, and ours in bfloat16
  python -m benchmarks.grpo_step --peer=none                 ours alone

A step samples every response, grades it, and makes one optimiser update. Each side is a process of
its own. They take turns, one step at a time, ours first; while one works the others wait, so any
other load on the machine affects all of them equally. The first steps, which compile and allocate,
do not count. Before the clock starts the sides must agree on the ids of the prompts and on how
likely the model finds them; after each step, on how many tokens were written.

The floor is what the step's matrix products alone would take at the best rate any side reaches
on a large square product, on this machine, in this run. It counts the least work that gives the
exact result: each prompt is read once for all its responses, in the update as in the rollout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from benchmarks.side import cores
from rl_llm.errors import ConfigError, UserError
from rl_llm.policy import TransformerConfig
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import forward_flops

MATMUL = 2048  # side of the square product whose rate is the floor's


class BenchmarkError(UserError, RuntimeError):
  """A side cannot be run, or the sides do not do the same work; the message says which and how."""


@dataclasses.dataclass(frozen=True)
class Config:
  """The step, and the settings of each side."""

  model: str = option("smollm2", "smollm2, a Hugging Face directory, a .gguf file; tiny: ours only")
  peer: Literal["trl", "tunix", "mixed", "all", "none"] = option(
    "all", "whom to measure against; mixed: ours in bfloat16, with float32 weights; all: the others"
  )
  prompts: int = option(4, "P, prompts a step", min=1)
  responses: int = option(8, "G, responses a prompt", min=2)
  prompt_tokens: int = option(46, "tokens of each prompt", min=8)
  new_tokens: int = option(64, "tokens of each response, no fewer and no more", min=1)
  steps: int = option(5, "steps timed on each side", min=1)
  warmup: int = option(1, "steps before them, not counted", min=1)
  microbatch_prompts: int = option(
    1, "ours: prompts whose responses' activations are held at once", min=1
  )
  remat: bool = option(False, "ours: compute activations twice instead of holding them")
  trl_python: str = option(".venv-trl/bin/python", "interpreter that has TRL")
  trl_batch_rows: int = option(32, "TRL: responses a batch; the rest is accumulated", min=1)
  trl_checkpointing: bool = option(
    True, "TRL: compute activations twice, its own default; false is faster and takes more memory"
  )
  tunix_python: str = option(".venv-tunix/bin/python", "interpreter that has Tunix")
  tunix_microbatch_prompts: int = option(
    1, "Tunix: prompts whose responses' activations are held at once", min=1
  )


class Side:
  """A process of `benchmarks.peers`, seen from here; `part` is its name there, if not the same."""

  def __init__(self, name: str, python: str, job: dict[str, Any], log: Path, *, part: str = ""):
    self.name, self._log = name, log
    root = Path(__file__).resolve().parents[1]
    with open(log, "w") as errors:
      self._process = subprocess.Popen(
        [python, "-m", "benchmarks.peers", part or name, json.dumps(job)],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": str(cores()), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
      )

  def __enter__(self) -> Side:
    return self

  def __exit__(self, *unused) -> None:
    self._process.stdin.close()
    try:
      self._process.wait(timeout=20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()

  def read(self) -> dict[str, Any]:
    """The side's next message."""
    line = self._process.stdout.readline()
    if not line:
      tail = self._log.read_text(errors="replace").strip().splitlines()[-12:]
      code = self._process.wait()
      raise BenchmarkError(f"the side {self.name} ended with code {code}:\n  " + "\n  ".join(tail))
    return json.loads(line)

  def step(self) -> dict[str, Any]:
    """One step, from the request until all of its results are there."""
    self._process.stdin.write("step\n")
    self._process.stdin.flush()
    return self.read()


def interpreters(config: Any, peers: dict[str, str]) -> dict[str, str]:
  """By side, ours first, the interpreter that runs it.

  Args:
    config: its `peer` is a key of `peers`, "all" or "none".
    peers: by name, the interpreter asked for.

  Raises:
    BenchmarkError: there is no such interpreter; the message names the flag and what makes it.
  """
  found = {"ours": sys.executable}
  for name, python in peers.items():
    if config.peer in (name, "all"):
      if not shutil.which(python):
        flag = "tunix_python" if name == "tunix" else "trl_python"
        raise BenchmarkError(
          f"--{flag}={python}: no such interpreter; `make bench-peers` makes .venv-trl and "
          ".venv-tunix with what is measured against, --peer=none measures ours alone"
        )
      # Not resolved: a virtual environment's interpreter is a link that depends on its location.
      found[name] = os.path.abspath(shutil.which(python))
  return found


def start_sides(
  commands: dict[str, str],
  job: dict[str, Any],
  scratch: str,
  stack: contextlib.ExitStack,
  *,
  prefix: str = "",
) -> tuple[list[Side], dict[str, dict[str, Any]]]:
  """Starts the sides, which end with `stack`, and waits until each has loaded its model.

  Args:
    commands: what `interpreters` gives.
    job: for all of them; of peers, the exported model's directory is added.
    scratch: an empty directory.
    stack: what the sides end with.
    prefix: of the side's name in `benchmarks.peers`.

  Returns:
    The sides, and by name what each said before its first step.
  """
  if len(commands) > 1:
    job = job | {"directory": str(Path(scratch, "model"))}
    with Side("export", sys.executable, job, Path(scratch, "export.log")) as export:
      job |= export.read()
  # One after the other, so that none loads while another measures its matrix product.
  sides, ready = [], {}
  for name, python in commands.items():
    log = Path(scratch, f"{name}.log")
    sides.append(stack.enter_context(Side(name, python, job, log, part=prefix + name)))
    ready[name] = sides[-1].read()
  return sides, ready


def check_same(ready: dict[str, dict[str, Any]], *, prompt_tokens: int) -> None:
  """Refuses to compare sides that read other prompts or hold other weights.

  Args:
    ready: by side, what it said before its first step.
    prompt_tokens: the length every prompt must have.

  Raises:
    BenchmarkError: they differ; the message says in what.
  """
  ours = ready["ours"]
  for name, side in ready.items():
    for ids in side["prompt_ids"]:
      if len(ids) != prompt_tokens:
        raise BenchmarkError(f"{name}: a prompt has {len(ids)} tokens, not {prompt_tokens}")
    if side["prompt_ids"] != ours["prompt_ids"]:
      raise BenchmarkError(f"{name}: reads the prompts as other ids than ours")
    gap = abs(side["prompt_logprob"] - ours["prompt_logprob"])
    if not gap < 1e-3:
      raise BenchmarkError(
        f"{name}: other weights than ours; mean log-prob of the first prompt's tokens "
        f"{side['prompt_logprob']:.4f} against {ours['prompt_logprob']:.4f}"
      )


def table(steps: dict[str, list[dict[str, float]]], *, forward: int, gflops: float) -> list[str]:
  """The figures as lines: seconds a step and its parts (medians), peak memory, ratio, floor.

  Args:
    steps: by side, one dict a timed step, as `benchmarks.peers` reports it.
    forward: what `rl_llm.runs.flops.forward_flops` gives.
    gflops: 1e9 floating-point operations a second, the best measured.
  """

  def median(name: str, key: str) -> float:
    return statistics.median(step[key] for step in steps[name])

  def peak(name: str) -> float:
    return max(step["peak_mb"] for step in steps[name])

  columns = "{:<6} {:>9} {:>18} {:>12} {:>8} {:>9} {:>12}"
  lines = [
    columns.format("side", "s/step", "min .. max", "generation", "reward", "update", "peak GiB")
  ]
  for name, taken in steps.items():
    seconds = [step["seconds"] for step in taken]
    spread = f"{min(seconds):.2f} .. {max(seconds):.2f}"
    parts = [f"{median(name, key):.2f}" for key in ("generation", "reward", "update")]
    row = (name, f"{median(name, 'seconds'):.2f}", spread, *parts, f"{peak(name) / 1024:.2f}")
    lines.append(columns.format(*row))
  for name in steps:
    if name == "ours":
      continue
    times = {
      key: median(name, key) / median("ours", key) for key in ("seconds", "generation", "update")
    }
    lines.append(
      f"ours is {times['seconds']:.2f} times as fast as {name} "
      f"(generation {times['generation']:.2f}, update {times['update']:.2f}); "
      f"{name} takes {peak(name) / peak('ours'):.2f} times the memory"
    )
  for name, taken in steps.items():
    if gaps := [step["logprob_gap"] for step in taken if "logprob_gap" in step]:
      lines.append(
        f"{name}: the sampler's and the trainer's log-probs differ by "
        f"{statistics.median(gaps):.2g} nats a token"
      )
  floor = {"generation": forward / gflops / 1e9, "update": 3 * forward / gflops / 1e9}
  total = sum(floor.values())
  lines.append(
    f"floor: {4 * forward / 1e12:.2f} TFLOP at {gflops:.0f} GFLOP/s take {total:.2f} s "
    f"(generation {floor['generation']:.2f}, update {floor['update']:.2f})"
  )
  for name in steps:
    parts = ", ".join(f"{part} {median(name, part) / floor[part]:.2f}" for part in floor)
    lines.append(f"{name} takes {median(name, 'seconds') / total:.2f} times the floor ({parts})")
  return lines


def main(config: Config) -> int:
  rows = config.prompts * config.responses
  wholes = {
    "microbatch_prompts": config.prompts,
    "tunix_microbatch_prompts": config.prompts,
    "trl_batch_rows": rows,
  }
  for name, size in wholes.items():
    value = getattr(config, name)
    if value < size and size % value:
      raise ConfigError(name, value, f"a divisor of {size}, or more than that")
  commands = interpreters(config, {"trl": config.trl_python, "tunix": config.tunix_python})
  if config.peer == "mixed":
    commands["mixed"] = sys.executable
  with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
    total = config.warmup + config.steps
    job = dataclasses.asdict(config) | {"matmul": MATMUL, "total_steps": total}
    sides, ready = start_sides(commands, job, scratch, stack)
    check_same(ready, prompt_tokens=config.prompt_tokens)

    print(
      f"{config.model}, float32: {config.prompts} prompts of {config.prompt_tokens} tokens x "
      f"{config.responses} responses of {config.new_tokens}; {platform.machine()}, {cores()} cores"
    )
    for name, message in ready.items():
      print(f"{name}: {message['versions']}; {message['note']}; {message['gflops']:.0f} GFLOP/s")
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    for number in range(total):
      for side in sides:
        taken = side.step()
        if taken["tokens"] != rows * config.new_tokens:
          raise BenchmarkError(
            f"{side.name}: wrote {taken['tokens']} tokens, not {rows * config.new_tokens}"
          )
        warm = number >= config.warmup
        if warm:
          steps[side.name].append(taken)
        word = "" if warm else " (not counted)"
        print(f"step {number} {side.name}: {taken['seconds']:.2f} s{word}", flush=True)
    forward = forward_flops(
      TransformerConfig(**ready["ours"]["shape"]),
      [config.prompt_tokens] * config.prompts,
      [config.new_tokens] * rows,
    )
    gflops = max(side["gflops"] for side in ready.values())
    print(*table(steps, forward=forward, gflops=gflops), sep="\n")
  return 0


if __name__ == "__main__":
  run(main, Config)
