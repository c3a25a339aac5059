"""REINFORCE: make what was rewarded likelier, in proportion to how far it beat a baseline.

The oldest of the four methods. Nothing but a grader is needed; all that varies is what a reward is
compared with, which takes away noise and not truth (`--advantage=`):

  plain                          nothing: the reward itself
  moving_average                 the mean reward of the steps before, a number in the state
  leave_one_out                  RLOO: the mean of the other responses to the same problem
  reinforce_plus_plus            REINFORCE++: the whole batch's mean and spread
  reinforce_plus_plus_baseline   its group's mean, then the whole batch's spread

  python -m experiments.reinforce                           SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.reinforce --model=tiny --task=copy
  python -m experiments.reinforce --advantage=reinforce_plus_plus --kl.coef=0.01
  python -m experiments.reinforce --epochs=2 --loss=ppo_loss     several updates need a ratio

The KL to the reference is part of the reward here, token by token; GRPO has it in the loss.
Rerunning the same command goes on from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --steps=16 --prompts_per_step=12, seeds 0, 1 and 2, on 2 cores: of
100 held-out sums, right at temperature 1 from 0.20 to 0.92, 0.95 and 0.93, greedily from 0.69 to
0.91, 0.95 and 0.92; 16 s a step, 350 to 480 s with evaluations.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

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
  PolicyLoss,
  Sampling,
  SamplingMesh,
  Weighting,
  adamw,
  check_loss,
  check_minibatches,
  check_sampling,
  check_schedule,
  check_updates,
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
from rl_llm.config import ConfigError, option, run
from rl_llm.evaluation import evaluate
from rl_llm.experience import (
  agree_on_data,
  collect,
  draw_problems,
  experience_metrics,
  held_out_problems,
  make_encode,
  make_generate,
  minibatches,
  sample_rows,
  take_prompts,
)
from rl_llm.flops import response_work, update_passes
from rl_llm.kl import k1
from rl_llm.masked import masked_mean
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
  """What a reward is compared with."""

  name: Literal[
    "plain", "moving_average", "leave_one_out", "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
  ] = option("leave_one_out", "the baseline; see above")
  decay: float = option(0.9, "of moving_average: how much of it stays a step", min=0, below=1)
  discount: float = option(
    1.0, "a token's share in what follows it, by distance; not for leave_one_out", min=0, max=1
  )


@dataclasses.dataclass(frozen=True)
class KL:
  """The price of leaving the model that training began with, taken off each token's reward."""

  coef: float = option(0.0, "0 keeps no reference model", min=0)


class State(NamedTuple):
  """What a checkpoint holds."""

  policy: TrainState
  baseline: jax.Array  # float32 scalar, the decayed sum of mean rewards
  weight: jax.Array  # float32 scalar, the same sum of ones: their quotient is the moving average


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, or a .gguf file")
  task: str = option(
    "arithmetic", "arithmetic, copy, reasoning_gym:<name>, jsonl:<path> or gsm8k:<path>"
  )
  preset: Literal[
    "none", "grpo", "dr_grpo", "dapo", "trl", "verl", "nexrl", "nemo", "tunix", "simply", "skyrl"
  ] = option(
    "none", "a published recipe of GRPO's for weighting and loss; flags given explicitly win"
  )
  workdir: str = option("", "the run's directory; empty = runs/reinforce-<model>-<task>-seed<seed>")
  seed: int = option(0, "of problems and samples, and of the tiny model's weights", min=0)
  steps: int = option(24, "rollouts, each followed by its updates", min=1)
  prompts_per_step: int = option(16, "P, problems a step", min=1)
  responses_per_prompt: int = option(8, "G, responses a problem", min=1)
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
  loss: PolicyLoss = PolicyLoss(name="reinforce_loss")
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
  "steps": 120,
  "prompts_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_prompts": 64,
  "loss.entropy_coef": 3e-3,  # Advantages are not scaled here: GRPO's 0.1 would outweigh them.
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
  "samples_every": 20,
  "checkpoint.every": 20,
}

def overrides(config: Config) -> dict[str, Any]:
  """What the model and the preset change, unless the command line says otherwise."""
  changes = dict(TINY) if config.model == "tiny" else {}
  if config.preset != "none":
    recipe = presets.grpo(config.preset)
    for part in ("weighting", "loss"):
      changes |= {f"{part}.{key}": value for key, value in getattr(recipe, part).items()}
  return changes


def volatile(config: Config) -> set[str]:
  """Flags with which a run may be resumed at other values: they do not change what is computed."""
  names = {
    "workdir", *MESH_FLAGS, "samples_every", "checkpoint.every", "checkpoint.keep", "export",
    "profile",
  }
  # A falling learning rate depends on where it is to end.
  return names | {"steps"} if config.optimizer.schedule == "constant" else names


def make_loss(config: Config, policy: Policy):
  """The objective: the surrogate, plus an entropy term where it is wanted."""

  def loss_fn(params, batch, hparams):
    logprobs, entropies = response_logprobs(
      params,
      batch["prompts"],
      batch["prompt_lengths"],
      batch["tokens"],
      batch["mask"],
      policy=policy,
      temperature=config.sampling.temperature,
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
    bonus, entropy_metrics = losses.entropy_loss(entropies, batch["weights"])
    loss = loss + hparams["entropy_coef"] * bonus
    gap = jnp.where(batch["mask"], jnp.abs(logprobs - batch["sampler_logprobs"]), 0.0)
    metrics |= entropy_metrics | {"logprob_gap_mean": (jnp.sum(gap), jnp.sum(batch["mask"]))}
    return loss, jax.lax.stop_gradient(metrics)

  return loss_fn


def init_reinforce(params, *, optimizer) -> State:
  """The state before the first step."""
  return State(init_state(params, optimizer), jnp.zeros(()), jnp.zeros(()))


def moving_average(state: State) -> float:
  """The mean reward of the steps before, late ones counting more; 0 before the first."""
  return float(state.baseline / state.weight) if state.weight else 0.0


# Compiled: by itself, a scan would be compiled again at every call.
_reinforce_plus_plus = jax.jit(advantages.reinforce_plus_plus)
_discounted_returns = jax.jit(advantages.discounted_returns)


def token_advantages(options: Advantage, rewards, ok, mask, kl, *, kl_coef, baseline) -> np.ndarray:
  """[B, T]: the rewards [P, G], less the KL [B, T], compared with what the flags say."""
  if options.name == "leave_one_out":
    total = rewards - kl_coef * np.sum(kl, axis=1).reshape(rewards.shape)
    alone = advantages.leave_one_out(total, where=ok).reshape(-1, 1)
    return np.where(mask, alone, 0)
  if options.name == "reinforce_plus_plus_baseline":
    rewards = np.asarray(advantages.group_relative(rewards, scale="none", where=ok))
  per_token = advantages.token_rewards(rewards.reshape(-1), mask, kl=kl, kl_coef=kl_coef)
  if options.name.startswith("reinforce_plus_plus"):
    found = _reinforce_plus_plus(per_token, mask, discount=options.discount)
  else:
    returns = _discounted_returns(per_token, mask, discount=options.discount)
    found = returns - (baseline if options.name == "moving_average" else 0)
  return np.where(mask, found, 0)


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
  # DRO alone has a term without the advantage.
  policy_term_only = not (config.loss.entropy_coef or config.loss.name == "dro_loss")
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
    functools.partial(init_reinforce, optimizer=optimizer),
    first,
    steps=config.steps,
    mesh=mesh,
  )
  model, first = model._replace(params=None), None
  pool = RewardPool(task.reward, workers=config.reward_workers, deadline=config.reward_deadline)

  def evaluate_state(state: State):
    say(f"evaluating on {len(held_out.problems)} held-out problems")
    return evaluate(
      whole(state.policy.params),
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

  def take_step(state: State, step: int, clock: PhaseClock) -> Step:
    experience = collect(
      whole(state.policy.params),
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
      parts=config.sampling.parts,
      clock=clock,
      check=stop.check,
      mesh=mesh,
    )
    prompts, rollout, scores = experience.prompts, experience.rollout, experience.scores
    # A response without a reward is as if it had not been sampled.
    mask = rollout.mask & scores.ok.reshape(-1, 1)
    truncated = rollout.stop_reason == STOP_LENGTH
    batch = {
      "prompts": prompts.tokens,
      "prompt_lengths": prompts.lengths,
      "tokens": rollout.tokens,
      "mask": mask,
      "sampler_logprobs": rollout.sampler_logprobs,
    }
    scored = [batch[key] for key in ("prompts", "prompt_lengths", "tokens", "mask")]
    scored = place_rows(scored, mesh)
    with clock("logprobs"):
      if config.epochs * config.minibatches > 1:
        batch["old_logprobs"] = fetch(logprobs_of(whole(state.policy.params), *scored)[0])
      kl = np.zeros(mask.shape, np.float32)
      if ref_params is not None:
        # Of the sampler's log-probs, which are the policy's: this is a reward, without a gradient.
        kl = k1(rollout.sampler_logprobs, fetch(logprobs_of(ref_params, *scored)[0]))
        kl = np.where(mask, kl, 0)
    batch["advantages"] = token_advantages(
      config.advantage,
      scores.rewards,
      scores.ok,
      mask,
      kl,
      kl_coef=config.kl.coef,
      baseline=moving_average(state),
    )
    per_prompt = batch["advantages"].reshape(config.prompts_per_step, -1)
    informative = np.any(per_prompt != 0, axis=1)
    stop.check()
    rate = learning_rate(config.optimizer, step, steps=config.steps)
    hparams = {
      "learning_rate": jnp.float32(rate),
      "loss": jax.tree.map(jnp.float32, loss_keywords(config.loss)),
      "entropy_coef": jnp.float32(config.loss.entropy_coef),
    }
    announce(f"compiling the update: responses of up to {mask.shape[1]} tokens")
    baseline = moving_average(state)
    reward = np.mean(scores.rewards[scores.ok]) if scores.ok.any() else baseline
    totals, trained, learned = {}, state.policy, []
    with clock("update"):
      for chosen in minibatches(
        config.seed,
        step,
        prompts=config.prompts_per_step,
        epochs=config.epochs,
        count=config.minibatches,
      ):
        # Groups without an advantage come last: where the policy term is all, they add nothing.
        chosen = chosen[np.argsort(~informative[chosen], kind="stable")]
        take = functools.partial(take_prompts, chosen=chosen, of=config.prompts_per_step)
        minibatch = {key: take(value) for key, value in batch.items()}
        minibatch["weights"] = token_weights(
          config.weighting,
          minibatch["mask"],
          take(truncated),
          responses_per_prompt=config.responses_per_prompt,
          max_new_tokens=config.max_new_tokens,
        )
        needed = np.count_nonzero(informative[chosen]) if policy_term_only else len(chosen)
        microbatches = -(-needed // config.microbatch_prompts)
        minibatch = place_rows(minibatch, mesh)
        trained, metrics = update(trained, minibatch, hparams, microbatches, frozen)
        totals = add_metrics(totals, jax.device_get(metrics))
        learned.append(chosen[:needed])
    decay = config.advantage.decay
    state = State(
      trained,
      decay * state.baseline + (1 - decay) * reward,
      decay * state.weight + (1 - decay),
    )
    row = (
      finalize(totals)
      | experience_metrics(experience, max_reward=task.max_reward)
      | {
        "baseline": baseline,
        "learning_rate": rate,
        "updates_skipped": int(state.policy.skipped),
      }
    )
    if ref_params is not None:
      row["kl_ref"] = float(kl.sum() / max(mask.sum(), 1))
    samples = sample_rows(
      experience.drawn.problems,
      experience.texts,
      rollout,
      scores,
      split="train",
      max_reward=task.max_reward,
      advantages=np.reshape(
        masked_mean(batch["advantages"], mask, axis=1), scores.rewards.shape
      ),
    )
    failure = failure_of(
      loss_fn, trained, minibatch, hparams, max_skipped=config.optimizer.max_skipped, frozen=frozen
    )
    work = response_work(
      policy.config,
      prompts.lengths,
      rollout.lengths,
      np.sum(mask, axis=1),
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
    export_model(run, policy.config, whole(state.policy.params), tokenizer, base=config.model)
  return finish(run)


def check(config: Config) -> None:
  """Refuses sizes that do not fit together, before anything is loaded or compiled."""
  check_minibatches(
    prompts_per_step=config.prompts_per_step,
    minibatches=config.minibatches,
    microbatch_prompts=config.microbatch_prompts,
  )
  check_loss(config.loss)
  check_updates(config.loss, updates=config.epochs * config.minibatches)
  if config.advantage.name == "leave_one_out" and config.responses_per_prompt == 1:
    raise ConfigError(
      "advantage.name",
      config.advantage.name,
      "another one with --responses_per_prompt=1, which leaves nobody to compare with",
      "try --advantage=moving_average",
    )
  if config.advantage.name == "leave_one_out" and config.advantage.discount != 1:
    raise ConfigError(
      "advantage.discount",
      config.advantage.discount,
      "1 with --advantage=leave_one_out, which compares whole responses",
      "try --advantage=reinforce_plus_plus_baseline",
    )
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
    "reinforce", model=config.model, data=config.task, seed=config.seed
  )
  return exit_code(
    functools.partial(train, config, workdir), distributed=joined(config.distributed)
  )


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
