"""Tunix's side, under an interpreter that has it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from benchmarks.side import Channel, Stopwatch, matmul_gflops, prompt_texts, reward, serve


def tunix_mesh() -> Any:
  """One device, under the names of the axes that Tunix's models are laid out on."""
  import jax
  import numpy as np

  return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))


def load_tunix(job: dict) -> tuple[Any, Any, list[str], dict]:
  """The exported model and tokenizer in Tunix, the prompts, and what this side has read."""
  import jax
  import jax.numpy as jnp
  import transformers
  from tunix.models.llama3 import model as llama
  from tunix.models.llama3 import params

  entries = json.loads(Path(job["directory"], "config.json").read_text())
  if entries["model_type"] != "llama":
    raise ValueError(f"model: {entries['model_type']}; Tunix's side has Llama's architecture only")
  config = llama.ModelConfig(
    num_layers=entries["num_hidden_layers"],
    vocab_size=entries["vocab_size"],
    embed_dim=entries["hidden_size"],
    hidden_dim=entries["intermediate_size"],
    num_heads=entries["num_attention_heads"],
    head_dim=entries["head_dim"],
    num_kv_heads=entries["num_key_value_heads"],
    rope_theta=entries["rope_theta"],
    norm_eps=entries["rms_norm_eps"],
    weight_tying=entries["tie_word_embeddings"],
  )
  # Tunix 0.1.7 turns every Llama by the base 1e6, whatever its configuration says.
  llama.apply_rope = functools.partial(llama.apply_rope, rope_theta=config.rope_theta)
  model = params.create_model_from_safe_tensors(job["directory"], config, tunix_mesh())
  tokenizer = transformers.AutoTokenizer.from_pretrained(job["directory"])
  tokenizer.bos_token = None  # It would stand before every prompt.
  texts = prompt_texts(tokenizer.encode, count=job["prompts"], tokens=job["prompt_tokens"])
  ids = [tokenizer.encode(text) for text in texts]
  first, seen = jnp.array(ids[:1]), jnp.tri(job["prompt_tokens"], dtype=bool)[None]
  logits, _ = model(first, jnp.arange(first.shape[1])[None], None, seen)
  read = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), first[:, 1:, None], -1)
  square, multiply = jnp.ones((job["matmul"],) * 2), jax.jit(jnp.matmul)
  return (
    model,
    tokenizer,
    texts,
    {
      "prompt_ids": ids,
      "prompt_logprob": float(read.mean()),
      "gflops": matmul_gflops(lambda: multiply(square, square).block_until_ready(), job["matmul"]),
      "versions": f"tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}",
    },
  )


def check_read(rows: Any, ids: list[list[int]], *, responses: int) -> None:
  """Refuses rows whose ids from Tunix's sampler differ from the tokenizer's, as by an extra BOS.

  Raises:
    ValueError: it has.
  """
  if rows[::responses].tolist() != ids:
    raise ValueError("Tunix's sampler reads the prompts as other ids than their tokenizer")


def tunix(job: dict, channel: Channel) -> None:
  """A step of Tunix's GRPOLearner; its data source blocks its loop until a step is asked for.

  Nothing else in that loop can wait; it asks for data again when the previous step has ended.
  """
  import numpy as np
  import optax
  from tunix.rl import rl_cluster
  from tunix.rl.grpo import grpo_learner
  from tunix.rl.rollout import base_rollout

  model, tokenizer, texts, ready = load_tunix(job)
  prompts = np.array(texts)
  micro = min(len(prompts), job["tunix_microbatch_prompts"])
  cache = job["prompt_tokens"] + job["new_tokens"]
  watch, tokens = None, 0

  def steps():
    nonlocal watch, tokens
    while True:
      channel.wait()
      watch, tokens = Stopwatch(), 0
      yield {"prompts": prompts}
      channel.send(watch.stop(tokens))

  def graded(prompts, completions, **columns):
    with watch("reward"):
      return reward(prompts, completions)

  roles = rl_cluster.Role
  cluster = rl_cluster.RLCluster(
    actor=model,
    tokenizer=tokenizer,
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), tunix_mesh()),
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)),
        eval_every_n_steps=job["total_steps"] + 1,
        max_steps=job["total_steps"] + 1,  # It ends when no further step is asked for.
        mini_batch_size=len(prompts),
        # Not even one microbatch is accumulated unless there are several.
        train_micro_batch_size=micro if micro < len(prompts) else None,
        rollout_micro_batch_size=len(prompts),
        compute_logps_micro_batch_size=len(prompts),
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_prompt_length=job["prompt_tokens"],
        max_tokens_to_generate=job["new_tokens"],
        kv_cache_size=cache,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],  # Nothing ends a response before its length.
      ),
    ),
  )
  generate = cluster.generate

  def timed_generate(*args, **kwargs):
    nonlocal tokens
    with watch("generation"):
      rollout = generate(*args, **kwargs)
    tokens += sum(map(len, rollout.tokens))
    check_read(rollout.left_padded_prompt_tokens, ready["prompt_ids"], responses=job["responses"])
    return rollout

  cluster.generate = timed_generate
  learner = grpo_learner.GRPOLearner(
    cluster, grpo_learner.GRPOConfig(num_generations=job["responses"], beta=0.0), graded
  )
  channel.send(
    ready
    | {
      "note": f"{len(prompts) // micro} microbatches, no recomputation, "
      f"a cache of {cache} columns, graded in its own process"
    }
  )
  learner.train(steps())


def generate_tunix(job: dict, channel: Channel) -> None:
  """Tunix's Sampler, from texts to texts as it does; the tokenizing takes milliseconds."""
  from tunix.generate import sampler

  model, tokenizer, texts, ready = load_tunix(job)
  cache = job["tunix_cache"] or job["prompt_tokens"] + job["new_tokens"]
  rows = [text for text in texts for _ in range(job["responses"])]
  sample = sampler.Sampler(
    model,
    tokenizer,
    sampler.CacheConfig(
      cache_size=cache,
      num_layers=model.config.num_layers,
      num_kv_heads=model.config.num_kv_heads,
      head_dim=model.config.head_dim,
    ),
  )

  def turn(number):
    written = sample(
      rows,
      max_generation_steps=job["new_tokens"],
      max_prompt_length=job["prompt_tokens"],
      temperature=1.0,
      top_p=1.0,
      eos_tokens=[-1],  # Nothing ends a response before its length.
      seed=number,
    )
    check_read(written.padded_prompt_tokens, ready["prompt_ids"], responses=job["responses"])
    return sum(map(len, written.tokens))

  serve(channel, ready | {"note": f"a cache of {cache} columns"}, turn)
