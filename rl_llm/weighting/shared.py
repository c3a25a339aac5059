"""Factors for what right and wrong responses to one prompt have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rl_llm.checks import Array, any_mesh, check_between, check_members, check_same_shape
from rl_llm.weighting._arrays import check_rows, to_float


@any_mesh
def shared_tokens(tokens, advantages, mask, *, group_size, positive=2.0) -> Array:
  """Factors that spare the tokens with which good and bad responses both begin, or both end (GTPO).

  A wrong answer is not wrong at its first token. What it shares with a right one, such as a tag
  that opens the reasoning, is pushed up by one and down by the other, and where more responses are
  wrong than right, down. That is how likelihoods of right answers fall under GRPO (see
  `llds_loss`). Within a group:

      shared = the same token stands at the same place in a good and in a bad response
      run    = the tokens from the start on, up to the first that is not shared
      factor = 0 in the run of a bad response, `positive` in that of a good one, 1 elsewhere

  The same again from the end, with places counted backwards; the two factors multiply. A right
  answer 5 7 1 9 and a wrong one 5 7 2 9 begin with 5 7 and end with 9:

  >>> tokens, mask = jnp.array([[5, 7, 1, 9], [5, 7, 2, 9]]), jnp.ones((2, 4), bool)
  >>> shared_tokens(tokens, jnp.array([1.0, -1.0]), mask, group_size=2).tolist()
  [[2.0, 2.0, 1.0, 2.0], [0.0, 0.0, 1.0, 0.0]]

  Only runs count, since deep inside two responses the same token at the same place is chance. The
  paper's implementation also divides a response's loss by the number of its shared tokens, and
  drops responses of high entropy; neither is part of these factors.

  Args:
    tokens: [B, T] int, rows of one prompt next to each other.
    advantages: [B] float, or [B, T], of which a response's sum counts: good above 0, bad below. A
      response of advantage 0 is compared with none.
    mask: [B, T] bool, the tokens the policy produced; another ends a run.
    group_size: G, responses per prompt; divides B.
    positive: factor of a good response's shared tokens, >= 0; 1 leaves them as they are.

  Returns:
    [B, T] float32 factors to multiply weights by; 0 outside the mask, nan in a row whose advantage
    is nan.

  Raises:
    ValueError: shapes differ, or `group_size` does not divide B.

  Reference: Simoni et al., 2025, GTPO: Trajectory-Based Policy Optimization,
    https://arxiv.org/abs/2508.03772
  """
  check_members(mask)
  check_same_shape("tokens", tokens, "mask", mask)
  check_between("positive", positive, 0, float("inf"))
  if jnp.ndim(advantages) == 2:
    check_same_shape("advantages", advantages, "mask", mask)
    advantages = jnp.sum(jnp.where(mask, to_float(advantages), 0), axis=1)
  check_rows("advantages", advantages, mask)
  rows, width = jnp.shape(mask)
  if group_size < 1 or rows % group_size:
    raise ValueError(f"group_size is {group_size}; it must divide the rows of mask, {rows}.")
  mask, advantages = jnp.asarray(mask), to_float(advantages)
  place = jnp.arange(width)[None]
  # From the end: the place of the last token of the response becomes 0, that of the one before 1.
  last = jnp.max(jnp.where(mask, place, -1), axis=1, keepdims=True, initial=-1)
  backwards = last - place
  turned = jnp.clip(backwards, 0, max(width - 1, 0))
  factors = jnp.float32(1)
  for order, within in ((None, mask), (turned, backwards >= 0)):
    ids, members = jnp.asarray(tokens), mask
    if order is not None and width:
      ids, members = (jnp.take_along_axis(x, order, axis=1) for x in (ids, mask))
      members &= within
    found = _runs(ids, members, advantages, group_size)
    if order is not None and width:
      found = jnp.take_along_axis(found, order, axis=1)
    bad = jnp.where(found, 0.0, 1.0)
    good = jnp.where(found, jnp.asarray(positive, jnp.float32), 1.0)
    factors *= jnp.where(advantages[:, None] > 0, good, bad)
  factors = jnp.where(jnp.isnan(advantages)[:, None], jnp.nan, factors)
  return jax.lax.stop_gradient(jnp.where(mask, factors, 0))


def _runs(tokens, members, advantages, group_size):
  """[B, T] bool: the tokens before the first that no good, or no bad, response has at its place."""
  rows, width = tokens.shape
  groups = rows // group_size
  tokens, members = (x.reshape(groups, group_size, width) for x in (tokens, members))
  advantages = advantages.reshape(groups, group_size)
  same = tokens[:, :, None] == tokens[:, None]  # [P, G, G, T]
  same &= members[:, :, None] & members[:, None]
  good, bad = advantages > 0, advantages < 0
  of_good = jnp.any(same & good[:, None, :, None], axis=2)
  of_bad = jnp.any(same & bad[:, None, :, None], axis=2)
  shared = of_good & of_bad & (good | bad)[:, :, None]
  return jnp.cumprod(shared.astype(jnp.int32), axis=2).astype(bool).reshape(rows, width)
