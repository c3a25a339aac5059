"""What only a GPU shows: cuDNN's attention, float32 that is float32, a run from end to end.

`make test-gpu` runs this file, and those of models, log-probs, sampling, updates and checkpoints.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import flags, grpo, setup
from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.attention import Kernel, find_kernel
from tests.experiments import helpers
from tests.experiments.conftest import files, small  # noqa: F401  fixtures

pytestmark = pytest.mark.gpu


def relative(found, wanted):
  """The distance of two trees, in units of the second one's length."""
  leaves = zip(*map(jax.tree.leaves, (found, wanted)), strict=True)
  pairs = [
    (np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()) for a, b in leaves
  ]
  apart = np.linalg.norm(np.concatenate([a - b for a, b in pairs]))
  return apart / np.linalg.norm(np.concatenate([b for _, b in pairs]))


def test_auto_is_cudnn_for_half_precision_and_plain_for_float32():
  assert find_kernel("auto", dtype=jnp.bfloat16) == Kernel("cudnn", False, None, False)
  assert find_kernel("auto", dtype=jnp.float32) is None
  with pytest.raises(ValueError, match="attention: splash is for tpu and cpu, here is gpu"):
    find_kernel("splash", dtype=jnp.bfloat16)


@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_reads_packed_rows_as_plain_attention_does(window):
  """No further from float32 than twice what rounding to bfloat16 does to plain attention."""
  shape = {"n_layers": 2, "width": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
  config = dataclasses.replace(tiny_config(64), **shape)
  if window is not None:
    config = dataclasses.replace(config, sliding_window=window, layer_types=("sliding", "full"))
  random = np.random.default_rng(0)
  tokens = random.integers(1, 64, (2, 600))
  segments = np.stack([[1] * 350 + [2] * 200 + [-1] * 50, [-1] * 30 + [1] * 570])
  positions = np.stack([np.r_[0:350, 0:200, [0] * 50], np.r_[[0] * 30, 0:570]])
  used = (segments != -1)[..., None]
  direction = random.normal(size=(2, 600, config.width)) * used
  params = make_policy(config).init(jax.random.key(0))

  def outcome(dtype, attention):
    policy = make_policy(config, dtype=dtype, attention=attention)

    def summed(params):
      hidden, _ = policy.hidden(params, tokens, positions, segments)
      return jnp.sum(hidden * direction), hidden * used

    (_, hidden), gradient = jax.jit(jax.value_and_grad(summed, has_aux=True))(params)
    return hidden.astype(jnp.float32), gradient

  exact = outcome(jnp.float32, "xla")
  plain, fused = outcome(jnp.bfloat16, "xla"), outcome(jnp.bfloat16, "cudnn")
  for wanted, one, other in zip(exact, plain, fused, strict=True):
    assert 0 < relative(other, wanted) < 2 * relative(one, wanted)


def test_float32_is_multiplied_in_float32_by_default_and_in_less_when_asked():
  a, b = np.random.default_rng(0).normal(size=(2, 512, 512)).astype(np.float32)
  wanted = a.astype(np.float64) @ b

  def apart(asked):
    with jax.default_matmul_precision(
      setup.precision(flags.Weights(matmul_precision=asked), "gpu")
    ):
      return relative(jax.jit(jnp.matmul)(a, b), wanted)

  assert apart("auto") < 2e-6  # Of 24 bits; TF32 keeps 11: about 3e-4.
  assert apart("auto") < apart("default")


def test_a_run_samples_what_it_trains_on_and_resumes(tmp_path, small, files):  # noqa: F811
  """The sampler's log-probs are the trainer's, to float32's rounding; every step is on record."""
  changes = helpers.settings(files, **{"steps": 3, "checkpoint.every": 1})
  first = helpers.run(grpo, tmp_path, changes)
  assert max(row["logprob_gap_mean"] for row in first.metrics[:-1]) < 1e-5
  found = helpers.run(grpo, tmp_path, changes | {"steps": 5})
  assert [row["step"] for row in found.metrics] == list(range(6))
  assert found.metrics[:3] == first.metrics[:3]
