"""PyTorch's side of `benchmarks.gpu`, run by an interpreter that has torch and transformers.

It gets a job as JSON and prints seconds as JSON. The model is transformers' of the same shape, with
random weights. An update is that of a trainer without a shared prompt: a row of prompt and response
for each response, float32 weights, bfloat16 arithmetic by autocast, scaled dot product attention,
the log-probs of the response's tokens, AdamW. Decoding is `generate`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def make_model(shape: dict, device: str, dtype: Any) -> Any:
  import torch
  import transformers

  config = transformers.Qwen2Config(
    vocab_size=shape["vocab_size"],
    hidden_size=shape["width"],
    num_hidden_layers=shape["n_layers"],
    num_attention_heads=shape["n_heads"],
    num_key_value_heads=shape["n_kv_heads"],
    intermediate_size=shape["mlp_width"],
    tie_word_embeddings=shape["tie_embeddings"],
    rope_theta=shape["rope_theta"],
    rms_norm_eps=shape["rms_eps"],
    attn_implementation="sdpa",
    eos_token_id=None,
    pad_token_id=0,
  )
  config.head_dim = shape["head_dim"]
  torch.manual_seed(0)
  with torch.device(device):
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def clock(device: str) -> float:
  if device == "cuda":
    import torch

    torch.cuda.synchronize()
  return time.perf_counter()


def update(job: dict, device: str) -> list[float]:
  import torch

  model = make_model(job["shape"], device, torch.float32)
  if job["remat"]:
    model.gradient_checkpointing_enable()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), fused=True)
  length, new = job["prompt_tokens"] + job["new_tokens"], job["new_tokens"]
  tokens = torch.randint(1, job["shape"]["vocab_size"], (job["rows"], length), device=device)
  worth = torch.randn(job["rows"], 1, device=device)
  found = []
  for _ in range(job["runs"] + 1):
    begin = clock(device)
    with torch.autocast(device, dtype=torch.bfloat16):
      logits = model(tokens, logits_to_keep=new + 1, use_cache=False).logits[:, :-1]
    logprobs = -torch.nn.functional.cross_entropy(
      logits.float().flatten(0, 1), tokens[:, -new:].flatten(), reduction="none"
    )
    (-(worth * logprobs.view(job["rows"], new)).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    found.append(clock(device) - begin)
  return found[1:]


def decode(job: dict, device: str) -> list[float]:
  import torch

  model = make_model(job["shape"], device, torch.bfloat16).eval()
  shape = job["rows"], job["prompt_tokens"]
  prompts = torch.randint(1, job["shape"]["vocab_size"], shape, device=device)
  seen = torch.ones_like(prompts)
  by_length = []
  for length in job["lengths"]:
    found = []
    for _ in range(job["runs"] + 1):
      begin = clock(device)
      with torch.no_grad():
        model.generate(
          prompts,
          attention_mask=seen,
          do_sample=True,
          top_k=0,
          min_new_tokens=length,
          max_new_tokens=length,
          pad_token_id=0,
        )
      found.append(clock(device) - begin)
    by_length.append(found[1:])
  short, long = job["lengths"]
  return [(b - a) / (long - short) for a, b in zip(*by_length, strict=True)]


def main(job: dict) -> None:
  import torch
  import transformers

  device = "cuda" if torch.cuda.is_available() else "cpu"
  seconds = {"update": update, "decode": decode}[job["part"]](job, device)
  versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
  print(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
