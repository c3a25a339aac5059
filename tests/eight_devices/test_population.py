"""Members over eight devices, whole ones on each: a first update is what it is on one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from experiments import grpo, population
from rl_llm.runs.config import replace
from rl_llm.training import loop
from tests.eight_devices.test_experiments import files, small  # noqa: F401  fixtures
from tests.experiments import helpers

MEMBERS, ONE = 8, 5


def test_a_members_first_update_is_that_of_its_run_on_one_device(
  tmp_path,
  files,  # noqa: F811  The imported fixture.
  monkeypatch,
):
  found = []
  begin = loop.begin

  def begin_and_look(*args, **keywords):
    start, state = begin(*args, **keywords)
    found.extend(jax.tree.leaves(state))
    return start, state

  monkeypatch.setattr(loop, "begin", begin_and_look)
  shared = helpers.settings(files, steps=1) | {"lora.rank": 2, "kl.coef": 0.1}
  configs = [
    replace(grpo.Config(), shared | {"optimizer.learning_rate": 1e-3 * (1 + number)})
    for number in range(MEMBERS)
  ]
  places = [tmp_path / str(number) for number in range(MEMBERS)]
  population.train(configs, places, tmp_path / "population")
  for leaf in found:
    assert len(leaf.sharding.device_set) == MEMBERS
    assert leaf.sharding.shard_shape(leaf.shape)[0] == 1
  together = helpers.outcome(tmp_path / "population")

  alone = tmp_path / "alone"
  grpo.train(replace(configs[ONE], {"mesh.data": 1}), str(alone))
  alone = helpers.outcome(alone)
  ours = helpers.read(places[ONE] / "metrics.jsonl")[0]
  for name, value in alone.metrics[0].items():
    assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
  # B begins at 0, so that it is its own change.
  learned = [path for path in alone.params if path.endswith("lora_b")]
  moved, apart = (
    np.sqrt(sum(np.sum(np.square(tree[path] - other[path])) for path in learned))
    for tree, other in (
      (alone.params, dict.fromkeys(learned, 0.0)),
      (alone.params, {path: together.params[path][ONE] for path in learned}),
    )
  )
  assert 0 < moved and apart < 1e-3 * moved
