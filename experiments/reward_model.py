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

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import config as configs
from rl_llm import data, hosts, losses, metrics, policy, reward_model, sharding, training
from rl_llm.data import batches, encoding
from rl_llm.evaluation import Evaluation
from rl_llm.policy import scalar_head
from rl_llm.train_state import TrainState, init_state
from rl_llm.update import make_update


@dataclasses.dataclass(frozen=True)
class Scoring:
  """What is measured on pairs that training never draws."""

  every: int = configs.option(
    8, "steps between evaluations; first and last are always done", min=1
  )
  pairs: int = configs.option(
    256, "held-out pairs that are scored, and training pairs for the mean reward; 0 = all", min=0
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.Run = configs.inline(flags.Run(steps=16))
  model: flags.Model = configs.inline(flags.Model())
  data: flags.Data = configs.inline(flags.Data(held_out_fraction=0.2))
  layout: flags.Layout = configs.inline(flags.Layout())
  pairs: flags.Pairs = configs.inline(flags.Pairs(pairs_per_step=8))
  margin_column: str = configs.option(
    "", "a column with the number by which the rewards of a pair are to differ; empty = none"
  )
  center_coef: float = configs.option(
    0.01, "strength with which a pair's rewards are held around 0, or they drift", min=0
  )
  mesh: flags.MeshSizes = flags.MeshSizes()
  optimizer: flags.Optimizer = flags.Optimizer(learning_rate=2e-5)
  eval: Scoring = Scoring()


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
  return dict(TINY) if config.model.model == "tiny" else {}


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  if not config.data.data:
    raise configs.ConfigError(
      "data", "", "a file of preference pairs", "python -m experiments.make_preferences makes one"
    )
  if not config.data.held_out_fraction:
    raise configs.ConfigError("held_out_fraction", 0, "above 0", "nothing would be evaluated")
  flags.check_packing(config.data.packing, config.data.max_tokens)


class Batch(NamedTuple):
  """What the loss reads of 2 * B answers, chosen and rejected in turn; one of the first two."""

  sequences: batches.SequenceBatch | None  # each answer in a row of its own
  packed: batches.PackedShares | None  # several answers a row
  weights: np.ndarray  # [B]
  margin: np.ndarray  # [B] by how much the rewards of a pair are to differ


def make_loss(config: Config, trunk: policy.Policy):
  """The objective: Bradley-Terry on pairs, whose rows alternate."""

  def loss_fn(params, batch: Batch, hparams):
    if batch.packed is not None:
      rewards = reward_model.packed_rewards(params, batch.packed, policy=trunk)
    else:
      rewards = reward_model.sequence_rewards(params, *batch.sequences, policy=trunk)
    loss, found = losses.reward_model_loss(
      rewards[0::2],
      rewards[1::2],
      batch.weights,
      margin=batch.margin,
      center_coef=config.center_coef,
    )
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


def make_batch(
  config: Config, pairs: Sequence[encoding.Pair], margin: np.ndarray, *, pad_id: int
) -> tuple[Batch, batches.SequenceBatch]:
  """The batch, and the rows that are read, packed or not."""
  weights = np.full(len(pairs), 1 / len(pairs), np.float32)
  if not config.data.packing:
    sequences = batches.pair_batch(pairs, pad_id=pad_id)
    return Batch(sequences, None, weights, margin), sequences
  packed = batches.packed_shares(
    setup.flat(pairs),
    shares=config.pairs.microbatches,
    per_share=2 * len(pairs) // config.pairs.microbatches,
    length=config.data.packing,
    pad_id=pad_id,
  )
  return Batch(None, packed, weights, margin), packed.packed


def learn(
  config: Config,
  model: setup.Model,
  update: Callable,
  state: TrainState,
  drawn: training.Examples,
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[TrainState, training.Learned]:
  """One step's update on (pair, margin) examples."""
  pairs, margin = zip(*drawn.examples, strict=True)
  batch, read = make_batch(
    config, pairs, np.array(margin, np.float32), pad_id=model.tokenizer.pad_id
  )
  hparams = {"learning_rate": jnp.float32(setup.learning_rate(config, step))}
  with clock("update"):
    placed = sharding.place_rows(batch, model.mesh)
    state, found = update(
      state, placed, hparams, config.pairs.microbatches, model.weights.frozen
    )
  found |= {"padding_fraction": batches.padding_fraction(read.segment_ids)}
  return state, training.Learned(found, work=setup.text_work(model, pairs, predicts=False))


def make_score(config: Config, run: training.Run, model: setup.Model):
  """(params, pairs) -> [N, 2] rewards of chosen and rejected answers; may be interrupted."""
  score = jax.jit(functools.partial(reward_model.sequence_rewards, policy=model.policy))
  size, pad_id, mesh = config.pairs.pairs_per_step, model.tokenizer.pad_id, model.mesh

  def rewards_of(params, pairs: Sequence[encoding.Pair]) -> np.ndarray:
    rewards = np.zeros((len(pairs), 2), np.float32)
    # Pairs of similar length share a batch: one program for each width.
    order = sorted(range(len(pairs)), key=lambda index: -max(len(s.tokens) for s in pairs[index]))
    for first in range(0, len(order), size):
      run.stop.check()
      chosen = order[first : first + size]
      batch = batches.pair_batch([pairs[index] for index in chosen], pad_id=pad_id, rows=2 * size)
      found = sharding.fetch(score(params, *sharding.place_rows(batch, mesh)))
      rewards[chosen] = found.reshape(-1, 2)[: len(chosen)]
    return rewards

  return rewards_of


def evaluate(
  config: Config,
  run: training.Run,
  rewards_of: Callable,
  held_out: Sequence[encoding.Pair],
  margins: np.ndarray,
  params: Any,
) -> Evaluation:
  """How often the better answer of held-out pairs has the larger reward, and how sure that is."""
  run.console.say(f"scoring {len(held_out)} held-out pairs")
  chosen, rejected = rewards_of(params, held_out).T
  found = reward_model.pair_statistics(chosen, rejected)
  loss, _ = losses.reward_model_loss(
    jnp.asarray(chosen),
    jnp.asarray(rejected),
    jnp.full(len(chosen), 1 / len(chosen)),
    margin=jnp.asarray(margins),
    center_coef=config.center_coef,
  )
  run.console.say(f"margin {found.margin:.2f}, calibration error {found.calibration_error:.2f}")
  figures = {
    "eval/pair_accuracy": found.accuracy,
    "eval/pair_low": found.low,
    "eval/pair_high": found.high,
    "eval/pair_loss": float(loss),
    "eval/margin": found.margin,
    "eval/calibration_error": found.calibration_error,
    "eval/chosen_reward": float(np.mean(chosen)),
    "eval/rejected_reward": float(np.mean(rejected)),
  }
  return Evaluation(figures, [])


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Trains to the end, or resumes an earlier run of the same config; gives result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=True) as run:
    if run.result:
      return run.result
    size = config.pairs
    mesh = setup.open_mesh(
      config,
      per_step={"pairs_per_step": size.pairs_per_step},
      at_once={"microbatch_pairs": size.microbatch_pairs},
    )
    setup.check_packing(config, mesh)
    dataset = setup.read_data(config, "preference", "implicit_preference")
    check_margins(config, dataset)
    model = setup.load_model(config, run, mesh, without="unembed")
    loaded = setup.load_pairs(config, run, dataset, model.tokenizer, config.layout)
    scored = slice(config.eval.pairs or None)
    examples = list(
      zip(loaded.training, margins_of(config, loaded.training_columns), strict=True)
    )
    sizes = {
      "pairs a step": size.pairs_per_step,
      "pairs a microbatch": size.pairs_per_step // size.microbatches,
      "data": loaded.note,
      "held-out pairs scored": len(loaded.held_out[scored]),
    }
    setup.show_sizes(config, run, model.weights, sizes)
    optimizer, loss_fn = setup.adamw(config.optimizer), make_loss(config, model.policy)
    update = make_update(loss_fn, optimizer, microbatches=size.microbatches, mesh=mesh)
    width, seed = model.policy.config.width, config.run.seed

    def first_state(params) -> TrainState:
      head = scalar_head.normal_head(width, jax.random.key(seed))
      return init_state(scalar_head.with_head(params, head), optimizer)

    def sample(params, step: int, clock: metrics.PhaseClock) -> training.Examples:
      chosen = setup.step_indices(config, len(examples), step, size=size.pairs_per_step)
      return training.Examples([examples[index] for index in chosen])

    begun, model = setup.begin(config, run, model, first_state)
    rewards_of = make_score(config, run, model)
    held_out_margins = margins_of(config, loaded.held_out_columns)[scored]
    state = setup.train_loop(
      config,
      run,
      model,
      begun,
      sample=sample,
      learn=functools.partial(learn, config, model, setup.announced(update, run)),
      evaluate=functools.partial(
        evaluate, config, run, rewards_of, loaded.held_out[scored], held_out_margins
      ),
    )
    params = model.weights.whole(state.params)
    center = float(np.mean(rewards_of(params, loaded.training[scored])))
    export(run, model, params, center=center)
    return training.finish(run)


def export(run: training.Run, model: setup.Model, params: Any, *, center: float) -> None:
  """Writes the reward model, whose rewards have mean 0 over training answers, to WORKDIR/model."""
  params = training.on_main(policy.merge_lora(params))
  if hosts.is_main():
    directory = run.workdir / "model"
    shutil.rmtree(directory, ignore_errors=True)  # Of an earlier end of this run.
    shape = model.policy.config
    reward_model.save_reward_model(directory, shape, params, model.tokenizer, center=center)
    run.console.say(f"reward model: {directory}")


def check_margins(config: Config, dataset: data.Dataset) -> None:
  """Refuses a margin that is no number; the message names the line."""
  name = config.margin_column
  if not name:
    return
  for example, line in zip(dataset.examples, dataset.lines, strict=True):
    value = example.columns.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
      raise data.DataError(
        f"{config.data.data}:{line}: margin_column={name!r} is "
        f"{repr(value) if name in example.columns else 'missing'}; must be a number in every row"
      )


def margins_of(config: Config, columns: Sequence[dict[str, Any]]) -> np.ndarray:
  """[N] float32: each pair's margin; 0 where none is asked for."""
  name = config.margin_column
  return np.array([row[name] if name else 0.0 for row in columns], np.float32)


if __name__ == "__main__":
  configs.run(
    lambda config: setup.main(train, config, data=Path(config.data.data).name),
    Config,
    overrides=overrides,
  )
