"""Losses for reinforcement learning of language models, as functions of arrays.

A loss is one term of an objective, to minimise: `(loss, metrics)`, ready for
`jax.value_and_grad(..., has_aux=True)`. The loss is `sum(per_token * weights)` with weights from
`rl_llm.weighting`; metrics are a dict of `(sum, count)` pairs, which add across microbatches and
hosts. An objective is their sum, written out by the caller:

>>> import jax, jax.numpy as jnp
>>> from rl_llm import losses, weighting
>>> def objective(logprobs, ref_logprobs, old_logprobs, advantages, mask):
...   weights = weighting.token_mean(mask)
...   policy, metrics = losses.grpo_loss(logprobs, old_logprobs, advantages, weights)
...   kl, kl_metrics = losses.kl_loss(logprobs, ref_logprobs, weights)
...   return policy + 0.04 * kl, metrics | kl_metrics
>>> logprobs, mask = jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([[True, True]])
>>> gradient, metrics = jax.grad(objective, has_aux=True)(
...   logprobs, logprobs, logprobs, jnp.array([1.0]), mask)
>>> gradient.tolist()
[[-0.5, -0.5]]

Importing this package loads jax, numpy and chex, and nothing else.
"""

from rl_llm.losses.covariance import (
  clip_cov_loss,
  clip_cov_mask,
  kl_cov_loss,
  kl_cov_mask,
  ppo_clipped,
  token_covariance,
)
from rl_llm.losses.distillation import (
  chunked_gkd_loss,
  gkd_loss,
  minillm_advantages,
  on_policy_distillation_loss,
)
from rl_llm.losses.likelihood import (
  action_ids_of,
  llds_loss,
  llds_weights,
  positive_nll_loss,
)
from rl_llm.losses.policy_gradient import grpo_loss, ppo_loss, reinforce_loss
from rl_llm.losses.regularization import entropy_loss, kl_loss, value_loss
from rl_llm.losses.sequence_ratio import gmpo_loss, gspo_loss, gspo_token_loss, vespo_loss
from rl_llm.losses.supervised import sft_loss
from rl_llm.losses.token_ratio import (
  cispo_loss,
  dppo_kl_loss,
  dppo_tv_loss,
  dro_loss,
  sapo_loss,
)

__all__ = [
  "action_ids_of",
  "chunked_gkd_loss",
  "cispo_loss",
  "clip_cov_loss",
  "clip_cov_mask",
  "dppo_kl_loss",
  "dppo_tv_loss",
  "dro_loss",
  "entropy_loss",
  "gkd_loss",
  "gmpo_loss",
  "grpo_loss",
  "gspo_loss",
  "gspo_token_loss",
  "kl_cov_loss",
  "kl_cov_mask",
  "kl_loss",
  "llds_loss",
  "llds_weights",
  "minillm_advantages",
  "on_policy_distillation_loss",
  "positive_nll_loss",
  "ppo_clipped",
  "ppo_loss",
  "reinforce_loss",
  "sapo_loss",
  "sft_loss",
  "token_covariance",
  "value_loss",
  "vespo_loss",
]
