"""GRPO: ask the model the same question several times, and prefer its better answers.

The reward is never differentiated. It only says how far each sampled answer lies above or below the
others to the same question; the gradient then makes the better answers likelier. It needs no value
network, no reward model and no preference data, just a grader and G answers per question.

  python -m experiments.grpo                                SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.grpo --model=tiny --task=copy       the one-minute version, no extra package
  python -m experiments.grpo --model=DIR --task=jsonl:train.jsonl --jsonl.reward_file=reward.py
  python -m experiments.grpo --preset=dapo --seed=1         a published recipe, another seed

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, seeds 0, 1 and 2: of 100 held-out sums, right at temperature 1 from
0.16 to 0.89, 0.94 and 0.92, greedily from 0.53 to 0.91, 0.95 and 0.94; seed 1 in 549 s of training
and evaluation on 2 cores, with nothing compiled before. With the second, seed 0: of 20 held-out
strings, right greedily from 0.00 to 1.00, in 72 s.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from experiments import flags, setup
from rl_llm import losses
from rl_llm.policy import Policy
from rl_llm.rollout import ResponseBatch, response_logprobs
from rl_llm.runs import config as configs
from rl_llm.runs import keywords, metrics
from rl_llm.training import credit, loop, minibatches, objective
from rl_llm.training.train_state import TrainState, init_state


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.SampledRun = configs.inline(flags.SampledRun())
  model: flags.Model = configs.inline(flags.Model())
  task: flags.RewardedTask = configs.inline(flags.RewardedTask())
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  agents: flags.Agents = configs.inline(flags.Agents())
  updates: flags.Updates = configs.inline(flags.Updates())
  sampling: flags.Sampling = flags.Sampling()
  weighting: flags.Weighting = flags.Weighting()
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer()
  eval: flags.Evaluation = flags.Evaluation()
  preset: flags.PRESETS = flags.preset("all parts of the objective, groups and length")
  advantage: flags.GroupAdvantage = flags.GroupAdvantage()
  loss: flags.GroupLoss = flags.GroupLoss()
  kl: flags.KL = flags.KL()


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "prompts_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_prompts": 64,
  "samples_every": 20,
  "checkpoint.every": 20,
  "steps": 150,
  "loss.entropy_coef": 0.1,  # Without it the model copies but never learns to stop.
  "optimizer.learning_rate": 2e-3,  # At 3e-3 one run in ten learned nothing.
  "eval.every": 50,
}


def overrides(config: Config) -> dict[str, Any]:
  """What the model and the preset change, unless the command line says otherwise."""
  own = (TINY if config.model.model == "tiny" else {}) | flags.of_episodes(config)
  return own | flags.recipe(config.preset, "advantage", "weighting", "loss", "kl", "sampling")


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  if config.updates.responses_per_prompt < 2 and config.advantage.name != "remax":
    raise configs.ConfigError("responses_per_prompt", 1, "at least 2, to compare responses")
  if config.loss.name == "tpo_loss" and config.kl.coef and config.kl.place == "reward":
    allowed = "loss with --loss=tpo_loss, which knows whole responses alone"
    raise configs.ConfigError("kl.place", "reward", allowed)


def make_loss(config: Config, policy: Policy, *, chunk_size: int | None = None):
  """The objective: the surrogate, plus the other terms that have a coefficient."""
  temperature, terms = config.sampling.temperature, flags.objective_terms(config)

  def loss_fn(params, batch: ResponseBatch, hparams):
    logprobs, entropies = response_logprobs(
      params, batch, policy=policy, temperature=temperature, chunk_size=chunk_size
    )
    # With one update a batch the old policy is the current one: no second forward pass.
    one_update = batch.old_logprobs is None
    old_logprobs = jax.lax.stop_gradient(logprobs) if one_update else batch.old_logprobs
    weights, found = objective.surrogate_weights(terms, logprobs, batch)
    if config.loss.name == "tpo_loss":
      of_tokens = logprobs, old_logprobs, batch, weights
      loss, of_loss = objective.group_loss(losses.tpo_loss, *of_tokens, **hparams["loss"])
    else:
      loss, of_loss = keywords.call(
        config.loss,
        keywords=hparams["loss"],
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=batch.advantages,
        selected=batch.selected,
        weights=weights,
        mask=batch.mask,
      )
    found |= of_loss
    if terms.kl is not None and batch.ref_logprobs is not None:
      weights = batch.weights if batch.kl_weights is None else batch.kl_weights
      penalty, of_kl = losses.kl_loss(logprobs, batch.ref_logprobs, weights, **terms.kl)
      loss = loss + hparams["kl_coef"] * penalty
      found |= {"kl_ref": of_kl["kl"]}
    bonus, of_entropy = losses.entropy_loss(entropies, batch.weights)
    loss = loss + hparams["entropy_coef"] * bonus
    further, of_further = objective.further_terms(terms, hparams, logprobs, old_logprobs, batch)
    loss, found = loss + further, found | of_entropy | of_further
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


@functools.partial(jax.jit, static_argnums=0)
def group_advantages(options, rewards, ok, lengths=None, greedy=None, weights=None):
  """[P, G]: how each reward compares with the others of its group, by `flags.GroupAdvantage`."""
  arrays = {"where": ok, "lengths": lengths, "greedy_rewards": greedy, "weights": weights}
  return keywords.call(options, rewards=rewards, **arrays)


def make_programs(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> minibatches.Programs:
  """The compiled functions that a step calls after its rollout."""
  return setup.make_programs(config, policy, mesh, make_loss(config, policy))


def learn(
  config: Config,
  model: setup.Model,
  programs: minibatches.Programs,
  state: TrainState,
  experience: minibatches.Experience,
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[TrainState, loop.Learned]:
  """One step's updates: what GRPO does with graded samples."""
  scores, weights = experience.scores, model.weights
  batch = setup.place_responses(config, model, experience)
  with clock("logprobs"):
    old, ref = flags.needs_old(config), config.kl.coef > 0
    batch = minibatches.with_logprobs(batch, programs, weights, state, old=old, ref=ref)
  if config.advantage.name == "maxrl" and np.any(scores.rewards[scores.ok] < 0):
    least, instead = scores.rewards[scores.ok].min(), "try --advantage=group_relative"
    raise configs.ConfigError("advantage", "maxrl", f"another, for a reward of {least}", instead)
  inputs = minibatches.group_inputs(experience, flags.separate_rewards(config))
  advantages = np.asarray(group_advantages(config.advantage, *inputs))
  informative = np.any(advantages != 0, axis=1)
  batch, totals = setup.less_kl(config, batch._replace(advantages=advantages.reshape(-1)))
  if config.agents.credit == "turn":
    by_turn = credit.turn_inputs(experience)
    of_turns = [group_advantages(config.advantage, *of_turn) for of_turn in by_turn]
    batch = credit.with_turn_advantages(batch, of_turns)
    advantages, informative = minibatches.per_response(batch, scores.rewards.shape)
  hparams, trained = setup.hyperparameters(config, step, state.controls), []
  with clock("update"):
    for part in setup.minibatches(
      config, programs, batch, step, matters=informative, only=flags.policy_term_only(config)
    ):
      state, found = programs.update(state, part.batch, hparams, part.microbatches, weights.frozen)
      totals = metrics.add_metrics(totals, found)
      trained.append(part.problems)
      if setup.moved_too_far(config, found):
        break
  work = setup.step_work(model, experience, trained)
  totals |= {"frac_zero_std": minibatches.without_spread(informative, scores.ok)}
  return state, loop.Learned(totals, advantages, work)


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Trains to the end, or resumes an earlier run of the same config; returns result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=config.run.export) as run:
    if run.result:
      return run.result
    with setup.open_sampling(config, run, reference=config.kl.fixed_reference) as (model, problems):
      programs = make_programs(config, model.policy, model.mesh)
      programs = programs._replace(update=loop.announced(programs.update, run))
      init = functools.partial(init_state, optimizer=setup.make_optimizer(config.optimizer))
      begun, model = setup.begin(config, run, model, init)
      bound = functools.partial(learn, config, model, programs)
      state = setup.train_loop(
        config, run, model, begun, sample=problems.sample, learn=bound, evaluate=problems.evaluate
      )
    return setup.finish(config, run, model, state)


if __name__ == "__main__":
  configs.run(functools.partial(setup.main, train), Config, overrides=overrides)
