"""DPO and its family: raise the better of two answers over the worse one, without a reward model.

A policy that differs from its reference is already a reward model, with the reward
beta * (log policy - log reference); the loss fits that reward to the preferences (`--loss=`, a
function of rl_llm.losses). Watch the chosen answers' log-probs as well as the margin: most of these
losses see only the difference, and often both answers become less likely.

  python -m experiments.dpo                                 SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.dpo --model=tiny --task=copy        the one-minute version
  python -m experiments.dpo --data=pairs.jsonl --task=none --loss=ipo_loss --loss.beta=0.2
  python -m experiments.dpo --data=pairs.jsonl --loss=simpo_loss          needs no reference

`--data=on_policy` makes its own pairs: every step samples several responses to each of the task's
problems, and pairs the best with the worst where the grader tells them apart. `--data=FILE` reads
pairs from JSONL (plain or gzip) or Parquet: chosen and rejected, with a prompt column or a shared
beginning, as text or messages. The reference is the model that training starts from; what it says
of a file's pairs is computed once and kept on disk. --reference.refresh lets it follow the policy
(TR-DPO); held-out pairs are still compared with the first. Rerunning the same command resumes from
the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --pairs_per_step=12, seeds 0, 1 and 2, on 2 cores, and the question
"What is {a} {op} {b}? Reply with just the number.": of 100 held-out sums, right at temperature 1
from 0.20 to 0.84, 0.81 and 0.83, greedily from 0.69 to 0.88, 0.86 and 0.93; 18 s a step.
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
from rl_llm.data import batches, encoding, loading
from rl_llm.logprobs import sequence_logprobs
from rl_llm.rollout import collect
from rl_llm.runs import config as configs
from rl_llm.runs import keywords, metrics
from rl_llm.training import loop
from rl_llm.training import pairs as pair_lib
from rl_llm.training import reference_cache as reference
from rl_llm.training import train_state as states
from rl_llm.training import update as updates

# Whose formulas are about an answer's average token; IPO's as trainers have it.
PER_TOKEN = ("ipo_loss", "simpo_loss", "orpo_loss", "alphapo_loss")
REWARDS = ("margin", "chosen_reward", "rejected_reward")

Shift = typing.Literal["batch"] | None
Summed = typing.Literal["auto", "sum", "mean"]
TAIL = configs.option(1.0, "LD-DPO: factor of tokens past the shorter answer", min=0, max=1)
Loss = keywords.keyword_group(
  "loss",
  "The preference loss, and its keywords; none = the default of the loss.",
  losses.PREFERENCE_LOSSES,
  shape=(1,),
  further={
    "shift": (Shift, configs.option(None, "BCO: reward at 0; batch = midway between both means")),
    "logprobs": (Summed, configs.option("auto", "sum or mean; auto = mean in IPO, SimPO, ORPO")),
    "sft_coef": (float, configs.option(0.0, "RPO: factor of the chosen answers' NLL", min=0)),
    "tail_weight": (float, TAIL),
    "wpo": (bool, configs.option(False, "WPO: pairs count by how likely the policy writes them")),
  },
)


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.SampledRun = configs.inline(flags.SampledRun())
  model: flags.Model = configs.inline(flags.Model())
  data: flags.Data = configs.inline(flags.Data(data="on_policy"))
  pairs: flags.Pairs = configs.inline(flags.Pairs())
  task: flags.JudgedTask = configs.inline(flags.JudgedTask())
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  held_out_examples: int = configs.option(256, "held-out pairs to evaluate on; 0 = all", min=0)
  reference: flags.Reference = flags.Reference()
  reference_cache: str = flags.reference_cache()
  responses_per_prompt: int = configs.option(8, "G, responses a problem, on policy", min=2)
  sampling: flags.Sampling = flags.Sampling()
  loss: Loss = Loss()
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer(learning_rate=1e-5)
  eval: flags.Evaluation = flags.Evaluation()


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "steps": 120,
  "pairs_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_pairs": 64,
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
  "samples_every": 20,
  "checkpoint.every": 20,
}


def overrides(config: Config) -> dict[str, typing.Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model.model == "tiny" else {}


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  loss, moving, part = config.loss, config.reference, config.pairs.microbatch_pairs
  sampled = config.prompts.max_prompt_tokens + config.prompts.max_new_tokens
  on_policy = config.data.data == "on_policy"
  config.data.check_fits(sampled if on_policy else config.data.max_tokens)
  config.data.check_measured(config, "on_policy")
  if loss.name in losses.BATCH_COUPLED and config.pairs.microbatches > 1:
    allowed = f"at least pairs_per_step ({config.pairs.per_step}) with --loss={loss.name}"
    fix = "it compares the pairs of a batch with each other"
    raise configs.ConfigError("microbatch_pairs", part, allowed, fix)
  if config.task.reward != "task" and not on_policy:
    allowed = "task with a file of pairs, which says itself what is better"
    raise configs.ConfigError("reward", config.task.reward, allowed, "--data=on_policy samples")
  if moving.keep and not moving.refresh:
    allowed = "left out without --reference.refresh"
    raise configs.ConfigError("reference.keep", moving.keep, allowed)
  if moving.refresh and not needs_reference(loss):
    allowed = f"0 with --loss={loss.name}, which has no reference"
    raise configs.ConfigError("reference.refresh", moving.refresh, allowed)
  if loss.shift and loss.name != "bco_loss":
    allowed = f"left out with --loss={loss.name}"
    raise configs.ConfigError("loss.shift", loss.shift, allowed, "bco_loss has it")
  if loss.alpha is not None and loss.divergence != "alpha":
    allowed = "left out without --loss.divergence=alpha"
    raise configs.ConfigError("loss.alpha", loss.alpha, allowed)


def needs_reference(options: Loss) -> bool:
  """Whether the loss compares the policy with a reference at all."""
  return "ref_chosen_logprobs" in keywords.arrays(options)


class Batch(typing.NamedTuple):
  """What the loss reads of R pairs: rows 2i are chosen, rows 2i + 1 rejected."""

  pairs: pair_lib.PairBatch
  chosen_weights: np.ndarray  # [2 R, T] how much each token of the chosen answers counts
  ref_answers: np.ndarray | None = None  # [2 R] the reference's log-probs of the answers


def of_answers(options: Loss, logprobs, mask) -> jax.Array:
  """[B]: the log-prob of each answer, as the loss wants it."""
  kind, factor = options.logprobs, options.tail_weight
  tail = {"tail_weight": factor, "head_length": pair_lib.shorter_lengths(mask)}
  average = kind == "mean" or (kind == "auto" and options.name in PER_TOKEN)
  return sequence_logprobs(logprobs, mask, average=average, **tail if factor != 1 else {})


def known_answers(options: Loss, logprobs: abc.Sequence[np.ndarray], mask: np.ndarray):
  """`of_answers` of log-probs that are data: a vector for each of the first rows of the mask."""
  padded = batches.pad_values(logprobs, width=mask.shape[1])
  padded = np.pad(padded, ((0, len(mask) - len(padded)), (0, 0)))
  return np.asarray(of_answers(options, padded, mask))


def preference_loss(options: Loss, answers, ref_answers, weights, given):
  """The loss of that name: row 2i of the answers is chosen, row 2i + 1 rejected."""
  # The names among its keywords are a part of the program; `given` are its numbers.
  given = given | {k: v for k, v in keywords.given(options).items() if isinstance(v, str)}
  arrays = {"chosen_logprobs": answers[0::2], "rejected_logprobs": answers[1::2]}
  if ref_answers is not None:
    arrays |= {"ref_chosen_logprobs": ref_answers[0::2], "ref_rejected_logprobs": ref_answers[1::2]}
  loss, found = keywords.call(options, keywords=given, weights=weights, **arrays)
  return loss, {"pair_accuracy" if k == "accuracy" else k: v for k, v in found.items()}


def make_loss(config: Config, policy: setup.policy.Policy):
  """The objective: the preference loss, plus the chosen answers' likelihood where it is wanted."""
  options, temperature = config.loss, config.sampling.temperature

  def loss_fn(params, batch: Batch, hparams):
    mask, weights = batch.pairs.sequences.mask, batch.pairs.weights
    logprobs = pair_lib.pair_logprobs(params, batch.pairs, policy=policy, temperature=temperature)
    answers = of_answers(options, logprobs, mask)
    loss, found = preference_loss(options, answers, batch.ref_answers, weights, hparams["loss"])
    likelihood, of_chosen = losses.sft_loss(logprobs, batch.chosen_weights)
    loss = loss + hparams["sft_coef"] * likelihood
    found |= {"chosen_nll": of_chosen["nll"]}
    counted, sums = weights != 0, sequence_logprobs(logprobs, mask)
    for name, side in (("chosen", sums[0::2]), ("rejected", sums[1::2])):
      found[f"{name}_logprobs"] = (jnp.sum(jnp.where(counted, side, 0)), jnp.sum(counted))
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


def make_update(config: Config, policy: setup.policy.Policy, mesh):
  """The compiled update on a batch of pairs."""
  further = {"microbatches": config.pairs.microbatches, "mesh": mesh, "cast": policy.cast}
  optimizer = setup.make_optimizer(config.optimizer)
  return updates.make_update(make_loss(config, policy), optimizer, **further)


def make_batch(pairs: abc.Sequence[encoding.Pair], **sizes: int) -> tuple[Batch, float]:
  """The batch of an update, and how much of it is padding; `sizes` as for `make_pair_batch`."""
  made, padding = pair_lib.make_pair_batch(pairs, **sizes)
  return Batch(made, pair_lib.chosen_token_weights(made)), padding


class Drawn(typing.NamedTuple):
  """The pairs of a step."""

  pairs: list[encoding.Pair]
  ref_logprobs: list[np.ndarray]  # of both answers of each pair; empty without a fixed reference
  metrics: dict[str, typing.Any]
  samples: abc.Sequence[dict[str, typing.Any]] = ()
  work: loop.Work = loop.Work()  # what was sampled for them


def with_constants(
  options: Loss, batch: Batch, ref_logprobs: list[np.ndarray], policy_logprobs: abc.Callable
) -> tuple[Batch, dict[str, typing.Any]]:
  """The batch and the numbers of its loss, with all that is computed before the batch is split.

  `policy_logprobs()` are those of the policy, where the loss needs them beforehand.
  """
  mask = batch.pairs.sequences.mask
  given = {k: jnp.float32(v) for k, v in keywords.given(options).items() if type(v) is float}
  if needs_reference(options):
    batch = batch._replace(ref_answers=known_answers(options, ref_logprobs, mask))
  if options.shift == "batch":
    given["shift"] = losses.bco_shift(
      known_answers(options, policy_logprobs(), mask),
      batch.ref_answers,
      np.arange(len(mask)) % 2 == 0,
      where=np.repeat(batch.pairs.weights != 0, 2),
      **{name: value for name, value in given.items() if name == "beta"},
    )
  return batch, given


def learn(
  config: Config,
  model: setup.Model,
  score: abc.Callable,
  update: abc.Callable,
  state: states.TrainState,
  drawn: Drawn,
  step: int,
  clock: setup.PhaseClock,
) -> tuple[states.TrainState, loop.Learned]:
  """One step's update on preference pairs."""
  pairs, size = drawn.pairs, config.pairs
  if not pairs:  # All problems were answered equally well: there is nothing to learn.
    return state, loop.Learned({"pairs": 0}, work=drawn.work)
  sizes = {"rows": size.per_step, "packing": config.data.packing, "shares": size.microbatches}
  batch, padding = make_batch(pairs, pad_id=model.tokenizer.pad_id, **sizes)
  lengths = np.sum(batch.pairs.sequences.mask, axis=1)[: 2 * len(pairs)]
  with clock("logprobs"):
    flat, params, refs = encoding.flat(pairs), model.weights.whole(state.params), drawn.ref_logprobs
    if state.reference is not None:
      refs = score(model.weights.whole(state.reference), flat)
    batch, given = with_constants(config.loss, batch, refs, lambda: score(params, flat))
    if config.loss.wpo:
      half = config.sampling.temperature / 2
      both = score(params, flat), score(params, flat, temperature=half)
      batch = batch._replace(pairs=pair_lib.policy_weighted(batch.pairs, *both))
  numbers = {"learning_rate": setup.learning_rate(config, step), "sft_coef": config.loss.sft_coef}
  hparams = jax.tree.map(jnp.float32, numbers) | {"loss": given}
  with clock("update"):
    used = -(-len(pairs) // size.microbatch_pairs)
    state, found = setup.update_once(update, model, state, batch, hparams, used)
  found |= {"pairs": len(pairs), "padding_fraction": padding}
  for name, half in (("chosen", lengths[0::2]), ("rejected", lengths[1::2])):
    found[f"{name}_length"] = float(np.mean(half))
  trained = setup.work_on_texts(model, pairs)
  return state, loop.Learned(found, work=loop.Work(*drawn.work[:2], *trained[2:]))


def on_policy(
  model: setup.Model,
  problems: setup.Problems,
  score: abc.Callable,
  params: typing.Any,
  step: int,
  clock: setup.PhaseClock,
) -> Drawn:
  """The best and the worst response to each problem where the grader tells them apart."""
  experience = problems.sample(params, step, clock)
  scores = experience.scores
  chosen = pair_lib.best_and_worst(scores.rewards, scores.ok)
  signs = np.zeros(scores.rewards.shape)  # As a table shows them: which was preferred to which.
  for p, best, worst in chosen:
    signs[p, best], signs[p, worst] = 1, -1
  shown = zip(experience.samples, signs.reshape(-1), strict=True)
  samples = [line | {"advantage": float(sign)} for line, sign in shown]
  pairs, ref_logprobs = collect.sampled_pairs(experience, chosen), []
  if model.weights.reference is not None:
    with clock("logprobs"):
      ref_logprobs = score(model.weights.reference, encoding.flat(pairs))
  work = setup.step_work(model, experience, [])
  return Drawn(pairs, ref_logprobs, experience.metrics, samples, work)


def of_file(
  config: Config,
  loaded: loading.Loaded,
  known: list[np.ndarray],
  params: typing.Any,
  step: int,
  clock: setup.PhaseClock,
) -> Drawn:
  """The step's pairs of a file; `known`: the reference's log-probs of all its answers."""
  count, size = len(loaded.training), config.pairs.per_step
  chosen = batches.batch_indices(count, batch_size=size, seed=config.run.seed, step=step)
  refs = [known[2 * index + side] for index in chosen for side in (0, 1)] if known else []
  counts = {f"data_{name}": number for name, number in loaded.counts.items()}
  return Drawn([loaded.training[index] for index in chosen], refs, counts)


def known_logprobs(
  config: Config, run: loop.Run, model: setup.Model, pairs: abc.Sequence[encoding.Pair]
) -> list[np.ndarray]:
  """The reference's log-probs of both answers of a file's pairs, kept on disk."""
  if model.weights.reference is None or not pairs:
    return []
  how = {"temperature": config.sampling.temperature, "rows_per_batch": 2 * config.pairs.per_step}
  return setup.reference_of_file(config, run, model, encoding.flat(pairs), **how)


def pair_figures(
  options: Loss,
  held_out: abc.Sequence[encoding.Pair],
  ref_logprobs: list[np.ndarray],
  score: abc.Callable,
  pad_id: int,
  params: typing.Any,
) -> dict[str, float]:
  """Figures on held-out pairs: the policy's loss, and the rewards that it implies."""
  logprobs = score(params, encoding.flat(held_out))
  batch, _ = make_batch(held_out, rows=len(held_out), pad_id=pad_id)
  batch, given = with_constants(options, batch, ref_logprobs, lambda: logprobs)
  answers = known_answers(options, logprobs, batch.pairs.sequences.mask)
  loss, found = _jitted_loss(options, answers, batch.ref_answers, batch.pairs.weights, given)
  right = int(found["pair_accuracy"][0])
  correct = [1] * right + [0] * (len(held_out) - right)
  accuracy, low, high = metrics.proportion_interval(correct, 1)
  figures = {"pair_accuracy": accuracy, "pair_low": low, "pair_high": high}
  figures |= {name: metrics.finalize(found)[name] for name in REWARDS}
  for side, name in enumerate(("chosen_logprobs", "rejected_logprobs")):
    figures[name] = float(np.mean([float(np.sum(own)) for own in logprobs[side::2]]))
  return {f"eval/{k}": v for k, v in (figures | {"pair_loss": float(loss)}).items()}


_jitted_loss = jax.jit(preference_loss, static_argnums=0)


def train(config: Config, workdir: str) -> dict[str, typing.Any]:
  """Trains to the end, or resumes an earlier run of the same config; returns result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=config.run.export) as run:
    if run.result:
      return run.result
    size, layout = config.pairs, config.prompts.layout
    mesh = setup.open_pair_mesh(config)
    task, dataset = setup.load_training_task(config, size.per_step), None
    if config.data.data != "on_policy":
      dataset = setup.read_data(config, "preference", "implicit_preference")
    model = setup.load_model(config, run, mesh, reference=needs_reference(config.loss))
    pad_id, loaded = model.tokenizer.pad_id, loading.Loaded([], [], {}, "", [], [])
    if dataset:
      loaded = setup.load_pairs(config, run, model, dataset, layout)
    further = {"slots": config.sampling.slots, "reward": config.task.reward}
    further |= {"responses": 0 if dataset else config.responses_per_prompt}
    further |= {"rows_at_once": size.microbatch_pairs * config.responses_per_prompt}
    with setup.open_problems(
      config, run, model, task, prompts=size.per_step, **further
    ) as problems:
      held_out = loaded.held_out[: config.held_out_examples or None]
      sizes = {
        "pairs a step": size.per_step,
        "pairs a microbatch": size.per_step // size.microbatches,
        "data": loaded.note or f"pairs of responses to {task.name}: {task.note}",
        "held-out pairs": len(held_out),
        "held-out problems": len(problems.held_out.problems) if problems else 0,
      }
      setup.show_sizes(config, run, model.weights, sizes)
      statics = {"policy": model.policy, "temperature": config.sampling.temperature, "mesh": mesh}
      score = functools.partial(
        reference.compute_logprobs, **statics, pad_id=pad_id, rows_per_batch=2 * size.per_step
      )
      checked = functools.partial(score, check=run.stop.check)
      init = functools.partial(states.init_state, optimizer=setup.make_optimizer(config.optimizer))
      begun, model = setup.begin(config, run, model, init)
      training = [] if config.reference.refresh else loaded.training  # A moving one: in each step.
      known = known_logprobs(config, run, model, training + held_out)
      if dataset or config.reference.refresh:
        model = model._replace(weights=model.weights._replace(reference=None))
      sample = functools.partial(on_policy, model, problems, checked)
      if dataset:
        sample = functools.partial(of_file, config, loaded, known[: 2 * len(training)])
      known_held_out = known[2 * len(training) :]

      def evaluate(params: typing.Any, step: int) -> evaluation.Evaluation:
        own = (config.loss, held_out, known_held_out, checked, pad_id)
        figures = pair_figures(*own, params) if held_out else {}
        graded = problems.evaluate(params, step) if problems else evaluation.Evaluation({}, [])
        return graded._replace(metrics=figures | graded.metrics)

      update = loop.announced(make_update(config, model.policy, mesh), run)
      learning = functools.partial(learn, config, model, score, update)
      state = setup.train_loop(
        config, run, model, begun, sample=sample, learn=learning, evaluate=evaluate
      )
    return setup.finish(config, run, model, state)


def main(config: Config) -> int:
  file = "" if config.data.data == "on_policy" else config.data.data
  return setup.main(train, config, file=file)


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
