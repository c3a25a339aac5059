"""Faults that a run must survive, as one table: `make faults`."""

import os


def trials(asked: int) -> int:
  """How many trials a test does: as many as the table asks for, or as `--trials` allows."""
  return min(asked, int(os.environ.get("RL_LLM_TRIALS") or asked))
