"""Logits of Hugging Face `transformers`, which the tests of `rl_llm.policy` are held to.

Needs torch and transformers (`pip install 'rl_llm[parity]'`); the tests need neither, since they
make the same weights again from the same formula and read only the logits stored here.

  python tests/policy/make_goldens.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf   # writes goldens/
  python tests/policy/make_goldens.py --export /tmp/exported         # our weights, as directories
  python tests/policy/make_goldens.py --check-export /tmp/exported   # transformers reads them

With peft (`pip install peft`) the last one reads each family's adapters on its base too.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-3  # of logits, absolute
ADAPTER_TOLERANCE = 1e-4
N_TOKENS = 24

_SMALL = {
  "vocab_size": 48,
  "hidden_size": 32,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "intermediate_size": 48,
  "max_position_embeddings": 256,
  "rms_norm_eps": 1e-5,
  "bos_token_id": 1,
  "eos_token_id": 2,
  "pad_token_id": 0,
}
_GEMMA = {
  "hidden_activation": "gelu_pytorch_tanh",
  "query_pre_attn_scalar": 24,  # not head_dim, so that ignoring it shows
  "sliding_window": 8,
  "tie_word_embeddings": True,
}
# One small model a family, with whatever sets the family apart small enough to bite: windows
# shorter than the sequence, soft caps of the size of what they cap, frequencies on both sides of
# Llama 3's band.
FAMILIES = {
  "llama": {
    **_SMALL,
    "model_type": "llama",
    "tie_word_embeddings": False,
    "rope_theta": 500.0,
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": 4.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64,
    },
  },
  "mistral": {**_SMALL, "model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False},
  "qwen2": {
    **_SMALL,
    "model_type": "qwen2",
    "head_dim": 8,
    "tie_word_embeddings": True,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 2,
    "rope_theta": 1e6,
  },
  "qwen3": {**_SMALL, "model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6},
  "gemma2": {
    **_SMALL,
    **_GEMMA,
    "model_type": "gemma2",
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
  },
  "gemma3": {
    **_SMALL,
    **_GEMMA,
    "model_type": "gemma3_text",
    "sliding_window_pattern": 3,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  },
}

QUESTIONS = [
  "What is 2 + 3?",
  "What is the capital of France?",
  "Name three colours.",
  "Write one sentence about the sea.",
  "Translate 'good morning' into Spanish.",
  "Is the sun a star?",
  "What comes after Tuesday?",
  "Explain gravity to a child.",
  "List two prime numbers.",
  "What is 7 times 8?",
  "Who wrote Hamlet?",
  "What do bees make?",
  "Give me a rhyme for 'cat'.",
  "How many legs has a spider?",
  "What is water made of?",
  "Say hello in French.",
  "What is the opposite of hot?",
  "Spell the word 'tree'.",
  "What is 17 - 9?",
  "Which planet is largest?",
]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
N_NEW, N_LOGIT_PROMPTS, N_LOGIT_IDS = 16, 4, 64


def random_tensors(shapes: dict[str, tuple[int, ...]], *, gemma: bool) -> dict[str, np.ndarray]:
  """Weights from a formula: Hugging Face's names in sorted order, one generator.

  Matrices are normal / sqrt(columns), norms near 1 (as Gemma stores them, near 0), biases near 0.
  """
  rng = np.random.default_rng(2026)
  tensors = {}
  for name in sorted(shapes):
    noise = rng.standard_normal(shapes[name])
    if len(shapes[name]) == 2:
      values = noise / np.sqrt(shapes[name][1])
    elif name.endswith("norm.weight") and not gemma:
      values = 1.0 + 0.2 * noise
    else:
      values = 0.2 * noise
    tensors[name] = np.asarray(values, np.float32)
  return tensors


def family_tokens() -> np.ndarray:
  """[2, T] int64, ids below every family's vocabulary."""
  return np.random.default_rng(7).integers(3, _SMALL["vocab_size"], (2, N_TOKENS))


def logit_ids(vocab_size: int) -> np.ndarray:
  """[64] the vocabulary ids whose logits are stored for SmolLM2."""
  return np.linspace(0, vocab_size - 1, N_LOGIT_IDS).astype(np.int64)


def make_family_goldens() -> None:
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM

  logits = {}
  for family, entries in FAMILIES.items():
    # Eager: the faster implementations leave out Gemma 2's soft cap.
    config = AutoConfig.for_model(**entries)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    names = {name for name, _ in model.named_parameters()}  # a tied lm_head is not one
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if n in names}
    tensors = random_tensors(shapes, gemma=family.startswith("gemma"))
    model.load_state_dict({n: torch.from_numpy(t) for n, t in tensors.items()}, strict=False)
    with torch.no_grad():
      logits[family] = model(torch.from_numpy(family_tokens())).logits.numpy()
    print(family, logits[family].shape, "largest logit", np.abs(logits[family]).max())
  np.savez_compressed(GOLDENS / "families.npz", **logits)


def make_smollm2_goldens(gguf: Path) -> None:
  import torch
  from transformers import AutoModelForCausalLM, AutoTokenizer

  where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
  tokenizer = AutoTokenizer.from_pretrained(**where)
  model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
  prompts, answers, logits, best = [], [], [], []
  for number, question in enumerate(QUESTIONS):
    ids = tokenizer(CHAT.format(question), add_special_tokens=False)["input_ids"]
    step, cache, answer = torch.tensor([ids]), None, []
    with torch.no_grad():
      for _ in range(N_NEW):
        out = model(step, past_key_values=cache, use_cache=True)
        if cache is None and number < N_LOGIT_PROMPTS:
          logits.append(out.logits[0][:, logit_ids(model.config.vocab_size)].numpy())
          best.append(out.logits[0].argmax(-1).numpy())
        cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        answer.append(int(step))
    prompts.append(ids)
    answers.append(answer)
    print(repr(question), "->", repr(tokenizer.decode(answer)))
  np.savez_compressed(
    GOLDENS / "smollm2.npz",
    prompt_ids=np.concatenate(prompts).astype(np.int32),
    prompt_lengths=np.array([len(ids) for ids in prompts], np.int32),
    answers=np.array(answers, np.int32),
    logits=np.concatenate(logits).astype(np.float32),  # the first 4 prompts, one after another
    argmax=np.concatenate(best).astype(np.int32),
  )


def family_model(family: str):
  """(config, params) of a family, made from the formula."""
  from rl_llm.policy.configs import config_from_hf
  from rl_llm.policy.hf import assemble, leaf_shapes
  from rl_llm.policy.hf_names import hf_name

  config = config_from_hf(FAMILIES[family])
  shapes = {hf_name(config, path): shape for path, shape in leaf_shapes(config).items()}
  tensors = random_tensors(shapes, gemma=config.norm_plus_one)
  name_of = functools.partial(hf_name, config)
  return config, assemble(
    leaf_shapes(config), name_of, shapes, lambda name, part: tensors[name][part], family
  )


def adapted(params, *, rank: int, alpha: float, targets: str = "attention|mlp"):
  """Weights with adapters as after some training: no B is 0."""
  import jax

  from rl_llm.policy import join, split_lora

  frozen, trained = split_lora(params, jax.random.key(0), rank=rank, alpha=alpha, targets=targets)

  def shake(x):
    return x + 0.1 * jax.random.normal(jax.random.key(x.shape[0]), x.shape)

  return join(frozen, jax.tree.map(shake, trained))


# {name: adapters}, of which each family has one: all matrices, some, some of one layer alone.
ADAPTERS = {
  "all": {"rank": 4, "alpha": 8.0},
  "some": {"rank": 3, "alpha": 5.0, "targets": "query|value|down"},
  "layer": {"rank": 1, "alpha": 2.0, "targets": "layers_1/attention|up"},
}


def export(directory: Path) -> None:
  """Writes each family, and SmolLM2 if it is installed, with `save_hf`, our logits next to it, and
  adapters of each family with `save_adapter`, and the logits with these."""
  import jax

  from rl_llm.policy import WeightsError, load_weights, make_policy, save_adapter, save_hf

  models = {family: family_model(family) for family in FAMILIES}
  try:
    models["smollm2"] = load_weights("smollm2")
  except WeightsError as error:
    print(error)
  tokens = family_tokens()
  positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)

  def save_logits(path, config, params):
    policy = make_policy(config)
    logits_of = jax.jit(
      lambda params: policy.logits(params, policy.hidden(params, tokens, positions)[0])
    )
    np.save(path, np.asarray(logits_of(params)))

  for name, (config, params) in models.items():
    save_hf(directory / name, config, params, max_shard_bytes=200_000_000)
    save_logits(directory / f"{name}.npy", config, params)
    for kind, settings in (ADAPTERS if name in FAMILIES else {}).items():
      weights = adapted(params, **settings)
      adapter = directory / "adapters" / f"{name}-{kind}"
      save_adapter(adapter, weights, base=str(directory / name))
      save_logits(adapter.with_suffix(".npy"), config, weights)


def check_export(directory: Path) -> None:
  import torch
  from transformers import AutoModelForCausalLM

  for expected in sorted(directory.glob("*.npy")):
    model, report = AutoModelForCausalLM.from_pretrained(
      expected.with_suffix(""),
      dtype=torch.float32,
      attn_implementation="eager",
      output_loading_info=True,
    )
    assert not any(report.values()), report
    with torch.no_grad():
      theirs = model.eval()(torch.from_numpy(family_tokens())).logits.numpy()
    gap = np.abs(theirs - np.load(expected)).max()
    print(f"{expected.stem}: largest logit {np.abs(theirs).max():.3f}, largest gap {gap:.2e}")
    assert gap <= TOLERANCE, expected.stem
  check_adapters(directory)


def check_adapters(directory: Path) -> None:
  """PEFT, on the base that the adapter names, has our logits."""
  try:
    from peft import AutoPeftModelForCausalLM
  except ImportError as error:
    print(f"adapters not checked: {error}")
    return
  import torch

  for expected in sorted(directory.glob("adapters/*.npy")):
    with warnings.catch_warnings():
      warnings.simplefilter("error")  # Keys that are missing or not expected are but warned of.
      model = AutoPeftModelForCausalLM.from_pretrained(
        expected.with_suffix(""), dtype=torch.float32, attn_implementation="eager"
      ).eval()
    tokens = torch.from_numpy(family_tokens())
    with torch.no_grad():
      theirs = model(tokens).logits.numpy()
      with model.disable_adapter():
        change = np.abs(theirs - model(tokens).logits.numpy()).max()
    gap = np.abs(theirs - np.load(expected)).max()
    print(f"{expected.stem} in peft: adapters change {change:.3f}, largest gap {gap:.2e}")
    assert gap <= ADAPTER_TOLERANCE < change / 100, expected.stem


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gguf", type=Path, help="SmolLM2's file, to make its goldens too")
  parser.add_argument("--export", type=Path, metavar="DIR")
  parser.add_argument("--check-export", type=Path, metavar="DIR")
  args = parser.parse_args()
  if args.export:
    export(args.export)
  elif args.check_export:
    check_export(args.check_export)
  else:
    GOLDENS.mkdir(exist_ok=True)
    make_family_goldens()
    if args.gguf:
      make_smollm2_goldens(args.gguf)


if __name__ == "__main__":
  main()
