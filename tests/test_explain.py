"""Explanations say what the library computes, every number of it, in both languages."""

import functools
import math
import re
import string
import xml.etree.ElementTree as ElementTree

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rl_llm import advantages, explain, kl, logprobs, losses
from rl_llm.__main__ import main
from rl_llm.errors import ConfigError

# Each example compiles: a failing one is shown as it is, since making it smaller takes minutes.
FEW = settings(
  max_examples=4,
  suppress_health_check=[HealthCheck.too_slow],
  derandomize=True,
  phases=[Phase.explicit, Phase.generate],
)
P = st.floats(0.05, 0.95)
SMALL = st.floats(-3, 3).filter(lambda x: abs(x) > 1e-2)
ONE = jnp.ones((1, 1))


def near(x):
  return pytest.approx(x, rel=2e-4, abs=2e-5)


def log(*values):
  return jnp.log(jnp.array(values))


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


@FEW
@given(p=P, reward=SMALL, baseline=SMALL)
def test_reinforce(p, reward, baseline):
  values = explain.reinforce(p=p, reward=reward, baseline=baseline).values
  advantage = reward - baseline
  loss, _ = losses.reinforce_loss(log([p]), jnp.array([advantage]), ONE)
  assert values["loss"] == near(float(loss)) == near(-advantage * math.log(p))
  assert values["slope"] == near(-advantage)
  assert values["supervised_slope"] == near(-(1 - p))
  assert values["logit_slope"] == near(advantage * values["supervised_slope"])


@FEW
@given(p_old=P, p_new=P, advantage=SMALL, clip_low=st.floats(0.05, 0.5), high=st.floats(0.05, 0.5))
def test_ppo(p_old, p_new, advantage, clip_low, high):
  numbers = {"clip_low": clip_low, "clip_high": high}
  values = explain.ppo(p_old=p_old, p_new=p_new, advantage=advantage, **numbers).values
  ratio = p_new / p_old
  branches = -ratio * advantage, -min(max(ratio, 1 - clip_low), 1 + high) * advantage
  loss, metrics = losses.ppo_loss(
    log([p_new]), log([p_old]), jnp.array([advantage]), ONE, **numbers
  )
  assert values["ratio"] == near(float(metrics["ratio"][0])) == near(ratio)
  assert (values["unclipped"], values["clipped"]) == near(branches)
  assert values["loss"] == near(float(loss)) == near(max(branches))
  moves = branches[0] >= branches[1]
  assert values["slope"] == near(branches[0] if moves else 0)


@FEW
@given(p_old=P, p_new=P, advantage=SMALL)
def test_the_ways_to_limit_a_ratio(p_old, p_new, advantage):
  values = explain.clip(p_old=p_old, p_new=p_new, advantage=advantage).values
  arrays = log([p_new]), log([p_old]), jnp.array([advantage]), ONE
  for name, loss in (
    ("ppo", losses.ppo_loss(*arrays)),
    ("clip_higher", losses.ppo_loss(*arrays, clip_high=0.28)),
    ("dual_clip", losses.ppo_loss(*arrays, dual_clip=3.0)),
    ("cispo", losses.cispo_loss(*arrays)),
    ("sapo", losses.sapo_loss(*arrays)),
    ("dppo_tv", losses.dppo_tv_loss(*arrays)),
    ("dppo_kl", losses.dppo_kl_loss(*arrays)),
  ):
    assert values[f"{name}_loss"] == near(float(loss[0]))
  assert values["cispo_slope"] == near(-min(p_new / p_old, 5) * advantage)


@FEW
@given(rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=6))
def test_grpo(rewards):
  values = explain.grpo(rewards=tuple(rewards)).values
  mean = sum(rewards) / len(rewards)
  std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
  ours = advantages.group_relative(jnp.array([rewards]))[0].tolist()
  assert values["advantages"] == near(tuple(ours))
  assert values["advantages"] == near(tuple((r - mean) / (std + 1e-6) for r in rewards))
  assert (values["mean"], values["std"]) == near((mean, std))


@FEW
@given(
  pairs=st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=3),
  discount=st.floats(0, 1),
  gae_lambda=st.floats(0, 1),
)
def test_gae(pairs, discount, gae_lambda):
  rewards, values = zip(*pairs, strict=True)
  numbers = {"discount": discount, "gae_lambda": gae_lambda}
  found = explain.gae(rewards=rewards, values=values, **numbers).values
  mask = jnp.ones((1, 3), bool)
  ours, returns = advantages.gae(jnp.array([rewards]), jnp.array([values]), mask, **numbers)
  assert found["advantages"] == near(tuple(ours[0].tolist()))
  assert found["returns"] == near(tuple(returns[0].tolist()))
  following = [*values[1:], 0.0]
  surprises = [r + discount * n - v for r, v, n in zip(rewards, values, following, strict=True)]
  assert found["surprises"] == near(tuple(surprises))
  assert found["advantages"][1] == near(surprises[1] + discount * gae_lambda * surprises[2])


@FEW
@given(chosen=P, rejected=P, ref_chosen=P, ref_rejected=P, beta=st.floats(0.05, 2))
def test_dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
  refs = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
  values = explain.dpo(p_chosen=chosen, p_rejected=rejected, beta=beta, **refs).values
  arrays = log(chosen), log(rejected), log(ref_chosen), log(ref_rejected), jnp.ones(1)
  margin = beta * (math.log(chosen / ref_chosen) - math.log(rejected / ref_rejected))
  assert values["loss"] == near(float(losses.dpo_loss(*arrays, beta=beta)[0]))
  assert values["loss"] == near(-math.log(sigmoid(margin)))
  assert values["chosen_slope"] == near(-beta * (1 - sigmoid(margin)))
  assert values["without_reference"] == near(-math.log(sigmoid(beta * math.log(chosen / rejected))))


@FEW
@given(p=P, q=P)
def test_kl(p, q):
  values = explain.kl(policy=(p, 1 - p), reference=(q, 1 - q)).values
  exact = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
  slope = p * (1 - p) * (math.log(p / (1 - p)) - math.log(q / (1 - q)))
  assert (values["kl"], values["k1_mean"], values["k3_mean"]) == near((exact,) * 3)
  assert (values["slope"], values["k1_slope"], values["k2_slope"]) == near((slope, 0, slope))
  assert values["k3_slope"] == near(p - q)
  assert values["k2"] == near(tuple(kl.k2(log(p, 1 - p), log(q, 1 - q)).tolist()))


@FEW
@given(p=P, gap=st.floats(0.1, 2), coef=st.floats(0.1, 2))
def test_entropy(p, gap, coef):
  values = explain.entropy(p=p, gap=gap, coef=coef).values
  each = p * (1 - p)
  assert values["entropy"] == near(float(logprobs.entropy(log(p, 1 - p))))
  assert values["entropy"] == near(-p * math.log(p) - (1 - p) * math.log(1 - p))
  assert values["best"] == near(sigmoid(gap / coef))
  assert values["slope"] == near(each * (gap - coef * math.log(p / (1 - p))))
  # The general formula of a logit's slope, -p_i (log p_i + H).
  assert values["entropy_slope"] == near(-p * (math.log(p) + values["entropy"]))


@functools.cache
def explained(topic, **numbers):
  return topic(**numbers)


SITUATIONS = [
  *[(topic, {}) for topic in explain.TOPICS],
  (explain.reinforce, {"reward": 0.0}),
  (explain.reinforce, {"reward": -1.0}),
  (explain.ppo, {"advantage": 0.0}),
  (explain.ppo, {"advantage": -1.0}),
  (explain.ppo, {"advantage": -1.0, "p_new": 0.7}),
  (explain.ppo, {"p_new": 0.7}),
  (explain.ppo, {"p_new": 0.5}),
  (explain.clip, {"p_new": 0.9}),
  (explain.clip, {"advantage": 0.0}),
  (explain.grpo, {"rewards": (1.0, 1.0)}),
  (explain.grpo, {"scale": "none"}),
  (explain.dpo, {"p_chosen": 0.3}),
  (explain.dpo, {"p_chosen": 0.01}),
  (explain.entropy, {"p": 0.95}),
  (explain.entropy, {"p": float(sigmoid(2.0))}),
]


@pytest.mark.parametrize("topic, numbers", SITUATIONS)
def test_both_languages_say_the_same_numbers(topic, numbers):
  example = explained(topic, **numbers)
  for text in [example.title, *example.lines]:
    fields = [{f for _, f, _, _ in string.Formatter().parse(t) if f is not None} for t in text]
    assert fields[0] == fields[1] <= set(example.values)
  english, japanese = (explain.render(example, lang=lang) for lang in explain.LANGUAGES)
  assert english.count("\n") == japanese.count("\n")
  numerals = [re.findall(r"-?\d+\.\d+(?:e-?\d+)?", text) for text in (english, japanese)]
  assert sorted(numerals[0]) == sorted(numerals[1])
  assert not re.search(r"[^\x00-\x7f]", english)


@pytest.mark.parametrize("topic, numbers", SITUATIONS)
def test_no_line_is_left_in_english(topic, numbers):
  for line in explain.render(explained(topic, **numbers), lang="ja").splitlines():
    names = r"\b(?:log|clip|sigmoid|nat|ppo|clip_higher|dual_clip|cispo|sapo|dppo_\w+|p_\w+"
    names += r"|k\d|PPO|GRPO|DPO|GAE|RLOO|CPO|DAPO|REINFORCE)\b"
    words = re.findall(r"[A-Za-z]{3,}", re.sub(names, "", line, flags=re.ASCII))
    assert not words, line


@pytest.mark.parametrize("lang", explain.LANGUAGES)
def test_the_command_prints_and_draws(lang, tmp_path, capsys):
  path = tmp_path / "made" / "ppo.svg"
  arguments = ["explain", "ppo", "--p_new=0.3", "--advantage=-1", f"--lang={lang}"]
  assert main([*arguments, f"--plot={path}"]) == 0
  said = capsys.readouterr().out
  example = explain.ppo(p_new=0.3, advantage=-1.0)
  figure = example.figure()
  assert said.startswith(explain.render(example, lang=lang) + "\n")
  texts = {each.text for each in ElementTree.parse(path).iter() if each.text}
  assert {getattr(curve.name, lang) for curve in figure.curves} <= texts


def test_the_point_is_marked_on_its_curve(tmp_path):
  example = explain.ppo(p_old=0.5, p_new=0.3)
  figure = example.figure()
  ratio, loss = figure.points[0]
  xs, ys = (list(axis) for axis in figure.curves[0][1:])
  assert ys[xs.index(0.6)] == near(loss) and ratio == near(0.6)
  explain.draw(example, tmp_path / "a.svg")
  circles = [e for e in ElementTree.parse(tmp_path / "a.svg").iter() if e.tag.endswith("circle")]
  assert len(circles) == len(figure.points) == 2


@pytest.mark.parametrize("lang", explain.LANGUAGES)
def test_a_row_of_tokens_has_a_full_box_where_a_mark_is_true(lang, tmp_path):
  word = explain.Text
  parts = [(word("asked", "問い"), ["a"]), (word("written", "答え"), ["b<", "c" * 9])]
  marks = [(word("seen", "見える"), [True] * 3), (word("meant", "狙い"), [False, True, False])]
  example = explain.ppo()._replace(figure=lambda: explain.TokenRow(parts, marks))
  explain.draw(example, tmp_path / "a.svg", lang=lang)
  drawn = list(ElementTree.parse(tmp_path / "a.svg").getroot().iter())
  names = [getattr(name, lang) for name, _ in (*parts, *marks)]
  texts = [e.text for e in drawn if e.tag.endswith("}text")]
  assert sorted(texts) == sorted([*names, "a", "b<", "c" * 9])
  boxes = [e.attrib for e in drawn if e.tag.endswith("}rect")]
  lines = [[box["fill"] != "none" for box in boxes[i : i + 3]] for i in (0, 3, 6)]
  assert lines == [[False] * 3, *(list(found) for _, found in marks)]
  for line in (boxes[:3], boxes[3:6], boxes[6:]):
    left, right = ([float(box["x"]) + float(box["width"]) * end for box in line] for end in (0, 1))
    assert all(a < b for a, b in zip(right, left[1:], strict=False)) and right[-1] <= 720
    assert len({box["y"] for box in line}) == 1
  assert len({box["y"] for box in boxes}) == 3


@pytest.mark.parametrize(
  "arguments, named",
  [
    (["ppo", "--p_new=2"], "--p_new=0.5"),
    (["ppo", "--clip_low=0"], "clip_low is 0"),
    (["ppo", "--plot=a.png"], "--plot=a.svg"),
    (["grpo", "--rewards=1"], "--rewards=1,0,0,0"),
    (["gae", "--rewards=0,1"], "--values=0.4,0.6,0.8"),
    (["kl", "--policy=0.5,0.6"], "--policy=0.5,0.5"),
    (["kl", "--policy=0.5,0.25,0.25"], "--policy has"),
    (["entropy", "--coef=0"], "--coef=0.5"),
  ],
)
def test_a_number_that_cannot_be_is_one_line(arguments, named, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert main(["explain", *arguments]) == 2
  said = capsys.readouterr().err
  assert said.startswith("error: ") and said.count("\n") == 1 and named in said


@pytest.mark.parametrize("topic", explain.TOPICS)
def test_every_number_is_a_flag_with_help(topic, capsys):
  with pytest.raises(SystemExit):
    main(["explain", topic.__name__, "--help"])
  said = capsys.readouterr().out
  for name in topic.__kwdefaults__:
    assert re.search(rf"--{name} \S+\s+[^ -].{{8,}}", said), name


def test_the_error_is_of_the_kind_that_callers_catch():
  with pytest.raises(ConfigError, match="p_old"):
    explain.ppo(p_old=0.0)
