"""Many members trained as one program: N sets of weights, each with its own rows of the batch.

An update is a pure function of arrays, and what a sweep changes most is numbers. So N settings are
one `vmap` away from one. Small models have their own weights each; adapters have one base, which is
in memory once and is read once for all. Whole members lie over the devices.
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
from rl_llm.rollout import ResponseBatch, Rollout, experience
from rl_llm.rollout.experience import Generate, Sampler
from rl_llm.runs import metrics
from rl_llm.text.tokenizers import Tokenizer
from rl_llm.training import loop, minibatches
from rl_llm.training.train_state import TrainState


class Programs(NamedTuple):
  """What runs on the devices, for all members at once: members come first in all but `frozen`."""

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
  """The functions of one member's step, mapped over members; each device has whole ones.

  Args:
    policy: the model's functions.
    tokenizer: which knows what ends a response.
    update_one: a member's update, from `rl_llm.training.update.make_update` without a mesh.
    mesh: its devices share the members out.
    max_new_tokens: T.
    temperature: of the sampler, at which log-probs are taken.
    chunk_size: tokens of a member whose logits exist at the same time.
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
  """A function that generates for each of `count` members, all of which will be asked the same.

  Members are evaluated one after another, each on the same problems with the same keys. The first
  to ask has all of them answer; the others read what they have said.

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
        said.append(sharding.fetch(sample(tiled, jnp.concatenate([keys] * count), sampling, group)))
      size = len(keys)
      return Rollout(*(x[number * size : (number + 1) * size] for x in said[call]))

    return generate_own

  return [of_member(number) for number in range(count)]


def stacked(trees: Sequence[Any]) -> Any:
  """One tree, with a new first axis, on the host where its leaves are there."""
  return jax.tree.map(lambda *x: (jnp if isinstance(x[0], jax.Array) else np).stack(x), *trees)


def members_over(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shapes of which the first axis is the members', with their layout."""
  layout = sharding.row_sharding(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes)


class Evaluations(NamedTuple):
  """What an evaluation of all members found."""

  metrics: dict[str, float]  # of the whole
  members: list[evaluation.Evaluation]


def evaluate(
  sampler: Sampler,
  held_out: experience.Drawn,
  say: Callable[[str], None],
  state: TrainState,
  step: int,
  *,
  samples: int,
  prompts_per_batch: int,
) -> Evaluations:
  """Every member on the held-out problems, as `evaluation.evaluate` does one.

  Args:
    sampler: of all members at once.
    held_out: the problems.
    say: shows a line.
    state: with their weights.
    step: of the run.
    samples: responses a problem at temperature 1, of each member.
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
  """The step as that member would have made it alone, of one that all made together.

  Args:
    step: of all: what was learned has the members' sums under "totals", one advantage each.
    number: the member's.
    learning_rate: its own at this step.
  """
  found, learned = step.evaluation, None
  if step.learned:
    worth, totals = step.learned.advantages[number], step.learned.metrics["totals"]
    figures = metrics.finalize({k: (v[0][number], v[1][number]) for k, v in totals.items()})
    ok = step.experience[number].scores.ok
    figures["frac_zero_std"] = minibatches.without_spread(np.any(worth != 0, axis=1), ok)
    figures["learning_rate"] = learning_rate
    learned = loop.Learned(figures, worth)
  return step._replace(
    evaluation=found and found.members[number],
    experience=step.learned and step.experience[number],
    state=step.learned and TrainState(*[None] * 3, *(x[number] for x in step.state)),
    learned=learned,
  )
