"""The kernels of a compiled program, from its text: what each reads and writes, and its products.

XLA's own cost analysis counts a loop's body once, a fusion's operands whole, and no product of
cuBLAS or cuDNN. Here a loop that says how often it runs counts that often, a fusion reads the part
of an operand that it uses, and products are counted from their shapes.

Counted is traffic as if nothing stayed in a cache between two kernels, and each kernel read what it
needs once.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from benchmarks.gpu_kernels import touches_logits
from launch.hlo import BYTES

# Instructions that run nothing.
FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier "
  "partition-id replica-id".split()
)
# Within a fusion: what only moves values, and the arithmetic of whole numbers that says where to.
MOVES = frozenset("copy copy-start transpose reshape broadcast slice reverse".split()) | FREE
JOINS = frozenset("concatenate pad dynamic-slice dynamic-update-slice gather select iota".split())
PLACES = frozenset("compare add subtract minimum maximum and or not clamp".split())
# What reads its operands whole, however little of its result is used.
WHOLE = frozenset("reduce reduce-window dot convolution sort broadcast custom-call tuple".split())
# Other kernels by the name of the operation that they come from; the first that matches.
PARTS = (("norms", r"norm"), ("SwiGLU", r"/mlp/"), ("Adam", r"^jit\(update\)/jit\(_where\)"))


class Shape(NamedTuple):
  """Of one array."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    return BYTES.get(self.dtype, 0) * self.size


class Instruction(NamedTuple):
  """A line of a program."""

  name: str
  shapes: tuple[Shape, ...]  # of its results
  op: str
  operands: tuple[str, ...]  # names
  rest: str  # what stands behind the operands
  root: bool  # its results are those of its computation

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @property
  def called(self) -> str:
    """The computation that a fusion or a call runs; empty for anything else."""
    if self.op not in ("fusion", "call"):
      return ""
    return re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", self.rest)[1]


Computation = Mapping[str, Instruction]


class Kernel(NamedTuple):
  """One that runs, or a call of a library."""

  kind: str
  times: int  # by the loops that say how often they run
  read: float  # bytes, each time
  written: float
  flops: float  # of its products
  in_pass: bool  # in a loop that does not say how often it runs


class Tally(NamedTuple):
  """Of all kernels of a kind."""

  kernels: float = 0.0
  read: float = 0.0
  written: float = 0.0
  flops: float = 0.0

  def plus(self, other: Tally, *, times: float = 1.0) -> Tally:
    """
    >>> Tally(3, 10.0, 4.0, 1.0).plus(Tally(1, 2.0, 1.0, 0.5), times=26)
    Tally(kernels=29, read=62.0, written=30.0, flops=14.0)
    """
    return Tally(*(a + times * b for a, b in zip(self, other, strict=True)))


class Program(NamedTuple):
  """A compiled program."""

  computations: Mapping[str, Computation]
  entry: str

  def kernels(self, vocabulary: set[str] = frozenset()) -> list[Kernel]:
    """All that run.

    Args:
      vocabulary: names of the instructions that read or write logits, from `touches_logits`.
    """
    return list(self._run(self.entry, 1, False, vocabulary))

  def _run(self, name: str, times: int, in_pass: bool, logits: set[str]) -> Iterator[Kernel]:
    computation = self.computations[name]
    for found in computation.values():
      if found.op in FREE or found.op.endswith("-done"):
        continue
      if found.op == "while":
        body = re.search(r"body=%?([\w.\-]+)", found.rest)[1]
        count = re.search(r'known_trip_count[\\":{n\s]+(\d+)', found.rest)
        inner = times * int(count[1]) if count else times
        yield from self._run(body, inner, in_pass or not count, logits)
      elif found.op == "conditional":
        branches = [list(self._run(b, times, in_pass, logits)) for b in branches_of(found)]
        yield from min(branches, key=lambda kernels: sum(each.read for each in kernels))
      elif found.op == "call":
        yield from self._run(found.called, times, in_pass, logits)
      else:
        kind = self.kind(found, computation, blocks=times > 1 or found.name in logits)
        moved = self.moved(found, computation)
        yield Kernel(kind, times, *moved, self.flops(found, computation), in_pass)

  def kind(self, found: Instruction, computation: Computation, *, blocks: bool) -> str:
    """What a kernel is for.

    Args:
      found: the kernel.
      computation: where it stands.
      blocks: whether it works on logits.
    """
    if "$fmha" in found.rest:
      return "attention"
    if self.flops(found, computation):
      return "products"
    if blocks:
      return "vocabulary"
    inner = self.computations[found.called].values() if found.called else [found]
    values = {each.op for each in inner if each.op not in MOVES}
    if values == {"convert"}:
      return "casts"
    places = {each.op for each in inner if each.shapes[0].dtype in ("s32", "u32", "pred")}
    if values - {"convert"} <= JOINS | (places & PLACES):
      return "copies"
    source = re.search(r'op_name="([^"]*)"', found.rest)
    names = (part for part, pattern in PARTS if source and re.search(pattern, source[1].lower()))
    return next(names, "other")

  def flops(self, found: Instruction, computation: Computation) -> float:
    """Of a kernel's products, 2 for each multiply-add, masked scores among them."""
    if found.op == "dot" or "__cublas" in found.rest:
      left = computation[found.operands[0]].shapes[0]
      axes = numbers(r'lhs_contracting_dim(?:s=\{|ensions":\s*\[)([\d",\s]*)', found.rest)
      return 2.0 * found.shapes[0].size * math.prod(left.dims[axis] for axis in axes)
    if "$fmha" in found.rest:
      # Scores, and their product with the values; backward the scores again, and 4 gradients.
      query = computation[found.operands[0]].shapes[0]
      scores = numbers(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([\d",\s]*)\]', found.rest)
      products = 5 if "Backward" in found.rest else 2
      return 2.0 * products * math.prod(scores) * query.dims[-1]
    body = self.computations[found.called] if found.called else {}
    return sum(self.flops(each, body) for each in body.values())

  def moved(self, found: Instruction, computation: Computation) -> tuple[float, float]:
    """Bytes that a kernel reads, and that it writes."""
    if found.op == "fusion":
      body = self.computations[found.called]
      root = next(each for each in body.values() if each.root)
      return sum(self.reads(found.called).values()), written(root, body)
    given = [computation[name].bytes for name in found.operands]
    if found.op == "dynamic-update-slice":
      return sum(given[1:]), given[1]
    if found.op in ("dynamic-slice", "slice", "gather"):
      return found.bytes + sum(given[1:]), found.bytes
    # A library's scratch memory: bytes without a meaning.
    scratch = found.op == "custom-call" and found.shapes[1:] and found.shapes[-1].dtype in "s8 u8"
    return sum(given), found.bytes - (found.shapes[-1].bytes if scratch else 0)

  def reads(self, name: str) -> dict[int, float]:
    """Bytes that a computation reads of each of its parameters, by number."""
    body = self.computations[name]
    users: dict[str, list[tuple[Instruction, int]]] = {each: [] for each in body}
    for each in body.values():
      for index, operand in enumerate(each.operands):
        users[operand].append((each, index))

    def in_place(each: Instruction) -> bool:
      later = [user for user, _ in users[each.name]]
      passed = all(user.op in ("bitcast", "tuple") and in_place(user) for user in later)
      return each.root or bool(later) and passed

    def of_user(user: Instruction, index: int, size: float) -> float:
      if user.op == "dynamic-update-slice" and index == 0 and in_place(user):
        return 0.0
      if user.op == "scatter" and index == 0:
        return body[user.operands[-1]].shapes[0].size
      if user.op == "fusion":
        used = self.reads(user.called)[index]
        return used / (BYTES.get(body[user.operands[index]].shapes[0].dtype) or 1)
      if user.op in WHOLE or index > 0 and user.op in ("dynamic-slice", "gather"):
        return size
      return need(user.name)

    @functools.cache
    def need(each: str) -> float:
      """Elements."""
      size = sum(shape.size for shape in body[each].shapes)
      used = (of_user(user, index, size) for user, index in users[each])
      return size if body[each].root else min(size, sum(used))

    given = [each for each in body.values() if each.op == "parameter"]
    return {
      int(each.rest): need(each.name) * each.bytes / max(1, each.shapes[0].size) for each in given
    }


def written(found: Instruction, body: Computation) -> float:
  """Bytes that a fusion writes: what it updates in place only where it changes."""
  if found.op == "tuple":
    return sum(written(body[name], body) for name in found.operands)
  if found.op == "bitcast":
    return written(body[found.operands[0]], body)
  if found.op == "dynamic-update-slice":
    return body[found.operands[1]].bytes
  return body[found.operands[-1]].bytes if found.op == "scatter" else found.bytes


def branches_of(found: Instruction) -> list[str]:
  """The computations that a conditional chooses from."""
  several = re.search(r"branch_computations=\{([^}]*)\}", found.rest)
  if several:
    return re.findall(r"[\w.\-]+", several[1])
  return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", found.rest)


def numbers(pattern: str, text: str) -> list[int]:
  r"""The numbers in what a pattern captures.

  >>> numbers(r"dims=\{([\d,]*)\}", "dot(), dims={1,12}"), numbers(r"dims=\{([\d,]*)\}", "dims={}")
  ([1, 12], [])
  """
  found = re.search(pattern, text)
  return [int(number) for number in re.findall(r"\d+", found[1])] if found else []


def parse(text: str) -> Program:
  """Reads `Compiled.as_text`."""
  computations: dict[str, dict[str, Instruction]] = {}
  entry, body = "", {}
  for line in text.splitlines():
    head = re.match(r"\s*(ENTRY )?%?([\w.\-]+) \(.*\{\s*(?:/\*.*)?$", line)
    if head:
      body = computations.setdefault(head[2], {})
      entry = head[2] if head[1] else entry
      continue
    found = re.match(
      r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(((?:[^()]|\([^()]*\))*)\)(.*)", line
    )
    if found:
      root, name, kind, op, inside, rest = found.groups()
      shapes = tuple(
        Shape(dtype, tuple(map(int, filter(None, dims.split(",")))))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", kind)
      )
      operands = () if op == "constant" else tuple(re.findall(r"%([\w.\-]+)", inside))
      rest = inside if op == "parameter" else rest
      body[name] = Instruction(name, shapes, op, operands, rest, bool(root))
  return Program(computations, entry)


def count(text: str, *, vocabulary: int = 0) -> dict[str, Tally]:
  """What a compiled program moves and multiplies, by kind of kernel.

  Two rows of 3 times a matrix of 3 by 4, read and written in float32, and its result in bfloat16:

  >>> text = '''
  ... %cast (p: f32[2,4]) -> bf16[2,4] {
  ...   %p = f32[2,4]{1,0} parameter(0)
  ...   ROOT %c = bf16[2,4]{1,0} convert(%p)
  ... }
  ... ENTRY %main (x: f32[2,3], y: f32[3,4]) -> bf16[2,4] {
  ...   %x = f32[2,3]{1,0} parameter(0)
  ...   %y = f32[3,4]{1,0} parameter(1)
  ...   %dot = f32[2,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ...   ROOT %half = bf16[2,4]{1,0} fusion(%dot), kind=kLoop, calls=%cast
  ... }'''
  >>> for kind, tally in count(text).items():
  ...   print(kind, tally)
  products Tally(kernels=1.0, read=72.0, written=32.0, flops=48.0)
  casts Tally(kernels=1.0, read=32.0, written=16.0, flops=0.0)

  Args:
    text: of the compiled module.
    vocabulary: how many tokens there are; arrays whose last axis is as long are logits. So is what
      a loop that says how often it runs works on: blocks of the vocabulary.

  Returns:
    {kind: tally}. Of a program with a loop that does not say how often it runs, such as one over
    microbatches or over tokens, one pass of that loop and nothing else. Of a conditional, the
    branch that reads least.
  """
  logits = touches_logits(text, vocabulary) if vocabulary else set()
  kernels = parse(text).kernels(logits)
  passes = [kernel for kernel in kernels if kernel.in_pass]
  found: dict[str, Tally] = {}
  for kernel in passes or kernels:
    one = Tally(1.0, kernel.read, kernel.written, kernel.flops)
    found[kernel.kind] = found.get(kernel.kind, Tally()).plus(one, times=kernel.times)
  return found
