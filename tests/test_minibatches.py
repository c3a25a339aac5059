"""How much each token of an update counts, in the loss and in its KL term."""

import jax
import numpy as np

from rl_llm import weighting
from rl_llm.rollout import ResponseBatch
from rl_llm.training.minibatches import all_weights, make_programs

MASK = np.array([[True, True, True], [True, False, False], [True, True, False], [True] * 3])
ROWS = np.zeros(MASK.shape, np.int32)
BATCH = ResponseBatch(
  np.zeros((2, 2), np.int32),
  np.array([1, 2]),
  ROWS,
  MASK,
  MASK,
  truncated=np.array([False, False, True, False]),
)


def test_the_weights_of_the_kl_are_those_of_the_loss_unless_named():
  found = all_weights(BATCH, name="token_mean", length=8)
  np.testing.assert_array_equal(found["weights"], weighting.token_mean(MASK))
  assert found["kl_weights"] is None


def test_a_kl_term_may_have_weights_of_its_own():
  found = all_weights(BATCH, name="token_mean", length=8, kl_name="sequence_mean", truncated="zero")
  kept = np.where(BATCH.truncated[:, None], 0, 1)
  np.testing.assert_array_equal(found["weights"], weighting.token_mean(MASK) * kept)
  np.testing.assert_array_equal(found["kl_weights"], weighting.sequence_mean(MASK) * kept)


def test_an_update_takes_both_with_its_rows():
  weigh = lambda batch: all_weights(batch, name="token_mean", length=8, kl_name="sequence_sum")  # noqa: E731
  programs = make_programs(None, None, temperature=1.0, weigh=weigh)
  taken = programs.take(jax.tree.map(jax.numpy.asarray, BATCH), np.array([1]))
  np.testing.assert_array_equal(taken.weights, weighting.token_mean(MASK[2:]))
  np.testing.assert_array_equal(taken.kl_weights, weighting.sequence_sum(MASK[2:]))
  assert taken.truncated is None
