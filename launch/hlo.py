"""What a compiled program sends, read off its text."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str, *, loop: int = 1) -> dict[str, tuple[int, float]]:
  """Counts a compiled program's collectives, those in loops once per iteration.

  In a ring of n, a chip sends all but its own part: of an all-gather's output, of the input of a
  reduce-scatter, and of both for an all-reduce, which does one after the other.

  >>> text = '''
  ... %body (p: f32[8]) -> f32[8] {
  ...   %g = f32[8]{0} all-gather(f32[2]{0} %p), dimensions={0}
  ... }
  ... ENTRY %main (x: f32[8]) -> f32[8] {
  ...   %r = f32[8]{0} all-reduce(f32[8]{0} %x), to_apply=%sum
  ...   %w = f32[8]{0} while(f32[8]{0} %r), condition=%c, body=%body
  ... }'''
  >>> collectives(text, loop=3)
  {'all-gather': (3, 96.0), 'all-reduce': (1, 64.0)}

  TPU programs do not say how often a loop runs, but its condition holds the constant:

  >>> count = "%c (p: s32[]) -> pred[] {\\n %n = s32[]{:T(128)} constant(5)\\n}\\n"
  >>> collectives(count + text, loop=3)
  {'all-gather': (5, 160.0), 'all-reduce': (1, 64.0)}

  A TPU computes while it waits: it starts a collective in one place, continues it in others and
  ends it in a last one. All of these show the collective, as one chain, and it counts once:

  >>> start = '%fusion (p: f32[2]) -> f32[8] {\\n %g.1 = f32[8] all-gather(%p), chain_id="7"\\n}\\n'
  >>> done = start.replace("fusion", "done").replace("g.1", "g.2")
  >>> calls = "%a = f32[8] fusion(%x), calls=%fusion\\n%b = f32[8] fusion(%a), calls=%done\\n"
  >>> collectives(start + done + "ENTRY %main (x: f32[2]) -> f32[8] {\\n" + calls + "}")
  {'all-gather': (1, 32.0)}

  Args:
    text: of the compiled module.
    loop: how often a loop runs whose count is not in the text.

  Returns:
    {kind: (how many, bytes)}.
  """
  bodies: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    head = re.match(r"\s*(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
    if head and "=" not in line.split("(")[0]:
      lines = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  # By chain, or name where it is none, the lines that show it: how often each is met.
  met: defaultdict[str, Counter[str]] = defaultdict(Counter)
  found_as: dict[str, tuple[str, float]] = {}  # the same -> kind, bytes

  def walk(name: str, times: int) -> None:
    types: dict[str, str] = {}
    for line in bodies.get(name, ()):
      found = re.search(r"%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)", line)
      if not found:
        continue
      result, types[found[1]], operation, operands = found.groups()
      kind = operation.removesuffix("-start")
      if kind in KINDS:
        size = (max if operation.endswith("-start") else sum)(_sizes(types[result]))
        if kind == "reduce-scatter":  # Types stand next to the operands, or at their definitions.
          taken = [types.get(operand, "") for operand in re.findall(r"%([\w.\-]+)", operands)]
          size = sum(_sizes(operands) or _sizes(" ".join(taken)))
        chain = re.search(r'chain_id="(\d+)"', line)
        chain = chain[0] if chain else result
        met[chain][result] += times
        found_as[chain] = kind, size * (2 if kind == "all-reduce" else 1)
      inner = times
      if operation == "while":
        inner = times * (_trips(line, bodies) or loop)
      for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
        walk(called, inner)

  walk(entry, 1)
  counts: Counter[str] = Counter()
  moved: Counter[str] = Counter()
  for chain, (kind, size) in found_as.items():
    times = max(met[chain].values())
    counts[kind] += times
    moved[kind] += times * size
  return {kind: (counts[kind], float(moved[kind])) for kind in KINDS if counts[kind]}


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
  """How often a `while` runs: stated next to it, or the one constant in its condition."""
  known = re.search(r'known_trip_count[\\":{n\s]+(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  lines = bodies.get(condition[1], []) if condition else []
  bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", "\n".join(lines))
  return int(bounds[0]) if len(bounds) == 1 else None


def _sizes(text: str) -> list[int]:
  """Bytes of each array whose type is in the text."""
  return [_bytes(*found) for found in re.findall(r"(\w+)\[([\d,]*)\]", text)]


def _bytes(dtype: str, sizes: str) -> int:
  """Of an array as HLO writes it: f32 and 8,128."""
  count = 1
  for size in filter(None, sizes.split(",")):
    count *= int(size)
  return BYTES.get(dtype, 0) * count
