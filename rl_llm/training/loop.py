"""What every training run does, whatever it trains: resume, evaluate, record, save, stop, report.

An experiment provides its first state and two functions: `sample` returns a step's experience and
may be interrupted; `learn` makes the step's updates from it and may not. Everything else that
happens at a step follows from what these two return, in one place: `train_loop`.

At a kill: a step's lines are on record before a checkpoint includes it, and the run resumes from
the newest checkpoint, bit for bit (docs/design.md, "What a checkpoint holds, and why a kill is
harmless"). What SIGINT and SIGTERM do: `rl_llm/runs/signals.py`.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.errors import ConfigError, UserError
from rl_llm.evaluation import Evaluation
from rl_llm.parallel import hosts
from rl_llm.parallel.sharding import gather_to_host, sharded_shapes
from rl_llm.policy import TransformerConfig, merge_lora, save_adapter, save_hf
from rl_llm.policy.hf import import_safetensors
from rl_llm.rollout.reward_model import save_reward_model
from rl_llm.runs import origin
from rl_llm.runs.best import Best, best_recorded, better
from rl_llm.runs.checkpoint import Checkpointer
from rl_llm.runs.chips import Peak
from rl_llm.runs.config import volatile
from rl_llm.runs.console import Console
from rl_llm.runs.flops import Work
from rl_llm.runs.formatting import data_size, number
from rl_llm.runs.heap import trimmed
from rl_llm.runs.metrics import MetricsWriter, PhaseClock, finalize, read
from rl_llm.runs.profiling import StepTracer, compile_clock
from rl_llm.runs.report import read_changed, read_settings, write_report
from rl_llm.runs.report_samples import before_after
from rl_llm.runs.run_directory import Run, opened, write_result
from rl_llm.runs.signals import Interrupted, StopSignals
from rl_llm.runs.speed import rate_lines, rates, speed_metrics, step_table, steps_counted
from rl_llm.runs.tracking import tracking
from rl_llm.runs.verdicts import verdicts
from rl_llm.text.tokenizers import Tokenizer, save_tokenizer, token_ids
from rl_llm.training.train_state import TrainState
from rl_llm.training.update import name_nonfinite

TRACKED = 8  # samples of each kind in a tracker's table
MAY_TAKE = 0.05  # of the time of a run in progress, for writing its report


class Diverged(RuntimeError):
  """Training cannot continue; the message says where it broke and what to try."""


class Learned(NamedTuple):
  """The results of a step's updates, for its record.

  Attributes:
    metrics: name -> (sum, count), or a number; they may still be on the devices. An update's
      metrics include "nonfinite_leaves"; a second network's have names with its prefix.
    advantages: [P, G] what each response was worth, for samples.jsonl; None if none is sampled.
    work: what was sampled and trained on, from which the step's row gets its rates.
  """

  metrics: Mapping[str, Any]
  advantages: Any = None
  work: Work = Work()


class Examples(NamedTuple):
  """What a step takes from a file of examples: the counterpart of a sampled `Experience`."""

  examples: Sequence[Any]
  metrics: Mapping[str, Any] = {}  # what the step's row says about them
  samples: Sequence[dict[str, Any]] = ()  # lines of samples.jsonl


class Step(NamedTuple):
  """One step, for its record; the last "step" of a run only evaluates."""

  number: int
  clock: PhaseClock
  evaluation: Evaluation | None = None
  state: Any = None
  experience: Any = None  # an `Experience` or `Examples`: its metrics and samples are read
  learned: Learned | None = None
  compile_seconds: float = 0.0


class Schedule(NamedTuple):
  """When a run evaluates, saves and traces: what it does not do at every step."""

  steps: int  # of the whole run
  eval_every: int  # 0: a run without evaluation
  checkpoint_every: int
  profile: int = 0  # steps to trace, from the second one on, since the first compiles

  def evaluates(self, step: int) -> bool:
    """Whether the step's initial weights are evaluated; those at the end of the run always are."""
    return self.eval_every > 0 and (step == self.steps or step % self.eval_every == 0)


# (state, step, clock) -> experience. It may raise `Interrupted`: the state is as it was.
Sample = Callable[[Any, int, PhaseClock], Any]
# (state, experience, step, clock) -> (state, learned). It donates the state's arrays, so it must
# not be interrupted: it gets nothing with which to check for a signal.
Learn = Callable[[Any, Any, int, PhaseClock], tuple[Any, Learned]]
NO_SPREAD = (
  "a step taught nothing: in each group all responses earned the same (frac_zero_std is 1); if "
  "most steps are so, take easier or harder problems, or more responses to each"
)

# (step) -> why training cannot continue, "" if it can
Record = Callable[[Step], str]


@contextmanager
def open_run(
  config: Any,
  workdir: str | os.PathLike,
  *,
  steps: int,
  checkpoints_kept: int = 2,
  keep_best: bool = False,
  copy_to: str = "",
  export: bool = False,
  new_code: bool = False,
) -> Iterator[Run]:
  """Opens the run's directory for this process alone; the run has a result if it is finished.

  Args:
    config: recorded in the directory; a run with other settings there is refused.
    workdir: the directory.
    steps: of the whole run: a finished run with fewer steps resumes.
    checkpoints_kept: how many checkpoints to keep.
    keep_best: whether to keep the one of the best held-out accuracy too.
    copy_to: address of a bucket to copy them to; empty: none.
    export: whether to write a directory `model` at the end.
    new_code: as for `run_directory.open_run`.

  Raises:
    ConfigError: the directory cannot be used.
    WeightsError: an export is wanted, and safetensors is not installed.
  """
  if export:
    import_safetensors()  # Fail now, not at the end of the run.
  workdir = Path(workdir)
  with StopSignals() as stop, open_console(steps) as console:
    how = {"steps": steps, "new_code": new_code, "say": console.say}
    with opened(workdir, config, volatile=volatile(config), doing="trains in", **how) as result:
      exported = hosts.broadcast("the exported model", (workdir / "model").exists())
      if result is None or result["steps"] < steps or (export and not exported):
        kept = {"keep": checkpoints_kept, "keep_best": keep_best, "copy_to": copy_to}
        checkpoints = Checkpointer(workdir / "checkpoints", **kept)
        if result is not None and checkpoints.latest() is None:
          _refuse_to_begin_again(workdir, result["steps"], steps)
        said = origin.origin(workdir, config, volatile=volatile(config)) if hosts.is_main() else {}
        yield Run(workdir, console, stop, checkpoints, said)
        return
      console.say(
        f"{workdir} is finished; a larger --steps continues it, another --workdir begins anew"
      )
      if hosts.is_main():
        show_result(console, workdir, result)
      yield Run(workdir, console, stop, result=result)


def _refuse_to_begin_again(workdir: Path, done: int, steps: int) -> None:
  """Refuses to continue a finished run of which no checkpoint is left: it would begin anew."""
  allowed = f"{done}, the steps of the finished run in {workdir}, which has kept no checkpoint"
  fix = "another --workdir begins anew"
  if steps > done:
    raise ConfigError("steps", steps, allowed, fix)
  allowed = "a run that has kept a checkpoint, from which its model is written"
  raise ConfigError("workdir", str(workdir), allowed, fix)


def open_console(total_steps: int) -> Console:
  """The console of a run; with several processes, only the first one's is shown."""
  stream = None if hosts.is_main() else open(os.devnull, "w")
  return Console(stream, total_steps=total_steps)


def begin(
  run: Run,
  init_state: Callable[..., Any],
  *args: Any,
  steps: int,
  mesh: jax.sharding.Mesh,
  lay_out: Callable[[Any, jax.sharding.Mesh], Any] = sharded_shapes,
) -> tuple[int, Any]:
  """The step to start or resume at, and the state before it: the last checkpoint's, or the first.

  Args:
    run: its checkpoints are read.
    init_state: (*args) -> the first state; only its shapes are used if a checkpoint exists.
    *args: arrays; the state must not share them, since an update donates its state.
    steps: of the whole run.
    mesh: the devices to lay the state over; it may have been saved from another mesh.
    lay_out: (shapes, mesh) -> the shapes, each with its layout.

  Raises:
    ConfigError: the run is already past `steps`.
    ShardingError: the state cannot be divided as the mesh asks.
  """
  if (fetched := run.checkpoints.fetch(run.origin)) is not None:
    run.console.say(f"fetched the copy of the checkpoint at step {fetched}")
  start = run.checkpoints.latest()
  wanted = lay_out(jax.eval_shape(init_state, *args), mesh)
  say_room(run, wanted)
  if start is None:
    layout = jax.tree.map(lambda x: x.sharding, wanted)
    init = jax.jit(lambda *args: init_state(*jax.tree.map(jnp.copy, args)), out_shardings=layout)
    return 0, init(*args)
  start, state, extra = run.checkpoints.restore(wanted)
  run.console.say(f"resuming from the checkpoint at step {start}")
  for hole in origin.missing(run.workdir, start, extra) if hosts.is_main() else ():
    run.console.say(f"{hole}: the run resumes without them, and its result says so")
  if start > steps:
    raise ConfigError("steps", steps, f"at least {start}, which {run.workdir} has reached")
  return start, state


def train_loop(
  run: Run,
  start: int,
  state: Any,
  *,
  sample: Sample,
  learn: Learn,
  evaluate: Callable[[Any, int], Evaluation],
  record: Record,
  schedule: Schedule,
) -> Any:
  """Takes the steps from `start` to the end: sample, learn, record.

  A run killed at any moment and started again ends as if nothing had happened: a step is done once
  its lines are on record, and only then may a checkpoint include it. Metrics stay on the devices
  until the step ends.

  Args:
    run: the directory, the console, and the signals that stop the run.
    start: from `begin`.
    state: from `begin`.
    sample: see `Sample`.
    learn: see `Learn`.
    evaluate: (state, step) -> metrics "eval/..." and samples; called before step 0, every
      `eval_every` steps, and at the end, or never if `eval_every` is 0.
    record: such as from `open_record`.
    schedule: see `Schedule`.

  Returns:
    The last state.

  Raises:
    Interrupted: SIGINT or SIGTERM arrived; everything up to then is saved.
    Diverged: `record` returned a reason.
  """
  saved, best = start, _best_so_far(run, start)
  tracer = _tracer(run, start, schedule)
  with run.checkpoints, compile_clock() as compiled, trimmed(), tracer as trace:
    try:
      for step in range(start, schedule.steps + 1):
        with trace(step):
          done, before = Step(step, PhaseClock()), compiled()
          last = step == schedule.steps
          run.stop.check_together(f"step {step}")
          # All earlier steps are on record by now, so a kill at any time loses nothing.
          if step > saved and (last or step % schedule.checkpoint_every == 0):
            with done.clock("checkpoint"):
              save(run, step, state)
            saved = step
          if schedule.evaluates(step):
            with done.clock("eval"):
              done = done._replace(evaluation=evaluate(state, step))
            run.console.evaluation(step, done.evaluation.metrics)
            if found := _new_best(run, best, step, done.evaluation.metrics):
              if step > saved:
                with done.clock("checkpoint"):
                  save(run, step, state)
              saved, best = step, found
              run.checkpoints.protect(step)
          if last:
            record(done._replace(state=state))
            break
          experience = sample(state, step, done.clock)
          run.stop.check()  # The last chance to stop: `learn` donates the state.
          state, learned = learn(state, experience, step, done.clock)
          with done.clock("update"):
            learned = learned._replace(metrics=finalize(gather_to_host(dict(learned.metrics))))
          compile_seconds = compiled() - before
          failure = record(
            Step(step, done.clock, done.evaluation, state, experience, learned, compile_seconds)
          )
          if failure:
            raise Diverged(failure)
    except Interrupted as interruption:
      if step > saved:
        save(run, step, state)
      run.checkpoints.wait()
      where = f"step {step} of {schedule.steps}"
      run.console.say(f"{interruption}: saved at {where}; the same command resumes from it")
      raise
  return state


def _best_so_far(run: Run, start: int) -> Best | None:
  """The best step before `start` that has a checkpoint, which is kept from now on."""
  found = None
  if run.checkpoints.keep_best and start:
    if hosts.is_main():
      rows = [row for row in read(run.workdir / "metrics.jsonl") if row["step"] < start]
      found = best_recorded(rows, run.checkpoints.steps())
    found = hosts.broadcast("the best step so far", found and list(found))
    found = found and Best(tuple(found[0]), found[1])
  if found:
    run.checkpoints.protect(found.step)
  return found


def _new_best(run: Run, best: Best | None, step: int, metrics: Mapping[str, Any]) -> Best | None:
  """The step, if it is the best so far and the best is to be kept; says so."""
  found = better(best, step, metrics) if run.checkpoints.keep_best else None
  if found:
    run.console.say(f"the best so far, kept as {run.workdir}@{step}")
  return found


def save(run: Run, step: int, state: Any) -> None:
  """Begins to save the state before a step, and with it what the run's directory holds by now."""
  recorded = origin.recorded(run.workdir, step) if hosts.is_main() else {}
  run.checkpoints.start_save(step, state, {**run.origin, **recorded})


def say_room(run: Run, shapes: Any) -> None:
  """Says how much disk the checkpoints of such a state take at most, and the host's memory for the
  copy that is written while the next step computes; refuses too small a disk.

  Raises:
    ConfigError: less is free than the checkpoints to come need.
  """
  size, needed = run.checkpoints.bytes_needed(shapes)
  directory, keep = run.checkpoints.directory, run.checkpoints.keep
  free = shutil.disk_usage(directory).free
  best = run.checkpoints.keep_best
  others = f"{keep} checkpoints, the best one" if best else f"{keep} checkpoints"
  peak = f"{data_size(size * (keep + best + 1))} of disk for {others} and the one being written"
  if needed > free:
    raise ConfigError(
      "workdir",
      str(run.workdir),
      f"on a disk with room for another {data_size(needed)} of checkpoints",
      f"{data_size(free)} are free: free some, lower --checkpoint.keep, or give a --workdir "
      "on another disk",
    )
  copy = "" if hosts.count() > 1 else f"; {data_size(size)} of memory while one is being written"
  run.console.say(f"{directory}: at most {peak}; {data_size(free)} are free{copy}")


def _tracer(run: Run, start: int, schedule: Schedule) -> StepTracer:
  """Traces the steps that the schedule asks for."""
  last = min(start + schedule.profile, schedule.steps - 1) if schedule.profile else start
  if schedule.profile and last == start:
    run.console.say("--profile begins with the second step of a start: there is none, and no trace")
  directory = run.workdir / "profile"
  return StepTracer(directory, first=start + 1, last=last, say=run.console.say)


@contextmanager
def open_record(
  run: Run,
  start: int,
  *,
  samples_every: int,
  max_skipped: int,
  peak: Peak | None = None,
  track: Sequence[str] = (),
) -> Iterator[Record]:
  """The record of a run, open while the block lasts: one function that writes a step's lines.

  It also writes the report anew after each step that evaluates, and once more when the block ends.

  Args:
    run: writes its metrics.jsonl and samples.jsonl, and shows the lines on its console.
    start: the step that the run begins or resumes with: lines of later steps are dropped.
    samples_every: steps between tables of samples on the console; 0: none.
    max_skipped: consecutive updates without a finite gradient after which training stops.
    peak: of the devices, for the MFU; None: not known.
    track: names of `rl_llm.runs.tracking.TRACKERS`, which get the lines too.
  """
  names = ("metrics.jsonl", "samples.jsonl")
  metrics_file, samples_file = (
    MetricsWriter(
      run.workdir / name if hosts.is_main() else None, resume_step=start - 1, sync=False
    )
    for name in names
  )

  warn_once = functools.cache(run.console.say)

  def record(step: Step) -> str:
    row, lines = step_rows(step)
    failure = failure_of(step, max_skipped=max_skipped) if step.learned else ""
    times = step.clock.metrics()
    row |= times
    if step.learned:
      row |= speed_metrics(times, step.learned.work, peak)
      row["speed/compile_seconds"] = step.compile_seconds
    samples_file.write(step.number, *lines)
    metrics_file.write(step.number, row)  # Written last: this line puts the step on record.
    trained = [line for line in lines if line["split"] == "train"]
    due = bool(trained and samples_every and step.number % samples_every == 0)
    evaluated = [line for line in lines if line["split"] == "eval"]
    tracked(step.number, row, evaluated[:TRACKED] + trained[: TRACKED * due])
    if due:
      run.console.samples(step.number, trained)
    if step.learned:
      run.console.step(step.number, row)
    if row.get("frac_zero_std") == 1:
      warn_once(NO_SPREAD)
    if step.evaluation is not None:
      report(live=True)
    return failure

  report = reporter(run)
  try:
    names = track if hosts.is_main() else ()
    with metrics_file, samples_file, tracking(names, run.workdir, say=run.console.say) as tracked:
      yield record
  finally:
    report(live=False)


def reporter(run: Run) -> Callable[..., None]:
  """A function that writes the run's report while it trains, and takes little of its time.

  A report reads the whole record. So one in progress is left out where the last one took more than
  `MAY_TAKE` of the time since.
  """
  taken = ended = 0.0

  def report(*, live: bool) -> None:
    nonlocal taken, ended
    started = time.monotonic()
    if not hosts.is_main() or (live and taken > MAY_TAKE * (started - ended)):
      return
    recorded = run.workdir / "metrics.jsonl"
    # If somebody deleted it, the run ends by an error that says so, which this must not hide.
    if recorded.exists() and recorded.stat().st_size:
      write_report(run.workdir, live=live)
    ended = time.monotonic()
    taken = ended - started

  return report


def step_rows(step: Step) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The step's line of metrics.jsonl, without timings, and its lines of samples.jsonl."""
  row: dict[str, Any] = {}
  lines: list[dict[str, Any]] = []
  if step.evaluation is not None:
    row |= step.evaluation.metrics
    lines += step.evaluation.rows
  if step.learned is not None:
    row |= {k: v for k, v in step.learned.metrics.items() if not k.endswith("nonfinite_leaves")}
    row |= step.experience.metrics
    for prefix, trained in train_states(step.state):
      row[f"{prefix}updates_skipped"] = int(trained.skipped)
    advantages = step.learned.advantages
    if advantages is None:
      lines += step.experience.samples
    else:
      advantages = np.asarray(advantages).reshape(-1)
      for line, advantage in zip(step.experience.samples, advantages, strict=True):
        lines.append(line | {"advantage": float(advantage)})
  return row, lines


def train_states(state: Any) -> list[tuple[str, TrainState]]:
  """The networks that a state trains, with prefixes: "" for the first, else from the field's name.

  >>> class Two(NamedTuple):
  ...   policy: TrainState
  ...   value: TrainState
  >>> [prefix for prefix, _ in train_states(Two(TrainState(*[0] * 5), TrainState(*[0] * 5)))]
  ['', 'value_']
  """
  if isinstance(state, TrainState):
    return [("", state)]
  fields = state._asdict().items() if state else ()
  found = [(f"{name}_", leaf) for name, leaf in fields if isinstance(leaf, TrainState)]
  return [("", leaf) for _, leaf in found[:1]] + found[1:]


def policy_state(state: Any) -> TrainState:
  """The state of the network that samples: the first network that a state trains."""
  return train_states(state)[0][1]


def with_policy(state: Any, **changes: Any) -> Any:
  """The state with changed fields of the network that samples: see `policy_state`."""
  if isinstance(state, TrainState):
    return state._replace(**changes)
  fields = state._asdict().items()
  name = next(name for name, leaf in fields if isinstance(leaf, TrainState))
  return state._replace(**{name: getattr(state, name)._replace(**changes)})


def failure_of(step: Step, *, max_skipped: int) -> str:
  """Why training cannot continue, "" if it can: `max_skipped` updates in a row were not finite.

  The update already reported which leaves of its gradient were not finite; nothing is recomputed.
  """
  for prefix, trained in train_states(step.state):
    skipped = int(trained.skipped_in_a_row)
    if skipped >= max_skipped:
      return diagnosis(trained.params, step.learned.metrics[f"{prefix}nonfinite_leaves"], skipped)
  return ""


def diagnosis(params: Any, nonfinite_leaves: Any, skipped: int) -> str:
  """The message about that many updates in a row without a finite gradient."""
  return (
    f"{skipped} updates in a row had a gradient that is not finite, first in "
    f"{name_nonfinite(params, nonfinite_leaves)}; the parameters are those before them. Lower "
    "--optimizer.learning_rate, or look at samples.jsonl for what the model wrote"
  )


def announced(update: Callable, run: Run) -> Callable:
  """The update, with a line on the console, and the time, while it compiles for a new width."""

  def announced_update(state: Any, batch: Any, *further: Any) -> Any:
    masks = (leaf for leaf in jax.tree.leaves(batch) if leaf.dtype == bool and leaf.ndim > 1)
    width = max(mask.shape[1] for mask in masks)
    with run.console.timed(f"compiling the update: rows of up to {width} tokens"):
      return update(state, batch, *further)

  return announced_update


def finish(run: Run, *, checkpoints_kept: int | None = None) -> dict[str, Any]:
  """Writes result.json, the last of a run's files; shows the result to a person.

  Args:
    run: its directory is written to.
    checkpoints_kept: how many checkpoints to keep, the newest; None: all.
  """
  result = None
  if hosts.is_main():
    result = summary(read(run.workdir / "metrics.jsonl"))
    write_result(run.workdir, result)
    if checkpoints_kept is not None:
      run.checkpoints.keep_only(checkpoints_kept)
    show_result(run.console, run.workdir, result)
  return hosts.broadcast("the end of the run", result)


def export_model(
  run: Run, config: TransformerConfig, params: Any, tokenizer: Tokenizer, *, base: str
) -> None:
  """Writes the trained model as a Hugging Face directory, WORKDIR/model. With adapters it is the
  merged model, and WORKDIR/adapter has the adapters alone, as PEFT writes them.

  Args:
    run: its directory is written to.
    config: the model's shape.
    params: its weights, with or without adapters.
    tokenizer: also written.
    base: a person's name for the model that training began with; the adapters' config repeats it.
  """
  params = on_main(params)
  if not hosts.is_main():
    return
  directory, adapter = run.workdir / "model", run.workdir / "adapter"
  for old in (directory, adapter):
    shutil.rmtree(old, ignore_errors=True)  # From an earlier end of this run.
  merged = merge_lora(params)
  if jax.tree.structure(merged) != jax.tree.structure(params):
    save_adapter(adapter, params, base=base)
    run.console.say(f"adapters: {adapter}")
  save_hf(directory, config, merged, token_ids=token_ids(tokenizer))
  save_tokenizer(directory, tokenizer)
  run.console.say(f"model: {directory}")


def export_reward_model(
  run: Run, config: TransformerConfig, params: Any, tokenizer: Tokenizer, *, center: float
) -> None:
  """Writes a trained reward model as a Hugging Face directory, WORKDIR/model, adapters merged.

  Args:
    run, config, params, tokenizer: as for `export_model`.
    center: subtracted from every reward.
  """
  params = on_main(merge_lora(params))
  if hosts.is_main():
    directory = run.workdir / "model"
    shutil.rmtree(directory, ignore_errors=True)  # From an earlier end of this run.
    save_reward_model(directory, config, params, tokenizer, center=center)
    run.console.say(f"reward model: {directory}")


def on_main(params: Any) -> Any:
  """The whole weights on the first of several processes, to write them; the others keep none.

  Fetches one leaf after another, so that no device holds more than one whole matrix.
  """
  if hosts.count() == 1:
    return params

  def bring(leaf):
    whole = gather_to_host(leaf)
    return whole if hosts.is_main() else None

  return jax.tree.map(bring, params)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """The content of result.json, from the record; without evaluations, no before and after.

  Steps that the record has lost are named, and if the first is among them there is no before.
  """
  evaluated = [row for row in rows if any(key.startswith("eval/") for key in row)] or [{}]
  result = {"steps": rows[-1]["step"], "seconds": sum(row["time/step"] for row in rows)}
  if missing := origin.missing_steps((row["step"] for row in rows), rows[-1]["step"]):
    result["steps_missing"] = missing
    evaluated = ([{}] if rows[0]["step"] else []) + evaluated
  for name, row in (("before", evaluated[0]), ("after", evaluated[-1])):
    result[name] = {key: value for key, value in row.items() if key.startswith("eval/")}
  return result


def show_result(console: Console, workdir: Path, result: dict[str, Any]) -> None:
  """Shows the last lines: before, after, three answers of each, the report, what it says."""
  pairs = before_after(read(workdir / "samples.jsonl"))
  if pairs:
    console.table(
      "held-out problems, greedily",
      ("prompt", "before", "after"),
      [(old["prompt"], old["response"], new["response"]) for old, new in pairs[:3]],
    )
  for key in sorted(result["after"], reverse=True):
    if key.endswith("_accuracy"):
      figures = [_accuracy(result[when], key) for when in ("before", "after")]
      name = key.removeprefix("eval/").removesuffix("_accuracy")
      console.say(f"held-out accuracy, {name}: {figures[0]} -> {figures[1]}")
    elif key.endswith("_loss"):
      figures = [number(result[when].get(key)) for when in ("before", "after")]
      name = key.removeprefix("eval/").replace("_", " ")
      console.say(f"held-out {name}: {figures[0]} -> {figures[1]}")
  rows = read(workdir / "metrics.jsonl")
  show_speed(console, rows)
  if "steps_missing" in result:
    console.say(f"metrics.jsonl has lost the lines of steps {result['steps_missing']}")
  console.say(f"{result['steps']} steps in {result['seconds']:.0f} s")
  console.say(f"report: {workdir / 'report.html'}")
  found = verdicts(rows, read_settings(workdir)[0], read_changed(workdir))[:1]
  next_step = f"next: python -m rl_llm report {workdir} RUN compares it with another run"
  console.say(f"{found[0].says} {found[0].advice}." if found else next_step)


def _accuracy(found: Mapping[str, Any], key: str) -> str:
  """An accuracy with its interval; "-" if there is none: no response was graded."""
  values = [found.get(key.replace("accuracy", end)) for end in ("accuracy", "low", "high")]
  return "-" if values[0] is None else "{:.2f} (95% {:.2f} to {:.2f})".format(*values)


def show_speed(console: Console, rows: list[dict[str, Any]]) -> None:
  """Shows where a step's time goes, and the rates; nothing if the record has no times."""
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
  """Runs an experiment and returns 0, 128 + the signal that stopped it, or 1 if it diverged.

  If several processes train together, all report an error of any one of them, and all end: with 2
  if a person can fix it, else with 1.

  Args:
    train: the experiment.
    distributed: keywords of `rl_llm.parallel.hosts.initialize`; None: this process trains alone.
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
  """Tells all processes why this one cannot continue, and ends them."""
  if isinstance(error, UserError):
    hosts.end_all(str(error), 2, of_one=not isinstance(error, hosts.HostsDiffer))
  if isinstance(error, hosts.HostLost):
    hosts.end_all(str(error), 1, of_one=False)
  if hosts.is_of_network(error):
    hosts.end_all(hosts.lost(error), 1, of_one=True)
  traceback.print_exception(error)
  hosts.end_all(f"{type(error).__name__}: {error}", 1, of_one=True)
