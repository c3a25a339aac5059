"""Stops a run at numbers that are not finite, and says which weights they come from.

One infinite weight makes every log-prob NaN. A sampler that continues draws arbitrary tokens, and
the run ends with a meaningless result.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm.errors import UserError
from rl_llm.parallel.sharding import gather_to_host

_LISTED = 3


class NotFiniteError(UserError, ValueError):
  """A model computed numbers that are not finite; the message names the weights that are not."""


def check_finite(values: Any, params: Any, *, what: str) -> None:
  """Raises if a value is not finite.

  >>> check_finite(np.zeros(2), {"w": jnp.ones(2)}, what="the log-probs")

  Args:
    values: floats on the host, computed with the weights.
    params: those weights; None if they are not known here.
    what: the name of the values, for the message.

  Raises:
    NotFiniteError: one of the values is NaN or infinite.
  """
  if np.isfinite(values).all():
    return
  raise NotFiniteError(f"{what} are not finite: {cause_in(params)}")


def cause_in(params: Any) -> str:
  """Says which weights are not finite, and what to do about it: the end of an error message.

  >>> cause_in({"w": jnp.array([jnp.nan])})[:43]
  'weights hold NaN or infinity, namely w; loa'
  """
  if params is None:
    return "weights hold NaN or infinity; load the model's weights again"
  bad = nonfinite_weights(params)
  if not bad:
    return (
      "the weights are finite, so the arithmetic overflows; use --dtype=float32, or weights that "
      "were trained in the type of arithmetic that is used"
    )
  more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
  return (
    f"weights hold NaN or infinity, namely {', '.join(bad[:_LISTED])}{more}; load the model's "
    "weights again, or an earlier checkpoint's"
  )


def nonfinite_weights(params: Any) -> list[str]:
  """The paths of the leaves that hold NaN or infinity.

  >>> nonfinite_weights({"a": jnp.ones(2), "b": {"c": jnp.array([1.0, jnp.inf])}})
  ['b/c']

  Args:
    params: a pytree of arrays, on whatever devices.
  """
  found = jax.tree_util.tree_leaves_with_path(params)
  finite = gather_to_host(_all_finite([leaf for _, leaf in found]))
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, _), good in zip(found, finite, strict=True)
    if not good
  ]


@jax.jit
def _all_finite(leaves: Any) -> list[jax.Array]:
  """Whether each leaf is finite, in one program; with one per leaf, CPU devices could deadlock."""
  return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
