"""The flags of `launch.plan`: a run, and the chips that it should fit on."""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments.flags import ATTENTION_HELP, Lora, SamplingMesh
from launch.models import MODELS
from rl_llm.policy.attention import AttentionName
from rl_llm.runs.config import option


@dataclasses.dataclass(frozen=True)
class Config:
  """A run, and where it is to fit."""

  topology: str = option("v5e:16x16", "chips and how they lie: v5e:16x16, v5p:2x2x4, h100:8, cpu:8")
  num_slices: int = option(1, "such slices, joined by the data center's network", min=1)
  experiment: Literal["grpo", "reinforce", "ppo", "dpo"] = option("grpo", "whose programs")
  model: str = option("qwen2.5-7b", f"{', '.join(MODELS)}, tiny, or a directory with a config.json")
  vocab_size: int = option(0, "another vocabulary than the model's; 0 = its own", min=0)
  prompts_per_step: int = option(256, "P, problems a step; of dpo, pairs", min=1)
  responses_per_prompt: int = option(8, "G, responses a problem", min=2)
  prompt_tokens: int = option(512, "L, padded length of the prompts", min=1)
  max_new_tokens: int = option(1024, "T, limit of a response's length", min=2)
  epochs: int = option(1, "passes over a step's responses", min=1)
  minibatches: int = option(0, "optimiser updates a pass; 0 = as the experiment has it", min=0)
  microbatch_prompts: int = option(
    0,
    "problems, or pairs, whose activations are held at once; 0 = as many as fit by formula",
    min=0,
  )
  remat: bool = option(True, "compute activations twice instead of holding them")
  scan_layers: bool = option(True, "compile one layer and loop over all: compiles sooner")
  attention: AttentionName = option("auto", ATTENTION_HELP)
  dtype: Literal["bfloat16", "float32"] = option("bfloat16", "dtype of the arithmetic")
  kl_coef: float = option(0.0, "above 0 holds a reference model too", min=0)
  value_trunk: Literal["own", "shared"] = option("own", "trunk of ppo's value network")
  mesh: SamplingMesh = SamplingMesh(data=1, fsdp=-1)
  lora: Lora = Lora()
  search: bool = option(False, "try all meshes and microbatches instead, and compile the best few")
  candidates: int = option(3, "how many of them are compiled", min=1)
  efficiency: float = option(0.4, "assumed share of the bounds that is reached", above=0, max=1)
  json: str = option("", "a file for the figures; empty = none")
