"""Baselines that outlive a step, in tables of a fixed size: one for each problem, or each role.

A table's rows are found by a hash, so it needs not know the problems beforehand, and it is an array
of a run's state: what a checkpoint holds is what a resumed run compares with. Two problems of one
row share a baseline; make the table large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rl_llm.advantages import role_baseline, track_values
from rl_llm.checks import Array
from rl_llm.data.held_out import hashed
from rl_llm.errors import ConfigError
from rl_llm.masked import whiten
from rl_llm.parallel.sharding import gather_to_host
from rl_llm.tasks import Problem

NAMES = "track_values", "role_baseline"


class Counts(NamedTuple):
  """What SPO remembers of N rows of problems: see `rl_llm.advantages.track_values`."""

  right: Array  # [N] float32
  wrong: Array  # [N]
  seen_at: Array  # [N] how far the policy had moved when the row was last counted
  moved: Array  # [] how far it has moved since the run began, step by step, in nats a token


def no_counts(rows: int) -> Counts:
  """Before the first step, when a value is 1/2 and hardly known."""
  half = jnp.full(rows, 0.5)
  return Counts(half, half, jnp.zeros(rows), jnp.zeros(()))


def rows_of(problems: Sequence[Problem], rows: int, *, column: str = "") -> np.ndarray:
  """[P] the row of each problem in a table, by its key, or by the value of one of its columns.

  >>> a, b = Problem("", {"side": "first"}, "1"), Problem("", {"side": "first"}, "2")
  >>> len({*rows_of([a, b], 1000)}), len({*rows_of([a, b], 1000, column="side")})
  (2, 1)

  Args:
    problems: of a step.
    rows: N, of the table.
    column: "" for the key. A problem without the column belongs to the role None.
  """
  names = [str(each.columns.get(column)) if column else each.key for each in problems]
  return np.array([hashed(name) % rows for name in names])


def first(name: str, rows: int) -> Counts | Array | None:
  """The table of a baseline before the first step: "track_values", "role_baseline", or none."""
  if name == "track_values":
    return no_counts(rows)
  return jnp.zeros(rows) if name == "role_baseline" else None


def baselines(table: Counts | Array, rows: np.ndarray) -> np.ndarray:
  """[P]: what is remembered of each problem, or of its role.

  >>> [baselines(table, np.array([2])).tolist() for table in (no_counts(4), jnp.ones(4))]
  [[0.5], [1.0]]
  """
  if not isinstance(table, Counts):
    return np.asarray(gather_to_host(table[rows]))
  right, wrong = table.right[rows], table.wrong[rows]
  return np.asarray(gather_to_host(right / (right + wrong)))


def compared(name: str, rewards: Array, ok: Array, baseline: Array) -> Array:
  """[P, G]: the rewards less what is remembered [P]; of "track_values" whitened over the step."""
  found = jnp.where(ok, rewards - baseline[:, None], 0)
  return jnp.where(ok, whiten(found, ok), 0) if name == "track_values" else found


def remembered(
  table: Counts | Array,
  rows: np.ndarray,
  rewards: np.ndarray,
  ok: np.ndarray,
  *,
  moved: float,
  decay: float,
) -> Counts | Array:
  """The table after a step. A row that the step met several times gets the mean reward, once.

  How far the policy has moved since a row was counted is the sum of its steps' moves, which is at
  least as far as the way from there.

  Args:
    table: before the step.
    rows: [P] from `rows_of`.
    rewards: [P, G]; of counts between 0 and 1.
    ok: [P, G] bool, which of them there are.
    moved: the mean of |log-ratio| that the step's updates made, in nats a token; of counts.
    decay: as for `role_baseline`; of roles.

  Raises:
    ConfigError: a reward to count is not between 0 and 1.
  """
  met, means = row_means(rows, rewards, ok)
  if not isinstance(table, Counts):
    return table.at[met].set(role_baseline(table[met], means, decay=decay))
  if means.size and not (means.min() >= 0 and means.max() <= 1):
    wrong = means[np.argmax(np.abs(means - 0.5))]
    allowed = f"another, for a reward of {wrong:g}: it counts right and wrong"
    raise ConfigError("advantage", "track_values", allowed, "try --advantage=moving_average")
  old = table.right[met], table.wrong[met]
  right, wrong = track_values(*old, means, table.moved - table.seen_at[met])
  return Counts(
    table.right.at[met].set(right),
    table.wrong.at[met].set(wrong),
    table.seen_at.at[met].set(table.moved),
    table.moved + moved,
  )


def row_means(
  rows: np.ndarray, rewards: np.ndarray, ok: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The rows that have a reward, each once, and the mean of its rewards, float32.

  >>> rows_and_means = row_means(np.array([4, 2, 4]), np.array([[1.0], [0.5], [0.0]]),
  ...                            np.array([[True], [True], [True]]))
  >>> [x.tolist() for x in rows_and_means]
  [[2, 4], [0.5, 0.5]]
  """
  found: dict[int, list[float]] = {}
  for row, own, known in zip(rows.tolist(), rewards, ok, strict=True):
    found.setdefault(row, []).extend(own[known].tolist())
  kept = {row: float(np.mean(own)) for row, own in sorted(found.items()) if own}
  return np.array(list(kept), np.int32), np.array(list(kept.values()), np.float32)
