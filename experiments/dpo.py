"""DPO and its family: raise the better of two answers over the worse one, without a reward model.

A policy that differs from its reference is a reward model already, with the reward
beta * (log policy - log reference); the loss fits that one to the preferences (`--loss=`, a
function of rl_llm.losses). Watch the chosen answers' log-probs beside the margin: most of these
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

Rerunning the same command goes on from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --steps=16 --pairs_per_step=12, seeds 0, 1 and 2, on 2 cores: of
100 held-out sums, right at temperature 1 from 0.20 to 0.84, 0.81 and 0.83, greedily from 0.69 to
0.88, 0.86 and 0.93; 18 s a step, 380 to 450 s with evaluations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
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
  Sampling,
  SamplingMesh,
  adamw,
  check_packing,
  check_sampling,
  check_schedule,
  device_mesh,
  joined,
  learning_rate,
  sampling_config,
  split_weights,
)
from rl_llm import evaluation, losses, weighting
from rl_llm.chips import find_peak
from rl_llm.config import ConfigError, option, run
from rl_llm.data.batches import (
  batch_indices,
  packed_shares,
  pad_values,
  padding_fraction,
  pair_batch,
)
from rl_llm.data.encoding import Encoded, Pair, encode_pair, limit_pairs
from rl_llm.data.loading import load_sequences, read_examples
from rl_llm.data.packing import unpack
from rl_llm.experience import (
  Experience,
  agree_on_data,
  collect,
  draw_problems,
  experience_metrics,
  held_out_problems,
  make_encode,
  make_generate,
  sample_rows,
)
from rl_llm.flops import Work, forward_flops, text_work, update_passes
from rl_llm.logprobs import sequence_logprobs
from rl_llm.metrics import PhaseClock, finalize, proportion_interval
from rl_llm.model import load_model
from rl_llm.policy import Policy, join
from rl_llm.policy.attention import AttentionName
from rl_llm.reference_cache import compute_logprobs, reference_logprobs
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

FORMATS = ("preference", "implicit_preference")
# Whose formulas are about an answer's average token; IPO's as trainers have it.
PER_TOKEN = ("ipo_loss", "simpo_loss", "orpo_loss")
REWARDS = ("margin", "chosen_reward", "rejected_reward")


@dataclasses.dataclass(frozen=True)
class Loss:
  """The preference loss, and its keywords; none = the default of the loss."""

  name: Literal[
    "dpo_loss", "robust_dpo_loss", "hinge_dpo_loss", "ipo_loss", "exo_loss", "nca_loss", "bco_loss",
    "sppo_loss", "apo_zero_loss", "apo_down_loss", "discopop_loss", "aot_loss", "simpo_loss",
    "cpo_loss", "orpo_loss",
  ] = option("dpo_loss", "a function of rl_llm.losses")
  beta: float | None = option(None, "reward per nat of log-ratio", above=0)
  label_smoothing: float | None = option(None, "the share of wrong labels", min=0, below=1)
  divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] | None = option(
    None, "DPO: what stands in the place of the log-ratio"
  )
  alpha: float | None = option(None, "DPO: of the divergence alpha", above=0)
  temperature: float | None = option(None, "DiscoPOP: of its gate", above=0)
  gamma: float | None = option(None, "SimPO: the reward by which a chosen answer must win", min=0)
  nll_coef: float | None = option(None, "CPO: factor of the chosen answers' likelihood", min=0)
  shift: Literal["batch"] | None = option(
    None, "BCO: the reward of an answer neither good nor bad; batch = between the means of both"
  )
  logprobs: Literal["auto", "sum", "mean"] = option(
    "auto", "of an answer's tokens; auto = mean for ipo_loss, simpo_loss and orpo_loss, else sum"
  )
  sft_coef: float = option(
    0.0, "factor of the chosen answers' likelihood per token, added to any loss (RPO)", min=0
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, or a .gguf file")
  data: str = option(
    "on_policy", "on_policy = pairs of the model's own graded responses; or a file of pairs"
  )
  task: str = option(
    "arithmetic",
    "arithmetic, copy, reasoning_gym:<name>, jsonl:<path> or gsm8k:<path>, at which the model is "
    "graded; none = it is not",
  )
  data_errors: Literal["strict", "lenient"] = option(
    "strict", "the first broken row of --data stops, or broken rows are dropped and counted"
  )
  held_out_fraction: float = option(
    0.1, "of a file's prompts, kept for evaluation", min=0, below=1
  )
  held_out_examples: int = option(256, "held-out pairs to evaluate on; 0 = all", min=0)
  workdir: str = option("", "the run's directory; empty = runs/dpo-<model>-<data>-seed<seed>")
  reference_cache: str = option(
    "", "where the reference's log-probs are kept, by a hash of weights and pairs; empty = workdir"
  )
  seed: int = option(0, "of order, problems and samples, and of the tiny model's weights", min=0)
  steps: int = option(24, "updates", min=1)
  pairs_per_step: int = option(
    16, "pairs an update; on policy, the problems of which each gives at most one pair", min=1
  )
  responses_per_prompt: int = option(8, "G, responses a problem, on policy", min=2)
  max_tokens: int = option(512, "limit of a sequence of --data, prompt included", min=2)
  overlong: Literal["error", "drop", "truncate_left", "truncate_right"] = option(
    "error", "what to do with pairs of which a sequence is longer"
  )
  max_prompt_tokens: int = option(512, "limit of a prompt's length where it samples", min=1)
  overlong_prompt: Literal["error", "drop", "truncate_left"] = option(
    "error", "what to do with longer prompts"
  )
  max_new_tokens: int = option(16, "limit of a response's length", min=1)
  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto", "chat = the model's own chat template, plain = bare text; auto = chat if it has one"
  )
  system_prompt: str | None = option(None, "none = as the chat template has it; may be empty")
  packing: int = option(
    0, "tokens of a row that several answers with their prompts share; 0 = each has its own", min=0
  )
  microbatch_pairs: int = option(
    4, "pairs whose activations are held at once; divides pairs_per_step, or is more than that",
    min=1,
  )
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
  samples_every: int = option(5, "steps between sample tables, on policy", min=1)
  export: bool = option(
    False, "write the trained model as a Hugging Face directory, WORKDIR/model; with --lora.rank "
    "the adapters alone too, WORKDIR/adapter"
  )
  sampling: Sampling = Sampling()
  loss: Loss = Loss()
  lora: Lora = Lora()
  mesh: SamplingMesh = SamplingMesh()
  distributed: Distributed = Distributed()
  optimizer: Optimizer = Optimizer(learning_rate=1e-5)
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
  return dict(TINY) if config.model == "tiny" else {}


def volatile(config: Config) -> set[str]:
  """Flags with which a run may be resumed at other values: they do not change what is computed."""
  names = {
    *MESH_FLAGS,
    "workdir",
    "reference_cache",
    "samples_every",
    "checkpoint.every",
    "checkpoint.keep",
    "export",
    "profile",
  }
  # A falling learning rate depends on where it is to end.
  return names | {"steps"} if config.optimizer.schedule == "constant" else names


def needs_reference(options: Loss) -> bool:
  """Whether the loss compares the policy with a reference at all."""
  return "ref_chosen_logprobs" in inspect.signature(getattr(losses, options.name)).parameters


def of_answers(options: Loss, logprobs, mask) -> jax.Array:
  """[B]: the log-prob of each answer, as the loss wants it."""
  average = options.logprobs == "mean"
  average |= options.logprobs == "auto" and options.name in PER_TOKEN
  return sequence_logprobs(logprobs, mask, average=average)


def loss_keywords(options: Loss) -> dict[str, jax.Array]:
  """The numbers among the keywords that were given, as arrays: they may change between updates."""
  given = {name: getattr(options, name) for name in (
    "beta", "label_smoothing", "alpha", "temperature", "gamma", "nll_coef"
  )}
  return {name: jnp.float32(value) for name, value in given.items() if value is not None}


def known_answers(options: Loss, logprobs: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
  """`of_answers` of log-probs that are data: a vector for each of the first rows of the mask."""
  padded = pad_values(logprobs, width=mask.shape[1])
  padded = np.pad(padded, ((0, len(mask) - len(padded)), (0, 0)))
  return np.asarray(of_answers(options, padded, mask))


def preference_loss(options: Loss, answers, ref_answers, weights, keywords):
  """The loss of that name: row 2i of the answers is chosen, row 2i + 1 rejected."""
  rows = [answers[0::2], answers[1::2]]
  if needs_reference(options):
    rows += [ref_answers[0::2], ref_answers[1::2]]
  if options.divergence is not None:
    keywords = keywords | {"divergence": options.divergence}
  loss, metrics = getattr(losses, options.name)(*rows, weights, **keywords)
  return loss, {"pair_accuracy" if k == "accuracy" else k: v for k, v in metrics.items()}


def make_loss(config: Config, policy: Policy):
  """The objective: the preference loss, plus the chosen answers' likelihood where it is wanted."""
  options = config.loss

  def loss_fn(params, batch, hparams):
    score = functools.partial(
      teacher_forced_logprobs, policy=policy, temperature=config.sampling.temperature
    )
    if config.packing:
      packed, rows, starts, lengths = batch["packed"]
      logprobs, _ = score(params, *packed)
      rows = rows % len(logprobs)  # They are counted over all microbatches.
      logprobs = unpack(logprobs, rows, starts, lengths, width=batch["mask"].shape[1])
    else:
      fields = ("tokens", "mask", "positions", "segment_ids")
      logprobs, _ = score(params, *(batch[field] for field in fields))
    loss, metrics = preference_loss(
      options,
      of_answers(options, logprobs, batch["mask"]),
      batch.get("ref_answers"),
      batch["weights"],
      hparams["loss"],
    )
    likelihood, of_chosen = losses.sft_loss(logprobs, batch["chosen_weights"])
    loss = loss + hparams["sft_coef"] * likelihood
    metrics |= {"chosen_nll": of_chosen["nll"]}
    counted = batch["weights"] != 0
    sums = sequence_logprobs(logprobs, batch["mask"])
    for name, side in (("chosen", sums[0::2]), ("rejected", sums[1::2])):
      metrics[f"{name}_logprobs"] = (jnp.sum(jnp.where(counted, side, 0)), jnp.sum(counted))
    return loss, jax.lax.stop_gradient(metrics)

  return loss_fn


def make_batch(pairs: Sequence[Pair], *, rows: int, pad_id: int) -> dict[str, np.ndarray]:
  """Arrays of 2 * `rows` sequences, pair by pair, and the weights of pairs and of chosen tokens."""
  batch = pair_batch(pairs, pad_id=pad_id, rows=2 * rows)
  weights = np.zeros(rows, np.float32)
  weights[: len(pairs)] = 1 / len(pairs)
  is_chosen = np.arange(2 * rows)[:, None] % 2 == 0
  chosen_weights = np.asarray(weighting.token_mean(batch.mask & is_chosen))
  return batch._asdict() | {"weights": weights, "chosen_weights": chosen_weights}


def flat(pairs: Sequence[Pair]) -> list[Encoded]:
  """The sequences of pairs, in the order of a batch's rows."""
  return [sequence for pair in pairs for sequence in pair]


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


def sampled_pairs(experience: Experience, chosen: Sequence[tuple[int, int, int]]) -> list[Pair]:
  """The tokens of the chosen responses, each behind its prompt, as they were sampled."""
  rollout, prompts = experience.rollout, experience.drawn.prompts
  group = rollout.tokens.shape[0] // len(prompts)

  def sequence(p: int, g: int) -> Encoded:
    row = p * group + g
    response = rollout.tokens[row, : rollout.lengths[row]].tolist()
    mask = rollout.mask[row, : rollout.lengths[row]].tolist()
    return Encoded(prompts[p] + response, [False] * len(prompts[p]) + mask, len(prompts[p]))

  return [Pair(sequence(p, best), sequence(p, worst)) for p, best, worst in chosen]


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Runs to the end, or goes on from where an earlier run of the same config stopped.

  Returns:
    The result that result.json holds: held-out figures before and after, steps, seconds.

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
    per_step={"pairs_per_step": config.pairs_per_step},
    at_once={"microbatch_pairs": config.microbatch_pairs},
  )
  check_packing(config.packing, mesh)
  say(f"loading {config.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  task = make_task(config)
  strict = config.data_errors == "strict"
  dataset = None
  if config.data != "on_policy":
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
  encode = make_encode(
    tokenizer,
    prompt_format=config.prompt_format,
    system_prompt=config.system_prompt,
    max_prompt_tokens=config.max_prompt_tokens,
    overlong=config.overlong_prompt,
  )
  prompt_format = encode.keywords["prompt_format"]
  problems = held_out_problems(task, encode, limit=config.eval.problems) if task else None
  generate = make_generate(
    policy,
    tokenizer,
    max_new_tokens=config.max_new_tokens,
    slots=config.sampling.slots,
    say=say,
    mesh=mesh,
    gather=config.mesh.gather,
  )
  pool = contextlib.nullcontext()
  if task:
    pool = RewardPool(task.reward, workers=config.reward_workers, deadline=config.reward_deadline)

  optimizer = adamw(config.optimizer)
  loss_fn = make_loss(config, policy)
  microbatches = max(1, config.pairs_per_step // config.microbatch_pairs)
  update = make_update(loss_fn, optimizer, microbatches=microbatches, mesh=mesh)
  score = functools.partial(
    compute_logprobs,
    policy=policy,
    temperature=config.sampling.temperature,
    rows_per_batch=2 * config.pairs_per_step,
    pad_id=tokenizer.pad_id,
    mesh=mesh,
    check=stop.check,
  )
  announce = functools.cache(say)

  training, held_out, known, counts = [], [], [], {}
  note = f"pairs of responses to {task.name}: {task.note}" if task else ""
  if dataset is None:
    # An error comes now.
    agree_on_data(draw_problems(task, config.seed, 0, config.pairs_per_step, encode).prompts)
  else:
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
    training, note, counts = loaded.training, loaded.note, loaded.counts
    held_out = loaded.held_out[: config.held_out_examples or None]
    agree_on_data(sequence.tokens for sequence in flat(training + held_out))
  run.console.sizes(
    {
      "parameters": parameter_count(model.params),
      "parameters trained": parameter_count(first),
      "pairs a step": config.pairs_per_step,
      "pairs a microbatch": min(config.pairs_per_step, config.microbatch_pairs),
      "steps": config.steps,
      "data": note,
      "held-out pairs": len(held_out),
      "held-out problems": len(problems.problems) if problems else 0,
      "prompt format": prompt_format,
      "directory": str(run.workdir),
    }
  )
  if problems and problems.overlong:
    say(f"{problems.overlong} held-out prompts are over --max_prompt_tokens")

  start, state = begin(
    run,
    functools.partial(init_state, optimizer=optimizer),
    first,
    steps=config.steps,
    mesh=mesh,
  )
  ref_params = None
  if needs_reference(config.loss):  # New adapters change nothing, saved ones do.
    ref_params = whole(first) if config.lora.adapter else model.params
  model, first = model._replace(params=None), None
  if ref_params is not None and dataset is not None:

    def progress(done: int, total: int) -> None:
      announce(f"log-probs of the reference: {10 * (10 * done // total)} % of {total} sequences")
      if done < total:
        stop.check()

    try:
      known = reference_logprobs(
        config.reference_cache or run.workdir,
        ref_params,
        flat(training + held_out),
        policy=policy,
        temperature=config.sampling.temperature,
        rows_per_batch=2 * config.pairs_per_step,
        pad_id=tokenizer.pad_id,
        mesh=mesh,
        progress=progress,
      )
    except OSError as error:
      raise ConfigError(
        "reference_cache", config.reference_cache, "a directory that can be written", str(error)
      ) from None
    ref_params = None

  def with_constants(params, pairs: Sequence[Pair], rows: int, ref_logprobs: list[np.ndarray]):
    """The batch and the keywords of its loss: all that is taken before the batch is split."""
    batch = make_batch(pairs, rows=rows, pad_id=tokenizer.pad_id)
    keywords = loss_keywords(config.loss)
    if needs_reference(config.loss):
      batch["ref_answers"] = known_answers(config.loss, ref_logprobs, batch["mask"])
    if config.loss.shift == "batch":
      answers = known_answers(config.loss, score(params, flat(pairs)), batch["mask"])
      keywords["shift"] = losses.bco_shift(
        answers,
        batch["ref_answers"],
        np.arange(2 * rows) % 2 == 0,
        where=np.repeat(batch["weights"] != 0, 2),
        **{name: value for name, value in keywords.items() if name == "beta"},
      )
    return batch, keywords

  evaluate_pairs = jax.jit(functools.partial(preference_loss, config.loss))

  def evaluate_state(state: TrainState) -> evaluation.Evaluation:
    metrics, rows = {}, []
    if held_out:
      batch, keywords = with_constants(
        whole(state.params), held_out, len(held_out), known[2 * len(training) :]
      )
      logprobs = score(whole(state.params), flat(held_out))
      loss, figures = evaluate_pairs(
        known_answers(config.loss, logprobs, batch["mask"]),
        batch.get("ref_answers"),
        batch["weights"],
        keywords,
      )
      right = int(figures["pair_accuracy"][0])
      accuracy, low, high = proportion_interval([1] * right + [0] * (len(held_out) - right), 1)
      sums = [float(np.sum(own)) for own in logprobs]
      metrics |= {
        "eval/pair_loss": float(loss),
        "eval/pair_accuracy": accuracy,
        "eval/pair_low": low,
        "eval/pair_high": high,
        **{f"eval/{name}": finalize(figures)[name] for name in REWARDS},
        "eval/chosen_logprobs": float(np.mean(sums[0::2])),
        "eval/rejected_logprobs": float(np.mean(sums[1::2])),
      }
    if task is not None:
      say(f"evaluating on {len(problems.problems)} held-out problems")
      found = evaluation.evaluate(
        whole(state.params),
        problems,
        generate=generate,
        pool=pool,
        tokenizer=tokenizer,
        samples=config.eval.samples,
        prompts_per_batch=config.pairs_per_step,
        max_reward=task.max_reward,
        check=stop.check,
        mesh=mesh,
      )
      metrics |= found.metrics
      rows = found.rows
    return evaluation.Evaluation(metrics, rows)

  def draw(state: TrainState, step: int, clock: PhaseClock):
    """The step's pairs, the reference's log-probs of them, the two records' rows, the sampling."""
    if dataset is not None:
      chosen = batch_indices(
        len(training), batch_size=config.pairs_per_step, seed=config.seed, step=step
      )
      refs = [known[2 * index + side] for index in chosen for side in (0, 1)] if known else []
      row = {f"data_{name}": count for name, count in counts.items()}
      return [training[index] for index in chosen], refs, row, [], Work()
    experience = collect(
      whole(state.params),
      config.seed,
      step,
      task=task,
      prompts_per_step=config.pairs_per_step,
      responses_per_prompt=config.responses_per_prompt,
      sampling=sampling_config(config.sampling),
      encode=encode,
      generate=generate,
      pool=pool,
      tokenizer=tokenizer,
      parts=config.sampling.parts,
      clock=clock,
      check=stop.check,
      mesh=mesh,
    )
    scores = experience.scores
    chosen = best_and_worst(scores.rewards, scores.ok)
    signs = np.zeros(scores.rewards.shape)  # As a table shows them: which was preferred to which.
    for p, best, worst in chosen:
      signs[p, best], signs[p, worst] = 1, -1
    samples = sample_rows(
      experience.drawn.problems,
      experience.texts,
      experience.rollout,
      scores,
      split="train",
      max_reward=task.max_reward,
      advantages=signs,
    )
    pairs = sampled_pairs(experience, chosen)
    with clock("logprobs"):
      refs = score(ref_params, flat(pairs)) if ref_params is not None else []
    row = experience_metrics(experience, max_reward=task.max_reward)
    lengths = experience.rollout.lengths
    work = Work(
      generated_tokens=int(np.sum(lengths)),
      rollout_flops=forward_flops(policy.config, experience.prompts.lengths, lengths),
    )
    return pairs, refs, row, samples, work

  def take_step(state: TrainState, step: int, clock: PhaseClock) -> Step:
    pairs, refs, row, samples, work = draw(state, step, clock)
    rate = learning_rate(config.optimizer, step, steps=config.steps)
    row |= {"pairs": len(pairs), "learning_rate": rate, "updates_skipped": int(state.skipped)}
    if not pairs:  # All problems were answered equally well: there is nothing to learn.
      return Step(state, row, samples, work)
    with clock("logprobs"):
      batch, keywords = with_constants(whole(state.params), pairs, config.pairs_per_step, refs)
    row |= {"padding_fraction": padding_fraction(batch["segment_ids"])}
    if config.packing:
      packed = packed_shares(
        flat(pairs),
        shares=microbatches,
        per_share=2 * min(config.pairs_per_step, config.microbatch_pairs),
        length=config.packing,
        pad_id=tokenizer.pad_id,
      )
      row |= {"padding_fraction": padding_fraction(packed.packed.segment_ids)}
      batch = {k: v for k, v in batch.items() if k not in ("tokens", "positions", "segment_ids")}
      batch["packed"] = packed
    hparams = {
      "learning_rate": jnp.float32(rate),
      "loss": keywords,
      "sft_coef": jnp.float32(config.loss.sft_coef),
    }
    announce(f"compiling the update: pairs of up to {batch['mask'].shape[1]} tokens")
    stop.check()
    with clock("update"):
      placed = place_rows(batch, mesh)
      state, metrics = update(
        state, placed, hparams, -(-len(pairs) // config.microbatch_pairs), frozen
      )
      row |= finalize(jax.device_get(metrics))
    lengths = np.sum(batch["mask"], axis=1)[: 2 * len(pairs)]
    row |= {
      "chosen_length": float(np.mean(lengths[0::2])),
      "rejected_length": float(np.mean(lengths[1::2])),
      "updates_skipped": int(state.skipped),
    }
    most = config.optimizer.max_skipped
    failure = failure_of(loss_fn, state, batch, hparams, max_skipped=most, frozen=frozen)
    passes = update_passes(adapters=frozen is not None)
    trained = text_work(policy.config, flat(pairs), passes=passes)
    work = work._replace(
      trained_tokens=trained.trained_tokens, update_flops=trained.update_flops
    )
    return Step(state, row, samples, work, failure)

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
      samples_every=config.samples_every,
      peak=find_peak(list(mesh.devices.flat), config.dtype),
      profile=config.profile,
    )
  if config.export:
    export_model(run, policy.config, whole(state.params), tokenizer, base=config.model)
  return finish(run)


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  pairs, part = config.pairs_per_step, config.microbatch_pairs
  if pairs > part and pairs % part:
    raise ConfigError(
      "microbatch_pairs",
      part,
      f"a divisor of pairs_per_step ({pairs})",
      f"try --microbatch_pairs={math.gcd(pairs, part)}",
    )
  longest = config.max_tokens if config.data else config.max_prompt_tokens + config.max_new_tokens
  if 0 < config.packing < longest:
    raise ConfigError("packing", config.packing, f"0, or at least a sequence's limit ({longest})")
  check_loss(config.loss)
  if config.loss.name in losses.BATCH_COUPLED and pairs > part:
    raise ConfigError(
      "microbatch_pairs",
      part,
      f"at least pairs_per_step ({pairs}) with --loss={config.loss.name}",
      "it compares the pairs of a batch with each other",
    )
  check_sampling(
    config.sampling, max_new_tokens=config.max_new_tokens, prompts=config.pairs_per_step
  )
  check_schedule(config.optimizer, steps=config.steps)
  if config.task != "none":
    task_family(config.task)
  elif config.data == "on_policy":
    raise ConfigError("data", "on_policy", "a file with --task=none: nobody would grade")
  elif not config.held_out_fraction:
    raise ConfigError(
      "held_out_fraction", 0, "above 0 with --task=none", "nothing would say what was learned"
    )


def check_loss(options: Loss) -> None:
  """Refuses keywords that the chosen loss does not have, and numbers that it does not take."""
  loss = getattr(losses, options.name)
  allowed = inspect.signature(loss).parameters
  names = [field.name for field in dataclasses.fields(options) if field.default is None]
  given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
  for name, value in given.items():
    if name not in allowed:
      has = ", ".join(known for known in names if known in allowed)
      raise ConfigError(
        f"loss.{name}", value, f"left out with --loss={options.name}", f"which has {has}"
      )
  if options.alpha is not None and options.divergence != "alpha":
    raise ConfigError("loss.alpha", options.alpha, "left out without --loss.divergence=alpha")
  arrays = [np.zeros(1, np.float32)] * (5 if needs_reference(options) else 3)
  try:
    jax.eval_shape(lambda: loss(*arrays, **{k: v for k, v in given.items() if k != "shift"}))
  except ValueError as error:
    raise ConfigError("loss.name", options.name, "given what it takes", str(error)) from None


def make_task(config: Config) -> Task | None:
  """The task, with the options of its own group of flags."""
  if config.task == "none":
    return None
  return load_task(config.task, **vars(getattr(config, task_family(config.task))))


def main(config: Config) -> int:
  data = config.task if config.data == "on_policy" else Path(config.data).name
  workdir = config.workdir or default_workdir(
    "dpo", model=config.model, data=data, seed=config.seed
  )
  return exit_code(
    functools.partial(train, config, workdir), distributed=joined(config.distributed)
  )


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
