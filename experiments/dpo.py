"""DPO and its family: raise the better of two answers over the worse one, without a reward model.

A policy that differs from its reference is a reward model already, with the reward
beta * (log policy - log reference); the loss fits that one to the preferences (`--loss=`, a
function of rl_llm.losses). Watch the chosen answers' log-probs next to the margin: most of these
losses see the difference alone, and often both answers fall.

  python -m experiments.dpo                                 SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.dpo --model=tiny --task=copy        the one-minute version
  python -m experiments.dpo --data=pairs.jsonl --task=none --loss=ipo_loss --loss.beta=0.2
  python -m experiments.dpo --data=pairs.jsonl --loss=simpo_loss          needs no reference

`--data=on_policy` makes the pairs as it goes: every step samples several responses to each of the
task's problems, and the best meets the worst where the grader tells them apart. `--data=FILE` reads
pairs from JSONL (plain or gzip) or Parquet: chosen and rejected, with a prompt or beginning with
the same one, as text or messages. The reference is the model that training begins with. Of a file's
pairs its log-probs are computed once, and kept on disk.

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --steps=16 --pairs_per_step=12, seeds 0, 1 and 2, on 2 cores: of
100 held-out sums, right at temperature 1 from 0.20 to 0.84, 0.81 and 0.83, greedily from 0.69 to
0.88, 0.86 and 0.93; 18 s a step, 380 to 450 s with evaluations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import config as configs
from rl_llm import flops, keywords, losses, metrics, sharding, training, weighting
from rl_llm.data import batches, encoding, loading, packing
from rl_llm.evaluation import Evaluation
from rl_llm.experience import Experience
from rl_llm.logprobs import sequence_logprobs
from rl_llm.policy import Policy
from rl_llm.reference_cache import compute_logprobs, reference_logprobs
from rl_llm.teacher_forcing import teacher_forced_logprobs
from rl_llm.train_state import TrainState, init_state
from rl_llm.update import make_update

# Whose formulas are about an answer's average token; IPO's as trainers have it.
PER_TOKEN = ("ipo_loss", "simpo_loss", "orpo_loss")
REWARDS = ("margin", "chosen_reward", "rejected_reward")

Loss = keywords.keyword_group(
  "loss",
  "The preference loss, and its keywords; none = the default of the loss.",
  losses.PREFERENCE_LOSSES,
  shape=(1,),
  further={
    "shift": (Literal["batch"] | None, configs.option(
      None, "BCO: the reward of an answer neither good nor bad; batch = between the means of both"
    )),
    "logprobs": (Literal["auto", "sum", "mean"], configs.option(
      "auto", "of an answer's tokens; auto = mean for ipo_loss, simpo_loss and orpo_loss, else sum"
    )),
    "sft_coef": (float, configs.option(
      0.0, "factor of the chosen answers' likelihood per token, added to any loss (RPO)", min=0
    )),
  },
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.Run = configs.inline(flags.Run())
  model: flags.Model = configs.inline(flags.Model())
  data: flags.Data = configs.inline(flags.Data(data="on_policy"))
  pairs: flags.Pairs = configs.inline(flags.Pairs())
  task: flags.Task = configs.inline(flags.Task())
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  held_out_examples: int = configs.option(256, "held-out pairs to evaluate on; 0 = all", min=0)
  reference_cache: str = configs.option(
    "", "where the reference's log-probs are kept, by a hash of weights and pairs; empty = workdir",
    volatile=True,
  )
  responses_per_prompt: int = configs.option(8, "G, responses a problem, on policy", min=2)
  samples_every: int = flags.samples_every()
  export: bool = flags.export()
  sampling: flags.Sampling = flags.Sampling()
  loss: Loss = Loss()
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer(learning_rate=1e-5)
  eval: flags.Evaluation = flags.Evaluation()


# What a two-layer model of random weights needs instead of a pretrained one's defaults.
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


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model.model == "tiny" else {}


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  sampled = config.prompts.max_prompt_tokens + config.prompts.max_new_tokens
  on_policy = config.data.data == "on_policy"
  flags.check_packing(config.data.packing, sampled if on_policy else config.data.max_tokens)
  flags.check_measured(config, "on_policy")
  if config.loss.name in losses.BATCH_COUPLED and config.pairs.microbatches > 1:
    raise configs.ConfigError(
      "microbatch_pairs",
      config.pairs.microbatch_pairs,
      f"at least pairs_per_step ({config.pairs.pairs_per_step}) with --loss={config.loss.name}",
      "it compares the pairs of a batch with each other",
    )
  if config.loss.shift and config.loss.name != "bco_loss":
    raise configs.ConfigError(
      "loss.shift", config.loss.shift, f"left out with --loss={config.loss.name}", "BCO has it"
    )
  if config.loss.alpha is not None and config.loss.divergence != "alpha":
    raise configs.ConfigError(
      "loss.alpha", config.loss.alpha, "left out without --loss.divergence=alpha"
    )


def needs_reference(options: Loss) -> bool:
  """Whether the loss compares the policy with a reference at all."""
  loss = options.functions[options.name]
  return "ref_chosen_logprobs" in inspect.signature(loss).parameters


class Batch(NamedTuple):
  """What the loss reads of R pairs: rows 2i are chosen, rows 2i + 1 rejected."""

  sequences: batches.SequenceBatch  # each answer in a row; packed ones have their mask here alone
  packed: batches.PackedShares | None  # several answers a row
  weights: np.ndarray  # [R] how much each pair counts
  chosen_weights: np.ndarray  # [2 R, T] how much each token of the chosen answers counts
  ref_answers: np.ndarray | None  # [2 R] the reference's log-probs of the answers


def of_answers(options: Loss, logprobs, mask) -> jax.Array:
  """[B]: the log-prob of each answer, as the loss wants it."""
  average = options.logprobs == "mean"
  average |= options.logprobs == "auto" and options.name in PER_TOKEN
  return sequence_logprobs(logprobs, mask, average=average)


def known_answers(options: Loss, logprobs: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
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


def make_loss(config: Config, policy: Policy):
  """The objective: the preference loss, plus the chosen answers' likelihood where it is wanted."""
  score = functools.partial(
    teacher_forced_logprobs, policy=policy, temperature=config.sampling.temperature
  )

  def loss_fn(params, batch: Batch, hparams):
    mask = batch.sequences.mask
    if batch.packed is None:
      logprobs, _ = score(params, *batch.sequences)
    else:
      packed, rows, starts, lengths = batch.packed
      logprobs, _ = score(params, *packed)
      rows = rows % len(logprobs)  # They are counted over all microbatches.
      logprobs = packing.unpack(logprobs, rows, starts, lengths, width=mask.shape[1])
    answers = of_answers(config.loss, logprobs, mask)
    loss, found = preference_loss(
      config.loss, answers, batch.ref_answers, batch.weights, hparams["loss"]
    )
    likelihood, of_chosen = losses.sft_loss(logprobs, batch.chosen_weights)
    loss = loss + hparams["sft_coef"] * likelihood
    found |= {"chosen_nll": of_chosen["nll"]}
    counted = batch.weights != 0
    sums = sequence_logprobs(logprobs, mask)
    for name, side in (("chosen", sums[0::2]), ("rejected", sums[1::2])):
      found[f"{name}_logprobs"] = (jnp.sum(jnp.where(counted, side, 0)), jnp.sum(counted))
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


def make_batch(pairs: Sequence[encoding.Pair], *, rows: int, pad_id: int) -> Batch:
  """Arrays of 2 * `rows` sequences, pair by pair, and the weights of pairs and of chosen tokens."""
  sequences = batches.pair_batch(pairs, pad_id=pad_id, rows=2 * rows)
  weights = np.zeros(rows, np.float32)
  weights[: len(pairs)] = 1 / len(pairs)
  is_chosen = np.arange(2 * rows)[:, None] % 2 == 0
  chosen_weights = np.asarray(weighting.token_mean(sequences.mask & is_chosen))
  return Batch(sequences, None, weights, chosen_weights, None)


class Drawn(NamedTuple):
  """The pairs of a step."""

  pairs: list[encoding.Pair]
  ref_logprobs: list[np.ndarray]  # of both answers of each pair; empty without a reference
  metrics: dict[str, Any]
  samples: Sequence[dict[str, Any]] = ()
  work: flops.Work = flops.Work()  # what was sampled for them


class Programs(NamedTuple):
  """What a step runs on the devices besides its rollout; weights are always arguments."""

  score: Callable  # (params, sequences, check=) -> log-probs of each
  update: Callable  # (state, batch, hparams, microbatches used, frozen) -> (state, metrics)


def make_programs(config: Config, policy: Policy, mesh: jax.sharding.Mesh, pad_id: int) -> Programs:
  """What a step runs on the devices besides its rollout."""
  size, optimizer = config.pairs, setup.adamw(config.optimizer)
  return Programs(
    functools.partial(
      compute_logprobs,
      policy=policy,
      temperature=config.sampling.temperature,
      rows_per_batch=2 * size.pairs_per_step,
      pad_id=pad_id,
      mesh=mesh,
    ),
    make_update(make_loss(config, policy), optimizer, microbatches=size.microbatches, mesh=mesh),
  )


def with_constants(
  config: Config,
  batch: Batch,
  params,
  pairs: Sequence[encoding.Pair],
  ref_logprobs: list[np.ndarray],
  score: Callable,
) -> tuple[Batch, dict[str, Any]]:
  """The batch and the keywords of its loss, with all that is taken before the batch is split."""
  mask = batch.sequences.mask
  given = {k: jnp.float32(v) for k, v in keywords.given(config.loss).items() if type(v) is float}
  if needs_reference(config.loss):
    batch = batch._replace(ref_answers=known_answers(config.loss, ref_logprobs, mask))
  if config.loss.shift == "batch":
    given["shift"] = losses.bco_shift(
      known_answers(config.loss, score(params, setup.flat(pairs)), mask),
      batch.ref_answers,
      np.arange(len(mask)) % 2 == 0,
      where=np.repeat(batch.weights != 0, 2),
      **{name: value for name, value in given.items() if name == "beta"},
    )
  return batch, given


def learn(
  config: Config,
  model: setup.Model,
  programs: Programs,
  state: TrainState,
  drawn: Drawn,
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[TrainState, training.Learned]:
  """One step's update on preference pairs."""
  pairs, size, pad_id = drawn.pairs, config.pairs, model.tokenizer.pad_id
  if not pairs:  # All problems were answered equally well: there is nothing to learn.
    return state, training.Learned({"pairs": 0}, work=drawn.work)
  batch = make_batch(pairs, rows=size.pairs_per_step, pad_id=pad_id)
  lengths = np.sum(batch.sequences.mask, axis=1)[: 2 * len(pairs)]
  with clock("logprobs"):
    params = model.weights.whole(state.params)
    batch, given = with_constants(
      config, batch, params, pairs, drawn.ref_logprobs, programs.score
    )
  padding = batches.padding_fraction(batch.sequences.segment_ids)
  if config.data.packing:
    packed = batches.packed_shares(
      setup.flat(pairs),
      shares=size.microbatches,
      per_share=2 * min(size.pairs_per_step, size.microbatch_pairs),
      length=config.data.packing,
      pad_id=pad_id,
    )
    padding = batches.padding_fraction(packed.packed.segment_ids)
    own_mask = batches.SequenceBatch(None, batch.sequences.mask, None, None)
    batch = batch._replace(packed=packed, sequences=own_mask)
  hparams = jax.tree.map(
    jnp.float32,
    {
      "learning_rate": setup.learning_rate(config, step),
      "loss": given,
      "sft_coef": config.loss.sft_coef,
    },
  )
  with clock("update"):
    placed = sharding.place_rows(batch, model.mesh)
    used = -(-len(pairs) // size.microbatch_pairs)
    state, found = programs.update(state, placed, hparams, used, model.weights.frozen)
  found |= {
    "pairs": len(pairs),
    "padding_fraction": padding,
    "chosen_length": float(np.mean(lengths[0::2])),
    "rejected_length": float(np.mean(lengths[1::2])),
  }
  trained = setup.text_work(model, pairs)
  work = drawn.work._replace(
    trained_tokens=trained.trained_tokens, update_flops=trained.update_flops
  )
  return state, training.Learned(found, work=work)


def best_and_worst(rewards: np.ndarray, ok: np.ndarray) -> list[tuple[int, int, int]]:
  """(problem, best response, worst response) of each problem whose grades [P, G] differ.

  Of equal grades the first is taken: responses are drawn alike, so it is as good as any.

  >>> best_and_worst(np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), np.array([[1, 1, 1], [1, 1, 0]]))
  [(0, 1, 0)]
  """
  best = np.argmax(np.where(ok, rewards, -np.inf), axis=1)
  worst = np.argmin(np.where(ok, rewards, np.inf), axis=1)
  return [
    (p, int(b), int(w))
    for p, (b, w) in enumerate(zip(best, worst, strict=True))
    if ok[p, b] and ok[p, w] and rewards[p, b] > rewards[p, w]
  ]


def sampled_pairs(
  experience: Experience, chosen: Sequence[tuple[int, int, int]]
) -> list[encoding.Pair]:
  """The tokens of the chosen responses, each behind its prompt, as they were sampled."""
  rollout, prompts = experience.rollout, experience.drawn.prompts
  group = rollout.tokens.shape[0] // len(prompts)

  def sequence(p: int, g: int) -> encoding.Encoded:
    row, prompt = p * group + g, prompts[p]
    response = rollout.tokens[row, : rollout.lengths[row]].tolist()
    mask = rollout.mask[row, : rollout.lengths[row]].tolist()
    return encoding.Encoded(prompt + response, [False] * len(prompt) + mask, len(prompt))

  return [encoding.Pair(sequence(p, best), sequence(p, worst)) for p, best, worst in chosen]


def on_policy(
  config: Config,
  model: setup.Model,
  programs: Programs,
  problems: setup.Problems,
  check: Callable[[], None],
  params: Any,
  step: int,
  clock: metrics.PhaseClock,
) -> Drawn:
  """The best and the worst response to each problem where the grader tells them apart."""
  experience = problems.sample(params, step, clock)
  scores, lengths = experience.scores, experience.rollout.lengths
  chosen = best_and_worst(scores.rewards, scores.ok)
  signs = np.zeros(scores.rewards.shape)  # As a table shows them: which was preferred to which.
  for p, best, worst in chosen:
    signs[p, best], signs[p, worst] = 1, -1
  samples = [
    line | {"advantage": float(sign)}
    for line, sign in zip(experience.samples, signs.reshape(-1), strict=True)
  ]
  pairs, ref_logprobs = sampled_pairs(experience, chosen), []
  if model.weights.reference is not None:
    with clock("logprobs"):
      flat = setup.flat(pairs)
      ref_logprobs = programs.score(model.weights.reference, flat, check=check)
  work = flops.Work(
    generated_tokens=int(np.sum(lengths)),
    rollout_flops=flops.forward_flops(model.policy.config, experience.prompts.lengths, lengths),
  )
  return Drawn(pairs, ref_logprobs, experience.metrics, samples, work)


def file_source(
  config: Config, run: training.Run, model: setup.Model, loaded: loading.Loaded
) -> tuple[Callable, list[np.ndarray]]:
  """(step -> its pairs of the file), and the reference's log-probs of the held-out answers.

  The reference's log-probs are computed once, or read where an earlier run has kept them.
  """
  held_out, known = loaded.held_out[: config.held_out_examples or None], []
  say = functools.cache(run.console.say)

  def progress(done: int, total: int) -> None:
    say(f"log-probs of the reference: {10 * (10 * done // total)} % of {total} sequences")
    if done < total:
      run.stop.check()

  if model.weights.reference is not None:
    try:
      known = reference_logprobs(
        config.reference_cache or run.workdir,
        model.weights.reference,
        setup.flat(loaded.training + held_out),
        policy=model.policy,
        temperature=config.sampling.temperature,
        rows_per_batch=2 * config.pairs.pairs_per_step,
        pad_id=model.tokenizer.pad_id,
        mesh=model.mesh,
        progress=progress,
      )
    except OSError as error:
      raise configs.ConfigError(
        "reference_cache", config.reference_cache, "a directory that can be written", str(error)
      ) from None
  counts = {f"data_{name}": count for name, count in loaded.counts.items()}

  def draw(params: Any, step: int, clock: metrics.PhaseClock) -> Drawn:
    size = config.pairs.pairs_per_step
    chosen = setup.step_indices(config, len(loaded.training), step, size=size)
    refs = [known[2 * index + side] for index in chosen for side in (0, 1)] if known else []
    return Drawn([loaded.training[index] for index in chosen], refs, counts)

  return draw, known[2 * len(loaded.training) :]


def make_evaluate(
  config: Config,
  model: setup.Model,
  programs: Programs,
  problems: setup.Problems | None,
  held_out: Sequence[encoding.Pair],
  ref_logprobs: list[np.ndarray],
  check: Callable[[], None],
) -> Callable[[Any], Evaluation]:
  """(params) -> figures of held-out pairs, and accuracy at the task where there is one."""
  evaluate_pairs = jax.jit(functools.partial(preference_loss, config.loss))

  def pair_figures(params: Any) -> dict[str, float]:
    batch = make_batch(held_out, rows=len(held_out), pad_id=model.tokenizer.pad_id)
    score = functools.partial(programs.score, check=check)
    batch, given = with_constants(config, batch, params, held_out, ref_logprobs, score)
    logprobs = score(params, setup.flat(held_out))
    answers = known_answers(config.loss, logprobs, batch.sequences.mask)
    loss, found = evaluate_pairs(answers, batch.ref_answers, batch.weights, given)
    right = int(found["pair_accuracy"][0])
    wrong = len(held_out) - right
    accuracy, low, high = metrics.proportion_interval([1] * right + [0] * wrong, 1)
    sums = [float(np.sum(own)) for own in logprobs]
    return {
      "eval/pair_loss": float(loss),
      "eval/pair_accuracy": accuracy,
      "eval/pair_low": low,
      "eval/pair_high": high,
      **{f"eval/{name}": metrics.finalize(found)[name] for name in REWARDS},
      "eval/chosen_logprobs": float(np.mean(sums[0::2])),
      "eval/rejected_logprobs": float(np.mean(sums[1::2])),
    }

  def evaluate(params: Any) -> Evaluation:
    figures = pair_figures(params) if held_out else {}
    graded = problems.evaluate(params) if problems else Evaluation({}, [])
    return graded._replace(metrics=figures | graded.metrics)

  return evaluate


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Trains to the end, or resumes an earlier run of the same config; gives result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=config.export) as run:
    if run.result:
      return run.result
    size = config.pairs
    mesh = setup.open_mesh(
      config,
      per_step={"pairs_per_step": size.pairs_per_step},
      at_once={"microbatch_pairs": size.microbatch_pairs},
    )
    setup.check_packing(config, mesh)
    task, dataset = setup.load_task(config.task), None
    if config.data.data != "on_policy":
      dataset = setup.read_data(config, "preference", "implicit_preference")
    model = setup.load_model(config, run, mesh, reference=needs_reference(config.loss))
    loaded, sampled = loading.Loaded([], [], {}, "", [], []), config.responses_per_prompt
    if dataset:
      layout = config.prompts.layout
      loaded, sampled = setup.load_pairs(config, run, dataset, model.tokenizer, layout), 0
    with setup.open_problems(
      config,
      run,
      model,
      task,
      prompts=size.pairs_per_step,
      responses=sampled,
      slots=config.sampling.slots,
    ) as problems:
      held_out = loaded.held_out[: config.held_out_examples or None]
      sizes = {
        "pairs a step": size.pairs_per_step,
        "pairs a microbatch": size.pairs_per_step // size.microbatches,
        "data": loaded.note or f"pairs of responses to {task.name}: {task.note}",
        "held-out pairs": len(held_out),
        "held-out problems": len(problems.held_out.problems) if problems else 0,
      }
      setup.show_sizes(config, run, model.weights, sizes)
      programs = make_programs(config, model.policy, mesh, model.tokenizer.pad_id)
      init = functools.partial(init_state, optimizer=setup.adamw(config.optimizer))
      begun, model = setup.begin(config, run, model, init)
      known, stop = [], run.stop.check
      if dataset:
        sample, known = file_source(config, run, model, loaded)
        model = model._replace(weights=model.weights._replace(reference=None))
      else:
        sample = functools.partial(on_policy, config, model, programs, problems, stop)
      evaluate = make_evaluate(config, model, programs, problems, held_out, known, stop)
      programs = programs._replace(update=setup.announced(programs.update, run))
      state = setup.train_loop(
        config,
        run,
        model,
        begun,
        sample=sample,
        learn=functools.partial(learn, config, model, programs),
        evaluate=evaluate,
      )
    return setup.finish(config, run, model, state)


def main(config: Config) -> int:
  data = config.task.task if config.data.data == "on_policy" else Path(config.data.data).name
  return setup.main(train, config, data=data)


if __name__ == "__main__":
  configs.run(main, Config, overrides=overrides)
