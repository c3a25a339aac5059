"""Controllers, optimisers and refreshed references: what they do in a run, and that it resumes."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from experiments import grpo, ppo, reinforce, setup
from rl_llm.errors import ConfigError
from rl_llm.runs.config import replace
from tests.experiments import helpers
from tests.experiments.helpers import equal, settings
from tests.representatives import mostly_slow

run = functools.partial(helpers.run, grpo)

FAST = {"optimizer.learning_rate": 0.03, "steps": 4, "eval.every": 0}


@pytest.mark.slow
@pytest.mark.parametrize("controller", ["target", "lagged"])
def test_the_entropy_bonus_grows_while_the_entropy_is_too_low(tmp_path, small, files, controller):
  base = settings(files, **FAST)
  plain = run(tmp_path / "plain", base).metrics
  target = sorted(row["entropy"] for row in plain[:4])[2] + 1e-4  # Some are above, some below.
  numbers = {"entropy.target": target, "entropy.delta": 0.01, "loss.entropy_coef": 0.02}
  found = run(tmp_path / controller, base | numbers | {"entropy.controller": controller}).metrics
  coef, applied, low = 0.02, 0.02, set()
  for row in found[:4]:
    is_low = row["entropy"] < target
    low.add(is_low)
    if controller == "target":
      assert row["entropy_coef"] == pytest.approx(coef if is_low else 0, abs=1e-6)
    else:
      assert row["entropy_coef"] == pytest.approx(applied, abs=1e-6)
    coef = max(coef + (0.01 if is_low else -0.01), 0)
    applied = coef if is_low else 0
  assert low == {True, False}


@pytest.mark.slow
def test_the_entropy_is_held_where_it_would_fall(tmp_path, small, files):
  """One byte is best and its neighbours nearly as good: without a bonus only that one is left."""
  changes = {"steps": 60, "eval.every": 0, "max_new_tokens": 1, "responses_per_prompt": 16}
  changes |= {"jsonl.reward_function": "near_a", "advantage.scale": "none"}
  changes |= {"optimizer.learning_rate": 0.01, "optimizer.schedule": "linear", "optimizer.b1": 0.5}
  held = {"entropy.controller": "target", "entropy.target": 0.5}
  plain, found = (
    [row["entropy"] for row in run(tmp_path / name, settings(files) | changes | own).metrics[:60]]
    for name, own in (("plain", {}), ("held", held))
  )
  assert max(plain[-20:]) < 0.2
  assert np.all(np.abs(np.array(found[-20:]) - 0.5) < 0.1)


@pytest.mark.slow
def test_the_upper_clip_follows_the_entropy_while_a_bonus_falls(tmp_path, small, files):
  """The bonus in a line, to its last coefficient."""
  changes = {"clip.controller": "adaptive", "clip.target": 100.0, "clip.delta": 0.5, "epochs": 2}
  changes |= {"entropy.controller": "linear", "loss.entropy_coef": 0.3, "entropy.final": 0.0}
  found = run(tmp_path, settings(files, **FAST) | changes | {"loss.clip_low": 0.5}).metrics
  # 1 / (1 - 0.5) - 1 = 1, and half more at each step.
  assert [row["clip_high"] for row in found[:4]] == pytest.approx([1.0, 1.5, 2.0, 2.5])
  assert [row["entropy_coef"] for row in found[:4]] == pytest.approx([0.3, 0.2, 0.1, 0.0])


@pytest.mark.slow
def test_a_refreshed_reference_is_the_policy_of_that_step(tmp_path, small, files):
  base = settings(files, **FAST) | {"kl.coef": 0.1}
  never, whole, half = (
    [row["kl_ref"] for row in run(tmp_path / str(i), base | changes).metrics[:4]]
    for i, changes in enumerate([{}, {"kl.refresh": 2}, {"kl.refresh": 2, "kl.keep": 0.5}])
  )
  assert whole[:2] == pytest.approx(never[:2], rel=1e-4, abs=1e-7)
  assert whole[2] < 1e-8 < half[2] < never[2]
  assert whole[3] > 1e-5


@pytest.mark.parametrize("experiment", mostly_slow([grpo, reinforce, ppo], quick=[0]))
def test_what_controllers_know_and_the_reference_resume(tmp_path, small, files, experiment):
  changes = {"entropy.controller": "lagged", "entropy.target": 100.0, "entropy.delta": 0.01}
  changes |= {"loss.entropy_coef": 0.02, "kl.coef": 0.1}
  base = settings(files, **FAST) | changes | {"kl.refresh": 3, "kl.keep": 0.25}
  if experiment is not ppo:
    base["loss.name"] = "ppo_loss"
  if experiment is grpo:
    base |= {"clip.controller": "adaptive", "clip.target": 100.0, "clip.delta": 0.5}
    base["loss.clip_low"] = 0.5
  straight = helpers.run(experiment, tmp_path / "straight", base)
  if experiment is grpo:  # 1 / (1 - 0.5) - 1 = 1, and half more at each step.
    assert [row["clip_high"] for row in straight.metrics[:4]] == pytest.approx([1, 1.5, 2, 2.5])
  # The entropy is always below 100: the bonus grows, and each step applies what the last one left.
  coefs = [row["entropy_coef"] for row in straight.metrics[:4]]
  assert coefs == pytest.approx([0.02, 0.03, 0.04, 0.05], abs=1e-6)
  helpers.run(experiment, tmp_path / "stopped", base | {"steps": 2})
  (tmp_path / "stopped" / "result.json").unlink(missing_ok=True)
  resumed = helpers.run(experiment, tmp_path / "stopped", base)
  assert resumed.state.keys() == straight.state.keys()
  assert any("reference" in path for path in straight.state)
  assert equal(straight.state, resumed.state)


def test_a_linear_bonus_falls_to_its_last_coefficient():
  changes = {"entropy.controller": "linear", "loss.entropy_coef": 0.3, "entropy.final": 0.06}
  config = replace(grpo.Config(), changes | {"steps": 4})
  coefs = [setup.hyperparameters(config, step)["entropy_coef"] for step in range(4)]
  np.testing.assert_allclose(coefs, [0.3, 0.22, 0.14, 0.06], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "muon", "sgd"])
def test_other_optimisers_train(tmp_path, small, files, name):
  base = settings(files, **FAST) | {"steps": 2}
  adamw, found = (run(tmp_path / n, base | {"optimizer.name": n}) for n in ("adamw", name))
  assert found.metrics[0]["reward_mean"] == adamw.metrics[0]["reward_mean"]
  assert all(np.isfinite(leaf).all() for leaf in found.params.values())
  assert not equal(found.params, adamw.params)
  assert found.metrics[1]["updates_skipped"] == 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"entropy.target": 0.5}, "--entropy.target=0.5: must be left out with --entropy.controller"),
    ({"clip.target": 0.5}, "--clip.target=0.5: must be left out without --clip.controller"),
    (
      {"clip.controller": "adaptive", "loss.name": "cispo_loss"},
      "--clip.controller=adaptive: must be none for a loss without clip_high; try --loss=ppo_loss",
    ),
    ({"kl.refresh": 2}, "--kl.refresh=2: must be 0 without --kl.coef"),
    ({"kl.coef": 0.1, "kl.keep": 0.5}, "--kl.keep=0.5: must be left out without --kl.refresh"),
    ({"optimizer.name": "sgd", "optimizer.b2": 0.5}, "--optimizer.b2=0.5: must be left out with"),
    ({"optimizer.decayed": "all"}, "--optimizer.decayed=all: must be left out without"),
  ],
)
def test_numbers_that_nothing_reads_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    grpo.check(replace(grpo.Config(), changes))
