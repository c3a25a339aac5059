"""REINFORCE: make what was rewarded likelier, in proportion to how far it beat a baseline.

It only needs a grader. The baseline of a reward removes noise without changing the objective:

  --advantage=plain              nothing: the reward itself
  moving_average                 the mean reward of the steps before, a number in the state
  leave_one_out                  RLOO: the mean of the other responses to the same problem
  reinforce_plus_plus            REINFORCE++: the whole batch's mean and spread
  reinforce_plus_plus_baseline   its group's mean, then the whole batch's spread
  optimal_token_baseline         each token's own, of the least variance; takes two passes more
  track_values                   SPO: how often the problem was solved before; needs one response
  role_baseline                  RAE: the mean reward before of its role, a column of the problems

  python -m experiments.reinforce                           SmolLM2-135M learns to add, 2 CPU cores
  python -m experiments.reinforce --epochs=2 --loss=ppo_loss     several updates need a ratio

The KL to the reference is part of the reward here, token by token; --kl.place=loss moves it.
Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.

Measured with the first command, --prompts_per_step=12, seeds 0, 1 and 2, on 2 cores, and the
question "What is {a} {op} {b}? Reply with just the number.": of 100 held-out sums, right at
temperature 1 from 0.20 to 0.92, 0.95 and 0.93, greedily from 0.69 to 0.91, 0.95 and 0.92; 16 s a
step, 350 to 480 s with evaluations.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import advantages as estimators
from rl_llm import losses
from rl_llm.policy import Policy
from rl_llm.rollout import ResponseBatch, response_logprobs
from rl_llm.runs import config as configs
from rl_llm.runs import keywords, metrics
from rl_llm.training import credit, loop, minibatches, objective, trackers
from rl_llm.training.train_state import TrainState, init_state


class State(NamedTuple):
  """What a checkpoint holds."""

  policy: TrainState
  baseline: jax.Array  # float32 scalar, the decayed sum of the mean rewards of the steps before
  weight: jax.Array  # float32 scalar, the same sum of ones: their quotient is the moving average
  tracked: Any = None  # the table of `rl_llm.training.trackers`, for baselines that have one


def init_reinforce(params, *, optimizer, options: flags.Baseline) -> State:
  """The state before the first step."""
  tracked = trackers.first(options.name, options.rows)
  return State(init_state(params, optimizer), jnp.zeros(()), jnp.zeros(()), tracked)


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.SampledRun = configs.inline(flags.SampledRun())
  model: flags.Model = configs.inline(flags.Model())
  task: flags.RewardedTask = configs.inline(flags.RewardedTask())
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  agents: flags.Environments = configs.inline(flags.Environments())
  updates: flags.Updates = configs.inline(flags.Updates())
  sampling: flags.Sampling = flags.Sampling()
  weighting: flags.Weighting = flags.Weighting()
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer()
  eval: flags.Evaluation = flags.Evaluation()
  preset: flags.PRESETS = flags.preset("weighting and loss")
  advantage: flags.Baseline = flags.Baseline()
  loss: flags.PolicyLoss = flags.PolicyLoss(name="reinforce_loss")
  kl: flags.KL = flags.KL(place="reward", value="k1")


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "prompts_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_prompts": 64,
  "samples_every": 20,
  "checkpoint.every": 20,
  "steps": 120,
  "loss.entropy_coef": 3e-3,  # Advantages are not scaled here: GRPO's 0.1 would outweigh them.
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
}


def overrides(config: Config) -> dict[str, Any]:
  """What the model and the preset change, unless the command line says otherwise."""
  own = (TINY if config.model.model == "tiny" else {}) | flags.of_episodes(config)
  return own | flags.recipe(config.preset, "weighting", "loss")


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)


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
def token_advantages(options: flags.Baseline, rewards, ok, mask, kl, kl_coef, baseline):
  """[B, T]: the rewards [P, G], less the KL [B, T], compared with what the flags say."""
  if options.name == "leave_one_out":
    total = rewards - kl_coef * jnp.sum(kl, axis=1).reshape(rewards.shape)
    return jnp.where(mask, estimators.leave_one_out(total, where=ok).reshape(-1, 1), 0)
  if options.name == "reinforce_plus_plus_baseline":
    rewards = estimators.group_relative(rewards, scale="none", where=ok)
  if options.name in trackers.NAMES:
    rewards = trackers.compared(options.name, rewards, ok, baseline)
  per_token = estimators.token_rewards(rewards.reshape(-1), mask, kl=kl, kl_coef=kl_coef)
  if options.name.startswith("reinforce_plus_plus"):
    found = estimators.reinforce_plus_plus(per_token, mask, discount=options.discount)
  else:
    found = estimators.discounted_returns(per_token, mask, discount=options.discount)
    found -= baseline if options.name == "moving_average" else 0
  return jnp.where(mask, found, 0)


def make_programs(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> minibatches.Programs:
  """The compiled functions that a step calls after its rollout."""
  return setup.make_programs(config, policy, mesh, make_loss(config, policy))


def learn(
  config: Config,
  model: setup.Model,
  programs: minibatches.Programs,
  state: State,
  experience: minibatches.Experience,
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[State, loop.Learned]:
  """One step's updates: what REINFORCE does with graded samples."""
  scores, weights = experience.scores, model.weights
  policy, trained = state.policy, []
  batch = setup.place_responses(config, model, experience)
  with clock("logprobs"):
    old, ref = flags.needs_old(config), config.kl.coef > 0
    batch = minibatches.with_logprobs(batch, programs, weights, policy, old=old, ref=ref)
  baseline = float(state.baseline / state.weight) if state.weight else 0.0
  if (tracked := state.tracked) is not None:
    problems, column = experience.drawn.problems, config.advantage.role
    known = trackers.rows_of(problems, config.advantage.rows, column=column)
    baseline = trackers.baselines(tracked, known)
  kl, totals = setup.reward_kl(config, batch)
  per_token = token_advantages(
    config.advantage, scores.rewards, scores.ok, batch.mask, kl, config.kl.coef, baseline
  )
  if config.advantage.name == "optimal_token_baseline":
    given = weights.whole(policy.params), batch, per_token
    how = {"temperature": config.sampling.temperature, "group_size": scores.rewards.shape[1]}
    per_token = credit.less_optimal_baseline(*given, policy=model.policy, **how)
  batch = batch._replace(advantages=per_token)
  advantages, informative = minibatches.per_response(batch, scores.rewards.shape)
  hparams = setup.hyperparameters(config, step, policy.controls)
  with clock("update"):
    for part in setup.minibatches(
      config, programs, batch, step, matters=informative, only=flags.policy_term_only(config)
    ):
      policy, found = programs.update(
        policy, part.batch, hparams, part.microbatches, weights.frozen
      )
      totals = metrics.add_metrics(totals, found)
      trained.append(part.problems)
      if setup.moved_too_far(config, found):
        break
  work = setup.step_work(model, experience, trained)
  reward = np.mean(scores.rewards[scores.ok]) if scores.ok.any() else baseline
  decay = config.advantage.decay
  averages = decay * state.baseline + (1 - decay) * reward, decay * state.weight + (1 - decay)
  totals |= {"baseline": float(np.mean(baseline))}
  if tracked is not None:
    after = programs.logprobs(weights.whole(policy.params), batch)[0]
    moved = metrics.finalize(jax.device_get(minibatches.logprob_gap(after, batch)))
    how = {"moved": moved["logprob_gap_mean"] or 0.0, "decay": decay}
    tracked = trackers.remembered(tracked, known, scores.rewards, scores.ok, **how)
  return State(policy, *averages, tracked), loop.Learned(totals, advantages, work)


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
      optimizer, options = setup.make_optimizer(config.optimizer), config.advantage
      init = functools.partial(init_reinforce, optimizer=optimizer, options=options)
      begun, model = setup.begin(config, run, model, init)
      bound = functools.partial(learn, config, model, programs)
      state = setup.train_loop(
        config, run, model, begun, sample=problems.sample, learn=bound, evaluate=problems.evaluate
      )
    return setup.finish(config, run, model, state)


if __name__ == "__main__":
  configs.run(functools.partial(setup.main, train), Config, overrides=overrides)
