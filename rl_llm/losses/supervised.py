"""Learning from given answers: the likelihood terms."""

from __future__ import annotations

import jax.numpy as jnp

from rl_llm.checks import Array, Metrics
from rl_llm.losses import _checks


def sft_loss(logprobs, weights) -> tuple[Array, Metrics]:
  """Negative log-likelihood of the given tokens.

      loss = -sum(weights * logprobs)

  Tokens of probability 1/2 and 1/8 cost log 2 and log 8, on average 2 log 2:

  >>> loss, _ = sft_loss(jnp.log(jnp.array([[0.5, 0.125]])), jnp.full((1, 2), 0.5))
  >>> round(float(loss / jnp.log(2)), 3)
  2.0

  In other words: REINFORCE in which every answer has advantage 1.

  With a large vocabulary, compute the log-probs in chunks, so that no [B, T, V] array exists:

  >>> from rl_llm.logprobs import chunked_logprobs_and_entropy
  >>> hidden, unembedding = jnp.zeros((1, 2, 4)), jnp.ones((8, 4))  # all 8 tokens equally likely
  >>> logprobs, _ = chunked_logprobs_and_entropy(
  ...   hidden, unembedding, jnp.array([[3, 5]]), chunk_size=1)
  >>> loss, _ = sft_loss(logprobs, jnp.full((1, 2), 0.5))
  >>> round(float(loss / jnp.log(2)), 3)  # log 8
  3.0

  Args:
    logprobs: [B, T] float, log-probs of the given tokens under the policy being trained, in nats.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.

  Returns:
    The scalar loss, at least float32, and metrics {"nll"}: per token, unweighted.

  Raises:
    ValueError: shapes differ, or a dtype is not float; the message names the argument.

  Needs: demonstrations.

  Reference: Ouyang et al., 2022, Training language models to follow instructions with human
    feedback, https://arxiv.org/abs/2203.02155
  """
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights)
  return -jnp.sum(weights * logprobs), {"nll": _checks.metric(-logprobs, mask)}
