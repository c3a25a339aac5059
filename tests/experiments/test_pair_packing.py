"""Packed or a row each, pairs give the same losses, gradients and runs."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, reward_model
from rl_llm.data.encoding import Encoded, Pair, flat
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from tests.experiments.helpers import run
from tests.experiments.test_dpo import online, ready
from tests.representatives import mostly_slow


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
  config = replace(dpo.Config(), {"loss.beta": 0.5, "loss.sft_coef": 0.25})
  params = jax.jit(small.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  known = [-rng.uniform(0.1, 2, len(s.tokens)) * np.array(s.mask) for s in flat(pairs)]
  loss_fn = dpo.make_loss(config, small)

  def batch_of(**sizes):
    return ready(config, dpo.make_batch(pairs, rows=4, pad_id=0, **sizes)[0], known)

  value_and_grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))

  def gradient_of(batch):
    (loss, _), gradient = value_and_grad(params, batch, hparams)
    return loss, gradient

  plain, hparams = batch_of()
  wanted = gradient_of(plain)
  packed, _ = batch_of(packing=16, shares=2)
  assert len(packed.pairs.packed.packed.tokens) < 8  # or nothing shares a row
  halves = [jax.tree.map(lambda x, i=i: np.split(x, 2)[i], packed) for i in (0, 1)]
  for found in (gradient_of(packed), jax.tree.map(jnp.add, *map(gradient_of, halves))):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "experiment", mostly_slow([dpo, reward_model], quick=[1]), ids=["dpo", "reward_model"]
)
def test_a_run_is_the_same(experiment, data, small, tmp_path):
  changes = {
    "model": "tiny",
    "data": data,
    "prompt_format": "plain",
    "steps": 3,
    "pairs_per_step": 8,
    "microbatch_pairs": 4,
    "held_out_fraction": 0.3,
    "max_tokens": 32,
    "eval.every": 3,
    "optimizer.learning_rate": 0.01,
  } | ({"task": "none"} if experiment is dpo else {})
  plain = run(experiment, tmp_path / "plain", changes).metrics
  packed = run(experiment, tmp_path / "packed", changes | {"packing": 48}).metrics
  padding = [
    (a.pop("padding_fraction"), b.pop("padding_fraction"))
    for a, b in zip(plain[:-1], packed[:-1], strict=True)
  ]
  assert all(b < a for a, b in padding), padding
  if experiment is dpo:  # Against itself every margin is 0, and rounding says who is right.
    for rows in (plain, packed):
      del rows[0]["pair_accuracy"]
  for a, b in zip(plain, packed, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-4), key


PROMPTS = {"max_prompt_tokens": 23, "max_new_tokens": 8, "microbatch_pairs": 2, "steps": 1}


@pytest.mark.slow
def test_on_policy_rows_that_a_response_fits_into_train(small, files, tmp_path):
  plain = run(dpo, tmp_path / "plain", online(files, **PROMPTS))
  for packing in (31, 64):
    packed = run(dpo, tmp_path / str(packing), online(files, packing=packing, **PROMPTS))
    first, wanted = ([row for row in r.samples if row["step"] == 0] for r in (packed, plain))
    assert first == wanted
    row, wanted = packed.metrics[0], dict(plain.metrics[0])
    assert row["pairs"] > 1
    del row["padding_fraction"], row["pair_accuracy"]  # Against itself rounding says who is right.
    del wanted["padding_fraction"], wanted["pair_accuracy"]
    assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_on_policy_rows_that_are_too_short_are_refused_before_anything_is_loaded(
  files, tmp_path, monkeypatch
):
  monkeypatch.setattr("rl_llm.policy.load.load_model", None)
  monkeypatch.setattr("rl_llm.tasks.load_task", None)
  changes = online(files, packing=30, **PROMPTS)
  with pytest.raises(ConfigError, match=r"--packing=30: must be 0, or at least .*\(31\)"):
    run(dpo, tmp_path / "run", changes)
  assert not (tmp_path / "run").exists()
  dpo.check(replace(dpo.Config(), changes | {"packing": 31}))


def test_what_does_not_fit(data):
  for experiment in (dpo, reward_model):
    config = replace(experiment.Config(), {"data": data, "packing": 100})
    with pytest.raises(ConfigError, match="packing=100: .*0, or at least .*512"):
      experiment.check(config)
