"""Learning against its cost, from a run's record: accuracy over tokens and over time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal


def curve(rows: Sequence[dict], *, responses: int) -> list[dict[str, float]]:
  """A run's evaluations: each accuracy, with the samples, tokens and seconds of training before it.

  Args:
    rows: of metrics.jsonl.
    responses: sampled in each round of a step; a step that refills (DAPO) has several rounds.
  """
  samples = tokens = seconds = 0.0
  points = []
  for row in rows:
    if row.get("eval/sampled_accuracy") is not None:
      found = {name: row[f"eval/sampled_{name}"] for name in ("accuracy", "low", "high")}
      points.append({"samples": samples, "tokens": tokens, "seconds": seconds, **found})
    if "response_length_mean" in row:
      sampled = responses * row.get("refill/rounds", 1)
      samples += sampled
      tokens += sampled * row["response_length_mean"]
    seconds += sum(row.get(f"time/{phase}", 0.0) for phase in phases([row]))
  return points


def phases(rows: Sequence[dict]) -> list[str]:
  """The phases of a step that train: not evaluations, not checkpoints."""
  names = {key.removeprefix("time/") for row in rows for key in row if key.startswith("time/")}
  return sorted(names - {"step", "eval", "checkpoint"})


def tokens_to(points: Sequence[dict[str, float]], target: float) -> float | None:
  """Tokens sampled before the accuracy first reaches the target, interpolated linearly between two
  evaluations; None if it never does.

  >>> tokens_to([{"tokens": 0, "accuracy": 0.2}, {"tokens": 100, "accuracy": 1.0}], 0.8)
  75.0
  """
  for before, after in zip(points, points[1:], strict=False):
    if before["accuracy"] < target <= after["accuracy"]:
      share = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
      return round(before["tokens"] + share * (after["tokens"] - before["tokens"]), 6)
  return 0.0 if points[0]["accuracy"] >= target else None


def table(
  found: Sequence[Mapping[str, Any]], known: Mapping[str, Mapping[str, str]], *, target: float
) -> str:
  """A comparison of methods as Markdown: one column per method, with medians over its runs' steps.

  Args:
    found: for each method, its name ("method"), its gradient noise or None ("noise"), and its
      "runs": "phases" (seconds per step by name), "peak_gib", "tokens_to_target", "points", "seed".
    known: method name -> the first cells of its column, as {row name: text}; the row "" is the
      head.
    target: the accuracy that `tokens_to_target` refers to.
  """
  names = sorted({name for method in found for trial in method["runs"] for name in trial["phases"]})

  def column(method: Mapping[str, Any]) -> dict[str, str]:
    trials = method["runs"]
    seconds = {
      name: statistics.median(trial["phases"].get(name, 0.0) for trial in trials) for name in names
    }
    cells = {
      **known[method["method"]],
      **{f"seconds a step, {name}": f"{median:.1f}" for name, median in seconds.items()},
      "seconds a step, in all": f"{sum(seconds.values()):.1f}",
      "peak memory, GiB": f"{max(trial['peak_gib'] for trial in trials):.1f}",
    }
    if method["noise"] is not None:
      cells["gradient noise at the start"] = f"{float(method['noise']):.1f}"
    reached = (trial["tokens_to_target"] for trial in trials)
    shown = ("not reached" if count is None else f"{count:,.0f}" for count in reached)
    cells[f"tokens sampled to {target:.0%}"] = ", ".join(shown)
    for trial in trials:
      for when, point in (("before", trial["points"][0]), ("after", trial["points"][-1])):
        shown = "{accuracy:.2f} ({low:.2f} to {high:.2f})".format(**point)
        cells[f"accuracy {when}, seed {trial['seed']}"] = shown
    return cells

  return markdown([column(method) for method in found])


def markdown(columns: Sequence[Mapping[str, str]]) -> str:
  """A Markdown table from columns, each as {row name: cell}; the first row is the head.

  >>> print(markdown([{"": "GRPO", "accuracy": "0.9"}, {"": "PPO", "accuracy": "0.8"}]))
  | | GRPO | PPO |
  |---|---|---|
  | accuracy | 0.9 | 0.8 |
  <BLANKLINE>
  """
  rows = [[name, *(cells[name] for cells in columns)] for name in columns[0]]
  lines = ["".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in rows]
  return "\n".join([lines[0], "|---" * (len(columns) + 1) + "|", *lines[1:], ""])


def draw(
  methods: Mapping[str, Sequence[dict]],
  path: Path,
  *,
  cost: Literal["tokens", "samples"] = "tokens",
  target: float | None = None,
) -> None:
  """Draws accuracy against what was sampled, and against minutes of training; needs matplotlib.

  Args:
    methods: method name -> its trials; each has its `curve` as "points".
    path: the image file; its suffix sets the format. The same data give the same SVG.
    cost: what the left half counts.
    target: an accuracy to mark; None: none.
  """
  import matplotlib

  matplotlib.use("Agg")
  matplotlib.rcParams["svg.hashsalt"] = "rl_llm"
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
  for color, (method, trials) in enumerate(methods.items()):
    for axis, key, scale in ((axes[0], cost, 1e3), (axes[1], "seconds", 60)):
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
  axes[0].set(xlabel=f"thousands of {cost}", ylabel="held-out accuracy at temperature 1")
  axes[1].set(xlabel="minutes of training, evaluations left out", ylim=(0, 1))
  for axis in axes:
    if target is not None:
      axis.axhline(target, color="0.7", linewidth=0.8, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
  axes[0].legend(frameon=False)
  figure.savefig(path, metadata={"Date": None})
  pyplot.close(figure)
