"""Kernels, bytes and products of compiled programs, counted by hand for each shape of kernel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu, gpu_count
from benchmarks.gpu_count import Config
from benchmarks.gpu_hlo import Tally, count
from launch import chips
from launch.models import find_model
from rl_llm.errors import ConfigError


def one(body: str, entry: str, **options) -> Tally:
  """The only kernel of a program: computations, and what the entry runs."""
  (tally,) = count(f"{body}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n", **options).values()
  return tally


def fused(*lines: str, given: str, root: str = "f32[10]{0}") -> Tally:
  """A fusion of these lines: what it reads of its parameters, and writes."""
  shapes = given.split()
  names = [f"%a{n}" for n in range(len(shapes))]
  outer = "\n".join(f"  %a{n} = {shape} parameter({n})" for n, shape in enumerate(shapes))
  inner = outer.replace("%a", "%p")
  body = f"%fused () -> {root} {{\n{inner}\n" + "\n".join(f"  {line}" for line in lines) + "\n}"
  call = f"  ROOT %f = {root} fusion({', '.join(names)}), kind=kLoop, calls=%fused"
  return one(body, f"{outer}\n{call}")


def test_a_fusion_that_reads_a_slice_reads_no_more():
  """Ten of 100 numbers, and ten more."""
  tally = fused(
    "%s = f32[10]{0} slice(%p0), slice={[20:30]}",
    "ROOT %r = f32[10]{0} add(%s, %p1)",
    given="f32[100]{0} f32[10]{0}",
  )
  assert tally == Tally(1, 40 + 40, 40, 0)


def test_what_several_read_is_read_once_at_most():
  """Two slices of 60 are 100 at most; an element-wise reader and a sum read all of it once."""
  slices = (f"%s{n} = f32[60]{{0}} slice(%p0), slice={{[{n}:{n + 60}]}}" for n in (0, 40))
  tally = fused(
    *slices, "ROOT %r = f32[60]{0} add(%s0, %s40)", given="f32[100]{0}", root="f32[60]{0}"
  )
  assert (tally.read, tally.written) == (400, 240)
  tally = fused(
    "%z = f32[] constant(0)",
    "%n = f32[100]{0} negate(%p0)",
    "%s = f32[] reduce(%p0, %z), dimensions={0}, to_apply=%add",
    "ROOT %r = (f32[100]{0}, f32[]) tuple(%n, %s)",
    given="f32[100]{0}",
    root="(f32[100]{0}, f32[])",
  )
  assert (tally.read, tally.written) == (400, 404)


def test_an_update_in_place_moves_only_what_it_changes():
  """A row of 4 in bfloat16 among 100, at a place that an integer says."""
  given = "bf16[100,4]{1,0} bf16[1,4]{1,0} s32[]"
  update = "%r = bf16[100,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)"
  tally = fused(f"ROOT {update}", given=given, root="bf16[100,4]{1,0}")
  assert (tally.read, tally.written) == (8 + 4, 8)
  # Two of them, one of which is given another shape.
  pair = "(bf16[100,4]{1,0}, bf16[400]{0})"
  tally = fused(
    update,
    "%s = bf16[100,4]{1,0} dynamic-update-slice(%p3, %p1, %p2, %p2)",
    "%flat = bf16[400]{0} bitcast(%s)",
    f"ROOT %t = {pair} tuple(%r, %flat)",
    given=f"{given} bf16[100,4]{{1,0}}",
    root=pair,
  )
  assert (tally.read, tally.written) == (8 + 4, 8 + 8)
  # Not in place: what follows reads all of it.
  later = "ROOT %n = bf16[100,4]{1,0} negate(%r)"
  tally = fused(update, later, given=given, root="bf16[100,4]{1,0}")
  assert (tally.read, tally.written) == (800 + 8 + 4, 800)


def test_a_lookup_reads_the_rows_that_it_finds_and_a_scatter_what_it_adds_to():
  """Five rows of 8 out of 1,000, by five integers."""
  tally = fused(
    "ROOT %r = f32[5,8]{1,0} gather(%p0, %p1), offset_dims={1}, slice_sizes={1,8}",
    given="f32[1000,8]{1,0} s32[5,1]{1,0}",
    root="f32[5,8]{1,0}",
  )
  assert (tally.read, tally.written) == (5 * 8 * 4 + 5 * 4, 5 * 8 * 4)
  tally = fused(
    "ROOT %r = f32[1000,8]{1,0} scatter(%p0, %p1, %p2), to_apply=%add",
    given="f32[1000,8]{1,0} s32[5,1]{1,0} f32[5,8]{1,0}",
    root="f32[1000,8]{1,0}",
  )
  assert (tally.read, tally.written) == (160 + 20 + 160, 160)


def test_a_product_by_cublas_is_counted_from_its_axes_without_its_scratch_memory():
  """[4, 8] times [16, 8], both along the last axis."""
  config = '"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
  tally = one(
    "",
    f"""  %x = bf16[4,8]{{1,0}} parameter(0)
  %y = bf16[16,8]{{1,0}} parameter(1)
  ROOT %c.1 = (f32[4,16]{{1,0}}, s8[4096]{{0}}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul", backend_config={{{config}"rhs_contracting_dimensions":["1"]}}}}}}""",  # noqa: E501
  )
  assert tally == Tally(1, 2 * (4 * 8 + 16 * 8), 4 * 4 * 16, 2 * 4 * 16 * 8)


def test_a_product_of_batches_in_a_fusion_is_counted_from_its_axes():
  """Three of [4, 6] times [6, 5], with one number added to each."""
  tally = fused(
    "%d = f32[3,4,5]{2,1,0} dot(%p0, %p1), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
    "rhs_batch_dims={0}, rhs_contracting_dims={1}",
    "%b = f32[3,4,5]{2,1,0} broadcast(%p2), dimensions={}",
    "ROOT %r = f32[3,4,5]{2,1,0} add(%d, %b)",
    given="bf16[3,4,6]{2,1,0} bf16[3,6,5]{2,1,0} f32[]",
    root="f32[3,4,5]{2,1,0}",
  )
  assert tally == Tally(1, 2 * (72 + 90) + 4, 240, 2 * 3 * 4 * 5 * 6)


@pytest.mark.parametrize("target, products", [("", 2), ("Backward", 5)])
def test_attention_computes_all_scores_and_backward_once_more(target, products):
  """2 rows of 16 queries and 32 keys, 4 heads of size 8."""
  scores = '"intermediate_tensor_shape": {"dimensions": ["2", "4", "16", "32"], "tuple_shapes": []}'
  found = count(f"""ENTRY %main () -> f32[] {{
  %q = bf16[2,16,4,8]{{3,2,1,0}} parameter(0)
  %k = bf16[2,32,1,8]{{3,2,1,0}} parameter(1)
  ROOT %a = (bf16[2,4,16,8]{{3,1,2,0}}, u8[9]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaScaleBiasSoftmax{target}", backend_config={{"cudnn_fmha_backend_config": {{{scores}}}}}
}}""")  # noqa: E501
  flops = products * 2 * (2 * 4 * 16 * 32) * 8
  assert found == {"attention": Tally(1, 2 * (1024 + 512 + 512), 2 * 1024, flops)}


LOOPS = """
%inner (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %n = f32[8]{0} negate(%x)
  ROOT %o = (s32[], f32[8]{0}) tuple(%x, %n)
}
%outer (u: (s32[], f32[8])) -> (s32[], f32[8]) {
  %u = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%u), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"7"}}
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %m = f32[8]{0} exponential(%y)
  ROOT %v = (s32[], f32[8]{0}) tuple(%y, %m)
}
ENTRY %main (z: (s32[], f32[8])) -> (s32[], f32[8]) {
  %z = (s32[], f32[8]{0}) parameter(0)
  ROOT %l = (s32[], f32[8]{0}) while(%z), condition=%c, body=%outer HOW
}
"""  # noqa: E501


def test_a_loop_counts_as_often_as_it_says_and_else_one_pass_of_it_alone():
  inner, outer = Tally(7, 7 * 32, 7 * 32), Tally(1, 32, 32)
  assert count(LOOPS) == {"vocabulary": inner, "other": outer}
  thrice = LOOPS.replace(" HOW", ', backend_config={"known_trip_count":{"n":"3"}}')
  (all_of_them,) = count(thrice).values()
  assert all_of_them == Tally(3 * 8, 3 * 8 * 32, 3 * 8 * 32)
  before_it = "  %c = f32[500]{0} cosine(%c0)\n  ROOT %l"
  start = LOOPS.replace("  ROOT %l", f"  %c0 = f32[500]{{0}} parameter(1)\n{before_it}")
  assert count(start) == count(LOOPS)


def test_of_a_conditional_the_branch_that_reads_least_counts():
  branches = "true_computation=%greedy, false_computation=%sampled"
  for how in (branches, "branch_computations={%greedy, %sampled}"):
    tally = one(
      """%greedy (p: f32[99]) -> f32[9] {
  %p = f32[99]{0} parameter(0)
  ROOT %r = f32[9]{0} slice(%p), slice={[0:9]}
}
%sampled (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %s = f32[4]{0} copy(%q)
}""",
      f"  %x = f32[] parameter(0)\n  ROOT %i = f32[9]{{0}} conditional(%x, %x, %x), {how}",
    )
    assert tally == Tally(1, 16, 16)


@pytest.mark.parametrize(
  "line, source, kind",
  [
    ("bf16[8]{0} convert(%p0)", "", "casts"),
    ("f32[2,4]{1,0} transpose(%p0), dimensions={1,0}", "", "copies"),
    ("f32[9]{0} pad(%p0, %p0), padding=0_1", "jit(update)/Block/mlp/pad", "copies"),
    ("f32[8]{0} negate(%p0)", "jit(update)/jvp(x)/Block/mlp_norm/mul", "norms"),
    ("f32[8]{0} negate(%p0)", "jit(update)/jvp(x)/Block/mlp/down/mul", "SwiGLU"),
    ("f32[8]{0} negate(%p0)", "jit(update)/jit(_where)/select_n", "Adam"),
    ("f32[8]{0} negate(%p0)", "jit(update)/while/body/jit(_where)/select_n", "other"),
    ("u32[8]{0} shift-left(%p0, %p0)", "", "other"),
    ("f32[3,77]{1,0} broadcast(%p0), dimensions={}", "", "vocabulary"),
  ],
)
def test_a_kernel_is_known_by_what_it_does_and_then_by_what_it_is_for(line, source, kind):
  shape = line.split(" ")[0]
  text = f"""%f (p0: f32[8]) -> {shape} {{
  %p0 = f32[8]{{0}} parameter(0)
  ROOT %r = {line}
}}
ENTRY %main (a: f32[8]) -> {shape} {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %k = {shape} fusion(%a), kind=kLoop, calls=%f, metadata={{op_name="{source}"}}
}}"""
  assert list(count(text, vocabulary=77)) == [kind]


def test_a_kernel_that_casts_and_computes_is_no_cast():
  assert count("""%f (p0: f32[8]) -> bf16[8] {
  %p0 = f32[8]{0} parameter(0)
  %n = f32[8]{0} negate(%p0)
  ROOT %r = bf16[8]{0} convert(%n)
}
ENTRY %main (a: f32[8]) -> bf16[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %k = bf16[8]{0} fusion(%a), kind=kLoop, calls=%f
}""") == {"other": Tally(1, 32, 16)}


def test_products_of_a_real_program_are_those_that_the_compiler_counts():
  """A batch of products, and one in a loop of 5, which the compiler counts once."""

  def batch(x, y):
    return jnp.einsum("bij,bkj->bik", x, y)

  def loop(x, y):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ y), x)

  compiled = jax.jit(batch).lower(jnp.ones((3, 40, 24)), jnp.ones((3, 56, 24))).compile()
  flops = sum(tally.flops for tally in count(compiled.as_text()).values())
  assert flops == 2 * 3 * 40 * 24 * 56 == compiled.cost_analysis()["flops"]
  compiled = jax.jit(loop).lower(jnp.ones((16, 64)), jnp.ones((64, 64))).compile()
  flops = sum(tally.flops for tally in count(compiled.as_text()).values())
  assert flops == 5 * 2 * 16 * 64 * 64
  assert flops / 5 <= compiled.cost_analysis()["flops"] < flops / 4


def test_what_the_third_layer_adds_counts_once_for_each_further_one(tmp_path, capsys):
  """A rollout's loop whose layers negate 8 numbers each, and 5 numbers besides."""
  names = [gpu_count.file_of(tmp_path, Config(), "decode", layers) for layers in (2, 3)]
  for path, layers in zip(names, (2, 3), strict=True):
    lines = [f"  %n{n} = f32[8]{{0}} negate(%x)\n" for n in range(layers)]
    text = LOOPS.replace("  %m =", "".join(lines).replace("%x", "%y") + "  %m =")
    path.write_text(text.replace('"n":"7"', '"n":"1"'))
  layers = find_model("qwen2.5-1.5b").n_layers
  gpu_count.main(Config(out=str(tmp_path), before=str(tmp_path), programs=("decode",)))
  printed = capsys.readouterr().out
  work = gpu_count.formula(Config(), "decode", find_model("qwen2.5-1.5b")) / 1e12
  assert f"decode, qwen2.5-1.5b, h200; by formula {work:.2f} TFLOP" in printed
  assert f"| all | {2 + layers} | 0.00 | 0.00 | 0.00 |" in printed
  gpu_count.main(Config(text=str(names[0])))
  assert "| all | 4 | 0.00 | 0.00 | 0.00 |" in capsys.readouterr().out


def test_a_tokens_formula_is_its_weights_and_the_keys_it_sees():
  """What one more token of each row takes: as `benchmarks.gpu` bounds decoding."""
  shape = find_model("qwen2.5-1.5b")
  weights = 1536 * 128 * 2 * (12 + 2) + 3 * 1536 * 8960
  keys = 512 + 160 + 1
  token = 2 * 28 * weights + 28 * 4 * 12 * 128 * keys + 2 * 1536 * 151_936
  assert gpu_count.formula(Config(), "decode", shape) == 64 * token


@pytest.mark.parametrize(
  "changes, said",
  [
    ({}, "--out=: must be a directory"),
    ({"out": "d", "programs": ("sort",)}, "--programs=sort: must be some of update, microbatch"),
    ({"out": "d", "rows": 12}, "--rows=12: must be a multiple of 8"),
  ],
)
def test_what_cannot_be_counted_is_told(changes, said):
  with pytest.raises(ConfigError) as refused:
    gpu_count.main(Config(**changes))
  assert said in str(refused.value)


@pytest.mark.slow
def test_the_programs_of_a_small_model_are_compiled_kept_and_counted(tmp_path, monkeypatch):
  """On a CPU in the GPU's place: products of all layers, and their texts on disk."""
  monkeypatch.setattr(gpu, "find_gpu", lambda _: (jax.devices("cpu")[:1], "cpu"))
  sizes = {"prompt_tokens": 6, "new_tokens": 4, "microbatch_tokens": 50}
  small = lambda config, model="": gpu.Config(model=model or config.model, **sizes)  # noqa: E731
  monkeypatch.setattr(gpu_count, "settings", small)
  config = Config(out=str(tmp_path), model="tiny", rows=8)
  shape = find_model("tiny")
  list(gpu_count.report(config))
  kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  assert len(kept) == 6
  for program in gpu_count.PROGRAMS:
    found = gpu_count.counted(str(tmp_path), config, program)
    flops = sum(tally.flops for tally in found.values())
    least = gpu_count.formula(config, program, shape)
    assert 0.9 * least < flops < 3 * least, program
  list(gpu_count.report(dataclasses.replace(config, programs=("update",))))
  assert kept == {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(not chips._cuda_plugin(), reason="needs jax[cuda12]")
def test_a_gpus_products_are_those_of_its_libraries(tmp_path):
  config = Config(out=str(tmp_path), model="tiny", programs=("update",))
  list(gpu_count.report(config))
  assert "__cublas" in (tmp_path / "update-2.txt").read_text()
  found = gpu_count.counted(str(tmp_path), config, "update")
  assert found["products"].flops > 0.5 * gpu_count.formula(config, "update", find_model("tiny"))
