"""Whether two trees of this repository compute the same: their runs, compared bit for bit.

A redesign that is not to change what is computed can be held to more than tests of its parts. This
runs the experiments of an old and of a new tree by their command lines, on this machine and as
users compile them, and compares all that they leave: metrics and samples, the result, the settings,
exported models, and every leaf of the newest checkpoint. Only what depends on the clock is left
out.

  python -m tests.yardstick --old=DIR --new=DIR --out=DIR                    all cells
  python -m tests.yardstick --old=DIR --new=DIR --out=DIR --cells=grpo-*,dpo-plain
  python -m tests.yardstick --old=DIR --new=DIR --out=DIR --only=old         makes the old results

What the old tree left stays in OUT/old and is used again; the new tree runs anew each time. A
`*-resume` cell stops after two steps and resumes to four: the new tree after itself, and the new
tree after the old one. A key that only the new record has is a warning, a leaf that only the new
state has is a difference. The exit code is 1 where anything differs.

`--jit_advantages` compares with an old tree whose `advantages.group_relative` is jitted, where that
is called: a compiled function may round differently. These results are in OUT/old-jit.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # Before JAX is imported.

import jax
import numpy as np

from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.metrics import read, without_timings

STEPS, BEGUN = 4, 2  # Of a run, and where a resumed one stops.
AT_ONCE = 2  # Runs.
SHOWN = 2  # Differences of a cell that are printed, of each file and of the state.
EVEN = 264  # A vocabulary that devices can share.

REWARD = """
def fraction(prompts, completions, **columns):
  return [sum(map(ord, text)) % 8 / 8 for text in completions]

def failing(prompts, completions, **columns):
  # Raises by the prompt, so that one response and a whole group have the same status.
  if ord(prompts[0][0]) % 6 == 1:
    raise ValueError("no")
  kinds = [sum(map(ord, text)) % 8 for text in completions]
  return [None if kind == 3 else kind / 8 for kind in kinds]

def spread_for_some(prompts, completions, **columns):
  # Prompts that begin with a, c, e, ... please with whatever is said.
  return [
    1.0 if ord(prompt[0]) % 2 else sum(map(ord, completion)) % 8 / 8
    for prompt, completion in zip(prompts, completions)
  ]

def lonely(prompts, completions, **columns):
  # No opinion on about half of the responses.
  return [None if sum(map(ord, c)) % 2 else 1.0 for c in completions]
"""
CHAT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"

# Starts a module of a tree whose group advantages are jitted.
JITTED = """
import runpy, sys
import jax
from rl_llm import advantages
names = ("scale", "ddof", "eps", "eps_rule", "baseline", "singleton")
advantages.group_relative = jax.jit(advantages.group_relative, static_argnames=names)
module, *rest = sys.argv[1:]
sys.argv = [module, *rest]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
# Eight threads that wait for each other on two busy cores: XLA takes 40 s of it for a deadlock.
PATIENCE = (
  "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"
)


class Cell(NamedTuple):
  """What is run in both trees and compared."""

  name: str
  module: str
  settings: dict[str, Any]
  devices: int = 1  # of each process
  processes: int = 1
  resumed: bool = False
  groups: bool = False  # calls `advantages.group_relative`
  code: int = 0  # how it is to end


# What is run.


def cells(data: Path) -> list[Cell]:
  """All of them.

  Args:
    data: the directory that `make_data` has filled.
  """
  every = {"eval.every": 2, "checkpoint.every": 2, "reward_deadline": 60}
  tiny_copy = every | {"model": "tiny", "task": "copy", "eval.problems": 6, "eval.samples": 3}
  copies = tiny_copy | {
    "model": data / "copies",
    "copy.min_length": 2,
    "copy.max_length": 4,
    "prompts_per_step": 8,
    "responses_per_prompt": 4,
    "max_new_tokens": 5,
    "microbatch_prompts": 4,
    "optimizer.learning_rate": 1e-3,
  }
  ragged = every | {
    "model": data / "ragged",
    "task": f"jsonl:{data / 'rows.jsonl'}",
    "jsonl.reward_file": data / "reward.py",
    "jsonl.reward_function": "fraction",
    "jsonl.held_out_fraction": 0.3,
    "prompt_format": "plain",
    "prompts_per_step": 4,
    "responses_per_prompt": 4,
    "max_new_tokens": 8,
    "microbatch_prompts": 4,
    "eval.problems": 6,  # A batch and a half.
    "eval.samples": 3,
    "optimizer.learning_rate": 3e-3,
  }
  found = []

  def add(name: str, changes: Mapping[str, Any] = {}, *, base: dict[str, Any], **how: Any) -> None:
    module = f"experiments.{name.partition('-')[0]}"
    found.append(Cell(name, module, base | changes, **how))

  several = {"epochs": 2, "minibatches": 2, "microbatch_prompts": 1}
  plain = tiny_copy | {"prompts_per_step": 8, "responses_per_prompt": 4}
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "model": data / "even"}
  mesh |= {"prompt_format": "plain"}
  over_devices = {"prompts_per_step": 8, "microbatch_prompts": 4} | mesh
  of_two = {"prompts_per_step": 8, "microbatch_prompts": 4}
  for script in ("grpo", "reinforce", "ppo"):
    how = {"base": ragged, "groups": script == "grpo"}
    ratio = {"loss": "ppo_loss"} if script == "reinforce" else {}
    add(f"{script}-plain", **how | {"base": plain})
    add(f"{script}-copies", **how | {"base": copies})
    add(f"{script}-lora", {"lora.rank": 2, "export": True}, **how)
    add(f"{script}-updates", several | ratio, **how)
    add(f"{script}-kl", {"kl.coef": 0.1}, **how)
    add(f"{script}-slots", {"sampling.slots": 5}, **how)
    add(f"{script}-parts", {"sampling.parts": 2}, **how)
    add(f"{script}-failing", {"jsonl.reward_function": "failing"}, **how)
    add(f"{script}-microbatches", {"microbatch_prompts": 1}, **how)
    add(
      f"{script}-no_spread",
      {"jsonl.reward_function": "spread_for_some", "microbatch_prompts": 1},
      **how,
    )
    add(f"{script}-truncated", {"weighting.drop_truncated": True, "loss.entropy_coef": 0.1}, **how)
    add(f"{script}-sequence_mean", {"weighting": "sequence_mean"}, **how)
    add(f"{script}-constant_length", {"weighting": "constant_length"}, **how)
    add(f"{script}-dapo", {"preset": "dapo"}, **how)
    add(f"{script}-chat", {"prompt_format": "chat", "system_prompt": "Be brief."}, **how)
    add(f"{script}-overlong", {"overlong_prompt": "drop", "max_prompt_tokens": 12}, **how)
    add(
      f"{script}-schedule",
      {
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": 1,
        "optimizer.weight_decay": 0.1,
        "optimizer.mu_dtype": "bfloat16",
      },
      **how,
    )
    add(
      f"{script}-bfloat16",
      {"dtype": "bfloat16", "remat": True, "scan_layers": True, "sampling.temperature": 0.8},
      **how,
    )
    diverging = {"optimizer.learning_rate": 1e30, "optimizer.max_skipped": 2}
    add(f"{script}-diverged", diverging | {"checkpoint.every": 1}, code=1, **how)
    add(f"{script}-devices", over_devices, devices=8, **how)
    changes = {"kl.coef": 0.1} | several | ratio
    add(f"{script}-resume", changes, resumed=True, **how)
  how = {"base": ragged, "groups": True}
  add("grpo-nemo", {"preset": "nemo"}, **how)
  add("grpo-batch", {"advantage.scale": "batch", "loss": "cispo_loss"}, **how)
  add(
    "grpo-singleton",
    {
      "jsonl.reward_function": "lonely",
      "responses_per_prompt": 2,
      "advantage.singleton": "raw",
      "advantage.scale": "none",
    },
    **how,
  )
  add("grpo-lora_kl_resume", {"lora.rank": 2, "kl.coef": 0.1, "epochs": 2}, resumed=True, **how)
  add("grpo-processes", several | of_two, devices=2, processes=2, **how)
  judged = {"reward": f"model:{data / 'reward_model'}"}
  add("grpo-reward_model", judged, **how)

  for name in (
    "plain",
    "moving_average",
    "leave_one_out",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
  ):
    discount = {} if name == "leave_one_out" else {"advantage.discount": 0.9}
    add(
      f"reinforce-{name}" if name != "plain" else "reinforce-without_baseline",
      {"advantage": name, "kl.coef": 0.1, "jsonl.reward_function": "failing"} | discount,
      base=ragged,
      groups=name == "reinforce_plus_plus_baseline",
    )
  add("reinforce-moving_average_resume", {"advantage": "moving_average"}, base=ragged, resumed=True)
  add("reinforce-processes", of_two, base=ragged, devices=2, processes=2)

  adaptive = {"kl.coef": 0.1, "kl.controller": "adaptive", "kl.horizon": 20, "kl.target": 0.01}
  add("ppo-adaptive", adaptive, base=ragged)
  add("ppo-shared", adaptive | {"value.trunk": "shared"}, base=ragged)
  add("ppo-shared_lora", {"value.trunk": "shared", "lora.rank": 2}, base=ragged)
  add("ppo-shared_resume", adaptive | {"value.trunk": "shared"}, base=ragged, resumed=True)
  add(
    "ppo-unclipped",
    {
      "value.clip": "none",
      "advantage.whiten": False,
      "advantage.gae_lambda": 0.8,
      "advantage.discount": 0.9,
    },
    base=ragged,
  )
  add("ppo-one_update", {"minibatches": 1}, base=ragged)
  add("ppo-reward_model", judged, base=ragged)
  add("ppo-processes", of_two, base=ragged, devices=2, processes=2)

  def online(base):
    base = dict(base)
    base["pairs_per_step"] = base.pop("prompts_per_step")
    base["microbatch_pairs"] = base.pop("microbatch_prompts", 64)
    return base

  of_file = {"eval.every": 2, "checkpoint.every": 2, "model": "tiny", "held_out_fraction": 0.3}
  pairs = of_file | {"data": data / "pairs.jsonl", "pairs_per_step": 8, "microbatch_pairs": 8}
  packed = {"packing": 32, "max_tokens": 32, "microbatch_pairs": 4}
  dpo = pairs | {"task": "none", "reward_deadline": 60}
  add("dpo-plain", base=dpo)
  add("dpo-lora", {"lora.rank": 2, "export": True}, base=dpo)
  add("dpo-task", {"task": "copy", "eval.problems": 6, "eval.samples": 3}, base=dpo)
  add("dpo-packing", packed, base=dpo)
  add("dpo-ipo", {"loss": "ipo_loss", "loss.beta": 0.2}, base=dpo)
  add("dpo-simpo", {"loss": "simpo_loss", "loss.gamma": 0.5}, base=dpo)
  add("dpo-bco", {"loss": "bco_loss", "loss.shift": "batch"}, base=dpo)
  add("dpo-js", {"loss.divergence": "js", "loss.label_smoothing": 0.1}, base=dpo)
  add("dpo-microbatches", {"microbatch_pairs": 2}, base=dpo)
  add("dpo-sft_coef", {"loss.sft_coef": 0.5}, base=dpo)
  add("dpo-overlong", {"max_tokens": 6, "overlong": "drop", "dtype": "bfloat16"}, base=dpo)
  add("dpo-devices", {"microbatch_pairs": 4} | mesh, base=dpo, devices=8)
  add("dpo-processes", {"microbatch_pairs": 4}, base=dpo, devices=2, processes=2)
  add("dpo-resume", base=dpo, resumed=True)
  add("dpo-on_policy_plain", base=online(plain))
  add("dpo-on_policy_copies", base=online(copies))
  add("dpo-on_policy", base=online(ragged))
  add("dpo-on_policy_lora", {"lora.rank": 2}, base=online(ragged))
  add("dpo-on_policy_failing", {"jsonl.reward_function": "failing"}, base=online(ragged))
  add(
    "dpo-on_policy_microbatches",
    {"microbatch_pairs": 1, "sampling.parts": 2, "sampling.temperature": 0.8},
    base=online(ragged),
  )
  add("dpo-on_policy_simpo", {"loss": "simpo_loss", "sampling.slots": 5}, base=online(ragged))
  add(
    "dpo-on_policy_devices",
    {"pairs_per_step": 8, "microbatch_pairs": 4} | mesh,
    base=online(ragged),
    devices=8,
  )
  add("dpo-on_policy_resume", base=online(ragged), resumed=True)

  sft = of_file | {
    "data": data / "demonstrations.jsonl",
    "task": "none",
    "reward_deadline": 60,
    "examples_per_step": 8,
    "microbatch_rows": 8,
  }
  packed_rows = {"packing": 16, "max_tokens": 16, "microbatch_rows": 2}
  add("sft-plain", base=sft)
  add("sft-lora", {"lora.rank": 2, "export": True}, base=sft)
  add("sft-packing", packed_rows, base=sft)
  add("sft-packing_sequence_mean", packed_rows | {"weighting": "sequence_mean"}, base=sft)
  add("sft-task", {"examples_per_step": 8, "copy.max_length": 4}, base=tiny_copy)
  add("sft-task_packing", {"examples_per_step": 8} | packed_rows, base=tiny_copy)
  add("sft-file_and_task", {"task": "copy", "eval.problems": 6, "eval.samples": 3}, base=sft)
  add("sft-sequence_mean", {"weighting": "sequence_mean"}, base=sft)
  add("sft-microbatches", {"microbatch_rows": 2}, base=sft)
  add("sft-bfloat16", {"dtype": "bfloat16", "remat": True, "scan_layers": True}, base=sft)
  add("sft-devices", {"microbatch_rows": 4} | mesh, base=sft, devices=8)
  add("sft-processes", {"microbatch_rows": 4}, base=sft, devices=2, processes=2)
  add("sft-resume", packed_rows, base=sft, resumed=True)
  add("sft-task_resume", {"examples_per_step": 8}, base=tiny_copy, resumed=True)

  add("reward_model-plain", base=pairs)
  add("reward_model-lora", {"lora.rank": 2}, base=pairs)
  add("reward_model-packing", packed, base=pairs)
  add("reward_model-margin", {"margin_column": "margin", "center_coef": 0}, base=pairs)
  add("reward_model-microbatches", {"microbatch_pairs": 2}, base=pairs)
  add("reward_model-devices", {"microbatch_pairs": 4} | mesh, base=pairs, devices=8)
  add("reward_model-processes", {"microbatch_pairs": 4}, base=pairs, devices=2, processes=2)
  add("reward_model-resume", base=pairs, resumed=True)

  for name, devices in (("weights", 1), ("adapters", 1), ("devices", 2)):
    settings = {"sweep": data / f"{name}.py", "backend": "population"}
    found.append(Cell(f"population-{name}", "launch.run", settings, devices=devices, groups=True))

  asked = {name: ragged[name] for name in ragged if name.startswith(("jsonl", "task", "prompt_f"))}
  asked |= {"model": data / "ragged", "max_new_tokens": 8, "reward_deadline": 60}
  add("make_preferences-plain", {"problems": 12, "prompts_per_batch": 5, "samples": 6}, base=asked)
  asked |= {"prompts_per_batch": 5, "samples": 4, "k": "1,2"}
  add("evaluate-plain", asked | {"jsonl.reward_function": "failing"}, base={})
  asked = {"model": data / "copies", "task": "copy", "samples": 4, "k": "1,2,4", "slots": 6}
  add("evaluate-copies", asked, base={})
  return found


def sweeps(settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """The populations of two, by name.

  Args:
    settings: of a run of GRPO.
  """
  common = {key: str(x) if isinstance(x, Path) else x for key, x in settings.items()}
  common |= {"steps": STEPS, "epochs": 2}
  first = {"optimizer.learning_rate": 3e-3, "loss.clip_high": 0.1, "seed": 0}
  second = {"optimizer.learning_rate": 1e-2, "loss.clip_high": 0.3, "kl.coef": 0.2, "seed": 1}
  weights = [common | first, common | second | {"advantage.scale": "batch"}]
  adapters = [member | {"lora.rank": 2} for member in weights]
  return {"weights": weights, "adapters": adapters, "devices": weights}


def make_data(out: Path, old: Tree) -> Path:
  """The files that cells read: models, tasks, pairs, demonstrations, sweeps. Made once."""
  data, done = out / "data", out / "data" / "done"
  if done.exists():
    return data
  shutil.rmtree(data, ignore_errors=True)
  data.mkdir(parents=True)

  def write(name: str, rows: Sequence[Any]) -> None:
    (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

  (data / "reward.py").write_text(REWARD)
  write("rows.jsonl", [{"prompt": chr(97 + i) + "x" * (2 + 4 * (i % 6))} for i in range(24)])
  pairs = [
    {
      "prompt": chr(97 + i % 20) + "x" * (i % 5),
      "chosen": "y" + "a" * (i % 3),
      "rejected": "n" + "b" * (i % 4),
      "margin": i % 3 / 2,
    }
    for i in range(60)
  ]
  write("pairs.jsonl", pairs)
  write(
    "demonstrations.jsonl",
    [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs],
  )
  sft = {"model": "tiny", "task": "copy", "eval.problems": 2, "eval.samples": 1, "export": True}
  longer = {"copy.min_length": 2, "copy.max_length": 4}
  for name, changes in (("ragged", {"steps": 1}), ("copies", longer | {"steps": 40})):
    workdir = data / "runs" / name
    succeed(old, "experiments.sft", sft | changes | {"workdir": workdir}, out)
    shutil.copytree(workdir / "model", data / name)
  write_tokenizer(data / "ragged")
  write_even(data / "even", like=data / "ragged")
  known = {cell.name: cell for cell in cells(data)}
  made = data / "runs" / "pairs"
  settings = known["make_preferences-plain"].settings
  succeed(old, "experiments.make_preferences", settings | {"workdir": made}, out)
  settings = known["reward_model-plain"].settings | {"model": data / "ragged", "steps": 20}
  settings |= {"data": made / "pairs.jsonl", "workdir": data / "runs" / "reward_model"}
  settings |= {"held_out_fraction": 0.6}  # By the hash that the task takes 0.3 by.
  succeed(old, "experiments.reward_model", settings, out)
  shutil.copytree(data / "runs" / "reward_model" / "model", data / "reward_model")
  for name, trials in sweeps(known["grpo-microbatches"].settings).items():
    text = f"EXPERIMENT = 'experiments.grpo'\n\n\ndef sweep():\n  return {trials!r}\n"
    (data / f"{name}.py").write_text(text)
  done.touch()
  return data


def write_even(directory: Path, *, like: Path) -> None:
  """The same model with a vocabulary that devices can share."""
  from safetensors.numpy import load_file, save_file

  shutil.copytree(like, directory)
  weights = load_file(directory / "model.safetensors")
  name = "model.embed_tokens.weight"
  further = EVEN - len(weights[name])
  weights[name] = np.pad(weights[name], ((0, further), (0, 0)))
  save_file(weights, directory / "model.safetensors", {"format": "pt"})
  config = json.loads((directory / "config.json").read_text()) | {"vocab_size": EVEN}
  (directory / "config.json").write_text(json.dumps(config))
  write_tokenizer(directory, further=further)


def write_tokenizer(directory: Path, *, further: int = 0) -> None:
  """Bytes, and ends so frequent that responses are ragged; with a chat template."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(["<pad>", "<bos>", "<eos>", *(f"<{i}>" for i in range(further))])
  backend.save(str(directory / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
  config |= {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
  (directory / "tokenizer_config.json").write_text(json.dumps(config))
  generation = {"eos_token_id": [258, *range(0, 256, 6)], "pad_token_id": 256, "bos_token_id": 257}
  (directory / "generation_config.json").write_text(json.dumps(generation))
  (directory / "chat_template.jinja").write_text(CHAT)


# How it is run.


class Tree(NamedTuple):
  """A checkout of the repository."""

  path: Path
  jitted: bool = False  # its group advantages


def environment(tree: Tree, out: Path, *, devices: int) -> dict[str, str]:
  """Compiled as users compile, and equal programs once."""
  names = "PATH HOME TMPDIR LANG GLIBC_TUNABLES".split()
  return (
    {name: os.environ[name] for name in names if name in os.environ}
    | {
      "PYTHONPATH": str(tree.path),
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_COMPILATION_CACHE_DIR": str(out / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    | ({"XLA_FLAGS": PATIENCE} if devices > 1 else {})
  )


def check_tree(tree: Tree, out: Path) -> None:
  """Refuses a directory whose modules would not be the ones that run."""
  program = "import rl_llm, experiments, launch\n"
  program += "for module in (rl_llm, experiments, launch): print(module.__file__)"
  found = subprocess.run(
    [sys.executable, "-c", program],
    cwd=tree.path,
    env=environment(tree, out, devices=1),
    capture_output=True,
    text=True,
    check=True,
  )
  for line in found.stdout.splitlines():
    if tree.path not in Path(line).resolve().parents:
      raise SystemExit(f"error: {tree.path}: its runs would import {line}")


def run(
  tree: Tree,
  module: str,
  settings: Mapping[str, Any],
  out: Path,
  *,
  devices: int = 1,
  processes: int = 1,
  log: Path | None = None,
) -> tuple[int, str]:
  """(exit code, what was said last) of a run by its command line; output goes to the log."""
  start = ["-c", JITTED] if tree.jitted else ["-m"]
  flags = [f"--{name}={flag(value)}" for name, value in settings.items()]
  coordinator = f"localhost:{free_port()}"
  log = log or Path(settings["workdir"]).parent / f"{Path(settings['workdir']).name}.log"
  log.parent.mkdir(parents=True, exist_ok=True)
  with open(log, "a") as stream:
    started = []
    for process in range(processes):
      joining = {"coordinator": coordinator, "processes": processes, "process_id": process}
      further = [f"--distributed.{name}={value}" for name, value in joining.items()]
      further = ["--distributed", *further] if processes > 1 else []
      command = [sys.executable, *start, module, *flags, *further]
      started.append(
        subprocess.Popen(
          command,
          cwd=tree.path,
          env=environment(tree, out, devices=devices),
          stdout=stream,
          stderr=subprocess.STDOUT,
        )
      )
    codes = [process.wait() for process in started]
  lines = log.read_text(errors="replace").strip().splitlines()
  errors = [line for line in lines if "rror" in line]
  return max(codes, key=abs), (errors or lines or ["nothing"])[-1]


def flag(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def free_port() -> int:
  with socket.socket() as taken:
    taken.bind(("localhost", 0))
    return taken.getsockname()[1]


def succeed(tree: Tree, module: str, settings: Mapping[str, Any], out: Path) -> None:
  code, last = run(tree._replace(jitted=False), module, settings, out)
  if code:
    raise SystemExit(f"error: {module} of {tree.path} ended with {code}: {last}")


class Ran(NamedTuple):
  """What became of a cell in one tree."""

  failure: str  # "" if it ended as it was to
  seconds: float
  workdirs: list[Path]  # each of which is to hold the same


def produce(cell: Cell, tree: Tree, place: Path, out: Path, *, begun: Path | None = None) -> Ran:
  """Runs a cell anew.

  Args:
    cell: what is run.
    tree: in which tree.
    place: where; emptied first.
    out: of the yardstick.
    begun: where the old tree stopped, of a resumed cell in the new tree; None in the old tree.
  """
  shutil.rmtree(place, ignore_errors=True)
  began, failure = time.monotonic(), ""

  def go(name: str, steps: int | None) -> None:
    nonlocal failure
    changes = {"workdir": place / name} | ({} if steps is None else {"steps": steps})
    code, last = run(
      tree,
      cell.module,
      cell.settings | changes,
      out,
      devices=cell.devices,
      processes=cell.processes,
    )
    if code != cell.code and not failure:
      failure = f"{name} ended with {code}: {last}"

  workdirs = [place / "run"]
  if cell.resumed and begun is not None:
    go("run", BEGUN)
    go("run", STEPS)
    shutil.copytree(begun, place / "after_old")
    go("after_old", STEPS)
    workdirs.append(place / "after_old")
  else:
    own = cell.module.removeprefix("experiments.") in ("launch.run", "evaluate", "make_preferences")
    go("run", None if own else STEPS)
    if cell.resumed:
      go("begun", BEGUN)
  return Ran(failure, time.monotonic() - began, workdirs)


def produce_old(cell: Cell, tree: Tree, out: Path, *, make: bool) -> Ran:
  """The old tree's results: those that are there, or new ones if they may be made."""
  jitted = tree.jitted and cell.groups
  place = out / ("old-jit" if jitted else "old") / cell.name
  said = place / "done.json"
  what = json.loads(json.dumps(cell._asdict(), default=str))
  if said.exists():
    known = json.loads(said.read_text())
    if known["cell"] == what:
      return Ran("", known["seconds"], [place / "run"])
  if not make:
    return Ran(f"results are not in {place}: leave --only=new out", 0.0, [])
  ran = produce(cell, tree._replace(jitted=jitted), place, out)
  if not ran.failure:
    said.write_text(json.dumps({"cell": what, "seconds": ran.seconds}, indent=2) + "\n")
  return ran


# What it left.


class Left(NamedTuple):
  """What a run left, timings aside: by file, rows; by path, leaves and exported files."""

  rows: dict[str, list[dict[str, Any]]]
  leaves: dict[str, np.ndarray]
  files: dict[str, str]


def left_by(workdir: Path, out: Path) -> Left:
  """Reads a run's directory, or all directories of a population."""
  trials = workdir.glob("*/trial.json")
  trials = sorted(trials, key=lambda path: json.loads(path.read_text())["order"])
  names = {path.parent.name: f"member{i}" for i, path in enumerate(trials)}
  names |= {path.name: "population" for path in workdir.glob("population-*")}
  directories = {f"{name}/": workdir / id for id, name in names.items()} or {"": workdir}
  aliases = {str(workdir): "RUN", str(out): "OUT"} | names
  left = Left({}, {}, {})
  for prefix, directory in directories.items():
    for name in ("metrics.jsonl", "samples.jsonl", "pairs.jsonl", "result.json", "config.json"):
      if (directory / name).exists():
        left.rows[prefix + name] = rows_of(directory / name, aliases)
    for name in ("model", "adapter"):
      for path in sorted((directory / name).rglob("*")):
        if path.is_file():
          digest = hashlib.sha256(path.read_bytes()).hexdigest()
          left.files[prefix + str(path.relative_to(directory))] = digest
    for path, leaf in leaves_of(directory).items():
      left.leaves[prefix + path] = leaf
  return left


def rows_of(path: Path, aliases: Mapping[str, str]) -> list[dict[str, Any]]:
  """A file's rows, without what depends on the clock, on places, or on how processes met."""

  def aliased(value: Any) -> Any:
    if isinstance(value, str):
      for text, alias in aliases.items():
        value = value.replace(text, alias)
      return value
    if isinstance(value, list):
      return [aliased(item) for item in value]
    if isinstance(value, dict):
      return {key: aliased(item) for key, item in value.items() if key != "seconds"}
    return value

  if path.suffix == ".jsonl":
    rows = (
      without_timings(read(path))
      if path.name != "pairs.jsonl"
      else [json.loads(line) for line in path.read_text().splitlines()]
    )
  else:
    rows = [json.loads(path.read_text())]
  volatile = ("distributed.", "workdir")
  return [
    {
      key: aliased(value)
      for key, value in row.items()
      if key != "seconds" and not (path.name == "config.json" and key.startswith(volatile))
    }
    for row in rows
  ]


def leaves_of(workdir: Path) -> dict[str, np.ndarray]:
  """By path, all that the newest checkpoint holds, without knowing what the state is."""
  steps = [path for path in (workdir / "checkpoints").glob("[0-9]*")]
  if not steps:
    return {}
  newest = max(steps, key=lambda path: int(path.name))
  manifest = json.loads((newest / "manifest.json").read_text())
  wanted = {
    path: jax.ShapeDtypeStruct(tuple(shape), dtype) for path, dtype, shape in manifest["leaves"]
  }
  step, state, _ = Checkpointer(workdir / "checkpoints").restore(wanted)
  found = {path: np.asarray(leaf) for path, leaf in state.items()}
  return found | {"step of the newest checkpoint": np.asarray(step)}


def differences(old: Left, new: Left, close: Sequence[str] = ()) -> Iterator[str]:
  """What is not equal, a line each; the figures that `close` names may differ by rounding."""
  for name, wanted in old.rows.items():
    found = new.rows.get(name)
    if found is None:
      yield f"{name} is missing"
      continue
    if len(found) != len(wanted):
      yield f"{name} has {len(found)} rows instead of {len(wanted)}"
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=False)):
      where = f"{name}, step {theirs['step']}" if "step" in theirs else name
      where += f", line {number + 1}" if len(wanted) > 1 else ""
      for key, value in theirs.items():
        if key not in ours:
          yield f"{where}: {key} is missing (was {shown(value)})"
        elif key in close and isinstance(value, float):
          if not math.isclose(ours[key], value, rel_tol=1e-5, abs_tol=1e-6):
            yield f"{where}: {key} is {ours[key]}, was {value}: not close"
        elif written(ours[key]) != written(value):
          yield f"{where}: {key} is {shown(ours[key])}, was {shown(value)}"
  for name in new.rows.keys() - old.rows.keys():
    yield f"{name} is new"
  for path in sorted(old.leaves.keys() | new.leaves.keys()):
    ours, theirs = new.leaves.get(path), old.leaves.get(path)
    if ours is None or theirs is None:
      yield f"state: {path} is {'missing' if ours is None else 'new'}"
    elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
      yield f"state: {path} is {ours.dtype}{ours.shape}, was {theirs.dtype}{theirs.shape}"
    elif ours.tobytes() != theirs.tobytes():
      gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
      yield f"state: {path} differs by up to {np.max(gap):.3g}"
  for path in sorted(old.files.keys() | new.files.keys()):
    if old.files.get(path) != new.files.get(path):
      what = "missing" if path not in new.files else "another" if path in old.files else "new"
      yield f"{path} is {what}"


def written(value: Any) -> str:
  """The bits of a value that JSON held: its floats are written so that they come back."""
  return json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."


def added_keys(old: Left, new: Left) -> set[str]:
  """Keys that only the new record has, with their file."""

  def keys(left: Left) -> set[str]:
    return {f"{name}: {key}" for name, rows in left.rows.items() for row in rows for key in row}

  return keys(new) - keys(old)


# The comparison.


class Verdict(NamedTuple):
  """What is said of a cell."""

  cell: Cell
  differing: list[str]
  added: set[str]
  seconds: tuple[float, float]


def compare(
  cell: Cell, old: Tree, new: Tree, out: Path, only: str, close: Sequence[str]
) -> Verdict:
  """Runs what must be run, and compares."""
  theirs = produce_old(cell, old, out, make=only != "new")
  if theirs.failure or only == "old":
    failed = [f"the old tree's {theirs.failure}"] if theirs.failure else []
    return Verdict(cell, failed, set(), (theirs.seconds, 0.0))
  begun = theirs.workdirs[0].parent / "begun"
  ours = produce(cell, new, out / "new" / cell.name, out, begun=begun)
  if ours.failure:
    failed = [f"the new tree's {ours.failure}"]
    return Verdict(cell, failed, set(), (theirs.seconds, ours.seconds))
  wanted = left_by(theirs.workdirs[0], out)
  found, added = [], set()
  for workdir in ours.workdirs:
    left = left_by(workdir, out)
    label = "" if workdir.name == "run" else f"{workdir.name}: "
    found += [label + each for each in differences(wanted, left, close)]
    added |= added_keys(wanted, left)
  return Verdict(cell, found, added, (theirs.seconds, ours.seconds))


def report(verdict: Verdict, only: str) -> None:
  """A line of the table, and the first differences."""
  fine = "made" if only == "old" else "equal"
  word = f"DIFFERS ({len(verdict.differing)})" if verdict.differing else fine
  times = "  ".join(f"{seconds:6.1f}" for seconds in verdict.seconds)
  print(f"{verdict.cell.name:34} {word:14} {times}", flush=True)
  printed = collections.Counter()
  for line in verdict.differing:
    place = re.split(r"[,:] ", line)[0]
    printed[place] += 1
    if printed[place] <= SHOWN:
      print(f"    {line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--old", required=True, type=Path, help="the tree whose results are right")
  parser.add_argument("--new", type=Path, help="the tree that is measured")
  parser.add_argument("--out", required=True, type=Path, help="where results are kept")
  parser.add_argument("--cells", default="*", help="names or patterns such as grpo-*,dpo-plain")
  parser.add_argument(
    "--only",
    choices=["old", "new"],
    help="old: make its results, compare nothing; new: do not run the old tree",
  )
  parser.add_argument(
    "--close",
    default="",
    help="figures of records that may differ by 1e-5, since their programs were fused: kl_ref,...",
  )
  parser.add_argument("--jit_advantages", action="store_true", help="see above")
  parser.add_argument("--list", action="store_true", help="print the names of the cells")
  given = parser.parse_args(arguments)
  out = given.out.resolve()
  if given.list:
    print("\n".join(cell.name for cell in cells(out / "data")))
    return 0
  if given.new is None and given.only != "old":
    parser.error("--new is needed, or --only=old")
  old = Tree(given.old.resolve(), given.jit_advantages)
  new = Tree((given.new or given.old).resolve())
  out.mkdir(parents=True, exist_ok=True)
  for tree in {old.path, new.path}:
    check_tree(Tree(tree), out)
  known = cells(make_data(out, old))
  patterns = given.cells.split(",")
  chosen = [cell for cell in known if any(fnmatch.fnmatch(cell.name, each) for each in patterns)]
  if not chosen:
    parser.error(f"--cells={given.cells}: no cell has such a name; --list shows them")
  if given.jit_advantages and given.only == "old":
    chosen = [cell for cell in chosen if cell.groups]
  print(f"{'cell':34} {'':14} {'old s':>6}  {'new s':>6}", flush=True)

  def judge(cell: Cell) -> Verdict:
    verdict = compare(cell, old, new, out, given.only, given.close.split(","))
    report(verdict, given.only)
    return verdict

  with ThreadPoolExecutor(AT_ONCE) as pool:
    verdicts = list(pool.map(judge, [cell for cell in chosen if cell.processes == 1]))
  verdicts += [judge(cell) for cell in chosen if cell.processes > 1]
  added = collections.defaultdict(list)
  for verdict in verdicts:
    for key in verdict.added:
      added[key].append(verdict.cell.name)
  for key, names in sorted(added.items()):
    print(f"added key in {len(names)} cells, such as {names[0]}: {key}")
  differing = [verdict.cell.name for verdict in verdicts if verdict.differing]
  print(f"{len(verdicts)} cells, {len(differing)} differ: {', '.join(differing) or 'none'}")
  return 1 if differing else 0


if __name__ == "__main__":
  sys.exit(main())
