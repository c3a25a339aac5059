// The calculator's form. Without a page around it, `explained` is all that it offers.
"use strict";

// topic -> its function, its title, and its numbers as they are at first
const TOPICS = {
  reinforce: [
    reinforce,
    ["REINFORCE: one sampled token", "REINFORCE：サンプルした一つのトークン"],
    { p: 0.25, reward: 3, baseline: 0 },
  ],
  ppo: [
    ppo,
    ["PPO: one token, after the policy has moved", "PPO：方策が動いた後の一つのトークン"],
    { p_old: 0.5, p_new: 0.3, advantage: 1, clip_low: 0.2, clip_high: 0.2 },
  ],
  clip: [
    clip,
    [
      "One token, seven ways to limit its ratio (slopes in log p_new)",
      "一つのトークンと、比を制限する七つの方式（傾きは log p_new に関するもの）",
    ],
    { p_old: 0.5, p_new: 0.3, advantage: 1 },
  ],
  grpo: [
    grpo,
    ["GRPO: the responses to one prompt", "GRPO：一つのプロンプトへの応答"],
    { rewards: [1, 0, 0, 0], scale: "std" },
  ],
  gae: [
    gae,
    ["GAE: the tokens of one response", "GAE：一つの応答の各トークン"],
    { rewards: [0, 0, 1], values: [0.4, 0.6, 0.8], discount: 1, gae_lambda: 0.95 },
  ],
  dpo: [
    dpo,
    ["DPO: one pair of responses", "DPO：一組の応答"],
    { p_chosen: 0.1, p_rejected: 0.4, ref_chosen: 0.1, ref_rejected: 0.4, beta: 0.1 },
  ],
  kl: [
    kl,
    ["KL: one sample against all of them", "KL：一つのサンプルと全体"],
    { policy: [0.5, 0.5], reference: [0.25, 0.75] },
  ],
  entropy: [
    entropy,
    ["Entropy bonus: two responses", "エントロピーボーナス：二つの応答"],
    { p: 0.75, gap: 1, coef: 0.5 },
  ],
};
const LANGUAGES = ["en", "ja"];

// The numbers of a topic and its lines, as `explain` prints them; throws a pair of sentences.
function explained(topic, numbers, lang) {
  const [compute, title, defaults] = TOPICS[topic];
  const values = { ...defaults, ...numbers };
  for (const [name, value] of Object.entries(values)) {
    if (/^(p|ref)(_|$)/.test(name) && !(value > 0 && value < 1))
      throw [`${name}: a number above 0 and below 1`, `${name}：0 より大きく 1 より小さい数`];
    if (/^(clip_|coef$|beta$)/.test(name) && !(value > 0))
      throw [`${name}: a number above 0`, `${name}：0 より大きい数`];
    if (/^(discount|gae_lambda)$/.test(name) && !(value >= 0 && value <= 1))
      throw [`${name}: a number from 0 to 1`, `${name}：0 以上 1 以下の数`];
  }
  const which = LANGUAGES.indexOf(lang);
  const lines = compute(values).map((text) =>
    text[which].replace(/\{(\w+)\}/g, (_, name) => shown(values[name])),
  );
  return { values, title: title[which], lines };
}

// A number to five digits, as Python's "g" writes it.
function shown(value) {
  if (Array.isArray(value)) return value.map(shown).join(", ");
  if (Math.abs(value) < 1e-12) return "0"; // rounding of a sum that is 0
  const [digits, exponent] = value.toExponential(4).split("e");
  if (exponent >= -4 && exponent < 5) return String(Number(value.toPrecision(5)));
  const sign = exponent < 0 ? "-" : "+";
  return `${Number(digits)}e${sign}${String(Math.abs(exponent)).padStart(2, "0")}`;
}

// What was typed in a field whose first value is `like`.
function read(name, text, like) {
  if (typeof like === "string") return text;
  const numbers = text.split(/[,、，\s]+/).filter(Boolean).map(Number);
  const many = Array.isArray(like);
  if (!numbers.length || !numbers.every(Number.isFinite) || (!many && numbers.length > 1))
    throw many
      ? [`${name}: numbers such as ${like.join(",")}`, `${name}：${like.join(",")} のような数の並び`]
      : [`${name}: a number such as ${like}`, `${name}：${like} のような数`];
  return many ? numbers : numbers[0];
}

function show(place) {
  const lang = document.documentElement.lang === "ja" ? "ja" : "en";
  const make = (tag, parent, properties) =>
    parent.appendChild(Object.assign(document.createElement(tag), properties));
  const choice = make("select", make("p", place, {}), {
    ariaLabel: lang === "ja" ? "手法" : "method",
  });
  for (const topic of Object.keys(TOPICS)) make("option", choice, { value: topic, text: topic });
  const form = make("form", place, { onsubmit: () => false });
  const answer = make("div", place, { className: "answer", ariaLive: "polite" });

  function update() {
    const defaults = TOPICS[choice.value][2];
    answer.textContent = "";
    try {
      const numbers = {};
      for (const [name, like] of Object.entries(defaults))
        numbers[name] = read(name, form.elements[name].value, like);
      const found = explained(choice.value, numbers, lang);
      make("strong", answer, { textContent: found.title });
      for (const line of found.lines) make("p", answer, { textContent: line });
    } catch (said) {
      if (!Array.isArray(said)) throw said;
      make("p", answer, { className: "wrong", textContent: said[LANGUAGES.indexOf(lang)] });
    }
  }

  function choose() {
    form.textContent = "";
    for (const [name, value] of Object.entries(TOPICS[choice.value][2])) {
      const label = make("label", form, { textContent: `${name} ` });
      if (name === "scale") {
        const field = make("select", label, { name });
        for (const each of ["std", "none"]) make("option", field, { value: each, text: each });
      } else make("input", label, { name, value: String(value), size: Array.isArray(value) ? 18 : 6 });
    }
    update();
  }

  choice.onchange = choose;
  form.oninput = update;
  const asked = location.hash.slice(1);
  choice.value = asked in TOPICS ? asked : "ppo";
  choose();
}

if (typeof document !== "undefined") show(document.getElementById("calculator"));
