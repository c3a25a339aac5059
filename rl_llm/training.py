"""What every training run does whatever it trains: go on, evaluate, record, save, stop, report.

An experiment brings its first state, a function that takes one step and one that evaluates. The
loop sees to it that a run killed at any moment and started again ends as if nothing had happened:
a step is done once its lines are on record, and only then may a checkpoint hold it.
"""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from rl_llm import hosts
from rl_llm.chat_template import ChatTemplateError
from rl_llm.checkpoint import Checkpointer, CheckpointError
from rl_llm.chips import Peak
from rl_llm.config import ConfigError
from rl_llm.console import Console, number
from rl_llm.data import DataError
from rl_llm.data.prompts import PromptTooLong
from rl_llm.evaluation import Evaluation
from rl_llm.flops import Work
from rl_llm.interrupt import Interrupted, StopSignals
from rl_llm.memory import freed_given_back
from rl_llm.metrics import MetricsWriter, PhaseClock, read
from rl_llm.policy import (
  TransformerConfig,
  WeightsError,
  join,
  merge_lora,
  save_adapter,
  save_hf,
)
from rl_llm.policy.attention import AttentionError
from rl_llm.policy.hf import import_safetensors
from rl_llm.profiling import StepTracer, compile_clock
from rl_llm.report import before_after, write_report
from rl_llm.rewards import RewardError
from rl_llm.run_directory import opened, write_result
from rl_llm.sharding import ShardingError, fetch, placed_shapes
from rl_llm.speed import rate_lines, rates, speed_metrics, step_table, steps_counted
from rl_llm.tasks import TaskError
from rl_llm.tokenizers import Tokenizer, TokenizerError, save_tokenizer
from rl_llm.train_state import TrainState
from rl_llm.update import LossFn, first_nonfinite

# What a person can put right: told in one line, without a traceback.
USER_ERRORS = (
  WeightsError,
  TokenizerError,
  ChatTemplateError,
  TaskError,
  DataError,
  PromptTooLong,
  RewardError,
  CheckpointError,
  ShardingError,
  AttentionError,
  hosts.HostsDiffer,
)


class Diverged(RuntimeError):
  """Training cannot go on; the message says where it broke and what to try."""


class Run(NamedTuple):
  """Where a run lives and what it is saved to, and its lines to the person who started it."""

  workdir: Path
  checkpoints: Checkpointer
  console: Console
  stop: StopSignals


class Step(NamedTuple):
  """What one step gave.

  Attributes:
    state: the pytree that the next step begins with, and that checkpoints hold.
    metrics: the step's row of metrics.jsonl, timings aside.
    samples: its rows of samples.jsonl.
    work: what it sampled and trained on, of which its row gets rates.
    failure: why the run cannot go on, once this step is on record; "" if it can.
  """

  state: Any
  metrics: Mapping[str, Any]
  samples: Sequence[dict[str, Any]] = ()
  work: Work = Work()
  failure: str = ""


def start_run(
  body: Callable[[Run], dict[str, Any]],
  config: Any,
  workdir: str | os.PathLike,
  *,
  steps: int,
  volatile: Iterable[str],
  checkpoints_kept: int = 1,
  export: bool = False,
) -> dict[str, Any]:
  """Opens the run's directory for this process alone and runs `body` in it, unless it is finished.

  Args:
    body: trains and gives the result.
    config: recorded in the directory; a run of other settings there is refused.
    workdir: the directory.
    steps: of the whole run: a finished run with fewer goes on.
    volatile: fields of the config that may differ from those the run began with.
    checkpoints_kept: how many stay.
    export: whether a directory `model` is wanted.

  Returns:
    The result, which result.json holds.

  Raises:
    ConfigError: the directory cannot be used.
    WeightsError: an export is wanted, and safetensors is not installed.
    Interrupted: SIGINT or SIGTERM came; everything up to now is saved.
    Diverged: the gradients were not finite too often.
  """
  if export:
    import_safetensors()  # Or a run would find out at its end.
  workdir = Path(workdir)
  with StopSignals() as stop, open_console(steps) as console:
    with opened(workdir, config, volatile=volatile, doing="trains in") as result:
      finished = result is not None and result["steps"] >= steps
      exported = hosts.share("the exported model", (workdir / "model").exists())
      if not finished or (export and not exported):
        checkpoints = Checkpointer(workdir / "checkpoints", keep=checkpoints_kept)
        return body(Run(workdir, checkpoints, console, stop))
      console.say(f"{workdir} is finished; a larger --steps goes on, another --workdir begins anew")
      if hosts.is_main():
        show_result(console, workdir, result)
      return result


def open_console(total_steps: int) -> Console:
  """The console of a run; of several processes, the first one's is seen."""
  stream = None if hosts.is_main() else open(os.devnull, "w")
  return Console(stream, total_steps=total_steps)


def begin(
  run: Run,
  init_state: Callable[..., Any],
  *args: Any,
  steps: int,
  mesh: jax.sharding.Mesh,
  lay_out: Callable[[Any, jax.sharding.Mesh], Any] = placed_shapes,
) -> tuple[int, Any]:
  """The step to go on with, and the state before it: the last checkpoint's, or the first.

  Args:
    run: whose checkpoints.
    init_state: (*args) -> the first state; only its shapes are used where a checkpoint exists.
    *args: arrays; the state must not share them, since an update donates its state.
    steps: of the whole run.
    mesh: the devices over which the state lies, whatever it lay over when it was saved.
    lay_out: (shapes, mesh) -> the shapes with the layout of each.

  Raises:
    ConfigError: the run has already gone further than `steps`.
    ShardingError: the state cannot be cut as the mesh asks.
  """
  start = run.checkpoints.latest()
  wanted = lay_out(jax.eval_shape(init_state, *args), mesh)
  if start is None:
    layout = jax.tree.map(lambda x: x.sharding, wanted)
    init = jax.jit(lambda *args: init_state(*jax.tree.map(jnp.copy, args)), out_shardings=layout)
    return 0, init(*args)
  start, state, _ = run.checkpoints.restore(wanted)
  run.console.say(f"going on from the checkpoint at step {start}")
  if start > steps:
    raise ConfigError("steps", steps, f"at least {start}, which {run.workdir} has reached")
  return start, state


def train_loop(
  run: Run,
  start: int,
  state: Any,
  take_step: Callable[[Any, int, PhaseClock], Step],
  evaluate: Callable[[Any], Evaluation],
  *,
  steps: int,
  eval_every: int,
  checkpoint_every: int,
  samples_every: int,
  peak: Peak | None = None,
  profile: int = 0,
) -> Any:
  """Takes the steps from `start` on.

  Args:
    run: the directory, the console, and the signals that stop the run.
    start: from `begin`.
    state: from `begin`.
    take_step: (state, step, clock) -> `Step`. It may donate the state's arrays, and must not ask
      `run.stop` once it has: what is saved at an interruption is the state it was given.
    evaluate: (state) -> metrics "eval/..." and samples; done before step 0, every `eval_every`
      steps, and at the end.
    steps: of the whole run.
    eval_every: steps between evaluations.
    checkpoint_every: steps between checkpoints.
    samples_every: steps between tables of samples on the console.
    peak: of the devices, for the MFU; None: not known.
    profile: steps to trace into the directory `profile`, from the second one on, since the first
      compiles.

  Returns:
    The last state.

  Raises:
    Interrupted: as for `start_run`.
    Diverged: as for `start_run`.
  """
  console, stop, workdir, checkpoints = run.console, run.stop, run.workdir, run.checkpoints
  saved = start
  files = [workdir / "metrics.jsonl", workdir / "samples.jsonl"] if hosts.is_main() else [None] * 2
  metrics_file, samples_file = (MetricsWriter(path, resume_step=start - 1) for path in files)
  last_traced = min(start + profile, steps - 1) if profile else start
  if profile and last_traced == start:
    console.say("--profile begins with the second step of a start: there is none, and no trace")
  step_trace = StepTracer(
    workdir / "profile", first=start + 1, last=last_traced, say=console.say
  )
  with metrics_file, samples_file, compile_clock() as compiled, freed_given_back(), step_trace:
    try:
      for step in range(start, steps + 1):
        with step_trace(step):
          row, samples = {}, []
          clock, compiled_before = PhaseClock(), compiled()
          stop.check_together(f"step {step}")
          # What happened before this step is on record by now, so nothing is lost whenever we die.
          if step > saved and (step % checkpoint_every == 0 or step == steps):
            with clock("checkpoint"):
              checkpoints.save(step, state)
            saved = step
          if step % eval_every == 0 or step == steps:
            with clock("eval"):
              found = evaluate(state)
            console.evaluation(step, found.metrics)
            row |= found.metrics
            samples += found.rows
          if step == steps:
            metrics_file.write(step, row | clock.metrics())
            samples_file.write(step, *samples)
            break
          state, metrics, trained, work, failure = take_step(state, step, clock)
          samples_file.write(step, *samples, *trained)
          if trained and step % samples_every == 0:
            console.samples(step, trained)
          times = clock.metrics()
          row |= dict(metrics) | times | speed_metrics(times, work, peak)
          row["speed/compile_seconds"] = compiled() - compiled_before
          metrics_file.write(step, row)
          console.step(step, row)
          if failure:
            raise Diverged(failure)
    except Interrupted as interruption:
      if step > saved:
        checkpoints.save(step, state)
      console.say(
        f"{interruption}: saved at step {step} of {steps}; the same command goes on from it"
      )
      raise
  return state


def failure_of(
  loss_fn: LossFn,
  state: TrainState,
  batch: Any,
  hparams: Any,
  *,
  max_skipped: int,
  frozen: Any = None,
) -> str:
  """Why training cannot go on, "" if it can: `max_skipped` updates in a row were not finite.

  Args:
    loss_fn: the update's.
    state: after the update.
    batch: of the update.
    hparams: of the update.
    max_skipped: how many are too many.
    frozen: of the update.
  """
  skipped = int(state.skipped_in_a_row)
  if skipped < max_skipped:
    return ""

  def trained_loss(params, frozen, batch, hparams):
    return loss_fn(join(frozen, params), batch, hparams)

  gradient_of = jax.jit(jax.grad(trained_loss, has_aux=True))
  gradient = gradient_of(state.params, frozen, batch, hparams)[0]
  return (
    f"{skipped} updates in a row had a gradient that is not finite, first in "
    f"{first_nonfinite(gradient)}; the parameters are those before them. Lower "
    "--optimizer.learning_rate, or look at samples.jsonl for what the model wrote"
  )


def finish(run: Run) -> dict[str, Any]:
  """Writes the report and, last of all, result.json; shows a person what came of it."""
  result = None
  if hosts.is_main():
    write_report(run.workdir)
    result = summary(read(run.workdir / "metrics.jsonl"))
    write_result(run.workdir, result)
    show_result(run.console, run.workdir, result)
  return hosts.share("the end of the run", result)


def export_model(
  run: Run, config: TransformerConfig, params: Any, tokenizer: Tokenizer, *, base: str
) -> None:
  """Writes the trained model as a Hugging Face directory, WORKDIR/model. With adapters it is the
  merged one, and WORKDIR/adapter has the adapters alone, as PEFT writes them.

  Args:
    run: whose directory.
    config: the model's shape.
    params: its weights, adapters among them or not.
    tokenizer: written too.
    base: the model that training began with, as a person names it; the adapters repeat it.
  """
  params = on_main(params)
  if not hosts.is_main():
    return
  directory, adapter = run.workdir / "model", run.workdir / "adapter"
  for old in (directory, adapter):
    shutil.rmtree(old, ignore_errors=True)  # Of an earlier end of this run.
  merged = merge_lora(params)
  if jax.tree.structure(merged) != jax.tree.structure(params):
    save_adapter(adapter, params, base=base)
    run.console.say(f"adapters: {adapter}")
  save_hf(directory, config, merged)
  save_tokenizer(directory, tokenizer)
  run.console.say(f"model: {directory}")


def on_main(params: Any) -> Any:
  """Weights that the first of several processes has whole, to write them; the others keep none.

  One after another, so that no device holds more than one whole matrix.
  """
  if hosts.count() == 1:
    return params

  def bring(leaf):
    whole = fetch(leaf)
    return whole if hosts.is_main() else None

  return jax.tree.map(bring, params)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """What result.json holds, read off the record."""
  evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)]
  result = {"steps": rows[-1]["step"], "seconds": sum(row["time/step"] for row in rows)}
  for name, row in (("before", evaluated[0]), ("after", evaluated[-1])):
    result[name] = {key: value for key, value in row.items() if key.startswith("eval/")}
  return result


def show_result(console: Console, workdir: Path, result: dict[str, Any]) -> None:
  """The last lines a person reads: before, after, three answers of each, where the report is."""
  pairs = before_after(read(workdir / "samples.jsonl"))
  if pairs:
    console.table(
      "held-out problems, greedily",
      ("prompt", "before", "after"),
      [(old["prompt"], old["response"], new["response"]) for old, new in pairs[:3]],
    )
  for key in sorted(result["after"], reverse=True):
    if key.endswith("_accuracy"):
      figures = [
        "{accuracy:.2f} (95% {low:.2f} to {high:.2f})".format(
          accuracy=result[when][key],
          low=result[when][key.replace("accuracy", "low")],
          high=result[when][key.replace("accuracy", "high")],
        )
        for when in ("before", "after")
      ]
      name = key.removeprefix("eval/").removesuffix("_accuracy")
      console.say(f"held-out accuracy, {name}: {figures[0]} -> {figures[1]}")
    elif key.endswith("_loss"):
      figures = [number(result[when][key]) for when in ("before", "after")]
      name = key.removeprefix("eval/").replace("_", " ")
      console.say(f"held-out {name}: {figures[0]} -> {figures[1]}")
  show_speed(console, read(workdir / "metrics.jsonl"))
  console.say(f"{result['steps']} steps in {result['seconds']:.0f} s")
  console.say(f"report: {workdir / 'report.html'}")


def show_speed(console: Console, rows: list[dict[str, Any]]) -> None:
  """Where the time of a step goes, and the rates; nothing of a record without times."""
  table = step_table(rows)
  if table is None:
    return
  console.say(f"where the time of a step goes, in {steps_counted(table)}")
  lines = [(phase.name, phase.steps, phase.seconds, phase.share) for phase in table.phases]
  lines.append(("step", table.steps, table.seconds, 1.0))
  console.say(f"  {'phase':<10}  {'steps':>6}  {'median s':>8}  {'share':>6}")
  for name, steps, seconds, share in lines:
    console.say(f"  {name:<10}  {steps:>6}  {seconds:>8.3f}  {share:>6.1%}")
  for line in rate_lines(rates(rows)):
    console.say(line)


def exit_code(train: Callable[[], Any], *, distributed: Mapping[str, Any] | None = None) -> int:
  """Runs an experiment to its end: 0, 128 + the signal that stopped it, 1 where it diverged.

  Where several processes train together, an error of one is told by all, and ends all: with 2 where
  a person can put it right, else with 1.

  Args:
    train: the experiment.
    distributed: keywords of `rl_llm.hosts.initialize`; None: this process trains alone.
  """
  try:
    if distributed is not None:
      hosts.initialize(**distributed)
    train()
  except Interrupted as interruption:
    return 128 + interruption.signum
  except Diverged as error:
    if hosts.is_main():
      print(f"error: {error}", file=sys.stderr)
    return 1
  except Exception as error:
    if hosts.count() == 1:
      raise
    _end_all(error)
  return 0


def _end_all(error: Exception) -> NoReturn:
  """Tells all processes why this one cannot go on, and ends them."""
  if isinstance(error, (ConfigError, *USER_ERRORS)):
    hosts.end_all(str(error), 2, of_one=not isinstance(error, hosts.HostsDiffer))
  if isinstance(error, hosts.HostLost):
    hosts.end_all(str(error), 1, of_one=False)
  if hosts.is_of_network(error):
    hosts.end_all(hosts.lost(error), 1, of_one=True)
  traceback.print_exception(error)
  hosts.end_all(f"{type(error).__name__}: {error}", 1, of_one=True)


def default_workdir(experiment: str, *, model: str, data: str, seed: int) -> str:
  """Where a run goes that names no directory.

  >>> default_workdir("grpo", model="smollm2", data="gsm8k:train.jsonl", seed=0)
  'runs/grpo-smollm2-gsm8k_train.jsonl-seed0'
  """
  words = [experiment, Path(model).name.removesuffix(".gguf")]
  return os.path.join(
    "runs", "-".join([*words, data.replace(os.sep, "_").replace(":", "_"), f"seed{seed}"])
  )
