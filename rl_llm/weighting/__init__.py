"""How much each token counts: every aggregation of a loss, as an array of weights.

Every loss here is `sum(per_token * weights)`. What other code calls a loss mode (token mean,
sequence mean, Dr. GRPO) and what it calls a correction (truncated importance sampling, IcePop,
top-entropy masks) are then the same thing: numbers in a [B, T] array. Weights turn the sum into a
mean; factors multiply the weights.

A common misconception is that each microbatch may have its own weights, since each is "a mean". For
ragged rows, the mean of means is not the mean. Two rows, one of 3 tokens with loss 1 and one of 1
token with loss 0, have the token mean 3/4; the mean of the rows' own means is 1/2:

>>> import jax.numpy as jnp
>>> mask = jnp.array([[True, True, True], [True, False, False]])
>>> loss = jnp.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
>>> float(jnp.sum(loss * token_mean(mask)))
0.75
>>> float(jnp.mean(jnp.array([jnp.sum(loss[i] * token_mean(mask[i:i+1])[0]) for i in (0, 1)])))
0.5

So make the weights once, for the whole batch of one optimiser step, and split them along with the
tokens. The gradients of the microbatches then add up to the gradient of the whole batch.

In other words, the mask says which tokens belong to a response, and the weights say how much they
count. A factor of 0 changes the weights, never the membership.
"""

from rl_llm.weighting.factors import drop_truncated, top_entropy, truncated_importance
from rl_llm.weighting.means import (
  constant_length,
  length_power,
  prompt_mean,
  sequence_mean,
  sequence_sum,
  token_mean,
)
from rl_llm.weighting.shared import shared_tokens
from rl_llm.weighting.trust_region import off_policy_mask, second_moment_mask, trust_region_mask

__all__ = [
  "constant_length",
  "drop_truncated",
  "length_power",
  "off_policy_mask",
  "prompt_mean",
  "second_moment_mask",
  "sequence_mean",
  "sequence_sum",
  "shared_tokens",
  "token_mean",
  "top_entropy",
  "truncated_importance",
  "trust_region_mask",
]
