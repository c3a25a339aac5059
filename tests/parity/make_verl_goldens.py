"""What verl's own functions say about `inputs.py`: losses, gradients and advantages.

Runs where torch and verl are installed (`make parity`), writes goldens/verl.npz. verl imports ray
to talk to other machines; nothing here does, so an empty module takes its place.
"""

import pathlib
import sys
from unittest import mock

for name in (
  "ray",
  "ray.actor",
  "ray.util",
  "ray.util.placement_group",
  "ray.experimental",
  "ray.util.scheduling_strategies",
  "ray.experimental.state",
  "ray.experimental.state.api",
):
  sys.modules[name] = mock.MagicMock()

import inputs as x  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from verl.trainer.ppo import core_algos, rollout_corr_helper  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.config.actor import PolicyLossConfig  # noqa: E402

MASK = torch.tensor(x.MASK, dtype=torch.float32)
TOKENS, ROWS = int(x.MASK.sum()), int(x.MASK.any(axis=1).sum())
GOLDENS = {}


def record(name, loss, trained):
  """Stores a loss, or a [B, T] array whose sum over the mask is differentiated, and gradients."""
  GOLDENS[f"{name}/value"] = loss.detach().numpy()
  for key, leaf in trained.items():
    if loss.ndim:
      loss = (loss * MASK).sum()
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    GOLDENS[f"{name}/{key}"] = gradient.numpy()


def leaf(array):
  return torch.tensor(array, requires_grad=True)


def policy(
  name,
  mode,
  *,
  aggregation="token-mean",
  factors=None,
  rows=slice(None),
  token=False,
  batch=None,
  policy_loss=None,
  **settings,
):
  config = ActorConfig(
    strategy="fsdp",
    rollout_n=1,
    ppo_micro_batch_size_per_gpu=1,
    global_batch_info=batch or {},
    **settings,
  )
  object.__setattr__(config, "policy_loss", PolicyLossConfig(**policy_loss or {}))
  logprobs = leaf(x.LOGPROBS[rows])
  advantages = torch.tensor(
    x.TOKEN_ADVANTAGES if token else np.repeat(x.ADVANTAGES[:, None], x.T, axis=1)
  )[rows]
  loss, _ = core_algos.get_policy_loss_fn(mode)(
    torch.tensor(x.OLD[rows]),
    logprobs,
    advantages,
    MASK[rows],
    aggregation,
    config,
    None if factors is None else torch.tensor(factors[rows]),
  )
  record(name, loss, {"logprobs": logprobs})


MODES = {
  "token_mean": "token-mean",
  "sequence_mean": "seq-mean-token-mean",
  "sequence_sum": "seq-mean-token-sum",
  "constant_length": "seq-mean-token-sum-norm",
}
for ours, theirs in MODES.items():
  norm = {"loss_scale_factor": 9} if ours == "constant_length" else {}
  policy(f"ppo {ours}", "vanilla", aggregation=theirs, batch=norm)
policy("ppo clip_ratio 0.01", "vanilla", clip_ratio=0.01)
policy("ppo clip-higher, factors", "vanilla", clip_ratio_high=0.28, factors=x.FACTORS)
policy("ppo dual clip 1.5, token advantages", "vanilla", clip_ratio_c=1.5, token=True)
# A microbatch that knows the counts of the whole batch.
for i in (0, 2, 4):
  policy(f"ppo rows {i}", "vanilla", rows=slice(i, i + 2), batch={"batch_num_tokens": TOKENS})
  policy(
    f"ppo sequence_mean rows {i}",
    "vanilla",
    rows=slice(i, i + 2),
    aggregation="seq-mean-token-mean",
    batch={"global_batch_size": ROWS},
  )
policy("dppo_tv", "dppo_tv", token=True)
policy("dppo_tv cap 1.1, factors", "dppo_tv", clip_ratio_c=1.1, factors=x.FACTORS)
policy("dppo_kl", "dppo_kl", clip_ratio_low=0.05, clip_ratio_high=0.03, token=True)
policy("gspo", "gspo", aggregation="seq-mean-token-mean")
policy(
  "gspo factors",
  "gspo",
  aggregation="token-mean",
  clip_ratio_low=0.05,
  clip_ratio_high=0.1,
  factors=x.FACTORS,
)
policy("sapo", "sapo")
policy("gpg", "gpg", factors=x.FACTORS)
# Every candidate fits into the selection, so that the random order plays no part.
policy(
  "clip_cov",
  "clip_cov",
  token=True,
  policy_loss={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 0.5},
)
policy("kl_cov", "kl_cov", token=True, policy_loss={"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7})
policy("gmpo", "geo_mean")
policy("gmpo clip 0.4", "geo_mean", clip_ratio_low=0.4, clip_ratio_high=0.4)
policy("dro", "dro", policy_loss={"dro_beta": 0.3})
policy("cispo", "cispo")
policy("cispo factors", "cispo", clip_ratio_low=1.0, clip_ratio_high=0.5, factors=x.FACTORS)

for name, aggregation in (("token_mean", "token-mean"), ("sequence_mean", "seq-mean-token-mean")):
  logprobs = leaf(x.LOGPROBS)
  config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
  loss, _ = core_algos.compute_policy_loss_reinforce(
    torch.tensor(x.OLD),
    logprobs,
    torch.tensor(x.TOKEN_ADVANTAGES),
    MASK,
    aggregation,
    config,
    torch.tensor(x.FACTORS),
  )
  record(f"reinforce {name}", loss, {"logprobs": logprobs})
  values = leaf(x.VALUES)
  loss, _ = core_algos.compute_value_loss(
    values, torch.tensor(x.RETURNS), torch.tensor(x.OLD_VALUES), MASK, 0.5, aggregation
  )
  record(f"value {name}", loss, {"values": values})
  logits = leaf(x.LOGITS)
  loss = core_algos.compute_entropy_loss(logits, MASK, aggregation)
  record(f"entropy {name}", loss, {"logits": logits})

for kind in ("k1", "k2", "k3", "k1+", "k3+"):
  logprobs = leaf(x.LOGPROBS)
  record(
    f"kl {kind}", core_algos.kl_penalty(logprobs, torch.tensor(x.REF), kind), {"logprobs": logprobs}
  )


def advantage(name, function, **arguments):
  GOLDENS[f"advantage {name}/value"] = function(**arguments)[0].numpy()


COMMON = {"token_level_rewards": torch.tensor(x.TOKEN_REWARDS), "response_mask": MASK}
GROUPED = COMMON | {"index": x.GROUPS}
CONFIG = mock.Mock(gamma=0.9)
advantages, returns = core_algos.compute_gae_advantage_return(
  **COMMON, values=torch.tensor(x.VALUES), gamma=0.97, lam=0.9
)
GOLDENS["advantage gae whitened/value"] = advantages.numpy()
GOLDENS["advantage gae returns/value"] = returns.numpy()
advantage("group_relative", core_algos.compute_grpo_outcome_advantage, **GROUPED)
advantage(
  "group_relative none",
  core_algos.compute_grpo_outcome_advantage,
  **GROUPED,
  norm_adv_by_std_in_grpo=False,
)
advantage(
  "group_relative, one response",
  core_algos.compute_grpo_outcome_advantage,
  **COMMON,
  index=np.arange(x.B),
)
advantage("leave_one_out", core_algos.compute_rloo_outcome_advantage, **GROUPED)
advantage(
  "leave_one_out, one response",
  core_algos.compute_rloo_outcome_advantage,
  **COMMON,
  index=np.arange(x.B),
)
advantage(
  "leave_one_out vectorized, one response",
  core_algos.compute_rloo_vectorized_outcome_advantage,
  **COMMON,
  index=np.arange(x.B),
)
advantage(
  "reinforce_plus_plus",
  core_algos.compute_reinforce_plus_plus_outcome_advantage,
  **COMMON,
  config=CONFIG,
)
advantage(
  "reinforce_plus_plus_baseline",
  core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage,
  **GROUPED,
)
advantage("opo", core_algos.compute_opo_outcome_advantage, **GROUPED)
advantage("gpg", core_algos.compute_gpg_outcome_advantage, **GROUPED)
advantage(
  "remax",
  core_algos.compute_remax_outcome_advantage,
  **COMMON,
  reward_baselines=torch.tensor(np.repeat(x.GREEDY, x.G)),
)
for scale in (True, False):
  advantage(
    f"pass_at_k {'std' if scale else 'none'}",
    core_algos.compute_grpo_passk_outcome_advantage,
    **GROUPED,
    config={"norm_adv_by_std_in_grpo": scale},
  )
advantage(
  "optimal_token_baseline",
  core_algos.compute_optimal_token_baseline_advantage,
  **GROUPED,
  old_log_probs=torch.tensor(x.OLD),
  sum_pi_squared=torch.tensor(x.SUM_SQUARES),
)
for name in ("", " multi-turn"):
  function = (
    core_algos.compute_multi_turn_optimal_token_baseline_advantage
    if name
    else core_algos.compute_optimal_token_baseline_advantage
  )
  advantage(
    f"optimal_token_baseline{name}, tail kept",
    function,
    **GROUPED,
    handle_zero_tail=False,
    old_log_probs=torch.tensor(x.OLD),
    sum_pi_squared=torch.tensor(x.SUM_SQUARES),
  )
# verl finds the last token by counting attention, so it needs rows without holes: the prompt is
# empty here, and the whole array counts as the response.
full = torch.ones_like(MASK)
GOLDENS["advantage gdpo/value"] = core_algos.compute_gdpo_outcome_advantage(
  torch.tensor(x.TOKEN_REWARDS),
  full,
  x.GROUPS,
  config={"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": [1.0, 0.5]},
  non_tensor_batch={"a": x.REWARDS.reshape(-1), "b": x.MORE_REWARDS.reshape(-1)},
  batch={"prompts": torch.zeros((x.B, 0)), "attention_mask": full.long()},
)[0].numpy()
GOLDENS["advantage token_rewards/value"] = core_algos.compute_rewards(
  torch.tensor(x.TOKEN_REWARDS), torch.tensor(x.OLD), torch.tensor(x.REF), 0.05
).numpy()

MISMATCH = torch.tensor(x.OLD - x.SAMPLER)
for name, level, threshold in (
  ("token", "token", 1.5),
  ("sequence", "sequence", 2.0),
  ("icepop", "token", "0.7_1.4"),
):
  weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
    MISMATCH, MASK, level, threshold
  )
  GOLDENS[f"importance {name}/value"] = weights.numpy()
for name, kind in (("token", "token_k1"), ("geometric", "seq_mean_k1"), ("sequence", "seq_sum_k1")):
  mask, _ = rollout_corr_helper.compute_rollout_rejection_mask(MISMATCH, MASK, kind, "0.8_1.6")
  GOLDENS[f"rejection {name}/value"] = mask.numpy()

for kind in ("seq_max_k3", "seq_max_k2", "seq_mean_k3"):
  mask, _ = rollout_corr_helper.compute_rollout_rejection_mask(MISMATCH, MASK, kind, "0.15")
  GOLDENS[f"trust region {kind}/value"] = mask.numpy()

path = pathlib.Path(__file__).parent / "goldens" / "verl.npz"
path.parent.mkdir(exist_ok=True)
np.savez_compressed(path, **GOLDENS)
print(f"{path.name}: {len(GOLDENS)} arrays, {path.stat().st_size:,} bytes")
