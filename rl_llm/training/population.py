"""Many members trained as one program: N sets of weights, each with its own rows of the batch.

An update is a pure function of arrays, and a sweep changes mostly numbers, so one `vmap` turns one
setting into N. Small models each have their own weights. Adapters share one base, which is in
memory once and is read once for all of them. Each device holds whole members.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from rl_llm import evaluation, rollout
from rl_llm.data.prompts import PromptBatch
from rl_llm.parallel import sharding
from rl_llm.policy import Policy, join, population_policy
from rl_llm.rollout import ResponseBatch, Rollout, drawing
from rl_llm.rollout.collect import Generate, Sampler
from rl_llm.runs import metrics
from rl_llm.text.tokenizers import Tokenizer
from rl_llm.training import loop, minibatches
from rl_llm.training.train_state import TrainState


class Programs(NamedTuple):
  """The programs for all members at once: the first axis is the members', except in `frozen`."""

  # (frozen, own, prompts [N * P, L], lengths, keys [N * P * G], sampling, G)
  #   -> Rollout of N * P * G rows
  generate: Callable[..., Rollout]
  # (frozen, own, batch) -> log-probs [N, B, T]
  logprobs: Callable[..., jax.Array]
  # (batch, chosen [N, M]) -> the chosen problems' rows
  take: Callable[..., ResponseBatch]
  # (state, batch, hparams, microbatches, frozen) -> (state, metrics)
  update: Callable[..., tuple[TrainState, dict]]


def make_programs(
  policy: Policy,
  tokenizer: Tokenizer,
  update_one: Callable,
  mesh: jax.sharding.Mesh,
  *,
  max_new_tokens: int,
  temperature: float,
  chunk_size: int,
) -> Programs:
  """The functions of one member's step, mapped over members; each device has whole members.

  Args:
    policy: the model's functions.
    tokenizer: it knows what ends a response.
    update_one: a member's update, from `rl_llm.training.update.make_update` without a mesh.
    mesh: the devices to divide the members among.
    max_new_tokens: T.
    temperature: of the sampler, at which log-probs are taken.
    chunk_size: how many tokens of a member have logits in memory at the same time.
  """
  sampler = population_policy(policy)
  shared, members = PartitionSpec(), PartitionSpec(sharding.ROWS)
  on_each = functools.partial(jax.shard_map, mesh=mesh, out_specs=members, check_vma=False)

  @functools.partial(jax.jit, static_argnums=6)
  def generate_all(frozen, own, prompts, lengths, keys, sampling, group):
    def of_device(frozen, own, *batch):
      return rollout.generate(
        (frozen, own),
        *batch,
        policy=sampler,
        responses_per_prompt=group,
        max_new_tokens=max_new_tokens,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
      )

    program = on_each(of_device, in_specs=(shared, *[members] * 5))
    return program(frozen, own, prompts, lengths, keys, sampling)

  @jax.jit
  def logprobs(frozen, own, batch):
    def of_one(frozen, own, batch):
      weights = join(frozen, own)
      return rollout.response_logprobs(
        weights, batch, policy=policy, temperature=temperature, chunk_size=chunk_size
      )[0]

    of_device = jax.vmap(of_one, in_axes=(None, 0, 0))
    return on_each(of_device, in_specs=(shared, members, members))(frozen, own, batch)

  @jax.jit
  def take(batch, chosen):
    of_device = jax.vmap(rollout.take_prompts)
    return on_each(of_device, in_specs=(members, members))(batch, chosen)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch, hparams, microbatches, frozen):
    of_device = jax.vmap(update_one, in_axes=(0, 0, 0, None, None))
    specs = (*[members] * 3, shared, shared)
    return on_each(of_device, in_specs=specs)(state, batch, hparams, microbatches, frozen)

  return Programs(generate_all, logprobs, take, update)


def in_turns(sample: Generate, count: int) -> list[Generate]:
  """`count` functions, one per member, that generate from one call for all members.

  Members are evaluated one after another, each on the same problems with the same keys. The first
  call generates the responses of all members; the other members then read theirs.

  Args:
    sample: (None, prompts of all members, ...) -> their responses, the first member's first.
    count: N.
  """
  said: list[Rollout] = []

  def of_member(number: int) -> Generate:
    calls = itertools.count()

    def generate_own(params, prompts, keys, sampling, group):
      call = next(calls)
      if call == len(said):
        tiled = PromptBatch(*(np.concatenate([x] * count) for x in prompts))
        temperature = jnp.tile(sampling.temperature, count)
        sampling = dataclasses.replace(sampling, temperature=temperature)
        sampled = sample(tiled, jnp.concatenate([keys] * count), sampling, group)
        said.append(sharding.gather_to_host(sampled))
      size = len(keys)
      return Rollout(*(x[number * size : (number + 1) * size] for x in said[call]))

    return generate_own

  return [of_member(number) for number in range(count)]


def stacked(trees: Sequence[Any]) -> Any:
  """The trees as one, with a new first axis; leaves on the host stay there."""
  return jax.tree.map(lambda *x: (jnp if isinstance(x[0], jax.Array) else np).stack(x), *trees)


def members_over(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shapes whose first axis is the members', with their layout."""
  layout = sharding.row_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)


class Evaluations(NamedTuple):
  """The results of evaluating all members."""

  metrics: dict[str, float]  # over all members
  members: list[evaluation.Evaluation]


def evaluate(
  sampler: Sampler,
  held_out: drawing.Drawn,
  say: Callable[[str], None],
  state: TrainState,
  step: int,
  *,
  samples: int,
  prompts_per_batch: int,
) -> Evaluations:
  """Evaluates every member on the held-out problems, as `evaluation.evaluate` does for one.

  Args:
    sampler: of all members at once.
    held_out: the problems.
    say: shows a line.
    state: with the members' weights.
    step: of the run.
    samples: responses per problem at temperature 1, for each member.
    prompts_per_batch: problems sampled at once.
  """
  count = len(jax.tree.leaves(state.params)[0])
  say(f"evaluating {count} members on {len(held_out.problems)} held-out problems")
  sizes = {"samples": samples, "prompts_per_batch": prompts_per_batch, "step": step}
  found = [
    evaluation.evaluate(sampler._replace(generate=own), None, held_out, **sizes)
    for own in in_turns(functools.partial(sampler.generate, state.params), count)
  ]
  whole = {}
  for name in ("sampled", "greedy"):
    accuracies = [own.metrics[f"eval/{name}_accuracy"] for own in found]
    accuracies = [accuracy for accuracy in accuracies if accuracy is not None]
    if not accuracies:  # The grader had no opinion on any of it.
      continue
    say(f"held-out accuracy, {name}: from {min(accuracies):.2f} to {max(accuracies):.2f}")
    whole |= {f"eval/{name}_mean": float(np.mean(accuracies)), f"eval/{name}_best": max(accuracies)}
  return Evaluations(whole, found)


def member_step(step: loop.Step, number: int, *, learning_rate: float) -> loop.Step:
  """One member's part of a step that all made together, as if it had trained alone.

  Args:
    step: of all members: `learned` has the members' sums under "totals", and advantages for each.
    number: the member's.
    learning_rate: the member's own at this step.
  """
  found, learned = step.evaluation, None
  if step.learned:
    advantages, totals = step.learned.advantages[number], step.learned.metrics["totals"]
    figures = metrics.finalize({k: (v[0][number], v[1][number]) for k, v in totals.items()})
    ok = step.experience[number].scores.ok
    figures["frac_zero_std"] = minibatches.without_spread(np.any(advantages != 0, axis=1), ok)
    figures["learning_rate"] = learning_rate
    learned = loop.Learned(figures, advantages)
  return step._replace(
    evaluation=found and found.members[number],
    experience=step.learned and step.experience[number],
    state=step.learned and TrainState(*[None] * 3, *(x[number] for x in step.state)),
    learned=learned,
  )
