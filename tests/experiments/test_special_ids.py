"""A model learns eight pairs by heart and says them, whatever its files call EOS and padding.

The base model's EOS is `<|endoftext|>` and its template ends turns with `<|im_end|>`; "[PAD]" was
added to the tokenizer of the trained one, and the embedding has no row for it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import pytest

from experiments import evaluate, sft
from rl_llm.data import DataError
from rl_llm.policy import load_hf, make_policy, save_hf, tiny_config
from rl_llm.runs.config import replace
from rl_llm.runs.metrics import read
from rl_llm.text.tokenizers import TokenizerError, from_gguf, from_hf
from tests.test_tokenizers import CHATML, TOKENS, write_gguf

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("jinja2")

PAIRS = dict(zip("abcdefgh", "hello,12,abc,ab,world,123,!!,x".split(","), strict=True))
REWARD = """
def reward(prompts, completions, answer, **columns):
  return [float(text.strip() == right) for text, right in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A base model with random weights, the pairs, and a grader that takes them to the letter."""
  root = tmp_path_factory.mktemp("files")
  config = dataclasses.replace(tiny_config(len(TOKENS)), n_layers=1)
  params = jax.jit(make_policy(config).init)(jax.random.key(0))
  params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])  # Tokens are told apart sooner.
  save_hf(root / "base", config, params)
  from_gguf(write_gguf(root)).backend.save(str(root / "base/tokenizer.json"))
  names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
  (root / "base/tokenizer_config.json").write_text(json.dumps(names))
  (root / "base/generation_config.json").write_text('{"eos_token_id": 0}')
  for name, answer in (("pairs", "completion"), ("questions", "answer")):
    rows = [json.dumps({"prompt": p, answer: a}) for p, a in PAIRS.items()]
    (root / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
  (root / "one.jsonl").write_text(json.dumps({"prompt": "z", "answer": "z"}) + "\n")
  (root / "reward.py").write_text(REWARD)
  return root


def task(files):
  return {
    "task": f"jsonl:{files / 'one.jsonl'}",
    "jsonl.held_out_file": str(files / "questions.jsonl"),
    "jsonl.reward_file": str(files / "reward.py"),
    "reward_workers": 1,
    "max_new_tokens": 8,
  }


@pytest.fixture(scope="module")
def trained(files):
  """The run that learned the pairs: its directory and its result."""
  changes = {
    "model": str(files / "base"),
    "data": str(files / "pairs.jsonl"),
    "held_out_fraction": 0.0,
    "steps": 40,
    "examples_per_step": 8,
    "microbatch_rows": 8,
    "optimizer.learning_rate": 0.01,
    "eval.every": 40,
    "eval.samples": 1,
    "export": True,
  }
  directory = files / "run"
  result = sft.train(replace(sft.Config(), changes | task(files)), str(directory))
  return directory, result


def measured(files, model, workdir):
  """pass@1, and the responses."""
  changes = {"model": str(model), "samples": 1, "k": (1,), "greedy": True}
  result = evaluate.measure(replace(evaluate.Config(), changes | task(files)), str(workdir))
  return result["all"]["greedy"]["value"], read(workdir / "samples.jsonl")


@pytest.mark.slow
def test_what_is_trained_as_the_end_is_where_the_sampler_stops(trained):
  directory, result = trained
  assert result["before"]["eval/greedy_accuracy"] == 0
  assert result["after"]["eval/greedy_accuracy"] == 1
  exported = directory / "model"
  for file in ("config.json", "generation_config.json"):
    entries = json.loads((exported / file).read_text())
    assert (entries["eos_token_id"], entries["bos_token_id"]) == ([0, 2], None)
  assert from_hf(exported).eos_ids == (0, 2)


def with_more_tokens(source, model):
  """A copy of a model whose tokenizer gets "[PAD]" and "<plan>"; not so its weights."""
  shutil.copytree(source, model)
  backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
  backend.add_special_tokens(["[PAD]"])
  backend.add_tokens(["<plan>"])
  backend.save(str(model / "tokenizer.json"))
  names = json.loads((model / "tokenizer_config.json").read_text())
  (model / "tokenizer_config.json").write_text(json.dumps(names | {"pad_token": "[PAD]"}))
  assert backend.token_to_id("[PAD]") == load_hf(model)[0].vocab_size == len(TOKENS)
  return model


@pytest.mark.slow
def test_padding_beyond_the_embedding_changes_nothing(files, trained, tmp_path):
  padded = with_more_tokens(trained[0] / "model", tmp_path / "model")
  plain = measured(files, trained[0] / "model", tmp_path / "plain")
  found = measured(files, padded, tmp_path / "padded")
  assert found[0] == plain[0] == 1
  assert [row["response"] for row in found[1]] == [row["response"] for row in plain[1]]
  assert {row["stop_reason"] for row in found[1] if row["greedy"]} == {"eos"}


def test_any_other_id_beyond_it_is_refused_before_anything_compiles(files, tmp_path, capsys):
  padded = with_more_tokens(files / "base", tmp_path / "model")
  rows = tmp_path / "planned.jsonl"
  rows.write_text(json.dumps({"prompt": "a", "completion": "<plan>x"}) + "\n")
  changes = {"model": str(padded), "data": str(rows), "held_out_fraction": 0.0} | task(files)
  asking = _asking(files, "<plan>", tmp_path)
  for refused in (
    lambda: sft.train(replace(sft.Config(), changes), str(tmp_path / "run")),
    lambda: measured(asking, padded, tmp_path / "asked"),
  ):
    with pytest.raises((DataError, TokenizerError)) as caught:
      refused()
    assert f"'<plan>' has id {len(TOKENS) + 1}" in str(caught.value)
    assert f"embedding has {len(TOKENS)} rows" in str(caught.value)
    assert "compiling" not in capsys.readouterr().out  # as a run announces it


def _asking(files, text, directory):
  """The files with a question that holds the text."""
  for name in ("one.jsonl", "reward.py"):
    shutil.copy(files / name, directory / name)
  (directory / "questions.jsonl").write_text(json.dumps({"prompt": text, "answer": "z"}) + "\n")
  return directory
