"""GRPO with many settings in one program: learning rates, clips and seeds side by side.

An update is a pure function of arrays, and what a sweep changes most is numbers. So N settings are
one `vmap` away from one: each has its weights, its problems and its numbers, and all of them are
sampled, graded and updated together. Small models have their own weights each; with --lora.rank the
members have adapters of their own over one base, which is in memory once and is read once for all.

  python -m launch.run --sweep=SWEEP.py --backend=population

Each member leaves in its own directory what `experiments.grpo` leaves there, checkpoints aside,
which are the population's. Its first update is the one it would have made alone, up to rounding;
after that rounding may lead to other samples, as it does between two kinds of machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from experiments import grpo
from experiments.options import SamplingMesh, adamw, sampling_config, split_weights
from rl_llm.chips import find_peak
from rl_llm.config import ConfigError, flatten, option
from rl_llm.data.prompts import PromptBatch
from rl_llm.evaluation import Evaluation, evaluate
from rl_llm.experience import (
  Drawn,
  Generate,
  answer,
  draw_problems,
  held_out_problems,
  make_encode,
  make_judge,
  split_experience,
  step_keys,
)
from rl_llm.flops import Work, response_work, update_passes
from rl_llm.metrics import MetricsWriter, PhaseClock, add_metrics, read
from rl_llm.model import LanguageModel, load_model
from rl_llm.policy import Policy, join, population_policy
from rl_llm.report import write_report
from rl_llm.rewards import RewardPool
from rl_llm.rollout import CHUNK_SIZE, Rollout, generate, response_logprobs
from rl_llm.run_directory import opened, write_result
from rl_llm.sharding import ROWS, everywhere, fetch, make_mesh, place_rows, row_sharding
from rl_llm.tokenizers import Tokenizer
from rl_llm.train_state import TrainState, init_state, parameter_count
from rl_llm.training import (
  Run,
  Step,
  begin,
  export_model,
  failure_of,
  finish,
  start_run,
  summary,
  train_loop,
)
from rl_llm.update import LossFn, make_update

# What is data, or is done on the host before the program begins: paths, or beginnings of them.
MAY_DIFFER = (
  "workdir", "seed", "preset", "optimizer.learning_rate", "optimizer.warmup_steps", "kl.coef",
  "loss.", "advantage.", "weighting.",
)


@dataclasses.dataclass(frozen=True)
class Record:
  """What a population's directory says of it."""

  members: tuple[str, ...] = option((), "the directories of its members, in their order")


def check(configs: Sequence[grpo.Config]) -> None:
  """Refuses settings that one program cannot have.

  Raises:
    ConfigError: with the first setting that differs but must not, or that does not fit.
  """
  first, *others = map(flatten, configs)
  for values in others:
    for path, value in values.items():
      free = path != "loss.name" and path.startswith(MAY_DIFFER)
      # A keyword of the loss is a number for every member, or left to the loss for every member.
      same = (value is None) == (first[path] is None) if free else value == first[path]
      if not same:
        raise ConfigError(
          path,
          value,
          f"{first[path]}, as in the first member of the population",
          "what changes the program must be equal: sweep it with another --backend",
        )
  config = configs[0]
  seeds = {config.seed for config in configs}
  if config.model == "tiny" and config.lora.rank and len(seeds) > 1:
    raise ConfigError(
      "seed",
      max(seeds),
      f"{config.seed} for all, with --model=tiny and --lora.rank",
      "the base that the adapters share is drawn from it",
    )
  for path, value, allowed in (
    ("sampling.slots", config.sampling.slots, 0),
    ("sampling.parts", config.sampling.parts, 1),
    ("distributed.on", config.distributed.on, False),
    *((f"mesh.{name}", getattr(config.mesh, name), size)
      for name, size in dataclasses.asdict(SamplingMesh()).items()),
  ):
    if value != allowed:
      raise ConfigError(
        path, value, f"{allowed} in a population", "whole members lie over the devices"
      )


def train(
  configs: Sequence[grpo.Config], directories: Sequence[Path], workdir: Path
) -> dict[str, Any]:
  """Trains the members to the end, or goes on from the population's last checkpoint.

  Args:
    configs: of the members.
    directories: where each member leaves its record and its result.
    workdir: the population's own directory: its checkpoints, and a record of the whole.

  Returns:
    What the population's result.json holds. A member whose gradients were not finite too often
    ends there, as it would alone: it has a record, and no result.

  Raises:
    ConfigError: the settings differ in what must be equal, or a directory cannot be used.
    Interrupted: SIGINT or SIGTERM came; everything up to now is saved.
  """
  check(configs)
  return start_run(
    functools.partial(_train, configs, directories),
    Record(tuple(directory.name for directory in directories)),
    workdir,
    steps=configs[0].steps,
    volatile=(),
    checkpoints_kept=configs[0].checkpoint.keep,
    export=configs[0].export,
  )


def _train(
  configs: Sequence[grpo.Config], directories: Sequence[Path], run: Run
) -> dict[str, Any]:
  say, stop, config, count = run.console.say, run.stop, configs[0], len(configs)
  mesh = make_mesh(data=math.gcd(count, jax.device_count()))
  say(f"loading {config.model} for {count} members on {mesh.size} x {jax.devices()[0].device_kind}")
  task = grpo.make_task(config)
  model, frozen, first = load_members(configs, mesh)
  policy, tokenizer = model.policy, model.tokenizer
  model = model._replace(params=None)
  encode = make_encode(
    tokenizer,
    prompt_format=config.prompt_format,
    system_prompt=config.system_prompt,
    max_prompt_tokens=config.max_prompt_tokens,
    overlong=config.overlong_prompt,
  )
  held_out = held_out_problems(task, encode, limit=config.eval.problems)
  judge = make_judge(
    config.reward,
    tokenizer,
    rows_per_batch=config.microbatch_prompts * config.responses_per_prompt,
  )
  programs = make_programs(config, policy, tokenizer, mesh, members_at_once=count // mesh.size)
  announce = functools.cache(say)
  run.console.sizes(
    {
      "members": count,
      "parameters shared": parameter_count(frozen),
      "parameters of each": parameter_count(first) // count,
      "problems a step, each": config.prompts_per_step,
      "responses a problem": config.responses_per_prompt,
      "steps": config.steps,
      "directory": str(run.workdir),
    }
  )
  start, state = begin(
    run,
    jax.vmap(functools.partial(init_state, optimizer=adamw(config.optimizer))),
    first,
    steps=config.steps,
    mesh=mesh,
    lay_out=members_over,
  )
  reference = first if any(member.kl.coef for member in configs) else None
  first = None
  several_updates = config.epochs * config.minibatches > 1
  pool = RewardPool(task.reward, workers=config.reward_workers, deadline=config.reward_deadline)
  evaluations: list[Evaluation] = []  # of the step at hand, until its lines are written

  def sample(own, prompts, keys, sampling, group) -> Rollout:
    announce(f"compiling the rollout: {len(prompts.tokens)} prompts x {group} responses")
    batch = place_rows((prompts.tokens, prompts.lengths, keys, sampling), mesh)
    return programs.generate(frozen, own, *batch, group)

  def evaluate_state(state: TrainState) -> Evaluation:
    say(f"evaluating {count} members on {len(held_out.problems)} held-out problems")
    generates = in_turns(functools.partial(sample, state.params), count)
    evaluations[:] = [
      evaluate(
        None,
        held_out,
        generate=generate_own,
        pool=pool,
        tokenizer=tokenizer,
        samples=config.eval.samples,
        prompts_per_batch=config.prompts_per_step,
        max_reward=task.max_reward,
        check=stop.check,
      )
      for generate_own in generates
    ]
    rows = {}
    for name in ("sampled", "greedy"):
      found = [each.metrics[f"eval/{name}_accuracy"] for each in evaluations]
      say(f"held-out accuracy, {name}: from {min(found):.2f} to {max(found):.2f}")
      rows |= {f"eval/{name}_mean": float(np.mean(found)), f"eval/{name}_best": max(found)}
    return Evaluation(rows, [])

  def failed(state: TrainState) -> np.ndarray:
    """[N] which members cannot go on."""
    return fetch(state.skipped_in_a_row) >= config.optimizer.max_skipped

  def take_step(state: TrainState, step: int, clock: PhaseClock) -> Step:
    over = failed(state)
    drawn = [
      draw_problems(task, member.seed, step, config.prompts_per_step, encode) for member in configs
    ]
    together = Drawn(*(sum(parts[1:], parts[0]) for parts in zip(*drawn, strict=True)))
    experience = answer(
      state.params,
      together,
      jnp.concatenate(
        [
          step_keys(member.seed, step, config.prompts_per_step, config.responses_per_prompt)
          for member in configs
        ]
      ),
      responses_per_prompt=config.responses_per_prompt,
      sampling=sampling_config(config.sampling),
      generate=sample,
      pool=pool,
      tokenizer=tokenizer,
      judge=judge,
      clock=clock,
      check=stop.check,
    )
    each = split_experience(experience, drawn)
    worths = [grpo.group_advantages(*pair) for pair in zip(configs, each, strict=True)]
    batches = [grpo.make_batch(*pair) for pair in zip(each, worths, strict=True)]
    with clock("logprobs"):
      scored = [
        np.stack([batch[key] for batch in batches])
        for key in ("prompts", "prompt_lengths", "tokens", "mask")
      ]
      scored = place_rows(scored, mesh)
      weights = {"old_logprobs": state.params} if several_updates else {}
      weights |= {"ref_logprobs": reference} if reference is not None else {}
      for key, own in weights.items():
        for batch, logprobs in zip(
          batches, fetch(programs.logprobs(frozen, own, *scored)), strict=True
        ):
          batch[key] = logprobs
    stop.check()
    for number in np.flatnonzero(over):
      # Without a finite gradient its weights stay, and so does what the state says of it.
      batches[number]["advantages"] = np.full_like(batches[number]["advantages"], np.nan)
    hparams = stacked(jax.device_get([grpo.hyperparameters(member, step) for member in configs]))
    hparams = place_rows(hparams, mesh)
    announce(f"compiling the update: responses of up to {batches[0]['mask'].shape[1]} tokens")
    totals, learned = {}, [[] for _ in configs]
    deals = [
      grpo.deal(member, step, np.any(worth != 0, axis=1))
      for member, worth in zip(configs, worths, strict=True)
    ]
    with clock("update"):
      for dealt in zip(*deals, strict=True):
        minibatch = stacked(
          [
            grpo.take_minibatch(member, batch, chosen)
            for member, batch, (chosen, _) in zip(configs, batches, dealt, strict=True)
          ]
        )
        minibatch = place_rows(minibatch, mesh)
        needed = max([int(over.any()), *(needed for _, needed in dealt)])
        microbatches = -(-needed // config.microbatch_prompts)
        state, metrics = programs.update(state, minibatch, hparams, microbatches, frozen)
        totals = add_metrics(totals, fetch(metrics))
        for of_one, (chosen, needed) in zip(learned, dealt, strict=True):
          of_one.append(chosen[:needed])
    skipped, reasons = fetch(state.skipped), {}
    rows = [
      grpo.step_row(
        member,
        step,
        {key: (total[number], weight[number]) for key, (total, weight) in totals.items()},
        each[number],
        worths[number],
        skipped=int(skipped[number]),
        max_reward=task.max_reward,
      )
      for number, member in enumerate(configs)
    ]
    for number in np.flatnonzero(failed(state) & ~over):
      own_state, own_batch, own_hparams = jax.tree.map(
        lambda x, number=number: x[number], (state, minibatch, hparams)
      )
      reasons[number] = failure_of(
        programs.loss_fn,
        own_state,
        own_batch,
        own_hparams,
        max_skipped=config.optimizer.max_skipped,
        frozen=frozen,
      )
      say(f"{directories[number].name} failed: {reasons[number]}")
    for number in np.flatnonzero(~over):
      found = evaluations[number] if evaluations else Evaluation({}, [])
      trained = grpo.step_samples(each[number], worths[number], max_reward=task.max_reward)
      writers[number][1].write(step, *found.rows, *trained)
      reason = {"failure": reasons[number]} if number in reasons else {}
      writers[number][0].write(step, found.metrics | rows[number] | reason | clock.metrics())
    evaluations.clear()
    rewards = [row["reward_mean"] for row in rows if row["reward_mean"] is not None]
    whole = {"members": int(np.count_nonzero(~failed(state)))}
    if rewards:
      whole |= {"reward_mean": float(np.mean(rewards)), "reward_best": max(rewards)}
    works = [
      response_work(
        policy.config,
        own.prompts.lengths,
        own.rollout.lengths,
        np.sum(batch["mask"], axis=1),
        of_one,
        passes=update_passes(adapters=frozen is not None),
      )
      for own, batch, of_one in zip(each, batches, learned, strict=True)
    ]
    work = Work(*(sum(parts) for parts in zip(*works, strict=True)))  # Of all at once.
    return Step(state, whole, work=work)

  with contextlib.ExitStack() as stack:
    for member, directory in zip(configs, directories, strict=True):
      volatile = grpo.volatile(member)
      stack.enter_context(opened(directory, member, volatile=volatile, doing="trains in"))
    stack.enter_context(pool)
    writers = [
      [
        stack.enter_context(MetricsWriter(directory / name, resume_step=start - 1))
        for name in ("metrics.jsonl", "samples.jsonl")
      ]
      for directory in directories
    ]
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
    over = failed(state)
    last = read(run.workdir / "metrics.jsonl")[-1]
    times = {key: value for key, value in last.items() if key.startswith("time/")}
    for number in np.flatnonzero(~over):
      found, directory = evaluations[number], directories[number]
      writers[number][1].write(config.steps, *found.rows)
      writers[number][0].write(config.steps, found.metrics | times)
      if config.export:
        own = jax.tree.map(lambda x, number=number: x[number], state.params)
        own_run = run._replace(workdir=directory)
        export_model(own_run, policy.config, join(frozen, own), tokenizer, base=config.model)
      write_report(directory)
      write_result(directory, summary(read(directory / "metrics.jsonl")))
  return finish(run)


class Programs(NamedTuple):
  """What runs on the devices, for all members at once."""

  # (frozen, own, prompts [N * P, L], lengths, keys [N * P * G], sampling, G)
  #   -> Rollout of N * P * G rows
  generate: Callable[..., Rollout]
  # (frozen, own, prompts [N, P, L], lengths, tokens [N, B, T], mask) -> log-probs [N, B, T]
  logprobs: Callable[..., jax.Array]
  # (state, batch, hparams, microbatches, frozen) -> (state, metrics): `make_update`'s, with the
  # members first in all arrays but `frozen`
  update: Callable[..., tuple[TrainState, dict]]
  loss_fn: LossFn  # of one member


def make_programs(
  config: grpo.Config,
  policy: Policy,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
  *,
  members_at_once: int,
) -> Programs:
  """The functions of one member's step, mapped over members; each device has whole ones.

  Args:
    config: of any member: what its programs are made of is the same in all.
    policy: the model's functions.
    tokenizer: which knows what ends a response.
    mesh: its devices share the members out.
    members_at_once: on each device, whose logits exist at the same time.
  """
  sampler, members, shared = population_policy(policy), PartitionSpec(ROWS), PartitionSpec()
  on_each = functools.partial(jax.shard_map, mesh=mesh, out_specs=members, check_vma=False)
  chunk_size = max(1, CHUNK_SIZE // members_at_once)
  loss_fn = grpo.make_loss(config, policy, chunk_size=chunk_size)
  update_one = make_update(
    loss_fn,
    adamw(config.optimizer),
    microbatches=max(
      1, config.prompts_per_step // config.minibatches // config.microbatch_prompts
    ),
  )

  @functools.partial(jax.jit, static_argnums=6)
  def generate_all(frozen, own, prompts, lengths, keys, sampling, group):
    def of_device(frozen, own, *batch):
      return generate(
        (frozen, own),
        *batch,
        policy=sampler,
        responses_per_prompt=group,
        max_new_tokens=config.max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
      )

    program = on_each(of_device, in_specs=(shared, *[members] * 5))
    return program(frozen, own, prompts, lengths, keys, sampling)

  @jax.jit
  def logprobs(frozen, own, *batch):
    def of_one(frozen, own, *batch):
      return response_logprobs(
        join(frozen, own),
        *batch,
        policy=policy,
        temperature=config.sampling.temperature,
        chunk_size=chunk_size,
      )[0]

    of_device = jax.vmap(of_one, in_axes=(None, *[0] * 5))
    return on_each(of_device, in_specs=(shared, *[members] * 5))(frozen, own, *batch)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch, hparams, microbatches, frozen):
    of_device = jax.vmap(update_one, in_axes=(0, 0, 0, None, None))
    specs = (*[members] * 3, shared, shared)
    return on_each(of_device, in_specs=specs)(state, batch, hparams, microbatches, frozen)

  return Programs(generate_all, logprobs, update, loss_fn)


def load_members(
  configs: Sequence[grpo.Config], mesh: jax.sharding.Mesh
) -> tuple[LanguageModel, Any, Any]:
  """(model, what all members share or None, the weights of each, members first).

  Args:
    configs: of the members.
    mesh: its devices share the members out, and have what is shared each.
  """

  def load(config: grpo.Config) -> LanguageModel:
    return load_model(
      config.model,
      seed=config.seed,
      dtype=jnp.dtype(config.dtype),
      remat=config.remat,
      scan_layers=config.scan_layers,
      attention=config.attention,
    )

  model = load(configs[0])
  own = []
  for config in configs:  # Only random weights depend on the seed.
    drawn = config.model == "tiny" and config.seed != configs[0].seed
    params = load(config).params if drawn else model.params
    frozen, trained = split_weights(config.lora, params, seed=config.seed)
    own.append(trained)
  return model, everywhere(frozen, mesh), place_rows(stacked(own), mesh)


def in_turns(sample: Generate, count: int) -> list[Generate]:
  """A function that generates for each of `count` members, all of which will be asked the same.

  Members are evaluated one after another, each on the same problems with the same keys. The first
  to ask has all of them answer; the others read what they have said.

  Args:
    sample: (None, prompts of all members, ...) -> their responses, the first member's first.
    count: N.
  """
  said: list[Rollout] = []

  def of_member(number: int) -> Generate:
    calls = itertools.count()

    def generate_own(params, prompts, keys, sampling, group):
      call = next(calls)
      if call == len(said):
        tiled = PromptBatch(*(np.concatenate([x] * count) for x in prompts))
        temperature = jnp.tile(sampling.temperature, count)
        sampling = dataclasses.replace(sampling, temperature=temperature)
        said.append(fetch(sample(tiled, jnp.concatenate([keys] * count), sampling, group)))
      size = len(keys)
      return Rollout(*(x[number * size : (number + 1) * size] for x in said[call]))

    return generate_own

  return [of_member(number) for number in range(count)]


def stacked(trees: Sequence[Any]) -> Any:
  """One tree, with a new first axis, on the host where its leaves are there."""
  return jax.tree.map(lambda *x: (jnp if isinstance(x[0], jax.Array) else np).stack(x), *trees)


def members_over(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of which the first axis is the members', with their layout."""
  layout = row_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)
