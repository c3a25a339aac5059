"""What runs open before their first step, from groups of `experiments.flags`.

Functions and statics are bound here once, in NamedTuples; weights stay arguments of everything that
computes with them. Nothing here knows an algorithm: what a step learns, and from what, is in the
scripts, and how it is looped over in `rl_llm.training`.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import flags
from rl_llm import (
  data,
  evaluation,
  experience,
  flops,
  keywords,
  kl,
  sharding,
  tasks,
  tokenizers,
  training,
  update,
  weighting,
)
from rl_llm import model as models
from rl_llm import policy as policies
from rl_llm.chips import find_peak
from rl_llm.config import ConfigError, volatile
from rl_llm.data import batches, encoding, loading
from rl_llm.data.prompts import PromptTooLong
from rl_llm.interrupt import StopSignals
from rl_llm.masked import masked_mean
from rl_llm.metrics import PhaseClock
from rl_llm.rewards import RewardPool
from rl_llm.rollout import ResponseBatch, response_logprobs, take_prompts
from rl_llm.run_directory import opened
from rl_llm.sampling import SamplingConfig
from rl_llm.train_state import parameter_count


class Weights(NamedTuple):
  """The weights that a run begins with, and those that stay as they are."""

  trained: Any  # what the first state is made of
  frozen: Any  # under adapters all weights, which stay; None where all weights are trained
  reference: Any  # the model that training began with, whole; None where nothing compares with it

  def whole(self, trained: Any) -> Any:
    """The weights of a model whose trained part these are."""
    return policies.join(self.frozen, trained)


class Problems(NamedTuple):
  """Where a run's experience comes from, and what it is evaluated on."""

  # (params, step, clock) -> Experience of that step; may be interrupted
  sample: Callable[[Any, int, PhaseClock], experience.Experience]
  # (params) -> Evaluation on the held-out problems; may be interrupted
  evaluate: Callable[[Any], evaluation.Evaluation]
  held_out: experience.Drawn
  prompt_format: str  # as laid out: "chat" or "plain"


class Model(NamedTuple):
  """The model that a run trains, and where it lies."""

  policy: policies.Policy
  tokenizer: tokenizers.Tokenizer
  mesh: jax.sharding.Mesh
  weights: Weights


# A run and its end.


@contextlib.contextmanager
def open_run(config: Any, workdir: str, *, export: bool = False) -> Iterator[training.Run]:
  """Checks the config and opens the run's directory for this process alone."""
  with training.open_run(
    config,
    workdir,
    steps=config.run.steps,
    checkpoints_kept=config.run.checkpoint.keep,
    export=export,
  ) as run:
    yield run


def train_loop(
  config: Any,
  run: training.Run,
  model: Model,
  begun: tuple[int, Any],
  *,
  sample: Callable[[Any, int, PhaseClock], Any],
  learn: training.Learn,
  evaluate: Callable[[Any], evaluation.Evaluation],
) -> Any:
  """`training.train_loop` with what the config says of evaluations, checkpoints and records.

  Args:
    config: of the run.
    run: from `open_run`.
    model: whose weights are trained.
    begun: (step, state), from `begin`.
    sample: (the model's whole weights, step, clock) -> experience.
    learn: as for `training.train_loop`.
    evaluate: (the model's whole weights) -> an `Evaluation`.

  Returns:
    The last state.
  """

  def whole(state: Any) -> Any:
    return model.weights.whole(training.policy_state(state).params)

  def learn_at_a_rate(state: Any, experience: Any, step: int, clock: PhaseClock) -> Any:
    state, learned = learn(state, experience, step, clock)
    rate = {"learning_rate": learning_rate(config, step)}
    return state, learned._replace(metrics=learned.metrics | rate)

  recorded = training.open_record(
    run,
    begun[0],
    samples_every=getattr(config, "samples_every", 0),
    max_skipped=config.optimizer.max_skipped,
    peak=find_peak(list(model.mesh.devices.flat), config.model.dtype),
  )
  with recorded as record:
    return training.train_loop(
      run,
      *begun,
      sample=lambda state, step, clock: sample(whole(state), step, clock),
      learn=learn_at_a_rate,
      evaluate=lambda state: evaluate(whole(state)),
      record=record,
      schedule=training.Schedule(
        config.run.steps, config.eval.every, config.run.checkpoint.every, config.run.profile
      ),
    )


def finish(config: Any, run: training.Run, model: Model, state: Any) -> dict[str, Any]:
  """Exports the trained model if that is wanted; gives the run's result."""
  if config.export:
    whole = model.weights.whole(training.policy_state(state).params)
    training.export_model(run, model.policy.config, whole, model.tokenizer, base=config.model.model)
  return training.finish(run)


def main(
  train: Callable[[Any, str], Any], config: Any, *, model: str = "", data: str = ""
) -> int:
  """Trains in the directory that the config names, or that is named after it: the exit code."""
  name = Path(sys.modules[type(config).__module__].__file__).stem
  workdir = config.run.workdir or training.default_workdir(
    name,
    model=model or config.model.model,
    data=data or config.task.task,
    seed=config.run.seed,
  )
  return training.exit_code(
    functools.partial(train, config, workdir), distributed=config.run.distributed.joined()
  )


# The model.


def open_mesh(
  config: Any,
  *,
  per_step: dict[str, int],
  at_once: dict[str, int],
  minibatches: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """The mesh, once it is clear that the batch can be cut for it.

  Args:
    config: its group `mesh` has the sizes.
    per_step: the setting that says how much a step has, by name; each minibatch has its share.
    at_once: the setting that says how much of it is computed at once.
    minibatches: of a step.
    devices: all that JAX sees by default.

  Raises:
    ShardingError: there are not that many devices.
    ConfigError: a setting is not a multiple of the number of devices over which rows lie.
  """
  sizes = config.mesh
  mesh = sharding.make_mesh(
    data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, devices=devices
  )
  parts = sharding.row_shards(mesh)
  shares = f" in each of {minibatches} minibatches" if minibatches > 1 else ""
  for settings, multiple, where in ((per_step, parts * minibatches, shares), (at_once, parts, "")):
    for name, value in settings.items():
      if value % multiple:
        raise ConfigError(
          name,
          value,
          f"a multiple of {multiple}: rows lie over data x fsdp = {parts} devices{where}",
          f"try --{name}={-(-value // multiple) * multiple}, or a smaller --mesh.data",
        )
  return mesh


def load_model(
  config: Any,
  run: training.Run,
  mesh: jax.sharding.Mesh,
  *,
  reference: bool = False,
  without: str = "",
) -> Model:
  """The model of the groups `model` and `lora`, over the mesh.

  Args:
    config: of the run.
    run: which says what is loaded.
    mesh: from `open_mesh`.
    reference: as for `split_weights`.
    without: a part of the weights that the run has no use for.
  """
  options = config.model
  run.console.say(f"loading {options.model} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  loaded = models.load_model(
    options.model,
    seed=config.run.seed,
    dtype=jnp.dtype(options.dtype),
    remat=options.remat,
    scan_layers=options.scan_layers,
    attention=options.attention,
    mesh=mesh,
  )
  params = {name: leaf for name, leaf in loaded.params.items() if name != without}
  weights = split_weights(options.lora, params, seed=config.run.seed, reference=reference)
  return Model(loaded.policy, loaded.tokenizer, mesh, weights)


def split_weights(lora: flags.Lora, params: Any, *, seed: int, reference: bool = False) -> Weights:
  """What is trained, what stays, and what is compared with.

  Fresh adapters are a no-op, so the base weights are the reference; loaded adapters are not.

  Args:
    lora: adapters, or none.
    params: the model's.
    seed: of new adapters.
    reference: whether something compares with the model that training begins with.

  Raises:
    ConfigError: the pattern is none, no weight has such a path, or adapters are given with rank 0.
    WeightsError: the saved adapters cannot be used, or are others than the settings say.
  """
  if lora.rank == 0:
    if lora.adapter:
      raise ConfigError(
        "lora.rank", 0, f"the rank of --lora.adapter={lora.adapter}", "0 trains all weights"
      )
    return Weights(params, None, params if reference else None)
  # Another stream than that of problems and responses, which fold small numbers into the seed.
  key = jax.random.fold_in(jax.random.key(seed), 0x10A4)
  try:
    frozen, trained = policies.split_lora(
      params, key, rank=lora.rank, alpha=lora.alpha, targets=lora.targets
    )
  except (ValueError, re.error) as error:
    raise ConfigError(
      "lora.targets", lora.targets, "a pattern of weights' paths", str(error)
    ) from None
  if lora.adapter:
    trained = policies.load_adapter(lora.adapter, policies.join(frozen, trained))
    return Weights(trained, frozen, policies.join(frozen, trained) if reference else None)
  return Weights(trained, frozen, params if reference else None)


def begin(
  config: Any, run: training.Run, model: Model, init: Callable[[Any], Any]
) -> tuple[tuple[int, Any], Model]:
  """((step, state) to begin with, the model without the weights that the state has now)."""
  weights = model.weights
  begun = training.begin(run, init, weights.trained, steps=config.run.steps, mesh=model.mesh)
  return begun, model._replace(weights=weights._replace(trained=None))


def show_sizes(config: Any, run: training.Run, weights: Weights, sizes: dict[str, Any]) -> None:
  """The table of what is trained, and of the run's own sizes by name."""
  frozen = 0 if weights.frozen is None else parameter_count(weights.frozen)
  trained = parameter_count(weights.trained)
  run.console.sizes(
    {"parameters": frozen or trained, "parameters trained": trained}
    | sizes
    | {"steps": config.run.steps, "directory": str(run.workdir)}
  )


# Problems.


def load_task(group: flags.Task) -> tasks.Task | None:
  """The task, with the options of its own group of flags; None for "none"."""
  if group.task == "none":
    return None
  return tasks.load_task(
    group.task, **vars(getattr(group.families, tasks.task_family(group.task)))
  )


def make_encode(config: Any, tokenizer: Any) -> Callable[..., experience.Drawn]:
  """(problems) -> their tokens."""
  prompts = config.prompts
  return experience.make_encode(
    tokenizer,
    prompt_format=prompts.layout.prompt_format,
    system_prompt=prompts.layout.system_prompt,
    max_prompt_tokens=prompts.max_prompt_tokens,
    overlong=prompts.overlong_prompt,
  )


@contextlib.contextmanager
def open_sampler(
  config: Any,
  run: training.Run,
  model: Model,
  task: tasks.Task,
  *,
  slots: int = 0,
  reward: str = "task",
  rows_at_once: int = 0,
) -> Iterator[experience.Sampler]:
  """The sampler of a task, with its graders' processes, which end with the block.

  Args:
    config: its groups `task`, `prompts` and `mesh` are read.
    run: whose signals stop it between phases.
    model: whose functions and tokenizer; its weights are not read.
    task: from `load_task`.
    slots: responses decoded at once; 0: all.
    reward: "task" or "model:DIR", as for `experience.make_judge`.
    rows_at_once: responses that a reward model scores at once.
  """
  tokenizer, mesh = model.tokenizer, model.mesh
  generate = experience.make_generate(
    model.policy,
    tokenizer,
    max_new_tokens=config.prompts.max_new_tokens,
    slots=slots,
    say=run.console.say,
    mesh=mesh,
    gather=config.mesh.gather,
  )
  judge = experience.make_judge(reward, tokenizer, rows_per_batch=rows_at_once, mesh=mesh)
  encode = make_encode(config, tokenizer)
  with RewardPool(
    task.reward, workers=config.task.reward_workers, deadline=config.task.reward_deadline
  ) as pool:
    yield experience.Sampler(task, tokenizer, encode, generate, pool, judge, mesh, run.stop.check)


def make_problems(
  config: Any, run: training.Run, sampler: experience.Sampler, *, prompts: int, responses: int = 0
) -> Problems:
  """The problems of training and of evaluation.

  Args:
    config: of the run.
    run: which says what is evaluated.
    sampler: from `open_sampler`.
    prompts: P, problems a step and a batch of evaluation.
    responses: G, to each problem of a step; 0 where training does not sample.
  """
  held_out = experience.held_out_problems(
    sampler.task, sampler.encode, limit=config.eval.problems
  )
  if responses:  # Draw step 0's problems now, so that bad data fails before anything compiles.
    drawn = experience.draw_problems(
      sampler.task, config.run.seed, 0, prompts, sampler.encode
    )
    experience.agree_on_data(drawn.prompts)
  if held_out.overlong:
    run.console.say(f"{held_out.overlong} held-out prompts are over --max_prompt_tokens")

  def sample(params: Any, step: int, clock: PhaseClock) -> experience.Experience:
    return experience.collect(
      sampler,
      params,
      config.run.seed,
      step,
      clock,
      prompts=prompts,
      responses=responses,
      sampling=sampling_config(config.sampling),
      parts=config.sampling.parts,
    )

  def evaluate(params: Any) -> evaluation.Evaluation:
    run.console.say(f"evaluating on {len(held_out.problems)} held-out problems")
    return evaluation.evaluate(
      sampler, params, held_out, samples=config.eval.samples, prompts_per_batch=prompts
    )

  return Problems(sample, evaluate, held_out, sampler.encode.keywords["prompt_format"])


@contextlib.contextmanager
def open_problems(
  config: Any,
  run: training.Run,
  model: Model,
  task: tasks.Task | None,
  *,
  prompts: int,
  responses: int = 0,
  slots: int = 0,
) -> Iterator[Problems | None]:
  """`make_problems` of a sampler that ends with the block; None where there is no task."""
  model = model._replace(weights=None)  # The caller frees them once a state has taken over.
  if task is None:
    yield None
    return
  with open_sampler(config, run, model, task, slots=slots) as sampler:
    yield make_problems(config, run, sampler, prompts=prompts, responses=responses)


@contextlib.contextmanager
def open_sampling(
  config: Any, run: training.Run, *, reference: bool
) -> Iterator[tuple[Model, Problems]]:
  """All of the above for a run whose every step samples, with the groups of its config.

  Args:
    config: of the run.
    run: from `open_run`.
    reference: whether something compares with the model that training begins with.
  """
  size = config.updates
  mesh = open_mesh(
    config,
    per_step={"prompts_per_step": size.prompts_per_step},
    at_once={"microbatch_prompts": size.microbatch_prompts},
    minibatches=size.minibatches,
  )
  task = load_task(config.task)
  model = load_model(config, run, mesh, reference=reference)
  opened = [model]  # Not by name: the caller frees the first weights once a state has taken over.
  with open_sampler(
    config,
    run,
    model._replace(weights=None),
    task,
    slots=config.sampling.slots,
    reward=config.reward,
    rows_at_once=size.microbatch_prompts * size.responses_per_prompt,
  ) as sampler:
    problems = make_problems(
      config, run, sampler, prompts=size.prompts_per_step, responses=size.responses_per_prompt
    )
    sizes = {
      "problems a step": size.prompts_per_step,
      "responses a problem": size.responses_per_prompt,
      "updates a step": size.count,
      "problems a microbatch": size.prompts_per_step // size.minibatches // size.microbatches,
      "tokens a response, at most": config.prompts.max_new_tokens,
      "held-out problems": len(problems.held_out.problems),
      "task": f"{task.name}: {task.note}" if task.note else task.name,
      "prompt format": problems.prompt_format,
    }
    show_sizes(config, run, model.weights, sizes)
    del model
    yield opened.pop(), problems


def sampling_config(options: Any) -> SamplingConfig:
  """What the sampler needs to know of a group `sampling`."""
  return SamplingConfig(
    options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    min_new_tokens=options.min_new_tokens,
  )


# Files of examples.


def read_data(config: Any, *formats: str) -> data.Dataset:
  """The rows of --data, which must be of one of these formats."""
  return loading.read_examples(config.data.data, formats=formats, strict=config.data.strict)


def prompt_format(layout: flags.Layout, tokenizer: tokenizers.Tokenizer) -> str:
  """"chat" or "plain": "auto" takes the model's chat template, if it has one."""
  if layout.prompt_format != "auto":
    return layout.prompt_format
  return "chat" if tokenizer.chat_template else "plain"


def load_data(
  config: Any,
  run: training.Run,
  dataset: data.Dataset,
  *,
  encode: Callable[[Any], Any],
  limit_all: Callable[..., encoding.Limited],
) -> loading.Loaded:
  """The rows as tokens, to train on and held out; all processes have the same.

  Args:
    config: its group `data` is read.
    run: whose signals stop it.
    dataset: from `read_data`.
    encode: an example's tokens, `encoding.encode` or `encode_pair` with its settings.
    limit_all: `encoding.limit_sequences` or `limit_pairs`.
  """
  options = config.data
  loaded = loading.load_sequences(
    options.data,
    dataset,
    encode=encode,
    limit_all=limit_all,
    limit=options.max_tokens,
    overlong=options.overlong,
    strict=options.strict,
    held_out_fraction=options.held_out_fraction,
    check=run.stop.check,
  )
  sequences = flat(loaded.training + loaded.held_out)
  experience.agree_on_data(sequence.tokens for sequence in sequences)
  return loaded


def load_pairs(
  config: Any,
  run: training.Run,
  dataset: data.Dataset,
  tokenizer: tokenizers.Tokenizer,
  layout: flags.Layout,
) -> loading.Loaded:
  """`load_data` of preference pairs."""
  encode = functools.partial(
    encoding.encode_pair,
    tokenizer=tokenizer,
    prompt_format=prompt_format(layout, tokenizer),
    system_prompt=layout.system_prompt,
  )
  return load_data(config, run, dataset, encode=encode, limit_all=encoding.limit_pairs)


def check_packing(config: Any, mesh: jax.sharding.Mesh) -> None:
  """Refuses packed answers over several devices: both of a pair may lie on different ones."""
  packing, shards = config.data.packing, sharding.row_shards(mesh)
  if packing and shards > 1:
    raise ConfigError("packing", packing, f"0 where rows lie over {shards} devices")


def flat(examples: Sequence[Any]) -> list[encoding.Encoded]:
  """The sequences of examples, in the order of a batch's rows: of a pair, both."""
  return [
    sequence
    for example in examples
    for sequence in (example if isinstance(example, encoding.Pair) else [example])
  ]


def step_indices(config: Any, count: int, step: int, *, size: int) -> np.ndarray:
  """Which of `count` examples a step of `size` takes."""
  return batches.batch_indices(count, batch_size=size, seed=config.run.seed, step=step)


def text_work(model: Model, examples: Sequence[Any], *, predicts: bool = True) -> flops.Work:
  """What an update on whole texts trained on."""
  passes = flops.update_passes(adapters=model.weights.frozen is not None)
  return flops.text_work(model.policy.config, flat(examples), passes=passes, predicts=predicts)


# Updates.


def adamw(options: flags.Optimizer) -> optax.GradientTransformation:
  """The optimiser that the flags describe, without its learning rate."""
  return update.make_optimizer(
    b1=options.b1,
    b2=options.b2,
    eps=options.eps,
    weight_decay=options.weight_decay,
    max_grad_norm=options.max_grad_norm,
    mu_dtype=jnp.dtype(options.mu_dtype),
  )


def learning_rate(config: Any, step: int) -> float:
  """The learning rate of a step."""
  options = config.optimizer
  return update.learning_rate_at(
    step,
    peak=options.learning_rate,
    schedule=options.schedule,
    warmup_steps=options.warmup_steps,
    total_steps=config.run.steps,
  )


def announced(update: Callable, run: training.Run) -> Callable:
  """The update, which says when it meets a new width, since it is compiled then."""
  say = functools.cache(run.console.say)

  def announced_update(state: Any, batch: Any, *further: Any) -> Any:
    width = max(mask.shape[1] for mask in jax.tree.leaves(batch) if mask.dtype == bool)
    say(f"compiling the update: rows of up to {width} tokens")
    return update(state, batch, *further)

  return announced_update


class Programs(NamedTuple):
  """What a step runs on the devices besides its rollout; weights are always arguments."""

  logprobs: Callable  # (params, batch) -> log-probs and entropies [B, T]
  take: Callable  # (batch, chosen problems) -> the minibatch with its weights
  update: Callable  # (state, minibatch, hparams, microbatches used, frozen) -> (state, metrics)


def make_programs(
  config: Any,
  policy: policies.Policy,
  mesh: jax.sharding.Mesh | None,
  loss_fn: update.LossFn,
  optimizer: optax.GradientTransformation | None = None,
) -> Programs:
  """The programs of a policy that is trained on responses; each compiles when it is called.

  Args:
    config: its groups `updates`, `sampling`, `weighting` and `optimizer` are read.
    policy: the model's functions.
    mesh: from `open_mesh`; None where there is one device.
    loss_fn: (params, batch, hparams) -> (loss, metrics).
    optimizer: None: `adamw` of the config.
  """
  optimizer = adamw(config.optimizer) if optimizer is None else optimizer
  temperature = config.sampling.temperature
  return Programs(
    jax.jit(functools.partial(response_logprobs, policy=policy, temperature=temperature)),
    make_take(config, mesh),
    update.make_update(loss_fn, optimizer, microbatches=config.updates.microbatches, mesh=mesh),
  )


def with_logprobs(
  programs: Programs, weights: Weights, state: Any, batch: ResponseBatch, *, old: bool, ref: bool
) -> ResponseBatch:
  """The batch with the log-probs that are compared with, each a pass over all responses.

  Args:
    programs: whose `logprobs` is called.
    weights: the reference among them.
    state: before the step's updates.
    batch: on the devices.
    old: whether the step has several updates: in the first, the policy is the old one itself.
    ref: whether something compares with the reference.
  """
  if old:
    params = weights.whole(training.policy_state(state).params)
    batch = batch._replace(old_logprobs=programs.logprobs(params, batch)[0])
  if ref:
    batch = batch._replace(ref_logprobs=programs.logprobs(weights.reference, batch)[0])
  return jax.block_until_ready(batch)


def hyperparameters(config: Any, step: int, **further: float) -> dict[str, Any]:
  """The numbers that a step's updates are computed with: data, so none compiles anew."""
  numbers = {
    "learning_rate": learning_rate(config, step),
    "loss": keywords.given(config.loss),
    "entropy_coef": config.loss.entropy_coef,
  }
  return jax.tree.map(jnp.float32, numbers | further)


def make_take(
  config: Any, mesh: jax.sharding.Mesh | None
) -> Callable[[ResponseBatch, Any], ResponseBatch]:
  """(batch, chosen problems) -> their rows, with the weights of one update's tokens; jitted."""

  @jax.jit
  def take(batch: ResponseBatch, chosen: Any) -> ResponseBatch:
    taken = take_prompts(batch, chosen)
    taken = taken._replace(weights=token_weights(config, taken), truncated=None)
    return taken if mesh is None else sharding.constrain_rows(taken, mesh)

  return take


class Minibatch(NamedTuple):
  """The responses of one update."""

  batch: ResponseBatch  # with the weights of its tokens
  microbatches: int  # how many of its microbatches are computed; the rest adds nothing
  problems: np.ndarray  # the problems whose responses these are


def minibatches(
  config: Any,
  take: Callable[[ResponseBatch, Any], ResponseBatch],
  batch: ResponseBatch,
  step: int,
  *,
  matters: np.ndarray | None = None,
  only: bool = False,
) -> Iterator[Minibatch]:
  """A step's responses, shared out to its updates.

  Args:
    config: of the run; its group `updates` says how many there are.
    take: from `make_take`.
    batch: on the devices, whole.
    step: of the run.
    matters: [P] bool, False = the policy term of these problems' responses is 0: they come last.
    only: whether nothing but the policy term counts, so that they are left out.
  """
  size = config.updates
  for chosen, used in experience.minibatches(
    config.run.seed,
    step,
    prompts=size.prompts_per_step,
    epochs=size.epochs,
    count=size.minibatches,
    matters=matters,
  ):
    used = used if only else len(chosen)
    computed = -(-used // size.microbatch_prompts)
    yield Minibatch(take(batch, chosen), computed, chosen[:used])


def response_work(
  model: Model, found: experience.Experience, trained: Sequence[np.ndarray], *, towers: int = 0
) -> flops.Work:
  """What a step sampled and trained on; `trained`: the problems of each of its updates."""
  return flops.response_work(
    model.policy.config,
    found.prompts.lengths,
    found.rollout.lengths,
    np.sum(experience.response_batch(found).mask, axis=1),
    trained,
    passes=flops.update_passes(adapters=model.weights.frozen is not None),
    towers=towers,
  )


@functools.partial(jax.jit, static_argnames="value")
def reward_kl(batch: ResponseBatch, *, value: str) -> tuple[jax.Array, dict[str, tuple]]:
  """The KL as a part of the reward: [B, T], and the metric "kl_ref"; 0 without a reference.

  Of the sampler's log-probs, which are the policy's: a reward has no gradient.
  """
  if batch.ref_logprobs is None:
    return jnp.zeros_like(batch.sampler_logprobs), {}
  estimate = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[value]
  prices = estimate(batch.sampler_logprobs, batch.ref_logprobs)
  prices = jnp.where(batch.mask, prices, 0)
  return prices, {"kl_ref": (jnp.sum(prices), jnp.sum(batch.mask))}


def per_response(batch: ResponseBatch, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """[P, G] means of advantages per token, and [P] which problems have any that is not 0."""
  means, any_of = sharding.fetch(_per_response(batch.advantages, batch.mask))
  return means.reshape(shape), np.any(any_of.reshape(shape), axis=1)


@jax.jit
def _per_response(per_token: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  return masked_mean(per_token, mask, axis=1), jnp.any(per_token != 0, axis=1)


def logprob_gap(logprobs: jax.Array, batch: ResponseBatch) -> dict[str, tuple]:
  """How far the trainer's log-probs are from the sampler's: a metric of every policy loss."""
  gap = jnp.where(batch.mask, jnp.abs(logprobs - batch.sampler_logprobs), 0.0)
  return {"logprob_gap_mean": (jnp.sum(gap), jnp.sum(batch.mask))}


def token_weights(config: Any, batch: ResponseBatch) -> jax.Array:
  """[B, T] how much each token of an update counts, by the group `weighting`."""
  options, keywords = config.weighting, {}
  if options.name == "constant_length":
    keywords = {"length": options.length or config.prompts.max_new_tokens}
  elif options.name == "prompt_mean":
    keywords = {"group_size": len(batch.tokens) // len(batch.prompts)}
  weights = getattr(weighting, options.name)(batch.mask, **keywords)
  if options.drop_truncated:
    weights = weights * weighting.drop_truncated(batch.mask, batch.truncated)
  return weights


# Responses that nothing is trained on.


def run_name(model: str) -> str:
  """The model; of one that a run exported, the run's directory, whose name says more."""
  path = Path(model)
  return str(path.parent) if path.name == "model" and path.parent.name else model


@contextlib.contextmanager
def open_record(
  config: Any, workdir: str, problems: Sequence[tasks.Problem]
) -> Iterator[training.Run]:
  """Opens the directory in which responses to these problems are kept, for this process alone."""
  rounds = -(-len(problems) // config.responses.prompts_per_batch)
  with StopSignals() as stop, training.open_console(rounds) as console:
    with opened(Path(workdir), config, volatile=volatile(config), doing="writes to"):
      yield training.Run(Path(workdir), console, stop)


def record_responses(
  config: Any,
  run: training.Run,
  task: tasks.Task,
  problems: Sequence[tasks.Problem],
  *,
  temperatures: Sequence[float],
  describe: Callable[[tasks.Problem, int, dict[str, Any]], dict[str, Any]],
) -> tuple[experience.Drawn, str]:
  """Writes the responses that are not on record yet: samples.jsonl, then metrics.jsonl.

  Args:
    config: its groups `run`, `model`, `responses`, `task`, `prompts` and `mesh` are read.
    run: from `open_record`.
    task: whose grader is asked.
    problems: what the model is asked.
    temperatures: one a response to each problem; 0 is greedy.
    describe: as for `evaluation.record_responses`.

  Returns:
    The problems that fit, and how they were laid out: "chat" or "plain".

  Raises:
    PromptTooLong: none fits.
  """
  options, size = config.responses, config.responses.prompts_per_batch
  mesh = open_mesh(config, per_step={"prompts_per_batch": size}, at_once={})
  name, dtype = config.model.model, jnp.dtype(config.model.dtype)
  run.console.say(f"loading {name} on {mesh.size} x {mesh.devices.flat[0].device_kind}")
  policy, params, tokenizer = models.load_model(
    name, seed=config.run.seed, dtype=dtype, mesh=mesh
  )
  model = Model(policy, tokenizer, mesh, Weights(None, None, None))
  with open_sampler(config, run, model, task, slots=options.slots) as sampler:
    drawn = sampler.encode(problems)
    if not drawn.problems:
      limit = config.prompts.max_prompt_tokens
      raise PromptTooLong(
        f"all {drawn.overlong} prompts are over --max_prompt_tokens={limit}; raise it"
      )
    experience.agree_on_data(drawn.prompts)
    evaluation.record_responses(
      run,
      sampler,
      params,
      drawn,
      SamplingConfig(np.asarray(temperatures), top_k=options.top_k, top_p=options.top_p),
      seed=config.run.seed,
      prompts_per_batch=size,
      describe=describe,
    )
  return drawn, sampler.encode.keywords["prompt_format"]
