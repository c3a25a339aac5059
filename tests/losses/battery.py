"""What must hold of every public loss, as checks that take one.

The losses are found by introspection, so that none can be forgotten: whatever `rl_llm.losses`
exports is called with arrays made up from the names of its positional arguments. A loss with a new
argument name fails until `ARRAYS` knows how to make it. A loss with an array of one entry per token
gets weights [B, T] and `MASK`; one whose arrays have one entry per row, weights [B] and `ROW_MASK`.

Most of the time goes into compiling, so every check calls a loss on arrays of one of two shapes:
`SHAPE`, and that of `enlarged`.
"""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import losses, weighting

SHAPE = (4, 6)
MASK = np.array(
  [
    [True, True, True, True, False, False],
    [True, False, False, True, True, True],
    [False, True, False, False, False, False],
    [True, True, True, True, True, True],
  ]
)
ROW_MASK = np.array([True, True, False, True])

# Positional arguments through which the gradient flows; all others are constants.
TRAINED = {
  "logprobs",
  "entropies",
  "values",
  "logits",
  "hidden",
  "chosen_logprobs",
  "rejected_logprobs",
  "response_logprobs",
  "chosen_rewards",
  "rejected_rewards",
}
# Constants that may be of any number type, and those that may be one number for all rows.
ANY_NUMBER = {"advantages"}
MAY_BE_SCALAR = {"baseline"}
ARRAYS = {
  "logprobs": lambda rng: np.log(rng.uniform(0.2, 0.9, SHAPE)),
  "old_logprobs": lambda rng: np.log(rng.uniform(0.2, 0.9, SHAPE)),
  "ref_logprobs": lambda rng: np.log(rng.uniform(0.2, 0.9, SHAPE)),
  "advantages": lambda rng: rng.normal(size=SHAPE[:1]),
  "entropies": lambda rng: rng.uniform(0, 2, SHAPE),
  "values": lambda rng: rng.normal(size=SHAPE),
  "old_values": lambda rng: rng.normal(size=SHAPE),
  "returns": lambda rng: rng.normal(size=SHAPE),
  "chosen_logprobs": lambda rng: np.log(rng.uniform(0.1, 0.9, SHAPE[:1])),
  "rejected_logprobs": lambda rng: np.log(rng.uniform(0.1, 0.9, SHAPE[:1])),
  "ref_chosen_logprobs": lambda rng: np.log(rng.uniform(0.1, 0.9, SHAPE[:1])),
  "ref_rejected_logprobs": lambda rng: np.log(rng.uniform(0.1, 0.9, SHAPE[:1])),
  "response_logprobs": lambda rng: np.log(rng.uniform(0.1, 0.9, SHAPE[:1])),
  "ref_response_logprobs": lambda rng: np.log(rng.uniform(0.1, 0.9, SHAPE[:1])),
  "desirable": lambda rng: np.array([True, False, True, True]),
  "baseline": lambda rng: np.full(SHAPE[:1], 0.3),
  "preferences": lambda rng: rng.uniform(size=SHAPE[:1]),
  "sampler_logprobs": lambda rng: np.log(rng.uniform(0.2, 0.9, SHAPE)),
  "teacher_logprobs": lambda rng: np.log(rng.uniform(0.2, 0.9, SHAPE)),
  "selected": lambda rng: rng.uniform(size=SHAPE) < 0.5,
  "correct": lambda rng: np.array([True, False, True, True]),
  "logits": lambda rng: rng.normal(size=(*SHAPE, 3)),
  "teacher_logits": lambda rng: rng.normal(size=(*SHAPE, 3)),
  "hidden": lambda rng: rng.normal(size=(*SHAPE, 2)),
  "teacher_hidden": lambda rng: rng.normal(size=(*SHAPE, 2)),
  "chosen_rewards": lambda rng: rng.normal(size=SHAPE[:1]),
  "rejected_rewards": lambda rng: rng.normal(size=SHAPE[:1]),
}
# Two settings of each numeric keyword.
SETTINGS = {
  "clip_low": (0.1, 0.3),
  "clip_high": (0.1, 0.3),
  "dual_clip": (2.0, 3.0),
  "delta": (1.5, 4.0),
  "clip": (0.1, 0.5),
  "low": (0.5, 0.9),
  "high": (1.1, 2.0),
  "tau_positive": (0.5, 2.0),
  "tau_negative": (0.5, 2.0),
  "threshold": (0.2, 12.5),
  "threshold_low": (0.05, 0.3),
  "threshold_high": (0.05, 0.3),
  "ratio_cap": (0.8, 1.5),
  "k_positive": (1.0, 2.0),
  "lambda_positive": (1.0, 3.0),
  "k_negative": (1.0, 3.0),
  "lambda_negative": (1.0, 2.0),
  "beta": (0.1, 0.5),
  "label_smoothing": (0.1, 0.2),
  "alpha": (0.2, 0.7),
  "temperature": (0.05, 0.5),
  "shift": (-0.1, 0.4),
  "gamma": (0.5, 1.5),
  "nll_coef": (0.5, 2.0),
  "center_coef": (0.01, 0.1),
  "desirable_weight": (0.5, 2.0),
  "undesirable_weight": (0.5, 2.0),
  "coef": (0.1, 1.0),
  "max_drop": (0.1, 0.3),
  "sampler_coef": (0.01, 0.1),
}
# Metrics over some of the members, such as the desirable rows only.
OVER_A_PART = {
  "desirable_reward",
  "undesirable_reward",
  "positive_nll",
  "gate_open",
  "log_ratio_positive",
  "log_ratio_negative",
  "logprob_positive",
}
# Metrics over responses: their count is that of the rows with a member, not of the members.
PER_RESPONSE = {"sequence_ratio"}
# Where value and gradient belong to different functions, a choice that makes them agree.
CONSISTENT = {
  "kl_loss": {"gradient": "k3"},
  "cispo_loss": {"low": 1.0, "high": 1.0},
  "vespo_loss": {
    "k_positive": 0.0,
    "lambda_positive": 0.0,
    "k_negative": 0.0,
    "lambda_negative": 0.0,
  },
}

# Losses with a constant that is made from the trained array: no slope of theirs is the gradient.
# Their own tests take the slope with that constant held.
HOLDS_A_CONSTANT = {"dft_loss", "on_policy_distillation_loss"}

PUBLIC = {name: getattr(losses, name) for name in losses.__all__ if name.endswith("_loss")}


def chunked_gkd_loss(hidden, teacher_hidden, weights, *, beta=0.5, temperature=1.0):
  """With its unembeddings, which have no axis of rows: test_distillation has their gradient."""
  student, teacher = np.random.default_rng(1).normal(size=(2, 3, 2)).astype(np.float32)
  return losses.chunked_gkd_loss(
    hidden,
    student,
    teacher_hidden,
    teacher,
    weights,
    beta=beta,
    temperature=temperature,
    chunk_size=5,
  )


PUBLIC["chunked_gkd_loss"] = chunked_gkd_loss


def defined():
  """The names of all losses in the family files, exported or not."""
  found = set()
  for module in pkgutil.iter_modules(losses.__path__):
    members = vars(importlib.import_module(f"rl_llm.losses.{module.name}"))
    found |= {name for name in members if name.endswith("_loss") and not name.startswith("_")}
  return found


def arguments(name, seed=0):
  """The positional arguments of a loss as a dict of float32 and other arrays, weights last."""
  rng = np.random.default_rng(seed)
  parameters = inspect.signature(PUBLIC[name]).parameters.values()
  positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
  assert positional[-1] == "weights", f"{name}: weights are the last array"
  arrays = to(np.float32, {p: ARRAYS[p](rng) for p in positional[:-1]})
  return arrays | {"weights": weights(members(arrays))}


def members(arrays):
  """The mask that fits the arrays: per token if one of them is, else per row."""
  return MASK if any(x.ndim > 1 for x in arrays.values()) else ROW_MASK


def weights(mask):
  if mask.ndim == 1:
    return (mask / max(mask.sum(), 1)).astype(np.float32)
  return np.asarray(weighting.sequence_mean(mask))


def is_float(x):
  return jnp.issubdtype(x.dtype, jnp.floating)


def to(dtype, arrays):
  """The arrays with their floats converted; masks and ids stay."""
  return {k: x.astype(dtype) if is_float(x) else x for k, x in arrays.items()}


def numeric_keywords(name):
  parameters = inspect.signature(PUBLIC[name]).parameters.values()
  return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in SETTINGS]


@functools.cache
def compiled(name):
  """floats, others -> ((loss, metrics), gradients of every float), compiled once per shape."""
  f = PUBLIC[name]
  return jax.jit(jax.value_and_grad(lambda floats, others: f(**floats, **others), has_aux=True))


def run(name, arrays):
  floats = {k: x for k, x in arrays.items() if is_float(x)}
  others = {k: x for k, x in arrays.items() if k not in floats}
  (loss, metrics), gradients = compiled(name)(floats, others)
  return loss, metrics, gradients


def trained(gradients):
  return {k: v for k, v in gradients.items() if k in TRAINED}


def close(left, right, rtol=1e-5, atol=1e-7):
  for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def rows(arrays, index):
  return {k: v[index] for k, v in arrays.items()}


def enlarged(arrays, before):
  """Arrays of 4 or 8 rows as 8 rows of 9 tokens: `before` rows before and after, 2 + 1 tokens.

  What is added is outside the mask. Weights are those of the larger mask.
  """

  def pad(x, value):
    return np.pad(x, ((before,) * 2, (2, 1), (0, 0))[: x.ndim], constant_values=value)

  mask = members(arrays)
  mask = pad(np.concatenate([mask] * (2 - before // 2)), False)
  return {
    key: weights(mask) if key == "weights" else pad(x, 0.5 if is_float(x) else 1)
    for key, x in arrays.items()
  }


def inside(arrays, before):
  """Where the arrays given to `enlarged` are in those that it gave back."""
  return (slice(before, 8 - before), slice(2, -1))[: members(arrays).ndim]


def both(first, second):
  return {key: np.concatenate([x, second[key]]) for key, x in first.items()}


def check_is_a_float32_scalar_with_sum_and_count_metrics(name):
  arrays = arguments(name)
  loss, metrics, gradients = run(name, arrays)
  assert loss.shape == () and loss.dtype == jnp.float32 and np.isfinite(loss)
  assert metrics, "a loss reports something"
  for key, (total, count) in metrics.items():
    assert total.shape == count.shape == () and np.isfinite(total), key
    mask = members(arrays)
    size = mask.any(axis=1).sum() if key in PER_RESPONSE else mask.sum()
    assert 0 < count < size if key in OVER_A_PART else count == size, key
  assert all(np.any(g) for g in trained(gradients).values()), "the trained array gets a gradient"


def check_jit_changes_nothing(name):
  arrays = arguments(name)
  loss, metrics, _ = run(name, arrays)
  with jax.debug_nans(True):  # Nor is there a nan on the way, which no result shows.
    close(PUBLIC[name](**arrays), (loss, metrics))


def check_padding_and_empty_rows_change_nothing(name):
  arrays = arguments(name)
  padded = enlarged(arrays, 2)
  loss, metrics, gradients = run(name, arrays)
  padded_loss, padded_metrics, padded_gradients = run(name, padded)
  close((padded_loss, padded_metrics), (loss, metrics))
  where = inside(arrays, 2)
  mask = np.zeros(padded["weights"].shape, bool)
  mask[where] = members(arrays)
  for key, gradient in trained(padded_gradients).items():
    close(gradient[where], gradients[key])
    assert not np.any(np.asarray(gradient)[~mask])


def check_the_order_of_rows_changes_nothing(name):
  arrays = arguments(name)
  order = np.array([2, 0, 3, 1])
  loss, metrics, gradients = run(name, arrays)
  moved_loss, moved_metrics, moved = run(name, rows(arrays, order))
  close((moved_loss, moved_metrics), (loss, metrics))
  close(trained(moved), rows(trained(gradients), order))


def check_duplicating_the_batch_changes_nothing(name):
  arrays = arguments(name)
  close(run(name, enlarged(both(arrays, arrays), 0))[0], run(name, arrays)[0])


def check_microbatches_add_up_to_the_whole(name):
  if name in losses.BATCH_COUPLED:
    return
  halves = [arguments(name, seed) for seed in (0, 1)]
  whole = enlarged(both(*halves), 0)
  loss, metrics, gradients = run(name, whole)
  where = inside(halves[0], 0)
  for number, half in enumerate(halves):  # Of the whole batch's weights.
    half["weights"] = whole["weights"][where][4 * number :][:4]
  parts = [run(name, half) for half in halves]
  close(sum(part[0] for part in parts), loss)
  close(jax.tree.map(jnp.add, parts[0][1], parts[1][1]), metrics)
  together = jax.tree.map(lambda *x: jnp.concatenate(x), *(trained(part[2]) for part in parts))
  close(together, {key: x[where] for key, x in trained(gradients).items()})


def check_all_masked_is_zero(name):
  arrays = arguments(name)
  arrays["weights"] = np.zeros_like(arrays["weights"])
  loss, metrics, gradients = run(name, arrays)
  assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves((metrics, gradients)))


def check_garbage_outside_the_mask_is_not_seen(name):
  arrays = arguments(name)
  mask = members(arrays)
  exposed = [k for k, x in arrays.items() if x.shape[: mask.ndim] == mask.shape and is_float(x)]
  exposed.remove("weights")
  clean = run(name, arrays)
  for garbage in (1e4, -1e4, np.inf, -np.inf, np.nan):
    dirty = {key: arrays[key].copy() for key in exposed}
    for x in dirty.values():
      x[~mask] = garbage
    close(run(name, arrays | dirty), clean)
    for key in exposed:
      close(run(name, arrays | {key: dirty[key]}), clean)


def check_extremes_inside_the_mask_stay_finite(name):
  arrays = arguments(name)
  for key in TRAINED & arrays.keys():
    for extreme in (100.0, -100.0, 1e4, -1e4):
      loss, metrics, gradients = run(name, arrays | {key: arrays[key] + np.float32(extreme)})
      assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, metrics, gradients)))


def check_constants_receive_no_gradient(name):
  _, _, gradients = run(name, arguments(name))
  for key, gradient in gradients.items():
    assert key in TRAINED or not np.any(gradient), key


def check_bfloat16_is_computed_in_float32(name):
  arrays = to(jnp.bfloat16, {k: jnp.asarray(v) for k, v in arguments(name).items()})
  loss, _, gradients = run(name, arrays)
  exact, _, exact_gradients = run(name, to(jnp.float32, arrays))
  assert loss.dtype == jnp.float32
  close(loss, exact)
  rounded = {k: v.astype(jnp.bfloat16) for k, v in trained(exact_gradients).items()}
  close(
    jax.tree.map(lambda x: x.astype(jnp.float32), trained(gradients)),
    jax.tree.map(lambda x: x.astype(jnp.float32), rounded),
    rtol=2**-7,
  )


def check_wrong_arguments_are_named(name):
  arrays = arguments(name)
  mask = members(arrays)
  first = next(k for k in arrays if arrays[k].shape[: mask.ndim] == mask.shape)
  for key, x in arrays.items():
    for wrong in (x[:1], x[..., None], np.float32(1.0)):
      if key in MAY_BE_SCALAR and wrong.ndim == 0:
        continue
      message = error(name, arrays | {key: wrong})
      # The first array sets the shape: where its axes are right, the next is named against it.
      named = key if key != first or wrong.ndim != x.ndim else f"the shape of {key}"
      assert message.startswith(named) or (named != key and named in message), message
    if key not in ANY_NUMBER:
      message = error(name, arrays | {key: np.ones(x.shape, np.int32)})
      assert message.startswith(f"{key} has dtype int32"), message
  message = error(name, arrays | {"weights": mask})
  assert message.startswith("weights has dtype bool"), message


def error(name, arrays):
  try:
    PUBLIC[name](**arrays)
  except ValueError as problem:
    return str(problem)
  raise AssertionError(f"{name} accepted {jax.tree.map(np.shape, arrays)}")


def check_settings_may_be_traced_and_vmapped_and_do_not_recompile(name):
  keywords = numeric_keywords(name)
  settings = {k: np.array(SETTINGS[k], np.float32) for k in keywords}
  f = lambda arrays, settings: PUBLIC[name](**arrays, **settings)[0]  # noqa: E731
  together = jax.jit(jax.vmap(f, (None, 0)) if keywords else f)
  for seed, order in ((1, -1), (2, 1), (0, 1)):
    losses_found = together(arguments(name, seed), {k: x[::order] for k, x in settings.items()})
  assert together._cache_size() == 1
  for i, loss in enumerate(losses_found if keywords else []):
    wanted = f(arguments(name), {k: SETTINGS[k][i] for k in keywords})
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def check_gradient_matches_finite_differences_in_float64(name):
  @jax.jit
  def slopes_and_gradients(arrays):
    found = {}
    for key in TRAINED & arrays.keys():
      f = lambda x: PUBLIC[name](**arrays | {key: x}, **CONSISTENT.get(name, {}))[0]  # noqa: B023,E731
      x = arrays[key]
      steps = 1e-6 * np.eye(x.size).reshape(-1, *x.shape)
      above, below = jnp.split(jax.vmap(f)(jnp.concatenate([x + steps, x - steps])), 2)
      found[key] = ((above - below) / 2e-6).reshape(x.shape), jax.grad(f)(x)
    return found

  if name in HOLDS_A_CONSTANT:
    return
  with jax.enable_x64(True):
    arrays = to(jnp.float64, {k: jnp.asarray(v) for k, v in arguments(name).items()})
    for slopes, gradient in slopes_and_gradients(arrays).values():
      assert gradient.dtype == jnp.float64
      np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-9)


CHECKS = {name: f for name, f in list(globals().items()) if name.startswith("check_")}
