"""Texts of unequal length: several in a row, against a row each that is filled up with padding.

  python -m benchmarks.packing                 24 texts of 2 to 256 tokens, SmolLM2
  python -m benchmarks.packing --model=tiny    in a minute

Lengths are drawn from an exponential distribution and cut off, as answers' lengths often look: most
are short, and a few decide how wide the rows are. `--packing` of the experiments puts as many into
a row as fit, and no text sees another. Both sides compute the gradient of the same loss, hold the
same number of tokens at once, take turns, and must agree to 1e-5 (relative, L2) before anything is
printed. The floor is the time of the texts' products alone, without padding, at the rate of a large
square product measured in the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side import STORY
from benchmarks.timing import alternate, check_close, distance, measure_ceilings, ratios, spread
from benchmarks.update import TOLERANCE
from experiments import sft
from rl_llm.data.encoding import Encoded
from rl_llm.errors import ConfigError
from rl_llm.policy.load import load_model
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import text_flops, update_passes


@dataclasses.dataclass(frozen=True)
class Config:
  """The texts, and how often each side is timed."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, a .gguf file")
  texts: int = option(24, "texts of a batch", min=1)
  mean: int = option(64, "tokens of a text, on average if there were no limit", min=2)
  limit: int = option(256, "tokens of a text at most, and of a row", min=2)
  rows_at_once: int = option(4, "rows whose activations are held at once", min=1)
  runs: int = option(3, "times each side is run, after one that is not counted", min=1)


def make_texts(config: Config, story: Sequence[int]) -> list[Encoded]:
  """The texts: a first token that is not trained, the rest that is; the longest is the limit."""
  lengths = np.random.default_rng(0).exponential(config.mean, config.texts)
  lengths = np.clip(np.ceil(lengths), 2, config.limit).astype(int)
  lengths[0] = config.limit
  return [
    Encoded(np.resize(np.roll(story, -7 * n), length).tolist(), [False] + [True] * (length - 1), 1)
    for n, length in enumerate(lengths)
  ]


def cut(batch: sft.Batch, rows: int) -> list[sft.Batch]:
  """Parts of this many rows; rows at the end in which nothing is trained are left out."""
  used = int(np.max(np.nonzero(batch.sequences.mask.any(axis=1))[0])) + 1
  return [
    jax.tree.map(lambda x, first=first: x[first : first + rows], batch)
    for first in range(0, used, rows)
  ]


def main(config: Config) -> int:
  policy, params, tokenizer = load_model(config.model)
  texts = make_texts(config, tokenizer.encode(STORY))
  rows = -(-config.texts // config.rows_at_once) * config.rows_at_once
  loss_fn = sft.make_loss(sft.Config(), policy)
  add = jax.jit(lambda left, right: jax.tree.map(jnp.add, left, right), donate_argnums=0)
  gradient = jax.jit(jax.grad(lambda params, part: loss_fn(params, part, {})[0]))
  batches = {
    name: sft.make_batch(texts, name="token_mean", packing=packing, rows=rows, pad_id=0)
    for name, packing in (("padded", 0), ("packed", config.limit))
  }
  if batches["padded"].sequences.tokens.shape[1] != config.limit:
    raise ConfigError("limit", config.limit, "a width that batches are padded to, such as 256")
  parts = {name: cut(batch, config.rows_at_once) for name, batch in batches.items()}

  def side(name: str) -> Any:
    total = None
    for part in parts[name]:
      found = gradient(params, part)
      total = found if total is None else add(total, found)
    return jax.block_until_ready(total)

  gradients = {name: side(name) for name in parts}
  check_close(gradients, tolerance=TOLERANCE)
  apart = distance(*gradients.values())
  del gradients
  ceilings = measure_ceilings()
  tokens = sum(len(text.tokens) for text in texts)
  print(
    f"{config.model}, float32: {config.texts} texts of {tokens / config.texts:.0f} tokens on "
    f"average in rows of {config.limit}; gradients agree to {apart:.1e}; {ceilings}",
    flush=True,
  )
  seconds = alternate({name: functools.partial(side, name) for name in parts}, runs=config.runs)
  ceilings = ceilings.or_better(measure_ceilings())
  predicted = sum(sum(text.mask) for text in texts)
  work = text_flops(policy.config, [len(text.tokens) for text in texts], predicted=predicted)
  floor = update_passes(adapters=False) * work / ceilings.flops
  for name, taken in seconds.items():
    columns = sum(part.sequences.mask.size for part in parts[name])
    middle = statistics.median(taken)
    print(
      f"  {name} {spread(taken)} s, {tokens / middle:.0f} tokens/s, {1 - tokens / columns:.0%} "
      f"padding; {middle / floor:.2f} times the floor of {floor:.2f} s"
    )
  print(f"  packed is {spread(ratios(seconds['padded'], seconds['packed']))} times as fast")
  return 0


if __name__ == "__main__":
  run(main, Config)
