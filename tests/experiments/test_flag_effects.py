"""Flags of an update change what it computes: seen on made-up log-probs, without a model or a run.

GRPO stands for all scripts, since they share these groups of flags; that a flag reaches a whole
run is a slow test of each script.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments import grpo, setup
from rl_llm.rollout import ResponseBatch
from rl_llm.runs.config import replace

P, G, T = 2, 4, 6
FACTORS = (1.0, -0.5, 2.0, 0.7)
BASE = {
  "steps": len(FACTORS),
  "kl.coef": 0.1,
  "loss.entropy_coef": 0.01,
  "optimizer.learning_rate": 0.3,
}
FLAGS = [
  {"sampling.temperature": 0.7},
  {"advantage.scale": "none"},
  {"advantage.scale": "batch"},
  {"advantage.scale": "leave_one_out"},
  {"advantage.ddof": 0},
  {"advantage.eps": 0.5},
  {"advantage.eps_rule": "max", "advantage.eps": 0.5},
  {"advantage.baseline": "leave_one_out"},
  {"advantage.singleton": "raw"},
  {"advantage.name": "leave_one_out"},
  {"advantage.name": "maxrl"},
  {"advantage.name": "maxrl", "advantage.eps": 0.5},
  {"weighting.name": "sequence_mean"},
  {"weighting.name": "sequence_sum"},
  {"weighting.name": "prompt_mean"},
  {"weighting.name": "constant_length"},
  {"weighting.name": "constant_length", "weighting.length": 3},
  {"weighting.name": "length_power"},
  {"weighting.name": "length_power", "weighting.power": 0.2},
  {"weighting.truncated": "zero"},
  {"weighting.truncated": "drop"},
  {"loss.name": "cispo_loss"},
  {"loss.name": "dro_loss"},
  {"loss.name": "gspo_loss"},
  {"loss.clip_low": 0.01},
  {"loss.clip_high": 0.01},
  {"loss.dual_clip": 1.2},
  {"loss.delta": 1.01},
  {"loss.entropy_coef": 0.5},
  {"kl.coef": 1.0},
  {"kl.gradient": "k1"},
  {"kl.gradient": "k3"},
  {"kl.weighting": "sequence_mean"},
  {"optimizer.learning_rate": 0.1},
  {"optimizer.schedule": "linear"},
  {"optimizer.schedule": "cosine"},
  {"optimizer.warmup_steps": 3},
  {"optimizer.b1": 0.5},
  {"optimizer.b2": 0.5},
  {"optimizer.eps": 1e-2},
  {"optimizer.weight_decay": 0.1},
  {"optimizer.max_grad_norm": 0.01},
  {"optimizer.mu_dtype": "bfloat16"},
  {"optimizer.spike_window": 2, "optimizer.spike_sigma": 0.5},
  {"optimizer.spike_window": 2, "optimizer.spike_sigma": 0.1},
]
# Equal where another is: the old name of a flag, and what is reported and not differentiated.
POWER = {"weighting.name": "length_power"}
SAME = [
  ({"weighting.drop_truncated": True}, {"weighting.truncated": "zero"}),
  ({"kl.value": "k1"}, {}),
  (POWER | {"weighting.power": 0.0}, {"weighting.name": "sequence_mean"}),
  (POWER | {"weighting.power": 1.0}, {}),
]


def batch_of(config):
  """Responses of 1 to 6 tokens, one of them cut off, and a reward that failed."""
  rng = np.random.default_rng(0)
  mask = np.arange(T) < np.array([6, 6, 1, 4, 5, 2, 6, 2])[:, None]
  old, ref = (jnp.float32(-rng.uniform(0.1, 2, (P * G, T))) for _ in range(2))
  rewards = np.array([[0.0, 1.0, 0.25, 1.0], [0.5, 0.0, 0.0, 0.0]], np.float32)
  ok = np.array([[True] * 4, [True, False, False, False]])
  advantages = grpo.group_advantages(config.advantage, rewards, ok, mask.sum(1).reshape(P, G))
  batch = ResponseBatch(
    prompts=np.zeros((P, 1), np.int32),
    prompt_lengths=np.ones(P, np.int32),
    tokens=np.zeros((P * G, T), np.int32),
    attended=mask,
    mask=mask & ok.reshape(-1, 1),
    sampler_logprobs=old,
    old_logprobs=old,
    ref_logprobs=ref,
    advantages=advantages.reshape(-1),
    truncated=np.arange(P * G) == 1,
  )
  return batch._replace(**setup.weigh(config)(batch))


def differentiated(changes, monkeypatch):
  """The log-probs [B, T] of a policy that has moved, and the objective's gradient by them; an
  entropy is a log-prob's square."""

  def logprobs_of(params, batch, *, temperature, **_):
    return params / temperature, jnp.square(params)

  monkeypatch.setattr(grpo, "response_logprobs", logprobs_of)
  config = replace(grpo.Config(), BASE | changes)
  batch = batch_of(config)
  log_ratio = -0.3 * np.cos(np.arange(P * G * T)).reshape(P * G, T)  # Ratios of 0.74 to 1.35.
  params = batch.old_logprobs + jnp.float32(log_ratio)
  numbers = setup.hyperparameters(config, 0, kl_coef=config.kl.coef)
  return params, jax.grad(grpo.make_loss(config, None), has_aux=True)(params, batch, numbers)[0]


def trained(changes, params, gradient):
  """The log-probs after four updates with multiples of this gradient."""
  config = replace(grpo.Config(), BASE | changes)
  optimizer = setup.make_optimizer(config.optimizer)
  moments = optimizer.init(params)
  for step, factor in enumerate(FACTORS):
    direction, moments = optimizer.update(factor * gradient, moments, params)
    params = params - setup.hyperparameters(config, step)["learning_rate"] * direction
  return np.asarray(params)


def test_every_flag_of_an_update_changes_it(monkeypatch):
  """Each against the base, and against each other: no two of these mean the same."""
  base = differentiated({}, monkeypatch)
  config_of = lambda changes: replace(grpo.Config(), BASE | changes)  # noqa: E731
  kinds = {
    "optimizer.": lambda changes: trained(changes, *base),
    "advantage.": lambda changes: np.asarray(batch_of(config_of(changes)).advantages),
    "weighting.": lambda changes: np.asarray(batch_of(config_of(changes)).weights),
    "": lambda changes: np.asarray(differentiated(changes, monkeypatch)[1]),
  }
  tried = []
  for start, compute in kinds.items():
    flags = [{}, *(x for x in FLAGS if x not in tried and all(n.startswith(start) for n in x))]
    found = [compute({})]
    assert np.isfinite(found[0]).all() and np.any(found[0])
    if start in ("advantage.", "weighting."):  # They are what the gradient is of.
      one = differentiated(flags[1], monkeypatch)[1]
      assert not np.array_equal(one, base[1])
    for changes in flags[1:]:
      found.append(compute(changes))
      same = [i for i, other in enumerate(found[:-1]) if np.array_equal(other, found[-1])]
      assert not same, (changes, flags[same[0]])
    tried += flags
  assert len(tried) == len(FLAGS) + len(kinds)


def test_what_means_the_same_computes_the_same(monkeypatch):
  for one, other in SAME:
    found = [differentiated(changes, monkeypatch)[1] for changes in (one, other)]
    np.testing.assert_array_equal(*found)
