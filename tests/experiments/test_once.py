"""Programs are taken for the same where they compute the same, and nowhere else."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm.training.update import make_update
from tests.experiments.once import jit_of, meaning


@dataclasses.dataclass(frozen=True)
class Numbers:
  rate: float = 0.1
  steps: int = 3


def scaled(numbers, *, by=1):
  """A function that reads one of the numbers, and another within it that reads none."""

  def outer(x):
    def inner():
      return by * x

    return inner() + numbers.rate

  return outer


def handed_on(numbers):
  return lambda x: str(numbers) + x


def counting(start):
  def count(n):
    return count(n - 1) if n else start

  return count


def test_functions_are_the_same_by_their_code_and_what_they_read():
  assert meaning(scaled(Numbers())) == meaning(scaled(Numbers(steps=9)))
  for other in (
    scaled(Numbers(rate=0.2)),
    scaled(Numbers(), by=2),
    scaled(Numbers(), by=1.0),
    scaled(Numbers(), by=True),
    functools.partial(scaled(Numbers())),
    handed_on(Numbers()),
  ):
    assert meaning(other) != meaning(scaled(Numbers()))
  # What takes all of the numbers may read any of them.
  assert meaning(handed_on(Numbers())) != meaning(handed_on(Numbers(steps=9)))
  ways = [functools.partial(max, key=key) for key in (abs, len)]
  assert meaning(ways[0]) == meaning(functools.partial(max, key=abs)) != meaning(ways[1])
  assert meaning({"a": 1}) == meaning({"a": 1}) != meaning({"a": 2})


def test_what_may_change_is_the_same_as_nothing():
  for value in (np.zeros(2), jnp.zeros(2), {1}, scaled(Numbers(), by=np.zeros(2))):
    with pytest.raises(TypeError):
      meaning(value)
  with pytest.raises(RecursionError):
    meaning(counting(0))


def test_an_update_is_made_once_for_each_loss(monkeypatch):
  known, original = {}, jax.jit
  monkeypatch.setattr(jax, "jit", jit_of(known))

  def update(rate, optimizer=None):
    def loss(params, batch, hparams):
      return rate * params, {}

    return make_update(loss, optimizer)

  assert update(0.1) is update(0.1) is not update(0.2)
  held = np.zeros(2)
  assert update(held) is not update(held)
  assert len(known) == 2 and jax.jit(len) is not jax.jit(len) and original is not jax.jit
