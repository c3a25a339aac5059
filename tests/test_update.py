"""One update: gradients add over microbatches, nothing recompiles, bad gradients are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rl_llm.parallel.sharding import make_mesh
from rl_llm.policy import make_policy, split_lora, tiny_config
from rl_llm.runs.metrics import add_metrics, finalize
from rl_llm.training.train_state import init_state, parameter_count
from rl_llm.training.update import make_optimizer, make_update, moved_towards, name_nonfinite


def regression_loss(params, batch, hparams):
  """A weighted sum, as every loss of the library is, plus l2 |p|^2 sum_b w_b."""
  error = batch["x"] @ params["p"] + params["b"] - batch["y"]
  penalty = hparams["l2"] * jnp.sum(params["p"] ** 2)
  loss = jnp.sum(batch["w"] * (error**2 + penalty))
  return loss, {"error": (jnp.sum(jnp.abs(error)), jnp.float32(error.size))}


def make_problem(rows=12, width=5, seed=0):
  rng = np.random.default_rng(seed)
  batch = {
    "x": jnp.asarray(rng.normal(size=(rows, width)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=rows), jnp.float32),
    "w": jnp.asarray(rng.uniform(size=rows) * (rng.uniform(size=rows) > 0.3) / rows, jnp.float32),
  }
  params = {"p": jnp.asarray(rng.normal(size=width), jnp.float32), "b": jnp.zeros(())}
  return params, batch, {"learning_rate": jnp.float32(0.1), "l2": jnp.float32(0.01)}


def sgd_gradient(microbatches):
  """The gradient the update applied, read off one step of plain descent at learning rate 1."""
  params, batch, hparams = make_problem()
  hparams["learning_rate"] = jnp.float32(1.0)
  before = jax.tree.map(np.asarray, params)
  update = make_update(regression_loss, optax.identity(), microbatches=microbatches)
  state, metrics = update(init_state(params, optax.identity()), batch, hparams)
  return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params), metrics


@pytest.mark.parametrize("microbatches", [1, 2, 3, 12])
def test_microbatches_add_up_to_the_whole_batch(microbatches):
  params, batch, hparams = make_problem()
  exact, _ = jax.grad(regression_loss, has_aux=True)(params, batch, hparams)
  gradient, metrics = sgd_gradient(microbatches)
  for name in exact:
    np.testing.assert_allclose(gradient[name], exact[name], rtol=1e-5, atol=1e-6)
  loss, _ = regression_loss(params, batch, hparams)
  np.testing.assert_allclose(metrics["loss"][0], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["error"][1], 12)
  np.testing.assert_allclose(metrics["grad_norm"][0], optax.tree.norm(exact), rtol=1e-5)


def test_microbatches_left_out_are_not_computed_and_nothing_recompiles():
  """The first two of four, with poison in the others; the count is data."""
  params, batch, hparams = make_problem()
  update = make_update(regression_loss, optax.identity(), microbatches=4)
  for used in (2, 0, 4):
    rows = 3 * used
    poisoned = {k: v.at[rows:].set(jnp.nan) for k, v in batch.items()}
    exact, _ = jax.grad(regression_loss, has_aux=True)(
      params, jax.tree.map(lambda x, n=rows: x[:n], batch), hparams
    )
    state = init_state(jax.tree.map(jnp.copy, params), optax.identity())
    _, metrics = update(state, poisoned, hparams, used)
    np.testing.assert_allclose(metrics["grad_norm"][0], optax.tree.norm(exact), rtol=1e-5)
    assert metrics["error"][1] == rows
  assert update._cache_size() == 1


def narrow(params):
  return {"m": params["m"].astype(jnp.bfloat16), "v": params["v"]}


@pytest.mark.parametrize("microbatches", [1, 4])
def test_weights_are_cast_once_an_update_and_gradients_are_summed_in_float32(microbatches):
  """1 and 3 times 2^-8 are numbers of bfloat16, their sum is not: it would be 1."""

  def loss(params, batch, hparams):
    assert (params["m"].dtype, params["v"].dtype) == (jnp.bfloat16, jnp.float32)
    return jnp.sum(params["m"] * batch["x"].astype(jnp.bfloat16)).astype(jnp.float32), {}

  params, hparams = {"m": jnp.zeros(2), "v": jnp.zeros(3)}, {"learning_rate": jnp.float32(1)}
  parts = np.array([1, 2.0**-8, 2.0**-8, 2.0**-8], np.float32)
  batch = {"x": jnp.array(parts if microbatches == 4 else parts[:1])[:, None] * jnp.ones(2)}
  update = make_update(loss, optax.identity(), microbatches=microbatches, cast=narrow)
  state, _ = update(init_state(params, optax.identity()), batch, hparams)
  assert state.params["m"].dtype == jnp.float32
  np.testing.assert_array_equal(state.params["m"], np.full(2, -batch["x"][:, 0].sum()))


@pytest.mark.parametrize(("platform", "kept"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_nothing_keeps_one_accelerator_from_adding_up_gradients_as_they_are(platform, kept):
  params, batch, hparams = make_problem()
  mesh = make_mesh(devices=jax.devices()[:1])
  update = make_update(regression_loss, optax.identity(), microbatches=2, mesh=mesh)
  traced = update.trace(init_state(params, optax.identity()), batch, hparams)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("optimization_barrier" in text) == kept


def test_no_microbatch_casts_a_layers_weights():
  """Nor those that are frozen; the scales stay, and so does the table of embeddings."""
  config, read = tiny_config(vocab_size=32), []
  policy = make_policy(config, dtype=jnp.bfloat16)
  params = policy.init(jax.random.key(0))
  frozen, trained = split_lora(params, jax.random.key(1), rank=2, alpha=4.0)

  def loss(params, batch, hparams):
    read.append(
      jax.tree.map_with_path(lambda path, x: (jax.tree_util.keystr(path), x.dtype), params)
    )
    positions = jnp.broadcast_to(jnp.arange(batch.shape[1]), batch.shape)
    return jnp.sum(policy.hidden(params, batch, positions)[0].astype(jnp.float32)), {}

  update = make_update(loss, optax.identity(), microbatches=2, cast=policy.cast)
  for state, base in ((params, None), (trained, frozen)):
    arguments = init_state(state, optax.identity()), jnp.ones((4, 3), jnp.int32)
    jax.eval_shape(update, *arguments, {"learning_rate": jnp.float32(1)}, 2, base)
    for name, dtype in jax.tree.leaves(read.pop(), is_leaf=lambda x: isinstance(x, tuple)):
      wide = "scale" in name.split("[")[-1] and "lora" not in name or name.startswith("['embed']")
      assert dtype == (jnp.float32 if wide else jnp.bfloat16), name


@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_loss_is_traced_once(microbatches):
  traced = []

  def loss(*arguments):
    traced.append(arguments)
    return regression_loss(*arguments)

  params, batch, hparams = make_problem()
  update = make_update(loss, optax.identity(), microbatches=microbatches)
  update(init_state(params, optax.identity()), batch, hparams)
  assert len(traced) == 1


def test_rows_that_do_not_divide_name_the_numbers():
  params, batch, hparams = make_problem()
  update = make_update(regression_loss, optax.identity(), microbatches=5)
  with pytest.raises(ValueError, match="microbatches: 5 does not divide the batch's 12 rows"):
    update(init_state(params, optax.identity()), batch, hparams)


def test_adamw_takes_the_steps_its_formula_gives():
  """Two steps written out: clip by norm, moments with bias correction, decay of matrices only."""
  optimizer = make_optimizer(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, max_grad_norm=0.5)

  def loss_fn(params, batch, hparams):
    return jnp.sum(params["m"] * batch["g"][0]) + jnp.sum(params["v"] * batch["h"][0]), {}

  params = {"m": jnp.array([[1.0, -2.0]]), "v": jnp.array([3.0])}
  expected = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
  update = make_update(loss_fn, optimizer)
  state = init_state(params, optimizer)
  mean = {name: 0.0 for name in expected}
  square = {name: 0.0 for name in expected}
  for step, scale in [(1, 1.0), (2, 0.1)]:
    gradients = {"m": np.array([[0.6, -0.8]]) * scale, "v": np.array([2.4]) * scale}
    batch = {"g": jnp.asarray(gradients["m"][None]), "h": jnp.asarray(gradients["v"][None])}
    state, _ = update(state, batch, {"learning_rate": jnp.float32(0.01)})
    norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    for name, gradient in gradients.items():
      gradient = gradient * min(1.0, 0.5 / norm)
      mean[name] = 0.9 * mean[name] + 0.1 * gradient
      square[name] = 0.95 * square[name] + 0.05 * gradient**2
      direction = (mean[name] / (1 - 0.9**step)) / (np.sqrt(square[name] / (1 - 0.95**step)) + 1e-8)
      decay = 0.1 * expected[name] if name == "m" else 0.0
      expected[name] = expected[name] - 0.01 * (direction + decay)
  for name in expected:
    np.testing.assert_allclose(state.params[name], expected[name], rtol=1e-5)


def test_the_mean_gradient_may_be_kept_in_two_bytes():
  optimizer = make_optimizer(mu_dtype=jnp.bfloat16, max_grad_norm=0.0)
  params = {"m": jnp.zeros((1, 2))}
  update = make_update(lambda p, batch, _: (jnp.sum(p["m"] * batch["g"][0]), {}), optimizer)
  state = init_state(params, optimizer)
  batch, hparams = {"g": jnp.array([[[0.3, 0.7]]])}, {"learning_rate": jnp.float32(0.01)}
  for _ in range(2):
    state, _ = update(state, batch, hparams)
  kept = {x.dtype.name for x in jax.tree.leaves(state.opt_state) if x.shape == (1, 2)}
  assert kept == {"bfloat16", "float32"} and state.params["m"].dtype == jnp.float32
  # A constant gradient moves every weight by the learning rate a step, up to bfloat16's 2^-8.
  np.testing.assert_allclose(state.params["m"], [[-0.02, -0.02]], rtol=2**-8)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad, microbatches):
  optimizer = make_optimizer()
  params, batch, hparams = make_problem()
  update = make_update(regression_loss, optimizer, microbatches=microbatches)
  state, _ = update(init_state(params, optimizer), batch, hparams)
  before = jax.tree.map(np.asarray, state)
  poisoned = {**batch, "y": batch["y"].at[3].set(bad), "w": batch["w"].at[3].set(1.0)}
  state, metrics = update(state, poisoned, hparams)
  jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (2, 1, 1)
  state, _ = update(state, poisoned, hparams)
  assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 2)
  state, metrics = update(state, batch, hparams)
  assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 0)
  assert not np.array_equal(state.params["p"], before.params["p"])


def test_hyperparameters_are_data_and_nothing_recompiles():
  optimizer = make_optimizer()
  params, batch, hparams = make_problem()
  update = make_update(regression_loss, optimizer)
  state = init_state(params, optimizer)
  for rate in (0.1, 0.2, 0.0):
    before = np.asarray(state.params["p"])
    state, _ = update(state, batch, {**hparams, "learning_rate": jnp.float32(rate)})
    assert np.array_equal(before, state.params["p"]) == (rate == 0.0)
  assert update._cache_size() == 1


def test_the_state_is_donated():
  optimizer = make_optimizer()
  params, batch, hparams = make_problem()
  state = init_state(params, optimizer)
  make_update(regression_loss, optimizer)(state, batch, hparams)
  assert state.params["p"].is_deleted()
  assert not batch["x"].is_deleted()


def root_loss(params, batch, hparams):
  """Where a root is 0, its gradient is infinite: the loss is finite and one leaf alone is not."""
  loss = jnp.sum(batch["w"] * (params["a"] + jnp.sum(jnp.sqrt(params["b"][1] + batch["x"]), 1)))
  return loss + hparams["l2"] * params["b"][0], {}


@pytest.mark.parametrize("microbatches", [1, 3])
def test_the_update_itself_says_which_leaf_was_not_finite(microbatches):
  """Nothing is computed again: the loss is traced once, and the update compiled once, for all."""
  traced = []

  def loss(*arguments):
    traced.append(1)
    return root_loss(*arguments)

  params = {"a": jnp.ones(()), "b": [jnp.ones(()), jnp.zeros(2)]}
  update = make_update(loss, optax.identity(), microbatches=microbatches)
  hparams = {"learning_rate": jnp.float32(0), "l2": jnp.float32(1)}
  good = {"x": jnp.ones((6, 2)), "w": jnp.ones(6)}
  bad = {**good, "x": good["x"].at[4, 0].set(0)}  # In the last of three microbatches.
  state, found, total = init_state(params, optax.identity()), [], {}
  for batch in (good, bad, good, bad):
    state, metrics = update(state, batch, hparams)
    assert np.isfinite(metrics["loss"][0])
    found.append(np.asarray(metrics["nonfinite_leaves"][0]).tolist())
    total = add_metrics(total, metrics)
  assert found == [[0, 0, 0], [0, 0, 1]] * 2
  assert name_nonfinite(state.params, found[1]) == "['b'][1]"
  assert len(traced) == 1 and update._cache_size() == 1
  # Of several updates it says how many of them; shapes will do for the names.
  assert finalize(total)["nonfinite_leaves"].tolist() == [0, 0, 0.5]
  shapes = jax.eval_shape(lambda: state.params)
  assert name_nonfinite(shapes, finalize(total)["nonfinite_leaves"]) == "['b'][1]"
  assert name_nonfinite(shapes, [1, 0, 1]) == "['a']"


def test_a_norm_may_overflow_though_every_leaf_is_finite():
  """1.5e19 squared is 2.25e38, which float32 holds; twice as much it does not."""
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  update = make_update(
    lambda p, batch, hparams: (jnp.sum(batch * (p["a"] + p["b"])), {}), optax.identity()
  )
  state, metrics = update(
    init_state(params, optax.identity()), jnp.full(1, 1.5e19), {"learning_rate": jnp.float32(1)}
  )
  assert int(state.skipped) == 1 and metrics["nonfinite_leaves"][0].tolist() == [0, 0]
  found = name_nonfinite(state.params, metrics["nonfinite_leaves"][0])
  assert found == "its norm, which overflows"


def test_parameters_are_counted():
  tree = {"a": jnp.zeros(2), "b": [jnp.ones(1), jnp.ones((1, 2))], "n": jnp.arange(2)}
  assert parameter_count(tree) == 7


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "sgd"])
def test_every_optimiser_goes_downhill(name):
  params, batch, hparams = make_problem()
  params = {"p": params["p"], "b": params["b"], "m": jnp.ones((4, 4))}
  optimizer = make_optimizer(name=name)
  update = make_update(regression_loss, optimizer)
  state, found = init_state(params, optimizer), []
  for _ in range(30):
    state, metrics = update(state, batch, hparams | {"learning_rate": jnp.float32(0.02)})
    found.append(float(metrics["loss"][0]))
  assert found[-1] < found[0] < 100


def test_muon_moves_a_matrix_along_its_singular_directions_alone():
  """Newton-Schulz leaves singular values near 1, where a gradient has them 100 apart."""
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  right, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  gradient = jnp.asarray(left @ np.diag([100, 50, 20, 10, 5, 1.0]) @ right, jnp.float32)
  grads = {"layer": {"weight": gradient}, "embed": {"embedding": gradient}}
  optimizer = make_optimizer(name="muon", max_grad_norm=0)
  moved, _ = optimizer.update(grads, optimizer.init(grads), grads)
  values = np.linalg.svd(np.asarray(moved["layer"]["weight"]), compute_uv=False)
  assert values.max() / values.min() < 3
  assert np.sum(np.asarray(moved["layer"]["weight"]) * np.asarray(gradient)) > 0
  sizes = np.asarray(moved["embed"]["embedding"]) * np.sign(gradient)  # Adam: one size for all.
  np.testing.assert_allclose(sizes, sizes.mean(), rtol=1e-4)
  assert sizes.mean() > 0


@pytest.mark.parametrize(
  ("decayed", "names"),
  [("matrices", {"weight", "embedding"}), ("layers", {"weight"}), ("all", None)],
)
def test_what_decays_is_what_was_asked_for(decayed, names):
  params = {"a": {"weight": jnp.ones((2, 2)), "scale": jnp.ones(2)}}
  params["embed"] = {"embedding": jnp.ones((2, 2))}
  optimizer = make_optimizer(name="sgd", weight_decay=0.5, decayed=decayed)
  zeros = jax.tree.map(jnp.zeros_like, params)
  moved, _ = optimizer.update(zeros, optimizer.init(params), params)
  found = {key for part in moved.values() for key, x in part.items() if np.all(x == 0.5)}
  assert found == (names or {"weight", "scale", "embedding"})


def test_a_reference_moves_towards_the_policy():
  old, new = {"p": jnp.array([0.0, 4.0])}, {"p": jnp.array([1.0, 0.0])}
  assert moved_towards(old, new, keep=0.75)["p"].tolist() == [0.25, 3.0]
