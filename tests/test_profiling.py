"""Traces of steps by name, ended by whatever ends a run; and the time spent compiling."""

from __future__ import annotations

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from rl_llm.runs.metrics import PhaseClock
from rl_llm.runs.profiling import StepTracer, compile_clock
from tests.representatives import mostly_slow

double = jax.jit(lambda x: x * 2)


def take_steps(step_trace, steps, *, stop_in=None):
  for step in range(steps):
    with step_trace(step):
      clock = PhaseClock()
      with clock("rollout"):
        double(jnp.ones(3)).block_until_ready()
      if step == stop_in:
        raise InterruptedError
      with clock("update"):
        double(jnp.ones(3)).block_until_ready()


def events(directory):
  """(names, the numbers of the steps) in the one trace that is there."""
  (path,) = directory.rglob("perfetto_trace.json.gz")
  found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  steps = [event["args"]["step_num"] for event in found if event.get("name") == "step"]
  return {event.get("name") for event in found}, sorted(map(int, steps))


def test_the_steps_asked_for_are_traced_with_their_phases_by_name(tmp_path):
  said = []
  with StepTracer(tmp_path / "profile", first=1, last=2, say=said.append) as step_trace:
    take_steps(step_trace, 5)
    assert len(said) == 1, "the trace is written before the run is over"
  names, steps = events(tmp_path / "profile")
  assert steps == [1, 2] and {"rollout", "update"} <= names
  (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
  assert len(said) == 1 and "steps 1 to 2" in said[0] and str(path) in said[0]
  assert "ui.perfetto.dev" in said[0]
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1  # What xprof reads.


@pytest.mark.parametrize(
  "stop_in, told", mostly_slow([(1, "a part of step 1:"), (2, "step 1:")], quick=[0])
)
def test_what_ends_the_run_ends_the_trace_and_another_can_follow(tmp_path, stop_in, told):
  said = []
  for name in ("one", "two"):
    with pytest.raises(InterruptedError):
      with StepTracer(tmp_path / name, first=1, last=3, say=said.append) as step_trace:
        take_steps(step_trace, 4, stop_in=stop_in)
    assert "rollout" in events(tmp_path / name)[0]
    assert f"trace of {told}" in said[-1]


def test_without_steps_to_trace_nothing_is_written(tmp_path):
  said = []
  with StepTracer(tmp_path / "profile", first=1, last=0, say=said.append) as step_trace:
    take_steps(step_trace, 3)
  assert not said and not list(tmp_path.iterdir())


def test_compiling_counts_once_however_it_is_nested():
  compiling = "/jax/core/compile/backend_compile_duration"
  with compile_clock() as compiled:
    for event, start, end in (
      (compiling, 10.0, 11.0),
      (compiling, 12.0, 14.0),
      (compiling, 12.0, 15.5),  # Holds the one before.
      ("/jax/else", 20.0, 30.0),
      (compiling, 40.0, 40.25),
    ):
      jax.monitoring.record_event_time_span(event, start, end)
    assert compiled() == 1.0 + 3.5 + 0.25
  jax.monitoring.record_event_time_span(compiling, 50.0, 60.0)
  assert compiled() == 4.75, "it ends with its block"


def test_a_new_program_takes_time_and_a_known_one_none():
  with compile_clock() as compiled:
    program = jax.jit(lambda x: jnp.sin(x) @ x)
    program(jnp.ones((3, 3))).block_until_ready()
    first = compiled()
    program(jnp.ones((3, 3))).block_until_ready()
    assert 0 < first == compiled()
