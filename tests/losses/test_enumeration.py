"""What each estimator is on average: every response of a tiny policy listed, nothing sampled.

Three tokens, one of which ends the response, and at most three of them: 15 responses. Expectations
over responses, and over all 225 pairs of them, are then finite sums. The exact gradients come from
differentiating those sums, so they owe nothing to the estimators that are held to them.

`python -m tests.losses.test_enumeration` prints the tables of docs/estimators.md.
"""

import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_llm import advantages, kl, losses, weighting

END, VOCABULARY, LENGTH, GROUP = 2, 3, 3, 2
TOLERANCE = 3e-6  # eps 1e-6 against the smallest standard deviation of two rewards, 0.5 / sqrt(2)
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "estimators.md"
RNG = np.random.default_rng(0)


def responses(prefix=()):
  for token in range(VOCABULARY):
    response = (*prefix, token)
    done = token == END or len(response) == LENGTH
    yield from [response] if done else responses(response)


RESPONSES = list(responses())
N = np.array([len(y) for y in RESPONSES])
MASK = np.arange(LENGTH) < N[:, None]
# Each beginning has logits of its own, so the policy can be any distribution over responses.
CONTEXTS = sorted({y[:t] for y in RESPONSES for t in range(len(y))}, key=lambda c: (len(c), c))
CONTEXT = np.array(
  [[CONTEXTS.index(y[:t]) if t < len(y) else 0 for t in range(LENGTH)] for y in RESPONSES]
)
TOKEN = np.array([[*y, *[0] * (LENGTH - len(y))] for y in RESPONSES])
REWARD = np.array([(y.count(0) == 1) + 0.5 * (y[-1] == END) for y in RESPONSES])

LOGITS = RNG.normal(size=(len(CONTEXTS), VOCABULARY))
LOGP = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
REFERENCE = LOGP + RNG.normal(scale=0.7, size=LOGP.shape)
REFERENCE -= np.log(np.exp(REFERENCE).sum(1, keepdims=True))
LOGPROBS = np.where(MASK, LOGP[CONTEXT, TOKEN], 0)
REF_LOGPROBS = np.where(MASK, REFERENCE[CONTEXT, TOKEN], 0)
PROBABILITY = np.exp(LOGPROBS.sum(1))
ENTROPY = -np.sum(np.exp(LOGP) * LOGP, axis=1)
ENTROPIES = np.where(MASK, ENTROPY[CONTEXT], 0)

# What a value network might say of each context, and of the one after each token: the reward, there
# where the response ends.
WRONG_VALUE = RNG.uniform(size=len(CONTEXTS))
NEXT_VALUE = np.array(
  [
    [
      REWARD[RESPONSES.index((*c, v))]
      if (*c, v) in RESPONSES
      else WRONG_VALUE[CONTEXTS.index((*c, v))]
      for v in range(VOCABULARY)
    ]
    for c in CONTEXTS
  ]
)

# The chain rule by hand: [15, T, contexts, V], derivatives by the logits z of a token's context,
#   d log p(token) / d z_v = 1[v = token] - p_v        d entropy / d z_v = -p_v (log p_v + entropy)
SCORES = np.zeros((len(RESPONSES), LENGTH, *LOGITS.shape))
ENTROPY_SLOPES = np.zeros_like(SCORES)
for i, t in zip(*np.nonzero(MASK), strict=True):
  c = CONTEXT[i, t]
  SCORES[i, t, c] = np.eye(VOCABULARY)[TOKEN[i, t]] - np.exp(LOGP[c])
  ENTROPY_SLOPES[i, t, c] = -np.exp(LOGP[c]) * (LOGP[c] + ENTROPY[c])


def expectations(logits):
  """The sums over all responses whose exact gradients are wanted."""
  logp = jax.nn.log_softmax(logits)
  tokens = jnp.where(MASK, logp[CONTEXT, TOKEN], 0)
  p = jnp.exp(tokens.sum(1))
  here = jax.lax.stop_gradient(p)  # as if the way to each context did not depend on the policy

  def contexts_fixed(per_context):
    return jnp.sum(here[:, None] * jnp.where(MASK, per_context[CONTEXT], 0))

  return {
    "reward": p @ REWARD,
    "reward / length": p @ (REWARD / N),
    "1 / length": p @ (1 / N),
    "wins - losses": p @ np.sign(REWARD[:, None] - REWARD) @ here,
    "lead / tokens": p @ (2 * (REWARD[:, None] - REWARD) / (N[:, None] + N)) @ here,
    "share of lead": p @ (N * (REWARD[:, None] - REWARD) / (N[:, None] + N)) @ here,
    "best of two": p @ np.maximum(REWARD[:, None], REWARD) @ p,
    "next value, contexts fixed": contexts_fixed(jnp.sum(jnp.exp(logp) * NEXT_VALUE, 1)),
    "kl": p @ (tokens - REF_LOGPROBS).sum(1),
    "entropy": -p @ tokens.sum(1),
    "kl, contexts fixed": contexts_fixed(jnp.sum(jnp.exp(logp) * (logp - REFERENCE), 1)),
    "forward kl, contexts fixed": contexts_fixed(
      jnp.sum(np.exp(REFERENCE) * (REFERENCE - logp), 1)
    ),
    "entropy, contexts fixed": contexts_fixed(-jnp.sum(jnp.exp(logp) * logp, 1)),
  }


@functools.cache
def exact():
  """({name: value}, {name: gradient}) of `expectations`."""
  with jax.enable_x64(True):
    f = lambda logits: (expectations(logits),) * 2  # noqa: E731
    gradients, values = jax.jit(jax.jacrev(f, has_aux=True))(LOGITS)
    return jax.tree.map(np.asarray, (values, gradients))


def true_values():
  """[15, T]: the reward still expected before each token is chosen."""
  return np.array(
    [
      [
        PROBABILITY
        @ np.where([z[:t] == y[:t] for z in RESPONSES], REWARD, 0)
        / sum(PROBABILITY[j] for j, z in enumerate(RESPONSES) if z[:t] == y[:t])
        if t < len(y)
        else 0
        for t in range(LENGTH)
      ]
      for y in RESPONSES
    ]
  )


def sampled(loss, group=GROUP, trained=LOGPROBS, slopes=SCORES):
  """(probabilities [K], gradients [K, parameters]) of a loss over all K groups of responses."""
  groups = np.array(list(itertools.product(range(len(RESPONSES)), repeat=group)))
  with jax.enable_x64(True):
    by_token = jax.jit(jax.vmap(jax.grad(lambda x, y: loss(x, y)[0])))(trained[groups], groups)
  gradients = np.einsum("kgt,kgtcv->kcv", np.asarray(by_token), slopes[groups])
  return PROBABILITY[groups].prod(axis=1), gradients.reshape(len(groups), -1)


def moments(probabilities, gradients):
  """Exact mean, and exact variance summed over the parameters."""
  mean = probabilities @ gradients
  return mean, probabilities @ np.square(gradients - mean).sum(axis=1)


# In the losses below, y are the indices [G] of a group's responses: traced, hence jnp.asarray.
def take(x, y):
  return jnp.asarray(x)[y]


def reinforce(advantage, weights=weighting.sequence_sum):
  return lambda x, y: losses.reinforce_loss(x, advantage(y), weights(take(MASK, y)))


def of_group(f, **keywords):
  return lambda y: f(take(REWARD, y)[None], **keywords)[0]


def opo(y):
  return advantages.opo(take(REWARD, y)[None], take(N, y)[None])[0]


def gae_of(values, gae_lambda):
  def advantage(y):
    rewards = advantages.token_rewards(take(REWARD, y), take(MASK, y))
    return advantages.gae(rewards, take(values, y), take(MASK, y), gae_lambda=gae_lambda)[0]

  return advantage


def kl_as_reward(y):
  price = kl.k1(take(LOGPROBS, y), take(REF_LOGPROBS, y))
  rewards = advantages.token_rewards(0 * take(REWARD, y), take(MASK, y), kl=price, kl_coef=1.0)
  return advantages.discounted_returns(rewards, take(MASK, y))


def kl_term(gradient, value="k3", ratio=False):
  def loss(x, y):
    ratios = jnp.exp(x - take(LOGPROBS, y)) if ratio else None
    return losses.kl_loss(
      x,
      take(REF_LOGPROBS, y),
      weighting.sequence_sum(take(MASK, y)),
      value=value,
      gradient=gradient,
      ratio=ratios,
    )

  return loss


def entropy_term(x, y):
  return losses.entropy_loss(x, weighting.sequence_sum(take(MASK, y)))


def ppo(x, y):
  old = take(LOGPROBS, y)
  return losses.ppo_loss(x, old, RLOO(y), weighting.sequence_sum(take(MASK, y)))


RLOO = of_group(advantages.leave_one_out)
CENTRED = of_group(advantages.group_relative, scale="none")
SCALED = of_group(advantages.group_relative, scale="std")
THIRD = functools.partial(weighting.constant_length, length=LENGTH)
VALUES = true_values()
WRONG_VALUES = np.where(MASK, WRONG_VALUE[CONTEXT], 0)

# estimator, loss, which exact gradient its mean should be compared with, and what its mean is: a
# list of (factor, name in `expectations`), derived on paper.
J = exact()[0]["reward"]
ROWS = [
  ("REINFORCE", reinforce(lambda y: take(REWARD, y)), "reward", "yes", [(-1, "reward")]),
  (
    "REINFORCE, constant baseline 0.7",
    reinforce(lambda y: take(REWARD, y) - 0.7),
    "reward",
    "yes",
    [(-1, "reward")],
  ),
  ("leave-one-out baseline (RLOO)", reinforce(RLOO), "reward", "yes", [(-1, "reward")]),
  ("PPO at ratio 1, the same baseline", ppo, "reward", "yes", [(-1, "reward")]),
  (
    "group mean as baseline (Dr. GRPO)",
    reinforce(CENTRED),
    "reward",
    "half of it: (G - 1) / G",
    [(-1 / 2, "reward")],
  ),
  (
    "group mean and std (GRPO)",
    reinforce(SCALED),
    "reward",
    "no: that of winning against itself",
    [(-1 / math.sqrt(2), "wins - losses")],
  ),
  (
    "length-weighted mean as baseline (OPO)",
    reinforce(opo),
    "reward",
    "no: that of a share of the lead",
    [(-1, "share of lead")],
  ),
  (
    "pass@k with k = 2",
    reinforce(of_group(advantages.pass_at_k)),
    "best of two",
    "half of it: 1 / G",
    [(-1 / 2, "best of two")],
  ),
  (
    "RLOO, `constant_length` 3",
    reinforce(RLOO, THIRD),
    "reward",
    "a third of it",
    [(-1 / 3, "reward")],
  ),
  (
    "REINFORCE, `sequence_mean`",
    reinforce(lambda y: take(REWARD, y), weighting.sequence_mean),
    "reward",
    "no: E[R / n]",
    [(-1, "reward / length")],
  ),
  (
    "RLOO, `sequence_mean`",
    reinforce(RLOO, weighting.sequence_mean),
    "reward",
    "no: E[R / n] - E[R] E[1 / n]",
    [(-1, "reward / length"), (J, "1 / length")],
  ),
  (
    "RLOO, `token_mean`",
    reinforce(RLOO, weighting.token_mean),
    "reward",
    "no: that of the lead per token",
    [(-1, "lead / tokens")],
  ),
  (
    "GAE, lambda 1, wrong values",
    reinforce(gae_of(WRONG_VALUES, 1.0)),
    "reward",
    "yes",
    [(-1, "reward")],
  ),
  (
    "GAE, lambda 0, wrong values",
    reinforce(gae_of(WRONG_VALUES, 0.0)),
    "reward",
    "no: that of the next value",
    [(-1, "next value, contexts fixed")],
  ),
  ("GAE, lambda 0, true values", reinforce(gae_of(VALUES, 0.0)), "reward", "yes", [(-1, "reward")]),
  ("k1 in the reward", reinforce(kl_as_reward), "kl", "yes", [(1, "kl")]),
  ("`kl_loss`, gradient k1", kl_term("k1"), "kl", "no: zero", []),
  ("`kl_loss`, gradient k2", kl_term("k2"), "kl", "contexts fixed", [(1, "kl, contexts fixed")]),
  (
    "`kl_loss`, gradient k3",
    kl_term("k3"),
    "kl",
    "no: forward KL, contexts fixed",
    [(1, "forward kl, contexts fixed")],
  ),
  (
    "`kl_loss`, ratio * k3",
    kl_term("k3", ratio=True),
    "kl",
    "contexts fixed",
    [(1, "kl, contexts fixed")],
  ),
  ("`entropy_loss`", entropy_term, "entropy", "contexts fixed", [(-1, "entropy, contexts fixed")]),
]


@functools.cache
def measured(name):
  loss = next(row[1] for row in ROWS if row[0] == name)
  if loss is entropy_term:
    return moments(*sampled(loss, trained=ENTROPIES, slopes=ENTROPY_SLOPES))
  return moments(*sampled(loss))


def target(terms):
  return sum((factor * exact()[1][name].reshape(-1) for factor, name in terms), np.zeros(21))


def direction(of):
  """The exact gradient of a loss whose descent raises the reward or entropy, or lowers the KL."""
  return target([(1 if of == "kl" else -1, of)])


def bias(mean, of):
  return np.linalg.norm(mean - direction(of)) / np.linalg.norm(direction(of))


def angle(mean, of):
  """Degrees between the mean and what it should be: what no learning rate can repair."""
  cosine = mean @ direction(of) / np.linalg.norm(mean) / np.linalg.norm(direction(of))
  return math.degrees(math.acos(min(cosine, 1.0)))


def estimator_table():
  lines = [
    "| estimator | gradient of | is its mean that? | bias | angle | variance | noise |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, _, of, verdict, terms in ROWS:
    mean, variance = measured(name)
    turned = f"{angle(mean, of):.0f}°" if terms else "none"
    noise = f"{variance / (mean @ mean):.1f}" if terms else "all"
    cells = name, of, verdict, f"{bias(mean, of):.0%}", turned, f"{variance:.3f}", noise
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def kl_values(estimator):
  """Exact mean and variance of an estimate of the KL from one response."""
  with jax.enable_x64(True):
    per_token = np.asarray(estimator(LOGPROBS, REF_LOGPROBS))
  return moments(PROBABILITY, per_token.sum(1, keepdims=True))


def value_table():
  lines = ["| estimate from one response | mean | variance |", "|---|---|---|"]
  for name, estimator in (("k1", kl.k1), ("k2", kl.k2), ("k3", kl.k3)):
    mean, variance = kl_values(estimator)
    lines.append(f"| {name} | {mean[0]:.3f} | {variance:.3f} |")
  return "\n".join([*lines, f"| the KL itself | {exact()[0]['kl']:.3f} | |"])


def test_the_world_is_complete():
  assert len(RESPONSES) == 15 and len(CONTEXTS) == 7 and sorted(set(N)) == [1, 2, 3]
  np.testing.assert_allclose(PROBABILITY.sum(), 1)
  np.testing.assert_allclose(exact()[0]["reward"], VALUES[0, 0])  # the value of the empty context


@pytest.mark.parametrize(
  "name, of, verdict, terms",
  [(name, of, verdict, terms) for name, _, of, verdict, terms in ROWS],
  ids=[r[0] for r in ROWS],
)
def test_the_mean_is_what_was_derived(name, of, verdict, terms):
  mean, _ = measured(name)
  np.testing.assert_allclose(mean, target(terms), atol=TOLERANCE)
  assert (verdict == "yes") == np.allclose(mean, direction(of), atol=TOLERANCE)
  if terms:
    assert (verdict == "yes" or "of it" in verdict) == (angle(mean, of) < 0.01)


@pytest.mark.parametrize("advantage, factor", [(RLOO, 1), (CENTRED, 2 / 3)])
def test_groups_of_three(advantage, factor):
  mean, _ = moments(*sampled(reinforce(advantage), group=3))
  np.testing.assert_allclose(mean, factor * direction("reward"), atol=1e-6)


def test_with_rewards_of_two_values_the_std_only_rescales():
  """Why GRPO's bias is often missed: right or wrong, its mean points where it should."""
  right = (REWARD > 1).astype(float)
  advantage = lambda y: advantages.group_relative(take(right, y)[None])[0]  # noqa: E731
  mean, _ = moments(*sampled(reinforce(advantage)))
  slope = np.einsum("i,itcv->cv", PROBABILITY * right, SCORES).reshape(-1)
  np.testing.assert_allclose(mean, -slope / math.sqrt(2), atol=1e-5)


def test_variances_by_hand():
  """Of a mean of G independent terms A * score: (E[A^2 |score|^2] - |gradient|^2) / G."""
  squares = np.square(SCORES.sum(axis=1)).sum(axis=(1, 2))
  for name, baseline in (("REINFORCE", 0), ("REINFORCE, constant baseline 0.7", 0.7)):
    advantage = REWARD - baseline
    expected = PROBABILITY @ (advantage**2 * squares) - direction("reward") @ direction("reward")
    np.testing.assert_allclose(measured(name)[1], expected / GROUP, rtol=1e-6)


def test_which_variance_is_smaller():
  variance = {name: measured(name)[1] for name, *_ in ROWS}
  assert variance["leave-one-out baseline (RLOO)"] < variance["REINFORCE"]
  assert variance["PPO at ratio 1, the same baseline"] == pytest.approx(
    variance["leave-one-out baseline (RLOO)"]
  )
  assert variance["GAE, lambda 0, true values"] < variance["GAE, lambda 1, wrong values"]
  assert variance["k1 in the reward"] > variance["`kl_loss`, gradient k2"]
  assert variance["`kl_loss`, gradient k1"] > 0  # noise alone


def test_contexts_fixed_is_exact_where_nothing_follows():
  """What `contexts fixed` leaves out is the way a token changes which contexts come later."""
  last = [len(c) == LENGTH - 1 for c in CONTEXTS]
  for name in ("kl", "entropy"):
    full, fixed = exact()[1][name], exact()[1][f"{name}, contexts fixed"]
    np.testing.assert_allclose(full[last], fixed[last], atol=1e-12)
    assert np.abs(full - fixed).max() > 0.01


@pytest.mark.parametrize("gradient", kl.ESTIMATORS)
def test_the_value_reported_has_no_part_in_the_gradient(gradient):
  f = lambda x, y: sum(kl_term(gradient, value)(x, y)[0] for value in kl.ESTIMATORS) / 3  # noqa: E731
  together = moments(*sampled(lambda x, y: (f(x, y), None), group=1))
  alone = moments(*sampled(kl_term(gradient), group=1))
  np.testing.assert_allclose(together[0], alone[0], atol=1e-7)
  np.testing.assert_allclose(together[1], alone[1], rtol=1e-6)


def test_k1_and_k3_are_unbiased_as_values_and_k2_is_not():
  truth = exact()[0]["kl"]
  for estimator, unbiased in ((kl.k1, True), (kl.k2, False), (kl.k3, True)):
    mean, _ = kl_values(estimator)
    assert np.isclose(mean[0], truth, atol=1e-6) == unbiased
  assert kl_values(kl.k3)[1] < kl_values(kl.k1)[1]


@pytest.mark.parametrize("table", [estimator_table, value_table])
def test_the_page_shows_these_numbers(table):
  """If this fails, paste what `python -m tests.losses.test_enumeration` prints into the page."""
  assert table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
  print(estimator_table(), value_table(), sep="\n\n")
