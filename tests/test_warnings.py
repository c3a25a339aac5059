"""A step of which no group has any spread is said once, not at every step (F18)."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import jax.numpy as jnp

from rl_llm.runs.metrics import PhaseClock
from rl_llm.training import loop
from tests.test_origin import Counted, Drawn


def said(tmp_path: Path, *shares: float | None) -> list[str]:
  """The lines of a run whose steps have these values of frac_zero_std."""
  run = mock.Mock(workdir=tmp_path)
  with loop.open_record(run, 0, samples_every=0, max_skipped=9) as record:
    for number, share in enumerate(shares):
      learned = loop.Learned({} if share is None else {"frac_zero_std": share})
      state = Counted(jnp.float32(0))
      record(loop.Step(number, PhaseClock(), None, state, Drawn({}, []), learned))
  return [call.args[0] for call in run.console.say.call_args_list]


def test_groups_without_spread_are_said_once(tmp_path):
  lines = said(tmp_path, 0.5, 1.0, 1.0, 0.0, 1.0)
  assert [line for line in lines if "taught nothing" in line] == [loop.NO_SPREAD]


def test_other_steps_are_no_matter(tmp_path):
  assert loop.NO_SPREAD not in said(tmp_path, 0.0, 0.99, None)
