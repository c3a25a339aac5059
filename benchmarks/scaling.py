"""How the cost of a step grows: with the model's size, the batch, the responses' length, and G.

  python -m benchmarks.scaling                        about three minutes on 2 cores
  python -m benchmarks.scaling --widths=512,1024      fewer points

One factor at a time changes around a base point, whose values are the middle ones of the flags. At
each point a rollout and the gradient of its responses' log-probs are compiled and timed in turns
with the base's, so that growth is a ratio of neighbours in time. Weights are random, models differ
only in width (the count of weights grows with its square), and responses all have T tokens.

Next to each figure is what the count of operations predicts. A factor that costs less fills idle
processors: a decode step of few rows waits for weights to be read. A factor that costs more pays
for something other than matrix products.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import BenchmarkError, alternate, measure_ceilings, ratios, spread
from rl_llm.errors import ConfigError
from rl_llm.policy import TransformerConfig, make_policy
from rl_llm.rollout import ResponseBatch, Rollout, generate, response_logprobs, row_keys
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import forward_flops


class Point(NamedTuple):
  """A step's sizes."""

  width: int  # D, of the model
  prompts: int  # P
  new_tokens: int  # T, of each response
  responses: int  # G, to each prompt


@dataclasses.dataclass(frozen=True)
class Config:
  """The values of each factor, an odd number of them; the middle one is the base's."""

  widths: tuple[int, ...] = option((256, 512, 1024), "D, multiples of 128", min=128)
  prompts: tuple[int, ...] = option((2, 4, 8), "P, prompts", min=1)
  new_tokens: tuple[int, ...] = option((16, 32, 64), "T, tokens of each response", min=2)
  responses: tuple[int, ...] = option((2, 4, 8), "G, responses a prompt", min=1)
  prompt_tokens: int = option(64, "L, tokens of each prompt", min=1)
  layers: int = option(4, "layers of every model", min=1)
  vocabulary: int = option(4096, "V, of every model", min=2)
  runs: int = option(3, "times each point is timed, after one that is not counted", min=1)


class Step(NamedTuple):
  """A point's programs, ready to be timed."""

  rollout: Callable[[], Rollout]
  gradient: Callable[[], Any]
  temporaries: tuple[int, int]  # bytes that XLA allocates besides arguments and results, of each
  flops: int  # of the forward pass, which is the rollout's


def shape_of(width: int, *, layers: int, vocabulary: int) -> TransformerConfig:
  """A model of one family: half as many key heads as query heads, all of size 64.

  >>> shape_of(256, layers=4, vocabulary=100).n_heads
  4
  """
  return TransformerConfig(
    vocab_size=vocabulary,
    width=width,
    n_layers=layers,
    n_heads=width // 64,
    n_kv_heads=width // 128,
    head_dim=64,
    mlp_width=4 * width,
  )


def points(config: Config) -> Iterator[tuple[str, Point]]:
  """The base, then every point that differs from it in one factor; each with its name."""
  factors = {
    "width": config.widths,
    "prompts": config.prompts,
    "new_tokens": config.new_tokens,
    "responses": config.responses,
  }
  base = Point(**{name: values[len(values) // 2] for name, values in factors.items()})
  yield "base", base
  for name, values in factors.items():
    for value in values:
      if value != getattr(base, name):
        yield f"{name} {value}", base._replace(**{name: value})


def point_flops(point: Point, *, prompt_tokens: int, layers: int, vocabulary: int) -> int:
  """Operations of a rollout's matrix products; the gradient's are three times as many."""
  shape = shape_of(point.width, layers=layers, vocabulary=vocabulary)
  rows = point.prompts * point.responses
  return forward_flops(shape, [prompt_tokens] * point.prompts, [point.new_tokens] * rows)


def make_step(point: Point, *, prompt_tokens: int, layers: int, vocabulary: int) -> Step:
  """Compiles a point's rollout, and the gradient of what it wrote."""
  policy = make_policy(shape_of(point.width, layers=layers, vocabulary=vocabulary))
  params = jax.jit(policy.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  rows = point.prompts * point.responses
  shape = point.prompts, prompt_tokens
  prompts = jnp.asarray(rng.integers(0, vocabulary, shape), jnp.int32)
  lengths = jnp.full(point.prompts, prompt_tokens, jnp.int32)
  weights = jnp.asarray(rng.normal(size=(rows, 1)), jnp.float32)  # As advantages would be.
  keys = row_keys(jax.random.key(0), point.prompts, point.responses)
  arguments = params, prompts, lengths, keys, SamplingConfig(1.0)
  rollout = generate.lower(
    *arguments,
    policy=policy,
    responses_per_prompt=point.responses,
    max_new_tokens=point.new_tokens,
    eos_ids=(),
    pad_id=0,
  ).compile()

  def loss(params, tokens):
    everything = jnp.ones(tokens.shape, bool)
    batch = ResponseBatch(prompts, lengths, tokens, everything, everything)
    logprobs, _ = response_logprobs(params, batch, policy=policy)
    return -jnp.sum(weights * logprobs)

  tokens = jnp.asarray(rng.integers(0, vocabulary, (rows, point.new_tokens)), jnp.int32)
  gradient = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
  return Step(
    rollout=lambda: jax.block_until_ready(rollout(*arguments)),
    gradient=lambda: jax.block_until_ready(gradient(params, tokens)),
    temporaries=tuple(x.memory_analysis().temp_size_in_bytes for x in (rollout, gradient)),
    flops=point_flops(point, prompt_tokens=prompt_tokens, layers=layers, vocabulary=vocabulary),
  )


def check_written(results: dict[str, Any]) -> None:
  """Raises BenchmarkError unless every response of every rollout has all its tokens."""
  for name, result in results.items():
    if isinstance(result, Rollout) and not bool(jnp.all(result.mask)):
      raise BenchmarkError(f"{name}: {int(result.mask.sum())} tokens of {result.mask.size}")


def main(config: Config) -> None:
  for name in ("widths", "prompts", "new_tokens", "responses"):
    if len(getattr(config, name)) % 2 == 0:
      values = ",".join(map(str, getattr(config, name)))
      raise ConfigError(name, values, "an odd number of values", "the middle one is the base's")
  wrong = [width for width in config.widths if width % 128]
  if wrong:
    raise ConfigError("widths", wrong[0], "multiples of 128")
  make = functools.partial(
    make_step,
    prompt_tokens=config.prompt_tokens,
    layers=config.layers,
    vocabulary=config.vocabulary,
  )
  ceilings = measure_ceilings()
  (_, middle), *others = points(config)
  base = make(middle)
  print(
    f"base: {config.layers} layers of width {middle.width}, V = {config.vocabulary}, "
    f"{middle.prompts} prompts of {config.prompt_tokens} tokens x {middle.responses} responses of "
    f"{middle.new_tokens}; float32; {ceilings}\n"
    "Growth over the base: FLOPs by count, seconds measured (smallest to largest), and MB of "
    "temporaries."
  )
  columns = "{:<15} {:>6} {:>9} {:>22} {:>9} {:>22} {:>14} {:>14}"
  print(
    columns.format(
      "point", "FLOPs", "rollout s", "growth", "update s", "growth", "rollout MB", "update MB"
    ),
    flush=True,
  )
  own: dict[str, list[float]] = {"rollout": [], "gradient": []}
  for name, point in others:
    step = make(point)
    found = alternate(
      {
        "base rollout": base.rollout,
        "rollout": step.rollout,
        "base gradient": base.gradient,
        "gradient": step.gradient,
      },
      runs=config.runs,
      check=check_written,
    )
    cells = []
    for part in own:
      own[part] += found[f"base {part}"]
      growth = ratios(found[part], found[f"base {part}"])
      cells += [f"{statistics.median(found[part]):.2f}", spread(growth)]
    memory = (
      f"{mine / 1e6:.0f} ({mine / theirs:.2f})"
      for mine, theirs in zip(step.temporaries, base.temporaries, strict=True)
    )
    line = columns.format(name, f"{step.flops / base.flops:.2f}", *cells, *memory)
    print(line, flush=True)
  memory = (f"{bytes / 1e6:.0f} (1.00)" for bytes in base.temporaries)
  cells = [x for seconds in own.values() for x in (f"{statistics.median(seconds):.2f}", "1")]
  print(columns.format("base", "1.00", *cells, *memory))
  ceilings = ceilings.or_better(measure_ceilings())
  least = base.flops / ceilings.flops
  print(
    f"The base's FLOPs alone would take {least:.2f} s and {3 * least:.2f} s: its rollout takes "
    f"{statistics.median(own['rollout']) / least:.1f} times that, its update "
    f"{statistics.median(own['gradient']) / (3 * least):.1f} times"
  )


if __name__ == "__main__":
  run(main, Config)
