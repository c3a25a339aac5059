"""From sampled responses to updates: what every policy gradient does between a reward and a step.

A batch of responses is placed on the devices once. The log-probs that an update compares with (of
the policy before it, of a reference) are computed there. Each update takes its rows there too, and
its tokens are weighted among all tokens of that update.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import weighting
from rl_llm.losses import llds_weights
from rl_llm.masked import masked_mean
from rl_llm.parallel import sharding
from rl_llm.policy import Policy
from rl_llm.policy.load import Weights
from rl_llm.rollout import ResponseBatch, response_logprobs, take_prompts
from rl_llm.rollout.collect import Experience, response_batch
from rl_llm.runs.flops import Work, response_work, update_passes
from rl_llm.training.train_state import TrainState

Truncated = Literal["keep", "zero", "drop"]

# (batch) -> {"weights", "kl_weights"}: how much each token of an update counts
Weigh = Callable[[ResponseBatch], dict[str, jax.Array | None]]


class Programs(NamedTuple):
  """The programs that a step runs on the devices after its rollout; weights are arguments."""

  logprobs: Callable  # (params, batch) -> log-probs and entropies [B, T]
  take: Callable  # (batch, chosen problems) -> their rows, with the weights of their tokens
  update: Callable  # (state, minibatch, hparams, microbatches used, frozen) -> (state, metrics)


def make_programs(
  policy: Policy,
  update: Callable,
  *,
  temperature: float,
  weigh: Weigh,
  mesh: jax.sharding.Mesh | None = None,
) -> Programs:
  """Builds the programs that train a policy on responses; each compiles when it is called.

  Args:
    policy: the model's functions.
    update: from `rl_llm.training.update.make_update`, of a loss on a `ResponseBatch`.
    temperature: the sampler's.
    weigh: for example `all_weights` with its keywords.
    mesh: the devices over which rows lie; None: the first.
  """

  @jax.jit
  def take(batch: ResponseBatch, chosen: Any) -> ResponseBatch:
    taken = take_prompts(batch, chosen)
    taken = weighed(taken, weigh(taken))
    return taken if mesh is None else sharding.constrain_rows(taken, mesh)

  logprobs = jax.jit(functools.partial(response_logprobs, policy=policy, temperature=temperature))
  return Programs(logprobs, take, update)


def group_inputs(
  experience: Experience, separate: np.ndarray | None = None
) -> tuple[jax.Array | None, ...]:
  """What advantages of groups are computed from, in this order.

  Args:
    experience: of a step.
    separate: [K], the weights of several rewards that the advantage takes one by one; None: it
      takes their sum.

  Gives:
    [P, G] rewards; [P, G] bool, which of them to count; [P, G] lengths in tokens; and the reward
    [P] of each problem's greedy response, or None if none was sampled. Where that has no reward,
    those of its problem do not count. With `separate` the first two are [P, G, K], and the fifth
    are these weights; else it is None.
  """
  scores, greedy = experience.scores, experience.greedy
  lengths = np.reshape(experience.rollout.lengths, scores.rewards.shape)
  if separate is not None:
    shape = (*scores.rewards.shape, len(separate))
    values = [
      [float("nan") if value is None else value for value in result.parts.values()]
      for result in scores.results
    ]
    values = np.reshape(np.asarray(values, np.float32), shape)
    counted = np.isfinite(values) & scores.ok[..., None]
    weights = np.asarray(separate, np.float32)
    return jax.device_put((np.where(counted, values, 0), counted, lengths, None, weights))
  if greedy is None:
    return jax.device_put((scores.rewards, scores.ok, lengths, None, None))
  ok = scores.ok & greedy.ok
  return jax.device_put((scores.rewards, ok, lengths, greedy.rewards[:, 0], None))


def rewards_by_credit(
  experience: Experience, batch: ResponseBatch, *, credit: str
) -> tuple[np.ndarray, jax.Array | None]:
  """The rewards of whole episodes [B] and None; or of their turns [B, N], and the batch's turns.

  Args:
    experience: of the step.
    batch: its responses, on the devices.
    credit: "trajectory" or "turn".
  """
  if credit == "turn":
    return experience.turns.rewards, batch.turns
  return experience.scores.rewards.reshape(-1), None


def weighed(batch: ResponseBatch, weights: dict[str, Any]) -> ResponseBatch:
  """An update's rows with the weights of their tokens, without what only these were made from."""
  spent = {"truncated": None, "entropies": None}
  return batch._replace(**weights, **spent)


def place_responses(
  experience: Experience,
  mesh: jax.sharding.Mesh | None,
  *,
  entropies: bool = False,
  correct: bool = False,
) -> ResponseBatch:
  """Puts the experience on the devices as losses read it; its tokens are sent only here.

  Args:
    experience: of the step.
    mesh: over which its rows lie.
    entropies: whether weights depend on the sampler's entropies.
    correct: whether the loss depends on which answers are right.
  """
  batch = response_batch(experience)
  if entropies:
    batch = batch._replace(entropies=experience.rollout.entropies)
  if correct:
    right = np.array([row["correct"] is True for row in experience.samples])
    batch = batch._replace(correct=right)
  return sharding.shard_rows(batch, mesh)


def all_weights(
  batch: ResponseBatch,
  *,
  kl_name: str = "loss",
  corrections: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
  top_entropy: float = 1.0,
  shared_tokens: float | None = None,
  llds: str | None = None,
  **of_loss: Any,
) -> dict[str, jax.Array | None]:
  """The weights of the loss, and those of its other terms if they differ.

  Args:
    batch: the update's rows.
    kl_name: a function of `rl_llm.weighting`, or "loss" for the weights of the loss.
    corrections: functions of `rl_llm.weighting` that compare the old policy with the sampler, by
      name, with their keywords.
    top_entropy: the share of the tokens that the surrogate counts, those of the highest entropy.
    shared_tokens: what a good response's tokens count that bad ones share; None: all count 1.
    llds: the normalizer of `rl_llm.losses.llds_weights`; None: there is no such term.
    **of_loss: the keywords of `token_weights`; for the KL, only the name differs.
  """
  weights = token_weights(batch, **of_loss)
  of_kl = None if kl_name == "loss" else token_weights(batch, **of_loss | {"name": kl_name})
  found = {"weights": weights, "kl_weights": of_kl}
  factors = []
  for name, given in corrections.items():
    compared = batch.old_logprobs, batch.sampler_logprobs, batch.mask
    factors.append(getattr(weighting, name)(*compared, **given))
  if top_entropy < 1:
    factors.append(weighting.top_entropy(batch.entropies, batch.mask, fraction=top_entropy))
  if shared_tokens is not None:
    rows, size = (batch.tokens, batch.advantages, batch.mask), _group_size(batch)
    factors.append(weighting.shared_tokens(*rows, group_size=size, positive=shared_tokens))
  if factors:
    found["factors"] = math.prod(factors)
  if llds is not None:
    found["llds_weights"] = llds_weights(batch.advantages, batch.mask, normalizer=llds)
  if batch.correct is not None:
    found["nll_weights"] = weighting.token_mean(batch.mask & batch.correct[:, None])
  return found


def _group_size(batch: ResponseBatch) -> int:
  return len(batch.tokens) // len(batch.prompts)


def token_weights(
  batch: ResponseBatch, *, name: str, length: int, power: float = 1.0, truncated: Truncated = "keep"
) -> jax.Array:
  """[B, T] how much each token of an update counts: a function of `rl_llm.weighting` by its name.

  Args:
    batch: the update's rows.
    name: of the function.
    length: of "constant_length".
    power: of "length_power".
    truncated: what to do with responses that were cut off at the limit. "keep" counts them like any
      other. "zero" gives them weight 0 but leaves them in the denominator, so the others keep their
      weights (the batch's gradient shrinks). "drop" takes the mean over the others.
  """
  mask = batch.mask
  if truncated == "drop":
    mask = mask & ~batch.truncated[:, None]
  keywords = {
    "constant_length": {"length": length},
    "length_power": {"power": power},
    "prompt_mean": {"group_size": _group_size(batch)},
  }
  weights = getattr(weighting, name)(mask, **keywords.get(name, {}))
  if truncated == "zero":
    weights = weights * weighting.drop_truncated(batch.mask, batch.truncated)
  return weights


def with_logprobs(
  batch: ResponseBatch,
  programs: Programs,
  weights: Weights,
  state: TrainState,
  *,
  old: bool,
  ref: bool,
) -> ResponseBatch:
  """The batch with the log-probs that updates compare with; each takes a pass over all responses.

  Args:
    batch: on the devices.
    programs: their `logprobs` is called.
    weights: include the reference's, if it stays what it is.
    state: of the policy before the step's updates, with the reference's weights if they change.
    old: whether the step has several updates; in the first, the policy is still the old policy.
    ref: whether anything compares with the reference.
  """
  if old:
    batch = batch._replace(old_logprobs=programs.logprobs(weights.whole(state.params), batch)[0])
  if ref:
    fixed = state.reference is None
    reference = weights.reference if fixed else weights.whole(state.reference)
    batch = batch._replace(ref_logprobs=programs.logprobs(reference, batch)[0])
  return jax.block_until_ready(batch)


class Minibatch(NamedTuple):
  """The responses of one update."""

  batch: ResponseBatch  # with the weights of its tokens
  microbatches: jax.Array  # [] how many of its microbatches are computed; the rest add nothing
  problems: np.ndarray  # the problems that these responses answer


def minibatches(
  take: Callable[[ResponseBatch, Any], ResponseBatch],
  batch: ResponseBatch,
  order: Iterator[tuple[np.ndarray, int]],
  *,
  microbatch_prompts: int,
  only: bool = False,
) -> Iterator[Minibatch]:
  """Divides a step's responses among its updates.

  Args:
    take: from `Programs`.
    batch: the whole batch, on the devices; advantages may still be on the host.
    order: from `rl_llm.training.minibatches.problem_order`: the problems of each update, those that
      matter first, and how many of them do.
    microbatch_prompts: problems per microbatch.
    only: whether the loss has no other term, so that problems that do not matter can be left out.
  """
  # What is not on the devices is put there by name: under `jax.transfer_guard("disallow")` nothing
  # goes there by itself.
  batch = jax.tree.map(lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x, batch)
  for chosen, used in order:
    used = used if only else len(chosen)
    rows, count = jax.device_put((chosen, np.int32(-(-used // microbatch_prompts))))
    yield Minibatch(take(batch, rows), count, chosen[:used])


def per_response(batch: ResponseBatch, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """The means [P, G] of advantages per token, and [P] which problems have one that is not 0."""
  means, any_of = sharding.gather_to_host(_per_response(batch.advantages, batch.mask))
  return means.reshape(shape), np.any(any_of.reshape(shape), axis=1)


@jax.jit
def _per_response(per_token: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  return masked_mean(per_token, mask, axis=1), jnp.any(per_token != 0, axis=1)


def logprob_gap(logprobs: jax.Array, batch: ResponseBatch) -> dict[str, tuple]:
  """How far the trainer's log-probs are from the sampler's: a metric of every policy loss."""
  gap = jnp.where(batch.mask, jnp.abs(logprobs - batch.sampler_logprobs), 0.0)
  return {"logprob_gap_mean": (jnp.sum(gap), jnp.sum(batch.mask))}


def step_work(
  shape: Any, experience: Experience, trained: Sequence[np.ndarray], *, adapters: bool, towers: int
) -> Work:
  """What a step sampled and trained on.

  Args:
    shape: the model's configuration.
    experience: of the step.
    trained: the problems of each of its updates.
    adapters: whether only adapters are trained, not all weights.
    towers: as for `rl_llm.runs.flops.response_work`.
  """
  work = response_work(
    shape,
    experience.prompts.lengths,
    experience.rollout.lengths,
    np.sum(response_batch(experience).mask, axis=1),
    trained,
    passes=update_passes(adapters=adapters),
    towers=towers,
  )
  # What an environment said has been read, but nobody generated it.
  return work._replace(generated_tokens=int(np.sum(experience.rollout.mask)))


def without_spread(informative: np.ndarray, ok: np.ndarray) -> float | None:
  """Among the groups with a reward, the share whose responses are all worth the same.

  >>> ok = np.array([[True, True], [True, True], [False, False]])
  >>> without_spread(np.array([True, False, False]), ok)
  0.5

  Args:
    informative: [P] bool, whether the group has an advantage that is not 0.
    ok: [P, G] bool, True where there is a reward.
  """
  graded = ok.any(axis=1)
  return float(np.mean(~informative[graded])) if graded.any() else None


def problem_order(
  seed: int, step: int, *, prompts: int, epochs: int, count: int, matters: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, int]]:
  """The problems of each update, with `count` updates per epoch; every epoch reshuffles them.

  >>> [(chosen.size, used) for chosen, used in problem_order(0, 0, prompts=6, epochs=1, count=3)]
  [(2, 2), (2, 2), (2, 2)]

  Args:
    seed: of the run.
    step: of the run.
    prompts: P.
    epochs: passes over all problems.
    count: updates in each pass; divides P.
    matters: [P] bool, False = its responses add nothing to the loss; None: all matter.

  Yields:
    The chosen problems, those that matter first, and how many of them matter.
  """
  for epoch in range(epochs):
    rng = np.random.default_rng(np.random.SeedSequence([seed, step, epoch]))
    for chosen in np.split(rng.permutation(prompts), count):
      used = np.ones(len(chosen), bool) if matters is None else matters[chosen]
      yield chosen[np.argsort(~used, kind="stable")], int(np.count_nonzero(used))
