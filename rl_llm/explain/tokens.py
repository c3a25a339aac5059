"""What one sampled token contributes: REINFORCE, PPO, and the ways to limit its ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import losses
from rl_llm.advantages import remax
from rl_llm.explain.explanation import Curve, Explanation, Figure, Text, check_probability
from rl_llm.logprobs import token_logprobs

_RATIOS = tuple(np.round(np.arange(0.05, 2.0001, 0.01), 2).tolist())

_REINFORCE_LINES = (
  Text(
    "advantage A = reward - baseline = {reward} - {baseline} = {advantage}",
    "アドバンテージ A = 報酬 - ベースライン = {reward} - {baseline} = {advantage}",
  ),
  Text("log p = log {p} = {logprob}", "log p = log {p} = {logprob}"),
  Text(
    "loss = -A * log p = {loss}      (A is a coefficient; log p is differentiated)",
    "損失 = -A * log p = {loss}      （A は係数であり、微分されるのは log p だけである）",
  ),
  Text("slope of the loss in log p = -A = {slope}", "log p に関する損失の傾き = -A = {slope}"),
  Text(
    "slope in the token's own logit = -A * (1 - p) = {logit_slope}",
    "そのトークンのロジットに関する傾き = -A * (1 - p) = {logit_slope}",
  ),
  Text(
    "the same token as a label, cross-entropy: slope {supervised_slope}; REINFORCE is that, "
    "times {advantage}",
    "同じトークンを正解ラベルとした交差エントロピーの傾き = {supervised_slope}。"
    "REINFORCE はその {advantage} 倍である",
  ),
)


def reinforce(*, p: float = 0.25, reward: float = 3.0, baseline: float = 0.0) -> Explanation:
  """REINFORCE on one sampled token: supervised learning, times a number.

  >>> values = reinforce(p=0.25, reward=3.0, baseline=1.5).values
  >>> values["advantage"], values["logit_slope"], values["supervised_slope"]
  (1.5, -1.125, -0.75)

  Args:
    p: probability that the policy gave the token, above 0 and below 1.
    reward: what the response earned.
    baseline: what was expected; 0 is none.

  Returns:
    The explanation; its figure is the slope in the token's logit over p.
  """
  check_probability("p", p)
  one = jnp.ones((1, 1))
  advantage = remax(jnp.array([[float(reward)]]), jnp.array([float(baseline)]))[0]

  def of_logits(logits, loss):
    return loss(token_logprobs(logits[None], jnp.zeros((1, 1), int)[0])[None])

  def policy_loss(logprobs):
    return losses.reinforce_loss(logprobs, advantage, one)[0]

  def supervised_loss(logprobs):
    return losses.sft_loss(logprobs, one)[0]

  def logit_slopes(p):
    logits = jnp.log(jnp.stack([p, 1 - p]))
    return tuple(jax.grad(of_logits)(logits, f)[0] for f in (policy_loss, supervised_loss))

  logprob = jnp.log(jnp.array([[p]]))
  loss, slope = jax.value_and_grad(policy_loss)(logprob)
  logit_slope, supervised_slope = map(float, logit_slopes(jnp.asarray(p)))
  values = {
    "p": p,
    "reward": reward,
    "baseline": baseline,
    "advantage": float(advantage[0]),
    "logprob": float(losses.reinforce_loss(logprob, advantage, one)[1]["logprob"][0]),
    "loss": float(loss),
    "slope": float(slope[0, 0]),
    "logit_slope": logit_slope,
    "supervised_slope": supervised_slope,
  }

  def figure():
    xs = np.arange(0.01, 0.995, 0.01)
    ours, supervised = map(np.ravel, jax.vmap(logit_slopes)(jnp.asarray(xs)))
    return Figure(
      Text("p, the probability of the sampled token", "サンプルしたトークンの確率 p"),
      (
        Curve(Text("slope, REINFORCE", "傾き（REINFORCE）"), xs, ours),
        Curve(Text("slope, supervised", "傾き（教師あり）"), xs, supervised),
      ),
      ((p, logit_slope),),
    )

  lines = (*_REINFORCE_LINES, _direction(values["slope"]))
  title = Text("REINFORCE: one sampled token", "REINFORCE：サンプルした一つのトークン")
  return Explanation(title, values, lines, figure)


def ppo(
  *,
  p_old: float = 0.5,
  p_new: float = 0.3,
  advantage: float = 1.0,
  clip_low: float = 0.2,
  clip_high: float = 0.2,
) -> Explanation:
  """PPO's clipped loss on one token: ratio, both branches, which one counts, and the slope.

  >>> values = ppo(p_old=0.5, p_new=0.3, advantage=1.0).values
  >>> [round(values[name], 3) for name in ("ratio", "unclipped", "clipped", "loss", "slope")]
  [0.6, -0.6, -0.8, -0.6, -0.6]

  Args:
    p_old: the token's probability when it was sampled, above 0 and below 1.
    p_new: its probability now, above 0 and below 1.
    advantage: how much better than expected its response was.
    clip_low: lower clip range, above 0.
    clip_high: upper clip range, above 0.

  Returns:
    The explanation; its figure is loss and slope over the ratio.
  """
  clips = {"clip_low": clip_low, "clip_high": clip_high}
  values = {"p_old": p_old, "p_new": p_new, "advantage": advantage, **clips}
  check_probability("p_old", p_old)
  check_probability("p_new", p_new)
  loss, slope, ratio = _tokens(losses.ppo_loss, [p_new], p_old, advantage, **clips)[0]
  # Without a bound only the first branch is left. The loss is the larger branch, and with the
  # advantage negated it is minus the smaller one.
  no_clip = {"clip_low": 1e9, "clip_high": 1e9}
  unclipped = _tokens(losses.ppo_loss, [p_new], p_old, advantage, **no_clip)[0][0]
  smaller = -_tokens(losses.ppo_loss, [p_new], p_old, -advantage, **clips)[0][0] + 0.0
  clipped = smaller if unclipped == loss else loss
  values |= {"ratio": ratio, "unclipped": unclipped, "clipped": clipped}
  values |= {"loss": loss, "slope": slope}

  def figure():
    ratios = [r for r in _RATIOS if r * p_old < 1]
    p_news = [r * p_old for r in ratios]
    curve = _tokens(losses.ppo_loss, p_news, p_old, advantage, **clips)
    return Figure(
      Text("ratio p_new / p_old", "比 p_new / p_old"),
      (
        Curve(Text("loss", "損失"), ratios, [each[0] for each in curve]),
        Curve(Text("slope in log p_new", "log p_new に関する傾き"), ratios, [e[1] for e in curve]),
      ),
      ((ratio, loss), (ratio, slope)),
    )

  lines = _ppo_lines(values)
  title = Text("PPO: one token, after the policy has moved", "PPO：方策が動いた後の一つのトークン")
  return Explanation(title, values, lines, figure)


def _ppo_lines(values: Mapping[str, float]) -> tuple[Text, ...]:
  if values["unclipped"] == values["clipped"]:
    counts = Text("the two are equal, the ratio is within the range", "両者は等しい（比が範囲内）")
  elif values["loss"] == values["unclipped"]:
    counts = Text("the first counts", "第一項が効く")
  else:
    counts = Text("the second counts, which is a constant", "第二項（定数）が効く")
  return (
    Text(
      "ratio = p_new / p_old = {p_new} / {p_old} = {ratio}",
      "比 = p_new / p_old = {p_new} / {p_old} = {ratio}",
    ),
    Text(
      "first term:  -ratio * A = -{ratio} * {advantage} = {unclipped}",
      "第一項：-比 * A = -{ratio} * {advantage} = {unclipped}",
    ),
    Text(
      "second term: -clip(ratio, 1 - {clip_low}, 1 + {clip_high}) * A = {clipped}",
      "第二項：-clip(比, 1 - {clip_low}, 1 + {clip_high}) * A = {clipped}",
    ),
    Text(
      f"loss = the larger of the two = {{loss}}: {counts.en}",
      f"損失 = 大きい方 = {{loss}}：{counts.ja}",
    ),
    Text("slope of the loss in log p_new = {slope}", "log p_new に関する損失の傾き = {slope}"),
    _after_clip(values["slope"], values["advantage"]),
  )


# name -> (loss, its keywords, what it does with a ratio)
_VARIANTS: dict[str, tuple[Callable, dict[str, float], Text]] = {
  "ppo": (losses.ppo_loss, {}, Text("clip at 1 +- 0.2", "1 ± 0.2 でクリップ")),
  "clip_higher": (
    losses.ppo_loss,
    {"clip_high": 0.28},
    Text("DAPO: the upper clip at 1 + 0.28", "DAPO：上側だけ 1 + 0.28"),
  ),
  "dual_clip": (
    losses.ppo_loss,
    {"dual_clip": 3.0},
    Text("and a bad token's loss stops at 3 * |A|", "加えて、悪いトークンの損失は 3 * |A| まで"),
  ),
  "cispo": (
    losses.cispo_loss,
    {},
    Text("the ratio is a constant of at most 5", "比を定数として扱い、5 を上限とする"),
  ),
  "sapo": (
    losses.sapo_loss,
    {},
    Text("the slope fades with the distance from 1", "1 から離れるほど傾きが滑らかに弱まる"),
  ),
  "dppo_tv": (
    losses.dppo_tv_loss,
    {},
    Text(
      "drops a token whose probability moved by over 0.15", "確率が 0.15 を超えて動いたら捨てる"
    ),
  ),
  "dppo_kl": (
    losses.dppo_kl_loss,
    {},
    Text("drops a token that moved by over 0.05 nats", "0.05 nat を超えて動いたら捨てる"),
  ),
}


def clip(*, p_old: float = 0.5, p_new: float = 0.3, advantage: float = 1.0) -> Explanation:
  """The same token under each way to limit its ratio: loss and slope.

  >>> values = clip(p_old=0.01, p_new=0.05, advantage=1.0).values
  >>> [round(values[f"{name}_slope"], 2) + 0 for name in ("ppo", "cispo", "dppo_tv")]
  [0.0, -5.0, -5.0]

  Args:
    p_old: the token's probability when it was sampled, above 0 and below 1.
    p_new: its probability now, above 0 and below 1.
    advantage: how much better than expected its response was.

  Returns:
    The explanation; its figure is each variant's slope over the ratio.
  """
  check_probability("p_old", p_old)
  check_probability("p_new", p_new)
  values = {"p_old": p_old, "p_new": p_new, "advantage": advantage}
  lines = []
  for name, (loss_function, keywords, said) in _VARIANTS.items():
    loss, slope, ratio = _tokens(loss_function, [p_new], p_old, advantage, **keywords)[0]
    values |= {f"{name}_loss": loss, f"{name}_slope": slope, "ratio": ratio}
    numbers = f"{{{name}_loss}}", f"{{{name}_slope}}"
    lines.append(
      Text(
        "{}: loss {}, slope {} ({})".format(name, *numbers, said.en),
        "{}：損失 {}、傾き {}（{}）".format(name, *numbers, said.ja),
      )
    )

  def figure():
    ratios = [r for r in _RATIOS[::2] if r * p_old < 1]
    p_news = [r * p_old for r in ratios]
    curves = []
    for name, (loss_function, keywords, _) in _VARIANTS.items():
      curve = _tokens(loss_function, p_news, p_old, advantage, **keywords)
      curves.append(Curve(Text(name, name), ratios, [each[1] for each in curve]))
    points = [(values["ratio"], values[f"{name}_slope"]) for name in _VARIANTS]
    return Figure(Text("ratio p_new / p_old", "比 p_new / p_old"), curves, points)

  zero = [name for name in _VARIANTS if values[f"{name}_slope"] == 0]
  names = ", ".join(zero)
  if advantage == 0:
    last = _direction(0.0)
  elif zero:
    last = Text(
      f"Without a slope, so no longer trained: {names}.", f"傾きが 0（学習しない）：{names}。"
    )
  else:
    last = Text("All of them still train this token.", "どの方式でも、まだ学習される。")
  lines = [
    Text(
      "ratio = p_new / p_old = {p_new} / {p_old} = {ratio}, advantage {advantage}",
      "比 = p_new / p_old = {p_new} / {p_old} = {ratio}、アドバンテージ {advantage}",
    ),
    *lines,
    last,
  ]
  title = Text(
    "One token, seven ways to limit its ratio (slopes in log p_new)",
    "一つのトークンと、比を制限する七つの方式（傾きは log p_new に関するもの）",
  )
  return Explanation(title, values, lines, figure)


def _tokens(
  loss: Callable, p_new: Sequence[float], p_old: float, advantage: float, **keywords: float
) -> list[tuple[float, float, float]]:
  """(loss, slope in log p_new, ratio) of one token with weight 1, for each p_new."""
  old, one = jnp.log(jnp.array([[p_old]])), jnp.ones((1, 1))

  def of_token(logprob):
    value, metrics = loss(
      logprob * one, old, jnp.array([float(advantage)]), one, mask=one > 0, **keywords
    )
    return value, metrics["ratio"][0]

  (values, ratios), slopes = jax.vmap(jax.value_and_grad(of_token, has_aux=True))(
    jnp.log(jnp.array(p_new, jnp.float32))
  )
  rows = zip(values.tolist(), slopes.tolist(), ratios.tolist(), strict=True)
  return [(value, slope + 0.0, ratio) for value, slope, ratio in rows]


def _direction(slope: float) -> Text:
  if slope == 0:
    return Text("An advantage of 0 teaches nothing.", "アドバンテージが 0 なら、何も学習されない。")
  if slope < 0:
    return Text(
      "A step down this slope makes the token likelier.",
      "この傾きを下ると、このトークンの確率は上がる。",
    )
  return Text(
    "A step down this slope makes the token rarer.",
    "この傾きを下ると、このトークンの確率は下がる。",
  )


def _after_clip(slope: float, advantage: float) -> Text:
  """What PPO's slope will do, in words."""
  if advantage == 0:
    return _direction(0.0)
  if slope == 0 and advantage > 0:
    return Text(
      "It has already risen above 1 + {clip_high} times: this batch pushes it up no further.",
      "確率はすでに 1 + {clip_high} 倍を超えて上がった。このバッチではもう押し上げない。",
    )
  if slope == 0:
    return Text(
      "It has already fallen below 1 - {clip_low} times: this batch pushes it down no further.",
      "確率はすでに 1 - {clip_low} 倍を下回った。このバッチではもう押し下げない。",
    )
  said = _direction(slope)
  return Text(
    f"{said.en[:-1]}; it counts {{ratio}} times as much as at ratio 1.",
    f"{said.ja[:-1]}（強さは、比が 1 のときの {{ratio}} 倍）。",
  )
