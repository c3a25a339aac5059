"""The sides of a benchmark, each in a process of its own that takes one step when told to.

  python -m benchmarks.peers SIDE JOB     a name of SIDES below; JOB is JSON

`benchmarks.grpo_step` and `benchmarks.generation` write the jobs. A side answers on standard
output, a JSON object a line: first what it read, then, for each line on its standard input, one
step's figures. So the sides can alternate on one machine, all loaded and warm, none running while
another is timed. TRL and Tunix run under other interpreters, so nothing here imports JAX or this
library except where a side alone needs it.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.metadata
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


def memory_gbytes(trials: int = 8, size: int = 2**28) -> float:
  """The best rate at which all cores together read or copy memory that no cache holds, in 1e9 B/s.

  Each core has a part of `size` bytes of its own; a copy counts what it reads and what it writes.
  """
  import numpy as np

  workers = cores()
  parts = [(np.ones(size // 4 // workers, np.float32), np.ones(size // 4 // workers, np.float32))
           for _ in range(workers)]
  ways = {1: lambda part: np.dot(part[0], part[0]), 2: lambda part: np.copyto(part[1], part[0])}
  rates = []
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    for (times, way), _ in itertools.product(ways.items(), range(trials)):
      begin = time.perf_counter()
      list(pool.map(way, parts))
      rates.append(times * size / (time.perf_counter() - begin) / 1e9)
  return max(rates)


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
  from rl_llm.tokenizers import save_tokenizer, token_ids

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
  from rl_llm.model import load_model
  from rl_llm.policy import make_policy

  model = load_model(job["model"], remat=remat, dtype=jnp.dtype(dtype))
  policy, encode = make_policy(model.policy.config), model.tokenizer.encode
  texts = prompt_texts(encode, count=job["prompts"], tokens=job["prompt_tokens"])
  ids = [encode(text) for text in texts]
  first = jnp.array(ids[:1])
  hidden, _ = policy.hidden(model.params, first, jnp.arange(first.shape[1])[None])
  read = logprobs.token_logprobs(policy.logits(model.params, hidden[:, :-1]), first[:, 1:])
  square, multiply = jnp.ones((job["matmul"],) * 2), jax.jit(jnp.matmul)
  fields = ("vocab_size", "width", "n_layers", "n_heads", "n_kv_heads", "head_dim", "mlp_width")
  return model, texts, {
    "prompt_ids": ids,
    "prompt_logprob": float(jnp.mean(read)),
    "gflops": matmul_gflops(lambda: multiply(square, square).block_until_ready(), job["matmul"]),
    "shape": {field: getattr(policy.config, field) for field in fields},
    "versions": f"jax {jax.__version__}",
  }


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
  from rl_llm.config import replace
  from rl_llm.experience import Drawn, Sampler, answer, make_generate, step_keys
  from rl_llm.memory import freed_given_back
  from rl_llm.model import Weights
  from rl_llm.rewards import RewardPool, RewardSource
  from rl_llm.tasks import Problem, Task
  from rl_llm.train_state import init_state

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
  task = Task("stories", None, (), RewardSource(os.path.abspath(__file__), "reward"))
  programs = grpo.make_programs(config, policy, None)
  optimizer = setup.adamw(config.optimizer)
  state = jax.jit(lambda p: init_state(jax.tree.map(jax.numpy.copy, p), optimizer))(loaded.params)
  ids = jax.numpy.array(ready["prompt_ids"])
  hidden, _ = jax.eval_shape(policy.hidden, loaded.params, ids, ids)
  kept = jax.tree.leaves(loaded.params)[0].dtype
  del loaded
  model = setup.Model(policy, tokenizer, None, Weights(None, None, None))
  sampling = setup.sampling_config(config.sampling)
  generate = make_generate(
    policy, tokenizer, max_new_tokens=new_tokens, say=lambda line: None
  )
  with freed_given_back(), RewardPool(task.reward) as pool:
    sampler = Sampler(task, tokenizer, None, generate, pool)
    channel.send(ready | {
      "note": f"{hidden.dtype} with {kept} weights, {config.updates.microbatches} microbatches, "
      f"{'' if job['remat'] else 'no '}recomputation, graded in sandboxed processes",
    })
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


def load_transformers(job: dict) -> tuple[Any, Any, list[str], dict]:
  """The exported model and tokenizer in transformers, the prompts, and what this side has read."""
  import torch
  import transformers

  torch.set_num_threads(cores())
  transformers.logging.set_verbosity_error()
  model = transformers.AutoModelForCausalLM.from_pretrained(job["directory"], dtype=torch.float32)
  tokenizer = transformers.AutoTokenizer.from_pretrained(job["directory"])
  texts = prompt_texts(
    lambda text: tokenizer(text)["input_ids"], count=job["prompts"], tokens=job["prompt_tokens"]
  )
  ids = tokenizer(texts)["input_ids"]
  first = torch.tensor(ids[:1])
  with torch.no_grad():
    read = model(first).logits[:, :-1].log_softmax(-1).gather(-1, first[:, 1:, None])
  square = torch.ones((job["matmul"],) * 2)
  return model, tokenizer, texts, {
    "prompt_ids": ids,
    "prompt_logprob": float(read.mean()),
    "gflops": matmul_gflops(lambda: square @ square, job["matmul"]),
  }


def trl(job: dict, channel: Channel) -> None:
  """A step of TRL's GRPOTrainer, whose loop a callback holds until a step is asked for."""
  import datasets
  import torch
  import transformers
  import trl as trl_library

  model, tokenizer, texts, ready = load_transformers(job)
  model.generation_config.eos_token_id = job["eos_ids"]
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
    channel.send(ready | {
      "versions": ", ".join(versions),
      "note": f"batches of {batch_rows} rows x {rows // batch_rows} accumulated, "
      f"{'' if job['trl_checkpointing'] else 'no '}recomputation, graded in its own process",
    })
    trainer.train()


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
  return model, tokenizer, texts, {
    "prompt_ids": ids,
    "prompt_logprob": float(read.mean()),
    "gflops": matmul_gflops(lambda: multiply(square, square).block_until_ready(), job["matmul"]),
    "versions": f"tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}",
  }


def check_read(rows: Any, ids: list[list[int]], *, responses: int) -> None:
  """Refuses rows that Tunix's sampler has made other ids of than the tokenizer, such as a BOS more.

  Raises:
    ValueError: it has.
  """
  if rows[::responses].tolist() != ids:
    raise ValueError("Tunix's sampler reads the prompts as other ids than their tokenizer")


def tunix(job: dict, channel: Channel) -> None:
  """A step of Tunix's GRPOLearner, whose loop its data holds until a step is asked for.

  Nothing else in that loop can wait; it comes back for data when the step before has ended.
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
      role_to_mesh=dict.fromkeys(
        (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), tunix_mesh()
      ),
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
    check_read(
      rollout.left_padded_prompt_tokens, ready["prompt_ids"], responses=job["responses"]
    )
    return rollout

  cluster.generate = timed_generate
  learner = grpo_learner.GRPOLearner(
    cluster, grpo_learner.GRPOConfig(num_generations=job["responses"], beta=0.0), graded
  )
  channel.send(ready | {
    "note": f"{len(prompts) // micro} microbatches, no recomputation, a cache of {cache} columns, "
    "graded in its own process",
  })
  learner.train(steps())


def serve(channel: Channel, ready: dict, generate: Callable[[int], int]) -> None:
  """Generates whenever that is asked for; `generate` is given the turn and says how many tokens."""
  channel.send(ready)
  for turn in itertools.count():
    channel.wait()
    begin = time.perf_counter()
    tokens = generate(turn)
    seconds = time.perf_counter() - begin
    channel.send({"seconds": seconds, "tokens": tokens, "peak_mb": peak_mb()})


def generate_ours(job: dict, channel: Channel) -> None:
  """`rl_llm.rollout.generate`, which also tells every token's log-probability and entropy."""
  import jax
  import jax.numpy as jnp

  from rl_llm.data.prompts import pad_prompts
  from rl_llm.rollout import generate, row_keys
  from rl_llm.sampling import SamplingConfig

  model, _, ready = load_ours(job)
  prompts = pad_prompts(ready["prompt_ids"], pad_id=model.tokenizer.pad_id)
  group = job["responses"]
  sampling = SamplingConfig(
    jnp.ones(job["prompts"] * group), min_new_tokens=job["new_tokens"]
  )

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


def generate_transformers(job: dict, channel: Channel) -> None:
  """Hugging Face's `generate` with its own defaults but for the distribution: all of it, at 1."""
  import torch
  import transformers

  model, tokenizer, texts, ready = load_transformers(job)
  prompts = tokenizer(texts, return_tensors="pt")

  def turn(number):
    torch.manual_seed(number)
    with torch.inference_mode():
      rows = model.generate(
        **prompts,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=job["responses"],
        min_new_tokens=job["new_tokens"],
        max_new_tokens=job["new_tokens"],
      )
    return rows[:, job["prompt_tokens"] :].numel()

  versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
  note = f"{model.config._attn_implementation} attention"
  serve(channel, ready | {"versions": versions, "note": note}, turn)


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


SIDES = {
  side.__name__: side
  for side in (
    export, ours, mixed, trl, tunix, generate_ours, generate_transformers, generate_tunix,
  )
}

if __name__ == "__main__":
  SIDES[sys.argv[1]](json.loads(sys.argv[2]), Channel())
