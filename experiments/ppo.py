"""PPO: a second network foresees the reward, and what counts is by how much a token beat it.

With one reward at the end of a response, which token earned it? The value network says before each
token how much reward is about to come; generalised advantage estimation turns the changes of its
mind into advantages, token by token. Sampling is dear, so a step's responses serve several updates,
and the clipped ratio keeps these from going further than the samples can tell.

  python -m experiments.ppo                                 SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.ppo --model=tiny --task=copy
  python -m experiments.ppo --value.trunk=shared            one network with two heads
  python -m experiments.ppo --reward=model:DIR              a reward model instead of the grader
  python -m experiments.ppo --kl.coef=0.02 --kl.controller=adaptive --kl.target=0.05

What each `--value.trunk` holds, for a policy of N parameters in float32, beside the policy's own
16 N bytes (weights, Adam's two moments, a gradient while it updates):

  own      16 N more: a copy of the trunk that learns apart, with its own passes and learning rate
  shared   a few kB more: one column that reads the policy's states, in the policy's passes

A reference (--kl.coef above 0) is 4 N more. A response that was cut off at the limit ends there
like any other: its grade is its reward, and no value is put in place of what might have followed.
TRL and verl do the same. Rerunning the same command goes on from the last checkpoint; so does it
after Ctrl-C or a kill.

Measured with the first command, --steps=16 --prompts_per_step=12, seeds 0, 1 and 2, on 2 cores: of
100 held-out sums, right at temperature 1 from 0.20 to 0.94, 0.93 and 0.90, greedily from 0.69 to
0.95, 0.95 and 0.91; 44 s a step, 1,020 to 1,100 s with evaluations. The value network foresaw 0.25
of the returns' variance at step 9 with seed 0, 0.59 at step 11 with seed 1, 0.34 at step 10 with
seed 2; later nearly all answers are right, and there is hardly any variance to foresee.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
from rl_llm.controllers import AdaptiveKL, adaptive_kl
from rl_llm.evaluation import evaluate
from rl_llm.experience import (
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
from rl_llm.kl import kl_penalty
from rl_llm.masked import masked_mean, whiten
from rl_llm.metrics import PhaseClock, add_metrics, finalize
from rl_llm.model import load_model
from rl_llm.policy import Policy, join
from rl_llm.policy.attention import AttentionName
from rl_llm.policy.scalar_head import with_head, zero_head
from rl_llm.rewards import RewardPool
from rl_llm.rollout import (
  STOP_LENGTH,
  logprobs_of_hidden,
  response_hidden,
  response_logprobs,
)
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
from rl_llm.value_network import explained_variance, response_values, values_of_hidden


@dataclasses.dataclass(frozen=True)
class Advantage:
  """Generalised advantage estimation."""

  discount: float = option(1.0, "a token's share in what follows it, by distance", min=0, max=1)
  gae_lambda: float = option(
    0.95, "1 trusts the rewards that came, 0 the value network's word", min=0, max=1
  )
  whiten: bool = option(True, "shift and scale the step's advantages to mean 0 and variance 1")


@dataclasses.dataclass(frozen=True)
class Value:
  """The value network."""

  trunk: Literal["own", "shared"] = option(
    "own", "a copy of the policy's trunk, or the policy's itself; see above"
  )
  learning_rate: float = option(
    1e-4, "of the tower, or of the head on a shared trunk; same schedule", above=0
  )
  coef: float = option(0.1, "of a shared trunk: the value loss beside the policy's", above=0)
  clip: float | None = option(
    0.2, "how far a value may move in a step, in units of reward; none = any", above=0
  )


@dataclasses.dataclass(frozen=True)
class KL:
  """The price of leaving the model that training began with, taken off each token's reward."""

  coef: float = option(0.0, "0 keeps no reference model; adaptive begins with it", min=0)
  value: Literal["k1", "k2", "k3"] = option("k1", "the estimator that is priced and reported")
  controller: Literal["fixed", "adaptive"] = option(
    "fixed", "adaptive = the coefficient follows the KL"
  )
  target: float = option(0.1, "of adaptive: the KL to hold, in nats a token", above=0)
  horizon: int = option(
    10_000, "of adaptive: in how many responses the coefficient may change by 20 %", min=1
  )


class State(NamedTuple):
  """What a checkpoint holds."""

  policy: TrainState  # of a shared trunk: with the value's "head" among its parameters
  value: TrainState | None  # the value network, where it is a tower of its own
  kl: AdaptiveKL


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
    "none", "a published recipe of GRPO's for weighting and loss; flags given explicitly win"
  )
  workdir: str = option("", "the run's directory; empty = runs/ppo-<model>-<task>-seed<seed>")
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
  minibatches: int = option(2, "optimiser updates a pass; divides prompts_per_step", min=1)
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
  value: Value = Value()
  weighting: Weighting = Weighting()
  loss: PolicyLoss = PolicyLoss(name="ppo_loss")
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
  "loss.entropy_coef": 0.1,  # Without it the model settles on one answer before it reads.
  "optimizer.learning_rate": 3e-3,
  "value.learning_rate": 3e-3,
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
  """The objective: the surrogate, an entropy term, and a shared trunk's value loss."""

  def loss_fn(params, batch, hparams):
    hidden = response_hidden(params, *responses_of(batch), policy=policy)
    logprobs, entropies = logprobs_of_hidden(
      params,
      hidden,
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
    if config.value.trunk == "shared":
      values = values_of_hidden(params["head"], hidden, batch["mask"])
      error, value_metrics = value_term(config.value, values, batch)
      loss = loss + hparams["value_coef"] * error
      metrics |= value_metrics
    bonus, entropy_metrics = losses.entropy_loss(entropies, batch["weights"])
    loss = loss + hparams["entropy_coef"] * bonus
    gap = jnp.where(batch["mask"], jnp.abs(logprobs - batch["sampler_logprobs"]), 0.0)
    metrics |= entropy_metrics | {"logprob_gap_mean": (jnp.sum(gap), jnp.sum(batch["mask"]))}
    return loss, jax.lax.stop_gradient(metrics)

  return loss_fn


def make_value_loss(config: Config, policy: Policy):
  """The objective of a value network with a tower of its own."""

  def loss_fn(params, batch, hparams):
    values = response_values(params, *responses_of(batch), policy=policy)
    return value_term(config.value, values, batch)

  return loss_fn


def value_term(options: Value, values, batch):
  """The value's loss and its metrics, the same whatever trunk the values come from."""
  loss, metrics = losses.value_loss(
    values, batch["old_values"], batch["returns"], batch["weights"], clip=options.clip
  )
  metrics |= {"value_loss": (loss, jnp.sum(batch["weights"]))}
  return loss, jax.lax.stop_gradient(metrics)


def responses_of(batch):
  """What every pass over a batch reads."""
  return tuple(batch[key] for key in ("prompts", "prompt_lengths", "tokens", "mask"))


def make_before(config: Config, policy: Policy):
  """(policy's weights, value network's, responses) -> what the updates compare with.

  That is the old values, and the old log-probs where they are needed.
  """

  @jax.jit
  def before(params, value_params, responses):
    _, _, tokens, mask = responses
    hidden = response_hidden(params, *responses, policy=policy)
    if config.value.trunk == "shared":
      values = values_of_hidden(params["head"], hidden, mask)
    else:
      values = response_values(value_params, *responses, policy=policy)
    if config.epochs * config.minibatches == 1:
      return {"old_values": values}
    logprobs, _ = logprobs_of_hidden(
      params, hidden, tokens, mask, policy=policy, temperature=config.sampling.temperature
    )
    return {"old_values": values, "old_logprobs": logprobs}

  return before


def policy_optimizer(config: Config) -> optax.GradientTransformation:
  """AdamW; a value head among the policy's parameters keeps its own learning rate."""
  if config.value.trunk == "own":
    return adamw(config.optimizer)
  scale = config.value.learning_rate / config.optimizer.learning_rate
  head = optax.masked(optax.scale(scale), lambda params: {name: name == "head" for name in params})
  return optax.chain(adamw(config.optimizer), head)


def init_ppo(params, *, config: Config, width: int) -> State:
  """The state before the first step: a value network that says 0 of everything."""
  head, kl = zero_head(width), AdaptiveKL(jnp.float32(config.kl.coef))
  if config.value.trunk == "shared":
    return State(init_state(params | {"head": head}, policy_optimizer(config)), None, kl)
  return State(
    init_state(params, policy_optimizer(config)),
    init_state(with_head(params, head), adamw(config.optimizer)),
    kl,
  )


@functools.partial(jax.jit, static_argnums=0)
def token_advantages(options: Advantage, rewards, values, mask, kl, kl_coef):
  """Advantages and returns [B, T], of rewards [B], and values and KL [B, T]."""
  per_token = advantages.token_rewards(rewards, mask, kl=kl, kl_coef=kl_coef)
  found, returns = advantages.gae(
    per_token, values, mask, discount=options.discount, gae_lambda=options.gae_lambda
  )
  return whiten(found, mask) if options.whiten else found, returns


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

  update_prompts = config.prompts_per_step // config.minibatches
  microbatches = max(1, update_prompts // config.microbatch_prompts)
  loss_fn, value_loss_fn = make_loss(config, policy), make_value_loss(config, policy)
  update = make_update(loss_fn, policy_optimizer(config), microbatches=microbatches, mesh=mesh)
  update_value = make_update(
    value_loss_fn, adamw(config.optimizer), microbatches=microbatches, mesh=mesh
  )
  before = make_before(config, policy)
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
      "value network": f"{config.value.trunk} trunk",
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
    functools.partial(init_ppo, config=config, width=policy.config.width),
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
      judge=judge,
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
    with clock("logprobs"):
      scored = place_rows(responses_of(batch), mesh)
      of_value = state.value and whole(state.value.params)
      batch |= fetch(before(whole(state.policy.params), of_value, scored))
      kl = np.zeros(mask.shape, np.float32)
      if ref_params is not None:
        # Of the sampler's log-probs, which are the policy's: this is a reward, without a gradient.
        ref_logprobs = logprobs_of(ref_params, *scored)[0]
        kl = fetch(kl_penalty(rollout.sampler_logprobs, ref_logprobs, value=config.kl.value))
        kl = np.where(mask, kl, 0)
    batch["advantages"], batch["returns"] = jax.device_get(
      token_advantages(
        config.advantage,
        scores.rewards.reshape(-1),
        batch["old_values"],
        mask,
        kl,
        state.kl.coef,
      )
    )
    stop.check()
    rate = learning_rate(config.optimizer, step, steps=config.steps)
    value_rate = rate / config.optimizer.learning_rate * config.value.learning_rate
    hparams = {
      "learning_rate": jnp.float32(rate),
      "loss": jax.tree.map(jnp.float32, loss_keywords(config.loss)),
      "entropy_coef": jnp.float32(config.loss.entropy_coef),
      "value_coef": jnp.float32(config.value.coef),
    }
    value_hparams = {"learning_rate": jnp.float32(value_rate)}
    announce(f"compiling the update: responses of up to {mask.shape[1]} tokens")
    totals, trained, value, learned = {}, state.policy, state.value, []
    with clock("update"):
      for chosen in minibatches(
        config.seed,
        step,
        prompts=config.prompts_per_step,
        epochs=config.epochs,
        count=config.minibatches,
      ):
        take = functools.partial(take_prompts, chosen=chosen, of=config.prompts_per_step)
        minibatch = {key: take(x) for key, x in batch.items()}
        minibatch["weights"] = token_weights(
          config.weighting,
          minibatch["mask"],
          take(truncated),
          responses_per_prompt=config.responses_per_prompt,
          max_new_tokens=config.max_new_tokens,
        )
        minibatch = place_rows(minibatch, mesh)
        trained, metrics = update(trained, minibatch, hparams, microbatches, frozen)
        if value is not None:
          value, value_metrics = update_value(
            value, minibatch, value_hparams, microbatches, frozen
          )
          metrics |= {
            key if key.startswith("value_") else f"value_{key}": metric
            for key, metric in value_metrics.items()
            if key != "loss"  # The same as "value_loss".
          }
        totals = add_metrics(totals, jax.device_get(metrics))
        learned.append(chosen)
    kl_coef = float(state.kl.coef)
    kl_ref = kl.sum() / max(mask.sum(), 1)
    state = State(trained, value, state.kl)
    if config.kl.controller == "adaptive":
      state = state._replace(
        kl=adaptive_kl(
          state.kl, kl_ref, target=config.kl.target, samples=len(mask), horizon=config.kl.horizon
        )
      )
    row = (
      finalize(totals)
      | experience_metrics(experience, max_reward=task.max_reward)
      | {
        "explained_variance": explained_variance(batch["old_values"], batch["returns"], mask),
        "values_mean": masked_mean(batch["old_values"], mask),
        "returns_mean": masked_mean(batch["returns"], mask),
        "learning_rate": rate,
        "value_learning_rate": value_rate,
        "updates_skipped": int(trained.skipped),
      }
    )
    if value is not None:
      row["value_updates_skipped"] = int(value.skipped)
    if ref_params is not None:
      row |= {"kl_ref": kl_ref, "kl_coef": kl_coef}
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
      grades=experience.grades,
    )
    most = config.optimizer.max_skipped
    failure = failure_of(loss_fn, trained, minibatch, hparams, max_skipped=most, frozen=frozen)
    if value is not None:
      failure = failure or failure_of(
        value_loss_fn, value, minibatch, value_hparams, max_skipped=most, frozen=frozen
      )
    work = response_work(
      policy.config,
      prompts.lengths,
      rollout.lengths,
      np.sum(mask, axis=1),
      learned,
      passes=update_passes(adapters=frozen is not None),
      towers=int(value is not None),
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
    weights = whole(state.policy.params)
    language_model = {name: leaf for name, leaf in weights.items() if name != "head"}
    export_model(run, policy.config, language_model, tokenizer, base=config.model)
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
  if config.kl.controller == "adaptive" and not config.kl.coef:
    raise ConfigError(
      "kl.coef", config.kl.coef, "above 0 with --kl.controller=adaptive", "try --kl.coef=0.001"
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
    "ppo", model=config.model, data=config.task, seed=config.seed
  )
  return exit_code(
    functools.partial(train, config, workdir), distributed=joined(config.distributed)
  )


if __name__ == "__main__":
  run(main, Config, overrides=overrides, errors=USER_ERRORS)
