"""Where a GPU's time goes, by kind of kernel: read from a trace, and predicted for other GPUs.

A trace says how long each kernel took. Its name says what it is, and the compiled program whether
it reads or writes logits. `RATES` are what an H200 reached in each kind (CUDA 13, JAX 0.11.2,
Qwen2.5-1.5B's shape, `python -m benchmarks.gpu`): the bounds of a chip, divided by them, are the
prediction for another chip or shape. It is as good as these rates are alike there. On that H200 it
gives 0.362 s for the update that took 0.359, 2.78 ms for 64 rows' token (2.57), 5.66 for 256 rows'
(5.54).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rl_llm.runs.chips import Chip
from rl_llm.runs.flops import forward_flops, prediction_flops, trunk_flops

# The first that matches a kernel's name is its kind; cuDNN's attention has "gemm" in its name too.
KINDS = (
  ("attention", r"sdpa|fmha|flash|cudnn"),
  ("products", r"gemm|cublas|cutlass|nvjet|xmma|dot|ynn"),
  ("copies", r"memcpy|memset|copy|transpose|concatenate|pad|slice|gather|scatter"),
  ("casts", r"convert"),
  ("reductions", r"reduce|argmax|sort"),
  ("element-wise", r""),
)
VOCABULARY = "vocabulary"  # products with the unembedding, and all that reads or writes logits
_CONTAINERS = re.compile(r"^(while|call|conditional)\b")


class Event(NamedTuple):
  """One run of a kernel."""

  name: str
  seconds: float
  op: str = ""  # the instruction of the compiled program, where the trace says it


class Rates(NamedTuple):
  """The share of a chip's peak that each kind of kernel reached; of an H200."""

  layers: float = 0.85  # an update's products: of the arithmetic; 137 TFLOP in 163 ms
  logits: float = 0.32  # an update's vocabulary: 23 TFLOP in 73 ms, logits computed twice
  attention: float = 0.145  # an update's: 8 TFLOP in 56 ms, scores computed twice
  rest: float = 1.4  # an update's: 65 ms; all bytes that its compiler counts take 91
  weights: float = 0.45  # a decoding step's products: of the bandwidth; 19.5 in 43.3 us a layer
  cache: float = 0.38  # keys and values: 7.4 in 19.4 us a layer
  vocabulary: float = 0.79  # 97 in 123 us
  layer: float = 13.5e-6  # seconds of a layer's other kernels: norms, activations, adds
  sample: float = 0.94e-6  # seconds a row to choose its token
  busy: float = 0.88  # of a decoding step: kernels leave gaps


RATES = Rates()


def predict_update(
  shape: Any, prompts: Sequence[int], responses: Sequence[int], bytes: float, chip: Chip
) -> float:
  """Seconds of an update, from each kind's operations at the rate that it reached.

  Args:
    shape: of the model.
    prompts, responses: [P] and [P * G] lengths, as for `forward_flops`.
    bytes: that the compiler counts.
    chip: what it runs on.
  """
  vocabulary = prediction_flops(shape, sum(responses))
  projections = 2 * shape.width * (shape.n_heads + shape.n_kv_heads) * shape.head_dim
  read = sum(prompts) + sum(length - 1 for length in responses)
  layers = 2 * shape.n_layers * (projections + 3 * shape.width * shape.mlp_width) * read
  attention = trunk_flops(shape, prompts, responses) - layers
  arithmetic = layers / RATES.layers + vocabulary / RATES.logits + attention / RATES.attention
  return 3 * arithmetic / chip.flops + bytes / chip.bandwidth / RATES.rest


def predict_decode(shape: Any, seen: int, rows: int, chip: Chip) -> float:
  """Seconds of a token of all rows, in bfloat16.

  Args:
    shape: of the model.
    seen: tokens that each row has seen.
    rows: decoded at once.
    chip: what it runs on.
  """
  heads = 2 * shape.width * (shape.n_heads + shape.n_kv_heads) * shape.head_dim
  weights = shape.n_layers * (heads + 3 * shape.width * shape.mlp_width)
  cache = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * seen * rows
  table = shape.width * shape.vocab_size
  total = forward_flops(shape, [0] * rows, [2] * rows) - forward_flops(
    shape, [0] * rows, [1] * rows
  )

  def taken(count: int, rate: float, flops: float = 0.0) -> float:
    return max(2 * count / chip.bandwidth, flops / chip.flops) / rate

  products = taken(weights, RATES.weights, total - prediction_flops(shape, rows))
  products += taken(table, RATES.vocabulary, prediction_flops(shape, rows))
  other = shape.n_layers * RATES.layer + rows * RATES.sample
  return (products + taken(cache, RATES.cache) + other) / RATES.busy


# Traces.


def read_trace(directory: Path) -> list[Event]:
  """The kernels of the newest trace in a directory; on a CPU, the instructions that it ran."""
  path = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  streams = [
    line
    for plane in planes
    if plane.name.startswith("/device:GPU")
    for line in plane.lines
    if line.name.startswith("Stream")
  ]
  lines = streams or [line for plane in planes for line in plane.lines]
  found = []
  for line in lines:
    for event in line.events:
      op = str(dict(event.stats).get("hlo_op", ""))
      if (streams or op) and not _CONTAINERS.match(event.name):
        found.append(Event(event.name, event.duration_ns / 1e9, op))
  return found


def touches_logits(program: str, vocabulary: int) -> set[str]:
  """The instructions of a compiled program that are the vocabulary's.

  These are products with a matrix of so many rows or columns, and whatever reads or writes arrays
  whose last axis has so many entries. The embedding's own update is not among them.

  Args:
    program: `Compiled.as_text`.
    vocabulary: how many tokens there are.
  """
  made = dict(re.findall(r"%?([\w.-]+) = (\(.*?\)|\S+) [\w-]+\(", program))
  found = set()
  for name, shape, kernel, operands in re.findall(
    r"%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)", program
  ):
    read = [made.get(operand, "") for operand in re.findall(r"%([\w.-]+)", operands)]
    sizes = [
      list(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", f"{shape}{read}")
    ]
    product = kind_of(f"{name} {kernel}") == "products"
    if any(size[-1] == vocabulary or (product and vocabulary in size) for size in sizes):
      found.add(name)
  return found


def kind_of(name: str) -> str:
  """A kernel's kind, by its name.

  >>> [kind_of(name) for name in ("nvjet_tst_128x256", "loop_add_fusion_3", "wrapped_convert")]
  ['products', 'element-wise', 'casts']
  >>> kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_gemm")
  'attention'
  """
  return next(kind for kind, pattern in KINDS if re.search(pattern, name.lower()))


def by_kind(
  events: Iterable[Event], logits: set[str] = frozenset()
) -> dict[str, tuple[float, int]]:
  """{kind: (seconds, kernels)}, the longest first.

  >>> by_kind([Event("nvjet_1", 2.0, "dot.1"), Event("nvjet_1", 3.0, "dot.2")], {"dot.2"})
  {'vocabulary': (3.0, 1), 'products': (2.0, 1)}

  Args:
    events: from `read_trace`.
    logits: from `touches_logits`.
  """
  found: dict[str, tuple[float, int]] = {}
  for event in events:
    kind = VOCABULARY if event.op in logits else kind_of(event.name)
    seconds, count = found.get(kind, (0.0, 0))
    found[kind] = seconds + event.seconds, count + 1
  return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def by_name(events: Iterable[Event]) -> dict[str, tuple[float, int]]:
  """{name without its number: (seconds, kernels)}, the longest first.

  >>> by_name([Event("loop_add_fusion_3", 1.0), Event("loop_add_fusion.12", 1.0)])
  {'loop_add_fusion': (2.0, 2)}
  """
  found: dict[str, tuple[float, int]] = {}
  for event in events:
    name = re.sub(r"([._]\d+)+$", "", event.name)
    seconds, count = found.get(name, (0.0, 0))
    found[name] = seconds + event.seconds, count + 1
  return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def table(events: Sequence[Event], logits: set[str], *, names: int = 30) -> str:
  """Kinds, and the names that took longest, as Markdown."""

  def rows(title: str, found: Mapping[str, tuple[float, int]]) -> list[str]:
    lines = [f"| {title} | ms | share | kernels |", "|---|---|---|---|"]
    for name, (seconds, count) in found.items():
      lines.append(f"| {name} | {1e3 * seconds:.2f} | {100 * seconds / total:.1f} % | {count} |")
    return lines

  total = sum(event.seconds for event in events) or 1.0
  longest = dict(list(by_name(events).items())[:names])
  return "\n".join([*rows("kind", by_kind(events, logits)), "", *rows("kernel", longest), ""])
