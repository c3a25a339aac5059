"""What a run's record says of learning against its cost: accuracy over tokens and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def curve(rows: Sequence[dict], *, responses: int) -> list[dict[str, float]]:
  """The evaluations of a run: tokens sampled and seconds of training before each, accuracy."""
  tokens = seconds = 0.0
  points = []
  for row in rows:
    if row.get("eval/sampled_accuracy") is not None:
      found = {name: row[f"eval/sampled_{name}"] for name in ("accuracy", "low", "high")}
      points.append({"tokens": tokens, "seconds": seconds, **found})
    tokens += responses * row.get("response_length_mean", 0.0)
    seconds += sum(row.get(f"time/{phase}", 0.0) for phase in phases([row]))
  return points


def phases(rows: Sequence[dict]) -> list[str]:
  """The phases of a step that train: not evaluations, not checkpoints."""
  names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")}
  return sorted(names - {"step", "eval", "checkpoint"})


def tokens_to(points: Sequence[dict[str, float]], target: float) -> float | None:
  """Tokens sampled before the accuracy first reaches the target, between two evaluations by the
  straight line; None where it never does.

  >>> tokens_to([{"tokens": 0, "accuracy": 0.2}, {"tokens": 100, "accuracy": 1.0}], 0.8)
  75.0
  """
  for before, after in zip(points, points[1:], strict=False):
    if before["accuracy"] < target <= after["accuracy"]:
      share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
      return round(before["tokens"] + share * (after["tokens"] - before["tokens"]), 6)
  return 0.0 if points[0]["accuracy"] >= target else None


def draw(methods: Mapping[str, Sequence[dict]], path: Path, *, target: float) -> None:
  """Draws accuracy against tokens sampled, and against minutes of training; needs matplotlib.

  Args:
    methods: the trials of each method by its name; each has its `curve` as "points".
    path: the picture; its suffix says the format. The same figures give the same SVG.
    target: an accuracy that is marked.
  """
  import matplotlib

  matplotlib.use("Agg")
  matplotlib.rcParams["svg.hashsalt"] = "rl_llm"
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
  for color, (method, trials) in enumerate(methods.items()):
    for axis, key, scale in ((axes[0], "tokens", 1e3), (axes[1], "seconds", 60)):
      for number, trial in enumerate(trials):
        axis.plot(
          [point[key] / scale for point in trial["points"]],
          [point["accuracy"] for point in trial["points"]],
          color=f"C{color}",
          marker="o",
          markersize=3,
          linewidth=1.2,
          label=method if number == 0 else None,
        )
  axes[0].set(xlabel="tokens sampled, thousands", ylabel="held-out accuracy at temperature 1")
  axes[1].set(xlabel="minutes of training, evaluations left out", ylim=(0, 1))
  for axis in axes:
    axis.axhline(target, color="0.7", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].legend(frameon=False)
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)
