"""What a response, or each of its tokens, is worth: GRPO's groups and GAE."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp

from rl_llm import advantages
from rl_llm.errors import ConfigError
from rl_llm.explain.explanation import Curve, Explanation, Figure, Text
from rl_llm.masked import masked_mean, masked_var


def grpo(
  *, rewards: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0), scale: Literal["std", "none"] = "std"
) -> Explanation:
  """GRPO's advantages: the responses to one prompt, compared with each other.

  >>> values = grpo(rewards=(1.0, 0.0, 0.0, 0.0)).values
  >>> [round(a, 2) for a in values["advantages"]], values["mean"], round(values["std"], 3)
  ([1.5, -0.5, -0.5, -0.5], 0.25, 0.5)

  Args:
    rewards: one for each response to the prompt, two or more, separated by commas.
    scale: "std" divides by the group's standard deviation (GRPO), "none" does not (Dr. GRPO).

  Returns:
    The explanation; its figure is reward and advantage of each response.
  """
  if len(rewards) < 2:
    shown = ",".join(f"{each:g}" for each in rewards)
    raise ConfigError("rewards", shown, "two rewards or more", "try --rewards=1,0,0,0")
  group = jnp.array([rewards], jnp.float32)
  everyone = jnp.ones_like(group, bool)
  advantage = advantages.group_relative(group, scale=scale)[0].tolist()
  centred = advantages.group_relative(group, scale="none")[0].tolist()
  values = {
    "rewards": tuple(map(float, rewards)),
    "mean": float(masked_mean(group, everyone)),
    "differences": tuple(centred),
    "std": float(jnp.sqrt(masked_var(group, everyone, ddof=1))),
    "advantages": tuple(advantage),
    "leave_one_out": tuple(advantages.leave_one_out(group)[0].tolist()),
  }
  numbers = list(range(1, len(rewards) + 1))

  def figure():
    return Figure(
      Text("response", "応答"),
      (
        Curve(Text("reward", "報酬"), numbers, rewards),
        Curve(Text("advantage", "アドバンテージ"), numbers, advantage),
      ),
      (),
      stepped=True,
    )

  lines = _grpo_lines(scale, bool(advantages.informative_groups(group)[0]))
  title = Text("GRPO: the responses to one prompt", "GRPO：一つのプロンプトへの応答")
  return Explanation(title, values, lines, figure)


def _grpo_lines(scale: str, informative: bool) -> tuple[Text, ...]:
  divided = {
    "std": Text(
      "advantages = differences / (spread + 1e-6) = {advantages}",
      "アドバンテージ = 差 / (標準偏差 + 1e-6) = {advantages}",
    ),
    "none": Text(
      "advantages = the differences, not divided: {advantages}",
      "アドバンテージ = 差のまま（割らない）：{advantages}",
    ),
  }
  if informative:
    last = Text(
      "Every token of a response has its response's advantage: above 0 it becomes likelier, below "
      "0 rarer.",
      "応答の全トークンがその応答のアドバンテージを持つ。正なら確率は上がり、負なら下がる。",
    )
  else:
    last = Text(
      "All rewards are equal, so this group teaches nothing, right or wrong.",
      "報酬がすべて等しいので、正解でも不正解でも、このグループからは何も学習されない。",
    )
  return (
    Text("rewards = {rewards}", "報酬 = {rewards}"),
    Text("mean = {mean}", "平均 = {mean}"),
    Text("differences from the mean = {differences}", "平均との差 = {differences}"),
    Text(
      "spread (standard deviation, G - 1 in the denominator) = {std}",
      "標準偏差（分母は G - 1）= {std}",
    ),
    divided[scale],
    Text(
      "for comparison, RLOO (each against the mean of the others) = {leave_one_out}",
      "参考：RLOO（自分以外の平均との差）= {leave_one_out}",
    ),
    last,
  )


_GAE_LINES = (
  Text("rewards r = {rewards}", "報酬 r = {rewards}"),
  Text("values V = {values}", "価値 V = {values}"),
  Text(
    "surprises delta_t = r_t + {discount} * V_(t+1) - V_t = {surprises}",
    "TD 誤差 δ_t = r_t + {discount} * V_(t+1) - V_t = {surprises}",
  ),
  Text(
    "advantages A_t = delta_t + {discount} * {gae_lambda} * A_(t+1) = {advantages}",
    "アドバンテージ A_t = δ_t + {discount} * {gae_lambda} * A_(t+1) = {advantages}",
  ),
  Text(
    "returns A + V, the value network's targets = {returns}",
    "リターン A + V（価値ネットワークの目標）= {returns}",
  ),
  Text(
    "with lambda 1, the sampled return minus V: {sampled}",
    "λ が 1 なら、サンプルしたリターンから V を引いたもの：{sampled}",
  ),
  Text(
    "The closer lambda is to 1, the less the value network's errors and the more the noise of "
    "sampling counts.",
    "λ が 1 に近いほど、価値ネットワークの誤差の影響は減り、サンプリングのばらつきは増える。",
  ),
)


def gae(
  *,
  rewards: tuple[float, ...] = (0.0, 0.0, 1.0),
  values: tuple[float, ...] = (0.4, 0.6, 0.8),
  discount: float = 1.0,
  gae_lambda: float = 0.95,
) -> Explanation:
  """Generalised advantage estimation along the tokens of one response.

  >>> found = gae(rewards=(0.0, 1.0), values=(0.4, 0.6), gae_lambda=0.5).values
  >>> [round(a, 3) for a in found["advantages"]], [round(d, 3) for d in found["surprises"]]
  ([0.4, 0.4], [0.2, 0.4])

  Args:
    rewards: what each token earned, separated by commas; usually 0 until the last.
    values: what the value network expected before each token, as many.
    discount: of what comes later, between 0 and 1.
    gae_lambda: how far a surprise is passed back, between 0 and 1.

  Returns:
    The explanation; its figure is values, advantages and returns of each token.
  """
  if not rewards or len(rewards) != len(values):
    shown = ",".join(f"{each:g}" for each in values)
    allowed = f"as many numbers as --rewards has, {len(rewards)}"
    raise ConfigError("values", shown, allowed, "try --rewards=0,0,1 --values=0.4,0.6,0.8")
  arrays = jnp.array([rewards], jnp.float32), jnp.array([values], jnp.float32)
  mask = jnp.ones((1, len(rewards)), bool)

  def of_lambda(gae_lambda):
    found = advantages.gae(*arrays, mask, discount=discount, gae_lambda=gae_lambda)
    return [tuple(each[0].tolist()) for each in found]

  advantage, returns = of_lambda(gae_lambda)
  numbers_of = {
    "rewards": tuple(map(float, rewards)),
    "values": tuple(map(float, values)),
    "discount": discount,
    "gae_lambda": gae_lambda,
    "surprises": of_lambda(0.0)[0],
    "advantages": advantage,
    "returns": returns,
    "sampled": of_lambda(1.0)[0],
  }
  title = Text("GAE: the tokens of one response", "GAE：一つの応答の各トークン")

  def figure():
    numbers = list(range(1, len(rewards) + 1))
    named = (
      (Text("value", "価値"), values),
      (Text("advantage", "アドバンテージ"), advantage),
      (Text("return", "リターン"), returns),
    )
    curves = [Curve(name, numbers, ys) for name, ys in named]
    return Figure(Text("token", "トークン"), curves, (), stepped=True)

  return Explanation(title, numbers_of, _GAE_LINES, figure)
