"""What tests of experiments share in addition to the fixtures: a task, and what a run leaves."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import setup
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read, without_timings
from rl_llm.text.tokenizers import ByteTokenizer
from rl_llm.training import loop

FULL = bool(os.environ.get("RL_LLM_FULL"))  # `make test-full`


class Chatty(ByteTokenizer):
  """Bytes with a chat template, and with ends so frequent that responses are ragged: "~" is one."""

  eos_ids = (258, *range(0, 256, 6))
  chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}~\n{% endfor %}"


REWARD = """
import time

def fraction(prompts, completions, **columns):
  return [sum(map(ord, text)) % 8 / 8 for text in completions]

def failing(prompts, completions, **columns):
  kind = sum(map(ord, completions[0])) % 8
  if kind == 1:
    raise ValueError("no")
  if kind == 2:
    time.sleep(60)
  return [None if kind == 3 else kind / 8]

def spread_for_some(prompts, completions, **columns):
  # Prompts that begin with a, c, e, ... please with whatever is said.
  return [
    1.0 if ord(prompt[0]) % 2 else sum(map(ord, completion)) % 8 / 8
    for prompt, completion in zip(prompts, completions)
  ]

def lonely(prompts, completions, **columns):
  # No opinion on about half of the responses.
  return [None if sum(map(ord, c)) % 2 else 1.0 for c in completions]

def signed(prompts, completions, **columns):
  return [sum(map(ord, text)) % 8 / 8 - 0.5 for text in completions]

def alike(prompts, completions, **columns):
  return [0.5] * len(completions)

def short(prompts, completions, **columns):
  return [float(len(text) < 4) for text in completions]

def near_a(prompts, completions, **columns):
  return [max(1 - abs(ord(text[0]) - 97) / 128, 0) if text else 0.0 for text in completions]

def hopeless(prompts, completions, **columns):
  raise ValueError("always")
"""


def write_examples(directory: Path, *, count: int) -> Path:
  """Files of preference pairs and of demonstrations, ragged, in the directory; gives it back."""
  rows = [
    {"prompt": chr(97 + i % 20) + "x" * (i % 5), "chosen": "y" + "a" * (i % 3), "rejected": "n"}
    for i in range(count)
  ]
  (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
  (directory / "demonstrations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return directory


def settings(files, **changes) -> dict[str, Any]:
  """A short run of `--model=tiny` on the task in `files`, for experiments that sample."""
  return {
    "model": "tiny",
    "task": f"jsonl:{files / 'rows.jsonl'}",
    "jsonl.reward_file": str(files / "reward.py"),
    "jsonl.reward_function": "fraction",
    "jsonl.held_out_fraction": 0.3,
    "prompt_format": "plain",
    "steps": 2,
    "prompts_per_step": 4,
    "responses_per_prompt": 4,
    "max_new_tokens": 8,
    "microbatch_prompts": 4,
    "eval.problems": 1,
    "eval.samples": 3,  # 4 responses with the greedy one: the shape of training
    "samples_every": 100,
  } | changes


@dataclasses.dataclass(frozen=True)
class Outcome:
  """All that a run leaves, timings aside."""

  metrics: list[dict]
  samples: list[dict]
  checkpoint: Path  # the newest

  @functools.cached_property
  def state(self) -> dict[str, np.ndarray]:
    """By path, all that the checkpoint holds; read without knowing what it is, once asked for."""
    leaves = json.loads((self.checkpoint / "manifest.json").read_text())["leaves"]
    abstract = {path: jax.ShapeDtypeStruct(shape, dtype) for path, dtype, shape in leaves}
    saved = Checkpointer(self.checkpoint.parent).restore(abstract, int(self.checkpoint.name))[1]
    return {path: np.asarray(leaf) for path, leaf in saved.items()}

  @property
  def params(self) -> dict[str, np.ndarray]:
    return {path: leaf for path, leaf in self.state.items() if "params" in path.split("/")}


def run(experiment, workdir, changes) -> Outcome:
  """Trains in this process with the changed config."""
  experiment.train(replace(experiment.Config(), changes), str(workdir))
  return outcome(workdir)


def main(experiment, config) -> int:
  """The exit code of the command that has this config."""
  return setup.main(experiment.train, config)


def outcome(workdir) -> Outcome:
  """What a run left."""
  workdir = Path(workdir)
  newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
  metrics = without_timings(read(workdir / "metrics.jsonl"))
  return Outcome(metrics, read(workdir / "samples.jsonl"), newest)


def wrap_seams(monkeypatch, **wrappers: Callable) -> None:
  """Runs take what these make of their own `sample`, `learn`, `evaluate` or `record`."""
  original = loop.train_loop

  def train_loop(*args, **seams):
    return original(*args, **seams | {name: wrap(seams[name]) for name, wrap in wrappers.items()})

  monkeypatch.setattr(loop, "train_loop", train_loop)


def wrap_updates(monkeypatch, experiment, wrap: Callable) -> None:
  """Each of a run's updates, of a value network too, is what this makes of it."""
  original = experiment.make_programs

  def wrapped(programs):
    changes = {"policy": wrapped, "update": wrap, "update_value": wrap}
    own = programs._asdict().items()
    return programs._replace(**{name: changes[name](x) for name, x in own if name in changes})

  monkeypatch.setattr(experiment, "make_programs", lambda *args: wrapped(original(*args)))


def equal(a, b) -> bool:
  """Bit for bit."""
  return all(x.tobytes() == y.tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
