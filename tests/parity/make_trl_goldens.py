"""What TRL's own methods say about `inputs.py`: losses, gradients and advantages.

Runs where torch and trl are installed (`make parity`), writes goldens/trl.npz. TRL's formulas are
methods of trainers; here they run on objects that have no model, whose "forward pass" hands out the
log-probs of `inputs.py`.
"""

import collections
import pathlib
import types
from unittest import mock

import inputs as x
import numpy as np
import torch
from trl.experimental.a2po.a2po_trainer import A2POTrainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer

MASK = torch.tensor(x.MASK, dtype=torch.float32)
GOLDENS = {}


class Accelerator:
  """One process: nothing to gather."""

  num_processes, sync_gradients, device, process_index = 1, True, torch.device("cpu"), 0
  parallelism_config = None

  def gather(self, tensor, **_):
    return tensor

  def reduce(self, tensor, **_):
    return tensor

  def pad_across_processes(self, tensor, **_):
    return tensor

  gather_for_metrics = gather


def bare(trainer, args=(), **attributes):
  """An instance of a trainer without its `__init__`: `args` are fields of its config."""
  made = trainer.__new__(trainer)
  made.__dict__ |= {
    "accelerator": Accelerator(),
    "model": types.SimpleNamespace(training=True),
    "_metrics": {"train": collections.defaultdict(list)},
    "aux_loss_enabled": False,
    "args": types.SimpleNamespace(**dict(args)),
    **attributes,
  }
  return made


def record(name, loss, trained):
  GOLDENS[f"{name}/value"] = loss.detach().numpy()
  for key, leaf in trained.items():
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    GOLDENS[f"{name}/{key}"] = gradient.numpy()


def leaf(array):
  return torch.tensor(array, requires_grad=True)


def grpo(
  name,
  trainer=GRPOTrainer,
  *,
  factors=None,
  entropy_coef=0.0,
  args=(),
  advantages=None,
  **attributes,
):
  logprobs, entropies = leaf(x.LOGPROBS), leaf(x.ENTROPIES)
  settings = {
    "delta": None,
    "use_bias_correction_kl": False,
    "steps_per_generation": 1,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
  }
  made = bare(
    trainer,
    settings | dict(args),
    **{
      "top_entropy_quantile": 1.0,
      "off_policy_mask_threshold": None,
      "beta": 0.0,
      "importance_sampling_level": "token",
      "loss_type": "dapo",
      "epsilon_low": 0.2,
      "epsilon_high": 0.2,
      "use_vllm": factors is not None,
      "max_completion_length": 9,
      "vllm_importance_sampling_correction": True,
      "current_gradient_accumulation_steps": 1,
      "_entropy_bonus_enabled": entropy_coef != 0,
      "use_adaptive_entropy": False,
      "entropy_coef": entropy_coef,
      "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, entropies, None),
    }
    | attributes,
  )
  none = torch.zeros((x.B, 0))
  loss = made._compute_loss(
    None,
    {
      "prompt_ids": none,
      "prompt_mask": none,
      "completion_ids": MASK,
      "completion_mask": MASK,
      "advantages": torch.tensor(x.ADVANTAGES if advantages is None else advantages),
      "old_per_token_logps": torch.tensor(x.OLD),
      "ref_per_token_logps": torch.tensor(x.REF),
      "sampling_per_token_logps": torch.tensor(x.SAMPLER),
      "num_items_in_batch": MASK.sum(),
      "old_logps": (torch.tensor(x.OLD) * MASK).sum(1),
    }
    | ({} if factors is None else {"importance_sampling_ratio": torch.tensor(factors)}),
  )
  record(name, loss, {"logprobs": logprobs} | ({"entropies": entropies} if entropy_coef else {}))


grpo("dapo")
grpo("dapo clip-higher, factors", epsilon_high=0.28, factors=x.FACTORS)
grpo("dapo delta 1.5", args={"delta": 1.5})
grpo("grpo", loss_type="grpo")
grpo("dr_grpo", loss_type="dr_grpo")
grpo("bnpo", loss_type="bnpo")
grpo("grpo kl 0.04", loss_type="grpo", beta=0.04)
grpo("dapo ratio * kl 0.04", beta=0.04, args={"use_bias_correction_kl": True})
grpo("dapo entropy 0.01", entropy_coef=0.01)
grpo("dapo top entropy 0.4", top_entropy_quantile=0.4)
grpo("dapo off-policy mask 0.05", off_policy_mask_threshold=0.05)
grpo("dapo token advantages", advantages=x.TOKEN_ADVANTAGES)
grpo("gspo", loss_type="grpo", importance_sampling_level="sequence")
grpo(
  "gspo clip 0.05",
  loss_type="dapo",
  importance_sampling_level="sequence",
  epsilon_low=0.05,
  epsilon_high=0.1,
)
grpo("luspo", loss_type="luspo", importance_sampling_level="sequence")
grpo("cispo", loss_type="cispo", epsilon_high=1.3)
grpo("sapo", loss_type="sapo")
grpo("vespo", loss_type="vespo")
grpo("gmpo", GMPOTrainer, epsilon_low=0.4, epsilon_high=0.4)
grpo("rloo", RLOOTrainer)
grpo("rloo clip 0.5", RLOOTrainer, epsilon_low=0.5, epsilon_high=0.5)

PAIR_MASK = torch.tensor(x.PAIR_MASK, dtype=torch.float32)


def outputs(logprobs, log_sum_of_squares=-0.2):
  """What a model with TRL's fused head returns; the first position predicts nothing."""
  zeros = torch.zeros(logprobs.shape)
  return types.SimpleNamespace(
    log_probs=logprobs * PAIR_MASK,
    entropy=zeros,
    mean_logits=zeros,
    is_top1=zeros.bool(),
    log_sum_sq_probs=torch.full(logprobs.shape, log_sum_of_squares) * PAIR_MASK,
  )


def pair_inputs():
  shifted = torch.cat([torch.zeros(len(PAIR_MASK), 1), PAIR_MASK], dim=1)  # one prompt token
  return {
    "input_ids": shifted,
    "attention_mask": torch.ones_like(shifted),
    "completion_mask": shifted,
  }


def dpo(name, loss_type, *, beta=0.1, args=(), log_sum_of_squares=-0.2, **attributes):
  logprobs = leaf(x.PAIR_LOGPROBS)
  settings = {"discopop_tau": 0.05, "gradient_checkpointing_kwargs": None}
  made = bare(
    DPOTrainer,
    settings | dict(args),
    **{
      "loss_types": [loss_type],
      "loss_weights": [1.0],
      "beta": beta,
      "label_smoothing": 0.1,
      "f_divergence_type": "reverse_kl",
      "f_alpha_divergence_coef": 0.5,
      "ld_alpha": None,
      "use_weighting": False,
      "precompute_ref_logps": False,
      "_total_train_tokens": 0,
      "_tp_size": 1,
      "ref_model": lambda **_: outputs(torch.tensor(x.PAIR_REF)),
    }
    | attributes,
  )
  made.model = mock.MagicMock(training=True)
  model = lambda **_: outputs(logprobs, log_sum_of_squares)  # noqa: E731
  loss = made._compute_loss(model, pair_inputs(), False)
  record(name, loss, {"pairs": logprobs})


for kind in (
  "sigmoid",
  "hinge",
  "ipo",
  "exo_pair",
  "nca_pair",
  "robust",
  "bco_pair",
  "sppo_hard",
  "aot",
  "aot_unpaired",
  "apo_zero",
  "apo_down",
  "discopop",
  "sft",
  "sigmoid_norm",
):
  dpo(f"dpo {kind}", kind)
dpo("dpo hinge beta 1", "hinge", beta=1.0)
dpo("dpo ld 0.3", "sigmoid", ld_alpha=0.3)
dpo("dpo wpo", "sigmoid", use_weighting=True)
dpo("dpo wpo above 1", "sigmoid", use_weighting=True, log_sum_of_squares=-0.7)
for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
  dpo(f"dpo {divergence}", "sigmoid", f_divergence_type=divergence)


def kto(name, loss_type):
  logprobs = leaf(x.PAIR_LOGPROBS)
  made = bare(
    KTOTrainer,
    loss_type=loss_type,
    calculate_KL=loss_type == "kto",
    beta=0.1,
    precompute_ref_logps=True,
    desirable_weight=1.0,
    undesirable_weight=1.3,
    _total_train_tokens=0,
    _tp_size=1,
    _compute_kl_logps=lambda *_: torch.full((1,), float(x.Z0)),
  )
  loss = made._compute_loss(
    lambda **_: outputs(logprobs),
    pair_inputs()
    | {
      "label": torch.tensor(x.DESIRABLE),
      "ref_logps": torch.tensor(x.PAIR_REF).sum(1),
      "ref_KL_logps": torch.zeros(1),
    },
    False,
  )
  record(name, loss, {"pairs": logprobs})


kto("kto", "kto")
kto("kto apo_zero_unpaired", "apo_zero_unpaired")


def total(logprobs):
  return (logprobs * PAIR_MASK).sum(1)


def average(logprobs):
  return total(logprobs) / PAIR_MASK.sum(1)


logprobs = leaf(x.PAIR_LOGPROBS)
losses, *_ = bare(ORPOTrainer, beta=0.1).odds_ratio_loss(*average(logprobs).chunk(2))
record("orpo odds ratio", -losses.mean(), {"pairs": logprobs})
for name, kind, answer in (
  ("simpo", "simpo", average),
  ("alphapo", "simpo", average),
  ("cpo", "sigmoid", total),
  ("cpo hinge", "hinge", total),
  ("cpo ipo", "ipo", average),
):
  logprobs = leaf(x.PAIR_LOGPROBS)
  made = bare(
    CPOTrainer,
    loss_type=kind,
    beta=2.0 if kind == "simpo" else 0.1,
    simpo_gamma=0.5,
    label_smoothing=0.0,
    alpha=0.25 if name == "alphapo" else 0.0,
  )
  losses, *_ = made.cpo_loss(*answer(logprobs).chunk(2))
  record(name, losses.mean(), {"pairs": logprobs})


logprobs = leaf(x.LOGPROBS)
made = bare(A2POTrainer, {"beta2": 0.3}, _get_sequence_logps=lambda *_: (logprobs * MASK).sum(1))
loss = made.compute_loss(
  None,
  {
    **dict.fromkeys(("input_ids", "attention_mask", "logits_to_keep")),
    "ref_logps": (torch.tensor(x.REF) * MASK).sum(1),
    "rewards": torch.tensor(x.REWARDS.reshape(-1)),
    "v_star": torch.full((x.B,), 0.4),
  },
)
record("a*-po", loss, {"logprobs": logprobs})

logprobs = leaf(x.LOGPROBS)
made = bare(
  SFTTrainer,
  {"loss_type": "dft", "average_tokens_across_devices": False},
  compute_loss_func=None,
  label_smoother=None,
  _total_train_tokens=0,
  _tp_size=1,
)
of_model = types.SimpleNamespace(
  log_probs=logprobs * MASK, label_mask=MASK, entropy=MASK, is_top1=MASK
)
loss = made.compute_loss(lambda **_: of_model, {"attention_mask": MASK})
record("dft", loss, {"logprobs": logprobs})


def reward_model(name, coefficient, **inputs):
  scores = leaf(x.SCORES)
  made = bare(
    RewardTrainer, {"center_rewards_coefficient": coefficient}, _total_train_tokens=0, _tp_size=1
  )
  loss = made.compute_loss(
    lambda **_: types.SimpleNamespace(logits=scores.reshape(-1, 1)),
    {"attention_mask": torch.ones(1)} | inputs,
  )
  record(name, loss, {"scores": scores})


reward_model("reward model", None)
reward_model("reward model margin", 0.02, margin=torch.tensor(x.MARGINS))

labels = torch.where(MASK.bool(), 1, -100)
for beta in (0.0, 0.1, 0.5, 1.0):
  logits = leaf(x.LOGITS)
  loss = GKDTrainer.generalized_jsd_loss(
    logits, torch.tensor(x.TEACHER_LOGITS), labels, beta=beta, temperature=0.9
  )
  record(f"gkd beta {beta}", loss, {"logits": logits})


def generated(trainer, rewards, *, args=(), tool_mask=None, **attributes):
  """What a trainer makes of the rewards: its batch, with advantages and importance ratios."""
  ids = [torch.ones(n, dtype=torch.long) for n in x.LENGTHS]
  logs = collections.defaultdict(list) | {"rewards": collections.defaultdict(list)}
  sampled = [row[:n].tolist() for row, n in zip(x.SAMPLER, x.LENGTHS, strict=True)]
  many = trainer is GRPOTrainer  # which also runs tools
  names = [f"reward {i}" for i in range(rewards.shape[1])]
  made = bare(
    trainer,
    {
      "per_device_train_batch_size": x.B,
      "gradient_checkpointing_kwargs": None,
      "steps_per_generation": 1,
      "gradient_accumulation_steps": 1,
    }
    | dict(args),
    **{
      "num_generations": x.G,
      "beta": 0.0,
      "tools": None,
      "mask_truncated_completions": False,
      "environment_factories": None,
      "environments": None,
      "chat_template_kwargs": {},
      "num_iterations": 1,
      "_logs": logs,
      "_tokenizer": types.SimpleNamespace(pad_token_id=0),
      "pad_to_multiple_of": None,
      "reward_funcs": names,
      "reward_func_names": names,
      "reward_clip_range": None,
      "reward_weights": torch.tensor([1.0, 0.5])[: rewards.shape[1]],
      "_pending_extra_logs": {},
      "_pending_metrics": {},
      "use_vllm": False,
      "vllm_importance_sampling_correction": True,
      "scale_rewards": "group",
      "normalize_advantages": False,
      "log_multimodal": False,
      "multi_objective_aggregation": "sum_then_normalize",
      "ref_model": None,
      "_generate": lambda _: (
        (ids, ids, tool_mask, ["" for _ in ids], sampled, {}, None, None)
        if many
        else (ids, ids, ["" for _ in ids])
      ),
      "_calculate_rewards": lambda *_: torch.tensor(rewards),
      "_get_per_token_logps_and_entropies": lambda *_, **__: (torch.tensor(x.OLD), None, None),
    }
    | attributes,
  )
  made.model = mock.MagicMock(training=True)
  return made._generate_and_score_completions([{"prompt": ""} for _ in ids])


ONE = x.REWARDS.reshape(-1, 1)
FAILED = ONE.copy()
FAILED[1] = np.nan  # a reward that could not be given
TWO = np.stack([x.REWARDS.reshape(-1), x.MORE_REWARDS.reshape(-1)], axis=1)
for name, trainer, rewards, attributes in (
  ("group_relative", GRPOTrainer, ONE, {}),
  ("group_relative none", GRPOTrainer, ONE, {"scale_rewards": "none"}),
  ("group_relative batch", GRPOTrainer, ONE, {"scale_rewards": "batch"}),
  ("group_relative, one failed", GRPOTrainer, FAILED, {}),
  ("gdpo", GRPOTrainer, TWO, {"multi_objective_aggregation": "normalize_then_sum"}),
  ("leave_one_out", RLOOTrainer, ONE, {}),
  ("leave_one_out, one failed", RLOOTrainer, FAILED, {}),
):
  batch = generated(trainer, rewards, **attributes)
  GOLDENS[f"advantage {name}/value"] = batch["advantages"].numpy()
for mode, low, high in (
  ("token_truncate", None, 1.5),
  ("sequence_truncate", 0.5, 2.0),
  ("token_mask", 0.7, 1.4),
  ("sequence_mask", None, 3.0),
):
  batch = generated(
    GRPOTrainer,
    ONE,
    use_vllm=True,
    vllm_importance_sampling_mode=mode,
    vllm_importance_sampling_clip_min=low,
    vllm_importance_sampling_clip_max=high,
    tool_mask=[row[:n].astype(int).tolist() for row, n in zip(x.MASK, x.LENGTHS, strict=True)],
  )
  GOLDENS[f"importance {mode}/value"] = batch["importance_sampling_ratio"].numpy()

path = pathlib.Path(__file__).parent / "goldens" / "trl.npz"
path.parent.mkdir(exist_ok=True)
np.savez_compressed(path, **GOLDENS)
print(f"{path.name}: {len(GOLDENS)} arrays, {path.stat().st_size:,} bytes")
