"""Makes the guide's figures from the library's own functions: `make docs`.

All but the last two are the figures of `python -m rl_llm explain`. Each is made in both languages.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from rl_llm import advantages, explain, losses, weighting
from rl_llm.explain import Curve, Explanation, Figure, Text

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
