"""Log-probs and entropies of sampled tokens: block by block of the vocabulary, against dense.

  python -m benchmarks.logprobs                        2,048 tokens, Qwen's vocabulary
  python -m benchmarks.logprobs --vocabulary=49152     SmolLM2's

Both forms compute the value and the gradients with respect to hidden states and unembedding,
compiled from the same loss, and take turns, so that any other load on the machine affects both
equally. They must agree before anything is printed. Memory is what XLA allocates besides arguments
and results. The floor is the time of the three products of D x V (forward, and backward to hidden
states and to the unembedding) at the rate of a large square product, measured in the same run.
Blocks compute the forward product twice, so their floor is four thirds of it.
"""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternate, check_close, measure_ceilings, ratios, spread
from rl_llm.logprobs import chunked_logprobs_and_entropy, entropy, token_logprobs, unembed
from rl_llm.runs.config import option, run

TOLERANCE = 1e-5  # of the two forms' difference, relative, L2


@dataclasses.dataclass(frozen=True)
class Config:
  """The sizes, and how often each form is timed."""

  tokens: int = option(2048, "B x T, tokens with a log-prob and an entropy", min=1)
  width: int = option(1024, "D, width of the hidden states", min=1)
  vocabulary: int = option(151_936, "V, rows of the unembedding", min=2)
  chunk_size: int = option(128, "tokens whose logits may exist at once", min=1)
  runs: int = option(3, "times each form is run, after one that is not counted", min=1)


def dense(hidden, unembedding, tokens):
  logits = unembed(hidden, unembedding)
  return token_logprobs(logits, tokens), entropy(logits)


def main(config: Config) -> int:
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  hidden = normal(config.tokens, config.width)
  unembedding = normal(config.vocabulary, config.width) / np.sqrt(config.width)
  tokens = jnp.asarray(rng.integers(0, config.vocabulary, config.tokens))
  weights = normal(2, config.tokens) / config.tokens

  def chunked(hidden, unembedding, tokens):
    return chunked_logprobs_and_entropy(hidden, unembedding, tokens, chunk_size=config.chunk_size)

  def compiled(f):
    def loss(hidden, unembedding, tokens, weights):
      logprobs, entropies = f(hidden, unembedding, tokens)
      return jnp.sum(weights[0] * logprobs + weights[1] * entropies)

    arguments = hidden, unembedding, tokens, weights
    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    return step, lambda: jax.block_until_ready(step(*arguments))

  forms = {"dense": compiled(dense), "chunked": compiled(chunked)}
  ceilings = measure_ceilings()
  seconds = alternate(
    {name: step for name, (_, step) in forms.items()},
    runs=config.runs,
    check=lambda results: check_close(results, tolerance=TOLERANCE),
  )
  ceilings = ceilings.or_better(measure_ceilings())
  print(f"{config.tokens} tokens, D = {config.width}, V = {config.vocabulary}, float32; {ceilings}")
  memory = {name: step.memory_analysis().temp_size_in_bytes for name, (step, _) in forms.items()}
  floor = 6 * config.tokens * config.width * config.vocabulary / ceilings.flops
  for name, taken in seconds.items():
    print(
      f"{name}: {memory[name] / 1e6:.0f} MB of temporaries, {spread(taken)} s, "
      f"{statistics.median(taken) / floor:.2f} times the floor of {floor:.2f} s"
    )
  print(
    f"chunked takes 1/{memory['dense'] / memory['chunked']:.1f} of the temporaries and "
    f"{spread(ratios(seconds['chunked'], seconds['dense']))} times the time, forward and backward"
  )
  return 0


if __name__ == "__main__":
  run(main, Config)
