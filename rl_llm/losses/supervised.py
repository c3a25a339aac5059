"""Learning from given answers: the likelihood terms."""

from __future__ import annotations

import jax
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


def dft_loss(logprobs, weights) -> tuple[Array, Metrics]:
  """DFT (Dynamic Fine-Tuning): likelihood, each token counted by how likely it already is.

      loss = -sum(weights * stop_gradient(exp(logprobs)) * logprobs)

  As a policy gradient, fine-tuning has the reward 1 / p for the given token: the less likely it is,
  the harder it is pushed, so single tokens that the model finds absurd make most of the gradient.
  The factor p cancels that, and every token is pushed by its probability. Of two tokens, `sft_loss`
  pushes the rare one as hard as the likely one; here it hardly moves:

  >>> logprobs, weights = jnp.log(jnp.array([[0.5, 0.01]])), jnp.ones((1, 2))
  >>> gradient = lambda f: jax.grad(lambda x: f(x, weights)[0])(logprobs)[0]
  >>> [[round(float(g), 3) for g in gradient(f)] for f in (sft_loss, dft_loss)]
  [[-1.0, -1.0], [-0.5, -0.01]]

  A common misconception is that this is always the better choice. What the model finds unlikely is
  then not learned: right for a model that nearly knows the domain, wrong for new facts.

  Args:
    logprobs: [B, T] float, log-probs of the given tokens under the policy being trained, in nats.
    weights: [B, T] float, from `rl_llm.weighting`: how much each token counts; a constant.

  Returns:
    The scalar loss, at least float32, and metrics {"nll", "probability"}: per token, unweighted.

  Raises:
    ValueError: shapes differ, or a dtype is not float; the message names the argument.

  Needs: demonstrations.

  Reference: Wu et al., 2025, On the Generalization of SFT, https://arxiv.org/abs/2508.05629
  """
  logprobs, weights, mask = _checks.tokens("logprobs", logprobs, weights)
  probabilities = jnp.exp(jnp.minimum(jax.lax.stop_gradient(logprobs), 0))
  metrics = {
    "nll": _checks.metric(-logprobs, mask),
    "probability": _checks.metric(probabilities, mask),
  }
  return -jnp.sum(weights * probabilities * logprobs), metrics
