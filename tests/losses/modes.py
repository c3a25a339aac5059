"""Every public function of arrays, found by introspection, with arguments to call it on.

What the MODULES export is called with arrays made up from the names of its parameters, as in
`battery`: once with its defaults, and once with each other choice of a keyword. A name that
`ARRAYS` and `CHOICES` do not know fails.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import controllers, logprobs
from tests.losses import battery

MODULES = (
  "losses",
  "advantages",
  "advantages.group",
  "kl",
  "weighting",
  "logprobs",
  "controllers",
  "masked",
)
KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
ROWS, GROUP, T, V, D, K = 16, 2, 6, 24, 2, 3  # Two rows on each of eight devices.


class Case(NamedTuple):
  """One way to call a function."""

  label: str
  function: Callable  # of arrays by name, its settings bound
  arrays: dict[str, Any]  # floats are float32


def of_rows(make):
  """`battery.ARRAYS` has four rows."""
  return lambda rng: np.concatenate([make(rng) for _ in range(ROWS // 4)])


def normal(*shape):
  return lambda rng: rng.normal(size=shape)


def uniform(*shape):
  return lambda rng: rng.uniform(size=shape)


def some(*shape):
  """True at about 0.7 of the places, and at the first."""
  first = np.arange(np.prod(shape)).reshape(shape) == 0
  return lambda rng: first | (rng.uniform(size=shape) < 0.7)


ARRAYS = {name: of_rows(make) for name, make in battery.ARRAYS.items()} | {
  "mask": of_rows(lambda rng: battery.MASK),
  "advantages": lambda rng: np.append(1.0, rng.normal(size=ROWS - 1)),
  "selected": lambda rng: ~some(ROWS, T)(rng),
  "key": lambda rng: jax.random.key(0),
  "rewards": uniform(ROWS, T),
  "where": some(ROWS, T),
  "greedy_rewards": uniform(ROWS),
  "ref_rewards": uniform(ROWS, T),
  "right": uniform(ROWS, T),
  "wrong": uniform(ROWS, T),
  "moved": uniform(ROWS, T),
  "baselines": normal(ROWS, T),
  "ref_where": some(ROWS, T),
  "outcomes": normal(ROWS),
  "covariance": normal(ROWS, T),
  "sum_of_squares": lambda rng: rng.uniform(0.5, 1, size=(ROWS, T)),
  "lengths": lambda rng: rng.integers(1, 9, size=(ROWS, T)),
  "truncated": some(ROWS),
  "tokens": lambda rng: rng.integers(0, 3, size=(ROWS, T)),
  "unembedding": normal(V, D),
  "teacher_unembedding": normal(V, D),
  "x": normal(ROWS, T),
  "coef": uniform(),
  "kl": uniform(ROWS, T),
  "entropy": uniform(),
  "ratio": lambda rng: rng.uniform(0.5, 2, size=(ROWS, T)),
  "bootstrap": normal(ROWS),
  "margin": normal(ROWS),
  "head_length": lambda rng: rng.integers(1, 4, size=ROWS),
  "clipped": some(ROWS, T),
  "answer_mask": some(ROWS, T),
  "action_ids": lambda rng: rng.integers(0, 3, size=(ROWS, T)),
  "shift": normal(ROWS),
  "gae_lambda": uniform(ROWS),
  "adaptive_kl.kl": uniform(),
  "gdpo.rewards": uniform(ROWS, T, K),
  "gdpo.weights": uniform(K),
  "gdpo.where": some(ROWS, T, K),
  "reinforce_plus_plus_baseline.rewards": uniform(ROWS // GROUP, GROUP),
  "reinforce_plus_plus_baseline.where": some(ROWS // GROUP, GROUP),
  "kto_baseline.where": some(ROWS),
  "bco_shift.where": some(ROWS),
}
# Settings that have no default, or that are tried besides it.
REQUIRED = {
  "chunk_size": 5,
  "group_size": GROUP,
  "fraction": 0.5,
  "power": 0.5,
  "length": 9,
  "limit": 6,
  "cache": 3,
  "target": 0.1,
  "samples": 4,
  "threshold": 0.1,
}
CHOICES = {
  "dual_clip": [3.0],
  "delta": [4.0],
  "ratio_cap": [1.5],
  "softcap": [2.0],
  "k": [2],
  "softcaps": [(2.0, None)],
  "chunk_size": [48, 1000],
  "clip": [None],
  "max_drop": [None],
  "axis": [1],
  "scale": ["batch", "leave_one_out", "none"],
  "pass_at_k.scale": ["std"],
  "baseline": ["leave_one_out"],
  "singleton": ["raw"],
  "eps_rule": ["max"],
  "divergence": ["forward_kl", "js", "alpha"],
  "gpg.alpha": ["nonzero"],
  "truncated_importance.level": ["sequence", "geometric"],
  "llds_loss.level": ["token", "response"],
  "mode": ["mask", "reject"],
  "estimator": ["k2"],
  "statistic": ["mean"],
  "normalizer": ["all"],
  "value": ["k1", "k2"],
  "gradient": ["k1", "k3"],
  "count_empty": [True],
  "average": [True],
  "length_normalize": [True],
  "shift_mean": [False],
}
# Settings that a choice of another one needs.
MAY_BE_ARRAY = {"shift", "gae_lambda"}
TOGETHER = {"head_length": {"tail_weight": 0.5}, "answer_mask": {"answer_weight": 0.5}}


def adaptive(step, state, fields):
  """A controller's step as a function of the arrays in its state."""

  def call(*, coef, **others):
    return step(state(*[jnp.asarray(coef, jnp.float32)] * fields), **others)

  return call, ["coef"], [key for key in inspect.signature(step).parameters if key != "state"]


# Where a positional parameter is no array: the function of arrays, their names, and which of its
# own parameters it still has.
ADAPTED = {
  "map_chunks": (
    lambda hidden: logprobs.map_chunks(lambda x: jnp.sum(jnp.float32(x), axis=-1), 5, hidden),
    ["hidden"],
    [],
  ),
  "adaptive_kl": adaptive(controllers.adaptive_kl, controllers.AdaptiveKL, 1),
  "adaptive_entropy": adaptive(controllers.adaptive_entropy, controllers.AdaptiveEntropy, 2),
  "adaptive_entropy_lagged": adaptive(
    controllers.adaptive_entropy_lagged, controllers.AdaptiveEntropy, 2
  ),
  "adaptive_clip": adaptive(controllers.adaptive_clip, controllers.AdaptiveClip, 1),
  "clip_high": adaptive(controllers.clip_high, controllers.AdaptiveClip, 1),
}


def public():
  """name -> function, of all modules; a function that two of them export is one."""
  found = {}
  for name in MODULES:
    module = importlib.import_module(f"rl_llm.{name}")
    own = [
      key
      for key, value in vars(module).items()
      if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    for key in getattr(module, "__all__", None) or own:
      if inspect.isfunction(getattr(module, key)) and not key.startswith("_"):
        found[key] = getattr(module, key)
  return found


PUBLIC = public()


@functools.cache
def cases(name):
  """The calls of one function: with its defaults, then with one other choice each."""
  call, positional, rest = ADAPTED.get(name, (PUBLIC[name], [], None))
  parameters = inspect.signature(PUBLIC[name]).parameters
  names = [key for key in parameters if rest is None or key in rest]
  bare = [key for key in names if parameters[key].default is inspect.Parameter.empty]
  data = positional + [key for key in bare if parameters[key].kind is not KEYWORD_ONLY]
  rng = np.random.default_rng(0)
  arrays: dict[str, Any] = {}
  for key in data:
    arrays[key] = array(name, key, rng, arrays)
  settings = {key: REQUIRED[key] for key in bare if key not in data}
  made = [Case(name, functools.partial(call, **settings), arrays)]
  for key in names:
    default = parameters[key].default
    choices = lookup(CHOICES, name, key) or []
    optional = key in MAY_BE_ARRAY or (default is None and not choices)
    unknown = isinstance(default, str | bool) and not choices
    assert not unknown, f"{name}: what else may {key} be?"
    for choice in choices:
      bound = functools.partial(call, **settings | {key: choice})
      made.append(Case(f"{name} {key}={choice}", bound, arrays))
    if optional:
      bound = functools.partial(call, **settings, **TOGETHER.get(key, {}))
      more = arrays | {key: array(name, key, rng, arrays)}
      made.append(Case(f"{name} {key}", bound, more))
  return made


def keywords(name):
  """Its keyword-only parameters."""
  parameters = inspect.signature(PUBLIC[name]).parameters.values()
  return [each.name for each in parameters if each.kind is KEYWORD_ONLY]


def split(arrays):
  """The floats, and all else."""
  floats = {k: x for k, x in arrays.items() if battery.is_float(x)}
  return floats, {k: x for k, x in arrays.items() if k not in floats}


def with_gradients(case):
  """floats, others -> the outputs, and gradients of every float; each entry counts differently."""

  def outputs(floats, others):
    found = case.function(**floats, **others)
    total = jnp.float32(0)
    for x in jax.tree.leaves(found):
      if battery.is_float(x):
        counts = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        total += jnp.sum(counts * x).astype(jnp.float32)
    return total, found

  def call(floats, others):
    if not floats:
      return outputs(floats, others)[1], {}
    (_, found), gradients = jax.value_and_grad(outputs, has_aux=True)(floats, others)
    return found, gradients

  return call


def lookup(table, function, name):
  return table.get(f"{function}.{name}", table.get(name))


def array(function, name, rng, others):
  """The array that a parameter is called with; floats are float32."""
  if name == "weights" and function != "gdpo":  # Of a loss: they follow from the mask.
    mask = np.concatenate([battery.members(others)] * (ROWS // 4))
    return battery.weights(mask)
  make = lookup(ARRAYS, function, name)
  assert make, f"{function}: how is {name} made?"
  made = make(rng)
  if isinstance(made, jax.Array):  # A key.
    return made
  made = np.asarray(made)
  return made.astype({"f": np.float32, "i": np.int32}.get(made.dtype.kind, made.dtype))
