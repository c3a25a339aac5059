"""float32 is float32 on every platform unless a flag says otherwise, for sampler and trainer."""

import jax
import jax.numpy as jnp
import pytest

from experiments import flags, grpo, setup
from rl_llm.policy import make_policy, tiny_config
from rl_llm.runs.chips import published_flops
from rl_llm.runs.config import replace
from tests.experiments import helpers


@pytest.mark.parametrize(
  "asked, dtype, platform, found",
  [
    ("auto", "float32", "cpu", None),
    ("auto", "float32", "gpu", "highest"),
    ("auto", "float32", "tpu", "highest"),
    ("auto", "bfloat16", "gpu", None),
    ("default", "float32", "gpu", "default"),
    ("high", "float32", "tpu", "high"),
    ("highest", "float32", "cpu", "highest"),
  ],
)
def test_what_auto_means(asked, dtype, platform, found):
  options = flags.Weights(matmul_precision=asked, dtype=dtype)
  assert setup.precision(options, platform) == found


def products(policy, options, platform):
  """The lines of a forward pass, as lowered for a platform, that multiply matrices."""
  params = jax.eval_shape(policy.init, jax.random.key(0))
  ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)

  def forward(params, ids):
    hidden, _ = policy.hidden(params, ids, ids)
    return policy.logits(params, hidden)

  with jax.default_matmul_precision(setup.precision(options, platform)):
    text = jax.jit(forward).trace(params, ids).lower(lowering_platforms=(platform,)).as_text()
  return [line for line in text.splitlines() if "dot_general" in line]


def test_every_product_of_float32_is_float32_on_a_gpu():
  policy = make_policy(tiny_config(100))
  found = products(policy, flags.Weights(), "cuda")
  assert len(found) >= 10 and all("HIGHEST" in line for line in found)
  assert not any("HIGHEST" in line for line in products(policy, flags.Weights(), "cpu"))


@pytest.mark.slow
def test_a_run_multiplies_as_it_was_told(tmp_path, small, monkeypatch):
  """Within a run, sampling, evaluation and updates all use it; afterwards nothing is left of it."""
  seen = []

  def watching(original):
    def watched(*args, **kwargs):
      seen.append(jax.config.jax_default_matmul_precision)
      return original(*args, **kwargs)

    return watched

  names = ("sample", "learn", "evaluate")
  helpers.wrap_seams(monkeypatch, **dict.fromkeys(names, watching))
  changes = {"model": "tiny", "task": "copy", "steps": 1, "matmul_precision": "highest"}
  changes |= {"prompts_per_step": 2, "responses_per_prompt": 2, "max_new_tokens": 2}
  changes |= {"eval.problems": 2, "eval.samples": 1, "microbatch_prompts": 2}
  grpo.train(replace(grpo.Config(), changes), str(tmp_path / "run"))
  assert len(seen) == 4 and set(seen) == {"highest"}
  assert jax.config.jax_default_matmul_precision is None


def test_the_peak_that_mfu_is_held_against_is_that_of_these_products():
  assert published_flops("TPU v5e", "float32", "high") == pytest.approx(197e12 / 3)
  assert published_flops("TPU v5e", "float32", "highest") == pytest.approx(197e12 / 6)
  assert published_flops("NVIDIA H200", "float32", "high") == 989e12 / 2
  assert published_flops("NVIDIA B200", "float32", "highest") is None
  assert published_flops("NVIDIA B200", "bfloat16", "highest") == 2250e12
