"""Every public function of arrays under JAX's strict modes, and what its docstring promises."""

from __future__ import annotations

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import kl
from rl_llm.losses import _checks, policy_gradient
from rl_llm.weighting import factors
from tests.losses import battery, modes
from tests.representatives import mostly_slow

every = pytest.mark.parametrize("name", modes.PUBLIC)

# What a function cannot do, and why.
EXCEPTIONS = {
  "llds_loss, llds_weights: a nan in the advantages": "only their sign is read, and nan has none",
  "off_policy_mask: a nan in its log-probs or advantages": "it says whom to drop and keeps what it "
  "cannot judge; the loss of that row is nan",
  "unembed, chunked_gkd_loss, chunked_logprobs_and_entropy: products at the default precision": (
    "the sampler's logits are made so, and the trainer's must be the same"
  ),
}
HIDES_NAN = {
  "llds_loss": {"advantages"},
  "llds_weights": {"advantages"},
  "off_policy_mask": {"advantages", "logprobs", "sampler_logprobs"},
}
DEFAULT_PRECISION = {"unembed", "chunked_gkd_loss", "chunked_logprobs_and_entropy"}


def test_the_exceptions_are_few():
  names = {name for text in EXCEPTIONS for name in text.split(":")[0].split(", ")}
  assert names == HIDES_NAN.keys() | DEFAULT_PRECISION and len(EXCEPTIONS) <= 8


def floats(found):
  """The dtypes of the outputs that are floats."""
  return {str(x.dtype) for x in jax.tree.leaves(found) if battery.is_float(x)}


def dtypes(case, dtype=jnp.float32):
  """`floats`, for arrays whose floats are of that dtype; nothing is run."""
  arrays = battery.to(dtype, {k: jnp.asarray(x) for k, x in case.arrays.items()})
  return floats(jax.eval_shape(case.function, **arrays))


@every
def test_nothing_is_promoted_and_float32_stays_float32(name):
  """By rank or by dtype, whether or not 64 bits are on: importers may have set any of them."""
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    for case in modes.cases(name):
      found, _ = jax.eval_shape(modes.with_gradients(case), *modes.split(case.arrays))
      assert floats(found) <= {"float32"}, case.label
      with jax.enable_x64(True):
        assert dtypes(case) <= {"float32"}, case.label
    usual = modes.cases(name)[0]
    assert dtypes(usual, jnp.bfloat16) <= {"float32"}
    with jax.enable_x64(True):
      dtypes(usual, jnp.float64)


@every
def test_widths_may_be_mixed(name):
  """Rewards of numpy are float64 as soon as 64 bits are on, values of a network are float32."""
  case = modes.cases(name)[-1]  # That with the most arrays, as optional ones come last.
  wide = list(modes.split(case.arrays)[0])[::2]
  arrays = case.arrays | {k: case.arrays[k].astype(np.float64) for k in wide}
  with jax.enable_x64(True):
    jax.eval_shape(modes.with_gradients(case), *modes.split(arrays))


OTHERS = [name for name in modes.PUBLIC if name not in battery.PUBLIC]
FIRST = {modes.PUBLIC[name].__module__: place for place, name in reversed([*enumerate(OTHERS)])}


# Each operation is a program of its own, so that one function of each module is enough at first.
@pytest.mark.parametrize("name", mostly_slow(OTHERS, quick=FIRST.values()))
def test_no_nan_on_the_way(name):
  """With `jax_debug_nans` any operation that makes a nan raises, even one that no result shows.

  The battery calls losses so.
  """
  with jax.debug_nans(True):
    for case in modes.cases(name):
      case.function(**case.arrays)


GROUPED = [name for name in modes.PUBLIC if "where" in modes.keywords(name)]


@pytest.mark.parametrize(
  "name",
  mostly_slow(GROUPED, quick=[i for i, name in enumerate(GROUPED) if name in ("gdpo", "opo")]),
)
def test_no_nan_in_the_slope_of_a_group_without_spread(name):
  """The root of a variance of 0 has an infinite slope, and 0 times it is nan."""
  case = modes.cases(name)[-1]
  alone = np.arange(case.arrays["where"].shape[-1]) < 1
  arrays = case.arrays | {"where": case.arrays["where"] & alone}
  with jax.debug_nans(True):
    modes.with_gradients(case)(*modes.split(arrays))


@functools.cache
def spoilt():
  """(function, array) -> whether its first results show a nan in the array; all in one program."""

  def results(name, key, arrays):
    x = jnp.asarray(arrays[key])
    broken = x.at[(0,) * x.ndim].set(jnp.nan)  # The first token of the first row is a member.
    found = modes.cases(name)[0].function(**arrays | {key: broken})
    floats = [y for y in jax.tree.leaves(found) if battery.is_float(y)]
    return [jnp.any(jnp.isnan(y)) for y in floats[:2]]

  def program(arrays):
    return {
      name: {key: results(name, key, own) for key in modes.split(own)[0]}
      for name, own in arrays.items()
    }

  return jax.jit(program)({name: modes.cases(name)[0].arrays for name in modes.PUBLIC})


@pytest.mark.slow
@every
def test_a_nan_among_the_members_is_seen(name):
  """A comparison with nan is False: written carelessly it drops the token, and the loss is 0."""
  hidden = {key for key, seen in spoilt()[name].items() if seen and not any(seen)}
  assert hidden == HIDES_NAN.get(name, set())


def of_nothing(case):
  """T = 0, and B = 0: the case's arrays of no tokens and of no rows."""
  for axis, sizes in ((1, {modes.T}), (0, {modes.ROWS, modes.ROWS // modes.GROUP})):
    has = {k: x for k, x in case.arrays.items() if x.ndim > axis and x.shape[axis] in sizes}
    if has:
      yield case.arrays | {k: np.take(x, [], axis) for k, x in has.items()}


def test_a_step_in_which_nothing_was_sampled_is_finite():
  def program(arrays):
    return {
      name: [modes.cases(name)[0].function(**own) for own in both] for name, both in arrays.items()
    }

  arrays = {name: list(of_nothing(modes.cases(name)[0])) for name in modes.PUBLIC}
  for name, found in jax.jit(program)(arrays).items():
    for x in jax.tree.leaves(found):
      assert not battery.is_float(x) or np.isfinite(x).all(), name


@every
def test_products_are_not_left_to_the_default_precision(name):
  """On a TPU that is bfloat16, on some GPUs TF32."""
  case = modes.cases(name)[0]
  text = str(jax.make_jaxpr(case.function)(**case.arrays))
  products = re.findall(r"dot_general\[(.*?)\n *\]", text, re.DOTALL)
  left = [product for product in products if "precision=(Precision.HIGHEST" not in product]
  assert bool(left) == (name in DEFAULT_PRECISION)


def described(name):
  """keyword -> what `Args:` says of it; "as in `f`" is what f says."""
  text = inspect.getdoc(modes.PUBLIC[name]).partition("\nArgs:\n")[2].partition("\n\n")[0]
  entries = (entry.partition(":") for entry in re.split(r"\n  (?=\w+:)", text.strip()))
  found = {key: " ".join(text.split()) for key, _, text in entries}
  for key, text in found.items():
    if same := re.match(r"as in `(\w+)`", text):
      found[key] = described(same[1])[key]
  return found


def outside(text):
  """Numbers outside of the range that a docstring states."""
  found = []
  if above := re.search(r"(?<![\w\]])> (\d+)\b", text):
    found += [int(above[1]), int(above[1]) - 1]
  if least := re.search(r">= (\d+)|(\d+) or more", text):
    found.append(int(least[1] or least[2]) - 1)
  if between := re.search(r"(?<!usually )between (\d)(?: \(.*?\))? and (\d)", text):
    found += [int(between[1]) - 0.5, int(between[2]) + 0.5]
  if "both excluded" in text:
    found += [0, 1]
  return found


@every
def test_a_number_outside_the_range_that_is_stated_is_refused(name):
  case = modes.cases(name)[0]
  for key, text in described(name).items():
    if key not in modes.keywords(name) or re.match(r"None, or \[", text):
      continue
    for bad in outside(text):
      for number in (bad, np.float32(bad)):
        value = (number, None) if key == "softcaps" else number
        with pytest.raises(ValueError, match=rf"^{key}(\[0\])? is {re.escape(str(number))}"):
          case.function(**case.arrays, **{key: value})


def test_ranges_are_read_from_the_docstrings():
  """Or the test above would pass by finding none."""
  stated = {
    (name, key)
    for name in modes.PUBLIC
    for key, text in described(name).items()
    if key in modes.keywords(name) and outside(text)
  }
  assert len(stated) > 90
  for name, key in (
    ("discounted_returns", "discount"),
    ("gae", "gae_lambda"),
    ("whiten", "eps"),
    ("grpo_loss", "dual_clip"),
    ("adaptive_kl", "samples"),
  ):
    assert (name, key) in stated


@pytest.mark.slow
def test_every_limit_of_a_log_ratio_is_said(monkeypatch):
  """A function that another limit would change says in its docstring that there is one."""
  far = {}
  for name in modes.PUBLIC:
    arrays = modes.cases(name)[0].arrays
    if any("logprobs" in key for key in arrays):
      far[name] = {key: 40 * x if "logprobs" in key else x for key, x in arrays.items()}
  program = lambda far: {name: modes.cases(name)[0].function(**far[name]) for name in far}  # noqa: E731
  usual = jax.jit(program)(far)
  for module in (kl, factors, _checks, policy_gradient):
    monkeypatch.setattr(module, "LOG_RATIO_LIMIT", 1.0)
  changed = jax.jit(lambda far: program(far))(far)
  limited = {
    name
    for name in far
    if any(
      not np.array_equal(x, y, equal_nan=battery.is_float(x))
      for x, y in zip(*map(jax.tree.leaves, (usual[name], changed[name])), strict=True)
    )
  }
  assert len(limited) > 15
  for name in limited:
    assert re.search(r"\+-20|exp\(20\)", inspect.getdoc(modes.PUBLIC[name])), name
