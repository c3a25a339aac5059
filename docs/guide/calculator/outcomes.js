// What responses and whole distributions are worth: GRPO's groups, GAE, DPO's pairs, the KL, entropy.
"use strict";

function grpo(v) {
  const n = v.rewards.length;
  if (n < 2) throw ["two rewards or more, such as 1,0,0,0", "報酬は二つ以上必要です（例：1,0,0,0）"];
  v.mean = mean(v.rewards);
  v.differences = v.rewards.map((r) => r - v.mean);
  v.std = Math.sqrt(sum(v.differences.map((d) => d * d)) / (n - 1));
  const divided = v.scale === "std";
  v.advantages = v.differences.map((d) => (divided ? d / (v.std + 1e-6) : d));
  v.leave_one_out = v.rewards.map((r) => r - (sum(v.rewards) - r) / (n - 1));
  const differ = v.rewards.some((r) => r !== v.rewards[0]);
  return [
    ["rewards = {rewards}", "報酬 = {rewards}"],
    ["mean = {mean}", "平均 = {mean}"],
    ["differences from the mean = {differences}", "平均との差 = {differences}"],
    [
      "spread (standard deviation, G - 1 in the denominator) = {std}",
      "標準偏差（分母は G - 1）= {std}",
    ],
    divided
      ? [
          "advantages = differences / (spread + 1e-6) = {advantages}",
          "アドバンテージ = 差 / (標準偏差 + 1e-6) = {advantages}",
        ]
      : [
          "advantages = the differences, not divided: {advantages}",
          "アドバンテージ = 差のまま（割らない）：{advantages}",
        ],
    [
      "for comparison, RLOO (each against the mean of the others) = {leave_one_out}",
      "参考：RLOO（自分以外の平均との差）= {leave_one_out}",
    ],
    differ
      ? [
          "Every token of a response has its response's advantage: above 0 it becomes likelier, below 0 rarer.",
          "応答の全トークンがその応答のアドバンテージを持つ。正なら確率は上がり、負なら下がる。",
        ]
      : [
          "All rewards are equal, so this group teaches nothing, right or wrong.",
          "報酬がすべて等しいので、正解でも不正解でも、このグループからは何も学習されない。",
        ],
  ];
}

function gae(v) {
  if (v.rewards.length !== v.values.length)
    throw ["as many values as rewards", "報酬と価値は同じ個数にしてください"];
  const of = (lambda) => {
    let later = 0;
    const found = v.rewards.map(() => 0);
    for (let t = v.rewards.length - 1; t >= 0; t--) {
      const next = t + 1 < v.values.length ? v.values[t + 1] : 0;
      later = v.rewards[t] + v.discount * next - v.values[t] + v.discount * lambda * later;
      found[t] = later;
    }
    return found;
  };
  [v.surprises, v.advantages, v.sampled] = [of(0), of(v.gae_lambda), of(1)];
  v.returns = v.advantages.map((a, t) => a + v.values[t]);
  return [
    ["rewards r = {rewards}", "報酬 r = {rewards}"],
    ["values V = {values}", "価値 V = {values}"],
    [
      "surprises delta_t = r_t + {discount} * V_(t+1) - V_t = {surprises}",
      "TD 誤差 δ_t = r_t + {discount} * V_(t+1) - V_t = {surprises}",
    ],
    [
      "advantages A_t = delta_t + {discount} * {gae_lambda} * A_(t+1) = {advantages}",
      "アドバンテージ A_t = δ_t + {discount} * {gae_lambda} * A_(t+1) = {advantages}",
    ],
    [
      "returns A + V, the value network's targets = {returns}",
      "リターン A + V（価値ネットワークの目標）= {returns}",
    ],
    [
      "with lambda 1, the sampled return minus V: {sampled}",
      "λ が 1 なら、サンプルしたリターンから V を引いたもの：{sampled}",
    ],
    [
      "The closer lambda is to 1, the less the value network's errors and the more the noise of sampling counts.",
      "λ が 1 に近いほど、価値ネットワークの誤差の影響は減り、サンプリングのばらつきは増える。",
    ],
  ];
}

function dpo(v) {
  v.chosen_log_ratio = Math.log(v.p_chosen / v.ref_chosen);
  v.rejected_log_ratio = Math.log(v.p_rejected / v.ref_rejected);
  v.margin = v.beta * (v.chosen_log_ratio - v.rejected_log_ratio);
  v.preference = sigmoid(v.margin);
  v.loss = Math.log1p(Math.exp(-v.margin));
  v.chosen_slope = -v.beta * sigmoid(-v.margin);
  v.rejected_slope = -v.chosen_slope;
  v.without_reference = Math.log1p(Math.exp(-v.beta * Math.log(v.p_chosen / v.p_rejected)));
  const moved =
    v.margin > 0
      ? ["more than", "より強く好んでいる"]
      : v.margin < 0
        ? ["less than", "ほどは好んでいない"]
        : ["just as much as", "と同じだけ好んでいる"];
  return [
    [
      "log-ratio of the chosen = log({p_chosen} / {ref_chosen}) = {chosen_log_ratio}",
      "好まれた応答の対数比 = log({p_chosen} / {ref_chosen}) = {chosen_log_ratio}",
    ],
    [
      "log-ratio of the rejected = log({p_rejected} / {ref_rejected}) = {rejected_log_ratio}",
      "退けられた応答の対数比 = log({p_rejected} / {ref_rejected}) = {rejected_log_ratio}",
    ],
    [
      "margin = {beta} * (chosen - rejected) = {margin}",
      "マージン = {beta} * （前者 - 後者）= {margin}",
    ],
    [
      "sigmoid(margin), the modelled chance of this preference = {preference}",
      "sigmoid(マージン)、この選好が得られる確率のモデル値 = {preference}",
    ],
    ["loss = -log of it = {loss}", "損失 = その -log = {loss}"],
    [
      "slopes in the two log-probs = {chosen_slope}, {rejected_slope}",
      "二つの対数確率に関する傾き = {chosen_slope}, {rejected_slope}",
    ],
    [
      "without the reference, the loss would be {without_reference} (CPO without its likelihood)",
      "参照方策がなければ損失は {without_reference}（尤度項を除いた CPO）",
    ],
    [
      `The policy prefers the chosen response ${moved[0]} the reference does; a step raises the chosen and lowers the rejected by the same slope.`,
      `方策は好まれた応答を参照方策${moved[1]}。一歩進むと、同じ大きさの傾きで前者は上がり、後者は下がる。`,
    ],
  ];
}

const ESTIMATORS = {
  // value, and slope in d, of d = log policy - log reference
  k1: [(d) => d, () => 1],
  k2: [(d) => (d * d) / 2, (d) => d],
  k3: [(d) => Math.exp(-d) + d - 1, (d) => 1 - Math.exp(-d)],
};

function kl(v) {
  const [p, q] = [v.policy, v.reference];
  for (const each of [p, q])
    if (each.length < 2 || Math.min(...each) <= 0 || Math.abs(sum(each) - 1) > 1e-6)
      throw [
        "two or more positive probabilities that add up to 1",
        "和が 1 になる正の確率を二つ以上入れてください",
      ];
  if (p.length !== q.length)
    throw ["as many reference probabilities as the policy has", "二つの分布は同じ個数にしてください"];
  const d = p.map((x, i) => Math.log(x / q[i]));
  const average = (xs) => sum(xs.map((x, i) => p[i] * x));
  v.kl = average(d);
  // The slope of outcome i's log-prob in the first logit is (i is first) - p of the first.
  const inFirst = p.map((_, i) => (i === 0 ? 1 : 0) - p[0]);
  v.slope = average(d.map((x, i) => x * inFirst[i]));
  for (const [name, [value, slope]] of Object.entries(ESTIMATORS)) {
    v[name] = d.map((x) => value(x));
    v[`${name}_mean`] = average(v[name]);
    v[`${name}_slope`] = average(d.map((x, i) => slope(x) * inFirst[i]));
  }
  return [
    ["policy = {policy}", "方策 = {policy}"],
    ["reference = {reference}", "参照方策 = {reference}"],
    ["KL(policy || reference) = {kl}", "KL(方策 || 参照方策) = {kl}"],
    [
      "its slope in the first outcome's logit = {slope}",
      "最初の事象のロジットに関する傾き = {slope}",
    ],
    ...Object.keys(ESTIMATORS).map((name) => [
      `${name} of each outcome: {${name}}; mean {${name}_mean}; mean slope {${name}_slope}`,
      `${name}（各事象）：{${name}}、平均 {${name}_mean}、傾きの平均 {${name}_slope}`,
    ]),
    [
      "As a value report k3 (right on average, never negative); as a loss differentiate k2 (its slope is the KL's).",
      "値としては k3 を報告し（平均が正しく、負にならない）、損失としては k2 を微分する（傾きが KL の傾きに一致する）。",
    ],
  ];
}

function entropy(v) {
  const of = (p) => -p * Math.log(p) - (1 - p) * Math.log1p(-p);
  v.entropy = of(v.p);
  v.objective = v.p * v.gap + v.coef * v.entropy;
  v.reward_slope = v.p * (1 - v.p) * v.gap;
  v.entropy_slope = -v.p * (Math.log(v.p) + v.entropy);
  v.slope = v.reward_slope + v.coef * v.entropy_slope;
  v.best = sigmoid(v.gap / v.coef);
  const other = sigmoid(-v.gap / v.coef);
  v.best_entropy = -v.best * Math.log(v.best) - (other > 0 ? other * Math.log(other) : 0);
  const last =
    Math.abs(v.slope) < 1e-6
      ? [
          "p is at its optimum: the two forces cancel.",
          "p は最適点にあり、二つの力は釣り合う。",
        ]
      : v.slope > 0
        ? [
            "The sum is above 0: p rises towards {best}.",
            "和は正であり、p は {best} に向かって上がる。",
          ]
        : [
            "The sum is below 0: p falls towards {best}, although the response is the better one.",
            "和は負であり、良い方の応答なのに p は {best} に向かって下がる。",
          ];
  return [
    ["entropy H(p) = {entropy} nats", "エントロピー H(p) = {entropy} nat"],
    [
      "objective p * gap + coef * H = {p} * {gap} + {coef} * {entropy} = {objective}",
      "目的関数 p * 差 + 係数 * H = {p} * {gap} + {coef} * {entropy} = {objective}",
    ],
    [
      "slope of p * gap in the logit = {reward_slope}",
      "p * 差 のロジットに関する傾き = {reward_slope}",
    ],
    ["slope of H in the logit = {entropy_slope}", "H のロジットに関する傾き = {entropy_slope}"],
    [
      "sum of the slopes, the second times {coef} = {slope}",
      "傾きの和（後者は {coef} 倍）= {slope}",
    ],
    [
      "optimum p = sigmoid({gap} / {coef}) = {best}, where the entropy is {best_entropy}",
      "最適点 p = sigmoid({gap} / {coef}) = {best}、そのエントロピーは {best_entropy}",
    ],
    last,
  ];
}
