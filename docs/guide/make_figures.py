"""Makes the guide's figures from the library's own functions: `make docs`.

All but the last six are the figures of `python -m rl_llm explain`. Each is made in both languages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import advantages, explain, losses, presets, weighting
from rl_llm.data.prompts import PromptBatch
from rl_llm.explain import Curve, Explanation, Figure, Text, TokenRow
from rl_llm.logprobs import token_logprobs
from rl_llm.policy import make_policy, tiny_config
from rl_llm.rollout import STOP_EOS, ResponseBatch, Rollout
from rl_llm.rollout.collect import Experience, response_batch
from rl_llm.rollout.grading import Scores
from rl_llm.rollout.sampling import SamplingConfig
from rl_llm.rollout.turns import NO_TURN, Turns, make_begin
from rl_llm.tasks.environments.builtin.calculator import Calculator

END = "</s>"  # ends a turn
FOLDER = pathlib.Path(__file__).parent / "figures"


def shared_token() -> Explanation:
  """What happens to the first token that one right and three wrong responses share."""

  def push(name, length):
    mask = jnp.arange(8) < jnp.array([[length], [2], [2], [2]])
    group = advantages.group_relative(jnp.array([[1.0, 0, 0, 0]])).reshape(-1)
    old = jnp.full((4, 8), -1.0)

    def loss(shared):
      weights = getattr(weighting, name)(mask)
      return losses.grpo_loss(old.at[:, 0].set(shared), old, group, weights, mask=mask)[0]

    return -float(jax.grad(loss)(-1.0))

  lengths = list(range(1, 9))

  def figure():
    return Figure(
      Text("tokens of the right response", "正解の応答のトークン数"),
      [
        Curve(Text(name, name), lengths, [push(name, length) for length in lengths])
        for name in ("sequence_mean", "token_mean")
      ],
      (),
      stepped=True,
    )

  title = Text("The push on a token that all share", "全応答が共有するトークンが受ける力")
  return Explanation(title, {}, (), figure)


def certainty() -> Explanation:
  """Entropy over the steps of the runs in copy_runs.json, with and without an entropy bonus."""
  runs = json.loads((pathlib.Path(__file__).parent / "copy_runs.json").read_text())["runs"]

  def figure():
    curves = []
    for coef in (0.1, 0.0):
      seeds = [run for run in runs if run["coef"] == coef]
      mean = np.mean([run["entropy"] for run in seeds], axis=0)
      name = Text(f"entropy, bonus {coef:g}", f"エントロピー（係数 {coef:g}）")
      curves.append(Curve(name, seeds[0]["step"], mean))
    return Figure(Text("step", "ステップ"), curves, ())

  title = Text("The tiny model learns to copy, three seeds", "小さいモデルの書き写し、三つのシード")
  return Explanation(title, {}, (), figure)


def baseline() -> Explanation:
  """Mean and variance of one draw of the two-armed bandit, over the baseline."""
  probability, reward = jnp.array([1 / 4, 3 / 4]), jnp.array([3.0, 1.0])

  def mean_and_variance(baseline):
    advantage = advantages.remax(reward[:, None], jnp.full(2, baseline))[:, 0]

    def loss(x, arm):
      logprob = jax.nn.log_sigmoid(jnp.array([x, -x]))[arm]
      return losses.reinforce_loss(logprob[None, None], advantage[arm][None], jnp.ones((1, 1)))[0]

    draws = -jax.vmap(jax.grad(loss), in_axes=(None, 0))(jnp.log(1 / 3), jnp.arange(2))
    mean = jnp.sum(probability * draws)
    return mean, jnp.sum(probability * draws**2) - mean**2

  def figure():
    baselines = np.round(np.arange(0, 4.01, 0.05), 2)
    means, variances = jax.jit(jax.vmap(mean_and_variance))(jnp.asarray(baselines, jnp.float32))
    marked = [(b, float(variances[np.argmin(abs(baselines - b))])) for b in (0, 1.5, 2.5)]
    return Figure(
      Text("baseline", "ベースライン"),
      (
        Curve(Text("mean of a draw", "一回引いた値の平均"), baselines, means),
        Curve(Text("variance of a draw", "一回引いた値の分散"), baselines, variances),
      ),
      marked,
    )

  title = Text("A baseline takes away noise", "ベースラインは雑音を減らす")
  return Explanation(title, {}, (), figure)


def comparison() -> Explanation:
  """Loss of a reward model, and its slope, over the difference of a pair's scores."""

  def loss(chosen):
    return losses.reward_model_loss(chosen[None], jnp.zeros(1), jnp.ones(1))[0]

  def figure():
    differences = np.round(np.arange(-4, 4.01, 0.1), 1)
    values, slopes = jax.vmap(jax.value_and_grad(loss))(jnp.asarray(differences, jnp.float32))
    at = int(np.argmin(abs(differences - 1)))
    return Figure(
      Text("score of the chosen - score of the rejected", "好まれた方の得点 - 退けられた方の得点"),
      (
        Curve(Text("loss", "損失"), differences, values),
        Curve(Text("slope, chosen score", "好まれた方の得点に関する傾き"), differences, slopes),
      ),
      ((1.0, float(values[at])), (1.0, float(slopes[at]))),
    )

  title = Text("A reward model and one comparison", "報酬モデルと一つの比較")
  return Explanation(title, {}, (), figure)


def played(prompt, call, answer, last) -> tuple[ResponseBatch, list[str]]:
  """An episode of words, sampled and read as a step does it: (its arrays, each id's word).

  The policy is certain of the word that comes next; the words of `call` and `last` are its own.
  """
  words = sorted({*prompt, *call, *answer, *last})
  ids = {word: i for i, word in enumerate(words)}
  table = np.zeros((len(words), len(words)), np.float32)
  for before, said in ((prompt[-1], call), (answer[-1], last)):
    for word, after in zip((before, *said), said, strict=False):
      table[ids[word], ids[after]] = 100.0
  policy = dataclasses.replace(
    make_policy(tiny_config(len(words))),
    hidden=lambda params, tokens, positions, segment_ids, cache: (params["table"][tokens], cache),
    logits=lambda params, hidden: hidden,
  )
  begin = make_begin(
    policy,
    types.SimpleNamespace(eos_ids=(ids[END],), pad_id=ids[END]),
    turn_tokens=8,
    episode_tokens=len((*call, *answer, *last)),
    say=lambda _: None,
  )
  prompts = PromptBatch(np.array([[ids[word] for word in prompt]]), np.array([len(prompt)]))
  params, keys = {"table": jnp.asarray(table)}, jax.random.split(jax.random.key(0), 1)
  state, resume = begin(params)(prompts, keys, SamplingConfig(1.0), 1)
  state = jax.device_get(resume(state, {0: [ids[word] for word in answer]}))
  sampled = Rollout(
    state.tokens, state.mask, state.logprobs, state.entropies, state.length, np.array([STOP_EOS])
  )
  scores, turns = Scores(np.ones((1, 1)), np.ones((1, 1), bool), {}, []), np.ones((1, 2))
  learned = Experience(None, prompts, sampled, [], scores, scores, {}, [])
  return response_batch(learned._replace(turns=Turns(state.turns, turns))), words


def episode() -> Explanation:
  """Of which tokens an episode is made, and which are attended and trained on."""
  expression = "86*67"
  answer = Calculator().calculate(expression)

  def figure():
    batch, words = played(
      ("What", "is", f"{expression}?"),
      ("call", "calculate:", expression, END),
      ("answer:", answer),
      ("It", "is", f"{answer}.", END),
    )
    parts = [(Text("prompt", "プロンプト"), [words[i] for i in batch.prompts[0]])]
    row = zip(batch.turns[0].tolist(), batch.tokens[0].tolist(), strict=True)
    for turn, own in itertools.groupby(row, key=lambda pair: pair[0]):
      policy = Text(f"policy, turn {turn + 1}", f"方策、ターン {turn + 1}")
      name = Text("tool", "ツール") if turn == NO_TURN else policy
      parts.append((name, [words[i] for _, i in own]))
    prompt = np.ones(batch.prompts.shape[1], bool)
    attended = Text("attended", "見える"), [*prompt, *batch.attended[0]]
    trained = Text("trained on", "訓練する"), [*~prompt, *batch.mask[0]]
    return TokenRow(parts, [attended, trained])

  title = Text("An episode, token by token", "エピソードのトークン")
  return Explanation(title, {}, (), figure)


def coefficient() -> Explanation:
  """Where two coefficients of the entropy put the optimum of two responses."""

  def best(gap, coef):
    return jnp.exp(token_logprobs(jnp.stack([gap, 0.0]), jnp.array(0), temperature=coef))

  def figure():
    own = presets.grpo("nexrl").entropy["coef"]
    gaps, curves, points = np.linspace(0, 10 * own, 101), [], []
    for coef in (own, 10 * own):
      optima = jax.vmap(functools.partial(best, coef=coef))(jnp.asarray(gaps, jnp.float32))
      curves.append(Curve(Text(f"optimum, c = {coef:g}", f"最適点、c = {coef:g}"), gaps, optima))
      points.append((coef, float(best(jnp.asarray(coef), coef))))
    return Figure(Text("difference in reward", "報酬の差"), curves, points)

  title = Text("The best probability of the better response", "良い方の応答の最適な確率")
  return Explanation(title, {}, (), figure)


# file -> what is drawn
FIGURES = {
  "reinforce": functools.partial(explain.reinforce, p=0.25, reward=3.0),
  "ppo": functools.partial(explain.ppo, p_old=0.5, p_new=0.3, advantage=1.0),
  "clip": explain.clip,
  "grpo": functools.partial(explain.grpo, rewards=(1.0, 0.0, 0.0, 0.0)),
  "dpo": explain.dpo,
  "kl": explain.kl,
  "entropy": functools.partial(explain.entropy, p=0.881, gap=1.0, coef=0.5),
  "collapse": shared_token,
  "certainty": certainty,
  "baseline": baseline,
  "comparison": comparison,
  "agents": episode,
  "nex_n1": coefficient,
}


def make(folder: pathlib.Path) -> None:
  """Draws every figure, in both languages, into a folder."""
  for name, explanation in FIGURES.items():
    example = explanation()
    figure = example.figure()  # once, for both languages
    example = example._replace(figure=lambda figure=figure: figure)
    explain.draw(example, folder / f"{name}.svg", lang="en")
    explain.draw(example, folder / f"{name}.ja.svg", lang="ja")


if __name__ == "__main__":
  make(FOLDER)
