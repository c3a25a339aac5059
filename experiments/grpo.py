"""GRPO: ask the model the same question several times, and prefer its better answers.

The reward is never differentiated. It only says how far each sampled answer lies above or below the
others to the same question; the gradient then makes what was better likelier. No value network, no
reward model, no preference data: a grader and G answers a question.

  python -m experiments.grpo                                SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.grpo --model=tiny --task=copy       the one-minute version, no extra package
  python -m experiments.grpo --model=DIR --task=jsonl:train.jsonl --jsonl.reward_file=reward.py
  python -m experiments.grpo --preset=dapo --seed=1         a published recipe, another seed

Rerunning the same command goes on from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command and --steps=24, seed 0, on 2 cores: of 100 held-out sums, right at
temperature 1 from 0.19 to 0.93, greedily from 0.69 to 0.96, in 569 s of training and evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import advantages, losses, presets, weighting
from rl_llm.chat_template import ChatTemplateError
from rl_llm.checkpoint import Checkpointer, CheckpointError
from rl_llm.config import ConfigError, option, run
from rl_llm.console import Console
from rl_llm.data import DataError
from rl_llm.data.prompts import PromptTooLong, pad_prompts
from rl_llm.evaluation import evaluate, first_problems
from rl_llm.experience import (
  draw_problems,
  encode_problems,
  response_texts,
  sample_rows,
  score,
  trim,
)
from rl_llm.files import locked
from rl_llm.interrupt import Interrupted, StopSignals
from rl_llm.metrics import MetricsWriter, PhaseClock, finalize, read
from rl_llm.model import load_model
from rl_llm.policy import Policy, WeightsError, save_hf
from rl_llm.report import before_after, write_report
from rl_llm.rewards import RewardError, RewardPool
from rl_llm.rollout import STOP_LENGTH, generate, response_logprobs, row_keys
from rl_llm.run_directory import open_run, write_result
from rl_llm.sampling import SamplingConfig
from rl_llm.tasks import (
  ArithmeticOptions,
  CopyOptions,
  Gsm8kOptions,
  JsonlOptions,
  ReasoningGymOptions,
  Task,
  TaskError,
  load_task,
  task_family,
)
from rl_llm.tokenizers import ModelTokenizer, TokenizerError, save_tokenizer
from rl_llm.train_state import init_state, parameter_count
from rl_llm.update import first_nonfinite, learning_rate_at, make_optimizer, make_update


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn."""

  temperature: float = option(1.0, "of the sampler and of the trainer alike", above=0)
  top_k: int = option(0, "keep the k likeliest tokens, 0 = all; needs allow_truncated", min=0)
  top_p: float = option(1.0, "keep the likeliest tokens that reach p; needs allow_truncated",
                        above=0, max=1)
  min_new_tokens: int = option(0, "no end of sequence before this many tokens", min=0)
  allow_truncated: bool = option(
    False, "train on top-k or top-p samples although they come from another distribution"
  )


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
class Weighting:
  """How much each token counts."""

  name: Literal[
    "token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean"
  ] = option("token_mean", "a function of rl_llm.weighting")
  length: int = option(0, "of constant_length; 0 = max_new_tokens", min=0)
  drop_truncated: bool = option(False, "responses cut off at the limit do not count (DAPO)")


@dataclasses.dataclass(frozen=True)
class Loss:
  """GRPO's surrogate."""

  clip_low: float = option(0.2, "how far below 1 the ratio may matter", above=0)
  clip_high: float = option(0.2, "how far above 1; more than clip_low is clip-higher", above=0)
  dual_clip: float | None = option(None, "bound of the loss where the advantage is < 0", above=1)
  delta: float | None = option(None, "upper bound of the ratio where the advantage is < 0", above=1)
  entropy_coef: float = option(0.0, "reward for entropy, per nat")


@dataclasses.dataclass(frozen=True)
class KL:
  """The price of leaving the model that training began with."""

  coef: float = option(0.0, "0 keeps no reference model", min=0)
  value: Literal["k1", "k2", "k3"] = option("k3", "the estimator that is reported")
  gradient: Literal["k1", "k2", "k3"] = option("k2", "the estimator that is differentiated")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW."""

  learning_rate: float = option(1.5e-5, "after warm-up", above=0)
  schedule: Literal["constant", "linear", "cosine"] = option("constant", "towards 0 at the end")
  warmup_steps: int = option(0, "steps over which the learning rate rises from 0", min=0)
  b1: float = option(0.9, "decay of the mean gradient", min=0, below=1)
  b2: float = option(0.95, "decay of the mean squared gradient", min=0, below=1)
  eps: float = option(1e-8, "added to its root", above=0)
  weight_decay: float = option(0.0, "of matrices, decoupled", min=0)
  max_grad_norm: float = option(1.0, "longer gradients are scaled down; 0 = never", min=0)
  max_skipped: int = option(3, "updates in a row with NaN or infinity after which to stop", min=1)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Accuracy on problems that training never draws."""

  every: int = option(16, "steps between evaluations; first and last are always done", min=1)
  problems: int = option(0, "how many of the task's held-out problems; 0 = all", min=0)
  samples: int = option(7, "responses a problem at temperature 1, beside the greedy one", min=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What survives a crash."""

  every: int = option(10, "steps between checkpoints; the last one is always written", min=1)
  keep: int = option(1, "checkpoints kept", min=1)


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
    "none", "a published recipe for advantage, weighting, loss and kl; flags given explicitly win"
  )
  workdir: str = option("", "the run's directory; empty = runs/grpo-<model>-<task>-seed<seed>")
  seed: int = option(0, "of problems and samples, and of the tiny model's weights", min=0)
  steps: int = option(32, "rollouts, each followed by its updates", min=1)
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
  remat: bool = option(False, "compute activations twice instead of holding them")
  samples_every: int = option(5, "steps between sample tables", min=1)
  export: bool = option(False, "write the trained model as a Hugging Face directory, WORKDIR/model")
  sampling: Sampling = Sampling()
  advantage: Advantage = Advantage()
  weighting: Weighting = Weighting()
  loss: Loss = Loss()
  kl: KL = KL()
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
  "eval.every": 40,
  "samples_every": 20,
  "checkpoint.every": 20,
}

def overrides(config: Config) -> dict[str, Any]:
  """What the model and the preset change, unless the command line says otherwise."""
  changes = dict(TINY) if config.model == "tiny" else {}
  if config.preset != "none":
    recipe = presets.grpo(config.preset)
    for part, keywords in recipe._asdict().items():
      if part in ("advantage", "loss"):  # One function each: group_relative, grpo_loss.
        keywords = {key: value for key, value in keywords.items() if key != "name"}
      changes |= {f"{part}.{key}": value for key, value in keywords.items()}
  return changes


def volatile(config: Config) -> set[str]:
  """Flags with which a run may be resumed at other values: they do not change what is computed."""
  names = {"workdir", "samples_every", "checkpoint.every", "checkpoint.keep", "export"}
  # A falling learning rate depends on where it is to end.
  return names | {"steps"} if config.optimizer.schedule == "constant" else names


def make_loss(config: Config, policy: Policy):
  """The objective: GRPO's surrogate, plus a KL term and an entropy term where they are wanted."""

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
    loss, metrics = losses.grpo_loss(
      logprobs,
      old_logprobs,
      batch["advantages"],
      batch["weights"],
      mask=batch["mask"],
      clip_low=hparams["clip_low"],
      clip_high=hparams["clip_high"],
      dual_clip=config.loss.dual_clip,
      delta=config.loss.delta,
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


def token_weights(config: Config, mask: np.ndarray, truncated: np.ndarray) -> np.ndarray:
  """The [B, T] weights of one optimiser step's batch."""
  name, keywords = config.weighting.name, {}
  if name == "constant_length":
    keywords = {"length": config.weighting.length or config.max_new_tokens}
  elif name == "prompt_mean":
    keywords = {"group_size": config.responses_per_prompt}
  weights = getattr(weighting, name)(mask, **keywords)
  if config.weighting.drop_truncated:
    weights = weights * weighting.drop_truncated(mask, truncated)
  return np.asarray(weights)


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Runs to the end, or goes on from where an earlier run of the same config stopped.

  Returns:
    The result that result.json holds: accuracies before and after, steps, seconds.

  Raises:
    Interrupted: SIGINT or SIGTERM came; everything up to now is saved.
  """
  check(config)
  workdir = Path(workdir)
  with StopSignals() as stop, Console(total_steps=config.steps) as console:
    result = open_run(workdir, config, volatile=volatile(config))
    with locked(workdir / ".lock") as alone:
      if not alone:
        raise ConfigError("workdir", str(workdir), "a directory that no other process trains in")
      finished = result is not None and result["steps"] >= config.steps
      if not finished or (config.export and not (workdir / "model").exists()):
        return _train(config, workdir, console, stop)
      console.say(f"{workdir} is finished; a larger --steps goes on, another --workdir begins anew")
      show_result(console, workdir, result)
      return result


def _train(config: Config, workdir: Path, console: Console, stop: StopSignals) -> dict[str, Any]:
  devices = jax.devices()
  console.say(f"loading {config.model} on {len(devices)} x {devices[0].device_kind}")
  task = make_task(config)
  model = load_model(config.model, seed=config.seed, remat=config.remat)
  policy, tokenizer = model.policy, model.tokenizer
  layout = config.prompt_format
  if layout == "auto":
    layout = "chat" if tokenizer.chat_template else "plain"
  encode = functools.partial(
    encode_problems,
    tokenizer=tokenizer,
    prompt_format=layout,
    system_prompt=config.system_prompt,
    max_prompt_tokens=config.max_prompt_tokens,
    overlong=config.overlong_prompt,
  )
  held_out = encode(first_problems(task.held_out, config.eval.problems))
  draw_problems(task, config.seed, 0, config.prompts_per_step, encode)  # An error comes now.
  if not held_out.problems:
    raise TaskError(
      f"task={config.task!r}: no held-out problem to evaluate on; hold some out, or give a file of "
      "them (see the task's flags)"
    )

  optimizer_config = config.optimizer
  optimizer = make_optimizer(
    b1=optimizer_config.b1,
    b2=optimizer_config.b2,
    eps=optimizer_config.eps,
    weight_decay=optimizer_config.weight_decay,
    max_grad_norm=optimizer_config.max_grad_norm,
  )
  update_prompts = config.prompts_per_step // config.minibatches
  loss_fn = make_loss(config, policy)
  update = make_update(
    loss_fn, optimizer, microbatches=max(1, update_prompts // config.microbatch_prompts)
  )
  logprobs_of = jax.jit(
    functools.partial(response_logprobs, policy=policy, temperature=config.sampling.temperature)
  )
  ref_params = model.params if config.kl.coef else None
  policy_term_only = not config.kl.coef and not config.loss.entropy_coef

  seen_shapes = set()

  def generate_responses(params, prompts, keys, sampling, group):
    shape = (*prompts.tokens.shape, group)
    if shape not in seen_shapes:
      seen_shapes.add(shape)
      console.say(
        f"compiling the rollout: {shape[0]} prompts of up to {shape[1]} tokens x {group} responses"
      )
    return generate(
      params,
      prompts.tokens,
      prompts.lengths,
      keys,
      sampling,
      policy=policy,
      responses_per_prompt=group,
      max_new_tokens=config.max_new_tokens,
      eos_ids=tokenizer.eos_ids,
      pad_id=tokenizer.pad_id,
    )

  console.sizes(
    {
      "parameters": parameter_count(model.params),
      "problems a step": config.prompts_per_step,
      "responses a problem": config.responses_per_prompt,
      "updates a step": config.epochs * config.minibatches,
      "problems a microbatch": min(update_prompts, config.microbatch_prompts),
      "tokens a response, at most": config.max_new_tokens,
      "steps": config.steps,
      "held-out problems": len(held_out.problems),
      "task": f"{task.name}: {task.note}" if task.note else task.name,
      "prompt format": layout,
      "directory": str(workdir),
    }
  )
  if held_out.overlong:
    console.say(f"{held_out.overlong} held-out prompts are over --max_prompt_tokens")

  checkpoints = Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep)
  start = checkpoints.latest()
  if start is None:
    start = 0
    # The state owns its arrays: an update donates them, and the reference must stay.
    state = jax.jit(lambda p: init_state(jax.tree.map(jnp.copy, p), optimizer))(model.params)
  else:
    abstract = jax.eval_shape(lambda p: init_state(p, optimizer), model.params)
    start, state, _ = checkpoints.restore(abstract)
    console.say(f"going on from the checkpoint at step {start}")
    if start > config.steps:
      raise ConfigError("steps", config.steps, f"at least {start}, which {workdir} has reached")
  model = model._replace(params=None)
  saved = start

  pool = RewardPool(task.reward, workers=config.reward_workers, deadline=config.reward_deadline)
  metrics_file = MetricsWriter(workdir / "metrics.jsonl", resume_step=start - 1)
  samples_file = MetricsWriter(workdir / "samples.jsonl", resume_step=start - 1)
  with pool, metrics_file, samples_file:
    try:
      for step in range(start, config.steps + 1):
        row, sample_lines = {}, []
        clock = PhaseClock()
        stop.check()
        # What happened before this step is on record by now, so nothing is lost whenever we die.
        if step > saved and (step % config.checkpoint.every == 0 or step == config.steps):
          with clock("checkpoint"):
            checkpoints.save(step, state)
          saved = step
        if step % config.eval.every == 0 or step == config.steps:
          console.say(f"evaluating on {len(held_out.problems)} held-out problems")
          with clock("eval"):
            found = evaluate(
              state.params,
              held_out,
              generate=generate_responses,
              pool=pool,
              tokenizer=tokenizer,
              samples=config.eval.samples,
              prompts_per_batch=config.prompts_per_step,
              max_reward=task.max_reward,
              check=stop.check,
            )
          console.evaluation(step, found.metrics)
          row |= found.metrics
          sample_lines += found.rows
        if step == config.steps:
          metrics_file.write(step, row | clock.metrics())
          samples_file.write(step, *sample_lines)
          break

        with clock("rollout"):
          drawn = draw_problems(task, config.seed, step, config.prompts_per_step, encode)
          prompts = pad_prompts(drawn.prompts, pad_id=tokenizer.pad_id)
          group = config.responses_per_prompt
          # Training draws from fold_in(fold_in(fold_in(root, step), problem), sample).
          keys = row_keys(
            jax.random.fold_in(jax.random.key(config.seed), step), config.prompts_per_step, group
          )
          sampling = SamplingConfig(
            # Of the type that evaluation has, or the same shape compiles twice.
            jnp.full(config.prompts_per_step * group, config.sampling.temperature, jnp.float32),
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            min_new_tokens=config.sampling.min_new_tokens,
          )
          rollout = trim(generate_responses(state.params, prompts, keys, sampling, group))
        stop.check()
        with clock("reward"):
          texts = response_texts(rollout, tokenizer)
          scores = score(pool, drawn.problems, texts, group_size=group)
          group_advantages = np.asarray(
            advantages.group_relative(
              scores.rewards, where=scores.ok, **dataclasses.asdict(config.advantage)
            )
          )
        stop.check()

        informative = np.any(group_advantages != 0, axis=1)

        # A response without a reward is as if it had not been sampled.
        mask = rollout.mask & scores.ok.reshape(-1, 1)
        truncated = rollout.stop_reason == STOP_LENGTH
        batch = {
          "prompts": prompts.tokens,
          "prompt_lengths": prompts.lengths,
          "tokens": rollout.tokens,
          "mask": mask,
          "sampler_logprobs": rollout.sampler_logprobs,
          "advantages": group_advantages.reshape(-1),
        }
        scored = [batch[key] for key in ("prompts", "prompt_lengths", "tokens", "mask")]
        with clock("logprobs"):
          if config.epochs * config.minibatches > 1:
            batch["old_logprobs"] = np.asarray(logprobs_of(state.params, *scored)[0])
          if ref_params is not None:
            batch["ref_logprobs"] = np.asarray(logprobs_of(ref_params, *scored)[0])
        rate = learning_rate_at(
          step,
          peak=optimizer_config.learning_rate,
          schedule=optimizer_config.schedule,
          warmup_steps=optimizer_config.warmup_steps,
          total_steps=config.steps,
        )
        hparams = {
          "learning_rate": jnp.float32(rate),
          "clip_low": jnp.float32(config.loss.clip_low),
          "clip_high": jnp.float32(config.loss.clip_high),
          "kl_coef": jnp.float32(config.kl.coef),
          "entropy_coef": jnp.float32(config.loss.entropy_coef),
        }
        totals: dict[str, tuple[float, float]] = {}
        with clock("update"):
          if step == start:
            console.say(f"compiling the update: responses of up to {mask.shape[1]} tokens")
          for chosen in minibatches(config, step):
            # Groups without spread come last: where the policy term is all, they add nothing.
            chosen = chosen[np.argsort(~informative[chosen], kind="stable")]
            take = functools.partial(take_prompts, chosen=chosen, of=config.prompts_per_step)
            minibatch = {key: take(value) for key, value in batch.items()}
            minibatch["weights"] = token_weights(config, minibatch["mask"], take(truncated))
            needed = np.count_nonzero(informative[chosen]) if policy_term_only else len(chosen)
            state, metrics = update(
              state, minibatch, hparams, -(-needed // config.microbatch_prompts)
            )
            for key, (total, count) in jax.device_get(metrics).items():
              before = totals.get(key, (0.0, 0.0))
              totals[key] = (before[0] + float(total), before[1] + float(count))
        row |= finalize(totals)
        row |= {
          "reward_mean": mean(scores.rewards, scores.ok),
          "accuracy": mean(scores.rewards >= task.max_reward, scores.ok),
          "frac_zero_std": float(np.mean(~informative)),
          "entropy": mean(rollout.entropies, mask),
          "response_length_mean": float(np.mean(rollout.lengths)),
          "truncated_fraction": float(np.mean(truncated)),
          "learning_rate": rate,
          "overlong_prompts": drawn.overlong,
          "updates_skipped": int(state.skipped),
          **{f"rewards_{status}": count for status, count in scores.counts.items()},
        }
        train_lines = sample_rows(
          drawn.problems,
          texts,
          rollout,
          scores,
          split="train",
          max_reward=task.max_reward,
          advantages=group_advantages,
        )
        samples_file.write(step, *sample_lines, *train_lines)
        if step % config.samples_every == 0:
          console.samples(step, train_lines)
        row |= clock.metrics()
        metrics_file.write(step, row)
        console.step(step, row)
        if int(state.skipped_in_a_row) >= optimizer_config.max_skipped:
          gradient = jax.jit(jax.grad(loss_fn, has_aux=True))(state.params, minibatch, hparams)[0]
          raise Diverged(
            f"{int(state.skipped_in_a_row)} updates in a row had a gradient that is not finite, "
            f"first in {first_nonfinite(gradient)}; the parameters are those before them. Lower "
            "--optimizer.learning_rate, or look at samples.jsonl for what the model wrote"
          )
    except Interrupted as interruption:
      if step > saved:
        checkpoints.save(step, state)
      console.say(
        f"{interruption}: saved at step {step} of {config.steps}; the same command goes on from it"
      )
      raise

  if config.export:
    shutil.rmtree(workdir / "model", ignore_errors=True)  # Of an earlier end of this run.
    save_hf(workdir / "model", policy.config, state.params)
    if isinstance(tokenizer, ModelTokenizer):
      save_tokenizer(workdir / "model", tokenizer)
    console.say(f"model: {workdir / 'model'}")
  write_report(workdir)
  result = summary(read(workdir / "metrics.jsonl"))
  write_result(workdir, result)
  show_result(console, workdir, result)
  return result


def check(config: Config) -> None:
  """Refuses sizes that do not fit together, before anything is loaded or compiled."""
  if config.prompts_per_step % config.minibatches:
    raise ConfigError(
      "minibatches",
      config.minibatches,
      f"a divisor of prompts_per_step ({config.prompts_per_step})",
    )
  problems = config.prompts_per_step // config.minibatches
  if problems > config.microbatch_prompts and problems % config.microbatch_prompts:
    raise ConfigError(
      "microbatch_prompts",
      config.microbatch_prompts,
      f"a divisor of the {problems} problems of an update (prompts_per_step / minibatches)",
      f"try --microbatch_prompts={math.gcd(problems, config.microbatch_prompts)}",
    )
  if config.sampling.min_new_tokens > config.max_new_tokens:
    raise ConfigError(
      "sampling.min_new_tokens",
      config.sampling.min_new_tokens,
      f"at most max_new_tokens ({config.max_new_tokens})",
    )
  truncated = [
    name
    for name, off in (("top_k", 0), ("top_p", 1.0))
    if getattr(config.sampling, name) != off
  ]
  if truncated and not config.sampling.allow_truncated:
    raise ConfigError(
      f"sampling.{truncated[0]}",
      getattr(config.sampling, truncated[0]),
      "off while training: it samples from another distribution than the one that is trained",
      "--sampling.allow_truncated does it all the same",
    )
  if config.optimizer.schedule != "constant" and config.optimizer.warmup_steps >= config.steps:
    raise ConfigError(
      "optimizer.warmup_steps", config.optimizer.warmup_steps, f"less than steps ({config.steps})"
    )
  task_family(config.task)


def make_task(config: Config) -> Task:
  """The task, with the options of its own group of flags."""
  family = task_family(config.task)
  return load_task(config.task, **vars(getattr(config, family)))


def minibatches(config: Config, step: int):
  """The problems of each update: every epoch deals them out anew."""
  for epoch in range(config.epochs):
    rng = np.random.default_rng(np.random.SeedSequence([config.seed, step, epoch]))
    yield from np.split(rng.permutation(config.prompts_per_step), config.minibatches)


def take_prompts(x: np.ndarray, chosen: np.ndarray, *, of: int) -> np.ndarray:
  """The rows of the chosen problems, however many rows each of the `of` problems has.

  >>> take_prompts(np.array([10, 11, 20, 21]), np.array([1]), of=2).tolist()
  [20, 21]
  """
  return x.reshape(of, -1, *x.shape[1:])[chosen].reshape(-1, *x.shape[1:])


def mean(values: np.ndarray, where: np.ndarray) -> float | None:
  """The mean of what there is, or None."""
  return float(np.mean(values[where])) if where.any() else None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """What result.json holds, read off the record."""
  evaluated = [row for row in rows if "eval/sampled_accuracy" in row]
  result = {"steps": rows[-1]["step"], "seconds": sum(row["time/step"] for row in rows)}
  for name, row in (("before", evaluated[0]), ("after", evaluated[-1])):
    result[name] = {key: value for key, value in row.items() if key.startswith("eval/")}
  return result


def show_result(console: Console, workdir: Path, result: dict[str, Any]) -> None:
  """The last lines a person reads: before, after, three answers of each, where the report is."""
  pairs = before_after(read(workdir / "samples.jsonl"))
  console.table(
    "held-out problems, greedily",
    ("prompt", "before", "after"),
    [(old["prompt"], old["response"], new["response"]) for old, new in pairs[:3]],
  )
  for kind in ("sampled", "greedy"):
    figures = [
      "{accuracy:.2f} (95% {low:.2f} to {high:.2f})".format(
        **{end: result[when][f"eval/{kind}_{end}"] for end in ("accuracy", "low", "high")}
      )
      for when in ("before", "after")
    ]
    console.say(f"held-out accuracy, {kind}: {figures[0]} -> {figures[1]}")
  console.say(f"{result['steps']} steps in {result['seconds']:.0f} s")
  console.say(f"report: {workdir / 'report.html'}")


class Diverged(RuntimeError):
  """Training cannot go on; the message says where it broke and what to try."""


def main(config: Config) -> int:
  workdir = config.workdir or default_workdir(config)
  try:
    train(config, workdir)
  except Interrupted as interruption:
    return 128 + interruption.signum
  except Diverged as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def default_workdir(config: Config) -> str:
  """runs/grpo-smollm2-arithmetic-seed0, and the like."""
  model = Path(config.model).name.removesuffix(".gguf")
  words = ["grpo", model, config.task.replace(os.sep, "_").replace(":", "_")]
  return os.path.join("runs", "-".join([*words, f"seed{config.seed}"]))


if __name__ == "__main__":
  run(
    main,
    Config,
    overrides=overrides,
    errors=(
      WeightsError,
      TokenizerError,
      ChatTemplateError,
      TaskError,
      DataError,
      PromptTooLong,
      RewardError,
      CheckpointError,
    ),
  )
