"""LoRA in every experiment: what is trained and saved, what is written, what stays."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, grpo, ppo, reinforce, reward_model, sft
from rl_llm.errors import ConfigError
from rl_llm.policy import WeightsError, join, load_adapter, load_hf, split_lora
from tests.experiments import helpers
from tests.experiments.helpers import FULL

LORA = {"lora.rank": 2, "lora.alpha": 8.0, "optimizer.learning_rate": 0.03}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Pairs, which are given answers too for who reads prompt and completion."""
  directory = tmp_path_factory.mktemp("data")
  for name, better in (("pairs", "chosen"), ("answers", "completion")):
    rows = [
      {"prompt": chr(97 + i % 20) + "xx", better: "yab"[: 1 + i % 3]}
      | ({"rejected": "nab"[: 1 + (i + 1) % 3]} if name == "pairs" else {})
      for i in range(60)
    ]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return directory


def settings(experiment, files, data):
  """A short run with adapters."""
  if experiment is sft:
    given = {"data": str(data / "answers.jsonl"), "task": "none", "examples_per_step": 4}
  elif experiment is reward_model:
    given = {"data": str(data / "pairs.jsonl"), "pairs_per_step": 4, "microbatch_pairs": 4}
  else:
    given = helpers.settings(files)
    if experiment is dpo:
      for name in ("prompts_per_step", "microbatch_prompts"):
        del given[name]
      given |= {"pairs_per_step": 4, "microbatch_pairs": 4}
  return given | {"model": "tiny", "prompt_format": "plain", "steps": 2} | LORA


TRIALS = [ppo, reward_model, *((grpo, reinforce, dpo, sft) if FULL else ())]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", TRIALS)
def test_adapters_alone_are_trained_and_saved(tmp_path, small, files, data, experiment):
  found = helpers.run(experiment, tmp_path, settings(experiment, files, data))
  assert_adapters_alone_are_trained(experiment, found)


def assert_adapters_alone_are_trained(experiment, found):
  kinds = {path.split("/")[-1] for path in found.params}
  heads = {"weight", "bias"} if experiment is ppo else {"weight"}  # The value's, or the reward's.
  assert kinds - heads == {"lora_a", "lora_b"}
  assert all(path.split("/")[-2] == "head" for path in found.params if path.endswith("weight"))
  learned = [leaf for path, leaf in found.params.items() if path.endswith("lora_b")]
  assert all(np.any(leaf != 0) for leaf in learned)


def adapters_of(found):
  """The newest checkpoint's, as a tree."""
  trained: dict = {}
  for path, leaf in found.params.items():
    *parents, name = path.split("/")[1:]
    node = trained
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(leaf)
  return trained


def test_the_model_written_is_the_merged_one_and_the_reference_stays(tmp_path, small, files):
  run = functools.partial(helpers.run, grpo)
  found = run(tmp_path, settings(grpo, files, None) | {"export": True, "kl.coef": 0.1, "steps": 3})
  assert_adapters_alone_are_trained(grpo, found)
  assert abs(found.metrics[0]["kl_ref"]) < 1e-5 < abs(found.metrics[2]["kl_ref"])
  config, written = load_hf(tmp_path / "model")
  params = jax.jit(small.init)(jax.random.key(0))
  params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])
  frozen, fresh = split_lora(params, jax.random.key(0), rank=2, alpha=8.0)
  trained = adapters_of(found)
  tokens = jnp.arange(10)[None]
  joined, merged = (
    small.logits(weights, small.hidden(weights, tokens, tokens)[0])
    for weights in (join(frozen, trained), written)
  )
  np.testing.assert_allclose(joined, merged, atol=1e-4)
  before = small.logits(params, small.hidden(params, tokens, tokens)[0])
  assert np.max(np.abs(joined - before)) > 0.01
  alone = load_adapter(tmp_path / "adapter", join(frozen, fresh))
  jax.tree.map(np.testing.assert_array_equal, alone, trained)
  entries = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert entries["base_model_name_or_path"] == "tiny"


@pytest.mark.slow
def test_a_run_begins_with_the_adapters_of_another_and_refers_to_them(tmp_path, small, files):
  given = settings(grpo, files, None) | {"export": True, "kl.coef": 0.1}
  first = helpers.run(grpo, tmp_path / "first", given)
  assert abs(first.metrics[1]["kl_ref"]) > 1e-5
  given |= {"lora.adapter": str(tmp_path / "first/adapter"), "optimizer.learning_rate": 1e-12}
  second = helpers.run(grpo, tmp_path / "second", given)
  assert abs(second.metrics[0]["kl_ref"]) < 1e-5
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-9),
    adapters_of(second),
    adapters_of(first),
  )
  with pytest.raises(WeightsError, match="lora_a' has rank 2, the rank asked for is 3; ask for"):
    helpers.run(grpo, tmp_path / "third", given | {"lora.rank": 3})
  with pytest.raises(ConfigError, match="--lora.rank=0: must be the rank of --lora.adapter=.*"):
    helpers.run(grpo, tmp_path / "fourth", given | {"lora.rank": 0})


def test_a_pattern_that_finds_nothing_is_refused(tmp_path, small, files):
  for pattern in ("conv", "("):
    with pytest.raises(ConfigError, match="--lora.targets=.*: must be a pattern of weights' paths"):
      helpers.run(grpo, tmp_path, settings(grpo, files, None) | {"lora.targets": pattern})
