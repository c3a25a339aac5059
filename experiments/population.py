"""GRPO with many settings in one program: learning rates, clips and seeds side by side.

An update is a pure function of arrays, and a sweep mostly changes numbers. So one `vmap` runs N
settings: each has its weights, its problems and its numbers, and all of them are sampled, graded
and updated together. Small models have separate weights; with --lora.rank each member has its own
adapters over one base, which is held in memory once and read once for all.

  python -m launch.run --sweep=SWEEP.py --backend=population

Each member writes to its own directory what `experiments.grpo` writes there, except checkpoints,
which are the population's. Its first update is the one it would have made alone, up to rounding;
after that rounding may lead to different samples, as it does between two kinds of machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import flags, grpo, setup, terms
from rl_llm import evaluation
from rl_llm.parallel import sharding
from rl_llm.policy import Policy, join
from rl_llm.rollout import CHUNK_SIZE, Rollout, collect, drawing, take_prompts
from rl_llm.rollout.collect import Sampler, response_batch
from rl_llm.runs import config as configs
from rl_llm.runs import metrics, origin
from rl_llm.runs.flops import Work
from rl_llm.runs.report import write_report
from rl_llm.runs.run_directory import opened, write_result
from rl_llm.training import loop, minibatches, population
from rl_llm.training.train_state import TrainState, init_state, parameter_count
from rl_llm.training.update import make_update

# What is data, or is done on the host before the program begins: paths, or beginnings of them.
MAY_DIFFER = (
  "workdir",
  "seed",
  "preset",
  "optimizer.learning_rate",
  "optimizer.warmup_steps",
  "kl.coef",
  "loss.",
  "advantage.",
  "weighting.",
)


@dataclasses.dataclass(frozen=True)
class Record:
  """What a population's directory says of it."""

  members: tuple[str, ...] = configs.option((), "the directories of its members, in their order")


def check(members: Sequence[grpo.Config]) -> None:
  """Refuses settings that one program cannot have.

  Raises:
    ConfigError: with the first setting that differs but must not, or that does not fit.
  """
  first, *others = map(configs.flatten, members)
  for values in others:
    for path, value in values.items():
      free = path != "loss.name" and path.startswith(MAY_DIFFER)
      # A keyword of the loss is a number for every member, or left to the loss for every member.
      if not ((value is None) == (first[path] is None) if free else value == first[path]):
        raise configs.ConfigError(
          path,
          value,
          f"{first[path]}, as in the first member of the population",
          "what changes the program must be equal: sweep it with another --backend",
        )
  seeds = {member.run.seed for member in members}
  if first["model"] == "tiny" and first["lora.rank"] and len(seeds) > 1:
    allowed = f"{first['seed']} for all, with --model=tiny and --lora.rank"
    fix = "the base that the adapters share is drawn from it"
    raise configs.ConfigError("seed", max(seeds), allowed, fix)
  mesh = {f"mesh.{name}": size for name, size in vars(flags.SamplingMesh()).items()}
  only = {"sampling.slots": 0, "sampling.parts": 1, "distributed.on": False} | mesh
  for path, allowed in only.items():
    if first[path] != allowed:
      fix = "whole members lie over the devices"
      raise configs.ConfigError(path, first[path], f"{allowed} in a population", fix)
  fix, without = "sweep it with another --backend", configs.flatten(grpo.Config())
  refused = "remax", "clip_cov_loss", "kl_cov_loss"
  for member in map(configs.flatten, members):
    for path, value in member.items():
      if path.startswith(terms.ALONE) and value != without[path] or value in refused:
        raise configs.ConfigError(path, value, "as it is by default in a population", fix)
  if first["reward_isolation"] == "batch":  # All members' responses are graded at once.
    raise configs.ConfigError("reward_isolation", "batch", "auto, sample or group in a population")


class Population(NamedTuple):
  """The members, and what they share."""

  members: Sequence[grpo.Config]
  directories: Sequence[Path]  # where each leaves its record and its result
  policy: Policy
  tokenizer: Any
  mesh: jax.sharding.Mesh  # its devices share the members out
  frozen: Any  # weights that all share; None where each has its own
  reference: Any  # the members' first weights where some member has a KL; else None

  @property
  def config(self) -> grpo.Config:
    """What is equal in all members is read from the first."""
    return self.members[0]

  def failed(self, state: TrainState) -> np.ndarray:
    """[N] which members cannot continue."""
    return sharding.gather_to_host(state.skipped_in_a_row) >= self.config.optimizer.max_skipped


def load_members(
  members: Sequence[grpo.Config], run: loop.Run, mesh: jax.sharding.Mesh
) -> tuple[setup.models.LanguageModel, Any, Any]:
  """(a model without weights, what all members share or None, the weights of each).

  Args:
    members: their configs.
    run: which says what is loaded.
    mesh: its devices share the members out, and have what is shared each.
  """
  model = setup.load_language_model(members[0], run, None)
  own = []
  for member in members:  # Only random weights depend on the seed.
    drawn = member.model.model == "tiny" and member.run.seed != members[0].run.seed
    params = setup.load_language_model(member, run, None).params if drawn else model.params
    weights = setup.split_weights(member, params)
    own.append(weights.trained)
  frozen = sharding.replicate(weights.frozen, mesh)
  return model._replace(params=None), frozen, sharding.shard_rows(population.stacked(own), mesh)


def sample(
  of: Population, sampler: Sampler, state: TrainState, step: int, clock: metrics.PhaseClock
) -> list[collect.Experience]:
  """Each member's experience of the step; all sample together."""
  prompts, group = of.config.updates.prompts_per_step, of.config.updates.responses_per_prompt
  seeds, task = [member.run.seed for member in of.members], sampler.task
  drawn = [drawing.draw_problems(task, seed, step, prompts, sampler.encode) for seed in seeds]
  found = collect.answer(
    sampler,
    state.params,
    drawing.Drawn(*(sum(parts[1:], parts[0]) for parts in zip(*drawn, strict=True))),
    jnp.concatenate([collect.step_keys(seed, step, prompts, group) for seed in seeds]),
    clock,
    responses=group,
    sampling=setup.sampling_config(of.config.sampling),
    step=step,
  )
  return collect.split_experience(found, drawn, max_reward=task.max_reward)


def learn(
  of: Population,
  programs: population.Programs,
  state: TrainState,
  each: Sequence[collect.Experience],
  step: int,
  clock: metrics.PhaseClock,
) -> tuple[TrainState, loop.Learned]:
  """One step's updates of all members: for each of them, what GRPO does alone."""
  over, size, mesh = of.failed(state), of.config.updates, of.mesh
  member_advantages = [
    np.asarray(
      grpo.group_advantages(
        member.advantage, *minibatches.group_inputs(own, flags.separate_rewards(member))
      )
    )
    for member, own in zip(of.members, each, strict=True)
  ]
  # Without a finite gradient a member's weights stay, and so does what the state says of it.
  spoiled = np.where(over, np.float32(np.nan), np.float32(0))
  hosts = [
    response_batch(own)._replace(advantages=advantages.reshape(-1) + spoil)
    for own, advantages, spoil in zip(each, member_advantages, spoiled, strict=True)
  ]
  batch = sharding.shard_rows(population.stacked(hosts), mesh)
  with clock("logprobs"):
    old = programs.logprobs(of.frozen, state.params, batch) if size.count > 1 else None
    ref = None if of.reference is None else programs.logprobs(of.frozen, of.reference, batch)
    batch = jax.block_until_ready(batch._replace(old_logprobs=old, ref_logprobs=ref))
  numbers = [setup.hyperparameters(own, step) for own in of.members]
  hparams = sharding.shard_rows(population.stacked(jax.device_get(numbers)), mesh)
  orders = [
    setup.order(member, step, matters=np.any(advantages != 0, axis=1))
    for member, advantages in zip(of.members, member_advantages, strict=True)
  ]
  totals, trained = {}, [[] for _ in of.members]
  with clock("update"):
    for shares in zip(*orders, strict=True):
      chosen = np.stack([problems for problems, _ in shares])
      used = [
        count if flags.policy_term_only(member) else len(problems)
        for member, (problems, count) in zip(of.members, shares, strict=True)
      ]
      weights = [
        setup.weigh(member)(take_prompts(own, problems))
        for member, own, problems in zip(of.members, hosts, chosen, strict=True)
      ]
      weights = jax.tree.map(lambda *rows: np.stack(rows), *weights)
      minibatch = programs.take(batch, sharding.shard_rows(chosen, mesh))._replace(
        **sharding.shard_rows(weights, mesh), truncated=None
      )
      needed = -(-max([int(over.any()), *used]) // size.microbatch_prompts)
      state, found = programs.update(state, minibatch, hparams, needed, of.frozen)
      totals = metrics.add_metrics(totals, found)
      for own, problems, count in zip(trained, chosen, used, strict=True):
        own.append(problems[:count])
  model = setup.Model(of.policy, of.tokenizer, mesh, setup.models.Weights(None, of.frozen, None))
  works = [setup.step_work(model, *pair) for pair in zip(each, trained, strict=True)]
  work = Work(*(sum(parts) for parts in zip(*works, strict=True)))  # Of all at once.
  # Of each member: `member_step` takes them apart.
  return state, loop.Learned({"totals": totals, "over": over}, member_advantages, work)


def make_record(
  of: Population,
  run: loop.Run,
  writers: Sequence[tuple[metrics.MetricsWriter, metrics.MetricsWriter]],
  record_whole: loop.Record,
) -> loop.Record:
  """The record of every member in its own directory, and of the whole."""

  def record(step: loop.Step) -> str:
    over = step.learned.metrics["over"] if step.learned else of.failed(step.state)
    means = []
    if step.learned:
      skipped = sharding.gather_to_host((step.state.skipped, step.state.skipped_in_a_row))
      failed, params, step = of.failed(step.state), step.state.params, step._replace(state=skipped)
    for number, (rows_file, lines_file) in enumerate(writers):
      rate = setup.learning_rate(of.members[number], step.number)
      own = population.member_step(step, number, learning_rate=rate)
      row, lines = loop.step_rows(own)
      means.append(row.get("reward_mean"))
      if over[number]:
        continue
      if step.learned and failed[number]:
        leaves, count = own.learned.metrics["nonfinite_leaves"], int(skipped[1][number])
        row["failure"] = loop.diagnosis(params, leaves, count)
        run.console.say(f"{of.directories[number].name} failed: {row['failure']}")
      lines_file.write(step.number, *lines)
      rows_file.write(step.number, row | step.clock.metrics())
    whole, rewards = {}, [mean for mean in means if mean is not None]
    if step.learned:
      whole = {"members": int(np.count_nonzero(~failed))}
    if rewards:
      whole |= {"reward_mean": float(np.mean(rewards)), "reward_best": max(rewards)}
    found = step.evaluation and evaluation.Evaluation(step.evaluation.metrics, [])
    learned = step.learned and step.learned._replace(metrics=whole, advantages=None)
    examples = loop.Examples([])
    return record_whole(
      step._replace(evaluation=found, state=None, experience=examples, learned=learned)
    )

  return record


def train(
  members: Sequence[grpo.Config], directories: Sequence[Path], workdir: Path
) -> dict[str, Any]:
  """Trains the members to the end, or resumes from the population's last checkpoint.

  Args:
    members: their configs.
    directories: where each member leaves its record and its result.
    workdir: the population's own directory: its checkpoints, and a record of the whole.

  Returns:
    What the population's result.json holds. A member stops when its gradients were not finite too
    often, as it would alone: it has a record, and no result.

  Raises:
    ConfigError: the settings differ in what must be equal, or a directory cannot be used.
    Interrupted: SIGINT or SIGTERM came; everything up to now is saved.
  """
  check(members)
  config = members[0]
  how = setup.precision(config.model)
  with (
    jax.default_matmul_precision(how),
    loop.open_run(
      Record(tuple(directory.name for directory in directories)),
      workdir,
      steps=config.run.steps,
      checkpoints_kept=config.run.checkpoint.keep,
      keep_best=config.run.checkpoint.best,
      copy_to=config.run.checkpoint.copy_to,
      export=config.run.export,
      new_code=config.run.code == "changed",
    ) as run,
  ):
    return run.result or _train(members, directories, run)


@contextlib.contextmanager
def open_members(of: Population, start: int) -> Iterator[list[list[metrics.MetricsWriter]]]:
  """The members' directories, for this process alone, and the two files of each one's record."""
  with contextlib.ExitStack() as stack:
    for member, directory in zip(of.members, of.directories, strict=True):
      how = {"volatile": configs.volatile(member), "steps": member.run.steps}
      how["new_code"] = member.run.code == "changed"
      stack.enter_context(opened(directory, member, doing="trains in", **how))
    yield [
      [
        stack.enter_context(metrics.MetricsWriter(directory / name, resume_step=start - 1))
        for name in ("metrics.jsonl", "samples.jsonl")
      ]
      for directory in of.directories
    ]


def say_missing(of: Population, start: int, state: Any, say: Callable[[str], Any]) -> None:
  """Names what the records of members that train on have lost of the steps before `start`."""
  for number in np.flatnonzero(~of.failed(state)) if start else ():
    for hole in origin.missing(of.directories[number], start, {}):
      name = of.directories[number].name
      say(f"{name}: {hole}: the run resumes without them, and its result says so")


def make_programs(config: grpo.Config, policy: Policy, tokenizer: Any, mesh: Any, count: int):
  """What a step of `count` members runs on the devices."""
  # Of all members on a device, as many logits exist at once as of one run alone.
  chunk_size = max(1, CHUNK_SIZE // (count // mesh.size))
  loss_fn, size = grpo.make_loss(config, policy, chunk_size=chunk_size), config.updates
  optimizer = setup.make_optimizer(config.optimizer)
  update = make_update(loss_fn, optimizer, microbatches=size.microbatches, cast=policy.cast)
  return population.make_programs(
    policy,
    tokenizer,
    update,
    mesh,
    max_new_tokens=config.prompts.max_new_tokens,
    temperature=config.sampling.temperature,
    chunk_size=chunk_size,
  )


def _train(
  members: Sequence[grpo.Config], directories: Sequence[Path], run: loop.Run
) -> dict[str, Any]:
  config, count, say = members[0], len(members), run.console.say
  mesh = sharding.make_mesh(data=math.gcd(count, jax.device_count()))
  kind = jax.devices()[0].device_kind
  say(f"loading {config.model.model} for {count} members on {mesh.size} x {kind}")
  task, size = setup.load_task(config), config.updates
  model, frozen, first = load_members(members, run, mesh)
  policy, tokenizer = model.policy, model.tokenizer
  programs = make_programs(config, policy, tokenizer, mesh, count)
  sizes = {
    "members": count,
    "parameters shared": parameter_count(frozen),
    "parameters of each": parameter_count(first) // count,
    "problems a step, each": size.prompts_per_step,
    "responses a problem": size.responses_per_prompt,
  }
  run.console.sizes(sizes | {"steps": config.run.steps, "directory": str(run.workdir)})
  init = jax.vmap(functools.partial(init_state, optimizer=setup.make_optimizer(config.optimizer)))
  begun = loop.begin(
    run, init, first, steps=config.run.steps, mesh=mesh, lay_out=population.members_over
  )
  reference = first if any(member.kl.coef for member in members) else None
  first = None
  of = Population(members, directories, policy, tokenizer, mesh, frozen, reference)
  say_missing(of, *begun, say)

  def generate(own, prompts, keys, sampling, group) -> Rollout:
    batch = sharding.shard_rows((prompts.tokens, prompts.lengths, keys, sampling), mesh)
    shape = f"{len(prompts.tokens)} prompts x {group} responses"
    with run.console.timed(f"compiling the rollout: {shape}"):
      return programs.generate(frozen, own, *batch, group)

  alone, rows = setup.Model(policy, tokenizer, None, None), size.microbatch_prompts
  rewards = {"reward": config.task.reward, "rows_at_once": rows * size.responses_per_prompt}
  with (
    open_members(of, begun[0]) as writers,
    setup.open_sampler(config, run, alone, task, **rewards) as sampler,
    setup.open_record_of(config, run, mesh, begun[0]) as record_whole,
  ):
    sampler = sampler._replace(generate=generate)
    held_out = setup.held_out_problems(config, sampler)
    evaluated = {"samples": config.eval.samples, "prompts_per_batch": size.prompts_per_step}
    state = loop.train_loop(
      run,
      *begun,
      sample=functools.partial(sample, of, sampler),
      learn=functools.partial(learn, of, programs),
      evaluate=functools.partial(population.evaluate, sampler, held_out, say, **evaluated),
      record=make_record(of, run, writers, record_whole),
      schedule=setup.schedule(config),
    )
    for number in np.flatnonzero(~of.failed(state)):
      own_run = run._replace(workdir=directories[number])
      if config.run.export:
        own = join(frozen, jax.tree.map(lambda x, number=number: x[number], state.params))
        base = config.model.model
        loop.export_model(own_run, policy.config, own, tokenizer, base=base)
      write_report(own_run.workdir)
      rows = metrics.read(own_run.workdir / "metrics.jsonl")
      write_result(own_run.workdir, loop.summary(rows))
  return loop.finish(run, checkpoints_kept=config.run.checkpoint.keep_at_end)
