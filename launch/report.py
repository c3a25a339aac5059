"""What came of a sweep: one table, and one HTML file with its curves that can be mailed.

  python -m launch.report runs/sweep-grpo_tiny
  python -m launch.report runs/sweep-grpo_tiny --figure=sweep.svg

Trials that differ in their seed alone are one line: mean and 95 % interval over seeds, which is
never narrower than a single evaluation's own. Only settings that vary are shown. In the directory
it writes report.csv (a line per trial), report.md (the table) and report.html: the table, the
curves of all settings over one another and of each, by a metric that is chosen on the page, and
links to the trials' own reports with their samples. It only reads the trials' files, so it can run
at any time.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.report_page import View, as_html, draw
from launch.results import Group, Row, checked_metric, grouped, read_trials, rows_of, shown
from launch.sweep import varying
from rl_llm.errors import ConfigError, UserError, redact
from rl_llm.files import write_atomically
from rl_llm.runs.config import option, run
from rl_llm.runs.formatting import duration, number, printable
from rl_llm.runs.metrics import RecordError
from rl_llm.runs.report import write_report

METRICS_SHOWN = 4  # on the page, the one that was asked for first


@dataclasses.dataclass(frozen=True)
class Config:
  """Which sweep."""

  workdir: str = option("", "the sweep's directory; may be given without --workdir=")
  metric: str = option("", "key of metrics.jsonl to compare by; empty = held-out accuracy, or loss")
  figure: str = option("", "a file.svg or .png for what each setting does; needs the extra plot")


def table(paths: Sequence[str], groups: Sequence[Group], metric: str) -> list[list[str]]:
  """Header and lines of the table."""
  lines = [[*paths, metric.removeprefix("eval/"), "95 %", "n", "status", "steps", "time"]]
  for group in groups:
    counts = Counter(row.status for row in group.rows)
    status = ", ".join(
      word if len(counts) == 1 else f"{count} {word}" for word, count in sorted(counts.items())
    )
    steps = [row.step or 0 for row in group.rows]
    lines.append(
      [
        *(shown(group.settings[path]) for path in paths),
        number(group.mean),
        f"±{number(group.half, 2)}" if group.half is not None else "-",
        str(sum(row.value is not None for row in group.rows)),
        status,
        "-".join(map(str, sorted({min(steps), max(steps)}))),
        duration(statistics.fmean(row.seconds for row in group.rows)),
      ]
    )
  return lines


def as_text(lines: Sequence[Sequence[str]]) -> str:
  """The table in columns."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
    for line in lines
  )


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
  """The table in Markdown."""
  rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
  return "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])


def failures(rows: Sequence[Row]) -> list[str]:
  """Why trials failed, in their last words."""
  lines = []
  for row in rows:
    if row.error:
      lines += [f"{row.id} {row.status}: {row.error[0]}", *(f"  | {x}" for x in row.error[1:])]
  return lines


def as_csv(rows: Sequence[Row], metric: str) -> str:
  """One line per trial."""
  paths = varying([row.config for row in rows])
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(["trial", *paths, metric, "status", "step", "steps", "seconds", "error"])
  for row in rows:
    writer.writerow(
      [
        row.id,
        *(row.config.get(path) for path in paths),
        row.value,
        row.status,
        row.step,
        row.steps,
        row.seconds,
        "\n".join(row.error),
      ]
    )
  return text.getvalue()


def write_own(directory: Path) -> None:
  """Writes the report of one trial.

  Raises:
    RecordError: a file of it is broken.
  """
  try:
    write_report(directory)
  except UserError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    said = f"a line lacks {error}" if isinstance(error, KeyError) else error
    raise RecordError(f"{directory}: its report cannot be written: {said}") from None


def write(workdir: Path, *, metric: str, figure: str = "") -> str:
  """Writes report.csv, report.md, report.html and the figure; gives the table as text."""
  trials = read_trials(workdir)
  metric = checked_metric(trials, metric)
  rows = rows_of(trials, metric)
  for row in rows:
    if row.status not in ("done", "running") and row.step is not None:
      write_own(row.directory)  # A trial that never finished has not written its own report.
  paths, groups = grouped(rows, metric)
  lines = table(paths, groups, metric)
  views = [View(metric, lines, paths, groups, rows)]
  for other in trials.metrics():
    if other != metric and len(views) < METRICS_SHOWN:
      own = rows_of(trials, other)
      views.append(View(other, table(*(of := grouped(own, other)), other), *of, own))
  why = failures(rows)
  name = workdir.resolve().name
  markdown = [f"# {name}", "", as_markdown(lines), ""]
  markdown += ["```", *why, "```", ""] if why else []
  for file, text in (
    ("report.csv", as_csv(rows, metric)),
    ("report.md", "\n".join(markdown)),
    ("report.html", as_html(name, views)),
  ):
    write_atomically(workdir / file, redact(text).encode("utf-8", "backslashreplace"))
  if figure:
    draw(paths, groups, metric, figure)
  return printable("\n".join([as_text(lines), *why]), keep_newlines=True)


def main(config: Config) -> int:
  workdir = Path(config.workdir)
  if not config.workdir:
    raise ConfigError("workdir", "", "the directory of a sweep", "python -m launch.report DIR")
  try:
    print(write(workdir, metric=config.metric, figure=config.figure))
  except OSError as error:
    field = "figure" if error.filename == config.figure else "workdir"
    raise ConfigError(
      field,
      getattr(config, field),
      "where files can be read and written",
      f"{error.filename}: {error.strerror}",
    ) from None
  print(f"curves: {workdir / 'report.html'}")
  return 0


def arguments(argv: Sequence[str]) -> list[str]:
  """A directory given bare is --workdir.

  >>> arguments(["report.py", "runs/x", "--metric=loss"])
  ['report.py', '--workdir=runs/x', '--metric=loss']
  """
  if len(argv) > 1 and not argv[1].startswith("-"):
    return [argv[0], f"--workdir={argv[1]}", *argv[2:]]
  return list(argv)


if __name__ == "__main__":
  run(main, Config, argv=arguments(sys.argv))
