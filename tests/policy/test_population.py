"""Many adapters over one base in one rollout: each row is its member's, and the base is one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from rl_llm.policy import join, make_policy, population_policy, split_lora, tiny_config
from rl_llm.rollout import ResponseBatch, generate, response_logprobs, row_keys
from rl_llm.rollout.sampling import SamplingConfig

MEMBERS, PROMPTS, GROUP, STEPS = 3, 2, 2, 5
POLICY = make_policy(dataclasses.replace(tiny_config(32), n_layers=1))


@functools.cache  # At the first test, not when tests are collected.
def weights():
  """Sharper than random weights are, so that a member's tokens tell it from the others.

  Three times as large they make 3e-5 of rounding.
  """
  return jax.tree.map(lambda x: 2 * x, jax.jit(POLICY.init)(jax.random.key(0)))


def with_adapters(number):
  """(frozen, adapters as after some training: B is not 0)."""
  return _with_adapters(weights(), number)


@jax.jit
def _with_adapters(params, number):
  frozen, own = split_lora(params, jax.random.key(number), rank=2, alpha=8.0)
  shake = jax.random.key(100 + number)
  return frozen, jax.tree.map(lambda x: x + 0.2 * jax.random.normal(shake, x.shape), own)


def roll(params, policy, first, last):
  """Responses to the problems of members `first` to `last` - 1, each with its own keys."""
  rng = np.random.default_rng(0)
  rows = slice(first * PROMPTS, last * PROMPTS)
  prompts = rng.integers(0, 32, (MEMBERS * PROMPTS, 4)).astype(np.int32)[rows]
  lengths = rng.integers(1, 5, MEMBERS * PROMPTS).astype(np.int32)[rows]
  keys = row_keys(jax.random.key(7), MEMBERS * PROMPTS, GROUP)
  rollout = generate(
    params,
    prompts,
    lengths,
    keys[first * PROMPTS * GROUP : last * PROMPTS * GROUP],
    SamplingConfig(0.7),
    policy=policy,
    responses_per_prompt=GROUP,
    max_new_tokens=STEPS,
    eos_ids=(3, 4, 5, 6),
    pad_id=0,
  )
  return prompts, lengths, rollout


def test_each_row_is_its_own_members():
  """The same tokens as alone, with the log-probs that the trainer's side gives them."""
  found = [with_adapters(number) for number in range(MEMBERS)]
  frozen = found[0][0]
  own = jax.tree.map(lambda *x: jnp.stack(x), *(own for _, own in found))
  prompts, lengths, together = roll((frozen, own), population_policy(POLICY), 0, MEMBERS)
  assert 0 < np.mean(together.mask) < 1  # Ragged.
  for number in range(MEMBERS):
    params = join(*found[number])
    problems = slice(number * PROMPTS, (number + 1) * PROMPTS)
    rows = slice(number * PROMPTS * GROUP, (number + 1) * PROMPTS * GROUP)
    alone = roll(params, POLICY, number, number + 1)[2]
    np.testing.assert_array_equal(together.tokens[rows], alone.tokens)
    mask = together.mask[rows]
    batch = ResponseBatch(prompts[problems], lengths[problems], together.tokens[rows], mask, mask)
    scored, _ = response_logprobs(params, batch, policy=POLICY, temperature=0.7)
    np.testing.assert_allclose(together.sampler_logprobs[rows], scored, atol=2e-5)
  texts = np.asarray(together.tokens).reshape(MEMBERS, -1)
  assert len({row.tobytes() for row in texts}) == MEMBERS


def products(jaxpr):
  """Shapes of the operands of every matrix product, those within loops and calls too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield [variable.aval.shape for variable in equation.invars]
    for inner in jaxprs_in_params(equation.params):
      yield from products(inner)


def test_a_decode_step_reads_each_shared_matrix_once():
  """In as many products as one member's own step, of none of which a copy a member is made."""
  found = [with_adapters(number) for number in range(MEMBERS)]
  frozen = found[0][0]
  own = jax.tree.map(lambda *x: jnp.stack(x), *(own for _, own in found))
  matrices = {leaf.shape for leaf in jax.tree.leaves(weights()) if leaf.ndim == 2}

  def of_base(policy, params, rows):
    tokens = jnp.zeros((rows, 1), jnp.int32)

    def step(params, tokens, cache):
      hidden, _ = policy.hidden(params, tokens, tokens, tokens, cache)
      return policy.logits(params, hidden[:, 0])

    traced = jax.make_jaxpr(step)(params, tokens, policy.init_cache(rows, 8))
    shapes = [shape for pair in products(traced.jaxpr) for shape in pair]
    copies = [shape for shape in shapes if shape[0] == MEMBERS and shape[1:] in matrices]
    return sorted(shape for shape in shapes if shape in matrices), copies

  alone = of_base(POLICY, join(*found[0]), 2)
  assert alone[0]
  together = of_base(population_policy(POLICY), (frozen, own), 2 * MEMBERS)
  assert together == (alone[0], [])
