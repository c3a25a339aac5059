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

Importing this package loads jax, numpy and chex, and nothing else. To add a loss, write it in a
file of its family, and name it in `__all__` and at `POLICY_LOSSES` below; docs/design.md, "How to
add", has the rest (its row in tests/losses/battery.py, the index of the docs).
"""

from rl_llm.losses.anchored import apo_down_loss, apo_zero_loss, bco_loss, nca_loss, sppo_loss
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
from rl_llm.losses.dpo import dpo_loss, hinge_dpo_loss, robust_dpo_loss, wpo_weights
from rl_llm.losses.likelihood import action_ids_of, llds_loss, llds_weights, positive_nll_loss
from rl_llm.losses.margin import discopop_loss, exo_loss, ipo_loss
from rl_llm.losses.optimal_transport import BATCH_COUPLED, aot_loss, aot_unpaired_loss
from rl_llm.losses.policy_gradient import grpo_loss, ppo_loss, reinforce_loss
from rl_llm.losses.quadratic import drpo_loss, spo_loss
from rl_llm.losses.reference_free import alphapo_loss, cpo_loss, orpo_loss, simpo_loss
from rl_llm.losses.regularization import entropy_loss, kl_loss, value_loss
from rl_llm.losses.reward_model import reward_model_loss
from rl_llm.losses.sequence_ratio import gmpo_loss, gspo_loss, gspo_token_loss, vespo_loss
from rl_llm.losses.supervised import dft_loss, sft_loss
from rl_llm.losses.targets import astar_po_loss, tpo_loss
from rl_llm.losses.token_ratio import cispo_loss, dppo_kl_loss, dppo_tv_loss, dro_loss, sapo_loss
from rl_llm.losses.unpaired import (
  bco_shift,
  bco_unpaired_loss,
  kto_baseline,
  kto_loss,
  nash_md_loss,
  xpo_loss,
)

# To offer a loss in the experiments, add it here: --loss= knows its name, and its keywords are
# flags (`rl_llm.runs.keywords`). The first is the default. All losses of a tuple share one
# signature, (logprobs, old_logprobs, advantages, weights, *, mask=None, ...); the exception is
# `reinforce_loss`, which takes no `old_logprobs`. A loss that is not 0 where the advantage is 0
# must also be named in `policy_term_only` of experiments/flags.py, which leaves such responses out.
POLICY_LOSSES = (
  grpo_loss,
  ppo_loss,
  reinforce_loss,
  cispo_loss,
  sapo_loss,
  dppo_tv_loss,
  dppo_kl_loss,
  dro_loss,
  gspo_loss,
  gspo_token_loss,
  gmpo_loss,
  vespo_loss,
  spo_loss,
  drpo_loss,
)
# (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, weights, *, ...);
# the last four have no reference.
PREFERENCE_LOSSES = (
  dpo_loss,
  robust_dpo_loss,
  hinge_dpo_loss,
  ipo_loss,
  exo_loss,
  nca_loss,
  bco_loss,
  sppo_loss,
  apo_zero_loss,
  apo_down_loss,
  discopop_loss,
  aot_loss,
  alphapo_loss,
  simpo_loss,
  cpo_loss,
  orpo_loss,
)

# On single answers, good or bad: AOT's compares one list of each.
UNPAIRED_LOSSES = (kto_loss, bco_unpaired_loss, aot_unpaired_loss)

__all__ = [
  "BATCH_COUPLED",
  "POLICY_LOSSES",
  "PREFERENCE_LOSSES",
  "UNPAIRED_LOSSES",
  "action_ids_of",
  "alphapo_loss",
  "aot_loss",
  "aot_unpaired_loss",
  "apo_down_loss",
  "apo_zero_loss",
  "astar_po_loss",
  "bco_loss",
  "bco_shift",
  "bco_unpaired_loss",
  "chunked_gkd_loss",
  "cispo_loss",
  "clip_cov_loss",
  "clip_cov_mask",
  "cpo_loss",
  "dft_loss",
  "discopop_loss",
  "dpo_loss",
  "dppo_kl_loss",
  "dppo_tv_loss",
  "dro_loss",
  "drpo_loss",
  "entropy_loss",
  "exo_loss",
  "gkd_loss",
  "gmpo_loss",
  "grpo_loss",
  "gspo_loss",
  "gspo_token_loss",
  "hinge_dpo_loss",
  "ipo_loss",
  "kl_cov_loss",
  "kl_cov_mask",
  "kl_loss",
  "kto_baseline",
  "kto_loss",
  "llds_loss",
  "llds_weights",
  "minillm_advantages",
  "nash_md_loss",
  "nca_loss",
  "on_policy_distillation_loss",
  "orpo_loss",
  "positive_nll_loss",
  "ppo_clipped",
  "ppo_loss",
  "reinforce_loss",
  "reward_model_loss",
  "robust_dpo_loss",
  "sapo_loss",
  "sft_loss",
  "simpo_loss",
  "spo_loss",
  "sppo_loss",
  "token_covariance",
  "tpo_loss",
  "value_loss",
  "vespo_loss",
  "wpo_weights",
  "xpo_loss",
]
