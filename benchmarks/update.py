"""The gradient of a group's responses: a prompt read once, against a copy for each response.

  python -m benchmarks.update                 SmolLM2, 8 responses of 50 to a prompt of 200
  python -m benchmarks.update --model=tiny    in a minute

The G responses to a prompt share it. A trainer that makes a row of every response reads the prompt
G times; ours reads it once and lets all responses see its keys and values
(`rl_llm.rollout.response_hidden`). With L prompt tokens and T tokens of each response

    tokens read:  G (L + T)  against  L + G T        2,000 against 600 for 8 x (200 + 50)

and the products, except those with the vocabulary, are in proportion. Both sides compute the
gradient of the same loss, take turns, and must agree to 1e-5 (relative, L2) before anything is
printed. The floor is the time of a side's matrix products at the rate of a large square product,
measured in the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side import STORY
from benchmarks.timing import alternate, check_close, distance, measure_ceilings, ratios, spread
from rl_llm.policy import Policy
from rl_llm.policy.load import load_model
from rl_llm.rollout import ResponseBatch, logprobs_of_hidden, response_logprobs
from rl_llm.runs.config import option, run
from rl_llm.runs.flops import forward_flops

TOLERANCE = 1e-5  # of the gradients' difference, relative, L2


@dataclasses.dataclass(frozen=True)
class Config:
  """The group, and how often each side is timed."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, a .gguf file")
  prompts: int = option(1, "P, groups whose gradient is taken at once", min=1)
  responses: int = option(8, "G, responses a prompt", min=1)
  prompt_tokens: int = option(200, "L, tokens of each prompt", min=1)
  new_tokens: int = option(50, "T, tokens of each response", min=1)
  remat: bool = option(False, "compute activations twice instead of holding them, on both sides")
  runs: int = option(5, "times each side is run, after one that is not counted", min=1)


def plain_logprobs(params: Any, batch: ResponseBatch, *, policy: Policy) -> jax.Array:
  """[B, T] as `response_logprobs`, with a row of prompt and response for each response.

  Args:
    params: the weights.
    batch: prompts without padding, and responses whose tokens are all attended.
    policy: the model's functions.
  """
  prompts, tokens = batch.prompts, batch.tokens
  copies = jnp.repeat(prompts, tokens.shape[0] // prompts.shape[0], axis=0)
  read = jnp.concatenate([copies, tokens[:, :-1]], axis=1)
  positions = jnp.broadcast_to(jnp.arange(read.shape[1]), read.shape)
  hidden, _ = policy.hidden(params, read, positions)
  predicting = hidden[:, prompts.shape[1] - 1 :]
  return logprobs_of_hidden(params, predicting, tokens, batch.mask, policy=policy)[0]


def shared_logprobs(params: Any, batch: ResponseBatch, *, policy: Policy) -> jax.Array:
  return response_logprobs(params, batch, policy=policy)[0]


def make_sides(config: Config) -> tuple[dict[str, Any], Policy]:
  """For each side its compiled gradient, called without arguments; and the policy."""
  policy, params, tokenizer = load_model(config.model, remat=config.remat)
  rows = config.prompts * config.responses
  # Text: a model that is surprised by every token has gradients that rounding shows in.
  story = np.array(tokenizer.encode(STORY), np.int32)

  def cuts(number, tokens):
    """[number, tokens] of the repeated story, each starting at a different word."""
    return np.stack([np.resize(np.roll(story, -7 * n), tokens) for n in range(number)])

  everything = np.ones((rows, config.new_tokens), bool)
  batch = ResponseBatch(
    cuts(config.prompts, config.prompt_tokens),
    np.full(config.prompts, config.prompt_tokens, np.int32),
    cuts(rows, config.new_tokens),
    attended=everything,
    mask=everything,
  )
  # Of one sign: where responses cancel one another, only rounding is left.
  worth = np.random.default_rng(0).uniform(0.5, 1.5, (rows, 1)).astype(np.float32)

  def compiled(logprobs_of):
    def loss(params, worth, batch):
      return -jnp.mean(worth * logprobs_of(params, batch, policy=policy))

    return jax.jit(jax.grad(loss)).lower(params, worth, batch).compile()

  forms = {"plain": plain_logprobs, "shared": shared_logprobs}
  programs = {name: compiled(form) for name, form in forms.items()}
  sides = {
    name: (program, lambda program=program: jax.block_until_ready(program(params, worth, batch)))
    for name, program in programs.items()
  }
  return sides, policy


def flops_of(config: Config, policy: Policy) -> dict[str, int]:
  """Operations of each side's products: three times those of its forward pass."""
  new = [config.new_tokens] * (config.prompts * config.responses)
  long = [config.prompt_tokens]
  return {
    "plain": 3 * forward_flops(policy.config, long * len(new), new),
    "shared": 3 * forward_flops(policy.config, long * config.prompts, new),
  }


def main(config: Config) -> int:
  sides, policy = make_sides(config)
  gradients = {name: side() for name, (_, side) in sides.items()}
  check_close(gradients, tolerance=TOLERANCE)
  apart = distance(*gradients.values())
  del gradients
  ceilings = measure_ceilings()
  print(
    f"{config.model}, float32: {config.prompts} x {config.responses} responses of "
    f"{config.new_tokens} tokens to prompts of {config.prompt_tokens}; gradients agree to "
    f"{apart:.1e}; {ceilings}",
    flush=True,
  )
  seconds = alternate({name: side for name, (_, side) in sides.items()}, runs=config.runs)
  ceilings = ceilings.or_better(measure_ceilings())
  work = flops_of(config, policy)
  for name, (program, _) in sides.items():
    floor = work[name] / ceilings.flops
    print(
      f"  {name:6} {spread(seconds[name])} s, {statistics.median(seconds[name]) / floor:.2f} times "
      f"its floor of {floor:.2f} s ({work[name] / 1e12:.2f} TFLOP); "
      f"{program.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB of temporaries"
    )
  times = spread(ratios(seconds["plain"], seconds["shared"]))
  fewer = work["plain"] / work["shared"]
  print(f"  shared is {times} times as fast; its products alone are {fewer:.2f} times fewer")
  return 0


if __name__ == "__main__":
  run(main, Config)
