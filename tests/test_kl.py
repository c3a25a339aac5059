"""KL estimators against the exact KL of a vocabulary small enough to enumerate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import kl

POLICY = jnp.array([0.3, -0.4, 1.1, 0.0])
REFERENCE = jnp.array([-0.2, 0.5, 0.4, 0.1])
D = np.array([-1.5, 0.0, 0.7, 1e-3])


def log_p(logits):
  return jax.nn.log_softmax(logits)


def reverse_kl(logits):
  return jnp.sum(jnp.exp(log_p(logits)) * (log_p(logits) - log_p(REFERENCE)))


def forward_kl(logits):
  return jnp.sum(jnp.exp(log_p(REFERENCE)) * (log_p(REFERENCE) - log_p(logits)))


def expectation(per_token, sampled_from=POLICY):
  """logits -> sum over the vocabulary of p(token) * per_token, with the sampling held fixed."""
  p = jax.lax.stop_gradient(jnp.exp(log_p(sampled_from)))
  return lambda logits: jnp.sum(p * per_token(log_p(logits), log_p(REFERENCE)))


def test_estimators_match_their_formulas():
  ref = np.full(4, -2.0)
  np.testing.assert_allclose(kl.k1(D + ref, ref), D, atol=2e-7)
  np.testing.assert_allclose(kl.k2(D + ref, ref), D**2 / 2, atol=3e-7)
  np.testing.assert_allclose(kl.k3(D + ref, ref), np.exp(-D) + D - 1, rtol=1e-5, atol=3e-7)


def test_k1_and_k3_are_unbiased_and_k2_is_not():
  exact = reverse_kl(POLICY)
  np.testing.assert_allclose(expectation(kl.k1)(POLICY), exact, rtol=1e-5)
  np.testing.assert_allclose(expectation(kl.k3)(POLICY), exact, rtol=1e-5)
  assert abs(expectation(kl.k2)(POLICY) - exact) > 1e-3


def test_k3_is_never_negative_and_zero_at_equality():
  d = jnp.concatenate([jnp.linspace(-30, 30, 2001), jnp.logspace(-8, 0, 100), jnp.zeros(1)])
  zero = jnp.zeros_like(d)
  assert float(kl.k3(d, zero).min()) >= 0 and kl.k3(d, d).max() == 0
  assert np.isfinite(kl.k3(jnp.array([-1e4]), jnp.zeros(1))).all()


GRADIENTS = {"k1": lambda logits: jnp.zeros(()), "k2": reverse_kl, "k3": forward_kl}


@pytest.mark.parametrize("value, gradient", list(itertools.product(GRADIENTS, repeat=2)))
def test_expected_gradient_of_each_choice(value, gradient):
  """k1 has none, k2 that of the reverse KL, k3 that of the forward KL."""
  f = expectation(lambda a, b: kl.kl_penalty(a, b, value=value, gradient=gradient))
  np.testing.assert_allclose(f(POLICY), expectation(getattr(kl, value))(POLICY), rtol=1e-6)
  exact = jax.grad(GRADIENTS[gradient])(POLICY)
  np.testing.assert_allclose(jax.grad(f)(POLICY), exact, atol=1e-6)


@pytest.mark.parametrize("gradient, through", [("k3", True), ("k2", False)])
def test_importance_weights_give_the_reverse_gradient_off_policy(gradient, through):
  old = jnp.array([1.0, 0.2, -0.3, 0.4])

  def penalty(logprobs, ref_logprobs):
    ratio = jnp.exp(logprobs - log_p(old))
    ratio = ratio if through else jax.lax.stop_gradient(ratio)
    return kl.kl_penalty(logprobs, ref_logprobs, value="k3", gradient=gradient, ratio=ratio)

  f = expectation(penalty, sampled_from=old)
  np.testing.assert_allclose(f(POLICY), reverse_kl(POLICY), rtol=1e-5)
  np.testing.assert_allclose(jax.grad(f)(POLICY), jax.grad(reverse_kl)(POLICY), atol=1e-6)


def test_the_reference_receives_no_gradient():
  for f in (kl.k1, kl.k2, kl.k3, kl.kl_penalty):
    assert not np.any(jax.grad(lambda ref, f=f: f(POLICY, ref).sum())(REFERENCE))


def test_bfloat16_is_computed_in_float32():
  half = POLICY.astype(jnp.bfloat16)
  assert kl.k3(half, half).dtype == jnp.float32


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: kl.k1(POLICY, REFERENCE[:2]), r"ref_logprobs has shape \(2,\).*logprobs, \(4,\)"),
    (lambda: kl.k2(np.arange(4), REFERENCE), "logprobs has dtype int"),
    (lambda: kl.kl_penalty(POLICY, REFERENCE, value="k4"), "value is 'k4'.*'k3'"),
    (lambda: kl.kl_penalty(POLICY, REFERENCE, gradient="k3+"), "gradient is 'k3\\+'"),
    (lambda: kl.kl_penalty(POLICY, REFERENCE, ratio=jnp.ones(1)), "ratio has shape"),
  ],
)
def test_errors_name_the_argument(call, message):
  with pytest.raises(ValueError, match=message):
    call()
