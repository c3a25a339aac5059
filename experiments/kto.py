"""KTO, BCO and AOT on single answers: learn from thumbs up and thumbs down.

Most feedback is about one answer: it was kept or thrown away, liked or not. Pairs are rare. As in
DPO the reward is beta * (log policy - log reference). But a single answer has no partner to be
compared with, so each loss has a point to compare it with:

  --loss=kto_loss             how far the policy has moved on answers in general: on prompts with
                              the answers to other prompts
  --loss=bco_unpaired_loss    midway between the mean rewards of both kinds, a running mean
  --loss=aot_unpaired_loss    the other kind's answer of the same rank, in one microbatch

  python -m experiments.make_preferences --out=pairs.jsonl       answers without people
  python -m experiments.kto --data=pairs.jsonl                   SmolLM2-135M, 2 CPU cores
  python -m experiments.kto --data=feedback.jsonl --task=gsm8k:test.jsonl --balanced

`--data=FILE` reads JSONL (plain or gzip) or Parquet with the columns prompt, completion and label
(true or 1: wanted), or preference pairs, whose answers are then taken apart. Held-out rows have
other prompts; eval/label_auc is how often a wanted answer of these has a larger reward than an
unwanted one, from 0.5 on. A task, if there is one, grades the model as well. The reference is the
model that training starts from; its log-probs are computed once and kept on disk.

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.
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
from rl_llm import evaluation, losses
from rl_llm.data import DataError, encoding, formats
from rl_llm.logprobs import sequence_logprobs
from rl_llm.runs import config as configs
from rl_llm.runs import keywords
from rl_llm.training import loop, unpaired
from rl_llm.training import pairs as pair_lib
from rl_llm.training import reference_cache as reference
from rl_llm.training import train_state as states
from rl_llm.training import update as updates

REWARDS = ("desirable_reward", "undesirable_reward")


def _example(config: typing.Any, name: str) -> np.ndarray:
  """One answer's array, as a loss takes it."""
  return np.zeros(1, bool if name == "desirable" else np.float32)


Loss = keywords.keyword_group(
  "loss",
  "The loss on single answers, and its keywords; none = the default of the loss.",
  losses.UNPAIRED_LOSSES,
  shape=_example,
  further={
    "decay": (
      float,
      configs.option(0.9, "BCO: share of the running shift that a step keeps", min=0, below=1),
    )
  },
)


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.ExportedRun = configs.inline(flags.ExportedRun())
  model: flags.Model = configs.inline(flags.Model())
  data: flags.Data = configs.inline(flags.Data())
  task: flags.Task = configs.inline(flags.Task(task="none"))
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  held_out_examples: int = configs.option(256, "held-out answers to evaluate on; 0 = all", min=0)
  reference_cache: str = flags.reference_cache()
  examples_per_step: int = configs.option(32, "B, answers an update", min=1)
  microbatch_rows: int = configs.option(
    8,
    "answers whose activations are held at once; divides examples_per_step, or is more than that",
    min=1,
  )
  balanced: bool = configs.option(
    False, "half of a step's answers wanted, half not, each kind in its own order; AOT's always are"
  )
  loss: Loss = Loss()
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer(learning_rate=1e-5)
  eval: flags.Evaluation = flags.Evaluation()

  @property
  def halves(self) -> bool:
    return self.balanced or self.loss.name in losses.BATCH_COUPLED


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
  rows, part, name = config.examples_per_step, config.microbatch_rows, config.loss.name
  if not config.data.data:
    fix = "python -m experiments.make_preferences makes one"
    raise configs.ConfigError("data", "", "a file of labelled answers, or of pairs", fix)
  configs.check_divides("microbatch_rows", rows, part, f"examples_per_step ({rows})")
  if name in losses.BATCH_COUPLED and part < rows:
    allowed = f"at least examples_per_step ({rows}) with --loss={name}"
    fix = "it compares the answers of a batch with each other"
    raise configs.ConfigError("microbatch_rows", part, allowed, fix)
  if config.halves and rows % 2:
    fix = f"with --loss={name}" if not config.balanced else "with --balanced"
    raise configs.ConfigError("examples_per_step", rows, f"an even number {fix}")
  if config.loss.decay != 0.9 and name != "bco_unpaired_loss":
    allowed, fix = f"left out with --loss={name}", "bco_unpaired_loss has it"
    raise configs.ConfigError("loss.decay", config.loss.decay, allowed, fix)
  config.data.check_fits(config.data.max_tokens)
  config.data.check_measured(config)


class State(typing.NamedTuple):
  """What a checkpoint holds."""

  policy: states.TrainState
  shift: jax.Array  # float32 scalar, the decayed sum of the steps' shifts
  weight: jax.Array  # float32 scalar, the same sum of ones


def init_kto(params, *, optimizer) -> State:
  """The state before the first step."""
  return State(states.init_state(params, optimizer), jnp.zeros(()), jnp.zeros(()))


class Batch(typing.NamedTuple):
  """What the loss reads of R answers."""

  answers: pair_lib.PairBatch
  desirable: np.ndarray  # [R] bool
  ref_answers: np.ndarray  # [R] the reference's log-probs of the answers
  point: np.ndarray  # [R] KTO's baseline, or BCO's shift


def unpaired_loss(options: Loss, answers, batch: Batch, given):
  """The loss of that name, and its metrics; AOT's rows 2i are wanted, rows 2i + 1 are not."""
  weights, ref = batch.answers.weights, batch.ref_answers
  if options.name in losses.BATCH_COUPLED:
    kinds = {"chosen_logprobs": answers[0::2], "rejected_logprobs": answers[1::2]}
    kinds |= {"ref_chosen_logprobs": ref[0::2], "ref_rejected_logprobs": ref[1::2]}
    loss, found = keywords.call(options, keywords=given, weights=2 * weights[0::2], **kinds)
    return loss, dict(zip(REWARDS, (found["chosen_reward"], found["rejected_reward"]), strict=True))
  if options.name == "bco_unpaired_loss":
    given = given | {"shift": batch.point}
  return keywords.call(
    options,
    keywords=given,
    response_logprobs=answers,
    ref_response_logprobs=ref,
    desirable=batch.desirable,
    baseline=batch.point,
    weights=weights,
  )


_jitted_loss = jax.jit(unpaired_loss, static_argnums=0)


def make_loss(config: Config, policy: setup.policy.Policy):
  """The objective: the loss on single answers, and nothing else."""
  options = config.loss

  def loss_fn(params, batch: Batch, hparams):
    mask, counted = batch.answers.sequences.mask, batch.answers.weights != 0
    logprobs = pair_lib.pair_logprobs(params, batch.answers, policy=policy)
    answers = sequence_logprobs(logprobs, mask)
    loss, found = unpaired_loss(options, answers, batch, hparams["loss"])
    for name, kind in (("desirable", batch.desirable), ("undesirable", ~batch.desirable)):
      kind = kind & counted
      found[f"{name}_logprobs"] = (jnp.sum(jnp.where(kind, answers, 0)), jnp.sum(kind))
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


def make_batch(drawn: unpaired.Answers, point: float, **sizes: int) -> tuple[Batch, float]:
  """The batch of an update, and how much of it is padding; sizes as for `make_answer_batch`."""
  made, padding = pair_lib.make_answer_batch(drawn.rows, **sizes)
  free = sizes["rows"] - len(drawn.rows)
  labels, refs = (np.pad(own, (0, free)) for own in (drawn.desirable, drawn.ref_answers))
  return Batch(made, labels, refs, np.full(len(labels), point, np.float32)), padding


def beta_of(options: Loss) -> float:
  """Reward per nat, as set or by default."""
  known = keywords.settings(keywords.chosen(options))
  return keywords.given(options).get("beta", known["beta"][1])


def point_of(
  options: Loss, score: abc.Callable, params: typing.Any, drawn: unpaired.Answers
) -> float:
  """What the answers' rewards are compared with, over all of them: before the batch is split."""
  summed = lambda rows: np.array([np.sum(own) for own in score(params, rows)], np.float32)  # noqa: E731
  if options.name == "kto_loss":
    return float(losses.kto_baseline(summed(drawn.others), drawn.ref_others))
  if options.name == "bco_unpaired_loss":
    known = drawn.ref_answers, drawn.desirable
    return float(losses.bco_shift(summed(drawn.rows), *known, beta=beta_of(options)))
  return 0.0


class Drawn(typing.NamedTuple):
  """The answers of a step."""

  answers: unpaired.Answers
  metrics: dict[str, typing.Any]
  samples: abc.Sequence[dict[str, typing.Any]] = ()


def learn(
  config: Config,
  model: setup.Model,
  score: abc.Callable,
  update: abc.Callable,
  state: State,
  drawn: Drawn,
  step: int,
  clock: setup.PhaseClock,
) -> tuple[State, loop.Learned]:
  """One step's update on single answers."""
  answers, rows, part = drawn.answers, config.examples_per_step, config.microbatch_rows
  shares, shift, weight = max(1, rows // part), state.shift, state.weight
  with clock("logprobs"):
    point = point_of(config.loss, score, model.weights.whole(state.policy.params), answers)
  if config.loss.name == "bco_unpaired_loss":
    decay = config.loss.decay
    shift, weight = decay * shift + (1 - decay) * point, decay * weight + (1 - decay)
    point = float(shift / weight)
  sizes = {"pad_id": model.tokenizer.pad_id, "packing": config.data.packing}
  batch, padding = make_batch(answers, point, rows=rows, shares=shares, **sizes)
  hparams = {"learning_rate": setup.learning_rate(config, step)}
  hparams |= {"loss": keywords.given(config.loss)}
  with clock("update"):
    policy, found = setup.update_once(
      update, model, state.policy, batch, jax.tree.map(jnp.float32, hparams), shares
    )
  found |= {"desirable_fraction": float(np.mean(answers.desirable)), "padding_fraction": padding}
  if config.loss.name == "bco_unpaired_loss":
    found |= {"shift": point}
  work = setup.work_on_texts(model, answers.rows)
  return State(policy, shift, weight), loop.Learned(found, work=work)


def answer_figures(
  options: Loss, held_out: unpaired.Answers, score: abc.Callable, pad_id: int, params: typing.Any
) -> dict[str, float]:
  """Figures on held-out answers: the rewards that the policy implies, and the loss."""
  logprobs = np.array([np.sum(own) for own in score(params, held_out.rows)], np.float32)
  ratios = logprobs - held_out.ref_answers
  rewards = beta_of(options) * ratios
  # Two batches of float32 differ by less than 1e-4 nats: where the policy is the reference, a tie.
  figures = {"label_auc": unpaired.label_auc(np.round(ratios, 4), held_out.desirable)}
  for name, kind in (("desirable", held_out.desirable), ("undesirable", ~held_out.desirable)):
    if np.any(kind):
      figures[f"{name}_reward"] = float(np.mean(rewards[kind]))
      figures[f"{name}_logprobs"] = float(np.mean(logprobs[kind]))
  if options.name not in losses.BATCH_COUPLED:  # Which would need as many of each kind.
    point = point_of(options, score, params, held_out)
    batch, _ = make_batch(held_out, point, rows=len(held_out.rows), pad_id=pad_id)
    given = {name: jnp.float32(value) for name, value in keywords.given(options).items()}
    figures["answer_loss"] = float(_jitted_loss(options, logprobs, batch, given)[0])
  return {f"eval/{name}": value for name, value in figures.items() if value is not None}


def open_answers(
  config: Config, run: loop.Run, model: setup.Model, dataset: formats.Dataset
) -> tuple[unpaired.Answers, unpaired.Answers, setup.loading.Loaded]:
  """The answers of the file, to train on and held out, and what was loaded."""
  layout = config.prompts.layout
  encode = functools.partial(
    encoding.encode,
    tokenizer=model.tokenizer,
    prompt_format=setup.resolve_format(layout.prompt_format, model.tokenizer),
    system_prompt=layout.system_prompt,
  )
  loaded = setup.load_data(
    config, run, model, formats.labelled(dataset), encode, encoding.limit_sequences
  )
  kept, path = slice(config.held_out_examples or None), config.data.data
  sides = loaded.training, loaded.held_out[kept]
  columns = loaded.training_columns, loaded.held_out_columns[kept]
  labels = [np.array([own["label"] for own in side], bool) for side in columns]
  if labels[0].all() or not labels[0].any():
    only, fix = str(bool(labels[0][0])).lower(), "python -m experiments.sft --data imitates answers"
    raise DataError(f"{path}: every label is {only}, and nothing tells answers apart; {fix}")
  others = [[], []]
  if config.loss.name == "kto_loss":
    try:
      rows, limit = sides[1] + sides[0], config.data.max_tokens
      others = [unpaired.mismatched(own, limit=limit) for own in (sides[0], rows)]
      others[1] = others[1][: len(sides[1])]
    except ValueError as error:
      raise DataError(f"{path}: {error}; try --loss=bco_unpaired_loss") from None
  parts = (*sides, *others)
  size = config.examples_per_step
  known = setup.reference_of_file(config, run, model, sum(parts, []), rows_per_batch=size)
  sums = np.array([np.sum(own) for own in known], np.float32)
  ref, ref_held_out, ref_others, ref_others_held_out = np.split(
    sums, np.cumsum([len(part) for part in parts[:-1]])
  )
  return (
    unpaired.Answers(sides[0], labels[0], ref, others[0], ref_others),
    unpaired.Answers(sides[1], labels[1], ref_held_out, others[1], ref_others_held_out),
    loaded,
  )


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
    task = setup.load_task(config)
    dataset = setup.read_data(config, "unpaired", "preference", "implicit_preference")
    model = setup.load_model(config, run, mesh, reference=True)
    training, held_out, loaded = open_answers(config, run, model, dataset)
    model = model._replace(weights=model.weights._replace(reference=None))
    pad_id, counts = model.tokenizer.pad_id, {f"data_{k}": n for k, n in loaded.counts.items()}
    with setup.open_problems(config, run, model, task, prompts=size) as problems:
      sizes = {
        "answers a step": size,
        "answers a microbatch": min(size, part),
        "data": loaded.note,
        "wanted": f"{np.mean(training.desirable):.0%} of the answers to train on",
        "held-out answers": len(held_out.rows),
        "held-out problems": len(problems.held_out.problems) if problems else 0,
      }
      setup.show_sizes(config, run, model.weights, sizes)
      statics = {"policy": model.policy, "mesh": mesh, "pad_id": pad_id, "rows_per_batch": size}
      score = functools.partial(reference.compute_logprobs, **statics)
      checked = functools.partial(score, check=run.stop.check)
      optimizer, loss_fn = setup.make_optimizer(config.optimizer), make_loss(config, model.policy)
      how = {"microbatches": max(1, size // part), "mesh": mesh, "cast": model.policy.cast}
      update = updates.make_update(loss_fn, optimizer, **how)
      init = functools.partial(init_kto, optimizer=optimizer)
      begun, model = setup.begin(config, run, model, init)
      draw = functools.partial(
        unpaired.drawn_answers, training.desirable, count=size, halves=config.halves
      )

      def sample(params: typing.Any, step: int, clock: setup.PhaseClock) -> Drawn:
        return Drawn(training.take(draw(seed=config.run.seed, step=step)), counts)

      def evaluate(params: typing.Any, step: int) -> evaluation.Evaluation:
        own = (config.loss, held_out, checked, pad_id)
        figures = answer_figures(*own, params) if held_out.rows else {}
        graded = problems.evaluate(params, step) if problems else evaluation.Evaluation({}, [])
        return graded._replace(metrics=figures | graded.metrics)

      learning = functools.partial(learn, config, model, score, loop.announced(update, run))
      state = setup.train_loop(
        config, run, model, begun, sample=sample, learn=learning, evaluate=evaluate
      )
    return setup.finish(config, run, model, state)


def main(config: Config) -> int:
  return setup.main(train, config, file=config.data.data)


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
