"""What compares whole distributions: DPO's pairs, the KL's estimators, the entropy bonus."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import kl as estimators
from rl_llm import losses
from rl_llm.errors import ConfigError
from rl_llm.explain.explanation import (
  Curve,
  Explanation,
  Figure,
  Text,
  check_distribution,
  check_probability,
)
from rl_llm.logprobs import entropy as entropy_of
from rl_llm.logprobs import token_logprobs


def dpo(
  *,
  p_chosen: float = 0.1,
  p_rejected: float = 0.4,
  ref_chosen: float = 0.1,
  ref_rejected: float = 0.4,
  beta: float = 0.1,
) -> Explanation:
  """DPO's loss on one pair, with and without its reference.

  >>> values = dpo(p_chosen=0.1, p_rejected=0.4, ref_chosen=0.1, ref_rejected=0.4).values
  >>> round(values["loss"], 3), round(values["without_reference"], 3)
  (0.693, 0.765)

  Args:
    p_chosen: probability of the preferred response under the policy, above 0 and below 1.
    p_rejected: the same of the other response.
    ref_chosen: probability of the preferred response under the reference.
    ref_rejected: the same of the other response.
    beta: how much a log-ratio counts, above 0.

  Returns:
    The explanation; its figure is the loss over the probability of the preferred response.
  """
  probabilities = {
    "p_chosen": p_chosen,
    "p_rejected": p_rejected,
    "ref_chosen": ref_chosen,
    "ref_rejected": ref_rejected,
  }
  for name, p in probabilities.items():
    check_probability(name, p)
  rejected, ref, ref_other = (
    jnp.log(jnp.array([p])) for p in (p_rejected, ref_chosen, ref_rejected)
  )
  one = jnp.ones(1)

  def with_reference(pair, beta=beta):
    return losses.dpo_loss(pair[:1], pair[1:], ref, ref_other, one, beta=beta)

  def without(pair):
    return losses.cpo_loss(pair[:1], pair[1:], one, beta=beta, nll_coef=0.0)[0]

  pair = jnp.log(jnp.array([p_chosen, p_rejected]))
  (loss, metrics), slopes = jax.value_and_grad(with_reference, has_aux=True)(pair)
  ratios = with_reference(pair, 1.0)[1]  # beta 1: the rewards are the log-ratios themselves
  values = {
    **probabilities,
    "beta": beta,
    "chosen_log_ratio": float(ratios["chosen_reward"][0]),
    "rejected_log_ratio": float(ratios["rejected_reward"][0]),
    "margin": float(metrics["margin"][0]),
    "loss": float(loss),
    "preference": float(jnp.exp(-loss)),
    "chosen_slope": float(slopes[0]),
    "rejected_slope": float(slopes[1]),
    "without_reference": float(without(pair)),
  }

  def figure():
    xs = np.arange(0.01, 0.995, 0.01)
    chosen = jnp.log(jnp.asarray(xs, jnp.float32))
    pairs = jnp.stack([chosen, jnp.full(len(xs), rejected[0])], axis=1)
    both = [jax.vmap(f)(pairs).tolist() for f in (lambda pair: with_reference(pair)[0], without)]
    return Figure(
      Text("probability of the preferred response", "好まれた応答の確率"),
      (
        Curve(Text("loss, DPO", "損失（DPO）"), xs, both[0]),
        Curve(Text("loss without a reference", "損失（参照方策なし）"), xs, both[1]),
      ),
      ((p_chosen, values["loss"]), (p_chosen, values["without_reference"])),
    )

  return Explanation(
    Text("DPO: one pair of responses", "DPO：一組の応答"), values, _dpo_lines(values), figure
  )


def _dpo_lines(values) -> tuple[Text, ...]:
  if values["margin"] > 0:
    moved = Text("more than", "より強く好んでいる")
  elif values["margin"] < 0:
    moved = Text("less than", "ほどは好んでいない")
  else:
    moved = Text("just as much as", "と同じだけ好んでいる")
  return (
    Text(
      "log-ratio of the chosen = log({p_chosen} / {ref_chosen}) = {chosen_log_ratio}",
      "好まれた応答の対数比 = log({p_chosen} / {ref_chosen}) = {chosen_log_ratio}",
    ),
    Text(
      "log-ratio of the rejected = log({p_rejected} / {ref_rejected}) = {rejected_log_ratio}",
      "退けられた応答の対数比 = log({p_rejected} / {ref_rejected}) = {rejected_log_ratio}",
    ),
    Text(
      "margin = {beta} * (chosen - rejected) = {margin}",
      "マージン = {beta} * （前者 - 後者）= {margin}",
    ),
    Text(
      "sigmoid(margin), the modelled chance of this preference = {preference}",
      "sigmoid(マージン)、この選好が得られる確率のモデル値 = {preference}",
    ),
    Text("loss = -log of it = {loss}", "損失 = その -log = {loss}"),
    Text(
      "slopes in the two log-probs = {chosen_slope}, {rejected_slope}",
      "二つの対数確率に関する傾き = {chosen_slope}, {rejected_slope}",
    ),
    Text(
      "without the reference, the loss would be {without_reference} (CPO without its likelihood)",
      "参照方策がなければ損失は {without_reference}（尤度項を除いた CPO）",
    ),
    Text(
      f"The policy prefers the chosen response {moved.en} the reference does; a step raises the "
      "chosen and lowers the rejected by the same slope.",
      f"方策は好まれた応答を参照方策{moved.ja}。一歩進むと、同じ大きさの傾きで前者は上がり、"
      "後者は下がる。",
    ),
  )


_KL_LINES = (
  Text("policy = {policy}", "方策 = {policy}"),
  Text("reference = {reference}", "参照方策 = {reference}"),
  Text("KL(policy || reference) = {kl}", "KL(方策 || 参照方策) = {kl}"),
  Text(
    "its slope in the first outcome's logit = {slope}", "最初の事象のロジットに関する傾き = {slope}"
  ),
  *(
    Text(
      f"{name} of each outcome: {{{name}}}; mean {{{name}_mean}}; mean slope {{{name}_slope}}",
      f"{name}（各事象）：{{{name}}}、平均 {{{name}_mean}}、傾きの平均 {{{name}_slope}}",
    )
    for name in ("k1", "k2", "k3")
  ),
  Text(
    "As a value report k3 (right on average, never negative); as a loss differentiate k2 (its "
    "slope is the KL's).",
    "値としては k3 を報告し（平均が正しく、負にならない）、損失としては k2 を微分する"
    "（傾きが KL の傾きに一致する）。",
  ),
)


def kl(
  *, policy: tuple[float, ...] = (0.5, 0.5), reference: tuple[float, ...] = (0.25, 0.75)
) -> Explanation:
  """The KL's three estimators: their values, their means, and the means of their slopes.

  >>> values = kl(policy=(0.5, 0.5), reference=(0.25, 0.75)).values
  >>> [round(values[name], 3) + 0 for name in ("kl", "k1_slope", "k2_slope", "k3_slope", "slope")]
  [0.144, 0.0, 0.275, 0.25, 0.275]

  Args:
    policy: probability of each outcome, positive and 1 in all, separated by commas.
    reference: the same of the reference, as many.

  Returns:
    The explanation; its figure is each estimator over the log-ratio of the outcome.
  """
  check_distribution("policy", policy, "0.5,0.5")
  check_distribution("reference", reference, "0.25,0.75")
  if len(policy) != len(reference):
    shown = ",".join(f"{each:g}" for each in reference)
    raise ConfigError("reference", shown, f"{len(policy)} numbers, as many as --policy has")
  p, ref = jnp.array(policy, jnp.float32), jnp.log(jnp.array(reference, jnp.float32))
  outcomes = jnp.arange(len(policy))

  def mean(logits, k, weights):
    logprobs = token_logprobs(jnp.tile(logits, (len(policy), 1)), outcomes)
    return jnp.sum(weights(logprobs) * k(logprobs, ref))

  logits = jnp.log(p)
  # The KL itself: its derivative sees that the outcomes' frequencies move, too.
  exact, exact_slope = jax.value_and_grad(mean)(logits, estimators.k1, jnp.exp)
  values = {"policy": policy, "reference": reference}
  values |= {"kl": float(exact), "slope": float(exact_slope[0])}
  for name in ("k1", "k2", "k3"):
    k = getattr(estimators, name)
    values[name] = tuple(k(logits, ref).tolist())
    value, slope = jax.value_and_grad(mean)(logits, k, lambda _: p)
    values |= {f"{name}_mean": float(value), f"{name}_slope": float(slope[0]) + 0.0}

  def figure():
    ds = np.arange(-1.5, 1.501, 0.05)
    curves = [
      Curve(Text(name, name), ds, getattr(estimators, name)(jnp.asarray(ds), jnp.zeros(len(ds))))
      for name in ("k1", "k2", "k3")
    ]
    return Figure(
      Text("d = log policy - log reference of one outcome", "事象の d = log 方策 - log 参照方策"),
      curves,
      (),
    )

  lines = _KL_LINES
  title = Text("KL: one sample against all of them", "KL：一つのサンプルと全体")
  return Explanation(title, values, lines, figure)


def entropy(*, p: float = 0.75, gap: float = 1.0, coef: float = 0.5) -> Explanation:
  """The entropy bonus on two responses: how far it moves the optimum.

  The objective is p * gap + coef * H(p), where the better response, of probability p, earns `gap`
  more. Its maximum is the softmax of the rewards at temperature `coef`:

  >>> [round(entropy(coef=c).values["best"], 5) for c in (1.0, 0.5, 0.1)]
  [0.73106, 0.8808, 0.99995]

  Args:
    p: probability of the better response now, above 0 and below 1.
    gap: how much more it earns.
    coef: coefficient of the entropy, above 0.

  Returns:
    The explanation; its figure is the objective over p, with and without the bonus.
  """
  check_probability("p", p)
  if not coef > 0:
    raise ConfigError("coef", coef, "a number above 0", "try --coef=0.5")

  def bonus(logits):
    return -losses.entropy_loss(entropy_of(logits)[None, None], jnp.ones((1, 1)))[0]

  def reward(logits):
    return gap * jnp.exp(token_logprobs(logits, jnp.array(0)))

  def two(p):
    return jnp.log(jnp.stack([p, 1 - p]))

  def objective(p, coef):
    return reward(two(p)) + coef * bonus(two(p))

  now = two(jnp.asarray(p))
  best = jnp.exp(token_logprobs(jnp.array([float(gap), 0.0]), jnp.array(0), temperature=coef))
  values = {
    "p": p,
    "gap": gap,
    "coef": coef,
    "entropy": float(bonus(now)),
    "objective": float(objective(jnp.asarray(p), coef)),
    "reward_slope": float(jax.grad(reward)(now)[0]),
    "entropy_slope": float(jax.grad(bonus)(now)[0]),
    "slope": float(jax.grad(lambda x: reward(x) + coef * bonus(x))(now)[0]),
    "best": float(best),
    "best_entropy": float(entropy_of(jnp.array([float(gap), 0.0]), temperature=coef)),
  }

  def figure():
    xs = np.arange(0.01, 0.995, 0.01)
    named = (Text("with the bonus", "ボーナスあり"), coef), (Text("without", "なし"), 0.0)
    curves = [
      Curve(name, xs, jax.vmap(lambda p, c=c: objective(p, c))(jnp.asarray(xs)).tolist())
      for name, c in named
    ]
    return Figure(
      Text("p, the probability of the better response", "良い方の応答の確率 p"),
      curves,
      ((p, values["objective"]),),
    )

  title = Text("Entropy bonus: two responses", "エントロピーボーナス：二つの応答")
  return Explanation(title, values, _entropy_lines(values), figure)


def _entropy_lines(values) -> tuple[Text, ...]:
  if abs(values["slope"]) < 1e-6:
    last = Text(
      "p is at its optimum: the two forces cancel.", "p は最適点にあり、二つの力は釣り合う。"
    )
  elif values["slope"] > 0:
    last = Text(
      "The sum is above 0: p rises towards {best}.", "和は正であり、p は {best} に向かって上がる。"
    )
  else:
    last = Text(
      "The sum is below 0: p falls towards {best}, although the response is the better one.",
      "和は負であり、良い方の応答なのに p は {best} に向かって下がる。",
    )
  return (
    Text("entropy H(p) = {entropy} nats", "エントロピー H(p) = {entropy} nat"),
    Text(
      "objective p * gap + coef * H = {p} * {gap} + {coef} * {entropy} = {objective}",
      "目的関数 p * 差 + 係数 * H = {p} * {gap} + {coef} * {entropy} = {objective}",
    ),
    Text(
      "slope of p * gap in the logit = {reward_slope}",
      "p * 差 のロジットに関する傾き = {reward_slope}",
    ),
    Text("slope of H in the logit = {entropy_slope}", "H のロジットに関する傾き = {entropy_slope}"),
    Text(
      "sum of the slopes, the second times {coef} = {slope}",
      "傾きの和（後者は {coef} 倍）= {slope}",
    ),
    Text(
      "optimum p = sigmoid({gap} / {coef}) = {best}, where the entropy is {best_entropy}",
      "最適点 p = sigmoid({gap} / {coef}) = {best}、そのエントロピーは {best_entropy}",
    ),
    last,
  )
