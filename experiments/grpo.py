"""GRPO: ask the model the same question several times, and prefer its better answers.

The reward is never differentiated. It only says how far each sampled answer lies above or below the
others to the same question; the gradient then makes what was better likelier. No value network, no
reward model, no preference data: a grader and G answers a question.

  python -m experiments.grpo                                SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.grpo --model=tiny --task=copy       the one-minute version, no extra package
  python -m experiments.grpo --model=DIR --task=jsonl:train.jsonl --jsonl.reward_file=reward.py
  python -m experiments.grpo --preset=dapo --seed=1         a published recipe, another seed

Rerunning the same command goes on from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, seed 0, on 2 cores: of 100 held-out sums, right at temperature 1
from 0.19 to 0.93, greedily from 0.69 to 0.95, in 569 to 698 s of training and evaluation. With the
second, seed 0: of 20 held-out strings, right greedily from 0.00 to 1.00, in 72 s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options import (
  ATTENTION_HELP,
  KL,
  MESH_FLAGS,
  Checkpoint,
  Distributed,
  Evaluation,
  Lora,
  Optimizer,
  PolicyLoss,
  Sampling,
  SamplingMesh,
  Weighting,
  adamw,
  check_loss,
  check_minibatches,
  check_sampling,
  check_schedule,
  device_mesh,
  joined,
  learning_rate,
  loss_keywords,
  policy_loss,
  sampling_config,
  split_weights,
  token_weights,
)
from rl_llm import advantages, losses, presets
from rl_llm.chips import find_peak
from rl_llm.config import option, run
from rl_llm.evaluation import evaluate
from rl_llm.experience import (
  Experience,
  agree_on_data,
  collect,
  draw_problems,
  experience_metrics,
  held_out_problems,
  make_encode,
  make_generate,
  make_judge,
  minibatches,
  sample_rows,
  take_prompts,
)
from rl_llm.flops import response_work, update_passes
from rl_llm.metrics import PhaseClock, add_metrics, finalize
from rl_llm.model import load_model
from rl_llm.policy import Policy, join
from rl_llm.policy.attention import AttentionName
from rl_llm.rewards import RewardPool
from rl_llm.rollout import STOP_LENGTH, response_logprobs
from rl_llm.sharding import fetch, place_rows
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


@dataclasses.dataclass(frozen=True)
class Advantage:
  """How a response compares with the others to its prompt."""

  scale: Literal["std", "batch", "leave_one_out", "none"] = option(
    "std", "divide by the spread of the group, of the batch, of the other responses (NeMo), or not "
    "at all (Dr. GRPO)"
  )
  ddof: int = option(1, "1 divides the variance by G - 1, 0 by G", min=0, max=1)
  eps: float = option(1e-6, "keeps a small standard deviation from exploding", above=0)
  eps_rule: Literal["add", "max"] = option("add", "std + eps, or the larger of the two")
  baseline: Literal["mean", "leave_one_out"] = option("mean", "what is subtracted")
  singleton: Literal["zero", "raw"] = option(
    "zero", "the advantage of a response alone in its group: 0, or its reward"
  )


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, or a .gguf file")
  task: str = option(
    "arithmetic", "arithmetic, copy, reasoning_gym:<name>, jsonl:<path> or gsm8k:<path>"
  )
  reward: str = option(
    "task", "what is trained on: task = the task's grader, or model:<dir> = a reward model's score"
  )
  preset: Literal[
    "none", "grpo", "dr_grpo", "dapo", "trl", "verl", "nexrl", "nemo", "tunix", "simply", "skyrl"
  ] = option(
    "none", "a published recipe for advantage, weighting, loss and kl; flags given explicitly win"
  )
  workdir: str = option("", "the run's directory; empty = runs/grpo-<model>-<task>-seed<seed>")
  seed: int = option(0, "of problems and samples, and of the tiny model's weights", min=0)
  steps: int = option(24, "rollouts, each followed by its updates", min=1)
  prompts_per_step: int = option(16, "P, problems a step", min=1)
  responses_per_prompt: int = option(8, "G, responses a problem", min=2)
  max_prompt_tokens: int = option(512, "limit of a prompt's length", min=1)
  overlong_prompt: Literal["error", "drop", "truncate_left"] = option(
    "error", "what to do with longer prompts"
  )
  max_new_tokens: int = option(16, "limit of a response's length", min=1)
  prompt_format: Literal["auto", "chat", "plain"] = option(
    "auto", "chat = the model's own chat template, plain = bare text; auto = chat if it has one"
  )
  system_prompt: str | None = option(None, "none = as the chat template has it; may be empty")
  epochs: int = option(1, "passes over a step's responses", min=1)
  minibatches: int = option(1, "optimiser updates a pass; divides prompts_per_step", min=1)
  microbatch_prompts: int = option(
    2, "problems whose responses' activations are held at once; divides prompts_per_step / "
    "minibatches, or is more than that", min=1
  )
  dtype: Literal["float32", "bfloat16"] = option(
    "float32", "of the arithmetic; weights, their gradients' sum and log-probs stay float32"
  )
  remat: bool = option(False, "compute activations twice instead of holding them")
  scan_layers: bool = option(False, "compile one layer and loop over all: compiles sooner")
  attention: AttentionName = option("auto", ATTENTION_HELP)
  samples_every: int = option(5, "steps between sample tables", min=1)
  profile: int = option(
    0, "steps to trace with jax.profiler, from the second of this start on, since the first "
    "compiles; written to WORKDIR/profile; 0 = none", min=0
  )
  export: bool = option(
    False, "write the trained model as a Hugging Face directory, WORKDIR/model; with --lora.rank "
    "the adapters alone too, WORKDIR/adapter"
  )
  sampling: Sampling = Sampling()
  advantage: Advantage = Advantage()
  weighting: Weighting = Weighting()
  loss: PolicyLoss = PolicyLoss()
  kl: KL = KL()
  lora: Lora = Lora()
  mesh: SamplingMesh = SamplingMesh()
  distributed: Distributed = Distributed()
  optimizer: Optimizer = Optimizer()
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
  "steps": 150,
  "prompts_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_prompts": 64,
  "loss.entropy_coef": 0.1,  # Without it the model settles on one answer before it reads.
  "optimizer.learning_rate": 2e-3,  # At 3e-3 one run in ten learned nothing.
  "eval.every": 50,
  "samples_every": 20,
  "checkpoint.every": 20,
}

def overrides(config: Config) -> dict[str, Any]:
  """What the model and the preset change, unless the command line says otherwise."""
  changes = dict(TINY) if config.model == "tiny" else {}
  if config.preset != "none":
    recipe = presets.grpo(config.preset)
    for part, keywords in recipe._asdict().items():
      if part == "advantage":  # Always group_relative.
        keywords = {key: value for key, value in keywords.items() if key != "name"}
      changes |= {f"{part}.{key}": value for key, value in keywords.items()}
  return changes


def volatile(config: Config) -> set[str]:
  """Flags with which a run may be resumed at other values: they do not change what is computed."""
  names = {
    "workdir", *MESH_FLAGS, "samples_every", "checkpoint.every", "checkpoint.keep", "export",
    "profile",
  }
  # A falling learning rate depends on where it is to end.
  return names | {"steps"} if config.optimizer.schedule == "constant" else names


def make_loss(config: Config, policy: Policy, *, chunk_size: int | None = None):
  """The objective: the surrogate, plus a KL term and an entropy term where they are wanted."""

  def loss_fn(params, batch, hparams):
    logprobs, entropies = response_logprobs(
      params,
      batch["prompts"],
      batch["prompt_lengths"],
      batch["tokens"],
      batch["mask"],
      policy=policy,
      temperature=config.sampling.temperature,
      chunk_size=chunk_size,
    )
    # One update per batch: the policy before it is the policy, and needs no second pass.
    old_logprobs = batch.get("old_logprobs", jax.lax.stop_gradient(logprobs))
    loss, metrics = policy_loss(
      config.loss.name,
      logprobs,
      old_logprobs,
      batch["advantages"],
      batch["weights"],
      batch["mask"],
      hparams["loss"],
    )
    if "ref_logprobs" in batch:
      penalty, kl_metrics = losses.kl_loss(
        logprobs,
        batch["ref_logprobs"],
        batch["weights"],
        value=config.kl.value,
        gradient=config.kl.gradient,
      )
      loss = loss + hparams["kl_coef"] * penalty
      metrics |= {"kl_ref": kl_metrics["kl"]}
    bonus, entropy_metrics = losses.entropy_loss(entropies, batch["weights"])
    loss = loss + hparams["entropy_coef"] * bonus
    gap = jnp.where(batch["mask"], jnp.abs(logprobs - batch["sampler_logprobs"]), 0.0)
    metrics |= entropy_metrics | {"logprob_gap_mean": (jnp.sum(gap), jnp.sum(batch["mask"]))}
    return loss, jax.lax.stop_gradient(metrics)

  return loss_fn


def policy_term_only(config: Config) -> bool:
  """Whether a response with advantage 0 adds nothing: DRO alone has a term without it."""
  return not (config.kl.coef or config.loss.entropy_coef or config.loss.name == "dro_loss")


def group_advantages(config: Config, experience: Experience) -> np.ndarray:
  """[P, G] what each response is worth beside the others to its prompt."""
  scores = experience.scores
  keywords = dataclasses.asdict(config.advantage)
  return np.asarray(advantages.group_relative(scores.rewards, where=scores.ok, **keywords))


def make_batch(experience: Experience, worth: np.ndarray) -> dict[str, np.ndarray]:
  """A step's responses, as `take_minibatch` shares them out. `worth`: [P, G] advantages."""
  prompts, rollout = experience.prompts, experience.rollout
  return {
    "prompts": prompts.tokens,
    "prompt_lengths": prompts.lengths,
    "tokens": rollout.tokens,
    # A response without a reward is as if it had not been sampled.
    "mask": rollout.mask & experience.scores.ok.reshape(-1, 1),
    "truncated": rollout.stop_reason == STOP_LENGTH,
    "sampler_logprobs": rollout.sampler_logprobs,
    "advantages": worth.reshape(-1),
  }


def deal(config: Config, step: int, informative: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
  """The problems of each of a step's updates, and how many of them, the first ones, matter.

  Groups without spread come last: where the policy term is all, they add nothing.

  Args:
    config: of the run.
    step: of the run.
    informative: [P] bool, which groups have spread.
  """
  for chosen in minibatches(
    config.seed,
    step,
    prompts=config.prompts_per_step,
    epochs=config.epochs,
    count=config.minibatches,
  ):
    matters = informative[chosen]
    needed = np.count_nonzero(matters) if policy_term_only(config) else len(chosen)
    yield chosen[np.argsort(~matters, kind="stable")], needed


def take_minibatch(
  config: Config, batch: dict[str, np.ndarray], chosen: np.ndarray
) -> dict[str, np.ndarray]:
  """The rows of the chosen problems, and how much each of their tokens counts."""
  take = functools.partial(take_prompts, chosen=chosen, of=config.prompts_per_step)
  taken = {key: take(value) for key, value in batch.items()}
  truncated = taken.pop("truncated")
  weights = token_weights(
    config.weighting,
    taken["mask"],
    truncated,
    responses_per_prompt=config.responses_per_prompt,
    max_new_tokens=config.max_new_tokens,
  )
  return taken | {"weights": weights}


def hyperparameters(config: Config, step: int) -> dict[str, Any]:
  """The numbers that a step's updates are computed with: data, so none compiles anew."""
  return {
    "learning_rate": jnp.float32(learning_rate(config.optimizer, step, steps=config.steps)),
    "loss": jax.tree.map(jnp.float32, loss_keywords(config.loss)),
    "kl_coef": jnp.float32(config.kl.coef),
    "entropy_coef": jnp.float32(config.loss.entropy_coef),
  }


def step_row(
  config: Config,
  step: int,
  totals: dict[str, Any],
  experience: Experience,
  worth: np.ndarray,
  *,
  skipped: int,
  max_reward: float,
) -> dict[str, Any]:
  """What metrics.jsonl says of a step, timings aside."""
  return (
    finalize(totals)
    | experience_metrics(experience, max_reward=max_reward)
    | {
      "frac_zero_std": float(np.mean(~np.any(worth != 0, axis=1))),
      "learning_rate": learning_rate(config.optimizer, step, steps=config.steps),
      "updates_skipped": skipped,
    }
  )


def step_samples(
  experience: Experience, worth: np.ndarray, *, max_reward: float
) -> list[dict[str, Any]]:
  """What samples.jsonl says of a step."""
  return sample_rows(
    experience.drawn.problems,
    experience.texts,
    experience.rollout,
    experience.scores,
    split="train",
    max_reward=max_reward,
    advantages=worth,
    grades=experience.grades,
  )


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Runs to the end, or goes on from where an earlier run of the same config stopped.

  Returns:
    The result that result.json holds: accuracies before and after, steps, seconds.

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
    per_step={"prompts_per_step": config.prompts_per_step},
    at_once={"microbatch_prompts": config.microbatch_prompts},
    minibatches=config.minibatches,
  )
  say(f"loading {config.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  task = make_task(config)
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
  held_out = held_out_problems(task, encode, limit=config.eval.problems)
  # An error comes now.
  agree_on_data(draw_problems(task, config.seed, 0, config.prompts_per_step, encode).prompts)
  generate = make_generate(
    policy,
    tokenizer,
    max_new_tokens=config.max_new_tokens,
    slots=config.sampling.slots,
    say=say,
    mesh=mesh,
    gather=config.mesh.gather,
  )
  judge = make_judge(
    config.reward,
    tokenizer,
    rows_per_batch=config.microbatch_prompts * config.responses_per_prompt,
    mesh=mesh,
  )

  optimizer = adamw(config.optimizer)
  update_prompts = config.prompts_per_step // config.minibatches
  loss_fn = make_loss(config, policy)
  update = make_update(
    loss_fn,
    optimizer,
    microbatches=max(1, update_prompts // config.microbatch_prompts),
    mesh=mesh,
  )
  logprobs_of = jax.jit(
    functools.partial(response_logprobs, policy=policy, temperature=config.sampling.temperature)
  )
  ref_params = None
  if config.kl.coef:  # New adapters change nothing, saved ones do.
    ref_params = whole(first) if config.lora.adapter else model.params
  announce = functools.cache(say)

  run.console.sizes(
    {
      "parameters": parameter_count(model.params),
      "parameters trained": parameter_count(first),
      "problems a step": config.prompts_per_step,
      "responses a problem": config.responses_per_prompt,
      "updates a step": config.epochs * config.minibatches,
      "problems a microbatch": min(update_prompts, config.microbatch_prompts),
      "tokens a response, at most": config.max_new_tokens,
      "steps": config.steps,
      "held-out problems": len(held_out.problems),
      "task": f"{task.name}: {task.note}" if task.note else task.name,
      "prompt format": encode.keywords["prompt_format"],
      "directory": str(run.workdir),
    }
  )
  if held_out.overlong:
    say(f"{held_out.overlong} held-out prompts are over --max_prompt_tokens")

  start, state = begin(
    run,
    functools.partial(init_state, optimizer=optimizer),
    first,
    steps=config.steps,
    mesh=mesh,
  )
  model, first = model._replace(params=None), None
  pool = RewardPool(task.reward, workers=config.reward_workers, deadline=config.reward_deadline)

  def evaluate_state(state: TrainState):
    say(f"evaluating on {len(held_out.problems)} held-out problems")
    return evaluate(
      whole(state.params),
      held_out,
      generate=generate,
      pool=pool,
      tokenizer=tokenizer,
      samples=config.eval.samples,
      prompts_per_batch=config.prompts_per_step,
      max_reward=task.max_reward,
      check=stop.check,
      mesh=mesh,
    )

  def take_step(state: TrainState, step: int, clock: PhaseClock) -> Step:
    experience = collect(
      whole(state.params),
      config.seed,
      step,
      task=task,
      prompts_per_step=config.prompts_per_step,
      responses_per_prompt=config.responses_per_prompt,
      sampling=sampling_config(config.sampling),
      encode=encode,
      generate=generate,
      pool=pool,
      tokenizer=tokenizer,
      judge=judge,
      parts=config.sampling.parts,
      clock=clock,
      check=stop.check,
      mesh=mesh,
    )
    worth = group_advantages(config, experience)
    batch = make_batch(experience, worth)
    scored = [batch[key] for key in ("prompts", "prompt_lengths", "tokens", "mask")]
    scored = place_rows(scored, mesh)
    with clock("logprobs"):
      if config.epochs * config.minibatches > 1:
        batch["old_logprobs"] = fetch(logprobs_of(whole(state.params), *scored)[0])
      if ref_params is not None:
        batch["ref_logprobs"] = fetch(logprobs_of(ref_params, *scored)[0])
    stop.check()
    hparams = hyperparameters(config, step)
    announce(f"compiling the update: responses of up to {batch['mask'].shape[1]} tokens")
    totals, learned = {}, []
    with clock("update"):
      for chosen, needed in deal(config, step, np.any(worth != 0, axis=1)):
        minibatch = place_rows(take_minibatch(config, batch, chosen), mesh)
        microbatches = -(-needed // config.microbatch_prompts)
        state, metrics = update(state, minibatch, hparams, microbatches, frozen)
        totals = add_metrics(totals, jax.device_get(metrics))
        learned.append(chosen[:needed])
    row = step_row(
      config,
      step,
      totals,
      experience,
      worth,
      skipped=int(state.skipped),
      max_reward=task.max_reward,
    )
    samples = step_samples(experience, worth, max_reward=task.max_reward)
    failure = failure_of(
      loss_fn, state, minibatch, hparams, max_skipped=config.optimizer.max_skipped, frozen=frozen
    )
    work = response_work(
      policy.config,
      experience.prompts.lengths,
      experience.rollout.lengths,
      np.sum(batch["mask"], axis=1),
      learned,
      passes=update_passes(adapters=frozen is not None),
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
  """Refuses sizes that do not fit together, before anything is loaded or compiled."""
  check_minibatches(
    prompts_per_step=config.prompts_per_step,
    minibatches=config.minibatches,
    microbatch_prompts=config.microbatch_prompts,
  )
  check_loss(config.loss)
  check_sampling(
    config.sampling, max_new_tokens=config.max_new_tokens, prompts=config.prompts_per_step
  )
  check_schedule(config.optimizer, steps=config.steps)
  task_family(config.task)


def make_task(config: Config) -> Task:
  """The task, with the options of its own group of flags."""
  return load_task(config.task, **vars(getattr(config, task_family(config.task))))


def main(config: Config) -> int:
  workdir = config.workdir or default_workdir(
    "grpo", model=config.model, data=config.task, seed=config.seed
  )
  return exit_code(
    functools.partial(train, config, workdir), distributed=joined(config.distributed)
  )


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
