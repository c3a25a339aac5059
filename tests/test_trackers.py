"""Baselines that are remembered, and policies that are guessed, against loops."""

import numpy as np
import pytest

from rl_llm.advantages import role_baseline, track_values
from rl_llm.logprobs import proximal_logprobs

RNG = np.random.default_rng(2)


def test_counts_fade_with_the_policys_move_and_prompts_without_a_try_stay():
  right, wrong = np.full(3, 0.5), np.full(3, 0.5)
  known = [[0.5, 0.5] for _ in range(3)]
  for _ in range(20):
    rewards, moved = RNG.uniform(size=3), RNG.exponential(0.01, size=3)
    tried = RNG.uniform(size=3) < 0.7
    right, wrong = track_values(right, wrong, rewards, moved, where=tried)
    for i in np.flatnonzero(tried):
      keep = min(max(2 ** (-moved[i] / 0.06), 0.875), 0.96)
      known[i] = [keep * known[i][0] + rewards[i], keep * known[i][1] + 1 - rewards[i]]
  np.testing.assert_allclose(np.stack([right, wrong], axis=1), known, rtol=1e-5)


@pytest.mark.parametrize("moved, tries", [(0.0, 1 / 0.04), (1.0, 1 / 0.125)])
def test_the_value_is_the_rate_over_as_many_tries_as_are_kept(moved, tries):
  right, wrong = np.float32(0.5), np.float32(0.5)
  for step in range(400):
    right, wrong = track_values(right, wrong, np.float32(step % 4 == 0), np.float32(moved))
  np.testing.assert_allclose(right + wrong, tries, rtol=1e-3)
  assert abs(right / (right + wrong) - 0.25) < 0.15


def test_a_roles_baseline_is_a_moving_average():
  baselines, known = np.zeros(2), [0.0, 0.0]
  for _ in range(30):
    rewards, played = RNG.normal(size=2), RNG.uniform(size=2) < 0.8
    baselines = role_baseline(baselines, rewards, decay=0.9, where=played)
    known = [0.9 * b + 0.1 * r if p else b for b, r, p in zip(known, rewards, played, strict=True)]
  np.testing.assert_allclose(baselines, known, rtol=1e-5)


def test_the_proximal_policy_lies_as_far_along_as_its_age_says():
  mask = RNG.uniform(size=(3, 4)) < 0.7
  now, sampler = -RNG.uniform(size=(2, 3, 4))
  updates = RNG.integers(0, 5, size=(3, 4))
  got = proximal_logprobs(np.where(mask, now, np.nan), sampler, mask, updates=updates)
  for b, t in np.argwhere(mask):
    # AReaL's versions: the policy trained is of version v, the proximal one of v - 1.
    v, behaviour = 9, 9 - updates[b, t]
    alpha = (v - 1 - behaviour) / (v - behaviour) if v > behaviour else 0.0
    expected = sampler[b, t] + alpha * (now[b, t] - sampler[b, t])
    np.testing.assert_allclose(got[b, t], expected, rtol=1e-5)
  assert not np.any(np.asarray(got)[~mask])


def test_errors_name_the_argument():
  for call, message in (
    (lambda: track_values(1.0, 1.0, 1.0, 0.0, half_life=0), "half_life is 0"),
    (lambda: track_values(1.0, 1.0, 1.0, 0.0, most=0.5), "most is 0.5.*between 0.875"),
    (lambda: track_values(np.ones(2), np.ones(3), 1.0, 0.0), "wrong has shape"),
    (lambda: role_baseline(np.ones(2), np.ones(3)), "rewards has shape"),
    (lambda: role_baseline(1.0, 1.0, decay=2), "decay is 2"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
