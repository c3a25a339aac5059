"""TRL's side, and Hugging Face's `generate`, under an interpreter that has them."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.side import Channel, Stopwatch, cores, matmul_gflops, prompt_texts, reward, serve


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
  return (
    model,
    tokenizer,
    texts,
    {
      "prompt_ids": ids,
      "prompt_logprob": float(read.mean()),
      "gflops": matmul_gflops(lambda: square @ square, job["matmul"]),
    },
  )


def trl(job: dict, channel: Channel) -> None:
  """A step of TRL's GRPOTrainer; a callback blocks its loop until a step is asked for."""
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
    channel.send(
      ready
      | {
        "versions": ", ".join(versions),
        "note": f"batches of {batch_rows} rows x {rows // batch_rows} accumulated, "
        f"{'' if job['trl_checkpointing'] else 'no '}recomputation, graded in its own process",
      }
    )
    trainer.train()


def generate_transformers(job: dict, channel: Channel) -> None:
  """Hugging Face's `generate` with its own defaults, but sampling everything, at temperature 1."""
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
