"""Profiling of a run: traces of its steps, and the time it spends compiling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rl_llm.parallel import hosts


class StepTracer:
  """Writes a trace of some steps, which shows each step and each phase by name.

      with StepTracer(directory, first=1, last=2, say=print) as step_trace:
        for step in range(steps):
          with step_trace(step):
            ...

  An exception ends the trace at that point. Each of several processes writes into its own
  directory, since two of them may be on one machine.

  Args:
    directory: where traces go; created if a trace is written.
    first: the step that the trace begins with.
    last: the step that it ends with; if this is before `first`, there is no trace.
    say: prints the line that says where the trace is.
  """

  def __init__(self, directory: Path, *, first: int, last: int, say: Callable[[str], None]):
    several = hosts.count() > 1
    self._directory = directory / f"process{hosts.index()}" if several else directory
    self._first, self._last, self._say = first, last, say
    self._tracing = False
    self._done: list[int] = []  # the steps that are in the trace

  def __enter__(self) -> StepTracer:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  @contextmanager
  def __call__(self, step: int) -> Iterator[None]:
    """Runs one step: the first traced step begins the trace, and the last one ends it."""
    if step == self._first <= self._last:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Python calls would fill most of the trace.
      jax.profiler.start_trace(
        self._directory, create_perfetto_trace=True, profiler_options=options
      )
      self._tracing = True
    with jax.profiler.StepTraceAnnotation("step", step_num=step):
      yield
    if self._tracing:
      self._done.append(step)
    if step == self._last:
      self._stop()

  def _stop(self) -> None:
    if not self._tracing:
      return
    self._tracing = False
    logging.getLogger("jax._src.profiler").setLevel(logging.WARNING)  # It logs each file.
    jax.profiler.stop_trace()
    written = max(self._directory.rglob("perfetto_trace.json.gz"), key=lambda p: p.stat().st_mtime)
    steps = {0: f"a part of step {self._first}", 1: f"step {self._first}"}.get(
      len(self._done), f"steps {self._first} to {self._first + len(self._done) - 1}"
    )
    self._say(
      f"trace of {steps}: open {written} at https://ui.perfetto.dev, "
      f"or pip install xprof and run: xprof {self._directory}"
    )


@contextmanager
def compile_clock() -> Iterator[Callable[[], float]]:
  """Yields a function that returns the seconds this process has compiled since the block began.

  Tracing and lowering count too. If one happens within another, the seconds count once.
  """
  spans: list[tuple[float, float]] = []

  def listen(event: str, start: float, end: float, **_: object) -> None:
    if event.startswith("/jax/core/compile/"):
      # An event is reported when it ends, so an event that contains others comes after them.
      while spans and spans[-1][0] >= start:
        spans.pop()
      spans.append((start, end))

  jax.monitoring.register_event_time_span_listener(listen)
  try:
    yield lambda: sum(end - start for start, end in spans)
  finally:
    jax.monitoring.unregister_event_time_span_listener(listen)
