"""A reward model: a network that learns which of two answers people, or a grader, prefer.

Where nothing can check an answer, somebody can still say which of two is better. Bradley-Terry
turns that into numbers: the better answer wins with probability sigmoid(r(better) - r(worse)), and
the network that computes r is trained until the winners in the data are likely. PPO and GRPO then
raise r, on texts that nobody has compared.

  python -m experiments.make_preferences --out=pairs.jsonl       pairs without people
  python -m experiments.reward_model --data=pairs.jsonl          SmolLM2-135M, 2 CPU cores
  python -m experiments.grpo --reward=model:WORKDIR/model        what it is for

`--data=FILE` reads JSONL (plain or gzip) or Parquet with the columns chosen and rejected, and
either prompt or the same beginning in both. The network starts as the language model, with one
column in place of its vocabulary. Held-out pairs have other prompts, and are scored before, during
and after training: how often the better answer has the larger reward, and whether the network is
right as often as it is confident (calibration_error; 0 is best). It is written as a Hugging Face
directory, WORKDIR/model, whose rewards have mean 0 over training answers.

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.

Measured on 2 cores (docs/results/reward_model.md has the commands): of 256 held-out pairs of copied
strings the judge gets 0.91 right (95 % 0.87 to 0.94), and GRPO against it goes from 0.46 to 0.59 by
the task's grader, PPO to 0.62. SmolLM2, which cannot do the sums itself, gets 0.82 to 0.90 of 67
held-out pairs right.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections import abc

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import data, evaluation, losses, policy
from rl_llm.data import batches
from rl_llm.rollout import reward_model
from rl_llm.runs import config as configs
from rl_llm.training import loop, pairs
from rl_llm.training import train_state as states
from rl_llm.training import update as updates


@dataclasses.dataclass(frozen=True)
class Scoring:
  """What is measured on pairs that training never draws."""

  NOTED = "every", "pairs"  # They change no weight.

  every: int = configs.option(
    8, "steps between evaluations, first and last included; 0 = a run without evaluation", min=0
  )
  pairs: int = configs.option(
    256, "held-out pairs that are scored, and training pairs for the mean reward; 0 = all", min=0
  )


@configs.experiment
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


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "steps": 120,
  "pairs_per_step": 32,
  "microbatch_pairs": 32,
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
  if not config.data.data:
    raise configs.ConfigError(
      "data", "", "a file of preference pairs", "python -m experiments.make_preferences makes one"
    )
  config.data.check_measured(config)
  config.data.check_fits(config.data.max_tokens)


class Batch(typing.NamedTuple):
  """What the loss reads of R pairs."""

  pairs: pairs.PairBatch
  margin: np.ndarray  # [R] by how much the rewards of a pair are to differ


def make_loss(config: Config, trunk: policy.Policy):
  """The objective: Bradley-Terry on pairs, whose rows alternate."""

  def loss_fn(params, batch: Batch, hparams):
    sequences, packed, weights = batch.pairs
    if packed is not None:
      rewards = reward_model.packed_rewards(params, packed, policy=trunk)
    else:
      rewards = reward_model.sequence_rewards(params, *sequences, policy=trunk)
    loss, found = losses.reward_model_loss(
      rewards[0::2], rewards[1::2], weights, margin=batch.margin, center_coef=config.center_coef
    )
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


def learn(
  config: Config,
  model: setup.Model,
  update: abc.Callable,
  state: states.TrainState,
  drawn: loop.Examples,
  step: int,
  clock: setup.PhaseClock,
) -> tuple[states.TrainState, loop.Learned]:
  """One step's update on (pair, margin) examples."""
  answers, margin = zip(*drawn.examples, strict=True)
  sizes = {"packing": config.data.packing, "shares": config.pairs.microbatches}
  pad_id, rows = model.tokenizer.pad_id, len(answers)
  made, padding = pairs.make_pair_batch(answers, pad_id=pad_id, rows=rows, **sizes)
  hparams = {"learning_rate": jnp.float32(setup.learning_rate(config, step))}
  batch, used = Batch(made, np.array(margin, np.float32)), config.pairs.microbatches
  with clock("update"):
    state, found = setup.update_once(update, model, state, batch, hparams, used)
  work = setup.work_on_texts(model, answers, predicts=False)
  return state, loop.Learned(found | {"padding_fraction": padding}, work=work)


def evaluate(
  config: Config,
  run: loop.Run,
  score: abc.Callable,
  held_out: abc.Sequence[data.encoding.Pair],
  margins: np.ndarray,
  params: typing.Any,
  step: int,
) -> evaluation.Evaluation:
  """How often the better answer of held-out pairs has the larger reward, and how sure that is."""
  run.console.say(f"scoring {len(held_out)} held-out pairs")
  chosen, rejected = score(params, held_out).T
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
  return evaluation.Evaluation(figures, [])


def train(config: Config, workdir: str) -> dict[str, typing.Any]:
  """Trains to the end, or resumes an earlier run of the same config; returns result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=True) as run:
    if run.result:
      return run.result
    size, scored = config.pairs, slice(config.eval.pairs or None)
    column = config.margin_column
    mesh = setup.open_pair_mesh(config)
    dataset = setup.read_data(config, "preference", "implicit_preference")
    pairs.check_margins(dataset, column, path=config.data.data)
    model = setup.load_model(config, run, mesh, without="unembed")
    loaded = setup.load_pairs(config, run, model, dataset, config.layout)
    margins = pairs.margins(loaded.training_columns, column)
    sizes = {
      "pairs a step": size.per_step,
      "pairs a microbatch": size.per_step // size.microbatches,
      "data": loaded.note,
      "held-out pairs scored": len(loaded.held_out[scored]),
    }
    setup.show_sizes(config, run, model.weights, sizes)
    optimizer, loss_fn = setup.make_optimizer(config.optimizer), make_loss(config, model.policy)
    how = {"microbatches": size.microbatches, "mesh": mesh, "cast": model.policy.cast}
    update = updates.make_update(loss_fn, optimizer, **how)
    width, seed = model.policy.config.width, config.run.seed
    statics = {"policy": model.policy, "pad_id": model.tokenizer.pad_id, "mesh": mesh}
    score = functools.partial(
      reward_model.score_pairs, **statics, pairs_per_batch=size.per_step, check=run.stop.check
    )

    def first_state(params) -> states.TrainState:
      head = policy.normal_head(width, jax.random.key(seed))
      return states.init_state(policy.with_head(params, head), optimizer)

    def sample(params, step: int, clock: setup.PhaseClock) -> loop.Examples:
      count = len(loaded.training)
      chosen = batches.batch_indices(count, batch_size=size.per_step, seed=seed, step=step)
      return loop.Examples([(loaded.training[index], margins[index]) for index in chosen])

    begun, model = setup.begin(config, run, model, first_state)
    held_out = [loaded.held_out[scored], pairs.margins(loaded.held_out_columns, column)[scored]]
    state = setup.train_loop(
      config,
      run,
      model,
      begun,
      sample=sample,
      learn=functools.partial(learn, config, model, loop.announced(update, run)),
      evaluate=functools.partial(evaluate, config, run, score, *held_out),
    )
    params = model.weights.whole(state.params)
    center = float(np.mean(score(params, loaded.training[scored])))
    shape, tokenizer = model.policy.config, model.tokenizer
    loop.export_reward_model(run, shape, params, tokenizer, center=center)
    return loop.finish(run, checkpoints_kept=config.run.checkpoint.keep_at_end)


def main(config: Config) -> int:
  return setup.main(train, config, file=config.data.data)


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
