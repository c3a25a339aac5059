"""Our side: a step of `experiments.grpo`, and generation alone."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import side
from benchmarks.side import Channel, Stopwatch, matmul_gflops, prompt_texts, serve


def export(job: dict, channel: Channel) -> None:
  """Writes our weights and tokenizer where transformers reads them: same numbers, same ids."""
  from rl_llm.policy import save_hf
  from rl_llm.policy.load import load_model
  from rl_llm.text.tokenizers import save_tokenizer, token_ids

  model = load_model(job["model"])
  directory = Path(job["directory"])
  ids = token_ids(model.tokenizer)
  save_hf(directory, model.policy.config, model.params, token_ids=ids)
  save_tokenizer(directory, model.tokenizer)
  channel.send({"eos_ids": list(model.tokenizer.eos_ids)})


def load_ours(
  job: dict, *, remat: bool = False, dtype: str = "float32"
) -> tuple[Any, list[str], dict]:
  """The model, the prompts, and what this side says of what it has read, in float32."""
  import jax
  import jax.numpy as jnp

  from rl_llm import logprobs
  from rl_llm.policy import make_policy
  from rl_llm.policy.load import load_model

  model = load_model(job["model"], remat=remat, dtype=jnp.dtype(dtype))
  policy, encode = make_policy(model.policy.config), model.tokenizer.encode
  texts = prompt_texts(encode, count=job["prompts"], tokens=job["prompt_tokens"])
  ids = [encode(text) for text in texts]
  first = jnp.array(ids[:1])
  hidden, _ = policy.hidden(model.params, first, jnp.arange(first.shape[1])[None])
  read = logprobs.token_logprobs(policy.logits(model.params, hidden[:, :-1]), first[:, 1:])
  square, multiply = jnp.ones((job["matmul"],) * 2), jax.jit(jnp.matmul)
  fields = ("vocab_size", "width", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_width")
  return (
    model,
    texts,
    {
      "prompt_ids": ids,
      "prompt_logprob": float(jnp.mean(read)),
      "gflops": matmul_gflops(lambda: multiply(square, square).block_until_ready(), job["matmul"]),
      "shape": {field: getattr(policy.config, field) for field in fields},
      "versions": f"jax {jax.__version__}",
    },
  )


def mixed(job: dict, channel: Channel) -> None:
  """Our step, computed in bfloat16; weights and moments stay float32."""
  ours(job, channel, dtype="bfloat16")


def phases(watch: Stopwatch) -> Callable[[str], Any]:
  """The clock of an experiment's step, whose rollout and grading are parts of the stopwatch's."""
  parts = {"rollout": "generation", "reward": "reward"}
  return lambda phase: watch(parts[phase]) if phase in parts else contextlib.nullcontext()


def ours(job: dict, channel: Channel, *, dtype: str = "float32") -> None:
  """A step of `experiments.grpo`: what it samples and grades, and what it learns from that."""
  import jax

  from experiments import grpo, setup
  from rl_llm.policy.load import Weights
  from rl_llm.rewards import RewardPool, RewardSource
  from rl_llm.rollout.collect import Sampler, answer, make_generate, step_keys
  from rl_llm.rollout.drawing import Drawn
  from rl_llm.runs.config import replace
  from rl_llm.runs.heap import trimmed
  from rl_llm.tasks import Problem, Task
  from rl_llm.training.train_state import init_state

  prompts, group, new_tokens = job["prompts"], job["responses"], job["new_tokens"]
  config = replace(
    grpo.Config(),
    {
      "prompts_per_step": prompts,
      "responses_per_prompt": group,
      "max_new_tokens": new_tokens,
      "microbatch_prompts": job["microbatch_prompts"],
      "sampling.min_new_tokens": new_tokens,
      "optimizer.learning_rate": 1e-6,
    },
  )
  loaded, texts, ready = load_ours(job, remat=job["remat"], dtype=dtype)
  policy, tokenizer = loaded.policy, loaded.tokenizer
  problems = [Problem(key=str(p), prompt=text, columns={}) for p, text in enumerate(texts)]
  drawn = Drawn(problems, ready["prompt_ids"], 0)
  task = Task("stories", None, (), RewardSource(os.path.abspath(side.__file__), "reward"))
  programs = grpo.make_programs(config, policy, None)
  optimizer = setup.make_optimizer(config.optimizer)
  state = jax.jit(lambda p: init_state(jax.tree.map(jax.numpy.copy, p), optimizer))(loaded.params)
  ids = jax.numpy.array(ready["prompt_ids"])
  hidden, _ = jax.eval_shape(policy.hidden, loaded.params, ids, ids)
  kept = jax.tree.leaves(loaded.params)[0].dtype
  del loaded
  model = setup.Model(policy, tokenizer, None, Weights(None, None, None))
  sampling = setup.sampling_config(config.sampling)
  generate = make_generate(policy, tokenizer, max_new_tokens=new_tokens, say=lambda line: None)
  with trimmed(), RewardPool(task.reward) as pool:
    sampler = Sampler(task, tokenizer, None, generate, pool)
    channel.send(
      ready
      | {
        "note": f"{hidden.dtype} with {kept} weights, {config.updates.microbatches} microbatches, "
        f"{'' if job['remat'] else 'no '}recomputation, graded in sandboxed processes"
      }
    )
    for step in itertools.count():
      channel.wait()
      watch = Stopwatch()
      clock, keys = phases(watch), step_keys(config.run.seed, step, prompts, group)
      experience = answer(
        sampler, state.params, drawn, keys, clock, responses=group, sampling=sampling
      )
      state, learned = grpo.learn(config, model, programs, state, experience, step, clock)
      jax.block_until_ready(state)
      gap, tokens = map(float, learned.metrics["logprob_gap_mean"])
      channel.send(watch.stop(learned.work.generated_tokens) | {"logprob_gap": gap / tokens})


def generate_ours(job: dict, channel: Channel) -> None:
  """`rl_llm.rollout.generate`, which also returns every token's log-probability and entropy."""
  import jax
  import jax.numpy as jnp

  from rl_llm.data.prompts import pad_prompts
  from rl_llm.rollout import generate, row_keys
  from rl_llm.rollout.sampling import SamplingConfig

  model, _, ready = load_ours(job)
  prompts = pad_prompts(ready["prompt_ids"], pad_id=model.tokenizer.pad_id)
  group = job["responses"]
  sampling = SamplingConfig(jnp.ones(job["prompts"] * group), min_new_tokens=job["new_tokens"])

  def turn(number):
    rollout = generate(
      model.params,
      prompts.tokens,
      prompts.lengths,
      row_keys(jax.random.fold_in(jax.random.key(0), number), job["prompts"], group),
      sampling,
      policy=model.policy,
      responses_per_prompt=group,
      max_new_tokens=job["new_tokens"],
      eos_ids=model.tokenizer.eos_ids,
      pad_id=model.tokenizer.pad_id,
    )
    return int(rollout.mask.sum())

  serve(channel, ready | {"note": "each prompt read once for all its responses"}, turn)
