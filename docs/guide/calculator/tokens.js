// What one sampled token contributes: REINFORCE, PPO, and the ways to limit its ratio.
//
// The calculator is `python -m rl_llm explain` in the page, without a server. A page cannot run the
// library, so its formulas and sentences stand here a second time; tests/test_calculator.py runs
// these files and compares each number and each sentence with rl_llm.explain, in both languages.
"use strict";

const sigmoid = (x) => 1 / (1 + Math.exp(-x));
const sum = (xs) => xs.reduce((total, x) => total + x, 0);
const mean = (xs) => sum(xs) / xs.length;

// Sentences are [English, Japanese]; {name} stands for a number.
const DIRECTIONS = {
  zero: ["An advantage of 0 teaches nothing.", "アドバンテージが 0 なら、何も学習されない。"],
  up: [
    "A step down this slope makes the token likelier.",
    "この傾きを下ると、このトークンの確率は上がる。",
  ],
  down: [
    "A step down this slope makes the token rarer.",
    "この傾きを下ると、このトークンの確率は下がる。",
  ],
};
const direction = (slope) => DIRECTIONS[slope === 0 ? "zero" : slope < 0 ? "up" : "down"];

function reinforce(v) {
  v.advantage = v.reward - v.baseline;
  v.logprob = Math.log(v.p);
  v.loss = -v.advantage * v.logprob;
  v.slope = -v.advantage;
  v.supervised_slope = -(1 - v.p);
  v.logit_slope = v.advantage * v.supervised_slope;
  return [
    [
      "advantage A = reward - baseline = {reward} - {baseline} = {advantage}",
      "アドバンテージ A = 報酬 - ベースライン = {reward} - {baseline} = {advantage}",
    ],
    ["log p = log {p} = {logprob}", "log p = log {p} = {logprob}"],
    [
      "loss = -A * log p = {loss}      (A is a coefficient; log p is differentiated)",
      "損失 = -A * log p = {loss}      （A は係数であり、微分されるのは log p だけである）",
    ],
    ["slope of the loss in log p = -A = {slope}", "log p に関する損失の傾き = -A = {slope}"],
    [
      "slope in the token's own logit = -A * (1 - p) = {logit_slope}",
      "そのトークンのロジットに関する傾き = -A * (1 - p) = {logit_slope}",
    ],
    [
      "the same token as a label, cross-entropy: slope {supervised_slope}; REINFORCE is that, times {advantage}",
      "同じトークンを正解ラベルとした交差エントロピーの傾き = {supervised_slope}。REINFORCE はその {advantage} 倍である",
    ],
    direction(v.slope),
  ];
}

function clipped(ratio, advantage, low, high) {
  const first = -ratio * advantage;
  const second = -Math.min(Math.max(ratio, 1 - low), 1 + high) * advantage;
  return { first, second, loss: Math.max(first, second), slope: first >= second ? first : 0 };
}

function ppo(v) {
  v.ratio = v.p_new / v.p_old;
  const found = clipped(v.ratio, v.advantage, v.clip_low, v.clip_high);
  [v.unclipped, v.clipped, v.loss, v.slope] = [found.first, found.second, found.loss, found.slope];
  const counts =
    found.first === found.second
      ? ["the two are equal, the ratio is within the range", "両者は等しい（比が範囲内）"]
      : found.first > found.second
        ? ["the first counts", "第一項が効く"]
        : ["the second counts, which is a constant", "第二項（定数）が効く"];
  return [
    [
      "ratio = p_new / p_old = {p_new} / {p_old} = {ratio}",
      "比 = p_new / p_old = {p_new} / {p_old} = {ratio}",
    ],
    [
      "first term:  -ratio * A = -{ratio} * {advantage} = {unclipped}",
      "第一項：-比 * A = -{ratio} * {advantage} = {unclipped}",
    ],
    [
      "second term: -clip(ratio, 1 - {clip_low}, 1 + {clip_high}) * A = {clipped}",
      "第二項：-clip(比, 1 - {clip_low}, 1 + {clip_high}) * A = {clipped}",
    ],
    [
      `loss = the larger of the two = {loss}: ${counts[0]}`,
      `損失 = 大きい方 = {loss}：${counts[1]}`,
    ],
    ["slope of the loss in log p_new = {slope}", "log p_new に関する損失の傾き = {slope}"],
    afterClip(v.slope, v.advantage),
  ];
}

function afterClip(slope, advantage) {
  if (advantage === 0) return DIRECTIONS.zero;
  if (slope === 0 && advantage > 0)
    return [
      "It has already risen above 1 + {clip_high} times: this batch pushes it up no further.",
      "確率はすでに 1 + {clip_high} 倍を超えて上がった。このバッチではもう押し上げない。",
    ];
  if (slope === 0)
    return [
      "It has already fallen below 1 - {clip_low} times: this batch pushes it down no further.",
      "確率はすでに 1 - {clip_low} 倍を下回った。このバッチではもう押し下げない。",
    ];
  const [english, japanese] = direction(slope).map((said) => said.slice(0, -1));
  return [
    `${english}; it counts {ratio} times as much as at ratio 1.`,
    `${japanese}（強さは、比が 1 のときの {ratio} 倍）。`,
  ];
}

// name -> [loss and slope of (p_old, p_new, ratio, A), what it does with a ratio]
const VARIANTS = {
  ppo: [(p, q, r, a) => clipped(r, a, 0.2, 0.2), ["clip at 1 +- 0.2", "1 ± 0.2 でクリップ"]],
  clip_higher: [
    (p, q, r, a) => clipped(r, a, 0.2, 0.28),
    ["DAPO: the upper clip at 1 + 0.28", "DAPO：上側だけ 1 + 0.28"],
  ],
  dual_clip: [
    (p, q, r, a) => {
      const found = clipped(r, a, 0.2, 0.2);
      return a < 0 && found.loss > -3 * a ? { loss: -3 * a, slope: 0 } : found;
    },
    ["and a bad token's loss stops at 3 * |A|", "加えて、悪いトークンの損失は 3 * |A| まで"],
  ],
  cispo: [
    (p, q, r, a) => ({ loss: -Math.min(r, 5) * a * Math.log(q), slope: -Math.min(r, 5) * a }),
    ["the ratio is a constant of at most 5", "比を定数として扱い、5 を上限とする"],
  ],
  sapo: [
    (p, q, r, a) => {
      const tau = a > 0 ? 1 : 1.05;
      const gate = sigmoid(tau * (r - 1));
      return { loss: (-4 / tau) * gate * a, slope: -4 * gate * (1 - gate) * r * a };
    },
    ["the slope fades with the distance from 1", "1 から離れるほど傾きが滑らかに弱まる"],
  ],
  dppo_tv: [
    (p, q, r, a) => kept(a * (q - p) > 0 && Math.abs(q - p) > 0.15, r, a),
    [
      "drops a token whose probability moved by over 0.15",
      "確率が 0.15 を超えて動いたら捨てる",
    ],
  ],
  dppo_kl: [
    (p, q, r, a) => {
      const moved = p * Math.log(p / q) + (1 - p) * Math.log((1 - p) / (1 - q));
      return kept(a * (q - p) > 0 && moved > 0.05, r, a);
    },
    ["drops a token that moved by over 0.05 nats", "0.05 nat を超えて動いたら捨てる"],
  ],
};
const kept = (dropped, r, a) => (dropped ? { loss: 0, slope: 0 } : { loss: -r * a, slope: -r * a });

function clip(v) {
  v.ratio = v.p_new / v.p_old;
  const lines = [
    [
      "ratio = p_new / p_old = {p_new} / {p_old} = {ratio}, advantage {advantage}",
      "比 = p_new / p_old = {p_new} / {p_old} = {ratio}、アドバンテージ {advantage}",
    ],
  ];
  for (const [name, [of, said]] of Object.entries(VARIANTS)) {
    const found = of(v.p_old, v.p_new, v.ratio, v.advantage);
    [v[`${name}_loss`], v[`${name}_slope`]] = [found.loss, found.slope];
    lines.push([
      `${name}: loss {${name}_loss}, slope {${name}_slope} (${said[0]})`,
      `${name}：損失 {${name}_loss}、傾き {${name}_slope}（${said[1]}）`,
    ]);
  }
  const zero = Object.keys(VARIANTS).filter((name) => v[`${name}_slope`] === 0).join(", ");
  if (v.advantage === 0) lines.push(DIRECTIONS.zero);
  else if (zero)
    lines.push([
      `Without a slope, so no longer trained: ${zero}.`,
      `傾きが 0（学習しない）：${zero}。`,
    ]);
  else lines.push(["All of them still train this token.", "どの方式でも、まだ学習される。"]);
  return lines;
}
