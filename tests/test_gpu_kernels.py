"""Kinds of kernels: by name, by what they read, and the rates that predict other GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_kernels as kernels
from benchmarks.gpu_kernels import Event
from launch.models import find_model
from rl_llm.runs.chips import GPUS, Chip
from rl_llm.runs.flops import forward_flops

MODEL = find_model("qwen2.5-1.5b")
BYTES = 439e9  # counted by the compiler for the update
PROMPTS, RESPONSES = [512] * 2, [1024] * 16


@pytest.mark.parametrize(
  "predicted, measured",
  [
    (kernels.predict_update(MODEL, PROMPTS, RESPONSES, BYTES, GPUS["h200"]), 0.359),
    (kernels.predict_decode(MODEL, 512 + 160, 64, GPUS["h200"]), 2.57e-3),
    (kernels.predict_decode(MODEL, 512 + 160, 256, GPUS["h200"]), 5.54e-3),
  ],
)
def test_where_it_was_measured_the_prediction_is_what_was_measured(predicted, measured):
  """Within a tenth: the rates are of kinds of kernels, and nothing else is fitted."""
  assert predicted == pytest.approx(measured, rel=0.1)


def test_an_update_is_its_parts_at_their_rates(monkeypatch):
  """At rates of 1 it is the formula's operations at the peak, and the bytes."""
  monkeypatch.setattr(kernels, "RATES", kernels.Rates(1, 1, 1, 1, 1, 1, 1, 0, 0, 1))
  chip = Chip(1, 1e12, 1e12, 1)
  seconds = 3 * forward_flops(MODEL, PROMPTS, RESPONSES) / 1e12
  found = kernels.predict_update(MODEL, PROMPTS, RESPONSES, 2e12, chip)
  assert found == pytest.approx(seconds + 2)
  # And a decoding step is what it reads, all of it once.
  heads = 2 * MODEL.width * (MODEL.n_heads + MODEL.n_kv_heads) * MODEL.head_dim
  weights = MODEL.n_layers * (heads + 3 * MODEL.width * MODEL.mlp_width)
  cache = 2 * MODEL.n_layers * MODEL.n_kv_heads * MODEL.head_dim * 100 * 3
  read = 2 * (weights + cache + MODEL.width * MODEL.vocab_size)
  fast = Chip(1, 1e30, 1e12, 1)
  assert kernels.predict_decode(MODEL, 100, 3, fast) == pytest.approx(read / 1e12)


@pytest.mark.parametrize(
  "name, kind",
  [
    ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "products"),
    ("gemm_fusion_dot_3", "products"),
    ("sm90_xmma_gemm_f32f32_tf32f32_f32_nn_n", "products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
    ("loop_add_multiply_fusion_12", "element-wise"),
    ("loop_select_fusion", "element-wise"),
    ("wrapped_convert", "casts"),
    ("input_reduce_fusion_7", "reductions"),
    ("MemcpyD2D", "copies"),
    ("loop_dynamic_update_slice_fusion", "copies"),
  ],
)
def test_a_kernel_is_known_by_its_name(name, kind):
  assert kernels.kind_of(name) == kind


def test_time_is_grouped_by_kind_and_by_name():
  events = [Event("gemm_1", 3e-3, "dot.1"), Event("gemm_2", 1e-3, "dot.2")]
  events += [Event("loop_exp_fusion_1", 2e-3, "f.1"), Event("loop_exp_fusion_2", 2e-3)]
  found = kernels.by_kind(events, {"dot.2", "f.1"})
  assert found == {
    "products": (3e-3, 1),
    "vocabulary": (pytest.approx(3e-3), 2),
    "element-wise": (2e-3, 1),
  }
  assert kernels.by_name(events) == {"gemm": (4e-3, 2), "loop_exp_fusion": (4e-3, 2)}
  written = kernels.table(events, {"dot.2", "f.1"})
  assert "| products | 3.00 | 37.5 % | 1 |" in written
  assert "| loop_exp_fusion | 4.00 | 50.0 % | 2 |" in written


def test_a_trace_of_this_machine_is_read_and_what_touches_logits_is_found(tmp_path):
  def loss(hidden, table, matrix):
    logits = jnp.tanh(hidden @ matrix) @ table.T
    return jax.nn.logsumexp(logits, axis=-1).sum()

  hidden, table, matrix = jnp.ones((40, 48)), jnp.ones((1031, 48)), jnp.ones((48, 48))
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table, matrix).compile()
  jax.block_until_ready(compiled(hidden, table, matrix))
  with jax.profiler.trace(str(tmp_path)):
    jax.block_until_ready(compiled(hidden, table, matrix))
  events, logits = kernels.read_trace(tmp_path), kernels.touches_logits(compiled.as_text(), 1031)
  seen = {event.op for event in events}
  assert events and all(event.seconds >= 0 for event in events)
  assert seen & logits and seen - logits, (seen, logits)
  assert kernels.by_kind(events, logits)["vocabulary"][0] > 0


def test_the_logits_are_known_by_their_axis_and_products_by_a_factor():
  program = """
  %hidden = f32[8,4]{1,0} parameter(0)
  %table = f32[99,4]{1,0} parameter(1)
  %dot.1 = f32[8,99]{1,0} dot(%hidden, %table), lhs_contracting_dims={1}
  %cublas-gemm.2 = (f32[8,4]{1,0}, s8[64]{0}) custom-call(%dot.1, %table), target="x"
  %loop_exponential = f32[8,99]{1,0} fusion(%dot.1), kind=kLoop
  %loop_multiply = f32[99,4]{1,0} fusion(%table), kind=kLoop
  %add.5 = f32[8,4]{1,0} add(%hidden, %hidden)
  """
  assert kernels.touches_logits(program, 99) == {"dot.1", "cublas-gemm.2", "loop_exponential"}
