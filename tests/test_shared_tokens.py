"""GTPO's factors: a loop over places, the edges of responses, and what they do to a likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(11)
P, G, T = 3, 4, 8
LENGTHS = RNG.integers(2, T + 1, size=P * G)
MASK = np.arange(T) < LENGTHS[:, None]
TOKENS = RNG.integers(0, 2, size=(P * G, T))  # two ids, so that runs are long
ADVANTAGES = np.where(RNG.uniform(size=P * G) < 0.2, 0.0, RNG.normal(size=P * G))


def runs(rows, advantages):
  """For each of one prompt's responses (lists of ids) the length of its shared beginning."""
  found = []
  for mine, own in zip(rows, advantages, strict=True):
    length = 0
    while own != 0 and length < len(mine):
      having = [
        a
        for row, a in zip(rows, advantages, strict=True)
        if length < len(row) and row[length] == mine[length]
      ]
      if not (any(a > 0 for a in having) and any(a < 0 for a in having)):
        break
      length += 1
    found.append(length)
  return found


@pytest.mark.parametrize("positive", [2.0, 1.0, 0.5])
def test_the_factors_match_the_loop(positive):
  got = weighting.shared_tokens(TOKENS, ADVANTAGES, MASK, group_size=G, positive=positive)
  expected = MASK.astype(float)
  for p in range(P):
    group = range(p * G, (p + 1) * G)
    rows = [TOKENS[b, : LENGTHS[b]].tolist() for b in group]
    advantages = ADVANTAGES[p * G : (p + 1) * G]
    starts = runs(rows, advantages)
    ends = runs([row[::-1] for row in rows], advantages)
    for b, a, start, end in zip(group, advantages, starts, ends, strict=True):
      factor = positive if a > 0 else 0.0
      expected[b, :start] *= factor
      expected[b, LENGTHS[b] - end : LENGTHS[b]] *= factor
  assert 0 < np.mean(expected[MASK] == 0) < 1
  np.testing.assert_array_equal(got, expected)


def test_what_is_not_a_token_of_the_response_ends_a_run():
  tokens = np.array([[4, 5, 6, 7, 8], [4, 5, 6, 7, 9]])
  mask = np.array([[True, True, False, True, True]] * 2)
  got = weighting.shared_tokens(tokens, np.array([1.0, -1.0]), mask, group_size=2)
  assert got.tolist() == [[2, 2, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_groups_are_compared_within_and_token_advantages_by_their_sum():
  tokens, mask = np.zeros((4, 2), int), np.ones((4, 2), bool)
  one_sided = weighting.shared_tokens(tokens, np.array([1.0, 1, -1, -1]), mask, group_size=2)
  assert np.all(one_sided == 1)
  per_token = np.array([[3.0, -1], [-3, 1], [1, 1], [0, 0]])
  got = weighting.shared_tokens(tokens, per_token, mask, group_size=2)
  assert got.tolist() == [[4, 4], [0, 0], [1, 1], [1, 1]]  # as a beginning and as an end


def test_a_shared_beginning_is_no_longer_pushed_down():
  """Three wrong answers and a right one begin the same: GRPO lowers that token's log-prob."""
  tokens = np.array([[1, 2], [1, 3], [1, 3], [1, 4]])
  advantages, mask = np.array([0.5, -0.5, -0.5, -0.5]), np.ones((4, 2), bool)
  logprobs = jnp.log(jnp.full((4, 2), 0.5))

  def push(factors):
    weights = weighting.token_mean(mask) * factors
    loss = lambda x: losses.grpo_loss(x, logprobs, advantages, weights)[0]  # noqa: E731
    return -jax.grad(loss)(logprobs)[:, 0].sum()  # of the one token that all begin with

  assert push(1.0) < 0
  assert push(weighting.shared_tokens(tokens, advantages, mask, group_size=4)) > 0


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"group_size": 5}, "group_size is 5; it must divide the rows of mask, 12"),
    ({"positive": -1.0}, "positive is -1.0"),
    ({"advantages": np.ones(3)}, r"advantages has shape \(3,\)"),
    ({"tokens": TOKENS[:1]}, "tokens has shape"),
  ],
)
def test_errors_name_the_argument(changes, message):
  given = {"tokens": TOKENS, "advantages": ADVANTAGES, "mask": MASK, "group_size": G} | changes
  with pytest.raises(ValueError, match=message):
    weighting.shared_tokens(**given)
