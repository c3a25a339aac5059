"""The display of a run in progress: a live view on a terminal, plain lines elsewhere.

A model in training may write anything: terminal escapes that would clear the screen, brackets that
a markup language would swallow, a megabyte of one letter. A person must see what it wrote, so all
of it is shown literally, with control characters escaped and long texts shortened.
"""

from __future__ import annotations

import contextlib
import html
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import rich.box
import rich.console
import rich.live
import rich.progress
import rich.table
import rich.text

from rl_llm.runs.formatting import duration, number, printable

TRAINED, UNTRAINED = "green", "cyan"  # the model's words, and the environment's


class _Elapsed:
  """A line with the seconds since it was made: a live view draws it anew, and they count up."""

  def __init__(self, line: str):
    self._line, self._since = line, time.monotonic()

  def __str__(self) -> str:
    return f"{self._line}: {duration(time.monotonic() - self._since)}"

  def __rich__(self) -> rich.text.Text:
    return rich.text.Text(str(self))


@contextlib.contextmanager
def timed(line: str, say: Callable[[str], Any], *, every: float = 30.0) -> Iterator[None]:
  """Says a line, and while the block lasts how long it has taken so far.

  Args:
    line: what happens in the block.
    say: called with each line, from another thread too.
    every: seconds between two lines; after four of them twice as many, since minutes are whole.
  """
  say(line)
  elapsed, ended = _Elapsed(line), threading.Event()

  def tell() -> None:
    said = 0
    while not ended.wait(every if said < 4 else 2 * every):
      say(f"{elapsed} so far")
      said += 1

  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    ended.set()
    teller.join()


def telling(rows: Iterable[Mapping[str, Any]], *, count: int) -> list[Mapping[str, Any]]:
  """The samples of a step to show: first the problems whose responses earned differently.

  A group in which all earned the same teaches nothing, and shows nothing of what is learned. A
  group that is too long is shown by its best and its worst responses, in their order:

  >>> earned = [("a", 0), ("a", 0), ("b", 0), ("b", 0), ("b", 1), ("b", 0)]
  >>> rows = [{"problem": problem, "reward": reward} for problem, reward in earned]
  >>> [(row["problem"], row["reward"]) for row in telling(rows, count=3)]
  [('b', 0), ('b', 1), ('b', 0)]

  Args:
    rows: of samples.jsonl, of one step.
    count: how many at most.
  """
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(str(row.get("problem", row.get("prompt"))), []).append(row)
  kept: list[Mapping[str, Any]] = []
  for group in sorted(groups.values(), key=lambda group: not _differ(group)):
    room = count - len(kept)
    if len(group) > room and _differ(group):
      best_first = sorted(range(len(group)), key=lambda i: _earned(group[i]), reverse=True)
      ends = best_first[: room - room // 2] + best_first[len(group) - room // 2 :]
      group = [group[i] for i in sorted(ends)]
    kept += group[:room]
  return kept


def _earned(row: Mapping[str, Any]) -> float:
  """The reward; a response whose grade failed is below all."""
  reward = row.get("reward")
  return reward if isinstance(reward, (int, float)) else float("-inf")


def _differ(group: Iterable[Mapping[str, Any]]) -> bool:
  return len({row.get("reward") for row in group}) > 1


def _notebook(stream: TextIO) -> Callable[[str, float], None] | None:
  """A function that shows a line and a bar in a notebook, in the place of the last one; or None."""
  shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
  if stream is not sys.stdout or type(shell).__name__ != "ZMQInteractiveShell":
    return None
  from IPython.display import display

  handle = display({"text/plain": ""}, raw=True, display_id=True)

  def show(line: str, share: float) -> None:
    bar = f'<progress max="1" value="{share:.4f}" style="width:100%"></progress>'
    page = f"{bar}<br><code>{html.escape(line)}</code>"
    handle.update({"text/plain": line, "text/html": page}, raw=True)

  return show


class Console:
  """Shows a run on a stream. Flushes everything at once, so an interrupted run loses no output.

  On a terminal, a progress bar with the latest figures stays at the bottom, and other lines scroll
  above it. In a notebook the latest figures replace those before. Anywhere else (a pipe, a file, a
  dumb terminal), each step is one plain line.

      with Console(total_steps=100) as console:
        console.say("compiling on 2 CPU cores")
        console.step(1, {"reward_mean": 0.25, "time/step": 2.0})

  Args:
    stream: where to write; standard output if None.
    total_steps: steps of the whole run, for the progress bar and the time left.
  """

  def __init__(self, stream: TextIO | None = None, *, total_steps: int):
    self._stream = sys.stdout if stream is None else stream
    self._encoding = getattr(self._stream, "encoding", None) or "utf-8"
    self._total_steps = total_steps
    self._seconds: list[float] = []  # of the last steps, for the time left
    terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
    self._rich = rich.console.Console(
      file=self._stream,
      force_terminal=terminal,
      force_jupyter=False,
      width=None if terminal else 80,
      color_system="auto" if terminal else None,
      markup=False,
      highlight=False,
      emoji=False,
    )
    self._live, self._figures_shown = None, None
    self._timed: set[str] = set()
    self._notebook = _notebook(self._stream)
    if terminal:
      self._bar = rich.progress.Progress(
        rich.progress.SpinnerColumn("line"),
        rich.progress.TextColumn("step {task.completed}/{task.total}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TimeElapsedColumn(),
        expand=True,
      )
      self._task = self._bar.add_task("", total=total_steps)
      self._live = rich.live.Live(self._bar, console=self._rich, refresh_per_second=4)
      self._live.start()

  def __enter__(self) -> Console:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Leaves the last state of the display on the screen, and the terminal as it was."""
    if self._live is not None:
      self._live.stop()
      self._live = None
    self._stream.flush()

  def say(self, line: str) -> None:
    """Shows a line (or several) in full and literally.

    Args:
      line: any text.
    """
    self._rich.print(self._text(line, keep_newlines=True), soft_wrap=True)
    self._stream.flush()

  @contextlib.contextmanager
  def timed(self, line: str, *, every: float = 30.0) -> Iterator[None]:
    """Shows a line, and how long the block takes while it lasts; nothing if it was shown before.

    Args:
      line: what happens in the block, such as a compilation, which is done once.
      every: seconds between two lines where there is no live view.
    """
    if line in self._timed:
      yield
      return
    self._timed.add(line)
    if not self._live:
      with timed(line, self.say, every=every):
        yield
      return
    self.say(line)
    self._live.update(rich.console.Group(self._bar, _Elapsed(printable(line))))
    try:
      yield
    finally:
      if self._live:
        self._live.update(self._figures_shown or self._bar)

  def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Shows a table that fits the screen: texts wrap, numbers are right-aligned.

    Args:
      title: its heading.
      columns: names of the columns.
      rows: one sequence of cells per row; a cell is a text, a number or None, or a text in colours
        that is printable already.
    """
    rows = [list(row) for row in rows]
    table = rich.table.Table(
      title=self._text(title), title_justify="left", box=rich.box.HORIZONTALS, show_lines=True
    )
    for index, column in enumerate(columns):
      texts = str | rich.text.Text
      numeric = bool(rows) and not any(isinstance(row[index], texts) for row in rows)
      justify = "right" if numeric else "left"
      table.add_column(self._text(column), justify=justify, no_wrap=numeric, overflow="fold")
    for row in rows:
      table.add_row(*(self._cell(cell) for cell in row))
    self._rich.print(table)
    self._stream.flush()

  def sizes(self, values: Mapping[str, Any]) -> None:
    """Shows the sizes that follow from the config: a wrong setting is easiest to see there.

    Args:
      values: name -> size, such as "problems per step", "responses per problem", "microbatch".
    """
    width = max(map(len, values), default=0)
    self.say("\n".join(f"  {name:<{width}}  {value}" for name, value in values.items()))

  def samples(self, step: int, rows: Iterable[Mapping[str, Any]], *, count: int = 4) -> None:
    """Shows what the model wrote: prompt, response, reward, advantage, of a group with spread.

    Args:
      step: the step they were sampled in.
      rows: rows of samples.jsonl; a reward that failed shows its status.
      count: the most rows to show.
    """
    cells = [
      (
        row["prompt"],
        self._response(row),
        row["status"] if row.get("reward") is None else row["reward"],
        row.get("advantage"),
      )
      for row in telling(rows, count=count)
    ]
    self.table(f"samples of step {step}", ("prompt", "response", "reward", "advantage"), cells)

  def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows the held-out accuracies, losses and divergences of a step.

    Args:
      step: how many steps the evaluated weights have been trained.
      metrics: a line of metrics.jsonl, or its part with the keys "eval/...".
    """
    for kind in ("sampled", "greedy", "pair"):
      if metrics.get(f"eval/{kind}_accuracy") is not None:
        low, high = (number(metrics.get(f"eval/{kind}_{end}"), 2) for end in ("low", "high"))
        accuracy = number(metrics[f"eval/{kind}_accuracy"], 2)
        self.say(f"step {step} held-out accuracy, {kind}: {accuracy} (95% {low} to {high})")
    for key in sorted(metrics):
      if key.startswith("eval/") and key.endswith(("_loss", "_auc", "_kl")):
        name = key.removeprefix("eval/").replace("_", " ")
        self.say(f"step {step} held-out {name}: {number(metrics[key])}")
    if self._live is not None:
      self._bar.update(self._task, completed=step)

  def step(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows a finished step.

    Args:
      step: its number, of `total_steps`.
      metrics: its line of metrics.jsonl; figures it lacks are left out.
    """
    figures = self._figures(step, metrics)
    line = f"step {step}/{self._total_steps} {figures}"
    if self._live is not None:
      self._bar.update(self._task, completed=step)
      self._figures_shown = rich.console.Group(self._bar, self._text(figures))
      self._live.update(self._figures_shown)
    elif self._notebook:
      self._notebook(printable(line), min(1.0, step / max(1, self._total_steps)))
    else:
      self.say(line)

  def _figures(self, step: int, metrics: Mapping[str, Any]) -> str:
    names = {
      "reward": "reward_mean",
      "accuracy": "accuracy",
      "loss": "loss",
      "pair accuracy": "pair_accuracy",
      "margin": "margin",
      "length": "response_length_mean",
      "entropy": "entropy",
    }
    if metrics.get("reward_mean") is not None:
      del names["loss"]  # It stays near 0, however well a policy learns.
    parts = [
      f"{name} {number(metrics[key], 2 if name != 'length' else 3)}"
      for name, key in names.items()
      if metrics.get(key) is not None
    ]
    if metrics.get("time/step") is not None:
      self._seconds = [*self._seconds[-9:], float(metrics["time/step"])]
      left = sum(self._seconds) / len(self._seconds) * max(self._total_steps - step, 0)
      parts += [f"{number(self._seconds[-1], 2)}s/step", f"ETA {duration(left)}"]
    return " ".join(parts)

  def _response(self, row: Mapping[str, Any]) -> str | rich.text.Text:
    """What the model wrote; of an episode its turns and what the environment said to them."""
    if not row.get("turns"):
      return row["response"]
    said = []
    for turn in row["turns"]:
      said += [
        self._text(turn["text"], limit=240),
        self._text(turn.get("observation", ""), limit=240),
      ]
      said[-2].stylize(TRAINED)
      said[-1].stylize(UNTRAINED)
    return rich.text.Text("\n").join(text for text in said if text)

  def _cell(self, cell: Any) -> rich.text.Text:
    if isinstance(cell, rich.text.Text):
      return cell
    return self._text(cell if isinstance(cell, str) else number(cell), limit=240)

  def _text(self, text: str, **how: Any) -> rich.text.Text:
    shown = printable(text, **how)
    return rich.text.Text(shown.encode(self._encoding, "backslashreplace").decode(self._encoding))
