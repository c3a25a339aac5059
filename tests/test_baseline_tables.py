"""Baselines in tables: whose row a problem has, what is counted, and how old counts fade."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.errors import ConfigError
from rl_llm.tasks import Problem
from rl_llm.training import trackers

MOVED = {"moved": 0.0, "decay": 0.9}


def problems(*keys):
  return [Problem("?", {"side": key[0]}, key) for key in keys]


def test_a_problem_has_the_same_row_in_every_step_and_process():
  asked = problems("first 1", "second 1", "first 2", "first 1")
  a, b, c, again = trackers.rows_of(asked, 10**6)
  assert a == again and len({a, b, c}) == 3
  by_role = trackers.rows_of(asked, 10**6, column="side")
  assert by_role[0] == by_role[2] == by_role[3] != by_role[1]
  # A hash of the text, not Python's own, which differs from one process to the next.
  assert trackers.rows_of(problems("first 1"), 97).tolist() == [trackers.hashed("first 1") % 97]


def test_counts_are_those_of_one_problem_after_another():
  """Against the formula, by hand: 1/2 and 1/2 at first, then a right and a wrong answer."""
  rows, ok = np.array([3, 5]), np.ones((2, 1), bool)
  table = trackers.remembered(
    trackers.no_counts(8), rows, np.float32([[1], [0]]), ok, **MOVED | {"moved": 0.02}
  )
  most = 0.96  # Nothing has moved when they are counted: the most is kept.
  wanted = [(most * 0.5 + 1) / (most + 1), most * 0.5 / (most + 1)]
  np.testing.assert_allclose(trackers.baselines(table, rows), wanted, rtol=1e-6)
  assert trackers.baselines(table, np.array([0])).tolist() == [0.5]
  assert float(table.moved) == pytest.approx(0.02) and table.seen_at[rows].tolist() == [0, 0]
  # Row 3 again: the policy has moved by 0.02 since, of a half-life of 0.06.
  again = trackers.remembered(table, rows[:1], np.float32([[0]]), ok[:1], **MOVED)
  keep = min(max(2 ** (-0.02 / 0.06), 0.875), 0.96)
  right, wrong = keep * (most * 0.5 + 1), keep * most * 0.5 + 1
  assert float(trackers.baselines(again, rows)[0]) == pytest.approx(right / (right + wrong))
  assert float(again.seen_at[3]) == pytest.approx(0.02) and float(again.seen_at[5]) == 0


def test_a_row_met_twice_counts_its_mean_once_and_a_failed_grade_not_at_all():
  rows = np.array([2, 2, 4])
  rewards, ok = np.float32([[1], [0], [1]]), np.array([[True], [True], [False]])
  table = trackers.remembered(trackers.no_counts(6), rows, rewards, ok, **MOVED)
  assert float(trackers.baselines(table, rows)[0]) == pytest.approx(0.5)
  assert float(table.right[2] + table.wrong[2]) == pytest.approx(0.96 + 1)
  assert float(table.right[4] + table.wrong[4]) == 1
  nothing = trackers.remembered(table, rows, rewards, np.zeros((3, 1), bool), **MOVED)
  assert all(map(np.array_equal, jax.tree.leaves(nothing), jax.tree.leaves(table)))


def test_each_role_has_its_own_moving_average():
  rows, ok = np.array([1, 0, 1]), np.ones((3, 2), bool)
  rewards = np.float32([[1, 0], [-2, -4], [1, 1]])
  table = trackers.remembered(jnp.zeros(2), rows, rewards, ok, **MOVED)
  np.testing.assert_allclose(table, [0.1 * -3, 0.1 * 0.75], rtol=1e-6)
  table = trackers.remembered(table, rows, rewards, ok, **MOVED)
  np.testing.assert_allclose(table, [-0.3 * 0.9 - 0.3, 0.075 * 0.9 + 0.075], rtol=1e-6)


def test_a_count_takes_shares_of_right_alone():
  with pytest.raises(ConfigError, match="for a reward of 2"):
    trackers.remembered(
      trackers.no_counts(4), np.array([1]), np.float32([[2]]), np.ones((1, 1), bool), **MOVED
    )


def test_only_baselines_with_a_table_have_one():
  assert trackers.first("plain", 5) is None
  assert trackers.first("role_baseline", 5).tolist() == [0] * 5
  assert trackers.first("track_values", 5).right.tolist() == [0.5] * 5
