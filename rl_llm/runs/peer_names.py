"""Other systems' names for our flags, so that an error message and a page can name ours.

Taken from TRL 1.16, verl 0.9.1 and OpenRLHF 0.11.2. If a script lacks the first flag of `ours`, it
may have the next: DPO's batch consists of pairs, SFT's of examples.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple


class Known(NamedTuple):
  """A flag that has other names in other systems."""

  what: str
  ours: tuple[str, ...]
  trl: tuple[str, ...] = ()
  verl: tuple[str, ...] = ()
  openrlhf: tuple[str, ...] = ()
  also: tuple[str, ...] = ()  # names that people type, whatever system they know


KNOWN = (
  Known(
    "the model",
    ("model",),
    ("model_name_or_path",),
    ("actor_rollout_ref.model.path",),
    ("actor.model_name_or_path", "model.model_name_or_path"),
    ("model_path", "pretrain"),
  ),
  Known(
    "problems, or rows of a file",
    ("data", "task"),
    ("dataset_name",),
    ("data.train_files",),
    ("data.prompt_dataset", "data.dataset"),
    ("dataset", "train_file"),
  ),
  Known(
    "a reward function",
    ("jsonl.reward_file",),
    ("reward_funcs",),
    ("reward.custom_reward_function.path", "custom_reward_function.path"),
    ("reward.remote_url",),
    ("reward_function", "reward_fn", "reward_file"),
  ),
  Known(
    "a reward model",
    ("reward",),
    ("reward_model_path",),
    ("reward.reward_model.model_path",),
    ("reward.model_name_or_path",),
    ("reward_model",),
  ),
  Known(
    "where the run is written",
    ("workdir",),
    ("output_dir",),
    ("trainer.default_local_dir",),
    ("ckpt.output_dir", "ckpt.path"),
    ("out", "save_path", "run_dir"),
  ),
  Known(
    "steps of the run",
    ("steps",),
    ("max_steps",),
    ("trainer.total_training_steps",),
    ("train.num_episodes",),
    ("num_steps", "total_steps", "num_train_epochs"),
  ),
  Known(
    "problems a step",
    ("prompts_per_step", "pairs_per_step", "examples_per_step"),
    ("per_device_train_batch_size", "generation_batch_size"),
    ("data.train_batch_size",),
    ("rollout.batch_size", "batch_size"),
    ("train_batch_size", "bs"),
  ),
  Known(
    "responses a problem",
    ("responses_per_prompt",),
    ("num_generations",),
    ("actor_rollout_ref.rollout.n",),
    ("rollout.n_samples_per_prompt",),
    ("n_samples_per_prompt", "group_size", "num_samples", "n"),
  ),
  Known(
    "what is held at once",
    ("microbatch_prompts", "microbatch_pairs", "microbatch_rows"),
    ("gradient_accumulation_steps",),
    ("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",),
    ("train.micro_batch_size",),
    ("micro_batch_size", "micro_train_batch_size"),
  ),
  Known(
    "passes over a step's responses",
    ("epochs",),
    ("num_iterations", "num_ppo_epochs"),
    ("actor_rollout_ref.actor.ppo_epochs",),
    ("train.max_epochs",),
    ("ppo_epochs",),
  ),
  Known(
    "updates a pass",
    ("minibatches",),
    ("steps_per_generation", "num_mini_batches"),
    ("actor_rollout_ref.actor.ppo_mini_batch_size",),
    ("train.batch_size",),
    ("mini_batch_size", "ppo_mini_batch_size"),
  ),
  Known(
    "the longest response",
    ("max_new_tokens",),
    ("max_completion_length",),
    ("data.max_response_length",),
    ("rollout.max_new_tokens",),
    ("max_response_length", "response_length", "generate_max_len", "max_tokens"),
  ),
  Known(
    "the longest text",
    ("max_tokens",),
    ("max_length",),
    ("data.max_length",),
    ("data.max_len",),
    ("max_seq_length", "seq_len"),
  ),
  Known(
    "the longest prompt",
    ("max_prompt_tokens",),
    ("max_prompt_length",),
    ("data.max_prompt_length",),
    ("data.max_len",),
    ("prompt_max_len",),
  ),
  Known("several texts a row", ("packing",), ("packing",), (), ("ds.packing_samples",)),
  Known(
    "sampling temperature",
    ("sampling.temperature",),
    ("temperature",),
    ("actor_rollout_ref.rollout.temperature",),
    ("rollout.temperature",),
  ),
  Known(
    "sampling of the likeliest",
    ("sampling.top_p",),
    ("top_p",),
    ("actor_rollout_ref.rollout.top_p",),
    ("rollout.top_p",),
  ),
  Known(
    "sampling of the k likeliest",
    ("sampling.top_k",),
    ("top_k",),
    ("actor_rollout_ref.rollout.top_k",),
    (),
  ),
  Known(
    "the loss",
    ("loss",),
    ("loss_type",),
    ("actor_rollout_ref.actor.policy_loss.loss_mode",),
    ("actor.policy_loss_type", "model.loss_type"),
  ),
  Known(
    "the advantage",
    ("advantage",),
    (),
    ("algorithm.adv_estimator",),
    ("algo.advantage.estimator",),
    ("adv_estimator", "advantage_estimator"),
  ),
  Known(
    "what a group's advantages are divided by",
    ("advantage.scale",),
    ("scale_rewards",),
    ("algorithm.norm_adv_by_std_in_grpo",),
    (),
  ),
  Known(
    "how much a token counts", ("weighting",), (), ("actor_rollout_ref.actor.loss_agg_mode",), ()
  ),
  Known(
    "coefficient of the KL",
    ("kl.coef", "loss.beta"),
    ("beta",),
    ("actor_rollout_ref.actor.kl_loss_coef", "algorithm.kl_ctrl.kl_coef"),
    ("algo.kl.init_coef", "model.beta"),
    ("kl_coef", "kl_loss_coef", "init_kl_coef"),
  ),
  Known(
    "lower clip range",
    ("loss.clip_low",),
    ("epsilon", "cliprange"),
    ("actor_rollout_ref.actor.clip_ratio_low", "actor_rollout_ref.actor.clip_ratio"),
    ("actor.eps_clip",),
    ("clip_ratio", "eps_clip", "epsilon_low", "clip_eps"),
  ),
  Known(
    "upper clip range",
    ("loss.clip_high",),
    ("epsilon_high",),
    ("actor_rollout_ref.actor.clip_ratio_high",),
    ("actor.eps_clip_low_high",),
    ("clip_ratio_high", "eps_clip_high"),
  ),
  Known(
    "entropy bonus",
    ("loss.entropy_coef",),
    ("entropy_coef",),
    ("actor_rollout_ref.actor.entropy_coeff",),
    ("actor.entropy_coef",),
    ("entropy_coeff", "ent_coef", "entropy_bonus"),
  ),
  Known(
    "discount factor",
    ("advantage.discount",),
    ("gamma",),
    ("algorithm.gamma",),
    ("algo.advantage.gamma",),
    ("discount",),
  ),
  Known(
    "GAE's lambda",
    ("advantage.gae_lambda",),
    ("lam",),
    ("algorithm.lam",),
    ("algo.advantage.lambd",),
    ("gae_lambda", "lambd"),
  ),
  Known(
    "learning rate",
    ("optimizer.learning_rate",),
    ("learning_rate",),
    ("actor_rollout_ref.actor.optim.lr",),
    ("adam.lr",),
    ("lr",),
  ),
  Known(
    "its schedule",
    ("optimizer.schedule",),
    ("lr_scheduler_type",),
    ("actor_rollout_ref.actor.optim.lr_scheduler_type",),
    ("lr_scheduler",),
  ),
  Known(
    "its warm-up",
    ("optimizer.warmup_steps",),
    ("warmup_steps", "warmup_ratio"),
    ("actor_rollout_ref.actor.optim.lr_warmup_steps",),
    ("lr_warmup_ratio",),
    ("warmup",),
  ),
  Known(
    "weight decay",
    ("optimizer.weight_decay",),
    ("weight_decay",),
    ("actor_rollout_ref.actor.optim.weight_decay",),
    ("adam.weight_decay",),
    ("wd",),
  ),
  Known(
    "longest gradient",
    ("optimizer.max_grad_norm",),
    ("max_grad_norm",),
    ("actor_rollout_ref.actor.grad_clip",),
    ("max_norm",),
    ("grad_clip", "clip_grad"),
  ),
  Known(
    "steps between evaluations",
    ("eval.every",),
    ("eval_steps",),
    ("trainer.test_freq",),
    ("eval.steps",),
    ("eval_every",),
  ),
  Known(
    "steps between checkpoints",
    ("checkpoint.every",),
    ("save_steps",),
    ("trainer.save_freq",),
    ("ckpt.save_steps",),
    ("save_every", "checkpoint_every"),
  ),
  Known(
    "checkpoints kept",
    ("checkpoint.keep",),
    ("save_total_limit",),
    ("trainer.max_actor_ckpt_to_keep",),
    ("ckpt.max_num",),
  ),
  Known(
    "arithmetic",
    ("dtype",),
    ("bf16", "fp16"),
    ("actor_rollout_ref.actor.fsdp_config.dtype",),
    (),
    ("torch_dtype", "param_dtype", "precision"),
  ),
  Known(
    "activations computed twice",
    ("remat",),
    ("gradient_checkpointing",),
    ("actor_rollout_ref.model.enable_gradient_checkpointing",),
    ("actor.gradient_checkpointing_enable",),
  ),
  Known(
    "rank of adapters",
    ("lora.rank",),
    ("lora_r",),
    ("actor_rollout_ref.model.lora_rank",),
    ("ds.lora.rank",),
    ("lora_rank",),
  ),
  Known(
    "their scale",
    ("lora.alpha",),
    ("lora_alpha",),
    ("actor_rollout_ref.model.lora_alpha",),
    ("ds.lora.alpha",),
  ),
  Known(
    "which weights have one",
    ("lora.targets",),
    ("lora_target_modules",),
    ("actor_rollout_ref.model.target_modules",),
    ("ds.lora.target_modules",),
  ),
  Known(
    "the same samples again",
    ("seed",),
    ("data_seed",),
    ("actor_rollout_ref.actor.data_loader_seed",),
    ("train.seed",),
  ),
  Known("trackers", ("track",), ("report_to",), ("trainer.logger",), also=("logger",)),
)

# Settings that have no flag here, and why.
INSTEAD = {
  "logging_steps": "metrics.jsonl has every step",
  "log_completions": "samples.jsonl has every response",
  "use_vllm": "the model that is trained also samples",
  "deepspeed": "--mesh.fsdp cuts weights and moments over devices",
  "zero_stage": "--mesh.fsdp cuts weights and moments over devices",
}
# Names of choices.
CHOICES = {
  "rloo": "leave_one_out",
  "grpo": "group_relative",
  "reinforce++": "reinforce_plus_plus",
  "reinforce++-baseline": "reinforce_plus_plus_baseline",
  "sigmoid": "dpo_loss",
  "hinge": "hinge_dpo_loss",
  "bnpo": "token_mean",
  "token-mean": "token_mean",
  "seq-mean-token-mean": "sequence_mean",
  "bf16": "bfloat16",
  "fp32": "float32",
  "low_var_kl": "k3",
  "kl": "k1",
  "mse": "k2",
}


def ours(name: str, flags: Container[str]) -> str | None:
  """Our name for another system's flag, if it is among these flags.

  >>> ours("num_generations", {"responses_per_prompt", "seed"})
  'responses_per_prompt'
  >>> ours("beta", {"loss.beta", "loss"}), ours("seed", {"steps"})
  ('loss.beta', None)

  Args:
    name: as it was typed; dashes count as underscores.
    flags: the script's flags.
  """
  name = name.replace("-", "_").lower()
  for known in KNOWN:
    if name in known.trl + known.verl + known.openrlhf + known.also:
      for flag in known.ours:
        for path in (flag, f"{flag}.name"):
          if path in flags:
            return path
  return None
