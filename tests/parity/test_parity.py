"""Our losses, gradients and advantages equal those of verl and TRL on the same arrays.

The goldens are what their own functions returned; `make parity` runs those again. Where we differ
on purpose, a test says by how much. `python -m tests.parity.test_parity` prints the table of
docs/parity.md.
"""

import collections
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import advantages, losses, weighting
from tests.parity import advantage_cases, policy_cases, preference_cases
from tests.parity import inputs as x

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "parity.md"
GOLDENS = {system: dict(np.load(HERE / "goldens" / f"{system}.npz")) for system in ("verl", "trl")}
CASES = [*policy_cases.CASES, *advantage_cases.CASES, *preference_cases.CASES]
TOLERANCE = 1e-5  # of the golden's largest number: float32, summed in another order


@functools.cache
def ours(system):
  """{index of the case: (value, gradient or None)}, in one compilation."""
  mine = {i: case for i, case in enumerate(CASES) if case.system == system}

  def run(arrays):
    return {i: evaluate(case, arrays.get(i)) for i, case in mine.items()}

  arrays = {i: jnp.asarray(case.trained[1]) for i, case in mine.items() if case.trained}
  quick = {"xla_backend_optimization_level": 0}  # compiling takes longer than running, once
  return jax.device_get(jax.jit(run, compiler_options=quick)(arrays))


def evaluate(case, array):
  """(value, gradient or None); of an array of terms, the gradient of what is compared, summed."""
  if array is None:
    return case.f(), None

  def total(array):
    value = case.f(array)
    return jnp.sum(jnp.where(case.where, value, 0)), value

  gradient, value = jax.grad(total, has_aux=True)(array)
  return value, gradient


def difference(got, golden, where=True):
  """The largest difference, in units of the golden's largest number if that is not 0."""
  golden = golden[:, None] if np.ndim(golden) == 1 else golden
  got, golden = (np.where(where, y, 0) for y in np.broadcast_arrays(got, golden))
  return float(np.abs(got - golden).max() / (np.abs(golden).max() or 1))


def differences(i):
  case = CASES[i]
  value, gradient = ours(case.system)[i]
  found = {}
  if case.value:
    found["value"] = difference(value, GOLDENS[case.system][f"{case.golden}/value"], case.where)
  if gradient is not None:
    key = f"{case.golden}/{case.trained[0]}"
    found["gradient"] = difference(gradient, GOLDENS[case.system][key])
  return found


@pytest.mark.parametrize(
  "i", range(len(CASES)), ids=[f"{case.system}-{case.golden}-{case.name}" for case in CASES]
)
def test_equal(i):
  assert max(differences(i).values()) <= TOLERANCE


def test_no_golden_is_forgotten():
  compared = {
    (c.system, f"{c.golden}/{part}") for c in CASES for part in ("value", *(c.trained or ())[:1])
  }
  assert compared == {(system, key) for system, all_of in GOLDENS.items() for key in all_of}


def test_goldens_are_small():
  assert sum(path.stat().st_size for path in (HERE / "goldens").iterdir()) < 200_000


def grpo(weights):
  return losses.grpo_loss(x.LOGPROBS, x.OLD, x.ADVANTAGES, weights)[0]


def test_trl_counts_rows_without_tokens():
  """Our sequence mean leaves the empty row out; TRL divides by all 6 rows instead of 5."""
  np.testing.assert_allclose(
    grpo(weighting.sequence_mean(x.MASK)), GOLDENS["trl"]["grpo/value"] * 6 / 5, rtol=1e-5
  )


def test_verl_gives_a_lone_response_its_raw_reward():
  alone = x.REWARDS.reshape(-1, 1)
  assert not np.any(advantages.group_relative(alone))
  theirs = GOLDENS["verl"]["advantage group_relative, one response/value"].max(axis=1)
  np.testing.assert_allclose(theirs, alone[:, 0] / (1 + 1e-6), rtol=1e-6)


def test_verl_forgets_how_gmpo_and_sapo_should_be_averaged():
  """Asked for the token mean, which would give other numbers."""
  token = weighting.token_mean(x.MASK)
  for golden, loss in (("gmpo clip 0.4", losses.gmpo_loss), ("sapo", losses.sapo_loss)):
    asked, _ = loss(x.LOGPROBS, x.OLD, x.ADVANTAGES, token)
    assert abs(asked - GOLDENS["verl"][f"{golden}/value"]) > 0.01


def test_verl_clip_ratio_alone_does_nothing():
  goldens = GOLDENS["verl"]
  assert goldens["ppo clip_ratio 0.01/value"] == goldens["ppo token_mean/value"]
  tight, _ = losses.ppo_loss(
    x.LOGPROBS, x.OLD, x.ADVANTAGES, weighting.token_mean(x.MASK), clip_low=0.01, clip_high=0.01
  )
  assert abs(tight - goldens["ppo clip_ratio 0.01/value"]) > 0.01


def test_verl_rejection_bounds_are_mirrored():
  """Told to keep w within [0.8, 1.6], it keeps 1 / w within them."""

  def kept(low, high):
    return np.asarray(
      weighting.truncated_importance(x.OLD, x.SAMPLER, x.MASK, mode="reject", low=low, high=high)
    )

  theirs = GOLDENS["verl"]["rejection token/value"]
  assert np.array_equal(kept(1 / 1.6, 1 / 0.8), theirs)
  assert not np.array_equal(kept(0.8, 1.6), theirs)


def test_trl_lets_wpo_weights_exceed_1():
  uncapped = np.exp(sum(preference_cases.aligned(-0.7)))
  capped = losses.wpo_weights(*preference_cases.aligned(-0.7), jnp.ones(x.PAIRS))
  assert uncapped.max() > 1.2  # "dpo wpo above 1" is equal only with these
  np.testing.assert_allclose(capped, np.minimum(uncapped, 1), rtol=1e-6)


def rows():
  """{(our function, system): {what: largest difference}, and how many cases}."""
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for i, case in enumerate(CASES):
    for what, size in differences(i).items():
      found[case.name, case.system][what].append(size)
  return dict(sorted(found.items()))


def table():
  show = lambda sizes: f"{max(sizes):.0e}".replace("0e+00", "0") if sizes else ""  # noqa: E731
  lines = ["| our function | system | cases | value | gradient |", "|---|---|---|---|---|"]
  for (name, system), of in rows().items():
    cases = max(map(len, of.values()))
    cells = show(of["value"]), show(of["gradient"])
    lines.append(f"| `{name}` | {system} | {cases} | {' | '.join(cells)} |")
  return "\n".join(lines)


def test_the_page_shows_every_row():
  """All but the differences themselves, which another machine's float32 may change."""

  def without(text):
    return [line.split("|")[1:4] for line in text.splitlines() if line.startswith("| ")]

  assert without(table()) == without(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
  print(table())
