"""Which models fit on which slices: docs/results/plan.md, one `launch.plan` a row.

  python -m benchmarks.plan_table            compiles what is missing, and writes the table
  python -m benchmarks.plan_table --limit=0  writes it from what there is

Needs libtpu (pip install jax[tpu]). Each row is compiled by a process of its own and kept as soon
as it is done, so an interruption loses one row and the same command continues with the rest. A row
that is not compiled says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from launch.chips import find_chip
from launch.plan import Program
from rl_llm.files import write_atomically
from rl_llm.runs.chips import Chip
from rl_llm.runs.config import option, run

# (model, topology, flags): GRPO's full fine-tune, 256 problems a step, 8 responses of 1,024 tokens.
ROWS = (
  ("qwen2.5-1.5b", "v5e:4x4", "--microbatch_prompts=16"),
  ("qwen2.5-7b", "v5e:16x16", "--mesh.gather=token"),
  ("qwen2.5-7b", "v5e:16x16", "--mesh.fsdp=64 --mesh.tensor=4 --microbatch_prompts=128"),
  ("qwen2.5-32b", "v5p:4x4x4", "--mesh.gather=token --microbatch_prompts=64"),
  ("qwen2.5-32b", "v5p:4x4x4", "--mesh.fsdp=16 --mesh.tensor=4 --microbatch_prompts=64"),
  (
    "llama-3.1-70b",
    "v6e:16x16",
    "--mesh.fsdp=64 --mesh.tensor=4 --mesh.gather=token --microbatch_prompts=64",
  ),
)
HEAD = """# What fits on which slice

`python -m benchmarks.plan_table`: the update and the rollout of GRPO's full fine-tune (float32
weights and moments, bfloat16 arithmetic, remat, layers scanned), compiled for slices that were not
there. A step is 256 problems of 512 tokens with 8 responses of 1,024. GB are those of one chip,
from the compiler: *resident* are moments that stay while a rollout runs. *Binds* is the largest of
three lower bounds, of compute, HBM and network. *Compiling* is in seconds of the processors (2
cores). Nothing was run on such a chip.

An update reads each matrix for hundreds of thousands of tokens, so gathering it costs little. A
decode step reads it for one token a row: a rollout gathers all weights before its first token
(*gather*) and then waits for HBM, or, where a chip has no room for them, gathers each at every
token (`--mesh.gather=token`) and waits for the network, longer than the update takes.
`--mesh.tensor` divides what is gathered ([parallelism.md](../parallelism.md)).

Without a compiler, `launch.plan` goes by formula (`launch/estimate.py`). Its peaks are 0.78 to 1.24
times those of this table, which its factors were chosen on.

| model | slice | mesh | program | arguments | temporaries | resident | peak of \
| binds | compiling | fits |
|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class Config:
  """Where, and how much of it."""

  out: str = option("docs/results", "directory of plan.md and plan.json")
  limit: int = option(100, "rows to compile, at most", min=0)
  hours: float = option(2.0, "after which a row is given up", above=0)


def command(model: str, topology: str, flags: str) -> str:
  return " ".join(f"python -m launch.plan --topology={topology} --model={model} {flags}".split())


def continued(command: str) -> str:
  r"""A command for the shell, on as many lines as it needs.

  >>> print(continued("python -m launch.plan --topology=v5e:4x4 --model=qwen2.5-7b --mesh.fsdp=64"))
  python -m launch.plan --topology=v5e:4x4 --model=qwen2.5-7b --mesh.fsdp=64
  >>> print(continued("python -m launch.plan --model=qwen2.5-7b " + 4 * "--mesh.tensor=4 "))
  python -m launch.plan --model=qwen2.5-7b --mesh.tensor=4 --mesh.tensor=4 \
    --mesh.tensor=4 --mesh.tensor=4
  """
  lines = textwrap.wrap(command, width=86, subsequent_indent="  ", break_on_hyphens=False)
  return " \\\n".join(lines)


def compile_row(row: str, *, seconds: float) -> dict | None:
  """The figures of a command of `launch.plan`; None: there are none, and it has said why."""
  with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, "figures.json")
    words = [sys.executable, *row.split()[1:], f"--json={path}"]
    try:
      subprocess.run(words, timeout=seconds)
    except subprocess.TimeoutExpired:
      print(f"not done in {seconds:.0f} s", flush=True)
    return json.loads(Path(path).read_text()) if os.path.exists(path) else None


def row_lines(row: tuple[str, str, str], found: dict | None) -> list[str]:
  """One line a program."""
  model, topology, flags = row
  if found is None:
    return [f"| {model} | {topology} | {mesh(flags)} | - | - | - | - | - | - | - | not compiled |"]
  chip, _ = find_chip(topology)
  head = model, topology, mesh(flags)
  return [program_line(*head, Program(**fields), chip) for fields in found["programs"]]


def mesh(flags: str) -> str:
  """What the flags say of the mesh.

  >>> mesh("--mesh.fsdp=64 --mesh.gather=token --microbatch_prompts=64"), mesh("")
  ('fsdp=64, gather=token', 'fsdp=all')
  """
  said = [flag.removeprefix("--mesh.") for flag in flags.split() if flag.startswith("--mesh.")]
  if not any(word.startswith("fsdp=") for word in said):
    said.insert(0, "fsdp=all")
  return ", ".join(said)


def program_line(model: str, topology: str, mesh: str, program: Program, chip: Chip) -> str:
  times = program.times(chip)
  binding = max(times, key=times.get)
  gigabytes = [f"{x / 1e9:.2f}" for x in (program.arguments, program.temporaries, program.resident)]
  cells = (
    model,
    topology,
    mesh,
    program.name,
    *gigabytes,
    f"{program.peak / 1e9:.1f} of {chip.hbm / 1e9:.0f}",
    f"{binding}, {times[binding]:.2f} s",
    f"{program.compile_seconds:.0f} s",
    "yes" if program.peak <= chip.hbm else "no",
  )
  return f"| {' | '.join(cells)} |"


def page(found: dict[str, dict]) -> str:
  """The table, and the command of each row."""
  lines, commands = [], []
  for row in ROWS:
    lines += row_lines(row, found.get(command(*row)))
    commands.append(continued(command(*row)))
  return HEAD + "\n".join([*lines, "\nThe rows' commands:\n\n```sh", *commands, "```\n"])


def main(config: Config) -> None:
  out = Path(config.out)
  kept = out / "plan.json"
  found = json.loads(kept.read_text()) if kept.exists() else {}
  missing = [command(*row) for row in ROWS if command(*row) not in found]
  for row in missing[: config.limit]:
    print(row, flush=True)
    figures = compile_row(row, seconds=3600 * config.hours)
    if figures is not None:
      found[row] = figures
      write_atomically(kept, json.dumps(found, indent=1).encode())
    write_atomically(out / "plan.md", page(found).encode())
  write_atomically(out / "plan.md", page(found).encode())


if __name__ == "__main__":
  run(main, Config)
