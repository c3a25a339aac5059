"""A small model and a small task."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest

from rl_llm.parallel.sharding import shard
from rl_llm.policy import make_policy, tiny_config
from rl_llm.policy.load import LanguageModel, load_model
from rl_llm.runs.chips import find_peak
from rl_llm.runs.metric_keys import explained
from rl_llm.text.tokenizers import ByteTokenizer
from rl_llm.training import loop
from tests.experiments import once
from tests.experiments.helpers import REWARD, Chatty


@pytest.fixture
def small(monkeypatch):
  """`--model=tiny` is one narrow layer and `Chatty` everywhere; "another" has other weights.

  Reports are not drawn, and the peak of the CPU is not measured: that takes longer than a step. No
  program is made twice, nor the processes of a grader: see `once`.
  """
  config = dataclasses.replace(
    tiny_config(ByteTokenizer.vocab_size),
    n_layers=1,
    width=32,
    n_heads=2,
    n_kv_heads=1,
    mlp_width=64,
  )
  policy = make_policy(config)
  init = jax.jit(policy.init)

  def load(name, *, seed, dtype=jnp.float32, mesh=None, **settings):
    if name not in ("tiny", "another"):
      return load_model(name, seed=seed, dtype=dtype, mesh=mesh, **settings)
    params = init(jax.random.key(seed + (name == "another")))
    params["embed"] = jax.tree.map(lambda x: 10 * x, params["embed"])
    found = make_policy(config, dtype=dtype)
    return LanguageModel(found, params if mesh is None else shard(params, mesh), Chatty())

  monkeypatch.setattr("rl_llm.policy.load.load_model", load)
  monkeypatch.setattr(jax, "jit", once.jit_of(once.PROGRAMS))
  monkeypatch.setattr("experiments.setup.RewardPool", once.open_pool)
  monkeypatch.setattr("rl_llm.training.loop.write_report", lambda workdir, live: None)
  quick = functools.partial(find_peak, measure=lambda device, dtype: 1e11)
  monkeypatch.setattr("rl_llm.runs.chips.find_peak", quick)
  return policy


@pytest.fixture(scope="session")
def files(tmp_path_factory):
  """A JSONL task of ragged prompts, 3 to 23 bytes, and the rewards of `helpers.REWARD`."""
  directory = tmp_path_factory.mktemp("task")
  (directory / "reward.py").write_text(REWARD)
  rows = [{"prompt": chr(97 + i) + "x" * (2 + 4 * (i % 6))} for i in range(24)]
  (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  with once.pools_of(str(directory / "reward.py")):
    yield directory


@pytest.fixture(autouse=True, scope="module")
def every_key_is_explained():
  """Whatever a run of these tests writes to metrics.jsonl stands in docs/metrics.md."""
  made = loop.step_rows

  def step_rows(step):
    row, lines = made(step)
    missing = [key for key in row if not explained(key)]
    assert not missing, f"rl_llm.runs.metric_keys does not explain {missing}"
    return row, lines

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "step_rows", step_rows)
    yield
