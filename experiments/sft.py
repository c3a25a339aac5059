"""SFT: make given answers likelier, token by token.

It needs no sampling, no grader and no reference. If you have right answers, start here; the other
methods usually start where this one ends. It is REINFORCE on somebody else's samples, with
advantage 1 for every answer.

  python -m experiments.sft                                 SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.sft --model=tiny --task=copy        the one-minute version
  python -m experiments.sft --task=gsm8k:train.jsonl --max_tokens=1024 --max_new_tokens=256
  python -m experiments.sft --data=chats.jsonl --task=none --packing=1024 --max_tokens=1024

`--data=task` imitates the right answers to the training problems of --task. `--data=FILE` reads
JSONL (plain or gzip) or Parquet with the columns prompt and completion, messages, or text; in
messages the assistant's turns are trained on, except those of weight 0. A task, if there is one,
grades the model before, during and after training; the held-out loss is always computed.

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --eval.samples=2, seeds 0, 1 and 2, on 2 cores, and the question
"What is {a} {op} {b}? Reply with just the number.": of 100 held-out sums, right at temperature 1
from 0.22 to 0.51, 0.55 and 0.57; 7 to 8 s a step, 380 to 460 s with evaluations. Greedily it falls,
from 0.69 to 0.48, 0.58 and 0.57: every answer is now a bare number, as it was shown, where the
model used to write the sum out first. docs/results/sft.md has GSM8K.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections import abc

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import evaluation, losses, weighting
from rl_llm.data import batches, encoding
from rl_llm.rollout import demonstrations, drawing
from rl_llm.rollout.teacher_forcing import teacher_forced_logprobs
from rl_llm.runs import config as configs
from rl_llm.training import loop
from rl_llm.training import reference_cache as reference
from rl_llm.training import train_state as states
from rl_llm.training import update as updates


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.ExportedRun = configs.inline(flags.ExportedRun(steps=32))
  model: flags.Model = configs.inline(flags.Model())
  data: flags.Data = configs.inline(flags.Data(data="task"))
  task: flags.TrainedTask = configs.inline(flags.TrainedTask())
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  held_out_examples: int = configs.option(
    256, "held-out examples whose loss is taken; 0 = all", min=0
  )
  examples_per_step: int = configs.option(16, "B, examples an update", min=1)
  microbatch_rows: int = configs.option(
    4,
    "rows whose activations are held at once; divides examples_per_step, or is more than that",
    min=1,
  )
  weighting: typing.Literal["token_mean", "sequence_mean", "sequence_sum"] = configs.option(
    "token_mean", "what counts the same: tokens, or examples by their mean or by their sum"
  )
  loss: typing.Literal["sft_loss", "dft_loss"] = configs.option(
    "sft_loss", "the likelihood, or each token's times its probability (DFT)"
  )
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer(learning_rate=2e-5)
  eval: flags.Evaluation = flags.Evaluation()


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "steps": 120,
  "examples_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_rows": 64,
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
  "checkpoint.every": 20,
}


def overrides(config: Config) -> dict[str, typing.Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model.model == "tiny" else {}


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  rows, part = config.examples_per_step, config.microbatch_rows
  configs.check_divides("microbatch_rows", rows, part, f"examples_per_step ({rows})")
  config.data.check_fits(config.data.max_tokens)
  config.data.check_measured(config, "task")


class Batch(typing.NamedTuple):
  """What the loss reads: sequences in rows of their own, or packed."""

  sequences: batches.SequenceBatch
  weights: np.ndarray  # [R, T] how much each token counts


def make_loss(config: Config, policy: setup.policy.Policy):
  """The objective: the likelihood of the trained tokens."""
  likelihood = getattr(losses, config.loss)

  def loss_fn(params, batch: Batch, hparams):
    logprobs, entropies = teacher_forced_logprobs(params, *batch.sequences, policy=policy)
    loss, found = likelihood(logprobs, batch.weights)
    found |= {"entropy": (jnp.sum(entropies), jnp.sum(batch.sequences.mask))}
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


def make_batch(
  sequences: abc.Sequence[encoding.Encoded], *, name: str, packing: int, rows: int, pad_id: int
) -> Batch:
  """[rows, T] arrays and weights: a row each, or packed into rows of `packing` tokens."""
  padded = batches.sequence_batch(sequences, pad_id=pad_id, rows=rows)
  weights = np.asarray(getattr(weighting, name)(padded.mask))
  if not packing:
    return Batch(padded, weights)
  sizes = {"length": packing, "pad_id": pad_id, "rows": rows}
  return Batch(*batches.packed_with_values(sequences, weights, **sizes))


def learn(
  config: Config,
  model: setup.Model,
  update: abc.Callable,
  state: states.TrainState,
  drawn: loop.Examples,
  step: int,
  clock: setup.PhaseClock,
) -> tuple[states.TrainState, loop.Learned]:
  """One step's update on examples."""
  batch = make_batch(
    drawn.examples,
    name=config.weighting,
    packing=config.data.packing,
    rows=config.examples_per_step,
    pad_id=model.tokenizer.pad_id,
  )
  segments = batch.sequences.segment_ids
  filled = int(np.sum(np.any(segments > 0, axis=1)))  # Rows that hold anything come first.
  hparams = {"learning_rate": jnp.float32(setup.learning_rate(config, step))}
  with clock("update"):
    used = -(-filled // config.microbatch_rows)
    state, found = setup.update_once(update, model, state, batch, hparams, used)
  found |= {
    "examples": len(drawn.examples),
    "trained_tokens": int(np.sum(batch.sequences.mask)),
    "padding_fraction": batches.padding_fraction(segments),
  }
  return state, loop.Learned(found, work=setup.work_on_texts(model, drawn.examples))


class Source(typing.NamedTuple):
  """Where examples come from."""

  draw: abc.Callable[[int], list[encoding.Encoded]]  # (step) -> the step's
  held_out: list[encoding.Encoded]
  note: str
  counts: dict[str, int]  # of all rows, and of those that were dropped or cut


def open_source(
  config: Config, run: loop.Run, model: setup.Model, task: typing.Any, dataset: typing.Any
) -> Source:
  """The examples of a file, or the right answers to a task's problems."""
  layout, seed, size = config.prompts.layout, config.run.seed, config.examples_per_step
  prompt_format = setup.resolve_format(layout.prompt_format, model.tokenizer)
  if layout.prompt_format == "auto" and dataset and dataset.format == "text":
    # Bare text has no turns; a transcript is a conversation already.
    bare = isinstance(dataset.examples[0].completion, str)
    prompt_format = "plain" if bare else prompt_format
  settings = {"prompt_format": prompt_format, "system_prompt": layout.system_prompt}
  encode = functools.partial(encoding.encode, tokenizer=model.tokenizer, **settings)
  kept = slice(config.held_out_examples or None)
  if dataset is None:
    limits = {"limit": config.data.max_tokens, "overlong": config.data.overlong}
    answers = functools.partial(demonstrations.encode_answers, encode=encode, **limits)

    def draw(step: int) -> list[encoding.Encoded]:
      return answers(task.sample(seed, step, size)).kept

    problems = task.held_out[kept]
    held_out = answers(problems)
    counts = {"rows": len(problems), "overlong": held_out.overlong, "dropped": held_out.dropped}
    drawing.assert_same_data(sequence.tokens for sequence in draw(0))
    return Source(draw, held_out.kept, f"right answers to {task.name}: {task.note}", counts)
  loaded = setup.load_data(config, run, model, dataset, encode, encoding.limit_sequences)

  def draw(step: int) -> list[encoding.Encoded]:
    count = len(loaded.training)
    chosen = batches.batch_indices(count, batch_size=size, seed=seed, step=step)
    return [loaded.training[index] for index in chosen]

  return Source(draw, loaded.held_out[kept], loaded.note, loaded.counts)


def evaluate(
  config: Config,
  run: loop.Run,
  model: setup.Model,
  problems: setup.Problems | None,
  held_out: list[encoding.Encoded],
  params: typing.Any,
  step: int,
) -> evaluation.Evaluation:
  """The loss on held-out examples, and accuracy at the task where there is one."""
  found, rows = {}, config.examples_per_step
  if held_out:
    statics = {"policy": model.policy, "pad_id": model.tokenizer.pad_id, "mesh": model.mesh}
    logprobs = reference.compute_logprobs(
      params, held_out, **statics, rows_per_batch=rows, check=run.stop.check
    )
    trained = sum(sum(sequence.mask) for sequence in held_out)
    found["eval/token_loss"] = -math.fsum(float(np.sum(x)) for x in logprobs) / trained
  graded = problems.evaluate(params, step) if problems else evaluation.Evaluation({}, [])
  return graded._replace(metrics=found | graded.metrics)


def train(config: Config, workdir: str) -> dict[str, typing.Any]:
  """Trains to the end, or resumes an earlier run of the same config; returns result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=config.run.export) as run:
    if run.result:
      return run.result
    size, part = config.examples_per_step, config.microbatch_rows
    mesh = setup.open_mesh(
      config, per_step={"examples_per_step": size}, at_once={"microbatch_rows": part}
    )
    task, dataset = setup.load_training_task(config, size), None
    if config.data.data != "task":
      dataset = setup.read_data(config, "prompt_completion", "messages", "text")
    model = setup.load_model(config, run, mesh)
    source = open_source(config, run, model, task, dataset)
    with setup.open_problems(config, run, model, task, prompts=size) as problems:
      sizes = {
        "examples a step": size,
        "rows a microbatch": min(size, part),
        "tokens a row": config.data.packing or f"up to {config.data.max_tokens}",
        "data": source.note,
        "held-out examples": len(source.held_out),
        "held-out problems": len(problems.held_out.problems) if problems else 0,
      }
      setup.show_sizes(config, run, model.weights, sizes)
      optimizer = setup.make_optimizer(config.optimizer)
      loss_fn, count = make_loss(config, model.policy), max(1, size // part)
      how = {"microbatches": count, "mesh": mesh, "cast": model.policy.cast}
      update = updates.make_update(loss_fn, optimizer, **how)
      init = functools.partial(states.init_state, optimizer=optimizer)
      begun, model = setup.begin(config, run, model, init)
      dropped = {f"data_{name}": count for name, count in source.counts.items()}
      state = setup.train_loop(
        config,
        run,
        model,
        begun,
        sample=lambda params, step, clock: loop.Examples(source.draw(step), dropped),
        learn=functools.partial(learn, config, model, loop.announced(update, run)),
        evaluate=functools.partial(evaluate, config, run, model, problems, source.held_out),
      )
    return setup.finish(config, run, model, state)


def main(config: Config) -> int:
  file = "" if config.data.data == "task" else config.data.data
  return setup.main(train, config, file=file)


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
