"""SFT: make given answers likelier, token by token.

No sampling, no grader, no reference: whoever has right answers should begin here, and the other
methods mostly begin where this one ends. In other words, REINFORCE on somebody else's samples, in
which every answer has advantage 1.

  python -m experiments.sft                                 SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.sft --model=tiny --task=copy        the one-minute version
  python -m experiments.sft --task=gsm8k:train.jsonl --max_tokens=1024 --max_new_tokens=256
  python -m experiments.sft --data=chats.jsonl --task=none --packing=1024 --max_tokens=1024

`--data=task` imitates the right answers to the training problems of --task. `--data=FILE` reads
JSONL (plain or gzip) or Parquet with the columns prompt and completion, messages, or text; of
messages every turn of the assistant's is trained on. With a task besides, the model is graded at it
before, during and after; the loss on held-out examples is taken in any case.

Rerunning the same command goes on from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --eval.samples=2, seeds 0, 1 and 2, on 2 cores: of 100 held-out
sums, right at temperature 1 from 0.22 to 0.51, 0.55 and 0.57; 7 to 8 s a step, 380 to 460 s with
evaluations. Greedily it falls, from 0.69 to 0.48, 0.58 and 0.57: every answer is now a bare number,
as it was shown, where the model used to write the sum out first.

GSM8K's training file, 60 steps of 4 problems (--steps=60 --examples_per_step=4 --packing=512
--microbatch_rows=1 --max_tokens=512 --overlong=drop --held_out_examples=64 --max_new_tokens=192
--eval.every=60 --eval.problems=8 --eval.samples=1 --checkpoint.every=20): the loss on 64 held-out
examples falls from 1.37 to 0.82 nats a token, 16 s a step, 1,520 s in all. Killed at step 42 and
begun again it ends with the same record and, bit for bit, the same weights and moments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options import (
  ATTENTION_HELP,
  MESH_FLAGS,
  Checkpoint,
  Distributed,
  Evaluation,
  Lora,
  Optimizer,
  SamplingMesh,
  adamw,
  check_schedule,
  device_mesh,
  joined,
  learning_rate,
  split_weights,
)
from rl_llm import evaluation, losses, weighting
from rl_llm.chips import find_peak
from rl_llm.config import ConfigError, option, run
from rl_llm.data import DataError
from rl_llm.data.batches import batch_indices, packed_batch, padding_fraction, sequence_batch
from rl_llm.data.encoding import Encoded, encode, limit_sequences
from rl_llm.data.loading import load_sequences, read_examples
from rl_llm.data.packing import pack
from rl_llm.demonstrations import demonstrations
from rl_llm.experience import (
  agree_on_data,
  held_out_problems,
  make_encode,
  make_generate,
)
from rl_llm.flops import text_work, update_passes
from rl_llm.metrics import PhaseClock, finalize
from rl_llm.model import load_model
from rl_llm.policy import Policy, join
from rl_llm.policy.attention import AttentionName
from rl_llm.reference_cache import compute_logprobs
from rl_llm.rewards import RewardPool
from rl_llm.sharding import place_rows
from rl_llm.tasks import (
  ArithmeticOptions,
  CopyOptions,
  Gsm8kOptions,
  JsonlOptions,
  ReasoningGymOptions,
  Task,
  load_task,
  task_family,
)
from rl_llm.teacher_forcing import teacher_forced_logprobs
from rl_llm.train_state import TrainState, init_state, parameter_count
from rl_llm.training import (
  USER_ERRORS,
  Run,
  Step,
  begin,
  default_workdir,
  exit_code,
  export_model,
  failure_of,
  finish,
  start_run,
  train_loop,
)
from rl_llm.update import make_update

FORMATS = ("prompt_completion", "messages", "text")


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, or a .gguf file")
  data: str = option("task", "task = right answers to the training problems of --task; or a file")
  task: str = option(
    "arithmetic",
    "arithmetic, copy, reasoning_gym:<name>, jsonl:<path> or gsm8k:<path>, at which the model is "
    "graded; none = it is not",
  )
  data_errors: Literal["strict", "lenient"] = option(
    "strict", "the first broken row of --data stops, or broken rows are dropped and counted"
  )
  held_out_fraction: float = option(
    0.1, "of a file's prompts, kept to take the loss on; a task has held-out problems",
    min=0, below=1,
  )
  held_out_examples: int = option(256, "held-out examples whose loss is taken; 0 = all", min=0)
  workdir: str = option("", "the run's directory; empty = runs/sft-<model>-<data>-seed<seed>")
  seed: int = option(0, "of the examples' order, and of the tiny model's weights", min=0)
  steps: int = option(32, "updates", min=1)
  examples_per_step: int = option(16, "B, examples an update", min=1)
  max_tokens: int = option(512, "limit of an example's length, prompt included", min=2)
  overlong: Literal["error", "drop", "truncate_left", "truncate_right"] = option(
    "error", "what to do with longer examples"
  )
  packing: int = option(
    0, "tokens of a row that several examples share; 0 = each has a row of its own", min=0
  )
  weighting: Literal["token_mean", "sequence_mean", "sequence_sum"] = option(
    "token_mean", "what counts alike: tokens, or examples by their mean or by their sum"
  )
  microbatch_rows: int = option(
    4, "rows whose activations are held at once; divides examples_per_step, or is more than that",
    min=1,
  )
  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto", "chat = the model's own chat template, plain = bare text; auto = chat if it has one, "
    "and plain for rows of text"
  )
  system_prompt: str | None = option(None, "none = as the chat template has it; may be empty")
  max_prompt_tokens: int = option(512, "limit of a prompt's length when graded", min=1)
  overlong_prompt: Literal["error", "drop", "truncate_left"] = option(
    "error", "what to do with longer prompts"
  )
  max_new_tokens: int = option(16, "limit of a response's length when graded", min=1)
  dtype: Literal["float32", "bfloat16"] = option(
    "float32", "of the arithmetic; weights, their gradients' sum and log-probs stay float32"
  )
  remat: bool = option(False, "compute activations twice instead of holding them")
  scan_layers: bool = option(False, "compile one layer and loop over all: compiles sooner")
  attention: AttentionName = option("auto", ATTENTION_HELP)
  profile: int = option(
    0, "steps to trace with jax.profiler, from the second of this start on, since the first "
    "compiles; written to WORKDIR/profile; 0 = none", min=0
  )
  export: bool = option(
    False, "write the trained model as a Hugging Face directory, WORKDIR/model; with --lora.rank "
    "the adapters alone too, WORKDIR/adapter"
  )
  lora: Lora = Lora()
  mesh: SamplingMesh = SamplingMesh()
  distributed: Distributed = Distributed()
  optimizer: Optimizer = Optimizer(learning_rate=2e-5)
  eval: Evaluation = Evaluation()
  checkpoint: Checkpoint = Checkpoint()
  reward_deadline: float = option(5.0, "seconds a grader may take for one response", above=0)
  reward_workers: int = option(2, "grader processes", min=1)
  arithmetic: ArithmeticOptions = ArithmeticOptions()
  copy: CopyOptions = CopyOptions()
  reasoning_gym: ReasoningGymOptions = ReasoningGymOptions()
  jsonl: JsonlOptions = JsonlOptions()
  gsm8k: Gsm8kOptions = Gsm8kOptions()


# What a two-layer model of random weights needs instead of a pretrained one's defaults.
TINY = {
  "steps": 120,
  "examples_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_rows": 64,
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
  "checkpoint.every": 20,
}


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model == "tiny" else {}


def volatile(config: Config) -> set[str]:
  """Flags with which a run may be resumed at other values: they do not change what is computed."""
  names = {"workdir", *MESH_FLAGS, "checkpoint.every", "checkpoint.keep", "export", "profile"}
  # A falling learning rate depends on where it is to end.
  return names | {"steps"} if config.optimizer.schedule == "constant" else names


def make_loss(policy: Policy):
  """The objective: the likelihood of the trained tokens."""

  def loss_fn(params, batch, hparams):
    logprobs, entropies = teacher_forced_logprobs(
      params,
      batch["tokens"],
      batch["mask"],
      batch["positions"],
      batch["segment_ids"],
      policy=policy,
    )
    loss, metrics = losses.sft_loss(logprobs, batch["weights"])
    metrics |= {"entropy": (jnp.sum(entropies), jnp.sum(batch["mask"]))}
    return loss, jax.lax.stop_gradient(metrics)

  return loss_fn


def make_batch(
  sequences: Sequence[Encoded], *, name: str, packing: int, rows: int, pad_id: int
) -> dict[str, np.ndarray]:
  """[rows, T] arrays and weights: a row each, or packed into rows of `packing` tokens."""
  padded = sequence_batch(sequences, pad_id=pad_id, rows=rows)
  weights = np.asarray(getattr(weighting, name)(padded.mask))
  if not packing:
    return padded._asdict() | {"weights": weights}
  packed = packed_batch(sequences, length=packing, pad_id=pad_id, rows=rows)
  places = pack(sequences, length=packing, pad_id=pad_id)
  moved = np.zeros(packed.mask.shape, np.float32)
  for own, row, start, length in zip(
    weights, places.rows[:, 0], places.starts[:, 0], places.lengths[:, 0], strict=False
  ):
    moved[row, start : start + length] = own[:length]
  return packed._asdict() | {"weights": moved}


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Runs to the end, or goes on from where an earlier run of the same config stopped.

  Returns:
    The result that result.json holds: held-out loss and accuracies before and after, steps,
    seconds.

  Raises:
    Interrupted: SIGINT or SIGTERM came; everything up to now is saved.
    Diverged: too many updates in a row were not finite.
  """
  check(config)
  return start_run(
    functools.partial(_train, config),
    config,
    workdir,
    steps=config.steps,
    volatile=volatile(config),
    checkpoints_kept=config.checkpoint.keep,
    export=config.export,
  )


def _train(config: Config, run: Run) -> dict[str, Any]:
  say, stop = run.console.say, run.stop
  mesh = device_mesh(
    config.mesh,
    per_step={"examples_per_step": config.examples_per_step},
    at_once={"microbatch_rows": config.microbatch_rows},
  )
  say(f"loading {config.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  task = make_task(config)
  strict = config.data_errors == "strict"
  dataset = None
  if config.data != "task":
    dataset = read_examples(config.data, formats=FORMATS, strict=strict)
  model = load_model(
    config.model,
    seed=config.seed,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
    scan_layers=config.scan_layers,
    attention=config.attention,
    mesh=mesh,
  )
  policy, tokenizer = model.policy, model.tokenizer
  frozen, first = split_weights(config.lora, model.params, seed=config.seed)
  whole = functools.partial(join, frozen)

  prompt_format = config.prompt_format
  if prompt_format == "auto":
    bare = dataset is not None and dataset.format == "text"
    bare = bare and isinstance(dataset.examples[0].completion, str)  # and no transcript
    prompt_format = "chat" if tokenizer.chat_template and not bare else "plain"
  encode_example = functools.partial(
    encode, tokenizer=tokenizer, prompt_format=prompt_format, system_prompt=config.system_prompt
  )
  counts = {}
  if dataset is None:
    encode_problems = functools.partial(
      encode_answers, encode=encode_example, limit=config.max_tokens, overlong=config.overlong
    )
    held_out = encode_problems(task.held_out[: config.held_out_examples or None])
    note = f"right answers to {task.name}: {task.note}"

    def draw(step: int) -> list[Encoded]:
      return encode_problems(task.sample(config.seed, step, config.examples_per_step))

  else:
    loaded = load_sequences(
      config.data,
      dataset,
      encode=encode_example,
      limit_all=limit_sequences,
      limit=config.max_tokens,
      overlong=config.overlong,
      strict=strict,
      held_out_fraction=config.held_out_fraction,
      check=stop.check,
    )
    held_out = loaded.held_out[: config.held_out_examples or None]
    note, counts = loaded.note, loaded.counts

    def draw(step: int) -> list[Encoded]:
      chosen = batch_indices(
        len(loaded.training), batch_size=config.examples_per_step, seed=config.seed, step=step
      )
      return [loaded.training[index] for index in chosen]

  agree_on_data(sequence.tokens for sequence in draw(0))  # An error comes now.
  optimizer = adamw(config.optimizer)
  loss_fn = make_loss(policy)
  update = make_update(
    loss_fn,
    optimizer,
    microbatches=max(1, config.examples_per_step // config.microbatch_rows),
    mesh=mesh,
  )
  announce = functools.cache(say)
  run.console.sizes(
    {
      "parameters": parameter_count(model.params),
      "parameters trained": parameter_count(first),
      "examples a step": config.examples_per_step,
      "rows a microbatch": min(config.examples_per_step, config.microbatch_rows),
      "tokens a row": config.packing or f"up to {config.max_tokens}",
      "steps": config.steps,
      "data": note,
      "held-out examples": len(held_out),
      "held-out problems": len(task.held_out[: config.eval.problems or None]) if task else 0,
      "prompt format": prompt_format,
      "directory": str(run.workdir),
    }
  )
  start, state = begin(
    run,
    functools.partial(init_state, optimizer=optimizer),
    first,
    steps=config.steps,
    mesh=mesh,
  )
  model, first = model._replace(params=None), None
  evaluate_state, pool = make_evaluate(
    config, run, task, policy, tokenizer, held_out, mesh, whole
  )

  def take_step(state: TrainState, step: int, clock: PhaseClock) -> Step:
    sequences = draw(step)
    batch = make_batch(
      sequences,
      name=config.weighting,
      packing=config.packing,
      rows=config.examples_per_step,
      pad_id=tokenizer.pad_id,
    )
    filled = int(np.sum(np.any(batch["segment_ids"] > 0, axis=1)))  # They come first.
    rate = learning_rate(config.optimizer, step, steps=config.steps)
    hparams = {"learning_rate": jnp.float32(rate)}
    announce(f"compiling the update: rows of {batch['tokens'].shape[1]} tokens")
    stop.check()
    with clock("update"):
      placed = place_rows(batch, mesh)
      state, metrics = update(
        state, placed, hparams, -(-filled // config.microbatch_rows), frozen
      )
      row = finalize(jax.device_get(metrics))
    row |= {
      "examples": len(sequences),
      "trained_tokens": int(np.sum(batch["mask"])),
      "padding_fraction": padding_fraction(batch["segment_ids"]),
      "learning_rate": rate,
      "updates_skipped": int(state.skipped),
      **{f"data_{name}": count for name, count in counts.items()},
    }
    most = config.optimizer.max_skipped
    failure = failure_of(loss_fn, state, batch, hparams, max_skipped=most, frozen=frozen)
    passes = update_passes(adapters=frozen is not None)
    work = text_work(policy.config, sequences, passes=passes)
    return Step(state, row, work=work, failure=failure)

  with pool:
    state = train_loop(
      run,
      start,
      state,
      take_step,
      evaluate_state,
      steps=config.steps,
      eval_every=config.eval.every,
      checkpoint_every=config.checkpoint.every,
      samples_every=config.steps,
      peak=find_peak(list(mesh.devices.flat), config.dtype),
      profile=config.profile,
    )
  if config.export:
    export_model(run, policy.config, whole(state.params), tokenizer, base=config.model)
  return finish(run)


def make_evaluate(
  config: Config, run: Run, task: Task | None, policy, tokenizer, held_out, mesh, whole
):
  """(state -> Evaluation, the grader's workers): the held-out loss, and accuracy at the task."""
  pool = contextlib.nullcontext()
  if task is not None:
    problems = held_out_problems(
      task,
      make_encode(
        tokenizer,
        prompt_format=config.prompt_format,
        system_prompt=config.system_prompt,
        max_prompt_tokens=config.max_prompt_tokens,
        overlong=config.overlong_prompt,
      ),
      limit=config.eval.problems,
    )
    generate = make_generate(
      policy,
      tokenizer,
      max_new_tokens=config.max_new_tokens,
      say=run.console.say,
      mesh=mesh,
      gather=config.mesh.gather,
    )
    pool = RewardPool(task.reward, workers=config.reward_workers, deadline=config.reward_deadline)

  def evaluate_state(state: TrainState) -> evaluation.Evaluation:
    metrics, rows = {}, []
    if held_out:
      logprobs = compute_logprobs(
        whole(state.params),
        held_out,
        policy=policy,
        rows_per_batch=config.examples_per_step,
        pad_id=tokenizer.pad_id,
        mesh=mesh,
        check=run.stop.check,
      )
      trained = sum(sum(sequence.mask) for sequence in held_out)
      metrics["eval/token_loss"] = -math.fsum(float(np.sum(x)) for x in logprobs) / trained
    if task is not None:
      run.console.say(f"evaluating on {len(problems.problems)} held-out problems")
      found = evaluation.evaluate(
        whole(state.params),
        problems,
        generate=generate,
        pool=pool,
        tokenizer=tokenizer,
        samples=config.eval.samples,
        prompts_per_batch=config.examples_per_step,
        max_reward=task.max_reward,
        check=run.stop.check,
        mesh=mesh,
      )
      metrics |= found.metrics
      rows = found.rows
    return evaluation.Evaluation(metrics, rows)

  return evaluate_state, pool


def encode_answers(problems, *, encode, limit: int, overlong: str) -> list[Encoded]:
  """The right answers to problems as tokens, without those that are dropped as too long."""
  examples = demonstrations(problems, prompt_format=encode.keywords["prompt_format"])
  encoded = [encode(example) for example in examples]
  for problem, sequence in zip(problems, encoded, strict=True):
    if len(sequence.tokens) > limit and overlong == "error":
      raise DataError(
        f"problem {problem.key!r:.60}: {len(sequence.tokens)} tokens with its answer, over "
        f"--max_tokens={limit}; raise it, or choose --overlong=drop, truncate_left or "
        "truncate_right"
      )
  limited = limit_sequences(encoded, limit=limit, overlong=overlong)
  kept = [sequence for sequence in limited.kept if sequence is not None]
  if problems and not kept:
    raise DataError(f"all {len(problems)} examples are over --max_tokens={limit}; raise it")
  return kept


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  rows, part = config.examples_per_step, config.microbatch_rows
  if rows > part and rows % part:
    raise ConfigError(
      "microbatch_rows",
      part,
      f"a divisor of examples_per_step ({rows})",
      f"try --microbatch_rows={math.gcd(rows, part)}",
    )
  if config.packing and config.packing < config.max_tokens:
    raise ConfigError(
      "packing",
      config.packing,
      f"0, or at least max_tokens ({config.max_tokens})",
      f"--max_tokens={config.packing} makes it so",
    )
  if config.task != "none":
    task_family(config.task)
  elif config.data == "task":
    raise ConfigError("data", "task", "a file where there is no task", "or name one with --task")
  elif not config.held_out_fraction:
    raise ConfigError(
      "held_out_fraction", 0, "above 0 with --task=none", "nothing would say what was learned"
    )
  check_schedule(config.optimizer, steps=config.steps)


def make_task(config: Config) -> Task | None:
  """The task, with the options of its own group of flags."""
  if config.task == "none":
    return None
  return load_task(config.task, **vars(getattr(config, task_family(config.task))))


def main(config: Config) -> int:
  data = config.task if config.data == "task" else Path(config.data).name
  workdir = config.workdir or default_workdir(
    "sft", model=config.model, data=data, seed=config.seed
  )
  return exit_code(
    functools.partial(train, config, workdir), distributed=joined(config.distributed)
  )


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
