"""The two sides of a benchmark, each in a process of its own that takes one step when told to.

  python -m benchmarks.peers export|ours|trl JOB       JOB is JSON; benchmarks.grpo_step writes it

A side answers on standard output, a JSON object a line: first what it read, then, for each line on
its standard input, one step's figures. So two sides can alternate on one machine, both loaded and
warm, neither running while the other is timed. The side "trl" runs under another interpreter, so
nothing here imports JAX or this library except where that side alone needs it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STORY = (
  "A ferry carries cars and people over a wide river. On Monday it makes eleven trips, with nine "
  "cars and forty people on each. On Tuesday the water is high, so it makes only seven trips, but "
  "each of them is full: fourteen cars and ninety people. The captain writes every number into a "
  "book, draws a line, and adds them up twice, since the owner once paid for a car that nobody had "
  "seen. In the evening she reads the sums to the engineer and asks what he makes of them. "
)


def prompt_texts(encode: Callable[[str], list], *, count: int, tokens: int) -> list[str]:
  """Different texts that all have exactly this many tokens: one story, cut where the count fits.

  Raises:
    ValueError: no cut has that many tokens.
  """
  texts = []
  for number in range(1, count + 1):
    story = f"Story {number}. {STORY}"
    cuts = (story[:end] for end in range(len(story)))
    text = next((cut for cut in cuts if len(encode(cut)) == tokens), None)
    if text is None:
      raise ValueError(
        f"prompt_tokens: {tokens}; the story has fewer ({len(encode(story))}) or cannot be cut "
        "there; choose another number"
      )
    texts.append(text)
  return texts


def reward(prompts: list, completions: list[str], **columns) -> list[float]:
  """As if random, in [0, 1], and the same for the same text: advantages are not 0, time is."""
  return [zlib.crc32(completion.encode()) / 0xFFFFFFFF for completion in completions]


def cores() -> int:
  """The cores this process may use; both sides compute with all of them."""
  return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def peak_mb() -> float:
  """The most memory this process has held so far, in MB of 2^20 bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def matmul_gflops(product: Callable[[], Any], size: int, trials: int = 8) -> float:
  """The best rate of a few runs of one [size, size] product, after one to warm up."""
  product()
  seconds = []
  for _ in range(trials):
    begin = time.perf_counter()
    product()
    seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / min(seconds) / 1e9


class Channel:
  """Lines of JSON to the benchmark; what libraries print goes to standard error instead."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

  def send(self, message: dict) -> None:
    self._out.write(json.dumps(message) + "\n")
    self._out.flush()

  def wait(self) -> None:
    """Until the next step is asked for; the benchmark's end is this side's end."""
    if not sys.stdin.readline():
      raise SystemExit(0)


class Stopwatch:
  """Seconds of named parts of a step; "update" is what no other part accounts for."""

  def __init__(self):
    self._begin = time.perf_counter()
    self.parts = {"generation": 0.0, "reward": 0.0}

  @contextlib.contextmanager
  def __call__(self, part: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    self.parts[part] += time.perf_counter() - begin

  def stop(self, tokens: int) -> dict[str, float]:
    seconds = time.perf_counter() - self._begin
    update = seconds - sum(self.parts.values())
    return {
      "seconds": seconds, **self.parts, "update": update, "tokens": tokens, "peak_mb": peak_mb()
    }


def export(job: dict, channel: Channel) -> None:
  """Writes our weights and tokenizer where transformers reads them: same numbers, same ids."""
  from rl_llm.model import load_model
  from rl_llm.policy import save_hf
  from rl_llm.tokenizers import save_tokenizer

  model = load_model(job["model"])
  directory = Path(job["directory"])
  save_hf(directory, model.policy.config, model.params)
  save_tokenizer(directory, model.tokenizer)
  channel.send({"eos_ids": list(model.tokenizer.eos_ids)})


def ours(job: dict, channel: Channel) -> None:
  """A step by the functions that `experiments/grpo.py` uses, graded by its pool of processes."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from experiments import grpo
  from rl_llm import advantages, logprobs, weighting
  from rl_llm.data.prompts import pad_prompts
  from rl_llm.experience import response_texts, score, trim
  from rl_llm.flops import forward_flops
  from rl_llm.model import load_model
  from rl_llm.rewards import RewardPool, RewardSource
  from rl_llm.rollout import generate, row_keys
  from rl_llm.sampling import SamplingConfig
  from rl_llm.tasks import Problem
  from rl_llm.train_state import init_state
  from rl_llm.update import make_optimizer, make_update

  config = grpo.Config(
    prompts_per_step=job["prompts"],
    responses_per_prompt=job["responses"],
    max_new_tokens=job["new_tokens"],
    microbatch_prompts=job["microbatch_prompts"],
    sampling=grpo.Sampling(min_new_tokens=job["new_tokens"]),
  )
  model = load_model(job["model"], remat=job["remat"])
  policy, tokenizer = model.policy, model.tokenizer
  texts = prompt_texts(tokenizer.encode, count=job["prompts"], tokens=job["prompt_tokens"])
  ids = [tokenizer.encode(text) for text in texts]
  problems = [Problem(key=str(p), prompt=text, columns={}) for p, text in enumerate(texts)]
  prompts = pad_prompts(ids, pad_id=tokenizer.pad_id)
  optimizer = make_optimizer()
  group = job["responses"]
  microbatches = max(1, job["prompts"] // job["microbatch_prompts"])
  update = make_update(grpo.make_loss(config, policy), optimizer, microbatches=microbatches)
  hparams = {"learning_rate": jnp.float32(1e-6), "entropy_coef": jnp.float32(0), "loss": {}}
  sampling = SamplingConfig(
    jnp.ones(job["prompts"] * group), min_new_tokens=job["new_tokens"]
  )

  first = jnp.array(ids[:1])
  hidden, _ = policy.hidden(model.params, first, jnp.arange(first.shape[1])[None])
  read = logprobs.token_logprobs(policy.logits(model.params, hidden[:, :-1]), first[:, 1:])
  square, multiply = jnp.ones((job["matmul"],) * 2), jax.jit(jnp.matmul)
  gflops = matmul_gflops(lambda: multiply(square, square).block_until_ready(), job["matmul"])
  rows = job["prompts"] * group
  forward = forward_flops(
    policy.config, [job["prompt_tokens"]] * job["prompts"], [job["new_tokens"]] * rows
  )
  state = jax.jit(lambda p: init_state(jax.tree.map(jnp.copy, p), optimizer))(model.params)
  model = model._replace(params=None)
  with RewardPool(RewardSource(os.path.abspath(__file__), "reward")) as pool:
    channel.send({
      "prompt_ids": ids,
      "prompt_logprob": float(jnp.mean(read)),
      "gflops": gflops,
      "forward_flops": forward,
      "versions": f"jax {jax.__version__}",
      "note": f"{microbatches} microbatches, {'' if job['remat'] else 'no '}recomputation, "
      "graded in sandboxed processes",
    })
    for step in itertools.count():
      channel.wait()
      watch = Stopwatch()
      with watch("generation"):
        rollout = trim(
          generate(
            state.params,
            prompts.tokens,
            prompts.lengths,
            row_keys(jax.random.fold_in(jax.random.key(0), step), job["prompts"], group),
            sampling,
            policy=policy,
            responses_per_prompt=group,
            max_new_tokens=job["new_tokens"],
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
          )
        )
      with watch("reward"):
        scores = score(pool, problems, response_texts(rollout, tokenizer), group_size=group)
      mask = rollout.mask & scores.ok.reshape(-1, 1)
      batch = {
        "prompts": prompts.tokens,
        "prompt_lengths": prompts.lengths,
        "tokens": rollout.tokens,
        "mask": mask,
        "sampler_logprobs": rollout.sampler_logprobs,
        "advantages": np.asarray(
          advantages.group_relative(scores.rewards, where=scores.ok)
        ).reshape(-1),
        "weights": np.asarray(weighting.token_mean(mask)),
      }
      state, _ = jax.block_until_ready(update(state, batch, hparams))
      channel.send(watch.stop(int(mask.sum())))


def trl(job: dict, channel: Channel) -> None:
  """A step of TRL's GRPOTrainer, whose loop a callback holds until a step is asked for."""
  import datasets
  import torch
  import transformers
  import trl as trl_library

  torch.set_num_threads(cores())
  transformers.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(job["directory"], dtype=torch.float32)
  model.generation_config.eos_token_id = job["eos_ids"]
  tokenizer = transformers.AutoTokenizer.from_pretrained(job["directory"])
  texts = prompt_texts(
    lambda text: tokenizer(text)["input_ids"], count=job["prompts"], tokens=job["prompt_tokens"]
  )
  ids = tokenizer(texts)["input_ids"]
  first = torch.tensor(ids[:1])
  with torch.no_grad():
    read = model(first).logits[:, :-1].log_softmax(-1).gather(-1, first[:, 1:, None])
  square = torch.ones((job["matmul"],) * 2)
  gflops = matmul_gflops(lambda: square @ square, job["matmul"])
  watch, tokens = None, 0

  def graded(prompts, completions, completion_ids, **columns):
    nonlocal tokens
    with watch("reward"):
      tokens += sum(map(len, completion_ids))
      return reward(prompts, completions)

  generate = model.generate

  def timed_generate(*args, **kwargs):
    with watch("generation"):
      return generate(*args, **kwargs)

  model.generate = timed_generate

  class Steps(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
      nonlocal watch, tokens
      channel.wait()
      watch, tokens = Stopwatch(), 0

    def on_step_end(self, args, state, control, **kwargs):
      channel.send(watch.stop(tokens))

  rows = job["prompts"] * job["responses"]
  batch_rows = min(rows, job["trl_batch_rows"])
  with tempfile.TemporaryDirectory() as output:
    trainer = trl_library.GRPOTrainer(
      model=model,
      processing_class=tokenizer,
      reward_funcs=graded,
      train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
      callbacks=[Steps()],
      args=trl_library.GRPOConfig(
        output_dir=output,
        max_steps=job["total_steps"],
        per_device_train_batch_size=batch_rows,
        gradient_accumulation_steps=rows // batch_rows,
        gradient_checkpointing=job["trl_checkpointing"],
        num_generations=job["responses"],
        max_completion_length=job["new_tokens"],
        generation_kwargs={"min_new_tokens": job["new_tokens"]},
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
      ),
    )
    versions = [f"{m.__name__} {m.__version__}" for m in (trl_library, transformers, torch)]
    channel.send({
      "prompt_ids": ids,
      "prompt_logprob": float(read.mean()),
      "gflops": gflops,
      "versions": ", ".join(versions),
      "note": f"batches of {batch_rows} rows x {rows // batch_rows} accumulated, "
      f"{'' if job['trl_checkpointing'] else 'no '}recomputation, graded in its own process",
    })
    trainer.train()


if __name__ == "__main__":
  {"export": export, "ours": ours, "trl": trl}[sys.argv[1]](json.loads(sys.argv[2]), Channel())
