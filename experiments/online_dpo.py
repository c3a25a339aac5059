"""Online DPO, XPO, Nash-MD and A*-PO: answer next to an opponent, and learn from who did better.

A file of preferences is about somebody else's answers. Here every step has its own: the policy and
an opponent answer the same problems, and the grader (or --reward=model:DIR) says who did better.
Who the opponent is, and what is learned from a duel, is the difference:

  --loss=dpo_loss       the policy itself: of two answers, the better one becomes likelier (online
                        DPO); duels without a winner teach nothing
  --loss=xpo_loss       the reference: the same, and what the reference writes becomes less likely
                        by --loss.alpha, which makes the policy look for something else (XPO)
  --loss=nash_md_loss   a mixture of policy and reference, --loss.mixture of it the reference: the
                        policy's answer becomes likelier as often as it wins (Nash-MD)
  --loss=astar_po_loss  the reference, whose rewards say what the best policy near it would get;
                        each answer's log-ratio is fitted to how far it is above that (A*-PO)

  python -m experiments.online_dpo                                SmolLM2-135M, 2 CPU cores
  python -m experiments.online_dpo --model=tiny --task=copy       the one-minute version
  python -m experiments.online_dpo --reward=model:runs/rm/model --loss=nash_md_loss

Nash-MD's opponent has the mean of both models' weights, not of their log-probs. A reward model
decides by sigmoid(difference), its own model of preferences, and a grader by the order alone;
--preference_scale says otherwise. `experiments.dpo` pairs the best with the worst of several
answers instead, which takes fewer updates where a grader is exact.

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import advantages, losses, rollout
from rl_llm.logprobs import sequence_logprobs
from rl_llm.parallel import sharding
from rl_llm.policy import Policy
from rl_llm.rollout import duels
from rl_llm.rollout.collect import Experience
from rl_llm.runs import config as configs
from rl_llm.runs import metrics
from rl_llm.training import loop
from rl_llm.training import update as updates
from rl_llm.training.train_state import TrainState, init_state


@dataclasses.dataclass(frozen=True)
class Loss:
  """What a duel teaches."""

  name: Literal["dpo_loss", "xpo_loss", "nash_md_loss", "astar_po_loss"] = configs.option(
    "dpo_loss", "a function of rl_llm.losses; see above"
  )
  beta: float = configs.option(0.1, "reward per nat of log-ratio to the reference", above=0)
  alpha: float = configs.option(1e-5, "XPO: strength of the bonus for exploring", above=0)
  mixture: float = configs.option(
    0.5, "Nash-MD: share of the reference in the opponent's weights", min=0, max=1
  )

  temperature: float = configs.option(
    0.5, "A*-PO: reward per nat of the best policy near the reference", above=0
  )

  def check(self, config: Any) -> None:
    """Refuses numbers that the loss does not have."""
    owners = {"alpha": "xpo_loss", "mixture": "nash_md_loss", "temperature": "astar_po_loss"}
    for name, own in owners.items():
      value = getattr(self, name)
      if value != getattr(Loss(), name) and self.name != own:
        allowed = f"left out with --loss={self.name}"
        raise configs.ConfigError(f"loss.{name}", value, allowed, f"{own} has it")


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.SampledRun = configs.inline(flags.SampledRun())
  model: flags.Model = configs.inline(flags.Model())
  task: flags.JudgedTask = configs.inline(flags.JudgedTask())
  preference_scale: float | None = configs.option(
    None, "a duel is won with sigmoid(scale * difference in reward); none = by the order, or 1 "
    "with a reward model", above=0
  )  # fmt: skip
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  pairs: flags.Duels = configs.inline(flags.Duels())
  sampling: flags.Sampling = flags.Sampling()
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer(learning_rate=1e-5)
  eval: flags.Evaluation = flags.Evaluation()
  loss: Loss = Loss()


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "steps": 120,
  "prompts_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_prompts": 64,
  "samples_every": 20,
  "checkpoint.every": 20,
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
}


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model.model == "tiny" else {}


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  if config.loss.name == "astar_po_loss" and config.preference_scale is not None:
    allowed = "left out with --loss=astar_po_loss, which compares rewards"
    raise configs.ConfigError("preference_scale", config.preference_scale, allowed)


class Batch(NamedTuple):
  """What the loss reads of P * G duels: to each problem G of the policy, then G of the other."""

  responses: rollout.ResponseBatch
  # [P * G] how likely the policy's answer is the better one; of A*-PO its optimal advantage
  outcomes: np.ndarray
  weights: np.ndarray  # [P * G] how much each duel counts


def make_loss(config: Config, policy: Policy):
  """The objective: what the duels' outcomes say of both answers' log-probs."""
  options, temperature = config.loss, config.sampling.temperature

  def loss_fn(params, batch: Batch, hparams):
    rows, outcomes, weights = batch
    logprobs, _ = rollout.response_logprobs(params, rows, policy=policy, temperature=temperature)
    of_answer = functools.partial(sequence_logprobs, mask=rows.mask)
    sides = (len(rows.prompts), 2, -1)  # Whole duels, in whatever part of the batch this is.
    answers = (of_answer(x).reshape(sides) for x in (logprobs, rows.ref_logprobs))
    (own, other), (ref_own, ref_other) = (
      (x[:, 0].reshape(-1), x[:, 1].reshape(-1)) for x in answers
    )
    if options.name in ("nash_md_loss", "astar_po_loss"):
      of_own = getattr(losses, options.name)
      loss, found = of_own(own, ref_own, outcomes, weights, beta=hparams["beta"])
    else:
      won, decided = outcomes > 0.5, weights * (outcomes != 0.5)
      chosen, rejected = jnp.where(won, own, other), jnp.where(won, other, own)
      refs = jnp.where(won, ref_own, ref_other), jnp.where(won, ref_other, ref_own)
      loss, found = losses.dpo_loss(chosen, rejected, *refs, decided, beta=hparams["beta"])
      found = {"pair_accuracy" if k == "accuracy" else k: v for k, v in found.items()}
      found |= {"preference": (jnp.sum(outcomes * (weights != 0)), jnp.sum(weights != 0))}
    if options.name == "xpo_loss":
      bonus, of_bonus = losses.xpo_loss(other, weights, alpha=hparams["alpha"])
      loss, found = loss + bonus, found | of_bonus
    return loss, jax.lax.stop_gradient(found)

  return loss_fn


class Drawn(NamedTuple):
  """The duels of a step."""

  own: Experience
  other: Experience
  metrics: dict[str, Any]
  samples: list[dict[str, Any]]


@jax.jit
def mixed(reference: Any, params: Any, share: float) -> Any:
  """Weights between two models': `share` of the reference's."""
  return jax.tree.map(lambda old, new: share * old + (1 - share) * new, reference, params)


def draw_duels(
  config: Config,
  model: setup.Model,
  problems: setup.Problems,
  params: Any,
  step: int,
  clock: metrics.PhaseClock,
) -> Drawn:
  """The policy's answers to a step's problems, and its opponent's."""
  own, opponent = problems.sample(params, step, clock), params
  if config.loss.name in ("xpo_loss", "astar_po_loss"):
    opponent = model.weights.reference
  if config.loss.name == "nash_md_loss":
    opponent = mixed(model.weights.reference, params, config.loss.mixture)
  sizes = {"sampling": setup.sampling_config(config.sampling), "parts": config.sampling.parts}
  sampler, seed = problems.sampler, config.run.seed
  other = duels.opposed(sampler, opponent, own, seed, step, clock, **sizes)
  found = own.metrics | {"opponent_reward_mean": other.metrics["reward_mean"]}
  return Drawn(own, other, found, own.samples)


def outcomes_of(
  config: Config, own: Experience, other: Experience
) -> tuple[np.ndarray, np.ndarray]:
  """[P * G] what each of the policy's answers was worth next to the other's, and which count."""
  if config.loss.name == "astar_po_loss":
    known = {"ref_where": other.scores.ok, "where": own.scores.ok}
    rewards, temperature = (own.scores.rewards, other.scores.rewards), config.loss.temperature
    found = advantages.optimal_advantage(*rewards, temperature=temperature, **known)
    counted = own.scores.ok & other.scores.ok.any(axis=1, keepdims=True)
    return np.asarray(found).reshape(-1), counted.reshape(-1)
  scale = config.preference_scale
  if scale is None and own.scores is not own.grades:
    scale = 1.0  # A reward model's rewards are logits of preferences.
  return duels.preferences(own.scores, other.scores, scale=scale)


def learn(
  config: Config,
  model: setup.Model,
  programs: tuple[Any, Any],
  state: TrainState,
  drawn: Drawn,
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[TrainState, loop.Learned]:
  """One step's update on duels."""
  score, update = programs
  outcomes, known = outcomes_of(config, drawn.own, drawn.other)
  weights = np.where(known, 1 / max(known.sum(), 1), 0).astype(np.float32)
  both = duels.duel_batch(drawn.own, drawn.other)
  rows = sharding.shard_rows(both, model.mesh)
  with clock("logprobs"):
    ref, _ = jax.block_until_ready(score(model.weights.reference, rows))
  batch = Batch(
    rows._replace(ref_logprobs=ref), *sharding.shard_rows((outcomes, weights), model.mesh)
  )
  hparams = {"learning_rate": setup.learning_rate(config, step), "beta": config.loss.beta}
  if config.loss.name == "xpo_loss":
    hparams["alpha"] = config.loss.alpha
  with clock("update"):
    hparams = jax.tree.map(jnp.float32, hparams)
    state, found = update(state, batch, hparams, config.pairs.microbatches, model.weights.frozen)
  sides = [setup.step_work(model, side, []) for side in (drawn.own, drawn.other)]
  work = loop.Work(*map(sum, zip(*sides, setup.work_on_responses(model, both), strict=True)))
  worth = outcomes if config.loss.name == "astar_po_loss" else 2 * outcomes - 1
  return state, loop.Learned(found, worth.reshape(drawn.own.scores.rewards.shape), work)


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Trains to the end, or resumes an earlier run of the same config; returns result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=config.run.export) as run:
    if run.result:
      return run.result
    size, slots = config.pairs, config.sampling.slots
    prompts, group, part = size.prompts_per_step, size.responses_per_prompt, size.microbatch_prompts
    per_step, at_once = {"prompts_per_step": prompts}, {"microbatch_prompts": part}
    mesh = setup.open_mesh(config, per_step=per_step, at_once=at_once)
    task = setup.load_training_task(config, prompts)
    model = setup.load_model(config, run, mesh, reference=True)
    further = {"slots": slots, "reward": config.task.reward, "rows_at_once": part * group}
    with setup.open_problems(
      config, run, model, task, prompts=prompts, responses=group, **further
    ) as problems:
      sizes = {
        "problems a step": prompts,
        "duels a problem": group,
        "tokens a response, at most": config.prompts.max_new_tokens,
        "held-out problems": len(problems.held_out.problems),
        "task": f"{task.name}: {task.note}" if task.note else task.name,
      }
      setup.show_sizes(config, run, model.weights, sizes)
      optimizer, loss_fn = setup.make_optimizer(config.optimizer), make_loss(config, model.policy)
      how = {"microbatches": size.microbatches, "mesh": mesh, "cast": model.policy.cast}
      update = updates.make_update(loss_fn, optimizer, **how)
      statics = {"policy": model.policy, "temperature": config.sampling.temperature}
      score = jax.jit(functools.partial(rollout.response_logprobs, **statics))
      init = functools.partial(init_state, optimizer=optimizer)
      begun, model = setup.begin(config, run, model, init)
      state = setup.train_loop(
        config,
        run,
        model,
        begun,
        sample=functools.partial(draw_duels, config, model, problems),
        learn=functools.partial(learn, config, model, (score, loop.announced(update, run))),
        evaluate=problems.evaluate,
      )
    return setup.finish(config, run, model, state)


if __name__ == "__main__":
  configs.run(functools.partial(setup.main, train), Config, overrides=overrides)
