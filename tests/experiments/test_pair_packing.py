"""Packed or a row each, pairs give the same losses, gradients and runs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, reward_model
from rl_llm.config import ConfigError, replace
from rl_llm.data.batches import packed_shares
from rl_llm.data.encoding import Encoded, Pair
from tests.experiments.helpers import run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Pairs of answers of very different length."""
  path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
  rows = [
    {"prompt": chr(97 + i % 20) + "x" * (i % 5), "chosen": "y" * (1 + i % 9), "rejected": "n"}
    for i in range(40)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def ragged_pairs(count):
  rng = np.random.default_rng(1)

  def answer():
    size = int(rng.integers(3, 12))
    return Encoded(rng.integers(97, 122, size=size).tolist(), [False] * 2 + [True] * (size - 2), 2)

  return [Pair(answer(), answer()) for _ in range(count)]


def test_loss_and_gradient_are_those_of_a_row_each(small):
  """In one piece and as two microbatches, of which the last place is empty."""
  pairs = ragged_pairs(3)
  config = replace(dpo.Config(), {"loss.beta": 0.5, "loss.sft_coef": 0.25, "packing": 16})
  params = small.init(jax.random.key(0))
  batch = dpo.make_batch(pairs, rows=4, pad_id=0)
  rng = np.random.default_rng(0)
  known = [-rng.uniform(0.1, 2, len(s.tokens)) * np.array(s.mask) for s in dpo.flat(pairs)]
  batch["ref_answers"] = dpo.known_answers(config.loss, known, batch["mask"])
  hparams = {"loss": dpo.loss_keywords(config.loss), "sft_coef": jnp.float32(0.25)}

  def gradient_of(config, batch):
    loss_fn = dpo.make_loss(config, small)
    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, hparams)
    return loss, gradient

  wanted = gradient_of(replace(config, {"packing": 0}), batch)
  shared = packed_shares(dpo.flat(pairs), shares=2, per_share=4, length=16, pad_id=0)
  packed = batch | {"packed": shared}
  assert len(shared.packed.tokens) < 8  # or nothing shares a row
  halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], packed) for i in (0, 1)]
  parts = [gradient_of(config, half) for half in halves]
  for found in (gradient_of(config, packed), jax.tree.map(jnp.add, *parts)):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experiment", [dpo, reward_model], ids=["dpo", "reward_model"])
def test_a_run_is_the_same(experiment, data, small, tmp_path):
  changes = {
    "model": "tiny", "data": data, "prompt_format": "plain", "steps": 3, "pairs_per_step": 8,
    "microbatch_pairs": 4, "held_out_fraction": 0.3, "max_tokens": 32, "eval.every": 3,
    "optimizer.learning_rate": 0.01,
  } | ({"task": "none"} if experiment is dpo else {})
  plain = run(experiment, tmp_path / "plain", changes).metrics
  packed = run(experiment, tmp_path / "packed", changes | {"packing": 48}).metrics
  padding = [(a.pop("padding_fraction"), b.pop("padding_fraction"))
             for a, b in zip(plain[:-1], packed[:-1], strict=True)]
  assert all(b < a for a, b in padding), padding
  if experiment is dpo:  # Against itself every margin is 0, and rounding says who is right.
    for rows in (plain, packed):
      del rows[0]["pair_accuracy"]
  for a, b in zip(plain, packed, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key


def test_what_does_not_fit(data):
  for experiment in (dpo, reward_model):
    config = replace(experiment.Config(), {"data": data, "packing": 100})
    with pytest.raises(ConfigError, match="packing=100: .*0, or at least .*512"):
      experiment.check(config)
