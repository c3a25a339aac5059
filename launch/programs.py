"""The programs that an experiment would compile, and the work they do by formula."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import dpo, flags, grpo, ppo, reinforce, setup
from launch.plan_flags import Config
from rl_llm.data.batches import SequenceBatch
from rl_llm.parallel import sharding
from rl_llm.policy import Policy, TransformerConfig
from rl_llm.policy.load import Weights
from rl_llm.rollout import ResponseBatch, gather_weights, generate, row_keys
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.config import flatten, replace
from rl_llm.runs.flops import forward_flops, text_flops, update_passes
from rl_llm.training import reference_cache
from rl_llm.training.pairs import PairBatch
from rl_llm.training.train_state import init_state, parameter_count

EXPERIMENTS = {"grpo": grpo, "reinforce": reinforce, "ppo": ppo, "dpo": dpo}
# Flags of the plan that an experiment has by another name.
ALIASES = {
  "prompts_per_step": "pairs_per_step",
  "microbatch_prompts": "microbatch_pairs",
  "kl_coef": "kl.coef",
  "value_trunk": "value.trunk",
  "prompt_tokens": "max_prompt_tokens",
}


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
  """The experiment's own Config, with every flag that it shares with the plan."""
  own = EXPERIMENTS[config.experiment].Config()
  known, values = flatten(own), flatten(config)
  if not config.minibatches:
    del values["minibatches"]
  values |= {alias: values[path] for path, alias in ALIASES.items()}
  values["lora.adapter"] = ""  # Saved ones have the same shapes.
  return replace(own, {path: value for path, value in values.items() if path in known})


def command(config: Config) -> str:
  """The experiment's command with these sizes: all flags that differ from its defaults, and what
  it holds at once."""
  default = flatten(EXPERIMENTS[config.experiment].Config())
  said = [f"python -m experiments.{config.experiment} --model=DIR"]
  for path, value in flatten(settings_of(config)).items():
    if path != "model" and (value != default[path] or path.startswith("microbatch_")):
      said.append(f"--{path}={str(value).lower() if isinstance(value, bool) else value}")
  return " ".join(said)


def updates_of(config: Config) -> flags.Updates:
  """How a step's batch is divided into updates; one update where the experiment takes pairs."""
  sizes = {name: getattr(config, name) for name in ("prompts_per_step", "microbatch_prompts")}
  return getattr(settings_of(config), "updates", flags.Updates(**sizes))


def programs(config: Config, policy: Policy, mesh: jax.sharding.Mesh) -> list[Lowering]:
  """All programs of a step that run on the devices and are not small."""
  plan = Programs(config, settings_of(config), policy, mesh)
  return list(plan.of_dpo() if config.experiment == "dpo" else plan.of_policy_gradient())


@dataclasses.dataclass(frozen=True)
class Programs:
  """The programs of one run; its arrays are shapes that know their devices."""

  config: Config
  settings: Any
  policy: Policy
  mesh: jax.sharding.Mesh

  def of_policy_gradient(self) -> Iterator[Lowering]:
    """An update, a rollout, and the passes over responses that an update compares with."""
    module, state = EXPERIMENTS[self.config.experiment], self.state
    made = responses = module.make_programs(self.settings, self.policy, self.mesh)
    old, ref, coefs = self.updates.count > 1, self.config.kl_coef > 0, {}
    if module is ppo:  # Its pass for values gives the old log-probs too.
      responses, state, old, coefs = made.policy, state.policy, False, {"value_coef": 0.0}
    elif module is grpo:
      coefs = {"kl_coef": 0.0}
    batch, params = self.minibatch(responses.take), self.weights.whole(state.params)
    yield self.update("update", responses.update, state, batch, self.numbers(**coefs))
    if module is ppo:
      yield from self.of_values(made, params, batch)
    yield from self.sampling(params)
    if old or ref:
      scored = self.weights.reference if ref else params
      score = self.call("log-probs", responses.logprobs, scored, self.batch)
      yield score._replace(calls=old + ref)

  def of_values(self, made: ppo.Programs, params, batch) -> Iterator[Lowering]:
    """A value network's update, where it is a tower of its own, and the pass before the updates."""
    value = self.state.value
    tower = value and self.weights.whole(value.params)
    before = self.call("values", made.before, params, tower, self.batch)
    if value is not None:
      numbers = {"learning_rate": array(jnp.float32)}
      yield self.update("value update", made.update_value, value, batch, numbers)
      before = before._replace(flops=2 * before.flops, moved=2 * before.moved)
    yield before

  def of_dpo(self) -> Iterator[Lowering]:
    """DPO's on a file of pairs: the reference reads them all, then there are only updates."""
    pairs = self.config.prompts_per_step
    shape = 2 * pairs, self.config.prompt_tokens + self.config.max_new_tokens
    ids, number = array(jnp.int32, *shape), array(jnp.float32)
    sequences = SequenceBatch(ids, array(bool, *shape), ids, ids)
    batch = dpo.Batch(
      PairBatch(sequences, None, array(jnp.float32, pairs)),
      chosen_weights=array(jnp.float32, *shape),
      ref_answers=array(jnp.float32, 2 * pairs),
    )
    numbers = {"learning_rate": number, "loss": {}, "sft_coef": number}
    update = dpo.make_update(self.settings, self.policy, self.mesh)
    yield self.update("update", update, self.state, self.rows(batch), numbers)
    given = self.weights.reference, self.rows(sequences), number
    before = self.call("reference", reference_cache.score, *given, policy=self.policy)
    yield before._replace(calls=0)  # Before the first step.

  # The arrays.

  @functools.cached_property
  def weights(self) -> Weights:
    """With the model as the reference, whether something compares with it or not."""

    def split(key):
      return setup.split_weights(self.settings, self.policy.init(key), reference=True)

    found = self.placed(split, jax.random.key(0))
    # With adapters the reference is what is frozen.
    frozen = dict(jax.tree.leaves_with_path(found.frozen))
    same = jax.tree.map_with_path(lambda path, x: frozen.get(path, x), found.reference)
    return found._replace(reference=same)

  @functools.cached_property
  def state(self) -> Any:
    """As training begins."""
    init = functools.partial(init_state, optimizer=setup.make_optimizer(self.settings.optimizer))
    if self.config.experiment == "ppo":
      init = functools.partial(ppo.init_ppo, config=self.settings, width=self.policy.config.width)
    return self.placed(init, self.weights.trained)

  @functools.cached_property
  def batch(self) -> ResponseBatch:
    """A step's responses before its updates."""
    config = self.config
    prompts, rows = config.prompts_per_step, config.prompts_per_step * config.responses_per_prompt
    mask, per_token = (array(dtype, rows, config.max_new_tokens) for dtype in (bool, jnp.float32))
    batch = ResponseBatch(
      prompts=array(jnp.int32, prompts, config.prompt_tokens),
      prompt_lengths=array(jnp.int32, prompts),
      tokens=array(jnp.int32, rows, config.max_new_tokens),
      attended=mask,
      mask=mask,
      sampler_logprobs=per_token,
      old_logprobs=per_token if self.updates.count > 1 else None,
      ref_logprobs=per_token if config.kl_coef else None,
      advantages=array(jnp.float32, rows) if config.experiment == "grpo" else per_token,
      truncated=array(bool, rows),
    )
    if config.experiment == "ppo":
      batch = batch._replace(old_values=per_token, returns=per_token)
    return self.rows(batch)

  def minibatch(self, take: Callable) -> ResponseBatch:
    """The responses of one update."""
    chosen = array(jnp.int32, self.updates.prompts_per_step // self.updates.minibatches)
    return self.rows(jax.eval_shape(take, self.batch, chosen))

  def placed(self, make: Callable[..., Any], *arguments) -> Any:
    return sharding.sharded_shapes(jax.eval_shape(make, *arguments), self.mesh)

  def rows(self, shapes, mesh: jax.sharding.Mesh | None = None):
    """Shapes of a batch, whose rows lie over the mesh."""
    layout = sharding.row_sharding(mesh or self.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)

  # The programs.

  @property
  def updates(self) -> flags.Updates:
    return updates_of(self.config)

  def numbers(self, **further: float) -> dict[str, Any]:
    """What a step's updates are computed with besides their batch."""
    return jax.eval_shape(lambda: setup.hyperparameters(self.settings, 0, **further))

  def update(self, name: str, program, state, batch, hparams) -> Lowering:
    size, frozen = self.updates, self.weights.frozen
    passes = update_passes(adapters=frozen is not None) + self.config.remat
    # Weights once a pass of every microbatch, as they are gathered; the state read and written.
    moved = passes * size.microbatches * self.gathered(frozen or state.params)
    moved += 6 * device_bytes(state.params)
    return self.call(name, program, state, batch, hparams, size.microbatches, frozen)._replace(
      calls=size.count,
      loop=size.microbatches,
      flops=passes * self.work() / size.minibatches,
      moved=moved,
    )

  def sampling(self, params) -> Iterator[Lowering]:
    """The rollout of a step, and before it the weights where they are gathered once."""
    config, policy, mesh = self.config, self.policy, self.mesh
    if config.mesh.gather == "step" and mesh.shape["fsdp"] > 1:
      mesh = sharding.whole_along_fsdp(mesh)
      whole, policy = {"dtype": policy.dtype, "mesh": mesh}, policy.over(mesh)
      gather = self.call("gather", gather_weights, params, **whole)
      yield gather._replace(flops=0.0, moved=self.gathered(params))
      gathered = jax.eval_shape(functools.partial(gather_weights, **whole), params)
      params = sharding.sharded_shapes(gathered, mesh)
    rows, steps = self.batch.tokens.shape
    sizes = config.prompts_per_step, config.responses_per_prompt
    keys = jax.eval_shape(lambda: row_keys(jax.random.key(0), *sizes))
    sampling = SamplingConfig(array(jnp.float32, rows))
    rollout = self.call(
      "rollout",
      generate,
      params,
      *self.rows((self.batch.prompts, self.batch.prompt_lengths, keys, sampling), mesh),
      policy=policy,
      responses_per_prompt=config.responses_per_prompt,
      max_new_tokens=steps,
      eos_ids=(0,),
      pad_id=0,
    )
    cache = (config.prompt_tokens + steps / 2) * rows * cache_bytes(config, policy.config)
    # Each token reads all weights that its device computes with, and the cache of its rows, which
    # is half full on average.
    moved = steps * (self.gathered(params) + cache / mesh.size)
    yield rollout._replace(loop=steps, moved=moved)

  def call(self, name: str, program: Any, *arguments: Any, **static: Any) -> Lowering:
    """A program, counted as one pass of the model over all that a step reads."""
    held = self.state, self.weights.frozen
    if self.weights.frozen is None and flatten(self.settings).get("kl.coef"):
      held = *held, self.weights.reference
    given = set(map(id, jax.tree.leaves(arguments)))
    how = setup.precision(self.settings.model, self.mesh.devices.flat[0].platform)

    def lower():
      with jax.default_matmul_precision(how):
        return program.lower(*arguments, **static)

    return Lowering(
      name,
      lower=lower,
      calls=1,
      loop=1,
      flops=self.work(),
      moved=self.gathered(self.weights.reference),
      resident=device_bytes([x for x in jax.tree.leaves(held) if id(x) not in given]),
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
