"""The sides of a benchmark, each in a process of its own that takes one step when told to.

  python -m benchmarks.peers SIDE JOB     a name of SIDES below; JOB is JSON

`benchmarks.grpo_step` and `benchmarks.generation` write the jobs. A side answers on standard
output, a JSON object a line: first what it read, then, for each line on its standard input, one
step's figures. So the sides can alternate on one machine, all loaded and warm, with none running
while another is timed. TRL and Tunix run under other interpreters, so JAX and this library are only
imported inside the sides that need them.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.side import Channel

# The module of each side is imported in its own process, by the interpreter that has what it needs.
SIDES = {
  "export": "side_ours",
  "ours": "side_ours",
  "mixed": "side_ours",
  "generate_ours": "side_ours",
  "trl": "side_trl",
  "generate_transformers": "side_trl",
  "tunix": "side_tunix",
  "generate_tunix": "side_tunix",
}


def side(name: str) -> Callable[[dict[str, Any], Channel], None]:
  """The function that answers as this side."""
  return getattr(importlib.import_module(f"benchmarks.{SIDES[name]}"), name)


if __name__ == "__main__":
  side(sys.argv[1])(json.loads(sys.argv[2]), Channel())
