"""The benchmark of one GPU: its formulas by hand, and its programs on a CPU in a GPU's place."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import jax
import pytest

from benchmarks import gpu
from benchmarks.gpu import Config, Cost
from launch import chips
from launch.models import find_model
from rl_llm.errors import ConfigError
from rl_llm.policy import TransformerConfig
from rl_llm.runs.chips import GPUS, Chip
from rl_llm.training.train_state import parameter_count

SMALL = Config(model="tiny", prompt_tokens=6, new_tokens=4, microbatch_tokens=50, rows=(8,), runs=2)
# Width 2, one head of size 4 for keys and two for queries, an MLP of width 5, 7 tokens.
SHAPE = TransformerConfig(
  vocab_size=7, width=2, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, mlp_width=5
)


@pytest.fixture
def short(monkeypatch):
  monkeypatch.setattr(gpu, "SHORT", 2)
  monkeypatch.setattr(gpu, "LONG", 4)


def test_a_microbatch_has_the_tokens_asked_for_and_no_prompt_too_many():
  assert gpu.update_prompts(SMALL) == 2  # 6 + 8 x 4 = 38 a prompt
  assert gpu.update_prompts(dataclasses.replace(SMALL, microbatch_tokens=38)) == 1


def test_the_bound_of_a_token_is_bytes_or_operations_whichever_takes_longer():
  """16 rows that have seen 6 + 160 tokens."""
  attention = 2 * (8 + 4 + 4 + 8)  # query, key, value, output
  weights = attention + 3 * 2 * 5 + 7 * 2  # and the MLP's, and the vocabulary's
  cache = 2 * 4 * (6 + 160) * 16
  slow = Chip(1, 1e30, 1e3, 1)
  assert gpu.decode_bound(SMALL, SHAPE, 16, slow) == pytest.approx(2 * (weights + cache) / 1e3)
  # The token is read: its projections and MLP, the keys before it and its own; and predicted.
  flops = 16 * (2 * (attention + 30) + 4 * 2 * 4 * (6 + 160 + 1) + 2 * 14)
  fast = Chip(1, 1e3, 1e30, 1)
  assert gpu.decode_bound(SMALL, SHAPE, 16, fast) == pytest.approx(flops / 1e3)


@pytest.mark.slow
def test_update_and_decoding_are_timed(short):
  update = gpu.timed_update(SMALL, jax.devices())
  assert len(update) == SMALL.runs and all(each > 0 for each in update)
  assert len(gpu.timed_decode(SMALL, 8, jax.devices())) == SMALL.runs


@pytest.mark.slow
def test_the_compiler_counts_at_least_what_the_formula_does(short):
  shape = find_model("tiny")
  found = gpu.update_cost(SMALL, jax.devices())
  flops = gpu.update_flops(SMALL, shape)
  # Padding is computed too, and each query meets every key.
  assert flops < found.flops < 3 * flops
  count = parameter_count(jax.eval_shape(gpu.make_policy(shape).init, jax.random.key(0)))
  assert found.bytes > 4 * 3 * 2 * count  # Weights and moments, read and written.
  decode = gpu.decode_cost(SMALL, 8, jax.devices())
  fast = Chip(1, 1.0, 1e30, 1)
  assert decode.flops > 0.9 * gpu.decode_bound(SMALL, shape, 8, fast)


@pytest.mark.slow
def test_memory_is_that_of_the_larger_program(short):
  largest = gpu.predicted_memory(SMALL, "tiny", 0, jax.devices())
  adapters = gpu.predicted_memory(SMALL, "tiny", 2, jax.devices())
  count = parameter_count(
    jax.eval_shape(gpu.make_policy(find_model("tiny")).init, jax.random.key(0))
  )
  assert largest > 4 * 4 * count > 0  # Weights, two moments, a gradient.
  assert adapters < largest


def test_a_report_says_what_was_predicted_and_what_was_measured(short, monkeypatch):
  chip, asked = GPUS["h100"], []
  monkeypatch.setattr(gpu, "update_cost", lambda *_: Cost(2e12, 1e9))
  monkeypatch.setattr(gpu, "predict_update", lambda *_: 0.25)
  predicted = dataclasses.replace(SMALL, predict="h100")
  (line,) = gpu.report_update(predicted, jax.devices(), chip)
  assert "76 tokens at once" in line and "predicted 0.250 s, MFU 0 %; at the maker's" in line
  assert "rates 0.002 to 0.002 s" in line
  monkeypatch.setattr(gpu, "decode_cost", lambda *_: Cost(1.0, 3.35e9))
  monkeypatch.setattr(gpu, "predict_decode", lambda *_: 3e-3)
  (line,) = gpu.report_decode(predicted, jax.devices(), chip)
  assert "predicted 3.00 ms" in line and "counts 3.35 GB" in line

  found = {"update:1": {"seconds": [0.5, 1.0, 2.0]}, "decode:8": {"seconds": [1e-3, 2e-3, 4e-3]}}
  monkeypatch.setattr(gpu, "alone", lambda _, part: asked.append(part) or (found[part], ""))
  (line,) = gpu.report_update(SMALL, jax.devices(), chip)
  assert "1.000 (0.500 to 2.000) s" in line and "predicted" not in line
  (line,) = gpu.report_decode(SMALL, jax.devices(), chip)
  assert "2.00 (1.00 to 4.00) ms" in line and asked == ["update:1", "decode:8"]


def test_what_fails_is_one_line_and_the_rest_is_measured(monkeypatch):
  failing = [sys.executable, "-c", "import sys; print('a'); sys.exit('RuntimeError: no\\nlast')"]
  assert gpu.last_line(failing) == ({}, "failed, exit code 1: last")
  failing[-1] = "import sys; sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried\\nlast')"
  assert "CUDA out of memory" in gpu.last_line(failing)[1]
  printing = [sys.executable, "-c", "print('text'); print('{\"bytes\": 7}')"]
  assert gpu.last_line(printing) == ({"bytes": 7}, "")
  answers = iter([({}, "failed, exit code 1: no"), ({"seconds": [1e-3]}, "")])
  monkeypatch.setattr(gpu, "alone", lambda *_: next(answers))
  config = dataclasses.replace(SMALL, rows=(8, 16))
  one, other = gpu.report_decode(config, jax.devices(), GPUS["h100"])
  assert one.endswith("failed, exit code 1: no") and "1.00" in other


def test_our_figure_is_printed_before_the_peer_runs_and_a_peer_that_is_full_computes_twice(
  monkeypatch,
):
  jobs = []

  def peer(words):
    jobs.append(json.loads(words[-1]))
    if jobs[-1]["remat"]:
      return {"seconds": [2.0, 3.0, 4.0], "versions": "torch 9"}, ""
    return {}, "failed, exit code 1: torch.OutOfMemoryError: CUDA out of memory"

  monkeypatch.setattr(gpu, "last_line", peer)
  monkeypatch.setattr(gpu, "alone", lambda *_: ({"seconds": [0.5, 1.0, 2.0]}, ""))
  config = dataclasses.replace(SMALL, torch_python="python")
  lines = gpu.report_update(config, jax.devices(), GPUS["h100"])
  assert "1.000 (0.500 to 2.000) s" in next(lines) and not jobs
  full, twice = lines
  assert "without recomputation: failed" in full and "out of memory" in full
  assert "torch 9 with recomputation: 3.000" in twice and [job["remat"] for job in jobs] == [0, 1]
  _, decode = gpu.report_decode(config, jax.devices(), GPUS["h100"])
  assert "PyTorch: failed" in decode and len(jobs) == 3, "only an update recomputes"


def test_a_figure_is_made_by_a_process_that_is_told_all_settings(monkeypatch):
  told = []
  monkeypatch.setattr(gpu, "last_line", lambda words: told.append(words) or ({}, ""))
  gpu.alone(dataclasses.replace(SMALL, rows=(8, 16), trace="/tmp/t"), "decode:8")
  assert (
    told[0][:3] == [sys.executable, "-m", "benchmarks.gpu"] and told[0][-1] == "--part=decode:8"
  )
  assert {"--rows=8,16", "--trace=/tmp/t", "--remat=false", "--prompt_tokens=6"} < {*told[0]}


@pytest.mark.slow
def test_a_trace_is_written_by_kind_of_kernel(short, tmp_path):
  config = dataclasses.replace(SMALL, trace=str(tmp_path), runs=1)
  assert len(gpu.one_figure(dataclasses.replace(config, part="update:1"), jax.devices())["seconds"])
  assert len(gpu.one_figure(dataclasses.replace(config, part="decode:8"), jax.devices())["seconds"])
  for part in ("update", "decode-8"):
    written = (tmp_path / part / "kernels.md").read_text()
    kinds = re.findall(r"^\| (\S+) \| ([\d.]+) \| ([\d.]+) % \| (\d+) \|$", written, re.M)
    found = {name: float(share) for name, _, share, _ in kinds}
    assert found["vocabulary"] > 0 and found["element-wise"] > 0, written
    shares = written.split("| kernel |")[0]
    assert sum(map(float, re.findall(r"([\d.]+) %", shares))) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"predict": "h900"}, "--predict=h900: must be one of a100, h100, h200, b200"),
    ({}, "here is no GPU that is known, but cpu"),
    ({"rows": (8, 12)}, "--rows=12: must be multiples of 8"),
    ({"part": "nothing"}, "--part=nothing: must be all, update, decode, memory or memory:MODEL"),
    ({"trace": "d", "predict": "h100"}, "--trace=d: must be given where kernels run"),
  ],
)
def test_what_cannot_be_measured_is_told(changes, said):
  with pytest.raises(ConfigError) as refused:
    gpu.main(dataclasses.replace(SMALL, **changes))
  assert said in str(refused.value)


@pytest.mark.skipif(not chips._cuda_plugin(), reason="needs jax[cuda12]")
def test_a_gpu_that_is_not_here_is_predicted(tmp_path):
  flags = ["--predict=h100", "--model=tiny", "--rows=8", "--part=decode"]
  found = subprocess.run(
    [sys.executable, "-m", "benchmarks.gpu", *flags], capture_output=True, text=True
  )
  assert found.returncode == 0, found.stderr
  assert "h100 (compiled for, not run), tiny" in found.stdout and "predicted" in found.stdout
  one = [sys.executable, "-m", "benchmarks.gpu", "--predict=h100", "--part=memory:tiny:2"]
  assert json.loads(subprocess.check_output(one, text=True))["bytes"] > 0
