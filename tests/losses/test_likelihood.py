"""Likelihood preservation against loops, and its gates one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import losses, weighting

RNG = np.random.default_rng(0)
MASK = np.array(
  [
    [True, True, False, True, True, True],
    [False, True, True, False, True, False],
    [True, True, True, True, False, False],
    [False, False, False, False, False, False],
  ]
)
ACTIONS = np.array(
  [[0, 0, -1, 1, 1, 1], [-1, 0, 0, -1, 1, -1], [0, 0, 0, 0, -1, -1], [-1, -1, -1, -1, -1, -1]]
)
SHAPE = MASK.shape
OLD = np.log(RNG.uniform(0.1, 0.9, SHAPE))
# By hand, so that every level opens other gates: row 0 falls as a whole, its first action does not;
# in row 2 the first token falls and nothing else.
LOGPROBS = OLD + np.array(
  [
    [-0.5, 0.8, 9.0, -0.6, 0.1, -0.2],
    [0.0, -0.7, 0.3, 0.0, -0.4, 0.0],
    [-0.3, 0.5, 0.1, 0.2, 0.0, 0.0],
    [0.0] * 6,
  ]
)
ADVANTAGES = np.array([1.5, -0.7, 0.0, 2.0])
ANSWER = np.array([[False] * 4 + [True] * 2] * 4)
LLDS = jax.jit(jax.value_and_grad(losses.llds_loss, has_aux=True), static_argnames="level")


def units(level, ids=ACTIONS):
  """[(row, its tokens)] of every gate."""
  for b in range(SHAPE[0]):
    tokens = [t for t in range(SHAPE[1]) if MASK[b, t]]
    if level == "token":
      yield from ((b, [t]) for t in tokens)
    elif level == "response":
      yield b, tokens
    else:
      yield from ((b, [t for t in tokens if ids[b, t] == i]) for i in {ids[b, t] for t in tokens})


def llds_loop(level, weights, ids=ACTIONS):
  """The loss, the gradient, and (open units, units)."""
  total, gradient, gates = 0.0, np.zeros(SHAPE), []
  for b, tokens in units(level, ids):
    if ADVANTAGES[b] < 0 or not tokens:
      continue
    gates.append(sum(OLD[b, t] - LOGPROBS[b, t] for t in tokens) > 0)
    for t in tokens:
      lost = OLD[b, t] - LOGPROBS[b, t]
      if gates[-1] and lost > 0:
        total += weights[b, t] * lost
        gradient[b, t] = -weights[b, t]
  return total, gradient, (sum(gates), len(gates))


def llds_weights_loop(normalizer, answer_weight):
  kept = [b for b in range(SHAPE[0]) if ADVANTAGES[b] >= 0 or normalizer == "all"]
  tokens = sum(MASK[b].sum() for b in kept)
  return np.where(ANSWER, answer_weight, 1.0) * MASK / tokens


@pytest.mark.parametrize("normalizer", ["preserving", "all"])
@pytest.mark.parametrize("level", ["action", "token", "response"])
def test_llds_matches_the_loop(level, normalizer):
  weights = np.asarray(
    losses.llds_weights(
      ADVANTAGES, MASK, normalizer=normalizer, answer_mask=ANSWER, answer_weight=0.5
    )
  )
  np.testing.assert_allclose(weights, llds_weights_loop(normalizer, 0.5), rtol=1e-6)
  (loss, metrics), gradient = LLDS(LOGPROBS, OLD, ADVANTAGES, weights, level=level)
  total, slope, gates = llds_loop(level, weights)
  np.testing.assert_allclose(loss, total, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-6)
  np.testing.assert_allclose(metrics["gate_open"], gates, rtol=1e-6)
  assert 0 < gates[0]


def test_the_levels_differ_and_action_ids_may_be_given():
  weights = np.asarray(losses.llds_weights(ADVANTAGES, MASK))
  values = [llds_loop(level, weights)[0] for level in ("action", "token", "response")]
  assert len(set(values)) == 3  # or the rows above would prove nothing
  ids = np.array([[5, 5, 1, 5, 2, 2], [0] * 6, [3, 1, 1, 3, 0, 0], [0] * 6])
  (loss, _), _ = LLDS(LOGPROBS, OLD, ADVANTAGES, weights, action_ids=ids)
  np.testing.assert_allclose(loss, llds_loop("action", weights, ids)[0], rtol=1e-5)
  assert loss != values[0]


def test_actions_are_runs_of_the_mask():
  np.testing.assert_array_equal(losses.action_ids_of(MASK), ACTIONS)


@pytest.mark.parametrize("level", ["action", "token", "response"])
def test_nothing_is_lost_before_the_first_update(level):
  weights = losses.llds_weights(ADVANTAGES, MASK)
  (loss, _), gradient = LLDS(OLD, OLD, ADVANTAGES, weights, level=level)
  assert loss == 0 and not np.any(gradient)


def test_the_diagnostics_are_those_of_each_sign():
  weights = np.asarray(losses.llds_weights(ADVANTAGES, MASK))
  (_, metrics), _ = LLDS(LOGPROBS, OLD, ADVANTAGES, weights)
  moved = LOGPROBS - OLD
  for name, x, row in [
    ("log_ratio_positive", moved, 0),
    ("log_ratio_negative", moved, 1),
    ("logprob_positive", LOGPROBS, 0),
  ]:
    expected = x[row][MASK[row]].sum(), MASK[row].sum()
    np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)


def test_a_zero_weight_keeps_its_place_in_the_gate_if_the_mask_is_passed():
  """The answer fell, the search rose less: counted with weight 0, the answer opens the gate."""
  old, now = np.zeros((1, 3)), np.array([[-0.1, 0.3, -1.0]])
  mask, answer, good = np.ones((1, 3), bool), np.array([[False, False, True]]), np.ones(1)
  weights = losses.llds_weights(good, mask, answer_mask=answer, answer_weight=0.0)
  np.testing.assert_allclose(LLDS(now, old, good, weights, mask=mask)[0][0], 0.1 / 3, rtol=1e-5)
  assert LLDS(now, old, good, weights)[0][0] == 0


def test_nothing_to_preserve_weighs_nothing():
  assert not np.any(losses.llds_weights(-np.ones(4), MASK))
  assert np.any(losses.llds_weights(-np.ones(4), MASK, normalizer="all"))


def test_positive_nll_is_sft_on_the_right_answers():
  correct = np.array([True, False, True, True])
  weights = weighting.token_mean(MASK & correct[:, None])
  f = jax.jit(jax.value_and_grad(losses.positive_nll_loss, has_aux=True))
  (loss, metrics), gradient = f(LOGPROBS, correct, weights)
  right = [(b, t) for b, t in np.argwhere(MASK) if correct[b]]
  nll = -sum(LOGPROBS[b, t] for b, t in right)
  np.testing.assert_allclose(loss, nll / len(right), rtol=1e-5)
  np.testing.assert_allclose(metrics["positive_nll"], (nll, len(right)), rtol=1e-5)
  np.testing.assert_allclose(gradient, -np.asarray(weights), rtol=1e-6)
  (loss, _), gradient = f(LOGPROBS, correct, weighting.token_mean(MASK))
  assert not np.any(gradient[1]) and np.any(gradient[0])


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: losses.llds_loss(OLD, OLD, ADVANTAGES, OLD, level="turn"), "level is 'turn'.*'token'"),
    (lambda: losses.llds_loss(OLD, OLD, ADVANTAGES, OLD, action_ids=OLD), "action_ids has dtype"),
    (
      lambda: losses.llds_loss(OLD, OLD, ADVANTAGES, OLD, action_ids=np.ones(3, int)),
      "action_ids has shape",
    ),
    (lambda: losses.llds_weights(ADVANTAGES, MASK, normalizer="none"), "normalizer is 'none'"),
    (lambda: losses.llds_weights(ADVANTAGES, MASK * 1.0), "mask has dtype"),
    (lambda: losses.llds_weights(ADVANTAGES[:1], MASK), "advantages has shape"),
    (lambda: losses.llds_weights(ADVANTAGES, MASK, answer_mask=MASK[:1]), "answer_mask has shape"),
    (lambda: losses.action_ids_of(jnp.ones(3, bool)), "mask has shape"),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
