"""The programs of an experiment as it would compile them, and what formulas say of their work."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import dpo, grpo, ppo, reinforce
from experiments.options import adamw, split_weights
from rl_llm import sharding
from rl_llm.flops import forward_flops, text_flops, update_passes
from rl_llm.policy import Policy, TransformerConfig, join
from rl_llm.rollout import gather_weights, generate, response_logprobs, row_keys
from rl_llm.sampling import SamplingConfig
from rl_llm.teacher_forcing import teacher_forced_logprobs
from rl_llm.train_state import init_state, parameter_count
from rl_llm.update import make_update

if TYPE_CHECKING:
  from launch.plan import Config

EXPERIMENTS = {"grpo": grpo, "reinforce": reinforce, "ppo": ppo, "dpo": dpo}


class Lowering(NamedTuple):
  """A program before it is compiled, and what the formulas say of it."""

  name: str
  lower: Callable[[], Any]
  calls: int  # a step
  loop: int  # how often a loop runs whose count the program does not know
  flops: float  # of a chip
  moved: float  # bytes between HBM and a chip
  resident: float  # bytes a chip of weights and moments that it does not get and that stay


def settings_of(config: Config) -> Any:
  """The experiment's own Config at these flags."""
  module = EXPERIMENTS[config.experiment]
  shared = {
    name: getattr(config, name)
    for name in ("responses_per_prompt", "max_new_tokens", "remat", "scan_layers", "lora")
  }
  if module is dpo:
    return dpo.Config(
      pairs_per_step=config.prompts_per_step, microbatch_pairs=config.microbatch_prompts, **shared
    )
  own = module.Config()
  shared |= {
    "prompts_per_step": config.prompts_per_step,
    "microbatch_prompts": config.microbatch_prompts,
    "epochs": config.epochs,
    "minibatches": config.minibatches or own.minibatches,
    "kl": dataclasses.replace(own.kl, coef=config.kl_coef),
  }
  if module is ppo:
    shared["value"] = dataclasses.replace(own.value, trunk=config.value_trunk)
  return module.Config(**shared)


def programs(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> list[Lowering]:
  """All that a step of the experiment runs on the devices and that is not small."""
  plan = Programs(config, settings_of(config), policy, mesh)
  return {"ppo": plan.of_ppo, "dpo": plan.of_dpo}.get(config.experiment, plan.of_policy_gradient)()


@dataclasses.dataclass(frozen=True)
class Programs:
  """The programs of one run."""

  config: Config
  settings: Any
  policy: Policy
  mesh: jax.sharding.Mesh

  def of_policy_gradient(self) -> list[Lowering]:
    """GRPO's and REINFORCE's: an update, a rollout, and log-probs where something compares."""
    module, optimizer = EXPERIMENTS[self.config.experiment], adamw(self.settings.optimizer)
    base, frozen, trained = self.weights()
    state = self.placed(functools.partial(init_state, optimizer=optimizer), trained)
    held = device_bytes((state, frozen, self.reference(base, frozen)))
    batch = self.batch()
    if module is grpo:
      batch["advantages"] = array(jnp.float32, len(batch["tokens"]))
      if self.config.kl_coef:
        batch["ref_logprobs"] = batch["sampler_logprobs"]
    loss = module.make_loss(self.settings, self.policy)
    found = [
      self.update("update", loss, optimizer, state, frozen, batch, held),
      *self.sampling(join(frozen, trained), held),
    ]
    if self.updates > 1 or self.config.kl_coef:
      found.append(self.logprobs(base, held))
    return found

  def of_ppo(self) -> list[Lowering]:
    """PPO's: the same, of two networks; and their passes before the updates."""
    base, frozen, trained = self.weights()
    width = self.policy.config.width
    init = functools.partial(ppo.init_ppo, config=self.settings, width=width)
    state = self.placed(init, trained)
    held = device_bytes((state, frozen, self.reference(base, frozen)))
    batch = self.batch() | {
      name: self.batch()["sampler_logprobs"] for name in ("old_values", "returns")
    }
    loss = ppo.make_loss(self.settings, self.policy)
    optimizer = ppo.policy_optimizer(self.settings)
    found = [self.update("update", loss, optimizer, state.policy, frozen, batch, held)]
    if state.value is not None:
      value_loss = ppo.make_value_loss(self.settings, self.policy)
      optimizer = adamw(self.settings.optimizer)
      found.append(
        self.update("value update", value_loss, optimizer, state.value, frozen, batch, held)
      )
    params = join(frozen, state.policy.params)
    value = state.value and join(frozen, state.value.params)
    responses = self.rows(self.responses(self.config.prompts_per_step))
    before = ppo.make_before(self.settings, self.policy)
    networks = 1 if value is None else 2
    found.append(
      Lowering(
        "values",
        lambda: before.lower(params, value, responses),
        calls=1,
        loop=1,
        flops=networks * self.work(),
        moved=networks * self.gathered(base),
        resident=held - device_bytes((params, state.value and state.value.params)),
      )
    )
    found += self.sampling(params, held)
    return found + ([self.logprobs(base, held)] if self.config.kl_coef else [])

  def of_dpo(self) -> list[Lowering]:
    """DPO's on a file of pairs: the reference reads them all, then there are updates alone."""
    optimizer = adamw(self.settings.optimizer)
    base, frozen, trained = self.weights()
    state = self.placed(functools.partial(init_state, optimizer=optimizer), trained)
    held = device_bytes((state, frozen))
    pairs = self.config.prompts_per_step
    shape = (2 * pairs, self.config.prompt_tokens + self.config.max_new_tokens)
    batch = {
      "tokens": array(jnp.int32, *shape),
      "mask": array(bool, *shape),
      "positions": array(jnp.int32, *shape),
      "segment_ids": array(jnp.int32, *shape),
      "weights": array(jnp.float32, pairs),
      "chosen_weights": array(jnp.float32, *shape),
      "ref_answers": array(jnp.float32, 2 * pairs),
    }
    read = [batch[name] for name in ("tokens", "mask", "positions", "segment_ids")]
    score = jax.jit(
      lambda params, temperature, *rows: teacher_forced_logprobs(
        params, *rows, policy=self.policy, temperature=temperature
      )[0]
    )
    loss = dpo.make_loss(self.settings, self.policy)
    return [
      self.update("update", loss, optimizer, state, frozen, batch, held),
      Lowering(
        "reference",
        lambda: score.lower(base, array(jnp.float32), *self.rows(read)),
        calls=0,  # Before the first step.
        loop=1,
        flops=self.work(),
        moved=self.gathered(base),
        resident=held - (device_bytes(base) if frozen is not None else 0),
      ),
    ]

  # The arrays.

  def weights(self):
    """(the model's, those that are frozen or None, those that are trained), on their devices."""

    def split(key):
      params = self.policy.init(key)
      lora = dataclasses.replace(self.config.lora, adapter="")  # Saved ones have the same shapes.
      return params, *split_weights(lora, params, seed=0)

    return self.placed(split, jax.random.key(0))

  def placed(self, make: Callable[..., Any], *arguments) -> Any:
    return sharding.placed_shapes(jax.eval_shape(make, *arguments), self.mesh)

  def reference(self, base, frozen):
    """What a KL holds beside the rest: with adapters nothing, the model itself is still there."""
    return base if self.config.kl_coef and frozen is None else None

  def responses(self, prompts: int):
    """What every pass over responses reads."""
    shape = (prompts * self.config.responses_per_prompt, self.config.max_new_tokens)
    return (
      array(jnp.int32, prompts, self.config.prompt_tokens),
      array(jnp.int32, prompts),
      array(jnp.int32, *shape),
      array(bool, *shape),
    )

  def batch(self) -> dict[str, Any]:
    """That of an update, as far as all methods share it."""
    names = ("prompts", "prompt_lengths", "tokens", "mask")
    batch = dict(zip(names, self.responses(self.update_prompts), strict=True))
    per_token = array(jnp.float32, *batch["tokens"].shape)
    names = ["sampler_logprobs", "advantages", "weights"]
    return batch | dict.fromkeys(names + ["old_logprobs"] * (self.updates > 1), per_token)

  def rows(self, shapes):
    """Shapes of a batch, whose rows lie over the mesh."""
    layout = sharding.row_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)

  # The programs.

  @property
  def minibatches(self) -> int:
    return getattr(self.settings, "minibatches", 1)

  @property
  def updates(self) -> int:
    """A step."""
    return self.minibatches * getattr(self.settings, "epochs", 1)

  @property
  def update_prompts(self) -> int:
    return self.config.prompts_per_step // self.minibatches

  def update(self, name, loss, optimizer, state, frozen, batch, held) -> Lowering:
    microbatches = max(1, self.update_prompts // self.config.microbatch_prompts)
    update = make_update(loss, optimizer, microbatches=microbatches, mesh=self.mesh)
    names = ("learning_rate", "kl_coef", "entropy_coef", "value_coef", "sft_coef")
    hparams = {name: array(jnp.float32) for name in names} | {"loss": {}}
    passes = update_passes(adapters=frozen is not None) + self.config.remat
    trained = device_bytes(state.params)
    return Lowering(
      name,
      lambda: update.lower(state, self.rows(batch), hparams, microbatches, frozen),
      calls=self.updates,
      loop=microbatches,
      flops=passes * self.work() / self.minibatches,
      # Weights once a pass of every microbatch, as they are gathered; the state read and written.
      moved=passes * microbatches * self.gathered(frozen or state.params) + 6 * trained,
      resident=held - device_bytes((state, frozen)),
    )

  def sampling(self, params, held) -> list[Lowering]:
    """The rollout, and before it the weights where they are gathered once."""
    if self.config.mesh.gather == "token" or self.mesh.shape["fsdp"] == 1:
      return [self.rollout(params, held - device_bytes(params))]
    mesh = sharding.whole_along_fsdp(self.mesh)
    gather = functools.partial(gather_weights, dtype=self.policy.dtype, mesh=mesh)
    sampler = dataclasses.replace(self, policy=self.policy.over(mesh), mesh=mesh)
    gathering = Lowering(
      "gather",
      lambda: gather_weights.lower(params, dtype=self.policy.dtype, mesh=mesh),
      calls=1,
      loop=1,
      flops=0.0,
      moved=self.gathered(params),
      resident=held - device_bytes(params),
    )
    gathered = sharding.placed_shapes(jax.eval_shape(gather, params), mesh)
    return [gathering, sampler.rollout(gathered, held)]

  def rollout(self, params, resident) -> Lowering:
    """All prompts of a step at once."""
    config = self.config
    total = config.prompts_per_step * config.responses_per_prompt
    keys = jax.eval_shape(
      lambda: row_keys(jax.random.key(0), config.prompts_per_step, config.responses_per_prompt)
    )
    prompts = self.responses(config.prompts_per_step)[:2]
    arrays = (*prompts, keys, SamplingConfig(array(jnp.float32, total)))
    settings = {
      "policy": self.policy,
      "responses_per_prompt": config.responses_per_prompt,
      "max_new_tokens": config.max_new_tokens,
      "eos_ids": (0,),
      "pad_id": 0,
    }
    length = config.prompt_tokens + config.max_new_tokens / 2  # On average.
    cache = length * total * cache_bytes(config, self.policy.config)
    return Lowering(
      "rollout",
      lambda: generate.lower(params, *self.rows(arrays), **settings),
      calls=1,
      loop=config.max_new_tokens,
      flops=self.work(),
      # Each token reads all weights that its device computes with, and the cache of its rows.
      moved=config.max_new_tokens * (self.gathered(params) + cache / self.mesh.size),
      resident=resident,
    )

  def logprobs(self, base, held) -> Lowering:
    """Of all responses of a step, under the reference or under the policy before the updates."""
    score = jax.jit(functools.partial(response_logprobs, policy=self.policy, temperature=1.0))
    responses = self.rows(self.responses(self.config.prompts_per_step))
    return Lowering(
      "log-probs",
      lambda: score.lower(base, *responses),
      calls=(self.updates > 1 and self.config.experiment != "ppo") + (self.config.kl_coef > 0),
      loop=1,
      flops=self.work(),
      moved=self.gathered(base),
      resident=held - device_bytes(base),
    )

  def gathered(self, params) -> float:
    """Bytes of the weights that a device computes with, in the dtype of the arithmetic."""
    return itemsize(self.config) * parameter_count(params) / self.mesh.shape["tensor"]

  def work(self) -> float:
    return work(self.config, self.policy.config) / self.mesh.size


def array(dtype, *shape) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def device_bytes(tree) -> int:
  """What one device holds of arrays that know their devices."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def itemsize(config: Config) -> int:
  return jnp.dtype(config.dtype).itemsize


def cache_bytes(config: Config, shape: TransformerConfig) -> int:
  """Keys and values of one token."""
  return 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * itemsize(config)


def work(config: Config, shape: TransformerConfig) -> float:
  """Operations of one pass over all that a step reads."""
  prompt, new, prompts = config.prompt_tokens, config.max_new_tokens, config.prompts_per_step
  if config.experiment == "dpo":  # Two texts a pair, and every token of them is predicted.
    lengths = [prompt + new] * (2 * prompts)
    return text_flops(shape, lengths, predicted=sum(lengths))
  return forward_flops(shape, [prompt] * prompts, [new] * (prompts * config.responses_per_prompt))
