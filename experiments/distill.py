"""Distillation: a small model learns to write as a larger one would, along its own texts.

A reward is one number a text. A teacher says at every token how likely each token is, so a student
learns from it in far fewer texts, and no grader is needed: the task's only says how well it went. A
student that copies the teacher's texts never sees what follows its own mistakes; so the texts are
the student's own, and the teacher reads along:

  --loss=gkd_loss                     compares whole distributions: --loss.beta=0 covers all that
                                      the teacher says, 1 says nothing that it would not (GKD)
  --loss=on_policy_distillation_loss  the teacher's log-prob of each sampled token is its advantage
  --loss=minillm_advantages           the same, for all that follows: KL of whole texts (MiniLLM)

  python -m experiments.distill --teacher=DIR               SmolLM2-135M learns from another model
  python -m experiments.sft --model=tiny --task=copy --workdir=runs/teacher
  python -m experiments.distill --model=tiny --seed=1 --task=copy --teacher=runs/teacher

The teacher has the student's vocabulary, and may have any other shape. --own_share=0.5 takes the
texts of about half the steps from the task, its right answers, as GKD does. eval/reverse_kl is the
KL on the student's own responses to held-out problems, over the whole vocabulary.

Rerunning the same command resumes from the last checkpoint; so does it after Ctrl-C or a kill.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, setup
from rl_llm import evaluation, losses, rollout
from rl_llm.parallel import sharding
from rl_llm.policy import Policy
from rl_llm.rollout import given_texts
from rl_llm.rollout.collect import response_batch
from rl_llm.runs import config as configs
from rl_llm.runs import keywords, metrics
from rl_llm.training import loop, minibatches
from rl_llm.training import update as updates
from rl_llm.training.train_state import TrainState, init_state


def _example(config: Any, name: str) -> np.ndarray:
  """One token's array, as a loss takes it."""
  shape = (1, 1, 2) if name.endswith("logits") else (1, 1)
  return np.zeros(shape, bool if name == "mask" else np.float32)


Loss = keywords.keyword_group(
  "loss",
  "What the student is to have in common with its teacher; none = the default of the loss.",
  (losses.gkd_loss, losses.on_policy_distillation_loss, losses.minillm_advantages),
  shape=_example,
)


@configs.experiment
@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that defines a run."""

  run: flags.SampledRun = configs.inline(flags.SampledRun())
  model: flags.Model = configs.inline(flags.Model())
  teacher: str = configs.option("", "the model to learn from, named as for --model")
  own_share: float = configs.option(
    1.0, "share of steps whose texts are the student's own; others' are right answers", min=0, max=1
  )
  task: flags.TrainedTask = configs.inline(flags.TrainedTask())
  prompts: flags.Prompts = configs.inline(flags.Prompts())
  batches: flags.Batches = configs.inline(flags.Batches(responses_per_prompt=2))
  sampling: flags.Sampling = flags.Sampling()
  weighting: flags.TOKEN_WEIGHTINGS = configs.option(
    "token_mean", "how much each token counts, a function of rl_llm.weighting"
  )
  mesh: flags.SamplingMesh = flags.SamplingMesh()
  optimizer: flags.Optimizer = flags.Optimizer()
  eval: flags.Evaluation = flags.Evaluation()
  loss: Loss = Loss()


# Defaults for the two-layer model of random weights, where a pretrained one's do not fit.
TINY = {
  "prompts_per_step": 64,
  "max_new_tokens": 4,
  "microbatch_prompts": 64,
  "samples_every": 20,
  "checkpoint.every": 20,
  "steps": 120,
  "optimizer.learning_rate": 3e-3,
  "eval.every": 40,
}


def overrides(config: Config) -> dict[str, Any]:
  """What the model changes, unless the command line says otherwise."""
  return dict(TINY) if config.model.model == "tiny" else {}


def check(config: Config) -> None:
  """Refuses settings that do not fit together, before anything is loaded or compiled."""
  configs.check(config)
  name, count = config.loss.name, config.batches.count
  if not config.teacher:
    fix = "one with the vocabulary of --model"
    raise configs.ConfigError("teacher", "", "a model to learn from", fix)
  if config.own_share < 1 and name != "gkd_loss":
    allowed = f"1 with --loss={name}, which is about what the student samples"
    raise configs.ConfigError("own_share", config.own_share, allowed, "gkd_loss takes any text")
  if count > 1 and name == "minillm_advantages":
    allowed = "another where a step has several updates (epochs * minibatches > 1)"
    fix = "try --loss=on_policy_distillation_loss"
    raise configs.ConfigError("loss.name", name, allowed, fix)


class Teacher(NamedTuple):
  """The model that is learned from. Its weights are arguments of all that computes with them."""

  policy: Policy
  params: Any


class Programs(NamedTuple):
  """The compiled functions of a run."""

  read: Any  # (the teacher's weights, batch) -> the batch with what the teacher says of its tokens
  take: Any  # as of `minibatches.Programs`
  update: Any
  divergence: Any  # (student's weights, teacher's, batch) -> {name: KL} along its tokens


def gkd(params, batch, teacher_unembedding, *, policy: Policy, teacher: Policy, **numbers):
  """`losses.gkd_loss` along a batch whose teacher's states are known."""
  hidden = rollout.response_hidden(params, batch, policy=policy)
  return losses.chunked_gkd_loss(
    hidden,
    policy.unembed(params).astype(hidden.dtype),
    batch.teacher_hidden,
    teacher_unembedding.astype(hidden.dtype),
    batch.weights,
    softcaps=(policy.config.final_softcap, teacher.config.final_softcap),
    chunk_size=rollout.CHUNK_SIZE * policy.row_shards,
    **numbers,
  )


def make_loss(config: Config, policy: Policy, teacher: Policy):
  """The objective: one of the three, and nothing else."""
  name, temperature = config.loss.name, config.sampling.temperature

  def loss_fn(params, batch: rollout.ResponseBatch, hparams):
    numbers = hparams["loss"]
    if name == "gkd_loss":
      how = {"policy": policy, "teacher": teacher}
      loss, found = gkd(params, batch, hparams["teacher_unembedding"], **how, **numbers)
      return loss, jax.lax.stop_gradient(found)
    logprobs, _ = rollout.response_logprobs(params, batch, policy=policy, temperature=temperature)
    if name == "minillm_advantages":
      loss, found = losses.reinforce_loss(logprobs, batch.advantages, batch.weights)
    else:
      loss, found = keywords.call(
        config.loss,
        keywords=numbers,
        logprobs=logprobs,
        sampler_logprobs=batch.sampler_logprobs,
        teacher_logprobs=batch.ref_logprobs,
        weights=batch.weights,
      )
    further = logprobs - batch.ref_logprobs
    found |= {"reverse_kl": (jnp.sum(jnp.where(batch.mask, further, 0)), jnp.sum(batch.mask))}
    return loss, jax.lax.stop_gradient(found | minibatches.logprob_gap(logprobs, batch))

  return loss_fn


def make_programs(config: Config, policy: Policy, teacher: Policy, mesh: Any) -> Programs:
  """The compiled functions of a run: of the student, and of the teacher that reads its texts."""
  options, temperature = config.loss, config.sampling.temperature
  rows = policy.config.vocab_size  # The teacher's embedding may have more.
  weigh = functools.partial(
    minibatches.all_weights, name=config.weighting, length=config.prompts.max_new_tokens
  )

  @jax.jit
  def read(teacher_params, batch):
    if options.name == "gkd_loss":
      hidden = rollout.response_hidden(teacher_params, batch, policy=teacher)
      return batch._replace(teacher_hidden=hidden)
    ref, _ = rollout.response_logprobs(
      teacher_params, batch, policy=teacher, temperature=temperature
    )
    batch = batch._replace(ref_logprobs=ref)
    if options.name == "minillm_advantages":
      known = batch.sampler_logprobs, ref, batch.mask
      return batch._replace(advantages=losses.minillm_advantages(*known, **keywords.given(options)))
    return batch

  @jax.jit
  def divergence(params, teacher_params, batch):
    hidden = rollout.response_hidden(teacher_params, batch, policy=teacher)
    batch = batch._replace(teacher_hidden=hidden, **weigh(batch))
    of_teacher = teacher.unembed(teacher_params)[:rows]
    how = {"policy": policy, "teacher": teacher, "temperature": temperature}
    kinds = {"eval/forward_kl": 0.0, "eval/reverse_kl": 1.0}
    both = {name: gkd(params, batch, of_teacher, **how, beta=beta) for name, beta in kinds.items()}
    return {name: found["divergence"] for name, (_, found) in both.items()}

  optimizer, count = setup.make_optimizer(config.optimizer), config.batches.microbatches
  loss_fn = make_loss(config, policy, teacher)
  how = {"microbatches": count, "mesh": mesh, "cast": policy.cast}
  update = updates.make_update(loss_fn, optimizer, **how)
  taken = minibatches.make_programs(policy, update, temperature=temperature, weigh=weigh, mesh=mesh)
  return Programs(read, taken.take, update, divergence)


class Texts(NamedTuple):
  """The texts of a step."""

  batch: rollout.ResponseBatch  # on the host
  metrics: dict[str, Any]
  samples: list[dict[str, Any]] = []
  experience: Any = None  # from which they were sampled, if they were


def draw_texts(
  config: Config, problems: setup.Problems, params: Any, step: int, clock: metrics.PhaseClock
) -> Texts:
  """The student's responses, or right answers: which of them depends on the step alone."""
  rng = np.random.default_rng(np.random.SeedSequence([config.run.seed, step]))
  if rng.random() < config.own_share:
    found = problems.sample(params, step, clock)
    batch = response_batch(found)
    # What the grader thinks of a text, or whether it thinks, is nothing to the teacher.
    batch = batch._replace(mask=batch.attended, truncated=None)
    return Texts(batch, found.metrics | {"own_texts": 1}, found.samples, found)
  sizes = {"prompts": config.batches.prompts_per_step, "longest": config.prompts.max_new_tokens}
  batch = given_texts.answer_batch(problems.sampler, config.run.seed, step, **sizes)
  return Texts(batch, {"own_texts": 0})


def learn(
  config: Config,
  model: setup.Model,
  teacher: Teacher,
  programs: Programs,
  state: TrainState,
  texts: Texts,
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[TrainState, loop.Learned]:
  """One step's updates: what the teacher says of the texts, and the student after it."""
  size, totals, trained = config.batches, {}, []
  with clock("logprobs"):
    batch = programs.read(teacher.params, sharding.shard_rows(texts.batch, model.mesh))
    batch = jax.block_until_ready(batch)
  hparams = {"learning_rate": setup.learning_rate(config, step)}
  hparams |= {"loss": keywords.given(config.loss)}
  if config.loss.name == "minillm_advantages":
    hparams["loss"] = {}
  hparams = jax.tree.map(jnp.float32, hparams)
  if config.loss.name == "gkd_loss":
    rows = model.policy.config.vocab_size
    hparams["teacher_unembedding"] = teacher.policy.unembed(teacher.params)[:rows]
  counts = {"prompts": size.prompts_per_step, "epochs": size.epochs, "count": size.minibatches}
  order = minibatches.problem_order(config.run.seed, step, **counts)
  with clock("update"):
    for part in minibatches.minibatches(
      programs.take, batch, order, microbatch_prompts=size.microbatch_prompts
    ):
      state, found = programs.update(
        state, part.batch, hparams, part.microbatches, model.weights.frozen
      )
      totals = metrics.add_metrics(totals, found)
      trained.append(part.problems)
  work = loop.Work()
  if texts.experience is not None:
    work = setup.step_work(model, texts.experience, trained)
  return state, loop.Learned(totals, work=work)


def make_evaluate(
  config: Config, model: setup.Model, teacher: Teacher, programs: Programs, problems: setup.Problems
):
  """(params, step) -> the KL along the student's own held-out responses, and its accuracy."""
  size, seed, mesh = config.batches, config.run.seed, model.mesh
  known, sampling = problems.held_out.prompts, setup.sampling_config(config.sampling)
  prompts = [known[i % len(known)] for i in range(size.prompts_per_step)] if known else []

  def evaluate(params: Any, step: int) -> evaluation.Evaluation:
    how = {"responses": size.responses_per_prompt, "sampling": sampling}
    batch = given_texts.sampled_batch(problems.sampler, params, prompts, seed, **how)
    found = programs.divergence(params, teacher.params, sharding.shard_rows(batch, mesh))
    figures = metrics.finalize(sharding.gather_to_host(found))
    graded = problems.evaluate(params, step)
    return graded._replace(metrics=figures | graded.metrics)

  return evaluate


def train(config: Config, workdir: str) -> dict[str, Any]:
  """Trains to the end, or resumes an earlier run of the same config; returns result.json's content.

  Raises `Interrupted` with everything saved, or `Diverged` after too many skipped updates.
  """
  check(config)
  with setup.open_run(config, workdir, export=config.run.export) as run:
    if run.result:
      return run.result
    size, slots = config.batches, config.sampling.slots
    prompts, group = size.prompts_per_step, size.responses_per_prompt
    mesh = setup.open_mesh(
      config,
      per_step={"prompts_per_step": prompts},
      at_once={"microbatch_prompts": size.microbatch_prompts},
      minibatches=size.minibatches,
    )
    task = setup.load_training_task(config, prompts)
    model = setup.load_model(config, run, mesh)
    loaded = setup.load_teacher(config, run, model)
    teacher = Teacher(loaded.policy, loaded.params)
    with setup.open_problems(
      config, run, model, task, prompts=prompts, responses=group, slots=slots
    ) as problems:
      sizes = {
        "the teacher's parameters": setup.parameter_count(teacher.params),
        "problems a step": prompts,
        "responses a problem": group,
        "updates a step": size.count,
        "tokens a response, at most": config.prompts.max_new_tokens,
        "held-out problems": len(problems.held_out.problems),
        "task": f"{task.name}: {task.note}" if task.note else task.name,
      }
      setup.show_sizes(config, run, model.weights, sizes)
      programs = make_programs(config, model.policy, teacher.policy, mesh)
      programs = programs._replace(update=loop.announced(programs.update, run))
      init = functools.partial(init_state, optimizer=setup.make_optimizer(config.optimizer))
      begun, model = setup.begin(config, run, model, init)
      state = setup.train_loop(
        config,
        run,
        model,
        begun,
        sample=functools.partial(draw_texts, config, problems),
        learn=functools.partial(learn, config, model, teacher, programs),
        evaluate=make_evaluate(config, model, teacher, programs, problems),
      )
    return setup.finish(config, run, model, state)


if __name__ == "__main__":
  configs.run(functools.partial(setup.main, train), Config, overrides=overrides)
