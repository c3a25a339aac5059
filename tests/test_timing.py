"""What benchmarks of two sides in one process share, and how cost grows."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import scaling, timing
from rl_llm.errors import ConfigError
from rl_llm.rollout import Rollout


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
  """Rates of small arrays: what is tested here is not the machine."""
  monkeypatch.setattr(timing, "MATMUL", 64)
  monkeypatch.setattr(timing, "BYTES", 2**16)


def test_sides_take_turns_and_the_first_turn_is_not_counted():
  said, seen = [], []

  def side(name):
    def work():
      said.append(name)
      return len(said)

    return work

  found = timing.alternate({"a": side("a"), "b": side("b")}, runs=2, check=seen.append)
  assert said == ["a", "b"] * 3
  assert {name: len(seconds) for name, seconds in found.items()} == {"a": 2, "b": 2}
  assert seen == [{"a": 1, "b": 2}, {"a": 3, "b": 4}, {"a": 5, "b": 6}]


@pytest.mark.parametrize("wrong", [1.1, math.nan])
def test_results_that_differ_are_refused(wrong):
  right = {"w": np.array([1.0, 0.0]), "v": np.array([0.0])}
  timing.check_close({"plain": right, "shared": dict(right)}, tolerance=1e-5)
  with pytest.raises(timing.BenchmarkError, match="shared and plain give other results"):
    timing.check_close(
      {"plain": right, "shared": right | {"w": np.array([wrong, 0.0])}}, tolerance=1e-5
    )


def test_ceilings_are_rates():
  ceilings = timing.measure_ceilings()
  assert ceilings.flops > 1e6 and ceilings.bandwidth > 1e6
  assert ceilings.seconds(flops=3 * ceilings.flops, bytes=ceilings.bandwidth) == pytest.approx(3)
  assert ceilings.seconds(flops=ceilings.flops, bytes=2 * ceilings.bandwidth) == pytest.approx(2)


def test_every_point_of_scaling_differs_from_the_base_in_one_factor():
  (name, base), *others = scaling.points(scaling.Config())
  assert (name, base) == ("base", (512, 4, 32, 4))
  assert len(others) == 8
  for name, point in others:
    factor, value = name.split()
    assert point == base._replace(**{factor: int(value)}) != base
  with pytest.raises(ConfigError, match="odd number of values"):
    scaling.main(scaling.Config(prompts=(1, 2)))
  with pytest.raises(ConfigError, match="widths=100: must be multiples of 128"):
    scaling.main(scaling.Config(widths=(128, 256, 100)))


def test_operations_of_a_point_are_those_of_every_product():
  point = scaling.Point(width=128, prompts=2, new_tokens=3, responses=4)
  weights = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 512  # of a layer; one key head
  read = predicted = 0
  for _ in range(2):
    seen = list(range(1, 6)) + 4 * [6, 7]  # The prompt's keys; those of two tokens, 4 times.
    for keys in seen:
      read += 3 * (2 * weights + 4 * 2 * 64 * keys)
    predicted += 4 * 3 * 2 * 128 * 11
  found = scaling.point_flops(point, prompt_tokens=5, layers=3, vocabulary=11)
  assert found == read + predicted


@pytest.mark.slow
def test_scaling_runs_and_prints_a_line_a_point(capsys):
  scaling.main(
    scaling.Config(
      widths=(128,),
      prompts=(1, 2, 2),
      new_tokens=(2,),
      responses=(2,),
      prompt_tokens=4,
      layers=1,
      vocabulary=16,
      runs=1,
    )
  )
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("base: 1 layers of width 128")
  assert [line.split()[0] for line in lines[3:]] == ["prompts", "base", "The"]
  assert lines[3].split()[1:3] == ["1", "0.50"]  # Half the prompts, half the FLOPs.


def test_scaling_refuses_a_rollout_that_ended_early():
  def written(mask):
    return Rollout(*[None] * 6)._replace(mask=jnp.array(mask))

  scaling.check_written({"rollout": written([[True, True]]), "gradient": None})
  with pytest.raises(timing.BenchmarkError, match="rollout: 1 tokens of 2"):
    scaling.check_written({"rollout": written([[True, False]]), "gradient": None})
