"""Ragged responses: a slot that goes to the next response, against batches that wait for the last.

  python -m benchmarks.rollout                              256 responses on 32 slots, SmolLM2
  python -m benchmarks.rollout --model=tiny --runs=3        in a minute

Both sides decode the same responses, drawn with the same keys, and never hold more rows at once
than there are slots. One takes them in batches, each as long as its longest response. The other
gets all of them at once, and refills a slot when its response has ended. They take turns, and must
have written the same numbers of tokens.

A real model decides when a response ends. So the policy gets an end of known probability, 1 / mean,
in place of its own: lengths are geometric, the discrete form of exponential, and cut off at the
limit. With N responses of that mean on S slots a batch lasts about mean * (1 + 1/2 + ... + 1/S)
steps, 260 for a mean of 64 and 32 slots. The slots take N / S * mean steps and the end of the last
ones, so the limit of the ratio is 1 + 1/2 + ... + 1/S, here 4.1.
"""

from __future__ import annotations

import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import BenchmarkError, alternate, ratios, spread
from rl_llm.errors import ConfigError
from rl_llm.policy import Policy
from rl_llm.policy.load import load_model
from rl_llm.rollout import generate, row_keys
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.runs.config import option, run


@dataclasses.dataclass(frozen=True)
class Config:
  """How much there is to say."""

  model: str = option("smollm2", "smollm2, tiny, a Hugging Face directory, a .gguf file")
  prompts: int = option(32, "P, prompts", min=1)
  responses: int = option(8, "G, responses a prompt", min=1)
  prompt_tokens: int = option(46, "tokens of each prompt", min=1)
  mean: int = option(64, "tokens of a response, on average if there were no limit", min=2)
  limit: int = option(512, "tokens of a response, at most", min=1)
  slots: int = option(32, "responses decoded at once", min=1)
  runs: int = option(1, "times each side is run, after one that is not counted", min=1)


def with_end(policy: Policy, eos: int, mean: int) -> Policy:
  """The policy with an end of probability 1 / mean, whatever it has read.

  >>> from rl_llm.policy.load import load_model
  >>> policy, params, _ = load_model("tiny")
  >>> logits = with_end(policy, 3, 4).logits(params, jnp.ones((1, policy.config.width)))
  >>> round(float(jax.nn.softmax(logits)[0, 3]), 4)
  0.25
  """

  def logits(params, hidden):
    scores = policy.logits(params, hidden)
    others = jnp.where(jnp.arange(scores.shape[-1]) == eos, -jnp.inf, scores)
    end = jax.nn.logsumexp(others, axis=-1) - jnp.log(mean - 1.0)
    return scores.at[..., eos].set(end)

  return dataclasses.replace(policy, logits=logits)


def measure(config: Config) -> tuple[dict[str, list[float]], np.ndarray]:
  """Seconds of each side's runs, and the tokens of each response."""
  rows = config.prompts * config.responses
  if config.slots % config.responses or rows % config.slots:
    raise ConfigError(
      "slots",
      config.slots,
      f"a multiple of --responses={config.responses} that divides their number, {rows}",
    )
  policy, params, tokenizer = load_model(config.model)
  eos = min(tokenizer.eos_ids)
  policy = with_end(policy, eos, config.mean)
  rng = np.random.default_rng(0)
  shape = config.prompts, config.prompt_tokens
  prompts = rng.integers(0, policy.config.vocab_size, shape).astype(np.int32)
  keys = row_keys(jax.random.key(0), config.prompts, config.responses)
  lengths = np.full(config.prompts, config.prompt_tokens, np.int32)

  def roll(first, last, slots):
    rollout = generate(
      params,
      prompts[first:last],
      lengths[first:last],
      keys[first * config.responses : last * config.responses],
      SamplingConfig(1.0),
      policy=policy,
      responses_per_prompt=config.responses,
      max_new_tokens=config.limit,
      eos_ids=(eos,),
      pad_id=tokenizer.pad_id,
      slots=slots,
    )
    return np.asarray(rollout.lengths)

  batch = config.slots // config.responses

  def batches():
    parts = [roll(p, p + batch, 0) for p in range(0, config.prompts, batch)]
    return np.concatenate(parts)

  written = {}

  def check(lengths: dict[str, np.ndarray]) -> None:
    written.update(lengths)
    if not np.array_equal(*lengths.values()):
      raise BenchmarkError(f"tokens: { {name: int(x.sum()) for name, x in lengths.items()} }")

  sides = {"batches": batches, "slots": lambda: roll(0, config.prompts, config.slots)}
  return alternate(sides, runs=config.runs, check=check), written["slots"]


def main(config: Config) -> None:
  found, lengths = measure(config)
  tokens, rows = int(lengths.sum()), config.prompts * config.responses
  steps = int(lengths.reshape(-1, config.slots).max(axis=1).sum())
  print(
    f"{config.model}: {rows} responses, {tokens / rows:.0f} tokens on average; batches of "
    f"{config.slots} take {steps} steps, the least with {config.slots} slots is "
    f"{-(-tokens // config.slots)}"
  )
  for name, seconds in found.items():
    per_second = tokens / statistics.median(seconds)
    print(f"  {name:8} {spread(seconds, digits=1)} s, {per_second:.0f} tokens/s")
  print(f"  {spread(ratios(found['batches'], found['slots']))} times as fast")


if __name__ == "__main__":
  run(main, Config)
