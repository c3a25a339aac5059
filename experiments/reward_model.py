"""A reward model: a network that learns which of two answers people, or a grader, prefer.

Where nothing can check an answer, somebody can still say which of two is better. Bradley-Terry
makes numbers of that: the better answer wins with probability sigmoid(r(better) - r(worse)), and
the network that gives r is trained until the winners of the data are likely. PPO and GRPO then
raise r, on texts that nobody has compared.

  python -m experiments.make_preferences --out=pairs.jsonl       pairs without people
  python -m experiments.reward_model --data=pairs.jsonl          SmolLM2-135M, 2 CPU cores
  python -m experiments.reward_model --data=pairs.jsonl --margin_column=margin --center_coef=0
  python -m experiments.grpo --reward=model:WORKDIR/model        what it is for

`--data=FILE` reads JSONL (plain or gzip) or Parquet with the columns chosen and rejected, and
prompt or the same beginning in both. The network begins as the language model, with one column in
the place of its vocabulary. Held-out pairs are of other prompts, and are scored before, during and
after: how often the better answer has the larger reward, and whether the network is as often right
as it is sure (calibration_error; 0 is best). It is written as a Hugging Face directory,
WORKDIR/model, whose rewards have mean 0 over training answers.

Rerunning the same command goes on from the last checkpoint; so does it after Ctrl-C or a kill.

Measured, seed 0, on 2 cores, in two minutes in all: a tiny model that copies half of its strings
right, a judge of its own answers, and what training against the judge does to it. C stands for
--task=copy --copy.alphabet=abcdefgh --copy.held_out=100, R for runs/copy.

  python -m experiments.sft --model=tiny C --steps=40 --export --workdir=R/sft
  python -m experiments.make_preferences --model=R/sft/model C --max_new_tokens=4 --problems=412 \
    --samples=8 --pairs_per_problem=4 --prompts_per_batch=64 --out=R/pairs.jsonl --workdir=R/pairs
  python -m experiments.reward_model --model=R/sft/model --data=R/pairs.jsonl --steps=400 \
    --pairs_per_step=32 --microbatch_pairs=32 --optimizer.learning_rate=1e-3 \
    --optimizer.schedule=linear --eval.every=100 --workdir=R/rm
  python -m experiments.grpo --model=R/sft/model C --reward=model:R/rm/model --steps=60 \
    --prompts_per_step=32 --max_new_tokens=4 --microbatch_prompts=32 \
    --optimizer.learning_rate=3e-4 --eval.every=20 --eval.samples=3 --workdir=R/grpo

Of 256 held-out pairs of other strings the judge is right about 0.91 (95 % 0.87 to 0.94). By the
task's grader GRPO goes from 0.46 (0.40 to 0.51) to 0.59 (0.52 to 0.65) of 100 held-out strings,
PPO with the same flags to 0.62 (0.55 to 0.68). Both also learn what the judge overlooks: the reward
rises from 0.7 to 1.7 and to 2.0, and greedy answers, all right before, are right 0.91 and 0.88
after. The report has reward and grade side by side.

A judge that cannot do the sum itself is a worse one: SmolLM2 on 448 pairs of 140 sums of numbers up
to 20 (make_preferences with --arithmetic.operand_max=20 --problems=320 --samples=8
--pairs_per_problem=4 --max_new_tokens=24) is right about 0.82 to 0.90 of 67 held-out pairs, whether
after 32 steps or 80 and at a constant rate or a falling one, and learns its 381 by heart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
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
  Lora,
  MeshSizes,
  Optimizer,
  adamw,
  check_packing,
  check_schedule,
  device_mesh,
  joined,
  learning_rate,
  split_weights,
)
from rl_llm import hosts, losses
from rl_llm.chips import find_peak
from rl_llm.config import ConfigError, option, run
from rl_llm.data import DataError, Dataset
from rl_llm.data.batches import batch_indices, packed_shares, padding_fraction, pair_batch
from rl_llm.data.encoding import Pair, encode_pair, limit_pairs
from rl_llm.data.loading import load_sequences, read_examples
from rl_llm.evaluation import Evaluation
from rl_llm.experience import agree_on_data
from rl_llm.flops import text_work, update_passes
from rl_llm.metrics import PhaseClock, finalize
from rl_llm.model import load_model
from rl_llm.policy import Policy, join, merge_lora
from rl_llm.policy.attention import AttentionName
from rl_llm.policy.scalar_head import normal_head, with_head
from rl_llm.reward_model import (
  packed_rewards,
  pair_statistics,
  save_reward_model,
  sequence_rewards,
)
from rl_llm.sharding import fetch, place_rows
from rl_llm.train_state import TrainState, init_state, parameter_count
from rl_llm.training import (
  USER_ERRORS,
  Run,
  Step,
  begin,
  default_workdir,
  exit_code,
  failure_of,
  finish,
  on_main,
  start_run,
  train_loop,
)
from rl_llm.update import make_update

FORMATS = ("preference", "implicit_preference")


@dataclasses.dataclass(frozen=True)
class Scoring:
  """What is measured on pairs that training never draws."""

  every: int = option(8, "steps between evaluations; first and last are always done", min=1)
  pairs: int = option(
    256, "held-out pairs that are scored, and training pairs for the mean reward; 0 = all", min=0
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: str = option(
    "smollm2", "smollm2, tiny, a Hugging Face directory, or a .gguf file; for PPO and GRPO, one "
    "with the tokenizer of their model"
  )
  data: str = option("", "the file of pairs; experiments.make_preferences writes one")
  data_errors: Literal["strict", "lenient"] = option(
    "strict", "the first broken row of --data stops, or broken rows are dropped and counted"
  )
  held_out_fraction: float = option(0.2, "of the file's prompts, kept for evaluation",
                                    above=0, below=1)
  margin_column: str = option(
    "", "a column with the number by which the rewards of a pair are to differ; empty = none"
  )
  center_coef: float = option(
    0.01, "strength with which a pair's rewards are held around 0, or they drift", min=0
  )
  workdir: str = option(
    "", "the run's directory; empty = runs/reward_model-<model>-<data>-seed<seed>"
  )
  seed: int = option(0, "of the head, of the pairs' order, and of the tiny model's weights", min=0)
  steps: int = option(16, "updates", min=1)
  pairs_per_step: int = option(8, "B, pairs an update", min=1)
  max_tokens: int = option(512, "limit of a prompt with an answer", min=2)
  overlong: Literal["error", "drop", "truncate_left", "truncate_right"] = option(
    "error", "what to do with longer ones"
  )
  packing: int = option(
    0, "tokens of a row that several answers with their prompts share; 0 = each has its own", min=0
  )
  microbatch_pairs: int = option(
    4, "pairs whose activations are held at once; divides pairs_per_step, or is more than that",
    min=1,
  )
  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto", "chat = the model's own chat template, plain = bare text; auto = chat if it has one"
  )
  system_prompt: str | None = option(None, "none = as the chat template has it; may be empty")
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
  lora: Lora = Lora()
  mesh: MeshSizes = MeshSizes()
  distributed: Distributed = Distributed()
  optimizer: Optimizer = Optimizer(learning_rate=2e-5)
  eval: Scoring = Scoring()
  checkpoint: Checkpoint = Checkpoint()


# What a two-layer model of random weights needs instead of a pretrained one's defaults.
TINY = {
  "steps": 120,
  "pairs_per_step": 32,
  "microbatch_pairs": 32,
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
  "checkpoint.every": 20,
}


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model == "tiny" else {}


def volatile(config: Config) -> set[str]:
  """Flags with which a run may be resumed at other values: they do not change what is computed."""
  names = {"workdir", *MESH_FLAGS, "checkpoint.every", "checkpoint.keep", "profile"}
  # A falling learning rate depends on where it is to end.
  return names | {"steps"} if config.optimizer.schedule == "constant" else names


def make_loss(config: Config, policy: Policy):
  """The objective: Bradley-Terry on pairs, whose rows alternate."""

  def loss_fn(params, batch, hparams):
    if config.packing:
      rewards = packed_rewards(params, batch["packed"], policy=policy)
    else:
      fields = ("tokens", "mask", "positions", "segment_ids")
      rewards = sequence_rewards(params, *(batch[field] for field in fields), policy=policy)
    loss, metrics = losses.reward_model_loss(
      rewards[0::2],
      rewards[1::2],
      batch["weights"],
      margin=batch["margin"],
      center_coef=config.center_coef,
    )
    return loss, jax.lax.stop_gradient(metrics)

  return loss_fn


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Runs to the end, or goes on from where an earlier run of the same config stopped.

  Returns:
    The result that result.json holds: accuracy and calibration on held-out pairs before and after,
    steps, seconds.

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
    export=True,
  )


def _train(config: Config, run: Run) -> dict[str, Any]:
  say, stop = run.console.say, run.stop
  mesh = device_mesh(
    config.mesh,
    per_step={"pairs_per_step": config.pairs_per_step},
    at_once={"microbatch_pairs": config.microbatch_pairs},
  )
  check_packing(config.packing, mesh)
  say(f"loading {config.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  strict = config.data_errors == "strict"
  dataset = read_examples(config.data, formats=FORMATS, strict=strict)
  check_margins(config, dataset)
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
  trunk = {name: leaf for name, leaf in model.params.items() if name != "unembed"}
  frozen, first = split_weights(config.lora, trunk, seed=config.seed)
  whole = functools.partial(join, frozen)
  prompt_format = config.prompt_format
  if prompt_format == "auto":
    prompt_format = "chat" if tokenizer.chat_template else "plain"
  loaded = load_sequences(
    config.data,
    dataset,
    encode=functools.partial(
      encode_pair,
      tokenizer=tokenizer,
      prompt_format=prompt_format,
      system_prompt=config.system_prompt,
    ),
    limit_all=limit_pairs,
    limit=config.max_tokens,
    overlong=config.overlong,
    strict=strict,
    held_out_fraction=config.held_out_fraction,
    check=stop.check,
  )
  agree_on_data(side.tokens for pair in loaded.training + loaded.held_out for side in pair)
  margins = margins_of(config, loaded.training_columns)
  scored = slice(config.eval.pairs or None)
  held_out = loaded.held_out[scored]
  held_out_margins = margins_of(config, loaded.held_out_columns)[scored]

  optimizer = adamw(config.optimizer)
  loss_fn = make_loss(config, policy)
  microbatches = max(1, config.pairs_per_step // config.microbatch_pairs)
  update = make_update(loss_fn, optimizer, microbatches=microbatches, mesh=mesh)
  announce = functools.cache(say)
  run.console.sizes(
    {
      "parameters": parameter_count(model.params),
      "parameters trained": parameter_count(first),
      "pairs a step": config.pairs_per_step,
      "pairs a microbatch": min(config.pairs_per_step, config.microbatch_pairs),
      "steps": config.steps,
      "data": loaded.note,
      "held-out pairs scored": len(held_out),
      "prompt format": prompt_format,
      "directory": str(run.workdir),
    }
  )

  def first_state(params) -> TrainState:
    head = normal_head(policy.config.width, jax.random.key(config.seed))
    return init_state(with_head(params, head), optimizer)

  start, state = begin(run, first_state, first, steps=config.steps, mesh=mesh)
  model, trunk, first = model._replace(params=None), None, None
  score = jax.jit(functools.partial(sequence_rewards, policy=policy))

  def rewards_of(params, pairs: Sequence[Pair]) -> np.ndarray:
    """[N, 2]: of the chosen and of the rejected answers; one program for each width."""
    rewards = np.zeros((len(pairs), 2), np.float32)
    # Pairs of like length share a batch.
    order = sorted(range(len(pairs)), key=lambda index: -max(len(s.tokens) for s in pairs[index]))
    for first in range(0, len(order), config.pairs_per_step):
      stop.check()
      chosen = order[first : first + config.pairs_per_step]
      batch = pair_batch(
        [pairs[index] for index in chosen], pad_id=tokenizer.pad_id, rows=2 * config.pairs_per_step
      )
      found = fetch(score(params, *place_rows(batch, mesh)))
      rewards[chosen] = found.reshape(-1, 2)[: len(chosen)]
    return rewards

  def evaluate_state(state: TrainState) -> Evaluation:
    say(f"scoring {len(held_out)} held-out pairs")
    chosen, rejected = rewards_of(whole(state.params), held_out).T
    found = pair_statistics(chosen, rejected)
    loss, _ = losses.reward_model_loss(
      jnp.asarray(chosen),
      jnp.asarray(rejected),
      jnp.full(len(chosen), 1 / len(chosen)),
      margin=jnp.asarray(held_out_margins),
      center_coef=config.center_coef,
    )
    metrics = {
      "eval/pair_accuracy": found.accuracy,
      "eval/pair_low": found.low,
      "eval/pair_high": found.high,
      "eval/pair_loss": float(loss),
      "eval/margin": found.margin,
      "eval/calibration_error": found.calibration_error,
      "eval/chosen_reward": float(np.mean(chosen)),
      "eval/rejected_reward": float(np.mean(rejected)),
    }
    say(f"margin {found.margin:.2f}, calibration error {found.calibration_error:.2f}")
    return Evaluation(metrics, [])

  def take_step(state: TrainState, step: int, clock: PhaseClock) -> Step:
    chosen = batch_indices(
      len(loaded.training), batch_size=config.pairs_per_step, seed=config.seed, step=step
    )
    pairs = [loaded.training[index] for index in chosen]
    batch = {
      "weights": np.full(len(pairs), 1 / len(pairs), np.float32),
      "margin": margins[chosen],
    }
    if config.packing:
      packed = packed_shares(
        [sequence for pair in pairs for sequence in pair],
        shares=microbatches,
        per_share=2 * len(pairs) // microbatches,
        length=config.packing,
        pad_id=tokenizer.pad_id,
      )
      batch, read = batch | {"packed": packed}, packed.packed
    else:
      read = pair_batch(pairs, pad_id=tokenizer.pad_id)
      batch |= read._asdict()
    rate = learning_rate(config.optimizer, step, steps=config.steps)
    hparams = {"learning_rate": jnp.float32(rate)}
    announce(f"compiling the update: rows of {read.tokens.shape[1]} tokens")
    stop.check()
    with clock("update"):
      batch = place_rows(batch, mesh)
      state, metrics = update(state, batch, hparams, microbatches, frozen)
      row = finalize(jax.device_get(metrics))
    row |= {"learning_rate": rate, "updates_skipped": int(state.skipped)}
    row |= {"padding_fraction": padding_fraction(read.segment_ids)}
    most = config.optimizer.max_skipped
    failure = failure_of(loss_fn, state, batch, hparams, max_skipped=most, frozen=frozen)
    work = text_work(
      policy.config,
      [sequence for pair in pairs for sequence in pair],
      passes=update_passes(adapters=frozen is not None),
      predicts=False,
    )
    return Step(state, row, work=work, failure=failure)

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
  center = float(np.mean(rewards_of(whole(state.params), loaded.training[scored])))
  params = on_main(merge_lora(whole(state.params)))
  if hosts.is_main():
    directory = run.workdir / "model"
    shutil.rmtree(directory, ignore_errors=True)  # Of an earlier end of this run.
    save_reward_model(directory, policy.config, params, tokenizer, center=center)
    say(f"reward model: {directory}")
  return finish(run)


def check_margins(config: Config, dataset: Dataset) -> None:
  """Refuses a margin that is no number; the message names the line."""
  name = config.margin_column
  if not name:
    return
  for example, line in zip(dataset.examples, dataset.lines, strict=True):
    value = example.columns.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise DataError(
        f"{config.data}:{line}: margin_column={name!r} is "
        f"{repr(value) if name in example.columns else 'missing'}; must be a number in every row"
      )


def margins_of(config: Config, columns: Sequence[dict[str, Any]]) -> np.ndarray:
  """[N] float32: each pair's margin; 0 where none is asked for."""
  name = config.margin_column
  return np.array([row[name] if name else 0.0 for row in columns], np.float32)


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  if not config.data:
    raise ConfigError(
      "data", "", "a file of preference pairs", "python -m experiments.make_preferences makes one"
    )
  pairs, part = config.pairs_per_step, config.microbatch_pairs
  if pairs > part and pairs % part:
    raise ConfigError(
      "microbatch_pairs",
      part,
      f"a divisor of pairs_per_step ({pairs})",
      f"try --microbatch_pairs={math.gcd(pairs, part)}",
    )
  if 0 < config.packing < config.max_tokens:
    raise ConfigError(
      "packing",
      config.packing,
      f"0, or at least max_tokens ({config.max_tokens})",
      f"--max_tokens={config.packing} makes it so",
    )
  check_schedule(config.optimizer, steps=config.steps)


def main(config: Config) -> int:
  workdir = config.workdir or default_workdir(
    "reward_model", model=config.model, data=Path(config.data).name, seed=config.seed
  )
  return exit_code(
    functools.partial(train, config, workdir), distributed=joined(config.distributed)
  )


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
