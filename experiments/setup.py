"""Builds what runs need before their first step, from groups of `experiments.flags`.

Functions and statics are bound here once, in NamedTuples; weights stay arguments of everything that
computes with them. Nothing here is specific to an algorithm: the scripts say what a step learns and
from what, and `rl_llm.training.loop` runs the steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import agents, flags
from rl_llm import evaluation, policy, tasks
from rl_llm.data import Dataset, encoding, loading
from rl_llm.errors import ConfigError
from rl_llm.parallel import sharding
from rl_llm.policy import load as models
from rl_llm.rewards import InProcess, RewardPool, RewardSource, Several, describe
from rl_llm.rollout import ResponseBatch, collect, drawing, episodes, judge, refill, shaping, turns
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs import chips, code, compile_cache, keywords
from rl_llm.runs.config import changed, volatile
from rl_llm.runs.flops import Work, response_work, text_work, update_passes
from rl_llm.runs.identity import find_run, json_object
from rl_llm.runs.metrics import PhaseClock
from rl_llm.runs.run_directory import Run, default_workdir, found_workdir, opened
from rl_llm.runs.trained import checkpoint_of, load_trained, restore_part
from rl_llm.tasks.environments.problems import default_task
from rl_llm.text.conversations import resolve_format
from rl_llm.text.tokenizers import Tokenizer, vocabulary
from rl_llm.training import control, credit, loop, objective, reference_cache, spikes, update
from rl_llm.training import minibatches as responses
from rl_llm.training.train_state import parameter_count

SELECTION = 2**32 - 1  # Stands where a problem's number does in the keys of a step's samples.


class Model(NamedTuple):
  """The model that a run trains, and where it lies."""

  policy: policy.Policy
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  weights: models.Weights


class Problems(NamedTuple):
  """Where a run's experience comes from, and what it is evaluated on."""

  # (the model's weights, step, clock) -> the step's Experience; may be interrupted
  sample: Callable[[Any, int, PhaseClock], collect.Experience]
  # (the model's weights, step) -> Evaluation on the held-out problems; may be interrupted
  evaluate: Callable[[Any, int], evaluation.Evaluation]
  held_out: drawing.Drawn
  prompt_format: str  # as laid out: "chat" or "plain"
  sampler: collect.Sampler | None = None


# A run and its end.


def main(
  train: Callable[[Any, str], Any], config: Any, *, model: str = "", data: str = "", file: str = ""
) -> int:
  """Trains in the directory that the config names, or that is named after it: the exit code.

  It is named after the model, and after the `data`, the data `file`, or else the task.
  """
  name = code.experiment(type(config))[0].removeprefix("experiments.")
  model, data = model or config.model.model, data or Path(file).name or agents.data_name(config)
  base = functools.partial(default_workdir, name, model=model, data=data, seed=config.run.seed)
  workdir = config.run.workdir or found_workdir(config, base(changed=changed(config)), base())
  distributed = config.run.distributed.joined()
  with compile_cache.kept(config.run.compile_cache):
    return loop.exit_code(functools.partial(train, config, workdir), distributed=distributed)


@contextlib.contextmanager
def open_run(config: Any, workdir: str, *, export: bool = False) -> Iterator[Run]:
  """The run's directory, opened for this process alone while a `with` lasts."""
  sizes = {"steps": config.run.steps, "checkpoints_kept": config.run.checkpoint.keep}
  sizes |= {"keep_best": config.run.checkpoint.best, "copy_to": config.run.checkpoint.copy_to}
  sizes["new_code"] = config.run.code == "changed"
  with jax.default_matmul_precision(precision(config.model)):
    with loop.open_run(config, workdir, export=export, **sizes) as run:
      yield run


def precision(options: flags.Weights, platform: str | None = None) -> str | None:
  """How float32 is multiplied; None for the platform: that of this machine's devices."""
  platform = platform or jax.default_backend()
  return chips.matmul_precision(options.matmul_precision, options.dtype, platform)


def begin(
  config: Any, run: Run, model: Model, init: Callable[[Any], Any]
) -> tuple[tuple[int, Any], Model]:
  """((step, state) to begin with, the model without the weights that the state has now)."""
  weights, steering = model.weights, flags.steering(config)

  def begin_with(trained: Any) -> Any:
    state, own = init(trained), {}
    if steering != control.Steering():
      own["controls"] = control.init_controls(steering, coef=config.loss.entropy_coef)
    if flags.moving_reference(config):
      own["reference"] = jax.tree.map(jnp.copy, loop.policy_state(state).params)
    return loop.with_policy(state, **own) if own else state

  steps, mesh = config.run.steps, model.mesh
  step, state = loop.begin(run, begin_with, weights.trained, steps=steps, mesh=mesh)
  if config.run.init_moments and not step:
    state = with_moments(config, state)
  return (step, state), model._replace(weights=weights._replace(trained=None))


def with_moments(config: Any, state: Any) -> Any:
  """The state, its policy with the optimizer's moments of the run that it begins with."""
  run, setting = config.run.init_from, "init_from"
  own, (directory, step) = loop.policy_state(state), checkpoint_of(run, setting=setting)
  moments = restore_part(directory, step, "opt_state", own.opt_state)
  return loop.with_policy(state, opt_state=moments)


def train_loop(
  config: Any,
  run: Run,
  model: Model,
  begun: tuple[int, Any],
  *,
  sample: Callable[[Any, int, PhaseClock], Any],
  learn: loop.Learn,
  evaluate: Callable[[Any, int], evaluation.Evaluation],
) -> Any:
  """`training.train_loop` with what the config says of evaluations, checkpoints and records.

  `sample` and `evaluate` are given the model's whole weights, `learn` the state. Every record has
  the learning rate. Gives the last state.
  """

  def whole(state: Any) -> Any:
    return model.weights.whole(loop.policy_state(state).params)

  steering, moving = flags.steering(config), flags.moving_reference(config)

  def learn_at_a_rate(state: Any, drawn: Any, step: int, clock: PhaseClock) -> Any:
    rate, entropy = {"learning_rate": learning_rate(config, step)}, drawn.metrics.get("entropy")
    if steering.scheduled:
      rate["entropy_coef"] = entropy_coef(config, step)
    if (controls := loop.policy_state(state).controls) is not None:
      controls = control.before_updates(steering, controls, entropy)
      state = loop.with_policy(state, controls=controls)
      rate |= {name: float(value) for name, value in steered(config, controls).items()}
      # Copies: the updates donate what is in the state.
      controls = jax.tree.map(jnp.copy, control.after_updates(steering, controls, entropy))
    state, learned = learn(state, drawn, step, clock)
    if controls is not None:
      state = loop.with_policy(state, controls=controls)
    if moving and (step + 1) % moving.refresh == 0:
      policy = loop.policy_state(state)
      fresh = update.moved_towards(policy.reference, policy.params, keep=moving.keep)
      state = loop.with_policy(state, reference=fresh)
    return state, learned._replace(metrics=learned.metrics | rate)

  with open_record_of(config, run, model.mesh, begun[0]) as record:
    return loop.train_loop(
      run,
      *begun,
      sample=lambda state, step, clock: sample(whole(state), step, clock),
      learn=learn_at_a_rate,
      evaluate=lambda state, step: evaluate(whole(state), step),
      record=record,
      schedule=schedule(config),
    )


def schedule(config: Any) -> loop.Schedule:
  """When the run evaluates, saves and traces."""
  run = config.run
  return loop.Schedule(run.steps, config.eval.every, run.checkpoint.every, run.profile)


def open_record_of(config: Any, run: Run, mesh: jax.sharding.Mesh, start: int) -> Any:
  """The record of a run that begins or resumes with this step, open while a `with` lasts."""
  how, dtype = precision(config.model), config.model.dtype
  peak = chips.find_peak(list(mesh.devices.flat), dtype, precision=how)
  how = {"max_skipped": config.optimizer.max_skipped, "peak": peak, "track": config.run.track}
  return loop.open_record(run, start, samples_every=getattr(config.run, "samples_every", 0), **how)


def finish(config: Any, run: Run, model: Model, state: Any) -> dict[str, Any]:
  """Exports the trained model if that is wanted; gives the run's result."""
  if config.run.export:
    whole = model.weights.whole(loop.policy_state(state).params)
    loop.export_model(run, model.policy.config, whole, model.tokenizer, base=config.model.model)
  return loop.finish(run, checkpoints_kept=config.run.checkpoint.keep_at_end)


# The model.


def open_mesh(
  config: Any,
  *,
  per_step: dict[str, int],
  at_once: dict[str, int],
  minibatches: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """The mesh, after a check that it can divide the batch: `per_step` names the setting that
  says how much a step has, `at_once` how much of it is computed at once."""
  sizes = config.mesh
  mesh = sharding.make_mesh(data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor, devices=devices)
  sharding.check_rows(mesh, per_step, minibatches=minibatches)
  sharding.check_rows(mesh, at_once)
  return mesh


def open_pair_mesh(config: Any) -> jax.sharding.Mesh:
  """The mesh of a run on preference pairs."""
  size = config.pairs
  at_once = {"microbatch_pairs": size.microbatch_pairs}
  mesh = open_mesh(config, per_step={"pairs_per_step": size.pairs_per_step}, at_once=at_once)
  if config.data.packing and sharding.row_shards(mesh) > 1:
    # Both answers of a pair may lie on different devices.
    allowed = f"0 where rows lie over {sharding.row_shards(mesh)} devices"
    raise ConfigError("packing", config.data.packing, allowed)
  return mesh


def load_language_model(
  config: Any, run: Run, mesh: jax.sharding.Mesh | None
) -> models.LanguageModel:
  """The model that the group `model` names, over the mesh; None: on the first device."""
  options, say = config.model, run.console.say
  if mesh is not None:
    how = f", matmul precision {found}" if (found := precision(options)) else ""
    kind = mesh.devices.flat[0].device_kind
    say(f"loading {options.model} on {mesh.size} x {kind}, {options.dtype}{how}")
  load = _loader(config, run, mesh)
  if begun := getattr(config.run, "init_from", ""):
    name = json_object(checkpoint_of(begun, setting="init_from")[0] / "config.json")["model"]
    if name != options.model:
      raise ConfigError("model", options.model, f"{name}, as in {begun}")
  if begun or find_run(options.model):
    trained, setting = begun or options.model, "init_from" if begun else "model"
    return load_trained(trained, lambda name, seed: load(name, seed=seed), setting=setting)
  return load(options.model)


def _loader(
  config: Any, run: Run, mesh: jax.sharding.Mesh | None
) -> Callable[..., models.LanguageModel]:
  """`load_model` with what the group `model` says of any model."""
  options, names = config.model, ("remat", "scan_layers", "attention", "fetch")
  further = {name: getattr(options, name) for name in names if hasattr(options, name)}
  further |= {"seed": config.run.seed, "dtype": jnp.dtype(options.dtype), "mesh": mesh}
  return functools.partial(models.load_model, say=run.console.say, **further)


def load_teacher(config: Any, run: Run, student: Model) -> models.LanguageModel:
  """The model that the setting `teacher` names, over the student's mesh.

  Raises:
    ConfigError: it has not the student's vocabulary, so that its ids mean other texts.
  """
  name, load = config.teacher, _loader(config, run, student.mesh)
  run.console.say(f"loading the teacher, {name}")
  if find_run(name):
    teacher = load_trained(name, lambda own, seed: load(own, seed=seed), setting="teacher")
  else:
    teacher = load(name)
  rows, own = teacher.policy.config.vocab_size, student.policy.config.vocab_size
  same = vocabulary(teacher.tokenizer) == vocabulary(student.tokenizer)
  if not same or rows < own:
    allowed = f"a model with the vocabulary of {config.model.model}, whose ids it is to read"
    fix = f"its embedding has {rows} rows, fewer than {own}" if same else "the tokenizers differ"
    raise ConfigError("teacher", name, allowed, fix)
  return teacher


def load_model(
  config: Any, run: Run, mesh: jax.sharding.Mesh, *, reference: bool = False, without: str = ""
) -> Model:
  """The model to train; `without` a part of its weights that the run does not use."""
  loaded = load_language_model(config, run, mesh)
  params = {name: leaf for name, leaf in loaded.params.items() if name != without}
  weights = split_weights(config, params, reference=reference)
  return Model(loaded.policy, loaded.tokenizer, mesh, weights)


def split_weights(config: Any, params: Any, *, reference: bool = False) -> models.Weights:
  """Splits these weights, by the group `lora`, into the trained, the frozen and the reference."""
  lora = vars(config.model.lora)
  return models.split_weights(params, **lora, seed=config.run.seed, reference=reference)


def show_sizes(config: Any, run: Run, weights: models.Weights, sizes: dict[str, Any]) -> None:
  """The table of what is trained, and of the run's own sizes by name."""
  trained = parameter_count(weights.trained)
  whole = trained if weights.frozen is None else parameter_count(weights.frozen)
  counts = {"parameters": whole, "parameters trained": trained}
  rest = {"steps": config.run.steps, "directory": str(run.workdir)}
  run.console.sizes(counts | sizes | rest)


# Problems.


def load_task(config: Any) -> tasks.Task | None:
  """The task with its own options, and held-out problems if the run evaluates; None for "none"."""
  if (group := config.task).task == "none":
    return None
  if group.task == agents.OWN_TASK and hasattr(config, "agents"):
    task = default_task(agents.load(config.agents))
  else:
    family = tasks.task_family(group.task)
    options = vars(getattr(group.families, family)) if family else {}
    reward = getattr(group, "reward", "task")
    if family == "jsonl" and not options["reward_file"] and reward == "task":
      reward = agents.reward_instead(config)
    task = tasks.load_task(group.task, group.reward_isolation, reward, **options)
  if hasattr(config, "eval") and config.eval.every:
    tasks.check_held_out(task, otherwise="--eval.every=0")
  return task


def load_training_task(config: Any, size: int) -> tasks.Task | None:
  """`load_task` of what is trained on, `size` problems a step; in laps, if the config says so."""
  task = load_task(config)
  return tasks.in_laps(task, size) if task and config.task.laps else task


def open_grader(group: flags.Task, task: tasks.Task, say: Callable[[str], None]) -> Any:
  """The processes of a task's grader, or graders; or the function, if it is of this process."""
  if isinstance(task.reward, RewardSource) or callable(task.reward):
    return _open_one(group, task.reward, say)
  once, named = functools.cache(say), [term[:2] for term, _ in task.reward]
  with contextlib.ExitStack() as opened:  # One that does not open ends those before it.
    graders = [opened.enter_context(_open_one(group, each, once)) for _, each in task.reward]
    opened.pop_all()
  return Several(graders, named)


def _open_one(group: flags.Task, source: Any, say: Callable[[str], None]) -> Any:
  """The processes of one grader, or the function in this process."""
  if callable(source):
    say("rewards come from a function in this process: nothing isolates it, and it has no deadline")
    return InProcess(source, unit=group.reward_isolation)
  pool = RewardPool(
    source._replace(files=group.reward_files),
    workers=group.reward_workers,
    deadline=group.reward_deadline,
    allow_weak_sandbox=group.reward_sandbox == "weak",
  )
  say(describe(pool.active_layers()))
  return pool


@contextlib.contextmanager
def open_sampler(
  config: Any,
  run: Run,
  model: Model,
  task: tasks.Task,
  *,
  slots: int = 0,
  reward: str = "task",
  rows_at_once: int = 0,
) -> Iterator[collect.Sampler]:
  """The sampler of a task, with its graders' processes, which end with the block.

  `reward` and `rows_at_once` are as for `judge.make_judge`, `slots` as for `make_generate`.
  """
  policy, tokenizer, mesh, _ = model
  model, prompts, group = None, config.prompts, config.task  # The opener frees its weights.
  longest, told = prompts.max_new_tokens, {"say": run.console.say, "timed": run.console.timed}
  how = told | {"mesh": mesh, "gather": config.mesh.gather}
  generate = collect.make_generate(policy, tokenizer, max_new_tokens=longest, slots=slots, **how)
  make_begin = functools.partial(turns.make_begin, policy, tokenizer, turn_tokens=longest, **how)
  encode = drawing.make_encode(
    tokenizer,
    prompt_format=prompts.layout.prompt_format,
    system_prompt=prompts.layout.system_prompt,
    max_prompt_tokens=prompts.max_prompt_tokens,
    overlong=prompts.overlong_prompt,
  )
  judged = judge.make_judge(reward, tokenizer, rows_per_batch=rows_at_once, mesh=mesh)
  played = agents.opened(
    getattr(config, "agents", None),
    tokenizer,
    make_begin,
    prompt_format=encode.keywords["prompt_format"],
    weak=group.reward_sandbox == "weak",
  )
  with open_grader(group, task, run.console.say) as pool, played as episodic:
    further, steps = (pool, judged, mesh, run.stop.check), getattr(config.run, "steps", 1)
    yield collect.Sampler(task, tokenizer, encode, generate, *further, steps, episodic)


def held_out_problems(config: Any, sampler: collect.Sampler) -> drawing.Drawn:
  """What the run is evaluated on; nothing in a run without evaluation."""
  if not config.eval.every:
    return drawing.Drawn([], [], 0)
  return drawing.held_out_problems(sampler.task, sampler.encode, limit=config.eval.problems)


@contextlib.contextmanager
def open_problems(
  config: Any,
  run: Run,
  model: Model,
  task: tasks.Task | None,
  *,
  prompts: int,
  responses: int = 0,
  **further: Any,
) -> Iterator[Problems | None]:
  """The problems of training and of evaluation while the block lasts; None without a task.

  Args:
    config, run, model, task, further: as for `open_sampler`.
    prompts: P, problems a step and a batch of evaluation.
    responses: G, to each problem of a step; 0 where training does not sample.
  """
  model, seed = model._replace(weights=None), config.run.seed
  if task is None:
    yield None
    return
  with open_sampler(config, run, model, task, **further) as sampler:
    held_out = held_out_problems(config, sampler)
    if responses:  # Draw step 0's problems now, so that bad data fails before anything compiles.
      drawn = drawing.draw_problems(task, seed, 0, prompts, sampler.encode)
      drawing.assert_same_data(drawn.prompts)
    if held_out.overlong:
      run.console.say(f"{held_out.overlong} held-out prompts are over --max_prompt_tokens")

    shape = flags.shape_of(config)

    def sample(params: Any, step: int, clock: PhaseClock) -> collect.Experience:
      sampling, parts = sampling_config(config.sampling), config.sampling.parts
      sizes = {"prompts": prompts, "responses": responses, "parts": parts, "sampling": sampling}
      if sampler.episodic is not None:
        found = episodes.collect_episodes(sampler, params, seed, step, clock, **sizes)
      elif (dynamic := getattr(config.task, "dynamic", None)) and dynamic.groups == "informative":
        sizes["max_rounds"] = dynamic.max_rounds
        found = refill.collect_informative(sampler, params, seed, step, clock, **sizes)
      else:
        found = collect.collect(sampler, params, seed, step, clock, **sizes)
      of_step = {"seed": seed, "step": step, "sampling": sampling}
      return shaping.shaped(sampler, params, found, clock, shape, **of_step)

    def evaluate(params: Any, step: int) -> evaluation.Evaluation:
      run.console.say(f"evaluating on {len(held_out.problems)} held-out problems")
      sizes = {"samples": config.eval.samples, "prompts_per_batch": prompts}
      return evaluation.evaluate(sampler, params, held_out, step=step, **sizes)

    how = sampler.encode.keywords["prompt_format"]
    yield Problems(sample, evaluate, held_out, how, sampler)


@contextlib.contextmanager
def open_sampling(config: Any, run: Run, *, reference: bool) -> Iterator[tuple[Model, Problems]]:
  """Model and problems of a run whose every step samples; `reference` as for `split_weights`."""
  size, slots = config.updates, config.sampling.slots
  prompts, part, group = size.prompts_per_step, size.microbatch_prompts, size.responses_per_prompt
  mesh = open_mesh(
    config,
    per_step={"prompts_per_step": prompts},
    at_once={"microbatch_prompts": part},
    minibatches=size.minibatches,
  )
  task = load_training_task(config, prompts)
  model = load_model(config, run, mesh, reference=reference)
  rewards = {"reward": config.task.reward, "rows_at_once": part * group}
  with open_problems(
    config, run, model, task, prompts=prompts, responses=group, slots=slots, **rewards
  ) as problems:
    sizes = {
      "problems a step": prompts,
      "responses a problem": group,
      "updates a step": size.count,
      "problems a microbatch": prompts // size.minibatches // size.microbatches,
      "tokens a response, at most": config.prompts.max_new_tokens,
      "held-out problems": len(problems.held_out.problems),
      "task": f"{task.name}: {task.note}" if task.note else task.name,
      "prompt format": problems.prompt_format,
    }
    show_sizes(config, run, model.weights, sizes)
    given = [model]
    del model  # Whoever opened it frees its weights once a state has taken them over.
    yield given.pop(), problems


def sampling_config(options: Any) -> SamplingConfig:
  """What the sampler needs to know of a group `sampling`."""
  names = ("temperature", "top_k", "top_p", "min_new_tokens")
  return SamplingConfig(**{name: getattr(options, name) for name in names})


# Files of examples.


def read_data(config: Any, *formats: str) -> Dataset:
  """The rows of --data, which must be of one of these formats."""
  options, strict = config.data, config.data.data_errors == "strict"
  how = {"format": options.data_format, "strict": strict, "max_rows": options.max_rows}
  return loading.read_examples(options.data, formats=formats, **how)


def load_data(
  config: Any, run: Run, model: Model, dataset: Dataset, encode: Callable, limit_all: Callable
) -> loading.Loaded:
  """The rows as tokens, to train on and held out; the same in all processes.

  `encode` is `encoding.encode` or `encode_pair` with its settings, and `limit_all` matches it.
  """
  options = config.data
  loaded = loading.load_sequences(
    options.data,
    dataset,
    encode=encode,
    limit_all=limit_all,
    limit=options.max_tokens,
    overlong=options.overlong,
    strict=options.data_errors == "strict",
    held_out_fraction=options.held_out_fraction,
    check=run.stop.check,
  )
  sequences = encoding.flat(loaded.training + loaded.held_out)
  drawing.assert_same_data(sequence.tokens for sequence in sequences)
  longest = max(len(sequence.tokens) for sequence in sequences)
  if beyond := model.policy.config.length_note(longest):
    run.console.say(beyond)
  unread = loading.unread_note(dataset, read=[getattr(config, "margin_column", "")])
  return loaded._replace(note=loaded.note + unread)


def load_pairs(
  config: Any, run: Run, model: Model, dataset: Dataset, layout: flags.Layout
) -> loading.Loaded:
  """`load_data` of preference pairs."""
  tokenizer = model.tokenizer
  prompt_format = resolve_format(layout.prompt_format, tokenizer)
  settings = {"prompt_format": prompt_format, "system_prompt": layout.system_prompt}
  encode = functools.partial(encoding.encode_pair, tokenizer=tokenizer, **settings)
  return load_data(config, run, model, dataset, encode, encoding.limit_pairs)


def reference_of_file(
  config: Any, run: Run, model: Model, rows: Sequence[Any], **how: Any
) -> list[np.ndarray]:
  """The reference's log-probs of all rows, computed once and kept on disk.

  `how`: the temperature and `rows_per_batch`, as for `reference_cache.reference_logprobs`.
  """
  say = functools.cache(run.console.say)

  def progress(done: int, total: int) -> None:
    say(f"log-probs of the reference: {10 * (10 * done // total)} % of {total} sequences")
    if done < total:
      run.stop.check()

  how |= {"policy": model.policy, "pad_id": model.tokenizer.pad_id, "mesh": model.mesh}
  where, params = config.reference_cache or run.workdir, model.weights.reference
  return reference_cache.reference_logprobs(where, params, rows, **how, progress=progress)


def update_once(
  update: Callable, model: Model, state: Any, batch: Any, hparams: dict[str, Any], used: int
) -> tuple[Any, dict[str, Any]]:
  """One update on a batch from the host; only its first `used` microbatches are computed."""
  placed = sharding.shard_rows(batch, model.mesh)
  return update(state, placed, hparams, used, model.weights.frozen)


def work_on_texts(model: Model, examples: Sequence[Any], *, predicts: bool = True) -> Work:
  """What an update on whole texts, or pairs of them, trained on."""
  passes = update_passes(adapters=model.weights.frozen is not None)
  return text_work(model.policy.config, encoding.flat(examples), passes=passes, predicts=predicts)


def work_on_responses(model: Model, batch: ResponseBatch) -> Work:
  """What an update on all responses of a batch trained on; the batch on the host."""
  passes = update_passes(adapters=model.weights.frozen is not None)
  lengths, everything = np.sum(batch.mask, axis=1), [np.arange(len(batch.prompts))]
  read = model.policy.config, batch.prompt_lengths, lengths, lengths
  found = response_work(*read, everything, passes=passes)
  return found._replace(generated_tokens=0, rollout_flops=0)


# Updates.


def make_optimizer(options: flags.Optimizer) -> optax.GradientTransformation:
  """The optimiser that the flags describe, without its learning rate."""
  names = ("name", "b1", "b2", "eps", "weight_decay", "decayed", "max_grad_norm")
  numbers = {name: getattr(options, name) for name in names}
  found = update.make_optimizer(**numbers, mu_dtype=jnp.dtype(options.mu_dtype))
  if not options.spike_window:
    return found
  return spikes.skip_spikes(found, window=options.spike_window, sigma=options.spike_sigma)


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


def hyperparameters(
  config: Any, step: int, controls: control.Controls | None = None, **further: float
) -> dict[str, Any]:
  """The numbers that a step's updates are computed with: data, so none recompiles."""
  numbers = {"learning_rate": learning_rate(config, step), "loss": keywords.given(config.loss)}
  numbers["entropy_coef"], size = entropy_coef(config, step), config.updates
  found = steered(config, controls)
  if "clip_high" in found:
    numbers["loss"] |= {"clip_high": found.pop("clip_high")}
  numbers |= jax.tree.map(jnp.copy, found)  # The state that they are in is donated.
  if config.kl.place == "loss":
    numbers["kl_coef"] = config.kl.coef
  terms = {"llds_coef": size.llds.coef, "nll_coef": size.positive_nll_coef}
  numbers |= {name: coef for name, coef in terms.items() if coef}
  numbers = jax.tree.map(_float32, numbers | further)
  return jax.device_put(numbers)  # By name: see `minibatches`.


def _float32(number: Any) -> Any:
  return (jnp if isinstance(number, jax.Array) else np).float32(number)


def entropy_coef(config: Any, step: int) -> float:
  """The coefficient of the entropy bonus in a step, where no controller with a state sets it."""
  first, options = config.loss.entropy_coef, config.updates.entropy
  if options.controller != "linear":
    return first
  return first + (options.final - first) * step / max(1, config.run.steps - 1)


def steered(config: Any, controls: control.Controls | None) -> dict[str, Any]:
  """The numbers that the run's controllers set in a step."""
  low, known = config.loss.clip_low, keywords.settings(keywords.chosen(config.loss))
  low = known["clip_low"][1] if low is None and "clip_low" in known else low
  return control.steered(controls, clip_low=low)


def weigh(config: Any) -> responses.Weigh:
  """How much each token of an update counts, by the groups `weighting` and `kl`."""
  options, longest = config.weighting, config.prompts.max_new_tokens
  return functools.partial(
    responses.all_weights,
    name=options.name,
    kl_name=getattr(config.kl, "weighting", "loss"),
    length=options.length or longest,
    power=options.power,
    corrections=config.updates.correction.factors,
    top_entropy=options.top_entropy,
    shared_tokens=options.shared_tokens,
    llds=config.updates.llds.normalizer if config.updates.llds.coef else None,
    truncated="zero" if options.drop_truncated else options.truncated,
  )


def make_programs(
  config: Any,
  policy: policy.Policy,
  mesh: jax.sharding.Mesh | None,
  loss_fn: update.LossFn,
  optimizer: optax.GradientTransformation | None = None,
) -> responses.Programs:
  """`minibatches.make_programs` of a loss on responses; None: the optimiser that flags describe."""
  optimizer, count = optimizer or make_optimizer(config.optimizer), config.updates.microbatches
  how = {"microbatches": count, "mesh": mesh, "cast": policy.cast}
  updates = update.make_update(loss_fn, optimizer, **how)
  temperature = config.sampling.temperature
  return responses.make_programs(
    policy, updates, temperature=temperature, weigh=weigh(config), mesh=mesh
  )


def place_responses(config: Any, model: Model, experience: collect.Experience) -> ResponseBatch:
  """The step's responses on the devices, with what the config's weights and terms read."""
  read = {"entropies": config.weighting.top_entropy < 1}
  read["correct"] = config.updates.positive_nll_coef > 0
  return responses.place_responses(experience, model.mesh, **read)


def reward_kl(config: Any, batch: ResponseBatch) -> tuple[jax.Array, dict[str, tuple]]:
  """`credit.reward_kl`; 0 where the KL is a term of the loss."""
  if config.kl.place == "loss":
    batch = batch._replace(ref_logprobs=None)
  return credit.reward_kl(batch, value=config.kl.value)


def less_kl(config: Any, batch: ResponseBatch) -> tuple[ResponseBatch, dict[str, tuple]]:
  """The batch with the KL taken off its responses' advantages [B], where it is in the reward."""
  if config.kl.place == "loss" or not config.kl.coef:
    return batch, {}
  kl, found = reward_kl(config, batch)
  return credit.less_kl(batch, kl, config.kl.coef), found


def moved_too_far(config: Any, found: dict[str, Any]) -> bool:
  """Whether an update's metrics say that the step's updates are to end (--target_kl)."""
  if not config.updates.target_kl:
    return False
  total, count = jax.device_get(found["kl_old"])
  return bool(total > config.updates.target_kl * count)


def order(
  config: Any, step: int, *, matters: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, int]]:
  """The problems of each of a step's updates, as `minibatches.problem_order` shares them out."""
  size, seed = config.updates, config.run.seed
  counts = {"prompts": size.prompts_per_step, "epochs": size.epochs, "count": size.minibatches}
  return responses.problem_order(seed, step, **counts, matters=matters)


def minibatches(
  config: Any,
  programs: responses.Programs,
  batch: ResponseBatch,
  step: int,
  *,
  matters: np.ndarray | None = None,
  only: bool = False,
) -> Iterator[responses.Minibatch]:
  """A step's responses, shared out to its updates.

  Args:
    config: of the run; its group `updates` says how many there are.
    programs: whose `take` is called.
    batch: on the devices, whole.
    step: of the run.
    matters: [P] bool, False = the policy term of these problems' responses is 0: they come last.
    only: whether nothing but the policy term counts, so that they are left out.
  """
  problems, part = order(config, step, matters=matters), config.updates.microbatch_prompts
  if keywords.chosen(loss := config.loss) in flags.COVARIANCE_LOSSES:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.run.seed), step), SELECTION)
    limits = {"low": loss.covariance_low, "high": loss.covariance_high}
    how = {"loss": loss.name, "fraction": loss.selected} | limits
    batch = batch._replace(selected=objective.select_tokens(batch, key, **how))
  return responses.minibatches(programs.take, batch, problems, microbatch_prompts=part, only=only)


def step_work(
  model: Model, found: collect.Experience, trained: Sequence[np.ndarray], *, towers: int = 0
) -> Work:
  """What a step sampled and trained on; `trained`: the problems of each of its updates."""
  shape, adapters = model.policy.config, model.weights.frozen is not None
  return responses.step_work(shape, found, trained, adapters=adapters, towers=towers)


# Responses that nothing is trained on.


@contextlib.contextmanager
def open_record(config: Any, workdir: str, problems: Sequence[tasks.Problem]) -> Iterator[Run]:
  """Opens the directory in which responses to these problems are kept, for this process alone."""
  rounds = -(-len(problems) // config.responses.prompts_per_batch)
  with loop.StopSignals() as stop, loop.open_console(rounds) as console:
    how = {"new_code": config.run.code == "changed", "say": console.say}
    locked = opened(Path(workdir), config, volatile=volatile(config), doing="writes to", **how)
    with locked, jax.default_matmul_precision(precision(config.model)):
      yield Run(Path(workdir), console, stop)


def record_responses(
  config: Any,
  run: Run,
  task: tasks.Task,
  problems: Sequence[tasks.Problem],
  *,
  temperatures: Sequence[float],
  describe: Callable[[tasks.Problem, int, dict[str, Any]], dict[str, Any]],
) -> tuple[drawing.Drawn, str]:
  """Writes the responses that are not on record yet, as `evaluation.record_responses` does: one of
  each temperature to each problem. Gives the problems that fit, and their prompt format."""
  options, size = config.responses, config.responses.prompts_per_batch
  mesh = open_mesh(config, per_step={"prompts_per_batch": size}, at_once={})
  run.console.say(f"{task.name}: {task.note}")
  loaded = load_language_model(config, run, mesh)
  model = Model(loaded.policy, loaded.tokenizer, mesh, None)
  sampling = SamplingConfig(np.asarray(temperatures), top_k=options.top_k, top_p=options.top_p)
  with open_sampler(config, run, model, task, slots=options.slots) as sampler:
    drawn, seed = sampler.encode(problems), config.run.seed
    settings = {"seed": seed, "prompts_per_batch": size, "describe": describe}
    evaluation.record_responses(run, sampler, loaded.params, drawn, sampling, **settings)
  return drawn, sampler.encode.keywords["prompt_format"]
