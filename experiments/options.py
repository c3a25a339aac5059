"""Groups of flags that several experiments have; an experiment may change their defaults."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_llm import losses, weighting
from rl_llm.config import ConfigError, option
from rl_llm.policy import join, load_adapter, split_lora
from rl_llm.sampling import SamplingConfig
from rl_llm.sharding import make_mesh, row_shards
from rl_llm.update import learning_rate_at, make_optimizer

ATTENTION_HELP = "kernel for rows of many keys: cudnn on a GPU, splash on a TPU, xla for none"


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How responses are drawn."""

  temperature: float = option(1.0, "of the sampler and of the trainer alike", above=0)
  top_k: int = option(0, "keep the k likeliest tokens, 0 = all; needs allow_truncated", min=0)
  top_p: float = option(1.0, "keep the likeliest tokens that reach p; needs allow_truncated",
                        above=0, max=1)
  min_new_tokens: int = option(0, "no end of sequence before this many tokens", min=0)
  slots: int = option(
    0, "responses decoded at once; the next takes the place of one that has ended; 0 = all", min=0
  )
  parts: int = option(
    1, "of a step's problems, each graded while the next is sampled: for slow graders", min=1
  )
  allow_truncated: bool = option(
    False, "train on top-k or top-p samples although they come from another distribution"
  )


def sampling_config(options: Sampling) -> SamplingConfig:
  """What the sampler needs to know of it."""
  return SamplingConfig(
    options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    min_new_tokens=options.min_new_tokens,
  )


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
  """The surrogate, and its keywords; none = the default of the loss."""

  name: Literal[
    "reinforce_loss", "ppo_loss", "grpo_loss", "cispo_loss", "sapo_loss", "dppo_tv_loss",
    "dppo_kl_loss", "dro_loss", "gspo_loss", "gspo_token_loss", "gmpo_loss", "vespo_loss",
  ] = option("grpo_loss", "a function of rl_llm.losses")
  clip_low: float | None = option(None, "how far below 1 the ratio may matter", above=0)
  clip_high: float | None = option(
    None, "how far above 1; more than clip_low is clip-higher", above=0
  )
  dual_clip: float | None = option(None, "bound of the loss where the advantage is < 0", above=1)
  delta: float | None = option(None, "upper bound of the ratio where the advantage is < 0", above=1)
  low: float | None = option(None, "CISPO: least factor of a token", min=0)
  high: float | None = option(None, "CISPO: largest factor of a token", above=0)
  tau_positive: float | None = option(None, "SAPO: temperature where the advantage is > 0", above=0)
  tau_negative: float | None = option(None, "SAPO: the same where it is < 0", above=0)
  threshold_low: float | None = option(None, "DPPO: divergence allowed downwards", above=0)
  threshold_high: float | None = option(None, "DPPO: divergence allowed upwards", above=0)
  ratio_cap: float | None = option(None, "DPPO: largest ratio", above=0)
  beta: float | None = option(None, "DRO: strength of the pull to the old policy", above=0)
  k_positive: float | None = option(None, "VESPO: exponent where the advantage is >= 0", min=0)
  lambda_positive: float | None = option(None, "VESPO: its rate", min=0)
  k_negative: float | None = option(None, "VESPO: exponent where the advantage is < 0", min=0)
  lambda_negative: float | None = option(None, "VESPO: its rate", min=0)
  entropy_coef: float = option(0.0, "reward for entropy, per nat; of any surrogate")


def loss_keywords(options: PolicyLoss) -> dict[str, float]:
  """The keywords of the chosen loss that were given."""
  given = dataclasses.asdict(options)
  del given["name"], given["entropy_coef"]
  return {name: value for name, value in given.items() if value is not None}


def policy_loss(
  name: str, logprobs, old_logprobs, advantages, weights, mask, keywords
) -> tuple[jax.Array, dict]:
  """The surrogate of that name; REINFORCE alone knows no old policy."""
  if name == "reinforce_loss":
    return losses.reinforce_loss(logprobs, advantages, weights)
  surrogate = getattr(losses, name)
  return surrogate(logprobs, old_logprobs, advantages, weights, mask=mask, **keywords)


@dataclasses.dataclass(frozen=True)
class Weighting:
  """How much each token counts."""

  name: Literal[
    "token_mean", "sequence_mean", "sequence_sum", "constant_length", "prompt_mean"
  ] = option("token_mean", "a function of rl_llm.weighting")
  length: int = option(0, "of constant_length; 0 = max_new_tokens", min=0)
  drop_truncated: bool = option(False, "responses cut off at the limit do not count (DAPO)")


@dataclasses.dataclass(frozen=True)
class KL:
  """The price of leaving the model that training began with."""

  coef: float = option(0.0, "0 keeps no reference model", min=0)
  value: Literal["k1", "k2", "k3"] = option("k3", "the estimator that is reported")
  gradient: Literal["k1", "k2", "k3"] = option("k2", "the estimator that is differentiated")


@dataclasses.dataclass(frozen=True)
class MeshSizes:
  """How the devices share the work; -1 = the devices that the other axes leave, one axis only."""

  data: int = option(-1, "copies of the weights, each with other rows of the batch", min=-1)
  fsdp: int = option(1, "the same, but each matrix is cut over these devices", min=-1)
  tensor: int = option(1, "devices that share the heads and the MLP of the same rows", min=-1)


@dataclasses.dataclass(frozen=True)
class SamplingMesh(MeshSizes):
  """The same, of a run that samples."""

  gather: Literal["step", "token"] = option(
    "step", "when sampling gathers the matrices that fsdp cuts: all at once, if a device can hold "
    "them (divided by tensor), or at every token, which takes longer"
  )


@dataclasses.dataclass(frozen=True)
class Lora:
  """Train thin matrices beside the weights instead of the weights."""

  rank: int = option(0, "of each change; 0 trains all weights", min=0)
  alpha: float = option(32.0, "the change is multiplied by alpha / rank", above=0)
  targets: str = option("attention|mlp", "pattern found in the paths of the weights to adapt")
  adapter: str = option(
    "", "begin with the adapters of this directory, such as a run's WORKDIR/adapter or one that "
    "PEFT wrote, of this rank, alpha and targets; empty = new ones"
  )


def split_weights(options: Lora, params, *, seed: int) -> tuple:
  """(frozen, trained): nothing and everything, or everything and adapters, new or saved ones.

  Raises:
    ConfigError: the pattern is none, no weight has such a path, or adapters are given with rank 0.
    WeightsError: the saved adapters cannot be used, or are others than the settings say.
  """
  if options.rank == 0:
    if options.adapter:
      raise ConfigError(
        "lora.rank", 0, f"the rank of --lora.adapter={options.adapter}", "0 trains all weights"
      )
    return None, params
  # Another stream than that of problems and responses, which fold small numbers into the seed.
  key = jax.random.fold_in(jax.random.key(seed), 0x10A4)
  try:
    frozen, trained = split_lora(
      params, key, rank=options.rank, alpha=options.alpha, targets=options.targets
    )
  except (ValueError, re.error) as error:
    raise ConfigError(
      "lora.targets", options.targets, "a pattern of weights' paths", str(error)
    ) from None
  if options.adapter:
    trained = load_adapter(options.adapter, join(frozen, trained))
  return frozen, trained


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes, on one host or many, train one model; each is started with this command."""

  on: bool = option(
    False, "--distributed for short: join the others, found by Slurm, Open MPI, GKE or the TPU VM"
  )
  coordinator: str = option("", "HOST:PORT of process 0, where none of these says it")
  processes: int = option(0, "how many there are, where none of these says it", min=0)
  process_id: int = option(-1, "this one's number, from 0, where none of these says it", min=-1)
  heartbeat: int = option(
    100, "seconds without a sign of life after which a process is lost, and the others end", min=1
  )
  wait: int = option(
    600, "seconds that processes wait for one that is late, at most: at the start, at a step, for "
    "grades, at a checkpoint", min=1
  )


def joined(options: Distributed) -> dict[str, Any] | None:
  """The keywords of `rl_llm.hosts.initialize`; None for a process that trains alone.

  Raises:
    ConfigError: other processes are described, and not to be joined.
  """
  keywords = dataclasses.asdict(options)
  if keywords.pop("on"):
    return keywords
  for name in ("coordinator", "processes", "process_id"):
    if keywords[name] != getattr(Distributed(), name):
      raise ConfigError(f"distributed.{name}", keywords[name], "left out without --distributed")
  return None


# A run goes on whatever devices it finds: they do not change what is computed, beyond rounding.
MESH_FLAGS = (
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "mesh.gather",
  *(f"distributed.{field.name}" for field in dataclasses.fields(Distributed)),
)


def device_mesh(
  options: MeshSizes,
  *,
  per_step: dict[str, int],
  at_once: dict[str, int],
  minibatches: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
  """The mesh, after a look at whether the batch can be cut for it.

  Args:
    options: its sizes.
    per_step: the setting that says how much a step has, by name; each minibatch has its share.
    at_once: the setting that says how much of it is computed at once.
    minibatches: of a step.
    devices: all that JAX sees by default.

  Raises:
    ShardingError: there are not so many devices.
    ConfigError: a setting is not a multiple of the number of devices over which rows lie.
  """
  mesh = make_mesh(data=options.data, fsdp=options.fsdp, tensor=options.tensor, devices=devices)
  parts = row_shards(mesh)
  shares = f" in each of {minibatches} minibatches" if minibatches > 1 else ""
  for settings, multiple, where in ((per_step, parts * minibatches, shares), (at_once, parts, "")):
    for name, value in settings.items():
      if value % multiple:
        raise ConfigError(
          name,
          value,
          f"a multiple of {multiple}: rows lie over data x fsdp = {parts} devices{where}",
          f"try --{name}={-(-value // multiple) * multiple}, or a smaller --mesh.data",
        )
  return mesh


def check_packing(packing: int, mesh: jax.sharding.Mesh) -> None:
  """Refuses packed answers over several devices: both of a pair may lie on different ones."""
  if packing and row_shards(mesh) > 1:
    raise ConfigError("packing", packing, f"0 where rows lie over {row_shards(mesh)} devices")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW."""

  learning_rate: float = option(1.5e-5, "after warm-up", above=0)
  schedule: Literal["constant", "linear", "cosine"] = option("constant", "towards 0 at the end")
  warmup_steps: int = option(0, "steps over which the learning rate rises from 0", min=0)
  b1: float = option(0.9, "decay of the mean gradient", min=0, below=1)
  b2: float = option(0.95, "decay of the mean squared gradient", min=0, below=1)
  eps: float = option(1e-8, "added to its root", above=0)
  weight_decay: float = option(0.0, "of matrices, decoupled", min=0)
  max_grad_norm: float = option(1.0, "longer gradients are scaled down; 0 = never", min=0)
  mu_dtype: Literal["float32", "bfloat16"] = option("float32", "in which the mean gradient is kept")
  max_skipped: int = option(3, "updates in a row with NaN or infinity after which to stop", min=1)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Accuracy on problems that training never draws."""

  every: int = option(16, "steps between evaluations; first and last are always done", min=1)
  problems: int = option(0, "how many of the task's held-out problems; 0 = all", min=0)
  samples: int = option(7, "responses a problem at temperature 1, beside the greedy one", min=1)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What survives a crash."""

  every: int = option(10, "steps between checkpoints; the last one is always written", min=1)
  keep: int = option(1, "checkpoints kept", min=1)


def token_weights(
  options: Weighting,
  mask: np.ndarray,
  truncated: np.ndarray,
  *,
  responses_per_prompt: int,
  max_new_tokens: int,
) -> np.ndarray:
  """The [B, T] weights of one optimiser step's batch."""
  keywords = {}
  if options.name == "constant_length":
    keywords = {"length": options.length or max_new_tokens}
  elif options.name == "prompt_mean":
    keywords = {"group_size": responses_per_prompt}
  weights = getattr(weighting, options.name)(mask, **keywords)
  if options.drop_truncated:
    weights = weights * weighting.drop_truncated(mask, truncated)
  return np.asarray(weights)


def adamw(options: Optimizer) -> optax.GradientTransformation:
  """The optimiser that the flags describe, without its learning rate."""
  return make_optimizer(
    b1=options.b1,
    b2=options.b2,
    eps=options.eps,
    weight_decay=options.weight_decay,
    max_grad_norm=options.max_grad_norm,
    mu_dtype=jnp.dtype(options.mu_dtype),
  )


def learning_rate(options: Optimizer, step: int, *, steps: int) -> float:
  """The learning rate of a step of `steps`."""
  return learning_rate_at(
    step,
    peak=options.learning_rate,
    schedule=options.schedule,
    warmup_steps=options.warmup_steps,
    total_steps=steps,
  )


def check_loss(options: PolicyLoss) -> None:
  """Refuses keywords that the chosen loss does not have: they would do nothing."""
  allowed = inspect.signature(getattr(losses, options.name)).parameters
  for name in loss_keywords(options):
    if name not in allowed:
      has = [known for known in dataclasses.asdict(options) if known in allowed]
      raise ConfigError(
        f"loss.{name}",
        getattr(options, name),
        f"left out with --loss={options.name}",
        f"which has {', '.join(has)}" if has else "which has no keywords",
      )


def check_updates(options: PolicyLoss, *, updates: int) -> None:
  """Refuses several updates a step by a loss that takes every sample for the policy's own."""
  if options.name == "reinforce_loss" and updates > 1:
    raise ConfigError(
      "loss.name",
      options.name,
      "a loss with a ratio where a step has several updates (epochs * minibatches > 1)",
      "after the first the samples are another policy's: try --loss=ppo_loss",
    )


def check_sampling(sampling: Sampling, *, max_new_tokens: int, prompts: int) -> None:
  """Refuses what cannot be sampled, or would train on another distribution unasked."""
  if prompts % sampling.parts:
    raise ConfigError(
      "sampling.parts", sampling.parts, f"a divisor of the {prompts} problems of a step"
    )
  if sampling.min_new_tokens > max_new_tokens:
    raise ConfigError(
      "sampling.min_new_tokens",
      sampling.min_new_tokens,
      f"at most max_new_tokens ({max_new_tokens})",
    )
  truncated = [
    name for name, off in (("top_k", 0), ("top_p", 1.0)) if getattr(sampling, name) != off
  ]
  if truncated and not sampling.allow_truncated:
    raise ConfigError(
      f"sampling.{truncated[0]}",
      getattr(sampling, truncated[0]),
      "off while training: it samples from another distribution than the one that is trained",
      "--sampling.allow_truncated does it all the same",
    )


def check_schedule(optimizer: Optimizer, *, steps: int) -> None:
  """Refuses a warm-up that never ends."""
  if optimizer.schedule != "constant" and optimizer.warmup_steps >= steps:
    raise ConfigError(
      "optimizer.warmup_steps", optimizer.warmup_steps, f"less than steps ({steps})"
    )


def check_minibatches(*, prompts_per_step: int, minibatches: int, microbatch_prompts: int) -> None:
  """Refuses sizes that do not divide."""
  if prompts_per_step % minibatches:
    raise ConfigError(
      "minibatches", minibatches, f"a divisor of prompts_per_step ({prompts_per_step})"
    )
  problems = prompts_per_step // minibatches
  if problems > microbatch_prompts and problems % microbatch_prompts:
    raise ConfigError(
      "microbatch_prompts",
      microbatch_prompts,
      f"a divisor of the {problems} problems of an update (prompts_per_step / minibatches)",
      f"try --microbatch_prompts={math.gcd(problems, microbatch_prompts)}",
    )
